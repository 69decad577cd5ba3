"""`opdsl list`: the shipped specs, the gallery of failures, the standard library, the codes."""

from __future__ import annotations

import json

import click


@click.command("list")
@click.argument("what", type=click.Choice(["specs", "failures", "std", "codes"]), default="specs")
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text")
def list_(what: str, format_: str) -> None:
    """List shipped specs, failures (known mistakes), std (the standard library)
    or the diagnostic codes."""
    rows = {"specs": _specs, "failures": _failures, "std": _std, "codes": _codes}[what]()
    if format_ == "json":
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    import sys

    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(rows[0] if rows else ()):
        table.add_column(column, no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*(str(v) for v in row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _specs() -> list[dict[str, object]]:
    from opdsl.compilation import Compilation
    from opdsl.resources import specs
    from opdsl.syntax import read_source

    out = []
    for path in sorted(specs().glob("**/*.opd")):
        if path.parent.name in ("std", "failures"):
            continue
        compilation = Compilation(read_source(path))
        spec = compilation.spec
        if spec is None:
            continue
        credit = next((t.credit for t in spec.terms if t.credit), "–")
        out.append(
            {
                "name": path.stem,
                "title": spec.title or "",
                "route": "+".join(dict.fromkeys(t.route for t in spec.feedback_terms)),
                "credit": credit.split("(")[0],
                "evidence": spec.evidence or "",
                "source": ", ".join(v for _, v in spec.cites),
            }
        )
    return out


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
    for path in sorted((specs() / "std").glob("*.opd")):
        file, _ = parse(read_source(path))
        for item in file.items if file else ():
            if isinstance(item, tree.Def):
                out.append(
                    {"file": path.stem, "definition": signature(item), "meaning": item.doc or ""}
                )
    return out


def _codes() -> list[dict[str, object]]:
    from opdsl.codes import CODES

    return [
        {"code": c.code, "name": c.slug, "severity": str(c.severity), "rule": c.rule or ""}
        for c in CODES.values()
    ]
