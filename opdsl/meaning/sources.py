"""State sources, teachers and settings: the parts of a method that are not formulas."""

from __future__ import annotations

from opdsl.codes import make
from opdsl.diagnostics import Label
from opdsl.meaning import values as vl
from opdsl.meaning.builtins import named, word
from opdsl.meaning.graph import static_value
from opdsl.meaning.infer import Elaborator, Env, Stop
from opdsl.meaning.names import closest
from opdsl.meaning.spec import Schedule, StateSource, TeacherDecl
from opdsl.syntax import tree

STATE_EXAMPLE = "state rollouts(student, temperature = 1.0, group = 4)"


def _func_name(e: tree.Expr) -> str:
    return e.func.name if isinstance(e, tree.Call) and isinstance(e.func, tree.Name) else ""


# ---- states ------------------------------------------------------------------------------


def states(
    el: Elaborator, e: tree.Expr, env: Env, teachers: tuple[str, ...]
) -> tuple[StateSource, ...]:
    """`rollouts(…)`, `sequences(…)` or a `mix(p: a, 1 - p: b)` of them."""
    if _func_name(e) != "mix":
        return (_state(el, e, env, teachers, 1.0),)
    assert isinstance(e, tree.Call)
    out: list[StateSource] = []
    for arg in e.args:
        if not isinstance(arg, tree.MixArg):
            el.fail(
                "OPD105",
                arg.span,
                "each part of a mixture has a share",
                "share missing",
                helps=["state mix(0.5: rollouts(student), 0.5: sequences(data))"],
            )
        assert isinstance(arg, tree.MixArg)
        share = _share(el, arg.weight, env)
        out.append(_state(el, arg.value, env, teachers, share))
    _check_shares(el, e, out)
    return tuple(out)


def _share(el: Elaborator, e: tree.Expr, env: Env) -> float | Schedule:
    node = el.number(e, env, "a share")
    value = static_value(node)
    if value is None:
        if node.op == "schedule":
            return schedule_of(node)
        if node.op == "sub" and node.args[0].value is not None and node.args[1].op == "schedule":
            s, top = schedule_of(node.args[1]), node.args[0].value
            return Schedule(s.kind, top - s.start, top - s.stop, s.over)
        el.fail("OPD122", e.span, "a share is a fixed number or a schedule", node.q.describe())
    if not 0 <= value <= 1:  # type: ignore[operator]
        el.fail("OPD110", e.span, f"a share lies in [0, 1], this is {value:g}", "outside")
    return float(value)  # type: ignore[arg-type]


def schedule_of(node) -> Schedule:
    return Schedule(node.attr("kind"), node.attr("start"), node.attr("stop"), node.attr("over"))


def _check_shares(el: Elaborator, e: tree.Call, out: list[StateSource]) -> None:
    for step in (0.0, 1e9):
        total = sum(s.share.at(step) if isinstance(s.share, Schedule) else s.share for s in out)
        if abs(total - 1) > 1e-9:
            el.fail(
                "OPD110",
                e.span,
                f"the shares of a mixture sum to 1, these sum to {total:g}",
                "shares",
                helps=["state mix(lam: rollouts(student), 1 - lam: sequences(data))"],
            )


