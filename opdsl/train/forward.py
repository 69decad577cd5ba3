"""The student's forward pass and the batch a method's loss reads.

Two routes: up to a vocabulary of a few thousand the batch holds logits [B, T, V]; above, hidden
states and the head's weight, so that no [B, T, V] tensor is ever made. Models whose head is
more than a product (a soft cap, a scale) always take the first.

Shapes: B rows, T response tokens, H hidden, V vocabulary, N chosen tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from opdsl.emit.kernels.head import Head
from opdsl.train.models import trunk_of
from opdsl.train.runtime import Runtime
from opdsl.train.states import Rows
from opdsl.train.teachers import Scores
from opdsl.train.teachers.local import response_hidden, response_logits


@dataclass(frozen=True)
class Forward:
    """How the student of a run is evaluated at the tokens of a batch."""

    student: Any
    runtime: Runtime
    vocabulary: int
    fused: bool
    head: Head | None  # None: the model's own head, see `known_head`
    total_steps: int = 1
    memory: int | None = None  # bytes of loss and gradient on the fused route

    def states(self, rows: Rows) -> torch.Tensor:
        """Hidden states [B, T, H] that the head reads; logits [B, T, V] for other heads."""
        ids = [p.ids for p in rows.prompts]
        with self.runtime.autocast():
            if self.head is not None:
                return response_hidden(trunk_of(self.student), ids, rows.tokens, rows.lengths)
            logits = response_logits(self.student, ids, rows.tokens, rows.lengths, self.vocabulary)
            return logits.float()

    def states_in_parts(self, rows: Rows, size: int) -> torch.Tensor:
        """The same without gradient, `size` rows at a time."""
        with torch.no_grad():
            return torch.cat([self.states(part) for part in parts_of(rows, size)])

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """float32 logits […, V] of states […, H] (or of logits themselves)."""
        return states if self.head is None else head_logits(self.head, states)

    def live(self, states: torch.Tensor) -> torch.Tensor:
        """What a batch is made from: states on the fused route, else logits."""
        return states if self.fused else self.logits(states)

    def batch(self, rows: Rows, states, live, given: dict[str, Any], live_golden, needs, step: int):
        """The method's batch. `live` carries the gradient; `states` give the student's own
        log-probabilities of tokens that nobody sampled."""
        common: dict[str, Any] = {
            "tokens": rows.tokens,
            "mask": rows.mask,
            "rollout_logprobs": self._sampler_logprobs(rows, states),
            "outcome": given["outcome"] if needs.outcome else None,
            "group": rows.group,
            "step": max(step, 0),
            "total_steps": self.total_steps,
            "special": given.get("special"),
            "prompt": [p.fields for p in rows.prompts],
        }
        if given["values"]:
            common["values"] = given["values"]
        if live_golden is not None:
            golden = given["golden"]
            more = {"tokens": golden.tokens, "mask": golden.mask}
            more["prompt"] = [p.fields for p in golden.prompts]
            common["golden"] = self._make(live_golden, {}, None, more)
        return self._make(live, given["teachers"], given.get("initial"), common)

    def _make(self, live, teachers: dict[str, Scores], initial: Scores | None, common: dict):
        from opdsl import Batch

        common |= _lists_of(teachers)
        logits = {n: s.logits for n, s in teachers.items() if s.logits is not None}
        if logits:
            common["teacher_logits"] = logits
        if not self.fused:
            if initial is not None:
                common["initial_logits"] = initial.logits
            return Batch.from_logits(live, **common)
        hidden = {n: s for n, s in teachers.items() if s.hidden is not None}
        if hidden:
            common["teacher_hidden"] = {n: s.hidden for n, s in hidden.items()}
            common["teacher_head"] = {n: s.head for n, s in hidden.items()}
        if initial is not None:
            common |= {"initial_hidden": initial.hidden, "initial_head": initial.head}
        head = self.head
        if self.runtime.half:
            # Half-precision products with float32 accumulation; master weights stay float32.
            live, head = live.bfloat16(), replace(head, weight=head.weight.bfloat16())
        return Batch.from_hidden(live, head, **common, memory=self.memory)

    def _sampler_logprobs(self, rows: Rows, states) -> torch.Tensor:
        """Log-probabilities [B, T] under the sampler; the student's own where nobody sampled."""
        logprobs_BT = rows.logprobs
        for i in torch.isnan(logprobs_BT).any(-1).nonzero().flatten().tolist():
            if logprobs_BT is rows.logprobs:
                logprobs_BT = logprobs_BT.clone()
            with torch.no_grad():
                logp_TV = self.logits(states[i]).log_softmax(-1)
            logprobs_BT[i] = logp_TV.gather(-1, rows.tokens[i].unsqueeze(-1)).squeeze(-1)
        return logprobs_BT


def _lists_of(teachers: dict[str, Scores]) -> dict[str, Any]:
    """The batch's arguments for teachers that give log-probabilities of some tokens only."""
    sparse = {n: s for n, s in teachers.items() if not s.whole}
    listed = {n: s for n, s in sparse.items() if s.top_ids is not None}
    found: dict[str, Any] = {}
    if sparse:
        found["teacher_logprobs"] = {n: s.logprobs for n, s in sparse.items()}
    if listed:
        found["teacher_topk_ids"] = {n: s.top_ids for n, s in listed.items()}
        found["teacher_topk_logprobs"] = {n: s.top_logprobs for n, s in listed.items()}
    return found


class Cut:
    """States (and logits made from them) detached from the trunk, and the way back.

    The loss sees `leaf`; `backward` sends its gradient through the head once and through the
    trunk in parts of `size` rows, which are computed again for the purpose.
    """

    def __init__(self, forward: Forward, rows: Rows, size: int):
        self.forward, self.rows, self.size = forward, rows, size
        self.states = forward.states_in_parts(rows, size).requires_grad_()
        self.live = forward.live(self.states)
        # On the logits route the loss sees a second leaf, so the head runs backward once.
        self.leaf = self.live if forward.fused else self.live.detach().requires_grad_()

    def backward(self) -> None:
        if self.leaf is not self.live and self.leaf.grad is not None:
            self.live.backward(self.leaf.grad)
        if self.states.grad is not None:
            grads = self.states.grad.split(self.size)
            for part, grad in zip(parts_of(self.rows, self.size), grads):
                self.forward.states(part).backward(grad)


def parts_of(rows: Rows, size: int) -> list[Rows]:
    """The rows in runs of at most `size`."""
    B = len(rows)
    if size >= B:
        return [rows]
    return [rows.select(range(i, min(i + size, B)), "") for i in range(0, B, size)]


def head_logits(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """float32 logits […, V] of hidden states […, H], differentiable."""
    V = head.width
    bias = None if head.bias is None else head.bias[:V].float()
    logits = F.linear(hidden.float(), head.weight[:V].float(), bias) * head.scale
    return logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)


def scores_at(scores: Scores, b, t) -> torch.Tensor:
    """float32 teacher logits [N, V] of chosen tokens."""
    if scores.logits is not None:
        return scores.logits[b, t].float()
    return head_logits(scores.head, scores.hidden[b, t])
