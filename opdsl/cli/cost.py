"""`opdsl explain --cost`: plan class, head products, memory and time for given shapes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from opdsl.compilation import Compilation

SHAPE = "2048,512,32768"
DEVICES = ("cpu", "a100", "h100", "h200", "b200")


def shape(text: str) -> tuple[int, int, int]:
    """N,H,V from the command line."""
    try:
        n, h, v = (int(x.replace("_", "")) for x in text.split(","))
    except ValueError:
        n = h = v = 0
    if min(n, h, v) < 1:
        raise click.UsageError(f"--shape wants tokens,hidden,vocabulary, like {SHAPE}; got {text}")
    return n, h, v


def report(
    compilation: Compilation, at: str, device: str, format_: str, memory: str | None = None
) -> str:
    """What a step of the method costs, as text or json."""
    from opdsl.emit.budget import BudgetError, parse_bytes
    from opdsl.emit.cost import Shapes, machine
    from opdsl.emit.forecast import forecast

    n, h, v = shape(at)
    spec, _ = compilation.require()
    half = 4 if device == "cpu" else 2
    served = frozenset(t.name for t in spec.teachers if served_only(t))
    try:
        stated = None if memory is None else parse_bytes(memory)
        shapes = Shapes(n, h, v, served=served, bytes=half)
        found = forecast(compilation.emitted, shapes, machine(device, h, v), stated)
    except BudgetError as error:
        raise click.UsageError(f"--memory {memory}: {error}") from None
    except ValueError as error:
        raise click.UsageError(f"--memory: {error}") from None
    missing = [] if device == "cpu" else without_kernels(compilation)
    if format_ == "json":
        return json.dumps(found.to_json() | {"no_kernels": missing}, indent=2, default=list) + "\n"
    first, *rest = found.lines()
    out = [f"{spec.name}   {first}", *(f"  {line}" for line in rest)]
    if device != "cpu":
        how = f"torch, in place: {'; '.join(missing)}" if missing else "generated Triton kernels"
        out.append(f"  row passes  {how}")
    return "\n".join(out) + "\n"


def without_kernels(compilation: Compilation) -> list[str]:
    """Why row passes on a GPU would run without kernels, as this machine is set up."""
    from opdsl.emit.triton_available import reasons

    return reasons(compilation.emitted)


def served_only(teacher: Any) -> bool:
    """A teacher that gives numbers or lists, not logits: its head is not ours to pay for."""
    return teacher.kind == "external" and str(teacher.access) not in ("logits", "score_ids")


__all__ = ["DEVICES", "SHAPE", "report", "shape"]
