"""The figures of a step that on-policy distillation is watched by: their names and meaning.

`CATALOGUE` lists every key a record of `metrics.jsonl` may hold; a name with `*` stands for one
key per teacher (`/NAME`) or per term (`/TERM`), and without the suffix where there is one only.
docs/watching.md is this table. `statistics` makes the figures of a method's own quantities out of
the numbers per token that `instruments` hands over.

Shapes: N kept tokens of the batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

REJECTED = -20.0  # nats: a teacher gives such a token a probability below 2e-9


@dataclass(frozen=True)
class Metric:
    """One figure. how: how it joins over parts of a batch ("sum", "mean", "max", "min", "std",
    or "same" for what every part agrees on). group: the heading it is shown under."""

    name: str
    group: str
    unit: str
    text: str
    how: str = "mean"


def _spread(name: str, group: str, unit: str, text: str) -> tuple[Metric, ...]:
    """Mean, standard deviation, extremes and share of negative values of one quantity."""
    return (
        Metric(f"{name}_mean*", group, unit, text),
        Metric(f"{name}_std*", group, unit, "its standard deviation over tokens", "std"),
        Metric(f"{name}_min*", group, unit, "its smallest value", "min"),
        Metric(f"{name}_max*", group, unit, "its largest value", "max"),
        Metric(f"{name}_negative*", group, "share", "tokens where it is below 0"),
    )


CATALOGUE: tuple[Metric, ...] = (
    Metric("step", "step", "", "optimizer steps done; 0 and below: warm-up of critics", "same"),
    Metric("skipped", "step", "", "why the step was left out, where it was", "same"),
    Metric("dropped", "step", "", "why the batch was left out, where a server lost it", "same"),
    Metric("rows", "step", "", "responses trained on", "sum"),
    Metric("tokens", "step", "", "response tokens trained on", "sum"),
    Metric("loss", "objective", "", "the method's loss", "sum"),
    Metric("loss/*", "objective", "", "the share of one term; the shares add up", "sum"),
    Metric("reward", "objective", "share", "student's responses the verifier accepts"),
    Metric("reward/*", "objective", "share", "the same by the field `domain`, where there are several"),
    Metric("groups", "groups", "", "prompts with two or more judged responses", "sum"),
    Metric("groups_right", "groups", "share", "of them: every response is right"),
    Metric("groups_wrong", "groups", "share", "of them: every response is wrong"),
    Metric("groups_mixed", "groups", "share", "of them: some are"),
    Metric("pass_rate_min", "groups", "share", "pass rate of the worst group", "min"),
    Metric("pass_rate_max", "groups", "share", "pass rate of the best group", "max"),
    Metric("group_std", "groups", "share", "deviation of the score inside a group, mean"),
    Metric("curriculum_seen", "groups", "share", "prompts judged at all so far", "same"),
    Metric("curriculum_hard", "groups", "share", "prompts that are drawn less: too hard", "same"),
    Metric("curriculum_easy", "groups", "share", "prompts that are drawn less: too easy", "same"),
    Metric("grad_norm", "optimizer", "", "gradient norm before clipping", "same"),
    Metric("lr", "optimizer", "", "learning rate", "same"),
    # divergences, exact over the vocabulary at sampled tokens
    Metric("kl*", "divergence", "nats", "KL(student || teacher)"),
    Metric("kl_teacher*", "divergence", "nats", "KL(teacher || student)"),
    Metric("kl_sampled*", "divergence", "nats", "estimate of KL(student || teacher): mean of log student − log teacher at the student's own tokens, all of them"),
    Metric("kl_listed*", "divergence", "nats", "lower bound of KL(student || teacher): the teacher's list and one bucket"),
    Metric("kl_teacher_listed*", "divergence", "nats", "lower bound of KL(teacher || student), likewise"),
    Metric("energy*", "divergence", "nats²", "variance of the log-ratio under the student: 0 where a full KL pulls nowhere"),
    Metric("entropy", "entropy", "nats", "entropy of the student"),
    Metric("teacher_entropy*", "entropy", "nats", "entropy of the teacher"),
    Metric("teacher_uniformity*", "teacher", "share", "teacher entropy over ln V; near 1 the teacher has lost its weights"),
    Metric("teacher_rejects*", "teacher", "share", "sampled tokens to which the teacher gives less than e^-20"),
    # agreement and support
    Metric("overlap*", "overlap", "share", "of the 16 most probable tokens (at most V/4): shared with the teacher's"),
    Metric("overlap_mass*", "overlap", "share", "student mass on the shared tokens"),
    Metric("overlap_teacher_mass*", "overlap", "share", "teacher mass on the shared tokens"),
    Metric("overlap_advantage*", "overlap", "nats", "mean of p (log q − log p) over shared tokens, both renormalised on them"),
    Metric("student_top_teacher_mass*", "overlap", "share", "teacher mass on the student's most probable tokens"),
    Metric("teacher_top_student_mass*", "overlap", "share", "student mass on the teacher's most probable tokens"),
    Metric("listed_student_mass*", "support", "share", "student mass on a served teacher's list"),
    Metric("listed_teacher_mass*", "support", "share", "teacher mass on its list"),
    Metric("support_student*", "support", "share", "student mass on the term's support"),
    Metric("support_tail*", "support", "share", "student mass outside it, mean"),
    Metric("support_tail_max*", "support", "share", "student mass outside it, largest", "max"),
    Metric("support_teacher*", "support", "share", "teacher mass on the term's support (the known part of it)"),
    # feedback and credit
    *_spread("logratio", "credit", "nats", "log teacher − log student at the sampled token"),
    *_spread("signal", "credit", "nats", "the frozen reward of a token, shaped, where credit changes it"),
    *_spread("returned", "credit", "nats", "credit before the baseline, where there is one"),
    *_spread("advantage", "credit", "nats", "what multiplies the score of a token"),
    Metric("critic_ev*", "credit", "share", "variance of the returns that the critic explains"),
    Metric("critic_mse*", "credit", "nats²", "squared error of the critic"),
    Metric("rollout_gap", "credit", "nats", "mean distance of log student and log sampler at the sampled token"),
    # routing, gates, bounds
    Metric("routing_trigger*", "routing", "share", "tokens whose routing acts"),
    Metric("routing_routable*", "routing", "share", "of these: tokens with a candidate"),
    Metric("routing_candidates*", "routing", "", "of these: candidates per token"),
    Metric("routing_mass*", "routing", "nats", "strength of routed tokens, mean over all tokens"),
    Metric("kept/*", "gates", "share", "mean gate of a term"),
    Metric("gate_mean*", "gates", "share", "mean of one gate of a term that has several"),
    Metric("weight_mean*", "gates", "", "mean weight of a term"),
    Metric("weight_max*", "gates", "", "its largest weight", "max"),
    Metric("clipped_signal*", "bounds", "share", "tokens whose reward sits at a constant bound"),
    Metric("clipped_advantage*", "bounds", "share", "tokens whose credit sits at one"),
    Metric("clipped_weight*", "bounds", "share", "tokens whose weight sits at one"),
    Metric("clipped_strength*", "bounds", "share", "tokens whose routing strength sits at one"),
    Metric("clipped_loss*", "bounds", "share", "tokens whose loss or ratio sits at one"),
    # responses
    Metric("length", "responses", "tokens", "mean length of the student's responses"),
    Metric("length_max", "responses", "tokens", "longest of them", "max"),
    Metric("finished", "responses", "share", "of them: ended by the end token"),
    Metric("truncated", "responses", "share", "of them: cut at the limit"),
    Metric("eos", "responses", "share", "mean probability the student gives the end token"),
    Metric("teacher_eos*", "responses", "share", "mean probability the teacher gives it"),
)  # fmt: skip


@lru_cache(maxsize=4096)
def find(key: str) -> Metric | None:
    """The metric a key of a record stands for; None for a key of no known metric."""
    exact = {m.name: m for m in CATALOGUE}
    if key in exact:
        return exact[key]
    for metric in CATALOGUE:
        if re.fullmatch(_pattern(metric.name), key):
            return metric
    return None


def _pattern(name: str) -> str:
    stem = re.escape(name.rstrip("*"))
    if not name.endswith("*"):
        return stem
    if name in ("loss/*", "kept/*", "reward/*"):
        return stem + ".+"
    if name.startswith("critic_"):
        return rf"(.+/)?{stem}"  # a critic's name comes first
    return rf"{stem}(/.+)?"


def table() -> str:
    """CATALOGUE in Markdown, as docs/watching.md holds it."""
    lines = ["| name | unit | what it is |", "|---|---|---|"]
    lines += [f"| `{m.name}` | {m.unit or '–'} | {_escaped(m.text)} |" for m in CATALOGUE]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


# ---- statistics ----------------------------------------------------------------------------------


def statistics(
    values: Mapping[tuple[str, str], torch.Tensor], own_N: torch.Tensor | None
) -> dict[str, float]:
    """Figures of a step from numbers per token.

    values: {(what, of): [N]} of `Instruments`. own_N: which tokens the student sampled; the
    estimate of the KL is taken over these (None: over all).
    """
    made = _Made(values)
    names = made.owners("logp", without=("",))
    for name in names:
        ratio_N = values["logp", name] - values["logp", ""]
        made.spread("logratio", name, names, ratio_N)
        mine_N = ratio_N if own_N is None else ratio_N[own_N]
        if len(mine_N):
            made.add("kl_sampled", name, names, -mine_N.double().mean())
        made.share("teacher_rejects", name, names, values["logp", name] < REJECTED)
    if ("rollout", "") in values:
        gap_N = (values["logp", ""] - values["rollout", ""]).abs()
        made.add("rollout_gap", "", [""], gap_N.double().mean())
    for what in ("signal", "returned", "advantage"):
        for term in made.owners(what):
            made.spread(what, term, made.owners(what), values[what, term])
    _factors(made)
    _support(made)
    _routing(made)
    return made.numbers()


def _factors(made: _Made) -> None:
    for term in made.owners("weight"):
        weight_N = made.values["weight", term].double()
        made.add("weight_mean", term, made.owners("weight"), weight_N.mean())
        made.add("weight_max", term, made.owners("weight"), weight_N.max())
    for what, term in made.values:
        if what.startswith("gate "):
            value = made.values[what, term].double().mean()
            made.found[f"gate_mean/{term}/{what[5:]}"] = value
        if what.startswith("clipped "):
            made.share(what.replace(" ", "_"), term, made.owners(what), made.values[what, term])


def _support(made: _Made) -> None:
    terms = made.owners("mass student")
    for term in terms:
        mass_N = made.values["mass student", term].double().clamp(0, 1)
        made.add("support_student", term, terms, mass_N.mean())
        made.add("support_tail", term, terms, (1 - mass_N).mean())
        made.add("support_tail_max", term, terms, (1 - mass_N).max())
    teachers = [k for k in made.values if k[0].startswith("mass ") and k[0] != "mass student"]
    for what, term in teachers:
        who = [what[5:]] if len({w for w, t in teachers if t == term}) > 1 else []
        who = ([term] if len(terms) > 1 else []) + who
        key = "/".join(["support_teacher", *who])
        made.found[key] = made.values[what, term].double().clamp(0, 1).mean()


def _routing(made: _Made) -> None:
    """Of the tokens whose routing acts: which have a candidate, how many, how hard they move."""
    terms = made.owners("trigger")
    for term in terms:
        acts_N = made.values["trigger", term] > 0
        made.share("routing_trigger", term, terms, acts_N)
        if ("routable", term) not in made.values:
            continue
        able_N = acts_N & (made.values["routable", term] > 0)
        some = acts_N.sum().clamp_min(1).double()
        made.add("routing_routable", term, terms, able_N.sum().double() / some)
        count = torch.where(acts_N, made.values["candidates", term], 0.0).double().sum()
        made.add("routing_candidates", term, terms, count / some)
        if ("strength", term) in made.values:
            moved_N = torch.where(able_N, made.values["strength", term], 0.0)
            made.add("routing_mass", term, terms, moved_N.double().mean())


class _Made:
    """Figures in the making: tensors on the device, read back once at the end."""

    def __init__(self, values: Mapping[tuple[str, str], torch.Tensor]):
        self.values = values
        self.found: dict[str, torch.Tensor] = {}

    def owners(self, what: str, without: Sequence[str] = ()) -> list[str]:
        return [of for w, of in self.values if w == what and of not in without]

    def add(self, name: str, of: str, all_of: Sequence[str], value: torch.Tensor) -> None:
        self.found[name if len(all_of) == 1 else f"{name}/{of}"] = value

    def share(self, name: str, of: str, all_of: Sequence[str], truth_N: torch.Tensor) -> None:
        self.add(name, of, all_of, (truth_N > 0).double().mean())

    def spread(self, name: str, of: str, all_of: Sequence[str], x_N: torch.Tensor) -> None:
        if not len(x_N):
            return
        x_N = x_N.double()
        self.add(f"{name}_mean", of, all_of, x_N.mean())
        self.add(f"{name}_std", of, all_of, x_N.std(unbiased=False))
        self.add(f"{name}_min", of, all_of, x_N.min())
        self.add(f"{name}_max", of, all_of, x_N.max())
        self.share(f"{name}_negative", of, all_of, x_N < 0)

    def numbers(self) -> dict[str, float]:
        if not self.found:
            return {}
        return dict(zip(self.found, torch.stack(list(self.found.values())).tolist()))


def merged(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record of a whole batch from those of its parts, by `Metric.how`.

    Means weigh by `tokens`; a standard deviation joins with its mean, so that the result is that
    of the whole. Figures some parts lack are joined over those that have them.
    """
    out: dict[str, Any] = {}
    for key in dict.fromkeys(k for r in records for k in r):
        have = [r for r in records if isinstance(r.get(key), (int, float))]
        if not have:
            out[key] = next((r[key] for r in records if r.get(key) is not None), None)
            continue
        metric = find(key)
        out[key] = _join(key, metric.how if metric else "mean", have)
    return out


def _join(key: str, how: str, have: Sequence[Mapping[str, Any]]) -> float:
    values = [r[key] for r in have]
    if how == "same":
        return values[0]
    if how in ("sum", "max", "min"):
        return {"sum": math.fsum, "max": max, "min": min}[how](values)
    weights = [float(r.get("tokens", 1)) for r in have]
    total = math.fsum(weights) or 1.0
    if how == "std":
        means = [r.get(key.replace("_std", "_mean"), 0.0) for r in have]
        mean = math.fsum(m * w for m, w in zip(means, weights)) / total
        square = math.fsum((s * s + m * m) * w for s, m, w in zip(values, means, weights)) / total
        return max(0.0, square - mean * mean) ** 0.5
    return math.fsum(v * w for v, w in zip(values, weights)) / total
