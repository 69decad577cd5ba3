"""The training loop, in one sitting.

    plan → lock the folder → load → (resume) → for each step: rows, scores, loss, update,
    evaluation, checkpoint → report and export

`train` is the one public function. Everything random is a pure function of (seed, stream,
step), so a run stopped at any point and resumed equals the uninterrupted one bit for bit on
the same machine.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opdsl.train import checkpoint, durable, evaluate, streams
from opdsl.train.errors import GuardStop, Interrupted, RunProblem, TeacherLost, problem
from opdsl.train.metrics import Lines, Stopwatch, read_lines, to_line
from opdsl.train.mishaps import explained
from opdsl.train.plan import Plan, make_plan
from opdsl.train.progress import Progress, Silent
from opdsl.train.runtime import Signals, threads_for
from opdsl.train.settings import RunSettings
from opdsl.train.sinks import Sinks
from opdsl.train.sinks import check as check_sinks

SAMPLES = 6  # held-out prompts whose responses are shown in the report


@dataclass(frozen=True)
class Summary:
    """What a run did; also the content of `summary.json`.

    evals: records of `evals.jsonl`, {"step", "sets": {set: {"greedy" | "sampled": …}}}.
    seconds: wall time of loading, training and evaluating in this process.
    """

    method: str
    title: str
    fingerprints: dict[str, str]
    task: str | None
    student: str
    teachers: dict[str, str]
    data: str | None
    seed: int
    pair_seed: int
    steps: int
    rows_per_step: int
    parameters: int
    device: str
    evals: list[dict[str, Any]]
    last: dict[str, Any]
    counts: dict[str, int]
    notes: list[str]
    seconds: dict[str, float]
    out: str
    files: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)

    @classmethod
    def read(cls, path: Path) -> Summary:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def at(self, step: int, mode: str = "greedy", name: str = "held-out") -> dict[str, Any] | None:
        """The accuracy record measured after `step` steps, or None."""
        for record in self.evals:
            if record["step"] == step and name in record["sets"]:
                return record["sets"][name][mode]
        return None


def train(method, settings: RunSettings, progress: Progress | None = None) -> Summary:
    """Train a student by a method and write everything about it to the output folder.

    method: what `opdsl.load` returns. Raises RunProblem (see `errors`) for what cannot be run,
    GuardStop for a non-finite number, Interrupted after a signal; in the last two cases the
    newest checkpoint is good and `resume=True` continues from it.
    """
    progress = progress or Silent()
    check_sinks(settings.log)
    plan = make_plan(method, settings)
    _check_folder(plan)
    with checkpoint.FolderLock(plan.out):
        for line in plan.lines():
            progress.note(line)
        return _Run(method, plan, progress).run()


def _check_folder(plan: Plan) -> None:
    """An earlier run in the folder is never overwritten by accident."""
    used = (plan.out / "metrics.jsonl").exists() or (plan.out / "checkpoints").exists()
    if used and not plan.settings.resume:
        raise problem(
            "OPD704",
            f"{plan.out} holds an earlier run",
            helps=["--resume to continue it, or another --out to start afresh"],
            exit_code=2,
        )
    if plan.out.exists() and not plan.out.is_dir():
        raise problem("OPD704", f"the output folder {plan.out} is a file", helps=["--out DIR"])


class _Run:
    """One call of `train`: its files, its session, its place in the run."""

    def __init__(self, method, plan: Plan, progress: Progress):
        self.method, self.plan, self.progress = method, plan, progress
        self.out = plan.out
        self.lost: dict[str, int] = {}  # records that sinks did not take
        self.latest: dict[str, float] = {}  # held-out accuracy, for the progress display
        self.seconds = {"loading": 0.0, "training": 0.0, "evaluating": 0.0}
        self.place = (0, "loading the models")  # step and what is done, for messages

    def run(self) -> Summary:
        """The whole run. A full disk and exhausted memory end it with a message."""
        try:
            with streams.callers_generators_kept():
                return self._run()
        except RunProblem:
            raise
        except Exception as error:
            told = explained(error, self.out, self.place)
            if told is None:
                raise
            raise told from None

    def _run(self) -> Summary:
        from opdsl.train import resume  # these two import torch; the plan above does not
        from opdsl.train.setup import build

        began = time.perf_counter()
        known = set(self.plan.notes)
        self.session = build(self.method, self.plan, self.progress)
        self.plan = self.session.plan
        self.engine = self.session.engine
        self.notes = [*self.plan.notes, *self.session.data.notes]
        for note in self.notes:
            if note not in known:
                self.progress.note(f"note      {note}")
        self.sets = self.session.data.held_out()
        if self.plan.settings.eval_prompts:
            self.sets = {n: p[: self.plan.settings.eval_prompts] for n, p in self.sets.items()}
        first = resume.load(self.session, self.progress.note)
        self.notes += self.session.changes
        self.seconds["loading"] = time.perf_counter() - began
        finished = self.out / "summary.json"
        if first >= self.plan.recipe.steps and finished.exists():
            self.progress.note(f"this run is already complete ({first} steps)")
            return Summary.read(finished)
        with (
            threads_for(self.session.parameters, self.session.runtime.device.type),
            ExitStack() as files,
        ):
            keep = first if first else None
            self.metrics, self.evals, self.timings, self.samples = (
                Lines(self.out / f"{name}.jsonl", keep)
                for name in ("metrics", "evals", "timings", "samples")
            )
            for lines in (self.metrics, self.evals, self.timings, self.samples):
                files.callback(lines.close)
            self._open_sinks(files, first)
            self._write_plan()
            with Signals() as signals:
                self._steps(first, signals)
        return self._finish()

    def _save(self, done: int) -> Path:
        """Records first, so that no checkpoint is ahead of the lines that belong to it."""
        from opdsl.train import resume

        for lines in (self.metrics, self.evals, self.timings, self.samples):
            durable.sync_file(lines.path)
        return resume.save(self.session, done)

    # ---- the loop ----------------------------------------------------------------------------

    def _steps(self, first: int, signals: Signals) -> None:
        steps = self.plan.recipe.steps
        if first == 0:
            self._evaluate(0)
        self.progress.begin(steps, first)
        warmup = max((c.warmup for c in self.engine.critics), default=0)
        start = first if first else -warmup
        for teacher in self.engine.teachers.values():
            if hasattr(teacher, "stopped"):  # one that may wait for its server
                teacher.stopped = lambda: signals.stop is not None  # type: ignore[attr-defined]
        for step in range(start, steps):
            try:
                self._one_step(step)
            except TeacherLost:
                self._leave(step, step > max(first, 0) and not self.engine.moved, signals)
                raise
            done = step + 1
            if step >= 0 and done in self.plan.evals:
                self._evaluate(done)
            last, place = done == steps, None
            due = done % self.plan.save_every == 0 or last or signals.save
            if step >= 0 and (due or signals.stop is not None):
                signals.save = False
                place = self._save(done)
            if signals.stop is not None and not last:
                raise Interrupted(signals.stop, max(done, 0), str(place) if place else None)

    def _leave(self, done: int, whole: bool, signals: Signals) -> None:
        """A teacher is gone: keep the student as it stands, unless a step has half changed it."""
        place = self._save(done) if whole else None
        if place is not None:
            self.progress.note(f"saved after step {done} in {place}")
        if signals.stop is not None:
            raise Interrupted(signals.stop, max(done, 0), str(place) if place else None) from None

    def _one_step(self, step: int) -> None:
        watch, old = Stopwatch(), self.session.old
        if old is not None and step >= 0:
            old.before_update(step)
        began = time.perf_counter()
        self.place = (step + 1, "updating")
        streams.seed_everything(self.plan.seed, step)
        try:
            record = self.engine.step(step, watch)
        except GuardStop as stop:
            self._dump(stop)
            skipped = self.engine.counts.get("steps skipped: not finite", 0)
            if not stop.skippable or skipped >= self.plan.settings.skip_nonfinite:
                raise
            self.engine.counts["steps skipped: not finite"] = skipped + 1
            record = {"step": step + 1, "skipped": stop.message}
            self.progress.note(stop.message + "; step skipped")
        for line in self.engine.watched.said:
            self.progress.note(line)
        self.engine.watched.said.clear()
        if old is not None and step >= 0:
            old.after_step(step)
        self.seconds["training"] += time.perf_counter() - began
        self.metrics.write(record)
        self._write_measured(watch)
        timing = watch.record(step + 1, record.get("tokens", 0))
        self.timings.write(timing)
        self.sinks.step(record, timing)
        self.progress.step(step, record | self.latest, timing["tokens_per_second"])

    def _open_sinks(self, files: ExitStack, first: int) -> None:
        """`--log`; whatever becomes of a sink, the run goes on."""
        config = self.plan.decides() | {"method": self.plan.method, **self.plan.fingerprints}
        self.sinks = Sinks(self.plan.settings.log, self.out, config, first, self.progress.note)
        files.callback(lambda: self.lost.update(self.sinks.close()))

    def _write_measured(self, watch: Stopwatch) -> None:
        """Token records of this step, and what measuring cost, under its own name."""
        if self.engine.meters is not None:
            seconds, samples = self.engine.meters.take()
            watch.move("loss and gradient", "measuring", seconds)
            for sample in samples:
                self.samples.write(sample)

    def _evaluate(self, done: int) -> None:
        """Measure held-out accuracy after `done` steps and write it to `evals.jsonl`."""
        if not self.sets:
            return
        self.place = (done, "evaluating")
        began = time.perf_counter()
        result = evaluate.evaluate(
            self.session.sample, self.session.data, self.sets, self.plan.seed
        )
        line: dict[str, Any] = {"step": done, "sets": evaluate.to_json(result)}
        main = next(iter(self.sets.values()))[:SAMPLES]
        rows = self.session.sample([p.ids for p in main], greedy=True).rows()
        line["samples"] = [self.session.data.response_text(row) for row in rows]
        self.evals.write(line)
        self.sinks.evaluation(done, line["sets"])
        self.seconds["evaluating"] += time.perf_counter() - began
        name, modes = next(iter(result.items()))
        if modes["greedy"].judged:
            self.latest = {"accuracy": modes["greedy"].value}
            self.progress.note(
                f"after step {done}: {name} accuracy greedy {modes['greedy'].value:.1%},"
                f" sampled {modes['sampled'].value:.1%}"
            )

    # ---- endings ---------------------------------------------------------------------------------

    def _dump(self, stop: GuardStop) -> None:
        """Keep the batch a guard stopped, for inspection; failing to do so is not an error."""
        rows = self.engine.rows
        self.engine.optimizer.zero_grad(set_to_none=True)
        if rows is None:
            return
        record = {
            "message": stop.message,
            "step": stop.step,
            "row": stop.row,
            "position": stop.position,
            "prompts": [self.session.data.prompt_text(p) for p in rows.prompts],
            "prompt_ids": [list(map(int, p.ids)) for p in rows.prompts],
            "responses": rows.responses,
            "logprobs": rows.logprobs.tolist(),
        }
        try:
            place = self.out / f"bad-batch-step-{stop.step:06d}.json"
            place.write_text(to_line(record), encoding="utf-8")
            self.progress.note(f"the batch was written to {place}")
        except OSError:
            pass

    def _shown_prompts(self) -> list[str]:
        prompts = next(iter(self.sets.values()), [])[:SAMPLES]
        return [self.session.data.prompt_text(p) for p in prompts]

    def _write_page(self, summary: Summary, metrics: list[dict[str, Any]]) -> None:
        """`report.html`. A finished run is not lost over its page, except to a full disk."""
        from opdsl.train import html_report

        session = self.session
        try:
            written = html_report.write(
                self.out, summary, self.method, self.plan, session.identity, metrics,
                self._shown_prompts(),
            )  # fmt: skip
            summary.files.update(written)
        except OSError:
            raise
        except Exception as error:
            self.progress.note(f"note      report.html was not written: {error!r}"[:300])

    def _write_plan(self) -> None:
        record = self.plan.decides() | {
            "method": self.plan.method,
            "fingerprints": self.plan.fingerprints,
            "steps": self.plan.recipe.steps,
            "evals": list(self.plan.evals),
            "notes": self.notes,
        }
        (self.out / "plan.json").write_text(json.dumps(record, indent=1), encoding="utf-8")

    def _finish(self) -> Summary:
        from opdsl.train import models, report

        plan, session = self.plan, self.session
        metrics = read_lines(self.out / "metrics.jsonl")
        if not any("loss" in m for m in metrics):
            raise problem(
                "OPD707",
                "no step could be trained on",
                notes=[f"{what}: {n}" for what, n in self.engine.counts.items()],
            )
        summary = Summary(
            method=plan.method,
            title=plan.title,
            fingerprints=plan.fingerprints,
            task=plan.task,
            student=plan.student,
            teachers=plan.teachers,
            data=plan.data,
            seed=plan.seed,
            pair_seed=plan.pair_seed,
            steps=plan.recipe.steps,
            rows_per_step=plan.recipe.batch,
            parameters=session.parameters,
            device=f"{session.runtime.device} {session.runtime.precision}",
            evals=read_lines(self.out / "evals.jsonl"),
            last=metrics[-1],
            counts=self.engine.counts | self.lost,
            notes=self.notes,
            seconds={k: round(v, 2) for k, v in self.seconds.items()},
            out=str(self.out),
        )
        if plan.settings.report:
            summary.files.update(
                report.write(self.out, summary, self.method, metrics, self._shown_prompts())
            )
        self.place = (plan.recipe.steps, "exporting the student")
        if plan.settings.export:
            models.export(session.student, self.out / "student", session.tokenizer)
            summary.files["student"] = str(self.out / "student")
        if plan.settings.report:
            self._write_page(summary, metrics)
        temporary = self.out / "summary.json.tmp"
        temporary.write_text(json.dumps(summary.to_json(), indent=1), encoding="utf-8")
        os.replace(temporary, self.out / "summary.json")
        return summary
