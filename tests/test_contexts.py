"""Teachers that read more than the student: `context = "…"` of every kind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.models import tiny

import opdsl

TEXT = """opd 1
method m {{
  state     rollouts(student)
  teacher   T = {kind}
  support   full
  feedback  loss KL(student || T)
  aggregate mean(over = tokens)
}}
"""
KINDS = {
    "external": 'external(access = logits, context = "{solution}")',
    "self": 'self(context = "{solution}")',
    "ema": 'ema(student, decay = 0.9, context = "{solution}")',
    "initial": 'initial(context = "{solution}")',
}


def views(kind: str, folder) -> dict[str, object]:
    """Teacher role -> the ids it reads for a prompt whose context is 9."""
    import torch

    from opdsl.train.models import load_model
    from opdsl.train.runtime import Runtime
    from opdsl.train.teachers.make import TeacherMaker

    method = opdsl.compile(TEXT.format(kind=kind))
    cpu = torch.device("cpu")
    student = load_model(tiny(folder, 0), "student", torch.float32, cpu)
    data = SimpleNamespace(context_ids=lambda p, t: (9, *p.ids) if t else p.teacher_ids)
    maker = TeacherMaker(method, student, data, Runtime(cpu, "fp32"), 11, False, None)
    teachers, start = maker.make({"T": student})
    prompt = SimpleNamespace(ids=(1, 2), teacher_ids=(1, 2))
    assert start is None or start.view(prompt) == (1, 2)
    return {name: tuple(t.view(prompt)) for name, t in teachers.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_is_read_by_every_kind(kind: str, tmp_path) -> None:
    assert views(KINDS[kind], tmp_path) == {"T": (9, 1, 2)}


@pytest.mark.parametrize("kind", ["external(access = logits)", "ema(student)", "initial"])
def test_without_one_the_prompt_is_read_as_it_is(kind: str, tmp_path) -> None:
    assert views(kind, tmp_path) == {"T": (1, 2)}


def test_a_start_with_context_is_not_the_plain_start() -> None:
    text = TEXT.format(kind=KINDS["initial"])
    plain = opdsl.compile(TEXT.format(kind="initial"))
    m = opdsl.compile(text)
    assert not m.needs.initial and plain.needs.initial
    assert "with more context" in m.explain() and m.fingerprints != plain.fingerprints


def test_a_context_is_a_text() -> None:
    with pytest.raises(opdsl.CompileError) as e:
        opdsl.compile(TEXT.format(kind="external(access = logits, context = 3)"))
    assert [d.code for d in e.value.diagnostics] == ["OPD202"]
