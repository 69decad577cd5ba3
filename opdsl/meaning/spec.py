"""The typed specification: what a method means once every name is resolved.

Formulas are nodes of `opdsl.meaning.node`; everything is immutable. This is the only thing the
rooms behind `meaning` read.
"""

from __future__ import annotations

from collections.abc import Mapping

from opdsl.meaning.node import Builder, Node
from opdsl.records import record
from opdsl.source import NOWHERE, Span


@record
class Schedule:
    """A number that moves with the step; `over` counts steps, None means the whole run."""

    kind: str  # "linear" | "cosine"
    start: float
    stop: float
    over: float | None

    def at(self, step: float, total: float = 1.0) -> float:
        import math

        span = self.over if self.over is not None else total
        x = min(max(step / span, 0.0), 1.0) if span > 0 else 1.0
        if self.kind == "cosine":
            x = 0.5 * (1 - math.cos(math.pi * x))
        return self.start + (self.stop - self.start) * x


@record
class StateSource:
    """Whose prefixes the feedback is measured on."""

    kind: str  # "rollouts" | "sequences"
    policy: str  # "student" | "old" | "data" | "golden" | a teacher | "blend" | "interleaved"
    share: float | Schedule = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    group: int = 1
    max_tokens: int | None = None
    lag: int = 0
    prefix: int | None = None
    parts: tuple[tuple[float, str], ...] = ()  # "blend": shares of the policies, per token
    accept: int | None = None  # "interleaved": a draft token in the judge's top k stays
    span: Span = NOWHERE


ACCESS_ORDER = ("text", "sampled", "top", "score_ids", "logits")


@record
class TeacherDecl:
    """A teacher role; the model behind it is bound at run time."""

    name: str
    kind: str  # "external" | "self" | "ema" | "initial"
    access: str  # one of ACCESS_ORDER
    k: int | None = None
    context: str | None = None
    decay: float | None = None
    every: int = 1  # optimizer steps between two updates of an average
    when: tuple[str, str] | None = None
    span: Span = NOWHERE


@record
class Routed:
    """A distribution chosen per prompt among several teachers (`routed(a, b)`)."""

    name: str
    parts: tuple[str, ...]
    conditions: tuple[tuple[str, str] | None, ...]


@record
class CriticDecl:
    """A learned value of the state (nats): trained on λ-returns (theory §8)."""

    name: str
    init: str
    lr: float
    warmup: int


@record
class ParamValue:
    name: str
    value: float | Schedule
    unit: str
    domain_text: str = ""
    span: Span = NOWHERE


@record
class RunBlock:
    name: str
    method: str
    settings: Mapping[str, object]
    sweeps: Mapping[str, tuple[object, ...]]


@record
class Acceptance:
    keyword: str  # "accept" | "allow"
    rule: str  # slug or rule id
    reason: str
    inherited: bool
    span: Span = NOWHERE


@record
class Support:
    """The index set of a term and what happens to the mass outside it."""

    set: Node  # with_bin(…) when tail is bin
    base: Node  # the set without a bucket
    tail: str | None  # None on `full` and on `sampled`


@record
class Routing:
    """Where suppressed mass goes (theory §9): active where `trigger` holds."""

    kind: str  # "suppress" | "counterfactual" | "proportional" | "drop" | "local"
    trigger: Node | None = None
    candidates: Node | None = None  # bool over `domain`
    domain: Node | None = None
    target: Node | None = None  # normalised over the candidates
    raw_target: Node | None = None  # as written, before normalisation
    strength: Node | None = None
    routable: Node | None = None  # some candidate exists
    otherwise: str = "suppress"
    span: Span = NOWHERE


SUPPRESS = Routing("suppress")


@record
class Term:
    """One additive term: (1/N) Σ weight · gate · loss."""

    name: str
    kind: str  # "feedback" | "regularizer"
    route: str  # "loss" | "reward" | "scores" | "sft"
    support: Support
    loss: Node  # per token, gradient through the student
    gate: Node
    weight: Node
    feedback: Node | None = None  # as written
    signal: Node | None = None  # frozen, shaped reward
    advantage: Node | None = None  # result of credit and baseline
    returned: Node | None = None  # result of credit alone
    routing: Routing = SUPPRESS
    credit: str | None = None  # as written
    baseline: str | None = None
    teachers: tuple[str, ...] = ()
    teacher_named: bool = False
    rows: str = "main"  # "golden": measured on sequences(golden)
    spans: Mapping[str, Span] = dict  # type: ignore[assignment]
    written: Mapping[str, str] = dict  # type: ignore[assignment]


@record
class Spec:
    name: str
    title: str | None
    evidence: str | None
    cites: tuple[tuple[str, str], ...]
    acceptances: tuple[Acceptance, ...]
    states: tuple[StateSource, ...]
    teachers: tuple[TeacherDecl, ...]
    routed: tuple[Routed, ...]
    params: tuple[ParamValue, ...]
    critics: tuple[CriticDecl, ...]
    terms: tuple[Term, ...]  # feedback terms first, then regularizers
    aggregate: str  # "sum" | "tokens" | "kept_tokens" | "sequences" | "response_length"
    optimize: Mapping[str, object]
    runs: Mapping[str, RunBlock]
    builder: Builder
    span: Span = NOWHERE
    extends: tuple[str, ...] = ()

    @property
    def feedback_terms(self) -> tuple[Term, ...]:
        return tuple(t for t in self.terms if t.kind == "feedback")

    @property
    def group(self) -> int:
        return max((s.group for s in self.states), default=1)
