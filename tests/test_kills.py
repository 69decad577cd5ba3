"""kill -9 at any moment, a disk that fills up at any write, a process put to sleep.

Each trial starts a run, kills it once or several times (half of the kills at a system call of a
save, half at a random time), looks at the folder, and continues. The result must be the
uninterrupted run bit for bit: metrics, evaluations, weights. The quick trials are part of the
suite; the campaign is `pytest -m slow tests/test_kills.py -k campaign -s`.
"""

from __future__ import annotations

import collections
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from support import faults
from test_run_cli import SPEC

import opdsl
from opdsl.train import checkpoint
from opdsl.train.errors import RunProblem
from opdsl.train.loop import train
from opdsl.train.settings import RunSettings

STEPS = 6


@pytest.fixture(scope="module")
def method():
    return opdsl.compile(SPEC)


def settings(out: Path, models: dict, **more) -> RunSettings:
    base = {"steps": STEPS, "prompts": 4, "save_every": 1, "eval_every": 3, "eval_prompts": 8}
    base |= {"optimize": {"warmup": 1}, "report": False, "resume": True}
    return RunSettings(out=str(out), **(base | models | more))


def whole(method, tmp_path: Path, models: dict, **more) -> tuple[dict[str, bytes], int, float]:
    """The uninterrupted run: results, system calls that write checkpoints, seconds."""
    out, layer = tmp_path / "whole", faults.Layer()

    def work():
        faults.install(layer)
        train(method, settings(out, models, **more))
        (tmp_path / "calls").write_text(str(len(layer.seen)))

    began = time.perf_counter()
    assert faults.forked(work) == 0
    return faults.results(out), int((tmp_path / "calls").read_text()), time.perf_counter() - began


def killed(method, out: Path, models: dict, rng: random.Random, calls: int, seconds: float, **more):
    """One attempt that is killed: (kind of the kill, whether it still ran)."""
    at = rng.randrange(calls) if rng.random() < 0.5 else None

    def work():
        if at is not None:
            faults.install(faults.Layer(at, faults.dying))
        train(method, settings(out, models, **more))

    code = faults.forked(work, None if at is not None else rng.uniform(0.0, seconds))
    assert code in (0, -signal.SIGKILL), code
    return "at a call of a save" if at is not None else "at a random time", code != 0


def trial(method, tmp_path: Path, models: dict, seed: int, reference, kills: int, **more):
    """Kill a run `kills` times, then let it end. Returns the kinds of the kills that struck."""
    want, calls, seconds = reference
    rng, out, struck = random.Random(seed), tmp_path / f"cut-{seed}", []
    for _ in range(20 * kills):
        kind, hit = killed(method, out, models, rng, calls, seconds, **more)
        if hit:
            struck.append(kind)
        assert faults.faults_of(out) == []
        if len(struck) == kills:
            break
        if not hit:  # it came through: begin again, there is nothing left to kill
            shutil.rmtree(out)
    assert len(struck) == kills
    assert faults.forked(lambda: train(method, settings(out, models, **more))) == 0
    assert faults.results(out) == want
    assert not list((out / "checkpoints").glob("*.tmp-*"))
    shutil.rmtree(out)
    return struck


def test_three_kills_and_the_same_run(tmp_path, pair, method):
    reference = whole(method, tmp_path, pair)
    assert reference[1] > 50  # six saves of at least nine calls each
    assert len(trial(method, tmp_path, pair, 1, reference, kills=3)) == 3


