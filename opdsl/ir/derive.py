"""Derivatives: the coefficient form of a loss (theory §3.3).

Reverse accumulation over the graph gives g[v] = ∂L/∂log π(v), detached, split by where it lives
(the sampled token, the entries of a set, the whole vocabulary). The softmax adjoint is shared by
every method: ∂L/∂z = (g − (Σ g) π) / temperature. The field's coefficients are c = −g.
"""

from __future__ import annotations

from collections import Counter

from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Builder, Node
from opdsl.meaning.quantity import Axis, Info, Quantity
from opdsl.records import record


@record
class Cotangent:
    """∂L/∂log π of one live leaf, as detached nodes."""

    leaf: Node  # the `logp` node
    at_y: Node | None  # [N]
    at_sets: tuple[tuple[Node, Node], ...]  # (set, [N, K])
    dense: Node | None  # [N, V]

    @property
    def temperature(self) -> float:
        return float(self.leaf.attr("temperature"))  # type: ignore[arg-type]

    @property
    def roots(self) -> tuple[Node, ...]:
        found = [self.at_y, self.dense, *(n for _, n in self.at_sets)]
        return tuple(n for n in found if n is not None)


def domain_of(node: Node) -> Node | BinOf | None:
    """The index set a VOCAB value runs over; None for values without entries."""
    if node.q.axis < Axis.VOCAB:
        return None
    if node.op in ("logp", "put_set"):
        return FULL
    if node.op in ("at_set", "sum_v", "max_v", "lse_v"):
        return node.args[1]
    if node.op == "is_y":
        return node.args[0]
    if node.op == "in_set":
        return node.args[1]
    if node.op == "head":
        return node.args[1]
    if node.op == "add_bin":
        return BinOf(node.args[1])
    for a in node.args:
        d = domain_of(a)
        if d is not None:
            return d
    return None


class BinOf:
    """Stands for with_bin(base) where only the base node is at hand."""

    def __init__(self, base: Node):
        self.base = base


FULL = Node(-1, "full", (), (), Quantity(Axis.VOCAB, "set", 0, float("inf"), Info.STATE))


