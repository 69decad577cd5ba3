"""Which curves a report shows, from whatever a run recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opdsl.train.html_curves import Chart, Series
from opdsl.train.opd_metrics import find

Records = Sequence[Mapping[str, Any]]

# Heading, and its charts: title, unit, metric names. `NAME±` draws mean and a band of one
# standard deviation of a quantity with `_mean` and `_std`.
PANELS: tuple[tuple[str, tuple[tuple[str, str, tuple[str, ...]], ...]], ...] = (
    ("Objective", (
        ("Loss", "", ("loss", "loss/*")),
        ("Right, training prompts", "share", ("reward", "reward/*")),
        ("Groups of one prompt", "share", ("groups_right", "groups_wrong", "groups_mixed")),
    )),
    ("Distance to the teacher", (
        ("KL divergence", "nats", ("kl", "kl_teacher", "kl_listed", "kl_teacher_listed")),
        ("KL(student || teacher), estimated", "nats", ("kl_sampled",)),
        ("Entropy", "nats", ("entropy", "teacher_entropy")),
        ("Shared among the most probable tokens", "share", ("overlap", "overlap_mass", "overlap_teacher_mass")),
        ("Mass on the other's most probable tokens", "share", ("student_top_teacher_mass", "teacher_top_student_mass")),
        ("Mass on the support", "share", ("support_student", "support_teacher", "listed_student_mass", "listed_teacher_mass")),
        ("Teacher health: entropy over ln V, rejected tokens", "share", ("teacher_uniformity", "teacher_rejects")),
    )),
    ("Feedback and credit", (
        ("Log-ratio of teacher and student, ± one deviation", "nats", ("logratio±",)),
        ("Reward of a token, ± one deviation", "nats", ("signal±",)),
        ("Advantage, ± one deviation", "nats", ("advantage±",)),
        ("Tokens with a negative value", "share", ("advantage_negative", "logratio_negative")),
        ("Distance of student and sampler", "nats", ("rollout_gap",)),
        ("Critic: explained variance", "share", ("critic_ev",)),
    )),
    ("Routing, gates and bounds", (
        ("Routing: where it acts, where it finds a candidate", "share", ("routing_trigger", "routing_routable")),
        ("Routed strength per token", "nats", ("routing_mass",)),
        ("Candidates per token where routing acts", "", ("routing_candidates",)),
        ("Gates: kept", "share", ("kept/*", "gate_mean")),
        ("Weights", "", ("weight_mean", "weight_max")),
        ("Values at a constant bound", "share", ("clipped_signal", "clipped_advantage", "clipped_weight", "clipped_strength", "clipped_loss")),
    )),
    ("Responses", (
        ("Length", "tokens", ("length", "length_max")),
        ("Ended and cut", "share", ("finished", "truncated")),
        ("Probability of the end token", "share", ("eos", "teacher_eos")),
    )),
    ("Optimizer", (
        ("Gradient norm before clipping", "", ("grad_norm",)),
        ("Learning rate", "", ("lr",)),
    )),
)  # fmt: skip

MOST_SERIES = 8


def panels(metrics: Records, evals: Records, timings: Records) -> list[tuple[str, list[Chart]]]:
    """(heading, charts) in order; charts without a point are left out."""
    keys = list(dict.fromkeys(k for m in metrics for k in m))
    found: list[tuple[str, list[Chart]]] = []
    number = 0
    for heading, charts in PANELS:
        made = []
        for title, unit, names in charts:
            number += 1
            if names == ("kl_sampled",) and _matching("kl", keys):
                continue  # the exact figure is there
            series = _apart([s for name in names for s in _series(name, keys, metrics)])
            made.append(Chart(f"c{number}", title, unit, tuple(series[:MOST_SERIES])))
        found.append((heading, accuracy(evals) + made if heading == "Objective" else made))
    found.append(("Pace", pace(metrics, timings)))
    kept = [(h, [c for c in charts if _telling(c)]) for h, charts in found]
    return [(h, charts) for h, charts in kept if charts]


def _telling(chart: Chart) -> bool:
    """Whether a chart has points that are more than rounding errors."""
    return any(abs(y) > 1e-5 for s in chart.series for _, y in s.points)


def _apart(series: list[Series]) -> list[Series]:
    """Without curves that lie exactly on an earlier one."""
    seen: set[tuple] = set()
    return [s for s in series if s.points not in seen and not seen.add(s.points)]


LABELS = {
    "kl": "student || teacher", "kl_teacher": "teacher || student",
    "kl_listed": "student || teacher, lower bound", "kl_teacher_listed": "teacher || student, lower bound",
    "entropy": "student", "teacher_entropy": "teacher", "eos": "student", "teacher_eos": "teacher",
    "overlap": "tokens", "overlap_mass": "student mass", "overlap_teacher_mass": "teacher mass",
    "student_top_teacher_mass": "teacher on the student's", "teacher_top_student_mass": "student on the teacher's",
    "support_student": "student", "support_teacher": "teacher",
    "listed_student_mass": "student, on the list", "listed_teacher_mass": "teacher, on the list",
    "teacher_uniformity": "entropy / ln V", "teacher_rejects": "rejected tokens",
    "routing_trigger": "acts", "routing_routable": "finds a candidate", "reward": "all",
    "length": "mean", "length_max": "longest",
}  # fmt: skip


def label(key: str) -> str:
    """A curve's name in the legend of its chart; the owner of a figure stands behind it."""
    stem, _, owner = key.partition("/")
    if key.startswith(("loss/", "kept/", "reward/")):
        return owner
    return f"{LABELS.get(stem, stem.replace('_', ' '))} {owner}".strip()


