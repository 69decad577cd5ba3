"""Expressions: syntax tree -> typed nodes, with names resolved and definitions inlined.

Errors are reported once, at the user's own text (a fault inside the standard library points at
the call), and abandon only the statement they are in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from opdsl.codes import make
from opdsl.diagnostics import Label, Report
from opdsl.meaning import values as vl
from opdsl.meaning.allowed import marked
from opdsl.meaning.graph import static_value
from opdsl.meaning.inline import Inliner, RecRef
from opdsl.meaning.names import BUILTIN_FUNCTIONS, BUILTIN_NAMES, Scope, closest
from opdsl.meaning.node import Builder, Node, compatible_units
from opdsl.meaning.quantity import Axis, Info, Quantity
from opdsl.meaning.spec import Acceptance
from opdsl.records import record, replace
from opdsl.source import NOWHERE, Source, Span
from opdsl.syntax import tree


class Stop(Exception):
    """This statement cannot be understood; its fault has been reported."""


@record
class Thunk(vl.Value):
    """A `let`: evaluated where it is used, because `support` and `A` differ by term."""

    expr: tree.Expr
    env: Env
    type: tree.TypeExpr | None = None


@dataclass(eq=False)
class Env:
    scope: Scope
    names: dict[str, vl.Value] = field(default_factory=dict)
    parent: Env | None = None

    def find(self, name: str) -> vl.Value | None:
        env: Env | None = self
        while env is not None:
            if name in env.names:
                return env.names[name]
            env = env.parent
        return None

    def all_names(self) -> list[str]:
        out: list[str] = []
        env: Env | None = self
        while env is not None:
            out += env.names
            env = env.parent
        return out

    def child(self, **names: vl.Value) -> Env:
        return Env(self.scope, dict(names), self)


@record
class Context:
    """What built-in names mean here: they depend on the term, not on the file."""

    support: vl.Domain | None = None
    support_span: Span = NOWHERE
    advantage: Node | None = None
    teacher: vl.Dist | None = None  # the term's own teacher, for baselines
    v_tail: str | None = None
    group: int = 1
    own_support: vl.Domain | None = None  # what `support` written in a regularizer means
    broken: bool = False  # the term's own feedback was refused: `A` stays silent


MAX_STEPS = 20_000  # expressions looked at, those of definitions included; shipped specs: 350
UNITS = {"bits": ("nats", 0.6931471805599453), "%": ("real", 0.01), "nats": ("nats", 1.0)}


class Elaborator(Inliner):
    """Evaluates expressions; see `opdsl.meaning.builtins` for the functions of the language."""

    def __init__(self, builder: Builder, report: Report, std: Scope):
        self.b = builder
        self.report = report
        self.ctx = Context()
        self.std = std
        self._calls: list[tuple[Span, str]] = []
        self._let: tuple[Thunk | None, int] = None, 0  # being read, and how many calls outside it
        self._coins: dict[object, int] = {}  # place of a `chance` -> which draw of a token it is
        self.steps = 0
        self.access: dict[str, str] = {}  # teacher -> access level
        self.policies: tuple[str, ...] = ()  # who draws the texts of the method's states
        self.golden = False  # set when an expression reads golden rows
        self.acceptances: tuple[Acceptance, ...] = ()

    # -- reporting -------------------------------------------------------------------------
    def fail(self, code: str, span: Span, message: str, label: str = "", **more: object) -> None:
        """Report at the user's text and give up this statement."""
        notes = list(more.pop("notes", ()))  # type: ignore[call-overload]
        outer = self._outside(span)
        if outer is not span:
            notes.append(f"inside `{self._calls[-1][1]}`: {span.text.strip()[:80]}")
        self.report.add(make(code, outer, message, label, notes=notes, **more))  # type: ignore[arg-type]
        raise Stop

    def object(self, code: str, span: Span, message: str, label: str = "", **more: object) -> None:
        """Report an error that `allow` may override: gives up unless it is allowed."""
        found = make(code, self._outside(span), message, label, **more)  # type: ignore[arg-type]
        found = marked(self.acceptances, found)
        self.report.add(found)
        if found.overridden is None:
            raise Stop

    def of_library(self, source: Source) -> bool:
        """Whether a source belongs to the standard library."""
        return any(source is s for s in getattr(self.std.defs, "sources", ()))

    def _outside(self, span: Span) -> Span:
        """The user's own text that led here: the call, for places in the standard library."""
        if self._calls and self.of_library(span.source):
            for call, _ in self._calls:
                if not self.of_library(call.source):
                    return call
        return span

    @contextmanager
    def context(self, **changes: object) -> Iterator[None]:
        old = self.ctx
        self.ctx = replace(old, **changes)  # type: ignore[arg-type]
        try:
            yield
        finally:
            self.ctx = old

    # -- entry points ----------------------------------------------------------------------
    def number(self, expr: tree.Expr, env: Env, what: str = "a number") -> Node:
        value = self.ev(expr, env)
        if isinstance(value, vl.Bad):
            raise Stop
        if not isinstance(value, vl.Num):
            self._not_a(expr, value, what)
        return value.node  # type: ignore[union-attr]

    def dist(self, expr: tree.Expr, env: Env) -> vl.Dist:
        value = self.ev(expr, env)
        if isinstance(value, vl.Bad):
            raise Stop
        if not isinstance(value, vl.Dist):
            self._not_a(expr, value, "a distribution")
        return value  # type: ignore[return-value]

    def domain(self, expr: tree.Expr, env: Env) -> vl.Domain:
        value = self.ev(expr, env)
        if isinstance(value, vl.Bad):
            raise Stop
        if not isinstance(value, vl.Domain):
            self._not_a(expr, value, "an index set over the vocabulary")
        return value  # type: ignore[return-value]

    def static(self, expr: tree.Expr, env: Env, what: str) -> float:
        """A number known before any batch: literals, knobs and arithmetic on them."""
        node = self.number(expr, env, what)
        value = static_value(node)
        if value is None:
            self.fail(
                "OPD122",
                expr.span,
                f"{what} must be a fixed number",
                f"this is {node.q.describe()}",
                helps=["use a literal or a `param`"],
            )
        return value  # type: ignore[return-value]

    def _not_a(self, expr: tree.Expr, value: vl.Value, what: str) -> None:
        helps = []
        text = expr.span.text
        if isinstance(value, vl.Dist) and not what.startswith("an index set") and len(text) <= 40:
            helps = [f"{text}[y] is its probability of the sampled token"]
        if isinstance(value, vl.Num) and what == "a distribution":
            helps = ["a distribution is `student`, `initial`, a teacher, or a mixture of them"]
        kind = "distribution over the vocabulary" if isinstance(value, vl.Dist) else value.kind
        article = "an" if kind[0] in "aeiou" else "a"
        self.fail(
            "OPD202", expr.span, f"expected {what} here", f"this is {article} {kind}", helps=helps
        )

    # -- dispatch --------------------------------------------------------------------------
    def ev(self, expr: tree.Expr, env: Env) -> vl.Value:
        self.steps += 1
        if self.steps > MAX_STEPS:
            self.fail(
                "OPD009",
                expr.span,
                "this method unfolds into more work than opdsl accepts",
                f"step {self.steps} of writing it out",
                helps=["a name used twice by a name used twice … doubles at every step"],
            )
        method: Callable[..., vl.Value] = getattr(self, f"_{type(expr).__name__.lower()}")
        outer, self.b.span = self.b.span, self._outside(expr.span)
        try:
            return method(expr, env)
        finally:
            self.b.span = outer

    def _number(self, e: tree.Number, env: Env) -> vl.Value:
        if e.unit is None:
            return vl.Num(self.b.const(e.value))
        unit, scale = UNITS.get(e.unit, ("int", 1.0))
        return vl.Num(self.b.const(e.value * scale, unit))

    def _text(self, e: tree.Text, env: Env) -> vl.Value:
        return vl.Str(e.value)

    def _name(self, e: tree.Name, env: Env) -> vl.Value:
        found = env.find(e.name)
        if isinstance(found, Thunk):
            outside, self._let = self._let, (found, len(self._calls))
            try:
                value = self.ev(found.expr, found.env)
            finally:
                self._let = outside
            if found.type is not None and isinstance(value, vl.Num):
                value = vl.Num(self.check_type(value.node, found.type, e.span, e.name))
            return value
        if found is not None:
            return found
        if e.name in BUILTIN_NAMES:
            return self._builtin_name(e)
        if e.name == "T" and self.ctx.teacher is not None and self.of_library(e.span.source):
            return self.ctx.teacher  # the term's own teacher, in a baseline of the library
        if e.name in BUILTIN_FUNCTIONS:
            return vl.Builtin(e.name)
        definition = env.scope.find_def(e.name)
        if definition is not None:
            return vl.Closure(*definition)
        self.unknown(e.name, e.span, env)
        raise Stop

    def coin(self, span: Span) -> int:
        """The number of a `chance`: one for each place, however often a `let` around it is read."""
        let, outside = self._let
        path = [(s.source.name, s.start) for s, _ in self._calls[outside:]]
        key = (id(let), *path, span.source.name, span.start)
        return self._coins.setdefault(key, len(self._coins))

    def unknown(self, name: str, span: Span, env: Env) -> None:
        std = env.scope
        while std.parent is not None:
            std = std.parent
        local = [*env.all_names(), *env.scope.def_names()]
        near = closest(name, [*local, *BUILTIN_NAMES, *BUILTIN_FUNCTIONS])
        helps = []
        if near is not None:
            entry = std.defs.get(near)
            about = f" (standard library: {entry.doc})" if entry is not None and entry.doc else ""
            helps.append(f"a close name: `{near}`{about}")
        elif name[:1].isupper() and name.isidentifier():
            helps.append(
                f"a teacher is declared first:  teacher {name} = external(access = logits)"
            )
        else:
            helps.append("`opdsl explain NAME` shows a definition; `opdsl list std` lists them")
        self.fail(
            "OPD101",
            span,
            f"I cannot find anything named `{name}`",
            "not in this method, its imports or the standard library",
            helps=helps,
        )

    def _builtin_name(self, e: tree.Name) -> vl.Value:
        b, name = self.b, e.name
        if name == "student":
            return vl.LeafDist("student", True)
        if name in ("initial", "reference"):
            return vl.LeafDist("initial")
        if name == "rollout":
            return vl.SamplerDist()
        if name in ("data", "golden", "prompt"):
            return vl.Word(name)
        if name == "y":
            return vl.IndexY()
        if name == "t":
            return vl.IndexT(0)
        if name in ("v", "i"):
            loop = "v in support" if name == "v" else "i in group"
            self.fail(
                "OPD210",
                e.span,
                f"`{name}` has no meaning here",
                "not inside a sum or set over it",
                helps=[f"sum({loop}: …) binds it", "student[y] reads the sampled token"],
            )
        if name == "A":
            if self.ctx.broken:
                raise Stop
            if self.ctx.advantage is None:
                self.fail(
                    "OPD101",
                    e.span,
                    "`A` is the result of credit; this term has none",
                    "no advantage here",
                    helps=["`A` exists on the reward route, after `credit`"],
                )
            return vl.Num(self.ctx.advantage)  # type: ignore[arg-type]
        if name in ("outcome", "verifier"):
            return vl.Num(b.input("outcome", Quantity(Axis.SEQ, "reward", info=Info.FUTURE)))
        if name == "position":
            return vl.Num(b.input("position", Quantity(Axis.TOK, "int", 0, info=Info.STATE)))
        if name == "length":
            return vl.Num(b.input("length", Quantity(Axis.SEQ, "int", 1, info=Info.FUTURE)))
        if name == "step":
            return vl.Num(b.input("step", Quantity(Axis.CONST, "int", 0)))
        if name == "support":
            if self.ctx.own_support is not None and not self._calls:
                return self.ctx.own_support
            if self.ctx.support is None:
                self.fail(
                    "OPD303",
                    e.span,
                    "this expression runs over `support`, but no support is declared",
                    "which entries?",
                    helps=["support full", "support top(32, of = T, tail = bin)"],
                )
            return self.ctx.support  # type: ignore[return-value]
        if name == "full":
            full = b.set_("full")
            return vl.Domain(full, full)
        if name == "sampled":
            one = b.set_("sampled")
            return vl.Domain(one, one)
        return vl.Rows(name)

    # -- operators -------------------------------------------------------------------------
    def _unary(self, e: tree.Unary, env: Env) -> vl.Value:
        if e.op == "not":
            return vl.Num(self.b.not_(self.truth(e.operand, env)))
        return vl.Num(self.b.neg(self.number(e.operand, env)))

    def truth(self, expr: tree.Expr, env: Env) -> Node:
        node = self.number(expr, env, "a condition")
        if node.q.unit not in ("bool", "gate"):
            self.fail(
                "OPD205",
                expr.span,
                "expected a condition here",
                f"this is {node.q.describe()}",
                helps=[f"compare it with something:  {expr.span.text[:40]} > 0"],
            )
        return node

    def _binary(self, e: tree.Binary, env: Env) -> vl.Value:
        b = self.b
        if e.op in ("and", "or"):
            left, right = self.truth(e.left, env), self.truth(e.right, env)
            return vl.Num(b.and_(left, right) if e.op == "and" else b.or_(left, right))
        left, right = self.ev(e.left, env), self.ev(e.right, env)
        if isinstance(left, vl.Bad) or isinstance(right, vl.Bad):
            raise Stop
        if isinstance(left, vl.Field) or isinstance(right, vl.Field):
            return self._field_test(e, left, right)
        if isinstance(left, vl.IndexT) or isinstance(right, vl.IndexT):
            return self._index_shift(e, left, right, env)
        if isinstance(left, vl.Dist) or isinstance(right, vl.Dist):
            return self._mix(e, left, right)
        if isinstance(left, vl.IndexV | vl.IndexY) and isinstance(right, vl.IndexV | vl.IndexY):
            return self._index_test(e, left, right)
        if isinstance(left, vl.IndexV) and isinstance(right, vl.Domain):
            return vl.Num(b.in_set(right.base, left.domain.base))
        for side, value in ((e.left, left), (e.right, right)):
            if not isinstance(value, vl.Num):
                self._not_a(side, value, "a number")
        x, y = left.node, right.node  # type: ignore[union-attr]
        self._check_units(e, x, y)
        if e.op in ("<", "<=", ">", ">=", "==", "!="):
            return vl.Num(b.compare(e.op, x, y))
        if e.op == "/" and y.is_const(0):
            self.fail("OPD211", e.span, "this divides by zero", "the divisor is 0")
        table = {"+": b.add, "-": b.sub, "*": b.mul, "/": b.div, "^": b.pow}
        return vl.Num(table[e.op](x, y))

    def _check_units(self, e: tree.Binary, x: Node, y: Node) -> None:
        if e.op in ("*", "/", "^") or compatible_units(x.q.unit, y.q.unit):
            return
        comparing = e.op not in ("+", "-")
        secondary = [Label(e.left.span, x.q.describe()), Label(e.right.span, y.q.describe())]
        if "reward" in (x.q.unit, y.q.unit) and not comparing:
            self.object(
                "OPD306",
                e.span,
                "a reward and nats are added without a coefficient",
                f"{x.q.unit} {e.op} {y.q.unit}",
                helps=[
                    f"say how many nats a reward is worth:  … {e.op} 0.5 * outcome",
                    "or keep them apart:  regularize 0.5 * outcome",
                ],
            )
            return  # allowed: one unit of reward counts as one nat
        verb = "comparing" if comparing else "adding"
        self.fail(
            "OPD204",
            e.span,
            f"{verb} {x.q.unit} with {y.q.unit}",
            f"{x.q.describe()}  {e.op}  {y.q.describe()}",
            secondary=[s for s in secondary if s.span.line != e.span.line],
            notes=["a probability lies in [0, 1]; entropies and log-ratios are in nats"]
            if "prob" in (x.q.unit, y.q.unit)
            else [],
            helps=["compare like with like, for example H(T) > tau with tau in nats"],
        )

    def _field_test(self, e: tree.Binary, left: vl.Value, right: vl.Value) -> vl.Value:
        field_, text = (left, right) if isinstance(left, vl.Field) else (right, left)
        if e.op not in ("==", "!=") or not isinstance(text, vl.Str):
            self.fail(
                "OPD202",
                e.span,
                "a field of the prompt can only be compared with a text",
                "not a comparison with a text",
                helps=['prompt.domain == "math"'],
            )
        q = Quantity(Axis.PROMPT, "bool", 0, 1, Info.PROMPT)
        node = self.b.input("field", q, field=field_.name, equals=text.text)  # type: ignore[union-attr]
        return vl.Num(node if e.op == "==" else self.b.not_(node))

    def _index_shift(self, e: tree.Binary, left: vl.Value, right: vl.Value, env: Env) -> vl.Value:
        if isinstance(left, vl.IndexT) and isinstance(right, vl.Num) and e.op in ("+", "-"):
            n = static_value(right.node)
            if n is not None and float(n).is_integer():
                return vl.IndexT(left.offset + int(n if e.op == "+" else -n))
        self.fail(
            "OPD210",
            e.span,
            "a token index is `t`, `t + n` or `t - n` with a fixed whole n",
            "not such an index",
            helps=["use `position` for the number of the token"],
        )
        raise Stop

    def _index_test(self, e: tree.Binary, left: vl.Value, right: vl.Value) -> vl.Value:
        pair = (left, right) if isinstance(left, vl.IndexV) else (right, left)
        if (
            e.op in ("==", "!=")
            and isinstance(pair[0], vl.IndexV)
            and isinstance(pair[1], vl.IndexY)
        ):
            same = self.b.is_y(pair[0].domain.set)  # the bucket of a tail is no token
            return vl.Num(same if e.op == "==" else self.b.not_(same))
        if e.op in ("==", "!=") and isinstance(left, vl.IndexY) and isinstance(right, vl.IndexY):
            return vl.Num(self.b.flag(e.op == "=="))
        self.fail(
            "OPD202", e.span, "indices can only be tested as v == y or v != y", "not such a test"
        )
        raise Stop

    def _mix(self, e: tree.Binary, left: vl.Value, right: vl.Value) -> vl.Value:
        b = self.b
        if e.op == "*":
            num, dist = (left, right) if isinstance(left, vl.Num) else (right, left)
            if isinstance(num, vl.Num) and isinstance(dist, vl.Dist):
                return scale_mix(b, num.node, dist)
        if e.op == "/" and isinstance(left, vl.Dist) and isinstance(right, vl.Num):
            return scale_mix(b, b.div(b.const(1.0), right.node), left)
        if e.op == "+" and isinstance(left, vl.Dist) and isinstance(right, vl.Dist):
            return vl.MixDist((*as_mix(b, left), *as_mix(b, right)))
        self.fail(
            "OPD202",
            e.span,
            "distributions can be mixed (0.9 * T + 0.1 * student), nothing else",
            f"{left.kind} {e.op} {right.kind}",
            helps=["for a probability write T[y] or, inside a sum, T[v]"],
        )
        raise Stop

    def _cond(self, e: tree.Cond, env: Env) -> vl.Value:
        test = self.truth(e.test, env)
        known = static_value(test)
        if known is not None:
            return self.ev(e.yes if known else e.no, env)
        yes, no = self.number(e.yes, env), self.number(e.no, env)
        if not compatible_units(yes.q.unit, no.q.unit):
            self.fail(
                "OPD204",
                e.span,
                f"the two branches have different units: {yes.q.unit} and {no.q.unit}",
                "both must mean the same kind of number",
            )
        return vl.Num(self.b.where(test, yes, no))

    def _attr(self, e: tree.Attr, env: Env) -> vl.Value:
        base = self.ev(e.base, env)
        if isinstance(base, vl.Word) and base.name == "prompt":
            return vl.Field(e.name)
        self.fail("OPD202", e.span, "only `prompt` has fields", f"this is a {base.kind}")
        raise Stop

    # -- indexing --------------------------------------------------------------------------
    def _index(self, e: tree.Index, env: Env) -> vl.Value:
        base, index = self.ev(e.base, env), self.ev(e.index, env)
        if isinstance(base, vl.Bad) or isinstance(index, vl.Bad):
            raise Stop
        b = self.b
        if isinstance(base, RecRef):
            if isinstance(index, vl.IndexT) and index.offset in (1, -1):
                return vl.Num(base.next if index.offset == 1 else base.last)
            self.fail(
                "OPD124",
                e.span,
                "a recurrence may only read its own next or its own last value",
                f"write {base.name}[t + 1] or {base.name}[t - 1]",
            )
        if isinstance(base, vl.Dist):
            return self._entry(e, base, index)
        if isinstance(base, vl.Num):
            if isinstance(index, vl.IndexT):
                return vl.Num(b.shift(base.node, index.offset))
            if isinstance(index, vl.IndexI):
                return base
            self.fail(
                "OPD202",
                e.span,
                f"{base.node.q.describe()} has no entry of the vocabulary",
                "only distributions are indexed by y or v",
                helps=["drop the index: the value already belongs to the token"],
            )
        self.fail("OPD202", e.span, f"a {base.kind} cannot be indexed", "not a distribution")
        raise Stop

    def _entry(self, e: tree.Index, base: vl.Dist, index: vl.Value) -> vl.Value:
        b = self.b
        if isinstance(index, vl.IndexY):
            return vl.Num(b.exp(base.at_y(b)))
        if isinstance(index, vl.IndexV):
            if isinstance(base, vl.SamplerDist):
                self.fail(
                    "OPD406",
                    e.span,
                    "of the sampling policy only the sampled token's probability is known",
                    "rollout[v] is not recorded",
                    helps=[
                        "rollout[y] is the probability of the sampled token",
                        "or use `student`",
                    ],
                )
            try:
                return vl.Num(b.exp(base.on(b, index.domain)))
            except LookupError as err:
                self.fail("OPD202", e.span, str(err), "indexed over another set here")
        self.fail(
            "OPD202",
            e.span,
            "a distribution is indexed by a token: `y`, or `v` inside a sum",
            "not a token index",
            helps=["time is implicit: student[y] is at the current state"],
        )
        raise Stop

    # -- sets and reductions -----------------------------------------------------------------
    def _setliteral(self, e: tree.SetLiteral, env: Env) -> vl.Value:
        self.fail(
            "OPD202",
            e.span,
            "a list of values is not an index set",
            "expected {v in support: condition}",
        )
        raise Stop

    def _setwhere(self, e: tree.SetWhere, env: Env) -> vl.Value:
        domain = self.domain(e.domain, env).plain
        inner = env.child(**{e.var.name: vl.IndexV(domain)})
        with self.context(v_tail=None):
            condition = self.truth(e.condition, inner)
        mask = condition if domain.mask is None else self.b.and_(domain.mask, condition)
        return vl.Domain(domain.base, domain.base, None, mask)

    def _reduce(self, e: tree.Reduce, env: Env) -> vl.Value:
        from opdsl.meaning.builtins import reduce_rows, reduce_vocab

        domain = self.ev(e.domain, env)
        if isinstance(domain, vl.Bad):
            raise Stop
        if isinstance(domain, vl.IndexT):
            domain = vl.Rows("sequence")
        name = e.func.name if isinstance(e.func, tree.Name) else ""
        if isinstance(domain, vl.Domain):
            return reduce_vocab(self, e, name, domain, env)
        if isinstance(domain, vl.Rows):
            inner = env.child(
                **{e.var.name: vl.IndexT(0) if domain.name == "sequence" else vl.IndexI()}
            )
            return vl.Num(reduce_rows(self, e, name, domain.name, self.number(e.body, inner)))
        self._not_a(e.domain, domain, "an index set (support, full, group, others, sequence)")
        raise Stop

    # -- calls -----------------------------------------------------------------------------
    def _call(self, e: tree.Call, env: Env) -> vl.Value:
        from opdsl.meaning.builtins import call_builtin

        func = self.ev(e.func, env)
        if isinstance(func, vl.Bad):
            raise Stop
        if isinstance(func, vl.Builtin):
            return call_builtin(self, func.name, e, env)
        if isinstance(func, vl.Domain) and isinstance(e.func, tree.Name):
            return self._tailed(e, func, env)
        if isinstance(func, vl.Closure):
            value = self.inline(func, e.args, e.span, env, ())
            self._want_direction(e, func, value)
            return value
        self.fail("OPD202", e.func.span, f"a {func.kind} cannot be called", "not a function")
        raise Stop

    def _tailed(self, e: tree.Call, domain: vl.Domain, env: Env) -> vl.Value:
        from opdsl.meaning.builtins import tail_argument, with_tail

        tail, rest = tail_argument(self, e.args)
        if rest:
            self.fail(
                "OPD106", e.span, "this index set takes only `tail = …`", "unexpected argument"
            )
        return with_tail(self, domain, tail)

    def _want_direction(self, e: tree.Call, func: vl.Closure, value: vl.Value) -> None:
        """A comparison of two distributions at a state must show its direction."""
        formals = func.definition.params
        two = len(formals) >= 2 and all(
            p.type is not None and p.type.unit == "dist" for p in formals[:2]
        )
        if not two or not isinstance(value, vl.Num) or len(e.args) < 2:
            return
        q = value.node.q
        declared = func.definition.type.unit if func.definition.type else q.unit
        if declared != "nats" or q.info > Info.STATE or q.axis is not Axis.TOK:
            return
        a, c = e.args[0].span.text, e.args[1].span.text
        rest = "".join(f", {x.span.text}" for x in e.args[2:])
        name = func.definition.name.name
        self.fail(
            "OPD209",
            e.span,
            f"write the direction of {name}: the order is invisible in {name}({a}, {c})",
            "which of the two is averaged over?",
            helps=[f"{name}({a} || {c}{rest})", f"{name}({c} || {a}{rest})"],
        )

    def _divergence(self, e: tree.Divergence, env: Env) -> vl.Value:
        func = self.ev(e.func, env)
        if isinstance(func, vl.Bad):
            raise Stop
        if not isinstance(func, vl.Closure) or len(func.definition.params) < 2:
            self.fail(
                "OPD202",
                e.func.span,
                f"`{e.func.span.text}` does not compare two distributions",
                "expected a divergence such as KL or JSD",
            )
        left, right = self.dist(e.left, env), self.dist(e.right, env)
        return self.inline(func, e.args, e.span, env, (left, right), divergence=True)  # type: ignore[arg-type]


# ---- helpers -----------------------------------------------------------------------------


def as_mix(b: Builder, dist: vl.Dist) -> tuple[tuple[Node, vl.Dist], ...]:
    if isinstance(dist, vl.MixDist):
        return dist.parts
    return ((b.const(1.0), dist),)


def scale_mix(b: Builder, factor: Node, dist: vl.Dist) -> vl.MixDist:
    return vl.MixDist(tuple((b.mul(factor, w), d) for w, d in as_mix(b, dist)))
