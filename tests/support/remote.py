"""What the tests of remote teachers share: short runs on tiny models, links, batches."""

from __future__ import annotations

import json

import pytest
import torch

import opdsl
from opdsl.train.errors import RunProblem
from opdsl.train.loop import train
from opdsl.train.settings import RunSettings
from opdsl.train.teachers.capabilities import Wants
from opdsl.train.teachers.link import Link, open_link
from opdsl.train.teachers.sources import parse
from support.models import tiny
from support.servers import FaultyServer, scorer_of

SAMPLED, TOP, ASKED, WHOLE = "sampled_opd", "topk_match", "trl_union", "gkd_reverse"
V = 44


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return tiny(root / "student", 0), tiny(root / "teacher", 1)


@pytest.fixture(scope="module")
def scorer(models):
    return scorer_of(models[1])


@pytest.fixture
def server(scorer):
    server = FaultyServer(scorer)
    yield server
    server.close()


def linked(server, want: Wants | None = None, deadline: float = 5.0, kind: str = "") -> Link:
    source = parse(kind + server.url, "T")
    settings = RunSettings(teacher_timeout=deadline)
    link = open_link("T", source, want or Wants(), settings)
    link.vocabulary = V
    return link


class Prompted:
    def __init__(self, ids):
        self.ids, self.fields = ids, {}


def batch():
    prompts = [Prompted((1, 5, 9)), Prompted((1, 8)), Prompted((1, 2, 3, 4))]
    tokens_BT = torch.randint(3, V, (3, 5), generator=torch.Generator().manual_seed(3))
    return prompts, tokens_BT, torch.tensor([5, 3, 1])


def run(tmp_path, models, spec, teacher, name, steps=3, **more):
    """(summary, lines of metrics) of a short run on tiny models."""
    method = opdsl.load(spec) if isinstance(spec, str) else spec
    settings = {"prompts": 4, "eval_prompts": 1, "report": False, "export": False,
                "save_every": 10, "measure_every": 0} | more  # fmt: skip
    settings |= {"student": models[0], "task": "chain", "steps": steps, "out": str(tmp_path / name)}
    summary = train(method, RunSettings(teachers={"": teacher}, **settings))
    return summary, lines_of(tmp_path / name)


def lines_of(out):
    return [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]


def numbers(lines):
    return [(x.get("loss"), x.get("grad_norm"), x.get("reward")) for x in lines]


def refused(tmp_path, models, teacher, spec=SAMPLED, **more) -> RunProblem:
    with pytest.raises(RunProblem) as caught:
        run(tmp_path, models, spec, teacher, "refused", **more)
    assert not (tmp_path / "refused" / "metrics.jsonl").exists()
    return caught.value


def told(problem: RunProblem) -> str:
    d = problem.diagnostic
    return " ".join([d.message, *d.notes, *d.helps])
