"""`report.html`: everything about one run in one file that asks the network for nothing.

Style and script are files of this package and are put inside; a content policy names them by their
hashes and forbids everything else, so that even markup that slipped through could neither run nor
load anything. All text is escaped by construction (`html_text`). The page reads without its script,
in print, in light and dark, and by ear: every curve has a description and a table.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdsl.train import provenance
from opdsl.train.checklist import Run, checklist
from opdsl.train.html_curves import gallery
from opdsl.train.html_math import formula_lines
from opdsl.train.html_panels import panels, stage_rows
from opdsl.train.html_samples import samples
from opdsl.train.html_text import Html, el, joined, number, table, trusted
from opdsl.train.metrics import read_lines
from opdsl.train.redact import redacted

HERE = Path(__file__).parent / "html"


def write(
    out: Path,
    summary: Any,
    method: Any,
    plan: Any,
    identity: Mapping[str, str],
    metrics: Sequence[Mapping[str, Any]],
    prompts: Sequence[str],
) -> dict[str, str]:
    """Write `report.html` beside the records it shows; returns its path by name."""
    page = render(out, summary, method, plan, identity, metrics, prompts)
    place = out / "report.html"
    place.write_text(page, encoding="utf-8")
    return {"page": str(place)}


def render(
    out: Path,
    summary: Any,
    method: Any,
    plan: Any,
    identity: Mapping[str, str],
    metrics: Sequence[Mapping[str, Any]],
    prompts: Sequence[str],
) -> str:
    """The page. out: the folder with `timings.jsonl` and `samples.jsonl`."""
    timings = read_lines(out / "timings.jsonl")
    facts = explained(method)
    run = Run(method, plan, summary, facts, metrics, identity)
    found = panels(metrics, summary.evals, timings)
    sections = [
        ("curves", "Curves", _curves(found)),
        ("samples", "Responses", _responses(out, summary, prompts)),
        ("method", "The method", _method(method, facts)),
        ("passport", "Passport", _passport(facts)),
        ("checklist", "Reporting checklist", _checklist(run)),
        ("pace", "Time", _pace(summary, metrics, timings)),
        ("repeat", "To repeat this run", _repeat(run)),
    ]
    sections = [(i, t, body) for i, t, body in sections if body]
    body = [
        el("a", "To the curves", href="#curves", class_="skip"),
        _head(summary, sections, metrics),
        el("main", *(el("section", el("h2", t, id=i), b, aria_labelledby=i) for i, t, b in sections),
           _footer(), id="main"),
        el("div", "", id="tip", role="status", aria_live="polite"),
    ]  # fmt: skip
    return _page(f"{summary.method} on {summary.task or summary.data or 'data'}", body)


def _page(title: str, body: Sequence[Html]) -> str:
    style = (HERE / "report.css").read_text(encoding="utf-8")
    script = (HERE / "report.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}';"
        " base-uri 'none'; form-action 'none'"
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="referrer", content="no-referrer"),
        el("title", f"{title} – opdsl"),
        trusted(f"<style>{style}</style>"),
    )
    return "<!DOCTYPE html>\n" + str(
        el("html", head, el("body", *body, trusted(f"<script>{script}</script>")), lang="en")
    )


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def explained(method: Any) -> dict[str, Any]:
    """`explain` as JSON; empty for what has no such page."""
    try:
        found = json.loads(method.explain("json"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


# ---- the sections ----------------------------------------------------------------------------------


def _head(summary: Any, sections: Sequence[tuple[str, str, Html]], metrics) -> Html:
    where = f"the embedded task {summary.task}" if summary.task else f"data {summary.data}"
    lead = f"{summary.steps} steps of {summary.rows_per_step} responses on {redacted(where)}"
    links = [el("li", el("a", title, href=f"#{ident}")) for ident, title, _ in sections]
    words = el(
        "div",
        el("h1", summary.method),
        el("p", summary.title, class_="lead") if summary.title else None,
        el("p", lead, class_="lead"),
        el("nav", el("ul", *links), aria_label="Sections"),
    )
    theme = el("button", "Theme", id="theme", type="button", hidden=True)
    cards = el("div", el("div", *_cards(summary, metrics), class_="cards"), class_="top")
    return el("header", el("div", words, theme, class_="top"), cards)


def _cards(summary: Any, metrics: Sequence[Mapping[str, Any]]) -> list[Html]:
    cards = []
    if summary.evals:
        for mode in ("greedy", "sampled"):
            name = next(iter(summary.evals[-1]["sets"]), None)
            if name is None:
                continue
            first, last = (
                e["sets"].get(name, {}).get(mode, {}) for e in (summary.evals[0], summary.evals[-1])
            )
            if last.get("accuracy") is not None:
                low, high = last["interval"]
                before = first.get("accuracy")
                cards.append(
                    _card(
                        f"Accuracy, {name}, {mode}",
                        f"{before:.1%} → {last['accuracy']:.1%}"
                        if before is not None
                        else f"{last['accuracy']:.1%}",
                        f"95 % interval after: {low:.1%} to {high:.1%}",
                    )
                )
    for key, label in (("kl", "KL(student || teacher)"), ("loss", "Loss")):
        values = [m[key] for m in metrics if isinstance(m.get(key), (int, float))]
        if values:
            text = f"{number(float(values[0]), 3)} → {number(float(values[-1]), 3)}"
            cards.append(
                _card(
                    label,
                    text.replace("-", "−"),
                    "nats, first and last step" if key == "kl" else "first and last step",
                )
            )
    seconds = summary.seconds
    cards.append(
        _card(
            "Training",
            f"{seconds.get('training', 0):.1f} s",
            f"{summary.device}, {summary.parameters:,} parameters",
        )
    )
    return cards


def _card(label: str, value: str, small: str) -> Html:
    return el(
        "dl", el("dt", label), el("dd", value, el("span", small, class_="soft")), class_="card"
    )


def _curves(found) -> Html:
    parts = [el("p", "Pale lines are single steps, strong ones a running mean. Point at a curve for its"
                     " values; every figure has its numbers below it.", class_="soft")]  # fmt: skip
    for heading, charts in found:
        parts.append(el("h3", heading))
        parts.append(gallery(charts))
    return joined(parts)


def _responses(out: Path, summary: Any, prompts: Sequence[str]) -> Html:
    shown = [e for e in summary.evals if e.get("samples")]
    greedy = None
    if shown and prompts:
        rows = list(zip(prompts, shown[0]["samples"], shown[-1]["samples"]))
        cells = [[el("span", cell, class_="said") for cell in row] for row in rows]
        greedy = joined(
            [
                el("h3", "Greedy responses to held-out prompts, before and after"),
                table(["prompt", "before", "after"], cells),
            ]
        )
    return samples(read_lines(out / "samples.jsonl"), greedy)


def _method(method: Any, facts: Mapping[str, Any]) -> Html:
    parts: list[Html | None] = []
    spoken = [facts.get("formula", "")]
    drawn = formula_lines(list(facts.get("latex_lines", [])), spoken) if facts else None
    parts.append(drawn)
    text = el("pre", method.explain().rstrip())
    if drawn is None:
        parts.append(text)
    else:
        parts.append(el("details", el("summary", "As text, with knobs, needs and biases"), text))
    cites = facts.get("cites", [])
    if cites:
        parts.append(el("p", "From: " + "; ".join(f"{c['kind']} {c['value']}" for c in cites)))
    return joined(parts)


def _passport(facts: Mapping[str, Any]) -> Html | None:
    """What the field is, as the compiler derived it."""
    passport = facts.get("passport")
    if not passport:
        return None
    rows = []
    for key, value in passport.items():
        if value in (None, [], {}, "") or key == "fingerprints":
            continue
        if key in ("biases", "notes"):
            value = el("ul", *(el("li", _remark(x)) for x in value))
        rows.append([key.replace("_", " "), _value(value)])
    return table(["", ""], rows)


def _remark(found: Mapping[str, Any]) -> str:
    why = f" (accepted: {found['accepted']})" if found.get("accepted") else ""
    return f"{found.get('code', '')} {found.get('statement', '')}{why}".strip()


def _value(value: Any) -> Html | str:
    if isinstance(value, Html):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {_value(v)}" for k, v in value.items() if v not in (None, ""))
    if isinstance(value, (list, tuple)):
        if all(not isinstance(v, (Mapping, list)) for v in value):
            return ", ".join(str(v) for v in value)
        return el("ul", *(el("li", _value(v)) for v in value))
    return str(value)


def _checklist(run: Run) -> Html:
    rows = []
    for entry in checklist(run):
        answers = el("ul", *(el("li", redacted(a)) for a in entry.answers))
        figures = (
            el("ul", *(el("li", m, class_="mono") for m in entry.measured))
            if entry.measured
            else "–"
        )
        rows.append([f"{entry.number}. {entry.item}", answers, figures])
    return joined(
        [
            el("p", "What a paper would have to say about this run, filled in from the compiled spec,"
                    " the plan and the records.", class_="soft"),
            table(["entry", "what ran", "measured: first → last"], rows, class_="wide"),
        ]
    )  # fmt: skip


def _pace(summary: Any, metrics, timings) -> Html:
    rows = stage_rows(metrics, timings)
    whole = [[name, f"{s:.2f}"] for name, s in summary.seconds.items()]
    return joined(
        [
            table(
                ["stage of a step", "seconds", "share", "response tokens/s"], rows, class_="figures"
            ),
            table(["part of the run", "seconds"], whole, class_="figures"),
        ]
    )


def _repeat(run: Run) -> Html:
    plan, summary = run.plan, run.summary
    facts = {f"fingerprint, {k}": v for k, v in summary.fingerprints.items()}
    facts |= {f"fingerprint, {k}": v for k, v in run.identity.items() if k != "method"}
    facts |= {"seed": str(plan.seed), "seed of built-in models": str(plan.pair_seed)}
    facts |= {f"version, {k}": v for k, v in provenance.versions().items()}
    facts |= provenance.machine(summary.device)
    facts |= {f"count, {k}": str(v) for k, v in summary.counts.items()}
    command = provenance.command(plan.settings, run.method)
    notes = [el("li", redacted(note)) for note in summary.notes]
    return joined(
        [
            el("p", "On the same machine with the same versions this gives the same numbers, bit for bit"
                    " on a CPU."),
            el("pre", command, id="command"),
            el("details", el("summary", "The plan in full"), el("pre", "\n".join(redacted(x) for x in plan.lines()))),
            table(["", ""], [[k, el("span", redacted(str(v)), class_="mono")] for k, v in facts.items()]),
            joined([el("h3", "Notes"), el("ul", *notes)]) if notes else None,
        ]
    )  # fmt: skip


def _footer() -> Html:
    return el(
        "footer",
        "Written by opdsl ", provenance.versions().get("opdsl", ""),
        ". This file loads nothing; its records are metrics.jsonl, evals.jsonl, samples.jsonl and"
        " timings.jsonl in the same folder.",
    )  # fmt: skip