def _state(
    el: Elaborator, e: tree.Expr, env: Env, teachers: tuple[str, ...], share: float | Schedule
) -> StateSource:
    name = _func_name(e)
    known = ("rollouts", "sequences", "mix", "interleaved")
    if name not in ("rollouts", "sequences", "interleaved"):
        near = closest(name or e.span.text, known)
        el.fail(
            "OPD121",
            e.span,
            "this is not a source of states",
            f"did you mean `{near}`?"
            if near and near not in (name,)
            else "expected rollouts or sequences",
            helps=[STATE_EXAMPLE, "state sequences(data)"],
        )
    assert isinstance(e, tree.Call)
    if name == "sequences":
        args = named(el, e, ("policy",), ("policy",))
        policy, _ = _policy(el, args.get("policy"), e, env, ("data", "golden", *teachers))
        return StateSource("sequences", policy, share, span=e.span)
    options = ("policy", "temperature", "top_p", "top_k", "group", "max_tokens", "prefix")
    parts: tuple[tuple[float, str], ...] = ()
    accept, lag = None, 0
    if name == "interleaved":
        args = named(el, e, ("draft", "judge", "accept", *options[1:]), ("draft", "judge"))
        policy, parts, accept = _interleaved(el, args, e, env, teachers)
    else:
        args = named(el, e, options, ("policy",))
        blend = _blend(el, args.get("policy"), env, teachers)
        if blend:
            policy, parts = "blend", blend
        else:
            policy, lag = _policy(el, args.get("policy"), e, env, ("student", "old", *teachers))

    def option(key: str, low: float, high: float, default: float | None) -> float | None:
        if key not in args:
            return default
        x = el.static(args[key], env, f"`{key}`")
        if not low <= x <= high:
            el.fail(
                "OPD110",
                args[key].span,
                f"`{key}` is {x:g}, outside [{low:g}, {high:g}]",
                "outside its range",
            )
        return x

    def whole(key: str, default: int | None) -> int | None:
        x = option(key, 1, 1e7, default)
        if x is not None and not float(x).is_integer():
            el.fail(
                "OPD110", args[key].span, f"`{key}` is a whole number, this is {x:g}", "not whole"
            )
        return None if x is None else int(x)

    temperature = option("temperature", 1e-3, 100, 1.0)
    top_p = option("top_p", 1e-6, 1, 1.0)
    assert temperature is not None and top_p is not None
    return StateSource(
        "rollouts",
        policy,
        share,
        temperature,
        top_p,
        whole("top_k", None),
        whole("group", 1) or 1,
        whole("max_tokens", None),
        lag,
        whole("prefix", None),
        parts,
        accept,
        e.span,
    )


def _blend(
    el: Elaborator, arg: tree.Expr | None, env: Env, teachers: tuple[str, ...]
) -> tuple[tuple[float, str], ...]:
    """`0.8 * student + 0.2 * T`: every token is drawn from a mixture of policies (MiniLLM)."""
    if not isinstance(arg, tree.Binary):
        return ()
    value = el.dist(arg, env)
    parts: list[tuple[float, str]] = []
    for weight, part in value.parts if isinstance(value, vl.MixDist) else ():
        share = static_value(weight)
        if not isinstance(part, vl.LeafDist) or part.name not in ("student", *teachers):
            el.fail("OPD121", arg.span, "only the student and teachers can draw tokens", part.kind)
        if share is None:
            el.fail("OPD122", arg.span, "the shares of a mixed sampler are fixed numbers", "")
        parts.append((float(share), part.name))  # type: ignore[arg-type,union-attr]
    total = sum(share for share, _ in parts)
    if not parts or abs(total - 1) > 1e-9:
        el.fail(
            "OPD110",
            arg.span,
            f"the shares of a mixed sampler sum to 1, these sum to {total:g}",
            "shares",
            helps=["state rollouts(0.8 * student + 0.2 * T)"],
        )
    return tuple(parts)


def _interleaved(
    el: Elaborator, args: dict, e: tree.Call, env: Env, teachers: tuple[str, ...]
) -> tuple[str, tuple[tuple[float, str], ...], int]:
    """`interleaved(student, T, accept = top(25))`: the draft's token stays where the judge has it
    among its top k; otherwise the judge draws (SKD, arXiv 2410.11325)."""
    example = ["state interleaved(student, T, accept = top(25))"]
    names = [
        _policy(el, args.get(key), e, env, ("student", *teachers))[0] for key in ("draft", "judge")
    ]
    rule = args.get("accept")
    if rule is None or _func_name(rule) != "top" or not isinstance(rule, tree.Call):
        span = e.span if rule is None else rule.span
        el.fail("OPD105", span, "which draft tokens stay?", "`accept = top(k)`", helps=example)
    k = el.static(rule.args[0].value, env, "`k`") if rule.args else 0  # type: ignore[union-attr]
    if not (1 <= k <= 1e6 and float(k).is_integer()):
        el.fail("OPD110", rule.span, f"`k` is a whole number from 1, this is {k:g}", "outside")
    return "interleaved", ((1.0, names[0]), (1.0, names[1])), int(k)


