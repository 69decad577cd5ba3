"""From rows to outcomes: verdicts, what could not be judged, statistics of the groups.

A verdict that is an error is never a reward of 0: its row is left out where the method needs
outcomes, counted either way, and said once for each reason.

Shapes: B rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from opdsl.train.errors import GuardStop
from opdsl.train.states import Rows
from opdsl.train.verify import Verdict

SILENT_STEPS = 3  # steps in a row without a single verdict, after which the verifier is broken
REASONS = 20  # different reasons that are counted apart
DOMAINS = 12  # different values of the field `domain` with figures of their own


@dataclass
class Outcomes:
    """Judges the rows of each step.

    needed: whether the method reads outcomes. counts, said: the run's counters and its lines for
    the user. silent: steps in a row in which no response could be judged.
    """

    data: Any
    needed: bool
    counts: dict[str, int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    silent: int = 0

    def __call__(
        self, rows: Rows, step: int
    ) -> tuple[Rows, torch.Tensor | None, dict[str, float | None]]:
        """(rows, outcomes [B] or None without a verifier, figures for the step's record).

        Rows without a verdict are left out if outcomes are needed, else their outcome is NaN.
        Raises GuardStop after SILENT_STEPS steps without any verdict that the method needs.
        """
        if not self.data.verifiable:
            return rows, None, {}
        own = rows.own.tolist()
        verdicts = self.data.judge(rows.prompts, rows.responses) if len(rows) else []
        mine = [i for i, o in enumerate(own) if o]
        scores = [verdicts[i].score for i in mine]
        record = dict(self.data.finish(step, [rows.prompts[i] for i in mine], scores))
        if not verdicts:
            return rows, None, record
        self._count(verdicts, step)
        values = [math.nan if v.score is None else float(v.score) for v in verdicts]
        outcome_B = torch.tensor(values, device=rows.tokens.device)
        record |= group_statistics(rows, outcome_B) | by_domain(rows, outcome_B)
        if self.needed:
            judged = [i for i, v in enumerate(verdicts) if v.score is not None]
            rows = rows.select(judged, "verifier error")
            outcome_B = outcome_B[torch.tensor(judged, dtype=torch.long, device=outcome_B.device)]
        return rows, outcome_B, record

    def memory(self) -> dict[str, int]:
        return {"silent": self.silent}

    def remember(self, record: Mapping[str, int]) -> None:
        self.silent = int(record.get("silent", 0))

    def _count(self, verdicts: Sequence[Verdict], step: int) -> None:
        errors = [v.error for v in verdicts if v.score is None]
        self.silent = self.silent + 1 if len(errors) == len(verdicts) else 0
        for error in errors:
            key = f"verifier errors: {error}"
            known = sum(k.startswith("verifier errors: ") for k in self.counts)
            if key not in self.counts and known >= REASONS:
                key = "verifier errors: other reasons"
            if key not in self.counts and known < 5:
                self.said.append(f"warning   step {step + 1}: a response has no verdict: {error}")
            self.counts[key] = self.counts.get(key, 0) + 1
        if self.needed and self.silent >= SILENT_STEPS:
            raise GuardStop(
                "the verifier",
                step + 1,
                None,
                None,
                f"{len(errors)} responses of this step; the first: {errors[0]}",
                code="OPD720",
                says=f"has given no verdict for {self.silent} steps in a row",
                cures=("try it on one response by hand, then continue with --resume",),
                skippable=False,
            )


def group_statistics(rows: Rows, outcome_B: torch.Tensor) -> dict[str, float]:
    """Pass rates of the student's groups (the rows of one prompt, two or more judged ones).

    groups: how many. groups_right, groups_wrong: shares in which every response scores 1, 0, so
    that a baseline of the group leaves nothing. groups_mixed: the rest. pass_rate_min, _max: of a
    group. group_std: standard deviation inside a group, averaged.
    """
    found: dict[int, list[float]] = {}
    use_B = rows.own & ~torch.isnan(outcome_B)
    for group, score, use in zip(rows.group.tolist(), outcome_B.tolist(), use_B.tolist()):
        if use:
            found.setdefault(group, []).append(score)
    groups = [scores for scores in found.values() if len(scores) > 1]
    if not groups:
        return {}
    rates = [sum(g) / len(g) for g in groups]
    right, wrong = sum(min(g) == 1.0 for g in groups), sum(max(g) == 0.0 for g in groups)
    spread = [math.sqrt(sum((s - rate) ** 2 for s in g) / len(g)) for g, rate in zip(groups, rates)]
    n = len(groups)
    return {
        "groups": n,
        "groups_right": right / n,
        "groups_wrong": wrong / n,
        "groups_mixed": (n - right - wrong) / n,
        "pass_rate_min": min(rates),
        "pass_rate_max": max(rates),
        "group_std": math.fsum(spread) / n,
    }


def by_domain(rows: Rows, outcome_B: torch.Tensor) -> dict[str, float | None]:
    """Mean reward for each value of the field `domain`, if the data have two to DOMAINS."""
    found: dict[str, list[float]] = {}
    for prompt, score, own in zip(rows.prompts, outcome_B.tolist(), rows.own.tolist()):
        domain = prompt.fields.get("domain")
        if own and domain is not None and not math.isnan(score):
            found.setdefault(domain, []).append(score)
    if not 2 <= len(found) <= DOMAINS:
        return {}
    return {f"reward/{d[:40]}": math.fsum(s) / len(s) for d, s in sorted(found.items())}
