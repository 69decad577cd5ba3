"""Where suppressed mass goes: from the `routing` section to a loss (theory §9)."""

from __future__ import annotations

from opdsl.meaning import values as vl
from opdsl.meaning.builtins import named, normalized, word
from opdsl.meaning.infer import Elaborator, Env
from opdsl.meaning.names import closest
from opdsl.meaning.node import Node, compatible_units
from opdsl.meaning.quantity import Axis, Info, Quantity
from opdsl.meaning.spec import Routing
from opdsl.syntax import tree

FALLBACKS = ("suppress", "proportional", "drop")
KINDS = ("counterfactual", "proportional", "drop", "local", "suppress")


def route(el: Elaborator, e: tree.Expr, env: Env, advantage: Node) -> tuple[Node, Routing]:
    """(loss per token, routing). The loss is −A log π(y) where the routing does not act."""
    name = e.name if isinstance(e, tree.Name) else ""
    if isinstance(e, tree.Call) and isinstance(e.func, tree.Name):
        name = e.func.name
    if name not in KINDS:
        near = closest(name or e.span.text, KINDS)
        el.fail(
            "OPD121",
            e.span,
            "this is not a routing",
            f"did you mean `{near}`?" if near else "unknown routing",
            helps=["routing counterfactual(when, among, toward, strength, otherwise)",
                   "routing suppress | proportional | drop | local(D, support)"],
        )  # fmt: skip
    b = el.b
    negative = b.compare("<", advantage, b.const(0.0))
    if name == "counterfactual":
        assert isinstance(e, tree.Call)
        return _counterfactual(el, e, env, advantage)
    if name == "local":
        return _local(el, e, env, advantage, negative)
    loss = fallback(el, name, advantage, negative)
    return loss, Routing(
        name, negative if name != "suppress" else None, otherwise=name, span=e.span
    )


def score(el: Elaborator, advantage: Node) -> Node:
    """−A log π(y): the plain softmax spill."""
    b = el.b
    return b.neg(b.mul(b.sg(advantage), b.at_y(b.logp("student", True))))


def fallback(el: Elaborator, name: str, advantage: Node, active: Node) -> Node:
    """suppress: −A log π(y). drop: nothing where active. proportional: only the logit of y moves
    (theory §9.1), written as a centred logit, log π(y) − mean_v log π(v), so that the loss does
    not depend on a constant added to every logit."""
    b = el.b
    plain = score(el, advantage)
    if name == "suppress":
        return plain
    if name == "drop":
        return b.where(active, b.const(0.0), plain)
    return b.where(active, b.mul(b.sg(b.neg(advantage)), centred_logit(el)), plain)


def centred_logit(el: Elaborator) -> Node:
    """log π(y) minus the mean of log π over the real vocabulary (padding rows are −inf)."""
    b = el.b
    lp = b.logp("student", True)
    full = b.set_("full")
    real = _real(el)
    total = b.sum_v(b.where(real, lp, b.const(0.0)), full)
    ones = b.where(real, b.const(1.0), b.const(0.0))
    words = Quantity(Axis.TOK, "real", 1.0, float("inf"), Info.STATE)  # never an empty vocabulary
    count = b.make("sum_v", (ones, full), words)
    return b.sub(b.at_y(lp), b.div(total, count))


def _local(
    el: Elaborator, e: tree.Expr, env: Env, advantage: Node, negative: Node
) -> tuple[Node, Routing]:
    args = (
        named(el, e, ("divergence", "support"), ("divergence", "support"))
        if isinstance(e, tree.Call)
        else {}
    )
    if "divergence" not in args:
        el.fail(
            "OPD313",
            e.span,
            "`local` says which divergence replaces the suppression",
            "divergence missing",
            helps=["routing local(KL(T || student), top(32, of = T, tail = bin))"],
        )
    support = el.domain(args["support"], env) if "support" in args else el.ctx.support
    with el.context(support=support, support_span=args.get("support", e).span):
        value = el.number(args["divergence"], env)
    if not value.q.live:
        el.fail(
            "OPD308", args["divergence"].span, "this does not depend on the student", "no gradient"
        )
    loss = el.b.where(negative, value, score(el, advantage))
    return loss, Routing("local", negative, otherwise="suppress", span=e.span)


