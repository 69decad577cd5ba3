"""Log-probabilities at given words, log-sum-exp and entropy, one [n, V] tile at a time.

Shapes: N rows, n rows of one chunk, K candidates, H hidden, V vocabulary.

Sampled, top-k, union, routed and tail-bin supports need only these numbers; everything behind them
is ordinary autograd on [N, K]. With s = logits / temperature, m = max s, S = Σ exp(s − m) and
incoming gradients g, the adjoint of one row is a scaled softmax plus K scattered numbers:

    d/ds_v = softmax(s)_v · (g_lse − Σ_k g_k − g_H (log softmax(s)_v + H)) + Σ_k g_k [v = id_k]

m and log S are kept apart: their sum loses 1e-5 of the softmax at logits of some hundreds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .head import Gradients, Head, HeadTile, largest, no_autocast, row_chunks
from .parallel import VocabShard

# exp underflows to an exact zero at -104 (float32) and -746 (float64): bounding the exponent there
# changes no number and keeps 0 · (-inf) out of the entropy.
_FLOOR = -1e3


def linear_logprobs(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """log softmax(logits / temperature) at `ids`, differentiable in hidden, head.weight, head.bias.

    hidden [N, H], ids [N, K] integers in [0, V) (repeats allowed, K may be 0), `chunk` rows per
    tile (None: from a byte budget).

    Returns (logp [N, K], lse [N], entropy [N] or None) in nats, float32 (float64 if hidden and
    weight both are). Costs one head product forward; the backward recomputes the tile and adds two
    (one, with a frozen head). Rows whose incoming gradients are all exactly zero are left out of
    the backward pass, so a gate saves its share of the work and masked rows may hold anything.

    Raises ValueError or IndexError where shapes or ids do not fit.
    """
    ids = _check(hidden, head, ids)
    outputs = _LogProbs.apply(
        hidden, head.weight, head.bias, head, ids, temperature, entropy, chunk
    )
    logp_NK, lse_N = outputs[:2]
    return logp_NK, lse_N, outputs[2] if entropy else None


@dataclass(frozen=True, eq=False)
class Score:
    """What a scoring pass read off the tiles; None where it was not asked for. Nats, detached."""

    lse: Tensor  # [N] log Σ exp(logits / temperature)
    logp: Tensor | None  # [N, K] at the given ids
    top_ids: Tensor | None  # [N, k] most probable words, in falling order
    top_logp: Tensor | None  # [N, k]
    entropy: Tensor | None  # [N]


@torch.no_grad()
def linear_score(
    hidden: Tensor,
    head: Head,
    *,
    ids: Tensor | None = None,
    k: int | None = None,
    entropy: bool = False,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Score:
    """Score rows outside autograd, as a teacher does: one head product, one tile at a time.

    hidden [N, H]; `ids` [N, K] words to score; `k` own top-k; `temperature` divides the logits.
    Raises ValueError or IndexError where shapes, ids or k do not fit.
    """
    if ids is None:
        head.check(hidden)
    else:
        ids = _check(hidden, head, ids)
    if k is not None and not 0 < k <= head.words:
        raise ValueError(f"k = {k} of a vocabulary of {head.words} words")
    read = _read(hidden, head, ids, k, temperature, entropy, chunk)
    return Score(read.max + read.logsum, read.logp, read.top_ids, read.top_logp, read.entropy)


class _Read(NamedTuple):
    """Statistics of every row; lse = max + logsum."""

    max: Tensor  # [N]
    logsum: Tensor  # [N] log Σ exp(s − max)
    entropy: Tensor | None  # [N]
    logp: Tensor | None  # [N, K]
    top_ids: Tensor | None  # [N, k]
    top_logp: Tensor | None  # [N, k]


def _read(
    hidden: Tensor,
    head: Head,
    ids: Tensor | None,
    k: int | None,
    temperature: float,
    entropy: bool,
    chunk: int | None,
) -> _Read:
    """The forward pass: every statistic of a tile before the next one is computed."""
    from .triton_launch import scorer

    N, shard = len(hidden), head.shard
    chunks = row_chunks(N, head.widest, hidden.device, chunk)
    with no_autocast(hidden.device):
        tile = HeadTile(head, largest(chunks), hidden.dtype, temperature=temperature)

        def new(*shape: int, dtype: torch.dtype = tile.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=hidden.device)

        out = _Read(
            max=new(N),
            logsum=new(N),
            entropy=new(N) if entropy else None,
            logp=None if ids is None else new(N, ids.shape[1]),
            top_ids=None if k is None else new(N, k, dtype=torch.int64),
            top_logp=None if k is None else new(N, k),
        )
        score = scorer(hidden.device, tile.dtype, k) if shard is None else None
        for start, stop in chunks:
            rows = slice(start, stop)
            s_nV = tile.logits(tile.load(hidden[rows]))
            if score is not None:
                found = score(s_nV, None if ids is None else ids[rows], k or 0)
                for name, whole in out._asdict().items():
                    if whole is not None:
                        whole[rows] = getattr(found, name)
                continue
            max_n = torch.amax(s_nV, dim=1, out=out.max[rows])
            if shard is not None:
                shard.most(max_n)
            entropy_n = None if out.entropy is None else out.entropy[rows]
            out.logsum[rows] = _exponentials(s_nV, max_n, entropy_n, shard)
            # log softmax as (s − max) − log S: exact near the maximum, at any offset.
            if ids is not None and out.logp is not None:
                if shard is None:
                    torch.gather(s_nV, 1, ids[rows], out=out.logp[rows])
                else:
                    out.logp[rows] = shard.at(s_nV, ids[rows])
                out.logp[rows].sub_(max_n[:, None]).sub_(out.logsum[rows, None])
            if k is not None and out.top_logp is not None and out.top_ids is not None:
                if shard is None:
                    torch.topk(s_nV, k, dim=1, out=(out.top_logp[rows], out.top_ids[rows]))
                else:
                    out.top_logp[rows], out.top_ids[rows] = shard.largest(s_nV, k)
                out.top_logp[rows].sub_(max_n[:, None]).sub_(out.logsum[rows, None])
    return out


def _exponentials(
    s_nV: Tensor, max_n: Tensor, entropy_n: Tensor | None, shard: VocabShard | None
) -> Tensor:
    """log Σ exp(s − max) [n]; writes H = log S − Σ exp(s − max)(s − max) / S if asked. Reads s."""
    sum_n = torch.zeros_like(max_n)
    moment_n = torch.zeros_like(max_n)
    for block_nv, scratch_nv in _columns(s_nV):
        t_nv = torch.sub(block_nv, max_n[:, None], out=scratch_nv)
        if entropy_n is None:
            sum_n += t_nv.exp_().sum(1)
            continue
        t_nv.clamp_(min=_FLOOR)
        e_nv = t_nv.exp()
        sum_n += e_nv.sum(1)
        moment_n += e_nv.mul_(t_nv).sum(1)
    if shard is not None:
        shard.add(sum_n)
        if entropy_n is not None:
            shard.add(moment_n)
    logsum_n = sum_n.log()
    if entropy_n is not None:
        torch.sub(logsum_n, moment_n / sum_n, out=entropy_n)
    return logsum_n


def _columns(s_nV: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Column blocks of a tile, each with the same scratch block, small enough to stay in cache."""
    n, V = s_nV.shape
    elements = 1 << 18 if s_nV.device.type == "cpu" else 1 << 26
    width = max(1, min(V, max(1024, elements // max(n, 1))))
    scratch_nv = torch.empty((n, width), dtype=s_nV.dtype, device=s_nV.device)
    for start in range(0, V, width):
        block_nv = s_nV[:, start : start + width]
        yield block_nv, scratch_nv[:, : block_nv.shape[1]]


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head, ids, temperature, entropy, chunk):
        read = _read(hidden, head, ids, None, temperature, entropy, chunk)
        ctx.save_for_backward(hidden, weight, bias, ids, read.max, read.logsum, read.entropy)
        ctx.set_materialize_grads(False)
        ctx.head, ctx.temperature, ctx.chunk = head, temperature, chunk
        outputs = (read.logp, read.max + read.logsum)
        return (*outputs, read.entropy) if entropy else outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_lse, g_entropy=None):
        hidden, weight, bias, ids, max_N, logsum_N, entropy_N = ctx.saved_tensors
        # The saved weight, not the one in ctx.head: autograd checks that nobody has changed it.
        head = replace(ctx.head, weight=weight, bias=bias)
        gradients = Gradients.zeros(hidden, head, ctx.needs_input_grad[:3])
        with no_autocast(hidden.device):
            # d/ds = exp(s − max) · (dense − tilt · (s − max)) + scatter(g_logp)
            dense_N = torch.zeros_like(max_N)
            touched_N = torch.zeros(len(max_N), dtype=torch.bool, device=hidden.device)
            tilt_N = None
            if g_lse is not None:
                dense_N += g_lse
                touched_N |= g_lse != 0
            if g_logp is not None:
                dense_N -= g_logp.sum(1)
                touched_N |= (g_logp != 0).any(1)
            if g_entropy is not None:
                dense_N -= g_entropy * (entropy_N - logsum_N)
                tilt_N = g_entropy * (-logsum_N).exp()
                touched_N |= g_entropy != 0
            dense_N *= (-logsum_N).exp()

            kept = touched_N.nonzero().squeeze(1)
            chunks = row_chunks(len(kept), head.widest, hidden.device, ctx.chunk)
            tile = HeadTile(
                head, largest(chunks), hidden.dtype, temperature=ctx.temperature, adjoint=True
            )
            whole = len(kept) == len(hidden)
            for start, stop in chunks:
                rows = slice(start, stop) if whole else kept[start:stop]
                h_nH = tile.load(hidden[rows])
                s_nV = tile.logits(h_nH)
                _softmax_adjoint(
                    s_nV, max_N[rows], dense_N[rows], None if tilt_N is None else tilt_N[rows]
                )
                if g_logp is not None and head.shard is not None:
                    head.shard.scatter_add(s_nV, ids[rows], g_logp[rows])
                elif g_logp is not None:
                    s_nV.scatter_add_(1, ids[rows], g_logp[rows])
                dhidden_nH = None if gradients.hidden is None else gradients.hidden[rows]
                tile.products(s_nV, h_nH, dhidden_nH, gradients.weight, gradients.bias)
                if gradients.hidden is not None and not whole:
                    gradients.hidden[rows] = dhidden_nH
            if head.shard is not None:
                head.shard.add_hidden(gradients.hidden)
        return (
            None if gradients.hidden is None else gradients.hidden.to(hidden.dtype),
            None if gradients.weight is None else gradients.weight.to(weight.dtype),
            None if gradients.bias is None else gradients.bias.to(bias.dtype),
            *(None,) * 5,
        )


def _softmax_adjoint(s_nV: Tensor, max_n: Tensor, dense_n: Tensor, tilt_n: Tensor | None) -> None:
    """s <- exp(s − max) · (dense − tilt · (s − max)), in place."""
    s_nV.sub_(max_n[:, None])
    if tilt_n is None:
        s_nV.exp_().mul_(dense_n[:, None])
        return
    for block_nv, scratch_nv in _columns(s_nV):
        e_nv = torch.exp(block_nv.clamp_(min=_FLOOR), out=scratch_nv)
        block_nv.mul_(-tilt_n[:, None]).add_(dense_n[:, None]).mul_(e_nv)


def _check(hidden: Tensor, head: Head, ids: Tensor) -> Tensor:
    """Checked ids as int64."""
    head.check(hidden)
    if ids.dim() != 2 or len(ids) != len(hidden):
        raise ValueError(f"ids must be [{len(hidden)}, K], got {tuple(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    # On an accelerator reading the extremes would stall the queue; gather asserts there.
    if ids.device.type == "cpu" and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= head.words:
            raise IndexError(f"ids run from {low} to {high} in a vocabulary of {head.words} words")
    return ids.to(torch.int64)
