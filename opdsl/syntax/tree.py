"""The abstract syntax tree of `.opd` files: mirrors the text, keeps every span.

Nodes are immutable. The formatter prints them back, so nothing the user wrote (alternative
spellings excepted: `≤` is `<=`, `‖` is `||`) is lost here; comments travel beside the tree.
Greek letters are canonicalised to their Latin names (`β` is `beta`) in `name` fields.
"""

from __future__ import annotations

from opdsl.records import record
from opdsl.source import Source, Span


@record
class Ident:
    """A name being declared, with the place it is written."""

    name: str
    span: Span


# ---- expressions ---------------------------------------------------------------------


@record
class Name:
    name: str
    span: Span


@record
class Number:
    """A literal. `unit` is None or one of nats bits steps tokens epochs % (value as written)."""

    value: float
    text: str
    unit: str | None
    span: Span


@record
class Text:
    value: str
    span: Span


@record
class Unary:
    op: str  # "-" | "not"
    operand: Expr
    span: Span


@record
class Binary:
    op: str  # + - * / ^ and or < <= > >= == !=
    left: Expr
    right: Expr
    span: Span


@record
class Cond:
    """`if test then yes else no`"""

    test: Expr
    yes: Expr
    no: Expr
    span: Span


@record
class Index:
    """`base[index]`"""

    base: Expr
    index: Expr
    span: Span


@record
class Attr:
    """`base.name`"""

    base: Expr
    name: str
    span: Span


@record
class Arg:
    """A positional (`name is None`) or named argument."""

    name: str | None
    value: Expr
    span: Span


@record
class MixArg:
    """`weight: source` inside mix(…)"""

    weight: Expr
    value: Expr
    span: Span


@record
class RampArg:
    """`start -> stop over span` inside linear(…), cosine(…)"""

    start: Expr
    stop: Expr
    over: Expr
    span: Span


@record
class Call:
    func: Expr
    args: tuple[Arg | MixArg | RampArg, ...]
    span: Span


@record
class Divergence:
    """`func(left || right, args…)`"""

    func: Expr
    left: Expr
    right: Expr
    args: tuple[Arg | MixArg | RampArg, ...]
    span: Span


@record
class Reduce:
    """`func(var in domain: body)`"""

    func: Expr
    var: Ident
    domain: Expr
    body: Expr
    span: Span


@record
class SetLiteral:
    """`{a, b, …}`"""

    items: tuple[Expr, ...]
    span: Span


@record
class SetWhere:
    """`{var in domain: condition}`"""

    var: Ident
    domain: Expr
    condition: Expr
    span: Span


Expr = (
    Name | Number | Text | Unary | Binary | Cond | Index | Attr | Call | Divergence | Reduce
    | SetLiteral | SetWhere
)  # fmt: skip

# ---- types and domains ---------------------------------------------------------------


@record
class TypeExpr:
    """`unit [per axis …]`, e.g. ("nats", ("token", "vocab"))"""

    unit: str
    axes: tuple[str, ...]
    span: Span


@record
class Interval:
    low: Expr
    high: Expr
    low_open: bool
    high_open: bool
    span: Span


@record
class Choice:
    """`in {a, b, c}`"""

    items: tuple[Expr, ...]
    span: Span


Domain = Interval | Choice

# ---- statements of a method ----------------------------------------------------------


@record
class Cite:
    kind: str  # arxiv | doi | url | …
    value: str
    span: Span


@record
class Evidence:
    grade: str  # hypothesis | reported | replicated
    span: Span


@record
class Accept:
    """`accept slug "why"` (a warning) or `allow Rxx "why"` (an error)."""

    keyword: str  # "accept" | "allow"
    rule: Ident
    reason: str
    span: Span


@record
class Param:
    name: Ident
    type: TypeExpr | None
    domain: Domain | None
    default: Expr
    span: Span


@record
class Let:
    name: Ident
    type: TypeExpr | None
    value: Expr
    span: Span


@record
class Teacher:
    name: Ident
    value: Expr
    when: Expr | None
    span: Span


@record
class Section:
    """state support feedback credit routing gate weight shape aggregate regularize assert.

    `route` is "loss" | "reward" | "scores" for feedback, else None. `term` is the name before
    the colon of `gate name:` / `weight name:`, else None. `message` belongs to assert.
    """

    keyword: Ident
    value: Expr
    span: Span
    route: str | None = None
    term: Ident | None = None
    message: str | None = None


@record
class TermBlock:
    """`term name { … }`"""

    name: Ident
    body: tuple[Let | Section, ...]
    span: Span


@record
class TermUse:
    """`term name = other(…)`"""

    name: Ident
    value: Expr
    span: Span


@record
class Setting:
    name: Ident
    value: Expr
    span: Span


@record
class Sweep:
    name: Ident
    values: tuple[Expr, ...]
    span: Span


@record
class Optimize:
    settings: tuple[Setting | Sweep, ...]
    span: Span


@record
class Override:
    """`override statement`"""

    statement: Param | Let | Teacher | Section | TermBlock | TermUse | Optimize
    span: Span


MethodStmt = (
    Cite | Evidence | Accept | Param | Let | Teacher | Section | TermBlock | TermUse | Optimize
    | Override
)  # fmt: skip

# ---- top level -----------------------------------------------------------------------


@record
class Import:
    """`import "path.opd" (a, b)` (is_file) or `import std.gates (a, b)`."""

    target: str
    is_file: bool
    names: tuple[Ident, ...]
    span: Span
    target_span: Span


@record
class Extends:
    base: Ident
    args: tuple[Arg | MixArg | RampArg, ...]
    span: Span


@record
class Method:
    name: Ident
    extends: Extends | None
    title: str | None
    body: tuple[MethodStmt, ...]
    span: Span


@record
class FormalParam:
    name: Ident
    type: TypeExpr | None
    domain: Domain | None
    default: Expr | None
    span: Span


@record
class Binding:
    """`name = expr` or, a recurrence, `name[t] = expr` inside a def block."""

    name: Ident
    subscript: Expr | None
    value: Expr
    span: Span


@record
class Def:
    """`def name(params) : type "doc" = result` (no bindings) or a block with `return result`."""

    name: Ident
    params: tuple[FormalParam, ...]
    type: TypeExpr | None
    doc: str | None
    bindings: tuple[Binding, ...]
    result: Expr
    is_block: bool
    span: Span


@record
class Run:
    """`run name of method { … }`"""

    name: Ident
    method: Ident
    settings: tuple[Setting | Sweep, ...]
    span: Span


@record
class Comment:
    text: str
    span: Span


@record
class File:
    source: Source
    version: int
    imports: tuple[Import, ...]
    items: tuple[Method | Def | Run, ...]
    comments: tuple[Comment, ...]
    span: Span
    lost: frozenset[str] = frozenset()  # words of what could not be read; see recover.lost
