"""From node graphs to mathematics: normal form, recognised structure, then a readable layout.

`Printer.expr` is the entrance. What the algebra cannot see through (min, scans, group means …) is
written operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable

from opdsl.formula.algebra import Atom, Dist, Mono, Poly, constant, in_order, leaf, only_dist
from opdsl.formula.conditions import Conditions
from opdsl.formula.factor import Layout
from opdsl.formula.normal import Normal, is_mean, is_softmax
from opdsl.formula.notation import (
    ONE,
    Add,
    Big,
    Call,
    Fn,
    Frac,
    Ind,
    Join,
    Math,
    Num,
    Pow,
    Rel,
    Sym,
    Text,
    Wrap,
    add,
    extent,
    mul,
    unicode,
    words,
)
from opdsl.formula.recognise import Divergence, differences, recognised, unmixed
from opdsl.formula.symbols import Named, Symbols
from opdsl.meaning.graph import static_value
from opdsl.meaning.node import Node

_OVER = {
    "others_sum": "j ≠ i", "group_sum": "j ∈ group", "group_max": "j ∈ group",
    "position_sum": "same position", "sum_b": "batch", "max_b": "batch", "sum_t": "k",
}  # fmt: skip
_HEADS = {
    "KL": "KL",
    "H": "H",
    "cross": "CE",
    "TV": "TV",
    "chi2": "χ²",
    "hellinger": "Hel²",
    "JSD": "JSD",
}
MAX_PART = 300  # symbols of one operation with all that is inside; more is not written out
MAX_WHOLE = 1000  # of one formula; the largest shipped one has 220
TOO_LONG = Sym("⟨…⟩", r"\langle\ldots\rangle")


class Printer(Conditions):
    """Writes nodes with the letters of `symbols`; `normal` knows which nodes have a name."""

    def __init__(self, normal: Normal, symbols: Symbols):
        self.normal, self.symbols = normal, symbols
        self.time, self.row, self.star = "t", "", False  # star: rows of given text
        self.written_out = False  # write divergences as sums
        self.divergences: dict[tuple, Divergence] = {}
        self.ratios: dict[tuple[Dist, Dist], bool] = {}  # pair -> printed at y as well
        self.layout = Layout(self)
        self._written: dict[tuple, Math] = {}
        self.cut = False  # whether something was too long to write
        self.depth = -1  # how many index letters are taken, less one: Σ_w inside an entry of v

    # -- entrances -----------------------------------------------------------------------------
    def expr(self, n: Node, at: str = "v") -> Math:
        return self.poly(self.normal.poly(n, at))

    def poly(self, a: Poly) -> Math:
        found = self.layout(
            differences(_means(self._windows(unmixed(recognised(a, not self.written_out)))))
        )
        return self._cut(found, MAX_WHOLE)

    def _cut(self, found: Math, most: int) -> Math:
        """The expression, or ⟨…⟩ where nobody would read it to its end."""
        if extent(found, most) <= most:
            return found
        self.cut = True
        return TOO_LONG

    def moved(self, n: Node, time: str | None = None, row: str | None = None) -> Math:
        """The value of a node at another time or of another rollout."""
        old = self.time, self.row
        self.time, self.row = time or self.time, self.row if row is None else row
        try:
            return self.expr(n)
        finally:
            self.time, self.row = old

    def entry(self, a: Poly) -> Math:
        """One entry of a vector over tokens: `v` is free, so sums run over w."""
        return self._deeper(lambda: self.poly(a))

    def _deeper(self, write: Callable[[], Math]) -> Math:
        self.depth += 1
        try:
            return write()
        finally:
            self.depth -= 1

    @property
    def letter(self) -> Sym:
        """The index of the innermost sum (or of the entry that is written)."""
        name = "vwu"[min(max(self.depth, 0), 2)]
        return Sym(name, name)

    # -- atoms -----------------------------------------------------------------------------------
    def atom(self, x: Atom) -> Math:
        match x.kind:
            case "P" if not x.at:  # as a vector
                return self.symbols.dist(x.key)  # type: ignore[arg-type]
            case "P":
                return Call(self.symbols.dist(x.key), (self.index(x.at),))  # type: ignore[arg-type]
            case "L":
                return Fn("log", Call(self.symbols.dist(x.key), (self.index(x.at),)))  # type: ignore[arg-type]
            case "diff":
                return self.difference(x, True)
            case "named":
                return self.named(x)
            case "node":
                return self.node(self.normal.nodes[x.key], x.at or "v")  # type: ignore[index]
            case "sum":
                sid, inner = x.key  # type: ignore[misc]
                return self._mass(sid, inner) or self.total(sid, {inner: 1.0})
            case "total":
                sid, body = x.key  # type: ignore[misc]
                return self.total(sid, in_order(body))
            case "mean":
                sid, inner = x.key  # type: ignore[misc]
                return self.total(sid, {inner: 1.0}, "mean")
            case "count":
                s = self.symbols.set(self.normal.sets[x.key])  # type: ignore[index]
                return Wrap("abs", Sym("V", "V") if s is None else s)
            case "exp":
                return self._exponential(in_order(x.key))  # type: ignore[call-overload]
            case "abs":
                body = self.poly(in_order(x.key))  # type: ignore[call-overload]
                if isinstance(body, Add) and not any(s for s, _ in body.items):
                    body = add([(True, m) for _, m in body.items])  # |−x| is |x|
                return Wrap("abs", body)
            case "group":
                return self.poly(in_order(x.key))  # type: ignore[call-overload]
            case "log":
                return Fn("log", self.poly(in_order(x.key)))  # type: ignore[call-overload]
            case "div":
                return self.divergence(x.key)  # type: ignore[arg-type]
            case "window":
                key, n = x.key  # type: ignore[misc]
                scan = self.normal.nodes[key]
                last = f"t+{n - 1}"
                return Big("Σ", Text(f"k = t … {last}"), self.moved(scan.args[0], "k"))
            case "e":
                y = self.index("y")
                assert isinstance(y, Sym)
                return Sym(f"e_{{{y.u}}}", f"e_{{{y.l}}}")
            case "ind" | "in":
                return Ind(self.literal(x, True))
        raise TypeError(x.kind)

    def index(self, at: str) -> Math:
        if at == "y":
            t = self.time if len(self.time) == 1 else "{" + self.time + "}"
            mark = "*" if self.star else self.row
            row = mark if self.star else f"^{mark}" if mark else ""
            up = f"^{{{mark}}}" if mark else ""
            below = t.replace("−", "-")
            return Sym(f"y_{t}{row}", f"y_{below}{up}")
        return Sym("rest", r"\mathrm{rest}") if at == "rest" else self.letter

    def named(self, x: Atom) -> Math:
        assert isinstance(x.key, Named)
        s = x.key.at(self.time, self.row)
        return Call(s, (self.index(x.at),)) if x.at else s

    def difference(self, x: Atom, product: bool) -> Math:
        """ℓ_t(v), or the logarithm of a ratio."""
        a, b = x.key  # type: ignore[misc]
        hat = a[0] == b[0] == "renorm" or a[0] == b[0] == "bin"
        left, right = (a[1], b[1]) if hat else (a, b)
        own = left == leaf("student") and self.symbols.teacher is not None
        if own and right == leaf(self.symbols.teacher) and not self.symbols.plain:  # type: ignore[arg-type]
            self.ratios[a, b] = self.ratios.get((a, b), False) or x.at == "y"
            mark = "\u0302" if a[0] == "renorm" else ""
            letter = Named(f"ℓ{mark}", r"\hat{\ell}" if mark else r"\ell").at(self.time, self.row)
            return letter if x.at == "y" else Call(letter, (self.index(x.at),))
        top, bottom = (Call(self.symbols.dist(d), (self.index(x.at),)) for d in (a, b))
        if product:
            return Fn("log", Frac(top, bottom))
        return Add(((True, Fn("log", top)), (False, Fn("log", bottom))))

    def divergence(self, d: Divergence) -> Math:
        s = self.symbols.set(self.normal.sets[d.set])
        p = self.symbols.dist(d.p)
        q = self.symbols.dist(d.q) if d.q is not None else None
        key = (d.kind, d.set, d.detached, d.p[0] == "renorm", d.weight is not None)
        self.divergences.setdefault(key, d)
        if d.kind == "L2":
            gap = Sym(f"‖{p.u} − {q.u}‖", rf"\Vert {p.l} - {q.l} \Vert")  # type: ignore[union-attr]
            under = Sym(f"{gap.u}_{s.u}", f"{gap.l}_{{{s.l}}}") if s else gap
            return Pow(under, Num(2))
        head = _HEADS[d.kind]
        marks_u = [s.u] if s else []
        marks_l = [s.l] if s else []
        if d.weight is not None:
            weight = self.poly(in_order(d.weight))
            marks_u.insert(0, unicode(weight))
            from opdsl.formula.notation import latex

            marks_l.insert(0, latex(weight))
        up_u, up_l = ("ˢᵍ", r"^{\mathrm{sg}}") if d.detached else ("", "")
        tex = {"χ²": r"\chi^2", "Hel²": r"\mathrm{Hel}^2"}.get(head, rf"\mathrm{{{head}}}")
        name = Sym(
            head + up_u + (f"_{','.join(marks_u)}" if marks_u else ""),
            tex + up_l + (f"_{{{','.join(marks_l)}}}" if marks_l else ""),
        )
        if q is None:
            return Call(name, (p,))
        return Call(name, (p, q), " ‖ " if d.kind in ("KL", "chi2", "JSD") else ", ")

    def _exponential(self, a: Poly) -> Math:
        if len(a) == 1:
            ((m, c),) = a.items()
            logs = [x for x, p in m if x.kind == "L" and p == 1]
            if len(logs) == 1 and not any(x.varies for x, _ in m if x is not logs[0]):
                rest = {m - {(logs[0], 1.0)}: c}
                return Pow(self.atom(Atom("P", logs[0].key, logs[0].at)), self.poly(rest))
        return Call(Sym("exp", r"\exp"), (self.poly(a),))

    def _mass(self, sid: int, inner: Mono) -> Math | None:
        """π(Ω) for Σ_{v ∈ Ω} π(v)."""
        s = self.symbols.set(self.normal.sets[sid])
        if s is None or len(inner) != 1:
            return None
        ((x, p),) = inner
        single = x.kind == "P" and p == 1 and x.key[0] == "leaf"  # type: ignore[index]
        return Call(self.symbols.dist(x.key), (s,)) if single else None  # type: ignore[arg-type]

    def total(self, sid: int, body: Poly, sign: str = "Σ") -> Math:
        """Σ over a set; conditions shared by every summand move under the sign."""
        return self._deeper(lambda: self._total(sid, body, sign))

    def _total(self, sid: int, body: Poly, sign: str) -> Math:
        s = self.symbols.set(self.normal.sets[sid])
        shared = None
        for m in body:
            own = {x for x, _ in m if x.kind in ("ind", "in")}
            shared = own if shared is None else shared & own
        tests = sorted(shared or (), key=lambda x: x.order)
        inner = {frozenset((x, p) for x, p in m if x not in tests): c for m, c in body.items()}
        under: Math = self.letter if s is None else Rel("∈", self.letter, s)
        if tests:
            first, *more = (self.literal(x, True) for x in tests)
            under = Join(",", (Rel(":", under, first), *more))
        return Big(sign, under, self.layout(differences(inner)))

    # -- operations the algebra does not see through ---------------------------------------------------
    def node(self, n: Node, at: str = "v") -> Math:
        return self._once(("value", n.id, at), lambda: self._node(n, at))

    def condition(self, n: Node, at: str = "v", positive: bool = True) -> Math:
        return self._once(
            ("test", n.id, at, positive), lambda: super(Printer, self).condition(n, at, positive)
        )

    def _once(self, what: tuple, write: Callable[[], Math]) -> Math:
        """Each node is written once for a place: nested conditions would be met again and again."""
        here = self.time, self.row, self.star, self.written_out, self.depth, self.symbols.plain
        key = (what, here, len(self.normal.names))
        if key not in self._written:
            self._written[key] = self._cut(write(), MAX_PART)
        return self._written[key]

    def _node(self, n: Node, at: str) -> Math:
        match n.op:
            case "param":
                return self.symbols.param(str(n.attr("name")))
            case "schedule":
                self.symbols.used["schedule", n.id] = n
                return self.symbols.schedule(n.id)
            case "input":
                return self._input(n)
            case "add" | "sub":
                a, b = (self.expr(x, at) for x in n.args)
                return add([(True, a), (n.op == "add", b)])
            case "min" | "max":
                return self._extreme(n, at)
            case "tanh" | "sigmoid":
                return Call(Sym(n.op, words(n.op)), (self.expr(n.args[0], at),))
            case "abs":
                return Wrap("abs", self.expr(n.args[0], at))
            case "log":
                return Fn("log", self.expr(n.args[0], at))
            case "exp":
                return Call(Sym("exp", r"\exp"), (self.expr(n.args[0], at),))
            case "pow":
                return Pow(self.expr(n.args[0], at), self.expr(n.args[1], at))
            case "mul":
                return mul([self.expr(a, at) for a in n.args])
            case "div":
                return self._divided(n, at)
            case "scan":
                return self._scan(n, "k ≥ t")
            case "scan_fwd":
                return self._so_far(n)
            case "max_t" if n.args[0].op == "neg":
                return Add(
                    ((False, Big("min", Sym("k", "k"), self.moved(n.args[0].args[0], "k"))),)
                )
            case "max_t":
                return Big("max", Sym("k", "k"), self.moved(n.args[0], "k"))
            case "rank_t":
                return Call(Sym("rank_t", words("rank") + "_t"), (self.expr(n.args[0]),))
            case "shift":
                return self._shift(n)
            case "max_v" | "lse_v":
                return self._deeper(lambda: self._over_entries(n))
            case "quantile_b":
                return Call(Sym(f"quantile_{n.attr('share'):g}", words(f"quantile {n.attr('share'):g}")),
                            (self.expr(n.args[0]),))  # fmt: skip
            case "group_max" | "max_b" if n.args[0].op == "neg":
                least = Big("min", _over(_OVER[n.op]), self.moved(n.args[0].args[0], row="j"))
                return Add(((False, least),))
            case "group_max" | "max_b":
                return Big("max", _over(_OVER[n.op]), self.moved(n.args[0], row="j"))
            case "sum_t" if self.normal.poly(n.args[0]) == constant(1.0):
                row = f"^{self.row}" if self.row else ""
                return Sym(f"|y{row}|", rf"|y{row}|")
            case "sum_t":
                return Big("Σ", Sym("k", "k"), self.moved(n.args[0], "k"))
            case "group_sum" | "others_sum" | "position_sum" | "sum_b":
                return Big("Σ", _over(_OVER[n.op]), self.moved(n.args[0], row="j"))
            case "score_tail":
                self.symbols.used["score_tail", n.id] = n
                tails = [k for k in self.symbols.used if k[0] == "score_tail"]
                marks = tails.index(("score_tail", n.id))
                return Sym("τ" + "′" * marks + "_t", r"\tau" + "'" * marks + "_t")
            case "where":
                test, yes, no = n.args
                on, off = Ind(self.condition(test, at)), Ind(self.condition(test, at, False))
                return add(
                    [(True, mul([on, self.expr(yes, at)])), (True, mul([off, self.expr(no, at)]))]
                )
        return Call(Sym(n.op, words(n.op)), tuple(self.expr(a, at) for a in n.args))

    def _over_entries(self, n: Node) -> Math:
        s = self.symbols.set(n.args[1])
        under = Rel("∈", self.letter, s) if s else self.letter
        if n.op == "max_v":
            return Big("max", under, self.expr(n.args[0], "v"))
        mass = Big("Σ", under, Call(Sym("exp", r"\exp"), (self.expr(n.args[0], "v"),)))
        dist = only_dist(self.normal.poly(n.args[0], "v"))
        if dist is not None:
            mass = Big("Σ", under, self.atom(Atom("P", dist, "v")))
        return Fn("log", mass)

    def _input(self, n: Node) -> Math:
        row = f"^{self.row}" if self.row else ""
        match n.attr("name"):
            case "outcome":
                return Sym(f"R{row}", f"R{row}")
            case "length":
                return Sym(f"|y{row}|", rf"|y{row}|")
            case "position":
                return Sym("pos_t", r"\mathrm{pos}_t")
            case "step":
                return Sym("step", r"\mathrm{step}")
            case "values":
                name = str(n.attr("critic")).split(".")[-1]
                t = self.time if len(self.time) == 1 else "{" + self.time + "}"
                return Call(Sym(name, name if len(name) == 1 else words(name)),
                            (Sym(f"s_{t}", f"s_{t}".replace("−", "-")),))  # fmt: skip
            case "special" | "field":
                return Ind(self.condition(n))
            case "variable":
                named = Named(
                    str(n.attr("of")),
                    words(str(n.attr("of"))) if len(str(n.attr("of"))) > 1 else str(n.attr("of")),
                )
                return named.at(self.time, self.row)
        return Sym(str(n.attr("name")), words(str(n.attr("name"))))

    def _extreme(self, n: Node, at: str) -> Math:
        a, b = n.args
        if n.op == "min" and a.op == "max" and b.value is not None and a.args[1].value is not None:
            args = (self.expr(a.args[0], at), self.expr(a.args[1]), self.expr(b))
            return Call(Sym("clip", r"\mathrm{clip}"), args)
        if n.op == "max" and (a.is_const(0) or b.is_const(0)):
            return Wrap("positive", self.expr(b if a.is_const(0) else a, at))
        return Call(Sym(n.op, rf"\{n.op}"), (self.expr(a, at), self.expr(b, at)))

    def _divided(self, n: Node, at: str) -> Math:
        top, bottom = n.args
        if is_mean(n):
            if top.op == "sum_t":
                return Big("mean", Sym("k", "k"), self.moved(top.args[0], "k"))
            return Big("mean", _over(_OVER[top.op]), self.moved(top.args[0], row="j"))
        if is_softmax(n):
            return Big("softmax", Text("group"), self.expr(top.args[0].args[0]))
        return Frac(self.expr(top, at), self.expr(bottom, at))

    def _scan(self, n: Node, under: str) -> Math:
        a, rate = n.args
        known = static_value(rate)
        if known == 1:
            weight: Math = ONE
        elif known is None:
            return Call(Sym("scan", words("scan")), (self.expr(a), self.expr(rate)))
        else:
            power = "k−t" if under == "k ≥ t" else "k−t−1"
            base = self.expr(rate)
            weight = Pow(base, Sym(power, power.replace("−", "-")))
        sign = (
            Rel("≥", Sym("k", "k"), Sym("t", "t"))
            if under == "k ≥ t"
            else Rel(">", Sym("k", "k"), Sym("t", "t"))
        )
        return Big("Σ", sign, mul([weight, self.moved(a, "k")]))

    def _so_far(self, n: Node, before: bool = False) -> Math:
        """Σ_{k ≤ t} c^{t−k} x_k, or up to the last token; the rate is stored one token later
        (see `Builder.scan_fwd`)."""
        a, rate = n.args
        known = static_value(rate)
        if known is None:
            return Call(Sym("carried", words("carried")), (self.expr(a), self.expr(rate)))
        power = "t−1−k" if before else "t−k"
        weight = ONE if known == 1 else Pow(self.expr(rate), Sym(power, power.replace("−", "-")))
        sign = Rel("<" if before else "≤", Sym("k", "k"), Sym("t", "t"))
        return Big("Σ", sign, mul([weight, self.moved(a, "k")]))

    def _shift(self, n: Node) -> Math:
        by = int(n.attr("n"))  # type: ignore[call-overload]
        x = n.args[0]
        if x.op == "scan" and by == 1 and x.id not in self.normal.names and self.time == "t":
            return self._scan(x, "k > t")
        if x.op == "scan_fwd" and by == -1 and x.id not in self.normal.names and self.time == "t":
            return self._so_far(x, before=True)
        return self.moved(x, f"{self.time}{'+' if by > 0 else '−'}{abs(by)}")

    def _windows(self, a: Poly) -> Poly:
        """Σ_{k≥t} − Σ_{k≥t+n} is a sum of n terms."""
        out = dict(a)
        for m, c in a.items():
            for x, p in m:
                if x.kind != "node" or p != 1:
                    continue
                n = self.normal.nodes[x.key]  # type: ignore[index]
                if (
                    n.op != "shift"
                    or n.args[0].op != "scan"
                    or static_value(n.args[0].args[1]) != 1
                ):
                    continue
                scan = self.normal.opaque(n.args[0], "v")
                ((sm, _),) = scan.items()
                partner = (m - {(x, p)}) | sm
                if abs(out.get(partner, 0.0) + c) < 1e-12 and m in out:
                    out.pop(partner)
                    out.pop(m)
                    window = Atom("window", (n.args[0].id, int(n.attr("n"))))  # type: ignore[call-overload]
                    out[(m - {(x, p)}) | {(window, 1.0)}] = -c
        return out


def _over(text: str) -> Math:
    """What a sum over rows runs over: `j ∈ group`, or words."""
    for op in ("≠", "∈"):
        left, sign, right = text.partition(f" {op} ")
        if sign:
            return Rel(op, Sym(left, left), Sym("i", "i") if right == "i" else Text(right))
    return Sym(text, text) if len(text) == 1 else Text(text)


def _means(a: Poly) -> Poly:
    """Σ over a set, over its size."""
    out: Poly = {}
    for m, c in a.items():
        powers = dict(m)
        for x in list(powers):
            size = Atom("count", x.key[0]) if x.kind == "sum" else None  # type: ignore[index]
            if size is not None and powers.get(size) == -1 and powers[x] == 1:
                del powers[size], powers[x]
                powers[Atom("mean", x.key)] = 1.0
                break
        out[frozenset(powers.items())] = c
    return out
