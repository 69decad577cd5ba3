"""A small random model of a method, and the exact expected gradient of its loss there.

A `Small` holds one case per kind of prompt the method tells apart; each has a tree of its own, so
the student is a table of logits [P, S, V]. Every response (in groups: every multiset of responses)
is weighted by the probability of being drawn by the method's own sampler. `field` runs the emitted
passes on all of them. How the models are made, and what is assumed, is in `small`.

Legend: P prompts, S states (prefixes), V vocabulary, B responses, T length cap, M draws, G group.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opdsl.emit.batch import Batch
from opdsl.emit.module import emit
from opdsl.emit.routed import add_routed
from opdsl.emit.runtime import LossModule
from opdsl.ir.interpret import Evaluator
from opdsl.ir.program import expand_tails, lower
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis
from opdsl.meaning.spec import Routed, Spec, StateSource
from opdsl.passport import enumerate as exact
from opdsl.passport.coupling import BATCHED, GROUPED, LOOPED, drawn, roots
from opdsl.passport.pieces import learner, share_of, sources
from opdsl.passport.returns import credit_of
from opdsl.passport.strict import SOURCE, STEP, STEPS


@dataclass(frozen=True, eq=False)
class Case:
    """What one kind of prompt meets."""

    prompt: Mapping[str, str]
    teachers: Mapping[str, Tensor]  # logits [S, V]
    initial_SV: Tensor
    outcome_B: Tensor
    data_SV: Tensor
    lag_SV: Tensor
    noise_S: Tensor  # error of a wrong critic


@dataclass(frozen=True, eq=False)
class Small:
    spec: Spec  # cut to fit
    tree: exact.Tree
    cases: tuple[Case, ...]
    student_PSV: Tensor
    group: int
    coupled: bool
    notes: tuple[str, ...]
    reference: str | None  # the teacher that J compares with
    golden: tuple[int, ...] = (2, 5, 3)  # responses given as golden text

    # -- programs -----------------------------------------------------------------------------
    @cached_property
    def module(self) -> LossModule:
        program = drawn(self.spec) if self.coupled else exact.summed(lower(self.spec))
        return LossModule(program, emit(program))

    @cached_property
    def looped(self) -> bool:
        return any(n.op in LOOPED for n in roots(self.module.program))

    @cached_property
    def critics(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.spec.critics if learner(self.spec, c.name) is not None)

    # -- policies -----------------------------------------------------------------------------
    def teacher(self, case: Case) -> Tensor | None:
        """Logits [S, V] of the teacher that J compares with, for this prompt."""
        if self.reference is None:
            return None
        for r in self.spec.routed:
            if r.name == self.reference:
                return case.teachers[r.parts[chosen(r, case.prompt)]]
        return case.teachers[self.reference]

    def law(self, source: StateSource, case: Case, z_SV: Tensor) -> Tensor:
        """Log-probabilities [S, V] a token is drawn with; -inf where it cannot be."""
        if source.policy == "blend":
            parts = [w * self._policy(n, source, case, z_SV).exp() for w, n in source.parts]
            return torch.stack(parts).sum(0).log()
        if source.policy == "interleaved":
            draft, judge = (self._policy(n, source, case, z_SV).exp() for _, n in source.parts)
            k = min(source.accept or 1, judge.shape[-1] - 1)
            kept = torch.zeros_like(judge).scatter(-1, judge.topk(k, -1).indices, 1.0)
            lost = (draft * (1 - kept)).sum(-1, keepdim=True)
            return (draft * kept + lost * judge).log()
        return self._policy(source.policy, source, case, z_SV)

    def _policy(self, name: str, source: StateSource, case: Case, z_SV: Tensor) -> Tensor:
        """Log-probabilities [S, V] of one policy, tempered and cut as the source says."""
        if name in ("data", "golden"):
            return torch.log_softmax(case.data_SV, -1)
        x = z_SV.detach()
        if name == "old":
            x = x + case.lag_SV
        elif name == "initial":
            x = case.initial_SV
        elif name != "student":
            x = case.teachers.get(name, self.teacher(case))
        return sampling(x / source.temperature, source)

    # -- the expected gradient ----------------------------------------------------------------
    def field(self, z_PSV: Tensor, wrong: bool = False) -> exact.Measured:
        """Expected gradient [P, S, V] of the loss per rollout, and its variance per draw."""
        grads, spread = [], 0.0
        for case, z_SV in zip(self.cases, z_PSV):
            total, variance = torch.zeros_like(z_SV), 0.0
            means = []
            for source in sources(self.spec):
                found = self._under(source, case, z_SV, wrong)
                share = share_of(source)
                total = total + share * found.gradient
                variance += share * (found.variance + float(found.gradient.square().sum()))
                means.append(found)
            variance -= float(total.square().sum())
            grads.append(total + self._given(case, z_SV))
            spread += max(variance, 0.0) / len(self.cases)
        return exact.Measured(torch.stack(grads) / len(grads), spread)

    def _under(self, source: StateSource, case: Case, z_SV: Tensor, wrong: bool) -> exact.Measured:
        w, g = self.tree, self.group
        case = marked(case, source.policy)
        pick, times_M = self._draws
        logp_SV = self.law(source, case, z_SV)
        logp_BT = logp_SV[w.state_BT, w.tokens_BT].masked_fill(~w.mask_BT, 0.0)
        weight_M = times_M * logp_BT.sum(1)[pick].reshape(-1, g).sum(1).exp()
        own_BT = torch.log_softmax(z_SV, -1)[w.state_BT, w.tokens_BT]
        rollout_BT = torch.where(torch.isfinite(logp_BT), logp_BT, own_BT)
        if source.policy in ("data", "golden"):  # nobody sampled it: the student's own numbers
            rollout_BT = own_BT
        values = self._values(case, source, z_SV, weight_M, rollout_BT, wrong)
        if self.looped:
            per_draw = torch.stack([
                self._gradient(case, z_SV, pick[m * g : m * g + g], rollout_BT, values)[0]
                if weight_M[m] > 0 else torch.zeros_like(z_SV)
                for m in range(len(weight_M))
            ])  # fmt: skip
        else:
            per_draw = self._gradient(case, z_SV, pick, rollout_BT, values)
        if not self.coupled:
            per_draw = per_draw / g
        mean = (weight_M[:, None, None] * per_draw).sum(0)
        spread = (weight_M * (per_draw - mean).square().sum((1, 2))).sum()
        return exact.Measured(mean, float(spread))

    @cached_property
    def _draws(self) -> tuple[Tensor, Tensor]:
        """Responses drawn together [M · G], in no order, and in how many orders they come [M]."""
        n, g = len(self.tree.responses), self.group
        draws = list(itertools.combinations_with_replacement(range(n), g))
        times = [
            math.factorial(g) / math.prod(math.factorial(d.count(i)) for i in set(d)) for d in draws
        ]
        return torch.tensor(draws).reshape(-1), torch.tensor(times, dtype=torch.float64)

    def _batch(
        self,
        case: Case,
        leaf: Tensor,
        pick: Tensor,
        rollout_BT: Tensor,
        values: Mapping[str, Tensor] | None,
        golden: Batch | None = None,
    ) -> Batch:
        w, states = self.tree, self.tree.state_BT[pick]
        special = w.tokens_BT[pick] == 1
        return Batch.from_logits(
            leaf,
            {k: v[states] for k, v in case.teachers.items()},
            tokens=w.tokens_BT[pick],
            mask=w.mask_BT[pick],
            rollout_logprobs=rollout_BT[pick],
            initial_logits=case.initial_SV[states],
            outcome=case.outcome_B[pick],
            group=torch.arange(len(pick) // self.group).repeat_interleave(self.group)
            if len(pick) % self.group == 0
            else torch.zeros(len(pick), dtype=torch.int64),
            values=None
            if values is None
            else {k: exact.critic(w, v)[pick] for k, v in values.items()},
            step=STEP,
            total_steps=STEPS,
            special=special,
            prompt=[case.prompt] * len(pick),
            golden=golden,
        )

    def _gradient(
        self,
        case: Case,
        z_SV: Tensor,
        pick: Tensor,
        rollout_BT: Tensor,
        values: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """Gradient of the loss by draw [M, S, V]; given text is left out."""
        states = self.tree.state_BT[pick]
        leaf = z_SV.detach()[states].requires_grad_()
        loss = self.module(self._batch(case, leaf, pick, rollout_BT, values)).loss
        draws = len(pick) // self.group
        out = torch.zeros(draws, *self.tree.size, dtype=z_SV.dtype)
        if loss.requires_grad:
            (dz_BTV,) = torch.autograd.grad(loss, leaf)
            draw_of = torch.arange(draws).repeat_interleave(self.group)[:, None]
            out.index_put_((draw_of.expand(-1, self.tree.cap), states), dz_BTV, accumulate=True)
        return out

    def _given(self, case: Case, z_SV: Tensor) -> Tensor:
        """Gradient [S, V] of the terms on golden text: fixed responses, once per rollout."""
        part = self.module.program.part("golden")
        out = torch.zeros_like(z_SV)
        if part is None:
            return out
        w = self.tree
        pick = torch.tensor([i % len(w.responses) for i in self.golden])
        states = w.state_BT[pick]
        leaf = z_SV.detach()[states].requires_grad_()
        own_BT = torch.log_softmax(z_SV, -1)[w.state_BT, w.tokens_BT]
        golden = _one_group(self._batch(marked(case, "golden"), leaf, pick, own_BT, None))
        first = torch.arange(self.group)
        rows = z_SV.detach()[w.state_BT[first]]
        values = {c: torch.zeros(w.size[0], dtype=z_SV.dtype) for c in self.critics}
        here = marked(case, sources(self.spec)[0].policy)
        main = self._batch(here, rows, first, own_BT, values or None, golden)
        (dz_BTV,) = torch.autograd.grad(self.module(main).loss, leaf)
        out.index_put_((states,), dz_BTV, accumulate=True)
        return out if self.coupled else out / len(pick)

    # -- critics ------------------------------------------------------------------------------
    def _values(
        self,
        case: Case,
        source: StateSource,
        z_SV: Tensor,
        weight_M: Tensor,
        rollout_BT: Tensor,
        wrong: bool,
    ) -> dict[str, Tensor] | None:
        """Expected return [S] of each critic's own signal from every state."""
        if not self.critics:
            return None
        out = {}
        pick, _ = self._draws
        for name in self.critics:
            term = learner(self.spec, name)
            assert term is not None and term.signal is not None
            gamma = credit_of(term).gamma
            alone = not any(n.op in GROUPED | BATCHED for n in nodes_below([term.signal]))
            rows = torch.arange(len(self.tree.responses)) if alone else pick
            weight = (
                self._alone(source, case, z_SV) if alone else weight_M.repeat_interleave(self.group)
            )
            r_BT = self._signal(case, z_SV, rows, rollout_BT, term.signal)
            out[name] = self._expected_return(rows, weight, r_BT, 1.0 if gamma is None else gamma)
            if wrong:
                out[name] = out[name] + case.noise_S
        return out

    def _alone(self, source: StateSource, case: Case, z_SV: Tensor) -> Tensor:
        w, logp_SV = self.tree, self.law(source, case, z_SV)
        return logp_SV[w.state_BT, w.tokens_BT].masked_fill(~w.mask_BT, 0.0).sum(1).exp()

    def _signal(
        self, case: Case, z_SV: Tensor, rows: Tensor, rollout_BT: Tensor, signal: Node
    ) -> Tensor:
        leaf = z_SV.detach()[self.tree.state_BT[rows]]
        batch = self._batch(case, leaf, rows, rollout_BT, None)
        batch = add_routed(batch, self.spec.routed)
        with torch.no_grad():
            run = Evaluator(batch, leaf.reshape(-1, leaf.shape[-1])[batch.place_N])
            signal = expand_tails(self.spec.builder, signal)
            x = run.lift(run(signal), signal, Axis.TOK)
        r = torch.zeros(len(rows) * self.tree.cap, dtype=z_SV.dtype)
        r[batch.place_N] = x.expand(batch.layout.n_rows).to(z_SV.dtype)
        return r.reshape(len(rows), self.tree.cap)

    def _expected_return(self, rows: Tensor, weight: Tensor, r_BT: Tensor, gamma: float) -> Tensor:
        after, total = torch.zeros(len(rows), dtype=r_BT.dtype), torch.zeros_like(r_BT)
        for t in reversed(range(self.tree.cap)):
            after = r_BT[:, t] + gamma * after
            total[:, t] = after
        states, mask = self.tree.state_BT[rows], self.tree.mask_BT[rows]
        share = weight[:, None].expand_as(total)
        top = torch.zeros(self.tree.size[0], dtype=r_BT.dtype)
        mass = torch.zeros_like(top)
        top.index_put_((states[mask],), (share * total)[mask], accumulate=True)
        mass.index_put_((states[mask],), share[mask], accumulate=True)
        return torch.where(mass > 0, top / mass.clamp_min(1e-300), 0.0)

    # -- objectives -----------------------------------------------------------------------------
    def sequence_gradient(self, z_PSV: Tensor, forward: bool = False) -> Tensor:
        """∇ of KL(student ‖ T) over whole responses (or KL(T ‖ student)), mean over prompts."""
        out = []
        for case, z in zip(self.cases, z_PSV):
            t = self.teacher(case)
            assert t is not None
            out.append(exact.gradient(lambda x, t=t: _sequence(self.tree, x, t, forward), z))
        return torch.stack(out) / len(out)

    def frozen_gradient(self, z_PSV: Tensor, forward: bool = False) -> Tensor:
        """The same at single states, weighted by how often the method visits them, held fixed."""
        out = []
        for case, z in zip(self.cases, z_PSV):
            t = self.teacher(case)
            assert t is not None
            seen = sum(
                share_of(s) * exact.visits(self.tree, _finite(self.law(s, case, z)))
                for s in sources(self.spec)
            )

            def mean_kl(x: Tensor, t: Tensor = t, seen: Tensor = seen) -> Tensor:  # type: ignore[assignment]
                kl = exact.state_kl(t, x) if forward else exact.state_kl(x, t)
                return (seen * kl).sum()

            out.append(exact.gradient(mean_kl, z))
        return torch.stack(out) / len(out)

    def at_teacher(self) -> Tensor | None:
        """Student logits equal to each prompt's teacher."""
        found = [self.teacher(c) for c in self.cases]
        return None if any(t is None for t in found) else torch.stack(found)  # type: ignore[arg-type]


