"""The figure of `explain --figure`: before, the push on the logits, where the mass lands.

Drawn without a display, the same bytes every time. Signs, hatches and numbers say what the colours
say, so nothing hangs on colour.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np

from opdsl.formula.mass import Flow, Mass

SUFFIXES = (".png", ".svg", ".pdf")
# Colour-blind safe (Okabe and Ito).
STUDENT, TEACHER, GAIN, LOSS, PLAIN = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
_SETTINGS = {"svg.hashsalt": "opdsl", "svg.fonttype": "path", "pdf.fonttype": 42, "font.size": 8,
             "font.family": ["DejaVu Sans"], "hatch.linewidth": 0.6}  # fmt: skip
_NOTHING = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None},
            ".pdf": {"CreationDate": None, "Creator": None, "Producer": None}}  # fmt: skip


def drawn(mass: Mass, suffix: str, title: str) -> bytes:
    """The figure as a file of one of SUFFIXES."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a token may have a sign the font lacks
        figure = _figure(mass, title)
        figure.savefig(out, format=suffix[1:], dpi=110, metadata=_NOTHING[suffix])
    return out.getvalue()


def _figure(mass: Mass, title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    s = mass.state
    size = len(s.tokens)
    figure = Figure(figsize=(9.6, 1.9 + 0.3 * size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 4, sharey=True, width_ratios=(1.15, 1.15, 1, 1))
    rows = np.arange(size)
    names = [_shown(t) + ("  ▸" if i == s.y else "") for i, t in enumerate(s.tokens)]
    axes[0].set_yticks(rows, names)
    for text in axes[0].get_yticklabels():
        text.set_parse_math(False)
    axes[0].get_yticklabels()[s.y].set_fontweight("bold")
    axes[0].invert_yaxis()
    _before(axes[0], mass, rows)
    _push(axes[1], mass, rows)
    reach = 1.22 * max(np.abs(mass.spec.moved).max(), np.abs(mass.plain.moved).max(), 1e-3)
    _landing(axes[2], mass.spec, rows, "this spec", reach)
    _landing(axes[3], mass.plain, rows, "plain suppression", reach)
    for axis in axes:
        axis.axhspan(s.y - 0.5, s.y + 0.5, color="0.9", zorder=0, lw=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    head = figure.suptitle(title, fontsize=10, x=0.01, ha="left", fontweight="bold")
    head.set_parse_math(False)
    below = f"▸ sampled token. {mass.verdict[0].upper()}{_shown(mass.verdict[1:], 80)}."
    if mass.notes:
        below += " At this one state " + "; ".join(mass.notes) + "."
    figure.supxlabel(_filled(below, 130), fontsize=7.5, x=0.01, ha="left").set_parse_math(False)
    return figure


def _before(axis: Any, mass: Mass, rows: np.ndarray) -> None:
    """Student and teacher, bars side by side."""
    for offset, p, colour, hatch, label in (
        (-0.2, mass.state.student, STUDENT, "", "student π"),
        (0.2, mass.teacher, TEACHER, "////", f"teacher {_shown(mass.teacher_name or 'T')}"),
    ):
        axis.barh(rows + offset, p, 0.38, color=colour, hatch=hatch, ec="white", lw=0, label=label)
        for y, x in zip(rows + offset, p):
            axis.text(x + 0.01, y, f"{x:.2g}", va="center", fontsize=6, color="0.25")
    axis.set_xlim(0, 1.16 * max(mass.state.student.max(), mass.teacher.max()))
    axis.set_title("before: probability", fontsize=8.5, loc="left")
    _key(axis)


def _key(axis: Any) -> None:
    """The legend below the panel, where no bar can be."""
    below = -0.25 / (axis.figure.get_figheight() - 1.5)  # under the numbers, whatever the height
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(-0.04, below),
                ncols=2, columnspacing=1, borderaxespad=0)  # fmt: skip


def _push(axis: Any, mass: Mass, rows: np.ndarray) -> None:
    """Δz of the spec beside plain suppression, which is scaled to push the token as hard."""
    own, y = mass.spec.push, mass.state.y
    scale = abs(own[y] / mass.plain.push[y]) if abs(own[y]) > 1e-12 else 1.0
    plain = mass.plain.push * scale
    axis.barh(rows - 0.2, own, 0.38, color=STUDENT, label="this spec")
    axis.barh(rows + 0.2, plain, 0.38, color=PLAIN, hatch="....", ec="white", lw=0,
              label="plain suppression")  # fmt: skip
    reach = 1.4 * max(np.abs(own).max(), np.abs(plain).max(), 1e-9)
    for y_, x in zip(rows - 0.2, own):
        _value(axis, x, y_, reach)
    axis.set_xlim(-reach, reach)
    axis.axvline(0, color="0.3", lw=0.6)
    axis.set_title("push on the logits Δz", fontsize=8.5, loc="left")
    _key(axis)


def _landing(axis: Any, flow: Flow, rows: np.ndarray, who: str, reach: float) -> None:
    """Where each unit of mass comes from and goes to."""
    up = flow.moved >= 0
    for mask, colour, hatch in ((up, GAIN, ""), (~up, LOSS, "xxxx")):
        axis.barh(rows[mask], flow.moved[mask], 0.6, color=colour, hatch=hatch, ec="white", lw=0)
    for y, x in zip(rows, flow.moved):
        _value(axis, x, y, reach)
    axis.set_xlim(-reach, reach)
    axis.axvline(0, color="0.3", lw=0.6)
    axis.set_title(f"where mass lands:\n{who}", fontsize=8.5, loc="left")
    unit = "taken off the token" if flow.own else "of mass moved in all"
    axis.set_xlabel(f"per unit {unit}", fontsize=7)


def _value(axis: Any, x: float, y: float, reach: float) -> None:
    """The number at the end of a bar, on its outer side."""
    small = abs(x) < 2e-3 * reach
    text = "0" if small else (f"{x:+.2f}" if reach > 0.5 else f"{x:+.1g}").replace("-", "−")
    if text in ("+0.00", "−0.00"):
        text = "0"
    side = 1 if x >= 0 else -1
    axis.text(x + 0.02 * reach * side, y, text, va="center", fontsize=6, color="0.2",
              ha="left" if side > 0 else "right")  # fmt: skip


def _shown(text: str, most: int = 16) -> str:
    """A token as it can be drawn: visible blanks, no control characters, not too long."""
    marks = {"\n": "↵", "\t": "⇥", " ": "·" if not text.strip() else " "}
    out = "".join(marks.get(c, c if c.isprintable() else "�") for c in text) or "∅"
    return out if len(out) <= most else out[: most - 1] + "…"


def _filled(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


__all__ = ["SUFFIXES", "drawn"]
