"""Exact small models: every response enumerated, so that an expectation is a finite sum.

A tree holds one state per prefix, each with logits of its own, so the policy is exact and every
gradient is known: of the sequence-level KL, of the KL with the state distribution frozen, and of
the term between the two (theory §§3-5, 13). The expected gradient of a compiled method is measured
by running its emitted passes on all responses at once.

Legend: S states (prefixes), V vocabulary, B responses, T length cap, M draws (groups of responses).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from opdsl.emit.batch import Batch
from opdsl.emit.module import emit
from opdsl.emit.runtime import LossModule
from opdsl.ir.program import Program, lower
from opdsl.meaning.graph import nodes_below
from opdsl.records import replace

LIMIT = 200_000  # rows of one enumeration


@dataclass(frozen=True, eq=False)
class Tree:
    """All responses over `vocab` tokens that end with `eos` or at the cap."""

    vocab: int
    cap: int
    eos: int | None
    prefixes: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    tokens_BT: Tensor  # int64, 0 beyond the end
    mask_BT: Tensor
    state_BT: Tensor  # index of the prefix before each token, 0 beyond the end
    next_SV: Tensor  # index of the prefix after each token, -1 where the response has ended

    @property
    def size(self) -> tuple[int, int]:
        """(S, V), the shape of a table of logits."""
        return len(self.prefixes), self.vocab

    def random(self, seed: int, spread: float = 1.0) -> Tensor:
        """Logits [S, V] of a random policy."""
        g = torch.Generator().manual_seed(seed)
        return spread * torch.randn(*self.size, generator=g, dtype=torch.float64)


@lru_cache(maxsize=8)
def tree(vocab: int = 4, cap: int = 3, eos: int | None = 0) -> Tree:
    """The tree of theory §13's model A; `tree(12, 1, None)` is model B, a single state."""
    prefixes = [p for n in range(cap) for p in itertools.product(range(vocab), repeat=n)]
    prefixes = [p for p in prefixes if eos is None or eos not in p]
    index = {p: i for i, p in enumerate(prefixes)}
    responses = []
    for p in prefixes:
        for v in range(vocab):
            if v == eos or len(p) + 1 == cap:
                responses.append((*p, v))
    tokens = torch.zeros(len(responses), cap, dtype=torch.int64)
    states = torch.zeros_like(tokens)
    mask = torch.zeros(len(responses), cap, dtype=torch.bool)
    for b, y in enumerate(responses):
        for t, v in enumerate(y):
            tokens[b, t], states[b, t], mask[b, t] = v, index[y[:t]], True
    after = torch.tensor([[index.get((*p, v), -1) for v in range(vocab)] for p in prefixes])
    return Tree(vocab, cap, eos, tuple(prefixes), tuple(responses), tokens, mask, states, after)


# ---- exact quantities ----------------------------------------------------------------------------


def log_probability(w: Tree, logits_SV: Tensor) -> Tensor:
    """log π(response) [B], differentiable in the logits."""
    lp_SV = torch.log_softmax(logits_SV, -1)
    return (lp_SV[w.state_BT, w.tokens_BT] * w.mask_BT).sum(1)


def visits(w: Tree, logits_SV: Tensor) -> Tensor:
    """d(s) [S]: probability that a response passes through each state."""
    p_SV = torch.softmax(logits_SV, -1)
    out = [torch.ones((), dtype=p_SV.dtype)]
    parent = {
        int(c): (s, v) for s, row in enumerate(w.next_SV) for v, c in enumerate(row) if c >= 0
    }
    for s in range(1, len(w.prefixes)):
        above, v = parent[s]
        out.append(out[above] * p_SV[above, v])
    return torch.stack(out)


def state_kl(student_SV: Tensor, teacher_SV: Tensor) -> Tensor:
    """KL(student ‖ teacher) [S] at every state."""
    lp, lq = torch.log_softmax(student_SV, -1), torch.log_softmax(teacher_SV, -1)
    return (lp.exp() * (lp - lq)).sum(-1)


def sequence_kl(w: Tree, student_SV: Tensor, teacher_SV: Tensor) -> Tensor:
    """J_seq = Σ_y π(y) log(π(y) / π_T(y)) over whole responses."""
    lp, lq = log_probability(w, student_SV), log_probability(w, teacher_SV)
    return (lp.exp() * (lp - lq)).sum()


def frozen_kl(w: Tree, student_SV: Tensor, teacher_SV: Tensor) -> Tensor:
    """J_fro = Σ_s sg(d(s)) KL(s): the states are held fixed."""
    return (visits(w, student_SV).detach() * state_kl(student_SV, teacher_SV)).sum()