class Adjoint:
    """Reverse accumulation from one root with adjoint 1 per row."""

    def __init__(self, b: Builder, root: Node):
        self.b = b
        self.adj: dict[int, Node] = {root.id: b.const(1.0)}
        self.sparse_y: dict[int, Node] = {}
        self.sparse_set: dict[int, list[tuple[Node, Node]]] = {}
        self.root = root

    def run(self) -> Adjoint:
        for node in reversed(nodes_below([self.root])):
            a = self.adj.get(node.id)
            if a is None or not node.q.live or node.op == "sg":
                continue
            rule = getattr(self, f"_{node.op}", None)
            if rule is None:  # a quantile is a threshold: frozen, whatever it is taken of
                assert node.op in ("logp", "input", "quantile_b", "rank_t"), (
                    f"no derivative of {node.op}"
                )
                continue
            rule(node, a)
        return self

    # -- plumbing ------------------------------------------------------------------------
    def set_node(self, domain: object) -> Node:
        if isinstance(domain, BinOf):
            return self.b.set_("with_bin", (domain.base,))
        if domain is FULL or domain is None:
            return self.b.set_("full")
        assert isinstance(domain, Node)
        return domain

    def give(self, arg: Node, value: Node, user: Node) -> None:
        """Add to the adjoint of `arg`, summed over what `arg` does not vary over."""
        if not arg.q.live or arg.op == "sg":
            return
        b = self.b
        have = user.q.axis
        if have is Axis.VOCAB and arg.q.axis < Axis.VOCAB:
            value = b.sum_v(value, self.set_node(domain_of(user)))
            have = Axis.TOK
        if have is Axis.TOK and arg.q.axis < Axis.TOK:
            value = b.couple("sum_t", _at(b, value, Axis.TOK), Axis.SEQ, Info.FUTURE)
            have = Axis.SEQ
        if have in (Axis.SEQ, Axis.PROMPT) and arg.q.axis is Axis.CONST:
            value = b.couple("sum_b", _at(b, value, Axis.SEQ), Axis.CONST, Info.FUTURE)
        old = self.adj.get(arg.id)
        self.adj[arg.id] = value if old is None else b.add(old, value)

    # -- elementwise ---------------------------------------------------------------------
    def _add(self, n: Node, a: Node) -> None:
        for x in n.args:
            self.give(x, a, n)

    def _sub(self, n: Node, a: Node) -> None:
        self.give(n.args[0], a, n)
        self.give(n.args[1], self.b.neg(a), n)

    def _neg(self, n: Node, a: Node) -> None:
        self.give(n.args[0], self.b.neg(a), n)

    def _mul(self, n: Node, a: Node) -> None:
        x, y = n.args
        self.give(x, self.b.mul(a, y), n)
        self.give(y, self.b.mul(a, x), n)

    def _div(self, n: Node, a: Node) -> None:
        b, (x, y) = self.b, n.args
        slope = b.div(a, y)
        if y.q.low <= 0 <= y.q.high:  # 0 / 0 = 0, without a slope (as in `ratio`)
            zero = b.const(0.0)
            nothing = b.and_(b.compare("==", x, zero), b.compare("==", y, zero))
            slope = b.where(nothing, zero, slope)
        self.give(x, slope, n)
        if y.q.live:
            self.give(y, self.b.neg(self.b.mul(a, self.b.div(n, y))), n)

    def _exp(self, n: Node, a: Node) -> None:
        self.give(n.args[0], self.b.mul(a, n), n)

    def _log(self, n: Node, a: Node) -> None:
        b, x = self.b, n.args[0]
        slope = b.div(a, x)
        if not x.q.low > 0:  # log 0 is a floor, not a pole
            slope = b.where(b.compare("<", b.const(0.0), x), slope, b.const(0.0))
        self.give(x, slope, n)

    def _pow(self, n: Node, a: Node) -> None:
        b, (x, p) = self.b, n.args
        slope = b.mul(p, b.pow(x, b.sub(p, b.const(1.0))))
        self.give(x, b.mul(a, slope), n)
        if p.q.live:
            self.give(p, b.mul(a, b.mul(n, b.log(x))), n)

    def _min(self, n: Node, a: Node) -> None:
        self._pick(n, a, self.b.compare("<=", n.args[0], n.args[1]))

    def _max(self, n: Node, a: Node) -> None:
        self._pick(n, a, self.b.compare(">=", n.args[0], n.args[1]))

    def _pick(self, n: Node, a: Node, first: Node) -> None:
        zero = self.b.const(0.0)
        self.give(n.args[0], self.b.where(first, a, zero), n)
        self.give(n.args[1], self.b.where(first, zero, a), n)

    def _abs(self, n: Node, a: Node) -> None:
        b, x = self.b, n.args[0]
        zero = b.const(0.0)
        sign = b.where(b.compare(">", x, zero), a, b.where(b.compare("<", x, zero), b.neg(a), zero))
        self.give(x, sign, n)

    def _tanh(self, n: Node, a: Node) -> None:
        b = self.b
        self.give(n.args[0], b.mul(a, b.sub(b.const(1.0), b.mul(n, n))), n)

    def _sigmoid(self, n: Node, a: Node) -> None:
        b = self.b
        self.give(n.args[0], b.mul(a, b.mul(n, b.sub(b.const(1.0), n))), n)

    def _logaddexp(self, n: Node, a: Node) -> None:
        pieces = _mixture_terms(self.b, n, a)
        if pieces is not None:  # a = c exp(n): the slope of each part is c exp of it, a piece of a
            for x, piece in zip(n.args, pieces):
                self.give(x, piece, n)
            return
        for x in n.args:
            self.give(x, self.b.mul(a, self.b.exp(self.b.sub(x, n))), n)

    def _where(self, n: Node, a: Node) -> None:
        b, (test, yes, no) = self.b, n.args
        zero = b.const(0.0)
        self.give(yes, b.where(test, a, zero), n)
        self.give(no, b.where(test, zero, a), n)

    def _live(self, n: Node, a: Node) -> None:
        self.give(n.args[0], a, n)

    # -- gathers and reductions ------------------------------------------------------------
    def _at_y(self, n: Node, a: Node) -> None:
        leaf = n.args[0]
        old = self.sparse_y.get(leaf.id)
        self.sparse_y[leaf.id] = a if old is None else self.b.add(old, a)
        self.adj.setdefault(n.id, a)

    def _at_set(self, n: Node, a: Node) -> None:
        x, set_ = n.args
        if x.op == "logp":
            self.sparse_set.setdefault(x.id, []).append((set_, a))
            return
        q = n.q.with_(axis=Axis.VOCAB, live=False)
        self.give(x, self.b.make("put_set", (_at(self.b, a, Axis.VOCAB), set_), q), x)

    def _add_bin(self, n: Node, a: Node) -> None:
        """log(1 − Σ exp x): slope −exp(x_v − tail), zero at the floor."""
        b, (x, set_) = self.b, n.args
        tail_q = n.q.with_(axis=Axis.TOK, live=False)
        tail = b.make("last", (n, set_), tail_q)
        head_a, last_a = a, a
        if a.q.axis is Axis.VOCAB:
            head_a = b.make("head", (a, set_), a.q)
            last_a = b.make("last", (a, set_), a.q.with_(axis=Axis.TOK))
        floor = b.const(TAIL_FLOOR)
        slope = b.where(b.compare("<", floor, tail), b.neg(b.exp(b.sub(x, tail))), b.const(0.0))
        self.give(x, b.add(head_a, b.mul(last_a, slope)), x)

    def _sum_v(self, n: Node, a: Node) -> None:
        x, set_ = n.args
        if x.q.axis < Axis.VOCAB:
            a = self.b.sum_v(a, set_)
        self.give(x, a, x)

    def _max_v(self, n: Node, a: Node) -> None:
        b, (x, set_) = self.b, n.args
        top = b.compare("==", x, n)
        one, zero = b.const(1.0), b.const(0.0)
        ties = b.sum_v(b.where(top, one, zero), set_)
        self.give(x, b.where(top, b.div(a, ties), zero), x)

    def _lse_v(self, n: Node, a: Node) -> None:
        b, (x, _) = self.b, n.args
        self.give(x, b.mul(a, b.exp(b.sub(x, n))), x)

    def _score_tail(self, n: Node, a: Node) -> None:
        """Outside the head: the slope of the body at y over the probability of having drawn y."""
        b, (_, inside) = self.b, n.args
        outside = b.compare("<", inside, b.const(0.5))
        for leaf, coefficient in tail_coefficients(b, n):
            self.give(leaf, b.where(outside, b.mul(a, coefficient), b.const(0.0)), n)

    # -- coupling ----------------------------------------------------------------------------
    def _sum_t(self, n: Node, a: Node) -> None:
        self.give(n.args[0], a, n.args[0])

    _sum_b = _sum_t

    def _symmetric(self, n: Node, a: Node) -> None:
        x = n.args[0]
        a = _at(self.b, a, n.q.axis if n.q.axis is not Axis.PROMPT else Axis.SEQ)
        self.give(x, self.b.make(n.op, (a,), n.q.with_(live=False), **dict(n.attrs)), x)

    _group_sum = _others_sum = _position_sum = _symmetric

    def _shift(self, n: Node, a: Node) -> None:
        back = -int(n.attr("n"))  # type: ignore[call-overload]
        self.give(n.args[0], self.b.shift(_at(self.b, a, Axis.TOK), back), n.args[0])

    def _scan(self, n: Node, a: Node) -> None:
        b, (x, c) = self.b, n.args
        q = n.q.with_(live=False)
        flow = b.make("scan_fwd", (_at(b, a, Axis.TOK), c), q)
        self.give(x, flow, n)
        if c.q.live:
            self.give(c, b.mul(flow, b.shift(n, 1)), n)

    def _scan_fwd(self, n: Node, a: Node) -> None:
        b, (x, c) = self.b, n.args
        flow = b.make("scan", (_at(b, a, Axis.TOK), c), n.q.with_(live=False, info=Info.FUTURE))
        self.give(x, flow, n)
        if c.q.live:
            self.give(c, b.mul(b.shift(flow, 1), n), n)

    def _max_t(self, n: Node, a: Node) -> None:
        b, x = self.b, n.args[0]
        top = b.where(b.compare("==", x, n), b.const(1.0), b.const(0.0))
        ties = b.couple("sum_t", _at(b, top, Axis.TOK), Axis.SEQ, Info.FUTURE)
        self.give(x, b.div(b.mul(_at(b, a, Axis.SEQ), top), ties), x)

    def _group_max(self, n: Node, a: Node) -> None:
        b, x = self.b, n.args[0]
        axis = Axis.TOK if n.q.axis is Axis.TOK else Axis.SEQ
        top = b.where(b.compare("==", x, n), b.const(1.0), b.const(0.0))
        total = b.couple("group_sum", _at(b, a, axis), n.q.axis, Info.PROMPT)
        ties = b.couple("group_sum", _at(b, top, axis), n.q.axis, Info.PROMPT)
        self.give(x, b.div(b.mul(total, top), ties), x)

    def _max_b(self, n: Node, a: Node) -> None:
        b, x = self.b, n.args[0]
        top = b.where(b.compare("==", x, n), b.const(1.0), b.const(0.0))
        ties = b.couple("sum_b", top, Axis.CONST, Info.PROMPT)
        self.give(x, b.div(b.mul(a, top), ties), x)


