"""`opdsl list`: shipped methods by axis, the gallery of failures, the standard library, codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from opdsl.cli.listing import Item, as_json, as_markdown, text, width

SHELVES = ["specs", "failures", "std", "axes", "codes"]


@click.command("list")
@click.argument("what", type=click.Choice(SHELVES), default="specs")
@click.option(
    "--where",
    multiple=True,
    metavar="AXIS=VALUE",
    help="Only methods with it; also AXIS!=VALUE and AXIS~TEXT. Several: commas, or repeat.",
)
@click.option(
    "--format", "format_", type=click.Choice(["text", "json", "markdown"]), default="text"
)
@click.option(
    "--gallery",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write a page for each method, and their table, to DIR.",
)
def list_(what: str, where: tuple[str, ...], format_: str, gallery: Path | None) -> None:
    """List shipped methods, failures (known mistakes), std (the standard library), the axes that
    --where asks about, or the diagnostic codes.

    Values are read off what a spec computes, never off its name:
    opdsl list --where route=reward,credit=gae
    """
    if what != "specs" and (where or gallery):
        raise click.UsageError(f"--where and --gallery go with methods, not with {what}")
    if gallery is not None:
        if where or format_ != "text":
            raise click.UsageError("--gallery writes every method, in Markdown")
        _write_gallery(gallery)
        return
    if what == "specs":
        _methods(where, format_)
        return
    rows, item = {
        "failures": (_failures, _failure_item),
        "std": (_std, _std_item),
        "axes": (_axes, _axis_item),
        "codes": (_codes, _code_item),
    }[what]
    _print(rows(), item, format_)


# ---- methods -------------------------------------------------------------------------------------


def _methods(where: tuple[str, ...], format_: str) -> None:
    from opdsl.formula import library

    try:
        wanted = library.conditions(where)
        whole = format_ != "text" or library.needs_passport(wanted)
        with _progress() as tell:
            entries, broken = library.entries(whole, tell)
        found = library.chosen(entries, wanted)
    except library.QueryError as error:
        raise click.UsageError(str(error)) from None
    for path in broken:
        click.echo(f"left out: {path} has errors; see opdsl check", err=True)
    if not found and format_ != "json":
        click.echo(f"no method has {' and '.join(where)}" if where else "no method ships")
        return
    if format_ == "json":
        click.echo(as_json([e.to_json() for e in found]))
    elif format_ == "markdown":
        from opdsl.formula.table import table

        click.echo(table(found), nl=False)
    else:
        from opdsl.formula.vocabulary import SHELVES as ABOUT

        asked = list(dict.fromkeys(c.axis for c in wanted))
        items = [_item(e, asked) for e in library.shelved(found)]
        click.echo(text(items, width(), ABOUT))
        click.echo(f"\n{len(found)} of {len(entries)} methods")


USUAL = ("route", "feedback", "credit")


def _item(e, asked: list[str]) -> Item:
    """An entry of the list: the usual axes, what was asked about, evidence and source."""
    facts = [", ".join(v for v in e.values(a) if v != "none") for a in USUAL]
    known = (*USUAL, "group", "evidence", "name", "title", "source")
    facts += [f"{a}: {', '.join(e.values(a)) or 'none'}" for a in asked if a not in known]
    return Item(e.name, e.title, tuple(f for f in (*facts, e.evidence, *e.sources) if f), e.group)


def _write_gallery(folder: Path) -> None:
    from opdsl.formula.gallery import gallery

    with _progress() as tell:
        written = gallery(folder, tell)
    click.echo(f"{len(written)} files in {folder}")


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on a terminal's stderr while methods are compiled; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("reading the library") as status:
        yield lambda name: status.update(f"reading the library: {name}")


# ---- the other shelves ---------------------------------------------------------------------------


def _failures() -> list[dict[str, object]]:
    from opdsl.compilation import Compilation
    from opdsl.resources import specs
    from opdsl.syntax import read_source

    out = []
    for path in sorted((specs() / "failures").glob("*.opd")):
        compilation = Compilation(read_source(path))
        if compilation.spec is None:
            continue
        accepted = {d.code: d.slug for d in compilation.diagnostics if d.overridden}
        out.append(
            {
                "name": path.stem,
                "title": compilation.spec.title or "",
                "reported": ", ".join(f"{c} {slug}" for c, slug in sorted(accepted.items())),
            }
        )
    return out


def _std() -> list[dict[str, object]]:
    from opdsl.meaning.arguments import signature
    from opdsl.resources import specs
    from opdsl.syntax import parse, read_source, tree

    out = []
    for path in sorted([*specs().glob("std/*.opd"), *specs().glob("recipes/*.opd")]):
        file, _ = parse(read_source(path))
        for item in file.items if file else ():
            if isinstance(item, tree.Def):
                place = path.stem if path.parent.name == "std" else f"recipes/{path.stem}"
                row = {"file": place, "definition": signature(item), "meaning": item.doc or ""}
                out.append(row)
    return out


def _axes() -> list[dict[str, object]]:
    from opdsl.formula.library import entries, values_of
    from opdsl.formula.vocabulary import AXES

    found, _ = entries()
    return [
        {"axis": axis, "meaning": text, "values": ", ".join(values_of(axis, found))}
        for axis, text in AXES.items()
    ]


def _codes() -> list[dict[str, object]]:
    from opdsl.codes import CODES

    return [
        {"code": c.code, "name": c.slug, "severity": str(c.severity), "rule": c.rule or ""}
        for c in CODES.values()
    ]


# ---- printing ------------------------------------------------------------------------------------


def _print(rows: list[dict[str, object]], item: Callable[[dict], Item], format_: str) -> None:
    if format_ == "json":
        click.echo(as_json(rows))
    elif format_ == "markdown":
        click.echo(as_markdown(rows))
    else:
        click.echo(text([item(row) for row in rows], width()))


def _failure_item(row: dict) -> Item:
    return Item(row["name"], row["title"], tuple(filter(None, row["reported"].split(", "))))


def _std_item(row: dict) -> Item:
    return Item(row["definition"], row["meaning"], shelf=row["file"])


def _axis_item(row: dict) -> Item:
    return Item(row["axis"], row["meaning"], (row["values"],))


def _code_item(row: dict) -> Item:
    words = (row["name"], row["severity"], row["rule"])
    return Item(row["code"], " · ".join(str(w) for w in words if w))
