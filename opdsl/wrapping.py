"""Text as a terminal shows it, in lines of its width.

Widths are counted in cells, as a terminal does: a wide character takes two, a combining mark none.
Code between backquotes, calls and indices stay on one line where they can, a line of two columns
(two spaces or more between them) breaks there first, and no line is left with one short word.
"""

from __future__ import annotations

import re
import unicodedata

# a gap, then a word; code, `f(a, b)` and `x[t + 1]` are one word
_PIECE = re.compile(r"(\s*)((?:`[^`\n]*`|(?<=\w)\([^()\n]*\)|(?<=\w)\[[^\[\]\n]*\]|\S)+)")
_WORD = re.compile(r"[^\s/\\]{61,}")
_COLUMNS = re.compile(r"(?<=\S) {2,}(?=\S)")
_SHORT = 12  # cells: a last line shorter than this takes a word from the one before
STEP = 4  # by how much the rest of a broken line is indented
_TAB = 4


def cells(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return len(text) if text.isascii() else sum(cell(ch) for ch in text)


def cell(ch: str) -> int:
    if ch.isascii():
        return 1
    if unicodedata.combining(ch):
        return 0
    return 2 if unicodedata.east_asian_width(ch) in "WF" else 1


def expanded(raw: str) -> tuple[str, list[int]]:
    """A source line as a terminal shows it, and the column at which each character starts."""
    out: list[str] = []
    columns = []
    at = 0
    for ch in raw:
        columns.append(at)
        if ch == "\t":
            piece, size = " " * _TAB, _TAB
        elif unicodedata.category(ch) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            piece, size = ("", 0) if ch == "\ufeff" else ("\ufffd", 1)
        else:
            piece, size = ch, cell(ch)
        out.append(piece)
        at += size
    columns.append(at)
    return "".join(out), columns


def trimmed(text: str, spans: list[tuple[int, int]], room: int) -> tuple[str, int]:
    """At most `room` columns of a long line around its underlined part, and the columns cut."""
    sizes = [cell(ch) for ch in text]
    total = sum(sizes)
    if total <= room:
        return text, 0
    low = min((a for a, _ in spans), default=0)
    start = 0 if low < room * 2 // 3 else low - room // 3
    at, taken, skipped = 0, [], 0
    for ch, size in zip(text, sizes):
        if at < start:
            skipped += size
        elif at + size > start + room - (3 if start else 2):
            break
        else:
            taken.append(ch)
        at += size
    head = "…" if skipped else ""
    tail = "…" if at < total else ""
    return head + "".join(taken) + tail, skipped - len(head)


def shortened(text: str, most: int = 600) -> str:
    """A text with the middle of endless words left out, and cut after `most` characters."""
    if len(text) > 60:
        text = _WORD.sub(lambda m: f"{m.group()[:40]}…{m.group()[-12:]}", text)
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def wrapped(text: str, room: int, first: int | None = None) -> list[str]:
    """Lines of at most `room` cells, the first of at most `first`; a longer word stays whole."""
    first = room if first is None else first
    if cells(text) <= first:
        return [text]
    columns = [m for m in _COLUMNS.finditer(text) if cells(text[: m.start()]) <= first]
    if columns:
        rest = wrapped(text[columns[-1].end() :], max(room - STEP, 8))
        return [text[: columns[-1].start()], *(" " * STEP + line for line in rest)]
    pieces = [(m.group(1), m.group(2)) for m in _PIECE.finditer(text)]
    pieces = [p for i, piece in enumerate(pieces) for p in _divided(piece, room if i else first)]
    lines: list[list[tuple[str, str]]] = [[]]
    used, limit = 0, first
    for gap, word in pieces:
        size = cells(gap) + cells(word)
        if lines[-1] and used + size > limit:
            lines.append([])
            used, limit, size, gap = 0, room, cells(word), ""
        lines[-1].append((gap, word))
        used += size
    while len(lines) > 1 and len(lines[-2]) > 2:
        last, (_, word) = lines[-1], lines[-2][-1]
        width = sum(cells(gap) + cells(part) for gap, part in last)
        if width >= _SHORT or cells(word) + 1 + width > room:
            break
        lines[-2].pop()
        lines[-1] = [("", word), (" ", last[0][1]), *last[1:]]
    return ["".join(gap + word for gap, word in line) for line in lines]


def _divided(piece: tuple[str, str], room: int) -> list[tuple[str, str]]:
    """Code between backquotes that is longer than a line breaks at its spaces after all."""
    gap, word = piece
    if cells(word) <= room or " " not in word:
        return [piece]
    return [(gap if i == 0 else " ", part) for i, part in enumerate(word.split(" "))]
