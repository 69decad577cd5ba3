"""An advantage as a linear map of token rewards: A_t = Σ_k K[t, k] r_k + Σ R ρ[t] + baselines.

Read off the graph for responses of a given length, so that any spelling of a credit is treated
alike: K is upper triangular with ones for a return-to-go, the identity for immediate credit.
Entries left of the diagonal multiply what is known before the token is drawn, and have no mean.

Legend: T response length; kernels [T, T] have the token's own position in rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import COUPLING_OPS, Node
from opdsl.meaning.quantity import Axis
from opdsl.passport.evaluate import Evaluator, Unknown
from opdsl.passport.strict import PLACES, STEP, schedule_at

TOKEN_INPUTS = frozenset({"one", "rollout_logp", "special", "position", "step", "field"})
ELEMENTWISE = frozenset(
    ["add", "sub", "mul", "div", "neg", "exp", "log", "pow", "min", "max", "abs", "tanh", "sigmoid",
     "lt", "le", "eq", "and", "or", "not", "where", "sg"]
)  # fmt: skip


class NotLinear(Exception):
    """No linear map with fixed numbers."""


@dataclass
class Linear:
    """tokens: rewards of one token each, with their kernels [T, T]. sequences: numbers of the whole
    response that do not read the student, with ρ [T]. critics, others (other rollouts of the
    prompt): kernels. bounded: critics that count only where they are below zero."""

    tokens: dict[int, tuple[Node, np.ndarray]] = field(default_factory=dict)
    sequences: dict[int, tuple[Node, np.ndarray]] = field(default_factory=dict)
    critics: dict[str, np.ndarray] = field(default_factory=dict)
    others: np.ndarray | None = None
    bounded: frozenset[str] = frozenset()

    def map(self, f) -> Linear:
        """f applied to every kernel (ρ as a column)."""
        return Linear(
            {i: (n, f(k)) for i, (n, k) in self.tokens.items()},
            {i: (n, f(r[:, None])[:, 0]) for i, (n, r) in self.sequences.items()},
            {c: f(k) for c, k in self.critics.items()},
            None if self.others is None else f(self.others),
            self.bounded,
        )

    def plus(self, other: Linear) -> Linear:
        def both(a: dict, b: dict) -> dict:
            out = dict(a)
            for i, (n, k) in b.items():
                out[i] = (n, out[i][1] + k) if i in out else (n, k)
            return out

        critics = dict(self.critics)
        for c, k in other.critics.items():
            critics[c] = critics[c] + k if c in critics else k
        rest = [x for x in (self.others, other.others) if x is not None]
        return Linear(
            both(self.tokens, other.tokens),
            both(self.sequences, other.sequences),
            critics,
            sum(rest) if rest else None,  # type: ignore[arg-type]
            self.bounded | other.bounded,
        )


def linear(advantage: Node, length: int) -> Linear:
    """The linear form of an advantage for responses of this length. Raises NotLinear."""
    return _Reader(length).read(advantage)


class Along(Evaluator):
    """Numbers that depend on the position and the length alone, along one response [T]."""

    def __init__(self, length: int):
        self.memo: dict[int, object] = {}
        self.length = length

    def _input(self, n: Node) -> np.ndarray:
        match n.attr("name"):
            case "one":
                return np.float64(1)
            case "step":
                return np.float64(STEP)
            case "position":
                return np.arange(self.length, dtype=float)
            case "length":
                return np.float64(self.length)
        raise Unknown(n.op)

    def _schedule(self, n: Node) -> np.ndarray:
        return np.float64(schedule_at(n))

    def _couple(self, n: Node, x: np.ndarray, *more: np.ndarray) -> np.ndarray:
        raise Unknown(n.op)

    def _logp(self, n: Node) -> np.ndarray:
        raise Unknown(n.op)

    _scan = _scan_fwd = _sum_t = _sum_b = _group_sum = _position_sum = _quantile_b = _couple
    _group_max = _max_b = _max_t = _rank_t = _others_sum = _shift = _couple


class _Reader:
    def __init__(self, length: int):
        self.T = length
        self.memo: dict[int, Linear] = {}
        self.along = Along(length)

    def number(self, n: Node) -> np.ndarray | None:
        """[T, 1] of a number that reads nothing but position and length."""
        try:
            x = self.along(n)
        except Unknown:
            return None
        return np.broadcast_to(np.asarray(x, float), (self.T,))[:, None]

    def read(self, n: Node) -> Linear:
        if n.id not in self.memo:
            self.memo[n.id] = self._read(n)
        return self.memo[n.id]

    def _read(self, n: Node) -> Linear:
        if _one_token(n):
            return Linear(tokens={n.id: (n, np.eye(self.T))})
        if _of_sequence(n):
            return Linear(sequences={n.id: (n, np.ones(self.T))})
        if _of_others(n):
            return Linear(others=np.eye(self.T))
        if n.op == "input" and n.attr("name") == "values":
            return Linear(critics={str(n.attr("critic")): np.eye(self.T)})
        match n.op:
            case "add":
                return self.read(n.args[0]).plus(self.read(n.args[1]))
            case "sub":
                return self.read(n.args[0]).plus(self.read(n.args[1]).map(np.negative))
            case "neg":
                return self.read(n.args[0]).map(np.negative)
            case "sg":
                return self.read(n.args[0])
            case "mul":
                for x, k in (n.args, n.args[::-1]):
                    if (found := self.number(k)) is not None:
                        return self.read(x).map(lambda m, f=found: m * f)
            case "div":
                if (found := self.number(n.args[1])) is not None and (found != 0).all():
                    return self.read(n.args[0]).map(lambda m: m / found)
            case "where":
                if (test := self.number(n.args[0])) is not None:
                    yes, no = self.read(n.args[1]), self.read(n.args[2])
                    return yes.map(lambda m: m * (test > 0)).plus(no.map(lambda m: m * (test <= 0)))
            case "min" if n.args[1].is_const(0) or n.args[0].is_const(0):
                inner = self.read(n.args[0] if n.args[1].is_const(0) else n.args[1])
                if not (inner.tokens or inner.sequences or inner.others is not None):
                    return Linear(critics=inner.critics, bounded=frozenset(inner.critics))
            case "shift":
                k = int(n.attr("n"))  # type: ignore[call-overload]
                k = max(1 - PLACES, min(k, PLACES - 1))  # far away: behind all but one
                return self.read(n.args[0]).map(lambda m: _shifted(m, k))
            case "scan":
                if (rate := self.number(n.args[1])) is not None:
                    return self.read(n.args[0]).map(lambda m: _scanned(m, rate[:, 0]))
            case "scan_fwd":
                if (rate := self.number(n.args[1])) is not None:
                    return self.read(n.args[0]).map(
                        lambda m: _scanned(m[::-1], rate[:, 0], before=True)[::-1]
                    )
            case "sum_t":
                return self.read(n.args[0]).map(
                    lambda m: np.broadcast_to(m.sum(0, keepdims=True), m.shape).copy()
                )
        raise NotLinear(n.op)


def _shifted(m: np.ndarray, k: int) -> np.ndarray:
    out = np.zeros_like(m)
    if abs(k) >= len(m):
        return out
    if k >= 0:
        out[: len(m) - k] = m[k:]
    else:
        out[-k:] = m[: len(m) + k]
    return out


def _scanned(m: np.ndarray, rate_T: np.ndarray, before: bool = False) -> np.ndarray:
    """From the last row to the first: out = m + rate · what follows. before: rows and rates run
    the other way, and a rate belongs to the token it comes from."""
    rates = np.roll(rate_T, 1)[::-1] if before else rate_T
    out, after = np.zeros_like(m), np.zeros_like(m[0])
    for t in reversed(range(len(m))):
        after = out[t] = m[t] + rates[t] * after
    return out


def _one_token(n: Node) -> bool:
    """Reads one state and its token, nothing else."""
    return all(
        x.op not in COUPLING_OPS and (x.op != "input" or x.attr("name") in TOKEN_INPUTS)
        for x in nodes_below([n])
    )


def _of_sequence(n: Node) -> bool:
    """One number per response, of the outcome and the length alone."""
    return n.q.axis <= Axis.SEQ and all(
        x.op in ELEMENTWISE
        or x.op in ("const", "param", "schedule")
        or (x.op == "input" and x.attr("name") in ("outcome", "length", "step", "one"))
        for x in nodes_below([n])
    )


def _of_others(n: Node) -> bool:
    """Reads the other rollouts of the prompt alone: independent of this one."""
    if n.op == "others_sum":
        return True
    if n.op in ("const", "param"):
        return True
    return n.op in ELEMENTWISE and bool(n.args) and all(_of_others(a) for a in n.args)
