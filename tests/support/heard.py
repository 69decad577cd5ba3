"""A progress that keeps what it is told."""

from __future__ import annotations

from opdsl.train.progress import Silent


class Heard(Silent):
    """lines: the notes of a run, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)
