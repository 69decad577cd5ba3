"""Where the mass goes: the push at one state against theory §9.1–9.3, and the figure of it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support import generate

import opdsl
from opdsl.cli import cli
from opdsl.diagnostics import CompileError
from opdsl.formula.figure import SUFFIXES, drawn
from opdsl.formula.mass import flow, mass
from opdsl.formula.state import State, read, toy
from opdsl.passport import field
from opdsl.passport.evaluate import random_world
from opdsl.resources import methods

SHIPPED = methods()
PLAIN = """opd 1
method m {
  state     rollouts(student, group = 4)
  teacher   T = external(access = logits)
  support   SUPPORT
  feedback  FEEDBACK
  CREDIT
  aggregate mean(over = tokens)
}
"""


def at_toy(feedback: str, support: str = "full", state: State | None = None):
    credit = "credit immediate" if feedback.startswith("reward") else ""
    text = PLAIN.replace("SUPPORT", support).replace("FEEDBACK", feedback).replace("CREDIT", credit)
    return mass(opdsl.compile(text).spec, state or toy())


# ---- the numbers -------------------------------------------------------------------------------


def test_the_toy_state_is_what_it_says():
    s = toy()
    (teacher,) = s.teachers.values()
    assert s.student.sum() == pytest.approx(1) and teacher.sum() == pytest.approx(1)
    best = int(s.student.argmax())
    assert teacher[s.y] < s.student[s.y] / 10 and teacher[best] < s.student[best] / 5
    wanted = int(teacher.argmax())
    assert s.student[wanted] > 0.1 and wanted not in (best, s.y)


def test_plain_suppression_follows_theory():
    """dπ_v ∝ π_v (π_v + π_y − S₂), dπ_y ∝ −π_y (1 − 2π_y + S₂) (theory §9.1)."""
    s = toy()
    p, y = s.student, s.y
    found = at_toy("loss KL(T || student)").plain.moved
    square = (p**2).sum()
    want = p * (p + p[y] - square)
    want[y] = -p[y] * (1 - 2 * p[y] + square)
    assert np.allclose(found, want / -want[y])
    gains = found > 0
    assert gains.sum() == 1 and gains[p.argmax()]  # the squeeze: only the first choice gains


def test_direct_losses():
    s = toy()
    p, q = s.student, s.teachers[""]
    assert np.allclose(at_toy("loss KL(T || student)").spec.push, q - p)
    gap = np.log(p / q)
    reverse = at_toy("loss KL(student || T)").spec
    assert np.allclose(reverse.push, p * ((p * gap).sum() - gap))
    assert reverse.sign == 1 and not reverse.own


def test_a_sampled_reward_is_plain_suppression():
    s = toy()
    found = at_toy("reward logratio(T, rollout)", "sampled")
    a = np.log(s.teachers[""][s.y] / s.student[s.y])
    assert np.allclose(found.spec.push, a * (np.eye(9)[s.y] - s.student))
    assert np.allclose(found.spec.moved, found.plain.moved) and found.spec.sign == -1


def test_routing_moves_mass_to_what_the_teacher_wants():
    found = mass(opdsl.load("cr_opd").spec, toy())
    p, q, y = found.state.student, found.teacher, found.state.y
    up = found.spec.push > 1e-12
    assert np.array_equal(up, (q > p) & (p >= 1e-3))  # deficits the student can reach
    assert found.spec.push[y] == pytest.approx(np.log(q[y] / p[y]))
    weight = np.where(up, q - p, 0)
    assert np.allclose(found.spec.push[up], -found.spec.push[y] * weight[up] / weight.sum())
    assert found.spec.push.sum() == pytest.approx(0)
    assert found.spec.moved.argmax() == q.argmax() and found.spec.moved[p.argmax()] < 0


def test_the_evaluator_agrees_with_the_passport():
    """On nine tokens: the push at one state is the passport's field there."""
    spec = opdsl.compile(PLAIN.replace("SUPPORT", "top(4, of = T, tail = bin)").replace(
        "FEEDBACK", "loss KL(student || T) + 0.5 * KL(T || student)").replace("CREDIT", "")).spec  # fmt: skip
    world = random_world(3)
    want = field.per_token(spec, spec.terms[0].loss, world)
    names = tuple(map(str, range(9)))
    for i, y in ((0, 2), (5, 7)):
        state = State(names, world.pi[i], {"": world.q[i]}, world.p0[i], y)
        assert np.allclose(mass(spec, state).spec.push, want[i, y], atol=1e-9)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_spec_has_a_push(path):
    found = mass(opdsl.load(path).spec, toy())
    assert found.spec.push.sum() == pytest.approx(0, abs=1e-9)
    assert found.spec.moved.sum() == pytest.approx(0, abs=1e-9)
    data = json.loads(json.dumps(found.data(), allow_nan=False))
    assert len(data["push"]) == len(data["tokens"]) == 9 and data["sampled"] == "20"


