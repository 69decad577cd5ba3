"""What each rule warns of, as a number measured on models small enough to enumerate.

`EFFECTS[code]` takes the compiled case and gives the size of the effect; the rule must report the
code exactly where the number exceeds its tolerance. Model A: vocabulary 4 with an end token,
length cap 3, 13 states. Model B: one state, vocabulary 12. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import opdsl
from opdsl.method import Method
from opdsl.passport import enumerate as exact

from . import toy

A = exact.tree()
B = exact.tree(12, 1, None)
STUDENT, TEACHER = toy.models(A)
SMALL_S, SMALL_T = toy.models(B, seed=3)
J_SEQ = exact.gradient(lambda z: exact.sequence_kl(A, z, TEACHER), STUDENT)
J_FRO = exact.gradient(lambda z: exact.frozen_kl(A, z, TEACHER), STUDENT)
REVERSE = exact.gradient(lambda z: exact.state_kl(z, SMALL_T).sum(), SMALL_S)
WON = (A.tokens_BT.sum(1) % 2).double()


@dataclass(frozen=True)
class Effect:
    """measure: case -> number. What exceeds `tolerance` is what the rule speaks of."""

    says: str
    tolerance: float
    measure: Callable[[Method], float]


EFFECTS: dict[str, Effect] = {}


def effect(code: str, says: str, tolerance: float = 1e-6):
    def add(f: Callable[[Method], float]) -> Callable[[Method], float]:
        EFFECTS[code] = Effect(says, tolerance, f)
        return f

    return add


# ---- tools ---------------------------------------------------------------------------------------


def field(m: Method, w=A, student=STUDENT, teacher=TEACHER, **rest) -> Tensor:
    """Expected gradient [S, V] per rollout."""
    return measured(m, w, student, teacher, **rest).gradient


def measured(m: Method, w=A, student=STUDENT, teacher=TEACHER, **rest) -> exact.Measured:
    start = student if w is A else SMALL_S
    given = {"outcome_B": WON if w is A else torch.ones(12).double(), "initial_SV": start + 0.3}
    return exact.expected(m.program, w, student, teacher, **{**given, **rest})


def small(m: Method, student=SMALL_S, teacher=SMALL_T, **rest) -> Tensor:
    return field(m, B, student, teacher, initial_SV=B.random(77), **rest)


def apart(x: Tensor, y: Tensor) -> float:
    """‖x − y‖ / ‖y‖"""
    return float((x - y).norm() / y.norm())


def turned(x: Tensor, y: Tensor) -> float:
    """1 − cos of the angle; 1 where either vanishes."""
    size = float(x.norm() * y.norm())
    return 1.0 if size < 1e-12 else 1 - float((x * y).sum()) / size


def off(x: Tensor, y: Tensor) -> float:
    """‖x − k y‖ / ‖x‖ at the best k > 0."""
    k = max(float((x * y).sum() / (y * y).sum()), 0.0)
    return float((x - k * y).norm() / x.norm())


def lost(x: Tensor, y: Tensor) -> float:
    """How much of the size of y is gone: 1 is everything."""
    return 1 - min(1.0, float(x.norm() / y.norm()))


def agrees(x: Tensor, y: Tensor) -> float:
    """Digits to which both agree."""
    import math

    return -math.log10(max(apart(x, y), 1e-16))


def by_state(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """(best factor per state, share of ‖x‖ that no factor per state explains)."""
    k_S = (x * y).sum(1) / (y * y).sum(1).clamp_min(1e-30)
    return k_S, float((x - k_S[:, None] * y).norm() / x.norm())


def at_token(m: Method, y: int, student=SMALL_S, teacher=SMALL_T) -> Tensor:
    """Logit gradient [V] at one state whose sampled token is y."""
    z = student.reshape(1, 1, -1).clone().requires_grad_()
    batch = opdsl.Batch.from_logits(
        z, teacher.reshape(1, 1, -1), tokens=torch.tensor([[y]]), mask=torch.tensor([[True]])
    )
    (grad,) = torch.autograd.grad(m.loss(batch).loss, z)
    return grad.reshape(-1)


def probs() -> tuple[Tensor, Tensor]:
    return torch.softmax(SMALL_S, -1).reshape(-1), torch.softmax(SMALL_T, -1).reshape(-1)


def source(m: Method) -> str:
    return m.compilation.source.text


def variant(m: Method, *changes: tuple[str, str]) -> Method:
    """The same text with replacements."""
    text = source(m)
    for old, new in changes:
        text = text.replace(old, new)
    return opdsl.compile(text)


def at(law_SV: Tensor) -> Tensor:
    """∇ of KL(student ‖ T) at the states that another policy visits."""
    d = exact.visits(A, law_SV)
    return exact.gradient(lambda z: (d * exact.state_kl(z, TEACHER)).sum(), STUDENT)


# ---- estimators: R01-R10 ---------------------------------------------------------------------------


@effect("OPD302", "expected gradient lost, share", 0.5)
def _(m):
    return lost(field(m), J_FRO)


@effect("OPD525", "angle to the gradient of KL(student ‖ T), 1 − cos")
def _(m):
    return turned(small(m), REVERSE)


def near_teacher(m: Method, want: Callable[[Tensor], Tensor]) -> float:
    student = SMALL_T + 0.05 * B.random(9)
    return turned(small(m, student), exact.gradient(lambda z: want(z).sum(), student))


@effect("OPD310", "angle to KL(student ‖ T) close to the teacher, 1 − cos", 0.02)
def _(m):
    return near_teacher(m, lambda z: exact.state_kl(z, SMALL_T))


@effect("OPD319", "angle to the gradient of the divergence whose value it is, 1 − cos")
def _(m):
    def hellinger(z):
        p, q = torch.softmax(z, -1), torch.softmax(SMALL_T, -1)
        return (p * (1 - (q / p) ** 0.5) ** 2).sum(-1)

    return turned(small(m), exact.gradient(lambda z: hellinger(z).sum(), SMALL_S))


@effect("OPD307", "expected gradient lost, share", 0.5)
def _(m):
    return lost(field(m), J_FRO)


@effect("OPD520", "gradient lost where no token leads elsewhere, share", 0.5)
def _(m):
    return lost(small(m), REVERSE)


@effect("OPD301", "weight of the last state over the first, minus 1")
def _(m):
    k_S, _ = by_state(field(m), J_FRO)
    depth = torch.tensor([len(p) for p in A.prefixes])
    return float(k_S[depth == 2].mean() / k_S[depth == 0].mean() - 1)


@effect("OPD528", "digits to which the mean is that of the sampled log-ratio", 9)
def _(m):
    assert measured(m).variance < measured(toy.reward("logratio(T, rollout)")).variance
    return agrees(field(m), J_FRO)


@effect("OPD316", "distance to ∇KL(student ‖ T) at the visited states")
def _(m):
    law = TEACHER if m.spec.states[0].kind == "sequences" else STUDENT
    return apart(field(m, sampler_SV=law), at(law))


@effect("OPD504", "distance to ∇KL(student ‖ T) at the visited states")
def _(m):
    law = STUDENT / m.spec.states[0].temperature
    return apart(field(m, sampler_SV=law), at(law))


@effect("OPD507", "distance to ∇KL(student ‖ T) at the visited states")
def _(m):
    law = STUDENT + 0.5 * A.random(5)
    return apart(field(m, sampler_SV=law), at(law))


# ---- supports: R20-R29 -------------------------------------------------------------------------------


@effect("OPD312", "gradient lost, share", 0.5)
def _(m):
    return lost(small(m), REVERSE)


@effect("OPD502", "gradient left at student = teacher, over that before")
def _(m):
    return float(small(m, SMALL_T).norm() / small(m).norm())


def outward(z: Tensor, k: int = 2) -> Tensor:
    """∇π(Ω) [V] for the teacher's top k."""
    inside = torch.zeros(1, 12).double().scatter(-1, SMALL_T.topk(k, -1).indices, 1.0)
    return exact.gradient(lambda x: (torch.softmax(x, -1) * inside).sum(), z)


