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
OF_ENTRY = 16  # numbers per row and entry of an index set that are alive together


@dataclass(frozen=True)
class Shapes:
    """N rows of a micro-batch, H and V of the student, H of every other model by name.

    A model in `served` gives lists or numbers, no logits: it costs nothing here. bytes is the size
    of a weight, wide that of a logit; kept is the share of rows that gates leave open. copies:
    models behind a name that chooses among several by row. plain: passes are not in place (words
    of probability 0, such a choice). capped: a head with a soft cap. parts: sets of rows with a
    gradient of their own (reference texts); kept_scratch: buffers that passes of any part keep.
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
    kept_scratch: int = 0

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


def buffers(plan: Plan) -> int:
    """Scratch tiles of the passes of a plan; class S0 has one, for log-sum-exps of other models."""
    own = int(len(plan.gradient.reads) > 1) if plan.kind == "S0" else plan.gradient.scratch
    return max(own, *(s.scratch for s in plan.statistics), 0)


def gradients(at: Shapes) -> int:
    """Bytes that do not depend on the rows at a time: gradients and numbers per row."""
    head = at.vocab * at.hidden * (at.wide + (at.bytes if at.bytes < at.wide else 0))
    sums = at.parts + (at.parts > 1)  # gradients of several parts wait for one another
    index = 8 * at.vocab
    per_row = 2 * at.wide * at.hidden + at.wide * NUMBERS
    return (0 if at.frozen_head else sums * head) + at.rows * per_row + index


def peak(plans: Sequence[Plan], at: Shapes, on: Place, n: int) -> int:
    """Bytes at the largest moment of loss and gradient with n rows at a time."""
    most = 0.0
    for plan in plans:
        kept, unit = _kept(plan, at, on, n), plan.unit and at.frozen_head
        sizes = [_pass(s, plan, at, on, n, unit) for s in plan.statistics]
        if unit:  # one more buffer, and no pass behind it
            kept += at.wide * at.vocab * max(_tall(s, at, on, n) for s in plan.statistics)
        elif plan.kind == "S0":
            sizes.append(_gathered(plan.gradient, at, n))
        else:
            sizes.append(_pass(plan.gradient, plan, at, on, n, True))
        most = max(most, kept + max(sizes))
    return int(most) + gradients(at)


def _tall(s: Sweep, at: Shapes, on: Place, n: int) -> int:
    """Rows a row program sees at a time: on a CPU a strip of the tile."""
    if on.kind != "cpu":
        return n
    return min(n, strip_rows(at.vocab, bool(listed(s, at)), on.threads, at.wide))


def _kept(plan: Plan, at: Shapes, on: Place, n: int) -> float:
    """Bytes of scratch, kept from pass to pass: each buffer as tall as the tallest that used it.

    While one grows, the shorter one is there as well.
    """
    uses = [(s.scratch, _tall(s, at, on, n)) for s in plan.statistics]
    if plan.kind == "S0":
        uses.append((int(bool(listed(plan.gradient, at))), n))
    else:
        uses.append((plan.gradient.scratch, _tall(plan.gradient, at, on, n)))
    if at.parts > 1 and on.kind == "cpu":  # passes of other parts, at their tallest
        uses.append((at.kept_scratch, min(n, strip_rows(at.vocab, False, on.threads, at.wide))))
    count = max(k for k, _ in uses)
    rows = sum(max(t for k, t in uses if k > i) for i in range(count))
    heights = sorted({t for k, t in uses if k})
    grown = heights[-2] if len(heights) > 1 else 0
    return at.wide * at.vocab * (rows + grown)


def _pass(s: Sweep, plan: Plan, at: Shapes, on: Place, n: int, backward: bool) -> float:
    """Bytes of one sweep over tiles beside its scratch, with the products backward or without."""
    others, tile, tall = listed(s, at), at.wide * at.vocab, _tall(s, at, on, n)
    copies = max(at.copies.values(), default=1)
    models = (backward or "student" in s.reads) + sum(at.copies.get(m, 1) for m in others)
    own = s.plain if at.plain else s.routed if copies > 1 else s.fresh
    size = tile * (n * models + tall * (own + 2 * max(0, copies - 2)))
    size += at.wide * tall * OF_ENTRY * (s.entries + 2)
    size += at.wide * n * (at.hidden + sum(at.width(m) for m in others))
    if at.bytes < at.wide and on.kind == "cpu":
        size += models * min(CAST_BYTES, tile * n)
    if backward:
        size += tile * n * at.capped
        size += tile * n * PICKED * (plan.gated == "measured")
        size += 2 * at.vocab * n * (at.bytes == 2 and on.kind == "cuda")
        # the cotangent of a chunk is there until the next one is; in place it lies in the scratch
        size += tile * tall * (at.plain or on.kind == "cuda")
    return size


def _gathered(s: Sweep, at: Shapes, n: int) -> float:
    """Bytes of the last pass of plan class S0: rows of the head, and whole logits of others."""
    others, tile = listed(s, at), at.wide * at.vocab
    rows = s.asked * at.hidden * (at.bytes + (at.wide if at.bytes < at.wide else 0))
    logits = sum(at.copies.get(m, 1) for m in others) + s.fresh
    cast = len(others) * min(CAST_BYTES, tile * n) if at.bytes < at.wide else 0
    return n * (rows + tile * logits + at.wide * OF_ENTRY * s.entries) + cast


def usual(plan: Plan, at: Shapes, on: Place, tile_bytes: int | None = None) -> int:
    """Rows at a time where nobody stated a memory; `tile_bytes` is another budget for one tile."""
    low, high = CHUNK_RANGE[on.kind]
    if plan.kind == "S0" and not listed(plan.gradient, at) and not plan.statistics:
        rows = max(16, GATHER_BYTES[on.kind] // (4 * EXPECTED_K * at.hidden))
    else:
        rows = max(low, min(high, (tile_bytes or TILE_BYTES[on.kind]) // (4 * at.vocab)))
    return max(1, min(rows, at.rows))


def even(plan: Plan, at: Shapes, n: int) -> int:
    """Rows at a time when chunks are made equal; gates known before may leave any number of rows."""
    return n if plan.gated == "known" else -(-at.rows // -(-at.rows // n))


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


__all__ = [
    "Place",
    "Shapes",
    "buffers",
    "even",
    "gradients",
    "listed",
    "peak",
    "rows_within",
    "usual",
]
