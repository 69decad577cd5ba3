"""vLLM and SGLang as teachers: answers in their documented shapes, and training against stand-ins."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support import remote
from support.models import tiny
from support.remote import (
    ASKED,
    SAMPLED,
    TOP,
    V,
    batch,
    linked,
    refused,
    run,
    told,
)
from support.servers import scorer_of, sglang, vllm

from opdsl.train.errors import RunProblem
from opdsl.train.teachers.answers import check
from opdsl.train.teachers.capabilities import IN_PROCESS
from opdsl.train.teachers.remote import RemoteTeacher
from opdsl.train.teachers.sglang import SglangServer
from opdsl.train.teachers.sources import parse
from opdsl.train.teachers.transport import Client, Fault
from opdsl.train.teachers.vllm import VllmServer
from opdsl.train.teachers.wire import Row, Want

models, scorer, server = remote.models, remote.scorer, remote.server

RECORDED = Path(__file__).parent / "recorded"


# ---- answers of vLLM and SGLang ------------------------------------------------------------------------


class Canned(Client):
    """A client whose server gives recorded answers."""

    def __init__(self, answers):
        super().__init__(parse("vllm+http://host:1", "T"), 5.0)
        self.answers, self.sent = answers, []

    def json(self, method, path, body=None, **more):
        self.sent.append((path, body))
        return self.answers[path]


def test_a_recorded_answer_of_vllm():
    answer = json.loads((RECORDED / "vllm_completions.json").read_text())
    client = Canned({"/v1/completions": answer})
    server = VllmServer(client, "org/teacher-0.6b", IN_PROCESS)
    rows = [Row((1, 5, 14, 3), 2), Row((2, 9), 1)]
    first, second = server.score(rows, Want(top=2), 1.0)
    assert first.sampled.tolist() == [-8.0, -0.75] and second.sampled.tolist() == [-0.5]
    assert first.top_ids.tolist() == [[3, 2], [3, 7]]
    assert first.top_logprobs.tolist() == [[-0.125, -3.0], [-0.75, -math.inf]]
    check(rows, [first, second], Want(top=2), V)
    path, sent = client.sent[0]
    assert path == "/v1/completions" and sent["prompt"] == [[1, 5, 14, 3], [2, 9]]
    assert sent["prompt_logprobs"] == 2 and sent["max_tokens"] == 1 and sent["temperature"] == 1.0


def test_a_recorded_answer_of_sglang():
    answer = json.loads((RECORDED / "sglang_generate.json").read_text())
    client = Canned({"/generate": answer})
    server = SglangServer(client, "/models/teacher", IN_PROCESS)
    row = Row((1, 5, 14, 3), 2, torch.tensor([[2, 14], [14, 2]]))
    (one,) = server.score([row], Want(top=2), 1.0)
    assert one.sampled.tolist() == [-8.0, -0.75]
    assert one.top_ids.tolist() == [[3, 2], [3, 0]]  # one entry is missing: not invented
    assert one.top_logprobs.tolist() == [[-0.125, -3.0], [-0.75, -math.inf]]
    assert one.ids_logprobs.tolist() == [[-4.0, -8.0], [-7.5, -6.5]]
    sent = client.sent[0][1]
    assert sent["logprob_start_len"] == 1 and sent["token_ids_logprob"] == [2, 14]
    assert sent["sampling_params"]["max_new_tokens"] == 0 and sent["return_logprob"] is True


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a["choices"].pop(),
        lambda a: a["choices"][0].update(index=7),
        lambda a: a["choices"][0].update(prompt_logprobs=None),
        lambda a: a["choices"][1]["prompt_logprobs"].pop(0),
        lambda a: a["choices"][1]["prompt_logprobs"][2].pop("14"),
        lambda a: a["choices"][1]["prompt_logprobs"][2].update({"3": {"rank": 1}}),
    ],
)
def test_damaged_answers_of_vllm_are_faults(spoil):
    answer = json.loads((RECORDED / "vllm_completions.json").read_text())
    spoil(answer)
    server = VllmServer(Canned({"/v1/completions": answer}), "org/teacher-0.6b", IN_PROCESS)
    with pytest.raises(Fault) as caught:
        server.score([Row((1, 5, 14, 3), 2), Row((2, 9), 1)], Want(top=2), 1.0)
    assert caught.value.tries == 3


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m["input_token_logprobs"].pop(),
        lambda m: m["input_token_logprobs"][1].__setitem__(1, 77),
        lambda m: m["input_token_logprobs"].__setitem__(1, "x"),
        lambda m: m.pop("input_top_logprobs"),
        lambda m: m["input_token_ids_logprobs"][1].pop(),
    ],
)
def test_damaged_answers_of_sglang_are_faults(spoil):
    answer = json.loads((RECORDED / "sglang_generate.json").read_text())
    spoil(answer["meta_info"])
    server = SglangServer(Canned({"/generate": answer}), "/models/teacher", IN_PROCESS)
    row = Row((1, 5, 14, 3), 2, torch.tensor([[2, 14], [14, 2]]))
    with pytest.raises(Fault):
        server.score([row], Want(top=2), 1.0)


@pytest.mark.parametrize(("kind", "make"), [("vllm+", vllm), ("sglang+", sglang)])
@pytest.mark.parametrize("spec", [SAMPLED, TOP, ASKED])
def test_training_with_other_servers(tmp_path, models, scorer, kind, make, spec):
    server = make(scorer)
    try:
        _, here = run(tmp_path, models, spec, models[1], "here", steps=2, prompts=2)
        _, there = run(tmp_path, models, spec, kind + server.url, "there", steps=2, prompts=2)
        for a, b in zip(here, there):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-4, abs=1e-5)
    finally:
        server.close()


def test_a_cap_on_logprobs_refuses_the_method_and_says_the_cap(tmp_path, models, scorer):
    server = vllm(scorer, max_logprobs=20)
    problem = refused(tmp_path, models, "vllm+" + server.url, "cr_opd")
    assert (problem.diagnostic.code, problem.exit_code) == ("OPD407", 2)
    assert "20" in told(problem) and "--max-logprobs" in told(problem)
    server.close()


def test_an_older_vllm_does_not_score_given_tokens(tmp_path, models, scorer):
    server = vllm(scorer, ids=False)
    problem = refused(tmp_path, models, "vllm+" + server.url, ASKED)
    assert problem.diagnostic.code == "OPD407" and "given tokens" in told(problem)
    server.close()


def test_lists_that_are_short_go_to_the_tail(tmp_path, models, scorer):
    server = sglang(scorer, short=2)
    _, lines = run(tmp_path, models, TOP, "sglang+" + server.url, "short", steps=2)
    assert all(math.isfinite(x["loss"]) for x in lines)
    server.close()


def test_a_canary_finds_a_server_that_changed(models, scorer, tmp_path):
    """Where answers do not name their weights, rows of the start are scored again."""
    first = vllm(scorer)
    link = linked(first, kind="vllm+")
    teacher = RemoteTeacher("T", link, lambda p: p.ids, torch.device("cpu"), V)
    prompts, tokens_BT, lengths_B = batch()
    teacher.begin(prompts)
    teacher.score(prompts, tokens_BT, lengths_B)
    other = vllm(scorer_of(tiny(tmp_path / "other", 7)))
    first.routes = other.routes
    link.client.troubled = True  # as after any fault on the line
    with pytest.raises(RunProblem) as caught:
        teacher.score(prompts, tokens_BT, lengths_B)
    assert caught.value.diagnostic.code == "OPD732" and caught.value.exit_code == 4
    first.close(), other.close()
