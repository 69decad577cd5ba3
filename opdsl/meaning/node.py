"""Nodes of the typed core language and the builder that makes them.

A method's formulas become a directed graph of these nodes once names are resolved and
definitions are inlined. The set of operations is closed (see `OPS`); the same nodes are the
intermediate representation of the passes in `opdsl.ir`. Nodes are interned: equal structure is
the same object, so shared work is shared everywhere and comparison is by identity.

Shapes by axis, in the packed layout every interpreter uses (B sequences, N response tokens of
the batch, K entries of an index set, V vocabulary):
CONST [] · PROMPT and SEQ [B] · TOK [N] · VOCAB [N, K] or [N, V].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from opdsl.meaning import quantity as qt
from opdsl.meaning.quantity import Axis, Info, Quantity
from opdsl.source import NOWHERE, Span

# operation -> one-line meaning; sets are the operations that yield an index set
OPS: dict[str, str] = {
    # leaves
    "const": "a number",
    "param": "a knob of the method, with its value",
    "schedule": "a number that moves with the step",
    "input": "a frozen value handed in with the batch",
    "logp": "log-probabilities of a distribution over the whole vocabulary, at a temperature",
    # index sets: ids and validity
    "full": "the whole vocabulary",
    "sampled": "the sampled token",
    "top": "the k most probable entries of a distribution",
    "top_p": "the smallest set of entries whose mass reaches p, at most k entries",
    "union": "entries of either set, once",
    "intersection": "entries of both sets",
    "with_bin": "the entries of a set and one bucket for the rest",
    # gathers
    "at_y": "vocabulary value at the sampled token",
    "at_set": "vocabulary value at the entries of a set",
    "put_set": "adjoint of at_set: entries of a set as a vocabulary value, zero elsewhere",
    "is_y": "whether an entry is the sampled token",
    "in_set": "whether an entry of one set belongs to another",
    "add_bin": "append log of the remaining mass to log-probabilities on a set",
    "head": "adjoint of add_bin: the entries without the bucket",
    "last": "the bucket of a set with a bin",
    # elementwise
    "add": "a + b",
    "sub": "a - b",
    "mul": "a * b",
    "div": "a / b",
    "neg": "-a",
    "exp": "exp a",
    "log": "log a",
    "pow": "a ^ b",
    "min": "smaller",
    "max": "larger",
    "abs": "absolute value",
    "tanh": "hyperbolic tangent",
    "sigmoid": "1 / (1 + exp(-a))",
    "logaddexp": "log(exp a + exp b)",
    "log1mexp": "log(1 - exp a), a < 0, floored",
    "lt": "a < b",
    "le": "a <= b",
    "eq": "a == b",
    "and": "both",
    "or": "either",
    "not": "negation",
    "where": "if a then b else c",
    "sg": "stop-gradient",
    "live": "marks a gate or weight whose gradient counts",
    "score_tail": "score term of the sampled token where it lies outside the head",
    # reductions over the entries of a set
    "sum_v": "sum over the entries of a set",
    "max_v": "maximum over the entries of a set",
    "lse_v": "log-sum-exp over the entries of a set",
    # coupling along and across sequences
    "sum_t": "sum over the tokens of the sequence",
    "scan": "G[t] = a[t] + b[t] G[t+1], 0 after the last token",
    "scan_fwd": "G[t] = a[t] + b[t-1] G[t-1], 0 before the first token; adjoint of scan",
    "max_t": "maximum over the tokens of the sequence",
    "rank_t": "share of the sequence's tokens with a smaller value",
    "shift": "value n tokens later, 0 past the end (critics: their bootstrap)",
    "group_sum": "sum over the rollouts of the prompt (token values: at the same position)",
    "group_max": "maximum over the rollouts of the prompt",
    "others_sum": "group_sum without the own rollout",
    "position_sum": "sum over the batch at the same position",
    "sum_b": "sum over the tokens (token values) or sequences of the whole batch",
    "max_b": "maximum over the whole batch",
    "quantile_b": "quantile over the whole batch",
}

SET_OPS = frozenset({"full", "sampled", "top", "top_p", "union", "intersection", "with_bin"})
COUPLING_OPS = frozenset(
    {
        "sum_t",
        "scan",
        "scan_fwd",
        "max_t",
        "rank_t",
        "shift",
        "group_sum",
        "group_max",
        "others_sum",
        "position_sum",
        "sum_b",
        "max_b",
        "quantile_b",
    }
)


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One operation. `attrs` are static facts (names, numbers) that belong to its identity."""

    id: int
    op: str
    args: tuple[Node, ...]
    attrs: tuple[tuple[str, object], ...]
    q: Quantity
    span: Span = field(default=NOWHERE, repr=False)

    def attr(self, name: str, default: object = None) -> object:
        for key, value in self.attrs:
            if key == name:
                return value
        return default

    @property
    def value(self) -> float | None:
        """The number of a constant or a knob (schedules and inputs have none)."""
        if self.op in ("const", "param"):
            return float(self.attr("value"))  # type: ignore[arg-type]
        return None

    def is_const(self, number: float) -> bool:
        return self.op == "const" and self.attr("value") == number

    def __repr__(self) -> str:
        inner = ", ".join(f"%{a.id}" for a in self.args)
        extra = " ".join(f"{k}={v!r}" for k, v in self.attrs)
        return f"%{self.id} = {self.op}({inner}) {extra}".rstrip()