def test_a_kill_at_every_call_of_one_save(tmp_path, pair, method):
    """Also between the two renames of a checkpoint that replaces one of the same step."""
    import torch

    root = tmp_path / "checkpoints"
    tensors = {"student": {"w": torch.arange(3.0)}}
    checkpoint.write(root, 1, tensors, {}, {})
    layer = faults.Layer()

    def save(at, step):
        faults.install(faults.Layer(at, faults.dying))
        checkpoint.write(root, step, {"student": {"w": torch.zeros(3)}}, {}, {})

    with pytest.MonkeyPatch.context() as patch:
        faults.install(layer, patch)
        checkpoint.write(root, 2, tensors, {}, {})
    for step in (3, 2):  # a new one, and one in place of another
        for at in range(len(layer.seen) + (step == 2)):
            assert faults.forked(partial(save, at, step)) == -9
            assert faults.faults_of(tmp_path) == []
            checkpoint.clean(root)
            assert checkpoint.newest(root).step in ((2, 3) if step == 3 else (2,)), at
            shutil.rmtree(root / "step-000003", ignore_errors=True)


CAMPAIGN = {
    "routing": ("cr_opd", {}),
    "critic": ("gae_opd", {}),
    "average": ("sdpo", {}),
    "old policy": ("nemotron3_ultra", {}),
    "adapter": ("cr_opd", {"optimize": {"adapter": ("lora", {"rank": 2}), "schedule": "linear"}}),
    "micro-batches": ("verifier_hybrid", {"micro_batch": 3}),
}


@pytest.mark.slow
def test_campaign_of_fifty_kills(tmp_path, capsys):
    """The embedded pair, six methods; at least fifty kills that struck a living run."""
    struck, trials = collections.Counter(), 0
    for number, (kind, (name, more)) in enumerate(CAMPAIGN.items()):
        found, folder = opdsl.load(name), tmp_path / name / kind
        folder.mkdir(parents=True)
        models = {"task": "chain"} | more
        train(found, settings(folder / "built", models, steps=1))  # the pair, into the cache
        reference = whole(found, folder, models)
        for kills in (1, 2, 1, 3, 2):
            seed = 100 * number + trials
            struck.update(trial(found, folder, models, seed, reference, kills))
            trials += 1
    with capsys.disabled():
        by_kind = ", ".join(f"{n} {kind}" for kind, n in sorted(struck.items()))
        print(f"\n{sum(struck.values())} kills ({by_kind}) in {trials} trials of {len(CAMPAIGN)}"
              " methods: every resume bitwise equal, no damaged checkpoint")  # fmt: skip
    assert sum(struck.values()) >= 50


