"""Teachers on servers: equal to teachers in the process, and honest when the server is not well."""

from __future__ import annotations

import pytest
import torch
from support import remote
from support.models import tiny
from support.remote import (
    ASKED,
    SAMPLED,
    TOP,
    WHOLE,
    V,
    batch,
    lines_of,
    linked,
    numbers,
    refused,
    run,
    told,
)
from support.servers import FaultyServer, scorer_of, vllm

import opdsl
from opdsl.emit.prelude import Dense
from opdsl.train.errors import RunProblem
from opdsl.train.loop import train
from opdsl.train.runtime import Runtime
from opdsl.train.settings import RunSettings
from opdsl.train.teachers.capabilities import Wants, wants
from opdsl.train.teachers.local import LocalTeacher
from opdsl.train.teachers.remote import RemoteTeacher
from opdsl.train.teachers.sources import parse
from opdsl.train.teachers.transport import Fault
from opdsl.train.teachers.wire import Row, Want

models, scorer, server = remote.models, remote.scorer, remote.server

# ---- equal to a teacher in this process ------------------------------------------------------------


def test_scores_are_bit_for_bit_those_of_the_model_here(scorer, server):
    prompts, tokens_BT, lengths_B = batch()
    local = LocalTeacher("T", lambda: scorer.model, lambda p: p.ids,
                         Runtime(torch.device("cpu"), "fp32"), V)  # fmt: skip
    z_BTV = local.score(prompts, tokens_BT, lengths_B).logits
    mask = torch.arange(5) < lengths_B[:, None]
    dist = Dense(z_BTV[mask], tokens_BT[mask])
    ids_BTK = torch.randint(0, V, (3, 5, 2), generator=torch.Generator().manual_seed(4))

    def remote(want: Wants) -> RemoteTeacher:
        return RemoteTeacher("T", linked(server, want), lambda p: p.ids, torch.device("cpu"), V)

    found = remote(Wants(top=4)).score(prompts, tokens_BT, lengths_B, ids_BTK)
    top, _ = dist.top(4)
    assert torch.equal(found.logprobs[mask], dist.at_y())
    assert torch.equal(found.top_ids[mask], torch.cat([top, ids_BTK[mask]], 1))
    assert torch.equal(found.top_logprobs[mask], dist.at(found.top_ids[mask]))
    whole = remote(Wants(whole=True)).score(prompts, tokens_BT, lengths_B)
    assert torch.equal(whole.logits[mask], z_BTV[mask])


@pytest.mark.parametrize("spec", [SAMPLED, TOP, ASKED, WHOLE])
def test_training_is_bit_for_bit_the_same(tmp_path, models, server, spec):
    """Sampled, own top k, ids of both lists, whole distributions."""
    _, here = run(tmp_path, models, spec, models[1], "here")
    summary, there = run(tmp_path, models, spec, server.url, "there")
    assert numbers(here) == numbers(there) and len(here) == 3 and here[0]["grad_norm"] > 0
    assert summary.counts == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", [SAMPLED, "cr_opd", TOP, ASKED, "renormalised_topk", "rethinking_intersection", WHOLE]
)
def test_the_embedded_pair_learns_bit_for_bit_the_same(tmp_path, spec):
    from opdsl.serve.loading import load

    server = FaultyServer(load("embedded"))
    try:
        found = []
        for name, teachers in (("here", {}), ("there", {"": server.url})):
            settings = RunSettings(out=str(tmp_path / name), task="chain", steps=10,
                                   teachers=teachers, eval_prompts=10, report=False)  # fmt: skip
            train(opdsl.load(spec), settings)
            weights = (tmp_path / name / "student" / "model.safetensors").read_bytes()
            found.append((numbers(lines_of(tmp_path / name)), weights))
        assert found[0] == found[1]
    finally:
        server.close()


EPOCHS = """opd 1
method several "Top 4 of the student, scored anew in every epoch" {
  state     rollouts(student)
  teacher   T = external(access = score_ids)
  support   top(4, of = student, tail = renormalize)
  feedback  loss KL(student || T)
  aggregate mean(over = tokens)
  optimize  { epochs = 2 }
}
"""


