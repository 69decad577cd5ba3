"""What a user sees while a run goes on: a live view on a terminal, short lines elsewhere.

Everything goes to stderr; stdout is for results. Nothing here decides anything.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol


class Progress(Protocol):
    """How the trainer tells what it is doing.

    stage: building or loading, fraction 0..1 of it done. step: a finished optimizer step, with
    the record of `metrics.jsonl` and tokens per second. note: one line worth keeping.
    """

    def stage(self, name: str, fraction: float, note: str) -> None: ...
    def begin(self, total: int, done: int) -> None: ...
    def step(self, step: int, record: dict[str, Any], tokens_per_second: float) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class Silent:
    """For library calls and tests."""

    def stage(self, name: str, fraction: float, note: str) -> None:
        pass

    def begin(self, total: int, done: int) -> None:
        pass

    def step(self, step: int, record: dict[str, Any], tokens_per_second: float) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Plain(Silent):
    """Lines for logs: at most one per stage tenth, and about ten over the run."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr
        self._stage: tuple[str, int] | None = None
        self._total = 0
        self._first = 0  # the first step seen; negative while a critic warms up
        self._last = time.monotonic()

    def _line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def stage(self, name: str, fraction: float, note: str) -> None:
        key = (name, int(fraction * 4))
        if key != self._stage:
            self._stage = key
            self._line(f"{name} {fraction:4.0%}  {note}")

    def begin(self, total: int, done: int) -> None:
        self._total = total

    def step(self, step: int, record: dict[str, Any], tokens_per_second: float) -> None:
        if step < 0:
            self.stage("critic", 1 + step / self._warmup(step), "learning values of states")
            return
        every = max(1, self._total // 10)
        now = time.monotonic()
        if (step + 1) % every == 0 or step + 1 == self._total or now - self._last > 30:
            self._last = now
            self._line(f"step {step + 1}/{self._total}  {figures(record, tokens_per_second)}")

    def _warmup(self, step: int) -> int:
        self._first = min(self._first, step)
        return -self._first

    def note(self, text: str) -> None:
        self._line(text)


def make_progress(json_output: bool = False) -> Progress:
    """Live on a terminal, plain lines otherwise."""
    if sys.stderr.isatty() and not json_output:
        from opdsl.train.live import Live

        return Live()
    return Plain()


def figures(record: dict[str, Any], tokens_per_second: float) -> str:
    """The figures of a step worth watching, in a fixed order."""
    shown = []
    for key, label, form in (
        ("loss", "loss", "{:.4f}"),
        ("kl", "KL", "{:.3f}"),
        ("reward", "right", "{:.0%}"),
        ("accuracy", "held-out", "{:.0%}"),
        ("length", "length", "{:.1f}"),
        ("critic_ev", "critic EV", "{:.2f}"),
    ):
        if isinstance(record.get(key), (int, float)):
            shown.append(f"{label} {form.format(record[key])}")
    shown.append(f"{tokens_per_second:,.0f} tok/s")
    return "  ".join(shown)