@pytest.mark.slow
def test_kills_of_the_command(tmp_path, pair):
    """The same through `python -m opdsl run … --resume` in processes of their own."""
    spec = tmp_path / "full_kl.opd"
    spec.write_text(SPEC)
    words = [sys.executable, "-m", "opdsl", "run", str(spec), "--task", "chain", "--resume"]
    words += ["--student", pair["student"], "--teacher", pair["teachers"]["T"]]
    words += ["--steps", "40", "--prompts", "4", "--save-every", "1", "--eval-every", "20"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    subprocess.run([*words, "--out", str(tmp_path / "whole")], check=True, env=env)
    seconds, rng, struck = time.perf_counter() - began, random.Random(3), 0
    for _ in range(12):
        process = subprocess.Popen([*words, "--out", str(tmp_path / "cut")], env=env)
        try:
            process.wait(rng.uniform(0.5, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            struck += 1
        process.wait()
        assert faults.faults_of(tmp_path / "cut") == []
        if struck == 5:
            break
    subprocess.run([*words, "--out", str(tmp_path / "cut")], check=True, env=env)
    assert struck >= 2
    assert faults.results(tmp_path / "cut") == faults.results(tmp_path / "whole")


# ---- a full disk -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_at_every_call_of_a_save(tmp_path, number, monkeypatch):
    import torch

    root = tmp_path / "checkpoints"
    tensors = {"student": {"w": torch.arange(3.0)}, "more": {"v": torch.ones(2)}}
    for step in (1, 2):
        checkpoint.write(root, step, tensors, {}, {})
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    at = 0
    while True:
        layer = faults.Layer(at, faults.failing(number))
        with monkeypatch.context() as patch:
            faults.install(layer, patch)
            try:
                checkpoint.write(root, 3, tensors, {}, {})
                break  # fewer calls than `at`: every one of them has failed once
            except RunProblem as problem:
                full = number in (errno.ENOSPC, errno.EDQUOT)
                assert problem.diagnostic.code == "OPD704" and problem.exit_code == 3
                assert ("MB" in problem.message) == full
                assert "--resume" in problem.diagnostic.helps[0]
        assert all(p.read_bytes() == data for p, data in before.items())
        assert not list(root.glob("*.tmp-*"))
        assert checkpoint.newest(root).step in (2, 3)
        shutil.rmtree(root / "step-000003", ignore_errors=True)
        at += 1
    assert at > 15


def test_a_run_on_a_full_disk_stops_and_goes_on_when_there_is_room(tmp_path, pair, method):
    """The limit on the size of a file stands for the disk: no checkpoint fits under it."""
    want, _, _ = whole(method, tmp_path, pair, eval_at=(2,))
    out, more = tmp_path / "cut", {"eval_at": (2,)}

    def cramped():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # weights need 40 kB
        train(method, settings(out, pair, **more))

    assert faults.forked(lambda: train(method, settings(out, pair, steps=2, **more))) == 0
    assert faults.forked(cramped) == 3
    assert checkpoint.newest(out / "checkpoints").step == 2 and faults.faults_of(out) == []
    assert not list((out / "checkpoints").glob("*.tmp-*"))
    assert faults.forked(lambda: train(method, settings(out, pair, **more))) == 0
    assert faults.results(out) == want


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json.tmp"])
def test_records_that_cannot_be_written_are_a_message(tmp_path, pair, method, name, monkeypatch):
    from opdsl.train.metrics import Lines

    def full(self, *args, **kwargs):
        if getattr(self, "path", self).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, *args, **kwargs)

    place = (Lines, "write") if name.endswith("jsonl") else (Path, "write_text")
    real = getattr(*place)
    with monkeypatch.context() as patch:
        patch.setattr(*place, full)
        with pytest.raises(RunProblem) as caught:
            train(method, settings(tmp_path / "out", pair, steps=2))
    assert caught.value.diagnostic.code == "OPD704" and "no room" in caught.value.message
    train(method, settings(tmp_path / "out", pair, steps=2))


def test_a_small_file_system(tmp_path, pair):
    """A real one where the system lets an ordinary user mount it."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    disk = tmp_path / "disk"
    disk.mkdir()
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from opdsl.train import checkpoint; from opdsl.train.errors import RunProblem\n"
        f"root = Path({str(disk)!r})\n"
        "tensors = {'student': {'w': torch.ones(50_000)}}\n"
        "try:\n"
        "    for step in range(1, 9): checkpoint.write(root, step, tensors, {}, {}, keep=8)\n"
        "except RunProblem as problem: print(problem.message)\n"
        "print(checkpoint.newest(root).step, len(list(root.glob('*.tmp-*'))))\n"
    )
    mount = f'mount -t tmpfs -o size=700k none {disk} && exec {sys.executable} -c "$CODE"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount],
        capture_output=True, text=True, env=os.environ | {"CODE": code},
    )  # fmt: skip
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.returncode == 0, done.stderr
    assert "no room for a checkpoint" in done.stdout and done.stdout.split()[-2:] == ["3", "0"]


def test_a_process_that_sleeps_and_a_clock_that_jumps(tmp_path, pair, method, monkeypatch):
    """SIGSTOP in the middle; names of temporary folders do not come from the wall clock."""
    want, _, _ = whole(method, tmp_path, pair)
    out = tmp_path / "cut"
    monkeypatch.setattr(time, "time", lambda: -1.0)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(method, settings(out, pair))
            code = 0
        finally:
            os._exit(code)
    time.sleep(0.3)
    os.kill(child, signal.SIGSTOP)
    time.sleep(0.3)
    os.kill(child, signal.SIGCONT)
    assert os.waitpid(child, 0)[1] == 0
    assert faults.results(out) == want
