"""Where the parser stopped, and what is known there about the mistake."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from opdsl.diagnostics import Edit, Fix, Safety
from opdsl.source import Source, Span
from opdsl.syntax.recover import Outline, Statement
from opdsl.syntax.tokens import Token

# One line that parses, for each keyword.
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


def example(stop: Stop) -> tuple[str, ...]:
    example = _EXAMPLES.get(stop.keyword)
    return (f"for example:   {example}",) if example else ()


def safely(span: Span, text: str) -> tuple[Fix, ...]:
    return (Fix(f"write `{text}`", (Edit(span, text),), Safety.SAFE),)


def peek(stop: Stop, i: int) -> Token | None:
    return stop.out.tokens[i] if i < len(stop.out.tokens) else None
