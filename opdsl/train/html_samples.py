"""Responses token by token, coloured by what the method thought of each token.

Blue tokens are rewarded, orange ones punished, in four strengths; closed gates are hatched and
rerouted tokens underlined, so that nothing rests on colour alone. Numbers show on pointing at a
token or moving to it with the keyboard, and stand in a table for those who do neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opdsl.train.html_text import Html, el, joined, number, table

LEVELS = 4
SHADED = ("advantage", "signal", "log-ratio")  # what colours a token, the first there is
UNITS = {"advantage": "nats", "signal": "nats", "log-ratio": "nats", "log student": "nats",
         "log teacher": "nats"}  # fmt: skip
TRUTHS = ("trigger", "routable")


def shade_of(names: Sequence[str]) -> str | None:
    """The name whose values colour the tokens: exactly one of SHADED, or the first of its owners."""
    for wanted in SHADED:
        for name in names:
            if name == wanted or name.startswith(wanted + " "):
                return name
    return None


def level(value: float, scale: float) -> int:
    """−4 … 4: the strength of a value on a scale; 0 near zero."""
    if not scale or value != value:
        return 0
    share = max(-1.0, min(1.0, value / scale))
    size = 0 if abs(share) < 0.05 else min(LEVELS, 1 + int(abs(share) * LEVELS * 0.999))
    return size if share > 0 else -size


def samples(records: Sequence[Mapping[str, Any]], before_after: Html | None) -> Html:
    """The section: legend, responses of the first and last shown step, the others folded."""
    records = [r for r in records if r.get("rows")]
    if not records:
        return joined([before_after]) if before_after else el("p", "No responses were recorded.")
    shade = shade_of(records[0]["names"])
    scale = _scale(records, shade)
    made = [_legend(shade, scale)]
    ends = [records[0], records[-1]] if len(records) > 1 else records
    for record in ends:
        made.append(el("h3", f"Step {record['step']}: what the student wrote before this update"))
        made += [_response(record, row, shade, scale) for row in record["rows"]]
    if len(records) > 2:
        inner = []
        for record in records[1:-1]:
            inner.append(el("h3", f"Step {record['step']}"))
            inner += [_response(record, row, shade, scale) for row in record["rows"]]
        made.append(el("details", el("summary", f"{len(records) - 2} steps between"), *inner))
    return joined([*made, before_after])


def _scale(records: Sequence[Mapping[str, Any]], shade: str | None) -> float:
    """The value that gets the strongest colour: 90 % of all shown are below it in size."""
    sizes = sorted(
        abs(x)
        for r in records
        for row in r["rows"]
        for x in row["values"].get(shade, [])
        if x is not None
    )
    return sizes[int(0.9 * (len(sizes) - 1))] if sizes else 0.0


def _legend(shade: str | None, scale: float) -> Html:
    if shade is None:
        return el("p", "This method scores no sampled token, so tokens are not coloured.")
    steps = [i for i in range(-LEVELS, LEVELS + 1)]
    boxes = [
        el("span", number(scale * i / LEVELS, 2).replace("-", "−"), class_=f"tok {_class(i)}")
        for i in steps
    ]
    return el(
        "div",
        el("p", "Coloured by ", el("strong", shade), " in nats: orange is punished, blue is rewarded.",
           " Point at a token, or move to one with Tab and the arrow keys, for its numbers."),
        el("p", *boxes, " ", el("span", "gate closed", class_="tok shut"), " ",
           el("span", "rerouted", class_="tok routed"), class_="legend-row"),
        class_="legend-box",
    )  # fmt: skip


def _class(step: int) -> str:
    return "z" if step == 0 else f"{'n' if step < 0 else 'p'}{abs(step)}"


def _response(
    record: Mapping[str, Any], row: Mapping[str, Any], shade: str | None, scale: float
) -> Html:
    values, names = row["values"], list(record["names"])
    tokens = []
    for i, piece in enumerate(row["text"]):
        classes = ["tok"]
        if shade is not None and values[shade][i] is not None:
            classes.append(_class(level(values[shade][i], scale)))
        gates = [values[n][i] for n in names if n == "gate" or n.startswith("gate ")]
        if gates and all(g == 0 for g in gates):
            classes.append("shut")
        if _holds(values, names, "trigger", i) and _holds(values, names, "routable", i):
            classes.append("routed")
        tokens.append(
            el(
                "span",
                _visible(piece),
                class_=" ".join(classes),
                title=_tip(piece, values, names, i),
                tabindex="0" if i == 0 else "-1",
            )
        )
    ending = "" if row["finished"] else " (cut at the limit)"
    ending += " (only the beginning is shown)" if row.get("cut") else ""
    prompt = el("p", el("span", "Prompt", class_="tag"), el("span", row["prompt"], class_="said"))
    response = el(
        "div", *tokens, class_="tokens", role="group", aria_label="Response, token by token"
    )
    return el(
        "div",
        prompt,
        el("div", el("span", "Response", class_="tag"), response, ending, class_="answer"),
        el("details", el("summary", "Numbers"), _numbers(row, names)),
        class_="sample",
    )


def _holds(values: Mapping[str, list], names: Sequence[str], what: str, i: int) -> bool:
    found = [values[n][i] for n in names if n == what or n.startswith(what + " ")]
    return any(bool(x) for x in found)


def _visible(piece: str) -> str:
    """Line ends and tabs a reader can see; the text itself is otherwise as it is."""
    return piece.replace("\n", "⏎\n").replace("\t", "⇥\t")


def _tip(piece: str, values: Mapping[str, list], names: Sequence[str], i: int) -> str:
    lines = [repr(piece)]
    for name in names:
        value = values[name][i]
        base = name.split(" ")[0] if name not in UNITS else name
        if base in TRUTHS:
            lines.append(f"{name}: {'yes' if value else 'no'}")
        else:
            lines.append(f"{name}: {number(value)} {UNITS.get(base, '')}".rstrip())
    return "\n".join(lines)


def _numbers(row: Mapping[str, Any], names: Sequence[str]) -> Html:
    lines = [
        [str(i + 1), repr(piece), *(number(row["values"][n][i]) for n in names)]
        for i, piece in enumerate(row["text"])
    ]
    return table(["", "token", *names], lines, class_="figures")
