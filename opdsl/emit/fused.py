"""Row passes that work in place: the same passes as `module.py`, for logits that are scratch memory.

On a CPU the page faults of fresh [n, V] tensors cost more than the arithmetic on them, so every
value with an entry per word of the vocabulary gets a buffer from a pool: the tiles of the logits
themselves first, then scratch that lives across chunks and steps. A value is written where an
argument died. Three identities save whole sweeps:

- factors and shifts that are one number per row stay outside: a value is scale · (base + shift),
  so (log p − log q)/N is never formed, and what differs by such numbers is computed once;
- π is e/Σe with e = exp(z − max z), the exponentials of the log-sum-exp;
- the softmax adjoint g − (Σ g) π is written into e.

The text is for logits without −inf (heads without padding rows); elsewhere the plain passes run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from opdsl.emit.buffers import Line, allocated, literal
from opdsl.emit.lazy import Lazy, Scale, combined, factor, negated
from opdsl.emit.module import Writer, _mangle, function_name, key, number
from opdsl.ir.derive import Cotangent, domain_of
from opdsl.ir.stages import Stage, Staged
from opdsl.meaning.node import SET_OPS, Node
from opdsl.meaning.quantity import Axis

SMOOTH = frozenset(["add", "sub", "mul", "div", "neg", "sum_v"])
REAL = -1e20  # what is above it is the log-probability of a real entry


def is_dense(n: Node) -> bool:
    """Whether a value has an entry for every word."""
    if n.q.axis is not Axis.VOCAB or n.op in SET_OPS:
        return False
    domain = domain_of(n)
    return isinstance(domain, Node) and domain.op == "full"


@dataclass(frozen=True, slots=True)
class Leaf:
    """One distribution at one temperature: logits, exp(z − max z), and names of its row numbers."""

    z: int
    e: int
    total: str  # Σ e
    lse: str
    dist: str


def fused(staged: Staged, st: Stage) -> str:
    """The text of one row pass, in place: `name(d, r, like, w)` with w(i) the i-th buffer."""
    return Fused(staged, st).function()


class Fused(Writer):
    """Writes the function of one row pass."""

    lines: list  # of str | Line
    words = "v"  # the size of the vocabulary

    def __init__(self, staged: Staged, st: Stage):
        super().__init__(staged, st)
        self.values: dict[object, int] = {}
        self.lazy: dict[int, Lazy | str] = {}  # a text: the same number for every entry
        self.leaves: dict[tuple[str, float], Leaf] = {}
        self.sums: dict[int, str] = {}
        self.made = 0

    def function(self) -> str:
        head = [
            f"def {function_name(self.staged.rows, self.st)}(d, r, like, w):",
            "    y = r['y']",
            "    n = y.numel()",
            "    v = d['student'].z.shape[1]",
        ]
        for n in self.st.imports:
            self.names[n.id] = f"r['{key(n)}']"
        leaves = [n for n in self.st.nodes if n.op == "logp"]
        leaves += [c.leaf for c in self.staged.cotangents] if self.last else []
        for n in sorted(leaves, key=lambda n: float(n.attr("temperature"))):  # type: ignore[arg-type]
            self.leaf(n)
        for n in self.st.nodes:
            self.statement(n)
        self.finish()
        return "\n".join([*head, *(f"    {line}" for line in allocated(self.lines))])

    # -- values with entries -------------------------------------------------------------------
    def new(self) -> int:
        self.made += 1
        return self.made

    def op(self, name: object, text: str, reads: tuple[int, ...]) -> int:
        """A value computed into a buffer, once."""
        if name not in self.values:
            self.values[name] = self.new()
            self.lines.append(Line(text, reads, self.values[name]))
        return self.values[name]

    def fresh_value(self, name: object, text: str, reads: tuple[int, ...]) -> int:
        """A value that torch allocates."""
        if name not in self.values:
            value = self.values[name] = self.new()
            self.lines.append(Line(f"v{value} = {text}", reads, value, f"v{value}", False))
        return self.values[name]

    def leaf(self, n: Node) -> Leaf:
        """Logits and their exponentials; every gather of this leaf reads the logits."""
        temperature = float(n.attr("temperature"))  # type: ignore[arg-type]
        which = (str(n.attr("dist")), temperature)
        if which in self.leaves:
            return self.leaves[which]
        k = len(self.leaves) + 1
        dist, z, e = f"d['{_mangle(which[0])}']", self.new(), self.new()
        if temperature != 1.0:
            text = f"{dist}.rescaled({number(temperature)}, {{out}})"
            base = self.leaves.get((which[0], 1.0))
            self.lines.append(Line(text, () if base is None else (base.z,), z))
            dist = f"{dist}.tempered({number(temperature)})"
        elif self._read_dense(n):
            self.lines.append(Line(f"z{k} = {dist}.z", (), z, f"z{k}"))
        else:  # may be a list of a served teacher: only asked, never read
            self.lines.append(Line(f"z{k} = None", (), z, f"z{k}", False))
        self.lines.append(Line(f"e{k} = {dist}.measure({{out}})", (z,), e))
        if self._read_dense(n):
            self.lines.append(f"l{k} = {dist}.lse[:, 0]")
        self.leaves[which] = Leaf(z, e, f"e{k}", f"l{k}", dist)
        return self.leaves[which]

    def _read_dense(self, leaf: Node) -> bool:
        if self.last and leaf.attr("dist") == "student":
            return True
        return super()._read_dense(leaf)

    # -- statements ------------------------------------------------------------------------------
    def statement(self, n: Node) -> None:
        if n.op == "logp":
            leaf = self.leaf(n)
            self.lazy[n.id] = Lazy(leaf.z, shift=f"-{leaf.lse}")
        elif is_dense(n):
            self.lazy[n.id] = self.dense(n)
        elif n.op in ("sum_v", "max_v", "lse_v") and is_dense(n.args[0]):
            self.reduction(n)
        elif n.op in ("at_y", "at_set", "top", "top_p"):
            self.gather(n)
        else:
            super().statement(n)

    def reduction(self, n: Node) -> None:
        if n.op == "sum_v":
            self.names[n.id] = self.sum_of(self.lazy[n.args[0].id])
            return
        x, var = self.entries_of(n.args[0]), self.fresh(n)
        if n.op == "max_v":
            self.lines.append(Line(f"{var} = {self.across}largest({{0}})", (self.whole(x),)))
            return
        base, out = self.base(x) if x.scale == Scale() else self.whole(x), self.new()
        self.lines.append(Line(f"{var} = {self.across}lse_into({{0}}, {{out}})", (base,), out))

    def sum_of(self, x: Lazy | str) -> str:
        """Σ over the vocabulary: scale · (Σ value + V · shift)."""
        if isinstance(x, str):
            return f"({self.words} * {x})"
        if x.value not in self.sums:
            leaf = next((f for f in self.leaves.values() if f.e == x.value), None)
            if leaf is not None:
                self.sums[x.value] = leaf.total
            else:
                self.count += 1
                self.sums[x.value] = f"x{self.count}"
                self.lines.append(Line(f"x{self.count} = {self.summed('{0}')}", (x.value,)))
        total = self.sums[x.value]
        if x.shift:
            total = f"({total} + {self.words} * ({x.shift}))"
        scale = x.scale
        if not x.shift and total in scale.down:  # Σ π = 1
            scale, total = scale * Scale(1.0, (total,)), ""
        if scale == Scale():
            return total or "torch.ones(n, dtype=like, device=y.device)"
        return f"({total} * {scale.text()})" if total else f"({scale.text()})"

    def summed(self, x: str) -> str:
        return f"{x}.sum(1)"

    def picked(self, x: str, ids: str) -> str:
        return f"{x}.gather(1, {ids})"

    def gather(self, n: Node) -> None:
        x = n.args[0]
        if x.op == "logp":
            super().statement(n)
            which = (str(x.attr("dist")), float(x.attr("temperature")))  # type: ignore[arg-type]
            reads = [self.leaves[which].z]
            base = self.leaves.get((which[0], 1.0))  # a list of the top reads it at temperature 1
            reads += [base.z] if base is not None and base.z != reads[0] else []
            self.lines[-1] = Line(literal(self.lines[-1]), tuple(reads))
        elif is_dense(x):
            value = self.whole(self.entries_of(x))
            self.names[x.id] = "{0}"
            text = f"{self.names[n.args[1].id]}[0]" if n.op == "at_set" else ""
            right = self.picked("{0}", text) if text else getattr(self, f"_{n.op}")(n)
            self.lines.append(Line(f"{self.fresh(n)} = {right}", (value,)))
        else:
            super().statement(n)

    # -- lazily scaled values ----------------------------------------------------------------------
    def base(self, x: Lazy) -> int:
        """value + shift, without the scale."""
        if not x.shift:
            return x.value
        text = f"torch.add({{0}}, column({x.shift}), out={{out}})"
        return self.op(("shift", x.value, x.shift), text, (x.value,))

    def whole(self, x: Lazy) -> int:
        base = self.base(x)
        if x.scale == Scale():
            return base
        text = f"torch.mul({{0}}, {x.scale.column()}, out={{out}})"
        return self.op(("scale", base, x.scale), text, (base,))

    def operand(self, n: Node) -> Lazy | str:
        """A value with entries, or the text of one number per row."""
        return self.lazy[n.id] if n.id in self.lazy else self.use(n, Axis.TOK)

    def entries_of(self, n: Node) -> Lazy:
        """A value with entries, written out where all of them are the same."""
        x = self.lazy[n.id]
        if isinstance(x, Lazy):
            return x
        text = f"entries(column({x}) + torch.zeros(n, 1, dtype=like, device=y.device), None, 0.0, n, v)"
        return Lazy(self.fresh_value(("row", n.id), text, ()))

    def dense(self, n: Node) -> Lazy | str:
        rule: Callable[[Node], Lazy | str | None] | None = getattr(self, f"_on_{n.op}", None)
        found = rule(n) if rule is not None else None
        return self.otherwise(n) if found is None else found

    def otherwise(self, n: Node) -> Lazy:
        """As the plain pass has it, on whole values."""
        reads = []
        for a in n.args:
            if a.id in self.lazy:
                self.names[a.id] = f"{{{len(reads)}}}"
                reads.append(self.whole(self.entries_of(a)))
        right = getattr(self, f"_{n.op}", None)
        text = right(n) if right is not None else self.simple(n)
        return Lazy(self.fresh_value(("plain", n.id), text, tuple(reads)))

    def _on_add(self, n: Node) -> Lazy | str | None:
        return self.plus(*(self.operand(a) for a in n.args))

    def _on_sub(self, n: Node) -> Lazy | str | None:
        a, b = (self.operand(x) for x in n.args)
        return self.plus(a, negated(b))

    def _on_neg(self, n: Node) -> Lazy | str | None:
        return negated(self.operand(n.args[0]))

    def _on_lt(self, n: Node) -> str | None:
        """-1e20 < log π: true of every entry here."""
        a, b = n.args
        known = a.is_const(REAL) and b.op == "logp" and b.attr("dist") == "student"
        return "True" if known else None

    def _on_where(self, n: Node) -> Lazy | str | None:
        test, yes, no = n.args
        if self.operand(test) == "True":
            return self.operand(yes)
        if test.q.axis is Axis.VOCAB and no.is_const(0) and isinstance(self.operand(yes), Lazy):
            x, mask = self.whole(self.entries_of(yes)), self.whole(self.entries_of(test))
            text = "masked_into({0}, {1}, {out})"
            return Lazy(self.op(("kept", x, mask), text, (x, mask)))
        return None

    def plus(self, a: Lazy | str, b: Lazy | str) -> Lazy | str | None:
        if isinstance(a, str):
            a, b = b, a
        if isinstance(a, str):
            return f"({a} + {b})"
        if isinstance(b, str):
            if a.scale != Scale():
                a = Lazy(self.whole(a))
            return replace(a, shift=f"{a.shift} + {b}" if a.shift else b)
        if a.value > b.value:  # the earlier one first, so that p − q and q − p are one value
            a, b = b, a
        if not a.scale.const or not b.scale.const:
            return None
        if (a.scale.up, a.scale.down) == (b.scale.up, b.scale.down) and a.value != b.value:
            c = b.scale.const / a.scale.const
            text = "torch.add({0}, {1}, out={out})"
            if c != 1.0:
                text = f"torch.add({{0}}, {{1}}, alpha={number(c)}, out={{out}})"
            value = self.op(("add", a.value, b.value, c), text, (a.value, b.value))
            return Lazy(value, a.scale, combined(a.shift, b.shift, c))
        first, second = self.whole(a), self.base(b)
        if b.scale.plain:
            text = f"torch.add({{0}}, {{1}}, alpha={number(b.scale.const)}, out={{out}})"
        else:
            text = f"multiple_into({{0}}, {{1}}, {b.scale.column()}, {{out}})"
        return Lazy(self.op(("fma", first, second, b.scale), text, (first, second)))

    def _on_mul(self, n: Node) -> Lazy | str | None:
        a, b = (self.operand(x) for x in n.args)
        if isinstance(a, str):
            a, b = b, a
        if isinstance(a, str):
            return f"({a} * {b})"
        if isinstance(b, str):
            return replace(a, scale=a.scale * factor(b))
        x, y = sorted((self.base(a), self.base(b)))
        value = self.op(("mul", x, y), "torch.mul({0}, {1}, out={out})", (x, y))
        return Lazy(value, a.scale * b.scale)

    def _on_div(self, n: Node) -> Lazy | str | None:
        bottom = n.args[1]
        if bottom.q.low <= 0 <= bottom.q.high:
            return None  # 0 / 0 = 0 takes care
        a, b = (self.operand(x) for x in n.args)
        if isinstance(b, str):
            if isinstance(a, str):
                return f"({a} / {b})"
            one = factor(b)
            return replace(a, scale=a.scale * Scale(1 / one.const, one.down, one.up))
        if isinstance(a, str):
            text = "torch.reciprocal({0}, out={out})"
            value = self.op(("inverse", self.base(b)), text, (self.base(b),))
            return Lazy(value, factor(a) * Scale(1 / b.scale.const, b.scale.down, b.scale.up))
        x, y = self.base(a), self.base(b)
        value = self.op(("div", x, y), "torch.div({0}, {1}, out={out})", (x, y))
        return Lazy(value, a.scale * Scale(1 / b.scale.const, b.scale.down, b.scale.up))

    def _on_exp(self, n: Node) -> Lazy | None:
        # compared with gathered probabilities it must be theirs to the last bit
        smooth = all(u.op in SMOOTH for u in self.st.nodes if n in u.args)
        if n.args[0].op == "logp" and smooth:
            leaf = self.leaf(n.args[0])
            return Lazy(leaf.e, Scale(1.0, (), (leaf.total,)))
        return self._elementwise(n)

    def _elementwise(self, n: Node) -> Lazy:
        x = self.whole(self.entries_of(n.args[0]))
        return Lazy(self.op((n.op, x), f"torch.{n.op}({{0}}, out={{out}})", (x,)))

    _on_tanh = _on_sigmoid = _on_abs = _elementwise

    def _on_log(self, n: Node) -> Lazy | None:
        if n.args[0].q.low < 0:
            return None
        x = self.whole(self.entries_of(n.args[0]))
        text = "torch.log({0}, out={out}).clamp_min_(FLOOR)"
        return Lazy(self.op(("log", x), text, (x,)))

    def _on_logaddexp(self, n: Node) -> Lazy | None:
        if any(a.id not in self.lazy for a in n.args):
            return None
        x, y = sorted(self.whole(self.entries_of(a)) for a in n.args)
        return Lazy(self.op(("lae", x, y), "torch.logaddexp({0}, {1}, out={out})", (x, y)))

    def _on_pow(self, n: Node) -> Lazy | None:
        a, p = (self.operand(x) for x in n.args)
        if isinstance(a, str) or isinstance(p, Lazy):
            return None
        x = self.whole(a)
        return Lazy(self.op(("pow", x, p), f"torch.pow({{0}}, column({p}), out={{out}})", (x,)))

    def _clamped(self, n: Node) -> Lazy | None:
        a, b = (self.operand(x) for x in n.args)
        if isinstance(a, Lazy) and isinstance(b, Lazy):
            x, y = sorted((self.whole(a), self.whole(b)))
            name = "minimum" if n.op == "min" else "maximum"
            text = f"torch.{name}({{0}}, {{1}}, out={{out}})"
            return Lazy(self.op((n.op, x, y), text, (x, y)))
        a, b = (a, b) if isinstance(a, Lazy) else (b, a)
        if isinstance(a, str) or isinstance(b, Lazy):
            return None
        x = self.whole(a)
        text = (
            f"torch.clamp_{n.op.replace('max', 'm_n').replace('min', 'max').replace('m_n', 'min')}"
        )
        text += f"({{0}}, column({b}), out={{out}})"
        return Lazy(self.op((n.op, x, b), text, (x,)))

    _on_min = _on_max = _clamped

    # -- what the pass returns -----------------------------------------------------------------
    def finish(self) -> None:
        if not self.last:
            super().finish()
            return
        found = [self.adjoint(c) for c in self.staged.cotangents]
        for other in found[1:]:
            self.lines.append(Line("{0}.add_({1})", (found[0], other)))
        value = self.names[self.staged.total.id]
        dz = "{0}" if found else "None"
        self.lines.append(Line(f"return {value}, {dz}, {{{{{self.extras()}}}}}", tuple(found[:1])))

    def adjoint(self, c: Cotangent) -> int:
        """∂L/∂z of one leaf, in the buffer of its exponentials."""
        leaf = self.leaf(c.leaf)
        at_y = self.names[c.at_y.id] if c.at_y is not None else "None"
        sets = ", ".join(f"({self.names[s.id]}, {self.entry(x)})" for s, x in c.at_sets)
        rest, total = None, "0.0"
        if c.dense is not None:
            rest = self.operand(c.dense)
            total = self.sum_of(rest)
        before = self.base(rest) if isinstance(rest, Lazy) else 0
        if before == leaf.e:
            before = self.op(("copy", before), "torch.mul({0}, 1.0, out={out})", (before,))
        args = f"{leaf.total}, {leaf.dist}.y, {number(c.temperature)}, {at_y}, [{sets}], {total}"
        self.lines.append(Line(f"{self.across}adjoint_into({{0}}, {args})", (leaf.e,)))
        if isinstance(rest, str):
            text = f"{{0}}.add_(column({rest} * {number(1.0 / c.temperature)}))"
            self.lines.append(Line(text, (leaf.e,)))
        elif rest is not None:
            scale = rest.scale * Scale(1.0 / c.temperature)
            text = f"multiple_into({{0}}, {{1}}, {scale.column()}, {{0}})"
            if scale.plain:
                text = f"{{0}}.add_({{1}}, alpha={number(scale.const)})"
            self.lines.append(Line(text, (leaf.e, before)))
        return leaf.e


__all__ = ["fused", "is_dense"]
