"""Where teacher scores come from.

A teacher answers one question per batch: its distribution at every response position, given
its own view of the prompt. `local` answers in this process; the protocol below is all the
trainer knows, so other kinds can be added beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Scores:
    """Teacher scores of B rows, T response positions; exactly one form is filled.

    logits [B, T, V]; or hidden [B, T, H] with its head, so that no [B, T, V] tensor exists.
    Positions behind a row's length hold anything finite.
    """

    logits: Any = None
    hidden: Any = None
    head: Any = None


class Teacher(Protocol):
    """One teacher role of a method."""

    name: str

    def score(self, prompts: Sequence[Any], tokens: Any, lengths: Any) -> Scores:
        """Scores of responses tokens [B, T] (lengths [B]) behind each row's prompt."""
        ...

    def after_update(self) -> None:
        """Called after every optimizer step (moving averages)."""
        ...

    def state(self) -> dict[str, Any]:
        """Tensors a checkpoint must hold, by name; empty for fixed teachers."""
        ...

    def load_state(self, tensors: dict[str, Any]) -> None: ...
