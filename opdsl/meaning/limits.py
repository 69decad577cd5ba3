"""How much a method may unfold into: beyond it one report instead of minutes or a deep stack.

Every pass after this one walks the nodes of a method by plain recursion, so their nesting is
bounded here, once. The largest shipped method has 29 statements, 6 terms, 164 nodes and 18 levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from opdsl.codes import make
from opdsl.diagnostics import Report
from opdsl.meaning.names import Scope
from opdsl.meaning.node import Builder, Node
from opdsl.meaning.spec import Spec
from opdsl.source import Span
from opdsl.syntax import tree

MAX_METHODS = 64
MAX_STATEMENTS = 128
MAX_TERMS = 40
MAX_NODES = 4000
MAX_LEVELS = 48
MAX_CHAIN = 150
CHAINS = frozenset({"add", "sub", "mul", "neg"})  # a long sum or product is read side by side


def bounded(decl: tree.Method, report: Report, elaborate: Callable[[], Spec | None]) -> Spec | None:
    """What `elaborate` gives for a method, or None with OPD009 where it is too large."""
    count = statements(decl)
    if count > MAX_STATEMENTS:
        _refuse(
            report,
            decl.name.span,
            "this method is too large for anyone to read",
            f"{count} statements, at most {MAX_STATEMENTS}",
            "share parts between methods: `extends`, or a term of another method",
        )
        return None
    try:
        spec = elaborate()
    except RecursionError:
        spec = None
        found: tuple[int, Node | None] = (MAX_LEVELS + 1, None)
    else:
        if spec is None:
            return None
        found = _deepest(spec.builder)
        for count, most, what in (
            (len(spec.terms), MAX_TERMS, "terms and regularizers"),
            (len(spec.builder.nodes), MAX_NODES, "operations"),
        ):
            if count > most:
                _refuse(
                    report,
                    decl.name.span,
                    f"this method unfolds into too many {what}",
                    f"{count} {what}, at most {most}",
                    "sum over a set instead of writing its members: sum(v in support: …)",
                )
                return None
        endless = next((n for n in spec.builder.nodes if n.op == "const" and not _finite(n)), None)
        if endless is not None:
            inside = endless.span.source is decl.span.source
            span = endless.span if inside else decl.name.span
            message = "this number is too large for a computer, or it is none"
            report.add(make("OPD211", span, message, f"worth {endless.value:g}"))
            return None
    if found[0] > MAX_LEVELS:
        node = found[1]
        inside = node is not None and node.span.source is decl.span.source
        _refuse(
            report,
            node.span if node is not None and inside else decl.name.span,
            "the formula is nested too deeply for anyone to read",
            f"more than {MAX_LEVELS} operations inside one another",
            "a recurrence in a `def` repeats an operation along the sequence",
        )
        return None
    return spec


def too_many(names: Sequence[str], scope: Scope, report: Report) -> bool:
    """Whether a file defines more methods than `check` looks at; reported as OPD009."""
    if len(names) <= MAX_METHODS:
        return False
    decl, _ = scope.methods[names[MAX_METHODS]]
    _refuse(
        report,
        decl.name.span,
        "this file defines too many methods",
        f"{len(names)} methods, at most {MAX_METHODS}",
        'put them into several files: import "./other.opd" (name)',
    )
    return True


def statements(decl: tree.Method) -> int:
    """Statements of a method, those of its terms included."""
    inner = [s.body for s in decl.body if isinstance(s, tree.TermBlock)]
    return len(decl.body) + sum(len(body) for body in inner)


def _finite(node: Node) -> bool:
    return node.value is not None and math.isfinite(node.value)


def _deepest(builder: Builder) -> tuple[int, Node | None]:
    """The nesting of the deepest node, and the first node that lies too deep."""
    levels: dict[int, tuple[int, int]] = {}
    most, first = 0, None
    for node in builder.nodes:  # arguments come before their users
        below = [levels[a.id] for a in node.args]
        level = max((x for x, _ in below), default=0) + (node.op not in CHAINS)
        chain = max((x for _, x in below), default=0) + 1
        levels[node.id] = level, chain
        if first is None and (level > MAX_LEVELS or chain > MAX_CHAIN):
            first, most = node, MAX_LEVELS + 1
        most = max(most, level)
    return most, first


def _refuse(report: Report, span: Span, message: str, label: str, cure: str) -> None:
    report.add(make("OPD009", span, message, label, helps=[cure]))