def test_lists_follow_a_student_that_moves(tmp_path, models, server):
    """In the second epoch the student's top tokens are others, and are asked for again."""
    method = opdsl.compile(EPOCHS)
    _, here = run(tmp_path, models, method, models[1], "here")
    _, there = run(tmp_path, models, method, server.url, "there")
    assert numbers(here) == numbers(there)


def test_micro_batches_change_nothing(tmp_path, models, server):
    method = opdsl.load(ASKED)
    _, one = run(tmp_path, models, method, server.url, "one", micro_batch=None)
    _, two = run(tmp_path, models, method, server.url, "two", micro_batch=3)
    for a, b in zip(one, two):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_large_vocabularies_read_hidden_states_or_lists(tmp_path, models, server, monkeypatch):
    """The route without tensors of tokens × words, on both sides."""
    from opdsl.train import setup
    from opdsl.train.teachers import scorer as scoring

    monkeypatch.setattr(setup, "FUSED_FROM", 8)
    monkeypatch.setattr(scoring, "FUSED_FROM", 8)
    for spec in (TOP, ASKED, WHOLE):
        _, here = run(tmp_path, models, spec, models[1], f"here {spec}")
        _, there = run(tmp_path, models, spec, server.url, f"there {spec}")
        for a, b in zip(here, there):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6), spec


ROUTED = """opd 1
method two "A teacher for each subject" {
  state     rollouts(student)
  teacher   M = external(access = top(8)) when prompt.subject == "a"
  teacher   N = external(access = top(8)) when prompt.subject == "b"
  let       T = routed(M, N)
  support   top(8, of = T, tail = bin)
  feedback  loss KL(T || student)
  aggregate mean(over = tokens)
}
"""


def test_of_routed_teachers_each_is_asked_its_own_rows(tmp_path, models, server):
    """One in this process, one on the server; the server sees half of the rows."""
    method, rows = opdsl.compile(ROUTED), []
    real = server.jobs.work
    server.jobs.work = lambda r, w: rows.append(len(r)) or real(r, w)
    settings = {"student": models[0], "task": "chain", "steps": 2, "prompts": 6, "report": False,
                "export": False, "eval_prompts": 1}  # fmt: skip
    both = {"M": models[1], "N": models[1]}
    train(method, RunSettings(out=str(tmp_path / "a"), teachers=both, **settings))
    teachers = {"M": models[1], "N": server.url}
    train(method, RunSettings(out=str(tmp_path / "b"), teachers=teachers, **settings))
    assert rows[-2:] == [3, 3]
    for a, b in zip(lines_of(tmp_path / "a"), lines_of(tmp_path / "b")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


# ---- the start of a run ------------------------------------------------------------------------------


def test_nobody_there(tmp_path, models, server):
    server.kill()
    problem = refused(tmp_path, models, server.url, teacher_timeout=0.3)
    assert (problem.diagnostic.code, problem.exit_code) == ("OPD730", 3)
    assert "refused" in told(problem) and "opdsl serve MODEL --port" in told(problem)


def test_another_kind_of_server(tmp_path, models, scorer):
    other = vllm(scorer)
    problem = refused(tmp_path, models, other.url)
    assert problem.exit_code == 3 and "vllm+http" in told(problem)
    other.close()


def test_another_vocabulary(tmp_path, models):
    server = FaultyServer(scorer_of(tiny(tmp_path / "wide", 1, vocab=60)))
    problem = refused(tmp_path, models, server.url)
    assert (problem.diagnostic.code, problem.exit_code) == ("OPD403", 3)
    assert "60" in told(problem)
    server.close()


def test_another_model_than_asked_for(tmp_path, models, server):
    problem = refused(tmp_path, models, server.url + "#llama")
    assert problem.exit_code == 3 and "it serves tiny, not llama" in told(problem)


def test_a_key_that_is_missing_or_wrong(tmp_path, models, scorer, monkeypatch):
    server = FaultyServer(scorer, key="right")
    problem = refused(tmp_path, models, server.url)
    assert "OPDSL_TEACHER_KEY" in told(problem)
    problem = refused(tmp_path, models, server.url, teacher_key_env="NOT_SET")
    assert "NOT_SET" in told(problem)
    monkeypatch.setenv("MINE", "wrong")
    problem = refused(tmp_path, models, server.url, teacher_key_env="MINE")
    assert problem.diagnostic.code == "OPD730" and "wrong" not in told(problem)
    server.close()


def test_a_key_is_in_no_artefact(tmp_path, models, scorer, monkeypatch):
    canary = "k-4f1d9c77aa"
    server = FaultyServer(scorer, key=canary)
    monkeypatch.setenv("OPDSL_TEACHER_KEY", canary)
    server.script = [None, None, 500, "nan"]
    run(tmp_path, models, SAMPLED, server.url, "out", steps=2, report=True, export=True)
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(files) > 5
    assert not [p for p in files if canary.encode() in p.read_bytes()]
    server.close()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [("shift", "shifted"), ("nan", "NaN"), ("above zero", "above 0")],
)
def test_a_server_that_is_wrong_is_found_before_the_first_step(
    tmp_path, models, server, spoil, says
):
    server.always = spoil
    problem = refused(tmp_path, models, server.url)
    assert (problem.diagnostic.code, problem.exit_code) == ("OPD732", 3) and says in told(problem)


