"""A difference as text for 80 columns, as Markdown, or as plain values."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from opdsl.formula.diff import Difference
from opdsl.ir.fingerprint import fingerprints

if TYPE_CHECKING:
    from opdsl.passport.diff_cases import Case
    from opdsl.passport.diff_measure import Agreement
    from opdsl.passport.diff_witness import Witness

WIDTH, LABEL, GAP = 80, 15, 2
FORMATS = ("text", "json", "markdown")


def render(d: Difference, format: str = "text") -> str:
    """Raises ValueError for a format outside FORMATS."""
    ways: dict[str, Callable[[Difference], str]] = {
        "text": text,
        "json": lambda d: json.dumps(data(d), indent=2, ensure_ascii=False) + "\n",
        "markdown": markdown,
    }
    if format not in ways:
        raise ValueError(f"unknown format {format!r}: use {', '.join(FORMATS)}")
    return ways[format](d)


# ---- the verdict ---------------------------------------------------------------------------------------


def verdict(d: Difference) -> str:
    """One sentence."""
    if d.kind == "same":
        changed = [x.name for x in d.axes if x.changed]
        rest = f"; what differs is no part of it: {', '.join(changed)}" if changed else ""
        return f"same method{rest}"
    if d.roles.why_not:
        return f"different: {d.roles.why_not}; below, all of them are one model"
    assert d.agreement is not None
    head = _HEADS[d.kind].format(factor=f"{d.agreement.factor:.6g}")
    if d.agreement.fresh:
        head += " where the student itself drew the tokens, not under a drifted sampler"
    if d.states == "rollouts":
        head += ", another number of rollouts per prompt"
    elif d.states == "different" and d.kind != "different":
        head += ", different states"
    return head


_HEADS = {
    "equal": "equal as tested: the same loss and gradient",
    "gradient": "same gradient, different value",
    "scaled": "equal up to a factor: B's gradient is {factor} times A's",
    "expected": "equal in expectation, not sample by sample",
    "expected scaled": "equal in expectation up to a factor: B's mean gradient is {factor} times A's",
    "different": "different",
}


def tested(d: Difference) -> str:
    """What the verdict rests on."""
    if d.kind == "same":
        names = "".join(f"; B says {b} for {a}" for a, b in d.roles.renamed)
        return "equal programs, states, teachers and critics; nothing had to be run" + names
    from opdsl.passport.diff_measure import TOLERANCE

    out = f"{d.batches} batches in float64, tolerance {TOLERANCE:g} of the largest entry"
    if d.kind in ("equal", "gradient") and d.agreement is not None and not d.agreement.fresh:
        out += f" (worst {d.worst:.0e})" if d.kind == "equal" else ""
    if d.kind == "different" and d.agreeing * 2 > d.batches:
        return f"{out}; they agree on {d.agreeing} of them"
    if d.undecided:
        out += f"; expectations not compared: {d.undecided}"
    elif d.kind.startswith("expected") or d.kind == "different":
        out += "; expectations over all responses of small models, per rollout"
    renamed = [f"{a} in A is {b} in B" for a, b in d.roles.renamed]
    return "; ".join([out, *renamed])


def spread(d: Difference) -> str:
    """Both variances of the gradient of one rollout."""
    v = d.variances
    if v is None:
        return ""
    ratio = f", B/A {v.b / v.a:.3g}" if v.a > 0 else ""
    return (
        f"A {v.a:.4g}, B {v.b:.4g}{ratio}: E‖g − E g‖² per rollout, mean of {v.models} random"
        f" models ({v.model}); A's is lower in {v.lower} of them"
    )


# ---- special cases ----------------------------------------------------------------------------------------


def case(c: Case) -> str:
    """`beta -> 0 in A: the gradient of B, up to the factor beta`."""
    parts = []
    for name, value in c.settings:
        short = name.split(".")[-1]
        if c.covers:
            parts.append(f"{short} covers the vocabulary")
        elif name in c.approached:
            parts.append(f"{short} -> {value:g}")
        else:
            parts.append(f"{short} = {value:g}")
    where = " and ".join(parts) + (f" in {c.side}" if parts else "")
    critic = {"any": "", "exact": "an exact critic", "zero": "V = 0"}[c.agreement.critic]
    if where and critic:
        where += f", with {critic}"
    where = where or f"with {critic}"
    said = agreed(c.agreement)
    if c.scale:
        said += f", {c.side} being {c.scale} times the other"
    states = {
        "same": "",
        "rollouts": "; rollouts per prompt differ",
        "different": "; states differ",
    }
    return f"{where}: {said}{states[c.states]}"


def agreed(x: Agreement) -> str:
    said = {
        "equal": "the same loss and gradient",
        "gradient": "the same gradient",
        "scaled": f"B's gradient is {x.factor:.6g} times A's",
        "expected": "equal in expectation",
        "expected scaled": f"B's mean gradient is {x.factor:.6g} times A's",
        "different": "different",
    }[x.kind]
    return said + (" on fresh rollouts" if x.fresh else "")


# ---- text --------------------------------------------------------------------------------------------------


def text(d: Difference) -> str:
    out = [*_pair_of_names(d), "", *_wrapped(verdict(d), 0), *_wrapped(tested(d), 2), ""]
    changed = [x for x in d.axes if x.changed]
    if changed:
        out += _table([(x.name, x.a, x.b) for x in changed], ("changed", "A", "B"))
    calm = [x.name for x in d.axes if not x.changed]
    if calm:
        out += _labelled("unchanged", _list(calm))
    if d.passport:
        out += ["", *_table(d.passport, ("passport", "A", "B"))]
    if d.variances is not None:
        out += ["", *_labelled("measured", f"variance {spread(d)}")]
    if d.witness is not None:
        out += ["", *_witness(d, d.witness)]
    if d.cases:
        out += ["", "where they meet"]
        for c in d.cases:
            out += textwrap.wrap(case(c), WIDTH, initial_indent="  ", subsequent_indent="    ")
    elif d.searched and (d.a.require()[0].params or d.b.require()[0].params) and not d.equal:
        out += ["", "no end of a knob's range makes them meet"]
    return "\n".join(line.rstrip() for line in out) + "\n"


def _pair_of_names(d: Difference) -> list[str]:
    out = []
    for label, c in (("A", d.a), ("B", d.b)):
        spec = c.require()[0]
        set_ = ", ".join(f"{k} = {v}" for k, v in c.settings.items())
        line = f"{label}  {spec.name}" + (f" at {set_}" if set_ else "")
        title = spec.title or ""
        room = WIDTH - len(line) - 3
        out.append(
            line + (f"   {textwrap.shorten(title, room, placeholder=' …')}" if room > 20 else "")
        )
    return out


def _wrapped(line: str, indent: int) -> list[str]:
    pad = " " * indent
    return textwrap.wrap(
        line, WIDTH, initial_indent=pad, subsequent_indent=pad, break_on_hyphens=False
    )


def _labelled(label: str, body: str) -> list[str]:
    lines = textwrap.wrap(body, WIDTH - LABEL, break_on_hyphens=False) or [""]
    return [f"{label if i == 0 else '':<{LABEL}}{line}" for i, line in enumerate(lines)]


def _table(rows: Sequence[tuple[str, str, str]], head: tuple[str, str, str]) -> list[str]:
    """Three columns; cells are wrapped, never cut."""
    width = (WIDTH - LABEL - GAP) // 2
    out = [f"{head[0]:<{LABEL}}{head[1]:<{width + GAP}}{head[2]}"]
    for name, a, b in rows:
        cells = [
            textwrap.wrap(name, LABEL - 1, subsequent_indent=" ", break_long_words=True),
            *(
                textwrap.wrap(x, width, subsequent_indent=" ", break_on_hyphens=False)
                for x in (a, b)
            ),
        ]
        for i in range(max(map(len, cells))):
            n, x, y = (c[i] if i < len(c) else "" for c in cells)
            out.append(f"{n:<{LABEL}}{x:<{width + GAP}}{y}")
    return out


def _list(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _witness(d: Difference, w: Witness) -> list[str]:
    return [*_wrapped(f"smallest witness: {scale(w)}", 0), *_numbers(w), *_wrapped(result(w), 2)]


def scale(w: Witness) -> str:
    """How big the witness is."""
    states = w.sequences * w.positions
    size = "one state" if states == 1 else f"{states} states"
    if w.sequences > 1:
        size += f" in {w.sequences} rollouts of a prompt"
    out = f"{size}, {w.vocabulary} tokens" + (" of given text" if w.given_text else "")
    if states > 1:
        out += f"; shown is position {w.place[1]}"
        out += f" of rollout {w.place[0]}" if w.sequences > 1 else ""
    return out


def _numbers(w: Witness) -> list[str]:
    keys = [k for k in w.rows[0] if k not in ("token", "sampled")]
    head = {"A": "dA/dz", "B": "dB/dz"}
    largest = max(abs(row[k]) for row in w.rows for k in head)
    digits = ".5f" if 1e-3 < largest < 1e4 else ".3e"
    out = ["  " + f"{'token':<12}" + "".join(f"{head.get(k, k)[:10]:>11}" for k in keys)]
    for row in w.rows:
        name = row["token"] + (" drawn" if row["sampled"] else "")
        cells = "".join(
            f"{_plain(row[k]):>+11{digits}}" if k in head else f"{_prob(row[k]):>11}" for k in keys
        )
        out.append(f"  {name:<12}{cells}")
    if len(w.rows) < w.vocabulary:
        out.append(f"  … {w.vocabulary - len(w.rows)} more")
    return out


def _prob(p: float) -> str:
    return f"{p:.3f}" if p == 0 or p >= 5e-4 else f"{p:.0e}"


def _plain(x: float) -> float:
    """No −0 and no rounding noise."""
    return 0.0 if abs(x) < 1e-12 else x


def result(w: Witness) -> str:
    bits = []
    for other in w.others[:3]:
        s, t = other["place"]
        at = f"position {t}" + (f" of rollout {s}" if w.sequences > 1 else "")
        probs = ", ".join(
            f"{k} {other[k]:.3g}" for k in other if k not in ("place", "token", "sampled", "A", "B")
        )
        bits.append(f"{at}: {other['token']} drawn ({probs})")
    if len(w.others) > 3:
        bits.append(f"{len(w.others) - 3} more states")
    for key, value in w.context.items():
        bits.append(f"{key} {_said(value)}")
    bits.append(f"loss A {_plain(w.losses[0]):.5g}, B {_plain(w.losses[1]):.5g}")
    bits.append(f"largest difference {w.gap:.3g}")
    return "; ".join(bits)


def _said(x: object) -> str:
    if isinstance(x, dict):
        return ", ".join(f"{k} = {v}" for k, v in x.items())
    if isinstance(x, list):
        return ", ".join(_said(v) for v in x)
    if isinstance(x, bool):
        return "yes" if x else "no"
    return f"{x:.3g}" if isinstance(x, float) else str(x)


# ---- other formats -------------------------------------------------------------------------------------------


def markdown(d: Difference) -> str:
    def cell(x: str) -> str:
        return x.replace("|", "\\|")

    names = [c.require()[0].name for c in (d.a, d.b)]
    out = [f"**{names[0]}** (A) and **{names[1]}** (B): {verdict(d)}.", "", f"{tested(d)}.", ""]
    rows = [(x.name, x.a, x.b) for x in d.axes if x.changed] + list(d.passport)
    if rows:
        out += ["| | A | B |", "|---|---|---|"]
        out += [f"| {n} | {cell(a)} | {cell(b)} |" for n, a, b in rows]
        out.append("")
    calm = [x.name for x in d.axes if not x.changed]
    if calm:
        out += [f"Unchanged: {_list(calm)}.", ""]
    if d.variances is not None:
        out += [f"Variance {spread(d)}.", ""]
    if d.witness is not None:
        lines = [*_numbers(d.witness), *_wrapped(result(d.witness), 2)]
        out += [f"Smallest witness: {scale(d.witness)}.", "", "```text", *lines, "```", ""]
    out += [f"- {case(c)}" for c in d.cases]
    return "\n".join(out).rstrip() + "\n"


def data(d: Difference) -> dict[str, Any]:
    """Plain values; keys are stable."""
    from dataclasses import asdict

    sides = {}
    for label, c in (("a", d.a), ("b", d.b)):
        spec, program = c.require()
        sides[label] = {
            "method": spec.name,
            "title": spec.title,
            "source": c.source.name,
            "settings": {k: str(v) for k, v in c.settings.items()},
            "fingerprints": fingerprints(program),
        }
    x = d.agreement
    return {
        **sides,
        "verdict": d.kind,
        "equal": d.equal,
        "statement": verdict(d),
        "states": d.states,
        "fresh_only": bool(x and x.fresh),
        "factor": None if x is None or "scaled" not in d.kind else x.factor,
        "tested": {
            "batches": d.batches,
            "agreeing": d.agreeing,
            "tolerance": None if d.kind == "same" else _tolerance(),
            "worst": d.worst if d.kind == "equal" else None,
            "undecided": d.undecided or None,
        },
        "roles": {
            "teachers": [list(p) for p in d.roles.teachers],
            "critics": [list(p) for p in d.roles.critics],
            "incomparable": d.roles.why_not or None,
        },
        "changed": [{"axis": r.name, "a": r.a, "b": r.b} for r in d.axes if r.changed],
        "unchanged": [r.name for r in d.axes if not r.changed],
        "passport": [{"row": n, "a": a, "b": b} for n, a, b in d.passport],
        "variance": None if d.variances is None else asdict(d.variances),
        "witness": None if d.witness is None else asdict(d.witness),
        "special_cases": [_case_data(c) for c in d.cases],
    }


def _tolerance() -> float:
    from opdsl.passport.diff_measure import TOLERANCE

    return TOLERANCE


def _case_data(c: Case) -> dict[str, Any]:
    return {
        "side": c.side or None,
        "settings": dict(c.settings),
        "approached": list(c.approached),
        "critic": c.agreement.critic,
        "agreement": c.agreement.kind,
        "factor": c.agreement.factor,
        "scale": c.scale or None,
        "states": c.states,
        "statement": case(c),
    }


__all__ = ["FORMATS", "data", "markdown", "render", "text", "verdict"]
