"""The live view of a run on a terminal: progress, the most telling figures, their curves.

    steps ━━━━━━━━━━━━━━━━━━━━━━━━ 34/100  0:00:04 gone, 0:00:07 left, 5,912 tok/s
    loss               -0.7362  █▇▇▆▅▄▃▂▁▁▁▂
    KL(student||T)       1.559  ██▇▇▆▆▅▄▃▃▂▁  nats
    …

Curves run from the first step to the last one done; each cell is the mean of its share of the
steps. Nothing here decides anything; everything goes to stderr.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from opdsl.train.progress import Silent

CELLS = 36  # width of a curve
ROWS = 9  # figures shown at once
BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = "_.-=+*%#"  # for terminals whose encoding has no blocks

# Figures worth a line, the most telling first: key, label, how it is written.
FIGURES: tuple[tuple[str, str, str], ...] = (
    ("loss", "loss", "{:.4f}"),
    ("kl", "KL(student||teacher)", "{:.3f}"),
    ("accuracy", "held-out, greedy", "{:.1%}"),
    ("reward", "right, training", "{:.1%}"),
    ("critic_ev", "critic explains", "{:.0%}"),
    ("routing_routable", "routable", "{:.0%}"),
    ("support_tail", "mass off support", "{:.3f}"),
    ("advantage_negative", "punished tokens", "{:.0%}"),
    ("overlap", "top tokens shared", "{:.0%}"),
    ("kl_teacher", "KL(teacher||student)", "{:.3f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("length", "length", "{:.1f}"),
    ("truncated", "cut at the limit", "{:.0%}"),
    ("grad_norm", "gradient norm", "{:.3g}"),
)


@dataclass
class History:
    """A curve of bounded size: full, it keeps the means of neighbours."""

    limit: int = 512
    values: list[float] = field(default_factory=list)
    stride: int = 1  # steps per stored value
    _sum: float = 0.0
    _count: int = 0

    def add(self, value: float) -> None:
        """One more value; numbers that are not finite leave no mark."""
        if not math.isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self.stride:
            return
        self.values.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self.values) >= self.limit:
            pairs = zip(self.values[::2], self.values[1::2])
            self.values = [(a + b) / 2 for a, b in pairs]
            self.stride *= 2


def sparkline(values: list[float], cells: int = CELLS, bars: str = BARS) -> str:
    """A curve in one line of text: at most `cells` characters, lowest to highest bar."""
    if not values:
        return ""
    cells = min(cells, len(values))
    edges = [round(i * len(values) / cells) for i in range(cells + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    if high - low <= 1e-12 * max(1.0, abs(high)):
        return bars[len(bars) // 2 - 1] * cells
    top = len(bars) - 1
    return "".join(bars[round((m - low) / (high - low) * top)] for m in means)


class Live(Silent):
    """A progress bar per stage while loading; a bar, figures and curves over the steps."""

    def __init__(self, console=None):
        from rich.console import Console
        from rich.live import Live as Screen
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._tasks: dict[str, Any] = {}
        self.curves: dict[str, History] = {}
        self.now: dict[str, float] = {}
        self.total = 0
        self.console = console or Console(stderr=True)
        self.bars = Bars(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("gone,"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
        )
        self.screen = Screen(
            get_renderable=self._view, console=self.console, refresh_per_second=4, transient=False
        )
        self.screen.start()

    # ---- what the trainer tells ------------------------------------------------------------------

    def stage(self, name: str, fraction: float, note: str) -> None:
        self.bars.update(self._task(name, 1.0), completed=fraction, text=note)

    def begin(self, total: int, done: int) -> None:
        for task in self._tasks.values():
            self.bars.remove_task(task)
        self._tasks.clear()
        self.total = total
        self.bars.update(self._task("steps", total), completed=done, text=f"{done}/{total}")

    def step(self, step: int, record: dict[str, Any], tokens_per_second: float) -> None:
        if step < 0:
            self.bars.update(self._task("steps", 0), text="critic warm-up")
            return
        for key, _, _ in FIGURES:
            value = record.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.curves.setdefault(key, History()).add(float(value))
                self.now[key] = float(value)
        text = f"{step + 1}/{self.total}  {tokens_per_second:,.0f} tok/s"
        self.bars.update(self._task("steps", 0), completed=max(0, step + 1), text=text)

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.screen.stop()

    # ---- what is drawn ---------------------------------------------------------------------------

    def _task(self, name: str, total: float):
        if name not in self._tasks:
            self._tasks[name] = self.bars.add_task(name, total=total, text="")
        return self._tasks[name]

    def _view(self):
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        if not self.now:
            return self.bars
        table = Table.grid(padding=(0, 2))
        bars = BARS if self.drawable() else PLAIN_BARS
        room = max(8, min(CELLS, self.console.width - 36))
        for key, label, form in [f for f in FIGURES if f[0] in self.now][:ROWS]:
            curve = sparkline(self.curves[key].values, room, bars)
            value = form.format(self.now[key])
            table.add_row(Text(label), Text(value, justify="right"), Text(curve, style="cyan"))
        return Group(self.bars, table)

    def drawable(self) -> bool:
        """Whether the terminal's encoding has block characters."""
        try:
            BARS.encode(self.console.encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            return False
        return True
