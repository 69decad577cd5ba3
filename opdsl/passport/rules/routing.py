"""Rules on vocabulary routing: R41, R43-R45 (theory §9.3)."""

from __future__ import annotations

from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import SET_OPS, Node
from opdsl.meaning.quantity import INF
from opdsl.passport.rules.base import Case


def routing(case: Case) -> None:
    """Where suppressed mass may go, and how hard."""
    how = case.term.routing
    if how.kind == "drop":
        _one_sided(case, "routing")
    elif one_sided(case):
        _one_sided(case, "gate" if "gate" in case.term.spans else "feedback")
    if how.kind != "counterfactual":
        return
    assert how.candidates is not None and how.strength is not None
    below = nodes_below([how.candidates])
    teacher = any(n.op == "logp" and n.attr("dist") not in ("student", "initial") for n in below)
    student = any(n.op == "logp" and n.attr("dist") == "student" for n in below)
    if not (teacher and student):
        _unguarded(case, "teacher" if not teacher else "student")
    elif not in_deficit(how.candidates):
        case.add(
            "OPD510",
            how.span,
            "these candidates need not be in deficit: routing changes the fixed point",
            "no descent of either KL is guaranteed",
            helps=["add  T[v] > student[v]  to `among`", 'accept routed_target "why"'],
        )
    if how.strength.q.high == INF:
        case.add(
            "OPD516",
            how.span,
            "the strength of this routing has no bound",
            "one very unlikely token can dominate the step",
            helps=["strength = min(5 nats, -A)", 'accept unbounded_strength "why"'],
        )


def _unguarded(case: Case, missing: str) -> None:
    case.add(
        "OPD517",
        case.term.routing.span,
        f"the candidates have no condition on the {missing}",
        "mass may go to tokens the teacher does not support"
        if missing == "teacher"
        else "mass may go to tokens the student cannot reach",
        helps=[
            "among = {v in support: T[v] > student[v] and student[v] >= 0.001}",
            'accept unguarded_candidates "why"',
        ],
    )


# ---- R45: one sign only --------------------------------------------------------------------------


def _one_sided(case: Case, where: str) -> None:
    case.add(
        "OPD526",
        case.term.routing.span if where == "routing" else case.span(where),
        "punished tokens are ignored: this is no longer the reverse KL"
        if where == "routing" or _ignored(case) < 0
        else "rewarded tokens are ignored: this is no longer the reverse KL",
        "the teacher stays a fixed point, the way there is slower",
        helps=["routing proportional", 'accept one_sided_signal "why"'],
    )


def one_sided(case: Case) -> bool:
    """Whether a shape or a gate removes every token of one sign, for a log-ratio reward."""
    term = case.term
    if term.signal is None or not case.teachers:
        return False
    cuts = any(n.op in ("min", "max", "where") for n in nodes_below([term.signal]))
    gates = term.gate.op != "const" and any(n is term.advantage for n in nodes_below([term.gate]))
    return (cuts or gates) and _ignored(case) != 0


def _ignored(case: Case) -> int:
    """-1 where tokens above the teacher are ignored, 1 where those below it are, else 0."""
    import numpy as np

    from opdsl.passport.evaluate import Evaluator, Unknown, random_world

    term, world = case.term, random_world(47, 1.3, case.teacher)
    run = Evaluator(world)
    try:
        r = run.token(term.signal)  # type: ignore[arg-type]
        if term.gate.op != "const" and any(n is term.advantage for n in nodes_below([term.gate])):
            r = r * run.token(term.gate)
    except (Unknown, ValueError):
        return 0
    gap = (world.teacher - world.student)[:, 0]
    if not np.isfinite(r).all() or (np.abs(r).max() == 0):
        return 0
    below, above = np.abs(r[gap > 0.05]), np.abs(r[gap < -0.05])
    if above.max() < 1e-9 and below.max() > 1e-9:
        return -1
    return 1 if below.max() < 1e-9 and above.max() > 1e-9 else 0


# ---- P3: deficit ------------------------------------------------------------------------------------


def in_deficit(mask: Node) -> bool:
    """A conjunct student[v] < teacher[v] (in probability or log-probability)."""
    stack, conjuncts = [mask], []
    while stack:
        n = stack.pop()
        if n.op == "and":
            stack += n.args
        else:
            conjuncts.append(n)
    for c in conjuncts:
        if c.op in ("lt", "le"):
            low, high = value_dists(c.args[0]), value_dists(c.args[1])
            if low == {"student"} and high and "student" not in high:
                return True
    return False


def value_dists(node: Node) -> set[str]:
    """Distributions a node reads for their values, not to choose an index set."""
    out: set[str] = set()
    seen: set[int] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n.id in seen or n.op in SET_OPS:
            continue
        seen.add(n.id)
        if n.op == "logp":
            out.add(str(n.attr("dist")))
        stack += n.args
    return out
