"""Checkpoints and resuming: bit for bit, after damage, with other settings, of other versions.

Kills and full disks are in `test_kills`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from fake_method import FakeBatch, FakeMethod, State, TeacherDecl, with_critic
from support.heard import Heard
from test_trainer import settings

import opdsl
from opdsl.train import checkpoint
from opdsl.train.errors import Interrupted, RunProblem
from opdsl.train.loop import train
from opdsl.train.step import Engine


@pytest.fixture(autouse=True)
def fake_batch(monkeypatch):
    monkeypatch.setattr(opdsl, "Batch", FakeBatch, raising=False)


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
    "adapter": lambda: FakeMethod("reverse"),
}


@pytest.mark.parametrize("kind", METHODS)
def test_resuming_equals_the_uninterrupted_run(tmp_path, pair, kind, monkeypatch):
    if kind == "critic":
        monkeypatch.delattr(opdsl, "Batch")  # a compiled method reads a real batch
    own = {k: v for k, v in pair.items() if kind != "average" or k != "teachers"}
    more = {"steps": 6, "save_every": 2, "eval_every": 3}
    if kind == "adapter":
        more["optimize"] = {"adapter": ("lora", {"rank": 2})}
    train(METHODS[kind](), settings(tmp_path / "whole", own, **more))
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(METHODS[kind](), settings(tmp_path / "cut", own, **more))
    heard = Heard()
    train(METHODS[kind](), settings(tmp_path / "cut", own, resume=True, **more), heard)
    assert "resuming after step 4" in heard.lines
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


def test_what_interrupted_writes_leave_is_cleaned(tmp_path, pair):
    root = finished(tmp_path, pair, steps=2)
    (root / "step-000009.tmp-1-2").mkdir()
    (root / "step-000009").mkdir()  # no manifest: it does not exist
    s = settings(tmp_path, pair, steps=3, save_every=1, resume=True)
    heard = Heard()
    train(FakeMethod("reverse"), s, heard)
    assert not list(root.glob("*.tmp-*"))
    assert any("step-000009 is unusable" in line for line in heard.lines)


def test_a_damaged_newer_checkpoint_does_not_push_out_a_good_one(tmp_path, pair):
    """Resuming passes over step 4; with room for one, step 3 or a later good one must stay."""
    root = finished(tmp_path, pair, keep=2, optimize={"warmup": 1})
    (root / "step-000004" / "student.safetensors").unlink()
    shutil.rmtree(tmp_path / "out" / "student")
    checkpoint.write(root, 3, {"student": {"w": torch.ones(2)}}, {}, {}, keep=1)
    assert [p.name for p in checkpoint._folders(root)] == ["step-000003"]
    assert checkpoint.newest(root).step == 3


def test_a_checkpoint_set_aside_comes_back(tmp_path):
    """A kill between the two renames of a checkpoint that replaces one of the same step."""
    root = tmp_path / "checkpoints"
    folder = checkpoint.write(root, 1, {"student": {"w": torch.ones(2)}}, {}, {})
    folder.rename(root / "step-000001.tmp-old-5")
    (root / "step-000001.tmp-7-8").mkdir()
    checkpoint.clean(root)
    assert [p.name for p in root.iterdir()] == ["step-000001"] and checkpoint.newest(root).step == 1


def test_tensors_are_written_in_the_common_format(tmp_path):
    """Every dtype a state can have, empty and scalar and strided tensors, read by the library."""
    from safetensors.torch import load_file

    from opdsl.train import durable

    tensors = {
        "float": torch.randn(3, 5), "half": torch.randn(3, 5).bfloat16(), "double": torch.ones(()).double(),
        "count": torch.tensor(7), "flag": torch.tensor([True, False]), "byte": torch.arange(7).to(torch.uint8),
        "none": torch.zeros(0, 4), "turned": torch.randn(4, 3).t(), "é|exp_avg": torch.ones(1),
    }  # fmt: skip
    facts = durable.write_tensors(tmp_path / "x.safetensors", tensors)
    assert facts == durable.facts_of(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
    with pytest.raises(ValueError, match="odd: complex64"):
        durable.write_tensors(
            tmp_path / "y.safetensors", {"odd": torch.ones(1, dtype=torch.cfloat)}
        )
    with pytest.raises(FileExistsError):
        durable.write_bytes(tmp_path / "x.safetensors", b"")


# ---- versions --------------------------------------------------------------------------------------


def as_schema(folder: Path, schema: int, drop=()) -> None:
    """Turn a checkpoint into one that another version of opdsl would have written."""
    from opdsl.train import durable

    manifest = json.loads((folder / "manifest.json").read_text())
    state = json.loads((folder / "state.json").read_text())
    state = {k: v for k, v in state.items() if k not in drop}
    (folder / "state.json").unlink()
    manifest["files"]["state.json"] = durable.write_bytes(
        folder / "state.json", json.dumps(state).encode()
    )
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema": schema}))


def test_a_checkpoint_of_the_first_schema_is_continued(tmp_path, pair):
    """It knows neither versions nor an outline; the run goes on to the same numbers."""
    more = {"eval_every": 2, "save_every": 2, "optimize": {"warmup": 1}}
    train(FakeMethod("reverse"), settings(tmp_path / "long", pair, steps=6, **more))
    train(FakeMethod("reverse"), settings(tmp_path / "short", pair, steps=4, **more))
    new = ("outline", "versions", "memories", "changes", "sizes", "position")
    folder = tmp_path / "short" / "out" / "checkpoints" / "step-000004"
    as_schema(folder, 1, drop=new)
    train(FakeMethod("reverse"), settings(tmp_path / "short", pair, steps=6, resume=True, **more))
    assert results(tmp_path / "short" / "out") == results(tmp_path / "long" / "out")


@pytest.mark.parametrize(("schema", "word"), [(0, "an older"), (99, "a newer")])
def test_a_checkpoint_no_version_here_reads_is_named(tmp_path, pair, schema, word):
    """The older good checkpoint beside it must not be taken: work would be lost unnoticed."""
    root = finished(tmp_path, pair)
    as_schema(root / "step-000004", schema)
    before = sorted(p.name for p in root.iterdir())
    with pytest.raises(RunProblem) as caught:
        train(FakeMethod("reverse"), settings(tmp_path, pair, steps=4, save_every=1, resume=True))
    problem = caught.value
    assert problem.diagnostic.code == "OPD705" and problem.exit_code == 3
    assert f"written by {word} opdsl: schema {schema}" in problem.message
    assert problem.diagnostic.helps and sorted(p.name for p in root.iterdir()) == before


def test_other_versions_of_libraries_are_told(tmp_path, pair, monkeypatch):
    finished(tmp_path, pair, optimize={"warmup": 1})
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    heard = Heard()
    more = {"steps": 5, "resume": True, "optimize": {"warmup": 1}}
    train(FakeMethod("reverse"), settings(tmp_path, pair, **more), heard)
    (line,) = [line for line in heard.lines if "9.9.9" in line]
    assert line.startswith("torch was ") and "last bits" in line


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
    problem = caught.value
    assert problem.diagnostic.code == "OPD705" and "another method" in problem.message
    assert "--allow-change method" in problem.diagnostic.helps[1]


SPEC = """opd 1
method m {{
  state     rollouts(student, temperature = {temperature})
  teacher   T = external(access = logits)
  param scale : real in (0, 10] = {scale}
  support   full
  feedback  loss scale * KL({order})
  aggregate mean(over = tokens)
}}
"""


def test_a_changed_spec_says_what_changed_and_needs_leave(tmp_path, pair, monkeypatch):
    monkeypatch.delattr(opdsl, "Batch")  # a compiled method reads a real batch

    def compiled(scale="1", temperature="1.0", order="student || T", comment=""):
        return opdsl.compile(
            comment + SPEC.format(scale=scale, temperature=temperature, order=order)
        )

    more = {"save_every": 1, "optimize": {"warmup": 1}}
    train(compiled(), settings(tmp_path, pair, steps=2, **more))
    changed = compiled(scale="2", temperature="0.5", order="T || student")
    s = settings(tmp_path, pair, steps=3, resume=True, **more)
    with pytest.raises(RunProblem) as caught:
        train(changed, s)
    notes = caught.value.diagnostic.notes
    assert caught.value.exit_code == 2
    assert "state 1 temperature: was 1.0, is 0.5" in notes
    assert "param scale: was 1.0, is 2.0" in notes
    assert any("KL(student || T), is" in n and "KL(T || student)" in n for n in notes)
    # Comments, layout and names are no change.
    train(compiled(comment="# a remark\n\n"), s)
    # What is allowed by name goes on, is said, and stays on record.
    heard = Heard()
    s = settings(tmp_path, pair, steps=4, resume=True, allow_change=("method",), **more)
    summary = train(changed, s, heard)
    assert any(line.startswith("changed as allowed: state 1 temperature") for line in heard.lines)
    assert any(n == "after step 3: param scale: was 1.0, is 2.0" for n in summary.notes)
    s = settings(tmp_path, pair, steps=5, resume=True, **more)
    assert any("param scale" in n for n in train(changed, s).notes)  # later, too


def test_parts_may_come_and_go_with_an_allowed_change(tmp_path, pair, monkeypatch):
    monkeypatch.delattr(opdsl, "Batch")
    more = {"save_every": 1, "optimize": {"warmup": 1}}
    plain = opdsl.compile(SPEC.format(scale="1", temperature="1.0", order="student || T"))
    train(with_critic(warmup=1), settings(tmp_path, pair, steps=2, **more))
    heard = Heard()
    s = settings(tmp_path, pair, steps=3, resume=True, allow_change=("all",), **more)
    train(plain, s, heard)
    assert any("critic-V of the checkpoint is not used any more" in line for line in heard.lines)
    s = settings(tmp_path, pair, steps=4, resume=True, allow_change=("method",), **more)
    train(with_critic(warmup=1), s, heard)
    assert any("critic-V of the checkpoint was not there" in line for line in heard.lines)


def test_a_student_of_another_shape_is_never_continued(tmp_path, pair):
    from support.models import tiny

    finished(tmp_path, pair, optimize={"warmup": 1})
    other = pair | {"student": tiny(tmp_path / "deep", 0, layers=2)}
    more = {"steps": 5, "resume": True, "allow_change": ("all",), "optimize": {"warmup": 1}}
    with pytest.raises(RunProblem) as caught:
        train(FakeMethod("reverse"), settings(tmp_path, other, **more))
    assert "another student" in caught.value.message and "layers.1" in caught.value.message


def test_models_that_moved_are_the_same_models(tmp_path, pair):
    finished(tmp_path, pair, optimize={"warmup": 1})
    moved = pair | {"student": str(shutil.copytree(pair["student"], tmp_path / "elsewhere"))}
    more = {"steps": 5, "resume": True, "optimize": {"warmup": 1}}
    assert train(FakeMethod("reverse"), settings(tmp_path, moved, **more)).steps == 5


@pytest.mark.parametrize("more", [{"seed": 3}, {"optimize": {"lr": 0.1}}, {"prompts": 4}])
def test_other_settings_are_refused_by_name(tmp_path, pair, more):
    warm = more.get("optimize", {}) | {"warmup": 1}
    more = more | {"optimize": warm}
    finished(tmp_path, pair, optimize={"warmup": 1})
    with pytest.raises(RunProblem) as caught:
        train(FakeMethod("reverse"), settings(tmp_path, pair, steps=8, resume=True, **more))
    assert caught.value.exit_code == 2
    name = {"optimize": "lr", "prompts": "batch"}.get(next(iter(more)), "seed")
    (note,) = caught.value.diagnostic.notes
    assert note.startswith(f"{name}: was ")
    assert f"--allow-change {name}" in caught.value.diagnostic.helps[1]
    allowed = settings(tmp_path, pair, steps=8, resume=True, allow_change=(name,), **more)
    assert f"after step 4: {note}" in train(FakeMethod("reverse"), allowed).notes


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
