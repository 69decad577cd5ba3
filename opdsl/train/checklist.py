"""The reporting checklist of on-policy distillation, filled in from what ran.

Sixteen entries (theory §10.4): what a paper would have to say for its run to be
understood and repeated. Each is answered from the compiled spec, from the plan, and from what was
measured; nothing is taken from the text of a title or a comment, and what was not measured says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opdsl.meaning.graph import nodes_below
from opdsl.train.html_text import number
from opdsl.train.opd_metrics import find


@dataclass(frozen=True)
class Entry:
    """One line of the checklist. answers: sentences; measured: figures of this run."""

    number: int
    item: str
    answers: tuple[str, ...]
    measured: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """What the checklist is filled in from. facts: `explain` as JSON ({} where there is none).
    metrics: records of `metrics.jsonl`. identity: fingerprints of weights, tokenizers, data."""

    method: Any
    plan: Any
    summary: Any
    facts: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    identity: Mapping[str, str]

    @property
    def spec(self) -> Any:
        return self.method.spec

    @property
    def terms(self) -> tuple[Any, ...]:
        return tuple(getattr(self.spec, "terms", ()))

    @property
    def passport(self) -> Mapping[str, Any]:
        return self.facts.get("passport", {})


def checklist(run: Run) -> list[Entry]:
    """The sixteen entries, in order."""
    makers = (
        _states, _teacher, _comparator, _support, _realisation, _credit, _routing, _factors,
        _shaping, _regularizers, _aggregate, _ratio, _outcome, _bias, _lengths, _evaluation,
    )  # fmt: skip
    entries = []
    for i, make in enumerate(makers):
        item, answers, names = make(run)
        found = tuple(a for a in answers if a) or ("not part of this method",)
        entries.append(Entry(i + 1, item, found, tuple(measured(run.metrics, names))))
    return entries


Made = tuple[str, list[str], tuple[str, ...]]  # item, answers, metrics to quote


# ---- the entries -----------------------------------------------------------------------------------


def _states(run: Run) -> Made:
    answers = list(run.facts.get("states", [])) or [str(s.kind) for s in run.spec.states]
    for s in run.spec.states:
        sampler = [f"temperature {s.temperature:g}"]
        sampler += [f"top-p {s.top_p:g}"] if s.top_p < 1 else []
        sampler += [f"top-k {s.top_k}"] if s.top_k else []
        horizon = [f"a right prefix of {s.prefix} tokens is forced"] if s.prefix else []
        stale = [f"{s.lag} to {s.lag + 1} updates old"] if s.lag else []
        if s.kind == "rollouts":
            answers.append("; ".join([", ".join(sampler), *horizon, *stale]))
    answers.append(f"{run.plan.prompts} prompts × {run.plan.group} responses a step")
    answers.append(f"at most {run.plan.max_tokens} tokens a response")
    answers += (
        [f"{run.plan.recipe.epochs} updates on each batch"] if run.plan.recipe.epochs > 1 else []
    )
    return "State source, staleness, sampler, prefix horizon", answers, ("rollout_gap",)


def _teacher(run: Run) -> Made:
    answers = list(run.facts.get("teachers", []))
    for name, model in run.summary.teachers.items():
        weights = run.identity.get(f"weights of {name}")
        answers.append(f"{name} is {model}" + (f", weights {weights[:16]}" if weights else ""))
    for t in run.spec.teachers:
        if t.context:
            answers.append(f"{t.name} reads the prompt behind a template of its own: {t.context!r}")
    own = run.identity.get("tokenizer of student")
    if own is not None:
        same = all(v == own for k, v in run.identity.items() if k.startswith("tokenizer of"))
        answers.append("tokenizers " + ("are equal" if same else "differ") + f" ({own[:16]})")
    needed = run.facts.get("needs", {}).get("teachers", {})
    answers += [f"{name}: the method reads {level}" for name, level in needed.items()]
    temperatures = sorted(
        {
            float(n.attr("temperature"))
            for n in _nodes(run)
            if n.op == "logp" and n.attr("dist") != "student"
        }
    )
    if temperatures and temperatures != [1.0]:
        answers.append("temperatures of teachers: " + ", ".join(f"{t:g}" for t in temperatures))
    names = ("teacher_entropy", "teacher_uniformity", "teacher_rejects")
    return "Teacher: identity, template, tokenizer, access, temperature", answers, names


def _comparator(run: Run) -> Made:
    answers = [f"{_named(run, t)}{t.route}: {_written(t, 'feedback')}" for t in _feedback(run)]
    return "Comparator and direction", answers, ("kl", "kl_teacher", "kl_sampled", "kl_listed")


def _support(run: Run) -> Made:
    answers = list(run.facts.get("support", []))
    answers += [
        f"{_named(run, t)}mass outside: {t.support.tail}" for t in _feedback(run) if t.support.tail
    ]
    names = ("support_student", "support_teacher", "support_tail_max", "overlap")
    return "Support, k, mass mode, measured π(Ω) and π_T(Ω)", answers, names


def _realisation(run: Run) -> Made:
    route = run.facts.get("route")
    words = {
        "loss": "differentiated through the student",
        "reward": "a frozen reward for the score of the sampled token",
        "scores": "a frozen score per candidate",
        "sft": "text to imitate",
    }
    routes = dict.fromkeys(t.route for t in run.terms) or ([route] if route else [])
    answers = [f"{r}: {words.get(r, r)}" for r in routes]
    answers += [f"variance: {run.passport['variance']}"] if run.passport.get("variance") else []
    return "Realisation and estimator", answers, ("energy",)


def _credit(run: Run) -> Made:
    answers = []
    for t in _feedback(run):
        if t.credit or t.written.get("credit"):
            answers.append(f"{_named(run, t)}{_written(t, 'credit') or t.credit}")
        if t.baseline or t.written.get("baseline"):
            answers.append(f"{_named(run, t)}baseline {_written(t, 'baseline') or t.baseline}")
    if run.method.gae:
        answers.append("γ = {:g}, λ = {:g}".format(*run.method.gae))
    for c in run.spec.critics:
        answers.append(f"critic {c.name}: from {c.init}, lr {c.lr:g}, warm-up {c.warmup} steps")
    if run.spec.critics:
        answers.append("a response cut at the limit is continued by the critic's value there")
    names = ("signal_mean", "returned_mean", "advantage_mean", "advantage_std", "critic_ev")
    return "Credit, γ, λ, baseline, critic, bootstrap where cut", answers, names


def _routing(run: Run) -> Made:
    answers = []
    for t in _feedback(run):
        if t.routing.kind != "suppress":
            answers.append(f"{_named(run, t)}{_written(t, 'routing') or t.routing.kind}")
            if t.routing.routable is not None:
                answers.append(f"without a candidate: {t.routing.otherwise}")
    if not answers and any(t.route == "reward" for t in _feedback(run)):
        answers = ["none: what a punished token loses goes where the softmax puts it"]
    names = ("routing_trigger", "routing_routable", "routing_candidates", "routing_mass")
    return "Routing: rule, candidates, fallback, routability", answers, names


def _factors(run: Run) -> Made:
    """`Info` says when a factor is known: a function of the state, the action, the future."""
    answers = []
    for t in run.terms:
        for what in ("gate", "weight"):
            node = getattr(t, what)
            if node.value is None:
                knows = node.q.info.name.lower()
                written = _written(t, what) or "as in the spec"
                answers.append(f"{_named(run, t)}{what} {written} (known from the {knows})")
    return "Gates and weights, and what they know", answers, ("kept/*", "gate_mean", "weight_mean")


def _shaping(run: Run) -> Made:
    answers = [
        f"{_named(run, t)}{_written(t, 'shape')}, on the reward, before credit"
        for t in _feedback(run)
        if t.written.get("shape")
    ]
    names = tuple(f"clipped_{x}" for x in ("signal", "advantage", "weight", "strength", "loss"))
    bound = [n for n in names if any(n in k for m in run.metrics for k in m)]
    answers += [f"constant bounds in the {n.removeprefix('clipped_')}" for n in bound]
    return "Shaping, where it is applied, how often it binds", answers, names


def _regularizers(run: Run) -> Made:
    answers = [_written(t, "feedback") or t.name for t in run.terms if t.kind == "regularizer"]
    fixed = run.passport.get("fixed_point")
    answers += [f"the whole rests at: {fixed}"] if fixed else []
    return "Regularizers and the implied target", answers, ("loss/*",)


def _aggregate(run: Run) -> Made:
    words = {
        "sum": "sum over tokens",
        "tokens": "mean over the tokens of the whole batch",
        "kept_tokens": "mean over the kept tokens of the whole batch",
        "sequences": "mean over sequences of the mean over their tokens",
        "response_length": "sum over sequences of the mean over their tokens",
    }
    kind = getattr(run.spec, "aggregate", None)
    return "Aggregation", [words.get(kind, kind)] if kind else [], ("tokens", "rows")


def _ratio(run: Run) -> Made:
    """An importance ratio is a live exp(log π(y) − log μ(y)) in a loss or weight."""
    found = []
    for t in run.terms:
        for n in nodes_below([t.loss, t.weight, t.gate]):
            if n.op == "exp" and _reads_both(n):
                found.append(f"{_named(run, t)}importance ratio of student and sampler")
                break
    answers = found or ["none: every token counts as if the student of this step had sampled it"]
    return (
        "Ratio clipping and importance weights",
        answers if run.terms else [],
        ("clipped_loss", "rollout_gap"),
    )


def _outcome(run: Run) -> Made:
    if not run.method.needs.outcome:
        return "Outcome coupling", ["none: the verifier is only reported"], ("reward",)
    answers = []
    for t in run.terms:
        for what in ("loss", "signal", "gate", "weight"):
            node = getattr(t, what)
            if node is not None and any(n.attr("name") == "outcome" for n in nodes_below([node])):
                answers.append(f"{_named(run, t)}the outcome enters its {what}")
                break
    verifier = run.plan.settings.verifier
    answers.append(
        f"verifier: {verifier or ('of the task' if run.plan.task else 'by the reference')}"
    )
    return "Outcome coupling", answers, ("reward", "groups_mixed")


def _bias(run: Run) -> Made:
    p = run.passport
    answers = [f"objective: {p['objective']}"] if p.get("objective") else []
    unbiased = [name for name, yes in p.get("unbiased", {}).items() if yes]
    answers += [f"unbiased for {', '.join(unbiased) or 'neither J_seq nor J_fro'}"] if p else []
    for bias in p.get("biases", []):
        why = f" (accepted: {bias['accepted']})" if bias.get("accepted") else ""
        answers.append(f"{bias['code']} {bias['statement']}{why}")
    answers += [f"evidence: {p['evidence']}"] if p.get("evidence") else []
    return "Bias statement: which objective, which boundary", answers, ()


def _lengths(run: Run) -> Made:
    names = ("length", "length_max", "truncated", "entropy", "eos", "teacher_eos")
    return "Length, truncation, entropy, end-token supply", ["see the figures"], names


def _evaluation(run: Run) -> Made:
    plan = run.plan
    answers = [f"seed {plan.seed} (data, rollouts)"]
    answers += [f"seed {plan.pair_seed} (built-in models)"] if plan.task else []
    if run.summary.evals:
        for mode in ("greedy", "sampled"):
            ends = [e["sets"] for e in (run.summary.evals[0], run.summary.evals[-1])]
            for name in ends[-1]:
                first, last = (s.get(name, {}).get(mode, {}) for s in ends)
                answers.append(f"{name}, {mode}: {_share(first)} before, {_share(last)} after")
    else:
        answers.append("no held-out prompts: accuracy was not measured")
    answers.append("one seed: no spread over seeds is known from this run")
    return "Seeds; greedy and sampled evaluation", answers, ()


# ---- helpers ---------------------------------------------------------------------------------------


def _feedback(run: Run) -> list[Any]:
    return [t for t in run.terms if t.kind == "feedback"]


def _named(run: Run, term: Any) -> str:
    return f"{term.name}: " if len(run.terms) > 1 else ""


def _written(term: Any, section: str) -> str:
    """A section as the spec has it, in one line and without its comments."""
    lines = (re.sub(r"(^|\s)#.*$", "", line) for line in term.written.get(section, "").splitlines())
    return " ".join(" ".join(lines).split())


def _nodes(run: Run) -> list[Any]:
    return list(nodes_below([t.loss for t in run.terms])) if run.terms else []


def _reads_both(n: Any) -> bool:
    below = nodes_below([n])
    own = any(x.op == "logp" and x.attr("dist") == "student" for x in below)
    return own and any(x.op == "input" and x.attr("name") == "rollout_logp" for x in below)


def _share(found: Mapping[str, Any]) -> str:
    if found.get("accuracy") is None:
        return "not measured"
    low, high = found["interval"]
    return f"{found['accuracy']:.1%} [{low:.1%}, {high:.1%}] of {found.get('judged', '?')}"


def measured(metrics: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """First, mean and last value of each figure, over all its owners; "not measured" is not said
    of figures this method does not have."""
    out = []
    stems = [n.rstrip("*") for n in names]
    keys = dict.fromkeys(k for m in metrics for k in m if find(k) is not None)
    for key in keys:
        name = find(key).name.rstrip("*")  # type: ignore[union-attr]
        if name not in stems:
            continue
        values = [m[key] for m in metrics if isinstance(m.get(key), (int, float))]
        if values:
            mean = sum(values) / len(values)
            first, middle, last = (number(float(x)) for x in (values[0], mean, values[-1]))
            out.append(f"{key} {first} → {last} (mean {middle})")
    return out
