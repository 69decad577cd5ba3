"""Views left out of a recorded step.

A step of one token is full of axes of length 1 that are put in and taken out again, and each of these
views costs as much as a sum of 16 rows. Here a tensor is known by its elements in memory order: a
view that keeps them becomes another name, elementwise operations run without axes of length 1, and a
real view is made only where an operation insists on a shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opdsl.train.decode_tape import Op, Ref, Tape, aten, mapped

Shape = tuple[int, ...]

VIEWS = {
    aten.view.default, aten._unsafe_view.default, aten.transpose.int, aten.t.default,
    aten.permute.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.expand.default, aten.alias.default, aten.detach.default,
    aten.select.int, aten.slice.Tensor,
}  # fmt: skip

# Operations on all elements alike, whatever the axes, and those that know the last axis only.
_ELEMENTWISE = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default,
    aten.silu.default, aten.gelu.default, aten.relu.default, aten.tanh.default,
    aten.sigmoid.default, aten.exp.default, aten.pow.Tensor_Scalar, aten.rsqrt.default,
    aten.cos.default, aten.sin.default, torch.addcmul, torch.hypot,
}  # fmt: skip
_LAST_AXIS = {torch.linalg.vector_norm, torch.roll}


class _Names:
    """The state of one pass: names of views, and the shapes tensors have when the tape runs."""

    def __init__(self, tape: Tape):
        self.values = tape.values
        self.root: dict[int, int] = {}  # slot of a view -> slot of the tensor it shows
        self.shapes: dict[int, Shape] = {}  # where a slot runs in another shape than recorded
        self.made: dict[tuple[int, Shape], int] = {}
        self.kept: list[Op] = []
        self.new_slot = tape.new_slot

    def recorded(self, slot: int) -> Shape:
        return tuple(self.values[slot].shape)

    def use(self, slot: int, shape: Shape) -> Ref:
        """A tensor of this shape with the elements of a slot; a view is added if there is none."""
        base = self.root.get(slot, slot)
        if self.shapes.get(base, self.recorded(base)) == shape:
            return Ref(base)
        if (base, shape) not in self.made:
            taken = slot == base or self.recorded(slot) != shape
            name = self.new_slot(self.values[slot].view(shape)) if taken else slot
            self.made[base, shape] = name
            self.kept.append(Op(torch.Tensor.view, (Ref(base), shape), {}, name))
        return Ref(self.made[base, shape])

    def as_recorded(self, x: Any) -> Any:
        return self.use(x.slot, self.recorded(x.slot)) if isinstance(x, Ref) else x

    def concerns(self, op: Op) -> bool:
        return any(s in self.root or s in self.shapes for s in op.reads)


def read_through(tape: Tape) -> Tape:
    """The tape with as few views as its operations need.

    A view reads nothing, so it may stand anywhere behind what it looks at.
    """
    names = _Names(tape)
    for op in tape.ops:
        if op.func in VIEWS and type(op.out) is int:
            base = names.root.get(op.args[0].slot, op.args[0].slot)
            if _same_elements(tape.values[base], tape.values[op.out]):
                names.root[op.out] = base
                continue
        narrowed = _without_ones(names, op)
        if narrowed is not None:
            op = narrowed
        elif names.concerns(op):
            args, kwargs = mapped((op.args, op.kwargs), names.as_recorded)
            op = Op(op.func, args, kwargs, op.out)
        names.kept.append(op)
    result = names.use(tape.result, names.recorded(tape.result)).slot
    return tape.having(names.kept, result=result)


def _without_ones(names: _Names, op: Op) -> Op | None:
    """An elementwise operation without the axes in which its result has length 1, but the last."""
    last = op.func in _LAST_AXIS and op.kwargs.get("dim", op.args[-1]) == -1
    if not (op.func in _ELEMENTWISE or last) or type(op.out) is not int:
        return None
    out = names.values[op.out]
    ones = [i - out.dim() for i, n in enumerate(out.shape[:-1]) if n == 1]
    tensors = [names.values[s] for s in op.reads]
    if not ones or not all(x.is_contiguous() for x in (out, *tensors)):
        return None

    def narrow(x: Any) -> Any:
        if not isinstance(x, Ref):
            return x
        shape = names.recorded(x.slot)
        kept = [n for i, n in enumerate(shape) if i - len(shape) not in ones]
        return names.use(x.slot, tuple(kept))

    args = tuple(narrow(x) for x in op.args)
    names.shapes[op.out] = tuple(n for i, n in enumerate(out.shape) if i - out.dim() not in ones)
    return Op(op.func, args, op.kwargs, op.out)


def _same_elements(a: Tensor, b: Tensor) -> bool:
    """Whether b shows all elements of a in their order in memory."""
    return (
        a.numel() == b.numel()
        and a.data_ptr() == b.data_ptr()
        and a.dtype == b.dtype
        and a.is_contiguous()
        and b.is_contiguous()
    )
