"""The bias passport: what a method's update is, computed from its program (theory §11.4).

Every entry is decided by structure or by evaluating the derived field on small random states; what
neither decides is None, printed as "not decided". What the four claims mean (zero expected gradient,
stationary at the teacher, conservative, unbiased) is said in `claims`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from opdsl.diagnostics import Severity
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node
from opdsl.meaning.spec import Spec, Term
from opdsl.passport import field
from opdsl.passport.claims import claims
from opdsl.passport.objective import (
    FKL,
    RKL,
    View,
    conservative_reason,
    objective,
    split_kl,
    views,
)
from opdsl.passport.rules import notes
from opdsl.passport.target import UNDECIDED, fixed_point, main_terms, total_field, whole, world_of

if TYPE_CHECKING:
    from opdsl.compilation import Compilation


def passport(compilation: Compilation) -> dict[str, Any]:
    """The passport of a compiled method as plain values. Raises CompileError on a faulty spec."""
    from opdsl.ir.fingerprint import fingerprints
    from opdsl.ir.needs import needs

    spec, program = compilation.require()
    found = views(spec)
    claim = claims(spec)
    rests = claim.stationary if claim.stationary is not None else _rests(spec)
    target = fixed_point(spec, found, rests, claim.zero)
    need = needs(program)
    return {
        "objective": objective(found),
        "conservative": claim.conservative,
        "conservative_reason": conservative_reason(spec, found, claim),
        "stationary_at_teacher": claim.stationary,
        "fixed_point": target,
        "zero_expected_gradient": claim.zero,
        "unbiased": {"J_seq": claim.j_seq, "J_fro": claim.j_fro},
        "biases": biases(compilation),
        "notes": [
            {"code": d.code, "slug": d.slug, "statement": d.message} for d in notes(spec, target)
        ],
        "descent": descent(spec, found),
        "variance": variance(spec, found),
        "routing": routing(found),
        "estimates": estimates(found),
        "teacher_access": dict(need.teachers),
        "evidence": spec.evidence,
        "fingerprints": fingerprints(program),
    }


def biases(compilation: Compilation) -> list[dict[str, Any]]:
    """Boundaries crossed (5xx) and rules overridden, each once."""
    out: list[dict[str, Any]] = []
    for d in compilation.diagnostics:
        if d.code[3] != "5" and (d.overridden is None or d.severity is not Severity.ERROR):
            continue
        row = {
            "code": d.code,
            "slug": d.slug,
            "statement": d.message,
            "accepted": d.overridden,
        }
        if row not in out:
            out.append(row)
    return sorted(out, key=lambda row: row["code"])


# ---- the field at a state --------------------------------------------------------------------


def _rests(spec: Spec) -> bool | None:
    """Whether the field is zero exactly where the student equals its teacher, corners included:
    the minimum of |x| is one, though no field next to it is small."""
    if not any(t not in ("initial",) for term in spec.terms for t in term.teachers):
        return None
    if any(t.rows == "golden" for t in spec.terms):
        return False  # given text pulls elsewhere
    world = world_of(spec, 11).at_teacher()
    answers = [_vanishes(spec, t, world) for t in main_terms(spec)]
    return True if all(answers) else None


def _vanishes(spec: Spec, term: Term, world: field.World) -> bool | None:
    """A term whose field is zero for every token stays zero under any gate and weight."""
    if not (term.gate.q.live or term.weight.q.live):
        u = field.per_token(spec, term.loss, world)
        if u is not None and np.isfinite(u).all() and np.abs(u).max() < 1e-8:
            return True
    return field.vanishes(spec, whole(spec, term), world)


# ---- descent, routing, variance --------------------------------------------------------------------


def descent(spec: Spec, found: list[View]) -> dict[str, str]:
    """KL -> whether a small step is certain to lower it: "guaranteed …", "not guaranteed …" (a
    counterexample was met) or "not decided"."""
    main = [v for v in found if v.term.rows == "main"]
    undecided = {RKL: UNDECIDED, FKL: UNDECIDED}
    if len(main) == 1 and main[0].term.routing.kind == "counterfactual":
        return _routed(spec, main[0])
    if any(v.credit.kind not in ("none", "immediate") for v in main):
        whole = [v for v in main if v.credit.exact and v.plain and not (v.by_length or v.misdrawn)]
        if split_kl(main) or (len(whole) == len(main) and all(_sequence_kl(v) for v in whole)):
            only = "guaranteed for whole sequences (in expectation)"
            return {RKL: only, FKL: UNDECIDED}
        return undecided
    world = world_of(spec, 13)
    total = total_field(spec, world)
    if total is None:
        return undecided
    s = field.fitted(total, world)
    if s.zero and any(v.misdrawn for v in main):
        return undecided  # zero only if the student had drawn the text
    if s.zero:
        return dict.fromkeys(undecided, "not guaranteed (the expected field is zero)")
    out = {}
    for name, lower in field.descends(total, world).items():
        own = (
            s.parts is not None and list(s.parts) == [name] and s.parts[name] > 0
        ) or s.scaled == name
        if own and not any(v.misdrawn for v in main):
            out[name] = (
                "guaranteed at visited states (in expectation)"
                if _is_sampled(main)
                else "guaranteed at visited states"
            )
        else:
            out[name] = (
                UNDECIDED if lower or own else "not guaranteed (counterexample at one state)"
            )
    return out


def _sequence_kl(view: View) -> bool:
    return view.shape is not None and view.shape.only(RKL)


def _is_sampled(found: list[View]) -> bool:
    return any(v.sampled for v in found)


def _routed(spec: Spec, view: View) -> dict[str, str]:
    """Rules P3 and P7: candidates in deficit, a trigger that punishes only excess, and for
    KL(student ‖ T) a centred trigger."""
    out = {RKL: UNDECIDED, FKL: UNDECIDED}
    if view.credit.kind != "immediate":
        return out
    worlds = [
        field.random_world(seed, spread) for seed, spread in ((17, 1.3), (18, 0.6), (19, 2.2))
    ]
    seen = [x for w in worlds if (x := field.routed_steps(spec, view.term, w)) is not None]
    if not seen:
        return out
    deficit = _in_deficit(view.term.routing.candidates)
    punishes = all(x["punishes"] for x in seen)
    centred = _reads_kl(view.term.routing.trigger)
    measure = ", measured on the support with its bucket" if view.term.support.tail == "bin" else ""
    for name, proved in ((FKL, deficit and punishes), (RKL, deficit and punishes and centred)):
        key = "binned" if name == RKL and measure else name
        if proved and all(x[key] for x in seen):
            out[name] = "guaranteed on routed tokens" + (measure if name == RKL else "")
        elif not all(x[name] for x in seen):
            out[name] = "not guaranteed (counterexample at one state)"
    return out


def _in_deficit(mask: Node | None) -> bool:
    """A conjunct student(v) < teacher(v), in probability or log-probability."""
    stack = [mask] if mask is not None else []
    while stack:
        n = stack.pop()
        if n.op == "and":
            stack += n.args
        elif n.op in ("lt", "le") and _value_of(n.args[0]) == "student":
            deficit = _value_of(n.args[1]) not in (None, "student", "initial")
            if deficit:
                return True
    return False


def _value_of(n: Node) -> str | None:
    """The distribution whose (log-)probability at an entry this is."""
    while n.op in ("exp", "log", "sg", "at_set", "add_bin"):
        n = n.args[0]
    return str(n.attr("dist")) if n.op == "logp" else None


def _reads_kl(trigger: Node | None) -> bool:
    """Whether the trigger compares with a divergence at the state (centred)."""
    if trigger is None:
        return False
    return any(n.op == "sum_v" and n.q.low < 0 for n in nodes_below([trigger]))


def routing(found: list[View]) -> str:
    """Where mass goes when a sampled token is punished."""
    out = []
    for v in found:
        how = v.term.routing
        if v.term.kind != "feedback":
            continue
        if v.term.route != "reward":
            text = "implicit in the loss" if v.term.teachers else ""
        elif how.kind == "suppress":
            text = "suppress: a punished token's mass spills over the softmax"
        elif how.kind == "counterfactual":
            text = f"counterfactual: to the candidates, else {how.otherwise}"
        elif how.kind == "proportional":
            text = "proportional: the other tokens keep their ratios"
        elif how.kind == "drop":
            text = "drop: punished tokens are ignored"
        else:
            text = "local: a divergence replaces the punishment"
        if text and text not in out:
            out.append(text)
    return "; ".join(out) or "none"


def variance(spec: Spec, found: list[View]) -> str:
    """Order of the second moment in the response length T (T6), and where it comes from."""
    main = [v for v in found if v.term.rows == "main" and v.term.kind == "feedback"]
    kinds = [v.credit.kind for v in main]
    parts = []
    if any(k in ("return_to_go", "full", "future") for k in kinds):
        word = "later tokens only, O(T⁴) bound" if set(kinds) & {"future"} else "O(T⁴) bound"
        base = any(v.term.baseline for v in main)
        parts.append(f"return: {word}" + (", lowered by a baseline" if base else ""))
    if "gae" in kinds:
        parts.append("return: set by λ and the critic, between O(T²) and O(T⁴)")
    if "discounted" in kinds:
        gamma = next(v.credit.gamma for v in main if v.credit.kind == "discounted")
        parts.append(f"return: O(T² · min(T, 1/(1 − {gamma:g}))²) bound")
    if "window" in kinds:
        parts.append("return: O(T² n²) bound for a window of n")
    if "immediate" in kinds:
        parts.append("own token: sampled, O(T²) bound")
    if any(v.term.route != "reward" and v.sampled for v in main):
        parts.append("own token: sampled")
    if any(v.term.route != "reward" and not v.sampled for v in main):
        tail = any(v.term.support.tail == "sampled" for v in main)
        parts.append(
            "own token: exact on the support, its tail sampled"
            if tail
            else "own token: exact at the state"
            if len(main) == 1 or "future" in kinds
            else "direct terms: exact at the state"
        )
    if "other" in kinds:
        parts.append("return: not decided")
    return "; ".join(parts) or UNDECIDED


def estimates(found: list[View]) -> list[dict[str, str]]:
    """Per term: what it estimates and how."""
    return [
        {
            "term": v.term.name,
            "route": v.term.route,
            "credit": v.credit.kind if v.term.route == "reward" else "–",
            "objective": v.objective,
        }
        for v in found
    ]