def _mixture_terms(b: Builder, n: Node, a: Node) -> tuple[Node, Node] | None:
    """Where a is c · exp(n) for n = log(k₁p₁ + k₂p₂), its two summands in the order of n's arguments.

    So it is in every expectation under a mixture of its own logarithm (Jensen-Shannon): the
    gradient through log m is then a multiple of p alone.
    """
    terms = _summands(a)
    if len(terms) != 2:
        return None
    factors = [_factors(t) for _, t in terms]
    found: list[Node] = []
    shares = []
    for x in n.args:
        part = b.exp(x.args[0]) if x.op == "add" and x.args[1].q.axis < Axis.VOCAB else b.exp(x)
        k = b.exp(x.args[1]) if part is not b.exp(x) else b.const(1.0)
        hits = [i for i, (_, powers) in enumerate(factors) if powers.get(part.id) == 1]
        if len(hits) != 1:
            return None
        sign, term = terms[hits[0]]
        size, powers = factors[hits[0]]
        kept = Counter(powers)
        kept[part.id] -= 1
        below, inner = _factors(k)
        kept.subtract(inner)
        shares.append((sign * size / below, {i: p for i, p in kept.items() if p}))
        found.append(term if sign > 0 else b.neg(term))
    (c, left), (d, right) = shares
    same = left == right and abs(c - d) <= 1e-12 * abs(c)
    return (found[0], found[1]) if same and found[0] is not found[1] else None


