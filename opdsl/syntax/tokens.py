"""Text to tokens, without deciding yet which words are keywords.

The parser decides that: a word is a keyword exactly where the grammar can use one. Comments go
beside the token list. Whatever cannot be a token becomes a `bad` token with a reason; the parse
goes on around it.
"""

from __future__ import annotations

import re
from functools import cache

from opdsl.source import Source, Span
from opdsl.syntax.tree import Comment

MAX_DEPTH = 64
MAX_DIGITS = 40

_LETTER = "A-Za-z_\u00b5\u0370-\u03ff"
_UNITS = "nats|bits|steps|tokens|epochs|%"
_DIGITS = r"[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
# `steps` before `=` is no unit but the name of the next setting: prompts = 1024  steps = 100
_NOT_A_NAME = r"(?!(?:[ \t\r\n]|\#[^\n]*\n)*=[^=])"
# Spellings from other languages that have no meaning here; longest first.
_FOREIGN = (
    "===", "!==", "**", "&&", ":=", "+=", "-=", "*=", "/=", "=>", "*/", "!", "%", "&",
    "|", "?", ";",
)  # fmt: skip
_OPERATORS = {
    "||": "BARS", "‖": "BARS", "∥": "BARS", "<=": "CMP", "≤": "CMP", "≥": "CMP", ">=": "CMP",
    "==": "CMP", "!=": "CMP", "≠": "CMP", "<": "CMP", ">": "CMP", "+": "PLUS", "-": "MINUS",
    "*": "STAR", "/": "SLASH", "^": "CARET", "->": "ARROW", "=": "EQUAL", ":": "COLON",
    ",": "COMMA", ".": "DOT", "(": "LPAR", ")": "RPAR", "[": "LSQB", "]": "RSQB", "{": "LBRACE",
    "}": "RBRACE",
}  # fmt: skip


@cache
def _pattern() -> re.Pattern[str]:
    def either(words: object) -> str:
        return "|".join(re.escape(word) for word in words)  # type: ignore[attr-defined]

    long_first = sorted(_OPERATORS, key=len, reverse=True)
    return re.compile(
        rf"""(?P<space>[ \t\r\n\f\u00a0\ufeff]+)
        |(?P<comment>\#[^\n]*)
        |(?P<word>[{_LETTER}][{_LETTER}0-9]*)
        |(?P<quantity>{_DIGITS}[ \t]*(?:{_UNITS})(?![A-Za-z_0-9]){_NOT_A_NAME})
        |(?P<number>{_DIGITS}(?![{_LETTER}0-9.]))
        |(?P<badnumber>\.?[0-9](?:[eE][+-]|[{_LETTER}0-9.])*)
        |(?P<string>"[^"\n]*")
        |(?P<unterminated>"[^"\n]*)
        |(?P<quote>'[^'\n]*'|‘[^’\n]*’|“[^”\n]*”|[“”][^“”"\n]*[“”"]?)
        |(?P<slashes>//[^\n]*|/\*[^\n]*?(?:\*/|$))
        |(?P<foreign>!==|!(?!=)|{either(f for f in _FOREIGN if f not in ("!", "!==", "|", "%"))}|%)
        |(?P<op>{either(long_first)})
        |(?P<bar>\|)
        |(?P<bad>[^\x00-\x7f{_LETTER}0-9\u00a0\ufeff≤≥≠‖∥“”‘’]+|.)""",
        re.VERBOSE | re.DOTALL | re.MULTILINE,
    )


class Token:
    """A word, number, string, operator, or bad piece of text.

    `type` is the grammar's terminal, or "" for words (their terminal depends on the parser) and
    bad tokens. `reason` says what is wrong with a bad one. `first` marks the first token of a
    line. `at` is the position in the token list.
    """

    __slots__ = ("at", "end", "first", "kind", "reason", "start", "text", "type")

    def __init__(self, kind: str, type_: str, text: str, start: int, end: int, first: bool):
        self.kind, self.type, self.text = kind, type_, text
        self.start, self.end, self.first = start, end, first
        self.reason = ""
        self.at = -1

    def __repr__(self) -> str:
        return f"Token({self.kind} {self.text!r} at {self.start})"

    @property
    def is_operand_end(self) -> bool:
        """Whether an expression may end with this token."""
        literal = self.reason in ("number", "huge", "unterminated", "quote")
        return literal or self.kind in ("word", "number", "string") or self.text in (")", "]", "}")

    @property
    def is_operand_start(self) -> bool:
        return self.kind in ("word", "number", "string")


def scan(source: Source) -> tuple[list[Token], tuple[Comment, ...]]:
    """Tokens and comments of a text; every character is in one of them or is white space."""
    tokens: list[Token] = []
    comments: list[Comment] = []
    first = True
    for match in _pattern().finditer(source.text):
        kind = match.lastgroup or "bad"
        text, start, end = match.group(), match.start(), match.end()
        if kind == "space":
            first = first or "\n" in text
            continue
        if kind == "comment":
            kept = text.rstrip()
            comments.append(Comment(kept, Span(source, start, start + len(kept))))
            continue
        token = Token(kind, "", text, start, end, first)
        first = False
        if kind == "op":
            token.type = _OPERATORS[text]
        elif kind == "string":
            token.type = "STRING"
        elif kind in ("number", "quantity"):
            _number(token)
        elif kind == "unterminated":
            # The brackets that close the statement are outside, not part of the text.
            kept = text.rstrip(" \t\r)]},")
            token.end = start + max(1, len(kept))
            token.text = text[: token.end - start]
            tokens.append(token)
            token.kind, token.reason = "bad", "unterminated"
            for i in range(token.end, end):
                if source.text[i] in ")]}":
                    tail = source.text[i]
                    tokens.append(Token("op", _OPERATORS[tail], tail, i, i + 1, False))
            continue
        elif kind != "word":
            token.kind = "bad"
            if kind == "slashes":  # another language's comment: report its sign, skip the rest
                kind = "foreign"
                token.text, token.end = text[:2], start + 2
            token.reason = {"badnumber": "number", "bar": "foreign"}.get(kind, kind)
            if kind == "bad":
                token.reason = "character"
        tokens.append(token)
    for i, token in enumerate(tokens):
        token.at = i
    return tokens, tuple(comments)


def _number(token: Token) -> None:
    """Set the terminal of a number; refuse what cannot be a finite double."""
    quantity = token.kind == "quantity"
    token.kind = "number"
    digits = token.text.rstrip("%abcdefghijklmnopqrstuvwxyz \t") if quantity else token.text
    if quantity:
        token.type = "QUANTITY"
    else:
        token.type = "INT" if digits.isdigit() else "NUMBER"
    if len(digits) > MAX_DIGITS or float(digits) == float("inf"):
        token.kind, token.type, token.reason = "bad", "", "huge"
