"""Batch passes: numbers per row of every micro-batch, of every process, in; coupled ones out.

Over processes there are two ways. Where rows meet other sequences in sums and maxima of the whole
batch alone (token counts, means, whitening) every process computes its part and those numbers are
reduced. Where they meet in groups, positions or quantiles the numbers per row are gathered, the
pass runs on all of them and every process keeps its own rows.

Legend: P processes, B sequences, N rows; both of this process unless a comment says all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opdsl.emit import prelude
from opdsl.emit.batch import ALONE, Batch
from opdsl.emit.feed import Numbers, as_type, keys_of, seq_input, tensor_of
from opdsl.emit.kernels.parallel import added, gathered
from opdsl.emit.module import Emitted, Writer, function_name, key
from opdsl.ir.stages import Stage, Staged
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis

MEET = frozenset(["group_sum", "group_max", "others_sum", "position_sum", "quantile_b"])


@dataclass(frozen=True)
class Ranks:
    """The processes that hold parts of one batch, and how much each holds."""

    group: Any
    rows: tuple[int, ...]
    seqs: tuple[int, ...]
    rank: int

    def whole(self, columns: Sequence[Tensor], sizes: tuple[int, ...]) -> list[Tensor]:
        """Columns of this process (all of one length) -> of all processes, in their order."""
        out: list[Tensor] = [torch.empty(0)] * len(columns)
        for dtype in dict.fromkeys(c.dtype for c in columns):
            which = [i for i, c in enumerate(columns) if c.dtype == dtype]
            kind = torch.uint8 if dtype == torch.bool else dtype  # no backend sends a bool
            mine = torch.stack([columns[i].to(kind) for i in which])
            padded = torch.nn.functional.pad(mine, (0, max(sizes) - mine.shape[1]))
            parts = [x[:, :n] for x, n in zip(gathered(padded, self.group), sizes)]
            for i, column in zip(which, torch.cat(parts, 1)):
                out[i] = column.to(dtype)
        return out


def meet(group: Any, rows: Sequence[Batch], device: torch.device) -> Ranks | None:
    """The processes of a group; None without rows on any of them. A collective call."""
    mine = torch.tensor(
        [sum(r.layout.n_rows for r in rows), sum(r.layout.n_seqs for r in rows)], device=device
    )
    found = torch.stack(gathered(mine, group)).tolist()
    rows_P, seqs_P = zip(*found)
    ranks = Ranks(group, rows_P, seqs_P, dist.get_rank(group))
    return ranks if sum(ranks.rows) else None


def couple(
    functions: Callable[[Stage, bool], Any],
    st: Stage,
    rows: Sequence[Batch],
    stores: Sequence[Numbers],
    constants: Numbers,
    like: torch.dtype,
    steps: Batch,
    ranks: Ranks | None = None,
) -> None:
    """A batch pass over all micro-batches; its exports go back into each one's store.

    functions: (pass, whether sums go over processes) -> its function. constants: numbers of the
    whole batch, kept apart because a process may have no rows. steps: says which step this is.
    """
    device = steps.tokens_N.device
    plain, per_seq, per_row = _columns(st, rows, stores, constants, like, device)
    layout = _layout(rows, device)
    gathers = ranks is not None and any(n.op in MEET for n in st.nodes)
    first = 0
    if gathers:
        assert ranks is not None
        columns = [*per_seq.values(), layout["length"], layout["group"]]
        *tables, layout["length"], layout["group"] = ranks.whole(columns, ranks.seqs)
        per_seq = dict(zip(per_seq, tables))
        start = sum(ranks.seqs[: ranks.rank])
        columns = [*per_row.values(), layout["seq"] + start, layout["pos"]]
        *tables, layout["seq"], layout["pos"] = ranks.whole(columns, ranks.rows)
        per_row = dict(zip(per_row, tables))
        first = sum(ranks.rows[: ranks.rank])
    summed = ranks is not None and not gathers
    args = (layout["seq"], layout["pos"], layout["length"], groups(layout["group"]))
    b = Spread(*args, ranks) if summed else prelude.Coupling(*args)  # type: ignore[arg-type]
    now = {"step": float(steps.step), "total_steps": float(steps.total_steps)}
    out = functions(st, summed)(b, {**now, **plain, **per_seq, **per_row}, like)
    _give_back(st, out, rows, stores, constants, like, device, first)


def _columns(
    st: Stage,
    rows: Sequence[Batch],
    stores: Sequence[Numbers],
    constants: Numbers,
    like: torch.dtype,
    device: torch.device,
) -> tuple[dict[str, object], Numbers, Numbers]:
    """What a batch pass reads: plain numbers, columns [B] and columns [N]."""
    plain: dict[str, object] = {}
    per_seq: Numbers = {}
    per_row: Numbers = {}

    def joined(found: list[Tensor], n: Node) -> Tensor:
        kind = torch.bool if n.q.unit == "bool" else like  # of a process without rows
        return torch.cat(found) if found else torch.zeros(0, dtype=kind, device=device)

    for n in st.imports:
        if n.q.axis is Axis.CONST:
            plain[key(n)] = constants[key(n)]
        else:
            per_row[key(n)] = joined([as_type(s[key(n)], like) for s in stores], n)
    for n in st.nodes:
        if n.op == "input" and n.attr("name") not in ("one", "step"):
            for k in keys_of(n):
                whole = n.q.axis in (Axis.SEQ, Axis.PROMPT) or k.startswith("boot_")
                table = per_seq if whole else per_row
                table[k] = joined([seq_input(r, n, k, like) for r in rows], n)
    return plain, per_seq, per_row


def _layout(rows: Sequence[Batch], device: torch.device) -> Numbers:
    """seq, pos [N], length, group [B] of the micro-batches of this process."""
    names = ("seq", "pos", "length", "group")
    parts: dict[str, list[Tensor]] = {k: [] for k in names}
    start = 0
    for r in rows:
        lay = r.layout
        for k, x in zip(names, (lay.seq_N + start, lay.pos_N, lay.length_B, lay.group_B)):
            parts[k].append(x)
        start += lay.n_seqs
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    return {k: torch.cat(x) if x else empty for k, x in parts.items()}


def groups(group_B: Tensor) -> Tensor:
    """Group of every sequence, from 0; one that named none is alone, whatever part it came in."""
    if not group_B.numel():
        return group_B
    named = torch.unique(group_B, return_inverse=True)[1]
    alone = torch.arange(len(group_B), device=group_B.device) + len(group_B)
    return torch.where(group_B <= ALONE, alone, named)


def _give_back(
    st: Stage,
    out: dict[str, object],
    rows: Sequence[Batch],
    stores: Sequence[Numbers],
    constants: Numbers,
    like: torch.dtype,
    device: torch.device,
    first: int,
) -> None:
    """Exports to the micro-batches, whose rows begin at `first` of those of the pass."""
    exports = {key(n): n for n in st.exports}
    found = {k: tensor_of(x, like, device) for k, x in out.items()}
    constants.update({k: x for k, x in found.items() if exports[k].q.axis is Axis.CONST})
    for r, store in zip(rows, stores):
        own = slice(first, first + r.layout.n_rows)
        first = own.stop
        for k, x in found.items():
            store[k] = x if k in constants or x.dim() == 0 else x[own]


# ---- sums over processes -------------------------------------------------------------------------


class Spread(prelude.Coupling):
    """Rows of this process; sums and maxima of the whole batch are those of all processes."""

    def __init__(self, seq: Tensor, pos: Tensor, length: Tensor, group: Tensor, ranks: Ranks):
        super().__init__(seq, pos, length, group)
        self.ranks = ranks

    def total(self, x: Tensor) -> Tensor:
        wide = torch.float64 if x.is_floating_point() and x.device.type != "mps" else x.dtype
        return added(x.sum(dtype=wide), self.ranks.group).to(x.dtype)

    def most(self, x: Tensor) -> Tensor:
        best = x.amax() if x.numel() else x.new_full((), -torch.inf)
        dist.all_reduce(best, dist.ReduceOp.MAX, group=self.ranks.group)
        return best


class SpreadWriter(Writer):
    """Writes a batch pass whose sums and maxima go over processes."""

    def _sum_b(self, n: Node) -> str:
        return f"b.total({self._whole(n)})"

    def _max_b(self, n: Node) -> str:
        return f"b.most({self._whole(n)})"


def spread(emitted: Emitted) -> str:
    """The batch passes of a method for `Spread`."""
    texts = [
        SpreadWriter(s, st).function()
        for s in emitted.staged
        for st in s.stages
        if st.kind != "rows"
    ]
    return "\n\n\n".join(texts) + "\n"


def named(staged: Staged, plain: dict[str, Any], over: Callable[[], dict[str, Any]]):
    """`functions` of `couple`: from the passes of one process, and those over processes."""
    return lambda st, summed: (over() if summed else plain)[function_name(staged.rows, st)]


__all__ = ["Ranks", "Spread", "couple", "groups", "meet", "named", "spread"]
