"""What commands share: showing diagnostics and finding specs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import click

from opdsl.compilation import Compilation
from opdsl.diagnostics import CompileError, Diagnostic
from opdsl.source import Source

MOST = 50  # reports a person is shown at once


def show(diagnostics: Iterable[Diagnostic], format: str = "text", stream=None) -> None:
    """Print reports: text to stderr by default, in colour only on a terminal."""
    from opdsl.render import render, wants_color, width_of

    stream = stream or sys.stderr
    items = tuple(diagnostics)
    shown = items[:MOST] if format == "text" else items  # a program may want them all
    text = render(shown, format, wants_color(stream), width_of(stream))
    if text:
        print(text, file=stream, end="\n" if format == "text" else "")
    if len(items) > len(shown):
        print(f"… and {len(items) - len(shown)} more", file=stream)


def source_of(name: str) -> Source:
    """A file, a shipped spec's name, or `-` for standard input. Raises CompileError."""
    if name == "-":
        return _standard_input()
    from opdsl.method import find_spec
    from opdsl.syntax import read_source

    path = find_spec(name)
    return read_source(path, display(path))


def _standard_input() -> Source:
    """What is piped in, under the rules of a file. Raises CompileError."""
    from opdsl.syntax import MAX_BYTES, decoded

    data = b"" if sys.stdin is None else sys.stdin.buffer.read(MAX_BYTES + 1)
    return decoded("<stdin>", data)


def display(path: Path) -> str:
    """A path as short as it can be said from here."""
    from opdsl.resources import here, resolved

    try:
        return str(resolved(path).relative_to(here()))
    except ValueError:
        return str(path)


def settings(pairs: Iterable[str]) -> dict[str, object]:
    """`--set k=v` options. Raises click.UsageError for anything else."""
    out: dict[str, object] = {}
    for pair in pairs:
        key, sep, value = pair.partition("=")
        if not sep or not key.strip() or not value.strip():
            raise click.UsageError(f"--set takes name=value, got {pair!r}")
        from opdsl.syntax.keywords import canonical

        out[canonical(key.strip())] = value.strip()
    return out


def compiled(name: str, set_: Mapping[str, object], method: str | None = None) -> Compilation:
    """A compilation without errors, warnings shown. Raises CompileError."""
    compilation = Compilation(source_of(name), method, set_)
    if compilation.errors:
        raise CompileError([d for d in compilation.diagnostics if d.overridden is None])
    return compilation
