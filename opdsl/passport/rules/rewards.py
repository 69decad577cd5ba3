"""Rules on frozen rewards of the sampled token: R03-R06, R09, R10 (theory §6, T8)."""

from __future__ import annotations

from opdsl.diagnostics import Label
from opdsl.meaning.quantity import Info
from opdsl.meaning.spec import StateSource
from opdsl.passport import signals
from opdsl.passport.rules.base import KL_S, Case


def rewards(case: Case) -> bool:
    """What the signal can teach at all, then who drew the token it is measured on. False where
    the signal is one of the state alone: what credit makes of it has been said."""
    term = case.term
    assert term.advantage is not None and term.signal is not None
    if term.signal.q.info <= Info.STATE and term.signal.value is None:
        _state_signal(case)
        return False
    _field(case)
    drawn_by(case)
    return True


def _state_signal(case: Case) -> None:
    assert case.term.advantage is not None
    if case.term.advantage.q.info <= Info.STATE:
        case.add(
            "OPD307",
            case.span("feedback"),
            "this reward is the same whichever token was sampled: its expected gradient is zero",
            "a function of the state alone",
            notes=["E[∇ log π(y) | s] = 0: a state-only advantage is pure noise"],
            helps=[
                "feedback loss …     differentiate the divergence instead",
                "feedback reward logratio(T, rollout)",
            ],
        )
    else:
        case.add(
            "OPD520",
            case.span("feedback"),
            "a state-only reward with returns teaches only which states to visit",
            "no local matching: the token's own choice is not compared",
            helps=["feedback reward logratio(T, rollout)", 'accept occupancy_only "why"'],
        )


# ---- R03, R04 ------------------------------------------------------------------------------------


def _field(case: Case) -> None:
    """A reward that grows with the student's own log-probability is no divergence's."""
    signal = case.term.signal
    assert signal is not None
    if not case.teachers or signals.never_rises(signal):
        return
    found = signals.reward(signal, case.teacher)
    if found is None or not found.rises:
        return
    parts = case.follows
    if parts and any(k < 0 and case.teacher_part(n) for n, k in parts.items()):
        _difference(case, parts)
    elif found.of_ratio and found.convex:
        _divergence_value(case)
    else:
        _sign_blind(case, found.one_signed)


def _difference(case: Case, parts: dict[str, float]) -> None:
    from opdsl.passport.objective import combination

    t = case.teacher
    case.add(
        "OPD310",
        case.span("feedback"),
        f"as a reward this is not the gradient of KL(student ‖ {t})",
        f"it follows {combination(parts, t)}",
        notes=["the second part pushes away from the teacher, and both cancel near it"],
        helps=[
            f"feedback reward logratio({t}, rollout)           follows KL(student || {t})",
            f"feedback loss   k3(student, {t})                 differentiated, follows KL({t} || student)",
            'allow R03 "why"',
        ],
    )


def _divergence_value(case: Case) -> None:
    t = case.teacher
    case.add(
        "OPD319",
        case.span("feedback"),
        "the value f of a divergence has the wrong weight as a reward: the right one is f − u f′",
        f"as f(u) with u = {t}[y] / student[y], the reward is −(f(u) − u f′(u))",
        notes=["the value's own dependence on the student is lost when it is frozen (theory §6.2)"],
        helps=[
            "feedback reward …    write −(f − u f′) instead of −f",
            "feedback loss …      over the support differentiates the divergence itself",
            'allow R04 "why"',
        ],
    )


def _sign_blind(case: Case, one_signed: bool) -> None:
    t = case.teacher
    case.add(
        "OPD310",
        case.span("feedback"),
        "this reward is sign-blind: it treats too likely and too unlikely tokens alike"
        if one_signed
        else "this reward grows where the student already over-likes the token",
        "not a divergence: nothing pulls toward the teacher",
        notes=["a reward must fall as the student's own probability of the token rises"],
        helps=[
            f"feedback reward logratio({t}, rollout)          the signed log-ratio",
            f"feedback loss   0.5 * logratio(student, {t})^2  differentiated, k2 follows KL(student || {t})",
            'allow R03 "why"',
        ],
    )


# ---- R09, R10: who drew the token -------------------------------------------------------------------


def drawn_by(case: Case) -> None:
    """A sampled-token estimator reads y as if the student, as it is now, had drawn it."""
    if case.reads_rollout():
        return
    foreign = [
        s for s in case.states if s.kind == "sequences" or s.policy not in ("student", "old")
    ]
    if foreign and (case.term.route == "reward" or _reverse(case)):
        _foreign(case, foreign[0])
    for s in case.states:
        if s.kind == "rollouts" and s.policy == "old":
            _stale(case, s)
        elif s.kind == "rollouts" and s.policy == "student" and tilted(s):
            _tilted(case, s)


def _reverse(case: Case) -> bool:
    return case.shape is not None and case.shape.only(KL_S)


def _foreign(case: Case, s: StateSource) -> None:
    case.add(
        "OPD316",
        case.span("feedback"),
        "a sampled-token reward on text the student did not sample estimates another objective"
        if case.term.route == "reward"
        else "a sampled loss on text the student did not sample estimates another objective",
        "reads the sampled token as if the student had drawn it",
        secondary=[Label(s.span, f"text from {s.policy}")],
        notes=["under other text the mean of log student - log T is not KL(student || T)"],
        helps=["feedback loss KL(T || student)", "state rollouts(student)"],
    )


def _stale(case: Case, s: StateSource) -> None:
    case.add(
        "OPD507",
        s.span,
        "these rollouts come from an older student and no ratio corrects for it",
        f"{s.lag} step{'s' if s.lag != 1 else ''} behind",
        helps=["weight truncated_ratio(student, rollout)", 'accept stale_rollouts "why"'],
    )


def _tilted(case: Case, s: StateSource) -> None:
    case.add(
        "OPD504",
        s.span,
        "tokens are drawn from a changed student but scored with the plain one",
        _tilt(s),
        secondary=[
            Label(
                case.span("feedback"),
                "a reward on the sampled token"
                if case.term.route == "reward"
                else "a loss on the sampled token",
            )
        ],
        notes=["on a loss over the vocabulary this would only change which states are visited"],
        helps=[
            "temperature = 1, top_p = 1",
            "weight ratio(student, rollout)",
            'accept sampler_mismatch "why"',
        ],
    )


def tilted(s: StateSource) -> bool:
    return s.temperature != 1 or s.top_p != 1 or s.top_k is not None


def _tilt(s: StateSource) -> str:
    parts = []
    if s.temperature != 1:
        parts.append(f"temperature {s.temperature:g}")
    if s.top_p != 1:
        parts.append(f"the top {s.top_p:.0%} of the mass")
    if s.top_k is not None:
        parts.append(f"the top {s.top_k} tokens")
    return "the sampler: " + ", ".join(parts)
