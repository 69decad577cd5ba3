"""Scores of a tile of logits in one read: log-sum-exp, entropy, given ids, the most probable words.

A teacher that scores rollouts needs log-probabilities of K given ids, perhaps its entropy and its
top k; eager torch reads [n, V] once for each and writes it for some. Here every row is read once,
whatever its type, and all arithmetic is float32. Imports Triton: see `triton_launch.available`.

Shapes: n rows, V vocabulary, K given ids, k of the top.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from opdsl.emit.kernels.triton_launch import BLOCK, EXACT, on_device

MOST = 256  # of the top; beyond it the running list costs more than torch.topk's own read


@dataclass(frozen=True)
class Scores:
    """All float32, natural logarithms; None where not asked for.

    max, logsum, entropy [n]      of x = z / temperature: largest x, log Σ exp(x − max), entropy
    logp [n, K]                   of the given ids
    top_ids, top_logp [n, k]      most probable first
    """

    max: Tensor
    logsum: Tensor
    entropy: Tensor
    logp: Tensor | None = None
    top_ids: Tensor | None = None
    top_logp: Tensor | None = None

    @property
    def lse(self) -> Tensor:
        return self.max + self.logsum


@triton.jit
def _score(
    z, stride, ids, largest, logsum, entropy, logp, top_z, top_ids, V, K, k, scale,
    BLOCK: tl.constexpr, GIVEN: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """One row: running maximum m, Σ exp(x − m) and Σ exp(x − m) (x − m); a list of the k best.

    A block whose largest entry does not beat the least of the list leaves it alone, so the list
    changes about k ln(V / k) times over a row.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    place = tl.arange(0, TOP)
    best = tl.where(place < k, float("-inf"), float("inf"))
    which = tl.zeros([TOP], tl.int32)
    m = float("-inf")
    e = 0.0
    s = 0.0
    for start in range(0, V, BLOCK):
        col = start + lane
        real = col < V
        x = tl.load(z + row * stride + col, mask=real, other=0.0).to(tl.float32) * scale
        w = tl.where(real, x, float("-inf"))
        hit = tl.max(w, 0)
        new = tl.maximum(m, hit)
        at = tl.where(new > float("-inf"), new, 0.0)  # so far every word may be log 0
        p = tl.exp(w - at)
        old = tl.exp(m - at)
        moved = tl.where(e > 0.0, m - at, 0.0)
        s = (s + e * moved) * old + tl.sum(tl.where(p > 0.0, p * (x - at), 0.0), 0)
        e = e * old + tl.sum(p, 0)
        m = new
        if TOP > 1:
            low = tl.min(best, 0)
            while hit > low:
                first = tl.argmax(w, 0)
                slot = tl.argmin(best, 0)
                best = tl.where(place == slot, hit, best)
                which = tl.where(place == slot, start + first, which)
                w = tl.where(lane == first, float("-inf"), w)
                hit = tl.max(w, 0)
                low = tl.min(best, 0)
    total = tl.log(e)
    tl.store(largest + row, m)
    tl.store(logsum + row, total)
    tl.store(entropy + row, total - s / e)
    if TOP > 1:
        tl.store(top_z + row * k + place, best, mask=place < k)
        tl.store(top_ids + row * k + place, which, mask=place < k)
    if GIVEN > 1:
        for start in range(0, K, GIVEN):
            given = start + tl.arange(0, GIVEN)
            col = tl.load(ids + row * K + given, mask=given < K, other=0)
            known = (given < K) & (col >= 0) & (col < V)  # elsewhere the answer is NaN
            x = tl.load(z + row * stride + col, mask=known, other=float("nan"))
            x = x.to(tl.float32) * scale
            tl.store(logp + row * K + given, (x - m) - total, mask=given < K)


def score(
    z_nV: Tensor, ids_nK: Tensor | None = None, k: int = 0, temperature: float = 1.0
) -> Scores:
    """Scores of logits (float32, bfloat16 or float16; −inf is log 0) in one read; k at most 256.

    A word outside the vocabulary scores NaN. Words of log 0 enter no list: where fewer than k are
    left, the rest of the list is word 0 at −inf. Raises ValueError for other k or shapes of ids.
    """
    if not 0 <= k <= min(MOST, z_nV.shape[1]):
        raise ValueError(f"k = {k} of {z_nV.shape[1]} words; at most {MOST} in one read")
    if ids_nK is not None and (ids_nK.dim() != 2 or len(ids_nK) != len(z_nV)):
        raise ValueError(f"ids must be [{len(z_nV)}, K], got {tuple(ids_nK.shape)}")
    n, V = z_nV.shape
    z = z_nV if z_nV.stride(1) == 1 else z_nV.contiguous()

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=z.device)

    top, logsum, entropy = empty(n), empty(n), empty(n)
    top_z, top_ids = empty(n, k), empty(n, k, dtype=torch.int32)
    K = 0 if ids_nK is None else ids_nK.shape[1]
    logp = empty(n, K)
    ids = torch.zeros(1, dtype=torch.int64, device=z.device) if ids_nK is None else ids_nK
    if n:
        block = min(BLOCK, max(16, triton.next_power_of_2(V)))
        with on_device(z.device):
            _score[(n,)](
                z, z.stride(0), ids.contiguous(), top, logsum, entropy, logp, top_z, top_ids, V, K, k,
                1.0 / temperature, BLOCK=block,
                GIVEN=max(2, min(256, triton.next_power_of_2(K))) if K else 1,
                TOP=max(2, triton.next_power_of_2(k)) if k else 1,
                num_warps=max(1, min(8, block // 256)),
                **EXACT,
            )  # fmt: skip
    if k:  # the list comes in the order of its slots
        top_z, order = top_z.sort(1, descending=True)
        top_ids = top_ids.long().gather(1, order)
    return Scores(
        top,
        logsum,
        entropy,
        logp if ids_nK is not None else None,
        top_ids if k else None,
        top_z - top[:, None] - logsum[:, None] if k else None,
    )


def lse(z_nV: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-sum-exp of logits over the temperature, [n]."""
    return score(z_nV, temperature=temperature).lse
