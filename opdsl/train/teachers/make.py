"""Teacher roles of a method, bound to models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from opdsl.train.models import known_head
from opdsl.train.runtime import Runtime
from opdsl.train.teachers.local import LocalTeacher, MovingAverage, initial_policy, joint_heads


@dataclass(frozen=True)
class TeacherMaker:
    """What every teacher of a run has in common.

    fused: score hidden states, so that no [B, T, V] tensor is made; else logits.
    chunk: rows per forward pass, None for all at once.
    """

    method: Any
    student: Any
    data: Any
    runtime: Runtime
    vocabulary: int
    fused: bool
    chunk: int | None

    def make(self, loaded: dict[str, Any]) -> tuple[dict[str, LocalTeacher], LocalTeacher | None]:
        """({role: teacher}, the initial policy's scorer or None). loaded: role -> model."""
        spec = self.method.spec
        teachers: dict[str, LocalTeacher] = {}
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
            elif decl.kind == "external":
                model = loaded[decl.name]
                teachers[decl.name] = self._scorer(decl.name, lambda m=model: m, privileged)
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
                _share_a_head([teachers[name] for name in routed.parts])
        return teachers, start

    def _view(self, context: str | None):
        """prompt -> the tokens a teacher reads: with a context, the template filled in."""
        return lambda p: self.data.context_ids(p, context)

    def _scorer(self, name: str, model: Callable[[], Any], view, **more: Any) -> LocalTeacher:
        return LocalTeacher(
            name,
            model,
            view,
            self.runtime,
            self.vocabulary,
            head=self._head(model()),
            chunk=self.chunk,
            **more,
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
