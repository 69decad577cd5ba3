"""Immutable records that are cheap to define.

`check` must start in a fifth of a second, and the code a hundred frozen dataclasses generate for
themselves takes longer than parsing and checking a spec. Records share one constructor, compare
by identity unless told otherwise, and print generically.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")

_set = object.__setattr__


def _init(self: Any, *args: object, **named: object) -> None:
    names, defaults = type(self).__record_fields__, type(self).__record_defaults__
    if len(args) > len(names):
        raise TypeError(f"{type(self).__name__} takes {len(names)} values, {len(args)} given")
    for name, value in zip(names, args):
        _set(self, name, value)
    for name in names[len(args) :]:
        if name in named:
            _set(self, name, named.pop(name))
        elif name in defaults:
            value = defaults[name]
            _set(self, name, {} if value is dict else value)
        else:
            raise TypeError(f"{type(self).__name__} needs {name!r}")
    if named:
        raise TypeError(f"{type(self).__name__} has no {next(iter(named))!r}")


def _frozen(self: object, name: str, value: object = None) -> None:
    raise AttributeError(f"{type(self).__name__} is immutable")


def _repr(self: Any) -> str:
    hidden = ("span", "builder", "spans", "written")
    shown = (f"{n}={getattr(self, n)!r}" for n in fields(self) if n not in hidden)
    return f"{type(self).__name__}({', '.join(shown)})"


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """An immutable class with slots from annotated fields; a default of `dict` means a new {}."""
    space = dict(cls.__dict__)
    names = tuple(space.pop("__annotations__", {}))
    defaults = {n: space.pop(n) for n in names if n in space}
    space.pop("__dict__", None)
    space.pop("__weakref__", None)
    space.update(
        __slots__=names,
        __record_fields__=names,
        __record_defaults__=defaults,
        __init__=_init,
        __setattr__=_frozen,
        __delattr__=_frozen,
        __match_args__=names,
    )
    space.setdefault("__repr__", _repr)
    return type(cls)(cls.__name__, cls.__bases__, space)  # type: ignore[return-value]


def fields(value: object) -> tuple[str, ...]:
    """Names of the fields of a record; () for anything else."""
    return getattr(type(value), "__record_fields__", ())


def items(value: object) -> Iterator[tuple[str, object]]:
    for name in fields(value):
        yield name, getattr(value, name)


def replace(value: T, **changes: object) -> T:
    """The record with some fields changed."""
    return type(value)(**{**dict(items(value)), **changes})
