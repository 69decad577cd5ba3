"""Notes: what is worth knowing and needs no acceptance. `explain` prints them.

R08, R23, R30 (returns), R35, R47, R50, R54, R60, R64, R65, R66 of theory §11.3.
"""

from __future__ import annotations

from opdsl.codes import make
from opdsl.diagnostics import Diagnostic, Report
from opdsl.meaning.graph import nodes_below, reads
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import INF, Info
from opdsl.meaning.spec import Spec
from opdsl.passport.rules.base import KL_S, Case, info_beside


def collect(spec: Spec, target: str | None) -> tuple[Diagnostic, ...]:
    """Every note of a method, each once; `target` is the closed form of the fixed point."""
    report = Report()
    cases = [Case(spec, t, report) for t in spec.terms]
    for case in cases:
        if case.term.kind != "feedback":
            continue
        _exact_own_token(case)
        _one_entry(case)
        if case.term.route == "reward":
            _returns(case)
            _extra_score(case)
        _state_factors(case)
        _ratio_clip(case)
        _special(case)
    _denominator(spec, cases, report)
    _target(spec, report, target)
    kinds = {}
    for d in report.items:
        kinds.setdefault(d.code, d)  # one line a kind, however many terms
    return tuple(sorted(kinds.values(), key=lambda d: d.code))


def _exact_own_token(case: Case) -> None:
    term = case.term
    if term.route != "loss" or case.sampled or term.support.tail or not case.on_policy:
        return
    if set(case.follows or ()) == {KL_S}:
        case.add(
            "OPD528",
            case.span("feedback"),
            "the mean of the sampled log-ratio with immediate credit, without its own-token noise",
        )


def _one_entry(case: Case) -> None:
    term = case.term
    if term.route == "loss" and case.tail == "bin" and case.teachers and not case.sampled:
        case.add(
            "OPD529",
            case.span("support"),
            "one entry for the tail is exact up to tail mass × KL of the conditional tails",
        )


def _returns(case: Case) -> None:
    how, signal = case.credit, case.term.signal
    if signal is None or not case.teachers:
        return
    plain = case.term.gate.op == "const" and case.term.weight.op == "const"
    plain = plain and not case.by_length and case.term.routing.kind == "suppress"
    term = case.term
    if term.returned is not None and term.advantage is not term.returned:
        others = info_beside(term.advantage, term.returned) < Info.ACTION
        plain = plain and others and not _includes_self(term.advantage)
    if how.exact and plain and set(case.follows or ()) == {KL_S}:
        case.add(
            "OPD532",
            case.span("credit"),
            f"unbiased for KL(student ‖ {case.teacher}) of whole sequences",
        )
    unbounded = signal.q.low == -INF or signal.q.high == INF
    if how.kind in ("return_to_go", "full", "future") and unbounded and not case.term.baseline:
        case.add(
            "OPD521",
            case.span("credit"),
            "the second moment of an unbounded return grows with the fourth power of the length",
        )


def _includes_self(advantage: Node) -> bool:
    return any(n.op == "group_sum" and n.args[0].op != "input" for n in nodes_below([advantage]))


def _extra_score(case: Case) -> None:
    """R47: a strength that reads π_T(y) beside a top-k."""
    how = case.term.routing
    if how.strength is None:
        return
    beside = _beside(how.strength, case.term.advantage)
    reads_y = any(
        n.op == "at_y" and n.args[0].op == "logp" and n.args[0].attr("dist") in case.teachers
        for n in beside
    )
    if reads_y and any(t.access == "top" for t in case.spec.teachers):
        case.add(
            "OPD535",
            how.span,
            "this strength reads π_T(y): the sampled token's own score beside the top k",
        )


def _beside(root: Node, advantage: Node | None) -> list[Node]:
    """What a strength reads other than A; −A may be spelled with its difference turned round."""
    turned = {
        n.id
        for n in nodes_below([root])
        if advantage is not None and n.op == "sub" and set(n.args) == set(_bare(advantage).args)
    }
    seen: set[int] = turned | ({advantage.id} if advantage is not None else set())
    out, stack = [], [root]
    while stack:
        n = stack.pop()
        if n.id not in seen:
            seen.add(n.id)
            out.append(n)
            stack += n.args
    return out


def _bare(n: Node) -> Node:
    while n.op == "sg":
        n = n.args[0]
    return n


# ---- gates and weights -----------------------------------------------------------------------------


def _state_factors(case: Case) -> None:
    from opdsl.passport.rules.factors import samples

    for kind, node in (("gate", case.term.gate), ("weight", case.term.weight)):
        if node.op == "const" or node.q.info <= Info.STATIC or node.q.live:
            continue
        if node.q.info <= Info.STATE or not samples(case):
            case.add(
                "OPD511",
                case.span(kind),
                f"this {kind} reweights states; the field at a state keeps its direction",
            )
            return


def _ratio_clip(case: Case) -> None:
    """R64: a ratio held inside bounds is unbiased only where it is 1."""
    bounds = [n for n in nodes_below([case.term.weight]) if n.op in ("min", "max", "where")]
    if any(_ratio(n) for n in bounds):
        case.add(
            "OPD508",
            case.span("weight"),
            "a clipped ratio is unbiased only at ratio 1: the first pass over fresh rollouts",
        )


def _ratio(n: Node) -> bool:
    """Whether a value compares the student of now with the policy that drew the rollouts."""
    below = nodes_below([n])
    drawn = any(x.op == "input" and x.attr("name") == "rollout_logp" for x in below)
    return drawn and any(x.op == "logp" and x.attr("dist") == "student" for x in below)


def _special(case: Case) -> None:
    """R66: template and end tokens count like any other unless they are masked."""
    term = case.term
    if not case.teachers or any(reads(n, "special") for n in (term.gate, term.weight, term.loss)):
        return
    case.add(
        "OPD538",
        case.span("feedback"),
        "special tokens count like any other: `gate not special(y)` leaves them out",
    )


# ---- the whole method ---------------------------------------------------------------------------------


def _denominator(spec: Spec, cases: list[Case], report: Report) -> None:
    gated = [c for c in cases if c.term.kind == "feedback" and c.term.gate.op != "const"]
    if not gated:
        return
    if spec.aggregate == "kept_tokens":
        gated[0].add(
            "OPD519",
            gated[0].span("gate"),
            "divided by the kept tokens: the mean over what the gate keeps, however little it is",
        )
    elif spec.aggregate in ("sum", "tokens"):
        gated[0].add(
            "OPD536",
            gated[0].span("gate"),
            "the share the gate keeps scales the step: the divisor counts every token",
        )


def _target(spec: Spec, report: Report, target: str | None) -> None:
    """R60: the student a state is pulled to, where it is not the teacher."""
    names = [f"π_{t.name}" for t in spec.teachers] + [f"π_{r.name}" for r in spec.routed]
    own = target in names or any(target.startswith(f"{n} (") for n in names) if target else True
    if own or target.startswith(("not decided", "every", "none", "any")):
        return
    report.add(make("OPD537", spec.span, f"implied target: {target}"))
