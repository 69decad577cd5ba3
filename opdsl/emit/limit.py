"""Rows at a time for a batch with a stated memory (`Batch.from_hidden(…, memory=…)`)."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from opdsl.emit.batch import Batch, DenseDist, HiddenDist, RoutedDist, SparseDist
from opdsl.emit.budget import CHUNK_RANGE
from opdsl.emit.feed import dtype_of, finite_entries
from opdsl.emit.footprint import Place, Shapes, buffers, rows_within
from opdsl.emit.plan import Plan, plans
from opdsl.emit.routed import resolve
from opdsl.ir.stages import Staged

if TYPE_CHECKING:
    from opdsl.emit.runtime import LossModule


_plans: WeakKeyDictionary[torch.nn.Module, tuple[Plan, ...]] = WeakKeyDictionary()


def plans_of(loss: LossModule) -> tuple[Plan, ...]:
    """The plans of a loss, made the first time a memory is stated."""
    if loss not in _plans:
        _plans[loss] = plans(loss.emitted)
    return _plans[loss]


def rows_at_once(loss: LossModule, staged: Staged, batch: Batch) -> int | None:
    """Rows of a chunk of one part; None where the batch states no memory.

    Raises BudgetError naming the least memory that works.
    """
    if batch.memory is None:
        return None
    made = plans_of(loss)
    plan = next(p for p in made if p.rows == staged.rows)
    return rows_within([plan], shapes_of(plan, staged, batch, made), place_of(batch), batch.memory)


def place_of(batch: Batch) -> Place:
    kind = batch.tokens_N.device.type
    return Place(kind if kind in CHUNK_RANGE else "cuda", torch.get_num_threads())


def shapes_of(plan: Plan, staged: Staged, batch: Batch, made: tuple[Plan, ...]) -> Shapes:
    """Shapes of the rows of one part, as the predictions have them. made: the plans of all parts."""
    student = batch.dists["student"]
    assert isinstance(student, HiddenDist)
    head = student.head
    others: dict[str, int] = {}
    copies: dict[str, int] = {}
    served: set[str] = set()
    for name in dict.fromkeys(plan.others):
        found = batch.dists[resolve(batch, name)]
        given = found.parts if isinstance(found, RoutedDist) else (found,)
        tiles = [d for d in given if not isinstance(d, SparseDist)]
        if not tiles:
            served.add(name)
        # logits that are given are copied into a tile, picked rows of them once more
        picked = plan.gated == "known" and any(isinstance(d, DenseDist) for d in tiles)
        copies[name] = len(tiles) + picked
        others[name] = sum(d.hidden_NH.shape[1] for d in tiles if isinstance(d, HiddenDist))
    passes = [st for st in staged.stages if st.kind == "rows"]
    return Shapes(
        rows=batch.layout.n_rows,
        hidden=student.hidden_NH.shape[1],
        vocab=head.widest,
        others=others,
        served=frozenset(served),
        bytes=head.weight.element_size(),
        frozen_head=not head.weight.requires_grad,
        wide=dtype_of(batch).itemsize,
        copies=copies,
        plain=not all(finite_entries(batch, st) for st in passes),
        capped=head.soft_cap is not None,
        parts=len(made),
        kept_scratch=max(buffers(p) for p in made),
    )


def logit_rows(batch: Batch, words: int) -> int | None:
    """Rows of the one tile that reads log-probabilities alone; None: as usual."""
    if batch.memory is None:
        return None
    high = CHUNK_RANGE[place_of(batch).kind][1]
    return max(1, min(high, batch.memory // (2 * dtype_of(batch).itemsize * words)))


__all__ = ["logit_rows", "place_of", "plans_of", "rows_at_once", "shapes_of"]
