"""Checkpoints and resuming: bit for bit, after kills, damage, a full disk, other settings."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from fake_method import FakeBatch, FakeMethod, State, TeacherDecl, with_critic
from test_trainer import settings

import opdsl
from opdsl.train import checkpoint
from opdsl.train.errors import Interrupted, RunProblem
from opdsl.train.loop import train
from opdsl.train.progress import Silent
from opdsl.train.step import Engine


@pytest.fixture(autouse=True)
def fake_batch(monkeypatch):
    monkeypatch.setattr(opdsl, "Batch", FakeBatch, raising=False)


class Heard(Silent):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


RESULTS = ("metrics.jsonl", "evals.jsonl", "student/model.safetensors")


def results(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in RESULTS}


def stop_at(monkeypatch, step, error=KeyboardInterrupt):
    """Make the run die inside step `step` (0, 1, …)."""
    whole = Engine.step

    def dying(self, number, watch):
        if number == step:
            raise error
        return whole(self, number, watch)

    monkeypatch.setattr(Engine, "step", dying)


METHODS = {
    "plain": lambda: FakeMethod("reverse", states=(State(group=2),)),
    "critic": lambda: with_critic(warmup=2),
    "average": lambda: FakeMethod("reverse", teachers=(TeacherDecl("T", "ema", decay=0.9),)),
    "old": lambda: FakeMethod("returns", states=(State(policy="old", lag=2),)),
}


@pytest.mark.parametrize("kind", METHODS)
def test_resuming_equals_the_uninterrupted_run(tmp_path, pair, kind, monkeypatch):
    if kind == "critic":
        monkeypatch.delattr(opdsl, "Batch")  # a compiled method reads a real batch
    own = {k: v for k, v in pair.items() if kind != "average" or k != "teachers"}
    more = {"steps": 6, "save_every": 2, "eval_every": 3}
    train(METHODS[kind](), settings(tmp_path / "whole", own, **more))
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(METHODS[kind](), settings(tmp_path / "cut", own, **more))
    heard = Heard()
    train(METHODS[kind](), settings(tmp_path / "cut", own, resume=True, **more), heard)
    assert "resuming after step 4" in heard.lines
    assert results(tmp_path / "cut" / "out") == results(tmp_path / "whole" / "out")


def test_kills_at_random_moments(tmp_path, pair, monkeypatch):
    """SIGKILL, at any time, in a run that saves after every step."""
    more = {"steps": 10, "save_every": 1, "eval_every": 5, "prompts": 4}
    train(FakeMethod("reverse"), settings(tmp_path / "whole", pair, **more))
    write = checkpoint._write_file

    def slow(path, data):  # half of the time is then spent saving, and a run outlives its killer
        time.sleep(0.008)
        return write(path, data)

    monkeypatch.setattr(checkpoint, "_write_file", slow)
    rng, killed = random.Random(5), 0
    for attempt in range(30):
        child = os.fork()
        if child == 0:
            try:
                train(FakeMethod("reverse"), settings(tmp_path / "cut", pair, resume=True, **more))
                os._exit(0)
            except BaseException:
                os._exit(1)
        time.sleep(rng.uniform(0.02, 0.3))
        if attempt < 8:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        else:
            assert os.WEXITSTATUS(status) == 0
            break
    assert killed >= 3
    assert results(tmp_path / "cut" / "out") == results(tmp_path / "whole" / "out")


def finished(tmp_path, pair, **more):
    base = {"steps": 4, "save_every": 1}
    s = settings(tmp_path, pair, **(base | more))
    train(FakeMethod("reverse"), s)
    return Path(s.out) / "checkpoints"


def files_of(root):
    return sorted(p.name for p in checkpoint._folders(root)[0].iterdir())


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "empty"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, pair, damage):
    root = finished(tmp_path, pair)
    assert [p.name for p in checkpoint._folders(root)] == [f"step-{n:06d}" for n in (4, 3, 2)]
    for name in files_of(root):
        path = root / "step-000004" / name
        whole = path.read_bytes()
        if damage == "delete":
            path.unlink()
        elif damage == "flip":
            middle = len(whole) // 2
            path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        else:
            path.write_bytes(whole[: len(whole) // 2] if damage == "truncate" else b"")
        said = []
        found = checkpoint.newest(root, said.append)
        if not (name == "manifest.json" and damage == "flip"):
            # One flipped bit of the manifest may leave a valid one (in white space, say).
            assert found.step == 3, name
            assert len(said) == 1 and "step-000004" in said[0] and "step-000003" in said[0]
        path.write_bytes(whole)
    assert checkpoint.newest(root).step == 4


def test_no_usable_checkpoint_is_an_error_and_none_at_all_is_not(tmp_path, pair):
    assert checkpoint.newest(tmp_path / "nothing") is None
    root = finished(tmp_path, pair)
    for folder in checkpoint._folders(root):
        (folder / "student.safetensors").unlink()
    with pytest.raises(RunProblem) as caught:
        checkpoint.newest(root)
    assert caught.value.diagnostic.code == "OPD705" and caught.value.exit_code == 3
    assert len(caught.value.diagnostic.notes) == 3


@pytest.mark.parametrize("call", range(4))
def test_a_full_disk_leaves_the_checkpoints_before_it(tmp_path, pair, call, monkeypatch):
    root = finished(tmp_path, pair, steps=2)
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    write, calls = checkpoint._write_file, []

    def full(path, data):
        calls.append(path)
        if len(calls) == call + 1:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(checkpoint, "_write_file", full)
    with pytest.raises(RunProblem) as caught:
        checkpoint.write(
            root, 3, {"student": {"w": torch.ones(3)}, "more": {"v": torch.ones(2)}}, {}, {}
        )
    assert caught.value.diagnostic.code == "OPD704" and "MB" in caught.value.message
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before


def test_what_interrupted_writes_leave_is_cleaned(tmp_path, pair):
    root = finished(tmp_path, pair, steps=2)
    (root / "step-000009.tmp-1-2").mkdir()
    (root / "step-000009").mkdir()  # no manifest: it does not exist
    s = settings(tmp_path, pair, steps=3, save_every=1, resume=True)
    heard = Heard()
    train(FakeMethod("reverse"), s, heard)
    assert not list(root.glob("*.tmp-*"))
    assert any("step-000009 is unusable" in line for line in heard.lines)


# ---- the same run, or none ---------------------------------------------------------------------------


def test_an_earlier_run_is_never_overwritten(tmp_path, pair):
    finished(tmp_path, pair)
    with pytest.raises(RunProblem) as caught:
        train(FakeMethod("reverse"), settings(tmp_path, pair, steps=4))
    assert caught.value.exit_code == 2 and "--resume" in caught.value.diagnostic.helps[0]


def test_resuming_a_complete_run_returns_its_summary(tmp_path, pair):
    finished(tmp_path, pair)
    again = train(FakeMethod("reverse"), settings(tmp_path, pair, steps=4, resume=True))
    assert again.steps == 4 and again.evals[-1]["step"] == 4


def test_another_method_is_refused(tmp_path, pair):
    finished(tmp_path, pair)
    with pytest.raises(RunProblem) as caught:
        train(FakeMethod("returns"), settings(tmp_path, pair, steps=8, resume=True))
    assert caught.value.diagnostic.code == "OPD705" and "another method" in caught.value.message


@pytest.mark.parametrize("more", [{"seed": 3}, {"optimize": {"lr": 0.1}}, {"prompts": 4}])
def test_other_settings_are_refused_by_name(tmp_path, pair, more):
    finished(tmp_path, pair)
    with pytest.raises(RunProblem) as caught:
        train(FakeMethod("reverse"), settings(tmp_path, pair, steps=8, resume=True, **more))
    assert caught.value.exit_code == 2
    assert any(
        next(iter(more)) in n or "lr" in n or "batch" in n for n in caught.value.diagnostic.notes
    )


def test_more_steps_continue_a_constant_schedule(tmp_path, pair):
    more = {"eval_every": 2, "save_every": 2, "optimize": {"warmup": 1}}
    train(FakeMethod("reverse"), settings(tmp_path / "short", pair, steps=4, **more))
    heard = Heard()
    s = settings(tmp_path / "short", pair, steps=6, resume=True, **more)
    train(FakeMethod("reverse"), s, heard)
    assert any("4 to 6" in line for line in heard.lines)
    train(FakeMethod("reverse"), settings(tmp_path / "long", pair, steps=6, **more))
    assert results(tmp_path / "short" / "out") == results(tmp_path / "long" / "out")


def test_a_folder_in_use_is_refused(tmp_path):
    with checkpoint.FolderLock(tmp_path):
        with pytest.raises(RunProblem) as caught:
            checkpoint.FolderLock(tmp_path).__enter__()
        assert caught.value.diagnostic.code == "OPD710"
        assert str(os.getpid()) in caught.value.message
    with checkpoint.FolderLock(tmp_path):
        pass


def test_an_output_folder_that_cannot_be(tmp_path, pair):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(RunProblem) as caught:
        train(FakeMethod("reverse"), settings(tmp_path, pair))
    assert caught.value.diagnostic.code == "OPD704" and caught.value.exit_code == 3
    with pytest.raises(RunProblem) as caught:
        train(FakeMethod("reverse"), settings(tmp_path / "out", pair))
    assert caught.value.diagnostic.code == "OPD704"


# ---- signals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_can_be_resumed(tmp_path, pair, number, monkeypatch):
    more = {"steps": 5, "save_every": 5, "eval_every": 5}
    train(FakeMethod("reverse"), settings(tmp_path / "whole", pair, **more))
    whole = Engine.step

    def interrupted(self, step, watch):
        if step == 2:
            os.kill(os.getpid(), number)
        return whole(self, step, watch)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted)
        with pytest.raises(Interrupted) as caught:
            train(FakeMethod("reverse"), settings(tmp_path / "cut", pair, **more))
    assert caught.value.step == 3 and caught.value.exit_code == 128 + number
    assert caught.value.checkpoint.endswith("step-000003")
    train(FakeMethod("reverse"), settings(tmp_path / "cut", pair, resume=True, **more))
    assert results(tmp_path / "cut" / "out") == results(tmp_path / "whole" / "out")


def test_sigusr1_saves_and_goes_on(tmp_path, pair, monkeypatch):
    whole = Engine.step

    def asked(self, step, watch):
        if step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return whole(self, step, watch)

    monkeypatch.setattr(Engine, "step", asked)
    train(FakeMethod("reverse"), settings(tmp_path, pair, steps=4, save_every=4))
    names = {p.name for p in (tmp_path / "out" / "checkpoints").iterdir()}
    assert names == {"step-000002", "step-000004"}


def test_nothing_is_pickled():
    folder = Path(checkpoint.__file__).parent
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "torch.save" not in text and "torch.load" not in text and "import pickle" not in text
