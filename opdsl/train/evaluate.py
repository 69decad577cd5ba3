"""Accuracy on held-out prompts, greedy and sampled, with intervals.

Sampled accuracy at temperature 1 is reported beside greedy accuracy because they separate
methods: a student can be right at its mode and wrong almost everywhere else. The sampling
numbers of an evaluation depend on the seed only, not on the step, so that differences between
evaluations are differences between students.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opdsl.train.streams import torch_generator


@dataclass(frozen=True)
class Accuracy:
    """Right responses among judged ones, with the 95 % Wilson interval.

    errors: responses the verifier could not judge; they are in neither number.
    """

    right: float
    judged: int
    low: float
    high: float
    length: float  # mean response tokens
    finished: float  # share ended by the end token
    errors: int = 0

    @property
    def value(self) -> float:
        return self.right / self.judged if self.judged else float("nan")

    def to_json(self) -> dict[str, Any]:
        return {
            "accuracy": round(self.value, 6) if self.judged else None,
            "interval": [round(self.low, 6), round(self.high, 6)],
            "judged": self.judged,
            "length": round(self.length, 4),
            "finished": round(self.finished, 6),
            "errors": self.errors,
        }


def wilson(right: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion; (0, 1) without observations.

    Source: E. B. Wilson, JASA 22 (1927) 209–212.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(
    policy, data, prompts: Sequence[Any], *, greedy: bool, seed: int, chunk: int
) -> tuple[Accuracy, list[list[int]]]:
    """Accuracy of a policy on prompts, and its responses.

    policy(prompt ids, greedy=…, generator=…) samples responses; see `rollouts` in `step`.
    """
    right, judged, errors, tokens, finished = 0.0, 0, 0, 0, 0
    responses: list[list[int]] = []
    for start in range(0, len(prompts), chunk):
        part = prompts[start : start + chunk]
        generator = None if greedy else torch_generator(seed, "evaluation", start)
        out = policy([p.ids for p in part], greedy=greedy, generator=generator)
        tokens += int(out.lengths.sum())
        finished += int(out.finished.sum())
        rows = out.rows()
        responses += rows
        for verdict in data.judge(part, rows):
            if verdict.score is None:
                errors += 1
            else:
                right, judged = right + verdict.score, judged + 1
    low, high = wilson(right, judged)
    n = max(1, len(prompts))
    return Accuracy(right, judged, low, high, tokens / n, finished / n, errors), responses


def evaluate(
    policy, data, sets: dict[str, list[Any]], seed: int, chunk: int = 512
) -> dict[str, Any]:
    """{set name: {"greedy": Accuracy, "sampled": Accuracy}} for every held-out set."""
    result: dict[str, Any] = {}
    for name, prompts in sets.items():
        greedy, _ = accuracy(policy, data, prompts, greedy=True, seed=seed, chunk=chunk)
        sampled, _ = accuracy(policy, data, prompts, greedy=False, seed=seed, chunk=chunk)
        result[name] = {"greedy": greedy, "sampled": sampled}
    return result


def to_json(result: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {mode: acc.to_json() for mode, acc in modes.items()} for name, modes in result.items()
    }
