"""`opdsl fmt FILE…`: the canonical layout."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

from opdsl.cli.common import display, show, source_of


@click.command()
@click.argument("files", nargs=-1, required=True)
@click.option(
    "--check", "check_", is_flag=True, help="Write nothing; exit code 1 if a file would change."
)
@click.option("--diff", is_flag=True, help="Show what would change.")
def fmt(files: tuple[str, ...], check_: bool, diff: bool) -> None:
    """Format spec files in place (`-` writes standard input back to standard output)."""
    from opdsl.diagnostics import CompileError
    from opdsl.syntax.fmt import format_source

    changed = failed = 0
    for name in files:
        try:
            source = source_of(name)
            text = format_source(source)
        except CompileError as e:
            show(e.diagnostics)
            failed += 1
            continue
        if name == "-":
            click.echo(text, nl=False)
            continue
        if text == source.text:
            continue
        changed += 1
        if diff:
            import difflib

            lines = difflib.unified_diff(
                source.text.splitlines(True), text.splitlines(True), source.name, source.name
            )
            click.echo("".join(lines), nl=False)
        if check_:
            click.echo(f"would reformat {source.name}", err=True)
        elif not diff:
            assert source.path is not None
            write_atomically(Path(source.path), text)
            click.echo(f"reformatted {display(Path(source.path))}", err=True)
    if failed or (check_ and changed):
        raise click.exceptions.Exit(1)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text (of a link: of what it leads to); the old text survives any failure.

    Raises CompileError OPD704 where nothing can be written.
    """
    from opdsl.codes import make
    from opdsl.diagnostics import CompileError
    from opdsl.resources import resolved
    from opdsl.source import NOWHERE

    path = resolved(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as f:
            f.write(text)
        if path.exists():
            os.chmod(temporary, path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        why = error.strerror or str(error)
        message = f"I cannot write `{display(path)}`: {why}"
        raise CompileError([make("OPD704", NOWHERE, message)]) from None
