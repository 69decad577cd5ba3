"""The trainer on its own: states, guards, micro-batches, critics, data files, models.

Methods are stand-ins (`fake_method`), models are untrained Llamas of 10,000 parameters; the one
test that learns uses the embedded pair.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_method import FakeBatch, FakeMethod, State, TeacherDecl, run_block, with_critic
from support.models import tiny

import opdsl
from opdsl.train import critic, models, streams
from opdsl.train.errors import GuardStop, RunProblem
from opdsl.train.loop import train
from opdsl.train.metrics import read_lines
from opdsl.train.plan import make_plan
from opdsl.train.settings import Recipe, RunSettings, parse_optimize, recipe_for


@pytest.fixture(autouse=True)
def fake_batch(monkeypatch):
    monkeypatch.setattr(opdsl, "Batch", FakeBatch, raising=False)


def settings(tmp_path, pair, **more):
    base = {"steps": 3, "prompts": 8, "eval_every": 100, "eval_prompts": 16, "report": False}
    return RunSettings(out=str(tmp_path / "out"), **(base | pair | more))


def weights(folder):
    from safetensors.torch import load_file

    return load_file(os.path.join(folder, "student", "model.safetensors"))


# ---- the loop ------------------------------------------------------------------------------------


def test_a_run_leaves_its_artefacts_and_repeats_exactly(tmp_path, pair):
    outs = []
    for name in ("a", "b"):
        s = settings(tmp_path / name, pair, eval_every=1)
        summary = train(FakeMethod("reverse"), s)
        outs.append(tmp_path / name / "out")
        assert summary.steps == 3 and len(summary.evals) == 4
    for name in ("metrics.jsonl", "evals.jsonl", "student/model.safetensors"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    records = read_lines(outs[0] / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3]
    for key in ("loss", "kl", "entropy", "reward", "length", "finished", "grad_norm", "lr", "kept"):
        assert all(math.isfinite(r[key]) for r in records), key
    assert not any("second" in key for key in records[0])
    assert json.loads((outs[0] / "summary.json").read_text())["method"] == "fake_reverse"
    # The KL measured beside the loss is the loss, for a method that is exactly that.
    assert records[0]["kl"] == pytest.approx(records[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("fused", [False, True])
def test_micro_batches_change_nothing(tmp_path, pair, size, fused, monkeypatch):
    if fused:
        monkeypatch.setattr("opdsl.train.setup.FUSED_FROM", 10)
    train(FakeMethod("returns"), settings(tmp_path / "one", pair, steps=2))
    train(FakeMethod("returns"), settings(tmp_path / "two", pair, steps=2, micro_batch=size))
    one, two = (weights(tmp_path / name / "out") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=2e-6)


def test_memory_running_out_halves_the_rows_per_pass(tmp_path, pair, monkeypatch):
    from opdsl.train.step import Engine

    whole = Engine._gradient
    calls = []

    def gradient(self, rows, given, step):
        calls.append(len(rows))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return whole(self, rows, given, step)

    monkeypatch.setattr(Engine, "_gradient", gradient)
    summary = train(FakeMethod("reverse"), settings(tmp_path, pair))
    assert summary.counts == {"times memory ran out (rows per pass halved)": 1}
    monkeypatch.undo()
    monkeypatch.setattr(opdsl, "Batch", FakeBatch, raising=False)
    train(FakeMethod("reverse"), settings(tmp_path / "plain", pair))
    one, two = weights(tmp_path / "out"), weights(tmp_path / "plain" / "out")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=2e-6)


@pytest.mark.slow
def test_the_embedded_pair_learns(tmp_path):
    summary = train(FakeMethod("reverse"), RunSettings(out=str(tmp_path), report=False))
    assert summary.at(0)["accuracy"] < 0.3
    assert summary.at(100)["accuracy"] > 0.9
    assert any("no models given" in note for note in summary.notes)


# ---- states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "states",
    [
        (State(group=4),),
        (State(kind="sequences", policy="data"),),
        (State(share=0.5), State(kind="sequences", policy="golden", share=0.5)),
        (State(policy="old", lag=2),),
        (State(policy="T"),),
        (State(prefix=2, top_p=0.9, top_k=5, temperature=0.7),),
    ],
    ids=["group", "data", "mix", "old", "teacher", "prefix"],
)
def test_state_sources(tmp_path, pair, states):
    summary = train(FakeMethod("returns", states=states), settings(tmp_path, pair))
    assert math.isfinite(summary.last["loss"])
    assert summary.last["rows"] == 8 * states[0].group


def test_a_share_is_kept_on_average_and_reproducible():
    counts = [streams.allocate([0.3, 0.7], 10, 5, step).count(0) for step in range(400)]
    assert set(counts) == {3}
    counts = [streams.allocate([0.25, 0.75], 10, 5, step).count(0) for step in range(400)]
    assert set(counts) == {2, 3} and sum(counts) / 400 == pytest.approx(2.5, abs=0.1)
    assert streams.allocate([0.5, 0.5], 9, 1, 2) == streams.allocate([0.5, 0.5], 9, 1, 2)
    with pytest.raises(ValueError):
        streams.allocate([0.5, 0.6], 4, 0, 0)


def test_rows_of_a_file_come_in_shuffled_passes():
    first = streams.epoch_rows(7, 0, 7, seed=3)
    assert sorted(first) == list(range(7))
    # Batches are cuts of one stream, so resuming needs only the step.
    assert streams.epoch_rows(7, 3, 4, 3) == first[3:]
    assert streams.epoch_rows(7, 5, 4, 3) == first[5:] + streams.epoch_rows(7, 7, 2, 3)


@pytest.mark.parametrize(
    "teacher",
    [
        TeacherDecl("T", "self", context="answer: {reference}"),
        TeacherDecl("T", "ema", decay=0.9),
        TeacherDecl("T", "initial"),
    ],
    ids=["self", "ema", "initial"],
)
def test_teachers_made_of_the_student(tmp_path, pair, teacher):
    own = {k: v for k, v in pair.items() if k != "teachers"}
    method = FakeMethod("reverse", teachers=(teacher,))
    first = train(method, settings(tmp_path, own, steps=1))
    # At step 0 the average, the start and the student are one policy.
    assert first.last["loss"] == pytest.approx(0.0, abs=1e-5)


def test_teachers_with_different_heads_share_one_that_is_exact():
    from opdsl.emit.kernels.head import Head
    from opdsl.train.teachers.local import joint_heads

    generator = torch.Generator().manual_seed(0)
    sizes = (3, 5)
    heads = [Head(torch.randn(7, h, generator=generator), vocab=6) for h in sizes]
    joint, pads = joint_heads(heads)
    for head, size, pad in zip(heads, sizes, pads):
        hidden = torch.randn(4, size, generator=generator)
        found = joint.logits(torch.nn.functional.pad(hidden, pad))
        torch.testing.assert_close(found, head.logits(hidden), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError):
        joint_heads([heads[0], Head(heads[1].weight, scale=2.0)])


# ---- guards -----------------------------------------------------------------------------------------


def test_a_teacher_that_is_not_finite_stops_the_run(tmp_path, pair):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "teacher"
    tiny(folder, 1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    bad = pair | {"teachers": {"T": str(folder)}}
    with pytest.raises(GuardStop) as caught:
        train(FakeMethod("reverse"), settings(tmp_path, bad))
    stop = caught.value
    assert stop.exit_code == 4 and stop.step == 1 and stop.row is not None
    assert "teacher T" in stop.message and "sample" in stop.message
    assert not (tmp_path / "out" / "summary.json").exists()
    assert (
        json.loads((tmp_path / "out" / "bad-batch-step-000001.json").read_text())["row"] == stop.row
    )


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(
    tmp_path, pair, where, monkeypatch
):
    method = FakeMethod("reverse")
    forward = type(method.loss).forward
    state = {"calls": 0}

    def poisoned(self, batch, context=None):
        result = forward(self, batch, context)
        state["calls"] += 1
        if state["calls"] > 2:
            scale = float("nan") if where == "loss" else 1.0
            result.loss = result.loss * scale
            if where == "gradient":
                result.loss.register_hook(lambda g: g * float("inf"))
        return result

    monkeypatch.setattr(type(method.loss), "forward", poisoned)
    with pytest.raises(GuardStop) as caught:
        train(method, settings(tmp_path, pair, steps=5, save_every=1))
    assert caught.value.step == 3 and where in caught.value.message
    assert len(read_lines(tmp_path / "out" / "metrics.jsonl")) == 2
    assert (tmp_path / "out" / "checkpoints" / "step-000002" / "manifest.json").exists()


def test_non_finite_steps_can_be_skipped_and_are_counted(tmp_path, pair, monkeypatch):
    method = FakeMethod("reverse")
    forward = type(method.loss).forward
    state = {"calls": 0}

    def poisoned(self, batch, context=None):
        result = forward(self, batch, context)
        state["calls"] += 1
        # The second step, and the first part taken to find the sample.
        if 2 <= state["calls"] <= 3:
            result.loss = result.loss * float("nan")
        return result

    monkeypatch.setattr(type(method.loss), "forward", poisoned)
    summary = train(method, settings(tmp_path, pair, skip_nonfinite=1))
    assert summary.counts["steps skipped: not finite"] == 1


def test_a_zero_gradient_changes_nothing(tmp_path, pair, monkeypatch):
    method = FakeMethod("reverse")
    forward = type(method.loss).forward

    def closed(self, batch, context=None):
        result = forward(self, batch, context)
        result.loss = result.loss * 0.0
        return result

    monkeypatch.setattr(type(method.loss), "forward", closed)
    more = {"optimize": {"weight_decay": 0.5}}
    summary = train(method, settings(tmp_path, pair, **more))
    assert summary.counts == {"steps with zero gradient": 3}
    from safetensors.torch import load_file

    before = load_file(os.path.join(pair["student"], "model.safetensors"))
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, before[name])


# ---- critics -----------------------------------------------------------------------------------------


def test_lambda_returns_against_the_definition():
    generator = torch.Generator().manual_seed(0)
    B, T, gamma, lam = 3, 5, 0.9, 0.7
    reward, values = (
        torch.randn(B, T, generator=generator),
        torch.randn(B, T + 1, generator=generator),
    )
    lengths = [5, 2, 3]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    values[1, 2] = 0.0  # ended by the end token
    found = critic.lambda_returns(reward, values, mask, gamma, lam)
    for b, n in enumerate(lengths):
        ahead = values[b, n].item()
        for t in reversed(range(n)):
            mixed = (1 - lam) * values[b, t + 1].item() + lam * ahead
            ahead = reward[b, t].item() + gamma * mixed
            assert found[b, t].item() == pytest.approx(ahead, abs=1e-5)
        assert torch.all(found[b, n:] == 0)


CRITIC = SimpleNamespace(name="V", init="student", lr=1e-2, warmup=4)


def test_the_student_waits_for_its_critic(tmp_path, pair, monkeypatch):
    monkeypatch.delattr(opdsl, "Batch")  # a compiled method reads a real batch
    train(with_critic(warmup=4), settings(tmp_path, pair, steps=2))
    records = read_lines(tmp_path / "out" / "metrics.jsonl")
    warm = [r for r in records if r["step"] <= 0]
    assert [r["step"] for r in records] == [-3, -2, -1, 0, 1, 2]
    assert all("loss" not in r and math.isfinite(r["critic_mse"]) for r in warm)
    assert all("loss" in r and "critic_ev" in r for r in records[4:])


@pytest.mark.parametrize("init", ["student", "zero"])
def test_a_critic_learns_values_that_its_states_determine(pair, init):
    from opdsl.train.runtime import Runtime

    runtime = Runtime(torch.device("cpu"), "fp32")
    student = models.load_model(pair["student"], "student", torch.float32, "cpu")
    before = models.weights_hash(student)
    learner = critic.Critic(SimpleNamespace(**(CRITIC.__dict__ | {"init": init})), student, runtime)
    generator = torch.Generator().manual_seed(0)
    prompts = [[1, 20, 5]] * 64
    measured = []
    for _ in range(60):
        tokens = torch.randint(3, 44, (64, 4), generator=generator)
        lengths = torch.full((64,), 4)
        mask = torch.ones(64, 4, dtype=torch.bool)
        # What the state before position t knows: the token at t - 1.
        seen = torch.cat([torch.full((64, 1), 5), tokens[:, :-1]], 1)
        targets = torch.where(seen % 2 == 0, -30.0, 10.0)
        values = learner.values(prompts, tokens, lengths, mask[:, 0])
        assert torch.all(values[:, 4] == 0)  # behind the end token
        measured.append(learner.learn(prompts, tokens, lengths, mask, targets, values))
    assert measured[0]["critic_ev"] == pytest.approx(0.0, abs=1e-6)
    assert measured[-1]["critic_ev"] > (0.9 if init == "student" else 0.2)
    assert models.weights_hash(student) == before


# ---- settings and plans ---------------------------------------------------------------------------------


def test_learning_rate_schedules():
    recipe = Recipe(lr=1.0, steps=20, batch=8, warmup=4, schedule="linear")
    assert [recipe.lr_at(s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert recipe.lr_at(12) == pytest.approx(0.5) and recipe.lr_at(20) == 0.0
    cosine = Recipe(lr=1.0, steps=20, batch=8, warmup=4, schedule="cosine")
    assert cosine.lr_at(12) == pytest.approx(0.5)
    assert Recipe(lr=1.0, steps=20, batch=8, warmup=0).lr_at(19) == 1.0


def test_recipes_of_the_embedded_pair_and_of_real_models():
    spec = {"lr": 1e-6, "steps": 500, "batch": 128, "epochs": 2}
    embedded, notes = recipe_for(spec, RunSettings(), embedded=True, group=4, rows_of_data=None)
    assert (embedded.lr, embedded.steps, embedded.batch, embedded.epochs) == (1e-3, 100, 64, 2)
    assert "lr" in notes[0]
    big, _ = recipe_for({}, RunSettings(), embedded=True, group=16, rows_of_data=None)
    assert big.batch == 8 * 16  # at least eight prompts
    real, _ = recipe_for(spec, RunSettings(), embedded=False, group=4, rows_of_data=99)
    assert (real.lr, real.steps, real.batch) == (1e-6, 500, 128)
    one_pass, notes = recipe_for({}, RunSettings(), embedded=False, group=4, rows_of_data=100)
    assert one_pass.steps == 7 and "one pass" in notes[0]
    user = RunSettings(optimize={"lr": 0.5}, steps=7, prompts=3)
    asked, _ = recipe_for(spec, user, embedded=True, group=4, rows_of_data=None)
    assert (asked.lr, asked.steps, asked.batch) == (0.5, 7, 12)


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("lrr", "1", "OPD119"),
        ("lr", "-1", "OPD112"),
        ("steps", "2.5", "OPD112"),
        ("lr", "x", "OPD112"),
    ],
)
def test_wrong_optimize_settings(name, text, code):
    with pytest.raises(RunProblem) as caught:
        parse_optimize(name, text)
    assert caught.value.diagnostic.code == code and caught.value.exit_code == 2


def test_optimize_values():
    assert parse_optimize("lr", "3e-4") == ("lr", 3e-4)
    assert parse_optimize("warmup", "20 steps") == ("warmup", 20)
    assert parse_optimize("adapter", "lora(rank = 8)") == ("adapter", ("lora", {"rank": 8}))
    assert parse_optimize("schedule", "cosine") == ("schedule", "cosine")


def test_a_run_block_counts_only_with_models(tmp_path):
    plain = FakeMethod("reverse", runs={"small": run_block(steps=7, seed=3)})
    plan = make_plan(plain, RunSettings(out=str(tmp_path)))
    assert (plan.student, plan.task, plan.seed, plan.recipe.steps) == ("embedded", "chain", 3, 7)
    block = run_block(student="org/small", T="org/big", data="train.jsonl", seed=7)
    real = FakeMethod("reverse", runs={"real": block})
    plan = make_plan(real, RunSettings(out=str(tmp_path)))
    assert plan.student == "org/small" and plan.teachers == {"T": "org/big"} and plan.seed == 7
    plan = make_plan(real, RunSettings(out=str(tmp_path), task="fork"))
    assert plan.student == "embedded" and plan.task == "fork" and plan.seed == 0
    plan = make_plan(real, RunSettings(out=str(tmp_path), student="/elsewhere", seed=1))
    assert plan.student == "/elsewhere" and plan.seed == 1


@pytest.mark.parametrize(
    ("more", "code", "word"),
    [
        ({"task": "chian"}, "OPD708", "chain"),
        ({"student": "x"}, "OPD402", "--data"),
        ({"teachers": {"S": "x"}}, "OPD402", "`S`"),
        ({"run": "nope"}, "OPD119", "nope"),
    ],
)
def test_plans_that_cannot_be(tmp_path, more, code, word):
    with pytest.raises(RunProblem) as caught:
        make_plan(FakeMethod("reverse"), RunSettings(out=str(tmp_path), **more))
    found = caught.value
    assert found.diagnostic.code == code and found.exit_code == 2
    assert word in found.message + " ".join(found.diagnostic.helps)


# ---- models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "empty", "pickled", "url", "hub"])
def test_models_that_cannot_be_loaded(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "m"
    name = {"url": "http://host/v1", "hub": "nobody/nothing-here"}.get(kind, str(folder))
    if kind in ("empty", "pickled"):
        folder.mkdir()
    if kind == "pickled":
        (folder / "config.json").write_text("{}")
        (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(RunProblem) as caught:
        models.check_source(name, "student")
    assert caught.value.exit_code == 3
    text = caught.value.message + " ".join(caught.value.diagnostic.notes)
    assert name in text or str(folder) in text
    if kind == "pickled":
        assert "pytorch_model.bin" in text


def test_vocabularies_of_different_size_need_a_tokenizer(tmp_path, pair):
    bad = pair | {"teachers": {"T": tiny(tmp_path / "other", 1, vocab=48)}}
    with pytest.raises(RunProblem) as caught:
        train(FakeMethod("reverse"), settings(tmp_path, bad))
    assert caught.value.diagnostic.code == "OPD403" and caught.value.exit_code == 3


def test_weights_of_the_teacher_stay_as_they_are(tmp_path, pair):
    path = Path(pair["teachers"]["T"]) / "model.safetensors"
    before = path.read_bytes()
    train(FakeMethod("reverse"), settings(tmp_path, pair))
    assert path.read_bytes() == before


def test_exported_files_follow_the_umask(tmp_path, pair):
    before = os.umask(0o022)
    try:
        train(FakeMethod("reverse"), settings(tmp_path, pair, steps=1))
    finally:
        os.umask(before)
    modes = {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out" / "student").iterdir()}
    assert modes == {"0o644"}
