"""Arguments of calls: matching them to parameters, and checking their types and ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdsl.diagnostics import Label
from opdsl.meaning import values as vl
from opdsl.meaning.names import closest
from opdsl.meaning.node import compatible_units
from opdsl.source import Span
from opdsl.syntax import tree

if TYPE_CHECKING:
    from opdsl.meaning.infer import Elaborator, Env


def bind(
    el: Elaborator,
    d: tree.Def,
    args: tuple,
    span: Span,
    env: Env,
    leading: tuple[vl.Value, ...],
    divergence: bool,
) -> dict[str, vl.Value]:
    """Parameter name -> value. `leading` are values already known (the sides of `||`)."""
    from opdsl.meaning.infer import Env as NewEnv
    from opdsl.meaning.infer import Stop

    bound: dict[str, vl.Value] = {}
    spans: dict[str, Span] = {}
    names = [p.name.name for p in d.params]
    name = d.name.name
    for formal, value in zip(d.params, leading):
        bound[formal.name.name] = value
        spans[formal.name.name] = span
    position = len(leading)
    for arg in args:
        if not isinstance(arg, tree.Arg):
            el.fail("OPD104", arg.span, f"`{name}` takes no such argument", "unexpected here")
        if arg.name is None:
            if position >= len(names):
                el.fail(
                    "OPD106",
                    arg.span,
                    f"`{name}` takes {len(names)} arguments",
                    "one too many",
                    notes=[signature(d)],
                )
            target = names[position]
            position += 1
        else:
            target = arg.name
            if target not in names:
                near = closest(target, names)
                el.fail(
                    "OPD104",
                    arg.span,
                    f"`{name}` has no argument named `{target}`",
                    f"did you mean `{near}`?" if near else "unknown argument",
                    notes=[signature(d)],
                )
        if target in bound:
            el.fail(
                "OPD103",
                arg.span,
                f"`{target}` is given twice",
                "second time",
                notes=[signature(d)],
            )
        value = el.ev(arg.value, env)
        if isinstance(value, vl.Bad):
            raise Stop
        bound[target] = value
        spans[target] = arg.value.span
    scope_env = NewEnv(env.scope, bound)
    for formal in d.params:
        key = formal.name.name
        if key not in bound:
            if formal.default is None:
                el.fail(
                    "OPD105",
                    span,
                    f"`{name}` needs `{key}`",
                    f"`{key}` is missing",
                    notes=[signature(d)],
                    helps=[f"{name}(…, {key} = …)"],
                )
            bound[key] = el.ev(formal.default, scope_env)  # type: ignore[arg-type]
            spans[key] = span
        bound[key] = check(el, d, formal, bound[key], spans[key], divergence)
    return bound


def signature(d: tree.Def) -> str:
    parts = []
    for p in d.params:
        text = p.name.name
        if p.type is not None:
            text += f" : {p.type.span.text.strip()}"
        if p.default is not None:
            text += f" = {p.default.span.text.strip()}"
        parts.append(text)
    return f"{d.name.name}({', '.join(parts)})"


def check(
    el: Elaborator,
    d: tree.Def,
    formal: tree.FormalParam,
    value: vl.Value,
    span: Span,
    divergence: bool,
) -> vl.Value:
    """The value if it fits the parameter; reports otherwise."""
    key, name = formal.name.name, d.name.name
    wants = formal.type.unit if formal.type else None
    if wants == "dist":
        if not isinstance(value, vl.Dist):
            el.fail(
                "OPD202",
                span,
                f"`{key}` of `{name}` is a distribution",
                f"this is a {value.kind}",
                notes=[signature(d)],
            )
        return value
    if wants is None:
        return value
    if isinstance(value, vl.Dist):
        el.fail(
            "OPD202",
            span,
            f"`{key}` of `{name}` is a number, in {wants}",
            "this is a distribution",
            notes=[signature(d)],
        )
    if not isinstance(value, vl.Num):
        return value
    unit = value.node.q.unit
    if not compatible_units(unit, wants) and not (wants == "nats" and unit == "reward"):
        el.fail(
            "OPD204",
            span,
            f"`{key}` of `{name}` is in {wants}, this is in {unit}",
            value.node.q.describe(),
            notes=[signature(d)],
        )
    if formal.domain is not None:
        in_domain(el, value, formal.domain, span, f"`{key}` of `{name}`", divergence, name)
    return value


def in_domain(
    el: Elaborator,
    value: vl.Num,
    domain: tree.Domain,
    span: Span,
    what: str,
    divergence: bool = False,
    name: str = "",
) -> None:
    """Reports a fixed number outside its range (OPD110), or at the degenerate end (OPD208)."""
    from opdsl.meaning.graph import static_value
    from opdsl.meaning.infer import Env
    from opdsl.meaning.names import Scope

    number = static_value(value.node)
    low_high = [number]
    if number is None:
        low_high = [value.node.q.low, value.node.q.high]
        if value.node.op != "schedule":
            return
    empty = Env(Scope(domain.span.source))
    if isinstance(domain, tree.Choice):
        allowed = [el.static(i, empty, "a choice") for i in domain.items]
        if number is not None and number not in allowed:
            el.fail(
                "OPD110",
                span,
                f"{what} is {number:g}",
                "not one of the choices",
                secondary=[Label(domain.span, "the choices declared here")],
            )
        return
    low = el.static(domain.low, empty, "the end of a range")
    high = el.static(domain.high, empty, "the end of a range")
    for x in low_high:
        if x is None:
            continue
        at_end = (x == low and domain.low_open) or (x == high and domain.high_open)
        if at_end and divergence:
            el.fail(
                "OPD208",
                span,
                f"{name} degenerates at {what.split('`')[1]} = {x:g}",
                f"the range is {domain.span.text.strip()}, ends excluded",
                notes=[
                    f"at the end of its range {name} is identically zero or another divergence; "
                    "trainers that switch silently there make the loss jump",
                ],
                helps=["write the limit you mean:  KL(T || student)  or  KL(student || T)"],
            )
        below = x < low or (x == low and domain.low_open)
        above = x > high or (x == high and domain.high_open)
        if below or above:
            edge = f"not {'above' if domain.low_open else 'at least'} {low:g}"
            if above:
                edge = f"not {'below' if domain.high_open else 'at most'} {high:g}"
            secondary = []
            if domain.span.source is span.source:
                secondary = [Label(domain.span, "the range declared here")]
            el.fail(
                "OPD110",
                span,
                f"{what} is {x:g}, outside {domain.span.text.strip()}",
                f"{x:g} is {edge}",
                secondary=secondary,
                helps=["choose a value inside, or widen the range where it is declared"],
            )
