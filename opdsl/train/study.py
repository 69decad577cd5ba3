"""Several methods on one embedded task, paired by seed: the comparison behind `opdsl compare`.

Seed s decides the embedded models and every random stream of a run, and all methods see the
same models, prompts and evaluation numbers at seed s. Most of the spread between runs is the
starting model, so differences are taken within a seed before they are averaged.

Each run has a folder of its own under `OUT/runs`, named by everything that decides its numbers;
a finished one is read instead of repeated, so a study that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdsl.train.loop import Summary, train
from opdsl.train.plan import digest
from opdsl.train.progress import Progress, Silent
from opdsl.train.settings import RunSettings

MARKS = (25, 50, 100)  # steps at which accuracies are tabulated
TARGET = 0.8  # greedy accuracy that "steps to 80 %" waits for

# 97.5 % quantiles of Student's t for 1 … 30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds with its 95 % t-interval; the interval is None for a single seed."""

    values: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "values": list(self.values)}

    def text(self, signed: bool = False) -> str:
        sign = "+" if signed else ""
        if self.low is None or self.high is None:
            return f"{self.mean:{sign}.2f}"
        return f"{self.mean:{sign}.2f} [{self.low:{sign}.2f}, {self.high:{sign}.2f}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of one number per seed. Raises ValueError for no values."""
    n = len(values)
    if n == 0:
        raise ValueError("no values to average")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(tuple(values), mean, None, None)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = (_T[n - 2] if n <= 31 else 1.96) * sd / math.sqrt(n)
    return Estimate(tuple(values), mean, mean - half, mean + half)


@dataclass(frozen=True)
class Study:
    """Results of a comparison: `runs[method label]` holds one summary per seed, in order."""

    task: str
    steps: int
    seeds: tuple[int, ...]
    marks: tuple[int, ...]
    runs: dict[str, tuple[Summary, ...]]

    @property
    def labels(self) -> list[str]:
        return list(self.runs)

    def accuracy(self, label: str, step: int, mode: str, name: str = "held-out") -> Estimate | None:
        records = [run.at(step, mode, name) for run in self.runs[label]]
        found = [r["accuracy"] for r in records if r is not None and r["accuracy"] is not None]
        return estimate(found) if len(found) == len(records) else None

    def steps_to_target(self, label: str) -> list[int | None]:
        """Per seed, the first evaluated step with greedy accuracy ≥ TARGET, or None."""
        reached = []
        for run in self.runs[label]:
            steps = [
                e["step"]
                for e in run.evals
                if (e["sets"]["held-out"]["greedy"]["accuracy"] or 0.0) >= TARGET
            ]
            reached.append(min(steps) if steps else None)
        return reached

    def difference(self, label: str, step: int, mode: str) -> Estimate | None:
        """Accuracy minus that of the first method, within each seed."""
        mine, first = (self.accuracy(m, step, mode) for m in (label, self.labels[0]))
        if mine is None or first is None:
            return None
        return estimate([a - b for a, b in zip(mine.values, first.values)])

    def other_sets(self) -> list[str]:
        last = next(iter(self.runs.values()))[0].evals[-1]
        return [name for name in last["sets"] if name != "held-out"]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """(header, one row per method) of the table, as text."""
        header = ["method"]
        header += [f"{mode}@{s}" for s in self.marks for mode in ("greedy", "sampled")]
        header.append(f"steps to {TARGET:.0%} greedy")
        header += [f"{name} (sampled)" for name in self.other_sets()]
        last = self.marks[-1]
        header += [f"Δ {mode}@{last}" for mode in ("greedy", "sampled")]
        rows = []
        for label in self.labels:
            row = [label]
            for step in self.marks:
                for mode in ("greedy", "sampled"):
                    row.append(_text(self.accuracy(label, step, mode)))
            row.append(_reached(self.steps_to_target(label)))
            for name in self.other_sets():
                row.append(_text(self.accuracy(label, self.steps, "sampled", name)))
            for mode in ("greedy", "sampled"):
                first = label == self.labels[0]
                row.append("–" if first else _text(self.difference(label, last, mode), signed=True))
            rows.append(row)
        return header, rows

    def markdown(self) -> str:
        header, rows = self.rows()
        seeds = len(self.seeds)
        lines = [f"# {self.task}: {', '.join(self.labels)}", ""]
        lines += [
            f"{self.steps} steps, {seeds} seed{'s' * (seeds > 1)} ({', '.join(map(str, self.seeds))}),"
            " paired: models, prompts and evaluation are the same for all methods at a seed."
            " Accuracies on 1,000 held-out prompts, mean over seeds with 95 % t-interval."
            f" Δ: difference from `{self.labels[0]}` within each seed.",
            "",
        ]
        lines.append("| " + " | ".join(header) + " |")
        lines.append("|---|" + "---:|" * (len(header) - 1))
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines += ["", "![curves](comparison.png)", "", "| method | fingerprint |", "|---|---|"]
        lines += [f"| {m} | `{r[0].fingerprints['method']}` |" for m, r in self.runs.items()]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        methods = []
        for label in self.labels:
            at = {
                str(step): {
                    mode: _json(self.accuracy(label, step, mode)) for mode in ("greedy", "sampled")
                }
                for step in self.marks
            }
            difference = {
                mode: _json(self.difference(label, self.marks[-1], mode))
                for mode in ("greedy", "sampled")
            }
            methods.append(
                {
                    "name": label,
                    "fingerprint": self.runs[label][0].fingerprints["method"],
                    "accuracy": at,
                    "steps_to_target": self.steps_to_target(label),
                    "difference": difference,
                    "other": {
                        name: _json(self.accuracy(label, self.steps, "sampled", name))
                        for name in self.other_sets()
                    },
                }
            )
        return {
            "task": self.task,
            "steps": self.steps,
            "seeds": list(self.seeds),
            "target": TARGET,
            "methods": methods,
        }

    def curves(self) -> dict[str, dict[str, Any]]:
        """Curves with intervals for `plots.comparison`."""
        curves: dict[str, dict[str, Any]] = {}
        for label, runs in self.runs.items():
            steps = [e["step"] for e in runs[0].evals]
            curve: dict[str, Any] = {"steps": steps}
            for mode in ("greedy", "sampled"):
                points = [self.accuracy(label, s, mode) for s in steps]
                means = [p.mean if p else math.nan for p in points]
                curve[mode] = {
                    "mean": means,
                    "low": [
                        m if p is None or p.low is None else p.low for p, m in zip(points, means)
                    ],
                    "high": [
                        m if p is None or p.high is None else p.high for p, m in zip(points, means)
                    ],
                }
            curves[label] = curve
        return curves