def returns(
    w: Tree, student_SV: Tensor, teacher_SV: Tensor, gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(V [S], continuation [S, V]): expected discounted sum of r = log π_T(y) − log π(y) from a
    state, and of everything after a token. At γ = 1, V = −W, the remaining sequence KL."""
    lp, lq = torch.log_softmax(student_SV, -1), torch.log_softmax(teacher_SV, -1)
    value_S = torch.zeros(len(w.prefixes), dtype=lp.dtype)
    after_SV = torch.zeros_like(lp)
    for s in reversed(range(len(w.prefixes))):
        for v in range(w.vocab):
            child = int(w.next_SV[s, v])
            after_SV[s, v] = value_S[child] if child >= 0 else 0.0
        value_S[s] = (lp[s].exp() * (lq[s] - lp[s] + gamma * after_SV[s])).sum()
    return value_S, after_SV


def occupancy(w: Tree, student_SV: Tensor, teacher_SV: Tensor) -> Tensor:
    """E[Σ_t ∇log π(y_t) W(s_{t+1})] [S, V]: what credit at the own token leaves out (theory T3)."""
    _, after_SV = returns(w, student_SV.detach(), teacher_SV)
    z = student_SV.detach().requires_grad_()
    lp_SV = torch.log_softmax(z, -1)
    weight_SV = visits(w, z).detach()[:, None] * lp_SV.detach().exp() * -after_SV
    (grad,) = torch.autograd.grad((weight_SV * lp_SV).sum(), z)
    return grad


def gradient(objective: Callable[[Tensor], Tensor], student_SV: Tensor) -> Tensor:
    """Gradient [S, V] of a scalar of the student's logits."""
    z = student_SV.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(objective(z), z)
    return grad


def critic(w: Tree, value_S: Tensor) -> Tensor:
    """A table of state values as a batch wants it: [B, T + 1], 0 after the end."""
    out_BT = torch.where(w.mask_BT, value_S[w.state_BT], 0.0)
    return torch.cat([out_BT, torch.zeros(len(out_BT), 1, dtype=out_BT.dtype)], 1)


# ---- compiled methods ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """The exact distribution of a method's per-rollout gradient."""

    gradient: Tensor  # [S, V] expected gradient of the loss
    variance: float  # E‖g − E g‖² of one draw of `group` responses


class Coupled(ValueError):
    """The method reads statistics of the whole batch: no draw stands alone."""


def summed(program: Program) -> Program:
    """The program with its batch-wide denominators left out, so that responses add up."""
    how = "response_length" if program.spec.aggregate in ("sequences", "response_length") else "sum"
    out = lower(replace(program.spec, aggregate=how))
    batchwide = {"sum_b", "max_b", "quantile_b", "position_sum"}
    for n in nodes_below([p.total for p in out.parts]):
        if n.op in batchwide:
            raise Coupled(f"this method reads the whole batch ({n.op})")
    return out


def expected(
    program: Program,
    w: Tree,
    student_SV: Tensor,
    teacher_SV: Tensor | Mapping[str, Tensor],
    *,
    group: int = 1,
    initial_SV: Tensor | None = None,
    values_S: Tensor | None = None,
    outcome_B: Tensor | None = None,
    sampler_SV: Tensor | None = None,
) -> Measured:
    """Exact expected gradient of Σ over tokens of the loss, per rollout drawn from the student.

    group: responses drawn together (all tuples are enumerated). values_S: a critic's table.
    sampler_SV: the policy that draws instead of the student. Raises Coupled for a method that
    reads whole-batch statistics, ValueError where the enumeration is too large.
    """
    program = summed(program)
    n = len(w.responses)
    if n**group * group * w.cap > LIMIT:
        raise ValueError(f"{n} responses in groups of {group} are too many to enumerate")
    pick = torch.cartesian_prod(*[torch.arange(n)] * group).reshape(-1)
    draws = n**group
    states = w.state_BT[pick]
    law = student_SV if sampler_SV is None else sampler_SV
    log_law = log_probability(w, law.detach())
    weight_M = log_law[pick].reshape(draws, group).sum(1).exp()

    leaf = student_SV.detach()[states].requires_grad_()
    teachers = teacher_SV if isinstance(teacher_SV, Mapping) else {"T": teacher_SV}
    rollout = torch.log_softmax(law.detach(), -1)[states, w.tokens_BT[pick]]
    batch = Batch.from_logits(
        leaf,
        {k: v.detach()[states] for k, v in teachers.items()},
        tokens=w.tokens_BT[pick],
        mask=w.mask_BT[pick],
        rollout_logprobs=rollout,
        initial_logits=None if initial_SV is None else initial_SV.detach()[states],
        outcome=None if outcome_B is None else outcome_B[pick],
        group=torch.arange(draws).repeat_interleave(group),
        values=None if values_S is None else critic(w, values_S)[pick],
    )
    module = LossModule(program, emit(program))
    (dz_BTV,) = torch.autograd.grad(module(batch).loss, leaf)
    per_draw = torch.zeros(draws, *w.size, dtype=dz_BTV.dtype)
    draw_of = torch.arange(draws).repeat_interleave(group)[:, None].expand(-1, w.cap)
    per_draw.index_put_((draw_of, states), dz_BTV, accumulate=True)
    per_draw /= group
    mean_SV = (weight_M[:, None, None] * per_draw).sum(0)
    spread = float((weight_M * (per_draw - mean_SV).square().sum((1, 2))).sum())
    return Measured(mean_SV, spread)


def asymmetry(field: Callable[[Tensor], Tensor], at_SV: Tensor, step: float = 1e-4) -> float:
    """‖J − Jᵀ‖ / ‖J‖ of a vector field of the logits: zero for the gradient of a scalar (T4).

    Central differences: a compiled loss gives first derivatives only.
    """
    size = at_SV.numel()
    rows = []
    for i in range(size):
        shift = torch.zeros(size, dtype=at_SV.dtype)
        shift[i] = step
        shift = shift.reshape(at_SV.shape)
        rows.append(((field(at_SV + shift) - field(at_SV - shift)) / (2 * step)).reshape(-1))
    jacobian = torch.stack(rows)
    return float((jacobian - jacobian.T).norm() / jacobian.norm().clamp_min(1e-300))
