"""A recorded step made shorter: equal work once, constants folded, views left out, weights packed.

Every rewriting keeps the meaning of the list up to rounding and is decided by the operations
themselves, never by what the model is called. What depends on weights alone (transposes, casts, `1 +
w`) keeps the value it had while recording: a tape lives inside one generation call, in
which weights stay as they are. With few rows an operation costs more for being one than for what
it computes, hence the care about views.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache as once
from typing import Any

import torch

from opdsl.train.decode_patterns import Rewriter
from opdsl.train.decode_tape import Extent, Op, Ref, Tape, aten, storage
from opdsl.train.decode_views import VIEWS, read_through

PACKED = 1 << 30  # bytes of weights that are copied into the order their product reads


def shorten(tape: Tape) -> Tape:
    """The same step in fewer and cheaper operations."""
    memory = _Memory(tape)
    tape = _folded(_shared(tape, memory), memory)
    tape = _needed(Rewriter(tape, memory.settled, memory.fixed).apply())
    return _packed(read_through(_folded(tape, memory)), memory)


class _Memory:
    """Which memory the step or its caller writes: nothing in it is a constant."""

    def __init__(self, tape: Tape):
        self.values = tape.values  # the list itself: slots that are added later are known as well
        self.written = {storage(tape.values[s]) for op in tape.ops for s in op.writes} - {0}
        self.changing = self.written | tape.changing

    def fixed(self, slots: Iterable[int]) -> bool:
        return all(storage(self.values[s]) not in self.changing for s in slots)

    def settled(self, slots: Iterable[int]) -> bool:
        """Not written within the step, so reading them twice gives the same."""
        return all(storage(self.values[s]) not in self.written for s in slots)


def _varies(op: Op) -> bool:
    """Whether equal arguments may give another value next time."""
    return _random(op.func) or any(isinstance(x, Extent) for x in op.args)


@once
def _random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


def _shared(tape: Tape, memory: _Memory) -> Tape:
    """Equal operations on equal arguments once: every layer makes the same mask and rotations."""
    first: dict[Any, Op] = {}
    same: dict[int, int] = {}

    kept = []
    for op in tape.ops:
        op = op.renamed(same)
        if _varies(op) or not memory.settled((*op.reads, *op.makes)):
            kept.append(op)
            continue
        earlier = first.setdefault((op.func, _key(op.args), _key(op.kwargs)), op)
        if earlier is op:
            kept.append(op)
        else:
            same.update(zip(op.makes, earlier.makes))
    return tape.having(kept, result=same.get(tape.result, tape.result))


def _key(x: Any) -> Any:
    """A hashable stand-in that tells 1 from 1.0 and True, and 0.0 from -0.0."""
    if isinstance(x, Ref):
        return x
    if isinstance(x, tuple | list):
        return tuple(_key(item) for item in x)
    if isinstance(x, dict):
        return tuple((k, _key(v)) for k, v in sorted(x.items()))
    return type(x), x.hex() if isinstance(x, float) else x


def _folded(tape: Tape, memory: _Memory) -> Tape:
    """Operations on constants alone are dropped; their recorded values become constants.

    A view of a tensor that stays where it is stays valid whatever is written into it.
    """
    known = {s for s in tape.given if memory.fixed((s,))}
    given = set(tape.given)
    kept = []
    for op in tape.ops:
        inputs, outputs = op.reads, op.makes
        constant = (
            all(s in known for s in inputs)
            and memory.fixed(outputs)
            and not op.writes
            and not _varies(op)
        )
        if constant:
            known.update(outputs)
        if constant or (op.func in VIEWS and all(s in given for s in inputs)):
            given.update(outputs)
        else:
            kept.append(op)
    return tape.having(kept, given=given)


def _needed(tape: Tape) -> Tape:
    """Without operations whose value nobody reads and that write nothing."""
    needed = {tape.result}
    kept: list[Op] = []
    for op in reversed(tape.ops):
        if not needed.isdisjoint(op.makes) or op.writes:
            needed.update(op.reads)
            kept.append(op)
    return tape.having(kept[::-1])


# ---- products --------------------------------------------------------------------------------


def _packed(tape: Tape, memory: _Memory) -> Tape:
    """x · Wᵀ with a constant W in float32 reads a copy of Wᵀ that lies in the product's order.

    Where x is y · w with a constant vector w, as behind a norm, w goes into the copy as well.
    """
    packed: dict[tuple[int, int | None], int] = {}
    args: dict[int, tuple] = {}
    room = PACKED
    scaled = _scaled(tape, memory)
    for op, place in _products(tape.ops):
        x, slot = op.args[place - 1].slot, op.args[place].slot
        w_IO = tape.values[slot]
        x, scale = scaled.get(x, (x, None))
        if (slot, scale) not in packed:
            turned = w_IO.dim() == 2 and w_IO.stride(0) == 1 and w_IO.stride(1) > 1
            if slot not in tape.given or not memory.fixed((slot,)) or not turned:
                continue
            if w_IO.dtype != torch.float32 or w_IO.nbytes > room:
                continue
            room -= w_IO.nbytes
            copy_IO = w_IO.contiguous()
            if scale is not None:
                copy_IO.mul_(tape.values[scale].unsqueeze(-1))
            packed[slot, scale] = tape.new_slot(copy_IO, given=True)
        pair = Ref(x), Ref(packed[slot, scale])
        args[id(op)] = (*op.args[: place - 1], *pair, *op.args[place + 1 :])
    ops = [Op(op.func, args.get(id(op), op.args), op.kwargs, op.out) for op in tape.ops]
    return _needed(tape.having(ops))


def _products(ops: Iterable[Op]) -> Iterable[tuple[Op, int]]:
    """Products of two matrices, and the place of the second among the arguments."""
    for op in ops:
        place = {aten.mm.default: 1, aten.addmm.default: 2}.get(op.func)
        if place is not None and all(isinstance(x, Ref) for x in op.args[place - 1 : place + 1]):
            yield op, place


def _scaled(tape: Tape, memory: _Memory) -> dict[int, tuple[int, int]]:
    """Slot of y · w, w a constant vector along the last axis -> slots of y and w."""
    found: dict[int, tuple[int, int]] = {}
    for op in tape.ops:
        if op.func is not aten.mul.Tensor or not all(isinstance(x, Ref) for x in op.args):
            continue
        y, w = (x.slot for x in op.args)
        vector = tape.values[w].dim() == 1 and tape.values[w].numel() > 1
        same = tape.values[y].numel() == tape.values[op.makes[0]].numel()
        if vector and same and w in tape.given and memory.fixed((w,)) and memory.settled((y,)):
            found[op.makes[0]] = y, w
    return found