def test_the_oracle_finds_scores_shifted_without_lists(scorer, server):
    """A server that gives nothing but scores, all of them one position late."""
    from opdsl.train.teachers.oracle import examine

    link = linked(server)
    link.server.capabilities = type(link.server.capabilities)("sampled only")
    rows = [Row((1, 5, 9, 1, 5, 9), 3), Row((1, 8, 7, 1, 8, 7), 3)]
    examine(link, rows, Want())
    server.always = "shift"
    with pytest.raises(Fault, match="another last token"):
        examine(link, rows, Want())


def test_lost_weights_are_found(models, tmp_path, server):
    zeros = FaultyServer(scorer_of(models[1]))
    for p in zeros.scorer.model.parameters():
        p.data.zero_()
    problem = refused(tmp_path, models, zeros.url)
    assert "lost its weights" in told(problem) or "shifted" in told(problem)
    zeros.close()


# ---- refusals before anything is loaded --------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "teacher", "says"),
    [
        (WHOLE, "vllm+http://nowhere:1", "whole distribution"),
        (WHOLE, "sglang+http://nowhere:1", "whole distribution"),
        ("skd", "http://nowhere:1", "text of its own"),
    ],
)
def test_what_no_server_of_a_kind_can_give_is_refused_by_the_plan(
    tmp_path, models, spec, teacher, says
):
    from opdsl.train.plan import make_plan

    with pytest.raises(RunProblem) as caught:
        make_plan(opdsl.load(spec), RunSettings(task="chain", teachers={"": teacher}))
    problem = caught.value
    assert (problem.diagnostic.code, problem.exit_code) == ("OPD407", 2)
    assert says in problem.message and problem.diagnostic.primary.span.start > 0


@pytest.mark.parametrize(
    "address",
    ["http://user:secret@host:1", "ftp://host", "tgi+http://host", "http://", "http://host:99999"],
)
def test_bad_addresses(address):
    with pytest.raises(RunProblem) as caught:
        parse(address, "T")
    assert caught.value.diagnostic.code == "OPD402" and "secret" not in told(caught.value)


def test_what_a_method_asks_of_its_teachers():
    found = wants(opdsl.load(ASKED).spec)["T"]
    assert found.top and [who for who, _ in found.ids_from] == ["student"] and not found.whole
    assert wants(opdsl.load(SAMPLED).spec)["T"].ids_from == ()
    assert wants(opdsl.load(WHOLE).spec)["T"].whole
    assert wants(opdsl.load("skd").spec)["T"].writes
    assert {t: w.top for t, w in wants(opdsl.compile(ROUTED).spec).items()} == {"M": 8, "N": 8}
