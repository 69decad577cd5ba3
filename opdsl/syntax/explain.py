"""Messages for a parse that stopped: from the parser's state to the mistake that was made.

`explain` tries rules from the particular to the general; each looks at the token, at the one
before it, at the statement the outline puts them in, and at what the parser would have accepted.
"""

from __future__ import annotations

from opdsl.codes import make
from opdsl.diagnostics import Diagnostic, Edit, Fix
from opdsl.source import Span
from opdsl.syntax.beginnings import beginning
from opdsl.syntax.keywords import QUANTITY_UNITS, ROUTES, SECTIONS, UNITS, VERSION, close
from opdsl.syntax.messages import shorten
from opdsl.syntax.stops import Stop, at_statement_start, example, peek, safely

# (statement or any, what was acceptable, what came instead): message and label.
_HABITS = {
    ("method", "LBRACE", "extends"): (
        "`extends` comes before the title of a method", "move it in front of the text"),
    ("def", "LPAR", "="): (
        "a definition has brackets, with or without parameters", "write `()` before it"),
    ("", "NUMBER", "["): ("a set is written with braces", "write `{ … }`"),
    ("", "AND", "->"): (
        "`->` only stands inside a schedule", "for example linear(1 -> 0.3 over 500 steps)"),
    ("teacher", "EQUAL", ":"): (
        "a teacher is always a distribution, so it has no type", "write `=` here"),
    ("", "AND", "in"): ("`in` belongs to ranges and index sets", "I expected an operator here"),
}  # fmt: skip
_NAMED = frozenset(
    ("cite", "evidence", "accept", "allow", "param", "let", "teacher", "term", "method", "def",
     "run", "sweep")
)  # fmt: skip
_NAME_MEANS = {
    "cite": "first comes the kind of work: arxiv, doi or url",
    "evidence": "a grade: hypothesis, reported or replicated",
    "accept": "first comes the name of the warning that is accepted",
    "allow": "first comes the rule that is broken on purpose, such as R05",
}
_ARTICLE = {
    "NAME": "a name", "STRING": "a text in quotes", "INT": "a whole number", "EQUAL": "`=`",
    "COLON": "`:`", "COMMA": "`,`", "LPAR": "`(`", "RPAR": "`)`", "LSQB": "`[`", "RSQB": "`]`",
    "LBRACE": "`{`", "RBRACE": "`}`", "BARS": "`||`", "ARROW": "`->`", "OVER": "`over`",
    "IN": "`in`", "THEN": "`then`", "ELSE": "`else`", "OF": "`of`", "RETURN": "`return`",
    "ROUTE": "`loss`, `reward` or `scores`", "PER": "`per`", "WHEN": "`when`",
    "EXTENDS": "`extends`", "DOT": "`.`",
}  # fmt: skip
_VALUE = frozenset(("NUMBER", "QUANTITY", "NOT"))
A_VALUE = _VALUE | {"NAME", "STRING", "INT", "MINUS", "LPAR", "LBRACE"}
_OPERATORS = frozenset(("PLUS", "STAR", "CARET", "CMP", "AND", "OR"))


def explain(stop: Stop) -> Diagnostic:
    """The message for a parse that stopped."""
    for rule in (beginning, _route, _comparison, _bars, _unfinished, _pieces, _adjacent):
        found = rule(stop)
        if found is not None:
            return found
    return _generic(stop)


def _route(stop: Stop) -> Diagnostic | None:
    """`feedback` without `loss`, `reward` or `scores`."""
    if stop.keyword != "feedback" or stop.accepted != {"ROUTE"}:
        return None
    helps = (
        "feedback loss E      E is differentiated through the student\n"
        "feedback reward E    E is frozen, goes through `credit`, then the policy gradient\n"
        "feedback scores E    E is frozen, one score term per candidate token",
    )
    token = stop.token
    if token is not None and token.kind == "word" and not stop.leaves:
        after = peek(stop, token.at + 1)
        guesses = close(token.text, ROUTES)
        if guesses and after is not None and after.is_operand_start and not after.first:
            return make(
                "OPD014", stop.span, f"`{token.text}` is not a route of feedback",
                f"did you mean `{guesses[0]}`?", helps=helps,
                fixes=safely(stop.span, guesses[0]),
            )  # fmt: skip
    keyword = stop.head()
    return make(
        "OPD014", keyword, "this feedback does not say how it reaches the student",
        "write `loss`, `reward` or `scores` after it", helps=helps,
    )  # fmt: skip


def _comparison(stop: Stop) -> Diagnostic | None:
    token = stop.token
    if token is None or token.type != "CMP" or "AND" not in stop.accepted:
        return None
    return make(
        "OPD007", stop.span, "comparisons do not chain",
        f"there is already a comparison to the left of this `{token.text}`",
        helps=("join two comparisons with `and`:   0 < x and x < 1",),
    )  # fmt: skip


def _bars(stop: Stop) -> Diagnostic | None:
    token = stop.token
    if token is None or token.type != "BARS" or "AND" not in stop.accepted:
        return None
    return make(
        "OPD015", stop.span, f"`{token.text}` only separates the two sides of a divergence",
        "a logical or is written `or`",
        helps=("a or b               one of two conditions\n"
               "KL(p || q)           a divergence, once per bracket",),
    )  # fmt: skip


