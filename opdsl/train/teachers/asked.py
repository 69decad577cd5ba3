"""Which tokens a teacher is asked about, where a method reads it on somebody else's list.

A set such as `top(16, of = student)` is only known once the student has been evaluated, and moves
with every update. A teacher in this process has the whole distribution; one that gives lists is
asked here, after the student's forward pass, for the scores of exactly the lists its method reads
(`Wants.ids_from`). Where the student's logits are made tile by tile, MARGIN more tokens are asked
for than the method reads: two products of one row may round differently and swap neighbours at
the edge of the list.

Shapes: B rows, T response tokens, K entries of a list, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from opdsl.emit.kernels.linear_logprobs import linear_score
from opdsl.train.teachers import Scores, Teacher
from opdsl.train.teachers.capabilities import MARGIN


def waits(teacher: Teacher) -> bool:
    """Whether a teacher can only be asked once the student's lists are known."""
    return bool(getattr(teacher, "ids_from", ()))


def complete(
    teachers: Mapping[str, Teacher],
    found: Mapping[str, Scores],
    initial: Scores | None,
    student: Callable[[int], torch.Tensor],
    ask: Callable[[Teacher, Any], Scores],
) -> dict[str, Scores]:
    """The scores of all teachers, those that wait included.

    found: of the teachers that do not wait. student(k): ids [B, T, k]. ask(teacher, ids [B, T, K]
    or None) gives the guarded scores of one.
    """
    waiting = {name: t for name, t in teachers.items() if waits(t)}
    lists = dict(found)
    if initial is not None:
        lists["initial"] = initial
    # A teacher whose own list is read by another that waits is asked for that list first.
    for name in {who for t in waiting.values() for who, _ in t.ids_from} & set(waiting):  # type: ignore[attr-defined]
        lists[name] = ask(waiting[name], None)
    out = dict(found)
    for name, teacher in waiting.items():
        ids = [
            student(k) if who == "student" else top_ids(lists[who], k)
            for who, k in teacher.ids_from  # type: ignore[attr-defined]
        ]
        out[name] = ask(teacher, torch.cat(ids, -1))
    return {name: out[name] for name in teachers}


@torch.no_grad()
def top_ids(scores: Scores, k: int) -> torch.Tensor:
    """The k most probable tokens [B, T, k] (fewer where the vocabulary ends) of some scores."""
    if scores.logits is not None:
        return scores.logits.topk(min(k, scores.logits.shape[-1]), -1).indices
    if scores.hidden is not None:
        return _of_hidden(scores.hidden, scores.head, k)
    return scores.top_ids[..., :k]


@torch.no_grad()
def student_ids(forward: Any, live: torch.Tensor, k: int) -> torch.Tensor:
    """The student's k most probable tokens [B, T, k]. live: what the batch is made from."""
    live = live.detach()
    if not forward.fused:
        return live.topk(min(k, live.shape[-1]), -1).indices
    head = forward.head
    if forward.runtime.half:  # as the batch rounds them
        live, head = live.bfloat16(), replace(head, weight=head.weight.bfloat16())
    return _of_hidden(live, head, k + MARGIN)


def _of_hidden(hidden_BTH: torch.Tensor, head: Any, k: int) -> torch.Tensor:
    B, T, H = hidden_BTH.shape
    plain = replace(
        head,
        weight=head.weight.detach(),
        bias=None if head.bias is None else head.bias.detach(),
    )
    found = linear_score(hidden_BTH.reshape(B * T, H), plain, k=min(k, head.words))
    return found.top_ids.view(B, T, -1)
