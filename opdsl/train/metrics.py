"""Records of a run: one JSON object per line, byte-identical for equal runs.

`metrics.jsonl` and `evals.jsonl` hold nothing that depends on the clock or the machine's load;
seconds and tokens per second go to `timings.jsonl`. A resumed run first cuts each file back to
the checkpoint it starts from, so that the file ends up as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def to_line(record: dict[str, Any]) -> str:
    """One line of strict JSON: non-finite numbers become null, keys keep their order."""
    return json.dumps(_clean(record), ensure_ascii=False, allow_nan=False) + "\n"


def _clean(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    return value


class Lines:
    """An append-only JSONL file, flushed line by line."""

    def __init__(self, path: Path, keep_through: int | None = None):
        """Open for appending; with `keep_through`, drop records of later steps first."""
        self.path = path
        if keep_through is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            kept = [
                to_line(record) for record in read_lines(path) if record["step"] <= keep_through
            ]
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(to_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole record; a last line cut short by a kill is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


class Stopwatch:
    """Seconds by stage of one step: `with watch("rollouts"): …`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def move(self, stage: str, to: str, seconds: float) -> None:
        """Count seconds of one stage as another's."""
        if seconds > 0:
            self.seconds[stage] = self.seconds.get(stage, 0.0) - seconds
            self.seconds[to] = self.seconds.get(to, 0.0) + seconds

    def record(self, step: int, tokens: int) -> dict[str, Any]:
        """The line for `timings.jsonl`; tokens are response tokens trained on."""
        total = sum(self.seconds.values())
        stages = {name: round(s, 5) for name, s in self.seconds.items()}
        rate = round(tokens / total, 1) if total else 0.0
        return {"step": step, "seconds": round(total, 5), "tokens_per_second": rate, **stages}


def explained_variance(values, targets, mask) -> float:
    """1 − Var(target − value) / Var(target) over masked positions [B, T]; 0 if targets are flat.

    Source: the critic-health measure of the PPO implementations.
    """
    v, g = values[mask].double(), targets[mask].double()
    if v.numel() < 2:
        return 0.0
    spread = g.var().item()
    return 1.0 - (g - v).var().item() / spread if spread > 1e-12 else 0.0
