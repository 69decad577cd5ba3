"""What the loss of a run costs: shapes from its settings and the models' configurations.

`--dry-run` prints it; a run asks beforehand whether a stated memory can work at all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from opdsl.emit.budget import BudgetError, parse_bytes
from opdsl.train.bindings import EMBEDDED, START
from opdsl.train.errors import problem
from opdsl.train.plan import Plan

WHOLE = "memory: logits are held whole in this run, so the amount that was stated changes nothing"


def memory_of(text: str | None) -> int | None:
    """`--memory` in bytes. Raises RunProblem OPD112 for what is no amount."""
    if text is None:
        return None
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise problem("OPD112", f"memory: {error}", exit_code=2) from None


def sizes_of(plan: Plan, configs: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(hidden, vocabulary) of the student and every teacher by role. configs: those of models."""
    found = {}
    for role, source in {"student": plan.student, **plan.teachers}.items():
        if source in (EMBEDDED, START):
            from opdsl.train.embedded import get_task

            pair = get_task(plan.task).pair
            teaches = role != "student" and source == EMBEDDED
            recipe = pair.teacher if teaches else pair.student
            found[role] = (recipe.hidden, recipe.vocab_size)
        elif role in configs:
            config = configs[role]
            config = config.get_text_config() if hasattr(config, "get_text_config") else config
            found[role] = (config.hidden_size, config.vocab_size)
    return found


def loss_of(
    method,
    plan: Plan,
    sizes: Mapping[str, tuple[int, int]],
    elsewhere: Collection[str] = (),
    whole: bool | None = None,
):
    """The `Forecast` of one micro-batch at its longest. elsewhere: roles served by others.

    whole: logits are held whole; None: by the size of the vocabulary. Raises RunProblem OPD112
    where the stated memory is too little, naming the least that works.
    """
    from opdsl.emit.footprint import Shapes
    from opdsl.emit.forecast import forecast, machine_of
    from opdsl.train import setup

    settings = plan.settings
    device = device_of(plan)
    hidden, vocab = sizes["student"]
    vocab = min(v for _, v in sizes.values())
    whole = vocab <= setup.FUSED_FROM if whole is None else whole
    sequences = min(settings.micro_batch or plan.recipe.batch, plan.recipe.batch)
    half = (settings.precision or ("fp32" if device == "cpu" else "bf16")) == "bf16"
    at = Shapes(
        rows=sequences * plan.max_tokens,
        hidden=hidden,
        vocab=vocab,
        others={role: h for role, (h, _) in sizes.items() if role != "student"},
        served=frozenset(elsewhere),
        bytes=2 if half else 4,
        frozen_head=plan.recipe.adapter is not None,  # adapters leave the head as it is
    )
    try:
        stated = None if whole else memory_of(settings.memory)
        emitted = method.compilation.emitted
        return forecast(emitted, at, machine_of(device, hidden, vocab), stated, whole)
    except BudgetError as error:
        raise problem(
            "OPD112",
            f"memory = {settings.memory}: {error}",
            helps=["more memory, or fewer tokens at a time: a smaller --micro-batch"],
            exit_code=2,
        ) from None


def device_of(plan: Plan) -> str:
    """Where the run would compute, as `make_runtime` decides it."""
    import torch

    if plan.settings.device is not None:
        return "cpu" if plan.settings.device.startswith("cpu") else plan.settings.device
    return "cuda" if torch.cuda.is_available() and not plan.embedded else "cpu"


__all__ = ["WHOLE", "device_of", "loss_of", "memory_of", "sizes_of"]
