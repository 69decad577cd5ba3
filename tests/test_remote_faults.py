"""Remote teachers that fail: one request at a time, and in the middle of a run."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from support import remote
from support.remote import (
    TOP,
    V,
    lines_of,
    linked,
    numbers,
    run,
    told,
)
from support.servers import FaultyServer

from opdsl.train.errors import GuardStop, RunProblem, TeacherLost
from opdsl.train.teachers.link import Patience, split
from opdsl.train.teachers.servers import Changed
from opdsl.train.teachers.transport import Fault
from opdsl.train.teachers.wire import Row, Want

models, scorer, server = remote.models, remote.scorer, remote.server

# ---- faults of one request -------------------------------------------------------------------------

ROWS = [Row((1, 5, 9, 14, 12), 3), Row((1, 8, 3), 1)]
PASSING = {
    500: "HTTP 500", 502: "HTTP 502", 503: "HTTP 503", 504: "HTTP 504", 429: "HTTP 429",
    "cut": "broke off", "garbage": "no safetensors", "not http": "HTTP", "hang": "no answer",
    "drip": "no answer", "nan": "NaN", "above zero": "above 0", "fewer rows": "1 rows came back",
    "fewer positions": "scores for", "shift": "shifted", "ids beyond": "outside the vocabulary",
    "too much mass": "together",
}  # fmt: skip


@pytest.mark.parametrize("fault", PASSING, ids=str)
def test_what_passes_is_asked_again(server, fault):
    link = linked(server, deadline=2.0 if fault in ("hang", "drip") else 20.0)
    server.script = [fault]
    found = link.ask(ROWS, Want(top=V))
    assert torch.equal(found[0].sampled, server.scorer.score(ROWS, Want())[0].sampled)
    assert server.asked == 2 and link.client.counts.retries == 1
    assert any(PASSING[fault] in text for text in link.client.counts.faults)


@pytest.mark.parametrize("fault", [500, "nan", "shift", "drip"], ids=str)
def test_what_does_not_pass_is_given_up_in_time(server, fault):
    link = linked(server, deadline=0.6)
    server.always = fault
    with pytest.raises(Fault, match=PASSING[fault]) as caught:
        link.ask(ROWS, Want(top=V))
    if fault in ("nan", "shift"):
        assert server.asked == 3 and caught.value.passing


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413])
def test_what_cannot_pass_is_not_asked_again(server, status):
    link = linked(server)
    server.script = [status]
    with pytest.raises(Fault, match=f"HTTP {status}"):
        link.ask(ROWS, Want())
    assert server.asked == 1


@pytest.mark.parametrize("spoil", ["other model", "other weights"])
def test_another_teacher_is_noticed_by_its_answer(server, spoil):
    link = linked(server)
    server.script = [spoil]
    with pytest.raises(Changed):
        link.ask(ROWS, Want())


def test_retry_after_is_honoured_and_random_streams_are_left_alone(server):
    link = linked(server)
    state = random.getstate()
    waits = []
    link.client._sleep = waits.append
    server.script = [429, 500, 500, 500]
    link.ask(ROWS, Want())
    assert len(waits) == 4 and waits[-1] > waits[1] * 1.2 and random.getstate() == state


def test_faults_in_a_fifth_of_all_requests_do_not_change_the_answers(server):
    """200 requests, faulty at random: the same scores, nothing counted twice."""
    link = linked(server, deadline=30.0)
    link.client._sleep = lambda seconds: None
    rng = random.Random(0)
    faults = [f for f in PASSING if f not in ("hang", "drip")]
    right = server.scorer.score(ROWS, Want(top=V))
    for _ in range(200):
        server.script = [rng.choice(faults)] if rng.random() < 0.2 else []
        for a, b in zip(link.ask(ROWS, Want(top=V)), right):
            assert torch.equal(a.sampled, b.sampled)
    assert link.client.counts.retries == sum(link.client.counts.faults.values())


def test_rows_are_split_into_requests_in_order():
    rows = [Row(tuple(range(n)), 1) for n in (3, 5, 2, 9, 2)]
    pieces = split(rows, 10)
    assert [[len(r.tokens) for r in p] for p in pieces] == [[3, 5], [2], [9], [2]]


# ---- faults in the middle of a run -------------------------------------------------------------------


def at_request(server, number, act):
    """Do something when the server is asked for the n-th time after the examination."""

    def on_score(asked):
        if asked == number:
            act()

    server.on_score = on_score


EXAMINED = 4  # requests of the examination before a run's first batch, for a method of top tokens


def test_a_server_that_is_killed_and_comes_back(tmp_path, models, scorer):
    _, calm = run(tmp_path, models, TOP, models[1], "calm", steps=4)
    server = FaultyServer(scorer)
    port, back = server.server_address[1], []

    def restart():
        time.sleep(0.4)
        back.append(FaultyServer(scorer, port=port))

    def die():
        server.kill()
        threading.Thread(target=restart).start()

    at_request(server, EXAMINED + 2, die)
    summary, lines = run(tmp_path, models, TOP, server.url, "killed", steps=4)
    assert numbers(lines) == numbers(calm)
    assert summary.counts["teacher T: requests tried again"] >= 1
    assert "teacher T: connection refused" in summary.counts
    back[0].close()


def test_halt_saves_and_a_resumed_run_goes_on_as_if_nothing_had_happened(tmp_path, models, scorer):
    _, calm = run(tmp_path, models, TOP, models[1], "calm", steps=4)
    server = FaultyServer(scorer)
    at_request(server, EXAMINED + 3, server.kill)
    server.script = [None] * (EXAMINED + 2) + [500]
    with pytest.raises(TeacherLost) as caught:
        run(tmp_path, models, TOP, server.url, "lost", steps=4, teacher_timeout=0.5)
    assert (caught.value.diagnostic.code, caught.value.exit_code) == ("OPD731", 4)
    assert not isinstance(caught.value, GuardStop) and "--resume" in told(caught.value)
    assert len(lines_of(tmp_path / "lost")) == 2
    again = FaultyServer(scorer)  # on another port: the weights are what counts
    summary, lines = run(tmp_path, models, TOP, again.url, "lost", steps=4, resume=True)
    assert numbers(lines) == numbers(calm)
    assert summary.counts["teacher T: connection refused"] >= 1
    again.close()


def test_batches_are_dropped_up_to_a_limit_and_counted(tmp_path, models, server):
    server.script = [None] * EXAMINED + [None, "nan", "nan", "nan", None]
    settings = {"steps": 3, "teacher_failure": "drop_batch(1)", "teacher_timeout": 5.0}
    summary, lines = run(tmp_path, models, TOP, server.url, "dropped", **settings)
    assert ["dropped" in x for x in lines] == [False, True, False]
    assert "loss" not in lines[1] and summary.counts["steps dropped: teacher T"] == 1
    server.script, server.asked = [None] * EXAMINED + ["nan"] * 6, 0
    with pytest.raises(TeacherLost, match="1 batches were dropped"):
        run(tmp_path, models, TOP, server.url, "twice", **settings)


def test_pausing_waits_for_the_server(tmp_path, models, scorer):
    _, calm = run(tmp_path, models, TOP, models[1], "calm", steps=3)
    server = FaultyServer(scorer)
    port, back = server.server_address[1], []

    def restart():
        time.sleep(1.0)  # longer than the time for a batch
        back.append(FaultyServer(scorer, port=port))

    def die():
        server.kill()
        threading.Thread(target=restart).start()

    at_request(server, EXAMINED + 2, die)
    settings = {"steps": 3, "teacher_failure": "pause", "teacher_timeout": 0.4}
    summary, lines = run(tmp_path, models, TOP, server.url, "paused", **settings)
    assert numbers(lines) == numbers(calm)
    assert summary.counts["times the run waited for teacher T"] == 1
    back[0].close()


def test_a_teacher_restarted_with_other_weights_ends_the_run(tmp_path, models, server):
    server.script = [None] * (EXAMINED + 1) + ["other weights"]
    with pytest.raises(RunProblem) as caught:
        run(tmp_path, models, TOP, server.url, "changed")
    assert (caught.value.diagnostic.code, caught.value.exit_code) == ("OPD732", 4)
    assert len(lines_of(tmp_path / "changed")) == 1


def test_a_run_that_is_asked_to_end_does_not_wait(server):
    link = linked(server, deadline=60.0)
    server.always = 503
    link.client.stopped = lambda: server.asked >= 2
    with pytest.raises(Fault):
        link.ask(ROWS, Want())
    assert server.asked <= 3


@pytest.mark.parametrize("text", ["halt", "pause", "drop_batch(3)", "drop_batch(max 3)"])
def test_words_of_patience(text):
    assert Patience.parse(text).kind in text
    with pytest.raises(RunProblem, match="OPD112"):
        Patience.parse(text + "!")