def _summands(a: Node, sign: float = 1.0) -> list[tuple[float, Node]]:
    if a.op == "neg":
        return _summands(a.args[0], -sign)
    if a.op in ("add", "sub"):
        second = sign if a.op == "add" else -sign
        return _summands(a.args[0], sign) + _summands(a.args[1], second)
    return [(sign, a)]


def _factors(n: Node) -> tuple[float, Counter[int]]:
    """A product as its number and the powers of its other factors, by node id."""
    if n.op == "const":
        return float(n.value or 0.0) or 1e-300, Counter()
    if n.op == "neg":
        c, powers = _factors(n.args[0])
        return -c, powers
    if n.op in ("mul", "div"):
        (c, left), (d, right) = (_factors(x) for x in n.args)
        powers = Counter(left)
        powers.update(right) if n.op == "mul" else powers.subtract(right)
        return (c * d if n.op == "mul" else c / d), powers
    return 1.0, Counter({n.id: 1})


TAIL_FLOOR = -13.815510557964274  # log 1e-6: fp32 sums of probabilities are exact to about 1e-7


def _at(b: Builder, x: Node, axis: Axis) -> Node:
    """A value with exactly this axis; VOCAB values broadcast on their own."""
    if x.q.axis >= axis or axis is Axis.VOCAB:
        return x
    one = b.input("one", Quantity(axis, "real", 1, 1, Info.STATE))
    return b.make("mul", (one, x), x.q.with_(axis=axis))


