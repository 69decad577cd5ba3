"""A normal form of node graphs: sums of products of named things.

Two spellings of one formula get one normal form: differences are multiplied out, logarithms of
ratios split, probabilities are exponentials of log-probabilities, Σ_v is linear, Σ_v p(v) is 1,
indicators multiply like conditions. What the algebra does not know stays as an opaque atom.

Entries of the vocabulary are read at an index: `v` (the running entry), `y` (the sampled token)
or `rest` (the bucket of a support with a bin).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from opdsl.formula.algebra import (
    Atom,
    Dist,
    Mono,
    Poly,
    atoms_of,
    constant,
    exponential,
    extent,
    frozen,
    held,
    in_order,
    key_text,
    leaf,
    level,
    mixed,
    mixture,
    normalized_on,
    only_dist,
    plus,
    power,
    scaled,
    single,
    times,
    weighed,
)
from opdsl.ir.derive import TAIL_FLOOR
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis

LIMIT = 96  # monomials; beyond it a value stays opaque
SIZE = 300  # atoms, nested ones included; likewise


# ---- from nodes ------------------------------------------------------------------------------


class Normal:
    """Normal forms of the nodes of one method.

    names: node id -> (±1, atom): quantities with a symbol of their own stay as they are.
    sets: id -> node of every index set met, for printing.
    """

    def __init__(self, names: dict[int, tuple[float, Atom]] | None = None):
        self.names = names or {}
        self.sets: dict[int, Node] = {}
        self.nodes: dict[int, Node] = {}
        self._memo: dict[tuple[int, str], Poly] = {}

    def poly(self, n: Node, at: str = "v") -> Poly:
        """The normal form of a node; VOCAB values are read at index `at`."""
        key = (n.id, at if n.q.axis is Axis.VOCAB else "")
        if key not in self._memo:
            if n.id in self.names:
                sign, atom = self.names[n.id]
                place = at if atom.at else ""
                found = scaled(single(Atom(atom.kind, atom.key, place)), sign)
            else:
                found = self._make(n, at)
                if len(found) > LIMIT or extent(found) > SIZE:
                    found = self.opaque(n, at)
            self._memo[key] = found
        return self._memo[key]

    def opaque(self, n: Node, at: str) -> Poly:
        self.nodes[n.id] = n
        return single(Atom("node", n.id, at if n.q.axis is Axis.VOCAB else ""))

    def _make(self, n: Node, at: str) -> Poly:
        rule: Callable[[Node, str], Poly | None] | None = getattr(self, f"_{n.op}", None)
        found = rule(n, at) if rule is not None else None
        return self.opaque(n, at) if found is None else found

    def set_id(self, s: Node) -> int:
        self.sets[s.id] = s
        return s.id

    # -- leaves ----------------------------------------------------------------------------
    def _const(self, n: Node, at: str) -> Poly:
        return constant(float(n.attr("value")))  # type: ignore[arg-type]

    def _input(self, n: Node, at: str) -> Poly | None:
        if n.attr("name") == "rollout_logp":
            return single(Atom("L", leaf("rollout"), "y"))
        return constant(1.0) if n.attr("name") == "one" else None

    def _logp(self, n: Node, at: str) -> Poly:
        temperature = float(n.attr("temperature"))  # type: ignore[arg-type]
        return single(Atom("L", leaf(str(n.attr("dist")), temperature), at))

    # -- gathers -----------------------------------------------------------------------------
    def _at_y(self, n: Node, at: str) -> Poly:
        return self.poly(n.args[0], "y")

    def _at_set(self, n: Node, at: str) -> Poly:
        return self.poly(n.args[0], at)

    def _head(self, n: Node, at: str) -> Poly:
        return self.poly(n.args[0], at)

    def _last(self, n: Node, at: str) -> Poly:
        return self.poly(n.args[0], "rest")

    def _put_set(self, n: Node, at: str) -> Poly:
        inside = Atom("in", self.set_id(n.args[1]), at)
        return times(single(inside), self.poly(n.args[0], at))

    def _add_bin(self, n: Node, at: str) -> Poly | None:
        inner = self.poly(n.args[0], "v")
        if at != "rest":
            return self.poly(n.args[0], at)
        dist = only_dist(inner)
        if dist is None:
            return None
        return single(Atom("L", ("bin", dist, self.set_id(n.args[1])), "rest"))

    # -- arithmetic ----------------------------------------------------------------------------
    def _add(self, n: Node, at: str) -> Poly:
        if n.q.axis is Axis.CONST:
            return self._static(n)
        return plus(self.poly(n.args[0], at), self.poly(n.args[1], at))

    def _sub(self, n: Node, at: str) -> Poly:
        if n.q.axis is Axis.CONST:
            return self._static(n)
        x, lse = n.args
        if lse.op == "lse_v" and lse.args[0] is x:
            dist = only_dist(self.poly(x, "v"))
            if dist is not None:
                if lse.args[1].op == "full":
                    return self.poly(x, at)
                return single(Atom("L", ("renorm", dist, self.set_id(lse.args[1])), at))
        return plus(self.poly(x, at), self.poly(lse, at), -1.0)

    def _static(self, n: Node) -> Poly:
        """Sums of knobs stay whole: 1 − β is one number."""
        a, b = (self.poly(x, "") for x in n.args)
        total = plus(a, b, 1.0 if n.op == "add" else -1.0)
        if len(total) <= 1:
            return total
        return self.opaque(n, "")

    def _neg(self, n: Node, at: str) -> Poly:
        return scaled(self.poly(n.args[0], at), -1.0)

    def _mul(self, n: Node, at: str) -> Poly:
        return times(self.poly(n.args[0], at), self.poly(n.args[1], at))

    def _div(self, n: Node, at: str) -> Poly | None:
        if is_mean(n) or is_softmax(n):
            return None
        top, bottom = self.poly(n.args[0], at), self.poly(n.args[1], at)
        if top == bottom:
            return constant(1.0)
        blend = mixture(bottom)
        if blend is not None:
            inverse = single(blend, -1.0)
        elif len(bottom) == 1:
            inverse = power(bottom, -1.0)
        else:
            inverse = single(Atom("group", frozen(bottom), level(bottom)), -1.0)
        return None if inverse is None or not bottom else times(top, inverse)

    def _pow(self, n: Node, at: str) -> Poly | None:
        base, exponent = self.poly(n.args[0], at), n.args[1].value
        if exponent is None or n.args[1].op != "const":
            return None
        found = power(base, exponent)
        if found is None and base:
            return single(Atom("group", frozen(base), level(base)), exponent)
        return found

    def _exp(self, n: Node, at: str) -> Poly:
        return exponential(self.poly(n.args[0], at))

    def _log(self, n: Node, at: str) -> Poly | None:
        inner = self.poly(n.args[0], at)
        blend = mixture(inner)
        if blend is not None:
            return single(Atom("L", blend.key, blend.at))
        if len(inner) != 1:
            static = n.q.axis is Axis.CONST and bool(inner)
            return single(Atom("log", frozen(inner))) if static else None
        ((m, c),) = inner.items()
        if c <= 0:
            return None
        out = constant(math.log(c))
        for atom, p in sorted(m, key=lambda x: x[0].order):
            if atom.kind == "P":
                out = plus(out, single(Atom("L", atom.key, atom.at)), p)
            elif atom.kind == "exp":
                out = plus(out, scaled(in_order(atom.key), p))  # type: ignore[call-overload]
            elif n.q.axis is Axis.CONST or (atom.kind in ("sum", "total") and len(m) > 1):
                out = plus(out, single(Atom("log", frozen(single(atom)))), p)
            else:
                return None
        return out

    def _abs(self, n: Node, at: str) -> Poly | None:
        inner = self.poly(n.args[0], at)
        if not inner or any(x.kind == "node" for x in atoms_of(inner)):
            return None
        first = min(inner, key=lambda m: key_text(m))
        if inner[first] < 0:
            inner = scaled(inner, -1.0)
        return single(Atom("abs", frozen(inner), level(inner)))

    def _logaddexp(self, n: Node, at: str) -> Poly | None:
        parts: list[tuple[frozenset, Dist]] = []
        at = at if n.q.axis is Axis.VOCAB else "y"
        for x in n.args:
            found = weighed(self.poly(x, at), at)
            if found is None:
                return None
            weight, dist = found
            if dist[0] == "mix":
                parts += [(frozen(times(in_order(w), weight)), d) for w, d in dist[1]]
            else:
                parts.append((frozen(weight), dist))
        return single(Atom("L", mixed(parts), at))

    def _sg(self, n: Node, at: str) -> Poly:
        return held(self.poly(n.args[0], at))

    def _live(self, n: Node, at: str) -> Poly:
        return self.poly(n.args[0], at)

    def _where(self, n: Node, at: str) -> Poly:
        test, yes, no = n.args
        side = _guarded(test, yes, no)
        if side is not None:
            return self.poly(side, at)
        c = self.truth(test, at)
        gap = plus(self.poly(yes, at), self.poly(no, at), -1.0)
        return plus(self.poly(no, at), self.consistent(times(c, gap)))

    # -- conditions ------------------------------------------------------------------------------
    def truth(self, n: Node, at: str) -> Poly:
        """A condition as a polynomial in indicators."""
        if n.id in self.names:
            return self.poly(n, at)
        match n.op:
            case "const":
                return constant(float(n.attr("value")))  # type: ignore[arg-type]
            case "not":
                return plus(constant(1.0), self.truth(n.args[0], at), -1.0)
            case "and":
                return self.consistent(times(*(self.truth(x, at) for x in n.args)))
            case "or":
                a, b = (self.truth(x, at) for x in n.args)
                return plus(plus(a, b), times(a, b), -1.0)
            case "where" if n.q.unit in ("bool", "gate"):
                test = self.truth(n.args[0], at)
                yes, no = (self.truth(x, at) for x in n.args[1:])
                return plus(no, times(test, plus(yes, no, -1.0)))
            case "is_y":
                return constant(1.0) if at == "y" else single(Atom("ind", "y", at))
            case "in_set":
                return single(Atom("in", self.set_id(n.args[0]), at))
        if _is_real(n) or _is_floor(n) or self._is_positive(n, at):
            return constant(1.0)
        if n.op == "lt" and n.args[1].is_const(0.5):  # a condition as a number, below a half
            inner = self.poly(n.args[0], at)
            if len(inner) == 1 and all(x.kind in ("ind", "in") for m in inner for x, _ in m):
                return plus(constant(1.0), inner, -1.0)
        self.nodes[n.id] = n
        return single(Atom("ind", n.id, at if n.q.axis is Axis.VOCAB else ""))

    def _is_positive(self, n: Node, at: str) -> bool:
        """0 < a product of probabilities: true of every entry a softmax can give."""
        if n.op != "lt" or not n.args[0].is_const(0):
            return False
        inner = self.poly(n.args[1], at)
        return bool(inner) and all(c > 0 and all(_grows(x) for x, _ in m) for m, c in inner.items())

    def consistent(self, a: Poly) -> Poly:
        """Without products of conditions that exclude each other."""
        out = {}
        for m, c in a.items():
            tests = [x for x, _ in m if x.kind == "ind" and x.key in self.nodes]
            if not any(self.opposite(x, y) for x in tests for y in tests):
                out[m] = c
        return out

    def opposite(self, x: Atom, y: Atom) -> bool:
        """Whether two conditions are a < b and b < a."""
        if x.kind != "ind" or y.kind != "ind" or x.at != y.at:
            return False
        a, b = self.nodes.get(x.key), self.nodes.get(y.key)  # type: ignore[arg-type]
        if a is None or b is None or a.op != "lt" or b.op not in ("lt", "le"):
            return False
        gaps = [plus(self.poly(n.args[1], x.at), self.poly(n.args[0], x.at), -1.0) for n in (a, b)]
        return not plus(*gaps)

    def _condition(self, n: Node, at: str) -> Poly:
        return self.truth(n, at)

    _lt = _le = _eq = _and = _or = _not = _is_y = _in_set = _condition

    # -- sums over entries -------------------------------------------------------------------------
    def _sum_v(self, n: Node, at: str) -> Poly:
        x, s = n.args
        return self.poly(x, "y") if s.op == "sampled" else self.summed(self.poly(x, "v"), s)

    def summed(self, a: Poly, s: Node) -> Poly:
        """Σ over the entries of a set: what does not vary in front, a distribution is 1."""
        sid = self.set_id(s)
        out: Poly = {}
        for m, c in a.items():
            inner = frozenset((x, p) for x, p in m if x.varies)
            outer = m - inner
            if not inner:
                total = single(Atom("count", sid))
            elif self._is_distribution(inner, s):
                total = constant(1.0)
            else:
                total = single(Atom("sum", (sid, inner)))
            out = plus(out, scaled(times({outer: 1.0}, total), c))
        return out

    def _is_distribution(self, m: Mono, s: Node) -> bool:
        """Whether a monomial is one distribution that sums to 1 over this set."""
        if len(m) != 1:
            return False
        ((atom, p),) = m
        return atom.kind == "P" and p == 1 and normalized_on(atom.key, s)

    def _lse_v(self, n: Node, at: str) -> Poly | None:
        dist = only_dist(self.poly(n.args[0], "v"))
        if dist is not None and normalized_on(dist, n.args[1]):
            return {}
        total = self.summed(exponential(self.poly(n.args[0], "v")), n.args[1])
        return single(Atom("log", frozen(total))) if total else None


# ---- guards that mathematics does not see -------------------------------------------------------


def _is_real(n: Node) -> bool:
    """−10²⁰ < log p: true of every real entry (padding rows are −inf)."""
    return n.op == "lt" and n.args[0].op == "const" and n.args[0].value == -1e20


def _is_floor(n: Node) -> bool:
    """The floor under the logarithm of a tail mass."""
    return n.op == "lt" and n.args[0].op == "const" and n.args[0].value == TAIL_FLOOR


def _guarded(test: Node, yes: Node, no: Node) -> Node | None:
    """The side that counts of a guard against 0/0 or log 0; None where the test is a real one.

    `where(0 < x, x, 1)` is a denominator that may be an empty sum; `where(x = 0 and y = 0, 0, z)`
    and `where(0 < x, z / x, 0)` are slopes of quotients and logarithms.
    """
    if test.op == "lt" and test.args[0].is_const(0):
        x = test.args[1]
        if x is yes and no.is_const(1):
            return yes
        slope = yes.args[0] if yes.op == "neg" else yes
        if no.is_const(0) and slope.op == "div" and slope.args[1] is x:
            return yes
    zeros = [x for x in test.args if x.op == "eq" and any(a.is_const(0) for a in x.args)]
    both = test.op == "and" and len(zeros) == len(test.args)
    return no if both and yes.is_const(0) else None


def _grows(x: Atom) -> bool:
    """An atom that is positive wherever a softmax is."""
    if x.kind == "sum":
        return all(a.kind in ("P", "exp") for a, _ in x.key[1])  # type: ignore[index]
    return x.kind in ("P", "exp", "count")


# ---- means and softmaxes over rows ----------------------------------------------------------------

ROWS = ("others_sum", "group_sum", "position_sum", "sum_b", "sum_t")


def is_mean(n: Node) -> bool:
    """x summed over rows or tokens, over the number of them (at least 1)."""
    top, bottom = n.args
    if bottom.op != "max" or not bottom.args[1].is_const(1) or top.op not in ROWS:
        return False
    count = bottom.args[0]
    if count.op != top.op:
        return False
    return count.args[0].op == "input" and count.args[0].attr("name") == "one"


def is_softmax(n: Node) -> bool:
    """exp x over the sum of exp x of the group, x shifted by its maximum."""
    top, bottom = n.args
    if top.op != "exp" or bottom.op != "group_sum" or bottom.args[0] is not top:
        return False
    gap = top.args[0]
    return gap.op == "sub" and any(x.op == "group_max" for x in nodes_below([gap.args[1]]))
