"""The step of a model without the model's Python: recorded on a CPU, captured on CUDA.

`RecordedSteps` records every call anew. `CapturedSteps` keeps its graph from call to call, since
capturing takes long; weights are read where they lie, so an optimizer's step in place is seen. Before
a kept graph is used again, everything it took for granted is compared: addresses and plain
attributes of every module, and the logits of one step with the model's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from opdsl.train.decode_rewrite import shorten
from opdsl.train.decode_steps import NEVER, FixedSteps
from opdsl.train.decode_tape import Extent, Unsuitable, player, record
from opdsl.train.memory import is_out_of_memory

SPAN = 16  # slots by which a recorded step's attention grows
KEPT = 2  # captured steps kept per model
KEPT_SHARE = 0.125  # of the device's memory that they may hold


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether logits differ by no more than the rounding of their type."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    tolerance = 1e-4 if a.dtype == torch.float32 else 1e-2
    largest = a.float().abs().amax().clamp(min=1e-3)
    return bool((a.float() - b.float()).abs().amax() <= tolerance * largest)  # False with NaN


def _unsuitable(what: str, error: Exception) -> Exception:
    """The reason not to go this way; that there is no memory is no reason, and passed on."""
    if is_out_of_memory(error):
        return error
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return Unsuitable(f"{what}: {first}")


class _Replayed(FixedSteps):
    """FixedSteps whose step is `run`, made by `_make` once per shape. None: to be made."""

    run: Callable[[], Tensor] | None = None

    def rehearse(self) -> None:
        """Make the step on stand-in tokens and compare it with the model's one slot further.

        What is written meanwhile lies in slots that the real steps write again. Raises Unsuitable
        where the step cannot be made or is not the model's.
        """
        if self.run is None:
            self._make()
        for x in (self.token_B1, self.at_1, self.position_B1):
            x.add_(1)
        own = self.call().clone()
        try:
            self._compare(own)
        finally:
            for x in (self.at_1, self.position_B1):
                x.sub_(1)

    def _compare(self, own: Tensor) -> None:
        """Raise Unsuitable unless `run` gives the model's own logits."""
        assert self.run is not None
        # What `run` reads it must have written itself.
        for room in (x for pair in self.layers for x in pair):
            room.index_fill_(2, self.at_1, 0)
        try:
            same = alike(own, self.run())
        except RuntimeError as error:  # a shape that rewriting got wrong
            raise _unsuitable("the step cannot be run again", error) from None
        if not same:
            raise Unsuitable("the step run again differs from the model's own")

    def _make(self) -> Tensor:
        raise NotImplementedError

    def _next(self) -> Tensor:
        if self.run is not None:
            return self.run()
        try:
            return self._make()
        except Unsuitable:  # it could be made in another shape; the model goes on by itself
            self.run = self.call
            return self.call()

    def _changed(self) -> None:
        super()._changed()
        self.run = None


