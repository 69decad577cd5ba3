"""Heads whose rows a data-parallel trainer keeps on other processes (FSDP2): gathered once, whole.

A loss that reads the weight chunk by chunk must not ask for it chunk by chunk. The weight is
gathered when the batch is made, every product of the step reads that copy, and its gradient goes
back in one reduce-scatter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def is_spread(x: Tensor | None) -> bool:
    """Whether a tensor is a DTensor, told without importing them."""
    return x is not None and hasattr(x, "full_tensor") and hasattr(x, "placements")


def gather(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole of a DTensor, in `dtype` (None: its own); other tensors as they are.

    A collective call, in the backward pass too. The gradient that arrives is the mean over the
    processes of the mesh of the gradients of each: what FSDP2 and DDP make of every other
    parameter. Dimensions of the mesh whose processes hold the same batch do no harm.
    """
    if not is_spread(weight):
        return weight
    return _Gathered.apply(weight, dtype or weight.dtype)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Any, dtype: torch.dtype) -> Tensor:
        ctx.mesh, ctx.placements = weight.device_mesh, weight.placements
        ctx.dtype, ctx.shape, ctx.stride = weight.dtype, weight.shape, weight.stride()
        return weight.detach().to(dtype).full_tensor()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor):
        from torch.distributed.tensor import DTensor, Partial

        partial = [Partial()] * ctx.mesh.ndim
        spread = DTensor.from_local(
            slope.to(ctx.dtype) / ctx.mesh.size(),
            ctx.mesh,
            partial,
            run_check=False,
            shape=ctx.shape,
            stride=ctx.stride,
        )
        return spread.redistribute(placements=ctx.placements), None


__all__ = ["gather", "is_spread"]
