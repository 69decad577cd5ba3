"""Messages for a parse that stopped: from the parser's state to the mistake that was made.

`explain` tries rules from the particular to the general; each looks at the token, at the one
before it, at the statement the outline puts them in, and at what the parser would have accepted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from opdsl.codes import make
from opdsl.diagnostics import Diagnostic, Edit, Fix, Safety
from opdsl.source import Source, Span
from opdsl.syntax.keywords import (
    METHOD_KEYWORDS,
    QUANTITY_UNITS,
    ROUTES,
    SECTIONS,
    TERM_KEYWORDS,
    TOP_KEYWORDS,
    UNITS,
    VERSION,
    close,
    distance,
)
from opdsl.syntax.messages import quoted, shorten, wrapped
from opdsl.syntax.recover import Outline, Statement
from opdsl.syntax.tokens import Token

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
_EXAMPLES = {
    "state": "state rollouts(student, temperature = 1.0)",
    "teacher": "teacher T = external(access = logits)",
    "support": "support top(32, of = T, tail = bin)",
    "feedback": "feedback loss KL(student || T)",
    "credit": "credit return_to_go",
    "routing": "routing proportional",
    "gate": "gate not special(y)",
    "weight": "weight ratio(student, rollout)",
    "shape": "shape clip(-5, 5)",
    "aggregate": "aggregate mean(over = tokens)",
    "regularize": "regularize 0.01 * KL(student || initial)",
    "optimize": "optimize { lr = 1e-6  steps = 100 }",
    "param": "param k : int in [1, 1024] = 32",
    "let": "let q = 0.5 * T + 0.5 * student",
    "term": "term keep { feedback loss KL(student || T) }",
    "cite": 'cite arxiv "2306.13649"',
    "evidence": "evidence hypothesis",
    "accept": 'accept immediate_credit "why it is fine here"',
    "allow": 'allow R05 "why it is fine here"',
    "override": "override credit return_to_go",
    "assert": 'assert k <= 64 "the server returns at most 64"',
    "method": 'method my_opd "What it does" { … }',
    "def": "def hesitant(p : dist, tau : nats) : gate per token = H(p) > tau",
    "run": 'run small of my_opd { student = "Qwen/Qwen3-0.6B" }',
    "import": 'import "./base.opd" (base)',
    "opd": "opd 1",
    "sweep": "sweep lam in { 0.25, 0.5, 1.0 }",
    "return": "return beta * KL(p || m)",
}
_NAMED = frozenset(
    ("cite", "evidence", "accept", "allow", "param", "let", "teacher", "term", "method", "def",
     "run", "sweep")
)  # fmt: skip
_ARTICLE = {
    "NAME": "a name", "STRING": "a text in quotes", "INT": "a whole number", "EQUAL": "`=`",
    "COLON": "`:`", "COMMA": "`,`", "LPAR": "`(`", "RPAR": "`)`", "LSQB": "`[`", "RSQB": "`]`",
    "LBRACE": "`{`", "RBRACE": "`}`", "BARS": "`||`", "ARROW": "`->`", "OVER": "`over`",
    "IN": "`in`", "THEN": "`then`", "ELSE": "`else`", "OF": "`of`", "RETURN": "`return`",
    "ROUTE": "`loss`, `reward` or `scores`", "PER": "`per`", "WHEN": "`when`",
    "EXTENDS": "`extends`", "DOT": "`.`",
}  # fmt: skip
_VALUE = frozenset(("NUMBER", "QUANTITY", "NOT", "MINUS"))
A_VALUE = _VALUE | {"NAME", "STRING", "INT", "LPAR", "LBRACE"}
_OPERATORS = frozenset(("PLUS", "STAR", "CARET", "CMP", "AND", "OR"))
# A parser that could begin a statement here has finished the one before.
_STARTERS = frozenset(("LET", "METHOD", "IMPORT", "DEF", "RETURN", "SWEEP"))


def at_statement_start(accepted: Iterable[str]) -> bool:
    return not _STARTERS.isdisjoint(accepted)


@dataclass(slots=True)
class Stop:
    """The parser stopped: at `token` (None: end of file) after `prev`, in `statement`."""

    source: Source
    out: Outline
    token: Token | None
    prev: Token | None
    statement: Statement | None
    accepted: frozenset[str]

    @property
    def span(self) -> Span:
        if self.token is not None:
            return Span(self.source, self.token.start, max(self.token.end, self.token.start))
        end = self.prev.end if self.prev is not None else len(self.source.text)
        return Span(self.source, end, end)

    @property
    def keyword(self) -> str:
        return self.statement.keyword if self.statement is not None else ""

    def head(self) -> Span:
        """The keyword (and the name it declares) of the statement."""
        assert self.statement is not None
        first = self.out.tokens[self.statement.first]
        return Span(self.source, first.start, first.end)

    def position(self) -> int:
        """How many tokens of the statement come before the stop, `override` not counted."""
        if self.token is None or self.statement is None:
            return -1
        skip = self.out.tokens[self.statement.first].text == "override"
        return self.token.at - self.statement.first - int(skip)

    @property
    def leaves(self) -> bool:
        """Whether the stop lies beyond the statement: it is unfinished."""
        if self.token is None or self.statement is None:
            return True
        at = self.token.at
        return at >= self.statement.last or at == self.statement.closed


def swallowed(stop: Stop) -> bool:
    """Whether the parser took the name of `name = value` for the value of the line before."""
    token, prev, statement = stop.token, stop.prev, stop.statement
    if token is None or prev is None or statement is None or token.text != "=":
        return False
    beginning = prev.at == statement.first and statement.context in ("block", "def")
    return beginning and "AND" in stop.accepted


def explain(stop: Stop) -> Diagnostic:
    """The message for a parse that stopped."""
    for rule in (_beginning, _route, _comparison, _bars, _unfinished, _pieces, _adjacent):
        found = rule(stop)
        if found is not None:
            return found
    return _generic(stop)


def _example(stop: Stop) -> tuple[str, ...]:
    example = _EXAMPLES.get(stop.keyword)
    return (f"for example:   {example}",) if example else ()


def _safely(span: Span, text: str) -> tuple[Fix, ...]:
    return (Fix(f"write `{text}`", (Edit(span, text),), Safety.SAFE),)


def _beginning(stop: Stop) -> Diagnostic | None:
    """The first word of a statement is not one that this place knows."""
    statement, token = stop.statement, stop.token
    if statement is None or token is None:
        return None
    if token.at != statement.first and stop.position() != 0:
        return None
    if not at_statement_start(stop.accepted) and stop.position() != 0:
        return None
    word, context = token.text, statement.context
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
    if context == "block":
        return make(
            "OPD004", stop.span, f"I cannot read the setting `{word}`",
            "a setting is `name = value`", helps=("for example:   lr = 1e-6",),
        )  # fmt: skip
    if context == "def":
        return make(
            "OPD004", stop.span, f"`{word}` does not begin a line of a definition",
            "I expected `name = value` or `return value`", helps=_example(stop),
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
    listing = wrapped(listing.split(", "))
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
    after = _peek(stop, statement.first + 1)
    first = statement.first == 0
    guesses = close(word, TOP_KEYWORDS)
    if first and after is not None and after.kind == "number" and "opd" in (*guesses, word.lower()):
        return make(
            "OPD002", stop.span, "a file begins with the version of the language",
            "did you mean `opd`?", helps=("write `opd 1` on the first line",),
            fixes=_safely(stop.span, "opd"),
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


def _peek(stop: Stop, i: int) -> Token | None:
    return stop.out.tokens[i] if i < len(stop.out.tokens) else None


def _sections_help(context: str) -> tuple[str, ...]:
    words = {"file": ("import", "method", "def", "run"), "term": TERM_KEYWORDS}.get(context)
    if words is None and context == "method":
        words = METHOD_KEYWORDS
    return (wrapped(["here may stand: " + words[0], *words[1:]]),) if words else ()


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
        after = _peek(stop, token.at + 1)
        guesses = close(token.text, ROUTES)
        if guesses and after is not None and after.is_operand_start and not after.first:
            return make(
                "OPD014", stop.span, f"`{token.text}` is not a route of feedback",
                f"did you mean `{guesses[0]}`?", helps=helps,
                fixes=_safely(stop.span, guesses[0]),
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
            helps=_example(stop),
        )  # fmt: skip
    if prev.text in ("(", ",") and closes:
        return None
    return make(
        "OPD004", here, f"something is missing after `{prev.text}`",
        "I expected a value to its right", helps=_example(stop),
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
            "a name is made of letters, digits and `_`", helps=_example(stop),
        )  # fmt: skip
    if keyword == "import" and "LPAR" in accepted:
        span = stop.span
        if stop.leaves and stop.prev is not None:
            span = Span(stop.source, stop.prev.start, stop.prev.end)
        return make(
            "OPD004", span, "this import does not say which names it brings",
            "I expected names in brackets", helps=_example(stop),
        )  # fmt: skip
    if accepted == {"OF"}:
        return make(
            "OPD004", stop.span, "this run does not say which method it runs",
            "I expected `of` and the name of a method", helps=_example(stop),
        )  # fmt: skip
    if "RETURN" in accepted and stop.leaves and stop.statement and stop.statement.kind == "def":
        return make(
            "OPD004", stop.head(), "this definition returns nothing",
            "its block has no `return`", helps=("end the block with   return value",),
        )  # fmt: skip
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
                "write `:` before it", helps=_example(stop),
                fixes=_safely(stop.span, f": {token.text}"),
            )  # fmt: skip
        if "IN" in stop.accepted and token.text in ("[", "(", "{"):
            return make(
                "OPD004", stop.span, "a range comes after the word `in`",
                "write `in` before it", helps=_example(stop),
                fixes=_safely(stop.span, f"in {token.text}"),
            )  # fmt: skip
        if token.text == "==":
            return make(
                "OPD004", stop.span, "a value is given with one `=`", "write `=`",
                fixes=_safely(stop.span, "="),
            )  # fmt: skip
    if keyword in ("param", "let", "teacher", "term"):
        declared = _peek(stop, stop.statement.first + 1) if stop.statement else None
        name = declared.text if declared is not None and declared.kind == "word" else name
        extra = ""
        if keyword == "param":
            extra = "a parameter has a default, which --set changes"
        return make(
            "OPD004", stop.span if not stop.leaves else stop.head(),
            f"`{name}` is given no value", "I expected `=` and a value",
            notes=(extra,) if extra else (), helps=_example(stop),
        )  # fmt: skip
    if stop.statement is not None and stop.statement.context in ("block", "def"):
        span = stop.span
        if stop.leaves and stop.prev is not None:
            span = Span(stop.source, stop.prev.start, stop.prev.end)
        if stop.statement.context == "def" and close(keyword, ("return",)):
            return make(
                "OPD004", stop.head(), f"`{keyword}` does not begin a line of a definition",
                "did you mean `return`?", fixes=_safely(stop.head(), "return"),
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
        "OPD004", span, what, "I expected a text in quotes", notes=notes, helps=_example(stop)
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
                fixes=_safely(stop.span, guesses[0]),
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
        notes=notes, helps=_example(stop) if not inside else (),
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
                    helps=_example(stop))  # fmt: skip
    return make(
        "OPD004", stop.span, f"I did not expect `{shorten(token.text, 24)}` here",
        f"I expected {wanted}", helps=_example(stop),
    )  # fmt: skip
