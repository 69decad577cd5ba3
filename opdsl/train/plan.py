"""What will be trained, on what, for how long: decided before anything is loaded.

`make_plan` binds a method's roles to models and data. Order of precedence: options, the `run`
block, the embedded pair. A run block counts only where it (or the options) names models; with
`--task` the embedded pair is used whatever the spec ships.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from opdsl.train import bindings
from opdsl.train.bindings import EMBEDDED
from opdsl.train.data_formats import stem
from opdsl.train.errors import problem
from opdsl.train.settings import PACE, Recipe, RunSettings, recipe_for
from opdsl.train.teachers.sources import refuse_by_kind

_BLOCK_NUMBERS = (
    "seed", "steps", "prompts", "micro_batch", "max_tokens", "eval_every", "save_every",
    "eval_prompts",
)  # fmt: skip
_BLOCK_TEXTS = (
    "data", "student", "precision", "device", "out", "task", "eval_data", "verifier", "columns",
    "curriculum", "memory",
)  # fmt: skip
_OF_DATA = ("columns", "curriculum")  # settings that mean nothing without data of one's own


@dataclass(frozen=True)
class Plan:
    """A run with every question answered.

    task: embedded task that gives the prompts, or None for a data file. student, teachers: model
    folder, hub name, or one of `bindings`. evals: steps after which held-out accuracy is measured.
    """

    method: str
    title: str
    fingerprints: dict[str, str]
    task: str | None
    student: str
    teachers: dict[str, str]
    data: str | None
    eval_data: str | None
    recipe: Recipe
    group: int
    seed: int
    pair_seed: int
    max_tokens: int
    evals: tuple[int, ...]
    save_every: int
    out: Path
    settings: RunSettings
    notes: tuple[str, ...] = ()

    @property
    def prompts(self) -> int:
        """Prompts per optimizer step."""
        return max(1, self.recipe.batch // self.group)

    @property
    def embedded(self) -> bool:
        """Whether the embedded suite's recipe holds: its tasks need models of 44 tokens, so a
        student of one's own on them is as small as the embedded one."""
        return self.task is not None

    def decides(self) -> dict[str, Any]:
        """Everything that decides the numbers of a run; a resumed run must agree on it.

        `steps` is left to the caller: a constant schedule may be continued further.
        """
        recipe = {k: v for k, v in asdict(self.recipe).items() if k != "steps"}
        return json.loads(
            json.dumps(
                {
                    "task": self.task,
                    "student": self.student,
                    "teachers": self.teachers,
                    "data": self.data,
                    "seed": self.seed,
                    "pair_seed": self.pair_seed,
                    "group": self.group,
                    "max_tokens": self.max_tokens,
                    "verifier": self.settings.verifier,
                    "columns": self.settings.columns,
                    "curriculum": self.settings.curriculum,
                    "rollout": dict(self.settings.rollout) or None,
                    **recipe,
                }
            )
        )

    def lines(self) -> list[str]:
        """The plan in short lines, for the start of a run and for --dry-run."""
        r = self.recipe
        where = f"task {self.task}" if self.task else f"data {self.data}"
        teachers = ", ".join(f"{n} = {m}" for n, m in self.teachers.items()) or "none"
        adapter = f", lora rank {r.adapter[1]['rank']}" if r.adapter else ""
        return [
            f"method    {self.method}",
            f"prompts   {where}",
            f"student   {self.student}{adapter}",
            f"teacher   {teachers}",
            f"batch     {self.prompts} prompts x {self.group} = {r.batch} rows,"
            f" at most {self.max_tokens} tokens each",
            f"steps     {r.steps or 'one pass over the data'}, AdamW lr {r.lr:g}"
            f" ({r.schedule}, warm-up {r.warmup}), clip {r.clip_grad:g}",
            f"seed      {self.seed}",
            f"out       {self.out}",
            *(f"note      {note}" for note in self.notes),
        ]


