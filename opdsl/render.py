"""Diagnostics as text for people, as JSON, and as annotations for a forge.

The text form shows the user's own line with carets under the mistake; further labels point at
the other half of a conflict. It fits 80 columns, or the terminal it is printed on. It needs no
third-party package; colour comes from rich, and only when it is asked for.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TextIO

from opdsl.diagnostics import Diagnostic, Edit, Label, Safety, Severity
from opdsl.source import NOWHERE, Span
from opdsl.wrapping import STEP, cells, expanded, shortened, trimmed, wrapped

WIDTH = 80
_NARROW, _WIDE = 50, 100  # what a terminal's width may change it to
_BESIDE = 30  # cells a label needs beside its carets; with less it stands below them
_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.NOTE: "bold cyan"}


def render(
    diagnostics: Iterable[Diagnostic], format: str = "text", color: bool = False, width: int = WIDTH
) -> str:
    """All diagnostics in one of the formats text, json, github. ValueError for another."""
    items = list(diagnostics)
    if format == "text":
        return render_text(items, color=color, width=width)
    if format == "json":
        return render_json(items)
    if format == "github":
        return render_github(items)
    raise ValueError(f"unknown format {format!r}: use text, json or github")


def wants_color(stream: TextIO) -> bool:
    """Whether a stream should get colour: a terminal, no NO_COLOR, and not a dumb one."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return bool(getattr(stream, "isatty", lambda: False)())


def width_of(stream: TextIO) -> int:
    """The columns to fill on a stream: those of the terminal, within reason, else `WIDTH`."""
    if not getattr(stream, "isatty", lambda: False)():
        return WIDTH
    columns = shutil.get_terminal_size((WIDTH, 24)).columns
    return max(_NARROW, min(columns, _WIDE))


# ---- text --------------------------------------------------------------------------------


def render_text(
    diagnostics: Iterable[Diagnostic], *, color: bool = False, width: int = WIDTH
) -> str:
    """The report as a terminal shows it, with one blank line between diagnostics."""
    blocks = [_block(diagnostic, width) for diagnostic in diagnostics]
    if color and not os.environ.get("NO_COLOR"):
        return "\n".join(_colored(block) for block in blocks)
    return "\n".join("".join(line.text + "\n" for line in block) for block in blocks)


def summary(diagnostics: Iterable[Diagnostic]) -> str:
    """`3 errors, 1 warning`; overridden ones are counted apart; "" when there is nothing."""
    counts = {severity: 0 for severity in Severity}
    overridden = 0
    for diagnostic in diagnostics:
        if diagnostic.overridden is not None:
            overridden += 1
        else:
            counts[diagnostic.severity] += 1
    parts = [f"{n} {s.value}{'s' if n > 1 else ''}" for s, n in counts.items() if n]
    if overridden:
        parts.append(f"{overridden} accepted")
    return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class _Line:
    """One output line; `marks` are (start, stop, style) ranges for colour."""

    text: str
    marks: tuple[tuple[int, int, str], ...] = ()


def _block(diagnostic: Diagnostic, width: int) -> list[_Line]:
    labels = [diagnostic.primary, *diagnostic.secondary]
    shown = [label for label in labels if label.span.source.text]
    numbers = [label.span.line for label in shown]
    gutter = max([2, *(len(str(number)) for number in numbers)])
    style = _STYLES[diagnostic.severity]
    lines = _heading(diagnostic, style, width)
    main = diagnostic.primary.span
    bare = not main.source.text
    place = main.source.name if bare else f"{main.source.name}:{main.line}:{main.column}"
    if main is not NOWHERE:
        lines.append(_Line(f"{' ' * gutter}--> {clean(place)}", ((gutter, gutter + 3, "blue"),)))
    if shown:
        lines += _excerpts(diagnostic, shown, gutter, width, style)
    elif diagnostic.primary.text:
        head = f"{' ' * gutter} = "
        text = shortened(clean(diagnostic.primary.text))
        rows = wrapped(text, width - len(head))
        lines += [_Line((head if i == 0 else " " * len(head)) + row) for i, row in enumerate(rows)]
    lines += _remarks(diagnostic, gutter, width)
    return lines


def _heading(diagnostic: Diagnostic, style: str, width: int) -> list[_Line]:
    kind = diagnostic.severity.value
    if diagnostic.overridden is not None:
        kind, style = "accepted", "bold green"
    head = f"{kind}[{diagnostic.code}]"
    text = f"{head} {diagnostic.slug}: {shortened(clean(diagnostic.message))}"
    first, *rest = wrapped(text, width - STEP, width)
    lines = [_Line(first, ((0, len(head), style), (len(head), len(first), "bold")))]
    for row in rest:
        lines.append(_Line(" " * STEP + row, ((STEP, STEP + len(row), "bold"),)))
    return lines


