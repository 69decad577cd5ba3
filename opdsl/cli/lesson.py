"""The page of a diagnostic code on a terminal: headings, paragraphs, code, lists and tables.

Pages are written in the part of Markdown that `opdsl/pages` uses. Without colour the text carries
its structure by indents alone.
"""

from __future__ import annotations

import re

import click

from opdsl.wrapping import cells, wrapped

_INDENT = "  "
_CODE = "      "


def lesson(text: str, width: int, color: bool) -> str:
    """A page laid out in `width` columns; bold headings where colour is wanted."""
    lines = text.rstrip("\n").split("\n")
    out: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        stop = at + 1
        if line.startswith("```"):
            while stop < len(lines) and not lines[stop].startswith("```"):
                stop += 1
            out += [(_CODE + row).rstrip() for row in lines[at + 1 : stop]]
            stop += 1
        elif line.startswith("|"):
            while stop < len(lines) and lines[stop].startswith("|"):
                stop += 1
            out += _table(lines[at:stop], width)
        elif line.startswith("#"):
            out.append(_bold(line.lstrip("# "), color))
            if line.startswith("## ") and stop < len(lines) and not lines[stop]:
                stop += 1  # the heading stands right above its text
        elif line.startswith("- "):
            first, *rest = wrapped(line[2:], width - 4)
            out += [f"{_INDENT}- {first}", *(f"{_INDENT}  {row}" for row in rest)]
        else:
            rows = wrapped(re.sub(r"\*\*(.+?)\*\*", r"\1", line), width - len(_INDENT))
            out += [(_INDENT + row).rstrip() for row in rows]
        at = stop
    return "\n".join(out) + "\n"


def _bold(text: str, color: bool) -> str:
    return click.style(text, bold=True) if color else text


def _table(lines: list[str], width: int) -> list[str]:
    """Columns side by side; the last one takes what is left and is wrapped."""
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    rows = [row for row in rows if not set("".join(row)) <= set("-: ")]
    sizes = [max(cells(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lead = len(_INDENT) + sum(size + 3 for size in sizes)
    out: list[str] = []
    for row in rows:
        head = "".join(f"{part}{' ' * (size - cells(part) + 3)}" for part, size in zip(row, sizes))
        first, *rest = wrapped(row[-1], max(width - lead, 24))
        out += [_INDENT + head + first, *(" " * lead + part for part in rest)]
    return out
