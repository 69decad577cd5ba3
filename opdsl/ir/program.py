"""From the typed specification to one loss per row.

L(θ) = Σ_n R[n] with R[n] = Σ_k a_k[n] w_k[n] g_k[n] ℓ_k[n]: the aggregation weight a_k is 1/N with
N taken over the whole optimizer batch (semantics §1), so a micro-batch is a sum over fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable

from opdsl.ir.derive import Cotangent, cotangents, tail_coefficients
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Builder, Node
from opdsl.meaning.quantity import Axis, Info, Quantity
from opdsl.meaning.spec import Spec, Term
from opdsl.records import record, replace
from opdsl.source import NOWHERE

EMPTY = 1e-12  # floor of a denominator that may be an empty sum of gates


@record
class Row:
    """One term with everything that multiplies it."""

    term: Term
    scale: Node  # a_k: the aggregation weight
    loss: Node  # a_k w_k g_k ℓ_k


@record
class Part:
    """All terms measured on the same rows ("main" or "golden")."""

    rows: str
    terms: tuple[Row, ...]
    total: Node  # R[n]
    cotangents: tuple[Cotangent, ...]


@record
class Program:
    spec: Spec
    parts: tuple[Part, ...]

    @property
    def builder(self) -> Builder:
        return self.spec.builder

    def part(self, rows: str) -> Part | None:
        return next((p for p in self.parts if p.rows == rows), None)


def one(b: Builder, axis: Axis) -> Node:
    return b.input("one", Quantity(axis, "real", 1, 1, Info.STATE))


def scale(b: Builder, aggregate: str, gate: Node) -> Node:
    """The aggregation weight of a term with this gate, per row."""
    length = b.input("length", Quantity(Axis.SEQ, "int", 1, info=Info.FUTURE))

    def count(x: Node) -> Node:
        return b.make("sum_b", (x,), x.q.with_(axis=Axis.CONST, low=0.0, high=float("inf")))

    if aggregate == "sum":
        return b.const(1.0)
    if aggregate == "tokens":
        return b.div(b.const(1.0), b.maximum(count(one(b, Axis.TOK)), b.const(1.0)))
    if aggregate == "kept_tokens":
        kept = count(lift_token(b, gate))
        return b.div(b.const(1.0), b.maximum(kept, b.const(EMPTY)))
    if aggregate == "response_length":
        return b.div(b.const(1.0), length)
    assert aggregate == "sequences", aggregate
    sequences = b.maximum(count(one(b, Axis.SEQ)), b.const(1.0))
    return b.div(b.const(1.0), b.mul(sequences, length))


def lift_token(b: Builder, x: Node) -> Node:
    """A value as one number per token."""
    x = b.number(x)
    if x.q.axis >= Axis.TOK:
        return x
    return b.make("mul", (one(b, Axis.TOK), x), x.q.with_(axis=Axis.TOK))


def lower(spec: Spec) -> Program:
    """The program of a specification; pure, except for interning nodes in its builder."""
    b = spec.builder
    b.span = NOWHERE  # what follows is derived, not written
    parts = []
    for rows in ("main", "golden"):
        terms = [t for t in spec.terms if t.rows == rows]
        if not terms:
            continue
        lowered = tuple(_row(b, spec, t) for t in terms)
        total = b.const(0.0)
        for row in lowered:
            total = b.add(total, row.loss)
        total = lift_token(b, total)
        parts.append(Part(rows, lowered, total, cotangents(b, total)))
    return Program(spec, tuple(parts))


def _row(b: Builder, spec: Spec, term: Term) -> Row:
    loss = expand_tails(b, term.loss)
    term = replace(term, gate=expand_tails(b, term.gate), weight=expand_tails(b, term.weight))
    a = scale(b, spec.aggregate, term.gate)
    factor = b.mul(b.mul(a, term.weight), term.gate)
    return Row(term, a, b.mul(lift_token(b, loss), factor))


def rewrite(
    b: Builder, root: Node, change: Callable[[Node, tuple[Node, ...]], Node | None]
) -> Node:
    """Rebuild a graph; `change` may replace a node given its rebuilt arguments."""
    new: dict[int, Node] = {}
    for n in nodes_below([root]):
        args = tuple(new[a.id] for a in n.args)
        replaced = change(n, args)
        if replaced is not None:
            new[n.id] = replaced
        elif args == n.args:
            new[n.id] = n
        else:
            new[n.id] = b.make(n.op, args, n.q, **dict(n.attrs))
    return new[root.id]


def expand_tails(b: Builder, root: Node) -> Node:
    """`tail = sampled`: where y lies outside the head, an estimate of the sum over the rest.

    Its value is body(y) / π(y), its gradient sg(∂body/∂log π(y) / π(y)) ∇log π(y), both unbiased
    for y ~ π. For Σ π ℓ that is sg(ℓ + 1) ∇log π(y), the pairing a raw head needs (theory §7).
    """

    def change(n: Node, args: tuple[Node, ...]) -> Node | None:
        if n.op != "score_tail":
            return None
        zero = b.const(0.0)
        drawn = b.exp(b.at_y(b.logp("student", True)))
        total = b.sg(b.div(args[0], drawn))
        for leaf, coefficient in tail_coefficients(b, b.make(n.op, args, n.q)):
            score = b.mul(coefficient, leaf)
            total = b.add(total, b.sub(score, b.sg(score)))
        outside = b.compare("<", args[1], b.const(0.5))
        return b.where(outside, total, zero)

    return rewrite(b, root, change)