def _unfinished(stop: Stop) -> Diagnostic | None:
    """A value is expected and the statement, bracket or file ends."""
    if not (_VALUE & stop.accepted) or "AND" in stop.accepted:
        return None
    token, prev = stop.token, stop.prev
    closes = token is not None and token.text in (")", "]", "}", ",")
    if not (stop.leaves or closes) or prev is None:
        return None
    here = Span(stop.source, prev.start, prev.end)
    statement = stop.statement
    bare = statement is not None and prev.at == statement.first
    if prev.kind == "word" and (bare or prev.text in ROUTES or prev.text == stop.keyword):
        what = stop.keyword or prev.text
        if prev.text in ROUTES and what == "feedback":
            what = f"feedback {prev.text}"
        return make(
            "OPD004", here, f"`{what}` has no value", "nothing follows it",
            helps=example(stop),
        )  # fmt: skip
    if prev.text in ("(", ",") and closes:
        return None
    return make(
        "OPD004", here, f"something is missing after `{prev.text}`",
        "I expected a value to its right", helps=example(stop),
    )  # fmt: skip


def _pieces(stop: Stop) -> Diagnostic | None:
    """A particular piece of a statement is missing."""
    accepted, token = stop.accepted, stop.token
    text = token.text if token is not None else ""
    keyword = stop.keyword
    if keyword == "opd":
        return make(
            "OPD002", stop.span, "the version of the language is a whole number",
            "written `opd 1`", helps=(f"this is opdsl for language version {VERSION}",),
        )  # fmt: skip
    if "THEN" in accepted or "ELSE" in accepted:
        word = "then" if "THEN" in accepted else "else"
        note = "every `if` has a value on both sides" if word == "else" else "the test ends here"
        span = stop.span
        if stop.leaves and stop.prev is not None:
            span = Span(stop.source, stop.prev.start, stop.prev.end)
        return make(
            "OPD004", span, f"this `if` has no `{word}`", note,
            helps=("write   if a then b else c",),
        )  # fmt: skip
    if "OVER" in accepted and token is not None and "AND" in accepted:
        return make(
            "OPD004", stop.span, "this schedule does not say how long it takes",
            "I expected `over`",
            helps=("linear(1 -> 0.3 over 500 steps), or `over run` for the whole run",),
        )  # fmt: skip
    habit = _habit(stop)
    if habit is not None:
        return habit
    if "EQUAL" in accepted and text != "=" and _missing_equals(stop):
        return _missing_equals(stop)
    if text == "=" and "CMP" in accepted:
        return make(
            "OPD004", stop.span, "`=` gives a name to a value, it does not compare",
            "did you mean `==`?", helps=("equality is written   a == b",),
            fixes=(Fix("write `==`", (Edit(stop.span, "=="),)),),
        )  # fmt: skip
    if accepted == {"STRING"}:
        return _missing_text(stop)
    nameless = stop.leaves or token is None or token.kind != "word"
    if accepted == {"NAME"} and nameless and keyword in _NAMED:
        shown = f", not `{shorten(text, 20)}`" if text and not stop.leaves else ""
        return make(
            "OPD004", stop.span if shown else stop.head(), f"`{keyword}` needs a name{shown}",
            _NAME_MEANS.get(keyword, "a name is made of letters, digits and `_`"),
            helps=example(stop),
        )  # fmt: skip
    if keyword == "import" and "LPAR" in accepted:
        span = stop.span
        if stop.leaves and stop.prev is not None:
            span = Span(stop.source, stop.prev.start, stop.prev.end)
        return make(
            "OPD004", span, "this import does not say which names it brings",
            "I expected names in brackets", helps=example(stop),
        )  # fmt: skip
    if accepted == {"OF"}:
        return make(
            "OPD004", stop.span, "this run does not say which method it runs",
            "I expected `of` and the name of a method", helps=example(stop),
        )  # fmt: skip
    if "RETURN" in accepted and stop.leaves and stop.statement and stop.statement.kind == "def":
        return make(
            "OPD004", stop.head(), "this definition returns nothing",
            "its block has no `return`", helps=("end the block with   return value",),
        )  # fmt: skip
    return None


def _habit(stop: Stop) -> Diagnostic | None:
    text = stop.token.text if stop.token is not None else ""
    for (where, terminal, wrong), (message, label) in _HABITS.items():
        if where in ("", stop.keyword) and terminal in stop.accepted and wrong == text:
            return make("OPD004", stop.span, message, label, helps=example(stop))
    return None