class RecordedSteps(_Replayed):
    """The model's step recorded and shortened: for few rows on a CPU."""

    def rehearse(self) -> None:
        """Record the step on stand-in tokens and compare what is repeated with what was recorded.

        Cheaper than the model's own next step, and enough for a recording that lives in one call
        if Python keeps no state between steps: no plain attribute of a module may have changed.
        """
        before = attributes(self.model)
        own = self._make().clone()
        if attributes(self.model) != before:
            raise Unsuitable("the model's modules count their steps")
        self._compare(own)

    def _make(self) -> Tensor:
        # the mask changes with the shape only, and then the step is recorded anew
        changing = [x for x in self.buffers() if x is not self.mask_BS]
        self.extent = Extent(0, self.slots)
        self._extend()
        tape, logits = record(self.call, changing, self.extent)
        try:
            self.run = player(shorten(tape))
        except RuntimeError as error:  # a shape that rewriting got wrong
            raise _unsuitable("the step cannot be shortened", error) from None
        return logits

    def _extend(self) -> None:
        """Attention looks at the slots filled by now, and one or two blocks more."""
        self.extent.n = min(self.slots, (self.filled // SPAN + 2) * SPAN)

    def _next(self) -> Tensor:
        if self.run is not None:
            self._extend()
        return super()._next()


# ---- captured -----------------------------------------------------------------------------------


class CapturedSteps(_Replayed):
    """The model's step as a CUDA graph; rows that ended stay in it and are masked.

    On a CPU a recording that nothing was folded into stands in: it reads weights and buffers where
    they lie, as a graph does.
    """

    drop_from = NEVER
    look_every = 16
    grain = 128
    shadows: Sequence[tuple[Tensor, Tensor]] = ()  # parameters and their copies in half precision

    def _make(self) -> Tensor:
        kind = self.at_1.device.type
        self.signature = signature(self.model)
        with _halved(self.model, kind) as self.shadows, _uncached(kind):
            if kind == "cuda":
                self.run, self.logits = _cuda_graph(self.call)
            else:
                tape, self.logits = record(self.call, self.buffers())
                self.run = player(tape)
        return self.run()

    def load(self, model, past, mask_BP: Tensor, position_B1: Tensor, limit: int) -> None:
        super().load(model, past, mask_BP, position_B1, limit)
        for parameter, copy in self.shadows:
            copy.copy_(parameter)

    def close(self) -> None:
        """Keep the graph for the next call, if there is memory for it."""
        held = sum(k.nbytes + v.nbytes for k, v in self.layers)
        held += sum(copy.nbytes for _, copy in self.shadows)
        made = self.run is not None and self.run != self.call
        model, self.model = self.model, None  # what is kept must not keep the model
        if not made or held > KEPT_SHARE * _memory(self.at_1.device):
            return
        kept = _KEPT.setdefault(model, [])
        kept[:] = [self, *kept][:KEPT]


_KEPT: WeakKeyDictionary[nn.Module, list[CapturedSteps]] = WeakKeyDictionary()


def take_captured(model: nn.Module, mask_BP: Tensor) -> CapturedSteps | None:
    """A kept step for as many rows that still stands for the model; others are dropped."""
    kept = _KEPT.pop(model, [])
    if not kept:
        return None
    now = signature(model)
    kept = [k for k in kept if k.signature == now and k.at_1.device == mask_BP.device]
    fits = [k for k in kept if len(k.mask_BS) == len(mask_BP) and k.slots > mask_BP.shape[1] + 2]
    if len(kept) > len(fits[:1]):
        _KEPT[model] = [k for k in kept if k is not (fits or [None])[0]]
    return fits[0] if fits else None


def forget_captured(model: nn.Module) -> None:
    """Give back the memory of what is kept for a model."""
    _KEPT.pop(model, None)


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(1 << 33)


def signature(model: nn.Module) -> tuple:
    """What a captured step took for granted: where tensors lie, and what Python might ask.

    Plain attributes of all modules stand for the branches of their code: a switched-off adapter
    is another step than one that is on.
    """
    tensors = [*model.parameters(), *model.buffers()]
    places = tuple((x.data_ptr(), x.dtype, tuple(x.shape)) for x in tensors)
    kind = next(model.parameters()).device.type
    casts = torch.is_autocast_enabled(kind), str(torch.get_autocast_dtype(kind))
    return places, attributes(model), casts


def attributes(model: nn.Module) -> tuple:
    """The plain attributes of all modules, and how many hooks and the like they have."""
    plain: list[Any] = []
    for module in model.modules():
        for name, value in vars(module).items():
            if _small(value):
                plain.append((name, repr(value)))
            elif isinstance(value, dict | list | tuple | set):
                plain.append((name, len(value)))
    return tuple(plain)


def _small(value: Any) -> bool:
    """Whether a value's text is short and says all: no tensors and no modules in it."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return len(value) < 64 and all(_small(x) for x in value)
    return isinstance(value, bool | int | float | str | None)


def _cuda_graph(step: Callable[[], Tensor]) -> tuple[Callable[[], Tensor], Tensor]:
    """`step` as a function that replays its kernels. Raises Unsuitable where it cannot be captured."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up outside the capture
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
    except Exception as error:  # whatever the model's code raises while its stream is captured
        torch.cuda.synchronize()
        raise _unsuitable("the step cannot be captured", error) from None

    def run() -> Tensor:
        graph.replay()
        return logits

    return run, logits


@contextlib.contextmanager
def _halved(model: nn.Module, kind: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Linear layers that autocast would cast in every step, reading copies that are cast once.

    Yields (parameter, copy); whoever keeps the captured step renews the copies. Only what is
    captured inside reads them: the layers are themselves again afterwards.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    changed: list[nn.Module] = []
    dtype = torch.get_autocast_dtype(kind)
    try:
        if torch.is_autocast_enabled(kind):
            for module in model.modules():
                if type(module) is not nn.Linear or "forward" in vars(module):
                    continue
                copies = []
                for parameter in (module.weight, module.bias):
                    cast = parameter is not None and parameter.dtype == torch.float32
                    copies.append(parameter.detach().to(dtype) if cast else parameter)
                    if cast:
                        pairs.append((parameter, copies[-1]))
                module.forward = _linear(*copies)  # type: ignore[method-assign]
                changed.append(module)
        yield pairs
    finally:
        for module in changed:
            del module.forward


def _linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: nn.functional.linear(x, weight, bias)


@contextlib.contextmanager
def _uncached(kind: str) -> Iterator[None]:
    """Autocast without its cache: a cast cached before the capture would never be made again."""
    if not torch.is_autocast_enabled(kind):
        yield
        return
    with torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False):
        yield
