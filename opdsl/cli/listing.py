"""Lists as a terminal, a pipe or a program reads them.

A list of names is laid out in entries rather than in cells: the name and what it is on one line,
what else is known below it, both wrapped. It can be read at any width from 50 columns.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from opdsl.wrapping import cells, wrapped

NARROW, WIDE = 50, 120
NAMES = 24  # cells: a longer name has a line of its own


@dataclass(frozen=True)
class Item:
    """name: what it is called. title: what it is. facts: what else is known, each one word or
    phrase. shelf: the heading it stands under."""

    name: str
    title: str
    facts: tuple[str, ...] = ()
    shelf: str = ""


def width() -> int:
    """Columns of the terminal, or those that COLUMNS says; 100 where nothing says."""
    return max(NARROW, min(shutil.get_terminal_size((100, 24)).columns, WIDE))


def text(items: Sequence[Item], columns: int, shelves: dict[str, str] | None = None) -> str:
    """Items one below the other. shelves: heading -> what it holds; items of one shelf follow
    one another under its heading."""
    names = [cells(i.name) for i in items if cells(i.name) <= NAMES]
    column = 2 + max(names, default=2) if len(names) * 2 > len(items) else 4
    margin = "  " if any(i.shelf for i in items) else ""
    out: list[str] = []
    shelf = None
    for item in items:
        if item.shelf != shelf:
            shelf = item.shelf
            about = (shelves or {}).get(shelf, "")
            out += [
                *([""] if out else []),
                *wrapped(f"{shelf}: {about}" if about else shelf, columns),
            ]
        out += [margin + line for line in _item(item, column, columns - len(margin))]
    return "\n".join(out)


def _item(item: Item, column: int, columns: int) -> list[str]:
    indent, room = " " * column, columns - column
    below = wrapped(item.title, room) if item.title else []
    facts = _joined(item.facts, room)
    if cells(item.name) + 2 > column or not below:
        name = wrapped(item.name, columns)
        return [*name, *(indent + line for line in (*below, *facts))]
    gap = " " * (column - cells(item.name))
    return [item.name + gap + below[0], *(indent + line for line in (*below[1:], *facts))]


def _joined(facts: Iterable[str], room: int) -> list[str]:
    """Facts between dots; one that does not fit starts a line."""
    lines: list[str] = []
    for fact in facts:
        if lines and cells(lines[-1]) + 3 + cells(fact) <= room:
            lines[-1] += f" · {fact}"
        else:
            lines += wrapped(fact, room)
    return lines


def as_json(rows: Sequence[dict[str, object]]) -> str:
    return json.dumps(rows, indent=2, ensure_ascii=False)


def as_markdown(rows: Sequence[dict[str, object]]) -> str:
    """A table whose columns are the keys of the rows."""
    heads = list(rows[0]) if rows else []
    out = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        values = (str(v).replace("|", "\\|").replace("\n", " ") for v in row.values())
        out.append("| " + " | ".join(values) + " |")
    return "\n".join(out)
