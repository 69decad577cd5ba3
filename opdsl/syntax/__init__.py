"""Text to tree: `parse` and `read_source`, which never raise anything but a report.

Reading a file goes: tokens, outline (statements and brackets), then the LALR parser. When the
parser stops, the statement to blame is reported and left out, and the rest is parsed again; so
several mistakes give exactly that many reports, and the sections that are right have a tree.
"""

from __future__ import annotations

import stat
from pathlib import Path

from opdsl.diagnostics import CompileError, Diagnostic
from opdsl.records import replace
from opdsl.source import Source, Span
from opdsl.syntax import build, explain, lalr, messages, outline, recover, stops, tokens, tree
from opdsl.syntax.grammar import tables
from opdsl.syntax.keywords import ALL_KEYWORDS, METHOD_KEYWORDS

__all__ = ["decoded", "parse", "read_source"]

MAX_BYTES = 128 * 1024
MAX_REPORTS = 20
# Parsing again costs time in proportion to the tokens; a hopeless large text stops early.
_MAX_WORK = 400_000
_HOLE = "\ue000"


def parse(source: Source) -> tuple[tree.File | None, tuple[Diagnostic, ...]]:
    """The tree of a text and every syntax error in it, in the order of the text.

    With errors, the tree lacks the statements they are in (a method whose header is wrong is
    missing altogether). None when nothing can be said: a text too large or too deeply nested, or
    more than `MAX_REPORTS` errors.
    """
    if len(source.text) > MAX_BYTES or len(source.text.encode("utf-8", "replace")) > MAX_BYTES:
        whole = Source(source.name, "", source.path)  # its text is not worth keeping
        return None, (messages.too_large(Span(whole, 0, 0), MAX_BYTES),)
    words, comments = tokens.scan(source)
    out = outline.outline(words, tokens.MAX_DEPTH)
    if out.deepest is not None:
        deepest = out.deepest
        return None, (messages.too_deep(Span(source, deepest.start, deepest.end)),)
    found = _before_parsing(source, out)
    root = None
    work = 0
    first = not found
    starts: frozenset[int] = recover.starts(out) if found else recover.overrides(out)
    while len(found) < MAX_REPORTS and work <= _MAX_WORK:
        kept = recover.surviving(out, _HOLE)
        work += len(kept) + 1
        result = lalr.run(tables(), kept, starts)
        if isinstance(result, lalr.Node):
            root = result
            break
        if first:  # of a broken text, the outline knows better where statements begin
            first, starts = False, recover.starts(out)
            again = lalr.run(tables(), kept, starts)
            result = again if isinstance(again, lalr.Failure) else result
        if result.deep and result.token is not None:
            found.append(messages.too_deep(Span(source, result.token.start, result.token.end)))
            break
        found.append(_stopped(source, out, kept, result))
    if not any(s.keyword == "opd" for s in _top(out)) and _wants_header(out, found):
        found.append(messages.missing_header(source, words[0] if words else None))
    file = None
    if root is not None:
        file, more = _build(source, root, comments)
        found += more
        if found and file is not None:
            file = replace(file, lost=recover.lost(out, kept))
    found.sort(key=lambda d: (d.primary.span.start, d.code))
    return file, tuple(found[:MAX_REPORTS])


def _top(out: recover.Outline) -> list[recover.Statement]:
    return [s for s in out.statements if s.context == "file"]


def _wants_header(out: recover.Outline, found: list[Diagnostic]) -> bool:
    """Whether a missing header is a mistake of its own: not when the first line is unreadable."""
    if any(diagnostic.code == "OPD002" for diagnostic in found):
        return False
    first = out.statements[0] if out.statements else None
    return first is None or not first.bad or first.body is not None or first.keyword in ALL_KEYWORDS


