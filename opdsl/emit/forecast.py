"""What a step of a method costs in front of the vocabulary, in words and as JSON.

`opdsl explain --cost` asks for shapes of its own, `opdsl run --dry-run` for those of a run.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from opdsl.emit.budget import amount
from opdsl.emit.cost import GPUS, Cost, Machine, cost, machine
from opdsl.emit.footprint import Place, Shapes, buffers, peak, rows_within
from opdsl.emit.module import Emitted
from opdsl.emit.plan import Plan, describe, plans


@dataclass(frozen=True)
class Forecast:
    """Plans and costs of every part of a method. memory: what the user stated, in bytes.

    whole: logits are held whole, as a run does below a vocabulary of some thousands.
    """

    at: Shapes
    on: Machine
    parts: tuple[tuple[Plan, Cost], ...]
    memory: int | None = None
    whole: bool = False

    def lines(self) -> list[str]:
        """The shapes, U, and a block for each part."""
        at = self.at
        unit = 2.0 * at.rows * at.hidden * at.vocab
        out = [
            f"{at.rows:,} tokens, hidden {at.hidden:,}, vocabulary {at.vocab:,}, {self.on.name}",
            f"U           {_flop(unit)}: one product with the head",
        ]
        for plan, c in self.parts:
            label = "loss" if plan.rows == "main" else "reference"
            stated = f" of the {amount(self.memory)} stated" if self.memory else ""
            rows = "logits held whole" if self.whole else f"{c.chunk} tokens at a time"
            out += [
                f"{label:<11} {describe(plan, at.served, at.frozen_head)}",
                f"memory      {amount(c.bytes)}{stated} beyond the models: {rows}",
                f"time        {duration(c.seconds)} for loss and gradient",
            ]
        return out

    def to_json(self) -> dict[str, Any]:
        rows = [
            {"plan": p.label, **asdict(p), "units": p.units(self.at.frozen_head), **asdict(c)}
            for p, c in self.parts
        ]
        return {
            "shape": [self.at.rows, self.at.hidden, self.at.vocab],
            "device": self.on.name,
            "memory": self.memory,
            "frozen_head": self.at.frozen_head,
            "served": sorted(self.at.served),
            "whole": self.whole,
            "parts": rows,
        }


def forecast(
    emitted: Emitted, at: Shapes, on: Machine, memory: int | None = None, whole: bool = False
) -> Forecast:
    """The costs of a method for these shapes. Raises BudgetError where `memory` is too little."""
    made = plans(emitted)
    at = replace(at, parts=len(made), kept_scratch=max(map(buffers, made), default=0))
    if not whole:
        if memory is not None:  # of all parts, so that the least that is named works for each
            rows_within(made, at, Place(on.kind, on.threads), memory)
        found = [(p, cost(p, at, on, memory=memory)) for p in made]
        return Forecast(at, on, tuple(found), memory)
    # every pass sees all rows at once, and none works in place
    plain, place = replace(at, plain=True, kept_scratch=0), Place("cuda")
    rows = []
    for plan in made:
        size = peak([replace(plan, kind="D1", unit=False)], plain, place, at.rows)
        rows.append((plan, replace(cost(plan, at, on), chunk=at.rows, bytes=size)))
    return Forecast(at, on, tuple(rows), None, True)


def gpu(name: str) -> str:
    """The row of `GPUS` for what a driver calls a device; the slowest of them for a stranger."""
    known = [k for k in GPUS if k in name.lower()]
    return known[0] if known else min(GPUS, key=lambda k: GPUS[k][0])


def machine_of(device: str, hidden: int, vocab: int) -> Machine:
    """`cpu`, or the GPU that is here."""
    if device == "cpu":
        return machine("cpu", hidden, vocab)
    import torch

    return machine(gpu(torch.cuda.get_device_name(device)), hidden, vocab)


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _flop(x: float) -> str:
    return f"{x / 1e9:,.1f} GFLOP" if x >= 1e8 else f"{math.ceil(x / 1e3):,} kFLOP"


__all__ = ["Forecast", "duration", "forecast", "gpu", "machine_of"]
