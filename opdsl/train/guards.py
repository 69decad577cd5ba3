"""Guards that stand before every update, and the measurements taken beside the loss.

A non-finite teacher score, student output, loss or gradient raises `GuardStop` with the step
(counted from 1, as in the records), the sample and the position; no parameter has moved.

Shapes: B rows, T response tokens, V vocabulary, N chosen tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from opdsl.train.errors import GuardStop
from opdsl.train.forward import Forward, scores_at
from opdsl.train.states import Rows
from opdsl.train.teachers import Scores

MEASURED_TOKENS = 512  # tokens on which entropy and KL(student ‖ T) are measured exactly


def guard_scores(what: str, value: Scores | torch.Tensor, rows: Rows, step: int, data) -> None:
    """Stop at the first token where `value` [B, T, …] is NaN or +inf.

    −inf is a legitimate log-score (a token the model excludes).
    """
    if isinstance(value, Scores):
        value = value.logits if value.logits is not None else value.hidden
    tensor = value.detach()
    # A float64 sum is finite if nothing is NaN or infinite; −inf goes to the slow path, which
    # sorts it out. The fast path is one pass without a temporary of the size of the scores.
    if math.isfinite(float(tensor.sum(dtype=torch.float64))):
        return
    bad_BT = (torch.isnan(tensor) | (tensor == torch.inf)).any(-1) & rows.mask
    if bool(bad_BT.any()):
        row, position = bad_BT.nonzero()[0].tolist()
        raise GuardStop(what, step, row, position, sample_note(rows, row, data))


def guard_loss(loss: float, module, batch, rows: Rows, step: int, data) -> None:
    """Stop on a loss that is not finite, naming the first sample whose part of it is not."""
    if math.isfinite(loss):
        return
    row = None
    with torch.no_grad():
        parts = batch.split(len(rows))
        for i, (part, context) in enumerate(zip(parts, module.prepare(parts))):
            if not math.isfinite(float(module(part, context).loss)):
                row = i
                break
    note = sample_note(rows, row, data) if row is not None else "no single sample alone"
    raise GuardStop("the loss", step, row, None, note)


def bad_gradient(names: list[str], parameters: list[Any], step: int) -> GuardStop:
    """The stop for a gradient whose norm is not finite."""
    bad = [
        name
        for name, p in zip(names, parameters)
        if p.grad is not None and not bool(torch.isfinite(p.grad).all())
    ]
    note = (
        f"in {len(bad)} of {len(names)} parameters, first {bad[0]}" if bad else "its norm overflows"
    )
    return GuardStop("the gradient", step, None, None, note)


def sample_note(rows: Rows, row: int, data) -> str:
    prompt = data.prompt_text(rows.prompts[row])
    response = data.response_text(rows.responses[row])
    return f"sample {row}: {prompt[:80]!r} → {response[:80]!r}"


# ---- measurements --------------------------------------------------------------------------------


def describe(rows: Rows, outcome_B: torch.Tensor | None) -> dict[str, Any]:
    """Length, end tokens and reward of the rows the student sampled."""
    record: dict[str, Any] = {"tokens": int(rows.lengths.sum())}
    own = rows.own
    if bool(own.any()):
        record["length"] = float(rows.lengths[own].float().mean())
        record["finished"] = float(rows.finished[own].float().mean())
        if outcome_B is not None:
            judged = outcome_B[own]
            judged = judged[~torch.isnan(judged)]
            record["reward"] = float(judged.mean()) if len(judged) else None
    return record


@torch.no_grad()
def measure(forward: Forward, rows: Rows, states, teachers: dict[str, Scores]) -> dict[str, Any]:
    """Entropy of the student and KL(student ‖ T), nats per token over the whole vocabulary.

    Measured on up to MEASURED_TOKENS tokens of rows the student sampled (all rows, if it
    sampled none), evenly spaced: exact at those states, whatever the method's support. Averaged
    over its own samples the KL is the mean of the sampled log-ratio, with less variance.
    """
    mask_BT = rows.mask & rows.own.unsqueeze(-1) if bool(rows.own.any()) else rows.mask
    index = mask_BT.nonzero()
    stride = max(1, math.ceil(len(index) / MEASURED_TOKENS))
    b, t = index[::stride].unbind(-1)
    if len(b) == 0:
        return {}
    logp_NV = forward.logits(states.detach()[b, t]).log_softmax(-1)
    p_NV = logp_NV.exp()
    # A token of probability 0 contributes nothing, and 0 · (−inf) must not become NaN.
    some_NV = p_NV > 0
    record = {"entropy": float(-torch.where(some_NV, p_NV * logp_NV, 0.0).sum(-1).mean())}
    for name, scores in teachers.items():
        logq_NV = scores_at(scores, b, t).log_softmax(-1)
        each_NV = torch.where(some_NV, p_NV * (logp_NV - logq_NV), 0.0)
        record["kl" if len(teachers) == 1 else f"kl/{name}"] = float(each_NV.sum(-1).mean())
    return record
