"""Guards: each names the step, the sample and the cure, stops before an update, exits with 4.

Memory that runs out changes the time a run takes and nothing else.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from fake_method import FakeBatch, FakeMethod
from support.heard import Heard
from support.models import tiny
from test_trainer import settings, weights

import opdsl
from opdsl.train import checkpoint, guards, setup
from opdsl.train.errors import GuardStop, RunProblem
from opdsl.train.loop import train
from opdsl.train.metrics import read_lines
from opdsl.train.plan import make_plan
from opdsl.train.progress import Silent
from opdsl.train.settings import RunSettings
from opdsl.train.states import States
from opdsl.train.step import Engine
from opdsl.train.teachers.local import LocalTeacher
from opdsl.train.watch import DEFAULTS, Rule, Watch, parse_guard


@pytest.fixture(autouse=True)
def fake_batch(monkeypatch):
    monkeypatch.setattr(opdsl, "Batch", FakeBatch, raising=False)


def scaled_teacher(folder: Path, scale: float, pair) -> dict:
    """The pair with a teacher whose last norm, and so every logit, is scaled."""
    from safetensors.torch import load_file, save_file

    tiny(folder, 1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return pair | {"teachers": {"T": str(folder)}}


def stopped(method, s: RunSettings) -> GuardStop:
    """The stop of a run; whatever the guard, it must say all of this."""
    with pytest.raises(GuardStop) as caught:
        train(method, s)
    stop, out = caught.value, Path(s.out)
    assert stop.exit_code == 4 and f"at step {stop.step}" in stop.message
    diagnostic = stop.diagnostic
    assert "checkpoint is intact" in " ".join(diagnostic.notes) and diagnostic.helps
    assert not (out / "summary.json").exists()
    assert len(read_lines(out / "metrics.jsonl")) == stop.step - 1
    return stop


def names_a_sample(stop: GuardStop) -> bool:
    return stop.row is not None and any(f"sample {stop.row}: " in n for n in stop.diagnostic.notes)


def unchanged(out: Path, pair) -> bool:
    """Whether no parameter has moved since the start."""
    from safetensors.torch import load_file

    before = load_file(os.path.join(pair["student"], "model.safetensors"))
    found = checkpoint.newest(out / "checkpoints").tensors["student"]
    return all(torch.equal(x, before[name]) for name, x in found.items())


# ---- teachers and log-ratios -----------------------------------------------------------------------


def test_a_teacher_that_lost_its_weights_stops_the_first_step(tmp_path, pair):
    bad = scaled_teacher(tmp_path / "zero", 0.0, pair)
    stop = stopped(FakeMethod("reverse"), settings(tmp_path, bad))
    assert stop.diagnostic.code == "OPD720" and stop.step == 1 and names_a_sample(stop)
    assert "teacher T" in stop.message and "100.00% of ln V" in stop.message
    assert stop.position is not None and "files" in stop.diagnostic.helps[0]
    train(FakeMethod("reverse"), settings(tmp_path / "off", bad, guards=rule("flat_teacher=off")))


def rule(*texts: str) -> dict[str, Rule]:
    return dict(parse_guard(text) for text in texts)


def test_a_nearly_flat_teacher_is_told_once_and_counted(tmp_path, pair):
    near = scaled_teacher(tmp_path / "near", 0.1, pair)
    heard = Heard()
    summary = train(FakeMethod("reverse"), settings(tmp_path, near), heard)
    assert sum("says nothing" in line for line in heard.lines) == 1
    assert summary.counts == {"warnings of the guard flat_teacher": 3}
    # An ordinary teacher, untrained as it is, passes.
    assert train(FakeMethod("reverse"), settings(tmp_path / "plain", pair)).counts == {}


@pytest.mark.parametrize("scale", [30.0, math.inf])
def test_log_ratios_that_explode(tmp_path, pair, scale):
    method = FakeMethod("reverse")
    if math.isinf(scale):  # a teacher that excludes words: −inf is a legitimate score
        bad, ratios = pair, -math.inf
        score = LocalTeacher.score

        def excluding(self, *args, **kwargs):
            found = score(self, *args, **kwargs)
            found.logits[..., 3:] = -math.inf
            return found

        method.loss.forward = closed(method)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalTeacher, "score", excluding)
            stop = stopped(method, settings(tmp_path, bad, guards=rule("log_ratio=halt")))
        assert f"{ratios:.1f} nats" in stop.message
        return
    bad = scaled_teacher(tmp_path / "loud", scale, pair)
    warned = train(method, settings(tmp_path, bad, guards=rule("log_ratio=20")))
    assert warned.counts == {"warnings of the guard log_ratio": 3}
    stop = stopped(method, settings(tmp_path / "h", bad, guards=rule("log_ratio=20:halt")))
    assert stop.step == 1 and names_a_sample(stop) and stop.position is not None
    assert "beyond 20" in stop.message and "shape clip" in stop.diagnostic.helps[0]


def closed(method):
    """A loss of zero, whatever the batch."""
    whole = method.loss.forward

    def forward(batch, context=None):
        result = whole(batch, context)
        result.loss = batch.student_logits.sum() * 0.0
        return result

    return forward


def test_the_initial_policy_is_guarded_like_a_teacher(tmp_path, pair, monkeypatch):
    method = FakeMethod("reverse")
    method.needs.initial = True
    score = LocalTeacher.score

    def poisoned(self, *args, **kwargs):
        found = score(self, *args, **kwargs)
        if self.name == "initial":
            found.logits[1, 0, 5] = math.nan
        return found

    monkeypatch.setattr(LocalTeacher, "score", poisoned)
    stop = stopped(method, settings(tmp_path, pair))
    assert "initial" in stop.message and (stop.row, stop.position) == (1, 0)


# ---- weights, lengths, idle steps --------------------------------------------------------------------


@pytest.mark.parametrize("where", ["moment", "weight"])
def test_a_poisoned_state_is_never_saved(tmp_path, pair, where, monkeypatch):
    """NaN in the optimizer gives NaN weights one step later: the good checkpoint must stay."""
    whole = Engine.step

    def poisoned(self, step, watch):
        record = whole(self, step, watch)
        if step == 2:
            p = self.parameters[0]
            found = self.optimizer.state[p]["exp_avg"] if where == "moment" else p.data
            found.view(-1)[0] = math.nan
        return record

    monkeypatch.setattr(Engine, "step", poisoned)
    with pytest.raises(GuardStop) as caught:
        train(FakeMethod("reverse"), settings(tmp_path, pair, steps=5, save_every=1, keep=1))
    assert "the weights of" in caught.value.message and caught.value.step == 3
    assert not caught.value.skippable and "--resume" in caught.value.diagnostic.helps[0]
    assert checkpoint.newest(tmp_path / "out" / "checkpoints").step == 2


def test_a_policy_that_cannot_be_sampled_from(tmp_path, pair, monkeypatch):
    from opdsl.train.rollout import NonFiniteLogits

    whole = States.rows

    def broken(self, step):
        if step == 1:
            raise NonFiniteLogits(2, 3)
        return whole(self, step)

    monkeypatch.setattr(States, "rows", broken)
    stop = stopped(FakeMethod("reverse"), settings(tmp_path, pair))
    assert (stop.step, stop.row, stop.position) == (2, 2, 3)
    assert "the batch began with the prompt" in stop.diagnostic.notes[0]


@pytest.mark.parametrize("action", ["warn", "halt"])
def test_lengths_that_explode(tmp_path, pair, action, monkeypatch):
    whole, calls = guards.describe, []

    def growing(rows, outcome_B):
        calls.append(0)
        mean = 3.0 if len(calls) <= 6 else 13.0
        return whole(rows, outcome_B) | {"length": mean, "finished": 0.25}

    monkeypatch.setattr(guards, "describe", growing)
    s = settings(tmp_path, pair, steps=8, save_every=1, guards=rule(f"length={action}"))
    if action == "warn":
        assert train(FakeMethod("reverse"), s).counts == {"warnings of the guard length": 2}
        return
    stop = stopped(FakeMethod("reverse"), s)
    assert stop.step == 7 and names_a_sample(stop)
    assert "4.3 times that of the first steps (3.0)" in stop.message and "75%" in stop.message
    # What the first steps were like is in the checkpoint, so a resumed run judges the same.
    calls[:] = [0] * 6
    with pytest.raises(GuardStop) as caught:
        train(FakeMethod("reverse"), RunSettings(**(s.__dict__ | {"resume": True})))
    assert caught.value.message == stop.message


@pytest.mark.parametrize("kind", ["empty", "masked"])
def test_steps_that_change_nothing_stop_in_the_end(tmp_path, pair, kind, monkeypatch):
    method = FakeMethod("reverse")
    if kind == "masked":
        method.loss.forward = closed(method)
    else:
        whole = States.rows
        monkeypatch.setattr(
            States, "rows", lambda self, step: whole(self, step).select([], "empty")
        )
    more = {"steps": 6, "save_every": 1, "guards": rule("idle=2"), "optimize": {"weight_decay": 1}}
    stop = stopped(method, settings(tmp_path, pair, **more))
    assert stop.step == 3 and "for 3 steps in a row" in stop.message
    assert ("8 empty" if kind == "empty" else "gradient was zero") in stop.message
    note = stop.diagnostic.notes[0]
    assert "the batch began with the prompt" in note if kind == "empty" else "sample 0: " in note
    assert unchanged(tmp_path / "out", pair)


def test_what_guards_can_be_told():
    assert parse_guard("log-ratio=30:halt") == ("log_ratio", Rule(30.0, "halt"))
    assert parse_guard("idle=7") == ("idle", Rule(7.0, DEFAULTS["idle"].action))
    assert parse_guard("length=off") == ("length", Rule(DEFAULTS["length"].limit, "off"))
    for text, code in [("lenght=3", "OPD119"), ("idle=-1", "OPD112"), ("idle=stop", "OPD112")]:
        with pytest.raises(RunProblem) as caught:
            parse_guard(text)
        assert caught.value.diagnostic.code == code and caught.value.exit_code == 2
        assert caught.value.diagnostic.helps


def test_a_limit_is_passed_only_from_above():
    watch = Watch({**DEFAULTS, "length": Rule(2.0, "halt")})
    longest = lambda: (0, "sample 0: …")  # noqa: E731
    for step in range(1, 6):
        watch.lengths({"length": 5.0, "finished": 0.0}, step, longest)
    watch.lengths({"length": 10.0, "finished": 0.0}, 6, longest)  # exactly twice
    watch.lengths({"length": 50.0, "finished": 0.5}, 7, longest)  # long, but they end
    watch.lengths({}, 8, longest)  # nothing was sampled
    with pytest.raises(GuardStop):
        watch.lengths({"length": 10.1, "finished": 0.4}, 9, longest)


# ---- memory ----------------------------------------------------------------------------------------


def exhausted(work, sizes, limit: int, kind=torch.OutOfMemoryError):
    """`work`, failing while it is asked for more than `limit` rows; sizes(args) says how many."""

    def wrapped(*args, **kwargs):
        rows = sizes(args)
        if rows > limit:
            raise kind(f"CUDA out of memory. Tried to allocate {rows} GiB")
        return work(*args, **kwargs)

    return wrapped


MEMORY = {
    "gradient": (Engine, "_gradient", lambda args: len(args[1])),
    "parts": (Engine, "_gradient_in_parts", lambda args: args[4]),
    "teacher": (LocalTeacher, "_piece", lambda args: len(args[2])),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["gradient", "teacher"])
def test_memory_running_out_keeps_the_mathematics(tmp_path, pair, kind, fused, monkeypatch):
    """At 16, 8 and 4 rows; the weights after three steps agree to 1e-6."""
    if fused:
        monkeypatch.setattr("opdsl.train.setup.FUSED_FROM", 10)
    more = {"prompts": 16, "optimize": {"warmup": 1}}
    train(FakeMethod("returns"), settings(tmp_path / "plain", pair, **more))
    with monkeypatch.context() as patch:
        for name in ("gradient", "parts") if kind == "gradient" else ("teacher",):
            owner, method, sizes = MEMORY[name]
            patch.setattr(owner, method, exhausted(getattr(owner, method), sizes, 3))
        summary = train(FakeMethod("returns"), settings(tmp_path / "cramped", pair, **more))
    (what, times), *rest = summary.counts.items()
    assert "memory ran out" in what and times == 3 and not rest
    one, two = weights(tmp_path / "plain" / "out"), weights(tmp_path / "cramped" / "out")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)


def test_one_gradient_whatever_the_rows_at_a_time(tmp_path, pair):
    """The gradient itself, before an optimizer divides it by its own size."""
    found = {}
    for size in (None, 5, 2, 1):
        method = FakeMethod("returns")
        plan = make_plan(method, settings(tmp_path / str(size), pair, micro_batch=size))
        engine = setup.build(method, plan, Silent()).engine
        rows = engine.states.rows(0)
        engine._gradient_within_memory(rows, engine._given(rows, None, 0), 0)
        found[size] = torch.cat([p.grad.flatten() for p in engine.parameters])
    scale = found[None].norm()
    assert scale > 1e-2
    for size, gradient in found.items():
        assert (gradient - found[None]).norm() <= 1e-6 * scale, size


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_sampling_with_less_memory_is_sampling(tmp_path, pair, kind, monkeypatch):
    """Fewer rows at a time draw other numbers of the same law, and a resumed run the same ones."""
    from opdsl.train import states

    more = {"steps": 4, "save_every": 2, "optimize": {"warmup": 1}}
    with monkeypatch.context() as patch:
        cramped = exhausted(states.decode, lambda args: len(args[1]), 3, kind)
        patch.setattr(states, "decode", cramped)
        summary = train(FakeMethod("reverse"), settings(tmp_path / "a", pair, **more))
    assert summary.counts == {"times memory ran out (rows sampled halved)": 3}
    with monkeypatch.context() as patch:
        patch.setattr(states, "decode", cramped)
        whole = Engine.step

        def dying(self, step, watch):
            if step == 3:
                raise KeyboardInterrupt
            return whole(self, step, watch)

        patch.setattr(Engine, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            train(FakeMethod("reverse"), settings(tmp_path / "b", pair, **more))
    train(FakeMethod("reverse"), settings(tmp_path / "b", pair, resume=True, **more))
    for name in ("metrics.jsonl", "evals.jsonl", "student/model.safetensors"):
        one, two = (tmp_path / x / "out" / name for x in "ab")
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("kind", ["gradient", "teacher", "sampling", "optimizer"])
def test_one_row_too_many_is_a_message(tmp_path, pair, kind, monkeypatch):
    from opdsl.train import states

    if kind == "sampling":
        monkeypatch.setattr(states, "decode", exhausted(states.decode, lambda args: 1, 0))
    elif kind == "optimizer":
        work = exhausted(torch.optim.AdamW.step, lambda args: 1, 0, RuntimeError)
        monkeypatch.setattr(torch.optim.AdamW, "step", work)
    else:
        for name in ("gradient", "parts") if kind == "gradient" else ("teacher",):
            owner, method, sizes = MEMORY[name]
            monkeypatch.setattr(owner, method, exhausted(getattr(owner, method), sizes, 0))
    with pytest.raises(RunProblem) as caught:
        train(FakeMethod("reverse"), settings(tmp_path, pair))
    problem = caught.value
    assert problem.diagnostic.code == "OPD721" and problem.exit_code == 4
    assert "GiB" in problem.diagnostic.notes[0] and "--max-tokens" in problem.diagnostic.helps[0]
