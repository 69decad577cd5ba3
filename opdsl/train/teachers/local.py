"""Teachers scored in this process: another model, the student itself, its average, its start.

    external   a frozen model bound by the run
    self       the student of this moment, reading a privileged context
    ema        a moving average of the student's weights
    initial    the student at step 0

Shapes: B rows, T response tokens, S prompt and response together, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from opdsl.emit.kernels.head import Head
from opdsl.train.models import bare, trunk_of
from opdsl.train.runtime import Runtime
from opdsl.train.teachers import Scores


def response_hidden(trunk, prompts: Sequence[Sequence[int]], tokens_BT, lengths_B) -> torch.Tensor:
    """Hidden states [B, T, H] that predict each response token.

    Rows are laid out as prompt + response, padded on the right only: with causal attention
    padding behind a row cannot reach it, so no mask is needed, and positions start at 0 as they
    do for the row alone. The state at index P−1+t predicts response token t.
    """
    ids_BS, first_B = layout(prompts, tokens_BT)
    hidden_BSH = trunk(input_ids=ids_BS, use_cache=False).last_hidden_state
    return gather_response(hidden_BSH, first_B, tokens_BT.shape[1])


def layout(prompts: Sequence[Sequence[int]], tokens_BT) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [B, S], index [B] of the state that predicts the first response token).

    The last response token predicts nothing that is used, so it is left out: S = P + T − 1.
    """
    B, T = tokens_BT.shape
    device = tokens_BT.device
    lengths = [len(p) for p in prompts]
    longest = max(lengths)
    if min(lengths) == longest:
        prompt_BP = torch.tensor([list(p) for p in prompts], dtype=torch.int64, device=device)
        ids_BS = torch.cat([prompt_BP, tokens_BT[:, :-1]], 1)
    else:
        ids_BS = tokens_BT.new_zeros(B, longest + T - 1)
        for i, prompt in enumerate(prompts):
            P = len(prompt)
            ids_BS[i, :P] = torch.tensor(prompt, dtype=torch.int64, device=device)
            ids_BS[i, P : P + T - 1] = tokens_BT[i, :-1]
    return ids_BS, torch.tensor([n - 1 for n in lengths], device=device)


def gather_response(states_BSx, first_B, T: int) -> torch.Tensor:
    """States [B, T, …] from index first_B on, out of [B, S, …]."""
    first = first_B.tolist()
    if min(first) == max(first):
        return states_BSx[:, first[0] : first[0] + T]
    index_BT = first_B.unsqueeze(-1) + torch.arange(T, device=states_BSx.device)
    return states_BSx.gather(1, index_BT.unsqueeze(-1).expand(-1, -1, states_BSx.shape[-1]))


class LocalTeacher:
    """One model asked for its scores, without gradient, in chunks of rows.

    model: a callable giving the model, because the student may be wrapped later.
    view: prompt -> the token ids this teacher is conditioned on.
    head: None for logits; else scores are hidden states, padded at their end and start by
    `pad` zeros where several teachers share one joint head (see `joint_heads`).
    disabled: a context in which the model is the one meant (adapters off, for `initial`; weights
    on the device, where they lie in main memory otherwise).
    """

    ids_from = ()  # its scores are whole, so nobody's list must be known first

    def __init__(
        self,
        name: str,
        model: Callable[[], Any],
        view: Callable[[Any], Sequence[int]],
        runtime: Runtime,
        vocabulary: int,
        *,
        head: Head | None = None,
        pad: tuple[int, int] = (0, 0),
        chunk: int | None = None,
        disabled: Callable[[], Any] = contextlib.nullcontext,
    ):
        self.name, self.model, self.view, self.runtime = name, model, view, runtime
        self.vocabulary, self.head, self.pad, self.chunk = vocabulary, head, pad, chunk
        self.disabled = disabled

    @torch.no_grad()
    def score(self, prompts: Sequence[Any], tokens_BT, lengths_B, ids_BTK=None) -> Scores:
        views = [self.view(p) for p in prompts]
        model, B = self.model(), len(views)
        chunk = self.chunk or B
        pieces = []
        with self.disabled(), self.runtime.autocast():
            for i in range(0, B, chunk):
                rows = slice(i, i + chunk)
                pieces.append(self._piece(model, views[rows], tokens_BT[rows], lengths_B[rows]))
        out = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if self.head is not None:
            padded = torch.nn.functional.pad(out, self.pad) if any(self.pad) else out
            return Scores(hidden=padded, head=self.head)
        return Scores(logits=out.float())

    def _piece(self, model, views, tokens_BT, lengths_B) -> torch.Tensor:
        if self.head is not None:
            return response_hidden(trunk_of(model), views, tokens_BT, lengths_B)
        return response_logits(model, views, tokens_BT, lengths_B, self.vocabulary)

    def after_update(self) -> None:
        """A fixed teacher does not change."""

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """A fixed teacher has nothing to load."""


