"""`--log`: the three sinks behind fakes of their packages, and what a broken one may not do."""

from __future__ import annotations

import json
import sys
import threading
import time
from types import ModuleType

import pytest
from click.testing import CliRunner
from support.heard import Heard

import opdsl
from opdsl.cli import cli
from opdsl.train import sinks
from opdsl.train.errors import RunProblem
from opdsl.train.loop import train
from opdsl.train.redact import redacted, redacted_value, redacted_words
from opdsl.train.settings import RunSettings

RECORD = {"step": 1, "loss": 0.5, "kl": 2.0, "tokens": 10, "skipped": "no", "bad": float("nan"),
          "advantage_mean": None, "finished": True}  # fmt: skip
TIMING = {"step": 1, "seconds": 2.0, "tokens_per_second": 5.0, "rollouts": 0.5}


class Recorder:
    """What a package was asked to do, in order."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


def install(monkeypatch, name, recorder):
    """A fake package in place of the real one."""
    if name == "tensorboard":
        module = ModuleType("torch.utils.tensorboard")
        module.SummaryWriter = recorder.open
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    else:
        module = ModuleType(name)
        for word in ("init", "log", "finish"):
            setattr(module, word, getattr(recorder, word))
        monkeypatch.setitem(sys.modules, name, module)


def use(names, out, first=0, config=None):
    said = []
    opened = sinks.Sinks(names, out, config or {"lr": 0.1}, first, said.append)
    opened.step(RECORD, TIMING)
    opened.evaluation(
        1, {"held-out": {"greedy": {"accuracy": 0.25}, "sampled": {"accuracy": None}}}
    )
    return opened.close(), said


def test_tensorboard(monkeypatch, tmp_path):
    recorder = Recorder()
    install(monkeypatch, "tensorboard", recorder)
    lost, said = use(["tensorboard"], tmp_path, first=3)
    assert not lost and not said
    (name, _, options), *rest = recorder.calls
    assert name == "open" and options == {"log_dir": str(tmp_path / "tensorboard"), "purge_step": 4}
    scalars = {args[0]: args[1:] for call, args, _ in rest if call == "add_scalar"}
    assert scalars["objective/loss"] == (0.5, 1) and scalars["divergence/kl"] == (2.0, 1)
    assert scalars["pace/rollouts (tokens per second)"] == (20.0, 1)
    assert scalars["held-out/greedy"] == (0.25, 1)
    assert not {"other/bad", "other/skipped", "held-out/sampled"} & set(scalars)
    assert rest[0][0] == "add_text" and "0.1" in rest[0][1][1] and rest[-1][0] == "close"


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_services(monkeypatch, tmp_path, name):
    recorder = Recorder()
    install(monkeypatch, name, recorder)
    config = {"lr": 0.1, "api_key": "sk-abcdefghijklmnopqrstuv", "url": "https://me:pw@host/x"}
    lost, said = use([name, name], tmp_path, config=config)
    assert not lost and not said
    words = [call for call, _, _ in recorder.calls]
    assert words == ["init", "log", "log", "finish"]
    options = recorder.calls[0][2]
    assert options["project"] == "opdsl" and options["resume"] == "allow"
    assert options["config"] == {"lr": 0.1, "api_key": "***", "url": "https://***@host/x"}
    _, (numbers,), where = recorder.calls[1]
    assert where == {"step": 1} and numbers["objective/loss"] == 0.5
    assert recorder.calls[2][1][0] == {"held-out/greedy": 0.25}
    # A resumed run goes on in the same place, a fresh one in a new one.
    ident = json.loads((tmp_path / "sinks.json").read_text())["id"]
    use([name], tmp_path, first=5)
    assert json.loads((tmp_path / "sinks.json").read_text())["id"] == ident
    use([name], tmp_path)
    assert json.loads((tmp_path / "sinks.json").read_text())["id"] != ident


@pytest.mark.parametrize("name", sorted(sinks.SINKS))
def test_a_missing_package_is_one_message_before_anything_is_loaded(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, sinks.SINKS[name][1], None)
    words = ["run", "cr_opd", "--log", name, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 3 and "Traceback" not in result.output
    assert "OPD740" in result.output and f"pip install 'opdsl[{name}]'" in result.output
    assert not (tmp_path / "out").exists()


def test_unknown_sinks_are_refused():
    with pytest.raises(RunProblem) as caught:
        sinks.check(["nowhere"])
    assert caught.value.diagnostic.code == "OPD112"


class Broken(Recorder):
    def log(self, *args, **kwargs):
        raise SystemExit("quota exceeded for key=sk-abcdefghijklmnopqrstuv")


def test_a_failing_sink_stops_no_run_and_is_told_once(monkeypatch, tmp_path, pair):
    install(monkeypatch, "trackio", Broken())
    heard = Heard()
    done = train(
        opdsl.load("cr_opd"),
        RunSettings(
            out=str(tmp_path / "out"), steps=3, prompts=4, eval_prompts=4, report=False,
            export=False, log=("trackio",), **pair,
        ),
        heard,
    )  # fmt: skip
    assert done.steps == 3
    # three steps and the evaluations before, between and after
    assert done.counts["records lost by --log trackio"] >= 5
    told = [line for line in heard.lines if "--log trackio fails" in line]
    assert len(told) == 1 and "quota exceeded" in told[0] and "sk-" not in told[0]


def test_a_sink_that_hangs_holds_nothing_up(monkeypatch, tmp_path):
    release = threading.Event()

    class Hanging(Recorder):
        def init(self, **kwargs):
            release.wait(20)

    install(monkeypatch, "wandb", Hanging())
    monkeypatch.setattr(sinks, "PATIENCE", 0.05)
    began = time.monotonic()
    lost, said = use(["wandb"], tmp_path)
    assert time.monotonic() - began < 10
    assert lost == {"records lost by --log wandb": 2}
    assert len(said) == 1 and "not finished" in said[0]
    release.set()


def test_what_a_package_prints_does_not_reach_stdout(monkeypatch, tmp_path, capsys):
    class Loud(Recorder):
        def log(self, *args, **kwargs):
            print("look at me")

    install(monkeypatch, "trackio", Loud())
    before = sys.stdout
    use(["trackio"], tmp_path)
    print("the result")
    shown = capsys.readouterr()
    assert shown.out == "the result\n" and shown.err.count("look at me") == 2
    assert sys.stdout is before


def test_keys_are_taken_out_of_what_is_written():
    assert redacted("see https://me:secret@host/v1") == "see https://***@host/v1"
    assert redacted("http://h/?api_key=abc&x=1") == "http://h/?api_key=***&x=1"
    assert redacted("Authorization: Bearer abcdefghijkl") == "Authorization: Bearer ***"
    assert redacted("hf_abcdefghijklmnopqrstuvwx") == "***"
    words = ["--api-key", "abc", "--max-tokens", "64", "--token=abc", "--student", "./key"]
    hidden = ["--api-key", "***", "--max-tokens", "64", "--token=***", "--student", "./key"]
    assert redacted_words(words) == hidden
    assert redacted_words(["--teacher-key-env", "MY_KEY"]) == ["--teacher-key-env", "MY_KEY"]
    nested = {
        "tokens": 5,
        "max_tokens": 6,
        "auth_token": "x",
        "list": ["http://a:b@c"],
        "key": None,
    }
    assert redacted_value(nested) == {
        "tokens": 5, "max_tokens": 6, "auth_token": "***", "list": ["http://***@c"], "key": None,
    }  # fmt: skip
