"""The push of a token's term on its logits: Δz = −∂L/∂z, "where the mass goes", as a formula.

With c = −∂L/∂log π the descent step on the logits is Δz = c − (Σ_v c) π, over the temperature the
student is read at (theory §3.3, §9.1). It adds up to zero over the vocabulary, so it is also the
one coefficient field in which nothing cancels: A (e_y − π) for a sampled score, m (ρ − e_y) for a
routed one, π_T − π for KL(π_T ‖ π), π(v) (K − ℓ(v)) for KL(π ‖ π_T).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from opdsl.formula.algebra import Atom, Poly, leaf, plus, scaled, single, times
from opdsl.formula.naming import Names
from opdsl.formula.notation import ZERO, Add, Call, Ind, Math, Rel, Sym, add, mul, unicode
from opdsl.formula.recognise import recognised, unmixed
from opdsl.ir.derive import Cotangent, cotangents
from opdsl.ir.program import expand_tails
from opdsl.meaning.node import Node
from opdsl.meaning.spec import Term


@dataclass(frozen=True, slots=True)
class Push:
    """Δz of one term, without the gates and weights that only multiply it."""

    term: str
    left: Math  # Δz, or Δz(v)
    right: Math


@dataclass(frozen=True, slots=True)
class Pieces:
    """c of one term: what stands at every entry of a set (None: of the vocabulary) and at y."""

    own: Atom  # π(v) at the temperature of the logits
    entries: tuple[tuple[Node | None, Poly], ...]
    y: Poly
    temperature: float


def push(names: Names, term: Term) -> Push:
    """Δz of a term. Its gate and weight are part of it only where a gradient flows through them."""
    b, loss = names.spec.builder, term.loss
    if term.gate.q.live or term.weight.q.live:
        loss = b.mul(b.mul(term.weight, term.gate), loss)
    old, names.printer.star = names.printer.star, term.rows == "golden"
    try:
        found = [pieces(names, c) for c in cotangents(b, expand_tails(b, loss))]
        left, right = _written(names, found)
    finally:
        names.printer.star = old
    return Push(term.name, left, right)


def pieces(names: Names, c: Cotangent) -> Pieces:
    """c = −g of one cotangent; multiples of π(v) on the vocabulary cancel and are left out."""
    normal = names.printer.normal
    own = Atom("P", leaf(str(c.leaf.attr("dist")), c.temperature), "v")
    entries: list[tuple[Node | None, Poly]] = []
    if c.dense is not None:
        dense = unmixed(normal.poly(c.dense, "v"))
        kept = {m: -k for m, k in dense.items() if _entry(m) != frozenset({(own, 1.0)})}
        entries.append((None, kept))
    entries += [(s, scaled(unmixed(normal.poly(x, "v")), -1.0)) for s, x in c.at_sets]
    y = {} if c.at_y is None else scaled(normal.poly(c.at_y), -1.0)
    return Pieces(own, tuple((s, p) for s, p in entries if p), y, c.temperature)


def _entry(m: frozenset) -> frozenset:
    return frozenset((x, p) for x, p in m if x.varies)


# ---- layouts ---------------------------------------------------------------------------------


def _written(names: Names, found: list[Pieces]) -> tuple[Math, Math]:
    """As a vector of letters where every part is one, otherwise entry by entry, whichever of a
    few layouts is the shortest."""
    letter = Sym("Δz", r"\Delta z")
    vector = _vector(names, found)
    if vector is not None:
        return letter, vector
    whole = add([part for c in found for part in _entrywise(names, c)])
    if len(found) == 1 or any(c.y for c in found):
        whole = min(whole, _together(names, found), key=lambda m: len(unicode(m)))
    return Call(letter, (Sym("v", "v"),)), whole


def _entrywise(names: Names, c: Pieces) -> list[tuple[bool, Math]]:
    """What the entries and what the sampled token add, one beside the other."""
    parts: list[tuple[bool, Math]] = []
    if c.entries:
        alone = replace(c, y={})
        tries = [_together(names, [alone]), _apart(names, alone), _by_case(names, alone)]
        parts.append((True, min((m for m in tries if m), key=lambda m: len(unicode(m)))))
    if c.y:
        mark = Ind(Rel("=", Sym("v", "v"), names.printer.index("y")))
        gap = add([(True, mark), (False, names.printer.entry(single(c.own)))])
        parts.append(_signed(names.printer.entry(scaled(c.y, 1 / c.temperature)), gap))
    return parts


def _vector(names: Names, found: list[Pieces]) -> Math | None:
    """A (e_y − π) + m (ρ − e_y): every entry is one letter, or the same number."""
    whole: Poly = {}
    for c in found:
        total = c.y
        part: Poly = dict(times(c.y, single(Atom("e", "y"))))
        for s, p in c.entries:
            if not all(_is_letter(names, m, s) for m in p):
                return None
            part = plus(part, _unindexed(p))
            total = plus(total, _summed(names, p, s))
        own = single(Atom("P", c.own.key))
        whole = plus(whole, plus(part, times(total, own), -1.0), 1 / c.temperature)
    if not whole:
        return ZERO
    written = names.printer.poly(whole)
    if len(found) == 1 and not found[0].entries:  # only y: one factor times e_y − π
        (c,) = found
        gap = plus(single(Atom("e", "y")), single(Atom("P", c.own.key)), -1.0)
        sign, product = _signed(
            names.printer.poly(scaled(c.y, 1 / c.temperature)), names.printer.poly(gap)
        )
        product = add([(sign, product)])
        return min(product, written, key=lambda m: len(unicode(m)) - (m is product))
    return written


def _is_letter(names: Names, m: frozenset, s: Node | None) -> bool:
    entry = _entry(m)
    if not entry:
        return _is_full(s)
    if len(entry) != 1:
        return False
    ((x, p),) = entry
    everywhere = _is_full(s) or x.key in names.targets
    return p == 1 and everywhere and (x.kind == "named" or (x.kind == "P" and x.key[0] == "leaf"))  # type: ignore[index]


def _unindexed(a: Poly) -> Poly:
    """π_T(v), ρ_t(v) as vectors."""
    return {
        frozenset((Atom(x.kind, x.key) if x.kind in ("named", "P") and x.varies else x, p)
                  for x, p in m): c
        for m, c in a.items()
    }  # fmt: skip


def _together(names: Names, found: list[Pieces]) -> Math:
    """One polynomial, split into the cases of its conditions."""
    out: Poly = {}
    for c in found:
        part = times(c.y, single(Atom("ind", "y", "v")))
        total = dict(c.y)
        for s, p in c.entries:
            part = plus(part, times(_inside(names, s), p))
            total = plus(total, _summed(names, p, s))
        part = plus(part, times(_tidy(names, total, c), single(c.own)), -1.0)
        out = plus(out, part, 1 / c.temperature)
    return names.printer.entry(out)


def _apart(names: Names, c: Pieces) -> Math:
    """The entries of each set, and what every entry gives up for them."""
    k, printer = 1 / c.temperature, names.printer
    shared = all(_has(m, c.own) for _, p in c.entries for m in p)
    inner: list[tuple[bool, Math]] = []
    total: Poly = {}
    for s, p in c.entries:
        total = plus(total, _summed(names, p, s))
        inner.append(_marked(names, s, scaled(_less(p, c.own) if shared else p, k)))
    total = _tidy(names, total, c)
    if total:
        part = total if shared else times(total, single(c.own))
        inner.append((True, printer.entry(scaled(part, -k))))
    whole = add(inner)
    return add([_signed(whole, printer.entry(single(c.own)), True)]) if shared else whole


def _by_case(names: Names, c: Pieces) -> Math | None:
    """π(v) (what holds everywhere + 1[v ∈ Ω] … + 1[v ∉ Ω] …) for a term on one cut support."""
    if len(c.entries) != 1:
        return None
    ((s, p),) = c.entries
    if _is_full(s) or not all(_has(m, c.own) for m in p):
        return None
    outside = scaled(_tidy(names, _summed(names, p, s), c), -1.0)
    inside = plus(_less(p, c.own), outside)
    both = {m: k for m, k in inside.items() if abs(outside.get(m, 0.0) - k) < 1e-12}
    k, printer = 1 / c.temperature, names.printer
    items = [(True, printer.entry(scaled(both, k)))]
    for part, op in ((plus(inside, both, -1.0), "∈"), (plus(outside, both, -1.0), "∉")):
        if part:
            items.append(_marked(names, s, scaled(part, k), op))
    return add([_signed(add(items), printer.entry(single(c.own)), True)])


def _marked(names: Names, s: Node | None, a: Poly, op: str = "∈") -> tuple[bool, Math]:
    value = names.printer.entry(a)
    place = None if s is None else names.symbols.set(s)
    if place is None:
        return True, value
    return _signed(value, Ind(Rel(op, Sym("v", "v"), place)), front=True)


def _signed(value: Math, factor: Math, front: bool = False) -> tuple[bool, Math]:
    """A product; a minus sign in front of the value moves before it."""
    sign = True
    items = value.items if isinstance(value, Add) else ()
    if items and not any(s for s, _ in items):
        sign, value = False, add([(True, x) for _, x in items])
    elif len(items) == 1:
        value = items[0][1]
    return sign, mul([factor, value] if front else [value, factor])


# ---- sums --------------------------------------------------------------------------------------


def _is_full(s: Node | None) -> bool:
    return s is None or s.op == "full"


def _has(m: frozenset, x: Atom) -> bool:
    return any(a == x and p >= 1 for a, p in m)


def _less(a: Poly, x: Atom) -> Poly:
    """A polynomial over one of its factors."""
    return times(a, single(x, -1.0))


def _inside(names: Names, s: Node | None) -> Poly:
    if _is_full(s):
        return {frozenset(): 1.0}
    return single(Atom("in", names.printer.normal.set_id(s), "v"))


def _summed(names: Names, a: Poly, s: Node | None) -> Poly:
    """Σ_v of entries; a routing's target is a distribution over its candidates."""
    normal = names.printer.normal
    out: Poly = {}
    for m, c in a.items():
        entry = _entry(m)
        target = len(entry) == 1 and next(iter(entry))[0].key in names.targets
        whole = names.spec.builder.set_("full") if s is None else s
        one = {m - entry: c} if target else normal.summed({m: c}, whole)
        out = plus(out, one)
    return out


