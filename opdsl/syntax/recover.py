"""What to leave out of a broken text, so that the rest of it still has a tree.

`outline.py` finds statements and brackets; here are its results, and what recovery makes of
them: the tokens that survive when bad statements are gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from opdsl.syntax.keywords import (
    ALL_KEYWORDS,
    METHOD_KEYWORDS,
    TOP_KEYWORDS,
    canonical,
    close,
)
from opdsl.syntax.tokens import Token

# The words that begin statements, by the place they stand in.
WORDS = {
    "file": frozenset(TOP_KEYWORDS + METHOD_KEYWORDS),
    "method": frozenset(METHOD_KEYWORDS),
    "term": frozenset(METHOD_KEYWORDS),
    "block": frozenset(("sweep",)),
    "def": frozenset(("return",)),
}


@dataclass(slots=True, eq=False)
class Statement:
    """Tokens `first` to `last` (exclusive) of one statement inside `context`.

    `keyword` is its first word (after `override`), known or not; `body` the position of the `{`
    that opens its block, `kind` the kind of block and `closed` the position of its `}`, if it
    has one. `bad` statements are left out of the parse.
    """

    keyword: str
    first: int
    context: str  # file | method | term | block | def
    parent: Statement | None
    last: int = -1
    body: int | None = None
    kind: str = ""
    closed: int | None = None
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """A bracket that does not match; `where` is the token that showed it, None at the end."""

    kind: str  # unclosed | stray | mismatch | unopened
    token: Token
    where: Token | None
    statement: Statement | None


@dataclass(slots=True)
class Outline:
    tokens: list[Token]
    statements: list[Statement] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    owner: list[Statement | None] = field(default_factory=list)
    dropped: set[int] = field(default_factory=set)  # stray brackets
    closers: list[tuple[int, int]] = field(default_factory=list)  # missing `}`: place, opener
    depth: int = 0
    deepest: Token | None = None  # the first opening bracket beyond the deepest allowed


def starts(out: Outline) -> frozenset[int]:
    """Positions of the words that begin statements and so must be keywords."""
    return frozenset(
        s.first for s in out.statements
        if s.context not in ("block", "def") or out.tokens[s.first].text in WORDS[s.context]
    )  # fmt: skip


def overrides(out: Outline) -> frozenset[int]:
    """Positions of the words `override` that begin statements: `gate` without a value must not
    take one for a name, for the section after it would then stand for itself."""
    return frozenset(s.first for s in out.statements if out.tokens[s.first].text == "override")


def leave_out(out: Outline, statement: Statement | None, at: int | None) -> None:
    """Leave a statement out of the parse; of text after its closing `}`, only that text.

    A definition cannot lose its `return` and stay: it goes altogether.
    """
    if statement is None:
        if at is not None:
            out.dropped.add(at)
    elif (
        statement.context == "def"
        and statement.parent is not None
        and (close(statement.keyword, ("return",)) or statement.last == statement.parent.closed)
    ):
        statement.parent.bad = True
    elif at is not None and statement.closed is not None and at > statement.closed:
        out.dropped.update(range(statement.closed + 1, statement.last))
    else:
        statement.bad = True


def surviving(out: Outline, hole: str) -> list[Token]:
    """The tokens without bad statements; a bad method header becomes one `HOLE` token."""
    skip = [False] * len(out.tokens)
    for i in out.dropped:
        skip[i] = True
    holes: dict[int, bool] = {}  # position: whether the `{` is missing as well
    for statement in out.statements:
        if not statement.bad:
            continue
        stop = statement.last
        in_file = statement.context == "file"
        if statement.kind == "method" and statement.body is not None and in_file:
            stop = statement.body
            if not skip[statement.first]:
                holes[statement.first] = out.tokens[stop].text != "{"
        for i in range(statement.first, stop):
            skip[i] = True
    missing: dict[int, int] = {}
    for place, opener in out.closers:
        if not skip[opener]:
            missing[place] = missing.get(place, 0) + 1
    kept: list[Token] = []
    for i, token in enumerate(out.tokens):
        for _ in range(missing.get(i, 0)):
            kept.append(_made("RBRACE", "}", i, token.start))
        if i in holes:
            kept.append(_made("HOLE", hole, i, token.start))
            if holes[i]:
                kept.append(_made("LBRACE", "{", i, token.start))
        if not skip[i] and token.kind != "bad":
            kept.append(token)
    end = out.tokens[-1].end if out.tokens else 0
    for _ in range(missing.get(len(out.tokens), 0)):
        kept.append(_made("RBRACE", "}", len(out.tokens) - 1, end))
    return kept


ANYTHING = "*"  # among lost words: what was lost may have been any statement


def lost(out: Outline, kept: list[Token]) -> frozenset[str]:
    """The words of a text that are not in its tree, with the keywords they may stand for.

    A later pass misses what they declared; it says nothing about a name that is among them.
    """
    there = {token.at for token in kept}
    gone = [token for token in out.tokens if token.at not in there]
    words = {token.text for token in gone if token.kind == "word"}
    for statement in out.statements:
        if not statement.bad or statement.keyword in ALL_KEYWORDS:
            continue
        guesses = close(statement.keyword, list(WORDS[statement.context]))
        words |= set(guesses) or {ANYTHING}
    if any(token.text in ("{", "}") for token in gone) or out.closers:
        words.add(ANYTHING)
    return frozenset(canonical(word) for word in words)


def _made(type_: str, text: str, at: int, offset: int) -> Token:
    token = Token("op", type_, text, offset, offset, False)
    token.at = at
    return token