@pytest.mark.parametrize("seed", range(0, 60))
def test_generated_specs_have_a_push(seed):
    found = mass(generate.compiled(generate.spec(seed).text).spec, toy())
    assert np.isfinite(found.spec.push).all() and found.spec.moved.sum() == pytest.approx(
        0, abs=1e-6
    )


def test_a_spec_that_lifts_the_token_says_so():
    s = State(("a", "b", "c"), np.array([0.2, 0.5, 0.3]), {"": np.array([0.8, 0.1, 0.1])},
              np.full(3, 1 / 3), 0)  # fmt: skip
    found = at_toy("reward logratio(T, rollout)", "sampled", s)
    assert found.spec.sign == 1 and "gains mass" in found.verdict
    assert drawn(found, ".png", "m")
    same = State(s.tokens, s.student, {"": s.student}, s.initial, 0)
    assert at_toy("loss KL(T || student)", "full", same).verdict.startswith("nothing is pushed")


def test_a_unit_is_what_the_token_loses_where_it_loses_much():
    s = toy()
    f = flow(s.student - np.eye(9)[s.y], s)
    assert f.own and f.moved[s.y] == pytest.approx(-1)
    g = flow(np.eye(9)[1] - np.eye(9)[0], s)
    assert not g.own and np.abs(g.moved).sum() == pytest.approx(2)


# ---- states that are given ---------------------------------------------------------------------

GOOD = {"student": [0.5, 0.3, 0.2], "teacher": [0.1, 0.8, 0.1], "sampled": 0}


def test_a_state_in_json():
    s = read(json.dumps(GOOD))
    assert s.tokens == ("0", "1", "2") and s.y == 0 and s.given
    s = read(json.dumps({**GOOD, "tokens": ["a", "b", "c"], "sampled": "c", "teacher": [2, -1, 0.5],
                         "initial": [1, 2, 3]}))  # fmt: skip
    assert s.y == 2 and s.teacher("T") == pytest.approx(
        np.exp([2, -1, 0.5]) / np.exp([2, -1, 0.5]).sum()
    )
    s = read(json.dumps({**GOOD, "teacher": {"math": [0.1, 0.8, 0.1], "T": [0.2, 0.2, 0.6]}}))
    assert s.teacher("T")[2] == pytest.approx(0.6)
    assert read(json.dumps({**GOOD, "teacher": [1.0, 0.0, 0.0]})).teacher("T").min() > 0


