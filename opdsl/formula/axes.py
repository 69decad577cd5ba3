"""What a method is along every axis of the language: the values `opdsl list --where` asks for.

Every value is read off the typed specification, its graphs, or the values of its fields on random
states, never off a name: a divergence written by hand counts as what it is. An axis has several
values where a method has several sources, teachers or terms.

In values, T stands for any teacher. Comparisons in `feedback` are those the expected update of a
term follows, on its support; `sampled …` reads one token only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np

from opdsl.meaning.graph import nodes_below, static_value
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis
from opdsl.meaning.spec import Spec, Term
from opdsl.passport import field
from opdsl.passport.objective import View
from opdsl.passport.returns import LINEAR, credit_of

Values = tuple[str, ...]


def axes(spec: Spec) -> dict[str, Values]:
    """Axis -> values, for all axes of `vocabulary.AXES` but those of the passport and the shelf."""
    terms = spec.feedback_terms
    return {
        "state": _states(spec),
        "teacher": _teachers(spec),
        "access": _access(spec),
        "support": _each(terms, _supports),
        "tail": _each(terms, lambda t: (t.support.tail,) if t.support.tail else ()) or ("none",),
        "route": _each(terms, lambda t: (t.route,)),
        "feedback": _each(terms, lambda t: _feedback(spec, t)),
        "credit": _each(terms, lambda t: (credit_of(t).kind,)),
        "baseline": _each(terms, _baseline) or ("none",),
        "routing": _each(terms, _routing),
        "gate": _each(terms, lambda t: what_it_reads(t, t.gate)) or ("none",),
        "weight": _each(terms, lambda t: what_it_reads(t, t.weight)) or ("none",),
        "aggregate": (spec.aggregate,),
        "regularize": _regularizers(spec) or ("none",),
    }


def _each(terms: Iterable[Term], of: Callable[[Term], Values]) -> Values:
    return tuple(dict.fromkeys(x for t in terms for x in of(t)))


# ---- states, teachers, supports ------------------------------------------------------------------


def _states(spec: Spec) -> Values:
    own = ("student", "old", "data", "golden", "blend", "interleaved")
    found = [s.policy if s.policy in own else "T" for s in spec.states]
    more = ["mix"] if len(spec.states) > 1 else []
    more += ["prefix"] if any(s.prefix for s in spec.states) else []
    moving = [s for s in spec.states if hasattr(s.share, "at")]
    return tuple(dict.fromkeys([*found, *more, *(["schedule"] if moving else [])]))


def _teachers(spec: Spec) -> Values:
    found = [t.kind for t in spec.teachers]
    found += ["context"] if any(t.context is not None for t in spec.teachers) else []
    found += ["routed"] if spec.routed else []
    found += ["several"] if len({t.name for t in spec.teachers if t.kind != "initial"}) > 1 else []
    return tuple(dict.fromkeys(found)) or ("none",)


def _access(spec: Spec) -> Values:
    from opdsl.meaning.access import requirements

    asked = [r.level for r in requirements(spec).values()]
    written = {s.policy for s in spec.states if s.kind == "sequences"}
    asked += ["text" for t in spec.teachers if t.name in written]
    return tuple(dict.fromkeys(asked)) or ("none",)


def _supports(term: Term) -> Values:
    base = term.support.base
    if base.op in ("union", "intersection"):
        parts = [x for a in base.args for x in _set_words(a)]
        return tuple(dict.fromkeys([base.op, *parts]))
    return _set_words(base)


def _set_words(s: Node) -> Values:
    if s.op in ("full", "sampled"):
        return (s.op,)
    if s.op in ("top", "top_p"):
        dists = {str(n.attr("dist")) for n in nodes_below(s.args) if n.op == "logp"}
        who = "+".join(sorted(_role(d) for d in dists)) or "T"
        return (f"{s.op}-{who}",)
    return tuple(dict.fromkeys(x for a in s.args for x in _set_words(a))) or (s.op,)


def _role(dist: str) -> str:
    return dist if dist in ("student", "initial") else "T"


# ---- feedback ------------------------------------------------------------------------------------


def _feedback(spec: Spec, term: Term) -> Values:
    view = View(spec, term)
    if term.route == "loss":
        return _comparison(term, view)
    return _signal(spec, term, view)


def _comparison(term: Term, view: View) -> Values:
    """A loss by its values; one that reads the sampled token by its expected field."""
    text = view._named[0]
    if text is not None:
        return tuple(dict.fromkeys(_plain(x) for x in _summands(text)))
    nodes = nodes_below([term.loss])
    teachers = {n.attr("dist") for n in nodes if n.op == "logp"} - {"student", "initial"}
    if view.sampled and (not teachers or (view.shape is not None and view.shape.zero)):
        return ("log-likelihood",)  # its mean is zero on own samples: gates and weights decide
    head = "sampled " if view.sampled else ""
    if view.shape is not None and view.shape.parts:
        return tuple(head + _plain(x) for x in view.shape.parts)
    return (head + "other",)


def _summands(text: str) -> list[str]:
    """`0.5 KL(a ‖ b) − H(p)` in its parts; signs inside brackets stay."""
    depth, start, out = 0, 0, []
    for i, c in enumerate(text):
        depth += (c in "([") - (c in ")]")
        if depth == 0 and text[i : i + 3] in (" + ", " − "):
            out.append(text[start:i])
            start = i + 3
    return [*out, text[start:]]


def _plain(text: str) -> str:
    """A comparison without its coefficient and weights: `KL(T || student)`, `JSD(T || student)`."""
    text = re.sub(r"^[−-]?[\d.e+-]*\s*", "", text.strip())
    text = re.sub(r"JSD_[\d.e-]+", "JSD", text)
    text = re.sub(r"[\d.e-]+ student \+ [\d.e-]+ T", "mixture", text)
    return text.replace(" ‖ ", " || ").replace("||", " || ").replace("  ", " ")


def _signal(spec: Spec, term: Term, view: View) -> Values:
    """A reward by what it is made of: the outcome, the log-ratio or a function of it, other scores."""
    signal = term.signal
    if signal is None:
        return ("other",)
    nodes = nodes_below([signal])
    found = ["outcome"] if any(n.attr("name") == "outcome" for n in nodes) else []
    teachers = [n for n in nodes if n.op == "logp" and _role(str(n.attr("dist"))) == "T"]
    if teachers:
        found.append(_of_teacher(spec, term, view, nodes))
    elif any(n.op == "logp" or n.attr("name") == "rollout_logp" for n in nodes):
        found.append("student score")
    return tuple(found) or ("number",)


def _of_teacher(spec: Spec, term: Term, view: View, nodes: list[Node]) -> str:
    known = view._signal
    if known is not None and np.isfinite(known[0]).all():
        r, gap = known
        centred, own = r - r.mean(1, keepdims=True), gap - gap.mean(1, keepdims=True)
        k = float((centred * own).sum() / (own * own).sum())
        if k > 1e-9 and np.abs(centred - k * own).max() < 1e-9 * max(1.0, k):
            return "logratio"
        if view.monotone:
            return "bent logratio"
        if np.abs(centred).max() < 1e-12:
            return "state score"
    if known is not None and _only_in_ratios(nodes):
        return "bent logratio"
    return "bent logratio" if _only_in_ratios(nodes) else "T score"


def _only_in_ratios(nodes: list[Node]) -> bool:
    """Whether the teacher enters by differences of log-probabilities of one token alone."""
    at_y = {n.id for n in nodes if n.op == "at_y" and _role(str(n.args[0].attr("dist"))) == "T"}
    dense = [
        n for n in nodes if n.op != "at_y" and any(
            a.op == "logp" and _role(str(a.attr("dist"))) == "T" for a in n.args
        )
    ]  # fmt: skip
    if not at_y or dense:
        return False
    users = [n for n in nodes if any(a.id in at_y for a in n.args)]
    return all(n.op == "sub" and all(_own_score(a) or a.id in at_y for a in n.args) for n in users)


def _own_score(n: Node) -> bool:
    if n.op == "at_y":
        return n.args[0].attr("dist") in ("student", "initial")
    return n.attr("name") == "rollout_logp" or (n.op == "sg" and _own_score(n.args[0]))


# ---- baseline and routing ------------------------------------------------------------------------

STATISTICS = {
    "others_sum": "leave_one_out",
    "group_sum": "group",
    "group_max": "group",
    "sum_b": "batch",
    "max_b": "batch",
    "position_sum": "position",
}


def _baseline(term: Term) -> Values:
    """What is subtracted from a return or from a reward, found along linear operations."""
    if term.route != "reward" or term.advantage is None:
        return ()
    parts = _linear_parts(term.advantage)
    found = [STATISTICS[n.op] for n in parts if n.op in STATISTICS and not _counts(n)]
    if credit_of(term).kind == "gae" or any(n.attr("name") == "values" for n in parts):
        found.append("critic")
    if not found and term.returned is not None and term.advantage is not term.returned:
        found.append("state")
    return tuple(dict.fromkeys(found))


def _counts(n: Node) -> bool:
    """A number of rollouts or tokens, not a statistic of a value."""
    return n.args[0].op in ("const", "input") and n.args[0].attr("name") in (None, "one")


def _linear_parts(root: Node) -> list[Node]:
    """Nodes that are added up in a value, each times some factor."""
    out, stack, seen = [], [root], set()
    while stack:
        n = stack.pop()
        if n.id in seen:
            continue
        seen.add(n.id)
        if n.op in LINEAR or n.op == "where":
            args = n.args[:1] if n.op == "div" else n.args[1:] if n.op == "where" else n.args
            stack += [a for a in args if a.q.axis is not Axis.VOCAB]
        else:
            out.append(n)
    return out


def _routing(term: Term) -> Values:
    return (term.routing.kind,) if term.route == "reward" else ("implicit",)


# ---- gates and weights ---------------------------------------------------------------------------

INPUTS = {
    "outcome": "outcome",
    "position": "position",
    "length": "length",
    "step": "step",
    "special": "special",
    "noise": "chance",
    "values": "critic",
}
OPERATIONS = {
    "schedule": "step",
    "rank_t": "rank",
    "quantile_b": "batch",
    "max_b": "batch",
    "sum_b": "batch",
    "group_sum": "group",
    "group_max": "group",
    "others_sum": "group",
    "sum_t": "sequence",
    "max_t": "sequence",
    "scan": "sequence",
    "scan_fwd": "sequence",
}


def what_it_reads(term: Term, factor: Node) -> Values:
    """Words for what a gate or weight is made of; `constant` for a number, none for 1."""
    if factor.is_const(1):
        return ()
    if static_value(factor) is not None:
        return ("constant",)
    own = {n.id for n in (term.advantage, term.signal) if n is not None and n.q.axis > Axis.CONST}
    nodes = _outside(factor, own)
    found = ["advantage"] if any(n.id in own for n in nodes) else []
    for n in nodes:
        if n.op == "input" and n.attr("name") == "field":
            found.append("source" if str(n.attr("field")).startswith("@") else "prompt")
        elif n.op == "input":
            found += [INPUTS[str(n.attr("name"))]] if n.attr("name") in INPUTS else []
        elif n.op in OPERATIONS and not _counts_one(n):
            found.append(OPERATIONS[n.op])
        elif n.op in ("sum_v", "max_v", "lse_v"):
            found.append(_over_entries(n))
    found += _at_token(nodes)
    return tuple(dict.fromkeys(found)) or ("other",)


def _outside(root: Node, own: set[int]) -> list[Node]:
    """Nodes below a factor, the advantage as one of them and nothing of what it is made of."""
    out, stack, seen = [], [root], set()
    while stack:
        n = stack.pop()
        if n.id not in seen:
            seen.add(n.id)
            out.append(n)
            stack += n.args if n.id not in own else ()
    return out


def _counts_one(n: Node) -> bool:
    return bool(n.args) and n.args[0].op == "input" and n.args[0].attr("name") == "one"


def _over_entries(n: Node) -> str:
    """A number taken over an index set: an entropy, a divergence, an overlap, a peak."""
    inner = nodes_below(n.args if n.args[1].op != "full" else n.args[:1])
    dists = sorted({_role(str(x.attr("dist"))) for x in inner if x.op == "logp"})
    who = "+".join(dists)
    if n.op == "max_v":
        return f"peak({who})"
    logs = any(
        a.op in ("logp", "at_set", "add_bin") and a.q.unit == "logprob"
        for x in inner if x.op in ("mul", "sub") for a in x.args
    )  # fmt: skip
    if not logs:
        return f"mass({who})" if len(dists) == 1 else f"overlap({who})"
    return f"entropy({who})" if len(dists) == 1 else f"divergence({who})"


def _at_token(nodes: list[Node]) -> list[str]:
    """How a factor reads the sampled token: one side's probability, or their ratio."""
    who = {_role(str(n.args[0].attr("dist"))) for n in nodes if n.op == "at_y"}
    drawn = any(n.attr("name") == "rollout_logp" for n in nodes)
    if drawn and "student" in who and "T" not in who:
        return ["drift"]
    if "T" in who and (drawn or who & {"student", "initial"}):
        return ["logratio", *(["drift"] if drawn and "student" in who else [])]
    return [f"probability({w})" for w in sorted(who)] + (["rollout"] if drawn and not who else [])


# ---- regularizers --------------------------------------------------------------------------------


def _regularizers(spec: Spec) -> Values:
    out = []
    for t in spec.terms:
        if t.kind == "feedback":
            continue
        if t.route == "sft" or t.rows == "golden":
            out.append("given text")
            continue
        text = field.named(spec, t)[0]
        out += [_plain(x) for x in _summands(text)] if text else ["other"]
    return tuple(dict.fromkeys(out))


__all__ = ["Values", "axes", "what_it_reads"]
