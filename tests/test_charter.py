"""What the charter of docs/robustness.md asks of a run and no other file tests."""

from __future__ import annotations

import ast
import os
import random
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_method import FakeBatch, FakeMethod, State, TeacherDecl
from support import faults
from test_trainer import settings

import opdsl
from opdsl.train import checkpoint, errors, setup
from opdsl.train.loop import train
from opdsl.train.metrics import read_lines
from opdsl.train.plan import make_plan
from opdsl.train.progress import Silent
from opdsl.train.settings import RunSettings
from opdsl.train.states import States
from opdsl.train.step import Engine


@pytest.fixture(autouse=True)
def fake_batch(monkeypatch):
    monkeypatch.setattr(opdsl, "Batch", FakeBatch, raising=False)


# ---- runs at the edge --------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", [0.0, 1.0])
def test_a_verifier_that_judges_all_alike(tmp_path, pair, verdict, monkeypatch):
    from opdsl.train.verify import Verdict

    alike = lambda self, prompts, responses: [Verdict(verdict)] * len(prompts)  # noqa: E731
    monkeypatch.setattr("opdsl.train.bindings.TaskData.judge", alike)
    train(FakeMethod("reverse"), settings(tmp_path, pair, eval_every=1))
    for record in read_lines(tmp_path / "out" / "metrics.jsonl"):
        assert record["reward"] == verdict and None not in record.values()


@pytest.mark.parametrize("end", ["at once", "never"])
def test_responses_that_end_at_once_or_never(tmp_path, pair, end, monkeypatch):
    whole = States.rows

    def ending(self, step):
        rows = whole(self, step)
        eos, B = self.data.eos, len(rows)
        if end == "at once":
            changes = {
                "tokens": torch.full((B, 1), eos),
                "lengths": torch.ones(B, dtype=torch.int64),
                "logprobs": rows.logprobs[:, :1],
                "finished": torch.ones(B, dtype=torch.bool),
                "responses": [[eos]] * B,
            }
        else:
            changes = {"finished": torch.zeros(B, dtype=torch.bool)}
        return replace(rows, **changes)

    monkeypatch.setattr(States, "rows", ending)
    train(FakeMethod("returns"), settings(tmp_path, pair))
    for record in read_lines(tmp_path / "out" / "metrics.jsonl"):
        assert None not in record.values() and record["finished"] == float(end == "at once")


def test_a_row_alone_and_among_longer_ones(tmp_path, pair):
    """Padding and positions: the states of a row do not depend on the others of the batch."""
    method = FakeMethod("reverse")
    session = setup.build(method, make_plan(method, settings(tmp_path, pair)), Silent())
    forward, rows = session.engine.forward, session.engine.states.rows(0)
    ragged = replace(
        rows,
        prompts=[replace(p, ids=p.ids[i % 3 :]) for i, p in enumerate(rows.prompts)],
        lengths=torch.tensor([1 + i % int(rows.lengths.max()) for i in range(len(rows))]),
    )
    together = forward.live(forward.states(ragged)).detach()
    for i in range(len(rows)):
        alone = forward.live(forward.states(ragged.select([i], ""))).detach()
        n = int(ragged.lengths[i])
        torch.testing.assert_close(together[i, :n], alone[0, :n], rtol=0, atol=1e-5)


def test_generators_of_the_caller_are_left_alone(tmp_path, pair):
    """And they do not matter: nothing in a run draws from them."""
    for name, seed in (("a", 1), ("b", 2)):
        random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), torch.get_rng_state()
        train(FakeMethod("reverse"), settings(tmp_path / name, pair, steps=2))
        assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    for name in ("metrics.jsonl", "student/model.safetensors"):
        one, two = (tmp_path / x / "out" / name for x in "ab")
        assert one.read_bytes() == two.read_bytes()


def test_threads_do_not_matter(tmp_path, pair):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            train(FakeMethod("reverse"), settings(tmp_path / str(threads), pair))
            assert torch.get_num_threads() == threads  # the caller's setting is put back
    finally:
        torch.set_num_threads(before)
    for name in ("metrics.jsonl", "student/model.safetensors"):
        one, two = (tmp_path / x / "out" / name for x in "12")
        assert one.read_bytes() == two.read_bytes()