@pytest.mark.parametrize(
    "change, said",
    [
        ("[1, 2]", "object"), ("{", "not JSON"), ('{"student": [NaN, 1]}', "not a number"),
        ({"extra": 1}, "no 'extra'"), ({"student": None}, "list of numbers"),
        ({"student": [0.5, 0.5]}, "has 3 tokens, student has 2"),
        ({"student": [0.5, 0.3, 0.1]}, "add up to 0.9"), ({"student": [1.0]}, "2 to 60"),
        ({"student": [True, False, True]}, "list of numbers"), ({"student": [1e400, 0, 0]}, "not a number"),
        ({"student": [10**400, 0, 0]}, "list of numbers"),
        ({"student": [0.1] * 61}, "2 to 60"), ({"teacher": {}}, "empty"),
        ({"tokens": ["a"]}, "1 names"), ({"tokens": [1, 2, 3]}, "list of texts"),
        ({"sampled": 3}, "from 0 to 2"), ({"sampled": "z"}, "no token is named"),
        ({"sampled": "a", "tokens": ["a", "a", "b"]}, "more than one"), ({"sampled": True}, "index"),
    ],
)  # fmt: skip
def test_bad_states_are_said(change, said):
    text = change if isinstance(change, str) else json.dumps({**GOOD, **change})
    with pytest.raises(ValueError, match=said):
        read(text)
    with pytest.raises(ValueError, match="'teacher' is missing"):
        read('{"student": [0.5, 0.5], "sampled": 0}')


def test_a_teacher_the_state_lacks():
    state = read(json.dumps({**GOOD, "teacher": {"Q": GOOD["teacher"]}}))
    with pytest.raises(ValueError, match="no teacher 'T'"):
        mass(opdsl.load("gkd").spec, state)


# ---- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_bytes_every_time(suffix):
    found = mass(opdsl.load("cr_opd").spec, toy())
    first = drawn(found, suffix, "a title")
    assert first == drawn(found, suffix, "a title") and len(first) > 5000
    assert first.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])


def test_size_and_odd_tokens():
    tokens = ["\n", " ", "", "$x_1$", "a" * 80, "日本", "\x00", "^{", "\\frac"]
    s = toy()
    state = State(tuple(tokens), s.student, s.teachers, s.initial, 3, True)
    png = drawn(mass(opdsl.load("gae_opd").spec, state), ".png", "odd $\\tokens_{")
    width, height = struct.unpack(">II", png[16:24])
    assert 800 <= width <= 1400 and 300 <= height <= 900


# ---- the command -----------------------------------------------------------------------------------


def run(*args: str):
    return CliRunner().invoke(cli, ["explain", *args])


def test_command(tmp_path):
    out = tmp_path / "routing.png"
    found = run("cr_opd", "--figure", str(out), "--format", "json")
    assert found.exit_code == 0 and out.read_bytes().startswith(b"\x89PNG")
    data = json.loads(found.stdout)
    assert data["push"]["sampled"] == "20" and data["push"]["suppression"]["moved"][0] > 1
    assert "push" not in json.loads(run("cr_opd", "--format", "json").output)
    given = tmp_path / "state.json"
    given.write_text(json.dumps({**GOOD, "tokens": ["a", "b", "c"]}))
    found = run("sampled_opd", "--figure", str(tmp_path / "x.svg"), "--state", str(given))
    assert found.exit_code == 0 and "'a' loses mass" in found.stderr
    assert found.stdout == opdsl.load("sampled_opd").explain()


def test_command_mistakes(tmp_path):
    out = str(tmp_path / "a.png")
    assert run("cr_opd", "--figure", "a.txt").exit_code == 2
    assert run("cr_opd", "--figure", str(tmp_path)).exit_code == 2
    assert run("cr_opd", "--state", __file__).exit_code == 2
    assert run("cr_opd", "--figure", out, "--state", str(tmp_path / "no.json")).exit_code == 2
    assert run("cr_opd", "--figure", out, "--dump", "ir").exit_code == 2
    for name in ("KL", "OPD302"):
        found = run(name, "--figure", out)
        assert found.exit_code == 2 and "code or a definition" in found.stderr
    for text in (b"{}", b"\xff\xfe\x00", b"[" * 100000):
        (tmp_path / "bad.json").write_bytes(text)
        found = run("cr_opd", "--figure", out, "--state", str(tmp_path / "bad.json"))
        assert isinstance(found.exception, CompileError)
        assert [d.code for d in found.exception.diagnostics] == ["OPD702"]
    found = run("cr_opd", "--figure", str(tmp_path / "nowhere" / "a.png"))
    assert found.exit_code == 3 and "OPD704" in found.stderr
    assert not Path(out).exists()
