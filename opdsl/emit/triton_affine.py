"""Sums over the vocabulary that one online sweep gives before any log-sum-exp is known.

With log p = z − lse, a value like log p − log q is a combination of logits plus a number per row.
What multiplies the words stays inside (differences of logits are taken first, so nothing
cancels), numbers per row come out:

    Σ π (Σ c z + s) = E_π[Σ c z] + s        lse(Σ c z + s) = lse(Σ c z) + s
    Σ (Σ c z + s) = Σ Σ c z + V s

Scales that are one number per row come out as factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from opdsl.emit.module import number
from opdsl.emit.triton_source import Body, Leaf, leaf_of
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis

if TYPE_CHECKING:
    from opdsl.emit.triton_rows import Rows

REAL = -1e20  # what is above it is the log-probability of a real entry
Combination = tuple[tuple[Leaf, float], ...]
Found = dict[object, int]


@dataclass(frozen=True)
class Affine:
    """scale · (Σ c z / T − Σ c lse + Σ c row + const), the scale a product of numbers per row."""

    logits: Combination = ()
    rows: tuple[tuple[Node, float], ...] = ()
    const: float = 0.0
    up: tuple[Node, ...] = ()
    down: tuple[Node, ...] = ()

    @property
    def scale(self) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
        return self.up, self.down

    @property
    def reads(self) -> list[Node]:
        return [*self.up, *self.down, *(n for n, _ in self.rows)]

    def times(self, c: float) -> Affine:
        return replace(
            self,
            logits=tuple((k, c * x) for k, x in self.logits),
            rows=tuple((k, c * x) for k, x in self.rows),
            const=c * self.const,
        )

    def plus(self, other: Affine) -> Affine | None:
        if self.scale != other.scale:
            return None
        return replace(
            self,
            logits=_merged(self.logits, other.logits),
            rows=_merged(self.rows, other.rows),
            const=self.const + other.const,
        )

    def scaled(self, n: Node, up: bool = True) -> Affine:
        """Times or over one number per row."""
        if n.value is not None:
            return self.times(n.value if up else 1.0 / n.value)
        a, b = (self.up, self.down) if up else (self.down, self.up)
        if n in b:
            b = tuple(x for i, x in enumerate(b) if i != b.index(n))
        else:
            a = tuple(sorted((*a, n), key=lambda x: x.id))
        return replace(self, up=a, down=b) if up else replace(self, up=b, down=a)


def _merged(a: tuple, b: tuple) -> tuple:
    out: dict = {}
    for k, x in (*a, *b):
        out[k] = out.get(k, 0.0) + x
    return tuple((k, x) for k, x in out.items() if x)


@lru_cache(maxsize=1 << 14)
def affine(n: Node) -> Affine | None:
    """A value with entries as a combination of logits, if it is one."""
    if n.q.axis is not Axis.VOCAB:
        if n.value is not None:
            return Affine(const=n.value)
        return Affine(rows=((n, 1.0),))
    if n.op == "logp":
        return Affine(logits=((leaf_of(n), 1.0),))
    if n.op == "where":
        of = real(n.args[0])
        return affine(n.args[1]) if of is not None and of[0] == "student" else None
    return _linear(n, affine)


def _linear(n: Node, inner):
    """Both kinds of values go through sums and factors per row."""
    if n.op in ("add", "sub"):
        a, b = (inner(x) for x in n.args)
        if a is None or b is None:
            return None
        return a.plus(b.times(-1.0) if n.op == "sub" else b)
    if n.op == "neg":
        a = inner(n.args[0])
        return None if a is None else a.times(-1.0)
    if n.op in ("mul", "div"):
        x, y = n.args
        if n.op == "mul" and y.q.axis is Axis.VOCAB:
            x, y = y, x
        if x.q.axis is not Axis.VOCAB or y.q.axis is Axis.VOCAB or y.q.unit == "bool":
            return None
        if n.op == "div" and y.q.low <= 0 <= y.q.high:
            return None
        a = inner(x)
        return None if a is None else a.scaled(y, n.op == "mul")
    return None


def real(test: Node) -> Leaf | None:
    """The leaf of -1e20 < log π: true of every entry of the student, and wherever π is not 0."""
    if test.op != "lt" or test.q.axis is not Axis.VOCAB:
        return None
    a, b = test.args
    return leaf_of(b) if a.is_const(REAL) and b.op == "logp" else None


@dataclass(frozen=True)
class Weighted:
    """Σ over leaves of π · affine; without a leaf the weight of every word is 1."""

    parts: tuple[tuple[Leaf | None, Affine], ...]

    def times(self, c: float) -> Weighted:
        return Weighted(tuple((leaf, a.times(c)) for leaf, a in self.parts))

    def scaled(self, n: Node, up: bool = True) -> Weighted:
        return Weighted(tuple((leaf, a.scaled(n, up)) for leaf, a in self.parts))

    def plus(self, other: Weighted) -> Weighted:
        parts = list(self.parts)
        for leaf, a in other.parts:  # differences are taken before the sum where they can be
            for i, (there, b) in enumerate(parts):
                both = b.plus(a) if there == leaf else None
                if both is not None:
                    parts[i] = (leaf, both)
                    break
            else:
                parts.append((leaf, a))
        return Weighted(tuple(parts))


@lru_cache(maxsize=1 << 14)
def weighted(n: Node) -> Weighted | None:
    """A value with entries as probabilities times combinations of logits, if it is that."""
    a = affine(n)
    if a is not None:
        return Weighted(((None, a),))
    if n.op == "exp" and n.args[0].op == "logp":
        return Weighted(((leaf_of(n.args[0]), Affine(const=1.0)),))
    if n.op == "mul" and all(a.q.axis is Axis.VOCAB for a in n.args):
        for x, y in (n.args, n.args[::-1]):
            w, a = weighted(x), affine(y)
            if w is None or a is None or len(w.parts) != 1 or w.parts[0][1].logits:
                continue
            leaf, factor = w.parts[0]
            if leaf is None or factor.rows or factor.const != 1.0:
                continue
            for m in factor.up:
                a = a.scaled(m)
            for m in factor.down:
                a = a.scaled(m, False)
            return Weighted(((leaf, a),))
        return None
    if n.op == "where":
        of, w = real(n.args[0]), weighted(n.args[1])
        if w is None or of is None:
            return None
        return w if of[0] == "student" or all(leaf == of for leaf, _ in w.parts) else None
    return _linear(n, weighted)


class Sums:
    """The reductions of a pass that the first kernel can do, and their texts afterwards."""

    def __init__(self, rows: Rows):
        self.writer = rows
        self.plans: dict[int, Weighted | Affine] = {}
        self.names: dict[object, str] = {}

    def plan(self, n: Node) -> list[Node] | None:
        """The numbers per row that the text of a reduction reads; None: not for the first kernel."""
        x = n.args[0]
        if n.op == "sum_v":
            found = weighted(x)
            if found is None:
                return None
            self.plans[n.id] = found
            return [r for _, a in found.parts for r in a.reads]
        a = affine(x)
        if a is None or a.up or a.down or not a.logits:
            return None
        if n.op == "max_v" and (len(a.logits) > 1 or a.logits[0][1] != 1 or a.rows or a.const):
            return None  # entries are compared with it: it must be one of them to the last bit
        self.plans[n.id] = a
        return a.reads

    def early(self, body: Body, found: Found, leaves: list[Leaf]) -> None:
        """Adds log-sum-exps, means and maxima to the first kernel."""
        means: dict[Combination, dict[Combination, None]] = {((leaf, 1.0),): {} for leaf in leaves}
        totals: dict[Combination, None] = {}
        largest: dict[Combination, None] = {}
        for n in [*self.writer.logs.nodes, *self.writer.masses]:
            plan = self.plans.get(n.id)
            if isinstance(plan, Weighted):
                for leaf, a in plan.parts:
                    over = totals if leaf is None else means.setdefault(((leaf, 1.0),), {})
                    if a.logits:
                        over[a.logits] = None
            elif plan is not None and n.op == "lse_v":
                means.setdefault(plan.logits, {})
            elif plan is not None:
                largest[plan.logits] = None
        for of, wanted in means.items():
            x = body.combination(of)
            numbers = body.online(x, tuple(body.combination(c) for c in wanted))
            found["lse", of] = numbers[0]
            found.update({("mean", of, c): i for c, i in zip(wanted, numbers[1:])})
        for of in totals:
            found["sum", of] = body.sum(body.combination(of))
        for of in largest:
            found["max", of] = body.largest(body.combination(of))

    def learn(self, names: dict) -> None:
        self.names.update(names)

    def text(self, n: Node) -> str:
        """One number per row."""
        plan = self.plans[n.id]
        if isinstance(plan, Affine):
            kind = "lse" if n.op == "lse_v" else "max"
            return f"({self.names[kind, plan.logits]}{self.shift(plan)})"
        texts = []
        for leaf, a in plan.parts:
            name = ("sum", a.logits) if leaf is None else ("mean", ((leaf, 1.0),), a.logits)
            inner = self.names[name] if a.logits else "0.0"
            text = f"({inner}{self.shift(a)})"
            if leaf is None:
                shift = self.shift(a)
                text = f"({inner} + v * (0.0{shift}))" if shift else inner
            for m in a.up:
                text += f" * {self.number(m)}"
            for m in a.down:
                text += f" / {self.number(m)}"
            texts.append(f"({text})")
        total = f"({' + '.join(texts)})"
        if any(a.logits or a.rows or a.up or a.down for _, a in plan.parts):
            return total
        return f"({total} + torch.zeros(n, dtype=like, device=y.device))"

    def number(self, n: Node) -> str:
        return self.writer.use(n, Axis.TOK)

    def shift(self, a: Affine) -> str:
        """What is added outside: − Σ c lse + Σ c row + const."""
        parts = [(self.names["lse", ((leaf, 1.0),)], -c) for leaf, c in a.logits]
        parts += [(self.number(n), c) for n, c in a.rows]
        text = "".join(
            f" {'-' if c < 0 else '+'} {x if abs(c) == 1 else f'{number(abs(c))} * {x}'}"
            for x, c in parts
        )
        sign = "-" if a.const < 0 else "+"
        return f"{text} {sign} {number(abs(a.const))}" if a.const else text
