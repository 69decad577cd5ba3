"""Full-vocabulary losses with the gradient in the forward pass, one [n, V] tile at a time.

Shapes: N rows, n rows of one chunk, H hidden, V vocabulary.

A loss that is a sum over rows needs no autograd over the vocabulary: for each chunk the logits are
computed, a row program turns them into the loss of each row and its cotangent d total / d logits,
and the two remaining products give the gradients of hidden states and head at once. The backward
pass multiplies by one number. That is 3 head products of 2·N·H·V FLOP, plus one per teacher head,
against 4 to 5 (plus two or three teacher products) for kernels which recompute in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opdsl.emit.budget import strip_rows

from .head import (
    Gradients,
    Head,
    HeadTile,
    accumulate_type,
    largest,
    no_autocast,
    row_chunks,
)

Dense = Tensor | tuple[Tensor, Head]
"""Logits [N, V] of another model, or its (hidden [N, H2], Head); constants either way."""

Program = Callable[
    [dict[str, Tensor], dict[str, Tensor]], tuple[Tensor, Tensor | None, Mapping[str, Tensor]]
]
"""(logits {name: [n, V]}, rows {name: [n, ...]}) -> (value [n], cotangent [n, V] | None, extras).

Every logits tensor is a float32 scratch buffer the program may overwrite, and the cotangent may be
one of them. It runs under no_grad with autocast off. The cotangent is d(sum of values) /
d logits["student"]; None means that the value is a constant. Extras are [n] numbers to report.
A row's results must depend on that row alone, or chunking would change the loss."""

STUDENT = "student"


