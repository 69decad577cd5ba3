"""Where teacher scores come from.

A teacher answers one question per batch: what it thinks of the response tokens, given its own
view of the prompt. `local` answers in this process, `remote` asks a server, `stored` reads what
was scored before. The protocol below is all the trainer knows; what a kind of teacher can give at
all stands in its `Capabilities`, and a plan that asks for more is refused before anything is
loaded.

Shapes: B rows, T response positions, K entries of a list, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Scores:
    """Teacher scores of B rows, T response positions, in one of three forms.

    logits [B, T, V]; or hidden [B, T, H] with its head, so that no [B, T, V] tensor exists; or
    log-probabilities (nats, temperature 1): `logprobs` [B, T] of the response tokens, and a list
    `top_ids`, `top_logprobs` [B, T, K] that starts with the teacher's own most probable tokens in
    falling order and goes on with the ids it was asked for. An entry the teacher did not give has
    log-probability −inf. Positions behind a row's length hold anything finite.
    """

    logits: Any = None
    hidden: Any = None
    head: Any = None
    logprobs: Any = None
    top_ids: Any = None
    top_logprobs: Any = None

    @property
    def whole(self) -> bool:
        """Whether the whole distribution is known, not only some entries."""
        return self.logits is not None or self.hidden is not None

    def tensors(self) -> list[Any]:
        """What must hold no NaN."""
        found = (self.logits, self.hidden, self.logprobs, self.top_logprobs)
        return [x for x in found if x is not None]


class Teacher(Protocol):
    """One teacher role of a method."""

    name: str

    def score(self, prompts: Sequence[Any], tokens: Any, lengths: Any, ids: Any = None) -> Scores:
        """Scores of responses tokens [B, T] (lengths [B]) behind each row's prompt.

        ids [B, T, K]: further tokens whose scores are wanted, from a teacher that gives lists.
        Raises BatchDropped or TeacherLost (see `errors`) where no answer can be had.
        """
        ...

    def after_update(self) -> None:
        """Called after every optimizer step (moving averages)."""
        ...

    def state(self) -> dict[str, Any]:
        """Tensors a checkpoint must hold, by name; empty for fixed teachers."""
        ...

    def load_state(self, tensors: dict[str, Any]) -> None: ...
