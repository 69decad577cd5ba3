"""`term x = other(T = T, k = 16)`: another method's terms on the states of this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdsl.codes import make
from opdsl.diagnostics import Label
from opdsl.meaning import sources
from opdsl.meaning.flatten import Scoped
from opdsl.meaning.infer import Env, Stop
from opdsl.meaning.limits import MAX_TERMS
from opdsl.meaning.names import closest
from opdsl.meaning.spec import StateSource, Term
from opdsl.meaning.values import Domain
from opdsl.syntax import tree

if TYPE_CHECKING:
    from opdsl.meaning.structure import Elaboration, Frame


def use_method(
    ela: Elaboration, frame: Frame, name: str, entry: Scoped, states: tuple[StateSource, ...]
) -> list[Term]:
    """The terms of the named method, under this method's names for its teachers and knobs."""
    from opdsl.meaning.structure import Frame as NewFrame

    stmt = entry.stmt
    assert isinstance(stmt, tree.TermUse)
    e = stmt.value
    func = e.func if isinstance(e, tree.Call) else e
    if not isinstance(func, tree.Name):
        ela.report.add(make("OPD202", e.span, "a term uses a method by name", "expected method(…)"))
        return []
    found = entry.scope.find_method(func.name)
    if found is None:
        near = closest(func.name, entry.scope.methods)
        ela.report.add(
            make(
                "OPD109",
                func.span,
                f"cannot find a method named `{func.name}`",
                "not in this file and not imported",
                helps=[
                    f"did you mean `{near}`?"
                    if near
                    else f'import "./{func.name}.opd" ({func.name})'
                ],
            )
        )
        return []
    ela.uses += 1
    if ela.uses > MAX_TERMS:
        if ela.uses == MAX_TERMS + 1:
            message = "this method unfolds into too many terms"
            label = f"here methods have been used {MAX_TERMS} times"
            ela.report.add(make("OPD009", func.span, message, label))
        return []
    if frame.prefix.count(".") > 8:
        ela.report.add(
            make(
                "OPD114",
                func.span,
                "methods use each other in a circle, or more than 8 deep",
                f"`{func.name}` is not followed any further",
                helps=["write the inner terms in this method, or break the circle"],
            )
        )
        return []
    flat = ela.flattener.flatten(*found)
    inner = NewFrame(flat, Env(found[1]), f"{frame.prefix}{name}.")
    here = _bind(ela, frame, inner, e, entry)
    if here is None:
        return []
    _teachers(ela, frame, inner, e, stmt)
    ela._names(inner)
    _no_unknown_settings(ela, inner, name, e)
    if not here:
        _check_states(ela, frame, inner, e, states)
    frame.params += inner.params
    frame.critics += inner.critics
    frame.flat.accepts += [Scoped(a.stmt, a.scope, True) for a in flat.accepts]
    ela.el.acceptances += ela._acceptances(flat)
    terms = ela._terms(inner, states)
    return [_regate(ela, frame, name, t, len(terms)) for t in terms]


def _bind(ela: Elaboration, frame: Frame, inner: Frame, e: tree.Expr, entry: Scoped) -> bool | None:
    """Binds the arguments; True when `state = here` was given, None after a fault."""
    here = False
    args = e.args if isinstance(e, tree.Call) else ()
    env = Env(entry.scope, {}, frame.env)
    known = [*inner.flat.params, *inner.flat.teachers, *inner.flat.lets, "state"]
    for a in args:
        if not isinstance(a, tree.Arg) or a.name is None:
            ela.report.add(
                make(
                    "OPD104", a.span, "give the arguments of a method by name", "which one is this?"
                )
            )
            return None
        if a.name == "state":
            here = isinstance(a.value, tree.Name) and a.value.name == "here"
            continue
        if a.name not in known:
            near = closest(a.name, known)
            ela.report.add(
                make(
                    "OPD104",
                    a.span,
                    f"`{inner.flat.decl.name.name}` has no teacher or knob named `{a.name}`",
                    f"did you mean `{near}`?" if near else "unknown name",
                    notes=[f"it has: {', '.join(known)}"],
                )
            )
            return None
        try:
            inner.env.names[a.name] = ela.el.ev(a.value, env)
        except Stop:
            return None
    return here


