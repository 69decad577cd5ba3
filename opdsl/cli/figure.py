"""`opdsl explain --figure`: the options of the figure, and the file it writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from opdsl.cli.common import show
from opdsl.diagnostics import CompileError

if TYPE_CHECKING:
    from opdsl.compilation import Compilation

EXAMPLE = '{"student": [0.7, 0.2, 0.1], "teacher": [0.1, 0.8, 0.1], "sampled": 2}'
ENVIRONMENT = 3  # exit code


def check(figure: Path | None, state: Path | None, dump: str | None) -> None:
    """Raises click.UsageError for options that do not go together."""
    if figure is None:
        raise click.UsageError("--state is the state of a figure: say where with --figure FILE.png")
    if dump is not None:
        raise click.UsageError("--figure and --dump exclude each other")
    from opdsl.formula.figure import SUFFIXES

    if figure.suffix.lower() not in SUFFIXES:
        raise click.UsageError(f"--figure writes {', '.join(SUFFIXES)}, got {figure.name!r}")


def draw(compilation: Compilation, path: Path, state: Path | None) -> dict[str, Any]:
    """Writes the figure and gives the numbers in it. Raises CompileError (OPD702) for a state that
    cannot be used, and leaves with code 3 where the file cannot be written."""
    from opdsl.codes import make
    from opdsl.formula.figure import drawn
    from opdsl.formula.mass import mass
    from opdsl.formula.state import read, toy
    from opdsl.source import NOWHERE

    spec, _ = compilation.require()
    try:
        here = toy() if state is None else read(state.read_text(encoding="utf-8-sig"))
        found = mass(spec, here)
    except (OSError, ValueError) as e:
        why = "it is not UTF-8 text" if isinstance(e, UnicodeDecodeError) else str(e)
        message = f"cannot use {state or 'the built-in state'}: {why}"
        helps = [f"a state is, for instance,  {EXAMPLE}"] if state else []
        raise CompileError([make("OPD702", NOWHERE, message, helps=helps)]) from None
    try:
        path.write_bytes(drawn(found, path.suffix.lower(), f"{spec.name}: where the mass goes"))
    except OSError as e:
        helps = ["--figure another/path.png"]
        show([make("OPD704", NOWHERE, f"cannot write {path}: {e.strerror}", helps=helps)])
        raise click.exceptions.Exit(ENVIRONMENT) from None
    click.echo(f"wrote {path}: {found.verdict}", err=True)
    return found.data()
