"""`opdsl explain --cost`: plan class, head products, memory and time for given shapes."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from opdsl.compilation import Compilation
    from opdsl.emit.cost import Machine, Shapes
    from opdsl.emit.plan import Plan

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


def report(compilation: Compilation, at: str, device: str, format_: str) -> str:
    """What a step of the method costs, as text or json."""
    from opdsl.emit.cost import Shapes, cost, machine
    from opdsl.emit.plan import plans

    n, h, v = shape(at)
    spec, _ = compilation.require()
    half = 4 if device == "cpu" else 2
    served = frozenset(t.name for t in spec.teachers if served_only(t))
    shapes = Shapes(n, h, v, served=served, bytes=half)
    on = machine(device, h, v)
    rows = [(p, cost(p, shapes, on)) for p in plans(compilation.emitted)]
    missing = [] if device == "cpu" else without_kernels(compilation)
    if format_ == "json":
        data = [{"plan": p.label, "units": p.units(), **asdict(p), **asdict(c)} for p, c in rows]
        found = {"shape": [n, h, v], "device": on.name, "parts": data, "no_kernels": missing}
        return json.dumps(found, indent=2, default=list) + "\n"
    out = lines(spec.name, rows, shapes, on)
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


def lines(name: str, rows: list[tuple[Plan, Any]], at: Shapes, on: Machine) -> list[str]:
    """The costs of every part, one block each."""
    from opdsl.emit.plan import describe

    unit = 2.0 * at.rows * at.hidden * at.vocab
    out = [
        f"{name}   {at.rows:,} tokens, hidden {at.hidden:,}, vocabulary {at.vocab:,}, {on.name}",
        f"  U           {unit / 1e9:,.1f} GFLOP: one product with the head",
    ]
    for plan, c in rows:
        label = "loss" if plan.rows == "main" else "reference"
        out += [
            f"  {label:<11} {describe(plan, at.served)}",
            f"  memory      {amount(c.bytes)} beyond the models: {c.chunk} tokens at a time",
            f"  time        {duration(c.seconds)} for loss and gradient",
        ]
    return out


def amount(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


__all__ = ["DEVICES", "SHAPE", "lines", "report", "shape"]
