"""Nodes as sympy expressions: for checks of algebra, never for printing.

Log-probabilities become indexed symbols, so Σ_v stays a sum over an index; what sympy has no
word for becomes an undefined function of its arguments. Nothing here parses text.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis


@cache
def _sympy() -> Any:
    import sympy

    return sympy


class ToSympy:
    """Translates nodes; entries of the vocabulary are read at the index `v`."""

    def __init__(self) -> None:
        s = self.s = _sympy()
        self.v = s.Symbol("v", integer=True, positive=True)
        self.y = s.Symbol("y", integer=True, positive=True)
        self.size = s.Symbol("V", integer=True, positive=True)
        self.memo: dict[tuple[int, str], Any] = {}

    def __call__(self, n: Node, at: str = "v") -> Any:
        for x in nodes_below([n]):
            for place in ("v", "y"):
                if (x.id, place) not in self.memo:
                    self.memo[x.id, place] = self._make(x, place)
        return self.memo[n.id, at]

    def _make(self, n: Node, at: str) -> Any:
        s = self.s
        args = [self.memo[a.id, at] for a in n.args]
        match n.op:
            case "const":
                return s.nsimplify(n.attr("value"))
            case "param":
                return s.Symbol(str(n.attr("name")), real=True)
            case "logp":
                base = s.IndexedBase(f"L_{n.attr('dist')}_{n.attr('temperature'):g}", real=True)
                return base[self.v if at == "v" else self.y]
            case "input":
                if n.attr("name") == "one":
                    return s.Integer(1)
                return s.Symbol(f"{n.attr('name')}_{n.attr('critic', '')}", real=True)
            case "at_y":
                return self.memo[n.args[0].id, "y"]
            case "at_set" | "sg" | "live":
                return args[0]
            case "add":
                return args[0] + args[1]
            case "sub":
                return args[0] - args[1]
            case "mul":
                return args[0] * args[1]
            case "div":
                return args[0] / args[1]
            case "neg":
                return -args[0]
            case "pow":
                return args[0] ** args[1]
            case "exp":
                return s.exp(args[0])
            case "log":
                return s.log(args[0])
            case "abs":
                return s.Abs(args[0])
            case "tanh":
                return s.tanh(args[0])
            case "sigmoid":
                return 1 / (1 + s.exp(-args[0]))
            case "min":
                return s.Min(*args)
            case "max":
                return s.Max(*args)
            case "logaddexp":
                return s.log(s.exp(args[0]) + s.exp(args[1]))
            case "sum_v":
                top = s.Symbol(f"V_{_set_name(n.args[1])}", integer=True, positive=True)
                return s.Sum(self.memo[n.args[0].id, "v"], (self.v, 1, top))
            case "where":
                return s.Piecewise((args[1], self._test(n.args[0], at)), (args[2], True))
        if not args:
            return s.Symbol(n.op)
        head = s.Function(n.op)
        return head(*[a for a in args if isinstance(a, s.Basic)])

    def _test(self, n: Node, at: str) -> Any:
        s = self.s
        args = [self.memo[a.id, at] for a in n.args]
        match n.op:
            case "lt":
                return s.StrictLessThan(*args)
            case "le":
                return s.LessThan(*args)
            case "eq":
                return s.Equality(*args)
            case "not":
                return s.Not(self._test(n.args[0], at))
            case "and":
                return s.And(*(self._test(a, at) for a in n.args))
            case "or":
                return s.Or(*(self._test(a, at) for a in n.args))
        place = "" if n.q.axis is not Axis.VOCAB else at
        return s.Symbol(f"c_{_set_name(n)}_{place}")


def _set_name(n: Node) -> str:
    """A set or condition as a name that is the same in every builder."""
    facts = "_".join(f"{k}{v}" for k, v in n.attrs)
    return "_".join(x for x in (n.op, facts, *(_set_name(a) for a in n.args)) if x)


def to_sympy(n: Node, at: str = "v") -> Any:
    """The sympy expression of a node; entries are read at the index v (or y)."""
    return ToSympy()(n, at)


def same(a: Node, b: Node, at: str = "v") -> bool:
    """Whether two nodes are the same function, as far as sympy can show: their difference
    expands to zero, sums over one set taken together."""
    s = _sympy()
    gap = s.expand(to_sympy(a, at) - to_sympy(b, at))
    if gap == 0:
        return True
    limits: dict[Any, Any] = {}
    rest = s.Integer(0)
    for term in s.Add.make_args(gap):
        k, sums = term.as_independent(s.Sum)
        if isinstance(sums, s.Sum):
            limits[sums.limits] = limits.get(sums.limits, 0) + k * sums.function
        else:
            rest += term
    bodies = [s.simplify(s.expand(body)) for body in limits.values()]
    return s.simplify(rest) == 0 and all(b == 0 for b in bodies)


__all__ = ["same", "to_sympy"]