def compare(
    methods: Sequence[Any],
    *,
    task: str,
    seeds: Sequence[int],
    steps: int,
    out: Path,
    base: RunSettings | None = None,
    eval_every: int = 10,
    progress: Progress | None = None,
) -> Study:
    """Train every method at every seed and write table, JSON and curves to `out`.

    base: further settings for all runs. Raises what `train` raises; runs finished before stay.
    """
    progress = progress or Silent()
    base = base or RunSettings()
    marks = tuple(sorted({s for s in MARKS if s <= steps} | {steps}))
    labels = _labels(methods)
    runs: dict[str, list[Summary]] = {label: [] for label in labels}
    for seed in seeds:
        for label, method in zip(labels, methods):
            settings = RunSettings(
                **{
                    **base.__dict__,
                    "task": task,
                    "steps": steps,
                    "seed": seed,
                    "pair_seed": seed,
                    "eval_every": eval_every,
                    "eval_at": marks,
                    "save_every": steps,
                    "report": False,
                    "export": False,
                }
            )
            progress.note(f"{label}, seed {seed}")
            summary = _one(method, settings, out / "runs", progress)
            greedy = [f"{s}: {summary.at(s)['accuracy']:.2f}" for s in marks]  # type: ignore[index]
            progress.note(f"{label}, seed {seed}: greedy accuracy at step {', '.join(greedy)}")
            runs[label].append(summary)
    study = Study(task, steps, tuple(seeds), marks, {k: tuple(v) for k, v in runs.items()})
    _write(study, out)
    return study


def _one(method, settings: RunSettings, root: Path, progress: Progress) -> Summary:
    """One run, from its folder if it is finished there."""
    decides = {
        k: v for k, v in settings.__dict__.items() if k not in ("out", "resume", "cache_dir")
    }
    key = digest([method.fingerprints, dict(decides)])
    folder = root / f"{method.name}-seed{settings.seed}-{key}"
    done = folder / "summary.json"
    if done.is_file():
        return Summary.read(done)
    own = RunSettings(**{**settings.__dict__, "out": str(folder), "resume": folder.exists()})
    return train(method, own, _Quiet(progress))


class _Quiet(Silent):
    """Bars and stages of the inner run, without its notes."""

    def __init__(self, outer: Progress):
        self.stage, self.begin, self.step = outer.stage, outer.begin, outer.step  # type: ignore[method-assign]


def _labels(methods: Sequence[Any]) -> list[str]:
    """Names of the methods; equal names are numbered."""
    labels: list[str] = []
    for method in methods:
        same = sum(1 for m in methods[: len(labels)] if m.name == method.name)
        labels.append(method.name if same == 0 else f"{method.name}-{same + 1}")
    return labels


def _write(study: Study, out: Path) -> None:
    from opdsl.train import plots

    (out / "comparison.md").write_text(study.markdown(), encoding="utf-8")
    (out / "comparison.json").write_text(json.dumps(study.to_json(), indent=1), encoding="utf-8")
    plots.comparison(out / "comparison.png", study.curves())


def _text(value: Estimate | None, signed: bool = False) -> str:
    return "–" if value is None else value.text(signed)


def _json(value: Estimate | None) -> dict[str, Any] | None:
    return None if value is None else value.to_json()


def _reached(steps: list[int | None]) -> str:
    """`28 (3/3)`: mean over the seeds that got there, and how many did."""
    there = [s for s in steps if s is not None]
    mean = f"{sum(there) / len(there):.0f}" if there else "never"
    return f"{mean} ({len(there)}/{len(steps)})"
