"""What is measured beside the loss, when, and at what price.

Divergences at sampled states and the method's own quantities cost up to a third of the loss, so
they are measured every fifth step, and every tenth where no [N, V] tensor may exist (the passes
there cost products with the head). Nothing measured enters the update: a run with `measure_every = 0` ends in the same
parameters, bit for bit. A fault of a measurement is told once, counted, and stops nothing.

Shapes: B rows, T response tokens, N kept tokens of the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from opdsl.train.distributions import compare, compare_lists
from opdsl.train.forward import Forward
from opdsl.train.instruments import Instruments
from opdsl.train.opd_metrics import statistics
from opdsl.train.samples import SHOWN, shown_rows, token_record
from opdsl.train.states import Rows
from opdsl.train.teachers import Scores

EVERY = 5  # steps between full measurements
EVERY_FUSED = 10  # on the route that makes no [N, V] tensor


class Meters:
    """Measures steps. `seconds` and `samples` are taken by whoever writes them down.

    every: steps between full measurements (0: never; then nothing is measured at all). shown:
    steps, counted from 1, whose tokens are recorded for the report. say: takes one line.
    """

    def __init__(
        self,
        method: Any,
        data: Any,
        *,
        every: int = EVERY,
        shown: frozenset[int] = frozenset(),
        say: Callable[[str], None] = lambda text: None,
    ):
        self.method, self.data, self.every, self.shown, self.say = method, data, every, shown, say
        self.seconds = 0.0
        self.samples: list[dict[str, Any]] = []
        self.troubles: dict[str, int] = {}
        self._instruments: Instruments | None = None
        self._seen: dict[str, dict[str, float]] = {}
        self._done: int | None = None  # the step measured last
        self._found: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Whether step 0, 1, … is measured in full."""
        return self.every > 0 and (step % self.every == 0 or step + 1 in self.shown)

    def see(self, teacher: str, step: int, logp_NV: torch.Tensor, logq_NV: torch.Tensor) -> None:
        """Compare log-probabilities that a guard has at hand, at its measured tokens."""
        if self.due(step) and step != self._done:
            began = time.perf_counter()
            eos = getattr(self.data, "eos", None)
            found = self._guarded("divergences", lambda: compare(logp_NV, logq_NV, eos))
            self._seen[teacher] = found
            self.seconds += time.perf_counter() - began

    def __call__(
        self,
        forward: Forward,
        rows: Rows,
        states: torch.Tensor,
        teachers: dict[str, Scores],
        parts: Sequence[Any],
        step: int,
    ) -> dict[str, float]:
        """Figures of step 0, 1, …, by the names of `opd_metrics`.

        states [B, T, …]: what `forward.states` gave. parts: the batch the loss saw, whole or in
        micro-batches, rows in order. A step is measured once: a second pass over its rows (memory
        ran out, several epochs) gets the figures of the first.
        """
        if not self.due(step) or step == self._done:
            return self._found if step == self._done else {}
        began = time.perf_counter()
        found: dict[str, float] = {}
        for name, scores in teachers.items():
            one = self._seen.get(name)
            if one is None:
                one = self._guarded(
                    "lists of teachers",
                    lambda scores=scores: compare_lists(forward, rows, states, scores),
                )
            of_teacher = "" if len(teachers) == 1 else f"/{name}"
            found |= {k if k == "eos" else k + of_teacher: v for k, v in one.items()}
        self._seen, self._done = {}, step
        if getattr(self.method, "program", None) is not None:
            found |= self._guarded("the method's terms", lambda: self._terms(rows, parts, step))
        self._found = found
        self.seconds += time.perf_counter() - began
        return found

    def take(self) -> tuple[float, list[dict[str, Any]]]:
        """Seconds spent and token records made since the last call."""
        taken = self.seconds, self.samples
        self.seconds, self.samples = 0.0, []
        return taken

    def _terms(self, rows: Rows, parts: Sequence[Any], step: int) -> dict[str, float]:
        if self._instruments is None:
            self._instruments = Instruments(self.method)
        values = self._instruments(parts)
        own_B = rows.own
        own_N = own_B.unsqueeze(-1).expand_as(rows.mask)[rows.mask] if bool(own_B.any()) else None
        if step + 1 in self.shown:
            chosen = shown_rows(rows, SHOWN)
            self.samples = [token_record(step + 1, rows, chosen, values, self.data)]
        return statistics(values, own_N)

    def _guarded(self, what: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The figures, or none where measuring fails: a run is not lost over its instruments."""
        try:
            return measure()
        except Exception as error:  # whatever it is, training goes on
            if what not in self.troubles:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self.say(f"note      {what} could not be measured: {first[:160]}")
            self.troubles[what] = self.troubles.get(what, 0) + 1
            return {}
