"""From a frozen reward to an advantage: shape, credit, baseline."""

from __future__ import annotations

from opdsl.meaning import values as vl
from opdsl.meaning.builtins import lift
from opdsl.meaning.infer import Elaborator, Env
from opdsl.meaning.names import closest
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis
from opdsl.records import record
from opdsl.syntax import tree


@record
class Credited:
    advantage: Node
    returned: Node  # before a baseline is subtracted
    credit: str  # as written
    baseline: str | None


def shaped(el: Elaborator, e: tree.Expr, env: Env, signal: Node) -> Node:
    """A monotone map on the signal: `clip(-5, 5)`, `softlog`, `tanh(5)`, or any def of one signal."""
    value = _apply(el, e, env, signal, "shape", ("clip(-5, 5)", "softlog", "tanh(5)"))
    return value


def credited(el: Elaborator, e: tree.Expr, env: Env, signal: Node) -> Credited:
    """`credit rule(args…, baseline = …)` applied to a token reward."""
    signal = lift(el, signal, Axis.TOK)
    rule, baseline = e, None
    if isinstance(e, tree.Call):
        kept = []
        for a in e.args:
            if isinstance(a, tree.Arg) and a.name == "baseline":
                baseline = a.value
            else:
                kept.append(a)
        rule = tree.Call(e.func, tuple(kept), e.span)
    credit = _apply(
        el,
        rule,
        env,
        signal,
        "credit",
        ("immediate", "return_to_go", "gae(V = V, gamma = 1, lam = 0.95)"),
    )
    credit = returned = lift(el, credit, Axis.TOK)
    name = None
    if baseline is not None:
        name = baseline.span.text.strip()
        if name != "none":
            with el.context(support=_baseline_support(el)):
                credit = _apply(
                    el, baseline, env, credit, "baseline", ("none", "kl_state", "leave_one_out")
                )
        else:
            name = None
    return Credited(credit, returned, e.span.text.strip(), name)


def _baseline_support(el: Elaborator) -> vl.Domain | None:
    """Statistics of the state run over the full vocabulary where the teacher gives it."""
    teacher = el.ctx.teacher
    name = teacher.leaves()[0] if teacher is not None and teacher.leaves() else None
    if name is not None and el.access.get(name, "logits") != "logits":
        return el.ctx.support
    full = el.b.set_("full")
    return vl.Domain(full, full)


def _apply(
    el: Elaborator, e: tree.Expr, env: Env, signal: Node, role: str, examples: tuple[str, ...]
) -> Node:
    """Call a definition whose first parameter is the signal."""
    func = e.func if isinstance(e, tree.Call) else e
    args = e.args if isinstance(e, tree.Call) else ()
    if not isinstance(func, tree.Name):
        el.fail(
            "OPD309",
            e.span,
            f"this is not a rule of {role}",
            "expected a name",
            helps=list(examples),
        )
    assert isinstance(func, tree.Name)
    prefixed = env.scope.find_def(f"{role}_{func.name}")
    found = prefixed or env.scope.find_def(func.name)
    if found is None:
        known = [
            n.removeprefix(f"{role}_") if n.startswith(f"{role}_") else n
            for n in env.scope.def_names()
            if n.startswith(f"{role}_") or (role == "credit" and _takes_signal(env, n))
        ]
        near = closest(func.name, known)
        el.fail(
            "OPD101",
            func.span,
            f"I know no {role} named `{func.name}`",
            f"did you mean `{near}`?" if near else f"not a rule of {role}",
            helps=[f"{role} {x}" for x in examples[:3]],
        )
    assert found is not None
    value = el.inline(vl.Closure(*found), args, e.span, env, (vl.Num(signal),))
    if not isinstance(value, vl.Num):
        el.fail(
            "OPD309",
            e.span,
            f"a rule of {role} gives one number per token",
            f"this is a {value.kind}",
        )
    node = value.node  # type: ignore[union-attr]
    if node.q.axis is Axis.VOCAB:
        el.fail("OPD201", e.span, f"a rule of {role} gives one number per token", node.q.describe())
    return node


def _takes_signal(env: Env, name: str) -> bool:
    found = env.scope.find_def(name)
    if found is None or not found[0].params:
        return False
    first = found[0].params[0]
    return first.type is not None and first.type.unit == "nats" and first.type.axes == ("token",)
