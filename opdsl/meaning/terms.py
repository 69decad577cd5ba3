"""Terms: support, feedback, credit, routing, gates and weights become one loss per token."""

from __future__ import annotations

from dataclasses import dataclass, field

from opdsl.diagnostics import Label
from opdsl.meaning import values as vl
from opdsl.meaning.credit import credited, shaped
from opdsl.meaning.flatten import Scoped
from opdsl.meaning.graph import dists_below, nodes_below, reads
from opdsl.meaning.infer import Elaborator, Env, Stop
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis
from opdsl.meaning.routing import route, score
from opdsl.meaning.spec import Routing, Support, Term
from opdsl.source import Span
from opdsl.syntax import tree


@dataclass(eq=False)
class Parts:
    """The sections of one term, each with the environment its names are looked up in."""

    name: str
    span: Span
    sections: dict[str, tuple[tree.Section, Env]] = field(default_factory=dict)
    gates: list[tuple[tree.Section, Env]] = field(default_factory=list)
    weights: list[tuple[tree.Section, Env]] = field(default_factory=list)


def freeze(el: Elaborator, node: Node) -> Node:
    """Stop-gradient, except inside `live(…)` (whose marker is removed)."""
    b = el.b
    below = nodes_below([node])
    marked = {n.id for n in below if n.op == "live"}
    if not marked:
        return b.sg(node)
    holds: set[int] = set()
    for n in below:
        if n.id in marked or any(a.id in holds for a in n.args):
            holds.add(n.id)

    def go(n: Node) -> Node:
        if n.op == "live":
            return n.args[0]
        if n.id not in holds:
            return b.sg(n)
        args = tuple(go(a) for a in n.args)
        return b.make(n.op, args, n.q.with_(live=any(a.q.live for a in args)), **dict(n.attrs))

    return go(node)


def build_term(el: Elaborator, parts: Parts) -> Term | None:
    """One feedback term; None when a fault was reported."""
    spans: dict[str, Span] = {}
    written: dict[str, str] = {}
    for key, (section, _) in parts.sections.items():
        spans[key] = section.value.span
        written[key] = section.value.span.text.strip()
    try:
        support: vl.Domain | None = _support(el, parts)
    except Stop:
        support = None
        _factors_only(el, parts, spans)
        return None
    feedback, env = parts.sections["feedback"]
    b = el.b
    with el.context(support=support, support_span=spans.get("support", parts.span)):
        try:
            value = el.number(feedback.value, _scores_env(el, feedback, env, support), "a signal")
            _check_signal(el, feedback, value)
            loss, extra = _by_route(el, parts, feedback, env, value, spans)
        except Stop:
            _factors_only(el, parts, spans)
            return None
        with el.context(advantage=extra.get("advantage")):
            gate = _product(el, parts.gates, "gate", spans)
            weight = _product(el, parts.weights, "weight", spans)
    if gate is None or weight is None:
        return None
    named = dists_below([value])
    return Term(
        name=parts.name,
        kind="feedback",
        route=feedback.route or "loss",
        support=Support(support.set, support.base, support.tail)
        if support is not None
        else Support(b.set_("sampled"), b.set_("sampled"), None),
        loss=loss,
        gate=gate,
        weight=weight,
        feedback=value,
        teachers=dists_below([value, loss]),
        teacher_named=bool(named),
        spans=spans,
        written=written,
        **extra,  # type: ignore[arg-type]
    )


def _factors_only(el: Elaborator, parts: Parts, spans: dict[str, Span]) -> None:
    """Gates and weights of a term whose feedback was refused: their own faults still count."""
    full = el.b.set_("full")
    with el.context(support=vl.Domain(full, full), broken=True):
        _product(el, parts.gates, "gate", spans)
        _product(el, parts.weights, "weight", spans)


def _support(el: Elaborator, parts: Parts) -> vl.Domain | None:
    if "support" not in parts.sections:
        return None
    section, env = parts.sections["support"]
    domain = el.domain(section.value, env)
    cut = domain.base.op not in ("full", "sampled")
    if domain.mask is not None:
        el.fail(
            "OPD202", section.value.span, "a filtered set is not a support", "use it inside a sum"
        )
    if cut and domain.tail is None:
        text = section.value.span.text.strip()
        inner = text[:-1] if text.endswith(")") else text
        el.fail(
            "OPD311",
            section.value.span,
            "a cut support must say what happens to the mass outside it",
            "`tail` is missing",
            helps=[
                f"{inner}, tail = bin)          one bucket for the rest",
                f"{inner}, tail = renormalize)  compare shapes inside only",
                f"{inner}, tail = drop)         forget the rest (not a divergence)",
            ],
        )
    if domain.single and domain.tail == "renormalize":
        el.object(
            "OPD312",
            section.value.span,
            "a single entry renormalised is the constant 1: every divergence on it is zero",
            "one entry, renormalised",
            helps=["support sampled", "support full"],
        )
    return domain


