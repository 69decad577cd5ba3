"""The output head in row chunks: float32 logits out, gradients of hidden states, weight, bias back.

Shapes: N rows, n rows of one chunk, H hidden, V real vocabulary, R weight rows (V plus padding).

One head product costs 2·N·H·V FLOP and a fused loss needs three of them, all left to the BLAS.
What this file adds is everything around the product that peers get wrong or pay for twice:

- logits are float32 under any weight type. Rounding them to bfloat16 costs 1-5 % of the gradient
  exactly where the student is close to the teacher. On CUDA the product writes float32 itself
  (`out_dtype`); elsewhere the weight is upcast one vocabulary block at a time, never whole.
- the gradient of the weight is summed over chunks in float32. Rounding each chunk's product to
  bfloat16 first biases training.
- padding rows of the weight do not exist here: a zero logit would be a phantom word.
- buffers are allocated once per call. On a CPU the page faults of fresh [n, V] tensors, not the
  arithmetic, are what makes chunked code slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from opdsl.emit.budget import CHUNK_RANGE, TILE_BYTES

from .parallel import VocabShard
from .parallel_gather import gather, is_spread

_CAST_BYTES = 16 << 20
MIXED = ("cuda",)  # devices with a product of half-precision matrices that gives float32
# Entries a row of a tile is rounded up to. A tokenizer's words are an odd number (151669 of Qwen's
# 151936 rows), and products of rows that start at odd places leave the fast paths of a GPU.
ALIGN = {"cuda": 64}


@dataclass(frozen=True, eq=False)
class Head:
    """logits = soft_cap · tanh(scale · (hidden @ weightᵀ + bias) / soft_cap).

    Without `soft_cap` (None) the logits are scale · (hidden @ weightᵀ + bias).

    weight [R, H]   float32, bfloat16, float16 or float64; may require grad
    bias [R]        optional
    scale           logit multiplier (Cohere `logit_scale`, Granite 1 / `logits_scaling`)
    soft_cap        Gemma `final_logit_softcapping`, in nats
    vocab           number of real words V <= R; None: every row is a word
    shard           weight and bias are the rows that this process holds of a larger head; see
                    `VocabShard` for what every process gets. It names the words, `vocab` does not

    Raises ValueError where the shapes or numbers cannot be a head.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    vocab: int | None = None
    shard: VocabShard | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2:
            raise ValueError(f"head weight must be [V, H], got {tuple(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"head bias must be [{self.weight.shape[0]}], got {tuple(self.bias.shape)}"
            )
        if self.vocab is not None and not 0 < self.vocab <= self.weight.shape[0]:
            raise ValueError(f"vocab = {self.vocab} but the head has {self.weight.shape[0]} rows")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"soft_cap must be positive or None, got {self.soft_cap}")
        if self.shard is not None and self.shard.rows != self.weight.shape[0]:
            raise ValueError(
                f"the shard has {self.shard.rows} rows, its weight {self.weight.shape[0]}"
            )
        if self.shard is not None and self.vocab is not None:
            raise ValueError("a sharded head takes its words from VocabShard(total=…), not vocab")

    @property
    def width(self) -> int:
        """The columns of its logits: V, the number of real words, of this process if sharded."""
        if self.shard is not None:
            return self.shard.columns
        return self.weight.shape[0] if self.vocab is None else self.vocab

    @property
    def words(self) -> int:
        """V, the number of real words, on all processes together."""
        return self.width if self.shard is None else self.shard.total

    @property
    def widest(self) -> int:
        """Columns that chunks are sized for: every process must cut its rows alike."""
        return self.width if self.shard is None else self.shard.widest

    def gathered(self, dtype: torch.dtype | None = None) -> Head:
        """The head with its weight and bias whole on this process, in `dtype`; see `gather`.

        `Batch.from_hidden` does it where they are DTensors (FSDP2). Do it by hand once per step
        where several batches share the head.
        """
        if not (is_spread(self.weight) or is_spread(self.bias)):
            return self
        bias = None if self.bias is None else gather(self.bias, dtype)
        return replace(self, weight=gather(self.weight, dtype), bias=bias)

    def check(self, hidden: Tensor, what: str = "hidden") -> None:
        """ValueError unless `hidden` is a floating [N, H] on the head's device."""
        if hidden.dim() != 2 or hidden.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"{what} must be [N, {self.weight.shape[1]}], got {tuple(hidden.shape)}"
            )
        if not hidden.is_floating_point():
            raise ValueError(f"{what} must be floating, got {hidden.dtype}")
        if hidden.device != self.weight.device:
            raise ValueError(f"{what} is on {hidden.device}, its head on {self.weight.device}")

    @torch.no_grad()
    def logits(self, hidden_nH: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits [n, V] outside autograd, float32 (float64 if hidden and weight both are).

        `out` [>= n, V] of that type is written and its first n rows are returned.
        """
        self.check(hidden_nH)
        tile = HeadTile(self, len(hidden_nH), hidden_nH.dtype, buffer=out)
        with no_autocast(hidden_nH.device):
            return tile.logits(tile.load(hidden_nH))


def accumulate_type(hidden: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """float32 whatever comes in; float64 only if both sides are, for checks against an oracle."""
    return torch.float64 if hidden == weight == torch.float64 else torch.float32


def mixes(hidden_type: torch.dtype, weight: Tensor) -> bool:
    """Whether hidden states and weight are multiplied as they are, into float32."""
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return half and hidden_type == weight.dtype and weight.device.type in MIXED


def takes_low(hidden_type: torch.dtype, head: Head) -> bool:
    """Whether the products backward read the cotangent as bfloat16, so that it may be written so.

    float16 cotangents underflow: no loss scale has been applied this early. The slope of a soft
    cap multiplies the cotangent before it is rounded.
    """
    low = head.weight.dtype == torch.bfloat16 and head.soft_cap is None
    return low and mixes(hidden_type, head.weight)


def tile_memory(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [rows, width], every row starting where products and kernels read fast."""
    unit = ALIGN.get(device.type, 1)
    padded = -(-width // unit) * unit
    return torch.empty((rows, padded), dtype=dtype, device=device)[:, :width]


def product(a: Tensor, b: Tensor, out: Tensor, alpha: float = 1.0) -> None:
    """out = alpha a b: half-precision factors, sums in float32."""
    if alpha == 1.0:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=0, alpha=alpha, out=out)


def add_product(into: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """into += alpha a b: half-precision factors, sums in float32."""
    torch.addmm(into, a, b, out_dtype=torch.float32, alpha=alpha, out=into)


def no_autocast(device: torch.device) -> torch.autocast:
    """A context in which autocast does not round the inputs of a product."""
    return torch.autocast(device.type, enabled=False)


def row_chunks(
    rows: int, width: int, device: torch.device, chunk: int | None = None
) -> list[tuple[int, int]]:
    """Split `rows` into equal (start, stop) chunks of at most `chunk` rows, tile in budget.

    Equal chunks, because a short last one still rereads the whole head and its gradient. The first
    is one of the largest, so that buffers kept from chunk to chunk need not grow.
    """
    if chunk is None:
        low, high = CHUNK_RANGE.get(device.type, CHUNK_RANGE["cuda"])
        budget = TILE_BYTES.get(device.type, TILE_BYTES["cuda"])
        chunk = max(low, min(high, budget // (4 * max(width, 1))))
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, got {chunk}")
    count = -(-rows // chunk)
    edges = [-(-i * rows // max(count, 1)) for i in range(count + 1)]
    return list(pairwise(edges))


def largest(chunks: list[tuple[int, int]]) -> int:
    """Rows of the widest chunk; 0 when there is none."""
    return max((stop - start for start, stop in chunks), default=0)


@dataclass(eq=False)
class Gradients:
    """Accumulators in the accumulation type; None where no gradient is wanted."""

    hidden: Tensor | None  # [N, H]
    weight: Tensor | None  # [R, H]
    bias: Tensor | None  # [R]

    @staticmethod
    def zeros(hidden: Tensor, head: Head, needs: tuple[bool, bool, bool]) -> Gradients:
        dtype = accumulate_type(hidden.dtype, head.weight.dtype)

        def make(like: Tensor | None, need: bool) -> Tensor | None:
            if like is None or not need:
                return None
            return torch.zeros(like.shape, dtype=dtype, device=like.device)

        return Gradients(*(map(make, (hidden, head.weight, head.bias), needs)))

    @property
    def wanted(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)


class HeadTile:
    """The buffers of one head for chunks of at most `rows` rows, and its three products.

    temperature   the logits are divided by it (after the soft cap), at no extra pass
    adjoint       keep what `products` needs: the slope of the soft cap
    buffer        memory to use for the logits instead of allocating

    Call under no_grad and `no_autocast`. A tile holds one chunk: `load`, `logits`, `products`.
    """

    def __init__(
        self,
        head: Head,
        rows: int,
        hidden_type: torch.dtype,
        *,
        dtype: torch.dtype | None = None,
        temperature: float = 1.0,
        adjoint: bool = False,
        buffer: Tensor | None = None,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.head = head
        self.weight = head.weight.detach()[: head.width]
        self.dtype = dtype or accumulate_type(hidden_type, head.weight.dtype)
        self.gain = head.scale / temperature
        shape, device = (rows, head.width), self.weight.device
        if buffer is None:
            buffer = tile_memory(rows, head.width, self.dtype, device)
        elif buffer.shape[0] < rows or buffer.shape[1] != shape[1] or buffer.dtype != self.dtype:
            raise ValueError(
                f"out must be {self.dtype} [>= {rows}, {shape[1]}], "
                f"got {buffer.dtype} {tuple(buffer.shape)}"
            )
        self.buffer = buffer
        capped = head.soft_cap is not None
        # tanh takes scale / cap before it and cap / temperature after it.
        self._inner = head.scale / head.soft_cap if head.soft_cap is not None else self.gain
        self._outer = head.soft_cap / temperature if head.soft_cap is not None else 1.0
        self._bias = None
        if head.bias is not None:
            self._bias = head.bias.detach()[: head.width].to(self.dtype) * self._inner
        self._slope = torch.empty_like(buffer[:rows]) if capped and adjoint else None
        self._one = torch.ones((), dtype=self.dtype, device=device)

        self._mixed = self.dtype == torch.float32 and mixes(hidden_type, self.weight)
        self._low: Tensor | None = None  # memory for a rounded cotangent
        self._cast: Tensor | None = None

    def load(self, hidden_nH: Tensor) -> Tensor:
        """The chunk's hidden states as the products want them: contiguous, right type."""
        keep = self._mixed
        return hidden_nH.detach().to(hidden_nH.dtype if keep else self.dtype).contiguous()

    def logits(self, hidden_nH: Tensor) -> Tensor:
        """Logits [n, V] of loaded hidden states, in this tile's buffer (yours to overwrite)."""
        n = len(hidden_nH)
        z_nV = self.buffer[:n]
        if n == 0:
            return z_nV
        if self._mixed:
            product(hidden_nH, self.weight.T, z_nV, self._inner)
        else:
            for columns, block in self._blocks():
                z_nV[:, columns].addmm_(hidden_nH, block.T, beta=0, alpha=self._inner)
        if self._bias is not None:
            z_nV.add_(self._bias)
        if self.head.soft_cap is not None:
            z_nV.tanh_()
            if self._slope is not None:
                torch.addcmul(self._one, z_nV, z_nV, value=-1, out=self._slope[:n])
            z_nV.mul_(self._outer)
        return z_nV

    def products(
        self,
        cotangent_nV: Tensor,
        hidden_nH: Tensor,
        dhidden_nH: Tensor | None,
        dweight_RH: Tensor | None,
        dbias_R: Tensor | None,
    ) -> None:
        """Pull d total / d logits back: write `dhidden_nH`, add to `dweight_RH` and `dbias_R`.

        `hidden_nH` is what `load` returned for the chunk whose logits were computed last. The
        cotangent is read only; where `takes_low` it may be bfloat16.
        """
        n, V = cotangent_nV.shape
        if n == 0:
            return
        if self._slope is not None:
            cotangent_nV = torch.mul(cotangent_nV, self._slope[:n], out=self._slope[:n])
        if dbias_R is not None:
            dbias_R[:V].add_(cotangent_nV.sum(0, dtype=self.dtype), alpha=self.gain)
        if self._mixed and self.weight.dtype == torch.bfloat16:
            low_nV = self._rounded(cotangent_nV)
            if dhidden_nH is not None:
                product(low_nV, self.weight, dhidden_nH, self.gain)
            if dweight_RH is not None:
                add_product(dweight_RH[:V], low_nV.T, hidden_nH, self.gain)
            return
        cotangent_nV = cotangent_nV.to(self.dtype)
        if dhidden_nH is not None:
            for i, (columns, block) in enumerate(self._blocks()):
                dhidden_nH.addmm_(cotangent_nV[:, columns], block, beta=min(i, 1), alpha=self.gain)
        if dweight_RH is not None:
            dweight_RH[:V].addmm_(cotangent_nV.T, hidden_nH.to(self.dtype), alpha=self.gain)

    def _rounded(self, cotangent_nV: Tensor) -> Tensor:
        """The cotangent as bfloat16: a program's own, or a copy in rows that are read fast."""
        unit = ALIGN.get(cotangent_nV.device.type, 1)
        if cotangent_nV.dtype == torch.bfloat16 and cotangent_nV.stride(0) % unit == 0:
            return cotangent_nV
        if self._low is None:
            rows, V = self.buffer.shape
            self._low = tile_memory(rows, V, torch.bfloat16, self.buffer.device)
        return self._low[: len(cotangent_nV)].copy_(cotangent_nV)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Vocabulary slices of the weight in the accumulation type: one, unless it must be upcast.

        The products of two bfloat16 numbers are exact in float32, so upcasting loses nothing.
        """
        V, H = self.weight.shape
        if self.weight.dtype == self.dtype:
            yield slice(0, V), self.weight
            return
        if self._cast is None:
            # Not larger than the tile, so the upcast is never the peak; not tiny for few rows.
            elements = max(1 << 16, min(self.buffer.numel(), _CAST_BYTES // self.dtype.itemsize))
            shape = (max(1, min(V, elements // max(H, 1))), H)
            self._cast = torch.empty(shape, dtype=self.dtype, device=self.weight.device)
        for start in range(0, V, len(self._cast)):
            stop = min(V, start + len(self._cast))
            block = self._cast[: stop - start].copy_(self.weight[start:stop])
            yield slice(start, stop), block
