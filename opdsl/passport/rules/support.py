"""Rules on cut supports: R21, R22, R24, R26, R29 (theory §7)."""

from __future__ import annotations

from opdsl.diagnostics import Label
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node
from opdsl.passport.rules.base import KL_S, Case

REPAIRS = [
    "tail = bin            keep the remaining mass as one extra entry",
    "tail = renormalize    compare shapes inside the support",
    "support full          no cut",
]


def support(case: Case) -> None:
    """What a cut leaves out of a direct loss, and statistics that the cut makes constant."""
    _mass(case)
    if case.term.route != "loss" or not _runs_over(case):
        return
    tail = case.tail
    if tail == "renormalize":
        if not _one_entry(case.term.support.base):  # that is R20: nothing at all is compared
            _blind(case)
    elif tail in ("drop", "detach") and case.teachers and not _pairing(case):
        (_dropped if tail == "drop" else _student_tail)(case)


def _runs_over(case: Case) -> bool:
    """Whether the loss sums over the cut support."""
    chosen = case.term.support.set
    return any(
        n.op in ("sum_v", "lse_v") and n.args[1] is chosen for n in nodes_below([case.term.loss])
    )


def _one_entry(s: Node) -> bool:
    return s.op == "sampled" or (s.op == "top" and s.attr("k") == 1)


def _dropped(case: Case) -> None:
    if case.rests is not False:
        return  # terms that vanish entry by entry where both agree: still a divergence
    case.add(
        "OPD502",
        case.span("support"),
        "a divergence over a cut support is not a divergence: it can be negative",
        "mass outside the support is forgotten",
        secondary=[
            Label(case.span("feedback"), "its lowest value is not at student = teacher")
        ],
        notes=["`--fix` is not offered: the repairs are different methods"],
        helps=REPAIRS,
    )  # fmt: skip


def _blind(case: Case) -> None:
    case.add(
        "OPD503",
        case.span("support"),
        "a renormalised support is blind to the mass outside it",
        "the student may move mass in or out freely",
        helps=[
            "tail = bin keeps the remaining mass as one entry",
            'accept renormalized_support "why"',
        ],
    )


# ---- R24: which tail sets the error --------------------------------------------------------------


def _student_tail(case: Case) -> None:
    """Reverse KL, weighted by the student, on entries that the teacher ranked."""
    if "student" in _rankers(case.term.support.base) or _has_sample(case.term.support.base):
        return
    from opdsl.passport import field

    if "KL(student ‖ T)" not in (field.divergence(case.spec, case.term) or ""):
        return
    t = case.teacher
    case.add(
        "OPD530",
        case.span("support"),
        "the entries are ranked by the teacher, the error is the student's mass outside them",
        f"KL(student ‖ {t}) is weighted by the student",
        notes=["early in training the student's tail is large exactly where the teacher's is small"],
        helps=[
            "tail = bin            keeps the tail as one entry",
            f"union(sampled, top(k, of = {t}), top(k, of = student), tail = …)",
            'accept student_tail "why"',
        ],
    )  # fmt: skip


def _rankers(s: Node) -> set[str]:
    return {str(n.attr("dist")) for n in nodes_below([s]) if n.op == "logp"}


def _has_sample(s: Node) -> bool:
    return any(n.op == "sampled" for n in nodes_below([s]))


# ---- R29: a head over the support and a score for what falls outside --------------------------------


def _pairing(case: Case) -> bool:
    """A hand-written correction by the sampled token. True where head and tail belong together
    or their mismatch was reported."""
    heads = any(c.at_sets for c in case.field)
    if not heads or not any(c.at_y is not None for c in case.field):
        return False
    leftover = _outward_push(case)
    if leftover is None:
        return False
    if abs(leftover) > 1e-6:
        case.add(
            "OPD531",
            case.span("feedback"),
            "this head and this sampled tail do not belong together: a push on the mass is left",
            f"the field is that of the whole KL {leftover:+.3g} ∇ π(support)",
            notes=["unbiased are: a detached head with score ℓ, or a raw head with score ℓ + 1"],
            helps=["tail = sampled pairs them", 'accept tail_pairing "why"'],
        )
    return True


def _outward_push(case: Case) -> float | None:
    """k of field = −∇KL(student ‖ T) − k ∇π(Ω); None where the field is not of this form."""
    import numpy as np

    from opdsl.passport import field
    from opdsl.passport.evaluate import Evaluator, S, Unknown, V, random_world

    world = random_world(45, 1.3, case.teacher)
    u = field.expected(case.spec, case.term.loss, world)
    try:
        mask = Evaluator(world).mask(case.term.support.base)
    except Unknown:
        return None
    if u is None or (mask != mask[:, :1]).any():
        return None
    inside = np.broadcast_to(mask[:, 0], (S, V)).astype(float)
    pi = world.pi
    push = pi * (inside - (pi * inside).sum(1, keepdims=True))
    basis = np.stack([-world.gradients()[KL_S].ravel(), -push.ravel()], 1)
    k, *_ = np.linalg.lstsq(basis, u.ravel(), rcond=None)
    if np.abs(basis @ k - u.ravel()).max() > 1e-7 or abs(k[0]) < 1e-6:
        return None
    return float(k[1] / k[0])


# ---- R26 ---------------------------------------------------------------------------------------------


def _mass(case: Case) -> None:
    """The mass of a support that is whole, renormalised or binned is 1, whatever is learned."""
    term = case.term
    for kind, root in (("gate", term.gate), ("weight", term.weight), ("feedback", term.loss),
                       ("feedback", term.signal)):  # fmt: skip
        if root is not None and any(_unit_mass(n) for n in nodes_below([root])):
            case.add(
                "OPD321",
                case.span(kind, "support"),
                "the mass of this support is the constant 1",
                "it says nothing about the student or the teacher",
                notes=[
                    "the whole vocabulary, a renormalised support and one with a bucket sum to 1"
                ],
                helps=[
                    "sum(v in top(k, of = T): student[v])   the mass of the entries alone",
                    'allow R26 "why"',
                ],
            )
            return


def _unit_mass(n: Node) -> bool:
    if n.op != "sum_v" or n.args[0].op != "exp":
        return False
    x = n.args[0].args[0]
    while x.op == "sg":
        x = x.args[0]
    if x.op == "add_bin":
        return n.args[1].op == "with_bin"
    if x.op == "logp":
        return n.args[1].op == "full"
    return x.op == "sub" and x.args[1].op == "lse_v" and x.args[1].args[0] is x.args[0]
