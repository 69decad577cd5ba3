"""What a syntax error looks like to the person who made it.

Every message is made here: from a bad token (`lexical`), an unmatched bracket (`bracket`), the
state in which the parser stopped (`explain`), or a finished tree (`after`). The rule for each:
name what was written, say what was expected and show a line that would parse.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from opdsl.codes import make
from opdsl.diagnostics import Diagnostic, Edit, Fix, Label, Safety
from opdsl.source import Source, Span
from opdsl.syntax.keywords import (
    AXES,
    GRADES,
    KINDS,
    QUANTITY_UNITS,
    UNITS,
    VERSION,
    close,
)
from opdsl.syntax.recover import Outline, Problem
from opdsl.syntax.tokens import MAX_DEPTH, MAX_DIGITS, Token

_FOREIGN = {
    "**": ("powers are written `^`", "^"),
    "&&": ("a logical and is written `and`", "and"),
    "!": ("a logical not is written `not`", "not "),
    "===": ("equality is written `==`", "=="),
    "!==": ("inequality is written `!=`", "!="),
    ":=": ("a definition is written with `=`", "="),
    "//": ("a comment begins with `#`; division is one `/`", "#"),
    "/*": ("a comment begins with `#` and ends with its line", "#"),
    "*/": ("a comment begins with `#` and ends with its line", ""),
    ";": ("nothing ends a statement: a new line or the next keyword does", ""),
    "%": ("`%` only follows a number, as in `5%`; there is no remainder operator", None),
    "&": ("a logical and is written `and`", "and"),
    "|": ("a logical or is written `or`; a divergence is written `KL(p || q)`", None),
    "?": ("a choice is written `if a then b else c`", None),
    "=>": ("`>=` compares; `->` goes from one value to another in a schedule", None),
    "+=": ("values are never changed; write a new name with `let`", None),
    "-=": ("values are never changed; write a new name with `let`", None),
    "*=": ("values are never changed; write a new name with `let`", None),
    "/=": ("values are never changed; write a new name with `let`", None),
}
_LOOKALIKE = {"−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "∙": "*", "÷": "/", "⁄": "/",
              "，": ",", "：": ":", "（": "(", "）": ")", "→": "->", "∧": "and", "∨": "or",
              "¬": "not", "∈": "in", "＝": "=", "｜": "||", "∣": "||", "…": "..."}  # fmt: skip


def quoted(words: Iterable[str]) -> str:
    items = [f"`{word}`" for word in words]
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " or " + items[-1]


def shorten(text: str, limit: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ---- bad tokens --------------------------------------------------------------------------


def lexical(source: Source, token: Token) -> Diagnostic:
    """A token that no text of the language contains."""
    span = Span(source, token.start, token.end)
    text = token.text
    if token.reason == "unterminated":
        return make(
            "OPD006", span, "this text has no closing quote",
            "I read to the end of the line without finding another `\"`",
            helps=("a text stays on one line, and holds no `\"` of its own",),
        )  # fmt: skip
    if token.reason == "foreign":
        advice, instead = _FOREIGN[text]
        return make(
            "OPD015", span, f"`{text}` is not an operator of this language", advice,
            helps=(f"write `{instead.strip()}` instead of `{text}`",) if instead else (),
            fixes=_replace(span, instead) if instead is not None else (),
        )  # fmt: skip
    if token.reason == "quote":
        inner = text.strip("'‘’“”\"")
        return make(
            "OPD005", span, "texts are written in straight double quotes",
            f'write "{shorten(inner)}"', fixes=_replace(span, f'"{inner}"', Safety.SAFE),
        )  # fmt: skip
    if token.reason == "huge":
        return make(
            "OPD012", span, f"the number `{shorten(text, 24)}` is too large",
            f"numbers have at most {MAX_DIGITS} characters and stay below 1.8e308",
        )  # fmt: skip
    if token.reason == "number":
        return _bad_number(span, text)
    return _bad_character(span, text)


def _replace(span: Span, text: str, safety: Safety = Safety.SHOW_ONLY) -> tuple[Fix, ...]:
    title = f"write `{text.strip()}`" if text.strip() else f"remove `{span.text}`"
    return (Fix(title, (Edit(span, text),), safety),)


def _bad_number(span: Span, text: str) -> Diagnostic:
    instead = ""
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
    word = text[len(digits) :]
    label = "numbers look like 3, 0.5, 1e-4, 20 steps or 5%"
    if text.startswith(".") and text[1:].isdigit():
        instead = "0" + text
    elif text.endswith(".") and text[:-1].isdigit():
        instead = text + "0"
    elif "_" in text and text.replace("_", "").isdigit():
        instead = text.replace("_", "")
    elif word and digits.replace(".", "", 1).isdigit():
        guesses = close(word, QUANTITY_UNITS)
        if guesses:
            instead, label = f"{digits} {guesses[0]}", f"did you mean `{digits} {guesses[0]}`?"
        else:
            label = "a name does not begin with a digit; a product is written with `*`"
    helps = (f"write `{instead}`",) if instead else ()
    return make(
        "OPD012", span, f"`{shorten(text, 24)}` is not a number", label, helps=helps,
        fixes=_replace(span, instead) if instead else (),
    )  # fmt: skip


def _bad_character(span: Span, text: str) -> Diagnostic:
    if text in _LOOKALIKE:
        instead = _LOOKALIKE[text]
        return make(
            "OPD005", span, f"`{text}` only looks like `{instead}`", f"write `{instead}`",
            fixes=_replace(span, instead, Safety.SAFE),
        )  # fmt: skip
    if text.isprintable():
        name = f"`{shorten(text, 20)}`"
    else:
        name = f"the character U+{ord(text[0]):04X}"
    what = "names are made of Latin and Greek letters, digits and `_`"
    return make("OPD005", span, f"I cannot read {name} here", what)


# ---- brackets ----------------------------------------------------------------------------

_PAIR = {"(": ")", "[": "]", "{": "}"}


def bracket(source: Source, out: Outline, problem: Problem) -> Diagnostic:
    token, where = problem.token, problem.where
    span = Span(source, token.start, token.end)
    if problem.kind == "stray":
        return _stray(source, problem, span)
    if problem.kind == "unopened":
        after = Span(source, token.end, token.end)
        return make(
            "OPD004", span, "this method has no `{`", "its sections follow without one",
            helps=(f"add `{{` at the end of line {span.line}",),
            fixes=(Fix("write `{`", (Edit(after, " {"),), Safety.SAFE),),
        )  # fmt: skip
    closer = _PAIR[token.text]
    if problem.kind == "mismatch":
        assert where is not None
        other = Span(source, where.start, where.end)
        return make(
            "OPD003", span, f"this `{token.text}` is closed by `{where.text}`", "opened here",
            secondary=(Label(other, f"I expected `{closer}`"),),
            helps=(f"write `{closer}` in place of `{where.text}`",),
            fixes=(Fix(f"write `{closer}`", (Edit(other, closer),)),),
        )  # fmt: skip
    message = f"this `{token.text}` is never closed"
    if where is None:
        end = Span(source, out.tokens[-1].end, out.tokens[-1].end)
        return make(
            "OPD003", span, message, "opened here, and the file ended without closing it",
            helps=(f"add `{closer}`" + (" at the end" if closer == "}" else ""),),
            fixes=(Fix(f"add `{closer}`", (Edit(end, closer),)),),
        )  # fmt: skip
    other = Span(source, where.start, where.end)
    before = out.tokens[where.at - 1]
    line = source.position(before.end)[0]
    if where.kind == "word":
        label = f"I was still inside the brackets when `{where.text}` began"
        help_ = f"add `{closer}` at the end of line {line}"
        if closer == "}":
            help_ = f"add `{closer}` before line {other.line}"
    else:
        label = f"`{where.text}` comes while the bracket is still open"
        help_ = f"add `{closer}` before this `{where.text}`"
    place = Span(source, before.end, before.end)
    return make(
        "OPD003", span, message, "opened here", secondary=(Label(other, label),), helps=(help_,),
        fixes=(Fix(f"add `{closer}`", (Edit(place, closer),)),),
    )  # fmt: skip


def _stray(source: Source, problem: Problem, span: Span) -> Diagnostic:
    text = problem.token.text
    where, statement = problem.where, problem.statement
    if where is not None and statement is not None:  # a `}` that closes a method too early
        name = where.text
        return make(
            "OPD013", span, "this `}` ends the method before its last section",
            "the method ends here",
            secondary=(Label(Span(source, where.start, where.end), f"`{name}` is left outside"),),
            helps=("remove this `}`: another one follows at the end",),
            fixes=(Fix("remove `}`", (Edit(span, ""),)),),
        )  # fmt: skip
    opener = {")": "(", "]": "[", "}": "{"}[text]
    return make(
        "OPD013", span, f"this `{text}` closes nothing", f"no `{opener}` is open here",
        helps=(f"remove it, or add the `{opener}` that it should close",),
        fixes=(Fix(f"remove `{text}`", (Edit(span, ""),)),),
    )  # fmt: skip


def too_deep(span: Span) -> Diagnostic:
    return make(
        "OPD009", span, "this is nested too deeply for anyone to read",
        f"more than {MAX_DEPTH} brackets inside one another",
        helps=("give the inner parts names: let a = …, or def f(…) = …",),
    )  # fmt: skip


def too_long(span: Span, limit: int) -> Diagnostic:
    return make(
        "OPD009", span, "this expression is too deep", f"more than {limit} operations in a chain",
        helps=("give parts of it names: let a = …, or sum over a set: sum(v in support: …)",),
    )  # fmt: skip


# ---- the header, and words that the grammar leaves open ----------------------------------


def missing_header(source: Source, first: Token | None) -> Diagnostic:
    span = Span(source, first.start, first.end) if first else Span(source, 0, 0)
    start = Span(source, 0, 0)
    label = "the first line must be `opd 1`"
    if first is None:
        label = "there are only comments here" if source.text.strip() else "the file is empty"
    return make(
        "OPD002", span, "this file does not say which language version it is written in",
        label,
        helps=("begin with a line `opd 1`" + ("" if first else ", or start from `opdsl new`"),),
        fixes=(Fix("write `opd 1`", (Edit(start, "opd 1\n\n"),), Safety.SAFE),) if first else (),
    )  # fmt: skip


def version(span: Span, found: int) -> Diagnostic:
    if found > VERSION:
        return make(
            "OPD011", span, f"this file is written in language version {found}",
            f"this opdsl knows versions up to {VERSION}",
            helps=("pip install --upgrade opdsl",),
        )  # fmt: skip
    return make("OPD002", span, f"there is no language version {found}", "the first one is 1")


def grade(span: Span, word: str) -> Diagnostic:
    guesses = close(word, GRADES)
    label = f"did you mean `{guesses[0]}`?" if guesses else "I expected one of three grades"
    fixes = ()
    if guesses:
        fixes = (Fix(f"write `{guesses[0]}`", (Edit(span, guesses[0]),), Safety.SAFE),)
    return make(
        "OPD004", span, f"`{shorten(word)}` is not a grade of evidence", label,
        helps=("hypothesis    nobody has reported it yet\n"
               "reported      one source reports it\n"
               "replicated    a second, independent source agrees",), fixes=fixes,
    )  # fmt: skip


def unit(span: Span, word: str) -> Diagnostic:
    guesses = close(word, UNITS)
    label = f"did you mean `{guesses[0]}`?" if guesses else "no unit has this name"
    fixes = ()
    if guesses:
        fixes = (Fix(f"write `{guesses[0]}`", (Edit(span, guesses[0]),)),)
    return make(
        "OPD004", span, f"I do not know the unit `{shorten(word)}`", label,
        notes=("the units are: " + ", ".join(UNITS),
               "a definition may also say: " + ", ".join(KINDS)),
        fixes=fixes,
    )  # fmt: skip


def axis(span: Span, word: str) -> Diagnostic:
    guesses = close(word, AXES)
    label = f"did you mean `{guesses[0]}`?" if guesses else "no axis has this name"
    fixes = ()
    if guesses:
        fixes = (Fix(f"write `{guesses[0]}`", (Edit(span, guesses[0]),)),)
    return make(
        "OPD004", span, f"I do not know the axis `{shorten(word)}`", label,
        notes=("the axes are: " + ", ".join(AXES),), fixes=fixes,
    )  # fmt: skip


# ---- files -------------------------------------------------------------------------------


def too_large(span: Span, limit: int) -> Diagnostic:
    return make(
        "OPD008", span, f"this file is larger than {limit // 1024} KB",
        "a method is a page of text",
        helps=("keep data in files of their own, and name them in a `run` block",),
    )  # fmt: skip


def not_utf8(name: str, data: bytes, error: UnicodeDecodeError) -> Diagnostic:
    source = Source(name, data.decode("utf-8", "replace"))
    start = len(data[: error.start].decode("utf-8", "replace"))
    helps: tuple[str, ...] = ("save it as UTF-8",)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        helps = ("this is UTF-16; save it as UTF-8",)
    elif b"\0" in data:
        helps = ("this is not a text file",)
    return make(
        "OPD010", Span(source, start, start + 1), "this file is not UTF-8 text",
        f"the byte 0x{data[error.start]:02x} cannot be read", helps=helps,
    )  # fmt: skip


def not_a_file(name: str) -> Diagnostic:
    return make(
        "OPD017", Span(Source(name, ""), 0, 0), f"`{name}` is a pipe or a device, not a file",
        helps=("standard input is read with `-`:   … | opdsl check -",),
    )  # fmt: skip


def unreadable(name: str, place: Path, error: Exception) -> Diagnostic:
    span = Span(Source(name, ""), 0, 0)
    helps: tuple[str, ...] = ()
    if isinstance(error, FileNotFoundError):
        message = f"there is no file `{name}`"
        siblings: list[str] = []
        with contextlib.suppress(OSError):
            siblings = sorted(p.name for p in place.parent.iterdir() if p.suffix == ".opd")
        guesses = close(place.name, siblings)
        if place.name + ".opd" in siblings:
            guesses = [place.name + ".opd"]
        if guesses:
            helps = (f"did you mean {quoted(str(place.with_name(g)) for g in guesses)}?",)
        elif not place.parent.is_dir():
            helps = (f"the folder `{place.parent}` does not exist either",)
        elif siblings:
            helps = ("in that folder: " + ", ".join(siblings[:12]),)
    elif isinstance(error, IsADirectoryError):
        message = f"`{name}` is a folder, not a file"
        inside: list[str] = []
        with contextlib.suppress(OSError):
            inside = sorted(p.name for p in place.iterdir() if p.suffix == ".opd")
        if inside:
            helps = ("it holds: " + ", ".join(inside[:12]),)
    elif isinstance(error, PermissionError):
        message = f"I may not read `{name}`"
    else:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"I cannot read `{name}`: {reason}"
    return make("OPD017", span, message, helps=helps)
