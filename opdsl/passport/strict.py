"""Random states for the four claims: whatever one state does not determine is NaN, never a guess.

A `Scene` is a `World` with what the claims depend on beside the three policies: who draws the
token (a tempered, truncated or older student, a teacher, given text), where in the response a
state sits, which tokens are special, what the prompt's fields say. Numbers that move with the step
are taken halfway through a run. Statistics that couple tokens or rollouts are NaN unless zero.

Legend: S states, Y sampled tokens (all of them), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node
from opdsl.meaning.spec import Spec, StateSource
from opdsl.passport.evaluate import Evaluator, S, V, World, normal, random_world

PLACES = 6  # response positions that the states are spread over
STEP, STEPS = 5, 10  # halfway through a run
SOURCE = "@source"  # the field of a prompt that says who wrote the response
PLAIN = StateSource("rollouts", "student")


@dataclass(frozen=True)
class Scene(World):
    """source: who draws tokens. outcome: the verifier's answer where it is the same for all."""

    source: StateSource = PLAIN
    outcome: float | None = None
    critic_zero: bool = False  # an exact critic says 0 at every state
    dust: float = 1e-12  # a value below this is zero beside one that is not known

    @cached_property
    def law(self) -> np.ndarray:
        """Probabilities [S, V] the sampled token is drawn with."""
        s = self.source
        if s.policy == "blend":
            return sum((w * self._drawn_by(name) for w, name in s.parts), np.zeros((S, V)))
        if s.policy == "interleaved":
            draft, judge = (self._drawn_by(name) for _, name in s.parts)
            kept = np.argsort(np.argsort(-judge, -1), -1) < min(s.accept or 1, V - 2)
            lost = np.where(kept, 0.0, draft).sum(-1, keepdims=True)
            return np.where(kept, draft, 0.0) + lost * judge
        return self._drawn_by(s.policy)

    def _drawn_by(self, policy: str) -> np.ndarray:
        """Probabilities [S, V] of one policy, tempered and cut."""
        s = self.source
        rng = np.random.default_rng([self.seed, 77])
        noise = rng.normal(0, 0.5, (S, 1, V))
        if policy in ("data", "golden"):
            return np.exp(normal(3 * noise)[:, 0])
        x = self.student if policy in ("student", "old") else self.logp(policy, 1.0)
        if policy == "old":
            x = x + noise
        return tilted(normal(x / s.temperature)[:, 0], s)

    @property
    def exact(self) -> bool:
        """Whether the student as it is draws: only then do scores average to zero."""
        return self.source.policy == "student" and not tilts(self.source)

    @property
    def moves(self) -> bool:
        names = {self.source.policy, *(name for _, name in self.source.parts)}
        return bool(names & {"student", "old"})

    @property
    def place(self) -> np.ndarray:
        """Position in the response [S, 1]."""
        return (np.arange(S) % PLACES)[:, None].astype(float)

    def nudged(self, i: int, step: float) -> Scene:
        """The student's logit of entry i moved, at every state."""
        shift = np.zeros(V)
        shift[i] = step
        return replace(self, student=normal(self.student + shift))

    def near_teacher(self) -> Scene:
        """A hair beside the teacher: where a field jumps there, it shows."""
        noise = np.random.default_rng(self.seed).normal(0, 1e-9, self.teacher.shape)
        return replace(self, student=normal(self.teacher + noise), dust=1e-6)


def tilts(s: StateSource) -> bool:
    return s.temperature != 1 or s.top_p < 1 or s.top_k is not None


def tilted(logp: np.ndarray, s: StateSource) -> np.ndarray:
    """Probabilities [S, V] after top-k and nucleus truncation. A cut sampler drops at least the
    least probable token, so that it shows among few."""
    p = np.exp(logp)
    if s.top_k is None and s.top_p >= 1:
        return p
    order = np.argsort(-p, -1, kind="stable")
    rank = np.argsort(order, -1, kind="stable")
    p = np.where(rank < min(s.top_k or V, V - 1), p, 0.0)
    p = p / p.sum(-1, keepdims=True)
    ranked = np.take_along_axis(p, order, -1)
    before = np.take_along_axis(ranked.cumsum(-1) - ranked, rank, -1)
    p = np.where(before < s.top_p, p, 0.0)
    return p / p.sum(-1, keepdims=True)


