"""Rules on a whole method: R38, R46, R61, R63 (theory T8, T9, §8.2, §9.2, §11.6)."""

from __future__ import annotations

from opdsl.codes import make
from opdsl.diagnostics import Label, Report
from opdsl.meaning.spec import Spec
from opdsl.passport.rules.base import KL_S, Case

INCLUSIVE = ("immediate", "return_to_go", "full", "discounted", "window", "gae")


def whole(spec: Spec, cases: list[Case], report: Report) -> None:
    """What terms do to each other, and what regularizers add."""
    feedback = [c for c in cases if c.term.kind == "feedback"]
    _twice(feedback)
    _redundant(feedback)
    if not any(c.term.teachers for c in feedback):
        return
    for case in cases:
        if case.term.kind != "regularizer":
            continue
        if case.term.route == "sft":
            _estimands(spec, case, report)
        elif case.term.route == "loss" and _shifts(case):
            _shift(case, feedback)


# ---- R38, R46: terms that do the same ---------------------------------------------------------------


def _exact(case: Case) -> bool:
    """KL(student ‖ T) over the vocabulary, differentiated, wherever the others act too."""
    return (
        case.term.route == "loss"
        and not case.sampled
        and case.term.gate.op == "const"
        and case.term.support.tail is None
    )


def _twice(feedback: list[Case]) -> None:
    exact = [c for c in feedback if _exact(c) and c.teachers]
    scored = [
        c
        for c in feedback
        if c.term.route == "reward"
        and c.credit.kind in INCLUSIVE
        and c.term.gate.op == "const"
        and c.teachers
    ]
    pairs = [(e, s) for e in exact for s in scored if e.teacher == s.teacher]
    for e, s in pairs:
        if not (e.follows and e.follows.get(KL_S) and s.follows and s.follows.get(KL_S)):
            continue
        s.add(
            "OPD534",
            s.span("credit"),
            "the own token counts twice: in closed form and again in this return",
            "includes the token's own log-ratio",
            secondary=[Label(e.span("feedback"), "the same comparison, exact at the state")],
            helps=["credit future_only    the rest of the return", 'accept counted_twice "why"'],
        )
        return


def _redundant(feedback: list[Case]) -> None:
    routed = [
        c for c in feedback if c.term.routing.kind == "counterfactual" and c.term.gate.op == "const"
    ]
    exact = [c for c in feedback if _exact(c) and c.teachers]
    for c in routed:
        for e in exact:
            if e.teacher == c.teacher:
                c.add(
                    "OPD522",
                    c.term.routing.span,
                    "a loss over the whole vocabulary already says where mass goes",
                    "routing repeats it by sample",
                    secondary=[Label(e.span("feedback"), "moves mass to the tokens T prefers")],
                    helps=["drop one of the two terms", 'accept redundant_routing "why"'],
                )
                return


# ---- R61, R63: what regularizers add ------------------------------------------------------------------


def _shifts(case: Case) -> bool:
    """Whether a regularizer has a gradient where the student equals its teacher."""
    return not case.teachers or case.rests is not True


def _shift(case: Case, feedback: list[Case]) -> None:
    returns = any(c.credit.kind in ("return_to_go", "full", "gae") for c in feedback)
    entropy = (
        case.follows is not None and set(case.follows) == {"-H(student)"} if returns else False
    )
    case.add(
        "OPD515",
        case.span("regularize"),
        "this regularizer moves the target away from the teacher",
        "the minimiser is no longer the teacher",
        notes=["log-ratio returns already hold the student's entropy: it counts twice"]
        if entropy
        else [],
        helps=['accept target_shift "why"'],
    )


def _estimands(spec: Spec, case: Case, report: Report) -> None:
    if not any(s.kind == "rollouts" for s in spec.states):
        return
    report.add(
        make(
            "OPD523",
            case.span("regularize"),
            "given text and own rollouts are two different averages",
            "this term is averaged over its own rows",
            helps=['accept two_estimands "why"'],
        )
    )
