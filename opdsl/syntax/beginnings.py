"""Messages for a statement that begins with the wrong word, or stands in the wrong place."""

from __future__ import annotations

from opdsl.codes import make
from opdsl.diagnostics import Diagnostic, Edit, Fix, Safety
from opdsl.syntax.keywords import (
    METHOD_KEYWORDS,
    SECTIONS,
    TERM_KEYWORDS,
    TOP_KEYWORDS,
    close,
    distance,
)
from opdsl.syntax.messages import quoted, shorten
from opdsl.syntax.stops import Stop, at_statement_start, example, peek, safely

# Words of other systems, and where this language says the same thing.
_ELSEWHERE = {
    "loss": "feedback loss …", "reward": "feedback reward …", "scores": "feedback scores …",
    "objective": "feedback loss …", "advantage": "credit …", "mask": "gate …",
    "baseline": "credit return_to_go(baseline = …)", "tail": "support top(k, of = T, tail = …)",
    "clip": "shape clip(a, b)", "regularizer": "regularize …", "penalty": "regularize …",
    "student": "run NAME of METHOD { student = … }", "model": "run NAME of METHOD { student = … }",
    "data": "run NAME of METHOD { data = … }", "seed": "run NAME of METHOD { seed = … }",
    "lr": "optimize { lr = … }", "steps": "optimize { steps = … }",
    "batch": "optimize { batch = … }", "sweep": "run NAME of METHOD { sweep x in { … } }",
    "normalize": "aggregate mean(over = …)", "reduction": "aggregate mean(over = …)",
    "rollouts": "state rollouts(student, …)", "sampler": "state rollouts(student, …)",
}  # fmt: skip


def beginning(stop: Stop) -> Diagnostic | None:
    """The first word of a statement is not one that this place knows."""
    statement, token = stop.statement, stop.token
    if statement is None or token is None:
        return None
    if token.at != statement.first and stop.position() != 0:
        return None
    if not at_statement_start(stop.accepted) and stop.position() != 0:
        return None
    word, context = token.text, statement.context
    if context == "block":
        return make(
            "OPD004", stop.span, f"I cannot read the setting `{shorten(word)}`",
            "a setting is `name = value`", helps=("for example:   lr = 1e-6",),
        )  # fmt: skip
    if token.kind != "word":
        return make(
            "OPD004", stop.span, f"a statement cannot begin with `{shorten(word)}`",
            "I expected a keyword here", helps=_sections_help(context),
        )  # fmt: skip
    if word == "opd":
        return make(
            "OPD002", stop.span, "the language version belongs on the first line",
            "nothing may come before it", helps=("move `opd 1` to the top of the file",),
        )  # fmt: skip
    if context == "file":
        return _top_level(stop, word)
    if context == "def":
        return make(
            "OPD004", stop.span, f"`{word}` does not begin a line of a definition",
            "I expected `name = value` or `return value`", helps=example(stop),
        )  # fmt: skip
    if context == "term" and word in METHOD_KEYWORDS:
        return make(
            "OPD016", stop.span, f"`{word}` belongs to the method, not to a term",
            "a term has no such section",
            notes=("a term may hold: " + ", ".join(TERM_KEYWORDS),),
            helps=(f"move `{word}` out of the braces of the term",),
        )  # fmt: skip
    if word in TOP_KEYWORDS or word == "return":
        return make(
            "OPD016", stop.span, f"`{word}` cannot stand inside a method",
            "I am still inside the braces of a method" if word != "return" else
            "only a `def` block returns something",
            helps=("close the method with `}` first",) if word != "return" else (),
        )  # fmt: skip
    words = TERM_KEYWORDS if context == "term" else METHOD_KEYWORDS
    return _unknown(stop, word, words)


def _unknown(stop: Stop, word: str, words: tuple[str, ...]) -> Diagnostic:
    guesses = close(word, words)
    listing = "a method has these sections: " + ", ".join(SECTIONS)
    if stop.statement is not None and stop.statement.context == "term":
        listing = "a term may hold: " + ", ".join(TERM_KEYWORDS)
    elsewhere = _ELSEWHERE.get(word)
    if elsewhere and not (guesses and guesses[0].startswith(word)):
        return make(
            "OPD001", stop.span, f"I do not know a section called `{word}`",
            f"this is written   {elsewhere}", helps=(listing,),
        )  # fmt: skip
    if not guesses:
        return make(
            "OPD001", stop.span, f"I do not know a section called `{word}`",
            "no section has a name like this", helps=(listing,),
        )  # fmt: skip
    best = guesses[0]
    safe = len(guesses) == 1 or len(close(word, (guesses[1],))) == 0
    fix = Fix(
        f"write `{best}`", (Edit(stop.span, best),),
        Safety.SAFE if safe or _clearly(word, guesses) else Safety.SHOW_ONLY,
    )  # fmt: skip
    return make(
        "OPD001", stop.span, f"I do not know a section called `{word}`",
        f"did you mean {quoted(guesses[:1] if fix.safety is Safety.SAFE else guesses)}?",
        helps=(listing,), fixes=(fix,),
    )  # fmt: skip


def _clearly(word: str, guesses: list[str]) -> bool:
    """Whether the first guess is nearer than the second."""
    return distance(word.lower(), guesses[0]) < distance(word.lower(), guesses[1])


def _top_level(stop: Stop, word: str) -> Diagnostic:
    if word in METHOD_KEYWORDS:
        return make(
            "OPD016", stop.span, f"`{word}` stands outside a method",
            "no method is open here",
            helps=("sections go between the braces of a method:   method my_opd { … }",),
        )  # fmt: skip
    if word == "import":
        return make(
            "OPD016", stop.span, "imports come before everything else",
            "a definition stands above this import", helps=("move it below the line `opd 1`",),
        )  # fmt: skip
    statement = stop.statement
    assert statement is not None
    after = peek(stop, statement.first + 1)
    first = statement.first == 0
    guesses = close(word, TOP_KEYWORDS)
    if first and after is not None and after.kind == "number" and "opd" in (*guesses, word.lower()):
        return make(
            "OPD002", stop.span, "a file begins with the version of the language",
            "did you mean `opd`?", helps=("write `opd 1` on the first line",),
            fixes=safely(stop.span, "opd"),
        )  # fmt: skip
    fixes: tuple[Fix, ...] = ()
    label = "a file holds: import, method, def, run"
    if guesses:
        label = f"did you mean {quoted(guesses)}?"
        safety = Safety.SAFE if len(guesses) == 1 else Safety.SHOW_ONLY
        fixes = (Fix(f"write `{guesses[0]}`", (Edit(stop.span, guesses[0]),), safety),)
    return make(
        "OPD001", stop.span, f"I do not know `{shorten(word)}` at this place", label,
        helps=("at the top level stand imports, methods, definitions and runs",), fixes=fixes,
    )  # fmt: skip


def _sections_help(context: str) -> tuple[str, ...]:
    words = {"file": ("import", "method", "def", "run"), "term": TERM_KEYWORDS}.get(context)
    if words is None and context == "method":
        words = METHOD_KEYWORDS
    return ("here may stand: " + ", ".join(words),) if words else ()
