"""`opdsl check FILE…`: every error and warning, nothing else."""

from __future__ import annotations

import sys

import click

from opdsl.cli.common import display, show, source_of
from opdsl.compilation import Compilation
from opdsl.diagnostics import CompileError, Diagnostic, Severity


@click.command()
@click.argument("files", nargs=-1, required=True)
@click.option("--format", "format_", type=click.Choice(["text", "json", "github"]), default="text")
@click.option("--deny", multiple=True, metavar="warnings|CODE", help="Treat these as errors.")
@click.option("--fix", is_flag=True, help="Apply the repairs that cannot change the formula.")
@click.option("--set", "pairs", multiple=True, metavar="NAME=VALUE", help="Set a knob.")
@click.option("--notes", is_flag=True, help="Also say what needs no acceptance.")
@click.option("--quiet", "-q", is_flag=True, help="Say nothing when there is nothing to say.")
def check(
    files: tuple[str, ...],
    format_: str,
    deny: tuple[str, ...],
    fix: bool,
    pairs: tuple[str, ...],
    notes: bool,
    quiet: bool,
) -> None:
    """Check spec files (`-` is standard input). Exit code 1 if anything is wrong."""
    from opdsl.cli.common import settings

    chosen = settings(pairs)
    found: list[Diagnostic] = []
    clean = 0
    for name in files:
        reports = [d for d in _one(name, chosen, fix, notes) if d.overridden is None]
        found += reports
        clean += not reports
    bad = any(_counts(d, deny) for d in found)
    if format_ == "json":
        show(found, "json", sys.stdout)
    elif found:
        show(found, format_, sys.stderr if format_ == "text" else sys.stdout)
    if not found and not quiet and format_ == "text":
        click.echo(f"{clean} file{'s' if clean != 1 else ''} checked, nothing to report", err=True)
    if bad:
        raise click.exceptions.Exit(1)


def _one(
    name: str, chosen: dict[str, object], fix: bool, notes: bool = False
) -> tuple[Diagnostic, ...]:
    """Diagnostics of every method of a file, each reported once."""
    try:
        source = source_of(name)
    except CompileError as e:
        return e.diagnostics
    found = _all(source, chosen, notes)
    if fix and source.path is not None:
        edits = [e for d in found for f in d.fixes if f.safety == "safe" for e in f.edits]
        if edits:
            from pathlib import Path

            from opdsl.cli.fmt import write_atomically

            path = Path(source.path)
            write_atomically(path, apply(source.text, edits))
            click.echo(
                f"fixed {len(edits)} place{'s' if len(edits) != 1 else ''} in {display(path)}",
                err=True,
            )
            found = _all(source_of(name), chosen, notes)
    return found


def _all(source, chosen: dict[str, object], notes: bool) -> tuple[Diagnostic, ...]:
    from opdsl.meaning.limits import MAX_METHODS

    first = Compilation(source, None, chosen)
    found = [*first.diagnostics, *(first.notes if notes else ())]
    others = first.methods[:-1] if len(first.methods) <= MAX_METHODS else ()
    seen = {_key(d) for d in found}
    for d in (d for method in others for d in first.of(method).diagnostics):
        if _key(d) not in seen:
            seen.add(_key(d))
            found.append(d)
    return tuple(found)


def _key(d: Diagnostic) -> tuple:
    return d.code, d.primary.span.start, d.message


def _counts(d: Diagnostic, deny: tuple[str, ...]) -> bool:
    if d.severity is Severity.ERROR:
        return True
    if d.severity is Severity.WARNING and "warnings" in deny:
        return True
    return d.code in deny or d.slug in deny


def apply(text: str, edits: list) -> str:
    """The text with non-overlapping edits made, last first."""
    end = len(text) + 1
    for e in sorted(edits, key=lambda e: e.span.start, reverse=True):
        if e.span.end <= end:
            text = text[: e.span.start] + e.text + text[e.span.end :]
            end = e.span.start
    return text
