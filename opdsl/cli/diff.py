"""`opdsl diff A B`: same, equal as tested, or different with the smallest witness."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from opdsl.cli.common import compiled, settings
from opdsl.compilation import Compilation
from opdsl.diagnostics import CompileError


@click.command(short_help="Are two methods the same, and where do they differ?")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--format", "format_", type=click.Choice(["text", "json", "markdown"]), default="text"
)
@click.option("--set", "both", multiple=True, metavar="NAME=VALUE", help="Set a knob of both.")
@click.option("--set-a", "only_a", multiple=True, metavar="NAME=VALUE", help="Set a knob of A.")
@click.option("--set-b", "only_b", multiple=True, metavar="NAME=VALUE", help="Set a knob of B.")
@click.option("--method-a", metavar="NAME", help="Which method of A's file. [the last]")
@click.option("--method-b", metavar="NAME", help="Which method of B's file. [the last]")
def diff(
    a: str, b: str, format_: str, both: tuple[str, ...], only_a: tuple[str, ...],
    only_b: tuple[str, ...], method_a: str | None, method_b: str | None,
) -> None:  # fmt: skip
    """Compare two methods: files, shipped specs, FILE@METHOD, or - for standard input.

    Prints a verdict, the axes and passport rows that differ, a witness, and knob values at which
    the two coincide. Exit code 0 if they are the same or equal as tested, 1 if they differ.
    """
    if a == b == "-":
        raise click.UsageError("standard input holds one spec: give the other by name")
    pairs = settings(both)
    wanted = (
        (a, {**pairs, **settings(only_a)}, method_a),
        (b, {**pairs, **settings(only_b)}, method_b),
    )
    left, right = _both(wanted)
    from opdsl.formula.diff import difference
    from opdsl.formula.diff_text import render

    with _progress() as tell:
        found = difference(left, right, tell)
    click.echo(render(found, format_), nl=False)
    if not found.equal:
        raise click.exceptions.Exit(1)


def _both(wanted: tuple) -> list[Compilation]:
    """Both compilations. Raises CompileError with the reports of both sides."""
    out, reports = [], []
    for name, chosen, method in wanted:
        try:
            out.append(compiled(*_where(name, chosen, method)))
        except CompileError as e:
            reports += [d for d in e.diagnostics if d not in reports]
    if reports:
        raise CompileError(reports)
    return out


def _where(name: str, chosen: dict, method: str | None) -> tuple[str, dict, str | None]:
    """FILE@METHOD, unless a file has that very name."""
    path, at, inner = name.rpartition("@")
    if at and path and inner and not Path(name).is_file():
        if method not in (None, inner):
            raise click.UsageError(f"{name} and --method say two methods: {inner}, {method}")
        return path, chosen, inner
    return name, chosen, method


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on a terminal's stderr while it works; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("comparing") as status:
        yield lambda what: status.update(f"comparing: {what}")