def _remarks(diagnostic: Diagnostic, gutter: int, width: int) -> list[_Line]:
    """Notes, helps, fixes that no help mentions, and where to read more."""
    remarks = [("note", note) for note in diagnostic.notes]
    if diagnostic.overridden is not None:
        remarks.append(("note", f"accepted: {diagnostic.overridden}"))
    remarks += [("help", text) for text in diagnostic.helps]
    for fix in diagnostic.fixes:
        if fix.safety is Safety.SAFE and not any("--fix" in text for text in diagnostic.helps):
            remarks.append(("help", f"`--fix` will {fix.title} for you"))
        elif fix.safety is not Safety.SAFE and not diagnostic.helps:
            remarks.append(("help", fix.title))
    remarks.append(("more", f"opdsl explain {diagnostic.code}"))
    lines = []
    margin = " " * gutter
    for kind, text in remarks:
        head = f"{margin} = {kind}: "
        rows = shortened(clean(text, newlines=True), 2000).split("\n")
        first, *rest = [part for row in rows for part in wrapped(row, width - len(head))]
        marks = ((gutter + 1, gutter + 2, "blue"), (gutter + 3, gutter + 3 + len(kind), "bold"))
        lines.append(_Line((head + first).rstrip(), marks))
        lines += [_Line((" " * len(head) + line).rstrip()) for line in rest]
    return lines


def _excerpts(
    diagnostic: Diagnostic, shown: list[Label], gutter: int, width: int, style: str
) -> list[_Line]:
    """The source lines that labels point at, in order, one part per source file."""
    bar = _Line(f"{' ' * gutter} |", ((gutter + 1, gutter + 2, "blue"),))
    lines: list[_Line] = []
    sources = list(dict.fromkeys(label.span.source for label in shown))
    home = diagnostic.primary.span.source
    sources.sort(key=lambda source: source is not home)
    for source in sources:
        if source is not home:
            first = next(label.span for label in shown if label.span.source is source)
            where = clean(f"{source.name}:{first.line}:{first.column}")
            lines.append(_Line(f"{' ' * gutter}::: {where}", ((gutter, gutter + 3, "blue"),)))
        lines.append(bar)
        by_line: dict[int, list[Label]] = {}
        for label in shown:
            if label.span.source is source:
                by_line.setdefault(label.span.line, []).append(label)
        previous = None
        for number in sorted(by_line):
            if previous is not None and number == previous + 2:
                lines += _excerpt(source.line(number - 1), number - 1, [], gutter, width, "", None)
            elif previous is not None and number > previous + 1:
                lines.append(_Line("..."))
            lines += _excerpt(
                source.line(number), number, by_line[number], gutter, width, style,
                diagnostic.primary,
            )  # fmt: skip
            previous = number
    lines.append(bar)
    return lines


def _excerpt(
    raw: str, number: int, labels: list[Label], gutter: int, width: int, style: str,
    primary: Label | None,
) -> list[_Line]:  # fmt: skip
    """One source line and the underlines below it, the primary first."""
    room = max(width - gutter - 3, 20)
    ranges = []  # of the labels, in characters of the line
    for label in labels:
        start = min(label.span.column - 1, len(raw))
        same_line = label.span.end <= label.span.start + len(raw) - start
        stop = min(start + label.span.end - label.span.start, len(raw)) if same_line else len(raw)
        ranges.append((start, stop, label))
    cut = max(0, min((start for start, _, _ in ranges), default=0) - 4 * room)
    raw = raw[cut : cut + 12 * room]  # what may be shown of an endless line
    text, columns = expanded(raw)
    spans = []
    for start, stop, label in ranges:
        a, b = (columns[min(max(0, at - cut), len(raw))] for at in (start, stop))
        spans.append((a, max(b, a + 1), label))
    text, shift = trimmed(text, [(a, b) for a, b, _ in spans], room)
    margin = f"{number:>{gutter}} | "
    lines = [_Line((margin + text).rstrip(), ((0, gutter + 2, "blue"),))]
    spans.sort(key=lambda item: (item[2] is not primary, item[0]))
    for start, stop, label in spans:
        mark = "^" if label is primary else "-"
        start, stop = min(max(0, start - shift), room - 1), max(1, stop - shift)
        end = min(max(stop, start + 1), max(room, start + 1))
        shade = style if label is primary else "bold blue"
        lines += _underlined(label, mark, start, end, gutter, room, shade)
    return lines


