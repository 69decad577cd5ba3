"""`opdsl run` and `opdsl compare`: options, messages, exit codes, data files, own models."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from support.models import tiny
from support.texts import WORDS, tokenizer

from opdsl.cli import cli
from opdsl.train.rows import Fault, check_row, decode

SPEC = """opd 1
method full_kl "KL at every state" {
  evidence replicated
  param scale : real in (0, 10] = 1
  state     rollouts(student, temperature = 1.0)
  teacher   T = external(access = logits)
  support   full
  feedback  loss scale * KL(student || T)
  aggregate mean(over = tokens)
}
"""


def run(*words, code=None):
    result = CliRunner().invoke(cli, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if code is not None:
        assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    path = tmp_path_factory.mktemp("specs") / "full_kl.opd"
    path.write_text(SPEC)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Student and teacher folders for the task `chain`."""
    root = tmp_path_factory.mktemp("small")
    return ("--student", tiny(root / "s", 0), "--teacher", tiny(root / "t", 1), "--task", "chain")


def text_model(folder, seed, rows=72, words=WORDS, template=None):
    """A model folder with a word-level tokenizer; the head may have more rows than words."""
    tiny(folder, seed, vocab=rows)
    tokenizer(words, template).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Student and teacher with equal tokenizers and heads padded to different sizes."""
    root = tmp_path_factory.mktemp("texts")
    return text_model(root / "s", 0, rows=72), text_model(root / "t", 1, rows=80)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"w{i} w{i + 1}", "reference": "42", "response": "w3 42"} for i in range(20)]
    return write_rows(tmp_path / "train.jsonl", rows)


# ---- running -----------------------------------------------------------------------------------------


def test_a_run_says_what_happened(tmp_path, spec, small):
    out = tmp_path / "out"
    words = ("run", spec, *small, "--steps", 2, "--prompts", 8, "--out", out)
    result = run(*words, code=0)
    shown = result.stdout
    for word in ("before", "after", "greedy", "sampled", "2 steps", "time", str(out / "report.md")):
        assert word in shown, word
    assert "step 2/2" in result.stderr and "task chain" in result.stderr
    report = (out / "report.md").read_text()
    assert "![curves](curves.png)" in report and "fingerprint" in report
    assert (out / "curves.png").stat().st_size > 5000
    again = run(*words, code=2)
    assert "--resume" in again.stderr
    assert "already complete" in run(*words, "--resume", code=0).stderr


def test_json_output_is_the_summary(tmp_path, spec, small):
    words = ("run", spec, *small, "--steps", 1, "--prompts", 4, "--out", tmp_path / "o", "--json")
    summary = json.loads(run(*words, code=0).stdout)
    assert summary["steps"] == 1 and summary["evals"][-1]["step"] == 1
    assert summary["files"]["report"].endswith("report.md")


def test_a_student_that_was_exported_can_be_trained_on(tmp_path, spec, small):
    first = tmp_path / "first"
    run("run", spec, *small, "--steps", 1, "--prompts", 4, "--out", first, code=0)
    words = ("--student", first / "student", "--teacher", small[3], "--task", "chain")
    run("run", spec, *words, "--steps", 1, "--prompts", 4, "--out", tmp_path / "second", code=0)


def test_own_models_on_a_file(tmp_path, spec, texts, data):
    out = tmp_path / "out"
    words = ("--student", texts[0], "--teacher", f"T={texts[1]}", "--data", data)
    result = run(
        "run", spec, *words, "--prompts", 5, "--max-tokens", 6, "--out", out, "--lr", 1e-3, code=0
    )
    assert "4 steps of 5 rows" in result.stdout and "one pass" in result.stderr
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out / "student")
    assert model.config.vocab_size == 72
    assert len(AutoTokenizer.from_pretrained(out / "student")) == len(WORDS) + 4


def test_an_adapter(tmp_path, spec, texts, data):
    out = tmp_path / "out"
    words = ("--student", texts[0], "--teacher", texts[1], "--data", data, "--max-tokens", 4)
    more = ("--set", "optimize.adapter=lora(rank = 2)", "--steps", 2, "--prompts", 4, "--out", out)
    run("run", spec, *words, *more, code=0)
    assert (out / "student-adapter" / "adapter_model.safetensors").is_file()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(texts[0])
    ids = torch.arange(4, 12).unsqueeze(0)
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, out / "student-adapter")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out / "student")(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-5)
    assert not torch.equal(adapted, plain)


def test_a_dry_run_checks_and_trains_nothing(tmp_path, spec, texts, data):
    out = tmp_path / "out"
    words = ("--student", texts[0], "--teacher", texts[1], "--data", data, "--out", out)
    result = run("run", spec, *words, "--dry-run", code=0)
    assert "20 usable training prompts" in result.stdout and "nothing was trained" in result.stdout
    assert not out.exists()
    shown = json.loads(run("run", spec, *words, "--dry-run", "--json", code=0).stdout)
    assert shown["parameters"]["student"] > 0 and shown["steps"] == 1
    run("run", spec, "--dry-run", "--out", out, code=0)


SHAPED = """opd 1
method shaped "a critic on a shaped signal" {
  evidence hypothesis
  state rollouts(student, temperature = 1.0)
  teacher T = external(access = sampled)
  let V : nats per token = critic(init = student, lr = 1e-3, warmup = 2 steps)
  support sampled
  feedback reward 2 * logratio(T, rollout)
  shape clip(-0.5, 0.5)
  credit gae(V = V, gamma = 1, lam = 0.9)
  aggregate mean(over = tokens)
}
"""


# ---- compiled methods in the trainer ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["cr_opd", SHAPED, "verifier_hybrid"], ids=["cr_opd", "critic", "routed"]
)
def test_routes_and_micro_batches_agree(tmp_path, small, name, monkeypatch):
    """Logits or hidden states, whole or in parts: the same student."""
    from safetensors.torch import load_file

    import opdsl
    from opdsl.train.loop import train
    from opdsl.train.settings import RunSettings

    method = opdsl.compile(name)
    teachers = {t.name: small[3] for t in method.spec.teachers}
    if len(teachers) > 1:
        teachers[next(iter(teachers))] = tiny(tmp_path / "second", 5)
    found = []
    for fused_from in (10**9, 10):
        for size in (None, 5):
            monkeypatch.setattr("opdsl.train.setup.FUSED_FROM", fused_from)
            out = tmp_path / f"{fused_from}-{size}"
            s = RunSettings(
                out=str(out),
                student=small[1],
                teachers=teachers,
                task="chain",
                steps=2,
                prompts=4,
                micro_batch=size,
                eval_prompts=4,
                eval_every=9,
                report=False,
            )
            train(method, s)
            found.append(load_file(out / "student" / "model.safetensors"))
    for other in found[1:]:
        for key, tensor in found[0].items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-5, atol=2e-6)


def test_a_critic_is_trained_on_the_methods_own_signal():
    import opdsl
    from opdsl.train.rewards import Rewards

    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 9, generator=generator) for _ in range(2))
    tokens = torch.randint(9, (3, 4), generator=generator)
    mask = torch.arange(4) < torch.tensor([4, 1, 2])[:, None]

    def at(logits):
        return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    batch = opdsl.Batch.from_logits(
        student,
        teacher,
        tokens=tokens,
        mask=mask,
        rollout_logprobs=at(student),
        values=torch.zeros(3, 5),
    )
    ratio = torch.where(mask, at(teacher) - at(student), 0.0)
    found = Rewards(opdsl.load("gae_opd"))(batch, mask)
    torch.testing.assert_close(found, ratio)
    shaped = opdsl.compile(SHAPED)
    found = Rewards(shaped)(batch, mask)
    torch.testing.assert_close(found, (2 * ratio).clamp(-0.5, 0.5))


# ---- mistakes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        (("--set", "scael=2"), 2, "scale"),
        (("--set", "scale=50"), 2, "scale"),
        (("--set", "scale=big"), 2, "not a number"),
        (("--set", "scale"), 2, "NAME=VALUE"),
        (("--set", "optimize.lrr=1"), 2, "optimize.lr"),
        (("--set", "optimize.lr=-1"), 2, "above 0"),
        (("--lr", "0"), 2, "above 0"),
        (("--task", "chian"), 2, "chain"),
        (("--steps", "0"), 2, "--steps"),
        (("--run", "h200"), 2, "h200"),
        (("--student", "/nowhere"), 2, "--teacher T=MODEL"),
        (("--student", "/nowhere", "--teacher", "/x", "--data", "d.jsonl"), 3, "/nowhere"),
        (("--student", "org/name", "--teacher", "o/t", "--data", "d"), 3, "org/name"),
        (("--teacher", "S=/x", "--task", "chain"), 2, "`S`"),
        (("--task", "chain", "--device", "warp"), 2, "warp"),
    ],
)
def test_mistakes_get_one_message_and_their_exit_code(tmp_path, spec, words, code, shown):
    result = run("run", spec, *words, "--out", tmp_path / "out", code=code)
    assert shown in result.stderr, result.stderr
    assert result.stderr.count("error[") <= 1
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_an_unknown_spec_and_an_output_folder_that_is_a_file(tmp_path, spec):
    assert "OPD711" in run("run", "no_such_method", code=2).stderr
    (tmp_path / "file").write_text("")
    result = run("run", spec, "--out", tmp_path / "file", code=3)
    assert "OPD704" in result.stderr


def test_hub_models_without_a_network_name_the_model_and_the_cure(tmp_path):
    text = (
        SPEC + '\nrun big of full_kl { student = "org/small"  T = "org/big"  data = "d.jsonl" }\n'
    )
    path = tmp_path / "full_kl.opd"
    path.write_text(text)
    result = run("run", path, "--out", tmp_path / "out", code=3)
    assert "org/small" in result.stderr and "--task chain" in result.stderr
    run("run", path, "--task", "chain", "--dry-run", "--out", tmp_path / "out", code=0)


def bad_data(tmp_path, spec, texts, rows, *more, code):
    path = tmp_path / "d.jsonl"
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    else:
        write_rows(path, rows)
    words = ("--student", texts[0], "--teacher", texts[1], "--data", path, "--max-tokens", 4)
    return run("run", spec, *words, "--dry-run", "--out", tmp_path / "o", *more, code=code)


GOOD = {"prompt": "w1 w2"}


@pytest.mark.parametrize(
    ("rows", "code", "shown"),
    [
        (b"", 1, "no usable row"),
        (b"\n \n", 1, "no usable row"),
        (b'{"prompt": "w1"}\n{"prompt": \n', 1, "line 2: not JSON"),
        ([GOOD, {"prompt": None}], 1, "line 2"),
        ([GOOD, GOOD, {"prompt": 7}], 1, "line 3"),
        ([{"prompt": "  "}], 1, "line 1: `prompt` is empty"),
        ([{"prompt": ["w1", "w2"]}], 1, "messages"),
        ([{"text": "w1"}], 1, "no `prompt`"),
        ([{"prompt": "w1", "reference": [1]}], 1, "`reference`"),
        (b'{"prompt": "w1 \\ud800"}\n', 1, "surrogate"),
        (b'\xff\xfe{"prompt"', 1, "not UTF-8"),
        ([[1, 2]], 1, "not an object"),
        ([{"prompt": "w1 " * 70}], 1, "longer than 60 tokens"),
    ],
)
def test_bad_data_is_refused_with_its_line(tmp_path, spec, texts, rows, code, shown):
    result = bad_data(tmp_path, spec, texts, rows, code=code)
    assert shown in " ".join(result.stderr.split()), result.stderr  # lines are wrapped


def test_bad_rows_and_long_prompts_can_be_left_out_with_a_count(tmp_path, spec, texts):
    rows = [GOOD, {"prompt": None}, {"prompt": "w1 " * 70}, GOOD]
    more = ("--skip-bad-rows", "--long-prompts", "drop")
    shown = bad_data(tmp_path, spec, texts, rows, *more, code=0).stdout
    assert "1 bad rows left out" in shown and "1 prompts over 60 tokens left out" in shown
    assert "2 usable" in shown
    more = ("--skip-bad-rows", "--long-prompts", "cut")
    assert "3 usable" in bad_data(tmp_path, spec, texts, rows, *more, code=0).stdout


def test_a_missing_data_file_and_one_that_is_a_folder(tmp_path, spec, texts):
    words = ("--student", texts[0], "--teacher", texts[1], "--dry-run", "--out", tmp_path / "o")
    assert "OPD702" in run("run", spec, *words, "--data", tmp_path / "none", code=3).stderr
    assert "OPD702" in run("run", spec, *words, "--data", tmp_path, code=3).stderr


def test_other_tokenizers_are_refused_with_a_witness(tmp_path, spec, texts, data):
    other = text_model(tmp_path / "other", 2, words=[*WORDS[1:], WORDS[0]])
    words = ("--student", texts[0], "--teacher", other, "--data", data)
    result = run("run", spec, *words, "--out", tmp_path / "o", code=3)
    assert "OPD403" in result.stderr and "w0" in result.stderr


def test_rows_as_they_are_read():
    line = b'{"prompt": [{"role": "user", "content": "a"}], "reference": 4, "x": "y"}'
    row = check_row(decode(line), {})
    assert row["reference"] == "4" and row["fields"] == {"x": "y"}
    with pytest.raises(Fault):
        decode(b"[" * 100_000)


def test_chat_templates_are_applied_once(tmp_path, texts, data):
    from transformers import AutoTokenizer

    from opdsl.train.data import FileData, FileOptions

    template = "<s> {% for m in messages %}{{ m['content'] }} {% endfor %}w59"
    folder = text_model(tmp_path / "chat", 0, template=template)
    found = FileData(
        str(data), AutoTokenizer.from_pretrained(folder), FileOptions(context=64, max_new_tokens=8)
    )
    assert found.response_text(found.prompts(0, 1)[0].ids[1:]).endswith("w59")
    assert list(found.prompts(0, 1)[0].ids).count(1) == 1  # one start token
    prompt = found.prompts(0, 1)[0]
    assert found.verify(prompt, found.tokenizer("w5 42")["input_ids"]) == 1.0
    assert found.verify(prompt, found.tokenizer("w5 7")["input_ids"]) == 0.0
    told = found.context_ids(prompt, "answer: {reference}")
    assert 4 + WORDS.index("42") in told and len(told) > len(prompt.ids)


# ---- comparing ---------------------------------------------------------------------------------------------


def test_estimates_over_seeds():
    from opdsl.train.study import estimate

    found = estimate([0.5, 0.7, 0.9])
    assert found.mean == pytest.approx(0.7)
    assert found.high - found.mean == pytest.approx(4.303 * 0.2 / 3**0.5)
    assert estimate([0.5]).low is None
    with pytest.raises(ValueError):
        estimate([])


@pytest.mark.slow
def test_compare_and_compare_again(tmp_path, spec):
    out = tmp_path / "study"
    words = ("compare", spec, spec, "--seeds", 2, "--steps", 30, "--out", out)
    first = run(*words, code=0)
    assert "| full_kl-2 |" in first.stdout and (out / "comparison.png").stat().st_size > 5000
    found = json.loads((out / "comparison.json").read_text())
    assert [m["name"] for m in found["methods"]] == ["full_kl", "full_kl-2"]
    # Equal methods at equal seeds are equal runs.
    assert found["methods"][1]["difference"]["greedy"]["values"] == [0.0, 0.0]
    assert run(*words, "--json", code=0).stdout  # from the cached runs