class Builder:
    """Makes nodes, interned, with types computed and identities folded.

    Folding only uses facts that hold in exact arithmetic and keep gradients (x + 0, log exp x,
    exp a / exp b …): teachers that cancel must cancel here, whatever the spelling.
    """

    def __init__(self) -> None:
        self._table: dict[tuple, Node] = {}
        self.span: Span = NOWHERE  # where the user wrote what is being built

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every node made so far, arguments before their users."""
        return tuple(self._table.values())

    # -- core --------------------------------------------------------------------------
    def make(
        self,
        op: str,
        args: tuple[Node, ...] = (),
        q: Quantity | None = None,
        **attrs: object,
    ) -> Node:
        assert op in OPS, op
        items = tuple(sorted(attrs.items()))
        # Two values may share their operands and differ in kind: ones per token and per sequence,
        # 2 and 2 nats, a sum over other rollouts whose information level is known to be lower.
        kind = (q.axis, q.unit, q.info) if q is not None else None
        key = (op, tuple(a.id for a in args), items, kind)
        found = self._table.get(key)
        if found is not None:
            return found
        node = Node(
            len(self._table), op, args, items, q or qt.join(*(a.q for a in args)), self.span
        )
        self._table[key] = node
        return node

    # -- leaves ------------------------------------------------------------------------
    def const(self, value: float, unit: str = "real") -> Node:
        value = float(value)
        value = 0.0 if value == 0 else value
        return self.make("const", (), Quantity(unit=unit, low=value, high=value), value=value)

    def flag(self, truth: bool) -> Node:
        value = 1.0 if truth else 0.0
        return self.make("const", (), Quantity(unit="bool", low=value, high=value), value=value)

    def param(self, name: str, value: float, unit: str) -> Node:
        q = Quantity(unit=unit, low=value, high=value)
        return self.make("param", (), q, name=name, value=float(value))

    def schedule(self, kind: str, start: float, stop: float, over: float | None) -> Node:
        """`over` counts steps; None is the whole run."""
        low, high = min(start, stop), max(start, stop)
        q = Quantity(unit="real", low=low, high=high)
        return self.make("schedule", (), q, kind=kind, start=start, stop=stop, over=over)

    def input(self, name: str, q: Quantity, **attrs: object) -> Node:
        return self.make("input", (), q, name=name, **attrs)

    def logp(self, dist: str, live: bool, temperature: float = 1.0) -> Node:
        q = Quantity(Axis.VOCAB, "logprob", -qt.INF, 0.0, Info.STATE, live)
        return self.make("logp", (), q, dist=dist, temperature=float(temperature))

    # -- sets --------------------------------------------------------------------------
    def set_(self, op: str, args: tuple[Node, ...] = (), **attrs: object) -> Node:
        info = Info.ACTION if op == "sampled" else Info.STATE
        info = max([info, *(a.q.info for a in args)])
        q = Quantity(Axis.VOCAB, "set", 0, qt.INF, info, False)
        return self.make(op, args, q, **attrs)

    # -- gathers -----------------------------------------------------------------------
    def at_y(self, x: Node) -> Node:
        assert x.op == "logp", x
        q = x.q.with_(axis=Axis.TOK, info=max(x.q.info, Info.ACTION))
        return self.make("at_y", (x,), q)

    def at_set(self, x: Node, set_: Node) -> Node:
        if set_.op == "full" or x.q.axis < Axis.VOCAB:
            return x
        q = x.q.with_(info=max(x.q.info, set_.q.info))
        return self.make("at_set", (x, set_), q)

    def is_y(self, set_: Node) -> Node:
        return self.make("is_y", (set_,), Quantity(Axis.VOCAB, "bool", 0, 1, Info.ACTION))

    def in_set(self, inner: Node, outer: Node) -> Node:
        """Whether each entry of `outer` belongs to `inner`."""
        info = max(inner.q.info, outer.q.info)
        return self.make("in_set", (inner, outer), Quantity(Axis.VOCAB, "bool", 0, 1, info))

    def add_bin(self, x: Node, set_: Node) -> Node:
        return self.make("add_bin", (x, set_), x.q.with_(info=max(x.q.info, set_.q.info)))

    # -- elementwise -------------------------------------------------------------------
    def number(self, a: Node) -> Node:
        """A condition in arithmetic counts as 1 or 0."""
        return self.where(a, self.const(1.0), self.const(0.0)) if a.q.unit == "bool" else a

    def add(self, a: Node, b: Node) -> Node:
        a, b = self.number(a), self.number(b)
        if a.is_const(0) and a.q.axis <= b.q.axis:
            return b
        if b.is_const(0) and b.q.axis <= a.q.axis:
            return a
        if _negated(a):
            return self.sub(b, a.args[0])
        if _negated(b):
            return self.sub(a, b.args[0])
        if a.op == b.op == "const":
            return self.const(a.value + b.value, join_units(a, b))
        low, high = qt.interval_add(a.q, b.q)
        return self._elementwise("add", (a, b), join_units(a, b), low, high)

    def sub(self, a: Node, b: Node) -> Node:
        a, b = self.number(a), self.number(b)
        if a is b:
            return self.const(0.0, "nats" if a.q.unit == "logprob" else a.q.unit)
        if b.is_const(0):
            return a
        if a.is_const(0):
            return self.neg(b)
        if _negated(b):
            return self.add(a, b.args[0])
        if a.op == b.op == "const":
            return self.const(a.value - b.value, join_units(a, b))
        # (x + y) - x, the cancellation a log-ratio identity needs
        if a.op == "add" and b in a.args:
            return a.args[1] if a.args[0] is b else a.args[0]
        if a.op == "sub" and a.args[0] is b:
            return self.neg(a.args[1])
        unit = "nats" if a.q.unit == b.q.unit == "logprob" else join_units(a, b)
        low, high = qt.interval_sub(a.q, b.q)
        return self._elementwise("sub", (a, b), unit, low, high)

    def mul(self, a: Node, b: Node) -> Node:
        a, b = self.number(a), self.number(b)
        if a.op == "const" and b.op != "const":
            a, b = b, a  # constants last
        if b.is_const(0):
            return self.const(0.0, product_unit(a, b))
        if a.q.unit == "reward" and b.op == "const" and b.value:
            pass  # a coefficient of 1 is a coefficient: it says how many nats a reward is worth
        elif b.is_const(1) and (b.q.unit in NEUTRAL or product_unit(a, b) == a.q.unit):
            return a
        elif b.is_const(-1) and (b.q.unit in NEUTRAL or product_unit(a, b) == a.q.unit):
            return self.neg(a)
        if a.op == b.op == "const":
            return self.const(a.value * b.value, product_unit(a, b))
        if _negated(a) and _negated(b):
            return self.mul(a.args[0], b.args[0])
        if _negated(a):
            return self.neg(self.mul(a.args[0], b))
        if _negated(b):
            return self.neg(self.mul(a, b.args[0]))
        if b.op == "const" and _plain_multiple(a):
            both = self.const(a.args[1].value * b.value, product_unit(a.args[1], b))
            return self.mul(a.args[0], both)
        if a.op == "div" and a.args[0].is_const(1):
            return self.div(b, a.args[1])
        if b.op == "div" and b.args[0].is_const(1):
            return self.div(a, b.args[1])
        if a is b:
            low, high = qt.interval_pow(a.q, 2)
        else:
            low, high = qt.interval_mul(a.q, b.q)
        return self._elementwise("mul", (a, b), product_unit(a, b), low, high)

    def div(self, a: Node, b: Node, within: tuple[float, float] | None = None) -> Node:
        """a / b. within: the range, where it is known to be narrower (a mean lies among what it
        averages)."""
        a, b = self.number(a), self.number(b)
        if b.is_const(1):
            return a
        if a.is_const(0):
            return a
        if a is b:
            return self.const(1.0)
        if b.op == "const" and b.value != 0 and b.q.unit in NEUTRAL:
            return self.mul(a, self.const(1.0 / b.value))
        if a.op == "exp" and b.op == "exp":
            return self.exp(self.sub(a.args[0], b.args[0]))
        if a.is_const(1) and b.op == "exp":
            return self.exp(self.neg(b.args[0]))
        if _negated(a):
            inner = None if within is None else (-within[1], -within[0])
            return self.neg(self.div(a.args[0], b, inner))
        if a.op == "mul" and b in a.args:
            return a.args[1] if a.args[0] is b else a.args[0]
        unit = "real" if a.q.unit == b.q.unit else a.q.unit
        low, high = within or qt.interval_div(a.q, b.q)
        return self._elementwise("div", (a, b), unit, low, high)

    def neg(self, a: Node) -> Node:
        a = self.number(a)
        if _negated(a):
            return a.args[0]
        if a.op == "const":
            return self.const(-a.value, a.q.unit)
        if a.op == "sub" and a.attr("unit") is None:
            return self.sub(a.args[1], a.args[0])
        if _plain_multiple(a):
            return self.mul(a.args[0], self.const(-a.args[1].value, a.args[1].q.unit))
        unit = "nats" if a.q.unit == "logprob" else a.q.unit
        return self._elementwise("neg", (a,), unit, -a.q.high, -a.q.low)

    def exp(self, a: Node) -> Node:
        a = self.number(a)
        if a.op == "log":
            return a.args[0]
        if a.op == "const":
            return self.const(qt.safe_exp(a.value))
        unit = "prob" if a.q.unit == "logprob" else "real"
        return self._elementwise("exp", (a,), unit, qt.safe_exp(a.q.low), qt.safe_exp(a.q.high))

    def log(self, a: Node) -> Node:
        a = self.number(a)
        if a.op == "exp":
            return a.args[0]
        if a.op == "const" and a.value > 0:
            return self.const(math.log(a.value), "nats")
        unit = "logprob" if a.q.unit == "prob" else "nats"
        if a.op == "mul" and a.args[0].op == a.args[1].op == "exp":
            return self.add(a.args[0].args[0], a.args[1].args[0])
        return self._elementwise("log", (a,), unit, qt.safe_log(a.q.low), qt.safe_log(a.q.high))

    def pow(self, a: Node, b: Node) -> Node:
        a, b = self.number(a), self.number(b)
        if b.is_const(1):
            return a
        if b.is_const(0):
            return self.const(1.0)
        if b.is_const(2):
            return self.mul(a, a)
        if a.op == "exp":
            unit = a.q.unit
            out = self.exp(self.mul(a.args[0], b))
            if out.q.unit != unit:  # prob ^ a is still compared with probabilities
                out = self.make(
                    out.op, out.args, out.q.with_(unit=unit, low=0.0, high=1.0), unit=unit
                )
            return out
        if a.op == b.op == "const":
            return self.const(_power(a.value, b.value))
        if b.value is not None:
            low, high = qt.interval_pow(a.q, b.value)
        else:
            low, high = (0.0 if a.q.low >= 0 else -qt.INF), qt.INF
        return self._elementwise("pow", (a, b), a.q.unit, low, high)

    def minimum(self, a: Node, b: Node) -> Node:
        low, high = min(a.q.low, b.q.low), min(a.q.high, b.q.high)
        return self._pair("min", a, b, low, high, min)

    def maximum(self, a: Node, b: Node) -> Node:
        low, high = max(a.q.low, b.q.low), max(a.q.high, b.q.high)
        return self._pair("max", a, b, low, high, max)

    def _pair(
        self, op: str, a: Node, b: Node, low: float, high: float, fold: Callable[..., float]
    ) -> Node:
        a, b = self.number(a), self.number(b)
        if a is b:
            return a
        if a.op == b.op == "const":
            return self.const(fold(a.value, b.value), join_units(a, b))
        if b.is_const(qt.INF if op == "min" else -qt.INF):
            return a
        return self._elementwise(op, (a, b), join_units(a, b), low, high)

    def abs(self, a: Node) -> Node:
        a = self.number(a)
        if a.q.low >= 0:
            return a
        low = 0.0 if a.q.low <= 0 <= a.q.high else min(abs(a.q.low), abs(a.q.high))
        unit = "nats" if a.q.unit == "logprob" else a.q.unit
        return self._elementwise("abs", (a,), unit, low, max(abs(a.q.low), abs(a.q.high)))

    def tanh(self, a: Node) -> Node:
        a = self.number(a)
        return self._elementwise("tanh", (a,), "real", -1.0, 1.0)

    def sigmoid(self, a: Node) -> Node:
        a = self.number(a)
        return self._elementwise("sigmoid", (a,), "real", 0.0, 1.0)

    def logaddexp(self, a: Node, b: Node, mass: bool = True) -> Node:
        """log(exp a + exp b); `mass`: parts of a mixture, at most log 1 together."""
        low = max(a.q.low, b.q.low)
        unit, high = ("logprob", 0.0) if mass else ("nats", max(a.q.high, b.q.high) + math.log(2))
        return self._elementwise("logaddexp", (a, b), unit, low, high)

    def compare(self, op: str, a: Node, b: Node) -> Node:
        """op in < <= > >= == !=."""
        if op in (">", ">="):
            return self.compare({">": "<", ">=": "<="}[op], b, a)
        if op == "!=":
            return self.not_(self.compare("==", a, b))
        if a.value is not None and b.value is not None and a.op == b.op == "const":
            truth = {"<": a.value < b.value, "<=": a.value <= b.value, "==": a.value == b.value}
            return self.flag(truth[op])
        name = {"<": "lt", "<=": "le", "==": "eq"}[op]
        return self._logic(name, (a, b))

    def and_(self, a: Node, b: Node) -> Node:
        for x, y in ((a, b), (b, a)):
            if x.op == "const":
                return y if x.value else x
        return a if a is b else self._logic("and", (a, b))

    def or_(self, a: Node, b: Node) -> Node:
        for x, y in ((a, b), (b, a)):
            if x.op == "const":
                return x if x.value else y
        return a if a is b else self._logic("or", (a, b))

    def not_(self, a: Node) -> Node:
        if a.op == "not":
            return a.args[0]
        if a.op == "const":
            return self.flag(not a.value)
        return self._logic("not", (a,))

    def _logic(self, op: str, args: tuple[Node, ...]) -> Node:
        base = qt.join(*(a.q for a in args))
        return self.make(op, args, base.with_(unit="bool", low=0.0, high=1.0, live=False))

    def where(self, test: Node, yes: Node, no: Node) -> Node:
        if test.op == "const":
            return yes if test.value else no
        if yes is no:
            return yes
        base = qt.join(test.q, yes.q, no.q)
        q = base.with_(
            unit=join_units(yes, no),
            low=min(yes.q.low, no.q.low),
            high=max(yes.q.high, no.q.high),
            live=yes.q.live or no.q.live,
        )
        return self.make("where", (test, yes, no), q)

    def sg(self, a: Node) -> Node:
        if not a.q.live:
            return a
        return self.make("sg", (a,), a.q.with_(live=False))

    def _elementwise(
        self, op: str, args: tuple[Node, ...], unit: str, low: float, high: float
    ) -> Node:
        base = qt.join(*(a.q for a in args))
        return self.make(op, args, base.with_(unit=unit, low=low, high=high))

    # -- reductions --------------------------------------------------------------------
    def sum_v(self, x: Node, set_: Node) -> Node:
        x = self.number(x)
        if x.is_const(0):
            return x
        if _negated(x):
            return self.neg(self.sum_v(x.args[0], set_))
        signed = x.q.low < 0
        low = 0.0 if not signed else -qt.INF
        high = 0.0 if x.q.high <= 0 else qt.INF
        if x.q.unit == "prob" and not signed and x.op == "exp":
            high = 1.0
        q = qt.join(x.q, set_.q).with_(
            axis=Axis.TOK, unit=x.q.unit, low=low, high=high, live=x.q.live
        )
        return self.make("sum_v", (x, set_), q)

    def max_v(self, x: Node, set_: Node) -> Node:
        x = self.number(x)
        q = qt.join(x.q, set_.q).with_(
            axis=Axis.TOK, unit=x.q.unit, low=x.q.low, high=x.q.high, live=x.q.live
        )
        return self.make("max_v", (x, set_), q)

    def lse_v(self, x: Node, set_: Node) -> Node:
        mass = x.q.unit == "logprob"  # of probabilities: at most one
        unit, high = ("logprob", 0.0) if mass else ("nats", qt.INF)
        q = qt.join(x.q, set_.q).with_(
            axis=Axis.TOK, unit=unit, low=-qt.INF, high=high, live=x.q.live
        )
        return self.make("lse_v", (x, set_), q)

    # -- coupling ----------------------------------------------------------------------
    def couple(self, op: str, x: Node, axis: Axis, info: Info, **attrs: object) -> Node:
        """One of the coupling operations on a token or sequence value."""
        x = self.number(x)
        summing = op.endswith("sum") or op in ("sum_t", "sum_b")
        low, high = x.q.low, x.q.high
        if summing:
            low, high = (0.0 if low >= 0 else -qt.INF), (0.0 if high <= 0 else qt.INF)
        q = x.q.with_(axis=axis, info=max(x.q.info, info), low=low, high=high)
        return self.make(op, (x,), q, **attrs)

    def shift(self, x: Node, n: int) -> Node:
        x = self.number(x)
        if n == 0 or x.q.axis < Axis.TOK:
            return x
        if _scaled_critic(x):  # 0.5 * V, min(V, 0): the bootstrap at the length cap is theirs too
            args = tuple(self.shift(a, n) for a in x.args)
            return self.make(x.op, args, x.q.with_(info=Info.FUTURE), **dict(x.attrs))
        q = x.q.with_(
            info=_moved(x.q.info, n),
            low=min(x.q.low, 0.0),
            high=max(x.q.high, 0.0),
        )
        return self.make("shift", (x,), q, n=n)

    def scan(self, a: Node, b: Node) -> Node:
        """G[t] = a[t] + b[t] G[t+1]."""
        a, b = self.number(a), self.number(b)
        if b.is_const(0):
            return a
        return self.make("scan", (a, b), _carried(a, b).with_(info=Info.FUTURE))

    def scan_fwd(self, a: Node, b: Node) -> Node:
        """C[t] = a[t] + b[t] C[t-1]: what happened up to a token, its own value included."""
        a, b = self.number(a), self.number(b)
        if b.is_const(0):
            return a
        return self.make("scan_fwd", (a, self.shift(b, 1)), _carried(a, b))


# ---- units -------------------------------------------------------------------------------


def _power(x: float, n: float) -> float:
    """x ^ n; infinite or no number where it has no value, which `limits` reports."""
    try:
        found = x**n
    except (OverflowError, ZeroDivisionError):
        return math.inf
    return math.nan if isinstance(found, complex) else found


def _carried(a: Node, b: Node) -> Quantity:
    """The type of a sum of `a` along a sequence at rate `b`."""
    low = 0.0 if a.q.low >= 0 and b.q.low >= 0 else -qt.INF
    high = 0.0 if a.q.high <= 0 and b.q.low >= 0 else qt.INF
    return qt.join(a.q, b.q).with_(axis=Axis.TOK, unit=a.q.unit, low=low, high=high)


def _moved(info: Info, n: int) -> Info:
    """Measurability of a value n tokens later: an earlier token's action is part of the state."""
    if n > 0:
        return Info.FUTURE
    return min(info, Info.STATE) if info <= Info.ACTION else info