def _missing_equals(stop: Stop) -> Diagnostic | None:
    token, keyword = stop.token, stop.keyword
    if "COMMA" in stop.accepted and keyword not in ("param", "def"):
        return None
    name = stop.prev.text if stop.prev is not None else ""
    if token is not None and not stop.leaves:
        if "COLON" in stop.accepted and token.text in UNITS:
            return make(
                "OPD004", stop.span, f"the type of `{name}` comes after a colon",
                "write `:` before it", helps=example(stop),
                fixes=safely(stop.span, f": {token.text}"),
            )  # fmt: skip
        if "IN" in stop.accepted and token.text in ("[", "(", "{"):
            return make(
                "OPD004", stop.span, "a range comes after the word `in`",
                "write `in` before it", helps=example(stop),
                fixes=safely(stop.span, f"in {token.text}"),
            )  # fmt: skip
        if token.text == "==":
            return make(
                "OPD004", stop.span, "a value is given with one `=`", "write `=`",
                fixes=safely(stop.span, "="),
            )  # fmt: skip
    if keyword in ("param", "let", "teacher", "term"):
        declared = peek(stop, stop.statement.first + 1) if stop.statement else None
        name = declared.text if declared is not None and declared.kind == "word" else name
        extra = ""
        if keyword == "param":
            extra = "a parameter has a default, which --set changes"
        return make(
            "OPD004", stop.span if not stop.leaves else stop.head(),
            f"`{name}` is given no value", "I expected `=` and a value",
            notes=(extra,) if extra else (), helps=example(stop),
        )  # fmt: skip
    if stop.statement is not None and stop.statement.context in ("block", "def"):
        span = stop.span
        if stop.leaves and stop.prev is not None:
            span = Span(stop.source, stop.prev.start, stop.prev.end)
        if stop.statement.context == "def" and close(keyword, ("return",)):
            return make(
                "OPD004", stop.head(), f"`{keyword}` does not begin a line of a definition",
                "did you mean `return`?", fixes=safely(stop.head(), "return"),
            )  # fmt: skip
        return make(
            "OPD004", span,
            f"I expected `=` after `{shorten(name, 24)}`", "a value is given as `name = value`",
        )  # fmt: skip
    return None


def _missing_text(stop: Stop) -> Diagnostic:
    keyword = stop.keyword
    prev = stop.prev
    span = stop.span
    if stop.leaves and prev is not None:
        span = Span(stop.source, prev.start, prev.end)
    what = {
        "accept": "this acceptance gives no reason", "allow": "this permission gives no reason",
        "cite": "this citation names no work",
    }.get(keyword, "a text in quotes is missing here")  # fmt: skip
    notes = ()
    if keyword in ("accept", "allow"):
        notes = ("the reason is printed in the report of every run",)
    return make(
        "OPD004", span, what, "I expected a text in quotes", notes=notes, helps=example(stop)
    )


def _adjacent(stop: Stop) -> Diagnostic | None:
    """Two operands side by side, or a value where only an operator can follow."""
    token, prev = stop.token, stop.prev
    if token is None or prev is None or "AND" not in stop.accepted:
        return None
    if prev.kind == "number" and token.kind == "word":
        guesses = close(token.text, QUANTITY_UNITS)
        if guesses:
            return make(
                "OPD004", stop.span, f"I do not know the unit `{token.text}`",
                f"did you mean `{guesses[0]}`?",
                notes=("the units are: " + ", ".join(QUANTITY_UNITS),),
                fixes=safely(stop.span, guesses[0]),
            )  # fmt: skip
    if not (token.is_operand_start or token.text in ("(", "[", "{") or token.text == "not"):
        return None
    inside = "COMMA" in stop.accepted or "RPAR" in stop.accepted
    wanted = "a comma or an operator" if inside else "an operator"
    shown = shorten(token.text, 24)
    notes: tuple[str, ...] = ()
    if stop.keyword in SECTIONS and not inside:
        notes = (f"`{stop.keyword}` takes one expression",)
    return make(
        "OPD004", stop.span, f"I did not expect `{shown}` here",
        f"{wanted} is missing between `{shorten(prev.text, 24)}` and `{shown}`",
        notes=notes, helps=example(stop) if not inside else (),
    )  # fmt: skip


def expected(accepted: frozenset[str]) -> str:
    """What could have come next, in words."""
    parts = []
    if _VALUE & accepted:
        parts.append("a value")
        accepted = accepted - {"NAME", "STRING", "INT", "LPAR", "LBRACE"}
    if _OPERATORS & accepted:
        parts.append("an operator")
        accepted = accepted - {"LPAR", "LSQB", "DOT"}
    if at_statement_start(accepted):
        parts.append("the next statement")
    parts += [text for terminal, text in _ARTICLE.items() if terminal in accepted]
    if not parts:
        return "the end of the file" if accepted else "something else"
    if len(parts) > 5:
        parts = parts[:5]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " or " + parts[-1]


def _generic(stop: Stop) -> Diagnostic:
    wanted = expected(stop.accepted)
    token = stop.token
    if token is None or (stop.leaves and stop.prev is not None):
        prev = stop.prev
        span = Span(stop.source, prev.start, prev.end) if prev is not None else stop.span
        message = "the statement ends too early" if token is not None else "the file ends too early"
        return make("OPD004", span, message, f"after this I expected {wanted}",
                    helps=example(stop))  # fmt: skip
    return make(
        "OPD004", stop.span, f"I did not expect `{shorten(token.text, 24)}` here",
        f"I expected {wanted}", helps=example(stop),
    )  # fmt: skip
