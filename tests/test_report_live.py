"""What a terminal shows while a run goes on, and what a log gets instead."""

from __future__ import annotations

import io

from rich.console import Console

from opdsl.train.live import BARS, History, Live, sparkline
from opdsl.train.progress import Plain


def test_sparklines_show_shape_and_extremes():
    assert sparkline([]) == ""
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BARS
    assert sparkline([2.0] * 5) == BARS[3] * 5
    assert len(sparkline(list(range(1000)), cells=20)) == 20
    assert sparkline([1.0, 3.0], bars="_#") == "_#"


def test_a_history_stays_small_and_keeps_the_mean():
    history = History(limit=64)
    for i in range(10_000):
        history.add(float(i))
    history.add(float("nan"))
    assert len(history.values) < 64
    whole = len(history.values) * history.stride
    assert sum(history.values) / len(history.values) == (whole - 1) / 2


def show(encoding="utf-8"):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    console = Console(file=stream, force_terminal=True, width=90, color_system=None)
    live = Live(console)
    try:
        live.stage("teacher", 0.5, "training")
        live.begin(10, 0)
        live.step(-1, {}, 0.0)
        for i in range(10):
            record = {"loss": 4.0 - i / 4, "kl": 2.0 - i / 10, "reward": i / 10, "skipped": "no"}
            live.step(i, record | ({"routing_routable": 0.5} if i % 5 == 0 else {}), 1234.5)
        live.note("held-out [b]accuracy[/b]")
        lines = console.render_lines(live._view(), pad=False)
        text = "\n".join("".join(s.text for s in line) for line in lines)
    finally:
        live.close()
    return text, stream.buffer.getvalue().decode(encoding)


def test_the_live_view_tells_progress_figures_and_curves():
    text, all_of_it = show()
    assert "10/10" in text and "1,234 tok/s" in text and "left" in text
    assert "loss" in text and "1.7500" in text and "90.0%" in text
    assert "KL(student||teacher)" in text and "routable" in text and "50%" in text
    assert BARS[0] in text and BARS[-1] in text
    assert "[b]accuracy[/b]" in all_of_it  # notes are text, not markup


def test_a_terminal_without_block_characters_gets_others():
    text, _ = show("ascii")
    assert not set(BARS) & set(text) and "#" in text


def test_a_log_gets_about_ten_lines():
    stream = io.StringIO()
    plain = Plain(stream)
    plain.begin(200, 0)
    for i in range(200):
        plain.step(i, {"loss": 1.0}, 10.0)
    lines = stream.getvalue().splitlines()
    assert (
        10 <= len(lines) <= 12 and "step 200/200" in lines[-1] and "\x1b" not in stream.getvalue()
    )
