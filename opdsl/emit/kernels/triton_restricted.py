"""The products of plan class S0 as kernels: logits at given ids, and their two adjoints.

`linear_restricted` gathers K rows of the head for each hidden state into [n, K, H] and multiplies
in a batch. Here nothing of that size is stored: each kernel reads the rows of the head where they
are. The gradient of the head goes by sorted ids: a program takes a run of entries, adds up what
belongs to one id and adds it to memory when the id changes, so a word that every row asks for
costs one atomic addition per run, not one per row. Imports Triton: see `triton_launch.available`.
What is no row of the head has a logit of NaN and no adjoint.

Shapes: n rows, K ids, H hidden, R rows of the head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opdsl.emit.kernels.head import Gradients, Head
from opdsl.emit.kernels.linear_restricted import Gathered
from opdsl.emit.kernels.triton_launch import on_device

RUN = 64  # sorted entries of one program
WIDE = 1024  # hidden numbers in flight
FUSED = {"num_warps": 4, "enable_fp_fusion": True}  # products of a scalar sum, as the BLAS rounds


@triton.jit
def _gather(hidden, weight, ids, out, K, H, R, hs, ws, IDS: tl.constexpr, BLOCK: tl.constexpr):
    """out[row, k] = Σ_h weight[ids[row, k], h] hidden[row, h]; NaN for what is no word"""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * IDS + tl.arange(0, IDS)
    word = tl.load(ids + row * K + k, mask=k < K, other=0)
    known = (word >= 0) & (word < R)
    word = tl.where(known, word, 0)
    total = tl.zeros([IDS], tl.float32)
    for start in range(0, H, BLOCK):
        h = start + tl.arange(0, BLOCK)
        x = tl.load(hidden + row * hs + h, mask=h < H, other=0.0).to(tl.float32)
        at = word[:, None] * ws + h[None, :]
        w = tl.load(weight + at, mask=(k < K)[:, None] & (h < H)[None, :], other=0.0)
        total += tl.sum(w.to(tl.float32) * x[None, :], 1)
    tl.store(out + row * K + k, tl.where(known, total, float("nan")), mask=k < K)


@triton.jit
def _pull_hidden(g, weight, ids, out, K, H, R, ws, BLOCK: tl.constexpr):
    """out[row, h] = Σ_k g[row, k] weight[ids[row, k], h]"""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(0, K):
        word = tl.load(ids + row * K + k)
        known = (word >= 0) & (word < R)
        word = tl.where(known, word, 0)
        w = tl.load(weight + word * ws + h, mask=h < H, other=0.0).to(tl.float32)
        total += tl.where(known, tl.load(g + row * K + k), 0.0) * w
    tl.store(out + row * H + h, total, mask=h < H)


@triton.jit
def _pull_weight(
    words, entries, g, hidden, into, count, K, H, R, hs, ws, RUN: tl.constexpr, BLOCK: tl.constexpr
):
    """into[word, h] += Σ g hidden[row, h] over the entries of a run, sorted by word."""
    first = tl.program_id(0).to(tl.int64) * RUN
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + first)
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(0, RUN):
        here = first + j < count
        following = tl.load(words + first + j, mask=here, other=word)
        if following != word:
            known = (word >= 0) & (word < R)
            word = tl.where(known, word, 0)
            tl.atomic_add(into + word * ws + h, tl.where(known, total, 0.0), mask=h < H)
            total = tl.zeros([BLOCK], tl.float32)
            word = following
        entry = tl.load(entries + first + j, mask=here, other=0)
        x = tl.load(hidden + (entry // K) * hs + h, mask=h < H, other=0.0).to(tl.float32)
        total += tl.where(here, tl.load(g + entry) * x, 0.0)  # row 0 may hold anything
    known = (word >= 0) & (word < R)
    word = tl.where(known, word, 0)
    tl.atomic_add(into + word * ws + h, tl.where(known, total, 0.0), mask=h < H)


def _width(H: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(H)))


def gather_product(hidden_nH: Tensor, weight_RH: Tensor, ids_nK: Tensor) -> Tensor:
    """Logits [n, K] at ids, float32, products of any type exact in it."""
    (n, K), H = ids_nK.shape, hidden_nH.shape[1]
    out = torch.empty(n, K, dtype=torch.float32, device=hidden_nH.device)
    if out.numel():
        ids, hidden, weight = ids_nK.contiguous(), rows_of(hidden_nH), rows_of(weight_RH)
        at_once = min(16, triton.next_power_of_2(K))
        with on_device(out.device):
            _gather[(n, triton.cdiv(K, at_once))](
                hidden, weight, ids, out, K, H, len(weight), hidden.stride(0), weight.stride(0),
                IDS=at_once, BLOCK=_width(H, 256), **FUSED,
            )  # fmt: skip
    return out


def pull_hidden(ids_nK: Tensor, g_nK: Tensor, weight_RH: Tensor) -> Tensor:
    """d total / d hidden [n, H] of a cotangent of the logits at ids, float32."""
    (n, K), H = ids_nK.shape, weight_RH.shape[1]
    out = torch.zeros(n, H, dtype=torch.float32, device=g_nK.device)
    if out.numel() and K:
        g, weight, block = g_nK.float().contiguous(), rows_of(weight_RH), _width(H, WIDE)
        with on_device(out.device):
            _pull_hidden[(n, triton.cdiv(H, block))](
                g, weight, ids_nK.contiguous(), out, K, H, len(weight), weight.stride(0),
                BLOCK=block, **FUSED,
            )  # fmt: skip
    return out


def pull_weight(ids_nK: Tensor, g_nK: Tensor, hidden_nH: Tensor, into_RH: Tensor) -> None:
    """Adds d total / d weight to `into_RH` (float32)."""
    K, H = ids_nK.shape[1], hidden_nH.shape[1]
    if not ids_nK.numel():
        return
    words, entries = ids_nK.flatten().sort()
    hidden, block = rows_of(hidden_nH), _width(H, WIDE)
    with on_device(into_RH.device):
        _pull_weight[(triton.cdiv(len(words), RUN), triton.cdiv(H, block))](
            words, entries, g_nK.float().contiguous(), hidden, into_RH, len(words), K, H,
            len(into_RH), hidden.stride(0), into_RH.stride(0), RUN=RUN, BLOCK=block, **FUSED,
        )  # fmt: skip


def rows_of(x: Tensor) -> Tensor:
    """A matrix whose rows are each in one piece."""
    x = x.detach()
    return x if x.stride(1) == 1 else x.contiguous()


class GatheredByKernel(Gathered):
    """`Gathered` without [n, K, H]: the same logits at ids, the same adjoint."""

    @staticmethod
    def at_once(hidden: Tensor) -> int:
        """Numbers of [n, K] alone are held: few launches, and long runs of one id."""
        return 1 << 16

    def __init__(self, hidden_nH: Tensor, head: Head, dtype: torch.dtype):
        if dtype != torch.float32:
            raise TypeError(f"kernels compute in float32, not {dtype}")
        self.hidden = hidden_nH.detach()
        self.head, self.dtype = head, dtype
        self.slope: dict[int, Tensor] = {}
        self.ids: dict[int, Tensor] = {}

    def at(self, ids_nK: Tensor) -> Tensor:
        head, key = self.head, id(ids_nK)
        self.ids[key] = ids_nK
        z_nK = gather_product(self.hidden, head.weight, ids_nK)
        if head.bias is not None:
            z_nK += head.bias.detach()[ids_nK].float()
        z_nK *= head.scale
        self.slope[key] = torch.full_like(z_nK, head.scale)
        if head.soft_cap is not None:
            t = torch.tanh(z_nK / head.soft_cap)
            self.slope[key] *= 1 - t * t
            z_nK = head.soft_cap * t
        return z_nK

    def products(self, ids_nK: Tensor, cotangent_nK: Tensor, into: Gradients, where) -> None:
        g_nK = cotangent_nK.float() * self.slope[id(ids_nK)]
        if into.bias is not None:
            into.bias.index_add_(0, ids_nK.flatten(), g_nK.flatten())
        if into.hidden is not None:
            into.hidden[where] += pull_hidden(ids_nK, g_nK, self.head.weight)
        if into.weight is not None:
            pull_weight(ids_nK, g_nK, self.hidden, into.weight)