def make_plan(method, settings: RunSettings) -> Plan:
    """The plan of a run. Raises RunProblem for anything that cannot be bound."""
    block_name, block = _choose_block(method.spec, settings)
    settings, block_teachers, notes = _with_block(method, settings, block)
    external = [t.name for t in method.spec.teachers if t.kind == "external"]
    given = _bind_teachers(external, settings.teachers)
    named = bool(settings.student or given or settings.data)
    task = settings.task
    if task is None and not named and not block_teachers:
        task = bindings.default_task(method.spec)
        notes.append(f"no models given: training the embedded pair on the task `{task}`")
    if task is not None:
        _check_task(task)
        if settings.data:
            raise problem("OPD112", "--task and --data exclude each other", exit_code=2)
        for name in _OF_DATA:
            if getattr(settings, name):
                raise problem(
                    "OPD112",
                    f"--{name} is for data of your own, and this run trains on the task `{task}`",
                    helps=["--data FILE with --student and --teacher"],
                    exit_code=2,
                )
        student = settings.student or EMBEDDED
        teachers = bindings.stand_ins(method.spec, given)
        notes += bindings.notes(method.spec, task, teachers)
    else:
        teachers = {name: given.get(name) or block_teachers.get(name) for name in external}
        student = settings.student or ""
        _require(student, teachers, settings.data)
        if block_name and not settings.run:
            notes.append(f"models and data of the run block `{block_name}`")
    refuse_by_kind(method.spec, teachers)
    group = max((s.group for s in method.spec.states), default=1)
    recipe, more = recipe_for(
        method.spec.optimize, settings, embedded=task is not None, group=group, rows_of_data=None
    )
    notes += more
    name = task or stem(settings.data or "data")
    return Plan(
        method=method.name,
        title=method.title or "",
        fingerprints=dict(method.fingerprints),
        task=task,
        student=student,
        teachers=teachers,  # type: ignore[arg-type]
        data=settings.data,
        eval_data=settings.eval_data,
        recipe=recipe,
        group=group,
        seed=settings.seed if settings.seed is not None else 0,
        pair_seed=settings.pair_seed,
        max_tokens=_max_tokens(task, settings, method.spec.states),
        evals=(),
        save_every=settings.save_every or 0,
        out=_out_folder(settings, f"{method.name}-{name}"),
        settings=settings,
        notes=tuple(notes),
    )


