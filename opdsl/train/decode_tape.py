"""One step of a model, recorded as a flat list of torch operations and run again without the model.

A model's `forward` spends as long in Python (modules, masks, decorators) as small products take.
`record` watches one call at torch's dispatcher and keeps what was computed from what; the tape then
repeats it on the same tensors. Inputs, key-value buffers and weights are held by reference, so
what is written into them between two runs is seen. Whatever would make the list untrue for the next
step is refused while recording: control flow or shapes that depend on numbers, tensor subclasses,
higher-order operators. What the caller cannot promise to leave alone may be named `changing`.

Nothing here knows a model; `decode_rewrite` makes the list shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache as once
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Unsuitable(Exception):
    """Why a model cannot be decoded in this way; the caller goes on in a plainer one."""


@dataclass(frozen=True, slots=True)
class Ref:
    """The value in one slot of a tape."""

    slot: int


class Op:
    """`out` = func(*args, **kwargs); tensors among the arguments are `Ref`s, at any depth.

    out: a slot, or a tuple of slots (None: not a tensor) where the operation gives several.
    reads, makes, writes: slots it reads, gives, and whose memory it writes.
    """

    __slots__ = ("args", "func", "kwargs", "makes", "out", "reads", "writes")

    def __init__(self, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any], out: Any):
        self.func, self.args, self.kwargs, self.out = func, args, kwargs, out
        self.reads: list[int] = []
        for x in (*args, *kwargs.values()) if kwargs else args:
            if type(x) is Ref:
                self.reads.append(x.slot)
            elif isinstance(x, tuple | list):
                self.reads += [leaf.slot for leaf in _leaves(x) if isinstance(leaf, Ref)]
        self.makes = (out,) if type(out) is int else tuple(s for s in out if s is not None)
        self.writes = _written(self) if _writes(func) else ()

    def renamed(self, names: dict[int, int]) -> Op:
        """The same operation reading slots by their new names."""
        if not any(slot in names for slot in self.reads):
            return self

        def new(x: Any) -> Any:
            return Ref(names[x.slot]) if isinstance(x, Ref) and x.slot in names else x

        return Op(self.func, mapped(self.args, new), mapped(self.kwargs, new), self.out)


def _leaves(x: Any) -> list[Any]:
    if isinstance(x, tuple | list):
        return [leaf for item in x for leaf in _leaves(item)]
    if isinstance(x, dict):
        return [leaf for item in x.values() for leaf in _leaves(item)]
    return [x]


def mapped(x: Any, f: Callable[[Any], Any]) -> Any:
    """The same nest of tuples, lists and dicts with f of every leaf."""
    kind = type(x)
    if kind is tuple or kind is list:
        return kind([mapped(item, f) for item in x])
    if kind is dict:
        return {k: mapped(v, f) for k, v in x.items()} if x else x
    return f(x)


@dataclass(eq=False)
class Extent:
    """Slots of a cache [.., S, ..] that a step may attend to: the first n of `slots`.

    The caller moves n on between steps; slots behind it have not been written.
    """

    n: int
    slots: int


@dataclass
class Tape:
    """Operations in order, and the value every slot had while they were recorded.

    given: slots that no operation makes (inputs, buffers, weights, constants). result: the slot of
    the result. changing: storages whose content the caller changes between runs. extent: how far
    the cache is filled, where the caller says so.
    """

    ops: list[Op]
    values: list[Tensor]
    given: set[int]
    result: int
    changing: set[int] = field(default_factory=set)
    extent: Extent | None = None

    def having(
        self, ops: list[Op], given: set[int] | None = None, result: int | None = None
    ) -> Tape:
        """The same tape with other operations; the list of values is shared."""
        return Tape(
            ops,
            self.values,
            self.given if given is None else given,
            self.result if result is None else result,
            self.changing,
            self.extent,
        )

    def new_slot(self, value: Tensor, given: bool = False) -> int:
        self.values.append(value)
        if given:
            self.given.add(len(self.values) - 1)
        return len(self.values) - 1


def storage(x: Tensor) -> int:
    """The address of a tensor's memory; 0 where it has none."""
    return x.untyped_storage().data_ptr()