def _teachers(
    ela: Elaboration, frame: Frame, inner: Frame, e: tree.Expr, stmt: tree.TermUse
) -> None:
    """Teachers not given: the same name here, else it becomes a teacher of this method."""
    for name in inner.flat.teachers:
        if name in inner.env.names:
            continue
        mine = frame.env.names.get(name)
        if mine is not None:
            inner.env.names[name] = mine
            continue
        ela.report.add(
            make(
                "OPD105",
                e.span,
                f"`{inner.flat.decl.name.name}` has a teacher `{name}`: which one is it here?",
                f"`{name}` is missing",
                helps=[f"term {stmt.name.name} = {inner.flat.decl.name.name}({name} = …)"],
            )
        )
        from opdsl.meaning.values import Bad

        inner.env.names[name] = Bad()


def _no_unknown_settings(ela: Elaboration, inner: Frame, name: str, e: tree.Expr) -> None:
    have = {p.name for p in inner.params}
    for key in ela.settings:
        if (
            key.startswith(inner.prefix)
            and key not in have
            and key.count(".") == inner.prefix.count(".")
        ):
            ela.report.add(
                make(
                    "OPD111",
                    e.span,
                    f"--set {key}: the term `{name}` has no such knob",
                    "unknown knob",
                    notes=[f"its knobs: {', '.join(sorted(have)) or 'none'}"],
                )
            )


def _check_states(
    ela: Elaboration, frame: Frame, inner: Frame, e: tree.Expr, states: tuple[StateSource, ...]
) -> None:
    entry = inner.flat.sections.get("state")
    if entry is None or not states:
        return
    section = entry.stmt
    assert isinstance(section, tree.Section)
    names = tuple(inner.flat.teachers)
    try:
        theirs = sources.states(ela.el, section.value, inner.env, names)
    except Stop:
        return
    if {(s.kind, s.policy) for s in theirs} == {(s.kind, s.policy) for s in states}:
        return
    name = inner.flat.decl.name.name
    mine = frame.flat.sections["state"].stmt
    assert isinstance(mine, tree.Section)
    text = section.value.span.text.split("\n")[0].strip()
    ela.report.add(
        make(
            "OPD305",
            e.span,
            "this term was written for other states than this method visits",
            f"{name}: {text}",
            secondary=[Label(mine.value.span, "here")],
            notes=[
                "a term brings support, feedback, credit, routing, gates and weights; the method owns `state`"
            ],
            helps=[f"{name}(…, state = here)   accept the states of this method"],
        )
    )


def _regate(ela: Elaboration, frame: Frame, name: str, term: Term, count: int) -> Term:
    """Adds this method's gates and weights for the term to those it brings."""
    from opdsl.meaning.terms import _product
    from opdsl.records import replace

    label = frame.prefix + (name if count == 1 else f"{name}.{term.name.split('.')[-1]}")
    gates, weights = [], []
    for entries, target in ((frame.flat.gates, gates), (frame.flat.weights, weights)):
        for entry in entries:
            section = entry.stmt
            assert isinstance(section, tree.Section)
            if section.term is None or section.term.name == name:
                target.append((section, Env(entry.scope, {}, frame.env)))
    spans = dict(term.spans)
    support = None
    if "support" in term.spans:
        support = Domain(term.support.set, term.support.base, term.support.tail)
    with ela.el.context(support=support, advantage=term.advantage):
        gate = _product(ela.el, gates, "gate", spans)
        weight = _product(ela.el, weights, "weight", spans)
    b = ela.builder
    if gate is None or weight is None:
        return replace(term, name=label)
    return replace(
        term,
        name=label,
        gate=b.mul(term.gate, gate),
        weight=b.mul(term.weight, weight),
        spans=spans,
    )
