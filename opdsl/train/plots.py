"""Curves as PNG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Colour-blind safe (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def run_curves(
    path: Path, metrics: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]]
) -> None:
    """Held-out accuracy with its interval, and the training curves, of one run."""
    plt = _pyplot()
    panels = [("loss", "loss"), ("kl", "KL(student || T), nats per token")]
    panels += [("reward", "right, training prompts"), ("entropy", "entropy, nats per token")]
    panels += [("grad_norm", "gradient norm"), ("critic_ev", "critic: explained variance")]
    kept = [(k, t) for k, t in panels if any(isinstance(m.get(k), (int, float)) for m in metrics)]
    count = len(kept) + (1 if evals else 0)
    rows = -(-count // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(9, 2.6 * rows), squeeze=False)
    flat = list(axes.flat)
    if evals:
        axis = flat.pop(0)
        for number, mode in enumerate(("greedy", "sampled")):
            found = [(e["step"], e["sets"]["held-out"][mode]) for e in evals if e["sets"]]
            found = [(s, a) for s, a in found if a["accuracy"] is not None]
            steps = [s for s, _ in found]
            axis.plot(
                steps,
                [a["accuracy"] for _, a in found],
                "o-",
                ms=3,
                color=COLOURS[number],
                label=mode,
            )
            low, high = ([a["interval"][i] for _, a in found] for i in (0, 1))
            axis.fill_between(steps, low, high, color=COLOURS[number], alpha=0.15, lw=0)
        axis.set_ylim(-0.02, 1.02)
        axis.set_title("held-out accuracy (95 % interval)", fontsize=9)
        axis.legend(fontsize=8, frameon=False)
    for axis, (key, title) in zip(flat, kept):
        points = [(m["step"], m[key]) for m in metrics if isinstance(m.get(key), (int, float))]
        axis.plot([s for s, _ in points], [v for _, v in points], lw=1, color=COLOURS[0])
        axis.set_title(title, fontsize=9)
    for axis in flat[len(kept) :]:
        axis.set_axis_off()
    _finish(plt, figure, axes, path)


def comparison(path: Path, curves: dict[str, dict[str, Any]]) -> None:
    """Greedy and sampled accuracy over steps for several methods, mean and 95 % interval.

    curves: method -> {"steps": [...], mode: {"mean": [...], "low": [...], "high": [...]}}.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), squeeze=False)
    for axis, mode in zip(axes.flat, ("greedy", "sampled")):
        for number, (name, curve) in enumerate(curves.items()):
            colour = COLOURS[number % len(COLOURS)]
            axis.plot(curve["steps"], curve[mode]["mean"], lw=1.4, color=colour, label=name)
            low, high = curve[mode]["low"], curve[mode]["high"]
            axis.fill_between(curve["steps"], low, high, color=colour, alpha=0.12, lw=0)
        axis.set_title(f"{mode} accuracy", fontsize=9)
        axis.set_ylim(-0.02, 1.02)
    axes.flat[0].legend(fontsize=8, frameon=False)
    _finish(plt, figure, axes, path)


def _finish(plt, figure, axes, path: Path) -> None:
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
        axis.set_xlabel("step", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
