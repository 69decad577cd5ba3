"""A method cut to fit a small model, so that every branch of it is taken there.

In a vocabulary of four, `top(32)` is the whole vocabulary, no entropy reaches 2 nats and no response
four tokens; a method measured as written would be another one. Sets keep fewer entries than there
are tokens, shifts stay within the response, and a threshold that no value of the model crosses
moves to the middle of the values. What was changed is said in notes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from opdsl.ir.program import rewrite
from opdsl.meaning.graph import nodes_below, static_value
from opdsl.meaning.node import COUPLING_OPS, Builder, Node
from opdsl.meaning.quantity import Axis
from opdsl.meaning.spec import Spec, Support, Term
from opdsl.records import replace

Values = Callable[[Node], "np.ndarray | None"]
ALONG = frozenset(
    {"scan", "scan_fwd", "shift", "sum_t", "max_t", "rank_t"}
)  # couplings within one response


@dataclass(frozen=True)
class Fitted:
    spec: Spec
    notes: tuple[str, ...]


def fitted(spec: Spec, values: Values, vocab: int, cap: int) -> Fitted:
    """The method for models of `vocab` tokens and responses of at most `cap`.

    Raises Twice. values(node): what the node is in a random small model, None where it cannot be told there.
    """
    check_chances(spec)
    b, notes = spec.builder, []
    roots = [n for t in spec.terms for n in (t.loss, t.gate, t.weight)]
    moved = _thresholds(roots, values)

    def change(n: Node, args: tuple[Node, ...]) -> Node | None:
        if n.op == "where" and _by_chance(n.args[0]):
            notes.append("a chance counts as its probability")
            p, one = _probability(b, args[0]), b.const(1.0)
            return b.add(b.mul(p, args[1]), b.mul(b.sub(one, p), args[2]))
        if n.op in ("top", "top_p"):
            k = int(n.attr("k"))  # type: ignore[call-overload]
            if k >= vocab and n.op == "top":
                notes.append(f"top({k}) is top({vocab - 1})")
                return _with(b, n, args, "k", vocab - 1)
        if n.op == "shift" and abs(int(n.attr("n"))) >= cap > 1:  # type: ignore[call-overload]
            k = int(n.attr("n"))  # type: ignore[call-overload]
            notes.append(f"{abs(k)} tokens away is {cap - 1}")
            return _with(b, n, args, "n", cap - 1 if k > 0 else 1 - cap)
        if n.id in moved:
            side, value = moved[n.id]
            old = static_value(n.args[side])
            notes.append(f"the threshold {old:g} is {value:.3g}")
            new = b.const(value, n.args[side].q.unit)
            return b.make(n.op, (new, args[1]) if side == 0 else (args[0], new), n.q)
        return None

    def go(n: Node | None) -> Node | None:
        return None if n is None else rewrite(b, n, change)

    terms = tuple(_term(t, go) for t in spec.terms)
    return Fitted(replace(spec, terms=terms), tuple(dict.fromkeys(notes)))


class Twice(ValueError):
    """One draw of a chance decides two factors of a term: no mean of either says the product."""


def check_chances(spec: Spec) -> None:
    """Raises Twice."""
    for t in spec.terms:
        seen: set[int] = set()
        for n in nodes_below([t.loss, t.gate, t.weight]):
            if n.op == "where" and _by_chance(n.args[0]):
                drawn = {x.id for x in nodes_below([n.args[0]]) if _is_noise(x)}
                if seen & drawn:
                    raise Twice("one chance decides two factors of a term")
                seen |= drawn


def _is_noise(n: Node) -> bool:
    return n.op == "input" and n.attr("name") == "noise"


def _by_chance(test: Node) -> bool:
    return test.q.axis < Axis.VOCAB and any(_is_noise(x) for x in nodes_below([test]))


def _probability(b: Builder, test: Node) -> Node:
    """That a condition holds, over its independent draws."""
    one, zero = b.const(1.0), b.const(0.0)
    match test.op:
        case "lt" if _is_noise(test.args[0]):
            return b.minimum(b.maximum(test.args[1], zero), one)
        case "not":
            return b.sub(one, _probability(b, test.args[0]))
        case "and":
            return b.mul(_probability(b, test.args[0]), _probability(b, test.args[1]))
        case "or":
            miss = [b.sub(one, _probability(b, a)) for a in test.args]
            return b.sub(one, b.mul(*miss))
    return b.where(test, one, zero)


def _with(b: Builder, node: Node, args: tuple[Node, ...], name: str, value: int) -> Node:
    return b.make(node.op, args, node.q, **{**dict(node.attrs), name: value})


def _term(t: Term, go: Callable) -> Term:
    s = t.support
    how = replace(
        t.routing,
        trigger=go(t.routing.trigger),
        candidates=go(t.routing.candidates),
        routable=go(t.routing.routable),
    )
    return replace(
        t,
        support=Support(go(s.set), go(s.base), s.tail),
        loss=go(t.loss),
        gate=go(t.gate),
        weight=go(t.weight),
        signal=go(t.signal),
        advantage=go(t.advantage),
        routing=how,
    )


def _thresholds(roots: list[Node], values: Values) -> dict[int, tuple[int, float]]:
    """Comparison -> (which side is the threshold, where it has to be)."""
    out: dict[int, tuple[int, float]] = {}
    for n in nodes_below(roots):
        if n.op not in ("lt", "le"):
            continue
        fixed = [static_value(a) for a in n.args]
        if (fixed[0] is None) == (fixed[1] is None) or _certain(n):
            continue
        side = 0 if fixed[0] is not None else 1
        free = n.args[1 - side]
        if not free.q.axis or any(
            x.op in COUPLING_OPS and x.op not in ALONG for x in nodes_below([free])
        ):
            continue
        x = values(free)
        if x is None:
            continue
        x = np.asarray(x, float)
        x = x[np.isfinite(x)]
        bound = fixed[side]
        if x.size < 2 or np.ptp(x) < 1e-6 or abs(bound) > 1e6:  # a guard, not a threshold
            continue
        if (x < bound).all() or (x > bound).all() or (n.op == "le" and (x <= bound).all()):
            out[n.id] = (side, _inside(x, bool((x > bound).all())))
    return out


def _inside(x: np.ndarray, low: bool) -> float:
    """A number with values on both sides; counts are cut at their end, so that most stay."""
    u = np.unique(x)
    if np.all(u == np.round(u)):
        return float(u[1] if low else u[-1])
    i = int(np.clip(np.searchsorted(u, np.median(x)), 1, len(u) - 1))
    return float((u[i - 1] + u[i]) / 2)


def _certain(n: Node) -> bool:
    """Ranges alone say what the comparison gives."""
    a, b = n.args[0].q, n.args[1].q
    if n.op == "lt":
        return a.high < b.low or a.low >= b.high
    return a.high <= b.low or a.low > b.high
