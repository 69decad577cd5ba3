"""What a run leaves for people: `report.md` with curves, and ten closing lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(
    out: Path, summary, method, metrics: Sequence[dict[str, Any]], prompts: Sequence[str]
) -> dict[str, str]:
    """Write `report.md` and `curves.png`; returns their paths by name."""
    from opdsl.train import plots

    plots.run_curves(out / "curves.png", metrics, summary.evals)
    report = out / "report.md"
    report.write_text(_markdown(summary, method, prompts), encoding="utf-8")
    return {"report": str(report), "curves": str(out / "curves.png")}


def _markdown(summary, method, prompts: Sequence[str]) -> str:
    where = f"embedded task `{summary.task}`" if summary.task else f"data `{summary.data}`"
    lines = [f"# {summary.method}" + (f": {summary.title}" if summary.title else ""), ""]
    lines += [f"{summary.steps} steps of {summary.rows_per_step} rows on {where}.", ""]
    lines += _accuracy_table(summary)
    lines += ["![curves](curves.png)", ""]
    lines += _samples(summary, prompts)
    lines += ["## What was trained", ""]
    facts: list[tuple[str, Any]] = [("student", summary.student)]
    facts += [(f"teacher {name}", model) for name, model in summary.teachers.items()]
    facts += [("parameters", f"{summary.parameters:,}"), ("device", summary.device)]
    facts += [("seed", summary.seed)]
    facts += [(f"fingerprint {name}", f"`{value}`") for name, value in summary.fingerprints.items()]
    facts += [(f"seconds, {name}", value) for name, value in summary.seconds.items()]
    facts += list(summary.counts.items())
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts), ""]
    if summary.notes:
        lines += ["Notes:", "", *(f"- {note}" for note in summary.notes), ""]
    lines += ["## Formula and passport", "", "```text", method.explain().rstrip(), "```", ""]
    return "\n".join(lines)


def _accuracy_table(summary) -> list[str]:
    if not summary.evals:
        return ["No held-out prompts, so no accuracy was measured.", ""]
    lines = [
        "| step | set | greedy | 95 % interval | sampled | 95 % interval | length | finished |"
    ]
    lines += ["|---:|---|---:|---|---:|---|---:|---:|"]
    for record in summary.evals:
        for name, modes in record["sets"].items():
            greedy, sampled = modes["greedy"], modes["sampled"]
            lines.append(
                f"| {record['step']} | {name} | {_share(greedy)} | {_interval(greedy)}"
                f" | {_share(sampled)} | {_interval(sampled)}"
                f" | {sampled['length']:.2f} | {sampled['finished']:.0%} |"
            )
    return [*lines, ""]


def _samples(summary, prompts: Sequence[str]) -> list[str]:
    """Greedy responses to the same held-out prompts before and after."""
    shown = [r for r in summary.evals if r.get("samples")]
    if not shown or not prompts:
        return []
    lines = ["## Samples", "", "Greedy responses to held-out prompts.", ""]
    lines += ["| prompt | before | after |", "|---|---|---|"]
    for prompt, before, after in zip(prompts, shown[0]["samples"], shown[-1]["samples"]):
        lines.append(f"| {_cell(prompt)} | {_cell(before)} | {_cell(after)} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    """Model text as one table cell: it is data, and must not become markup."""
    flat = " ".join(text.split())
    flat = flat if len(flat) <= 160 else flat[:157] + "…"
    flat = flat.replace("`", "'").replace("|", "\\|")
    return f"`{flat}`" if flat else "(empty)"


def _share(record: dict[str, Any]) -> str:
    return "–" if record["accuracy"] is None else f"{record['accuracy']:.1%}"


def _interval(record: dict[str, Any]) -> str:
    if record["accuracy"] is None:
        return "–"
    low, high = record["interval"]
    return f"{low:.1%} – {high:.1%}"


def closing_lines(summary, spec: str) -> list[str]:
    """About ten lines for the end of `opdsl run`. `spec`: the file or name as typed."""
    seconds = summary.seconds
    lines = [
        f"{summary.method} on {summary.task or summary.data}: {summary.steps} steps of"
        f" {summary.rows_per_step} rows, {summary.device}"
    ]
    if summary.evals:
        first, last = summary.evals[0], summary.evals[-1]
        for name in last["sets"]:
            for word, record in (("before", first), ("after", last)):
                modes = record["sets"][name]
                lines.append(
                    f"{word:<7} {name}: greedy {_share(modes['greedy']):>6}"
                    f" [{_interval(modes['greedy'])}]"
                    f"   sampled {_share(modes['sampled']):>6} [{_interval(modes['sampled'])}]"
                )
    else:
        lines.append("accuracy not measured: there are no held-out prompts")
    lines.append(
        f"time    {seconds['training']:.1f} s training, {seconds['evaluating']:.1f} s evaluating,"
        f" {seconds['loading']:.1f} s loading"
    )
    if summary.counts:
        lines.append("counts  " + ", ".join(f"{what}: {n}" for what, n in summary.counts.items()))
    for name in ("report", "page", "student"):
        if name in summary.files:
            lines.append(f"{name:<7} {summary.files[name]}")
    if summary.student == "embedded":
        lines.append(f"yours   opdsl run {spec} --student DIR --teacher DIR --data FILE.jsonl")
    return lines
