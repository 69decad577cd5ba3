"""Which statistics a method couples, and its program with one draw as the whole batch."""

from __future__ import annotations

from opdsl.ir.derive import cotangents
from opdsl.ir.program import Part, Program, Row, lower, rewrite
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis, Info
from opdsl.meaning.spec import Spec
from opdsl.records import replace

GROUPED = frozenset({"group_sum", "group_max", "others_sum"})
BATCHED = frozenset({"sum_b", "max_b", "quantile_b", "position_sum"})
LOOPED = frozenset({"max_b", "quantile_b"})  # no group statistic says the same


def roots(program: Program) -> list[Node]:
    return nodes_below([p.total for p in program.parts])


def reads_batch(spec: Spec) -> bool:
    """Whether a statistic of the batch beyond its denominators is read."""
    terms = [x for t in spec.terms for x in (t.loss, t.gate, t.weight)]
    return any(n.op in BATCHED for n in nodes_below(terms))


def drawn(spec: Spec) -> Program:
    """The program with the responses drawn together as its batch: sums over the batch become sums
    over the group."""
    b, program = spec.builder, lower(spec)

    def change(n: Node, args: tuple[Node, ...]) -> Node | None:
        if n.op == "sum_b":
            x = args[0]
            if x.q.axis is Axis.TOK:
                x = b.couple("sum_t", x, Axis.SEQ, Info.FUTURE)
            if x.q.axis is Axis.SEQ:
                return b.couple("group_sum", x, Axis.PROMPT, Info.FUTURE)
        if n.op == "position_sum":
            return b.couple("group_sum", args[0], Axis.TOK, Info.PROMPT)
        if args != n.args and n.q.axis < Axis.PROMPT and any(a.q.axis is Axis.PROMPT for a in args):
            return b.make(n.op, args, n.q.with_(axis=Axis.PROMPT), **dict(n.attrs))
        return None

    parts = []
    for part in program.parts:
        rows = tuple(
            Row(
                replace(r.term, gate=rewrite(b, r.term.gate, change)),
                rewrite(b, r.scale, change),
                rewrite(b, r.loss, change),
            )
            for r in part.terms
        )
        total = rewrite(b, part.total, change)
        parts.append(Part(part.rows, rows, total, cotangents(b, total)))
    return Program(spec, tuple(parts))
