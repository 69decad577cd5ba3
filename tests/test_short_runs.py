"""Every shipped method trains: five steps on the embedded task it is tried on, all numbers finite.

A few methods that together use everything a method can use run in every session, the others with
`pytest -m slow`.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import opdsl
from opdsl.resources import methods
from opdsl.train.bindings import START, stand_ins

NAMES = [path.stem for path in methods()]


def five_steps(name: str, folder: Path) -> list[dict]:
    """Records of five steps on the embedded task, everything bound as `opdsl run` binds it."""
    from opdsl.train.loop import train
    from opdsl.train.metrics import read_lines
    from opdsl.train.settings import RunSettings

    settings = RunSettings(
        out=str(folder), steps=5, prompts=4, eval_prompts=8, eval_every=100, report=False,
        save_every=100,
    )  # fmt: skip
    summary_ = train(opdsl.load(name), settings)
    assert summary_.steps == 5
    return read_lines(folder / "metrics.jsonl")


def check_run(name: str, folder: Path) -> None:
    """Every number is finite, and the method moves the student by more than nothing."""
    from safetensors.torch import load_file

    records = five_steps(name, folder)
    steps = [r for r in records if r["step"] >= 1]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    wrong = [(r["step"], k) for r in records for k, v in r.items()
             if isinstance(v, float) and not math.isfinite(v)]  # fmt: skip
    assert wrong == []
    assert any(r.get("grad_norm", 0.0) > 0.0 for r in steps), "no step had a gradient"
    for tensor in load_file(folder / "student" / "model.safetensors").values():
        assert tensor.isfinite().all()


# feature -> whether a method has it; the runs of every test session cover them all
FEATURES = {
    "a critic": lambda m: bool(m.needs.values),
    "a context": lambda m: any(t.context for t in m.spec.teachers),
    "several contexts": lambda m: len({t.context for t in m.spec.teachers if t.context}) > 1,
    "an average of the student": lambda m: any(t.kind == "ema" for t in m.spec.teachers),
    "the student as teacher": lambda m: any(t.kind == "self" for t in m.spec.teachers),
    "the start": lambda m: m.needs.initial,
    "given text beside rollouts": lambda m: m.needs.golden,
    "given text": lambda m: any(s.policy == "data" for s in m.spec.states),
    "a teacher's text": lambda m: any(s.policy == "T" for s in m.spec.states),
    "a blend of policies": lambda m: any(s.policy == "blend" for s in m.spec.states),
    "drafts under a judge": lambda m: any(s.policy == "interleaved" for s in m.spec.states),
    "stale rollouts": lambda m: any(s.policy == "old" for s in m.spec.states),
    "a mix of states": lambda m: len(m.spec.states) > 1,
    "outcomes": lambda m: m.needs.outcome,
    "groups": lambda m: m.needs.group,
    "teachers by field": lambda m: bool(m.spec.routed),
    "a field in a gate": lambda m: bool(m.needs.prompt_fields) and not m.spec.routed,
    "teachers to compare": lambda m: START in stand_ins(m.spec, {}).values(),
    "scores of sampled tokens": lambda m: "sampled" in m.needs.teachers.values(),
    "a top list": lambda m: any(v.startswith("top") for v in m.needs.teachers.values()),
    "special tokens": lambda m: m.needs.special,
    "statistics of the batch": lambda m: m.needs.coupled,
    "several terms": lambda m: len(m.spec.feedback_terms) > 1,
    "frozen scores of candidates": lambda m: any(
        t.route == "scores" for t in m.spec.feedback_terms
    ),
}
CHOSEN = (
    "gae_opd", "cepo", "sdpo", "minillm_paper", "skd", "async_opd", "verifier_hybrid",
    "tilted_target", "grpo", "gkd", "f_distill_js", "topk_match", "cr_opd", "direct_opd",
)  # fmt: skip


def test_the_chosen_runs_cover_every_feature():
    chosen = [opdsl.load(name) for name in CHOSEN]
    bare = [feature for feature, has in FEATURES.items() if not any(map(has, chosen))]
    assert bare == []


@pytest.mark.parametrize("name", CHOSEN)
def test_five_steps(name, tmp_path):
    check_run(name, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in CHOSEN])
def test_five_steps_of_every_method(name, tmp_path):
    check_run(name, tmp_path / "run")


def test_stand_ins_of_an_embedded_run():
    method = opdsl.load("tilted_target")
    assert stand_ins(method.spec, {}) == {"T": "embedded", "plus": "embedded", "minus": START}
    assert START not in stand_ins(method.spec, {"minus": "a/b"}).values()
    assert START not in stand_ins(opdsl.load("routed_opd").spec, {}).values()
    assert START not in stand_ins(opdsl.load("gkd").spec, {}).values()


def test_hints_and_fields_of_an_embedded_run():
    from opdsl.train.bindings import TaskData, invented_fields, notes, templates
    from opdsl.train.embedded import get_task

    task = get_task("hinted")
    spec = opdsl.load("cepo").spec
    data = TaskData(task, 0, None, templates(spec))
    prompt = data.prompts(0, 1)[0]
    shown = [data.context_ids(prompt, t) for t in (None, *templates(spec))]
    assert shown[0] == prompt.ids and len(set(shown)) == 3
    assert shown[1] == prompt.hinted and shown[1][-2] != shown[2][-2]
    assert [note.split(" is ")[1].split(",")[0] for note in notes(spec, "hinted", {})] == [
        "the answer",
        "a wrong answer",
    ]
    there = tuple(prompt.fields)
    assert invented_fields(opdsl.load("sdpo"), there) == {"reprompted": ("yes", "other")}
    assert invented_fields(opdsl.load("routed_opd"), there) == {}
    assert invented_fields(opdsl.load("routed_opd"), ()) == {"domain": ("math", "code")}
