"""One optimizer step: rows → scores → batch → loss → gradient → update.

Everything a method asks for (teachers, the initial policy, outcomes, groups, critic values, a
golden batch) is computed here from `method.needs`; nothing looks at the method's name.

Rows may be processed in smaller parts (`micro_batch`). The trunk is then run twice: once
without gradient for all rows, so that the loss sees the whole batch and its normalisers, and
once per part to carry the gradient of the states back. The result does not depend on the split.

Shapes: B rows, T response tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from opdsl.train import guards
from opdsl.train.critic import Critic, lambda_returns
from opdsl.train.errors import BatchDropped, GuardStop
from opdsl.train.forward import Cut, Forward
from opdsl.train.memory import within_memory
from opdsl.train.meters import Meters
from opdsl.train.metrics import Stopwatch
from opdsl.train.opd_metrics import merged
from opdsl.train.outcomes import Outcomes
from opdsl.train.rewards import Rewards
from opdsl.train.rollout import NonFiniteLogits
from opdsl.train.runtime import Runtime
from opdsl.train.settings import Recipe
from opdsl.train.states import Rows, States, sequence_rows
from opdsl.train.teachers import Teacher
from opdsl.train.teachers.asked import complete, student_ids, waits
from opdsl.train.watch import Watch


@dataclass
class Engine:
    """Everything one step needs. Built once by the loop; `micro_batch` may shrink in a run.

    counts: dropped rows, idle and skipped steps, by reason. rows: those of the step in progress,
    for the record of a batch that a guard stops. moved: whether the step in progress has already
    changed the student (in a later one of several epochs).
    """

    method: Any
    forward: Forward
    teachers: dict[str, Teacher]
    initial: Teacher | None
    critics: list[Critic]
    states: States
    data: Any
    recipe: Recipe
    runtime: Runtime
    micro_batch: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    rows: Rows | None = None
    moved: bool = False
    watched: Watch = field(default_factory=Watch)
    meters: Meters | None = None

    def __post_init__(self) -> None:
        student = self.forward.student
        student.zero_grad(set_to_none=True)  # a model trained a moment ago still has its last one
        named = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
        self.names = [n for n, _ in named]
        self.parameters = [p for _, p in named]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.recipe.lr,
            betas=(self.recipe.beta1, self.recipe.beta2),
            weight_decay=self.recipe.weight_decay,
            fused=True,
        )
        self.rewards = Rewards(self.method) if self.critics else None
        self.watched.counts = self.counts
        for teacher in self.teachers.values():
            if hasattr(teacher, "count"):  # teachers outside this process say what was lost
                teacher.count = self._count  # type: ignore[attr-defined]
        self.outcomes = Outcomes(
            self.data, self.method.needs.outcome, self.counts, self.watched.said
        )

    def step(self, step: int, watch: Stopwatch) -> dict[str, Any]:
        """Train on the batch of one step (0, 1, …); returns the record for `metrics.jsonl`.

        Negative steps are the critics' warm-up: the student does not move.
        """
        self.rows, self.moved = None, False
        with watch("rollouts"):
            self.rows = self._drawn(step)
        with watch("verifier"):
            rows, outcome_B, judged = self.outcomes(self.rows, step)
        self.rows = rows
        for reason, count in rows.dropped.items():
            self._count(f"rows dropped: {reason}", count)
        record: dict[str, Any] = {"step": step + 1, "rows": len(rows)} | judged
        if len(rows) == 0:
            self._count("steps without a usable row")
            if step >= 0:
                why = ", ".join(f"{n} {reason}" for reason, n in rows.dropped.items())
                self.watched.change(False, f"rows dropped: {why}", step + 1, self._first(step))
            return record
        try:
            with watch("teachers"):
                given = self._given(rows, outcome_B, step)
            record |= guards.describe(rows, outcome_B)
            self.watched.lengths(record, step + 1, lambda: guards.longest(rows, self.data))
            if step >= 0:
                record |= self._update(rows, given, step, watch)
            if self.critics:
                with watch("critic"):
                    record |= self._learn_values(rows, given, step)
        except BatchDropped as drop:  # before its gradient: nothing of the batch was used
            self._count(f"steps {drop.what}")
            self.watched.said.append(f"step {step + 1} was left out: {drop.message}")
            record["dropped"] = drop.message
        return record

    # ---- what the loss takes as given --------------------------------------------------------

    def _drawn(self, step: int) -> Rows:
        """The rows of a step; memory that runs out is seen to by `States`."""
        try:
            doing = (step + 1, "sampling responses")
            rows = within_memory(lambda: self.states.rows(step), place=doing)
        except NonFiniteLogits as bad:
            what = "the output of the policy that was sampled"
            raise GuardStop(what, step + 1, bad.row, bad.position, self._first(step)) from None
        if self.states.halved:
            self._count("times memory ran out (rows sampled halved)", self.states.halved)
            self.states.halved = 0
        return rows

    def _first(self, step: int) -> str:
        """The first prompt of a step's batch, where no row is left to name."""
        prompt = self.data.prompts(step, self.states.count)[0]
        return f"the batch began with the prompt {self.data.prompt_text(prompt)[:80]!r}"

    def _scored(self, teacher: Teacher, rows: Rows, step: int, ids_BTK=None):
        """A teacher's scores, guarded, with half the rows at a time whenever memory runs out."""

        def smaller() -> bool:
            size = min(getattr(teacher, "chunk", 1) or len(rows), len(rows))
            if size > 1:
                teacher.chunk = (size + 1) // 2  # type: ignore[attr-defined]
                self._count("times memory ran out (rows per teacher pass halved)")
            return size > 1

        scores = within_memory(
            lambda: teacher.score(rows.prompts, rows.tokens, rows.lengths, ids_BTK),
            smaller,
            (step + 1, f"teacher {teacher.name} scored"),
        )
        guards.guard_scores(
            f"the score of teacher {teacher.name}", scores, rows, step + 1, self.data
        )
        return scores

    def _given(self, rows: Rows, outcome_B, step: int) -> dict[str, Any]:
        """Teacher scores (guarded), initial policy, critic values, golden rows."""
        needs, given = self.method.needs, {"teachers": {}, "outcome": outcome_B}
        for name, teacher in self.teachers.items():
            if not waits(teacher):  # the others are asked once the student's lists are known
                given["teachers"][name] = self._scored(teacher, rows, step)
        if needs.initial and self.initial is not None:
            given["initial"] = self._scored(self.initial, rows, step)
        ids = [p.ids for p in rows.prompts]
        given["values"] = {
            c.name: c.values(ids, rows.tokens, rows.lengths, rows.finished) for c in self.critics
        }
        if needs.special:
            special = torch.tensor(sorted(self.data.special_ids), device=rows.tokens.device)
            given["special"] = torch.isin(rows.tokens, special)
        if needs.golden:
            golden = sequence_rows(
                self.data.golden(step, self.states.count), self.data.pad, self.runtime.device
            )
            usable = [i for i, n in enumerate(golden.lengths.tolist()) if n > 0]
            given["golden"] = golden.select(usable, "empty")
        return given

    def _with_lists(self, rows: Rows, given: dict, live, step: int) -> dict[str, Any]:
        """`given` with the teachers that are asked about lists of the student as it is now."""
        if not any(map(waits, self.teachers.values())):
            return given
        found = complete(
            self.teachers,
            given["teachers"],
            given.get("initial"),
            lambda k: student_ids(self.forward, live, k),
            lambda teacher, ids_BTK: self._scored(teacher, rows, step, ids_BTK),
        )
        return given | {"teachers": found}

    # ---- the update ----------------------------------------------------------------------------

    def _update(self, rows: Rows, given: dict[str, Any], step: int, watch) -> dict[str, Any]:
        """One optimizer step, or `epochs` of them on the same rows; metrics of the first."""
        record: dict[str, Any] = {}
        lr, moved = self.recipe.lr_at(step), False
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for epoch in range(self.recipe.epochs):
            self.moved = epoch > 0
            with watch("loss and gradient"):
                measured = self._gradient_within_memory(rows, given, step)
            with watch("optimizer"):
                limit = self.recipe.clip_grad or math.inf
                norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
                if not math.isfinite(norm):
                    raise guards.bad_gradient(self.names, self.parameters, step + 1)
                if epoch == 0:  # later passes see a student that has moved
                    record |= measured | {"grad_norm": norm, "lr": lr}
                if norm == 0.0:
                    # Nothing asked for a change; Adam's memory of earlier steps must not act.
                    self._count("steps with zero gradient")
                else:
                    moved = True
                    self.optimizer.step()
                    for teacher in self.teachers.values():
                        teacher.after_update()
                self.optimizer.zero_grad(set_to_none=True)
        note = guards.sample_note(rows, 0, self.data)
        self.watched.change(moved, "their gradient was zero", step + 1, note)
        return record

    def _gradient_within_memory(self, rows: Rows, given: dict, step: int) -> dict[str, Any]:
        """The gradient, with half the rows at a time whenever memory runs out."""

        def size() -> int:
            return min(self.micro_batch or len(rows), len(rows))

        def gradient() -> dict[str, Any]:
            if size() < len(rows):
                return self._gradient_in_parts(rows, given, step, size())
            return self._gradient(rows, given, step)

        def smaller() -> bool:
            self.optimizer.zero_grad(set_to_none=True)
            if size() == 1:
                return False
            self.micro_batch = (size() + 1) // 2
            self._count("times memory ran out (rows per pass halved)")
            return True

        return within_memory(gradient, smaller, (step + 1, "computing the gradient"))

    def _measured(self, rows: Rows, states, given: dict, parts, step: int) -> dict[str, Any]:
        """What is watched beside the loss; nothing of it enters the update."""
        forward, teachers, meters = self.forward, given["teachers"], self.meters

        def looking(name: str, at: tuple, logp_NV, logq_NV) -> None:
            guards.look(self.watched, name, rows, at, logp_NV, logq_NV, step + 1, self.data)
            if meters is not None:
                meters.see(name, step, logp_NV, logq_NV)

        found = guards.measure(forward, rows, states, teachers, looking)
        for name, scores in teachers.items():
            if not scores.whole:
                guards.look_at_list(self.watched, name, rows, scores, step + 1, self.data)
        more = meters(forward, rows, states, teachers, parts, step) if meters is not None else {}
        return found | more

    def _gradient(self, rows: Rows, given: dict, step: int) -> dict[str, Any]:
        """Leave d loss / d parameters in `.grad`; returns loss and metrics."""
        module, forward, golden = self.method.loss, self.forward, given.get("golden")
        states = forward.states(rows)
        guards.guard_scores("the student's output", states, rows, step + 1, self.data)
        live_golden = forward.live(forward.states(golden)) if golden else None
        live = forward.live(states)
        given = self._with_lists(rows, given, live, step)
        batch = forward.batch(rows, states, live, given, live_golden, self.method.needs, step)
        result = module(batch)
        loss = float(result.loss.detach())
        guards.guard_loss(loss, module, batch, rows, step + 1, self.data)
        if result.loss.requires_grad:  # a batch without a trainable token has a constant loss
            self.runtime.backward(result.loss)
        measured = self._measured(rows, states, given, [batch], step)
        return _record(loss, measured, result.metrics)

    def _gradient_in_parts(self, rows: Rows, given: dict, step: int, size: int) -> dict[str, Any]:
        """The same gradient with `size` rows in the trunk's graph at a time.

        Stages are cut off from one another by leaves: trunk → states → (logits →) loss. The loss
        is taken part by part with the whole batch's normalisers; `Cut` carries gradients back.
        """
        module, forward, golden = self.method.loss, self.forward, given.get("golden")
        main = Cut(forward, rows, size)
        guards.guard_scores("the student's output", main.states, rows, step + 1, self.data)
        given = self._with_lists(rows, given, main.leaf, step)
        rest = Cut(forward, golden, size) if golden else None
        live_golden = rest.leaf if rest else None
        batch = forward.batch(
            rows, main.states.detach(), main.leaf, given, live_golden, self.method.needs, step
        )
        parts = batch.split(math.ceil(len(rows) / size))
        losses, metrics = [], []
        for i, (part, context) in enumerate(zip(parts, module.prepare(parts))):
            result = module(part, context)
            losses.append(float(result.loss.detach()))
            metrics.append(result.metrics)
            if math.isfinite(losses[-1]) and result.loss.requires_grad:
                # The cast of the head's weight, where there is one, is shared by the parts.
                result.loss.backward(retain_graph=i + 1 < len(parts))
        loss = math.fsum(losses)
        guards.guard_loss(loss, module, batch, rows, step + 1, self.data)
        for cut in (main, rest):
            if cut is not None:
                cut.backward()
        measured = self._measured(rows, main.states, given, parts, step)
        return _record(loss, measured, merged(metrics))

    # ---- critics ---------------------------------------------------------------------------------

    def _learn_values(self, rows: Rows, given: dict, step: int) -> dict[str, float]:
        gamma, lam = self.method.gae or (1.0, 1.0)
        reward_BT = self._reward(rows, given, step)
        record: dict[str, float] = {}
        ids = [p.ids for p in rows.prompts]
        for critic in self.critics:
            values_BT = given["values"][critic.name]
            target_BT = lambda_returns(reward_BT, values_BT, rows.mask, gamma, lam)
            try:
                found = critic.learn(
                    ids, rows.tokens, rows.lengths, rows.mask, target_BT, values_BT
                )
            except FloatingPointError as error:
                raise GuardStop(str(error), step + 1, None, None, "critic update") from None
            prefix = "" if len(self.critics) == 1 else f"{critic.name}/"
            record |= {prefix + key: value for key, value in found.items()}
        return record

    @torch.no_grad()
    def _reward(self, rows: Rows, given: dict, step: int) -> torch.Tensor:
        """The method's frozen reward per token [B, T]: what its critic's returns are made of."""
        states = self.forward.states(rows)
        live = self.forward.live(states)
        given = self._with_lists(rows, given, live, step)
        batch = self.forward.batch(rows, states, live, given, None, self.method.needs, step)
        return self.rewards(batch, rows.mask)

    def _count(self, what: str, n: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + n


def _record(loss: float, measured: dict[str, Any], metrics: dict[str, float]) -> dict[str, Any]:
    """One step's figures: the loss, what was measured beside it, the method's own metrics."""
    own = {k: v for k, v in metrics.items() if k not in ("loss", "tokens")}
    return {"loss": loss} | measured | own
