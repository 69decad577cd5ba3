"""A method's states, teachers, route and knobs in words, read from its typed specification."""

from __future__ import annotations

from typing import Any

from opdsl.formula.notation import number
from opdsl.formula.sections import Formula
from opdsl.meaning.spec import ParamValue, Schedule, Spec, StateSource, TeacherDecl


def states(spec: Spec) -> list[str]:
    """Whose prefixes, one phrase per source."""
    out = []
    for s in spec.states:
        share = _share(s)
        if s.kind == "sequences":
            out.append(f"{share}y from {'the given data' if s.policy == 'data' else s.policy}")
            continue
        who = {"student": "π_θ", "old": f"π_θ of {s.lag} step{'s' * (s.lag != 1)} ago"}
        named = {name: "π_θ" if name == "student" else f"π_{name}" for _, name in s.parts}
        if s.policy == "blend":
            drawn = " + ".join(f"{w:g} {named[name]}" for w, name in s.parts)
            text = f"{share}y_t ~ {drawn}"
        elif s.policy == "interleaved":
            draft, judge = (named[name] for _, name in s.parts)
            text = f"{share}y_t ~ {draft} where {judge} has it in its top {s.accept}, else {judge}"
        else:
            text = f"{share}y ~ {who.get(s.policy, 'π_' + s.policy)}(· | x)"
        bits = [f"{s.group} per prompt", f"temperature {s.temperature:g}"]
        if s.top_p != 1:
            bits.append(f"top-p {s.top_p:g}")
        if s.top_k is not None:
            bits.append(f"top-k {s.top_k}")
        if s.max_tokens is not None:
            bits.append(f"at most {s.max_tokens:,} tokens")
        if s.prefix is not None:
            bits.append(f"continuing the first {s.prefix} given tokens")
        out.append(text + ": " + ", ".join(bits))
    return out


def _share(s: StateSource) -> str:
    if isinstance(s.share, Schedule):
        over = "the run" if s.share.over is None else f"{s.share.over:g} steps"
        return f"{s.share.start:.0%} → {s.share.stop:.0%} over {over} "
    return "" if s.share == 1 else f"{s.share:.0%} "


def teachers(spec: Spec) -> list[str]:
    """What every teacher is; teachers of one kind are said together."""
    kinds: dict[str, list[TeacherDecl]] = {}
    for t in spec.teachers:
        kinds.setdefault(_kind(t), []).append(t)
    out = []
    for kind, alike in kinds.items():
        names = ", ".join(t.name + _when(t) for t in alike)
        each = kind.replace("an external model", "external models") if len(alike) > 1 else kind
        out.append(f"{names}: {each}" if _when(alike[0]) else f"{names} = {each}")
    for r in spec.routed:
        out.append(f"{r.name} = the one of {', '.join(r.parts)} that fits the prompt")
    return out


def _when(t: TeacherDecl) -> str:
    return f" where {t.when[0]} is {t.when[1]}" if t.when else ""


def _kind(t: TeacherDecl) -> str:
    access = {
        "sampled": "log-probability of the sampled token",
        "top": f"its top {t.k} and the sampled token",
        "score_ids": "log-probabilities of chosen tokens",
        "logits": "full logits",
        "text": "text only",
    }[t.access]
    more = " with more context" if t.context is not None else ""
    match t.kind:
        case "self":
            return f"the student with more context, {access}"
        case "ema":
            return f"{_average(t)}{more}, {access}"
        case "initial":
            return f"the student at step 0{more}, full logits"
    return f"an external model{more}, {access}"


def _average(t: TeacherDecl) -> str:
    steps = "" if t.every == 1 else f" every {t.every} steps"
    if not t.decay:
        return f"a copy of the student{steps or ' after every step'}"
    return f"a moving average of the student (decay {t.decay:g}{steps})"


def route(spec: Spec) -> str:
    words = {
        "loss": "direct loss, differentiated through the student",
        "reward": "frozen reward → credit → score function on y_t",
        "scores": "frozen score per candidate → one score-function term each",
    }
    routes = dict.fromkeys(t.route for t in spec.feedback_terms)
    if len(routes) == 1:
        return words[next(iter(routes))]
    parts = []
    for r in routes:
        names = ", ".join(t.name for t in spec.feedback_terms if t.route == r)
        parts.append(f"{names}: {'direct loss' if r == 'loss' else words[r]}")
    return "; ".join(parts)


def knobs(f: Formula) -> list[str]:
    """`τ = 0.8 nats in [0, 12]`."""
    out = []
    for p in f.names.spec.params:
        domain = f" in {p.domain_text}" if p.domain_text else ""
        out.append(f"{f.names.symbols.param(p.name).u} = {_value(p)}{domain}")
    return out


def _value(p: ParamValue) -> str:
    if isinstance(p.value, Schedule):
        over = "the run" if p.value.over is None else f"{p.value.over:g} steps"
        return f"{number(p.value.start)} → {number(p.value.stop)} over {over}"
    unit = f" {p.unit}" if p.unit in ("nats", "bits") else ""
    return f"{p.value:g}{unit}"


def knob(p: ParamValue) -> dict[str, Any]:
    value = _value(p) if isinstance(p.value, Schedule) else p.value
    return {"name": p.name, "value": value, "unit": p.unit, "domain": p.domain_text}
