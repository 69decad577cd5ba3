"""A small pretty printer: documents that are laid out flat where they fit, broken where not.

After Wadler, "A prettier printer" (2003), reduced to what the formatter needs. A document is a
string, a `Line`, or one of the classes below; a group is flat if it fits the rest of the line
and holds no hard line.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """A possible line break: `flat` is printed in a flat group; a hard one always breaks."""

    flat: str = " "
    hard: bool = False


@dataclass(frozen=True, slots=True)
class Cat:
    parts: tuple[Doc, ...]


@dataclass(frozen=True, slots=True)
class Nest:
    by: int
    doc: Doc


@dataclass(frozen=True, slots=True)
class Group:
    doc: Doc


@dataclass(frozen=True, slots=True)
class Alt:
    """One text where the group is broken, another where it is flat (padding, mostly)."""

    broken: str
    flat: str


Doc = str | Line | Cat | Nest | Group | Alt

SPACE = Line()
SOFT = Line("")
HARD = Line("", True)


def cat(*parts: Doc) -> Cat:
    return Cat(parts)


def join(separator: Doc, docs: list[Doc]) -> Cat:
    parts: list[Doc] = []
    for i, doc in enumerate(docs):
        parts += [separator, doc] if i else [doc]
    return Cat(tuple(parts))


def layout(doc: Doc, indent: int, column: int, width: int) -> str:
    """The text of a document that begins at `column`; broken lines start at `indent`."""
    out: list[str] = []
    stack: list[tuple[int, bool, Doc]] = [(indent, False, doc)]  # indent, flat, document
    while stack:
        at, flat, item = stack.pop()
        if isinstance(item, str):
            out.append(item)
            column += len(item)
        elif isinstance(item, Alt):
            text = item.flat if flat else item.broken
            out.append(text)
            column += len(text)
        elif isinstance(item, Line):
            if flat and not item.hard:
                out.append(item.flat)
                column += len(item.flat)
            else:
                while out and out[-1].strip(" ") == "" and "\n" not in out[-1]:
                    out.pop()
                if out:
                    out[-1] = out[-1].rstrip(" ")
                out.append("\n" + " " * at)
                column = at
        elif isinstance(item, Cat):
            stack.extend((at, flat, part) for part in reversed(item.parts))
        elif isinstance(item, Nest):
            stack.append((at + item.by, flat, item.doc))
        else:
            stack.append((at, flat or _fits(item.doc, width - column, stack), item.doc))
    return "".join(out)


def _fits(doc: Doc, room: int, rest: list[tuple[int, bool, Doc]]) -> bool:
    """Whether a document, and what follows it up to the next break, fits flat."""
    todo: list[tuple[bool, Doc]] = [(flat, item) for _, flat, item in rest]
    todo.append((True, doc))
    inside = len(todo) - 1  # documents above this height belong to the group itself
    while todo and room >= 0:
        own = len(todo) > inside
        flat, item = todo.pop()
        if isinstance(item, str):
            room -= len(item)
        elif isinstance(item, Alt):
            room -= len(item.flat if flat else item.broken)
        elif isinstance(item, Line):
            if item.hard:
                return not own
            if not flat:
                return True
            room -= len(item.flat)
        elif isinstance(item, Cat):
            todo.extend((flat, part) for part in reversed(item.parts))
        elif isinstance(item, (Nest, Group)):
            todo.append((flat, item.doc))
    return room >= 0
