"""A small stand-in for a compiled method, so that the trainer is tested on its own.

`FakeMethod("reverse")` is KL(student || T) at every state, averaged over the tokens of the
batch; `FakeMethod("returns")` is a score function on the return-to-go of the log-ratio,
averaged likewise. Both keep the contract of `opdsl.Batch` and
`Method.loss`, splitting included. Critics need a compiled method: see `with_critic`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch


@dataclass
class FakeBatch:
    student_logits: Any
    teacher_logits: Any = None
    tokens: Any = None
    mask: Any = None
    rollout_logprobs: Any = None
    values: Any = None
    golden: Any = None
    extra: dict = field(default_factory=dict)
    total: float | None = None  # tokens of the whole batch

    @classmethod
    def from_logits(cls, student_logits, teacher_logits=None, **rest):
        known = {
            k: rest.pop(k)
            for k in ("tokens", "mask", "rollout_logprobs", "values", "golden")
            if k in rest
        }
        if isinstance(known.get("values"), dict):
            (known["values"],) = known["values"].values()
        return cls(student_logits, teacher_logits, extra=rest, **known)

    @classmethod
    def from_hidden(cls, hidden, lm_head, teacher_hidden=None, teacher_head=None, **rest):
        def logits(states, head):
            return torch.nn.functional.linear(states, head.weight[: head.width])

        teacher = {n: logits(h, teacher_head[n]) for n, h in (teacher_hidden or {}).items()}
        return cls.from_logits(logits(hidden, lm_head), teacher, **rest)

    def split(self, n):
        B = len(self.tokens)
        total = self.mask.sum().item() if self.total is None else self.total
        parts = []
        for i in range(n):
            rows = slice(i * B // n, (i + 1) * B // n)
            cut = {k: getattr(self, k)[rows] for k in ("student_logits", "tokens", "mask")}
            for k in ("rollout_logprobs", "values"):
                v = getattr(self, k)
                cut[k] = None if v is None else v[rows]
            teachers = {n: t[rows] for n, t in (self.teacher_logits or {}).items()}
            parts.append(replace(self, teacher_logits=teachers, total=total, **cut))
        return parts


class FakeLoss(torch.nn.Module):
    needs_prepare = False

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def prepare(self, parts):
        return [None] * len(parts)

    @staticmethod
    def _ratio(batch):
        teacher = next(iter(batch.teacher_logits.values())).log_softmax(-1)
        at_y = teacher.gather(-1, batch.tokens.unsqueeze(-1)).squeeze(-1)
        return torch.where(batch.mask, at_y - batch.rollout_logprobs, 0.0)

    def forward(self, batch, context=None):
        total = batch.total if batch.total is not None else batch.mask.sum().item()
        logp = batch.student_logits.log_softmax(-1)
        if self.kind == "reverse":
            logq = next(iter(batch.teacher_logits.values())).log_softmax(-1)
            each = (logp.exp() * (logp - logq)).sum(-1)
        else:
            credit = self._ratio(batch).flip(-1).cumsum(-1).flip(-1)
            at_y = logp.gather(-1, batch.tokens.unsqueeze(-1)).squeeze(-1)
            each = -credit.detach() * at_y
        each = torch.where(batch.mask, each, 0.0)
        loss = each.sum() / max(total, 1)
        return SimpleNamespace(loss=loss, metrics={"kept": float(batch.mask.float().mean())})


@dataclass(frozen=True)
class State:
    kind: str = "rollouts"
    policy: str = "student"
    share: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    group: int = 1
    max_tokens: int | None = None
    lag: int = 0
    prefix: int | None = None
    parts: tuple[tuple[float, str], ...] = ()
    accept: int | None = None


@dataclass(frozen=True)
class TeacherDecl:
    name: str = "T"
    kind: str = "external"
    access: str = "logits"
    k: int | None = None
    context: str | None = None
    decay: float | None = None
    every: int = 1
    when: tuple[str, str] | None = None
    span: object = None


@dataclass(frozen=True)
class Spec:
    name: str
    states: tuple = (State(),)
    teachers: tuple = (TeacherDecl(),)
    routed: tuple = ()
    critics: tuple = ()
    terms: tuple = ()
    optimize: dict = field(default_factory=dict)
    runs: dict = field(default_factory=dict)
    params: tuple = ()


class FakeMethod:
    title = "a stand-in"

    def __init__(self, kind="reverse", **spec):
        self.spec = Spec(f"fake_{kind}", **spec)
        self.name = self.spec.name
        self.loss = FakeLoss(kind)
        self.gae = None
        self.needs = SimpleNamespace(
            teachers={t.name: t.access for t in self.spec.teachers},
            initial=False,
            rollout=True,
            outcome=False,
            group=False,
            values=(),
            special=False,
            golden=False,
            prompt_fields=(),
            coupled=False,
        )
        self.fingerprints = {"method": f"m-{kind}-{self.spec.states}", "optimize": "o", "run": "r"}

    def explain(self, format="text"):
        return f"{self.name}: a formula"


def run_block(**settings):
    return SimpleNamespace(name="real", method="fake_reverse", settings=settings, sweeps={})


def with_critic(warmup):
    """A compiled method whose advantage reads a critic."""
    import opdsl

    return opdsl.compile(f"""opd 1
method critic_returns {{
  accept    value_drift "a test"
  state     rollouts(student)
  teacher   T = external(access = sampled)
  support   sampled
  feedback  reward logratio(T, rollout)
  let V : nats per token = critic(init = student, lr = 1e-3, warmup = {warmup} steps)
  credit    gae(V = V, gamma = 1, lam = 0.95)
  aggregate mean(over = tokens)
}}
""")
