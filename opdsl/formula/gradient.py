"""The coefficient field of a term, c_t(v) = −∂L/∂log π_θ(v), from the derivatives of the IR.

The logit gradient is ∂L/∂z = (Σ_v c) π − c. On the whole vocabulary a multiple of π_θ(v) that is
the same for every v changes nothing, so it is not printed (theory §3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

from opdsl.formula.algebra import Atom, Poly, plus, scaled, single, times
from opdsl.formula.naming import Names
from opdsl.formula.notation import Add, Call, Ind, Math, Rel, Sym, add, mul
from opdsl.formula.recognise import recognised, unmixed
from opdsl.ir.derive import Cotangent, cotangents
from opdsl.ir.program import expand_tails
from opdsl.meaning.node import Node
from opdsl.meaning.spec import Term

STEP = "∂L/∂z = (Σ_v c) π_θ − c"


@dataclass(frozen=True, slots=True)
class Field:
    """c of one term for one temperature of the student. left: `c_t` or `c_t(v)`."""

    term: str
    left: Math
    right: Math
    place: Math | None  # where it acts, if not everywhere
    shifted: bool  # a state constant times π_θ(v) was left out
    temperature: float = 1.0


def fields(names: Names, term: Term) -> list[Field]:
    """The coefficient fields of a term, one for each temperature the student is read at."""
    b = names.spec.builder
    loss = term.loss
    if term.gate.q.live or term.weight.q.live:
        loss = b.mul(b.mul(term.weight, term.gate), loss)
    old, names.printer.star = names.printer.star, term.rows == "golden"
    try:
        return [_field(names, term, c) for c in cotangents(b, expand_tails(b, loss))]
    finally:
        names.printer.star = old


def _field(names: Names, term: Term, c: Cotangent) -> Field:
    normal = names.printer.normal
    parts: list[tuple[Node | None, Poly]] = []
    if c.dense is not None:
        parts.append((None, unmixed(normal.poly(c.dense, "v"))))
    parts += [(s, unmixed(normal.poly(x, "v"))) for s, x in c.at_sets]
    own = Atom("P", ("leaf", c.leaf.attr("dist"), c.leaf.attr("temperature"), False), "v")
    shifted = False
    if c.dense is not None:
        kept = {m: k for m, k in parts[0][1].items() if _entry(m) != frozenset({(own, 1.0)})}
        shifted = len(kept) < len(parts[0][1])
        parts[0] = None, kept
    parts = [(s, p) for s, p in parts if p]
    vector = all(_simple(names, m, s) for s, p in parts for m in p)
    if vector:
        parts = [(s, _unindexed(p)) for s, p in parts]
    place: Math | None = None
    y = None if c.at_y is None else normal.poly(c.at_y)
    if vector:
        total = scaled(times(y, single(Atom("e", "y"))), -1.0) if y else {}
        for _, p in parts:
            total = plus(total, p, -1.0)
        right = names.printer.poly(recognised(total))
    else:
        pieces: list[tuple[bool, Math]] = []
        for s, p in parts:
            value = names.printer.poly(recognised(scaled(p, -1.0)))
            mark = names.symbols.set(s) if s is not None else None
            inside = Rel("∈", Sym("v", "v"), mark) if mark is not None else None
            if inside is not None and len(parts) == 1 and not y:
                place = inside
            pieces.append(
                _signed([Ind(inside)] if inside is not None and place is None else [], value)
            )
        if y:
            test = Ind(Rel("=", Sym("v", "v"), names.printer.index("y")))
            value = names.printer.poly(scaled(y, -1.0))
            pieces.append(_signed([test], value))
        right = add(pieces)
    left: Math = Sym("c_t", "c_t")
    if not vector:
        left = Call(left, (Sym("v", "v"),))
    return Field(term.name, left, right, place, shifted, c.temperature)


def _signed(factors: list[Math], value: Math) -> tuple[bool, Math]:
    """A product with the sign of its last factor in front."""
    if isinstance(value, Add) and len(value.items) == 1:
        return value.items[0][0], mul([*factors, value.items[0][1]])
    return True, mul([*factors, value])


def _entry(m: frozenset) -> frozenset:
    return frozenset((x, p) for x, p in m if x.varies)


def _simple(names: Names, m: frozenset, s: Node | None) -> bool:
    """Whether an entry's part is one letter (ρ_t) or nothing (1/V), wherever it is read."""
    entry = _entry(m)
    everywhere = s is None or s.op == "full" or any(x.key in names.targets for x, _ in entry)
    return everywhere and (
        not entry or (len(entry) == 1 and all(x.kind == "named" for x, _ in entry))
    )


def _unindexed(a: Poly) -> Poly:
    """ρ_t(v) as the vector ρ_t."""
    return {
        frozenset((Atom(x.kind, x.key, "") if x.kind == "named" else x, p) for x, p in m): c
        for m, c in a.items()
    }
