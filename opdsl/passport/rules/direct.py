"""Rules on losses that are differentiated through the student: R01, R02, R25 (theory §6, §7)."""

from __future__ import annotations

from opdsl.meaning.graph import dists_below, nodes_below, reads, static_value
from opdsl.meaning.node import Node
from opdsl.passport.rules.base import KL_S, Case


def direct(case: Case) -> None:
    """Reports at most one fault of the gradient itself, then clamps."""
    roots = [r for c in case.field for r in c.roots]
    if not roots:
        _no_gradient(case)
        return
    teachers = dists_below([case.term.feedback or case.term.loss])
    entries = [chosen for c in case.field for chosen, _ in c.at_sets]  # the teacher's own token, …
    if case.term.teacher_named and teachers and not dists_below([*roots, *entries]):
        _teacher_gone(case, teachers[0], case.sampled)
        return
    if case.term.kind == "feedback":
        _own_samples(case)
        _sampled(case)
    _clamped(case)


def _no_gradient(case: Case) -> None:
    named = ", ".join(case.term.teachers)
    case.add(
        "OPD308",
        case.span("feedback"),
        "this loss does not depend on the student: its gradient is zero everywhere",
        "nothing to descend",
        notes=[f"it reads {named}, which is frozen"] if named else [],
        helps=[
            "feedback loss KL(student || T)",
            "stop-gradients and a detached tail remove the gradient",
        ],
    )


def _teacher_gone(case: Case, teacher: str, zero: bool) -> None:
    text = case.term.written.get("feedback", "")
    case.add(
        "OPD302",
        case.span("feedback"),
        "this loss names a teacher that cannot influence its gradient",
        f"{teacher} has dropped out of the gradient",
        notes=["averaged over student samples it is exactly zero"] if zero else [],
        helps=[
            f"feedback reward logratio({teacher}, rollout)            policy gradient of KL(student || {teacher})",
            f"feedback loss   0.5 * logratio(student, {teacher})^2    the same gradient, differentiated",
        ]
        if zero
        else [f"check what `{text[:40]}` leaves of {teacher} once it is differentiated"],
    )


def _own_samples(case: Case) -> None:
    """Likelihood of the student's own samples, chosen by nobody: it teaches itself."""
    term = case.term
    if term.teachers or not case.on_policy or not case.sampled or static_value(term.weight) == 0:
        return
    if any(reads(n, "outcome") for n in (term.gate, term.weight, term.loss)):
        return
    if reads(term.loss, "rollout_logp"):  # a pull back to the policy that drew them
        return
    case.add(
        "OPD317",
        case.span("feedback"),
        "this raises the likelihood of the student's own samples, whatever they are",
        "no teacher, no verifier",
        notes=["its expected gradient is zero; what remains is drift toward the last batch"],
        helps=[
            "gate passed()    keeps rollouts the verifier accepts",
            "regularize 0.1 * sft(data = golden)",
        ],
    )


def _sampled(case: Case) -> None:
    """R01 and R02: a loss on sampled tokens follows the score form −h′(ℓ), not its own mean."""
    if not case.sampled or not case.teachers or not case.on_policy:
        return
    found = case.shape
    if found is None:
        return
    if found.zero:
        _teacher_gone(case, case.teacher, True)
        return
    if found.only(KL_S) or found.scaled == KL_S:
        return
    from opdsl.passport.objective import combination

    t = case.teacher
    follows = f"that of {combination(found.parts, t)}" if found.parts else "another one"
    case.add(
        "OPD525",
        case.span("feedback"),
        f"differentiated on sampled tokens, this loss does not follow KL(student ‖ {t})",
        f"its expected gradient is {follows}",
        notes=["a loss h(ℓ) on samples of the student has the gradient E[h′(ℓ) ∇ log π(y)]"],
        helps=[
            f"feedback loss   0.5 * logratio(student, {t})^2    follows KL(student || {t})",
            f"feedback reward logratio({t}, rollout)            the same, as a score",
            'accept sampled_divergence "why"',
        ],
    )


# ---- clamps ------------------------------------------------------------------------------------


def _clamped(case: Case) -> None:
    """R25: a bound on a divergence over a cut support removes the gradient where it acts."""
    for node, inner in _bounded(case.term.loss):
        if not any(n.op == "sum_v" and n.args[1].op != "full" for n in nodes_below([inner])):
            continue
        if not _acts(case, node, inner):
            continue
        case.add(
            "OPD322",
            case.span("feedback"),
            "a bound on this divergence switches its gradient off at some states",
            "where the bound acts nothing is learned",
            notes=[
                "over a cut support KL(p || q) is negative where p holds less mass than q there "
                "and both are of one shape"
            ],
            helps=["tail = bin keeps it non-negative without a bound", 'allow R25 "why"'],
        )
        return


def _bounded(loss: Node) -> list[tuple[Node, Node]]:
    """(bound, what it bounds) for live values held by a constant."""
    out = []
    for n in nodes_below([loss]):
        if n.op not in ("min", "max") or not n.q.live or not reads_entries(n):
            continue
        live = [a for a in n.args if a.q.live]
        fixed = [a for a in n.args if not a.q.live]
        if len(live) == 1 and len(fixed) == 1 and not dists_below(fixed):
            out.append((n, live[0]))
    return out


def reads_entries(n: Node) -> bool:
    from opdsl.meaning.quantity import Axis

    return n.q.axis is not Axis.VOCAB


def _acts(case: Case, node: Node, inner: Node) -> bool:
    """Whether the bound changes a value, far from the teacher or close to it."""
    from dataclasses import replace

    import numpy as np

    from opdsl.ir.program import expand_tails
    from opdsl.passport.evaluate import Evaluator, Unknown, World, normal, random_world

    worlds: list[World] = []
    for seed, spread in ((43, 1.3), (44, 3.0)):
        far = random_world(seed, spread, case.teacher)
        close = far.teacher + np.random.default_rng(seed).normal(0, 0.1, far.teacher.shape)
        worlds += [far, replace(far, student=normal(close))]
    for world in worlds:
        run = Evaluator(world)
        try:
            both = [run.token(expand_tails(case.b, x)) for x in (node, inner)]
        except (Unknown, ValueError):
            return False
        if bool((np.abs(both[0] - both[1]) > 1e-12).any()):
            return True
    return False