def response_logits(model, prompts, tokens_BT, lengths_B, vocabulary: int) -> torch.Tensor:
    """Logits [B, T, V] through the model's own head, whatever it does after the projection."""
    ids_BS, first_B = layout(prompts, tokens_BT)
    logits_BSV = bare(model)(input_ids=ids_BS, use_cache=False).logits
    return gather_response(logits_BSV, first_B, tokens_BT.shape[1])[..., :vocabulary]


class MovingAverage(LocalTeacher):
    """w ← decay · w + (1 − decay) · student, after every `every`-th optimizer step."""

    def __init__(self, name: str, student, decay: float, every: int, *args: Any, **kwargs: Any):
        self.average = frozen_copy(student)
        self.student, self.decay, self.every, self.steps = student, decay, every, 0
        super().__init__(name, lambda: self.average, *args, **kwargs)

    @torch.no_grad()
    def after_update(self) -> None:
        self.steps += 1
        if self.steps % self.every:
            return
        live = dict(self.student.named_parameters())
        for name, mean in self.average.named_parameters():
            if live[name].requires_grad:
                mean.lerp_(live[name].detach().to(mean.dtype), 1.0 - self.decay)

    def state(self) -> dict[str, torch.Tensor]:
        tensors = {n: p.detach() for n, p in self.average.named_parameters()}
        return tensors if self.every == 1 else tensors | {"@steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        if self.every > 1:
            self.steps = int(tensors["@steps"])
        for name, parameter in self.average.named_parameters():
            parameter.copy_(tensors[name])


def joint_heads(heads: Sequence[Head]) -> tuple[Head, list[tuple[int, int]]]:
    """One head that serves several teachers, and the zero padding of each one's hidden states.

    The weights stand side by side along H, and a teacher's states are zero everywhere but at its
    own columns, so every product is its own head's exactly. A batch whose prompts go to
    different teachers then still needs one fused pass and no [B, T, V] tensor.

    Raises ValueError for heads with a bias or of different scale, soft cap or width.
    """
    first = heads[0]
    for head in heads:
        same = (head.scale, head.soft_cap, head.width) == (first.scale, first.soft_cap, first.width)
        if head.bias is not None or not same:
            raise ValueError("these heads cannot be joined")
    widths = [head.weight.shape[1] for head in heads]
    joint = torch.cat([head.weight[: head.width].detach() for head in heads], 1)
    before = [sum(widths[:i]) for i in range(len(widths))]
    pads = [(b, sum(widths) - b - w) for b, w in zip(before, widths)]
    return Head(joint, None, first.scale, first.soft_cap), pads


def frozen_copy(model):
    """A deep copy that takes no gradient."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def initial_policy(student) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(model, context) of the student at step 0: a copy, or the student with adapters off."""
    if hasattr(student, "disable_adapter"):
        return (lambda: student), student.disable_adapter
    kept = frozen_copy(student)
    return (lambda: kept), contextlib.nullcontext