def test_the_base_of_an_adapter_stays_and_is_the_initial_policy(tmp_path, pair):
    own = {k: v for k, v in pair.items() if k != "teachers"} | {
        "optimize": {"adapter": ("lora", {"rank": 2}), "lr": 0.05, "warmup": 0}
    }
    method = FakeMethod("reverse", teachers=(TeacherDecl("T", "initial"),), states=(State(),))
    plan = make_plan(method, settings(tmp_path, own))
    session = setup.build(method, plan, Silent())
    base = {n: p.clone() for n, p in session.student.named_parameters() if "lora" not in n}
    rows = session.engine.states.rows(0)

    def gap() -> float:
        mine = session.engine.forward.live(session.engine.forward.states(rows)).detach()
        theirs = session.engine.teachers["T"].score(rows.prompts, rows.tokens, rows.lengths)
        return float((mine - theirs.logits)[rows.mask].abs().max())

    assert gap() <= 1e-5
    with torch.no_grad():
        for name, p in session.student.named_parameters():
            if "lora_B" in name:
                p.add_(0.1)
    assert gap() > 1e-2
    assert not any(p.requires_grad for n, p in session.student.named_parameters() if n in base)
    for name, p in session.student.named_parameters():
        if name in base:
            assert torch.equal(p, base[name])


def test_no_descriptor_and_no_thread_is_left_behind(tmp_path, pair):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    train(FakeMethod("reverse"), settings(tmp_path / "first", pair, save_every=1))
    before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    for name in "abc":
        train(FakeMethod("reverse"), settings(tmp_path / name, pair, save_every=1, eval_every=1))
    after = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    assert after[0] <= before[0] and after[1] <= before[1] + 1


def test_a_second_signal_ends_the_process_at_once(tmp_path, pair, monkeypatch):
    def told_twice(self, step, watch):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("still here")

    monkeypatch.setattr(Engine, "step", told_twice)
    code = faults.forked(lambda: train(FakeMethod("reverse"), settings(tmp_path, pair)))
    assert code == -signal.SIGTERM


def test_a_run_on_models_of_this_machine_needs_no_network(tmp_path, pair, monkeypatch):
    def refused(self, address):
        raise AssertionError(f"connects to {address}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused)
    train(FakeMethod("reverse"), settings(tmp_path, pair, steps=1))


# ---- the house ---------------------------------------------------------------------------------------


def test_exit_codes_are_few_and_documented():
    assert set(errors.EXIT_CODES.values()) <= {1, 2, 3, 4}
    text = (Path(__file__).parent.parent / "docs" / "robustness.md").read_text()
    for code, row in {
        1: "the data or the spec",
        2: "asked wrongly",
        3: "machine",
        4: "guard",
    }.items():
        assert f"| {code} |" in text and row in text


def test_models_never_run_code_of_their_own():
    """`trust_remote_code=False` is written wherever a model, tokenizer or configuration is read."""
    for path in (Path(opdsl.__file__).parent / "train").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr == "from_pretrained" and "Auto" in ast.unparse(node.func):
                words = {k.arg: k.value for k in node.keywords}
                found = words.get("trust_remote_code")
                assert isinstance(found, ast.Constant) and found.value is False, path.name


def test_what_a_model_writes_cannot_steer_a_terminal(tmp_path, pair):
    from opdsl.train import guards

    method = FakeMethod("reverse")
    session = setup.build(method, make_plan(method, settings(tmp_path, pair)), Silent())
    data = replace_text(session.data, "\x1b[2J\x1b]0;title\x07\nerror[OPD000]")
    note = guards.sample_note(session.engine.states.rows(0), 0, data)
    assert "\x1b" not in note and "\n" not in note and "\\x1b[2J" in note


def replace_text(data, text: str):
    """Data whose responses all read `text`."""

    class Told:
        prompt_text = staticmethod(data.prompt_text)
        response_text = staticmethod(lambda ids: text)

    return Told()


@pytest.mark.parametrize(
    "env",
    [
        {"COLUMNS": "20", "NO_COLOR": "1", "TERM": "dumb"},
        {"HOME": "/nowhere", "XDG_CACHE_HOME": "/nowhere", "LC_ALL": "C"},
        {"PYTHONIOENCODING": "cp1252:strict", "PYTHONUTF8": "0"},
    ],
    ids=["narrow", "no home", "codepage"],
)
def test_the_command_in_poor_surroundings(env):
    """Also with a pipe that is closed after the first line."""
    words = f"{sys.executable} -m opdsl list 2>&1 | head -1; {sys.executable} -m opdsl check cr_opd"
    done = subprocess.run(
        ["sh", "-c", words], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stderr


def test_a_pickle_in_a_checkpoint_is_never_read(tmp_path, pair):
    """A file the manifest does not list does not exist, whatever it would do when loaded."""
    s = settings(tmp_path, pair, steps=2, save_every=1, optimize={"warmup": 1})
    train(FakeMethod("reverse"), s)
    canary = tmp_path / "ran"
    payload = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    for folder in (tmp_path / "out" / "checkpoints").iterdir():
        for name in ("optimizer.pt", "student.bin", "training_args.bin"):
            (folder / name).write_bytes(payload)
    train(FakeMethod("reverse"), RunSettings(**(s.__dict__ | {"resume": True, "steps": 3})))
    assert not canary.exists()


@pytest.fixture
def command(tmp_path, pair, monkeypatch):
    """`opdsl run` on a small spec: words -> (exit code, everything said)."""
    from click.testing import CliRunner
    from test_run_cli import SPEC

    from opdsl.cli import cli

    monkeypatch.delattr(opdsl, "Batch")  # compiled methods read a real batch
    path = tmp_path / "full_kl.opd"
    path.write_text(SPEC)
    words = ["run", path, "--student", pair["student"], "--teacher", pair["teachers"]["T"]]
    words += ["--task", "chain", "--prompts", 4, "--out", tmp_path / "cli", "--eval-every", 9]

    def run(*more) -> tuple[int, str]:
        found = CliRunner().invoke(cli, [str(w) for w in (*words, *more)])
        assert "Traceback" not in found.output
        return found.exit_code, " ".join(found.output.split())

    return run


def test_one_run_whichever_door_it_comes_in_by(tmp_path, pair, command):
    assert command("--steps", 2)[0] == 0
    more = {"steps": 2, "prompts": 4, "eval_every": 9}
    method = opdsl.load(tmp_path / "full_kl.opd")
    train(method, RunSettings(out=str(tmp_path / "api"), **(pair | more)))
    for name in ("metrics.jsonl", "evals.jsonl", "student/model.safetensors"):
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "api" / name).read_bytes()


def test_what_the_command_says_about_changes_signals_and_guards(command, monkeypatch):
    whole = Engine.step

    def told_to_stop(self, step, watch):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, step, watch)

    base = ("--steps", 30, "--save-every", 9)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", told_to_stop)
        code, said = command(*base)
    assert code == 143 and "after step 1; saved in" in said and "--resume" in said
    code, said = command(*base, "--resume", "--lr", "0.0002", "--prompts", 2)
    assert code == 2 and "lr: was 0.001, is 0.0002" in said
    assert "--allow-change batch --allow-change lr" in said
    code, said = command(*base, "--resume", "--lr", "0.0002", "--allow-change", "batch")
    assert code == 2 and "lr: was" in said
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", told_to_stop)
        code, said = command(*base, "--resume", "--lr", "0.0002", "--allow-change")
        assert code == 143 and "changed as allowed: lr: was 0.001, is 0.0002" in said
    code, said = command("--resume", "--guard", "lenght=3")
    assert code == 2 and "did you mean `length`" in said


