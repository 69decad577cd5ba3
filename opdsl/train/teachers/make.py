"""Teacher roles of a method, bound to models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from opdsl.train.models import known_head
from opdsl.train.runtime import Runtime
from opdsl.train.teachers import Teacher
from opdsl.train.teachers.distant import Distant
from opdsl.train.teachers.local import LocalTeacher, MovingAverage, initial_policy, joint_heads
from opdsl.train.teachers.offload import Shelf


def _say_nothing(line: str) -> None:
    """Where nobody listens."""


@dataclass(frozen=True)
class TeacherMaker:
    """What every teacher of a run has in common.

    fused: score hidden states, so that no [B, T, V] tensor is made; else logits.
    chunk: rows per forward pass, None for all at once. offload: external models lie in main memory
    between their passes. distant: the teachers outside this process. say: where they report.
    """

    method: Any
    student: Any
    data: Any
    runtime: Runtime
    vocabulary: int
    fused: bool
    chunk: int | None
    offload: bool = False
    distant: Distant | None = None
    say: Callable[[str], None] = _say_nothing

    def make(self, loaded: dict[str, Any]) -> tuple[dict[str, Teacher], LocalTeacher | None]:
        """({role: teacher}, the initial policy's scorer or None). loaded: role -> model."""
        spec = self.method.spec
        teachers: dict[str, Any] = {}
        shelves: dict[int, Shelf] = {}  # one for each model, however many roles it plays
        start = None
        if self.method.needs.initial or any(t.kind == "initial" for t in spec.teachers):
            model, disabled = initial_policy(self.student)  # one copy, however many read it
            start = self._scorer("initial", model, lambda p: p.ids, disabled=disabled)
        for decl in spec.teachers:
            privileged = self._view(decl.context)
            if decl.kind == "initial" and decl.context is None and start is not None:
                teachers[decl.name] = start
            elif decl.kind == "initial":
                teachers[decl.name] = self._scorer(decl.name, model, privileged, disabled=disabled)
            elif self.distant is not None and decl.name in self.distant:
                teachers[decl.name] = self.distant.teacher(
                    decl.name,
                    privileged,
                    self.runtime.device,
                    self.vocabulary,
                    self.fused,
                    self._needed(decl.name),
                    self.say,
                )
            elif decl.kind == "external":
                model, more = loaded[decl.name], {}
                head = self._head(model)  # before the weights leave the device
                if self.offload and not self._writes(decl.name):
                    if id(model) not in shelves:
                        shelves[id(model)] = Shelf(model, self.runtime.device)
                    shelf = shelves[id(model)]
                    more["disabled"] = lambda shelf=shelf: shelf
                    if head is not None:
                        head = replace(head, weight=head.weight.to(self.runtime.device))
                teachers[decl.name] = self._scorer(
                    decl.name, lambda m=model: m, privileged, head=head, **more
                )
            elif decl.kind == "self":
                teachers[decl.name] = self._scorer(decl.name, lambda: self.student, privileged)
            else:
                average = MovingAverage(
                    decl.name,
                    self.student,
                    decl.decay,
                    decl.every,
                    (lambda p: p.ids) if decl.context is None else privileged,
                    self.runtime,
                    self.vocabulary,
                    chunk=self.chunk,
                )
                average.head = self._head(average.average)
                teachers[decl.name] = average
        if self.fused:
            for routed in spec.routed:
                parts = [teachers[name] for name in routed.parts]
                if all(isinstance(part, LocalTeacher) for part in parts):
                    _share_a_head(parts)
        return teachers, start

    def _writes(self, name: str) -> bool:
        """Whether the method draws text from this teacher."""
        return any(
            name in (s.policy, *(who for _, who in s.parts)) for s in self.method.spec.states
        )

    def _needed(self, name: str) -> Callable[[Any], bool]:
        """prompt -> whether this teacher is read there: of several that a field chooses among,
        only the chosen one is asked."""
        spec, needs = self.method.spec, self.method.needs
        routes = [r for r in spec.routed if name in r.parts]
        if name in needs.teachers or not routes:
            return lambda prompt: True

        def chosen(prompt: Any) -> bool:
            for route in routes:
                hits = [
                    part
                    for part, test in zip(route.parts, route.conditions)
                    if test and str(prompt.fields.get(test[0])) == test[1]
                ]
                hits += [p for p, test in zip(route.parts, route.conditions) if test is None]
                if hits and hits[0] == name:
                    return True
            return False

        return chosen

    def _view(self, context: str | None):
        """prompt -> the tokens a teacher reads: with a context, the template filled in."""
        return lambda p: self.data.context_ids(p, context)

    def _scorer(self, name: str, model: Callable[[], Any], view, **more: Any) -> LocalTeacher:
        if "head" not in more:
            more["head"] = self._head(model())
        return LocalTeacher(
            name, model, view, self.runtime, self.vocabulary, chunk=self.chunk, **more
        )

    def _head(self, model):
        """The frozen head of a model on the fused route; it shares the model's memory."""
        if not self.fused:
            return None
        head = known_head(model, self.vocabulary)
        return replace(head, weight=head.weight.detach()) if head is not None else None


def _share_a_head(teachers: list[LocalTeacher]) -> None:
    """Give teachers that one prompt field chooses among a head they all use."""
    models = {id(teacher.model()): teacher for teacher in teachers}
    first = teachers[0]
    if len(models) == 1:
        for teacher in teachers:
            teacher.head = first.head
        return
    joint, pads = joint_heads([teacher.head for teacher in models.values()])
    by_model = dict(zip(models, pads))
    for teacher in teachers:
        teacher.head, teacher.pad = joint, by_model[id(teacher.model())]