def _scores_env(el: Elaborator, feedback: tree.Section, env: Env, support: vl.Domain | None) -> Env:
    """On the `scores` route `v` runs over the support."""
    if feedback.route != "scores":
        return env
    if support is None:
        el.fail(
            "OPD303", feedback.span, "`feedback scores` needs a support to score", "which entries?"
        )
    assert support is not None
    return env.child(v=vl.IndexV(support.plain))


def _check_signal(el: Elaborator, feedback: tree.Section, value: Node) -> None:
    route = feedback.route
    span = feedback.value.span
    if value.q.unit in ("bool", "gate") and value.q.unit == "bool":
        el.fail(
            "OPD204",
            span,
            "a feedback is a number in nats, this is a condition",
            value.q.describe(),
        )
    if value.q.axis is Axis.VOCAB and route != "scores":
        el.fail(
            "OPD201",
            span,
            f"`feedback {route}` is one number per token, this one has one per vocabulary entry",
            value.q.describe(),
            helps=[
                "sum(v in support: …) reduces it",
                "feedback scores … keeps one score per entry",
            ],
        )
    if value.q.axis is not Axis.VOCAB and route == "scores":
        el.fail(
            "OPD201",
            span,
            "`feedback scores` is one number per candidate, this one has one per token",
            value.q.describe(),
            helps=["index it by `v`:  log(T[v]) - log(student[v])", "or `feedback reward …`"],
        )


def _by_route(
    el: Elaborator,
    parts: Parts,
    feedback: tree.Section,
    env: Env,
    value: Node,
    spans: dict[str, Span],
) -> tuple[Node, dict[str, object]]:
    b = el.b
    route_name = feedback.route or "loss"
    credit, routing, shape = (parts.sections.get(k) for k in ("credit", "routing", "shape"))
    if route_name in ("loss", "scores"):
        _no_credit(el, parts, feedback, route_name, credit, routing, shape)
        if route_name == "loss":
            if credit is not None:  # R07 allowed: the rule, applied to the live loss
                value = credited(el, credit[0].value, credit[1], value).advantage
            return value, {}
        lp = b.at_set(b.logp("student", True), parts_domain(el).base)
        loss = b.neg(b.sum_v(b.mul(b.sg(value), lp), parts_domain(el).base))
        return loss, {"signal": b.sg(value)}
    if credit is None:
        el.fail(
            "OPD303",
            feedback.span,
            "a reward needs a `credit`: how does a later reward count for this token?",
            "no `credit` in this method",
            helps=[
                "credit immediate       its own token only (biased for the sequence objective)",
                "credit return_to_go    everything after it (unbiased, higher variance)",
                "credit gae(V = V, gamma = 1, lam = 0.95)",
            ],
        )
    signal = b.sg(value)
    if shape is not None:
        signal = b.sg(shaped(el, shape[0].value, shape[1], signal))
    leaves = dists_below([value])
    with el.context(teacher=vl.LeafDist(leaves[0]) if leaves else None):
        assert credit is not None
        result = credited(el, credit[0].value, credit[1], signal)
    advantage = b.sg(result.advantage)
    extra: dict[str, object] = {
        "signal": signal,
        "advantage": advantage,
        "returned": b.sg(result.returned),
        "credit": result.credit,
        "baseline": result.baseline,
    }
    if routing is None:
        return score(el, advantage), {**extra, "routing": Routing("suppress")}
    with el.context(advantage=advantage):
        loss, how = route(el, routing[0].value, routing[1], advantage)
    return loss, {**extra, "routing": how}


def parts_domain(el: Elaborator) -> vl.Domain:
    assert el.ctx.support is not None
    return el.ctx.support


def _no_credit(el: Elaborator, parts, feedback, route_name, credit, routing, shape) -> None:
    if credit is not None:
        what = feedback.value.span.text.strip()
        el.object(
            "OPD301",
            credit[0].span,
            "credit has nothing to credit: this feedback is a direct loss"
            if route_name == "loss"
            else "credit has nothing to credit: scores are given per candidate",
            "credit assigns later rewards to earlier sampled tokens",
            secondary=[Label(feedback.span, "gradients flow straight through this")],
            notes=[
                "the two routes are: `feedback loss` (direct distributional loss) and "
                "`feedback reward` (frozen signal -> credit -> score function)"
            ],
            helps=[f"remove `credit`, or write   feedback reward -({what})"],
        )
    if routing is not None:
        el.fail(
            "OPD314",
            routing[0].span,
            "routing acts on punished samples: this feedback is a direct loss and punishes none",
            "a direct loss already says where mass goes",
            secondary=[Label(feedback.span, "the direct loss")],
            helps=["remove `routing`, or use `feedback reward …` with a credit"],
        )
    if shape is not None:
        el.fail(
            "OPD309",
            shape[0].span,
            "`shape` acts on a reward before credit; this feedback is a direct loss",
            "nothing to shape",
            helps=["apply the function inside the loss: clip(…, -5, 5)"],
        )


