"""Where the mass goes at one state: the derived push Δz of a spec, and what it does to the student.

To first order a step of size η along Δz = u changes the student by dπ_v = η π_v (u_v − Σ_w π_w u_w)
(theory §9.1). What one state cannot know is neutral here: the token is the whole response, its
rollout the whole batch, critics say 0, the verifier's reward is 0, prompt fields match.

Legend: V tokens of the state, Y = V sampled tokens (every token once), W entries (V, or V + 1 with
a bucket). The leading axis of the evaluator, states, has length 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from opdsl.formula.state import State
from opdsl.ir.derive import Cotangent, cotangents
from opdsl.ir.program import expand_tails
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis
from opdsl.meaning.spec import Spec, Term
from opdsl.passport.evaluate import Evaluator, Unknown, World

TINY = 1e-12


@dataclass(frozen=True)
class Flow:
    """push: Δz [V]. moved: dπ [V] in shares of `unit`, the size that counts as 1: what the
    sampled token loses where it is suppressed (`own`), otherwise all the mass that moves."""

    push: np.ndarray
    moved: np.ndarray
    own: bool
    sign: int  # −1 where the sampled token loses mass, 1 where it gains, 0 where it keeps it


@dataclass(frozen=True)
class Mass:
    """A spec at one state beside plain suppression of the sampled token, u = π − e_y."""

    state: State
    teacher: np.ndarray  # [V], the one the spec compares with
    teacher_name: str
    spec: Flow
    plain: Flow
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        name = f"the sampled token {self.state.tokens[self.state.y]!r}"
        if not np.abs(self.spec.push).max() > TINY:
            return "nothing is pushed at this state"
        return {
            -1: f"{name} loses mass",
            0: f"{name} keeps its mass",
            1: f"{name} gains mass here: it is not suppressed",
        }[self.spec.sign]

    def data(self) -> dict[str, Any]:
        """The numbers of the figure as plain values."""
        s = self.state

        def row(x: np.ndarray) -> list[float]:
            return [round(float(v), 6) + 0.0 for v in x]

        return {
            "tokens": list(s.tokens),
            "sampled": s.tokens[s.y],
            "student": row(s.student),
            "teacher": row(self.teacher),
            "push": row(self.spec.push),
            "moved": row(self.spec.moved),
            "unit": _unit(self.spec),
            "suppression": {"push": row(self.plain.push), "moved": row(self.plain.moved)},
            "verdict": self.verdict,
            "notes": list(self.notes),
        }


def mass(spec: Spec, state: State) -> Mass:
    """The push of all terms of a spec at a state. Raises ValueError where it cannot be told."""
    names = [t for term in spec.feedback_terms for t in term.teachers if t != "initial"]
    name = next(iter(names), "")
    known = [n for n in state.teachers if n]
    missing = [n for n in dict.fromkeys(names) if known and n not in known]
    if missing:
        raise ValueError(
            f"the state has no teacher {missing[0]!r} (it has {', '.join(known)});"
            " a list instead of an object stands for every teacher"
        )
    run = AtState(Given.of(state))
    main = [t for t in spec.terms if t.rows == "main"]
    notes = []
    push = _total(spec, main, run, True)
    if push is None or not np.abs(push).max() > TINY:
        bare = _total(spec, main, run, False)
        if bare is None:
            raise ValueError("the push of this method cannot be told from one state")
        if np.abs(bare).max() > TINY:
            push = bare
            notes.append("gates and weights left out: they need more than one state, or are closed")
    assert push is not None
    notes += _assumed(main, spec)
    e = np.eye(len(state.tokens))[state.y]
    return Mass(
        state, state.teacher(name), name, flow(push, state), flow(state.student - e, state), tuple(notes)
    )  # fmt: skip


def flow(push: np.ndarray, state: State) -> Flow:
    """dπ of a push: per unit of mass that the sampled token loses, if that is a good part of what
    moves, otherwise per unit of all that moves."""
    change = state.student * (push - state.student @ push)
    total, own = np.abs(change).sum() / 2, change[state.y]
    if total <= TINY:
        return Flow(push, np.zeros_like(change), False, 0)
    sign = 0 if abs(own) < 1e-6 * total else int(np.sign(own))
    takes = sign < 0 and -own > total / 10
    return Flow(push, change / (-own if takes else total), takes, sign)


def _unit(f: Flow) -> str:
    return "mass taken off the sampled token" if f.own else "mass moved in all"


def _assumed(terms: list[Term], spec: Spec) -> list[str]:
    """What the evaluation of a single state had to assume."""
    from opdsl.meaning.graph import nodes_below

    nodes = nodes_below([x for t in terms for x in (t.loss, t.gate, t.weight)])
    inputs = {n.attr("name") for n in nodes if n.op == "input"}
    out = []
    if any(n.op in ("scan", "shift", "sum_t") for n in nodes):
        out.append("later tokens are taken to bring nothing")
    if any(n.op in ("group_sum", "others_sum", "group_max", "quantile_b", "sum_b", "max_b") for n in nodes):  # fmt: skip
        out.append("other rollouts are left out")
    if "values" in inputs:
        out.append("the critic says 0")
    if "outcome" in inputs:
        out.append("the verifier's reward is 0")
    if any(t.rows == "golden" for t in spec.terms):
        out.append("given text is left out")
    return out


def _total(spec: Spec, terms: list[Term], run: AtState, gated: bool) -> np.ndarray | None:
    """Δz [V] of all terms for the sampled token; None where a value is unknown."""
    total = np.zeros(run.size)
    for t in terms:
        b, loss = spec.builder, t.loss
        if gated:
            loss = b.mul(b.mul(t.weight, t.gate), loss)
        try:
            for c in cotangents(b, expand_tails(b, loss)):
                total = total + _logits(c, run)
        except (Unknown, ValueError):
            return None
    return total if np.isfinite(total).all() else None


def _logits(c: Cotangent, run: AtState) -> np.ndarray:
    """−∂L/∂z [V] of one cotangent g: (Σ g) π − g over the temperature, at the sampled token."""
    g = np.zeros((1, run.size, run.size))
    if c.at_y is not None:
        g = g + np.eye(run.size)[None] * run.token(c.at_y)[:, :, None]
    for s, x in c.at_sets:
        g = g + np.where(run.mask(s), run.entries(x)[..., : run.size], 0.0)
    if c.dense is not None:
        g = g + run.entries(c.dense)[..., : run.size]
    p = np.exp(run.world.logp(str(c.leaf.attr("dist")), c.temperature))
    u = -(g - g.sum(-1, keepdims=True) * p) / c.temperature
    return u[0, run.world.y]


# ---- one state -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given(World):
    """A world of one state with the given distributions; arrays are [1, 1, V]."""

    state: State | None = None

    @staticmethod
    def of(state: State) -> Given:
        def log(p: np.ndarray) -> np.ndarray:
            return np.log(p)[None, None]

        return Given(log(state.student), log(state.teacher("")), log(state.initial), state=state)

    @property
    def y(self) -> int:
        assert self.state is not None
        return self.state.y

    def logp(self, dist: str, temperature: float) -> np.ndarray:
        assert self.state is not None
        if dist in ("student", "initial"):
            x = self.student if dist == "student" else self.initial
        else:
            x = np.log(self.state.teacher(dist))[None, None]
        x = x / temperature
        top = x.max(-1, keepdims=True)
        return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


class AtState(Evaluator):
    """The evaluator of the passport for any number of tokens, with neutral surroundings."""

    world: Given

    def __init__(self, world: Given):
        super().__init__(world)
        self.size = world.student.shape[-1]

    def token(self, n: Node) -> np.ndarray:
        return np.broadcast_to(self(n), (1, self.size))

    def entries(self, n: Node) -> np.ndarray:
        x = np.asarray(self(n))
        x = x if n.q.axis is Axis.VOCAB else x[..., None]
        width = max(x.shape[-1], self.size) if x.ndim else self.size
        return np.broadcast_to(x, (1, self.size, width))

    def mask(self, n: Node) -> np.ndarray:
        return np.broadcast_to(self(n), (1, self.size, self.size)).astype(bool)

    def _input(self, n: Node) -> np.ndarray:
        match n.attr("name"):
            case "one" | "position" | "length" | "step":
                return np.float64(1)
            case "rollout_logp":
                return self.world.student[:, 0]
            case "field":
                return np.float64(1)
        return np.zeros((1, self.size))  # special, values, outcome, …

    # -- sets and entries ----------------------------------------------------------------------
    def _full(self, n: Node) -> np.ndarray:
        return np.ones((1, 1, self.size), bool)

    def _sampled(self, n: Node) -> np.ndarray:
        return np.eye(self.size, dtype=bool)[None]

    def _top(self, n: Node, x: np.ndarray) -> np.ndarray:
        rank = np.argsort(np.argsort(-x, -1, kind="stable"), -1)
        return rank < int(n.attr("k"))  # type: ignore[call-overload]

    def _is_y(self, n: Node, s: np.ndarray) -> np.ndarray:
        return np.eye(self.size)[None]

    def _add_bin(self, n: Node, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        inside = np.where(s, np.exp(x), 0.0).sum(-1, keepdims=True)
        rest = np.log(np.maximum(1 - inside, 1e-6))
        x = np.broadcast_to(x, (*rest.shape[:-1], self.size))
        return np.concatenate([x, rest], -1)

    def _head(self, n: Node, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        return x[..., : self.size] if np.ndim(x) == 3 else x

    def _last(self, n: Node, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        return x[..., -1] if np.ndim(x) == 3 else x

    # -- coupling: this token is all there is ------------------------------------------------------
    def _couple(self, n: Node, x: np.ndarray, *more: np.ndarray) -> np.ndarray:
        return x

    _scan = _scan_fwd = _sum_t = _sum_b = _group_sum = _position_sum = _quantile_b = _couple
    _group_max = _max_b = _max_t = _rank_t = _couple

    def _shift(self, n: Node, x: np.ndarray) -> np.ndarray:
        return np.zeros_like(x)

    _others_sum = _shift


__all__ = ["Flow", "Mass", "flow", "mass"]