def _policy(
    el: Elaborator, arg: tree.Expr | None, e: tree.Call, env: Env, known: tuple[str, ...]
) -> tuple[str, int]:
    if arg is None:
        el.fail(
            "OPD105", e.span, "whose text is this?", "the policy is missing", helps=[STATE_EXAMPLE]
        )
    if isinstance(arg, tree.Call) and _func_name(arg) == "old" and "old" in known:
        lag = (
            int(el.static(arg.args[0].value, env, "the lag of a stale student")) if arg.args else 1
        )  # type: ignore[union-attr]
        return "old", max(lag, 0)
    if isinstance(arg, tree.Name) and arg.name in known:
        return arg.name, 0
    assert arg is not None
    value = env.find(arg.name) if isinstance(arg, tree.Name) else None
    if isinstance(value, vl.LeafDist) and value.name in known:
        return value.name, 0
    text = arg.span.text
    near = closest(text, known)
    el.fail(
        "OPD121",
        arg.span,
        f"`{text}` does not produce these states",
        f"did you mean `{near}`?" if near else "unknown policy",
        helps=[f"one of: {', '.join(known)}"],
    )
    raise Stop


# ---- teachers ----------------------------------------------------------------------------


def teacher(el: Elaborator, t: tree.Teacher, env: Env) -> TeacherDecl:
    """`teacher N = external(access = …) when prompt.field == "…"`.

    Every kind takes a `context`: the prompt it reads is then the template, filled in.
    """
    when = _when(el, t.when, env) if t.when is not None else None
    e, name = t.value, t.name.name
    kind = _func_name(e) or (e.name if isinstance(e, tree.Name) else "")
    if kind == "initial" and not isinstance(e, tree.Call):
        return TeacherDecl(name, "initial", "logits", when=when, span=t.span)
    kinds = ("external", "self", "ema", "initial")
    if kind not in kinds or not isinstance(e, tree.Call):
        near = closest(kind or e.span.text, kinds)
        el.fail(
            "OPD121",
            e.span,
            "this is not a kind of teacher",
            f"did you mean `{near}`?" if near else "unknown kind",
            helps=[
                f"teacher {name} = external(access = logits)    bound at run time",
                f'teacher {name} = self(context = "…")          the student with more context',
                f"teacher {name} = ema(student, decay = 0.99)",
            ],
        )
    assert isinstance(e, tree.Call)
    if kind == "initial":
        args = named(el, e, ("context",), ("context",))
        return TeacherDecl(
            name, "initial", "logits", context=_context(el, args), when=when, span=t.span
        )
    if kind == "external":
        args = named(el, e, ("access", "context"))
        if "access" not in args:
            el.fail(
                "OPD105",
                e.span,
                "say what this teacher can be asked for",
                "`access` is missing",
                helps=["external(access = sampled | top(k) | score_ids | logits | text)"],
            )
        access, k = _access(el, args["access"], env)
        return TeacherDecl(name, "external", access, k, _context(el, args), when=when, span=t.span)
    if kind == "self":
        args = named(el, e, ("context", "access"), ("context",))
        access, k = _access(el, args["access"], env) if "access" in args else ("logits", None)
        return TeacherDecl(name, "self", access, k, _context(el, args), when=when, span=t.span)
    args = named(el, e, ("policy", "decay", "every", "context"), ("policy", "decay"))
    word(
        el,
        args.get("policy", tree.Name("student", e.span)),
        ("student",),
        "what an average follows",
    )
    decay = el.static(args["decay"], env, "a decay") if "decay" in args else 0.99
    if not 0 <= decay < 1:
        el.fail(
            "OPD110", args["decay"].span, f"a decay lies in [0, 1), this is {decay:g}", "outside"
        )
    every = el.static(args["every"], env, "a number of steps") if "every" in args else 1
    if not (every >= 1 and float(every).is_integer()):
        el.fail(
            "OPD110", args["every"].span, f"`every` is a whole number of steps, this is {every:g}",
            "from 1 step on",
        )  # fmt: skip
    context = _context(el, args)
    return TeacherDecl(
        name, "ema", "logits", None, context, decay, int(every), when=when, span=t.span
    )


def _context(el: Elaborator, args: dict[str, tree.Expr]) -> str | None:
    context = args.get("context")
    if context is not None and not isinstance(context, tree.Text):
        el.fail("OPD202", context.span, "a context is a text", 'self(context = "…")')
    return context.value if isinstance(context, tree.Text) else None


