"""The built-in functions and reductions: what the language cannot say in itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdsl.meaning import values as vl
from opdsl.meaning.names import closest
from opdsl.meaning.node import Builder, Node
from opdsl.meaning.quantity import Axis, Info, Quantity
from opdsl.syntax import tree

if TYPE_CHECKING:
    from opdsl.meaning.infer import Elaborator, Env

TAILS = ("drop", "detach", "bin", "renormalize", "sampled")


# ---- reductions --------------------------------------------------------------------------


def reduce_vocab(
    el: Elaborator, e: tree.Reduce, name: str, domain: vl.Domain, env: Env
) -> vl.Value:
    """sum, mean, max, min, normalize, softmax over the entries of an index set."""
    b = el.b
    inner_domain = domain
    over_support = isinstance(e.domain, tree.Name) and e.domain.name == "support"
    if over_support and domain.tail is None and domain.base.op not in ("full",):
        el.fail(
            "OPD311",
            e.span,
            "this sums over a cut support that does not say what happens to the rest",
            f"over `{el.ctx.support_span.text.strip() or 'support'}`",
            helps=[
                "support top(k, of = T, tail = bin)          one bucket for the rest",
                "support top(k, of = T, tail = renormalize)  shapes inside only",
                "support full                                no cut",
            ],
        )
    if over_support and domain.tail == "renormalize" and domain.single:
        el.object(
            "OPD312",
            e.span,
            "a single entry renormalised is the constant 1: every divergence on it is zero",
            "renormalised over one entry",
            helps=["support full", "support top(32, of = T, tail = bin)"],
        )
    inner = env.child(**{e.var.name: vl.IndexV(inner_domain)})
    with el.context(v_tail=domain.tail):
        body = el.number(e.body, inner)
    masked = body
    if domain.mask is not None and name not in ("max", "min"):
        masked = b.where(domain.mask, body, b.const(0.0))
    if name == "normalize":
        return normalized(el, domain.plain, body, e)
    if name == "sum":
        total = b.sum_v(masked, domain.set)
        if domain.tail == "sampled" and domain.base.op != "full":
            total = b.add(total, _sampled_tail(el, e, domain, env))
        return vl.Num(total)
    if name == "mean":
        one = (
            b.const(1.0)
            if domain.mask is None
            else b.where(domain.mask, b.const(1.0), b.const(0.0))
        )
        count = b.maximum(b.make("sum_v", (one, domain.set), _count(domain)), b.const(1.0))
        return vl.Num(b.div(b.sum_v(masked, domain.set), count))
    if name in ("max", "min"):
        signed = body if name == "max" else b.neg(body)
        if domain.mask is not None:
            signed = b.where(domain.mask, signed, b.const(-1e30))
        out = b.max_v(signed, domain.set)
        return vl.Num(out if name == "max" else b.neg(out))
    if name == "softmax":
        logp = b.sub(body, b.lse_v(body, domain.base))
        return vl.SetDist(domain.plain, logp)
    _unknown_reduction(el, e, name, ("sum", "mean", "max", "min", "normalize", "softmax"))
    raise AssertionError


def _count(domain: vl.Domain) -> Quantity:
    info = domain.mask.q.info if domain.mask is not None else domain.set.q.info
    return Quantity(Axis.TOK, "int", 0, float("inf"), info)


def _sampled_tail(el: Elaborator, e: tree.Reduce, domain: vl.Domain, env: Env) -> Node:
    """Score term for the entries outside: expanded by the IR, which knows the derivative."""
    b = el.b
    at_y = env.child(**{e.var.name: vl.IndexY()})
    with el.context(v_tail=None):
        body = el.number(e.body, at_y)
    sampled = b.set_("sampled")
    inside = b.make(
        "sum_v",
        (b.where(b.in_set(domain.base, sampled), b.const(1.0), b.const(0.0)), sampled),
        Quantity(Axis.TOK, "bool", 0, 1, Info.ACTION),
    )
    return b.make("score_tail", (body, inside), body.q.with_(live=True))


def normalized(el: Elaborator, domain: vl.Domain, weight: Node, e: tree.Reduce) -> vl.SetDist:
    """weight / Σ weight over the set; all zero where the sum is zero.

    A product of powers of probabilities is normalised by its logarithms: T^a q^-b of a token that
    q has lost is beyond any float.
    """
    b = el.b
    body = _log_of_product(b, weight) if domain.mask is None else None
    if body is not None and body.q.axis is Axis.VOCAB:
        logp = b.sub(body, b.lse_v(body, domain.base))
        q = logp.q.with_(unit="logprob", high=0.0)
        return vl.SetDist(domain, b.make("sub", logp.args, q, unit="logprob"), span=e.span)
    if weight.q.low < 0:
        weight = b.maximum(weight, b.const(0.0))
    if domain.mask is not None:
        weight = b.where(domain.mask, weight, b.const(0.0))
    total = b.sum_v(weight, domain.base)
    safe = b.where(b.compare("<", b.const(0.0), total), total, b.const(1.0))
    share = b.div(weight, safe)
    share = b.make(
        share.op,
        share.args,
        share.q.with_(unit="prob", low=0.0, high=1.0),
        **dict(share.attrs),
        unit="prob",
    )
    return vl.SetDist(domain, b.log(share), span=e.span)


SHARES = frozenset(["sigmoid"])


def _log_of_product(b: Builder, n: Node) -> Node | None:
    """log n, where n is made of exponentials (powers are some, too) by ·, / and + alone, with
    factors that are not negative."""
    if n.op == "exp":
        return n.args[0]
    if n.op == "sg":
        held = _log_of_product(b, n.args[0])
        return None if held is None else b.sg(held)
    if n.op == "pow":
        base = _log_of_product(b, n.args[0])
        return None if base is None else b.mul(base, n.args[1])
    if n.op not in ("mul", "div", "add"):
        return b.log(n) if (n.q.low >= 0 and n.q.axis is not Axis.VOCAB) or n.op in SHARES else None
    left, right = (_log_of_product(b, x) for x in n.args)
    if left is None or right is None:
        return None
    if n.op == "add":
        return b.logaddexp(left, right, mass=False)
    return (b.add if n.op == "mul" else b.sub)(left, right)


def reduce_rows(el: Elaborator, e: tree.Reduce, name: str, rows: str, body: Node) -> Node:
    """Reductions over the tokens of a sequence, the rollouts of a prompt, or the batch."""
    b = el.b
    if name == "softmax":
        if rows not in ("group", "sequence"):
            _unknown_reduction(el, e, name, ("sum", "mean", "max", "min"))
        top = _fold(el, body, rows, "max", e)
        share = b.exp(b.sub(body, b.sg(top)))
        return b.div(share, _fold(el, share, rows, "sum", e))
    if name == "rank":
        if rows != "sequence":
            _unknown_reduction(el, e, name, ("sum", "mean", "max", "min", "std"))
        q = Quantity(Axis.TOK, "real", 0, 1, Info.FUTURE)
        return b.make("rank_t", (lift(el, b.number(body), Axis.TOK),), q)
    if name == "min":
        return b.neg(_fold(el, b.neg(body), rows, "max", e))
    if name == "std":
        mean = reduce_rows(el, _with_func(e, "mean"), "mean", rows, body)
        gap = b.sub(body, mean)
        return b.pow(
            reduce_rows(el, _with_func(e, "mean"), "mean", rows, b.mul(gap, gap)), b.const(0.5)
        )
    if name == "mean":
        total = _fold(el, body, rows, "sum", e)
        one = b.input("one", Quantity(body_axis(body, rows), "real", 1, 1, Info.STATE))
        count = b.maximum(_fold(el, one, rows, "sum", e), b.const(1.0))
        return b.div(total, count, within=(min(body.q.low, 0.0), max(body.q.high, 0.0)))  # 0: none
    if name in ("sum", "max"):
        return _fold(el, body, rows, name, e)
    _unknown_reduction(el, e, name, ("sum", "mean", "max", "min", "std", "softmax"))
    raise AssertionError


def _with_func(e: tree.Reduce, name: str) -> tree.Reduce:
    return tree.Reduce(tree.Name(name, e.func.span), e.var, e.domain, e.body, e.span)


def body_axis(body: Node, rows: str) -> Axis:
    if rows in ("sequence", "same_position"):
        return Axis.TOK
    return Axis.TOK if body.q.axis >= Axis.TOK else Axis.SEQ


def _fold(el: Elaborator, x: Node, rows: str, how: str, e: tree.Reduce) -> Node:
    b = el.b
    if x.q.axis is Axis.VOCAB:
        el.fail(
            "OPD201",
            e.body.span,
            "this still varies per vocabulary entry",
            x.q.describe(),
            helps=["reduce over the support first:  sum(v in support: …)"],
        )
    axis = body_axis(x, rows)
    x = lift(el, x, axis)
    info = Info.FUTURE if rows in ("sequence",) else Info.PROMPT
    if rows == "sequence":
        return b.couple("sum_t" if how == "sum" else "max_t", x, Axis.SEQ, Info.FUTURE)
    if rows == "group":
        out = Axis.PROMPT if axis is Axis.SEQ else Axis.TOK
        return b.couple("group_sum" if how == "sum" else "group_max", x, out, info)
    if rows == "others":
        if how == "max":
            el.fail("OPD121", e.span, "`max` over `others` is not available", "sum or mean")
        out = b.couple("others_sum", x, axis, Info.PROMPT)
        # the other rollouts are independent of this one: prompt-level for a baseline (theory T5)
        return b.make(out.op, out.args, out.q.with_(info=Info.PROMPT), **dict(out.attrs))
    if rows == "same_position":
        return b.couple("position_sum", x, Axis.TOK, info)
    if rows == "batch":
        return b.couple("sum_b" if how == "sum" else "max_b", x, Axis.CONST, info)
    raise AssertionError(rows)


def lift(el: Elaborator, x: Node, axis: Axis) -> Node:
    """A value with at least this axis (multiplied by ones when it varies less)."""
    x = el.b.number(x)
    if x.q.axis >= axis:
        return x
    one = el.b.input("one", Quantity(axis, "real", 1, 1, Info.STATE))
    return el.b.make("mul", (one, x), x.q.with_(axis=axis))


def _unknown_reduction(el: Elaborator, e: tree.Reduce, name: str, known: tuple[str, ...]) -> None:
    near = closest(name, known)
    el.fail(
        "OPD101",
        e.func.span,
        f"I know no reduction named `{name}` over this index set",
        f"did you mean `{near}`?" if near else "unknown reduction",
        helps=[f"here: {', '.join(known)}"],
    )


# ---- functions -----------------------------------------------------------------------------


def call_builtin(el: Elaborator, name: str, e: tree.Call, env: Env) -> vl.Value:
    from opdsl.meaning import sets

    b = el.b
    if name in ("top", "top_p", "union", "intersection"):
        return sets.make_set(el, name, e, env)
    if name in ("linear", "cosine", "constant"):
        return _schedule(el, name, e, env)
    if name == "critic":
        return _critic(el, e, env)
    if name == "routed":
        return _routed(el, e, env)
    if name == "sft":
        return _sft(el, e)
    if name == "tempered":
        args = _positional(el, name, e, 2)
        dist = el.dist(args[0], env)
        tau = el.static(args[1], env, "the temperature")
        if tau <= 0:
            el.fail(
                "OPD110", args[1].span, f"a temperature is above 0, this is {tau:g}", "not above 0"
            )
        if isinstance(dist, vl.LeafDist):
            return vl.LeafDist(dist.name, dist.is_live, dist.temperature * tau)
        if isinstance(dist, vl.FrozenDist) and isinstance(dist.inner, vl.LeafDist):
            inner = dist.inner
            return vl.FrozenDist(vl.LeafDist(inner.name, inner.is_live, inner.temperature * tau))
        el.fail(
            "OPD202",
            args[0].span,
            "only a model's own distribution can be tempered",
            f"a {dist.kind}",
        )
    if name == "special":
        args = _positional(el, name, e, 1)
        if not isinstance(el.ev(args[0], env), vl.IndexY):
            el.fail("OPD202", args[0].span, "`special` tests the sampled token", "write special(y)")
        return vl.Num(b.input("special", Quantity(Axis.TOK, "bool", 0, 1, Info.ACTION)))
    if name == "chance":
        return _chance(el, _positional(el, name, e, 1)[0], env)
    if name == "drawn":
        return _drawn(el, _positional(el, name, e, 1)[0], env)
    if name in ("sg", "live"):
        args = _positional(el, name, e, 1)
        value = el.ev(args[0], env)
        if isinstance(value, vl.Dist):
            return vl.FrozenDist(value) if name == "sg" and value.live else value
        node = el.number(args[0], env)
        if name == "sg":
            return vl.Num(b.sg(node))
        return vl.Num(b.make("live", (node,), node.q))
    if name == "clip":
        x, low, high = (el.number(a, env) for a in _positional(el, name, e, 3))
        return vl.Num(b.minimum(b.maximum(x, low), high))
    if name in ("min", "max"):
        args = [el.number(a, env) for a in _positional(el, name, e, None)]
        for arg in args[1:]:
            el._check_units(tree.Binary("+", e.func, e.func, e.span), args[0], arg)
        out = args[0]
        for arg in args[1:]:
            out = b.minimum(out, arg) if name == "min" else b.maximum(out, arg)
        return vl.Num(out)
    if name in ("sum", "mean", "std"):
        x = el.number(_positional(el, name, e, 1)[0], env)
        loop = tree.Reduce(e.func, tree.Ident("i", e.span), e.func, e.args[0].value, e.span)  # type: ignore[union-attr]
        return vl.Num(reduce_rows(el, loop, name, "batch", x))
    if name == "quantile":
        args = _positional(el, name, e, 2)
        x = el.number(args[0], env)
        share = el.static(args[1], env, "the share of a quantile")
        if not 0 <= share <= 1:
            el.fail(
                "OPD110", args[1].span, f"a quantile's share lies in [0, 1], this is {share:g}", ""
            )
        if x.q.axis is Axis.VOCAB:
            el.fail(
                "OPD201",
                args[0].span,
                "a quantile is taken over tokens or sequences",
                x.q.describe(),
            )
        return vl.Num(b.couple("quantile_b", x, Axis.CONST, Info.PROMPT, share=share))
    arg = _positional(el, name, e, 1)[0]
    return vl.Num(_unary(el, name, arg, env))


def _chance(el: Elaborator, e: tree.Expr, env: Env) -> vl.Value:
    """True with a probability: one draw a token, the same for the same step and place."""
    b, p = el.b, el.number(e, env)
    if p.q.axis is Axis.VOCAB or p.q.unit in ("nats", "logprob", "reward", "bool"):
        el.fail("OPD201", e.span, "a chance is one probability per token", p.q.describe())
    noise = b.input("noise", Quantity(Axis.TOK, "real", 0, 1, Info.STATE), k=el.coin(e.span))
    return vl.Num(b.compare("<", noise, p))


def _drawn(el: Elaborator, e: tree.Expr, env: Env) -> vl.Value:
    """Whether the text of a row comes from a policy: `drawn(data)`, `drawn(student)`, `drawn(T)`."""
    if not isinstance(e, tree.Name):
        el.fail("OPD202", e.span, "`drawn` takes the name of a policy", "drawn(student)")
    assert isinstance(e, tree.Name)
    if e.name not in el.policies:
        near = closest(e.name, el.policies)
        el.fail(
            "OPD101",
            e.span,
            f"no `state` of this method draws from `{e.name}`",
            f"did you mean `{near}`?" if near else "not among its states",
            notes=[f"its states draw from: {', '.join(el.policies)}"] if el.policies else [],
        )
    q = Quantity(Axis.SEQ, "bool", 0, 1, info=Info.PROMPT)
    return vl.Num(el.b.input("field", q, field=SOURCE_FIELD, equals=e.name))


SOURCE_FIELD = "@source"  # no spelling of the language reaches it


def _unary(el: Elaborator, name: str, arg: tree.Expr, env: Env) -> Node:
    b = el.b
    x = el.number(arg, env)
    if name == "log":
        if x.q.high <= 0 or (x.value is not None and x.value <= 0):
            el.fail(
                "OPD211",
                arg.span,
                "this is the logarithm of a number that is never positive",
                f"range {x.q.range_text()}",
            )
        out = b.log(x)
        return b.sg(out) if el.ctx.v_tail == "detach" and out.q.axis is Axis.VOCAB else out
    if name == "normalize":
        el.fail("OPD210", arg.span, "normalize needs an index", "write normalize(v in support: …)")
    if name == "softmax":
        el.fail("OPD210", arg.span, "softmax needs an index", "write softmax(i in group: …)")
    return {"exp": b.exp, "abs": b.abs, "tanh": b.tanh, "sigmoid": b.sigmoid}[name](x)


def _positional(el: Elaborator, name: str, e: tree.Call, count: int | None) -> list[tree.Expr]:
    out: list[tree.Expr] = []
    for a in e.args:
        if not isinstance(a, tree.Arg) or a.name is not None:
            el.fail("OPD104", a.span, f"`{name}` takes plain arguments", "give it without a name")
        out.append(a.value)  # type: ignore[union-attr]
    if (count is not None and len(out) != count) or not out:
        want = count or "at least one"
        code = "OPD106" if count is not None and len(out) > count else "OPD105"
        el.fail(
            code,
            e.span,
            f"`{name}` takes {want} argument{'s' if want != 1 else ''}",
            f"{len(out)} given",
        )
    return out


def named(
    el: Elaborator, e: tree.Call, known: tuple[str, ...], positional: tuple[str, ...] = ()
) -> dict[str, tree.Expr]:
    """Arguments by name for functions whose arguments are words or settings."""
    out: dict[str, tree.Expr] = {}
    spare = list(positional)
    func = e.func.span.text
    for a in e.args:
        if not isinstance(a, tree.Arg):
            el.fail("OPD104", a.span, f"`{func}` takes no such argument", "unexpected here")
        key = a.name  # type: ignore[union-attr]
        if key is None:
            if not spare:
                el.fail("OPD106", a.span, f"`{func}` takes no more arguments here", "one too many")
            key = spare.pop(0)
        elif key not in known:
            near = closest(key, known)
            el.fail(
                "OPD104",
                a.span,
                f"`{func}` has no argument named `{key}`",
                f"did you mean `{near}`?" if near else "unknown argument",
                helps=[f"it takes: {', '.join(known)}"],
            )
        if key in out:
            el.fail("OPD103", a.span, f"`{key}` is given twice", "second time")
        out[key] = a.value  # type: ignore[union-attr]
    return out


def word(el: Elaborator, expr: tree.Expr, known: tuple[str, ...], what: str) -> str:
    """One of a closed list of words."""
    text = expr.name if isinstance(expr, tree.Name) else expr.span.text
    if text not in known:
        near = closest(text, known)
        el.fail(
            "OPD121",
            expr.span,
            f"`{text}` is not {what}",
            f"did you mean `{near}`?" if near else "unknown word",
            helps=[f"one of: {', '.join(known)}"],
        )
    return text


def tail_argument(el: Elaborator, args: tuple) -> tuple[str | None, tuple]:
    """The `tail = …` among arguments, and the others."""
    tail: str | None = None
    rest = []
    for a in args:
        if isinstance(a, tree.Arg) and a.name == "tail":
            tail = word(el, a.value, TAILS, "a tail rule")
        else:
            rest.append(a)
    return tail, tuple(rest)


def with_tail(el: Elaborator, domain: vl.Domain, tail: str | None) -> vl.Domain:
    if tail is None or domain.base.op == "full":
        return domain
    base = domain.base
    set_ = el.b.set_("with_bin", (base,)) if tail == "bin" else base
    return vl.Domain(set_, base, tail, domain.mask)


def _schedule(el: Elaborator, name: str, e: tree.Call, env: Env) -> vl.Value:
    if name == "constant":
        return vl.Num(el.number(_positional(el, name, e, 1)[0], env))
    if len(e.args) != 1 or not isinstance(e.args[0], tree.RampArg):
        el.fail(
            "OPD105",
            e.span,
            "a schedule says where it starts, where it ends and over what",
            "incomplete",
            helps=[f"{name}(1 -> 0.3 over 500 steps)", f"{name}(1 -> 0.3 over run)"],
        )
    ramp = e.args[0]
    assert isinstance(ramp, tree.RampArg)
    start = el.static(ramp.start, env, "the start of a schedule")
    stop = el.static(ramp.stop, env, "the end of a schedule")
    over: float | None = None
    if not (isinstance(ramp.over, tree.Name) and ramp.over.name == "run"):
        over = el.static(ramp.over, env, "the length of a schedule")
        if over <= 0:
            el.fail(
                "OPD110", ramp.over.span, "a schedule lasts at least one step", f"{over:g} steps"
            )
    return vl.Num(el.b.schedule(name, start, stop, over))


def _critic(el: Elaborator, e: tree.Call, env: Env) -> vl.Value:
    args = named(el, e, ("init", "lr", "warmup"))
    init = (
        word(el, args["init"], ("student", "zero"), "an initialisation of a critic")
        if "init" in args
        else "student"
    )
    lr = el.static(args["lr"], env, "a learning rate") if "lr" in args else 1e-3
    warmup = int(el.static(args["warmup"], env, "a number of steps")) if "warmup" in args else 0
    return vl.Critic(init, lr, warmup)


def _sft(el: Elaborator, e: tree.Call) -> vl.Value:
    """`sft(data = golden)`: cross-entropy on given text; the term then runs over those rows."""
    args = named(el, e, ("data",), ("data",))
    data = args.get("data")
    if not (isinstance(data, tree.Name) and data.name in ("golden", "data")) and not isinstance(
        data, tree.Text
    ):
        el.fail(
            "OPD105",
            e.span,
            "`sft` says on which data",
            "which data?",
            helps=["sft(data = golden)"],
        )
    el.golden = True
    return vl.Num(el.b.neg(el.b.at_y(el.b.logp("student", True))))


def _routed(el: Elaborator, e: tree.Call, env: Env) -> vl.Value:
    from opdsl.meaning.infer import Stop

    parts: list[str] = []
    for a in e.args:
        value = el.ev(a.value, env) if isinstance(a, tree.Arg) else None
        if isinstance(value, vl.Bad):
            raise Stop
        if not isinstance(value, vl.LeafDist) or value.is_live:
            el.fail(
                "OPD202",
                a.span,
                "`routed` chooses among teachers",
                "expected the name of a teacher",
            )
        parts.append(value.name)  # type: ignore[union-attr]
    if len(parts) < 2:
        el.fail(
            "OPD105", e.span, "`routed` chooses among at least two teachers", "nothing to choose"
        )
    return vl.RoutedTeachers(tuple(parts))
