"""From the words of the command line to a model ready to score."""

from __future__ import annotations

from collections.abc import Callable

import torch

from opdsl.train import models
from opdsl.train.bindings import EMBEDDED
from opdsl.train.errors import problem
from opdsl.train.runtime import make_runtime
from opdsl.train.teachers.scorer import Scorer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    source: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    name: str | None = None,
    max_batch_tokens: int = 16_384,
    progress: Callable[[str, float, str], None] | None = None,
) -> Scorer:
    """The scorer of a model folder, a hub name, or `embedded[:TASK]`.

    dtype: fp32, bf16 or fp16; None for what a run would use for a frozen model on the device.
    Raises RunProblem OPD404, OPD701 or OPD708.
    """
    word, _, task = source.partition(":")
    embedded = word == EMBEDDED
    runtime = make_runtime(device, None, tiny=embedded)
    kind = runtime.frozen_dtype if dtype is None else DTYPES[dtype]
    if embedded:
        model, tokenizer = _embedded_teacher(task or "chain", progress), None
        model = model.to(runtime.device, kind)
    else:
        model = models.load_model(source, "the model", kind, runtime.device)
        tokenizer = models.load_tokenizer(source, "the model")
    model = model.requires_grad_(False).eval()
    return Scorer(model, tokenizer, name or source.rstrip("/"), max_batch_tokens)


def _embedded_teacher(task: str, progress: Callable[[str, float, str], None] | None):
    from opdsl.train.embedded import TASKS, build_pair

    if task not in TASKS:
        raise problem(
            "OPD708", f"there is no embedded task {task!r}", helps=[f"tasks: {', '.join(TASKS)}"]
        )
    return build_pair(task, 0, progress=progress).teacher


__all__ = ["DTYPES", "load"]
