"""`opdsl score`: a teacher's scores of all texts of a data set, written for later runs.

The texts are those the run will train on: same spec, data, tokenizer, limits, and for an embedded
task the same seed and steps. One pass over the data is enough, however many epochs a run makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opdsl.train import models
from opdsl.train.bindings import EMBEDDED, TaskData, invented_fields, templates
from opdsl.train.errors import problem
from opdsl.train.plan import Plan, make_plan
from opdsl.train.progress import Progress
from opdsl.train.runtime import make_runtime, threads_for
from opdsl.train.settings import RunSettings
from opdsl.train.teachers.capabilities import Wants, refuse_unable, wants
from opdsl.train.teachers.distant import Distant, open_all
from opdsl.train.teachers.scorer import Scorer
from opdsl.train.teachers.sources import AT_BEST, MANIFEST, is_distant
from opdsl.train.teachers.stored import Writer
from opdsl.train.teachers.transport import Fault
from opdsl.train.teachers.wire import Row, RowScores, Want


def record(
    method: Any, settings: RunSettings, out: Path, top: int | None, progress: Progress
) -> dict[str, Any]:
    """Score every text and write the folder `out`; returns its manifest.

    top: entries of the teacher's own list to keep, None for what the method reads. Raises
    RunProblem OPD402, OPD407, OPD704, OPD733 and whatever loading raises.
    """
    if (out / MANIFEST).exists():
        raise problem("OPD704", f"{out} holds scores already", helps=["another --out"])
    name, source = _one_teacher(method, settings)
    asked = wants(method.spec)[name]
    refuse_unable(method.spec, {name: (f"a folder of scores ({out})", AT_BEST["stored"])})
    wanted = Want(top=max(asked.top, top or 0))
    student = settings.student or (source if not is_distant(source) else None)
    plan = make_plan(method, replace(settings, student=student, out=str(out)))
    with_top = Wants(top=wanted.top, need=asked.need)
    scorer = _Local(source, plan) if not is_distant(source) else _Distant(method, plan, with_top)
    wanted = replace(wanted, top=min(wanted.top, scorer.vocabulary))
    tokenizer = None
    if plan.student != EMBEDDED:
        tokenizer = models.load_tokenizer(plan.student, "student")
    data = _data(method, plan, tokenizer, scorer.context)
    about = {
        "method": plan.method,
        "teacher": source,
        "weights": scorer.weights,
        "tokenizer": models.tokenizer_hash(tokenizer) if tokenizer is not None else None,
        "data": data.fingerprint,
        "vocabulary": scorer.vocabulary,
        "top": wanted.top,
    }
    context = next(t.context for t in method.spec.teachers if t.name == name)
    writer = Writer(out, about)
    with threads_for(scorer.parameters, scorer.device):
        for done, total, rows in _texts(method, plan, data, context):
            fresh = {r.tokens: r for r in rows if r.response > 0 and writer.fresh(r)}
            if fresh:
                batch = list(fresh.values())
                for row, one in zip(batch, scorer.score(batch, wanted)):
                    writer.add(row, one)
            progress.stage("scoring", done / total, f"{len(writer.seen)} texts")
    if not writer.seen:
        raise problem("OPD707", f"{data.name} has no text to score", helps=["rows with `response`"])
    return writer.close()


def _one_teacher(method: Any, settings: RunSettings) -> tuple[str, str]:
    """(role, model) of the one teacher that is scored."""
    external = [t.name for t in method.spec.teachers if t.kind == "external"]
    given = dict(settings.teachers)
    everyone = given.pop("", None)
    if everyone is not None and len(external) == 1:
        given = {external[0]: everyone}
    if len(given) != 1:
        names = ", ".join(external) or "none"
        raise problem(
            "OPD402",
            "say which teacher's scores are to be written: one --teacher NAME=MODEL",
            notes=[f"the method's external teachers: {names}"],
        )
    return next(iter(given.items()))


def _data(method: Any, plan: Plan, tokenizer: Any, context: int | None) -> Any:
    from opdsl.train.setup import file_data

    if plan.task is None:
        limits = [context]
        if plan.student != EMBEDDED:
            limits.append(models.context_of(plan.student, "student"))
        return file_data(method, plan, tokenizer, limits)
    from opdsl.train.embedded import get_task

    task = get_task(plan.task)
    fields = tuple(task.prompts(0, 0, 1)[0].fields)
    return TaskData(task, plan.seed, invented_fields(method, fields), templates(method.spec))


def _texts(
    method: Any, plan: Plan, data: Any, context: str | None
) -> Iterator[tuple[int, int, list[Row]]]:
    """(done, of how many, rows) of every batch of the run's texts."""
    n = plan.prompts
    steps = math.ceil(data.rows / n) if data.rows else max(1, plan.recipe.steps)
    policies = sorted({s.policy for s in method.spec.states})
    for step in range(steps):
        rows = []
        for policy in policies:
            batch = data.sequences(step, n) if policy == "data" else data.golden(step, n)
            for prompt in batch:
                view = tuple(data.context_ids(prompt, context))
                rows.append(Row(view + tuple(prompt.golden), len(view)))
        yield step + 1, steps, rows


class _Local:
    """A model of this process."""

    def __init__(self, source: str, plan: Plan):
        settings = plan.settings
        runtime = make_runtime(settings.device, settings.precision, tiny=source == EMBEDDED)
        if source == EMBEDDED:
            from opdsl.train.embedded import build_pair

            model = build_pair(plan.task or "chain", plan.pair_seed).teacher
            model, tokenizer = model.to(runtime.device, runtime.frozen_dtype), None
        else:
            model = models.load_model(source, "teacher", runtime.frozen_dtype, runtime.device)
            tokenizer = models.load_tokenizer(source, "teacher")
        self.scorer = Scorer(model.requires_grad_(False).eval(), tokenizer, source)
        self.context, self.weights = self.scorer.context, self.scorer.weights
        self.vocabulary, self.device = self.scorer.vocabulary, runtime.device.type
        self.parameters = self.scorer.parameters

    def score(self, rows: list[Row], want: Want) -> list[RowScores]:
        self.scorer.check(rows, want)
        return self.scorer.score(rows, want)


class _Distant:
    """A server."""

    parameters, device = 0, torch.device("cpu").type

    def __init__(self, method: Any, plan: Plan, asked: Wants):
        found: Distant = open_all(method.spec, plan.teachers, plan.settings)
        (self.name, self.link), *_ = found.links.items()
        server = self.link.server
        self.link.wants = asked
        self.context, self.weights = server.context, server.weights or server.model
        self.vocabulary = server.vocabulary or _rows_of(plan)
        self.link.vocabulary = self.vocabulary

    def score(self, rows: list[Row], want: Want) -> list[RowScores]:
        try:
            return self.link.ask(rows, want)
        except Fault as fault:
            raise problem(
                "OPD731",
                f"teacher {self.name}: no scores from {self.link.server.url}: {fault.text}",
            ) from None


def _rows_of(plan: Plan) -> int:
    """The words of the student's tokenizer, where a server does not say how many it has."""
    tokenizer = models.load_tokenizer(plan.student, "student")
    return max(tokenizer.get_vocab().values()) + 1