@effect("OPD503", "slope along moving mass out of the support lost, share", 0.9)
def _(m):
    out = torch.ones(1, 12).double().scatter(-1, SMALL_T.topk(2, -1).indices, 0.0)
    return 1 - min(1.0, abs(float((small(m) * out).sum() / (REVERSE * out).sum())))


def value(m: Method, student=SMALL_S, teacher=SMALL_T) -> float:
    batch = opdsl.Batch.from_logits(
        student.reshape(1, 1, -1), teacher.reshape(1, 1, -1),
        tokens=torch.tensor([[0]]), mask=torch.tensor([[True]]),
    )  # fmt: skip
    return float(m.reference(batch).loss)


@effect("OPD529", "nats of KL(student ‖ T) inside the one entry")
def _(m):
    p, q = probs()
    gap = float((p * (p / q).log()).sum()) - value(m)
    top = torch.zeros(12).bool().scatter(0, SMALL_T.reshape(-1).topk(2).indices, True)
    a, b = p[~top], q[~top]
    inside = float(a.sum() * ((a / a.sum()) * ((a / a.sum()) / (b / b.sum())).log()).sum())
    assert abs(gap) < 1e-12 or abs(gap - inside) < 1e-12
    return gap


@effect("OPD530", "distance to ∇KL(student ‖ T) where the student likes other tokens", 0.5)
def _(m):
    likes = torch.zeros(1, 12).double()
    student, teacher = likes.clone(), likes.clone()
    student[0, :2], teacher[0, 2:4] = 8.0, 8.0
    student[0, 0], teacher[0, 2] = 7.0, 9.0
    want = exact.gradient(lambda z: exact.state_kl(z, teacher).sum(), student)
    return apart(small(m, student, teacher), want)


@effect("OPD322", "share of states without any gradient")
def _(m):
    dead = [float(small(m, *toy.models(B, seed)).norm()) < 1e-12 for seed in range(60)]
    return sum(dead) / len(dead)


@effect("OPD321", "share of states whose mass is 1", 0.5)
def _(m):
    text = source(m)
    line = next(x for x in text.splitlines() if x.strip().startswith("weight"))
    bare = opdsl.compile(text.replace(line + "\n", "").replace('  allow OPD321 "as a case"\n', ""))
    ones = 0
    for seed in range(20):
        s, t = toy.models(B, seed)
        ones += abs(float(small(m, s, t).norm() / small(bare, s, t).norm()) - 1) < 1e-9
    return ones / 20


@effect("OPD401", "entries asked for beyond those given")
def _(m):
    from opdsl.meaning.access import requirements

    return (requirements(m.spec)["T"].k or 0) - (m.spec.teachers[0].k or 0)


@effect("OPD531", "push ∇π(support) left over, in units of ∇KL's")
def _(m):
    push = outward(SMALL_S).ravel()
    rest = (small(m) - REVERSE).ravel()
    return abs(float((rest * push).sum() / (push * push).sum()))