def test_a_checkpoint_is_complete(tmp_path, pair):
    """Weights, moments, averages, counters, memories, place, versions, fingerprints, outline."""
    own = {k: v for k, v in pair.items() if k != "teachers"}
    method = FakeMethod("reverse", teachers=(TeacherDecl("T", "ema", decay=0.9),))
    train(method, settings(tmp_path, own, steps=2, save_every=1))
    found = checkpoint.newest(tmp_path / "out" / "checkpoints")
    assert set(found.tensors) == {"student", "optimizer", "teacher-T"}
    assert {key.rpartition("|")[2] for key in found.tensors["optimizer"]} == {
        "exp_avg", "exp_avg_sq", "step",
    }  # fmt: skip
    state = found.state
    assert state["position"] == {"prompts": 16, "seed": 0} and state["step"] == 2
    assert {"torch", "transformers", "opdsl", "device"} <= set(state["versions"])
    assert state["identity"]["method"] == method.fingerprints["method"]
    assert {"data", "weights of student"} <= set(state["identity"])
    assert state["outline"]["teacher T decay"] == "0.9" and state["memories"]["watch"]["idle"] == 0


# ---- the charter itself ------------------------------------------------------------------------------

TABLE = Path(__file__).parent.parent / "docs" / "robustness.md"


def test_the_table_names_every_item_once_and_only_tests_that_exist():
    text = TABLE.read_text(encoding="utf-8")
    items = re.findall(r"^\| ([A-Z]\d+) \|", text, re.MULTILINE)
    sizes = {"C": 15, "L": 12, "T": 13, "K": 12, "R": 10, "X": 7, "S": 13}
    assert items == [f"{letter}{i}" for letter, n in sizes.items() for i in range(1, n + 1)]
    named = re.findall(r"`(test_\w+)::(\w+)`", text)
    assert len(named) > 100
    for file, test in named:
        path = next((TABLE.parent.parent / "tests").rglob(f"{file}.py"), None)
        assert path is not None, file
        assert f"def {test}(" in path.read_text(encoding="utf-8"), f"{file}::{test}"
    for row in re.findall(r"^\| [A-Z]\d+ \|.*$", text, re.MULTILINE):
        assert re.search(r"\| (present|part|absent) \|", row), row