def _access(el: Elaborator, e: tree.Expr, env: Env) -> tuple[str, int | None]:
    known = ("sampled", "top", "score_ids", "logits", "text")
    if isinstance(e, tree.Call) and _func_name(e) == "top":
        args = named(el, tree.Call(e.func, e.args, e.span), ("k",), ("k",))
        if "k" in args:
            k = el.static(args["k"], env, "`k`")
            if k >= 1 and float(k).is_integer():
                return "top", int(k)
            el.fail("OPD110", args["k"].span, f"`k` is a whole number from 1, this is {k:g}", "")
    text = e.name if isinstance(e, tree.Name) else ""
    if text not in known or text == "top":
        near = closest(text or e.span.text, known)
        el.fail(
            "OPD121",
            e.span,
            "this is not a level of teacher access",
            f"did you mean `{near}`?"
            if near and near != text
            else "how many entries?"
            if text == "top"
            else "unknown level",
            helps=["access = sampled | top(k) | score_ids | logits | text"],
        )
    return text, None


def _when(el: Elaborator, e: tree.Expr, env: Env) -> tuple[str, str] | None:
    node = el.number(e, env, "a condition on the prompt")
    if node.op == "input" and node.attr("name") == "field":
        return str(node.attr("field")), str(node.attr("equals"))
    el.fail(
        "OPD202",
        e.span,
        "a teacher is chosen by one field of the prompt",
        "not such a test",
        helps=['when prompt.domain == "math"'],
    )
    return None


# ---- settings ----------------------------------------------------------------------------

OPTIMIZE = [
    "lr",
    "schedule",
    "batch",
    "prompts",
    "epochs",
    "adapter",
    "steps",
    "warmup",
    "clip_grad",
    "weight_decay",
    "beta1",
    "beta2",
    "micro_batch",
    "optimizer",
    "eval_every",
    "save_every",
]


def settings(
    el: Elaborator, items: tuple, env: Env, known: tuple[str, ...] | None
) -> tuple[dict[str, object], dict[str, tuple[object, ...]]]:
    """Name -> plain Python value, and the sweeps. Unknown names are errors when `known` is given."""
    out: dict[str, object] = {}
    sweeps: dict[str, tuple[object, ...]] = {}
    for item in items:
        key = item.name.name
        if key in out or key in sweeps:
            el.report.add(make("OPD103", item.span, f"`{key}` is set twice", "second time"))
            continue
        if known is not None and key not in known and isinstance(item, tree.Setting):
            near = closest(key, known)
            el.report.add(
                make(
                    "OPD119",
                    item.name.span,
                    f"`{key}` is not a setting here",
                    f"did you mean `{near}`?" if near else "unknown setting",
                    helps=[f"known: {', '.join(known)}"],
                )
            )
            continue
        try:
            if isinstance(item, tree.Sweep):
                sweeps[key] = tuple(plain(el, v, env) for v in item.values)
            else:
                out[key] = plain(el, item.value, env)
        except Stop:
            continue
    return out, sweeps


def plain(el: Elaborator, e: tree.Expr, env: Env) -> object:
    """A setting's value: text, number, word, or ("lora", {"rank": 8})."""
    if isinstance(e, tree.Text):
        return e.value
    if isinstance(e, tree.Number) and e.unit == "%":
        return e.value / 100
    if isinstance(e, tree.Call) and isinstance(e.func, tree.Name):
        args = {
            (a.name or f"arg{i}"): plain(el, a.value, env)
            for i, a in enumerate(e.args)
            if isinstance(a, tree.Arg)
        }
        return e.func.name, args
    if isinstance(e, tree.Name) and env.find(e.name) is None:
        return {"true": True, "false": False}.get(e.name, e.name)
    value = el.static(e, env, "a setting")
    return int(value) if float(value).is_integer() and "." not in e.span.text else value


def gap(el: Elaborator, decls: list[TeacherDecl], parts: tuple[str, ...], span) -> None:
    """Teachers routed by a field where one of them has no condition cannot be told apart."""
    chosen = [d for d in decls if d.name in parts]
    without = [d for d in chosen if d.when is None]
    if len(without) > 1:
        el.report.add(
            make(
                "OPD405",
                span,
                "these teachers cannot be told apart: more than one has no `when`",
                "which one for which prompt?",
                secondary=[Label(d.span, "no `when` here") for d in without[:2]],
                helps=['teacher math = external(access = logits) when prompt.domain == "math"'],
            )
        )
