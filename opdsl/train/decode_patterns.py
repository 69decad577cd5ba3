"""Groups of operations in a recorded step that fewer operations compute: attention of one query,
root-mean-square norms, rotary embeddings.

A pattern looks at one operation and at what made its inputs. It answers with the slot that holds the
same value, made by operations it emits, or with None. What it replaced is dropped by the
caller if nobody else reads it.

Shapes: B rows, h query heads, g key-value heads, r = h / g, S slots of the cache, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from opdsl.train.decode_tape import Extent, Op, Ref, Tape, aten, mapped, storage
from opdsl.train.decode_views import VIEWS

Pattern = Callable[["Rewriter", Op], int | None]
Holds = Callable[[Iterable[int]], bool]  # something that holds for all of these slots


class Rewriter:
    """One pass over a tape.

    settled: whether values are written by no operation of the step; fixed: nor by its caller.
    """

    def __init__(self, tape: Tape, settled: Holds, fixed: Holds):
        self.tape, self.settled, self.fixed = tape, settled, fixed
        self.kept: list[Op] = []
        self.maker: dict[int, Op] = {}
        self.memo: dict[Any, Any] = {}
        self.moved: set[int] = set()  # views of other memory than recorded

    def apply(self) -> Tape:
        renamed: dict[int, int] = {}
        for op in self.tape.ops:
            op = self._renamed(op, renamed)
            pattern = PATTERNS.get(op.func)
            slot = pattern(self, op) if pattern is not None else None
            if slot is not None:
                renamed[op.makes[0]] = slot
            self._add(op)  # dropped later, where nobody reads it
        return self.tape.having(self.kept, result=renamed.get(self.tape.result, self.tape.result))

    def _renamed(self, op: Op, names: dict[int, int]) -> Op:
        """A view of a value that is made otherwise now shows that one's memory."""
        new = op.renamed(names)
        if op.func in VIEWS and (new is not op or not self.moved.isdisjoint(op.reads)):
            self.moved.add(op.out)
            self.tape.values[op.out] = op.func(*mapped(new.args, self._recorded))
        return new

    def _recorded(self, x: Any) -> Any:
        return self.value(x.slot) if isinstance(x, Ref) else x

    def _add(self, op: Op) -> None:
        self.kept.append(op)
        for slot in op.makes:
            self.maker[slot] = op

    def value(self, slot: int) -> Tensor:
        return self.tape.values[slot]

    def constant(self, slot: int) -> bool:
        return slot in self.tape.given and self.fixed((slot,))

    def new_constant(self, value: Tensor) -> int:
        return self.tape.new_slot(value, given=True)

    def emit(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> int:
        """One more operation, computed on the recorded values for its shape; its slot."""
        out = func(*mapped(args, self._recorded), **mapped(kwargs, self._recorded))
        slot = self.tape.new_slot(out)
        self._add(Op(func, args, kwargs, slot))
        return slot

    def made_by(self, slot: int | None, *funcs: Any) -> Op | None:
        """The operation behind a slot, if it is one of `funcs` and its value is settled."""
        op = self.maker.get(slot) if slot is not None else None
        if op is None or op.func not in funcs or not isinstance(op.out, int):
            return None
        return op if self.settled((op.out,)) else None

    def behind(self, slot: int | None, *funcs: Any) -> int | None:
        """The first argument of the operation behind a slot, if it is one of `funcs`."""
        op = self.made_by(slot, *funcs)
        return op.args[0].slot if op is not None and isinstance(op.args[0], Ref) else None


def _slot(x: Any) -> int | None:
    return x.slot if isinstance(x, Ref) else None


# ---- attention ---------------------------------------------------------------------------------


def attention(r: Rewriter, op: Op) -> int | None:
    """softmax(scale · q kᵀ + mask) v of few queries as two batched products.

    The kernel for many queries copes badly with one, and some models repeat their key-value heads
    in memory before it; here the r query heads of a key-value head are the rows of its product.
    """
    if not all(isinstance(x, Ref) for x in op.args[:3]):
        return None
    q, k, v = (x.slot for x in op.args[:3])
    dropout, causal = (*op.args[3:5], *(0.0, False)[len(op.args) - 3 :])
    mask = _slot(op.kwargs.get("attn_mask"))
    if op.kwargs.get("dropout_p", dropout) or op.kwargs.get("is_causal", causal):
        return None
    if any(r.value(s).dim() != 4 or r.value(s).dtype != torch.float32 for s in (q, k, v)):
        return None
    if mask is not None and r.value(mask).dim() != 4:
        return None
    k, v = _unrepeated(r, k), _unrepeated(r, v)
    (B, h, Q, d), (_, g, S, _) = r.value(q).shape, r.value(k).shape
    if r.value(v).shape[1] != g or Q * h > 4 * h or not _contiguous(r, k, v):
        return None
    scale = op.kwargs.get("scale")
    scale = d**-0.5 if scale is None else scale
    reshape = aten.view.default if _contiguous(r, q) else torch.reshape
    q_nrd = r.emit(reshape, Ref(q), (B * g, h // g * Q, d))
    k_nSd = r.emit(aten.view.default, Ref(k), (B * g, S, d))
    k_ndS = r.emit(aten.transpose.int, Ref(k_nSd), 1, 2)
    v_nSd = r.emit(aten.view.default, Ref(v), (B * g, S, r.value(v).shape[-1]))
    if mask is None:
        scores = r.emit(aten.bmm.default, Ref(q_nrd), Ref(k_ndS))
        scores = r.emit(aten.mul.Tensor, Ref(scores), scale)
    else:
        if (mask, B, g, h, Q) not in r.memo:
            r.memo[mask, B, g, h, Q] = r.emit(_spread, Ref(mask), B, g, h, Q)
        bias = r.memo[mask, B, g, h, Q]
        extent = r.tape.extent
        if extent is not None and extent.slots == S and _nothing_behind(r.value(bias), extent.n):
            if ("filled", bias) not in r.memo:
                r.memo["filled", bias] = r.emit(_filled, Ref(bias), 2, extent)
            bias = r.memo["filled", bias]
            k_ndS = r.emit(_filled, Ref(k_ndS), 2, extent)
            v_nSd = r.emit(_filled, Ref(v_nSd), 1, extent)
        scores = r.emit(torch.baddbmm, Ref(bias), Ref(q_nrd), Ref(k_ndS), alpha=scale)
    weights = r.emit(torch.softmax, Ref(scores), -1)
    out = r.emit(aten.bmm.default, Ref(weights), Ref(v_nSd))
    return r.emit(aten.view.default, Ref(out), (B, h, Q, r.value(v).shape[-1]))


def _contiguous(r: Rewriter, *slots: int) -> bool:
    return all(r.value(s).is_contiguous() for s in slots)


def _spread(mask: Tensor, B: int, g: int, h: int, Q: int) -> Tensor:
    """An additive mask [B | 1, h | 1, Q | 1, S] as [B g, r Q | 1, S]."""
    S = mask.shape[-1]
    if mask.shape[1] == mask.shape[2] == 1:
        return mask.expand(B, g, 1, S).reshape(B * g, 1, S)
    return mask.expand(B, h, Q, S).reshape(B * g, h // g * Q, S)


def _filled(x: Tensor, axis: int, extent: Extent) -> Tensor:
    return x.narrow(axis, 0, extent.n)


def _nothing_behind(bias: Tensor, n: int) -> bool:
    """Whether no query looks at a slot from n on: a mask of the past does not."""
    return bool((bias[..., n:] == -torch.inf).all())


def _unrepeated(r: Rewriter, slot: int) -> int:
    """Keys or values [B, g, S, d] behind heads that were repeated to [B, h, S, d], or the slot.

    The cache must not have been written between the copy and its reader.
    """
    copy = r.behind(slot, aten.view.default, aten._unsafe_view.default)
    wide = r.behind(copy, aten.clone.default)
    if wide is None or r.value(wide).dim() != 5 or r.value(wide).stride(2) != 0:
        return slot
    B, g, repeats, S, d = r.value(wide).shape
    if tuple(r.value(slot).shape) != (B, g * repeats, S, d):
        return slot
    copied = next(i for i, op in enumerate(r.kept) if copy in op.makes)
    later = {storage(r.value(s)) for op in r.kept[copied:] for s in op.writes}
    if storage(r.value(wide)) in later:
        return slot
    return r.emit(aten.select.int, Ref(wide), 2, 0)


# ---- norms and rotations -------------------------------------------------------------------------


def root_mean_norm(r: Rewriter, op: Op) -> int | None:
    """w · x · rsqrt(mean(x²) + eps) over the last axis as w √n · x / hypot(|x|, √(n eps)).

    w is a constant vector [n]; n the length of the axis.
    """
    if op.kwargs or not all(isinstance(x, Ref) for x in op.args):
        return None
    for weight, normed in (op.args, op.args[::-1]):
        w, product = r.value(weight.slot), r.made_by(normed.slot, aten.mul.Tensor)
        if product is None or not r.constant(weight.slot) or w.dim() != 1:
            continue
        for x, root in (product.args, product.args[::-1]):
            eps = _inverse_root_mean(r, root, x)
            n = w.shape[0]
            if eps is None or r.value(x.slot).shape[-1] != n:
                continue
            slots = r.memo.setdefault((weight.slot, eps), [])
            if not slots:
                slots.append(r.new_constant(w * n**0.5))
                slots.append(r.new_constant(torch.full((1,), (n * eps) ** 0.5, device=w.device)))
            length = r.emit(torch.linalg.vector_norm, x, dim=-1, keepdim=True)
            length = r.emit(torch.hypot, Ref(length), Ref(slots[1]))
            unit = r.emit(aten.div.Tensor, x, Ref(length))
            return r.emit(aten.mul.Tensor, Ref(unit), Ref(slots[0]))
    return None


def _inverse_root_mean(r: Rewriter, root: Any, x: Any) -> float | None:
    """eps where `root` is rsqrt(mean(x²) + eps) over the last axis of x, kept as length 1."""
    if not isinstance(x, Ref) or r.value(x.slot).dtype != torch.float32:
        return None
    shifted = r.made_by(r.behind(_slot(root), aten.rsqrt.default), aten.add.Tensor)
    if shifted is None or shifted.kwargs or not isinstance(shifted.args[1], float):
        return None
    mean = r.made_by(_slot(shifted.args[0]), aten.mean.dim)
    if mean is None or mean.kwargs or list(mean.args[1:2]) != [[-1]] or mean.args[2:] != (True,):
        return None
    square = r.made_by(_slot(mean.args[0]), aten.pow.Tensor_Scalar)
    settled = r.settled((x.slot,)) and shifted.args[1] >= 0
    found = square is not None and square.args[1] == 2 and square.args[0] == x and settled
    return float(shifted.args[1]) if found else None


def rotation(r: Rewriter, op: Op) -> int | None:
    """a + cat(−x₂, x₁) · s, x₁ and x₂ the halves of x, as a + roll(x) · (±s)."""
    if op.kwargs:
        return None
    turned = r.made_by(_slot(op.args[1]), aten.mul.Tensor)
    if turned is None or not all(isinstance(x, Ref) for x in (op.args[0], *turned.args)):
        return None
    for half, sine in (turned.args, turned.args[::-1]):
        x = _rotated_half(r, half.slot)
        if x is None:
            continue
        D = r.value(x).shape[-1]
        signed = (sine.slot, D)
        if r.value(sine.slot).shape[-1:] != (D,) or not r.settled((sine.slot,)):
            return None
        if signed not in r.memo:
            sign_D = torch.ones(D, dtype=r.value(x).dtype, device=r.value(x).device)
            sign_D[: D // 2] = -1
            r.memo[signed] = r.emit(aten.mul.Tensor, sine, Ref(r.new_constant(sign_D)))
        rolled = r.emit(torch.roll, Ref(x), D // 2, -1)
        return r.emit(torch.addcmul, op.args[0], Ref(rolled), Ref(r.memo[signed]))
    return None


def _rotated_half(r: Rewriter, slot: int) -> int | None:
    """x where a slot is cat([−x[…, D/2:], x[…, :D/2]], −1)."""
    joined = r.made_by(slot, aten.cat.default)
    if joined is None or len(joined.args) < 2 or len(joined.args[0]) != 2:
        return None
    upper = r.made_by(r.behind(_slot(joined.args[0][0]), aten.neg.default), aten.slice.Tensor)
    lower = r.made_by(_slot(joined.args[0][1]), aten.slice.Tensor)
    if upper is None or lower is None or upper.args[0] != lower.args[0]:
        return None
    x = lower.args[0].slot
    D, last = r.value(x).shape[-1], r.value(x).dim() - 1
    halves = D % 2 == 0 and joined.args[1] in (-1, last)
    halves = halves and upper.args[1] in (-1, last) and lower.args[1] in (-1, last)
    halves = halves and lower.args[2:4] == (0, D // 2) and len(lower.args) < 5
    halves = halves and upper.args[2] == D // 2 and upper.args[3] >= D and len(upper.args) < 5
    return x if halves and r.settled((x,)) else None


PATTERNS: dict[Any, Pattern] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: attention,
    aten.mul.Tensor: root_mean_norm,
    aten.add.Tensor: rotation,
}
