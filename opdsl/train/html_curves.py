"""Curves of a run as SVG, drawn here and readable without a script; numbers beside them as tables.

A curve with more points than pixels keeps the lowest and highest of each stretch, so that no spike
is lost. Colours are classes of the style sheet (Okabe and Ito, one set for light, one for dark);
series also differ by dash, for print and for eyes that tell few colours apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from opdsl.train.html_text import Html, el, embedded_json, joined, number, table

WIDTH, HEIGHT = 440, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 30  # margins, px
MOST = 360  # points of one drawn curve
TABLE_ROWS = 13  # rows of the table beside a curve
SMOOTHED_FROM = 60  # points from which a smoothed curve is drawn over the raw one


@dataclass(frozen=True)
class Series:
    """One curve. points: (step, value), steps rising. low, high: bounds of a band, alike long."""

    label: str
    points: tuple[tuple[float, float], ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Chart:
    """One picture. unit: "share" is drawn as per cent from 0 to 1. text: what it shows, in a
    sentence, for those who do not see it."""

    ident: str
    title: str
    unit: str
    series: tuple[Series, ...]
    text: str = ""


def draw(chart: Chart) -> Html:
    """A figure: caption, SVG with axes, legend, and the same numbers as a table."""
    series = [s for s in chart.series if s.points]
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + [y for s in series for y in (*s.low, *s.high)]
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, whole=True)
    y_axis = _y_axis(chart.unit, ys)
    unit = f", {chart.unit}" if chart.unit and chart.unit != "share" else ""
    spoken = chart.text or _spoken(chart)
    drawn = [
        el("title", f"{chart.title}{unit}", id=f"{chart.ident}-t"),
        el("desc", spoken, id=f"{chart.ident}-d"),
        _grid(x_axis, y_axis, chart.unit),
        *(_band(s, i, x_axis, y_axis) for i, s in enumerate(series)),
        *(_curve(s, i, x_axis, y_axis) for i, s in enumerate(series)),
        el("line", class_="cross", x1="0", x2="0", y1=TOP, y2=HEIGHT - BOTTOM),
    ]
    svg = el(
        "svg",
        *drawn,
        viewbox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=f"{chart.ident}-t {chart.ident}-d",
        class_="chart",
    )
    return el(
        "figure",
        el("figcaption", el("strong", chart.title), el("span", unit, class_="unit")),
        svg,
        el("p", "", class_="readout", aria_hidden="true"),
        _legend(series) if len(series) > 1 else None,
        el("details", el("summary", "Numbers"), _numbers(chart, series)),
        el("script", embedded_json(_data(chart, series, x_axis)), type="application/json"),
        id=chart.ident,
    )


# ---- axes ----------------------------------------------------------------------------------------


class _Axis:
    """A linear scale from values to pixels, with round ticks."""

    def __init__(self, low: float, high: float, first: float, last: float, whole: bool = False):
        if high - low < 1e-12 * max(1.0, abs(high)):
            pad = 0.5 if whole else max(1e-9, abs(high) * 0.05)
            low, high = low - pad, high + pad
        self.low, self.high, self.first, self.last = low, high, first, last
        self.step = _round_step((high - low) / (6 if whole else 4), whole)

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)

    def ticks(self) -> list[float]:
        start = math.ceil(self.low / self.step - 1e-9)
        stop = math.floor(self.high / self.step + 1e-9)
        return [round(i * self.step, 12) + 0.0 for i in range(start, stop + 1)]


def _round_step(raw: float, whole: bool) -> float:
    size = 10.0 ** math.floor(math.log10(max(raw, 1e-300)))
    step = next((m * size for m in (1, 2, 5) if m * size >= raw * 0.999), 10 * size)
    return max(1.0, step) if whole else step


def _y_axis(unit: str, ys: Sequence[float]) -> _Axis:
    low, high = min(ys), max(ys)
    if unit == "share":
        low, high = min(0.0, low), max(high, 1.0 if high > 0.5 else high * 1.1 or 1.0)
    else:
        pad = (high - low) * 0.06
        low, high = (0.0 if 0 <= low < 0.35 * high else low - pad), high + pad
    return _Axis(low, high, HEIGHT - BOTTOM, TOP)


def _written(value: float, unit: str) -> str:
    if unit == "share":
        return f"{value * 100:.3g} %"
    return number(value, 3).replace("-", "−")


def _grid(x_axis: _Axis, y_axis: _Axis, unit: str) -> Html:
    parts = []
    for value in y_axis.ticks():
        y = round(y_axis(value), 1)
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        label = _written(value, unit)
        parts.append(el("text", label, x=LEFT - 6, y=y + 3.5, text_anchor="end"))
    for value in x_axis.ticks():
        x = round(x_axis(value), 1)
        label = number(int(value))
        parts.append(el("text", label, x=x, y=HEIGHT - BOTTOM + 14, text_anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(el("text", "step", x=middle, y=HEIGHT - 3, text_anchor="middle"))
    return el("g", *parts, class_="grid", aria_hidden="true")


# ---- curves --------------------------------------------------------------------------------------


def thinned(points: Sequence[tuple[float, float]], most: int = MOST) -> list[tuple[float, float]]:
    """At most `most` points: of each stretch the lowest and the highest, in order."""
    if len(points) <= most:
        return list(points)
    out: list[tuple[float, float]] = []
    stretches = max(1, most // 2)
    for i in range(stretches):
        part = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        ends = {part.index(min(part, key=_value)), part.index(max(part, key=_value))}
        out += [part[j] for j in sorted(ends)]
    return out


def _value(point: tuple[float, float]) -> float:
    return point[1]


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """An exponential mean over a fortieth of the points, unbiased at the start."""
    rate = min(1.0, 40 / len(points))
    total = weight = 0.0
    out = []
    for x, y in points:
        total, weight = (1 - rate) * total + rate * y, (1 - rate) * weight + rate
        out.append((x, total / weight))
    return out


def _curve(series: Series, i: int, x_axis: _Axis, y_axis: _Axis) -> Html:
    whole = list(series.points)
    raw = el("polyline", points=_path(thinned(whole), x_axis, y_axis), class_=f"line s{i % 8}")
    if len(whole) < SMOOTHED_FROM:
        dots = [
            el("circle", cx=round(x_axis(x), 1), cy=round(y_axis(y), 1), r=1.8, class_=f"dot s{i % 8}")
            for x, y in whole
        ] if len(whole) <= 16 else []  # fmt: skip
        return el("g", raw, *dots)
    faint = el("polyline", points=_path(thinned(whole), x_axis, y_axis), class_=f"raw s{i % 8}")
    mean = thinned(smoothed(whole))
    return el(
        "g", faint, el("polyline", points=_path(mean, x_axis, y_axis), class_=f"line s{i % 8}")
    )


def _path(points: Sequence[tuple[float, float]], x_axis: _Axis, y_axis: _Axis) -> str:
    return " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in points)


def _band(series: Series, i: int, x_axis: _Axis, y_axis: _Axis) -> Html | None:
    if not series.low:
        return None
    xs = [x for x, _ in series.points]
    upper = list(zip(xs, series.high))
    lower = list(zip(xs, series.low))[::-1]
    return el("path", d=f"M {_path([*upper, *lower], x_axis, y_axis)} Z", class_=f"band s{i % 8}")


def _legend(series: Sequence[Series]) -> Html:
    items = []
    for i, s in enumerate(series):
        line = el("line", x1=0, x2=22, y1=5, y2=5, class_=f"line s{i % 8}")
        swatch = el("svg", line, viewbox="0 0 22 10", class_="swatch", aria_hidden="true")
        items.append(el("li", swatch, s.label))
    return el("ul", *items, class_="legend")


# ---- the same in words and numbers -----------------------------------------------------------------


def _spoken(chart: Chart) -> str:
    parts = []
    for s in chart.series:
        if s.points:
            (x0, y0), (x1, y1) = s.points[0], s.points[-1]
            parts.append(
                f"{s.label}: {_written(y0, chart.unit)} at step {number(x0)},"
                f" {_written(y1, chart.unit)} at step {number(x1)}"
            )
    return "; ".join(parts)


def _numbers(chart: Chart, series: Sequence[Series]) -> Html:
    steps = sorted({x for s in series for x, _ in s.points})
    if len(steps) > TABLE_ROWS:
        last = len(steps) - 1
        steps = [steps[round(i * last / (TABLE_ROWS - 1))] for i in range(TABLE_ROWS)]
    columns = [dict(s.points) for s in series]
    rows = [
        [number(int(x)), *(_written(c[x], chart.unit) if x in c else "–" for c in columns)]
        for x in steps
    ]
    return table(["step", *(s.label for s in series)], rows, class_="figures")


def _data(chart: Chart, series: Sequence[Series], x_axis: _Axis) -> dict:
    """What the script needs to read a value off under the pointer."""
    return {
        "unit": chart.unit,
        "x": [x_axis.low, x_axis.high, LEFT, WIDTH - RIGHT],
        "series": [
            {"label": s.label, "points": [[x, float(f"{y:.5g}")] for x, y in thinned(s.points)]}
            for s in series
        ],
    }


def gallery(charts: Sequence[Chart]) -> Html:
    """Several figures side by side as the page allows."""
    return el(
        "div", joined(draw(c) for c in charts if any(s.points for s in c.series)), class_="charts"
    )