def without_multiples(b: Builder, g: Node, leaf: Node) -> Node | None:
    """A dense cotangent of log π without its multiples of π: g − (Σ g) π is the same. None: nothing
    is left."""
    if g.op == "exp" and g.args[0] is leaf:
        return None
    if g.op in ("add", "sub"):
        left, right = (
            without_multiples(b, x, leaf) if x.q.axis is Axis.VOCAB else x for x in g.args
        )
        if left is None or right is None:
            kept = left if right is None else right if g.op == "add" else b.neg(right)
            return kept
        return g if (left, right) == g.args else getattr(b, g.op)(left, right)
    if g.op in ("mul", "div", "neg"):
        rows = [x for x in g.args if x.q.axis is not Axis.VOCAB]
        entries = [x for x in g.args if x.q.axis is Axis.VOCAB]
        if len(entries) != 1 or (g.op == "div" and g.args[1] in entries):
            return g
        kept = without_multiples(b, entries[0], leaf)
        if kept is None or kept is entries[0]:
            return None if kept is None else g
        return getattr(b, g.op)(kept, *rows)
    return g


def adjoints(b: Builder, root: Node) -> dict[int, Node]:
    """Node id -> ∂(Σ_n root[n])/∂node, for the live nodes below the root."""
    return Adjoint(b, root).run().adj


def tail_coefficients(b: Builder, tail: Node) -> list[tuple[Node, Node]]:
    """(log-probability at y, ∂body/∂it / π(y)) for every live distribution a tail's body reads.

    Σ over the entries outside the head is E_{y~π}[· / π(y)]; y is drawn at temperature 1.
    """
    body = tail.args[0]
    drawn = b.exp(b.at_y(b.logp("student", True)))
    found = adjoints(b, body)
    leaves = [n for n in nodes_below([body]) if n.op == "at_y" and n.q.live and n.id in found]
    return [(leaf, b.sg(b.div(found[leaf.id], drawn))) for leaf in leaves]


def strip(b: Builder, root: Node) -> Node:
    """Without stop-gradients and markers: what a pass computes when no autograd follows."""
    from opdsl.ir.program import rewrite

    def change(n: Node, args: tuple[Node, ...]) -> Node | None:
        if n.op in ("sg", "live"):
            return args[0]
        return None

    return rewrite(b, root, change)


def cotangents(b: Builder, root: Node) -> tuple[Cotangent, ...]:
    """The coefficient form of Σ_n root[n]: one cotangent per live leaf, detached."""
    flow = Adjoint(b, root).run()
    leaves = [n for n in nodes_below([root]) if n.op == "logp" and n.q.live]
    out = []
    for leaf in leaves:
        merged: dict[int, tuple[Node, Node]] = {}
        for set_, value in flow.sparse_set.get(leaf.id, ()):
            old = merged.get(set_.id)
            merged[set_.id] = (set_, value if old is None else b.add(old[1], value))
        sets = tuple((s, strip(b, v)) for s, v in merged.values() if not v.is_const(0))
        y = flow.sparse_y.get(leaf.id)
        dense = flow.adj.get(leaf.id)
        y = None if y is None else strip(b, y)
        dense = None if dense is None else strip(b, dense)
        found = Cotangent(
            leaf,
            None if y is None or y.is_const(0) else y,
            sets,
            None if dense is None or dense.is_const(0) else dense,
        )
        if found.roots:
            out.append(found)
    return tuple(out)