def scene(spec: Spec, source: StateSource, seed: int, spread: float, **more: object) -> Scene:
    """Random states; T is the first teacher that a term reads."""
    names = [t for term in spec.terms for t in term.teachers if t != "initial"]
    w = random_world(seed, spread, names[0] if names else "")
    return Scene(w.student, w.teacher, w.initial, seed, w.primary, source, **more)  # type: ignore[arg-type]


class Strict(Evaluator):
    """`Evaluator` on a scene."""

    world: Scene

    def __init__(self, world: Scene):
        super().__init__(world)

    def _schedule(self, n: Node) -> np.ndarray:
        return np.float64(schedule_at(n))

    def _input(self, n: Node) -> np.ndarray:
        w = self.world
        match n.attr("name"):
            case "one":
                return np.float64(1)
            case "step":
                return np.float64(STEP)
            case "position":
                return w.place
            case "rollout_logp":  # a token that cannot be drawn has weight 0: any number will do
                return np.where(w.law > 0, np.log(np.where(w.law > 0, w.law, 1.0)), w.student[:, 0])
            case "special":
                return np.broadcast_to((np.arange(V) % 3 == 1).astype(float), (S, V))
            case "field" if n.attr("field") == SOURCE:
                return np.float64(n.attr("equals") == w.source.policy)
            case "field":
                kinds = sum(map(ord, f"{n.attr('field')}={n.attr('equals')}")) % 2
                return ((np.arange(S) // 2 + kinds) % 2)[:, None].astype(float)
            case "values" if w.critic_zero:
                return np.zeros((S, 1))
            case "outcome" if w.outcome is not None:
                return np.float64(w.outcome)
        return np.float64("nan")

    def _mul(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        a, b = self._align(n, *xs)
        dust = self.world.dust
        nothing = (np.isnan(a) & (np.abs(b) < dust)) | (np.isnan(b) & (np.abs(a) < dust))
        return np.where(nothing, 0.0, super()._mul(n, *xs))

    def _div(self, n: Node, *xs: np.ndarray) -> np.ndarray:
        a, b = self._align(n, *xs)
        nothing = np.isnan(b) & (np.abs(a) < self.world.dust)
        return np.where(nothing, 0.0, super()._div(n, *xs))

    def _couple(self, n: Node, x: np.ndarray, *more: np.ndarray) -> np.ndarray:
        if np.all(np.abs(x) < self.world.dust):
            return np.zeros_like(x)
        same = np.ndim(x) == 0 and n.op in ("group_max", "max_b")
        return x if same else np.full(np.shape(x), np.nan)

    _scan = _scan_fwd = _sum_t = _sum_b = _group_sum = _position_sum = _quantile_b = _couple
    _group_max = _max_b = _max_t = _rank_t = _others_sum = _couple


def schedule_at(n: Node, step: float = STEP, steps: float = STEPS) -> float:
    """A schedule's number at a step."""
    start, stop, over = float(n.attr("start")), float(n.attr("stop")), n.attr("over")  # type: ignore[arg-type]
    span = steps if over is None else float(over)  # type: ignore[arg-type]
    x = min(max(step / span, 0.0), 1.0) if span > 0 else 1.0
    if n.attr("kind") == "cosine":
        x = 0.5 * (1 - np.cos(np.pi * x))
    return float(start + (stop - start) * x)


def reads_fields(nodes: list[Node]) -> set[tuple[str, str]]:
    """(field, value) pairs of the prompt that the nodes ask for."""
    return {
        (str(n.attr("field")), str(n.attr("equals")))
        for n in nodes_below(nodes)
        if n.op == "input" and n.attr("name") == "field" and n.attr("field") != SOURCE
    }