def complete(plan: Plan, method, rows: int | None) -> Plan:
    """The plan once the size of the data is known: steps, evaluations and saves."""
    settings = plan.settings
    recipe, notes = recipe_for(
        method.spec.optimize,
        settings,
        embedded=plan.embedded,
        group=plan.group,
        rows_of_data=rows,
    )
    fresh = [n for n in notes if n not in plan.notes]
    steps = recipe.steps
    every = settings.eval_every or max(1, steps // 4)
    evals = {0, steps, *range(every, steps, every)} | {s for s in settings.eval_at if s <= steps}
    save_every = settings.save_every or max(1, steps // 4 if plan.task else min(50, steps))
    return replace(
        plan,
        recipe=recipe,
        evals=tuple(sorted(evals)),
        save_every=save_every,
        notes=(*plan.notes, *fresh),
    )


# ---- run blocks ------------------------------------------------------------------------------


def _choose_block(spec, settings: RunSettings) -> tuple[str | None, Any]:
    blocks = {n: b for n, b in spec.runs.items() if b.method == spec.name or len(spec.runs) == 1}
    if settings.run is not None:
        if settings.run not in spec.runs:
            near = difflib.get_close_matches(settings.run, spec.runs, n=1)
            raise problem(
                "OPD119",
                f"the spec has no run block `{settings.run}`",
                helps=[f"did you mean `{near[0]}`?"]
                if near
                else [f"run blocks: {_list(spec.runs)}"],
            )
        return settings.run, spec.runs[settings.run]
    if settings.task is not None or not blocks:
        return None, None
    if len(blocks) > 1:
        if settings.student or settings.data:
            return None, None
        raise problem(
            "OPD112",
            f"the spec has several run blocks: {_list(blocks)}",
            helps=["choose one with --run NAME, or --task chain for the embedded pair"],
            exit_code=2,
        )
    return next(iter(blocks.items()))


def _with_block(method, settings: RunSettings, block) -> tuple[RunSettings, dict, list[str]]:
    """Settings completed from a run block; options the user gave win."""
    notes: list[str] = []
    for key in PACE:  # `optimize {}` may set the pace as well; options and run blocks win
        value = method.spec.optimize.get(key)
        if value is not None and getattr(settings, key) is None:
            settings = replace(settings, **{key: int(value)})  # type: ignore[arg-type]
    if block is None:
        return settings, {}, notes
    external = {t.name for t in method.spec.teachers if t.kind == "external"}
    teachers = {k: str(v) for k, v in block.settings.items() if k in external}
    if "teacher" in block.settings and len(external) == 1:
        teachers[next(iter(external))] = str(block.settings["teacher"])
    chosen: dict[str, Any] = {}
    for key, value in block.settings.items():
        if key in external or key == "teacher":
            continue
        if key not in (*_BLOCK_NUMBERS, *_BLOCK_TEXTS):
            near = difflib.get_close_matches(key, [*_BLOCK_NUMBERS, *_BLOCK_TEXTS, *external], n=1)
            raise problem(
                "OPD119",
                f"run block `{block.name}`: `{key}` is not a setting of a run",
                helps=[f"did you mean `{near[0]}`?"] if near else [],
                exit_code=1,
            )
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if key in _BLOCK_NUMBERS and not whole:
            raise problem(
                "OPD112", f"run block `{block.name}`: {key} = {value!r} is not a whole number"
            )
        if getattr(settings, key) is None:
            chosen[key] = value if key in _BLOCK_NUMBERS else str(value)
            if key == "verifier" and str(value).startswith("command:"):
                # A spec from elsewhere may be run without being read to its end.
                raise problem(
                    "OPD112",
                    f"run block `{block.name}`: a spec may not name a program to run",
                    helps=[f"give it on the command line: --verifier '{value}'"],
                )
    if not (teachers or "student" in block.settings or settings.student):
        # A run block without models only sets numbers; the embedded pair is still the default.
        for key in ("data", *_OF_DATA):
            chosen.pop(key, None)
    for name, values in block.sweeps.items():
        notes.append(
            f"run block `{block.name}` sweeps {name} over {len(values)} values; one run trains one:"
            f" choose with --set {name}=…"
        )
    return replace(settings, **chosen), teachers, notes


def _bind_teachers(external: list[str], given: Mapping[str, str]) -> dict[str, str]:
    """Teacher role -> model; the name "" stands for every external teacher."""
    bound = {}
    for name, model in given.items():
        if name == "":
            bound |= dict.fromkeys(external, model)
            if not external:
                raise problem("OPD402", "this method has no external teacher to bind", exit_code=2)
        elif name in external:
            bound[name] = model
        else:
            near = difflib.get_close_matches(name, external, n=1)
            raise problem(
                "OPD402",
                f"the method has no external teacher `{name}`",
                helps=[f"did you mean `{near[0]}`?"]
                if near
                else [f"its teachers: {_list(external)}"],
            )
    return bound


def _require(student: str, teachers: dict[str, str | None], data: str | None) -> None:
    missing = [] if student else ["--student MODEL"]
    missing += [f"--teacher {name}=MODEL" for name, model in teachers.items() if not model]
    missing += [] if data else ["--data FILE"]
    if missing:
        raise problem(
            "OPD402",
            f"to train on your own models this run still needs {' and '.join(missing)}",
            helps=["or --task chain for prompts and models that are built in"],
        )


def _check_task(task: str) -> None:
    from opdsl.train.embedded import TASKS

    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        helps = [f"did you mean {near[0]}?"] if near else []
        raise problem(
            "OPD708",
            f"there is no embedded task {task!r}",
            helps=[*helps, f"tasks: {_list(TASKS)}"],
        )


def _max_tokens(task: str | None, settings: RunSettings, states) -> int:
    """Longest response (tokens) any source may write."""
    if task is not None:
        from opdsl.train.embedded import get_task

        limit = get_task(task).max_new_tokens
    else:
        asked = [s.max_tokens for s in states if s.max_tokens]
        limit = max(asked) if asked else 512
    return min(settings.max_tokens or limit, limit) if task else settings.max_tokens or limit


def _out_folder(settings: RunSettings, name: str) -> Path:
    """The folder asked for; else `runs/NAME`, numbered so that nothing is overwritten."""
    if settings.out is not None:
        return Path(settings.out)
    base = Path("runs") / name
    taken = [
        p for p in (base, *(base.with_name(f"{name}-{i}") for i in range(2, 10_000))) if p.exists()
    ]
    if settings.resume:
        return taken[-1] if taken else base
    return base if not taken else base.with_name(f"{name}-{len(taken) + 1}")


def _list(names) -> str:
    return ", ".join(names) or "none"


def digest(value: Any) -> str:
    """Short hash of a JSON value, for names of cached results."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
