"""Outcomes in a run: curricula by pass rate, group statistics, verifiers that fail."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.models import tiny
from support.texts import WORDS, tokenizer

import opdsl
from opdsl.train.curriculum import NEVER, Band, Curriculum, parse_curriculum
from opdsl.train.data import FileData, FileOptions
from opdsl.train.errors import GuardStop, RunProblem
from opdsl.train.loop import train
from opdsl.train.metrics import read_lines
from opdsl.train.outcomes import Outcomes, by_domain, group_statistics
from opdsl.train.settings import RunSettings
from opdsl.train.states import Rows
from opdsl.train.verify import Verdict

# ---- which prompts are drawn -----------------------------------------------------------------------


def simulate(band, chances, steps, n=8, group=4, seed=0, stop_at=None):
    """Draw `steps` batches from prompts that pass with these chances; the draws, and the state.

    stop_at: go on from there in a new object with the state of the old one.
    """
    now, draws = Curriculum(band, len(chances), seed), []
    for step in range(steps):
        if step == stop_at:
            fresh = Curriculum(band, len(chances), seed)
            fresh.load_state(now.state())
            now = fresh
        drawn = now.draw(n)
        assert now.draw(n) == drawn, "drawing changes nothing"
        rng = np.random.default_rng(step)
        judged = [(i, float(rng.random() < chances[i])) for i in drawn for _ in range(group)]
        now.record(drawn, judged)
        draws.append(drawn)
    return draws, now


def counts(draws, rows):
    return np.bincount(np.concatenate(draws), minlength=rows)


def test_without_outcomes_every_prompt_comes_once_a_pass():
    now = Curriculum(Band(0.1, 0.9), 10, seed=3)
    seen = []
    for _ in range(5):
        drawn = now.draw(4)
        now.record(drawn, [])
        seen += drawn
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_prompts_outside_the_band_are_drawn_less():
    chances = np.array([0.0] * 40 + [0.5] * 40 + [1.0] * 40)
    draws, now = simulate(Band(0.2, 0.8, after=4, rest=8), chances, steps=300)
    hard, middle, easy = counts(draws, 120).reshape(3, 40)
    assert set(hard) | set(easy) <= {4, 5, 6, 7} and middle.min() > 4 * hard.max()
    figures = now.figures()
    assert figures["curriculum_seen"] == 1.0
    assert figures["curriculum_hard"] == pytest.approx(1 / 3, abs=0.02)
    assert figures["curriculum_easy"] == pytest.approx(1 / 3, abs=0.02)


def test_never_means_never_while_others_are_left():
    chances = np.array([0.0] * 5 + [0.5] * 5)
    band = Band(0.2, 0.8, after=1, rest=NEVER)
    draws, _ = simulate(band, chances, steps=60, n=5, group=200)
    assert list(counts(draws, 10)[:5]) == [1] * 5
    draws, _ = simulate(band, np.zeros(4), steps=8, n=2)
    assert list(counts(draws, 4)) == [4] * 4, "a run does not end for want of prompts"


def test_a_prompt_that_gets_better_comes_back():
    now = Curriculum(Band(0.2, 1.0, after=4, rest=2, memory=8), 2, seed=0)
    for _ in range(3):
        now.record(now.draw(1), [(0, 0.0)] * 4 + [(1, 0.5)] * 4)
    assert now.outside().tolist() == [True, False]
    now.record([0], [(0, 1.0)] * 8)
    assert now.outside().tolist() == [False, False] and now.rate[0] == 1.0


def test_a_resumed_curriculum_draws_the_same():
    chances = np.random.default_rng(0).random(50)
    whole, end = simulate(Band(0.3, 0.7), chances, steps=40)
    parts, again = simulate(Band(0.3, 0.7), chances, steps=40, stop_at=17)
    assert whole == parts and simulate(Band(0.3, 0.7), chances, 40, seed=1)[0] != whole
    for name, value in end.state().items():
        assert torch.equal(value, again.state()[name])
    with pytest.raises(RunProblem, match="OPD705"):
        Curriculum(Band(0.3, 0.7), 49, 0).load_state(end.state())
    with pytest.raises(RunProblem, match="OPD705"):
        Curriculum(Band(0.3, 0.7), 50, 0).load_state({})


def test_batches_larger_than_the_data_and_running_rates():
    now = Curriculum(Band(0.1, 0.9, memory=4), 3, seed=0)
    drawn = now.draw(8)
    assert sorted(np.bincount(drawn, minlength=3)) == [2, 3, 3]
    now.record(drawn, [(0, 1.0), (0, 0.0), (1, 1.0)])
    assert now.rate.tolist() == [0.5, 1.0, 0.0] and now.count.tolist() == [2, 1, 0]
    now.record([0], [(0, 1.0)] * 2)
    assert now.rate[0] == 0.75
    now.record([0], [(0, 0.0)] * 2)  # the first of six is forgotten by now
    assert now.rate[0] == 0.375 and now.due.sum() == 10


def test_curricula_are_read_from_words():
    assert parse_curriculum("pass_rate=0.1..0.9") == Band(0.1, 0.9)
    found = parse_curriculum("pass_rate=0..1, after=2, rest=never, memory=16")
    assert found == Band(0.0, 1.0, 2, NEVER, 16)
    for bad in ("0.1..0.9", "pass_rate=0.9..0.1", "pass_rate=0.1", "rest=3", "pass_rate=0..2",
                "pass_rate=0.1..0.9,rest=0", "pass_rate=0.1..0.9,speed=1", ""):  # fmt: skip
        with pytest.raises(RunProblem, match="OPD112"):
            parse_curriculum(bad)


# ---- statistics of groups --------------------------------------------------------------------------


class Prompt:
    def __init__(self, domain=None, index=0):
        self.fields, self.index = ({"domain": domain} if domain else {}), index


def rows_of(groups, own=None, prompts=None) -> Rows:
    B = len(groups)
    zeros = torch.zeros(B, 1)
    return Rows(
        prompts or [Prompt() for _ in groups],
        zeros.long(),
        torch.ones(B, dtype=torch.long),
        zeros,
        torch.ones(B, dtype=torch.bool),
        torch.tensor(groups),
        torch.tensor(own or [True] * B),
        [[0]] * B,
        {},
    )


def test_pass_rates_of_groups():
    outcome_B = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, float("nan")])
    found = group_statistics(rows_of([0, 0, 1, 1, 2, 2, 3, 3]), outcome_B)
    assert found == {
        "groups": 3, "groups_right": 1 / 3, "groups_wrong": 1 / 3, "groups_mixed": 1 / 3,
        "pass_rate_min": 0.0, "pass_rate_max": 1.0, "group_std": pytest.approx(0.5 / 3),
    }  # fmt: skip
    assert group_statistics(rows_of([0, 1, 2]), torch.ones(3)) == {}
    assert group_statistics(rows_of([0, 0], own=[True, False]), torch.ones(2)) == {}


def test_rewards_by_domain():
    prompts = [Prompt("math"), Prompt("code"), Prompt("math"), Prompt()]
    found = by_domain(rows_of([0, 1, 2, 3], prompts=prompts), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert found == {"reward/code": 0.0, "reward/math": 0.5}
    assert by_domain(rows_of([0, 1]), torch.ones(2)) == {}


class Source:
    """Data whose verifier gives these verdicts."""

    verifiable = True

    def __init__(self, *verdicts):
        self.verdicts = list(verdicts)

    def judge(self, prompts, responses):
        return self.verdicts

    def finish(self, step, prompts, scores):
        self.seen = (step, [p.index for p in prompts], scores)
        return {"figure": 1.0}


def test_an_error_is_left_out_or_unknown_and_always_counted():
    source = Source(Verdict(1.0), Verdict(None, "no gcc"), Verdict(0.0))
    rows = rows_of([0, 1, 2], own=[True, True, False])
    counted, said = {}, []
    kept, outcome_B, record = Outcomes(source, True, counted, said)(rows, 4)
    assert outcome_B.tolist() == [1.0, 0.0] and len(kept) == 2 and record["figure"] == 1.0
    assert kept.dropped == {"verifier error": 1} and source.seen == (4, [0, 0], [1.0, None])
    assert counted == {"verifier errors: no gcc": 1} and "no gcc" in said[0]
    kept, outcome_B, _ = Outcomes(source, False)(rows, 0)
    assert len(kept) == 3 and torch.isnan(outcome_B).tolist() == [False, True, False]


def test_a_verifier_that_never_answers_stops_the_run_after_a_few_steps():
    judge = Outcomes(Source(Verdict(None, "no answer for 30 s")), True)
    for step in range(2):
        kept, _, _ = judge(rows_of([0]), step)
        assert len(kept) == 0
    with pytest.raises(GuardStop, match="no verdict for 3 steps in a row at step 3") as caught:
        judge(rows_of([0]), 2)
    assert caught.value.exit_code == 4 and not caught.value.skippable
    patient = Outcomes(Source(Verdict(None, "x")), False)
    for step in range(9):
        patient(rows_of([0]), step)
    assert patient.counts == {"verifier errors: x": 9}


# ---- whole runs ------------------------------------------------------------------------------------

SPEC = """opd 1
method small_hybrid "Log-ratio plus outcome, within groups" {
  evidence hypothesis
  state     rollouts(student, group = 2, temperature = 1.0)
  teacher   T = external(access = sampled)
  support   sampled
  feedback  reward logratio(T, rollout) + 2 nats * outcome
  credit    return_to_go(baseline = leave_one_out)
  aggregate mean(over = tokens)
}
"""


@pytest.fixture(scope="module")
def method():
    return opdsl.compile(SPEC)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for i, name in enumerate(("s", "t")):
        tiny(root / name, i, vocab=72)
        tokenizer(WORDS).save_pretrained(root / name)
    return {"student": str(root / "s"), "teachers": {"": str(root / "t")}}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [
        {"prompt": f"w{i} w{i + 1}", "reference": "4", "domain": "ab"[i % 2]} for i in range(24)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def run(method, models, data, out, **more):
    base = {"steps": 6, "prompts": 4, "max_tokens": 6, "eval_every": 100, "report": False,
            "export": False, "save_every": 2, "optimize": {"warmup": 2, "lr": 1e-3}}  # fmt: skip
    settings = RunSettings(out=str(out), data=data, **(base | models | more))
    summary = train(method, settings)
    return summary, read_lines(out / "metrics.jsonl")


# Right with a chance of about a half, by what the student happens to write.
PARITY = r"regex:^\s*(?:\S+\s+){0,2}\S*[02468](?:\s|$)"


def test_a_run_with_a_curriculum_resumes_bit_for_bit(tmp_path, method, models, data, monkeypatch):
    words = {"curriculum": "pass_rate=0.3..0.7,after=2,rest=3", "verifier": PARITY, "steps": 14}
    _, whole = run(method, models, data, tmp_path / "whole", **words)
    assert whole[-1]["curriculum_hard"] + whole[-1]["curriculum_easy"] > 0
    assert {"groups_mixed", "reward/a", "reward/b"} <= set().union(*whole)
    run(method, models, data, tmp_path / "parts", **{**words, "steps": 9})
    _, parts = run(method, models, data, tmp_path / "parts", resume=True, **words)
    assert parts == whole
    _, plain = run(method, models, data, tmp_path / "plain", verifier=PARITY, steps=14)
    assert [r["reward"] for r in plain] != [r["reward"] for r in whole]
    with pytest.raises(RunProblem, match="OPD705") as caught:
        run(method, models, data, tmp_path / "parts", resume=True,
            **{**words, "steps": 15, "curriculum": "pass_rate=0.1..0.9"})  # fmt: skip
    assert any("curriculum" in note for note in caught.value.diagnostic.notes)


def test_a_run_with_a_program_as_its_verifier(tmp_path, method, models, data):
    judge = tmp_path / "judge.sh"
    judge.write_text(
        "#!/bin/sh\nwhile read line; do\n"
        """case $line in *'"id": 1,'*) echo '{"error": "no opinion"}';; *) echo 0.5;; esac\ndone\n"""
    )
    judge.chmod(0o755)
    summary, records = run(method, models, data, tmp_path / "out", verifier=f"command:{judge}")
    assert {r["reward"] for r in records} == {0.5}
    assert summary.counts["verifier errors: no opinion"] == 6
    assert summary.counts["rows dropped: verifier error"] == 6
    judge.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(GuardStop, match=r"OPD720 .*no verdict for 3 steps"):
        run(method, models, data, tmp_path / "broken", verifier=f"command:{judge}")


def test_options_that_make_no_sense_here(tmp_path, method, models, data):
    def refused(**more):
        with pytest.raises(RunProblem) as caught:
            run(method, models, more.pop("data", data), tmp_path / "no", **more)
        return caught.value.diagnostic.message

    assert "--curriculum is for data" in refused(
        data=None, task="chain", curriculum="pass_rate=0..1"
    )
    assert "no verifier 'exakt'" in refused(verifier="exakt")
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"prompt": "w1"}\n')
    assert "1 rows have no `reference`" in refused(data=str(bare))
    _, records = run(method, models, str(bare), tmp_path / "yes", verifier="regex:w", steps=1)
    assert records[0]["reward"] is not None, "a pattern needs no reference"
    spec = (
        SPEC + 'run r of small_hybrid { student = "s" T = "t" data = "d" verifier = "command:rm" }'
    )
    with pytest.raises(RunProblem, match="a spec may not name a program"):
        train(opdsl.compile(spec), RunSettings(out=str(tmp_path / "no")))


def test_prompts_that_a_curriculum_drew_stay_those_of_the_step(data):
    found = FileData(data, tokenizer(), FileOptions(context=64, max_new_tokens=8, verifier="text",
                                                    curriculum="pass_rate=0.4..0.6,after=1"))  # fmt: skip
    first = found.prompts(0, 6)
    assert found.finish(1, first, [1.0] * 6) == {}, "another step"
    figures = found.finish(0, first, [1.0, 0.0, None, 1.0, 1.0, 1.0])
    assert figures["curriculum_seen"] == pytest.approx(5 / 24)
    assert [p.index for p in found.prompts(0, 6)] == [p.index for p in first]
    assert found.finish(0, first, [0.0] * 6) == {}, "a step is recorded once"
    assert not {p.index for p in found.prompts(1, 6)} & {p.index for p in first}
