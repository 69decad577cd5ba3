"""Guards with a limit and a choice: what is watched over the steps of a run, and what is done.

    log_ratio     |log T(y) − log student(y)| of a sampled token, nats
    flat_teacher  entropy of a teacher as a share of ln V, at every measured position
    length        mean response length, times that of the first steps, once half are cut off
    idle          steps in a row that changed no weight

`--guard NAME=LIMIT:ACTION` sets one: `log_ratio=30:halt`, `length=off`, `idle=10`. A guard that
warns says so once and counts every time; one that halts stops before the update, exit code 4.

Numbers that are not finite are not here: they always stop (see `guards`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from opdsl.train.errors import GuardStop, problem

ACTIONS = ("halt", "warn", "off")
FIRST_STEPS = 5  # whose mean length is the measure of later ones


@dataclass(frozen=True)
class Rule:
    """Above `limit` the action is taken."""

    limit: float
    action: str


DEFAULTS: dict[str, Rule] = {
    "log_ratio": Rule(50.0, "warn"),
    # Zeroed or lost weights give exactly ln V, and that always halts; untrained ones come near.
    "flat_teacher": Rule(0.97, "warn"),
    "length": Rule(4.0, "warn"),
    "idle": Rule(50, "halt"),
}
UNIFORM = 1.0 - 1e-5  # share of ln V above which a teacher says nothing at all

CURES = {
    "log_ratio": "bound it in the spec (`shape clip(-5, 5)`), lower --lr, or check that student"
    " and teacher read the same tokens",
    "flat_teacher": "check the teacher's files: weights that were not found are initialised anew"
    " or left at zero",
    "length": "a smaller --max-tokens or --lr; see `finished` in metrics.jsonl for when it began",
    "idle": "look at `counts` in the report: rows without tokens, gates that are always closed,"
    " a verifier that judges all alike",
}


def parse_guard(text: str) -> tuple[str, Rule]:
    """`NAME=LIMIT`, `NAME=ACTION` or `NAME=LIMIT:ACTION`. Raises RunProblem OPD119 or OPD112."""
    name, _, value = (part.strip() for part in text.partition("="))
    name = name.replace("-", "_")
    if name not in DEFAULTS:
        near = difflib.get_close_matches(name, DEFAULTS, n=1)
        raise problem(
            "OPD119",
            f"there is no guard `{name}`",
            helps=[f"did you mean `{near[0]}`?"] if near else [f"guards: {', '.join(DEFAULTS)}"],
        )
    rule = DEFAULTS[name]
    for word in value.split(":"):
        try:
            rule = (
                replace(rule, action=word)
                if word in ACTIONS
                else replace(rule, limit=_positive(word))
            )
        except ValueError:
            raise problem(
                "OPD112",
                f"--guard {text}: {word!r} is neither a number above 0 nor halt, warn, off",
                helps=[f"--guard {name}={DEFAULTS[name].limit:g}:halt"],
            ) from None
    return name, rule


def _positive(word: str) -> float:
    value = float(word)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(word)
    return value


def rules(chosen: Mapping[str, Rule]) -> dict[str, Rule]:
    return {**DEFAULTS, **chosen}


@dataclass
class Watch:
    """The rules of a run, what they remember, and what they have to say.

    first: mean lengths of the first steps. idle: steps in a row without a change. said: lines
    for the user, taken out by the loop. counts: the run's counters, shared with the engine.
    """

    rules: dict[str, Rule] = field(default_factory=lambda: dict(DEFAULTS))
    counts: dict[str, int] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    idle: int = 0
    said: list[str] = field(default_factory=list)

    def met(
        self,
        name: str,
        message: str,
        says: str,
        step: int,
        row: int | None,
        position: int | None,
        note: str,
        *,
        always: bool = False,
    ) -> None:
        """A limit was passed: stop, or say it once and count. always: stop unless off."""
        action = self.rules[name].action
        if action == "off":
            return
        stop = GuardStop(
            message, step, row, position, note, code="OPD720", says=says, cures=(CURES[name],)
        )
        if action == "halt" or always:
            raise stop
        key = f"warnings of the guard {name}"
        if key not in self.counts:
            self.said.append(f"warning   {stop.message}; {note}; {CURES[name]}")
        self.counts[key] = self.counts.get(key, 0) + 1

    def over(self, name: str, value: float) -> bool:
        """Whether a value is above a guard's limit; NaN is not a matter for limits."""
        rule = self.rules[name]
        return rule.action != "off" and value > rule.limit

    def lengths(
        self, record: Mapping[str, Any], step: int, longest: Callable[[], tuple[int, str]]
    ) -> None:
        """Compare the mean length of a step (`length`, `finished` of its record) with the first.

        longest: gives the longest row and its text.
        """
        length = record.get("length")
        if length is None:
            return
        if len(self.first) < FIRST_STEPS:
            self.first.append(float(length))
            return
        usual = sum(self.first) / len(self.first)
        if self.over("length", length / max(usual, 1e-9)) and record["finished"] < 0.5:
            row, note = longest()
            self.met(
                "length",
                f"the mean response length ({length:.1f} tokens)",
                f"is {length / usual:.1f} times that of the first steps ({usual:.1f}), and"
                f" {1 - record['finished']:.0%} of the responses are cut off",
                step, row, None, note,
            )  # fmt: skip

    def change(self, changed: bool, why: str, step: int, note: str) -> None:
        """Whether a step moved a weight; `why` not, if it did not."""
        self.idle = 0 if changed else self.idle + 1
        if self.idle and self.over("idle", self.idle):
            self.met(
                "idle",
                "no weight",
                f"has changed for {self.idle} steps in a row ({why})",
                step, None, None, note,
            )  # fmt: skip

    # ---- checkpoints -----------------------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        return {"first": self.first, "idle": self.idle}

    def remember(self, record: Mapping[str, Any]) -> None:
        self.first = [float(x) for x in record.get("first", ())]
        self.idle = int(record.get("idle", 0))
