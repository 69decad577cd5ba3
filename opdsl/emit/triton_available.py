"""Whether row passes run in generated kernels, and the reason where they do not.

Reads what is installed and the passes of a method; needs neither torch nor Triton, so that
`opdsl explain --cost` can say it for a GPU that is elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from opdsl.emit.restricted import is_restricted
from opdsl.emit.triton_rows import generate
from opdsl.emit.triton_source import Unsupported

if TYPE_CHECKING:
    from opdsl.emit.module import Emitted
    from opdsl.ir.stages import Stage, Staged

NEEDS = (3, 6)  # the oldest Triton whose interpreter, compiler and launcher were tried


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def version() -> tuple[int, ...] | None:
    """Of the Triton that is installed; None without one."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as of

    try:
        text = of("triton")
    except PackageNotFoundError:
        return None
    return tuple(int(x) for x in text.split("+")[0].split(".")[:2] if x.isdigit())


def reason(device: object = "cuda") -> str:
    """Why row passes on this device run without kernels; "" where kernels run.

    device: "cuda", "cuda:1", or something with a `type`.
    """
    kind = getattr(device, "type", None) or str(device).split(":")[0]
    if os.environ.get("OPDSL_TRITON") == "0":
        return "OPDSL_TRITON=0"
    found = version()
    if found is None:
        return "triton is not installed (pip install 'triton>=3.6')"
    if found < NEEDS:
        return f"triton {dotted(found)} is older than {dotted(NEEDS)}"
    if kind != "cuda" and not interpreted():
        return f"rows are on {kind}; row kernels need CUDA"
    return ""


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def why_not(staged: Staged, st: Stage) -> str:
    """What in a row pass no kernel computes; "" where there is a kernel for all of it."""
    try:
        generate(staged, st)
    except Unsupported as problem:
        return f"no kernel computes {problem} (pass {staged.rows} {st.level})"
    return ""


def sweeps(emitted: Emitted) -> Iterator[tuple[Staged, Stage]]:
    """The passes of a method that read tiles of logits."""
    for staged in emitted.staged:
        for st in staged.stages:
            if st.kind == "rows" and not (st is staged.last and is_restricted(staged)):
                yield staged, st


def reasons(emitted: Emitted, device: object = "cuda") -> list[str]:
    """Everything that keeps a method's rows from running in kernels on a device."""
    found = [why_not(staged, st) for staged, st in sweeps(emitted)]
    return list(dict.fromkeys(x for x in (reason(device), *found) if x))


__all__ = [
    "NEEDS",
    "dotted",
    "interpreted",
    "reason",
    "reasons",
    "sweeps",
    "version",
    "why_not",
]