def points(records: Records, key: str) -> tuple[tuple[float, float], ...]:
    """(step, value) wherever the value is a number; steps of a critic's warm-up are left out."""
    return tuple(
        (float(r["step"]), float(r[key]))
        for r in records
        if isinstance(r.get(key), (int, float)) and not isinstance(r[key], bool) and r["step"] >= 1
    )


def _series(name: str, keys: Sequence[str], metrics: Records) -> list[Series]:
    if name.endswith("±"):
        return _banded(name[:-1], keys, metrics)
    out = []
    for key in _matching(name, keys):
        out.append(Series(label(key), points(metrics, key)))
    # One term: its share is the loss itself, and one curve says it all.
    return [] if name == "loss/*" and len(out) < 2 else out


def _banded(name: str, keys: Sequence[str], metrics: Records) -> list[Series]:
    out = []
    for key in _matching(f"{name}_mean", keys):
        spread = key.replace("_mean", "_std", 1)
        both = [m for m in metrics if key in m and spread in m and m["step"] >= 1]
        both = [m for m in both if m[key] is not None and m[spread] is not None]
        found = tuple((float(m["step"]), float(m[key])) for m in both)
        low = tuple(m[key] - m[spread] for m in both)
        high = tuple(m[key] + m[spread] for m in both)
        owner = key.partition("/")[2]
        out.append(Series(f"{name} {owner}".strip(), found, low, high))
    return out


def _matching(name: str, keys: Sequence[str]) -> list[str]:
    """Keys of one metric: itself, and with the name of a teacher or term behind it."""
    stem = name.rstrip("*")
    out = []
    for key in keys:
        metric = find(key)
        if name.endswith("*"):
            hit = key.startswith(stem)
        else:
            hit = key == name or (metric is not None and metric.name.rstrip("*") == name)
        if hit:
            out.append(key)
    return out


def accuracy(evals: Records) -> list[Chart]:
    """Held-out accuracy with its 95 % interval, one chart per set."""
    charts = []
    for n, name in enumerate(dict.fromkeys(s for e in evals for s in e.get("sets", {}))):
        series = []
        for mode in ("greedy", "sampled"):
            found = [
                (float(e["step"]), e["sets"][name][mode])
                for e in evals
                if name in e.get("sets", {})
            ]
            found = [(s, a) for s, a in found if a["accuracy"] is not None]
            series.append(
                Series(
                    mode,
                    tuple((s, a["accuracy"]) for s, a in found),
                    tuple(a["interval"][0] for _, a in found),
                    tuple(a["interval"][1] for _, a in found),
                )
            )
        charts.append(
            Chart(f"a{n}", f"Accuracy, {name}, with 95 % interval", "share", tuple(series))
        )
    return charts


def pace(metrics: Records, timings: Records) -> list[Chart]:
    """Tokens per second and seconds by stage; the clock's numbers differ from run to run."""
    stages = list(dict.fromkeys(k for t in timings for k in t))
    stages = [s for s in stages if s not in ("step", "seconds", "tokens_per_second")]
    seconds = [Series(s, points(timings, s)) for s in stages]
    rate = (Series("tokens per second", points(timings, "tokens_per_second")),)
    return [
        Chart("p0", "Response tokens per second, whole step", "tokens/s", rate),
        Chart("p1", "Seconds by stage of a step", "s", tuple(seconds[:MOST_SERIES])),
    ]


def stage_rows(metrics: Records, timings: Records) -> list[list[str]]:
    """Per stage: seconds in all, share, response tokens per second of that stage."""
    tokens = sum(m.get("tokens") or 0 for m in metrics if m.get("step", 0) >= 1)
    totals: dict[str, float] = {}
    for t in timings:
        for stage, value in t.items():
            if stage not in ("step", "seconds", "tokens_per_second"):
                totals[stage] = totals.get(stage, 0.0) + float(value)
    whole = sum(totals.values()) or 1.0
    return [
        [stage, f"{s:.2f}", f"{s / whole:.0%}", f"{tokens / s:,.0f}" if s > 0 else "–"]
        for stage, s in totals.items()
    ]
