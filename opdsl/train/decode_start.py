"""The start of a decoding call: prompts are read, and the way the steps are taken is chosen.

Shapes: B rows, U different prompts, P prompt tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from opdsl.train.decode_replay import CapturedSteps, RecordedSteps, take_captured
from opdsl.train.decode_steps import FixedSteps, PlainSteps, cache_name, check_fixed
from opdsl.train.decode_tape import Unsuitable

WAYS = ("auto", "plain", "fixed", "recorded", "captured")
FEW = 64  # rows up to which a step on a CPU takes long enough in Python to be recorded
WORTH = 32  # tokens after which a recording or a capture has paid for itself

Steps = PlainSteps | FixedSteps


def choose(way: str, rows: int, tokens: int, device: torch.device) -> str:
    """How steps are taken on a device; a pure function of the call, so that runs can be resumed.

    way: "auto", or one of the others to insist on it (tests and comparisons).
    """
    if way not in WAYS:
        raise ValueError(f"steps must be one of {', '.join(WAYS)}, not {way!r}")
    if way != "auto":
        return way
    if tokens < WORTH:
        return "plain"
    if device.type == "cuda":
        return "captured"
    return "recorded" if device.type == "cpu" and rows <= FEW else "plain"


def start(
    model, prompts: list[list[int]], tokens: int, pad: int, device, way: str
) -> tuple[Steps, Tensor]:
    """(steps, logits [B, V] behind the prompts). Prompts that occur several times are read once.

    tokens: how many will be decoded at most. Where a model cannot be decoded the chosen way, plain
    steps are taken: silently on a CPU, with one warning per model on CUDA or where it was asked for.
    """
    index: dict[tuple[int, ...], int] = {}
    row_of_B = [index.setdefault(tuple(p), len(index)) for p in prompts]
    ids_UP, mask_UP = left_pad(list(index), pad, device)
    arguments: dict[str, Any] = {"input_ids": ids_UP, "use_cache": True, "logits_to_keep": 1}
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        del arguments["logits_to_keep"]
    position_UP = None
    if mask_UP is not None:
        position_UP = (mask_UP.long().cumsum(-1) - 1).clamp(min=0)
        arguments |= {"attention_mask": mask_UP.long(), "position_ids": position_UP}
    held = cache_name(model)
    assert held is not None
    out = model(**arguments)
    past, logits_BV = getattr(out, held), out.logits[:, -1]
    mask_BP, position_B1 = mask_UP, None if position_UP is None else position_UP[:, -1:]
    if len(index) < len(prompts):
        rows = torch.tensor(row_of_B, device=device)
        past.batch_select_indices(rows)
        logits_BV = logits_BV[rows]
        if mask_BP is not None:
            mask_BP, position_B1 = mask_BP[rows], position_B1[rows]
    chosen = choose(way, len(prompts), tokens, device)
    if chosen != "plain" and tokens > 2:
        logits_BV = logits_BV.clone()  # a rehearsal may use the head's buffer
        try:
            steps = _fixed(chosen, model, past, mask_BP, position_B1, ids_UP.shape[1], tokens)
            return steps, logits_BV
        except Unsuitable as reason:
            if way != "auto" or device.type == "cuda":
                _say(model, f"decoding takes plain steps: {reason}")
    return PlainSteps(model, past, mask_BP, position_B1, tokens), logits_BV


def _fixed(way: str, model, past, mask_BP, position_B1, P: int, tokens: int) -> FixedSteps:
    """Steps in slots, rehearsed. Raises Unsuitable, with `past` as it was."""
    if model in _UNSUITABLE and way == "captured":
        raise Unsuitable(_UNSUITABLE[model])
    check_fixed(model, past)
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise Unsuitable("the model's weights are split over processes")
    B, device = past.layers[0].keys.shape[0], past.layers[0].keys.device
    if mask_BP is None:
        mask_BP = torch.ones(B, P, dtype=torch.bool, device=device)
        position_B1 = torch.full((B, 1), P - 1, device=device)
    given = model, past, mask_BP, position_B1, P + tokens
    if way == "captured" and (kept := take_captured(model, mask_BP)) is not None:
        kept.load(*given)
        try:
            kept.rehearse()
            return kept
        except Unsuitable:  # something it cannot see has changed; capture again
            kept.unload(past)
    kind = {"fixed": FixedSteps, "recorded": RecordedSteps, "captured": CapturedSteps}[way]
    steps = kind(*given)
    if isinstance(steps, RecordedSteps | CapturedSteps):
        try:
            steps.rehearse()
        except Unsuitable as reason:
            steps.unload(past)
            if way == "captured":  # a failed capture takes long
                _UNSUITABLE[model] = str(reason)
            raise
    return steps


_UNSUITABLE: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_SAID: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def _say(model, text: str) -> None:
    """A warning, once per model."""
    if text not in _SAID.setdefault(model, set()):
        _SAID[model].add(text)
        warnings.warn(text, stacklevel=4)


def left_pad(prompts, pad: int, device) -> tuple[Tensor, Tensor | None]:
    """ids [U, P] and mask [U, P] (None where all prompts are equally long)."""
    longest = max(map(len, prompts))
    ids_UP = torch.tensor(
        [[pad] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.int64, device=device
    )
    if all(len(p) == longest for p in prompts):
        return ids_UP, None
    # The mask comes from the lengths: a prompt may well contain the pad id.
    lengths_U1 = torch.tensor([[len(p)] for p in prompts], device=device)
    return ids_UP, torch.arange(longest, device=device) >= longest - lengths_U1
