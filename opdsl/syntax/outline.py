"""The outline of a text that may be broken: which token belongs to which statement.

The outline needs no parser. Two operands never stand side by side inside an expression, so a
word that follows a complete operand, at the start of a line or as a known keyword, begins a
statement; brackets are matched with that knowledge. For a correct text the outline repeats what
the parser finds; for a broken one it says what to leave out, so that each mistake is reported
once and the rest of the file still has a tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from opdsl.syntax.keywords import (
    AXES,
    JOINERS,
    METHOD_KEYWORDS,
    ROUTES,
    TERM_KEYWORDS,
    TOP_KEYWORDS,
    close,
)
from opdsl.syntax.recover import WORDS, Outline, Problem, Statement
from opdsl.syntax.tokens import Token

# Keywords that a name follows: the next word is declared, not a statement.
_NAMING = frozenset(
    ("opd", "import", "method", "def", "run", "let", "param", "teacher", "term", "cite",
     "evidence", "accept", "allow", "sweep")
)  # fmt: skip
_BODY_OF = {"method": "method", "term": "term", "optimize": "block", "run": "block", "def": "def"}
_AXES = frozenset(AXES)
_STATEMENT_WORDS = frozenset(TOP_KEYWORDS + METHOD_KEYWORDS + ("return",))
_OVERRIDE = frozenset(("override",))
_MOST_PROBLEMS = 20
_LONGEST_HEADER = 1000  # tokens before the `{` of a block; keeps the outline linear
_CLOSER = {"(": ")", "[": "]", "{": "}"}
_MISPLACED_IN_TERM = frozenset(METHOD_KEYWORDS) - frozenset(TERM_KEYWORDS)


@lru_cache(1024)
def _like_keyword(text: str, words: frozenset[str]) -> bool:
    """Whether a word is a keyword or a slip of one."""
    return text in words or bool(close(text, list(words)))


@dataclass(slots=True)
class _Frame:
    opener: int
    body: str  # the kind of body, or "" for a bracket inside an expression
    statement: Statement | None  # whose body; for a bracket, the statement it is in
    current: Statement | None = None  # the statement being read inside this body


class _Walker:
    def __init__(self, tokens: list[Token], limit: int):
        self.tokens = tokens
        self.limit = limit
        self.out = Outline(tokens)
        self.frames: list[_Frame] = [_Frame(-1, "file", None)]
        braces = [t.text for t in tokens if t.text in ("{", "}")]
        self.missing = braces.count("{") - braces.count("}")  # > 0: some `}` is missing

    # ---- looking around ------------------------------------------------------------------

    @property
    def top(self) -> _Frame:
        return self.frames[-1]

    def body_frame(self) -> _Frame:
        return next(frame for frame in reversed(self.frames) if frame.body)

    def peek(self, i: int) -> Token | None:
        return self.tokens[i] if i < len(self.tokens) else None

    def leads(self, i: int) -> bool:
        """Whether the word at `i` is followed, on its line, by the start of an operand."""
        after = self.peek(i + 1)
        if after is None or after.first:
            return False
        if after.kind == "word":
            return after.text not in JOINERS or after.text in ("not", "if")
        if after.kind in ("number", "string", "bad"):
            return True
        word = self.tokens[i].text
        if word in ("regularize", "feedback", "return") and after.text == "-":
            return True
        return word == "optimize" and after.text == "{"

    def opens_item(self, i: int) -> bool:
        """`method NAME {`, `def NAME (`, `run NAME of` at the start of a line."""
        token, name, then = self.tokens[i], self.peek(i + 1), self.peek(i + 2)
        if not token.first or name is None or then is None or name.kind != "word":
            return False
        if token.text == "method":
            return then.text in ("{", "extends") or then.kind == "string"
        return (token.text == "def" and then.text == "(") or (
            token.text == "run" and then.text == "of"
        )

    def begins(self, i: int, frame: _Frame) -> bool:
        """Whether the token at `i`, directly inside a body, is the first of a statement."""
        token, statement = self.tokens[i], frame.current
        if statement is None:
            return True
        if token.kind != "word" or token.text in JOINERS:
            return False
        prev, text, words = self.tokens[i - 1], token.text, WORDS[frame.body]
        keyworded = token.first and self.leads(i) and _like_keyword(text, words)
        head = i - statement.first
        inner = self.tokens[statement.first].text
        if inner == "override":
            head -= 1
        if head == 1 and not token.first and inner not in words and _like_keyword(inner, _OVERRIDE):
            return False  # `ovrride credit …` is one statement
        if head == 0 or prev.text in ("extends", "of") or {prev.text, text} <= _AXES:
            return False
        if head == 1 or (head == 2 and statement.keyword == "feedback" and prev.text in ROUTES):
            if statement.keyword in _NAMING:
                reasoned = statement.keyword == "evidence"  # `accept` has a text of its own
                return keyworded and (reasoned or self.tokens[i + 1].kind != "string")
            if statement.keyword in words:
                return keyworded
        after = self.peek(i + 1)
        named = frame.body in ("block", "def") and after is not None and after.text == "="
        if prev.is_operand_end and prev.text not in JOINERS:
            return token.first or named or text in words
        return keyworded or (named and token.first)

    # ---- doing ---------------------------------------------------------------------------

    def open_statement(self, i: int, frame: _Frame) -> None:
        self.close_statement(frame, i)
        token = self.tokens[i]
        keyword = token.text
        after = self.peek(i + 1)
        if keyword == "override" and after is not None and after.kind == "word":
            keyword = after.text
        frame.current = Statement(keyword, i, frame.body, frame.statement)
        self.out.statements.append(frame.current)

    def close_statement(self, frame: _Frame, i: int) -> None:
        if frame.current is not None:
            frame.current.last = i
            frame.current = None

    def body_kind(self, i: int, frame: _Frame) -> str:
        """The kind of body that the `{` at `i` opens, "" when it opens a set."""
        statement = frame.current
        if statement is None or statement.body is not None:
            return ""
        if i - statement.first > _LONGEST_HEADER:
            return ""
        keyword = statement.keyword
        if keyword not in _STATEMENT_WORDS:  # misspelt: `methd foo {`, `optimise {`
            parts = self.tokens[statement.first : i]
            if frame.body not in ("file", "method") or any(p.text == "=" for p in parts):
                return ""
            options = ["method", "run", "def"] if frame.body == "file" else ["term", "optimize"]
            guesses = close(keyword, options)
            keyword = guesses[0] if guesses else ("method" if frame.body == "file" else "")
        kind = _BODY_OF.get(keyword, "")
        if kind and keyword in ("term", "def"):
            parts = self.tokens[statement.first : i]
            depth = 0
            for part in parts:
                depth += (part.text in _CLOSER) - (part.text in (")", "]", "}"))
                if part.text == "=" and depth == 0:
                    return ""
                if part.text == "in" and part.at == i - 1:
                    return ""
        return kind

    def unclosed(self, frame: _Frame, where: Token | None) -> None:
        """Report an opener; one report per statement is enough."""
        statement = frame.statement
        if not frame.body and statement is not None:
            if any(p.statement is statement for p in self.out.problems):
                return
            statement.bad = True
        self.out.problems.append(Problem("unclosed", self.tokens[frame.opener], where, statement))

    def abandon(self, where: Token | None) -> None:
        """Pop the brackets above the innermost body; the innermost of them is to blame."""
        if not self.top.body:
            self.unclosed(self.top, where)
        while not self.top.body:
            self.frames.pop()

    def close_bodies(self, depth: int, i: int) -> None:
        """Pop open bodies down to `depth` frames, as if a `}` stood before token `i`."""
        while len(self.frames) > depth:
            frame = self.frames.pop()
            self.close_statement(frame, i)
            self.out.closers.append((i, frame.opener))
            self.missing -= 1

    # ---- the walk ------------------------------------------------------------------------

    def walk(self) -> Outline:
        """Reads every token, or gives up at too many problems or too deep a nesting."""
        for i, token in enumerate(self.tokens):
            if len(self.out.problems) >= _MOST_PROBLEMS or self.out.deepest is not None:
                break
            if token.kind == "word":
                self.word(i, token)
            elif token.text in _CLOSER and token.kind == "op":
                self.opener(i, token)
            elif token.text in (")", "]", "}") and token.kind == "op":
                self.closer(i, token)
            elif self.top.body and self.top.current is None:
                self.open_statement(i, self.top)
        end = len(self.tokens)
        if not self.top.body:
            self.abandon(None)
        if len(self.frames) > 1:
            self.unclosed(self.frames[-1], None)
            self.close_bodies(1, end)
        self.close_statement(self.frames[0], end)
        self.assign_owners()
        return self.out

    def word(self, i: int, token: Token) -> None:
        in_body = bool(self.top.body)
        if not in_body:
            if token.text in JOINERS or not (token.first and self.leads(i)):
                return
            if not _like_keyword(token.text, _STATEMENT_WORDS):
                return
            self.abandon(token)
        if len(self.frames) > 1 and self.missing > 0 and self.opens_item(i):
            self.unclosed(self.frames[-1], token)
            self.close_bodies(1, i)
        frame = self.top
        if not self.begins(i, frame):
            return
        if frame.body == "term" and token.text in _MISPLACED_IN_TERM and self.missing > 0:
            self.unclosed(frame, token)
            self.close_bodies(len(self.frames) - 1, i)
            frame = self.top
        elif frame.body == "file" and token.text in METHOD_KEYWORDS and self.repair(i):
            frame = self.top
        self.open_statement(i, frame)

    def repair(self, i: int) -> bool:
        return self.reopen(i) or self.unopened(i)

    def reopen(self, i: int) -> bool:
        """A section right after a method's `}`, with a `}` too many later: the first is stray."""
        last = self.top.current
        closer = self.tokens[i - 1] if i else None
        if last is None or last.body is None or closer is None or closer.text != "}":
            return False
        if last.keyword != "method":
            return False
        depth = 0
        for j in range(i, len(self.tokens)):
            text = self.tokens[j].text
            depth += (text == "{") - (text == "}")
            if depth < 0:
                break
            if self.opens_item(j):
                return False
        else:
            return False
        self.out.problems.append(Problem("stray", closer, self.tokens[i], last))
        self.out.dropped.add(i - 1)
        self.missing += 1
        self.frames.append(_Frame(last.body, "method", last))
        return True

    def unopened(self, i: int) -> bool:
        """A section right after a method's header, with a `}` to spare: the `{` is missing."""
        last = self.top.current
        if last is None or last.keyword != "method" or last.body is not None:
            return False
        if self.missing >= 0 or not self.tokens[i].first:
            return False
        self.out.problems.append(Problem("unopened", self.tokens[i - 1], self.tokens[i], last))
        last.body, last.kind, last.bad = i, "method", True
        self.missing += 1
        self.frames.append(_Frame(i - 1, "method", last))
        return True

    def opener(self, i: int, token: Token) -> None:
        frame = self.top
        if frame.body and frame.current is None:
            self.open_statement(i, frame)
        kind = self.body_kind(i, frame) if token.text == "{" and frame.body else ""
        statement = self.body_frame().current
        if kind and statement is not None:
            statement.body, statement.kind = i, kind
        self.frames.append(_Frame(i, kind, statement))
        self.out.depth = max(self.out.depth, len(self.frames) - 1)
        if len(self.frames) - 1 > self.limit and self.out.deepest is None:
            self.out.deepest = token

    def closer(self, i: int, token: Token) -> None:
        if not self.top.body and _CLOSER[self.tokens[self.top.opener].text] == token.text:
            self.frames.pop()
            return
        if not self.top.body and self.domain_end(token):
            self.frames.pop()
            return
        inside = []  # brackets of the current statement, innermost first
        for frame in reversed(self.frames):
            if frame.body:
                break
            inside.append(frame)
        depth = next(
            (d for d, f in enumerate(inside) if _CLOSER[self.tokens[f.opener].text] == token.text),
            None,
        )
        if depth is not None:  # the ones above it were never closed
            self.unclosed(inside[0], token)
            del self.frames[len(self.frames) - depth - 1 :]
            return
        if token.text == "}" and len(self.frames) - len(inside) > 1:
            if inside:
                self.abandon(token)
            frame = self.frames.pop()
            self.close_statement(frame, i)
            if frame.statement is not None:
                frame.statement.closed = i
            return
        if inside and self.ends_bracket(i):
            frame = self.frames.pop()
            if frame.statement is not None:
                frame.statement.bad = True
            self.out.problems.append(
                Problem("mismatch", self.tokens[frame.opener], token, frame.statement)
            )
            return
        statement = self.body_frame().current
        self.out.problems.append(Problem("stray", token, None, statement))
        self.out.dropped.add(i)
        if token.text == "}":
            self.missing += 1

    def domain_end(self, token: Token) -> bool:
        """`in (0, 1]` and `in [0, 1)` are half-open intervals."""
        opener = self.top.opener
        if token.text == "}" or self.tokens[opener].text == "{" or opener == 0:
            return False
        return self.tokens[opener - 1].text == "in"

    def ends_bracket(self, i: int) -> bool:
        """Whether the wrong closer at `i` stands where the right one should: none follows."""
        wanted = _CLOSER[self.tokens[self.top.opener].text]
        depth = 0
        for token in self.tokens[i + 1 :]:
            if token.kind == "word" and token.first and token.text in _STATEMENT_WORDS:
                return True
            if token.text in _CLOSER:
                depth += 1
            elif token.text in (")", "]", "}"):
                if depth == 0:
                    return token.text != wanted
                depth -= 1
        return True

    def assign_owners(self) -> None:
        owner: list[Statement | None] = [None] * len(self.tokens)
        for statement in self.out.statements:  # outer before inner
            for i in range(statement.first, max(statement.last, statement.first)):
                owner[i] = statement
        self.out.owner = owner


def outline(tokens: list[Token], limit: int) -> Outline:
    """Statements and unmatched brackets of a token list; `limit` is the deepest nesting."""
    return _Walker(tokens, limit).walk()
