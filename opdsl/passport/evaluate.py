"""Nodes evaluated in NumPy on S random states with V tokens, every token y taken once.

What couples tokens or rollouts is not known at one state: it becomes NaN unless it is zero for
certain, and whatever is NaN is not decided.

Legend: S states, Y sampled tokens (all of them), V vocabulary, W entries (V, or V + 1 with a bin).
Token values are [S, Y], entries [S, Y, W], numbers of the batch or the sequence are scalars.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis

V, S, CUT = 9, 24, 4  # a cut support keeps at most CUT of V tokens
TINY = 1e-9


@dataclass(frozen=True)
class World:
    """Log-probabilities [S, 1, V] by role. `primary` names the teacher that is `teacher`; other
    teachers are unrelated distributions. Without a name every teacher is that one."""

    student: np.ndarray
    teacher: np.ndarray
    initial: np.ndarray
    seed: int = 0
    primary: str = ""

    def logp(self, dist: str, temperature: float) -> np.ndarray:
        if dist == "student":
            x = self.student
        elif dist == "initial":
            x = self.initial
        elif dist == self.primary or not self.primary:
            x = self.teacher
        else:
            rng = np.random.default_rng([self.seed, *dist.encode()])
            x = normal(rng.normal(0, 1.3, (S, 1, V)))
        return x if temperature == 1 else normal(x / temperature)

    @cached_property
    def pi(self) -> np.ndarray:
        return np.exp(self.student[:, 0])  # [S, V]

    @cached_property
    def q(self) -> np.ndarray:
        return np.exp(self.teacher[:, 0])

    @cached_property
    def p0(self) -> np.ndarray:
        return np.exp(self.initial[:, 0])

    def at_teacher(self) -> World:
        return replace(self, student=self.teacher)

    def with_student(self, p_SV: np.ndarray) -> World:
        return replace(self, student=np.log(np.maximum(p_SV, 1e-300))[:, None])

    def gradients(self) -> dict[str, np.ndarray]:
        """Logit gradients [S, V] of the comparisons a field may be made of."""
        pi, q, p0 = self.pi, self.q, self.p0
        out = {}
        for name, other in (("T", q), ("initial", p0)):
            gap = np.log(pi) - np.log(other)
            out[f"KL(student||{name})"] = pi * (gap - (pi * gap).sum(1, keepdims=True))
            out[f"KL({name}||student)"] = pi - other
        log = np.log(pi)
        out["-H(student)"] = pi * (log - (pi * log).sum(1, keepdims=True))
        return out


def random_world(seed: int = 0, spread: float = 1.3, primary: str = "") -> World:
    rng = np.random.default_rng(seed)

    def draw() -> np.ndarray:
        return normal(rng.normal(0, spread, (S, 1, V)))

    return World(draw(), draw(), draw(), seed, primary)


def normal(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


# ---- evaluation of nodes --------------------------------------------------------------------------


class Unknown(Exception):
    """An operation this evaluator has no value for."""


class Evaluator:
    def __init__(self, world: World):
        self.world = world
        self.memo: dict[int, object] = {}
        self.rng = np.random.default_rng(world.seed + 1)

    def __call__(self, node: Node) -> np.ndarray:
        for n in nodes_below([node]):
            if n.id not in self.memo:
                rule = getattr(self, f"_{n.op}", None)
                if rule is None:
                    raise Unknown(n.op)
                with np.errstate(all="ignore"):
                    self.memo[n.id] = rule(n, *(self.memo[a.id] for a in n.args))
        return self.memo[node.id]  # type: ignore[return-value]

    def token(self, n: Node) -> np.ndarray:
        return np.broadcast_to(self(n), (S, V))

    def entries(self, n: Node) -> np.ndarray:
        x = self(n)
        x = x if n.q.axis is Axis.VOCAB else np.asarray(x)[..., None]
        return np.broadcast_to(x, (S, V, max(x.shape[-1], V) if x.ndim else V))

    def mask(self, n: Node) -> np.ndarray:
        return np.broadcast_to(self(n), (S, V, V)).astype(bool)

    def _align(self, n: Node, *xs: np.ndarray) -> list[np.ndarray]:
        """Token values gain an entry axis beside values with entries."""
        if n.q.axis is not Axis.VOCAB:
            return list(xs)
        return [
            x[..., None] if a.q.axis is Axis.TOK and np.ndim(x) == 2 else x
            for x, a in zip(xs, n.args)
        ]

    # -- leaves -------------------------------------------------------------------------------
    def _const(self, n: Node) -> np.ndarray:
        return np.float64(n.attr("value"))  # type: ignore[arg-type]

    _param = _const

    def _schedule(self, n: Node) -> np.ndarray:
        start, stop = float(n.attr("start")), float(n.attr("stop"))  # type: ignore[arg-type]
        return np.float64(start or stop)

    def _input(self, n: Node) -> np.ndarray:
        match n.attr("name"):
            case "one":
                return np.float64(1)
            case "rollout_logp":
                return np.broadcast_to(self.world.student[:, 0], (S, V))
            case "special":
                return np.zeros((S, V))
            case "values":  # a function of the state; zero where nothing is left to say
                same = self.world.student is self.world.teacher
                return np.zeros((S, 1)) if same else self.rng.normal(size=(S, 1))
            case "position":  # not the same at every state
                return (np.arange(S) % 6)[:, None].astype(float)
            case "length" | "step":
                return np.float64(3)
            case "field" if n.attr("field") == "@source":
                return np.float64(1)  # each source has states of its own: its terms act there
        return np.float64("nan")

    def _logp(self, n: Node) -> np.ndarray:
        return self.world.logp(str(n.attr("dist")), float(n.attr("temperature")))  # type: ignore[arg-type]

    # -- sets: masks [S, Y or 1, V] ---------------------------------------------------------------
    def _full(self, n: Node) -> np.ndarray:
        return np.ones((1, 1, V), bool)

    def _sampled(self, n: Node) -> np.ndarray:
        return np.eye(V, dtype=bool)[None]

    def _top(self, n: Node, x: np.ndarray) -> np.ndarray:
        k = min(int(n.attr("k")), CUT)  # type: ignore[call-overload]
        return _rank(x) < k

    def _top_p(self, n: Node, x: np.ndarray) -> np.ndarray:
        p = np.exp(x)
        above = (p[..., None, :] * (x[..., None, :] > x[..., :, None])).sum(-1)
        return above < float(n.attr("p"))  # type: ignore[arg-type]

    def _union(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        out = xs[0]
        for x in xs[1:]:
            out = out | x
        return out

    def _intersection(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        out = xs[0]
        for x in xs[1:]:
            out = out & x
        return out

    def _with_bin(self, n: Node, x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, np.ones((*x.shape[:-1], 1), bool)], -1)

    # -- gathers ------------------------------------------------------------------------------
    def _at_y(self, n: Node, x: np.ndarray) -> np.ndarray:
        return x[:, 0]

    def _at_set(self, n: Node, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        return x

    def _put_set(self, n: Node, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        return np.where(s, x, 0.0)

    def _is_y(self, n: Node, s: np.ndarray) -> np.ndarray:
        return np.eye(V)[None]

    def _in_set(self, n: Node, inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
        return inner.astype(float)

    def _add_bin(self, n: Node, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        rest = np.log(np.maximum(1 - np.where(s, np.exp(x), 0.0).sum(-1, keepdims=True), 1e-12))
        x, rest = np.broadcast_arrays(x, np.broadcast_to(rest, (*rest.shape[:-1], V)))
        return np.concatenate([x, rest[..., :1]], -1)

    def _head(self, n: Node, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        return x[..., :V] if np.ndim(x) == 3 and x.shape[-1] > V else x

    def _last(self, n: Node, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        return x[..., -1] if np.ndim(x) == 3 else x

    # -- arithmetic: an exact zero stays zero beside what is unknown ------------------------------------
    def _add(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        a, b = self._align(n, *xs)
        return a + b

    def _sub(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        a, b = self._align(n, *xs)
        return a - b

    def _mul(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        a, b = self._align(n, *xs)
        return np.where((a == 0) | (b == 0), 0.0, a * b)

    def _div(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        a, b = self._align(n, *xs)
        return np.where((a == 0) & (b != 0), 0.0, a / b)

    def _neg(self, n: Node, x: np.ndarray) -> np.ndarray:
        return -x

    def _exp(self, n: Node, x: np.ndarray) -> np.ndarray:
        return np.exp(x)

    def _log(self, n: Node, x: np.ndarray) -> np.ndarray:
        return np.where(x > 0, np.log(np.where(x > 0, x, 1.0)), np.where(np.isnan(x), x, -1e30))

    def _pow(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        a, b = self._align(n, *xs)
        return np.power(a, b)

    def _min(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        return np.minimum(*self._align(n, *xs))

    def _max(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        return np.maximum(*self._align(n, *xs))

    def _abs(self, n: Node, x: np.ndarray) -> np.ndarray:
        return np.abs(x)

    def _tanh(self, n: Node, x: np.ndarray) -> np.ndarray:
        return np.tanh(x)

    def _sigmoid(self, n: Node, x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    def _logaddexp(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        return np.logaddexp(*self._align(n, *xs))

    def _log1mexp(self, n: Node, x: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(-np.expm1(x), 1e-300))

    # -- conditions -----------------------------------------------------------------------------------
    def _lt(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        if n.args[0].op == "input" and n.args[0].attr("name") == "noise":
            return np.clip(xs[1], 0.0, 1.0)  # chance(p), in expectation over its draw
        a, b = self._align(n, *xs)
        return _known(a < b, a, b)

    def _le(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        a, b = self._align(n, *xs)
        return _known(a <= b, a, b)

    def _eq(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        a, b = self._align(n, *xs)
        return _known(a == b, a, b)

    def _and(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        return self._mul(n, *xs)

    def _or(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        a, b = self._align(n, *xs)
        return 1 - np.where((a == 1) | (b == 1), 0.0, (1 - a) * (1 - b))

    def _not(self, n: Node, x: np.ndarray) -> np.ndarray:
        return 1 - x

    def _where(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        t, a, b = self._align(n, *xs)
        out = np.where(t >= 1, a, np.where(t > 0, t * a + (1 - t) * b, b))
        return np.where(np.isnan(t) & (a != b), np.nan, out)

    def _sg(self, n: Node, x: np.ndarray) -> np.ndarray:
        return x

    _live = _sg

    # -- reductions -----------------------------------------------------------------------------------
    def _over(self, n: Node, x: np.ndarray, s: np.ndarray, empty: float) -> np.ndarray:
        if n.args[0].q.axis is not Axis.VOCAB:
            x = np.asarray(x)[..., None]
        return np.where(s, x, empty)

    def _sum_v(self, n: Node, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        return self._over(n, x, s, 0.0).sum(-1)

    def _max_v(self, n: Node, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        return self._over(n, x, s, -1e300).max(-1)

    def _lse_v(self, n: Node, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        return np.log(np.where(s, np.exp(x), 0.0).sum(-1))

    # -- coupling: unknown at one state, but zero stays zero ------------------------------------------------
    def _couple(self, n: Node, x: np.ndarray, *more: np.ndarray) -> np.ndarray:
        if n.args[0].op == "input" and n.args[0].attr("name") == "one":
            return np.float64(4)
        if np.all(np.abs(x) < 1e-12):
            return np.zeros_like(x)
        return np.full(np.shape(x), np.nan)

    _scan = _scan_fwd = _sum_t = _sum_b = _group_sum = _position_sum = _quantile_b = _couple

    def _shift(self, n: Node, x: np.ndarray) -> np.ndarray:
        return self._couple(n, x)

    def _others_sum(self, n: Node, x: np.ndarray) -> np.ndarray:
        """Other rollouts are independent of this one: any number will do."""
        known = self._couple(n, x)
        return np.where(np.isnan(known), self.rng.normal(size=(S, 1)), known)

    _group_max = _max_b = _max_t = _rank_t = _couple


def _known(test: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(a) | np.isnan(b), np.nan, test.astype(float))


def _rank(x: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(-x, -1, kind="stable"), -1)
