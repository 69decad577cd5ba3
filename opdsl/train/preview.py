"""`opdsl run --dry-run`: the plan, checked as far as possible without loading weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from opdsl.train import models
from opdsl.train.bindings import EMBEDDED, START
from opdsl.train.forecast import WHOLE, loss_of, sizes_of
from opdsl.train.plan import Plan, complete
from opdsl.train.teachers.distant import open_all

_GB = 1e9


@dataclass(frozen=True)
class Preview:
    """A completed plan with sizes. memory: GB by part, estimated from configurations."""

    plan: Plan
    needs: dict[str, Any]
    rows: int | None
    parameters: dict[str, int]
    memory: dict[str, float]
    notes: tuple[str, ...]
    cost: Any = None  # an `emit.forecast.Forecast` of one micro-batch

    def lines(self) -> list[str]:
        plan = self.plan
        lines = plan.lines()
        lines.append(
            f"needs     {', '.join(f'{k} = {v}' for k, v in self.needs.items()) or 'none'}"
        )
        if self.rows is not None:
            lines.append(f"data      {self.rows} usable training prompts")
        for role, count in self.parameters.items():
            lines.append(f"size      {role}: {count / 1e6:.2f} M parameters")
        if self.memory:
            total = sum(self.memory.values())
            parts = ", ".join(f"{name} {size:.2f}" for name, size in self.memory.items())
            lines.append(f"memory    about {total:.2f} GB before activations ({parts})")
        most = plan.recipe.batch * plan.max_tokens
        lines.append(f"tokens    at most {most:,} response tokens a step")
        if self.cost is not None:
            first, *rest = self.cost.lines()
            lines += [f"loss of   {first}", *(f"  {line}" for line in rest)]
        lines.append(f"tests     after steps {', '.join(map(str, plan.evals))}")
        lines += [f"note      {note}" for note in self.notes]
        lines.append("nothing was trained (--dry-run)")
        return lines

    def to_json(self) -> dict[str, Any]:
        plan = self.plan
        return plan.decides() | {
            "method": plan.method,
            "fingerprints": plan.fingerprints,
            "steps": plan.recipe.steps,
            "evals": list(plan.evals),
            "out": str(plan.out),
            "needs": self.needs,
            "rows": self.rows,
            "parameters": self.parameters,
            "memory_gb": self.memory,
            "cost": None
            if self.cost is None
            else json.loads(json.dumps(self.cost.to_json(), default=list)),
            "notes": [*plan.notes, *self.notes],
        }


def preview(method, plan: Plan) -> Preview:
    """Check models, tokenizers and data of a plan. Raises RunProblem as a run would."""
    needs = {f"teacher {name}": access for name, access in method.needs.teachers.items()}
    for name in ("initial", "outcome", "golden"):
        if getattr(method.needs, name):
            needs[name] = "yes"
    if method.needs.values:
        needs["critic"] = ", ".join(method.needs.values)
    parameters, memory, notes, rows = {}, {}, (), None
    sources = {"student": plan.student} | dict(plan.teachers)
    elsewhere = open_all(method.spec, plan.teachers, plan.settings)
    named = {
        role: source
        for role, source in sources.items()
        if source not in (EMBEDDED, START) and role not in elsewhere
    }
    for role, source in named.items():
        models.check_source(source, role)
    for role, source in named.items():
        parameters[role] = models.parameters_of(source, role)
    if "student" in parameters:
        # float32 weights, gradients and two moments; an adapter's own are small beside them.
        each = 4 if plan.recipe.adapter else 16
        memory["student"] = parameters["student"] * each / _GB
    half = plan.settings.precision != "fp32" and _cuda()
    for role, count in parameters.items():
        if role != "student":
            memory[role] = count * (2 if half else 4) / _GB
    if plan.task is None:
        from opdsl.train.setup import file_data

        tokenizer = models.load_tokenizer(plan.student, "student")
        contexts = [models.context_of(source, role) for role, source in named.items()]
        contexts += elsewhere.contexts()
        data = file_data(method, plan, tokenizer, contexts)
        rows, notes = data.rows, tuple(data.notes)
        plan = replace(plan, max_tokens=data.max_new_tokens)
    notes += tuple(elsewhere.lines())
    configs = {role: models.config_of(source, role) for role, source in named.items()}
    away = [name for name in plan.teachers if name in elsewhere]
    cost = loss_of(method, plan, sizes_of(plan, configs), away)
    if cost.whole and plan.settings.memory is not None:
        notes += (WHOLE,)
    return Preview(complete(plan, method, rows), needs, rows, parameters, memory, notes, cost)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
