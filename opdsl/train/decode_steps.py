"""Two ways to hold what a model has read: a cache that grows, and slots that stay where they are.

Both give the next logits for one token per row and can leave rows out. `PlainSteps` calls the
model with its own dynamic cache and works for every model that has one. `FixedSteps` keeps keys,
values, mask, positions and tokens in tensors of fixed size and address, so that one step can be
recorded or captured (`decode_replay`) and run again without the model's Python.

Shapes: B rows, P prompt tokens, L tokens a layer holds, S slots, g key-value heads, d head width, V
vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache as once
from typing import Any

import torch
from torch import Tensor

from opdsl.train.cache import make_room
from opdsl.train.decode_tape import Unsuitable

ROOM = 224  # slots set aside beyond the prompt at first; more whenever they are full
NEVER = 2.0  # a share of ended rows that is never reached


def cache_name(model) -> str | None:
    """What the key-value cache is called, as an argument and in the output; None: there is none.

    transformers 5.24 renamed `past_key_values` to `cache`; the old name goes with 5.40.
    """
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), None)


class PlainSteps:
    """The model called for every token, its cache growing into room set aside.

    mask_BP [B, P] bool and position_B1 [B, 1] are None where all prompts are equally long.
    drop_from: the share of ended rows from which it pays to copy the cache without them.
    look_every: after how many steps to look whether rows have ended, which waits for the device.
    """

    drop_from = 0.25
    look_every = 1

    def __init__(self, model, past, mask_BP: Tensor | None, position_B1, tokens: int):
        self.model, self.held, self.past = model, cache_name(model), past
        self.mask_BL = None if mask_BP is None else mask_BP.long()
        self.position_B1 = position_B1
        make_room(past, tokens)

    def step(self, token_B: Tensor) -> Tensor:
        """The logits [B, V] behind one more token of each row."""
        arguments = {"input_ids": token_B.unsqueeze(-1), self.held: self.past, "use_cache": True}
        if self.mask_BL is not None:
            self.mask_BL = torch.cat([self.mask_BL, self.mask_BL.new_ones(len(token_B), 1)], 1)
            self.position_B1 = self.position_B1 + 1
            arguments |= {"attention_mask": self.mask_BL, "position_ids": self.position_B1}
        out = self.model(**arguments)
        self.past = getattr(out, self.held)
        return out.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.past.batch_select_indices(rows)
        if self.mask_BL is not None:
            self.mask_BL, self.position_B1 = self.mask_BL[rows], self.position_B1[rows]

    def close(self) -> None:
        """The last step has been taken."""


@once
def _slots_class() -> type:
    from transformers.cache_utils import StaticLayer

    class Slots(StaticLayer):
        """Keys and values [B, g, S, d]; the next token of every row goes to slot `at_1`.

        Never sliding: a window is the mask's affair, so that a token stays where it is.
        """

        is_sliding = False

        def __init__(self, keys: Tensor, values: Tensor, at_1: Tensor):
            super().__init__(keys.shape[2])
            self.keys, self.values, self.at_1 = keys, values, at_1
            self.dtype, self.device = keys.dtype, keys.device
            self.batch_size = self.max_batch_size = keys.shape[0]
            self.num_heads, self.k_head_dim = keys.shape[1], keys.shape[3]
            self.v_head_dim = values.shape[3]
            self.is_initialized = True

        def update(self, key_states, value_states, *args, **kwargs):
            self.keys.index_copy_(2, self.at_1, key_states)
            self.values.index_copy_(2, self.at_1, value_states)
            return self.keys, self.values

        def get_seq_length(self, *args, **kwargs):
            return self.at_1[0]

    return Slots


def _slots_cache(layers: Sequence[tuple[Tensor, Tensor]], at_1: Tensor) -> Any:
    from transformers.cache_utils import Cache

    return Cache(layers=[_slots_class()(keys, values, at_1) for keys, values in layers])


def check_fixed(model, past) -> None:
    """Raise Unsuitable unless what a model keeps of its past can be held in slots."""
    taken = inspect.signature(model.forward).parameters
    if not {"attention_mask", "position_ids"} <= set(taken):
        raise Unsuitable("the model takes no mask or no position ids")
    for layer in getattr(past, "layers", None) or [None]:
        name = type(layer).__name__
        if name not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
            raise Unsuitable(f"a layer of the model keeps its past as {name}")
        if any(not isinstance(x, Tensor) or x.dim() != 4 for x in (layer.keys, layer.values)):
            raise Unsuitable("a layer of the model keeps keys or values of an unusual shape")
    try:
        _slots_cache([(torch.zeros(1, 1, 1, 1),) * 2], torch.zeros(1, dtype=torch.int64))
    except (AttributeError, ImportError, TypeError) as error:
        raise Unsuitable(f"this version's cache takes no layers of ours: {error}") from None


class FixedSteps:
    """The state of B rows in slots; `_next` computes the step that the buffers describe.

    token_B1 is read, its keys and values go to slot at_1 of every layer. limit: slots that will
    ever be needed. Raises Unsuitable where a model's past cannot be held like this.
    """

    drop_from = 0.5
    look_every = 1
    grain = 32  # slots are a multiple of this

    def __init__(self, model, past, mask_BP: Tensor, position_B1: Tensor, limit: int):
        check_fixed(model, past)
        device, (B, P) = mask_BP.device, mask_BP.shape
        self.slots = self._slots_for(P, limit)
        self.token_B1 = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self.position_B1 = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self.at_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.mask_BS = torch.ones(B, self.slots, dtype=torch.int64, device=device)
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.load(model, past, mask_BP, position_B1, limit)

    def load(self, model, past, mask_BP: Tensor, position_B1: Tensor, limit: int) -> None:
        """Start from what `past` holds, which is emptied: one layer at a time is there twice."""
        self.model, self.held, self.limit = model, cache_name(model), limit
        P = self.filled = mask_BP.shape[1]  # on the host, where at_1 would have to be waited for
        self.lengths = [layer.keys.shape[2] for layer in past.layers]
        for i, layer in enumerate(past.layers):
            if i == len(self.layers):
                self.layers.append((self._empty(layer.keys), self._empty(layer.values)))
            for room, held in zip(self.layers[i], (layer.keys, layer.values)):
                room.zero_()  # what lies behind a mask must still be finite
                room[:, :, P - held.shape[2] : P] = held
            layer.keys = layer.values = None
        self.at_1.fill_(P)
        self.position_B1.copy_(position_B1)
        self.mask_BS.fill_(1)
        self.mask_BS[:, :P] = mask_BP
        self.cache = _slots_cache(self.layers, self.at_1)

    def unload(self, past) -> None:
        """Give `past` back what `load` took from it; no step has been taken since."""
        for layer, pair, length in zip(past.layers, self.layers, self.lengths):
            layer.keys, layer.values = (
                room[:, :, self.filled - length : self.filled].clone() for room in pair
            )

    def _slots_for(self, filled: int, limit: int) -> int:
        wanted = min(filled + ROOM, limit)
        return -(-wanted // self.grain) * self.grain

    def _empty(self, x_BgLd: Tensor) -> Tensor:
        B, g, _, d = x_BgLd.shape
        return x_BgLd.new_zeros(B, g, self.slots, d)

    def buffers(self) -> list[Tensor]:
        """What is written between two steps."""
        return [self.token_B1, self.position_B1, self.at_1, self.mask_BS]

    def call(self) -> Tensor:
        """The step as the model itself does it: logits [B, 1, V]."""
        out = self.model(
            input_ids=self.token_B1,
            attention_mask=self.mask_BS,
            position_ids=self.position_B1,
            use_cache=True,
            **{self.held: self.cache},  # type: ignore[dict-item]
        )
        return out.logits

    def step(self, token_B: Tensor) -> Tensor:
        """The logits [B, V] behind one more token of each row; the next step's may overwrite it."""
        if self.filled == self.slots:
            self._grow()
        self.token_B1.copy_(token_B.unsqueeze(-1))
        self.position_B1.add_(1)
        logits = self._next()
        self.at_1.add_(1)
        self.filled += 1
        return logits[:, -1]

    def _next(self) -> Tensor:
        return self.call()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.layers = [(k[rows], v[rows]) for k, v in self.layers]
        self.token_B1, self.position_B1 = self.token_B1[rows], self.position_B1[rows]
        self.mask_BS = self.mask_BS[rows]
        self._changed()

    def _grow(self) -> None:
        old, self.slots = self.slots, self._slots_for(2 * self.slots - ROOM, self.limit)
        more = self.mask_BS.new_ones(len(self.mask_BS), self.slots - old)
        self.mask_BS = torch.cat([self.mask_BS, more], 1)
        for i, pair in enumerate(self.layers):
            wider = (self._empty(pair[0]), self._empty(pair[1]))
            for room, held in zip(wider, pair):
                room[:, :, :old] = held
            self.layers[i] = wider
        self._changed()

    def _changed(self) -> None:
        """The buffers are others than before."""
        self.cache = _slots_cache(self.layers, self.at_1)

    def close(self) -> None:
        """The last step has been taken."""
