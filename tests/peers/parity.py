"""Rows of the parity table: a function of a peer, our spec, and what may differ.

A row hands the same random batches to both sides. The peer's own function computes a scalar from a
float64 leaf [B, T, V] of student logits; its value and its gradient with respect to that leaf are
compared with `method.loss` and with the oracle `method.reference`. What a row function does besides
calling the peer is preparing arguments: gathering log-probabilities, padding, masks.

Legend: B sequences, T positions, V vocabulary, K kept candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from support import batches, relative
from torch import Tensor

import opdsl
from opdsl.method import Method

SEEDS = (11, 12, 13)
FLOAT64 = 1e-9
FLOAT32 = 2e-5  # the peer computes in float32
APART = 1e-2  # two objectives that differ have gradients at least this far apart, relatively


@dataclass(frozen=True)
class Case:
    """One batch as the peers want it. `student` is the leaf; nothing else carries a gradient."""

    inputs: batches.Inputs
    student: Tensor  # [B, T, V], requires grad

    @property
    def teacher(self) -> Tensor:
        return next(iter(self.inputs.teachers.values()))

    @property
    def initial(self) -> Tensor:
        return self.inputs.initial_BTV

    @property
    def tokens(self) -> Tensor:
        return self.inputs.tokens_BT

    @property
    def mask(self) -> Tensor:
        return self.inputs.mask_BT

    @property
    def labels(self) -> Tensor:
        """Tokens, −100 outside the response."""
        return self.tokens.masked_fill(~self.mask, -100)

    @property
    def rollout(self) -> Tensor:
        """Log-probabilities of the sampler [B, T]."""
        assert self.inputs.rollout_BT is not None
        return self.inputs.rollout_BT

    def logps(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the tokens [B, T]."""
        picked = torch.log_softmax(logits, -1).gather(2, self.tokens[..., None])
        return picked.squeeze(-1)

    @cached_property
    def student_logp(self) -> Tensor:
        return self.logps(self.student)

    @cached_property
    def teacher_logp(self) -> Tensor:
        return self.logps(self.teacher)

    def teacher_top(self, k: int) -> tuple[Tensor, Tensor]:
        """(log-probabilities, ids) of the teacher's top k, [B, T, K] each."""
        values, ids = torch.log_softmax(self.teacher, -1).topk(k, -1)
        return values, ids


def served(c: Case, k: int) -> dict[str, Tensor]:
    """What a teacher's server gives TRL's trainers; −inf outside the response, as there."""
    values, ids = c.teacher_top(k)
    outside = ~c.mask
    return {
        "topk_logprobs": values.masked_fill(outside[..., None], -torch.inf),
        "topk_token_ids": ids,
        "actual_logprobs": c.teacher_logp.masked_fill(outside, -torch.inf),
    }


@dataclass(frozen=True)
class Row:
    """One line of docs/parity.md.

    spec: a shipped method by name, or the text of an inline one (a bare function is no method).
    value: whether the two values mean the same; a clipped surrogate's value does not.
    unlike: a spec whose gradient must differ from the peer's: what the peer is not.
    """

    peer: str
    function: str
    spec: str
    call: Callable[[Case], Tensor]
    knobs: dict[str, object] = field(default_factory=dict)
    setting: str = ""
    remark: str = ""
    value: bool = True
    tolerance: float = FLOAT64
    unlike: str = ""
    contiguous: bool = False  # responses without holes
    spread: float = 1.0

    @property
    def inline(self) -> bool:
        return "\n" in self.spec

    @property
    def spec_name(self) -> str:
        return "(inline)" if self.inline else self.spec

    @property
    def id(self) -> str:
        last = ".".join(self.function.split(".")[-2:])
        return "-".join(x for x in (last, self.setting, self.spec_name) if x)


ROWS: list[Row] = []


def row(peer: str, function: str, spec: str, **settings) -> Callable:
    """Registers the decorated call as a row."""

    def register(call: Callable[[Case], Tensor]) -> Callable[[Case], Tensor]:
        ROWS.append(Row(peer, function, spec, call, **settings))
        return call

    return register


def rows(module: str) -> list[Row]:
    """The rows that a test file registered."""
    return [r for r in ROWS if r.call.__module__ == module]


def method(spec: str, knobs: dict[str, object]) -> Method:
    return opdsl.compile(spec, knobs) if "\n" in spec else opdsl.load(spec, knobs)


def draw(m: Method, seed: int, r: Row) -> batches.Inputs:
    """Uneven masks without an empty sequence (peers disagree on what those count for)."""
    teachers = tuple(t.name for t in m.spec.teachers if t.kind != "initial") or ("T",)
    x = batches.draw(
        seed, B=6, T=7, V=13, teachers=teachers, golden=False, spread=r.spread,
        critics=tuple(c.name for c in m.spec.critics),
    )  # fmt: skip
    b, t = x.mask_BT.shape
    g = torch.Generator().manual_seed(seed)
    if r.contiguous:
        mask = torch.arange(t)[None] < torch.randint(1, t + 1, (b, 1), generator=g)
    else:
        mask = x.mask_BT | (torch.arange(t)[None] == torch.randint(0, t, (b, 1), generator=g))
    # responses end: nothing is left to come after the last token
    values = {k: v * torch.nn.functional.pad(mask, (0, 1)) for k, v in x.values.items()}
    prompt = tuple({**p, "reprompted": "no" if i == 1 else "yes"} for i, p in enumerate(x.prompt))
    return replace(x, mask_BT=mask, values=values, prompt=prompt)


@dataclass(frozen=True)
class Errors:
    """Largest relative errors over the batches, and how far `unlike` is from the peer."""

    value: float
    gradient: float
    apart: float | None


def measure(r: Row) -> Errors:
    m = method(r.spec, r.knobs)
    other = method(r.unlike, {}) if r.unlike else None
    value, gradient, apart = 0.0, 0.0, []
    for seed in SEEDS:
        inputs = draw(m, seed, r)
        leaf = inputs.student_BTV.clone().requires_grad_()
        theirs = r.call(Case(inputs, leaf))
        (their_grad,) = torch.autograd.grad(theirs, leaf)
        assert bool(their_grad.abs().max() > 0), "the peer's gradient is zero: nothing was compared"
        batch, ours = batches.logits(inputs)
        oracle, emitted = m.reference(batch), m.loss(batch)
        (our_grad,) = torch.autograd.grad(emitted.loss, ours)
        if r.value:
            scale = max(abs(oracle.loss), *(abs(x) for x in oracle.terms.values()))
            for x in (oracle.loss, emitted.loss.detach()):
                value = max(value, relative(theirs.detach(), x, scale))
        for x in (oracle.grad_logits, our_grad):
            gradient = max(gradient, relative(their_grad, x))
        if other is not None:
            right = other.reference(batch).grad_logits
            apart.append(relative(their_grad, right))
    return Errors(value, gradient, min(apart) if apart else None)


def check(r: Row) -> None:
    found = measure(r)
    assert found.value <= r.tolerance, f"value off by {found.value:.2e}"
    assert found.gradient <= r.tolerance, f"gradient off by {found.gradient:.2e}"
    if r.unlike:
        assert found.apart is not None and found.apart > APART, f"{r.unlike} is no different"