def _before_parsing(source: Source, out: recover.Outline) -> list[Diagnostic]:
    """Bad tokens and unmatched brackets; their statements are left out from the start."""
    found = []
    open_text: set[int] = set()
    for token in out.tokens:
        if len(found) >= MAX_REPORTS:
            return found
        if token.kind == "bad":
            found.append(messages.lexical(source, token))
            statement = out.owner[token.at]
            recover.leave_out(out, statement, token.at)
            if token.reason == "unterminated" and statement is not None:
                open_text.add(statement.first)
    for problem in out.problems:
        # An open text may have swallowed the bracket that is missed.
        if problem.statement is None or problem.statement.first not in open_text:
            found.append(messages.bracket(source, out, problem))
    return found


def _stopped(
    source: Source, out: recover.Outline, kept: list[tokens.Token], failure: lalr.Failure
) -> Diagnostic:
    """Report where the parser stopped, and leave the statement to blame out of the next try."""
    accepted = lalr.accepts(tables(), failure)
    token = failure.token
    at = None if token is None else token.at
    index = len(kept) if token is None else kept.index(token)
    prev = kept[index - 1] if index else None
    before = out.owner[prev.at] if prev is not None else None
    statement = before if at is None else out.owner[at]
    if at is not None and statement is not None:
        starts = stops.at_statement_start(accepted)
        beginning = at == statement.first and index > 0
        closing = at == statement.closed
        if (beginning or closing) and not starts and before is not None:
            statement = before
    if statement is not None and statement.bad:  # already left out: drop the token itself
        statement = None
    stop = stops.Stop(source, out, token, prev, statement, accepted)
    if index > 1 and statement is not None and stops.swallowed(stop):
        # `x =` without a value took the name of the next line for it
        statement = out.owner[kept[index - 2].at]
        stop = stops.Stop(source, out, prev, kept[index - 2], statement, explain.A_VALUE)
    diagnostic = explain.explain(stop)
    if statement is None and at is None:
        out.dropped.update(range(len(out.tokens)))  # nothing to blame is left: give up the rest
    elif statement is not None and not stop.leaves:
        recover.leave_out(out, statement, at)
    else:
        recover.leave_out(out, statement, at if statement is None else None)
    if diagnostic.code == "OPD016" and statement is not None and statement.context == "file":
        _drop_run(out, statement)
    return diagnostic


def _drop_run(out: recover.Outline, first: recover.Statement) -> None:
    """Sections in a row outside a method are one mistake."""
    for statement in _top(out):
        if statement.first > first.first:
            if statement.keyword not in METHOD_KEYWORDS:
                return
            statement.bad = True


def _build(
    source: Source, root: lalr.Node, comments: tuple[tree.Comment, ...]
) -> tuple[tree.File | None, list[Diagnostic]]:
    deep = build.too_deep(root)
    if deep is not None:
        span = Span(source, max(deep.start, 0), max(deep.end, 0))
        return None, [messages.too_long(span, build.MAX_EXPRESSION_DEPTH)]
    builder = build.Builder(source)
    return builder.build(root, comments), builder.problems


def read_source(path: str | Path, name: str | None = None) -> Source:
    """The text of a file. Raises CompileError: OPD017 missing or unreadable, OPD010 not UTF-8,
    OPD008 too large. A byte order mark is dropped; `\\r\\n` is kept, so offsets stay true."""
    shown = name or str(path)
    place = Path(path)
    try:
        mode = place.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a pipe may wait for ever
            raise CompileError([messages.not_a_file(shown)])
        with place.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise CompileError([messages.unreadable(shown, place, error)]) from None
    return decoded(shown, data, str(path))


def decoded(shown: str, data: bytes, path: str | None = None) -> Source:
    """The bytes of a file as a source. Raises CompileError: OPD008, OPD010."""
    if len(data) > MAX_BYTES:
        raise CompileError([messages.too_large(Span(Source(shown, "", path), 0, 0), MAX_BYTES)])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CompileError([messages.not_utf8(shown, data, error)]) from None
    return Source(shown, text, path)
