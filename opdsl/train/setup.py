"""From a plan to everything loaded: models, data, teachers, critics, the step engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from opdsl.train import models
from opdsl.train.bindings import EMBEDDED, START, TaskData, invented_fields, templates
from opdsl.train.critic import Critic
from opdsl.train.data import FileData, FileOptions
from opdsl.train.errors import problem
from opdsl.train.forecast import WHOLE, loss_of, memory_of, sizes_of
from opdsl.train.forward import Forward
from opdsl.train.meters import EVERY, EVERY_FUSED, Meters
from opdsl.train.plan import Plan, complete
from opdsl.train.progress import Progress
from opdsl.train.runtime import Runtime, make_runtime
from opdsl.train.states import States
from opdsl.train.step import Engine
from opdsl.train.teachers.distant import open_all, probes
from opdsl.train.teachers.local import frozen_copy
from opdsl.train.teachers.make import TeacherMaker
from opdsl.train.teachers.sources import is_distant
from opdsl.train.watch import Watch, rules

FUSED_FROM = 16_384  # vocabulary size above which no [B, T, V] tensor is made
HASH_LIMIT = 200_000_000  # parameters up to which weights are hashed for the identity of a run
DECODE_ROWS = 512  # rows per decoding call; bounds the key-value cache


@dataclass
class Session:
    """A run with everything in memory."""

    plan: Plan
    method: Any
    engine: Engine
    data: Any
    student: Any
    old: OldStudent | None
    tokenizer: Any
    runtime: Runtime
    parameters: int
    identity: dict[str, str]
    changes: list[str] = field(default_factory=list)  # of settings, allowed when resuming

    def sample(self, ids: list[Sequence[int]], **settings: Any):
        """Responses of the student of this moment, for evaluation."""
        limit = self.plan.max_tokens
        return self.engine.states.sample("student", ids, max_new_tokens=limit, **settings)


class OldStudent:
    """The policy behind `rollouts(old(n))`: a copy of the student, renewed every n steps.

    It is between 1 and n optimizer steps old (exactly 1 for n = 1), except at step 0.
    """

    def __init__(self, student, lag: int):
        self.student, self.lag = student, lag
        self.model = frozen_copy(student)

    def after_step(self, step: int) -> None:
        """Renew at the start of steps 1, 1 + n, 1 + 2n, … from the weights one step earlier."""
        if step % self.lag == 0:
            self.load_state(self._pending)

    def before_update(self, step: int) -> None:
        """Keep the weights this step starts from; they are one step old at the next."""
        if step % self.lag == 0:
            self._pending = {n: p.detach().clone() for n, p in self.student.named_parameters()}

    def state(self) -> dict[str, torch.Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[name])


def build(method, plan: Plan, progress: Progress) -> Session:
    """Load or build everything a plan names. Raises RunProblem for anything missing."""
    settings = plan.settings
    runtime = make_runtime(settings.device, settings.precision, tiny=plan.embedded)
    distant = open_all(method.spec, plan.teachers, settings)
    student, loaded, tokenizers = _models(plan, runtime, progress)
    if plan.recipe.adapter:
        student = models.add_adapter(student, plan.recipe.adapter, plan.seed)
    else:
        student.requires_grad_(True)
    vocabulary = min(
        models.common_vocabulary(student, loaded, tokenizers),
        *(distant.rows(student, tokenizers.get("student")) or [1 << 31]),
    )
    data = _data(method, plan, tokenizers.get("student"), student, loaded, distant.contexts())
    head = models.known_head(student, vocabulary)
    # A head that is more than product, scale and soft cap needs logits throughout.
    others = [models.known_head(model, vocabulary) for model in loaded.values()]
    fused = vocabulary > FUSED_FROM and all(h is not None for h in (head, *others))
    if settings.memory is not None:
        _check_memory(method, plan, student, loaded, distant, fused, progress)
    if settings.compile:
        _compile(method, runtime, fused, progress)
    plan = complete(
        replace(plan, max_tokens=min(plan.max_tokens, data.max_new_tokens)), method, data.rows
    )
    distant.check_data(data)
    maker = TeacherMaker(
        method, student, data, runtime, vocabulary, fused, settings.micro_batch,
        settings.offload_teacher, distant, progress.note,
    )  # fmt: skip
    teachers, initial = maker.make(loaded)
    for name in distant.links:
        data.notes.extend(teachers[name].begin(probes(data)))
    old = _old(method, student)
    policies = {"student": lambda: models.bare(student)}
    if old is not None:
        policies["old"] = lambda: old.model
    for name, teacher in teachers.items():
        policies[name] = lambda teacher=teacher: models.bare(teacher.model())
    states = States(
        method.spec.states,
        data,
        policy=lambda name: policies[name](),
        view=lambda name, p: teachers[name].view(p) if name in teachers else p.ids,
        prompts=plan.prompts,
        steps=plan.recipe.steps,
        seed=plan.seed,
        vocabulary=vocabulary,
        runtime=runtime,
        chunk=DECODE_ROWS,
        backend=_backend(settings, student),
    )
    parameters = models.count_parameters(student)
    engine = Engine(
        method=method,
        forward=Forward(
            student, runtime, vocabulary, fused, head, plan.recipe.steps, memory_of(settings.memory)
        ),
        teachers=teachers,
        initial=initial,
        critics=[Critic(c, student, runtime) for c in _critics(method)],
        states=states,
        data=data,
        recipe=plan.recipe,
        runtime=runtime,
        micro_batch=settings.micro_batch,
        watched=Watch(rules(settings.guards)),
        meters=_meters(method, data, plan, fused, progress),
    )
    identity = _identity(method, student, loaded, tokenizers, data) | distant.identity()
    return Session(
        plan,
        method,
        engine,
        data,
        student,
        old,
        tokenizers.get("student"),
        runtime,
        parameters,
        identity,
    )


def _check_memory(method, plan, student, loaded, distant, fused, progress) -> None:
    """Raises RunProblem OPD112 where the stated memory is too little for the loss."""
    models_by_role = {"student": student, **loaded}
    configs = {role: models.bare(model).config for role, model in models_by_role.items()}
    away = [name for name in plan.teachers if name in distant]
    found = loss_of(method, plan, sizes_of(plan, configs), away, not fused)
    if found.whole:
        progress.note(WHOLE)


# ---- models ------------------------------------------------------------------------------------


def _models(plan: Plan, runtime: Runtime, progress: Progress):
    """(student, {teacher role: model}, {role: tokenizer or None})."""
    loaded: dict[str, Any] = {}
    tokenizers: dict[str, Any] = {}
    by_source: dict[str, Any] = {}
    student = None
    # Everything is looked up before anything large is loaded.
    here = {n: s for n, s in plan.teachers.items() if not is_distant(s)}
    place = torch.device("cpu") if plan.settings.offload_teacher else runtime.device
    for role, source in [("student", plan.student), *here.items()]:
        if source not in (EMBEDDED, START):
            models.check_source(source, role)
    if {EMBEDDED, START} & {plan.student, *plan.teachers.values()}:
        from opdsl.train.embedded import build_pair

        pair = build_pair(
            plan.task, plan.pair_seed, cache_dir=plan.settings.cache_dir, progress=progress.stage
        )
        by_source[EMBEDDED] = pair.teacher.to(runtime.device, runtime.frozen_dtype)
        if START in plan.teachers.values():
            by_source[START] = frozen_copy(pair.student).to(runtime.device, runtime.frozen_dtype)
        if plan.student == EMBEDDED:
            student = pair.student.to(runtime.device)
    if student is None:
        progress.stage("student", 0.0, f"loading {plan.student}")
        student = models.load_model(plan.student, "student", torch.float32, runtime.device)
        tokenizers["student"] = models.load_tokenizer(plan.student, "student")
        progress.stage("student", 1.0, "loaded")
    for name, source in here.items():
        if source not in by_source:
            progress.stage(f"teacher {name}", 0.0, f"loading {source}")
            by_source[source] = models.load_model(source, name, runtime.frozen_dtype, place)
            tokenizers[source] = models.load_tokenizer(source, name)
            progress.stage(f"teacher {name}", 1.0, "loaded")
        loaded[name] = by_source[source].requires_grad_(False).eval()
        tokenizers[name] = tokenizers.get(source)
    return student.eval(), loaded, tokenizers


def _data(method, plan: Plan, tokenizer, student, loaded, contexts: list[int | None]):
    """The prompts. contexts: limits of models that are not in this process."""
    if plan.task is not None:
        from opdsl.train.embedded import get_task

        task = get_task(plan.task)
        invented = invented_fields(method, tuple(task.prompts(0, 0, 1)[0].fields))
        return TaskData(task, plan.seed, invented, templates(method.spec))
    configs = [models.bare(m).config for m in (student, *loaded.values())]
    limits = [*(models.context_limit(c) for c in configs), *contexts]
    return file_data(method, plan, tokenizer, limits)


def file_data(method, plan: Plan, tokenizer, contexts: list[int | None]) -> FileData:
    """The data file of a plan, read and checked. contexts: the models' limits (tokens)."""
    needs, settings = method.needs, plan.settings
    if tokenizer is None:
        raise problem("OPD701", f"student: {plan.student} has no tokenizer, and the data are text")
    sources = {s.policy for s in method.spec.states}
    prefixed = any(s.prefix for s in method.spec.states)
    context = min([c for c in contexts if c], default=4096)
    longest = plan.max_tokens
    if settings.max_tokens is None and not any(s.max_tokens for s in method.spec.states):
        longest = min(longest, context // 2)  # nobody asked: leave room for the prompt
    if longest >= context:
        raise problem(
            "OPD709",
            f"responses of {longest} tokens leave no room for a prompt in a context of {context}",
            helps=["a smaller --max-tokens"],
        )
    options = FileOptions(
        seed=plan.seed,
        max_new_tokens=longest,
        context=context,
        skip_bad_rows=settings.skip_bad_rows,
        long_prompts=settings.long_prompts,
        required_fields=tuple(needs.prompt_fields),
        needs_response=bool(needs.golden or sources & {"data", "golden"} or prefixed),
        needs_reference=bool(needs.outcome),
        verifier=settings.verifier,
        verifier_limits=settings.verifier_limits,
        columns=settings.columns,
        curriculum=settings.curriculum,
    )
    return FileData(plan.data or "", tokenizer, options, plan.eval_data)


def _backend(settings, student) -> str:
    """Who samples the training rollouts. Raises RunProblem OPD701 where that cannot be had."""
    backend = str(settings.rollout.get("backend", "own"))
    if backend == "generate_batch":
        from opdsl.train.decode_generate import check_batching

        check_batching(models.bare(student))
    return backend


def _compile(method, runtime, fused: bool, progress: Progress) -> None:
    """What `--compile` asks for, or why it changes nothing."""
    if runtime.device.type == "cpu" and fused:
        method.loss.compile()
        return
    why = f"a vocabulary above {FUSED_FROM} words" if not fused else "a CPU; a GPU has row kernels"
    progress.note(f"--compile changes nothing here: it is for {why}")


def _meters(method, data, plan: Plan, fused: bool, progress: Progress) -> Meters:
    """What is measured beside the loss; responses are recorded where accuracy is measured too."""
    every = plan.settings.measure_every
    return Meters(
        method,
        data,
        every=(EVERY_FUSED if fused else EVERY) if every is None else every,
        shown=frozenset({1, *plan.evals}) if plan.settings.report else frozenset(),
        say=progress.note,
    )


def _old(method, student) -> OldStudent | None:
    lags = [s.lag for s in method.spec.states if s.policy == "old"]
    return OldStudent(student, max(1, *lags)) if lags else None


def _critics(method) -> list[Any]:
    wanted = set(method.needs.values)
    return [c for c in method.spec.critics if c.name in wanted]


def _identity(method, student, loaded, tokenizers, data) -> dict[str, str]:
    """What a resuming run must match: method, data, tokenizer and starting weights."""
    identity = {"method": method.fingerprints["method"], "data": data.fingerprint}
    for name, model in {"student": student, **loaded}.items():
        if models.count_parameters(model) <= HASH_LIMIT:
            identity[f"weights of {name}"] = models.weights_hash(model)
        if tokenizers.get(name) is not None:
            identity[f"tokenizer of {name}"] = models.tokenizer_hash(tokenizers[name])
    return identity
