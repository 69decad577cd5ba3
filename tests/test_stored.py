"""Scores on disk, and teachers whose weights lie in main memory between steps."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from support.models import tiny
from support.servers import FaultyServer, scorer_of
from test_run_cli import text_model, write_rows

import opdsl
from opdsl.cli import cli
from opdsl.train.errors import RunProblem
from opdsl.train.loop import train
from opdsl.train.settings import RunSettings
from opdsl.train.teachers.offload import Shelf
from opdsl.train.teachers.stored import StoredTeacher, Writer, read_manifest
from opdsl.train.teachers.wire import Row, RowScores, Want

TEXT = """opd 1
method offline "The teacher's top 8 on texts of the data" {{
  state     {state}
  teacher   T = external(access = top(8))
  support   top(8, of = T, tail = bin)
  feedback  loss KL(T || student)
  aggregate mean(over = tokens)
}}
"""


@pytest.fixture(scope="module")
def method():
    return opdsl.compile(TEXT.format(state="sequences(data)"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return tiny(root / "student", 0), tiny(root / "teacher", 1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    return text_model(root / "s", 0, rows=72), text_model(root / "t", 1, rows=80)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{"prompt": f"w{i} w{i + 1}", "response": f"w{i + 2} 42 w{i}"} for i in range(30)]
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    path = tmp_path_factory.mktemp("spec") / "offline.opd"
    path.write_text(TEXT.format(state="sequences(data)"))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, spec, texts, data):
    """Scores of the whole data set, written by the command."""
    out = tmp_path_factory.mktemp("scores") / "scores"
    words = ("--teacher", texts[1], "--data", data, "--out", out, "--max-tokens", 8)
    result = score(spec, *words)
    assert result.exit_code == 0, result.output
    assert "30 texts" in result.output and "top 8" in result.output
    return out


def score(spec, *words):
    result = CliRunner().invoke(cli, ["score", *(str(w) for w in (spec, *words))])
    assert "Traceback" not in result.output
    return result


def lines(method, out, **settings):
    more = {"report": False, "export": False, "eval_prompts": 1, "measure_every": 0} | settings
    train(method, RunSettings(out=str(out), **more))
    found = (out / "metrics.jsonl").read_text().splitlines()
    return [(x["loss"], x["grad_norm"]) for x in map(json.loads, found)]


# ---- stored scores ---------------------------------------------------------------------------------


def test_a_run_on_stored_scores_is_that_with_the_teacher(tmp_path, method, texts, data, folder):
    """Two epochs in another order than the scores were written in: the same bits, no teacher."""
    settings = {"student": texts[0], "data": str(data), "steps": 8, "prompts": 8, "max_tokens": 8}
    here = lines(method, tmp_path / "here", teachers={"T": texts[1]}, **settings)
    there = lines(method, tmp_path / "there", teachers={"T": str(folder)}, **settings)
    assert len(here) == 8 and here[0][1] > 0
    for a, b in zip(here, there):
        assert a == pytest.approx(b, rel=1e-5)


def test_scores_of_an_embedded_task(tmp_path, method, models):
    out = tmp_path / "scores"
    from opdsl.train.progress import Silent
    from opdsl.train.teachers.record import record

    settings = {"task": "chain", "student": models[0], "steps": 2, "prompts": 4}
    given = RunSettings(teachers={"T": models[1]}, **settings)
    assert record(method, given, out, None, Silent())["rows"] == 8
    here = lines(method, tmp_path / "here", teachers={"T": models[1]}, **settings)
    there = lines(method, tmp_path / "there", teachers={"T": str(out)}, **settings)
    assert here == there  # one pass over the same rows: the same bits
    with pytest.raises(RunProblem, match=r"OPD733.*no scores of a row"):
        lines(method, tmp_path / "more", teachers={"T": str(out)}, **settings | {"steps": 3})


def test_scores_can_come_from_a_server(tmp_path, spec, texts, data, folder):
    server = FaultyServer(scorer_of(texts[1]))
    out = tmp_path / "scores"
    words = ("--teacher", server.url, "--student", texts[0], "--data", data, "--max-tokens", 8)
    result = score(spec, *words, "--out", out)
    server.close()
    assert result.exit_code == 0, result.output
    theirs, ours = (read_manifest("T", str(f)) for f in (folder, out))
    assert theirs["weights"] == ours["weights"] and theirs["data"] == ours["data"]
    assert theirs["vocabulary"] == ours["vocabulary"] == 67


def refused(method, out, teacher, student, data, **more) -> RunProblem:
    with pytest.raises(RunProblem) as caught:
        lines(method, out, teachers={"T": str(teacher)}, student=student, data=str(data),
              steps=1, prompts=8, max_tokens=8, **more)  # fmt: skip
    return caught.value


def test_other_data_are_refused_by_name(tmp_path, method, texts, folder):
    rows = [{"prompt": f"w{i}", "response": "w1 w2"} for i in range(20)]
    other = write_rows(tmp_path / "other.jsonl", rows)
    problem = refused(method, tmp_path / "o", folder, texts[0], other)
    assert problem.diagnostic.code == "OPD733" and "other.jsonl" in problem.message


def test_another_tokenizer_is_refused_by_name(tmp_path, method, data, folder):
    words = [f"v{i}" for i in range(63)]
    student = text_model(tmp_path / "s", 0, rows=72, words=words)
    problem = refused(method, tmp_path / "o", folder, student, data)
    assert problem.diagnostic.code == "OPD733" and "different tokenizers" in problem.message


def test_damaged_files_are_refused_by_name(tmp_path, method, texts, data, folder):
    def spoiled(how) -> str:
        copy = tmp_path / f"c{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, copy)
        how(copy)
        problem = refused(method, tmp_path / "o", copy, texts[0], data)
        assert problem.diagnostic.code == "OPD733" and problem.exit_code == 1
        return problem.message

    def flip(copy):
        path = copy / "scores-00001.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    assert "scores-00001.safetensors is damaged" in spoiled(flip)
    assert "no such file" in spoiled(lambda c: (c / "scores-00001.safetensors").unlink())
    assert "scores.json is damaged" in spoiled(lambda c: (c / "scores.json").write_text("{"))
    text = (folder / "scores.json").read_text().replace("opdsl scores 1", "opdsl scores 9")
    assert "opdsl scores 9" in spoiled(lambda c: (c / "scores.json").write_text(text))


def test_only_known_texts_can_be_scored(tmp_path, texts, data, folder):
    for state in ("rollouts(student)", "mix(0.5: rollouts(student), 0.5: sequences(data))"):
        method = opdsl.compile(TEXT.format(state=state))
        problem = refused(method, tmp_path / "o", folder, texts[0], data)
        assert problem.diagnostic.code == "OPD407" and problem.exit_code == 2
        assert "not written yet" in problem.message and problem.diagnostic.primary.span.start > 0


def test_more_entries_than_were_stored_are_refused(tmp_path, texts, data, folder):
    method = opdsl.compile(TEXT.format(state="sequences(data)").replace("(8", "(16"))
    problem = refused(method, tmp_path / "o", folder, texts[0], data)
    assert problem.diagnostic.code == "OPD407" and "top 8" in " ".join(problem.diagnostic.notes)


def test_what_cannot_be_stored(tmp_path, texts, data):
    spec = tmp_path / "s.opd"
    spec.write_text(
        TEXT.format(state="sequences(data)").replace("top(8, of = T, tail = bin)", "full")
        .replace("top(8)", "logits")
    )  # fmt: skip
    result = score(spec, "--teacher", texts[1], "--data", data, "--out", tmp_path / "o")
    assert result.exit_code == 2 and "whole distribution" in " ".join(result.output.split())
    assert not (tmp_path / "o").exists()


def test_a_folder_is_not_written_twice(spec, texts, data, folder):
    result = score(spec, "--teacher", texts[1], "--data", data, "--out", folder)
    assert result.exit_code == 3 and "holds scores already" in result.output


def test_shards_are_read_as_one(tmp_path):
    rows = [Row(tuple(range(1, n + 3)), 2) for n in (3, 1, 4, 2, 5)]
    writer = Writer(tmp_path, {"top": 2, "vocabulary": 44, "teacher": "t"}, shard_bytes=100)
    for n, row in enumerate(rows):
        T = row.response
        writer.add(row, RowScores(torch.full((T,), -float(n)), torch.full((T, 2), n),
                                  torch.full((T, 2), -float(n))))  # fmt: skip
        writer.add(row, RowScores(torch.zeros(T)))  # seen before: not written again
    manifest = writer.close()
    assert manifest["rows"] == 5 and len(manifest["shards"]) > 2
    teacher = StoredTeacher("T", str(tmp_path), manifest, lambda p: p, torch.device("cpu"), 2)
    tokens = torch.zeros(5, 5, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : row.response] = torch.tensor(row.tokens[2:])
    lengths = torch.tensor([r.response for r in rows])
    found = teacher.score([r.tokens[:2] for r in rows], tokens, lengths)
    for i, row in enumerate(rows):
        assert found.logprobs[i, : row.response].unique().tolist() == [-float(i)]
        assert found.top_ids[i, : row.response].unique().tolist() == [i]


# ---- weights in main memory ----------------------------------------------------------------------------


def test_a_model_visits_the_device_and_leaves_again():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5))
    model[1].weight = model[0].weight  # tied: moved once
    before = {n: p.clone() for n, p in model.named_parameters()}
    home = {n: p.data_ptr() for n, p in model.named_parameters()}
    shelf = Shelf(model, "cpu")
    assert len(shelf.parts) == 2

    def moved() -> bool:
        places = {n: p.data_ptr() for n, p in model.named_parameters()}
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert len({places[n] == home[n] for n in home}) == 1
        return places != home

    assert not moved()
    with shelf:
        assert moved() and model[1].weight is model[0].weight
        with shelf:
            pass
        assert moved()  # the outer user is still there
    assert not moved() and shelf.moves == 1


def test_offloading_changes_no_number(tmp_path, models, monkeypatch):
    shelves = []
    monkeypatch.setattr(
        "opdsl.train.teachers.make.Shelf", lambda *a: shelves.append(Shelf(*a)) or shelves[-1]
    )
    method = opdsl.load("topk_match")
    settings = {"student": models[0], "task": "chain", "steps": 2, "prompts": 2,
                "teachers": {"T": models[1]}}  # fmt: skip
    plain = lines(method, tmp_path / "plain", **settings)
    assert plain == lines(method, tmp_path / "off", offload_teacher=True, **settings)
    (shelf,) = shelves
    assert shelf.moves >= 2


@pytest.mark.gpu
def test_offloading_frees_the_device():
    model = torch.nn.Linear(4096, 4096).requires_grad_(False)
    x = torch.randn(2, 4096, device="cuda")
    shelf = Shelf(model, "cuda")
    free = torch.cuda.memory_allocated()
    with shelf:
        y = model(x)
        assert torch.cuda.memory_allocated() >= free + model.weight.nbytes
    del y
    assert torch.cuda.memory_allocated() <= free + 1024
    assert model.weight.is_pinned()


def test_scorers_take_what_wants_ask(models):
    """`Want` and `RowScores` have the fields the protocol names, in its order."""
    (one,) = scorer_of(models[1]).score([Row((1, 2, 3), 1)], Want(top=2, entropy=True))
    assert {k for k, v in vars(one).items() if v is not None} == {
        "sampled", "top_ids", "top_logprobs", "entropy"
    }  # fmt: skip
