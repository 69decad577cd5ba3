"""Memory of the loss in front of the vocabulary, and how many rows at a time fit into a budget.

One formula serves both: what `explain --cost` and `run --dry-run` predict, and the rows at a time
that a loss picks where the user stated a memory. Counted is what the loss takes beyond the models,
the hidden states and the inputs: logits of one chunk of rows, scratch of its row programs, gradients.
Without torch.

Legend: N rows, n rows at a time, H hidden, V vocabulary; a tile is one number per row and word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from opdsl.emit.budget import (
    CHUNK_RANGE,
    EXPECTED_K,
    GATHER_BYTES,
    TILE_BYTES,
    BudgetError,
    amount,
    strip_rows,
)
from opdsl.emit.plan import Plan, Sweep

CAST_BYTES = 16 << 20  # of a head upcast a block at a time, where products have one type alone
PICKED = 0.75  # most of a tile that is copied where rows with closed gates are left out backward
NUMBERS = 48  # numbers per row that passes hand on and report, at most


@dataclass(frozen=True)
class Shapes:
    """N rows of a micro-batch, H and V of the student, H of every other model by name.

    A model in `served` gives lists or numbers, no logits: it costs nothing here. bytes is the size
    of a weight, wide that of a logit; kept is the share of rows that gates leave open. copies:
    models behind a name that chooses among several by row. plain: passes are not in place (words
    of probability 0, such a choice). capped: a head with a soft cap. parts: sets of rows with a
    gradient of their own (reference texts).
    """

    rows: int
    hidden: int
    vocab: int
    others: dict[str, int] = field(default_factory=dict)
    served: frozenset[str] = frozenset()
    bytes: int = 4
    frozen_head: bool = False
    kept: float = 1.0
    wide: int = 4
    copies: dict[str, int] = field(default_factory=dict)
    plain: bool = False
    capped: bool = False
    parts: int = 1

    def width(self, model: str) -> int:
        return self.others.get(model, self.hidden)


@dataclass(frozen=True)
class Place:
    """Where a loss runs: `cpu` or `cuda`, and the threads of a CPU."""

    kind: str
    threads: int = 1


def listed(s: Sweep, at: Shapes) -> list[str]:
    """Models other than the student whose logits a pass computes."""
    return [n for n in s.reads if n != "student" and n not in at.served]


def gradients(at: Shapes) -> int:
    """Bytes that do not depend on the rows at a time: gradients and numbers per row."""
    head = at.vocab * at.hidden * (at.wide + (at.bytes if at.bytes < at.wide else 0))
    sums = at.parts + (at.parts > 1)  # gradients of several parts wait for one another
    per_row = 2 * at.wide * at.hidden + at.wide * NUMBERS
    return (0 if at.frozen_head else sums * head) + at.rows * per_row


def peak(plans: Sequence[Plan], at: Shapes, on: Place, n: int) -> int:
    """Bytes at the largest moment of loss and gradient with n rows at a time."""
    most = 0
    for plan in plans:
        sweeps = [*plan.statistics, plan.gradient]
        scratch = max(s.scratch for s in sweeps)  # kept from pass to pass
        unit = plan.unit and at.frozen_head
        for s in plan.statistics:
            most = max(most, _pass(s, plan, at, on, n, scratch + unit, unit))
        if plan.kind == "S0":
            most = max(most, _gathered(plan.gradient, at, n))
        elif not unit:
            most = max(most, _pass(plan.gradient, plan, at, on, n, scratch, True))
    return int(most) + gradients(at)


def _pass(
    s: Sweep, plan: Plan, at: Shapes, on: Place, n: int, scratch: int, backward: bool
) -> float:
    """Bytes of one sweep over tiles, with the products backward or without."""
    others, tile = listed(s, at), at.wide * at.vocab
    models = (backward or "student" in s.reads) + sum(at.copies.get(m, 1) for m in others)
    tall = n
    if on.kind == "cpu":
        tall = min(n, strip_rows(at.vocab, bool(others), on.threads, at.wide))
    more = 2 * max(0, max(at.copies.values(), default=1) - 2)
    size = tile * n * models
    size += tile * tall * (s.plain + more if at.plain else scratch + s.fresh)
    size += at.wide * n * (at.hidden + sum(at.width(m) for m in others))
    if at.bytes < at.wide and on.kind == "cpu":
        size += models * min(CAST_BYTES, tile * n)
    if backward:
        size += tile * n * at.capped
        size += tile * n * PICKED * (plan.gated == "measured")
        size += 2 * at.vocab * n * (at.bytes == 2 and on.kind == "cuda")
    return size


def _gathered(s: Sweep, at: Shapes, n: int) -> float:
    """Bytes of the last pass of plan class S0: rows of the head, and whole logits of others."""
    others, tile = listed(s, at), at.wide * at.vocab
    rows = s.asked * at.hidden * (at.bytes + (at.wide if at.bytes < at.wide else 0))
    logits = sum(at.copies.get(m, 1) for m in others) + bool(others) + s.fresh
    cast = len(others) * min(CAST_BYTES, tile * n) if at.bytes < at.wide else 0
    return n * (rows + tile * logits + at.wide * 8 * s.asked) + cast


def usual(plan: Plan, at: Shapes, on: Place, tile_bytes: int | None = None) -> int:
    """Rows at a time where nobody stated a memory; `tile_bytes` is another budget for one tile."""
    low, high = CHUNK_RANGE[on.kind]
    if plan.kind == "S0" and not listed(plan.gradient, at) and not plan.statistics:
        rows = max(16, GATHER_BYTES[on.kind] // (4 * EXPECTED_K * at.hidden))
    else:
        rows = max(low, min(high, (tile_bytes or TILE_BYTES[on.kind]) // (4 * at.vocab)))
    return max(1, min(rows, at.rows))


def rows_within(plans: Sequence[Plan], at: Shapes, on: Place, memory: int) -> int:
    """The most rows at a time whose peak stays within `memory` bytes.

    At most what a tile may have (256 rows on a CPU, 4096 on a GPU), at least what is worth reading
    a head for (16 and 256). Raises BudgetError naming the least memory that works.
    """
    low, high = (max(1, min(x, at.rows)) for x in CHUNK_RANGE[on.kind])
    least = peak(plans, at, on, low)
    if least > memory:
        fixed = gradients(at)
        raise BudgetError(
            f"{amount(memory)} is too little for this loss: {low} tokens at a time take "
            f"{amount(least)}, {amount(fixed)} of it for gradients; the least that works is "
            f"{amount(least)}"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak(plans, at, on, middle) <= memory else (low, middle - 1)
    return low


__all__ = ["Place", "Shapes", "gradients", "listed", "peak", "rows_within", "usual"]
