"""Losses that read the student on given ids only, up to a constant per row: no product with V.

Where every use of the logits is inside a softmax over given ids (a support that is renormalised),
the log-sum-exp over the vocabulary cancels and so does the gradient of every other word. K rows of
the head are gathered for each of N rows: 6·N·K·H FLOP instead of 6·N·H·V, and a gradient of the
head that touches those rows alone. Engines that renormalise compute the full logits first.

Shapes: N rows, n rows of one chunk, H hidden, K ids, R rows of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from opdsl.emit.budget import EXPECTED_K, GATHER_BYTES

from .head import Gradients, Head, accumulate_type, largest, row_chunks
from .linear_rowwise import Dense, Source, check_inputs, delivered

Program = Callable[
    ["Gathered", dict[str, Tensor], dict[str, Tensor]],
    tuple[Tensor, "list[tuple[Tensor, Tensor]]", Mapping[str, Tensor]],
]
"""(student, logits of others, rows) -> (value [n], [(ids [n, K], cotangent [n, K])], extras).

Cotangents are d(sum of values) / d(what `student.at(ids)` gave), and 0 at ids that do not count."""


class Gathered:
    """Logits of one chunk at ids that are asked for, equal to the model's up to nothing at all."""

    def __init__(
        self, hidden_nH: Tensor, head: Head, dtype: torch.dtype, scratch: dict | None = None
    ):
        self.hidden = hidden_nH.detach().to(dtype)
        self.head, self.dtype = head, dtype
        self.scratch = {} if scratch is None else scratch  # memory for rows, kept across chunks
        self.slope: dict[int, Tensor] = {}
        self.rows: dict[int, Tensor] = {}
        self.ids: dict[int, Tensor] = {}

    @staticmethod
    def at_once(hidden: Tensor) -> int:
        """Rows per chunk where nothing else says: the gathered rows in budget."""
        budget = GATHER_BYTES.get(hidden.device.type, GATHER_BYTES["cuda"])
        return max(16, budget // (4 * EXPECTED_K * hidden.shape[1]))

    def at(self, ids_nK: Tensor) -> Tensor:
        """soft_cap · tanh(scale · (w[ids] · h + b) / soft_cap) [n, K]."""
        head, key = self.head, id(ids_nK)
        if key not in self.rows:
            self.ids[key] = ids_nK  # keeps it alive, so that its id stays its own
            self.rows[key] = self._gather(ids_nK, len(self.rows))
        z_nK = torch.bmm(self.rows[key], self.hidden[:, :, None])[:, :, 0]
        if head.bias is not None:
            z_nK = z_nK + head.bias.detach()[ids_nK].to(self.dtype)
        z_nK = z_nK * head.scale
        self.slope[key] = torch.full_like(z_nK, head.scale)
        if head.soft_cap is not None:
            t = torch.tanh(z_nK / head.soft_cap)
            self.slope[key] *= 1 - t * t
            z_nK = head.soft_cap * t
        return z_nK

    def _gather(self, ids_nK: Tensor, which: int) -> Tensor:
        """Rows of the head [n, K, H], in memory that was touched before where there is some."""
        weight, flat = self.head.weight.detach(), ids_nK.flatten()
        shape = (len(flat), weight.shape[1])
        have = self.scratch.get(which)
        if have is None or len(have) < shape[0]:
            have = self.scratch[which] = torch.empty(
                shape, dtype=weight.dtype, device=weight.device
            )
        rows = torch.index_select(weight, 0, flat, out=have[: shape[0]])
        return rows.view(*ids_nK.shape, -1).to(self.dtype)

    def products(self, ids_nK: Tensor, cotangent_nK: Tensor, into: Gradients, where: slice) -> None:
        """Pull a cotangent of `at(ids)` back into the accumulators."""
        key = id(ids_nK)
        g_nK = cotangent_nK.to(self.dtype) * self.slope[key]
        if into.bias is not None:
            into.bias.index_add_(0, ids_nK.flatten(), g_nK.flatten())
        if into.hidden is not None:
            into.hidden[where] += torch.bmm(g_nK[:, None, :], self.rows[key])[:, 0]
        if into.weight is not None:  # the gathered rows are read for the last time above
            outer = torch.mul(g_nK[:, :, None], self.hidden[:, None, :], out=self.rows[key])
            into.weight.index_add_(0, ids_nK.flatten(), outer.flatten(0, 1))


class GatheredInParts(Gathered):
    """The same where every process holds some rows of the head (`Head.shard`)."""

    def __init__(
        self, hidden_nH: Tensor, head: Head, dtype: torch.dtype, scratch: dict | None = None
    ):
        super().__init__(hidden_nH, head, dtype, scratch)
        self.here: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # rows here, whether here, ids

    def at(self, ids_nK: Tensor) -> Tensor:
        """Every word's logit comes from the process that holds it, the others add 0."""
        head, shard = self.head, self.head.shard
        assert shard is not None
        here_nK, mine_nK = self.here.setdefault(id(ids_nK), (*shard.own(ids_nK), ids_nK))[:2]
        key = id(here_nK)
        if key not in self.rows:
            self.rows[key] = self._gather(here_nK, len(self.rows))
        z_nK = torch.bmm(self.rows[key], self.hidden[:, :, None])[:, :, 0]
        if head.bias is not None:
            z_nK = z_nK + head.bias.detach()[here_nK].to(self.dtype)
        z_nK = shard.add(z_nK.masked_fill(~mine_nK, 0.0)) * head.scale
        self.slope[key] = mine_nK * torch.full_like(z_nK, head.scale)
        if head.soft_cap is not None:
            t = torch.tanh(z_nK / head.soft_cap)
            self.slope[key] *= 1 - t * t
            z_nK = head.soft_cap * t
        return z_nK

    def products(self, ids_nK: Tensor, cotangent_nK: Tensor, into: Gradients, where: slice) -> None:
        super().products(self.here[id(ids_nK)][0], cotangent_nK, into, where)


def linear_restricted(
    hidden: Tensor,
    head: Head,
    program: Program,
    *,
    rows: Mapping[str, Tensor] | None = None,
    others: Mapping[str, Dense] | None = None,
    active: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As `linear_rowwise`, for programs that ask the student at ids: (total, values [N], extras)."""
    rows, others = dict(rows or {}), dict(others or {})
    check_inputs(hidden, head, rows, others, active)
    return delivered(
        hidden,
        head,
        lambda into: _pass(hidden, head, program, rows, others, active, chunk, into),
    )


def _pass(
    hidden: Tensor,
    head: Head,
    program: Program,
    rows: dict[str, Tensor],
    others: dict[str, Dense],
    active: Tensor | None,
    chunk: int | None,
    gradients: Gradients,
) -> tuple[Tensor, dict[str, Tensor]]:
    from .triton_launch import gathered

    N = len(hidden)
    kept = torch.arange(N, device=hidden.device) if active is None else active.nonzero().squeeze(1)
    dtype = accumulate_type(hidden.dtype, head.weight.dtype)
    reader = gathered(hidden.device, dtype) if head.shard is None else GatheredInParts
    if chunk is None and not others:
        chunk = reader.at_once(hidden)
    chunks = row_chunks(len(kept), head.widest, hidden.device, chunk) or [(0, 0)]
    tall = largest(chunks)
    sources = {name: Source(dense, tall, dtype) for name, dense in others.items()}
    values = torch.zeros(N, dtype=dtype, device=hidden.device)
    extras: dict[str, Tensor] = {}
    scratch: dict[int, Tensor] = {}
    for start, stop in chunks:
        where = slice(start, stop) if active is None else kept[start:stop]
        student = reader(hidden[where], head, dtype)
        student.scratch = scratch
        logits = {name: source.logits(where) for name, source in sources.items()}
        chunk_rows = {name: row[where] for name, row in rows.items()}
        value_n, pieces, found = program(student, logits, chunk_rows)
        values[where] = value_n.to(dtype)
        for name, extra in found.items():
            if name not in extras:
                extras[name] = extra.new_zeros((N, *extra.shape[1:]))
            extras[name][where] = extra
        if gradients.wanted:
            for ids_nK, cotangent_nK in _by_ids(pieces):
                student.products(ids_nK, cotangent_nK, gradients, where)  # type: ignore[arg-type]
    return values, extras


def _by_ids(pieces: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """One cotangent for every list of ids: `Gathered.products` uses up the rows it gathered."""
    merged: dict[int, tuple[Tensor, Tensor]] = {}
    for ids_nK, cotangent_nK in pieces:
        old = merged.get(id(ids_nK))
        merged[id(ids_nK)] = (ids_nK, cotangent_nK if old is None else old[1] + cotangent_nK)
    return list(merged.values())