def _underlined(
    label: Label, mark: str, start: int, end: int, gutter: int, room: int, shade: str
) -> list[_Line]:
    """The underline from column `start` to `end`, its label beside it or, for want of room, below."""
    text = shortened(clean(label.text))
    bar = f"{' ' * gutter} | "
    beside, below, size = room - end - 1, room - start, cells(text)
    if size <= beside or (size > below and beside >= _BESIDE):
        first, *rest = wrapped(text, max(beside, 1)) if text else [""]
        rows = [" " * start + f"{mark * (end - start)} {first}".rstrip()]
        rows += [" " * (end + 1) + row for row in rest]
    else:
        at = max(0, min(start, room - max(_BESIDE, min(size, room))))
        rows = [" " * start + mark * (end - start)]
        rows += [" " * at + row for row in wrapped(text, room - at)]
    made = []
    for row in rows:
        lead = len(bar) + len(row) - len(row.lstrip(" "))
        marks = ((gutter + 1, gutter + 2, "blue"), (lead, len(bar) + len(row), shade))
        made.append(_Line(bar + row, marks))
    return made


def clean(text: str, newlines: bool = False) -> str:
    """Text without control characters, so that a file name or a spec cannot drive a terminal."""
    if text.isprintable():
        return text
    return "".join(
        ch if ch.isprintable() or (newlines and ch == "\n") else " " if ch in "\n\t" else "\ufffd"
        for ch in text
    )


def _colored(block: list[_Line]) -> str:
    import io

    from rich.console import Console
    from rich.text import Text

    console = Console(
        file=io.StringIO(), force_terminal=True, color_system="standard", width=10_000,
        highlight=False, emoji=False, markup=False, legacy_windows=False,
    )  # fmt: skip
    for line in block:
        text = Text(line.text)
        for start, stop, style in line.marks:
            text.stylize(style, start, stop)
        console.print(text, soft_wrap=True)
    return console.file.getvalue()  # type: ignore[attr-defined]


# ---- machine formats ---------------------------------------------------------------------


def _place(span: Span) -> dict[str, Any]:
    line, column = span.source.position(span.start)
    end_line, end_column = span.source.position(span.end)
    return {
        "file": span.source.path or span.source.name, "line": line, "column": column,
        "end_line": end_line, "end_column": end_column, "start": span.start, "end": span.end,
    }  # fmt: skip


def _edit(edit: Edit) -> dict[str, Any]:
    return {**_place(edit.span), "text": edit.text}


def as_json(diagnostic: Diagnostic) -> dict[str, Any]:
    """One diagnostic as plain values; lines and columns count from 1, offsets from 0."""
    return {
        "code": diagnostic.code,
        "slug": diagnostic.slug,
        "severity": diagnostic.severity.value,
        "message": diagnostic.message,
        **_place(diagnostic.primary.span),
        "label": diagnostic.primary.text,
        "secondary": [{**_place(s.span), "label": s.text} for s in diagnostic.secondary],
        "notes": list(diagnostic.notes),
        "helps": list(diagnostic.helps),
        "fixes": [
            {"title": f.title, "safety": f.safety.value, "edits": [_edit(e) for e in f.edits]}
            for f in diagnostic.fixes
        ],
        "rule": diagnostic.rule,
        "overridden": diagnostic.overridden,
    }


def render_json(diagnostics: Iterable[Diagnostic]) -> str:
    """A JSON array, one object per diagnostic."""
    items = [as_json(diagnostic) for diagnostic in diagnostics]
    return json.dumps(items, indent=2, ensure_ascii=False) + "\n"


def render_github(diagnostics: Iterable[Diagnostic]) -> str:
    """Workflow commands: one annotation per diagnostic, at its primary span."""
    kinds = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.NOTE: "notice"}
    lines = []
    for diagnostic in diagnostics:
        place = _place(diagnostic.primary.span)
        kind = "notice" if diagnostic.overridden is not None else kinds[diagnostic.severity]
        fields = {
            "file": place["file"], "line": place["line"], "endLine": place["end_line"],
            "col": place["column"], "endColumn": place["end_column"],
            "title": f"{diagnostic.code} {diagnostic.slug}",
        }  # fmt: skip
        parts = [diagnostic.message]
        if diagnostic.primary.text:
            parts.append(diagnostic.primary.text)
        parts += [f"note: {note}" for note in diagnostic.notes]
        parts += [f"help: {text}" for text in diagnostic.helps]
        properties = ",".join(f"{k}={_escape(str(v), True)}" for k, v in fields.items())
        lines.append(f"::{kind} {properties}::{_escape(chr(10).join(parts))}")
    return "".join(line + "\n" for line in lines)


def _escape(text: str, prop: bool = False) -> str:
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if prop else text
