"""A vocabulary spread over processes: each holds some rows of the head and all hidden states.

Shapes: n rows of a chunk, K ids, v the words of this process, V all words.

Numbers per row are the same on every process, values with an entry per word are a process's own
columns. What reduces over the words is finished by a maximum or sum over the processes; what is
read at given ids comes from the process that owns them, the others add 0; the k largest are merged
from every process's k largest. Every process must make the same calls in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from .head import Head


@dataclass(frozen=True, eq=False)
class VocabShard:
    """Which words of a vocabulary this process holds: `Head(weight[rows, H], shard=VocabShard(…))`.

    group           process group, None: all processes. The first rank holds the first words
    rows            rows of the head on this rank; they may differ from rank to rank
    total           words of the vocabulary; rows behind them, on the last rank, are padding
    partial_hidden  what is left in the gradient of the hidden states, see below

    Making one is a collective call: every process of the group makes it, once, and keeps it.

    Every process gets the same loss and the gradient of its own rows of the head. The gradient of
    the hidden states is summed over the group, so that each process has all of it: what Megatron's
    column-parallel output layer does without sequence parallelism. Where the trunk itself sums
    over the group (Megatron with sequence parallelism: `gather_from_sequence_parallel_region` with
    `tensor_parallel_output_grad=True` scatters the sum) give `partial_hidden=True`: each process
    then gets the part that its own words contribute. The hidden states, tokens and everything else
    of a batch must be the same on every process of the group.

    Raises ValueError, on every process alike, where the rows do not cover the words.
    """

    group: Any
    rows: int
    total: int
    partial_hidden: bool = False
    rank: int = field(init=False)
    bounds: tuple[tuple[int, int], ...] = field(init=False)  # (first word, one past the last)

    def __post_init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("a VocabShard needs processes: torch.distributed.init_process_group")
        mine = torch.tensor([self.rows, self.total], dtype=torch.int64, device=meeting(self.group))
        found = [(int(r), int(t)) for r, t in gathered(mine, self.group)]
        rows, totals = [r for r, _ in found], {t for _, t in found}
        if len(totals) > 1:
            raise ValueError(f"the ranks of a VocabShard name different totals: {sorted(totals)}")
        edges = [sum(rows[:i]) for i in range(len(rows) + 1)]
        if self.total > edges[-1]:
            raise ValueError(
                f"{self.total} words, but the ranks hold {edges[-1]} rows: {', '.join(map(str, rows))}"
            )
        bounds = tuple((a, min(b, self.total)) for a, b in pairwise(edges))
        for rank, (a, b) in enumerate(bounds):
            if a >= b:
                raise ValueError(
                    f"rank {rank} holds no word: rows {a} to {edges[rank + 1]} of {self.total} words"
                )
        object.__setattr__(self, "rank", dist.get_rank(self.group))
        object.__setattr__(self, "bounds", bounds)

    @property
    def start(self) -> int:
        """The first word of this process."""
        return self.bounds[self.rank][0]

    @property
    def stop(self) -> int:
        """One past the last word of this process; padding is beyond it."""
        return self.bounds[self.rank][1]

    @property
    def columns(self) -> int:
        """v, the words of this process."""
        return self.stop - self.start

    @property
    def widest(self) -> int:
        """The most words of any process: chunks are sized for it, alike everywhere."""
        return max(b - a for a, b in self.bounds)

    @property
    def words(self) -> slice:
        """This process's columns of something [..., V]."""
        return slice(self.start, self.stop)

    # -- numbers per row -----------------------------------------------------------------------
    def add(self, x: Tensor) -> Tensor:
        """Σ over the processes, in place; `x` is contiguous and this process's own."""
        return added(x, self.group)

    def most(self, x: Tensor) -> Tensor:
        """Maximum over the processes, in place."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def everywhere(self, fine: bool, device: torch.device) -> bool:
        """Whether something holds on every process: they must take the same way."""
        flag = torch.tensor([0 if fine else 1], device=device)
        return not bool(self.add(flag))

    def add_hidden(self, slope_NH: Tensor | None) -> None:
        """The gradient of the hidden states as promised above, in place."""
        if slope_NH is not None and not self.partial_hidden:
            self.add(slope_NH)

    # -- entries at ids ------------------------------------------------------------------------
    def own(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(columns here, whether the word is here) of ids of any shape."""
        here = ids - self.start
        return here.clamp(0, self.columns - 1), (here >= 0) & (here < self.columns)

    def at(self, x_nv: Tensor, ids_nK: Tensor) -> Tensor:
        """Entries [n, K] at ids of the whole vocabulary; 0 at an id that is no word."""
        here, mine = self.own(ids_nK)
        found = x_nv.gather(1, here)
        if found.dtype == torch.bool:
            return self.add((found & mine).to(torch.uint8)) > 0
        return self.add(found.masked_fill(~mine, 0))

    def scatter_add(self, into_nv: Tensor, ids_nK: Tensor, x_nK: Tensor) -> Tensor:
        """Adds numbers [n, K], the same on every process, to the entries that are here."""
        here, mine = self.own(ids_nK)
        return into_nv.scatter_add_(1, here, x_nK.expand(ids_nK.shape).masked_fill(~mine, 0.0))

    def largest(self, x_nv: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest entries of all columns and their ids, falling [n, k]."""
        k = min(k, self.total)
        each = min(k, self.widest)
        best, ids = x_nv.topk(min(each, self.columns), 1)
        short = each - best.shape[1]
        best = torch.nn.functional.pad(best, (0, short), value=-torch.inf)
        ids = torch.nn.functional.pad(ids + self.start, (0, short))
        best, ids = (torch.cat(gathered(x, self.group), 1) for x in (best, ids))
        best, order = best.topk(k, 1)
        return best, ids.gather(1, order)


def meeting(group: Any) -> torch.device:
    """Where small numbers of a group are exchanged."""
    on_gpu = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def added(x: Tensor, group: Any) -> Tensor:
    """Σ over the processes of a group, in place."""
    dist.all_reduce(x, group=group)
    return x


def gathered(x: Tensor, group: Any) -> list[Tensor]:
    """Every process's tensor of this shape, in the order of the ranks."""
    found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x.contiguous(), group=group)
    return found


def same_split(head: Head, other: Head) -> str:
    """Why two heads do not hold the same words on every process; "" if they do."""
    a, b = head.shard, other.shard
    if a is None and b is None:
        return ""
    if a is None or b is None:
        return "one head is sharded by words, the other is whole"
    if (a.bounds, a.rank) != (b.bounds, b.rank):
        return f"one head is split at {a.bounds}, the other at {b.bounds}"
    return ""


__all__ = ["VocabShard", "added", "gathered", "meeting", "same_split"]