# ---- numbers -----------------------------------------------------------------------------------


def sampling(logits_SV: Tensor, s: StateSource) -> Tensor:
    """Log-probabilities after top-k and nucleus truncation; -inf outside. A cut sampler drops at
    least the least probable token, so that it shows among few."""
    z, vocab = logits_SV, logits_SV.shape[-1]
    if s.top_k is None and s.top_p >= 1:
        return torch.log_softmax(z, -1)
    top, order = z.sort(-1, descending=True)
    k = min(s.top_k or vocab, max(vocab - 1, 1))
    top[:, k:] = -torch.inf
    p = top.softmax(-1)
    top = torch.where((p.cumsum(-1) - p < s.top_p) & (p > 0), top, -torch.inf)
    return torch.log_softmax(torch.full_like(z, -torch.inf).scatter(-1, order, top), -1)


def _finite(logp_SV: Tensor) -> Tensor:
    return logp_SV.clamp_min(-700.0)


def _sequence(w: exact.Tree, x: Tensor, t: Tensor, forward: bool) -> Tensor:
    return exact.sequence_kl(w, t, x) if forward else exact.sequence_kl(w, x, t)


def _one_group(batch: Batch) -> Batch:
    """All rows of a batch as one group."""
    layout = dataclasses.replace(batch.layout, group_B=torch.zeros_like(batch.layout.group_B))
    return dataclasses.replace(batch, layout=layout)


def marked(case: Case, policy: str) -> Case:
    """The case with who wrote its responses on the prompt: what `drawn(…)` asks."""
    return dataclasses.replace(case, prompt={**case.prompt, SOURCE: policy})


def chosen(r: Routed, prompt: Mapping[str, str]) -> int:
    """Which part of a routed teacher a prompt uses."""
    hits = [k for k, c in enumerate(r.conditions) if c and prompt.get(c[0]) == c[1]]
    return (hits + [k for k, c in enumerate(r.conditions) if c is None])[0]