def _counterfactual(
    el: Elaborator, e: tree.Call, env: Env, advantage: Node
) -> tuple[Node, Routing]:
    b = el.b
    keys = ("when", "among", "toward", "strength", "otherwise")
    args = named(el, e, keys)
    for key in keys:
        if key not in args:
            why = {
                "when": "which tokens are rerouted",
                "among": "which tokens may receive the mass",
                "toward": "in which proportion they receive it",
                "strength": "how hard, in nats",
                "otherwise": "what happens when no candidate exists",
            }[key]
            example = {
                "when": "when = A < 0",
                "among": "among = {v in support: v != y and T[v] > student[v]}",
                "toward": "toward = T[v] - student[v]",
                "strength": "strength = min(5, -A)",
                "otherwise": "otherwise = proportional",
            }[key]
            report = el.object if key == "otherwise" else el.fail
            report(
                "OPD313",
                e.span,
                f"this routing does not say {why}",
                f"`{key}` is missing",
                helps=[example],
            )
    otherwise = "suppress"  # what silence means where R42 is allowed: the plain softmax spill
    if "otherwise" in args:
        otherwise = word(el, args["otherwise"], FALLBACKS, "a fallback")
    trigger = el.truth(args["when"], env)
    among = el.domain(args["among"], env).plain
    not_y = b.not_(b.is_y(among.base))
    mask = not_y if among.mask is None else _and_once(el, among.mask, not_y)
    domain = vl.Domain(among.base, among.base, None, mask)
    inner = env.child(v=vl.IndexV(domain))
    raw = el.number(args["toward"], inner)
    if raw.q.high <= 0 and raw.value != 0:
        el.object(
            "OPD320",
            args["toward"].span,
            "a routing target is a share of mass: this is never positive",
            f"range {raw.q.range_text()}",
            helps=["toward = T[v] - student[v]"],
        )
    share = _real_entries(el, among, b.sg(raw))
    rho = b.exp(normalized(el, domain, share, tree.Reduce(e.func, _ident(e), e, e, e.span)).logp)
    strength = el.number(args["strength"], env)
    if not compatible_units(strength.q.unit, "nats"):
        el.fail(
            "OPD306",
            args["strength"].span,
            f"the strength multiplies a log-probability: it is in nats, this is in {strength.q.unit}",
            strength.q.describe(),
            helps=["give the coefficient:  strength = 5 nats * (student[y] - T[y])"]
            if strength.q.unit == "prob"
            else [],
        )
    if strength.q.axis is Axis.VOCAB:
        el.fail("OPD201", args["strength"].span, "one strength per token", strength.q.describe())
    trigger = b.sg(trigger)
    zero = b.const(0.0)
    weight = b.where(mask, b.maximum(share, zero), zero)
    routable = b.compare("<", zero, b.sum_v(weight, domain.base))
    lp = b.logp("student", True)
    pulled = b.sum_v(b.mul(rho, b.at_set(lp, domain.base)), domain.base)
    routed = b.mul(b.sg(strength), b.sub(b.at_y(lp), pulled))
    loss = b.where(
        b.and_(trigger, routable),
        routed,
        fallback(el, otherwise, advantage, trigger),
    )
    return loss, Routing(
        "counterfactual", trigger, mask, domain.base, rho, b.sg(raw), b.sg(strength), routable, otherwise, e.span
    )  # fmt: skip


def _real_entries(el: Elaborator, among: vl.Domain, share: Node) -> Node:
    """No mass for padding rows: over the full vocabulary they are no candidates (semantics §6)."""
    b = el.b
    return b.where(_real(el), share, b.const(0.0)) if among.base.op == "full" else share


def _real(el: Elaborator) -> Node:
    """Which entries of the vocabulary the student can produce at all (padding rows are −inf)."""
    return el.b.compare("<", el.b.const(-1e20), el.b.logp("student", True))


def _and_once(el: Elaborator, mask: Node, extra: Node) -> Node:
    """mask and extra, without repeating a conjunct that is already there."""
    stack = [mask]
    while stack:
        n = stack.pop()
        if n is extra:
            return mask
        if n.op == "and":
            stack += n.args
    return el.b.and_(mask, extra)


def _ident(e: tree.Call) -> tree.Ident:
    return tree.Ident("v", e.span)
