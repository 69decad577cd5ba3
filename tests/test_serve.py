"""`opdsl serve`: scores, limits, keys, back-pressure, and a clean end."""

from __future__ import annotations

import http.client
import json
import math
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from click.testing import CliRunner
from support.models import tiny
from support.servers import scorer_of

from opdsl.cli import cli
from opdsl.serve.jobs import Jobs
from opdsl.serve.server import ScoringServer
from opdsl.train.teachers import scorer as scoring
from opdsl.train.teachers import wire
from opdsl.train.teachers.wire import Row, Want

ROWS = [
    Row((1, 5, 9, 14, 12, 7), 3),
    Row((1, 6, 3), 2),
    Row((4, 4, 8, 2, 20, 31, 40, 2), 1),
]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return scorer_of(tiny(tmp_path_factory.mktemp("m") / "teacher", 1))


@pytest.fixture
def server(scorer):
    server = ScoringServer(scorer, max_body=1 << 20).start()
    yield server
    server.close()


def ask(server, method="GET", path="/health", body=None, **headers):
    """(status, headers, JSON body)."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    data = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
    connection.request(method, path, data, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, json.loads(content)


def reference(scorer, row: Row, temperature: float = 1.0) -> torch.Tensor:
    """log softmax [T, V] at the response positions, by the plainest means."""
    with torch.no_grad():
        logits = scorer.model(torch.tensor([row.tokens])).logits[0].double()
    return (logits[row.prompt - 1 : -1] / temperature).log_softmax(-1)


# ---- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["logits", "tiles"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_those_of_the_model(scorer, monkeypatch, route, temperature):
    if route == "tiles":  # as for a large vocabulary
        monkeypatch.setattr(scoring, "FUSED_FROM", 8)
        assert scorer.fused
    ids = torch.randint(0, 44, (12, 3), generator=torch.Generator().manual_seed(0))
    rows = [Row(r.tokens, r.prompt, ids[: r.response]) for r in ROWS]
    found = scorer.score(rows, Want(top=5, entropy=True, temperature=temperature))
    for row, one in zip(rows, found):
        logp_TV = reference(scorer, row, temperature)
        y = torch.tensor(row.tokens[row.prompt :])[:, None]
        close = {"rtol": 0, "atol": 2e-6, "check_dtype": False}
        torch.testing.assert_close(one.sampled, logp_TV.gather(1, y)[:, 0], **close)
        torch.testing.assert_close(one.top_logprobs, logp_TV.topk(5).values, **close)
        torch.testing.assert_close(one.ids_logprobs, logp_TV.gather(1, row.ids), **close)
        torch.testing.assert_close(one.entropy, -(logp_TV.exp() * logp_TV).sum(-1), **close)
        assert one.top_ids.tolist() == logp_TV.topk(5).indices.tolist()


def test_rows_in_several_passes_score_as_in_one(scorer):
    whole = scorer.score(ROWS, Want(top=3))
    small = scorer_of_same(scorer, max_batch_tokens=12)
    assert len(small._passes(ROWS)) == 2
    for a, b in zip(whole, small.score(ROWS, Want(top=3))):
        torch.testing.assert_close(a.sampled, b.sampled, rtol=0, atol=2e-6)
        assert a.top_ids.tolist() == b.top_ids.tolist()


def scorer_of_same(scorer, **more):
    return scoring.Scorer(scorer.model, None, scorer.name, **more)


def test_memory_that_runs_out_halves_the_pass(scorer, monkeypatch):
    small = scorer_of_same(scorer)
    real, sizes = small._scores, []

    def scarce(rows, want):
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(rows, want)

    monkeypatch.setattr(small, "_scores", scarce)
    found = small.score(ROWS, Want())
    assert sizes == [3, 1, 2, 1, 1] and [len(x.sampled) for x in found] == [3, 1, 7]


def test_a_vocabulary_is_cut_before_the_softmax(scorer):
    (one,) = scorer.score([ROWS[1]], Want(vocabulary=30))
    with torch.no_grad():
        z = scorer.model(torch.tensor([ROWS[1].tokens])).logits[0, 1, :30]
    torch.testing.assert_close(one.sampled[0], z.log_softmax(-1)[3], rtol=0, atol=2e-6)


def test_json_and_safetensors_say_the_same(scorer, server):
    ids = torch.tensor([[4, 7], [2, 8], [0, 1]])
    row = Row(ROWS[0].tokens, 3, ids)
    body = {"rows": [{"tokens": list(row.tokens), "prompt_length": 3, "ids": ids.tolist()}],
            "top": 2, "entropy": True}  # fmt: skip
    status, _, said = ask(server, "POST", "/score", body)
    (direct,) = scorer.score([row], Want(top=2, entropy=True))
    assert status == 200 and said["weights"] == scorer.weights and said["vocabulary"] == 44
    for name in ("sampled", "top_ids", "top_logprobs", "ids_logprobs", "entropy"):
        assert said["rows"][0][name] == getattr(direct, name).tolist(), name
    packed = wire.encode_answer([direct], {"model": "m"}, wire.BINARY)
    (again,), meta = wire.decode_answer(packed)
    assert meta == {"model": "m"}
    for name in ("sampled", "top_ids", "top_logprobs", "ids_logprobs", "entropy"):
        assert torch.equal(getattr(again, name), getattr(direct, name)), name


def test_minus_infinity_is_null_in_json():
    one = wire.RowScores(torch.tensor([-math.inf, -1.0]))
    assert json.loads(wire.encode_answer([one], {}, wire.JSON))["rows"][0]["sampled"] == [None, -1]


def test_the_model_describes_itself(scorer, server):
    status, _, said = ask(server, path="/v1/models")
    (info,) = said["data"]
    assert status == 200 and info["id"] == "tiny" and info["vocabulary"] == 44
    assert info["capabilities"]["ids"] == "per position" and len(info["weights"]) == 64
    assert ask(server)[2]["status"] == "ok"


# ---- bad requests --------------------------------------------------------------------------------

GOOD = {"tokens": [1, 2, 3], "prompt_length": 1}
BAD = {
    "not JSON": b"{",
    "no object": b"[]",
    "a list `rows`": {"top": 1},
    "no rows": {"rows": []},
    "token ids": {"rows": [{"tokens": "1 2", "prompt_length": 1}]},
    "not None": {"rows": [{"tokens": [1, 2]}]},
    "leaves no response": {"rows": [{"tokens": [1, 2], "prompt_length": 2}]},
    "has no tokens": {"rows": [{"tokens": [1, 2], "prompt_length": 0}]},
    "outside the vocabulary": {"rows": [{"tokens": [1, 99], "prompt_length": 1}]},
    "one list of token ids per": {"rows": [GOOD | {"ids": [[1], [2, 3]]}]},
    "ids are 1×1": {"rows": [GOOD | {"ids": [[1]]}]},
    "asks for an id outside": {"rows": [GOOD | {"ids": [[1], [44]]}]},
    "different numbers of ids": {"rows": [GOOD, GOOD | {"ids": [[1], [2]]}]},
    "top 45 of a vocabulary": {"rows": [GOOD], "top": 45},
    "whole number from 0": {"rows": [GOOD], "top": True},
    "`temperature` is": {"rows": [GOOD], "temperature": 0},
    "`whole` is one of": {"rows": [GOOD], "whole": "yes"},
    "safetensors only": {"rows": [GOOD], "whole": "logits"},
    "not 'other'": {"rows": [GOOD], "model": "other"},
    "context is 64": {"rows": [{"tokens": [1] * 65, "prompt_length": 1}]},
    "`within` is": {"rows": [GOOD], "within": -1},
}


@pytest.mark.parametrize("why", BAD)
def test_a_bad_request_gets_one_clear_sentence(server, why):
    status, _, said = ask(server, "POST", "/score", BAD[why])
    assert status == 400 and why in said["error"] and "\n" not in said["error"]


def test_broken_safetensors_are_a_bad_request(server):
    for body in (b"", b"\x05" * 8, b"\xff" * 40, wire.save_tensors({"tokens": torch.zeros(2)})):
        said = ask(server, "POST", "/score", body, Content_Type=wire.BINARY)
        assert said[0] == 400 and "safetensors" in said[2]["error"]
    tensors = {"tokens": torch.zeros(4), "lengths": torch.tensor([4]), "prompts": torch.tensor([1])}
    body = wire.save_tensors(tensors, {"opdsl": "{}"})
    assert ask(server, "POST", "/score", body, Content_Type=wire.BINARY)[0] == 400


def test_limits_of_the_body(server):
    assert ask(server, "POST", "/score", b"", Content_Length=str(2 << 20))[0] == 413
    assert ask(server, "POST", "/nowhere", b"{}")[0] == 404 and ask(server, path="/x")[0] == 404
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    connection.putrequest("POST", "/score")
    connection.endheaders()
    assert connection.getresponse().status == 411
    connection.close()


def test_a_key_is_asked_for(scorer):
    server = ScoringServer(scorer, key="open sesame").start()
    try:
        body = {"rows": [GOOD]}
        assert ask(server)[0] == 200
        for path in ("/v1/models", "/head"):
            assert ask(server, path=path)[0] == 401
        assert ask(server, "POST", "/score", body)[0] == 401
        assert ask(server, "POST", "/score", body, Authorization="Bearer open")[0] == 401
        assert ask(server, "POST", "/score", body, Authorization="Bearer open sesame")[0] == 200
    finally:
        server.close()


# ---- back-pressure and the end -------------------------------------------------------------------


class Slow:
    """Work that waits until it is let go."""

    def __init__(self):
        self.go, self.began = threading.Event(), threading.Event()

    def __call__(self, rows, want):
        self.began.set()
        assert self.go.wait(10)
        return [wire.RowScores(torch.zeros(r.response)) for r in rows]


@pytest.fixture
def slow(scorer):
    """A server whose queue has one place, its work under our control."""
    server, work = ScoringServer(scorer, queue=1), Slow()
    server.jobs.work = work
    server.start()
    yield server, work
    work.go.set()
    server.close()


def in_background(server, n, results):
    def one():
        results.append(ask(server, "POST", "/score", {"rows": [GOOD]}))

    threads = [threading.Thread(target=one) for _ in range(n)]
    for t in threads:
        t.start()
    return threads


def wait_for(test):
    end = time.monotonic() + 10
    while not test():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_asks_to_come_back(slow):
    server, work = slow
    results: list = []
    threads = in_background(server, 1, results)
    assert work.began.wait(10)
    threads += in_background(server, 1, results)
    wait_for(lambda: len(server.jobs) == 1)
    status, headers, said = ask(server, "POST", "/score", {"rows": [GOOD]})
    assert status == 429 and int(headers["Retry-After"]) >= 1 and "waiting" in said["error"]
    assert ask(server)[2]["queued"] == 1
    work.go.set()
    for t in threads:
        t.join(10)
    assert [r[0] for r in results] == [200, 200]


def test_the_end_finishes_what_is_computed_and_refuses_the_rest(slow):
    server, work = slow
    results: list = []
    threads = in_background(server, 1, results)
    assert work.began.wait(10)
    threads += in_background(server, 1, results)
    wait_for(lambda: len(server.jobs) == 1)
    ending = threading.Thread(target=server.jobs.close)
    ending.start()
    wait_for(server.jobs.closing.is_set)
    assert ask(server)[0] == 503
    assert ask(server, "POST", "/score", {"rows": [GOOD]})[0] == 503
    work.go.set()
    for t in (*threads, ending):
        t.join(10)
    assert sorted(r[0] for r in results) == [200, 503]


def test_a_request_nobody_waits_for_is_not_computed():
    import contextlib

    work = Slow()
    jobs = Jobs(work, 4, contextlib.nullcontext)
    first = jobs.put(ROWS[:1], Want(), 10)
    assert work.began.wait(10)
    late = jobs.put(ROWS[:1], Want(), 0.01)
    time.sleep(0.05)
    work.go.set()
    assert first.done.wait(10) and late.done.wait(10)
    assert isinstance(late.error, TimeoutError) and jobs.expired == 1
    jobs.close()


def test_a_fault_of_the_model_is_500_and_not_the_end(scorer):
    server = ScoringServer(scorer).start()
    try:
        server.jobs.work = lambda rows, want: [wire.RowScores(torch.full((2,), math.nan))]
        assert ask(server, "POST", "/score", {"rows": [GOOD]})[0] == 500
        server.jobs.work = scorer.score
        assert ask(server, "POST", "/score", {"rows": [GOOD]})[0] == 200
    finally:
        server.close()


def test_usage_errors_say_what_to_do(tmp_path, server, monkeypatch):
    def run(*words):
        result = CliRunner().invoke(cli, ["serve", *map(str, words)])
        assert "Traceback" not in result.output
        return result.exit_code, result.output

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(tmp_path / "none")[0] == 3
    code, output = run("embedded:nothing")
    assert code == 2 and "OPD708" in output
    code, output = run("x", "--api-key-env", "NO_SUCH_VARIABLE")
    assert code == 3 and "NO_SUCH_VARIABLE" in output
    tiny(tmp_path / "m", 0)
    code, output = run(tmp_path / "m", "--device", "cpu", "--port", server.server_address[1])
    assert code == 3 and "another --port" in output


@pytest.mark.slow
def test_the_command_serves_and_ends_on_a_signal(tmp_path):
    folder = tiny(tmp_path / "m", 0)
    command = [sys.executable, "-m", "opdsl", "serve", folder, "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert "44 words" in process.stdout.readline()
    url = process.stdout.readline().split("=")[-1].strip()
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "ended" in out