def _tidy(names: Names, total: Poly, c: Pieces) -> Poly:
    """Σ c with sums over a set and its bucket taken together, and divergences by name."""
    normal = names.printer.normal
    for s, _ in c.entries:
        if s is not None and any(x.at == "rest" for m in total for x, _ in m):
            total = _with_rest(normal, total, s, names.spec.builder.set_("with_bin", (s,)))
    return recognised(total)


def _with_rest(normal, total: Poly, s: Node, bucket: Node) -> Poly:
    """Σ_{v ∈ Ω} p(v) = 1 − p(rest), and Σ_{v ∈ Ω} x(v) + x(rest) = Σ_{v ∈ Ω⁺} x(v)."""
    out = dict(total)
    for m, k in total.items():
        inner = [x for x, p in m if x.kind == "sum" and p == 1 and x.key[0] == s.id]  # type: ignore[index]
        if len(inner) != 1:
            continue
        outer, body = m - {(inner[0], 1.0)}, inner[0].key[1]  # type: ignore[index]
        if len(body) == 1:
            ((x, p),) = body
            if x.kind == "P" and p == 1 and x.key[0] == "leaf":  # type: ignore[index]
                out.pop(m)
                rest = single(Atom("P", ("bin", x.key, s.id), "rest"))
                out = plus(out, times({outer: k}, plus({frozenset(): 1.0}, rest, -1.0)))
    for m, k in dict(out).items():
        inner = [x for x, p in m if x.kind == "sum" and p == 1 and x.key[0] == s.id]  # type: ignore[index]
        if len(inner) != 1:
            continue
        outer, body = m - {(inner[0], 1.0)}, inner[0].key[1]  # type: ignore[index]
        moved = frozenset((Atom(x.kind, ("bin", x.key, s.id), "rest"), p) for x, p in body)
        partner = times({outer: 1.0}, {moved: 1.0})
        ((pm, _),) = partner.items()
        if all(x.kind in ("P", "L") for x, _ in body) and abs(out.get(pm, 0.0) - k) < 1e-12:
            out.pop(m), out.pop(pm)
            both = single(Atom("sum", (normal.set_id(bucket), body)))
            out = plus(out, times({outer: k}, both))
    return out


__all__ = ["Push", "push"]