def _product(
    el: Elaborator, sections: list[tuple[tree.Section, Env]], kind: str, spans: dict[str, Span]
) -> Node | None:
    """The product of all gates or weights of a term, frozen; None when a fault was reported."""
    b = el.b
    out: Node = b.const(1.0)
    failed = False
    for section, env in sections:
        try:
            node = el.number(section.value, env, f"a {kind}")
            _check_factor(el, section, node, kind)
        except Stop:
            failed = True
            continue
        spans.setdefault(kind, section.value.span)
        if node.q.unit == "bool":
            node = b.where(node, b.const(1.0), b.const(0.0))
        factor = freeze(el, node)
        spans.setdefault(f"{kind} %{factor.id}", section.value.span)  # each where it is written
        out = b.mul(out, factor)
    return None if failed else out


def _check_factor(el: Elaborator, section: tree.Section, node: Node, kind: str) -> None:
    span, text = section.value.span, section.value.span.text.strip()
    if node.q.axis is Axis.VOCAB:
        support = el.ctx.support_span
        el.fail(
            "OPD201",
            span,
            f"a {kind} must be one number per token, this one has one per vocabulary entry",
            node.q.describe(),
            secondary=[Label(support, "`v` runs over these entries")] if support.text else [],
            notes=[
                f"needed: {kind} per token (or per sequence, or per group: those are broadcast)"
            ],
            helps=[
                f"reduce over the support:   {kind} max(v in support: {text})",
                f"test the sampled token:    {kind} {text.replace('[v]', '[y]')}",
            ],
        )
    if kind == "gate":
        if node.q.unit in ("nats", "logprob", "reward"):
            el.fail(
                "OPD205",
                span,
                f"a gate lies in [0, 1]; this is in {node.q.unit}",
                node.q.describe(),
                helps=[f"gate   {text} > 0", f"weight {text}"],
            )
        if node.q.low < 0 or node.q.high > 1:
            edge = (
                f"can reach {node.q.high:g}" if node.q.high > 1 else f"can fall to {node.q.low:g}"
            )
            el.fail(
                "OPD206",
                span,
                f"a gate lies in [0, 1], this one {edge}",
                f"range {node.q.range_text()}",
                notes=[
                    "gates choose tokens, weights scale them: only gates count in `kept_tokens`"
                ],
                helps=[f"weight {text}", f"gate   clip({text}, 0, 1)"],
            )
    elif node.q.low < 0:
        el.object(
            "OPD207",
            span,
            "a weight is never negative, this one can be",
            f"range {node.q.range_text()}",
            notes=["a negative weight turns imitation into its opposite"],
            helps=[f"weight max(0, {text})"],
        )


def regularizer(
    el: Elaborator, scoped: Scoped, env: Env, index: int, own: tuple[tree.Section, Env] | None
) -> Term | None:
    """`regularize E`: an additive term over the full vocabulary, without gates or weights.

    `own` is the method's support, which `on = support` names.
    """
    section = scoped.stmt
    assert isinstance(section, tree.Section)
    b = el.b
    full = b.set_("full")
    domain = vl.Domain(full, full)
    el.golden = False
    try:
        mine = el.domain(own[0].value, own[1]) if own is not None else None
        with el.context(support=domain, support_span=section.value.span, own_support=mine):
            value = el.number(section.value, env, "a regularizer")
            value = _regularizer_loss(el, section, value)
    except Stop:
        return None
    route_name = "loss"
    signal = advantage = None
    if el.golden:
        route_name = "sft"
    elif not value.q.live:
        route_name, signal, advantage = "reward", value, value
        value = score(el, value)  # an outcome is a reward: it is climbed, not descended
    one = b.const(1.0)
    return Term(
        name=f"regularizer {index + 1}",
        kind="regularizer",
        route=route_name,
        support=Support(full, full, None),
        loss=value,
        gate=one,
        weight=one,
        feedback=value,
        signal=signal,
        advantage=advantage,
        teachers=dists_below([value]),
        rows="golden" if el.golden else "main",
        spans={"feedback": section.value.span, "regularize": section.span},
        written={"feedback": section.value.span.text.strip()},
    )


def _regularizer_loss(el: Elaborator, section: tree.Section, value: Node) -> Node:
    span = section.value.span
    if value.q.axis is Axis.VOCAB:
        el.fail("OPD201", span, "a regularizer is one number per token", value.q.describe())
    if el.golden and value.op not in ("mul", "neg", "at_y", "sub"):
        el.fail(
            "OPD202",
            span,
            "text given as data is measured on its own rows: give `sft(…)` its own line",
            "mixed with terms on the rollouts",
            helps=["regularize 0.1 * sft(data = golden)"],
        )
    if value.q.live:
        return value
    if value.q.axis >= Axis.SEQ and ("reward" in value.q.unit or reads(value, "outcome")):
        return value
    el.fail(
        "OPD308",
        span,
        "this regularizer does not depend on the student: its gradient is zero",
        "nothing to descend",
        helps=["regularize 0.01 * KL(student || initial)", "regularize 0.5 * outcome"],
    )
    raise Stop