# Their output shapes, or what Python does next, depend on numbers: a list of operations cannot say.
_REFUSED = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []  # kept alive, so that an id stays one tensor's
        self.slots: dict[int, int] = {}
        self.given: set[int] = set()
        self.ops: list[Op] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and asking costs time per operation

    def slot(self, x: Tensor) -> int:
        found = self.slots.get(id(x))
        if found is None:
            found = self.slots[id(x)] = len(self.values)
            self.values.append(x)
        return found

    def _ref(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return mapped(x, self._ref) if isinstance(x, tuple | list) else x
        slot = self.slots.get(id(x))
        if slot is None:
            slot = self.slot(x)
            self.given.add(slot)
        return Ref(slot)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if types and not _PLAIN.issuperset(types):
            raise Unsuitable("the step uses a subclass of torch.Tensor")
        if not _recordable(func) and not _integer_index(func, args):
            raise Unsuitable(f"what the step does depends on numbers ({func})")
        ref = self._ref
        refs = tuple([ref(x) for x in args]), {k: ref(x) for k, x in kwargs.items()}
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            slots: Any = self.slot(out)
        elif isinstance(out, tuple | list):
            slots = tuple(self.slot(x) if isinstance(x, Tensor) else None for x in out)
        else:
            slots = ()
        self.ops.append(Op(func, *refs, slots))
        return out


_PLAIN = {Tensor, torch.nn.Parameter}


@once
def _recordable(func: Any) -> bool:
    if not isinstance(func, torch._ops.OpOverload):
        raise Unsuitable(f"the step uses {func}, which cannot be recorded")
    return not any(tag in func.tags for tag in _REFUSED)


def _integer_index(func, args) -> bool:
    """An index by numbers has the shape of the numbers; only one by booleans has any shape."""
    if func is not aten.index.Tensor:
        return False
    return all(x is None or x.dtype in (torch.int64, torch.int32) for x in args[1])


def record(
    step: Callable[[], Tensor], changing: Sequence[Tensor], extent: Extent | None = None
) -> tuple[Tape, Tensor]:
    """What `step()` did, and its result. Raises Unsuitable.

    changing: tensors the caller writes between two runs. Everything else that the step reads and
    does not write itself may be taken for constant until the tape is dropped.
    """
    recorder = _Recorder()
    with recorder:
        result = step()
    slot = recorder.slots.get(id(result))
    if slot is None:
        raise Unsuitable("the step's result comes from none of its operations")
    storages = {storage(x) for x in changing} - {0}
    return Tape(recorder.ops, recorder.values, recorder.given, slot, storages, extent), result


@once
def _writes(func: Callable[..., Any]) -> tuple[tuple[int | None, str], ...]:
    """Arguments an operation writes: their places (None: by keyword only) and names."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    return tuple(
        (None if argument.kwarg_only else i, argument.name)
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _written(op: Op) -> tuple[int, ...]:
    found = []
    for place, name in _writes(op.func):
        if place is not None and place < len(op.args):
            found.append(op.args[place])
        elif name in op.kwargs:
            found.append(op.kwargs[name])
    return tuple(x.slot for x in _leaves(found) if isinstance(x, Ref))


def player(tape: Tape) -> Callable[[], Tensor]:
    """A function that runs the tape. Its result may share memory with the next run's.

    A value is dropped after its last use, so that its memory is used again while it is warm.
    Casts by autocast are operations of the tape; the tape itself runs without.
    """
    last: dict[int, int] = {}
    for i, op in enumerate(tape.ops):
        for slot in (*op.reads, *op.makes):
            last[slot] = i
    dead: list[list[int]] = [[] for _ in tape.ops]
    for slot, i in last.items():
        if slot not in tape.given and slot != tape.result:
            dead[i].append(slot)
    program = [(_bound(op), op.out, tuple(d)) for op, d in zip(tape.ops, dead)]
    registers: list[Any] = [x if i in tape.given else None for i, x in enumerate(tape.values)]
    result, kind = tape.result, tape.values[tape.result].device.type

    def run() -> Tensor:
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return run()
        for call, out, gone in program:
            value = call(registers)
            if type(out) is int:
                registers[out] = value
            else:
                for slot, part in zip(out, value):
                    if slot is not None:
                        registers[slot] = part
            for slot in gone:
                registers[slot] = None
        return registers[result]

    return run


# The same operations by torch's own Python bindings, which are called faster.
_BINDINGS = {
    aten.mm.default: torch.mm, aten.bmm.default: torch.bmm, aten.add.Tensor: torch.add,
    aten.mul.Tensor: torch.mul, aten.div.Tensor: torch.div, aten.addmm.default: torch.addmm,
    aten.silu.default: torch.nn.functional.silu, aten.index_copy_.default: Tensor.index_copy_,
}  # fmt: skip


def _bound(op: Op) -> Callable[[list[Any]], Any]:
    """registers -> the operation's value, with the commonest forms of arguments spelt out."""
    func, args, kwargs = _BINDINGS.get(op.func, op.func), op.args, op.kwargs
    kinds = [isinstance(x, Ref) for x in args]
    nested = any(isinstance(x, tuple | list | dict) and _has_ref(x) for x in args)
    if nested or _has_ref(kwargs):

        def general(r):
            def value(x):
                return r[x.slot] if isinstance(x, Ref) else x

            return func(*mapped(args, value), **mapped(kwargs, value))

        return general
    if kinds == [True] and not kwargs:
        a = args[0].slot
        return lambda r: func(r[a])
    if kinds == [True, True] and not kwargs:
        a, b = args[0].slot, args[1].slot
        return lambda r: func(r[a], r[b])
    if kinds and kinds[0] and not any(kinds[1:]):
        a, rest = args[0].slot, args[1:]
        if not kwargs:
            return lambda r: func(r[a], *rest)
        return lambda r: func(r[a], *rest, **kwargs)
    if kinds == [True, True, True]:
        a, b, c = (x.slot for x in args)
        return lambda r: func(r[a], r[b], r[c], **kwargs)
    places = [(i, x.slot) for i, x in enumerate(args) if isinstance(x, Ref)]

    def filled(r):
        values = list(args)
        for i, slot in places:
            values[i] = r[slot]
        return func(*values, **kwargs)

    return filled


def _has_ref(x: Any) -> bool:
    return any(isinstance(leaf, Ref) for leaf in _leaves(x))
