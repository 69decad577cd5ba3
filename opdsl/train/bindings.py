"""What stands in, on an embedded task, for the models, contexts and fields a method asks for.

An embedded task has one teacher, one student and one hint. A method may ask for more: several
external teachers, several contexts, fields of the prompt. What is given instead is decided here
from the specification, and every stand-in is said in a note of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from opdsl.train.verify import Verdict

EMBEDDED = "embedded"
START = "embedded-start"  # the embedded student before any training
OTHER = "other"  # a value of a field that no condition of the spec names


def default_task(spec) -> str:
    """The embedded task a method is tried on: one with something to put in a context, where a
    teacher reads one."""
    return "hinted" if templates(spec) else "chain"


def templates(spec) -> tuple[str, ...]:
    """The contexts of a method's teachers, each once, in the order of the spec."""
    return tuple(dict.fromkeys(t.context for t in spec.teachers if t.context is not None))


def stand_ins(spec, given: Mapping[str, str]) -> dict[str, str]:
    """External teacher -> model. All are the embedded teacher, but for the last of several that
    no `when` tells apart and nobody bound: it is the student as it starts, the only other model
    there is, so that a method which compares its teachers has something to compare."""
    external = [t for t in spec.teachers if t.kind == "external"]
    found = {t.name: given.get(t.name, EMBEDDED) for t in external}
    free = [t.name for t in external if t.name not in given and t.when is None]
    if len(external) > 1 and len(free) > 1 and free[-1] == external[-1].name:
        found[free[-1]] = START
    return found


def notes(spec, task: str, teachers: Mapping[str, str]) -> list[str]:
    """What stands in for contexts and further teachers on an embedded task."""
    from opdsl.train.embedded import get_task

    out = [f"{name} is the student as it starts: the embedded suite has one teacher"
           for name, model in teachers.items() if model == START]  # fmt: skip
    readers = {x: [t.name for t in spec.teachers if t.context == x] for x in templates(spec)}
    for i, names in enumerate(readers.values()):
        who = ", ".join(names)
        if not get_task(task).hints:
            out.append(
                f"the task `{task}` has no hint: {who} reads the plain prompt (try `hinted`)"
            )
        elif i == 0:
            out.append(f"the context of {who} is the answer, in the prompt's slot for a hint")
        else:
            out.append(f"the context of {who} is a wrong answer, in the prompt's slot for a hint")
    return out


def invented_fields(method, there: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Values for the prompt fields a task lacks: those that the spec's conditions name, so that
    each holds for some prompts; beside a single one a value that it does not name."""
    named: dict[str, list[str]] = {}
    for t in method.spec.teachers:
        if t.when:
            named.setdefault(t.when[0], []).append(t.when[1])
    found: dict[str, tuple[str, ...]] = {}
    for name in method.needs.prompt_fields:
        if name not in there:
            values = tuple(dict.fromkeys([*named.get(name, ()), *_compared(method, name)]))
            found[name] = values if len(values) > 1 else (*values, OTHER)
    return found


def _compared(method, name: str) -> list[str]:
    """The texts that gates and weights compare a prompt field with."""
    from opdsl.meaning.graph import nodes_below

    nodes = nodes_below([p.total for p in method.program.parts])
    return sorted(str(n.attr("equals")) for n in nodes if n.attr("field") == name)


class TaskData:
    """An embedded task as a source of prompts.

    invented: field -> values dealt out in turn, for fields a method asks for and the task does
    not have (subjects by which a method routes among teachers). templates: the contexts its
    teachers read, in order; the first one shows the answer, every other a wrong one.
    """

    def __init__(
        self,
        task,
        seed: int,
        invented: dict[str, tuple[str, ...]] | None = None,
        templates: Sequence[str] = (),
    ):
        self.task, self.seed, self.name = task, seed, task.name
        self.invented, self.templates = invented or {}, tuple(templates)
        self.pad, self.eos = task.pad, task.eos
        self.max_new_tokens, self.special_ids = task.max_new_tokens, task.special_ids
        self.verifiable, self.rows = True, None
        self.notes = [
            f"the task has no field `{name}`: its prompts take turns with {', '.join(values)}"
            for name, values in self.invented.items()
        ]
        self.fingerprint = f"task:{task.name}"

    def prompts(self, step: int, n: int) -> list[Any]:
        return self._labelled(self.task.prompts(self.seed, step, n))

    def golden(self, step: int, n: int) -> list[Any]:
        return self._labelled(self.task.golden_batch(self.seed, step, n))

    def sequences(self, step: int, n: int) -> list[Any]:
        return self._labelled(self.task.data_batch(self.seed, step, n))

    def held_out(self) -> dict[str, list[Any]]:
        return {"held-out": self.task.held_out(), **self.task.extra_eval()}

    def _labelled(self, prompts: list[Any]) -> list[Any]:
        for name, values in self.invented.items():
            prompts = [
                replace(p, fields=p.fields | {name: values[i % len(values)]})
                for i, p in enumerate(prompts)
            ]
        return prompts

    def judge(self, prompts: Sequence[Any], responses: Sequence[Any]) -> list[Verdict]:
        return [Verdict(self.task.verify(p, r)) for p, r in zip(prompts, responses)]

    def finish(self, step: int, prompts: Sequence[Any], scores: Sequence[float | None]) -> dict:
        return {}

    def context_ids(self, prompt: Any, template: str | None) -> Sequence[int]:
        """The task's own privileged prompt stands in for a text template."""
        if template is None:
            return prompt.teacher_ids
        place = self.templates.index(template) if template in self.templates else 0
        return self.task.hinted(prompt, place)

    def prompt_text(self, prompt: Any) -> str:
        return self.task.decode_text(prompt.ids)

    def response_text(self, ids: Sequence[int]) -> str:
        return self.task.decode_text(ids)


__all__ = [
    "EMBEDDED",
    "START",
    "TaskData",
    "default_task",
    "invented_fields",
    "notes",
    "stand_ins",
    "templates",
]
