"""Guards that stand before every update, and the measurements taken beside the loss.

A non-finite teacher score, student output, loss or gradient raises `GuardStop` with the step
(counted from 1, as in the records), the sample and the position; no parameter has moved. A flat
teacher and exploding log-ratios are looked for at the measured tokens; `watch` says what then.

Shapes: B rows, T response tokens, V vocabulary, N chosen tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from opdsl.train.errors import GuardStop
from opdsl.train.forward import Forward, scores_at
from opdsl.train.states import Rows
from opdsl.train.teachers import Scores
from opdsl.train.watch import UNIFORM, Watch

MEASURED_TOKENS = 512  # tokens on which entropy and KL(student ‖ T) are measured exactly


def guard_scores(what: str, value: Scores | torch.Tensor, rows: Rows, step: int, data) -> None:
    """Stop at the first token where `value` [B, T, …] is NaN or +inf.

    −inf is a legitimate log-score (a token the model excludes).
    """
    if isinstance(value, Scores):
        for tensor in value.tensors():
            guard_scores(what, tensor, rows, step, data)
        return
    tensor = value.detach()
    # A float64 sum is finite if nothing is NaN or infinite; −inf goes to the slow path, which
    # sorts it out. The fast path is one pass without a temporary of the size of the scores.
    if math.isfinite(float(tensor.sum(dtype=torch.float64))):
        return
    bad_BT = torch.isnan(tensor) | (tensor == torch.inf)
    bad_BT = (bad_BT.any(-1) if bad_BT.dim() > 2 else bad_BT) & rows.mask
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


@torch.no_grad()
def guard_weights(groups: dict[str, dict[str, Any]], step: int) -> None:
    """Stop before a checkpoint is written that holds a weight or a moment that is not finite.

    groups: file -> {name: tensor}. Without it a poisoned state would push out the good ones.
    """
    for group, tensors in groups.items():
        bad = [
            name
            for name, x in tensors.items()
            if x.is_floating_point() and not math.isfinite(float(x.sum(dtype=torch.float64)))
        ]
        if bad:
            what = "of the student" if group == "student" else f"of {group}"
            note = f"in {len(bad)} of {len(tensors)} tensors, first {bad[0]}"
            raise GuardStop(f"the weights {what}", step, None, None, note, skippable=False)


def sample_note(rows: Rows, row: int, data) -> str:
    prompt = data.prompt_text(rows.prompts[row])
    response = data.response_text(rows.responses[row])
    return f"sample {row}: {prompt[:80]!r} → {response[:80]!r}"


def longest(rows: Rows, data) -> tuple[int, str]:
    """The longest row and its text."""
    row = int(rows.lengths.argmax())
    return row, sample_note(rows, row, data)


# ---- measurements --------------------------------------------------------------------------------


def describe(rows: Rows, outcome_B: torch.Tensor | None) -> dict[str, Any]:
    """Length, end tokens and reward of the rows the student sampled."""
    record: dict[str, Any] = {"tokens": int(rows.lengths.sum())}
    own = rows.own
    if bool(own.any()):
        record["length"] = float(rows.lengths[own].float().mean())
        record["length_max"] = int(rows.lengths[own].max())
        record["finished"] = float(rows.finished[own].float().mean())
        record["truncated"] = 1.0 - record["finished"]
        if outcome_B is not None:
            judged = outcome_B[own]
            judged = judged[~torch.isnan(judged)]
            record["reward"] = float(judged.mean()) if len(judged) else None
    return record


FLAT_LEAST = 16  # words below which ln V says little
FLAT_EVERY = 8  # of the measured tokens, every how many a teacher's entropy is taken at


@torch.no_grad()
def look(watch: Watch, name: str, rows: Rows, at: tuple, logp_NV, logq_NV, step: int, data) -> None:
    """A teacher that has lost its weights, and log-ratios that explode, at measured tokens.

    at: (rows b [N], positions t [N]) of the log-probabilities logp_NV (student), logq_NV.
    """
    b, t = at
    words = logq_NV.shape[-1]
    if words >= FLAT_LEAST and watch.rules["flat_teacher"].action != "off":
        few_MV = logq_NV[::FLAT_EVERY]
        real_M = torch.isfinite(few_MV).sum(-1).clamp(min=2)
        share_M = torch.special.entr(few_MV.exp()).sum(-1) / real_M.log()
        least = float(share_M.min())
        if watch.over("flat_teacher", least):
            row, position = int(b[0]), int(t[0])
            watch.met(
                "flat_teacher",
                f"teacher {name}",
                f"says nothing: its entropy is {least:.2%} of ln V or more at all"
                f" {len(few_MV)} measured positions, first",
                step, row, position, sample_note(rows, row, data),
                always=least > UNIFORM,
            )  # fmt: skip
    y_N1 = rows.tokens[b, t].unsqueeze(-1)
    ratio_N = (logq_NV.gather(-1, y_N1) - logp_NV.gather(-1, y_N1)).squeeze(-1)
    _look_at_ratios(watch, name, rows, at, ratio_N, step, data)


@torch.no_grad()
def look_at_list(watch: Watch, name: str, rows: Rows, scores: Scores, step: int, data) -> None:
    """The log-ratios of a teacher that gives lists: against the policy that sampled the tokens."""
    at = rows.mask.nonzero().unbind(-1)
    ratio_N = (scores.logprobs - rows.logprobs)[at]
    _look_at_ratios(watch, name, rows, at, ratio_N, step, data)


def _look_at_ratios(watch: Watch, name: str, rows: Rows, at, ratio_N, step: int, data) -> None:
    """ratio_N: log teacher − log student of the tokens at (b [N], t [N]), nats."""
    b, t = at
    rule = watch.rules["log_ratio"]
    if rule.action == "off" or len(b) == 0:
        return
    size_N = torch.where(rows.own[b] & ~torch.isnan(ratio_N), ratio_N.abs(), 0.0)
    worst = int(size_N.argmax())
    if watch.over("log_ratio", float(size_N[worst])):
        row, position, many = int(b[worst]), int(t[worst]), int((size_N > rule.limit).sum())
        watch.met(
            "log_ratio",
            f"the log-ratio of teacher {name} and student",
            f"is {float(ratio_N[worst]):.1f} nats ({many} of {len(size_N)} measured tokens beyond"
            f" {rule.limit:g})",
            step, row, position, sample_note(rows, row, data),
        )  # fmt: skip


@torch.no_grad()
def measure(
    forward: Forward,
    rows: Rows,
    states,
    teachers: dict[str, Scores],
    looking: Callable[[str, tuple, Any, Any], None] | None = None,
) -> dict[str, Any]:
    """Entropy of the student and KL(student ‖ T), nats per token over the whole vocabulary.

    Measured on up to MEASURED_TOKENS tokens of rows the student sampled (all rows, if it
    sampled none), evenly spaced: exact at those states, whatever the method's support. Averaged
    over its own samples the KL is the mean of the sampled log-ratio, with less variance.
    looking: called with (teacher, (b, t), logp_NV, logq_NV), for guards that want the same.
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
        if not scores.whole:
            continue  # see `kl_sampled` of the meters
        logq_NV = scores_at(scores, b, t).log_softmax(-1)
        if looking is not None:
            looking(name, (b, t), logp_NV, logq_NV)
        each_NV = torch.where(some_NV, p_NV * (logp_NV - logq_NV), 0.0)
        record["kl" if len(teachers) == 1 else f"kl/{name}"] = float(each_NV.sum(-1).mean())
    return record