def linear_rowwise(
    hidden: Tensor,
    head: Head,
    program: Program,
    *,
    rows: Mapping[str, Tensor] | None = None,
    others: Mapping[str, Dense] | None = None,
    active: Tensor | None = None,
    gates: Sequence[str] = (),
    reads_student: bool = True,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of a row program over N rows, differentiable in hidden, head.weight and head.bias.

    hidden [N, H]      any float type, any strides, leaf or not
    head               the student's head
    program            see `Program`
    rows               {name: [N, ...]} handed to the program chunk by chunk
    others             {name: Dense} logits the program reads beside "student"
    active [N] bool    rows to compute; the others are left out of the arithmetic and get an exact
                       zero value, extras and gradient, whatever their hidden states hold
    gates              extras of the program; a row where all of them are 0 has a zero cotangent
                       and takes no part in the two products of the backward direction
    reads_student      False: the program reads the others alone; the tile of the student is handed
                       in as it is, without the product
    chunk              rows per tile; None: from a byte budget

    Returns (total, values [N], extras {name: [N]}): the scalar sum (summed in float64, given in
    float32), its terms and the program's extras, both detached. With float64 hidden and weight
    everything is float64.

    Raises ValueError where a shape does not fit, where `rows` would need a gradient (a weight read
    from live student statistics is coupled: use `linear_logprobs` and autograd), or where another
    model's vocabulary differs (state the common part with `Head.vocab`, or slice the logits).
    """
    rows, others = dict(rows or {}), dict(others or {})
    check_inputs(hidden, head, rows, others, active)
    return delivered(
        hidden,
        head,
        lambda into: _pass(
            hidden, head, program, rows, others, active, tuple(gates), reads_student, chunk, into
        ),
    )


def delivered(
    hidden: Tensor, head: Head, run: Callable[[Gradients], tuple[Tensor, dict[str, Tensor]]]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(total, values [N], extras) of a sweep that fills gradients while it computes values."""
    grad = torch.is_grad_enabled()
    needs = (
        grad and hidden.requires_grad,
        grad and head.weight.requires_grad,
        grad and head.bias is not None and head.bias.requires_grad,
    )
    with torch.no_grad(), no_autocast(hidden.device):
        into = Gradients.zeros(hidden, head, needs)
        values, extras = run(into)
        if head.shard is not None:
            head.shard.add_hidden(into.hidden)
        wide = torch.float64 if values.device.type != "mps" else torch.float32
        total = values.sum(dtype=wide).to(values.dtype)
    if into.wanted:
        total = _Deliver.apply(
            hidden, head.weight, head.bias, total, into.hidden, into.weight, into.bias
        )
    return total, values, extras


class _Deliver(torch.autograd.Function):
    """A number whose gradients are already known: backward scales them.

    They go through `save_for_backward`, so a second backward raises as usual, and they are scaled
    out of place, so one with `retain_graph` is right. Times one they are handed on as they are: the
    gradient of a large head is the largest tensor of a step, and a copy of it would be the peak.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, total, dhidden, dweight, dbias):
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        # reading the number on a GPU would wait for it
        as_is = grad_total.device.type == "cpu" and float(grad_total) == 1.0

        def scaled(saved: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if saved is None or as_is:
                return None if saved is None else saved.to(dtype)
            # written in its own type: no second float32 copy of a large head's gradient
            return torch.mul(saved, grad_total, out=torch.empty_like(saved, dtype=dtype))

        found = (scaled(x, t) for x, t in zip(ctx.saved_tensors, ctx.types))
        return (*found, None, None, None, None)


def _pass(
    hidden: Tensor,
    head: Head,
    program: Program,
    rows: dict[str, Tensor],
    others: dict[str, Dense],
    active: Tensor | None,
    gates: tuple[str, ...],
    reads_student: bool,
    chunk: int | None,
    gradients: Gradients,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One pass over the chunks: fills `gradients`, returns (values [N], extras)."""
    N = len(hidden)
    kept = None if active is None else active.nonzero().squeeze(1)
    if kept is not None and len(kept) == N:
        kept = None
    count = N if kept is None else len(kept)
    # An empty pass still makes one call with zero rows, so that the extras have their names.
    chunks = row_chunks(count, head.widest, hidden.device, chunk) or [(0, 0)]
    tall = largest(chunks)
    dtype = accumulate_type(hidden.dtype, head.weight.dtype)
    unread = None  # a tile that nobody reads takes no memory
    if not reads_student:
        unread = torch.empty(1, head.width, dtype=dtype, device=hidden.device).expand(tall, -1)
    student = HeadTile(head, tall, hidden.dtype, adjoint=gradients.wanted, buffer=unread)
    sources = {name: Source(dense, tall, student.dtype) for name, dense in others.items()}
    values = torch.zeros(N, dtype=student.dtype, device=hidden.device)
    extras: dict[str, Tensor] = {}
    for start, stop in chunks:
        where = slice(start, stop) if kept is None else kept[start:stop]
        h_nH = student.load(hidden[where])
        logits = {STUDENT: student.logits(h_nH) if reads_student else student.buffer[: len(h_nH)]}
        for name, source in sources.items():
            logits[name] = source.logits(where)
        chunk_rows = {name: row[where] for name, row in rows.items()}
        # processes that share a vocabulary make the same calls: strips go by a process's threads
        run = program if head.shard is not None else partial(_in_strips, program)
        value_n, cotangent_nV, chunk_extras = run(logits, chunk_rows)
        _check_result(value_n, cotangent_nV, stop - start, head.width)
        values[where] = value_n.to(values.dtype)
        for name, extra in chunk_extras.items():
            if name not in extras:
                extras[name] = extra.new_zeros((N, *extra.shape[1:]))
            extras[name][where] = extra
        if cotangent_nV is None or not gradients.wanted:
            continue
        open_m = _open(chunk_extras, gates, head) if gates else None
        if open_m is not None:
            _some_products(student, cotangent_nV, h_nH, open_m, where, gradients)
            continue
        dhidden_nH = None
        if gradients.hidden is not None:
            # Indexing by a list of rows copies, so compacted chunks are written back below.
            dhidden_nH = gradients.hidden[where]
        student.products(cotangent_nV, h_nH, dhidden_nH, gradients.weight, gradients.bias)
        if gradients.hidden is not None and kept is not None:
            gradients.hidden[where] = dhidden_nH
    return values, extras


def _in_strips(
    program: Program, logits: dict[str, Tensor], rows: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None, Mapping[str, Tensor]]:
    """The program of one tile, on a CPU a few rows at a time.

    Products want tall tiles. The programs between them want short ones: their scratch is small
    then and closer to the core. The cotangent ends in the tile of the student.
    """
    tile_nV = logits[STUDENT]
    n, V = tile_nV.shape
    tall = n
    if tile_nV.device.type == "cpu":
        tall = strip_rows(V, len(logits) > 1, torch.get_num_threads(), tile_nV.element_size())
    if tall >= n:
        return program(logits, rows)
    pieces, moved = [], False
    for start in range(0, n, tall):
        strip = slice(start, start + tall)
        piece = program(
            {k: x[strip] for k, x in logits.items()}, {k: x[strip] for k, x in rows.items()}
        )
        slope_sV = piece[1]
        if slope_sV is not None:
            moved = True
            if slope_sV.data_ptr() != tile_nV[strip].data_ptr():
                tile_nV[strip] = slope_sV
        pieces.append((piece[0], piece[2]))  # a cotangent of its own memory is given back
        del piece, slope_sV
    extras = {k: torch.cat([p[1][k] for p in pieces]) for k in pieces[0][1]}
    return torch.cat([p[0] for p in pieces]), tile_nV if moved else None, extras


WORTH = 0.75  # share of open rows below which picking them is cheaper than multiplying zeros


def _open(extras: Mapping[str, Tensor], gates: tuple[str, ...], head: Head) -> Tensor | None:
    """Indices [m] of rows with an open gate; None where all rows had better be multiplied."""
    if head.soft_cap is not None:  # the slope of the cap is held for whole tiles
        return None
    open_n = torch.stack([extras[g] != 0 for g in gates]).any(0)
    kept = open_n.nonzero().squeeze(1)
    return kept if len(kept) < WORTH * len(open_n) else None


def _some_products(
    tile: HeadTile,
    cotangent_nV: Tensor,
    h_nH: Tensor,
    open_m: Tensor,
    where: slice | Tensor,
    into: Gradients,
) -> None:
    """`HeadTile.products` of some rows; the others keep a zero gradient."""
    h_mH = h_nH[open_m]
    dhidden_mH = None if into.hidden is None else torch.empty_like(into.hidden[: len(open_m)])
    tile.products(cotangent_nV[open_m], h_mH, dhidden_mH, into.weight, into.bias)
    if into.hidden is not None:
        rows = open_m + where.start if isinstance(where, slice) else where[open_m]
        into.hidden[rows] = dhidden_mH


class Source:
    """The logits of another model, chunk by chunk, in a float32 buffer of their own."""

    def __init__(self, dense: Dense, rows: int, dtype: torch.dtype) -> None:
        self.tile: HeadTile | None = None
        if isinstance(dense, Tensor):
            self.given = dense.detach()
            shape = (rows, dense.shape[1])
            self.buffer = torch.empty(shape, dtype=dtype, device=dense.device)
        else:
            hidden, head = dense
            self.given = hidden.detach()
            self.tile = HeadTile(head, rows, hidden.dtype, dtype=dtype)

    def logits(self, where: slice | Tensor) -> Tensor:
        picked = self.given[where]
        if self.tile is None:
            # A copy, so that the program may work in place; one pass of some fifty.
            # Finite, so that a program in place meets no −inf: see prelude.FLOOR.
            return self.buffer[: len(picked)].copy_(picked).clamp_min_(-1e30)
        return self.tile.logits(self.tile.load(picked))


def check_inputs(
    hidden: Tensor,
    head: Head,
    rows: dict[str, Tensor],
    others: dict[str, Dense],
    active: Tensor | None,
) -> None:
    head.check(hidden)
    N = len(hidden)
    for name, row in rows.items():
        if row.dim() < 1 or len(row) != N:
            raise ValueError(f"rows[{name!r}] must be [{N}, ...], got {tuple(row.shape)}")
        if torch.is_grad_enabled() and row.requires_grad:
            raise ValueError(
                f"rows[{name!r}] requires grad, but a row program treats it as a constant: "
                "detach it, or use linear_logprobs if its gradient is meant"
            )
    if STUDENT in others:
        raise ValueError(f"{STUDENT!r} is the name of the student's own logits")
    for name, dense in others.items():
        if isinstance(dense, Tensor):
            length, width = (len(dense), dense.shape[-1]) if dense.dim() == 2 else (None, None)
        else:
            dense[1].check(dense[0], f"others[{name!r}] hidden")
            length, width = len(dense[0]), dense[1].width
        if (length, width) != (N, head.width):
            raise ValueError(
                f"others[{name!r}] must have {N} rows of {head.width} words, got {length} of "
                f"{width}; name the common vocabulary with Head.vocab or slice the logits"
            )
    if active is not None and (active.shape != (N,) or active.dtype != torch.bool):
        raise ValueError(f"active must be bool [{N}], got {active.dtype} {tuple(active.shape)}")


def _check_result(value_n: Tensor, cotangent_nV: Tensor | None, n: int, width: int) -> None:
    if value_n.shape != (n,):
        raise ValueError(f"program value must be [{n}], got {tuple(value_n.shape)}")
    if cotangent_nV is not None and cotangent_nV.shape != (n, width):
        raise ValueError(
            f"program cotangent must be [{n}, {width}], got {tuple(cotangent_nV.shape)}"
        )
