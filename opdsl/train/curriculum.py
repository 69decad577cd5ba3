"""Which prompts a step trains on, when that depends on how often the student gets them right.

    --curriculum pass_rate=0.1..0.9,rest=8

Every prompt has a *due* number; a step takes the prompts with the smallest. A prompt whose
running pass rate lies inside the band is due again one pass later, one outside `rest` passes
later (`rest=never`: when nothing else is left). So every prompt comes once before any comes
twice, hard and easy ones come back now and then to be looked at, and the draw is a pure function
of (seed, recorded state): the state is saved in checkpoints, and a resumed run draws the same.

Prompt weights by pass rate have been studied with weights p(1 − p) and K = 8 rollouts
(arXiv 2603.11178); a band is their coarsest form, and needs no weight in the loss.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from opdsl.train.errors import problem
from opdsl.train.streams import seed_for

NEVER = 1_000_000  # passes
# Steele, Lea and Flood, Fast splittable pseudorandom number generators (2014): the mixer.
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True)
class Band:
    """low, high: pass rates inside are trained on (ends included). after: judged responses before
    a prompt can be outside. rest: passes between two looks at one that is. memory: responses the
    running rate remembers."""

    low: float
    high: float
    after: int = 4
    rest: int = 8
    memory: int = 32


def parse_curriculum(text: str) -> Band:
    """`pass_rate=0.1..0.9,after=4,rest=8,memory=32`. Raises RunProblem OPD112."""
    words = {}
    for word in text.split(","):
        name, _, value = (part.strip() for part in word.partition("="))
        ends = re.fullmatch(r"(\d(?:\.\d{1,9})?)\s?\.\.\s?(\d(?:\.\d{1,9})?)", value)
        count = re.fullmatch(r"\d{1,6}", value)
        if name == "pass_rate" and ends and 0 <= float(ends[1]) < float(ends[2]) <= 1:
            words |= {"low": float(ends[1]), "high": float(ends[2])}
        elif name in ("after", "rest", "memory") and count and int(value) >= 1:
            words[name] = int(value)
        elif (name, value) == ("rest", "never"):
            words["rest"] = NEVER
        else:
            raise _bad(word)
    if "low" not in words:
        raise _bad(text)
    return replace(Band(0.0, 1.0), **words)


def _bad(word: str):
    return problem(
        "OPD112",
        f"--curriculum does not understand {word.strip()!r}",
        helps=["--curriculum pass_rate=0.1..0.9,after=4,rest=8,memory=32 (or rest=never)"],
        exit_code=2,
    )


class Curriculum:
    """The state of a curriculum over `rows` prompts.

    due [rows] int64: pass in which each comes next; count [rows] int32: responses judged;
    rate [rows] float64: running pass rate.
    """

    def __init__(self, band: Band, rows: int, seed: int):
        self.band, self.seed = band, seed_for(seed, "curriculum")
        self.due = np.zeros(rows, dtype=np.int64)
        self.count = np.zeros(rows, dtype=np.int32)
        self.rate = np.zeros(rows, dtype=np.float64)

    def draw(self, n: int) -> list[int]:
        """The next `n` prompts, in an order of their own; no prompt twice unless n > rows."""
        found: list[int] = []
        due = self.due
        while len(found) < n:
            wanted = min(n - len(found), len(due))
            found += self._smallest(due, wanted)
            if len(found) < n:
                due = due + self._stride(np.arange(len(due)))
        return found

    def record(self, drawn: Sequence[int], judged: Sequence[tuple[int, float]]) -> None:
        """After a step: the prompts it drew, and (prompt, score) of each judged response."""
        scores: dict[int, list[float]] = {}
        for index, score in judged:
            scores.setdefault(index, []).append(score)
        for index, values in scores.items():
            number = min(int(self.count[index]) + len(values), self.band.memory)
            weight = min(1.0, len(values) / number)
            self.rate[index] += (sum(values) / len(values) - self.rate[index]) * weight
            self.count[index] = min(int(self.count[index]) + len(values), 2**31 - 1)
        index = np.asarray(drawn, dtype=np.int64)
        # One drawn twice (a batch larger than the data) moves on twice.
        np.add.at(self.due, index, self._stride(index))

    def outside(self) -> np.ndarray:
        """[rows] bool: judged often enough, and not inside the band."""
        known = self.count >= self.band.after
        return known & ((self.rate < self.band.low) | (self.rate > self.band.high))

    def figures(self) -> dict[str, float]:
        """Shares of all prompts for `metrics.jsonl`: judged at all, too hard, too easy."""
        out, easy = self.outside(), self.rate > self.band.high
        rows = max(1, len(self.due))
        return {
            "curriculum_seen": int((self.count > 0).sum()) / rows,
            "curriculum_hard": int((out & ~easy).sum()) / rows,
            "curriculum_easy": int((out & easy).sum()) / rows,
        }

    # ---- state of a checkpoint -----------------------------------------------------------

    def state(self) -> dict:
        """Named tensors."""
        import torch

        arrays = {"due": self.due, "count": self.count, "rate": self.rate}
        return {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}

    def load_state(self, tensors: dict) -> None:
        """Raises RunProblem OPD705 for the state of another data set, or none."""
        rows = {name: len(t) for name, t in tensors.items()}
        if rows != dict.fromkeys(("due", "count", "rate"), len(self.due)):
            raise problem("OPD705", "the checkpoint holds no pass rates for these data")
        self.due = tensors["due"].numpy().copy()
        self.count = tensors["count"].numpy().copy()
        self.rate = tensors["rate"].numpy().copy()

    # ---- inside --------------------------------------------------------------------------

    def _stride(self, index: np.ndarray) -> np.ndarray:
        """Passes until each of these prompts comes again."""
        return np.where(self.outside()[index], self.band.rest, 1)

    def _smallest(self, due: np.ndarray, n: int) -> list[int]:
        """The n prompts with the smallest (due, hash), ordered by it."""
        limit = np.partition(due, n - 1)[n - 1]
        first, last = np.flatnonzero(due < limit), np.flatnonzero(due == limit)
        keys, wanted = self._hash(last, due[last]), n - len(first)
        if wanted < len(last):  # among equals the smallest hashes; no sort of all of them
            last = last[np.argpartition(keys, wanted - 1)[:wanted]]
        chosen = np.concatenate([first, last])
        order = np.lexsort((self._hash(chosen, due[chosen]), due[chosen]))
        return chosen[order].tolist()

    def _hash(self, index: np.ndarray, due: np.ndarray) -> np.ndarray:
        """A pseudo-random 64-bit number for each (seed, prompt, pass): the order within a pass."""
        with np.errstate(over="ignore"):
            x = np.uint64(self.seed) + index.astype(np.uint64) * np.uint64(_GOLDEN)
            for salt in (due.astype(np.uint64), np.uint64(1)):
                x = x + salt * np.uint64(_GOLDEN)
                x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
                x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
                x = x ^ (x >> np.uint64(31))
        return x