NEUTRAL = frozenset({"real", "int", "weight", "gate", "bool"})


def _scaled_critic(x: Node) -> bool:
    """A function of a critic and numbers that is 0 where the critic is."""
    parts = [a for a in x.args if a.q.axis >= Axis.TOK]
    if not parts or not all(_is_critic(a) or _scaled_critic(a) for a in parts):
        return False
    numbers = [a for a in x.args if a.q.axis < Axis.TOK]
    match x.op:
        case "neg" | "add" | "sub" | "abs" | "tanh" if not numbers:
            return True
        case "mul":
            return len(parts) == 1
        case "div":
            return len(parts) == 1 and x.args[0] is parts[0]
        case "min" | "max":
            return all(a.is_const(0) for a in numbers)
    return False


def _is_critic(x: Node) -> bool:
    return x.op == "input" and x.attr("name") == "values"


def _negated(a: Node) -> bool:
    return a.op == "neg" and a.attr("unit") is None


def _plain_multiple(a: Node) -> bool:
    """A number times a constant, in the unit the product has (no declared one to lose)."""
    return a.op == "mul" and a.args[1].op == "const" and a.attr("unit") is None


def join_units(a: Node, b: Node) -> str:
    """Unit of a sum: plain numbers take the unit of what they are added to."""
    x, y = a.q.unit, b.q.unit
    if x == y:
        return x
    if x == "bool":  # beside a number a condition is a number
        return y
    if x in NEUTRAL and y != "bool":
        return y
    if y in NEUTRAL:
        return x
    return "nats" if {x, y} <= {"nats", "logprob"} else x


def compatible_units(x: str, y: str) -> bool:
    """Whether two units may be added or compared."""
    if x == y or x in NEUTRAL or y in NEUTRAL:
        return True
    return {x, y} <= {"nats", "logprob"}


def product_unit(a: Node, b: Node) -> str:
    """Unit of a product: probabilities and plain numbers weigh nats; a coefficient frees rewards."""
    x, y = a.q.unit, b.q.unit
    pair = {x, y}
    if "reward" in pair:
        other = y if x == "reward" else x
        return "real" if other in NEUTRAL | {"nats"} else "reward"
    if "nats" in pair or "logprob" in pair:
        return "nats"
    if pair == {"prob"}:
        return "prob"
    if "prob" in pair:
        return "prob"
    if pair <= {"gate", "bool"}:
        return "gate"
    if pair == {"int"}:
        return "int"
    return "weight" if "weight" in pair else "real"
