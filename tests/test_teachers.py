"""Averages of the student as teachers: how often they move, and that a resumed one goes on."""

from __future__ import annotations

import torch

import opdsl
from opdsl.train.teachers.local import MovingAverage

TEXT = """opd 1
method m {
  state     rollouts(student)
  teacher   T = ema(student, decay = 0, every = 3 steps, context = "Hint: {hint}")
  support   full
  feedback  loss KL(student || T)
  aggregate mean(over = tokens)
}
"""


def average(student, every: int = 3) -> MovingAverage:
    return MovingAverage("T", student, 0.0, every, lambda p: p, None, 5)


def moved(student, teacher: MovingAverage, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        with torch.no_grad():
            student.weight += 1
        teacher.after_update()
        seen.append(float(teacher.average.weight[0, 0]) - float(student.weight.detach()[0, 0]))
    return seen


def test_a_copy_is_made_every_n_steps() -> None:
    student = torch.nn.Linear(2, 2)
    assert [round(x) for x in moved(student, average(student), 7)] == [-1, -2, 0, -1, -2, 0, -1]


def test_a_resumed_copy_keeps_its_rhythm() -> None:
    student = torch.nn.Linear(2, 2)
    teacher = average(student)
    moved(student, teacher, 4)
    again = average(student)
    again.load_state(teacher.state())
    assert [round(x) for x in moved(student, again, 2)] == [-2, 0]


def test_it_is_part_of_the_method() -> None:
    m = opdsl.compile(TEXT)
    assert "a copy of the student every 3 steps with more context" in m.explain()
    other = opdsl.compile(TEXT.replace("3 steps", "4 steps"))
    assert m.fingerprints["method"] != other.fingerprints["method"]


def test_steps_are_whole() -> None:
    try:
        opdsl.compile(TEXT.replace("3 steps", "0.5"))
    except opdsl.CompileError as e:
        assert {d.code for d in e.diagnostics} == {"OPD110"}
    else:
        raise AssertionError("half a step was taken")
