"""A key-value cache that grows into room set aside, instead of being copied for every token.

transformers' `DynamicLayer` concatenates: decoding T tokens copies the cache T times. Layers of
exactly that kind get an `update` that writes into a buffer; every other kind is left as it is.

Shapes: B rows, h key-value heads, L tokens so far, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def make_room(cache: Any, tokens: int) -> None:
    """Let the plain layers of `cache` take `tokens` more without copying what they hold."""
    for layer in getattr(cache, "layers", ()):
        if _plain(layer):
            layer.update = _Growing(layer, tokens)


def _plain(layer: Any) -> bool:
    """Whether a layer holds its past as keys and values [B, h, L, d] and appends by `torch.cat`."""
    if type(layer).__name__ != "DynamicLayer" or "update" in vars(layer):
        return False
    held = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return all(isinstance(x, Tensor) and x.dim() == 4 for x in held)


class _Growing:
    """`update` of one layer. Selecting rows replaces the layer's tensors; then room is made anew."""

    def __init__(self, layer: Any, tokens: int):
        self.layer, self.last = layer, layer.keys.shape[-2] + tokens
        self.room: list[Tensor] = []

    def __call__(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        layer = self.layer
        held = (layer.keys, layer.values)
        start = held[0].shape[-2]
        stop = start + keys.shape[-2]
        mine = bool(self.room) and all(
            x.data_ptr() == r.data_ptr() and x.shape[0] == r.shape[0]
            for x, r in zip(held, self.room)
        )
        if not mine or stop > self.room[0].shape[-2]:
            self.room = []
            for x in held:
                B, h, _, d = x.shape
                room = torch.empty(B, h, max(self.last, stop), d, dtype=x.dtype, device=x.device)
                room[:, :, :start] = x
                self.room.append(room)
        for room, new in zip(self.room, (keys, values)):
            room[:, :, start:stop] = new
        layer.keys, layer.values = (room[:, :, :stop] for room in self.room)
        return layer.keys, layer.values
