"""What is measured beside the loss: right, named, cheap to leave out, and without effect."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest
import torch
from support import batches
from support.heard import Heard

import opdsl
from opdsl.emit.routed import add_routed
from opdsl.ir.derive import strip
from opdsl.ir.interpret import Evaluator, dense64
from opdsl.ir.program import expand_tails, lift_token
from opdsl.resources import methods
from opdsl.train import distributions, meters
from opdsl.train.instruments import Instruments
from opdsl.train.loop import train
from opdsl.train.metrics import read_lines
from opdsl.train.opd_metrics import CATALOGUE, find, merged, statistics, table
from opdsl.train.samples import pieces
from opdsl.train.settings import RunSettings
from opdsl.train.teachers import Scores

DOCUMENT = Path(__file__).parent.parent / "docs" / "watching.md"
SOME = ("cr_opd", "sampled_rtg", "verifier_hybrid", "reopold_a", "gae_opd", "routed_opd")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing `curves.png` takes longer than these runs."""
    monkeypatch.setattr("opdsl.train.plots.run_curves", lambda *a: None)


def settings(tmp_path, pair, **more):
    base = {"steps": 3, "prompts": 4, "eval_every": 100, "eval_prompts": 8, "export": True}
    return RunSettings(out=str(tmp_path / "out"), **(base | pair | more))


# ---- the method's own quantities -------------------------------------------------------------------


def forms(method, seed):
    """(name, parts of a batch, the same as logits) of one draw in each form."""
    teachers = tuple(t.name for t in method.spec.teachers if t.kind != "initial") or ("T",)
    critics = tuple(c.name for c in method.spec.critics)
    x = batches.draw(seed, B=6, T=5, V=13, teachers=teachers, critics=critics)
    plain = batches.logits(x)[0]
    yield "logits", [plain], plain
    yield "parts", plain.split(3), plain
    yield "hidden", [batches.hidden(x)[0]], batches.logits(batches.as_hidden(x))[0]
    served = batches.sparse(x, method.needs.teachers)[0]
    yield "lists", [served], served


def check_against_the_oracle(method):
    instruments, builder = Instruments(method), method.program.builder
    for form, parts, plain in forms(method, 1):
        found = instruments(parts)
        whole = add_routed(plain, method.spec.routed)
        oracle = Evaluator(whole, dense64(whole, "student"))
        for probe in instruments.probes:
            node = lift_token(builder, strip(builder, expand_tails(builder, probe.node)))
            want = oracle(node).detach().float().expand(whole.layout.n_rows)
            got = found[probe.what, probe.of]
            torch.testing.assert_close(
                got, want, rtol=1e-4, atol=1e-5, msg=f"{method.name} {form} {probe.what}"
            )


@pytest.mark.parametrize("name", SOME)
def test_probes_equal_the_oracle_in_every_form_of_a_batch(name):
    check_against_the_oracle(opdsl.load(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [p.stem for p in methods(failures=True)])
def test_probes_equal_the_oracle_for_every_method(name):
    check_against_the_oracle(opdsl.load(name))


def test_statistics_of_routing_support_and_bounds():
    values = {
        ("logp", ""): torch.tensor([-1.0, -2.0, -1.0, -3.0]),
        ("logp", "T"): torch.tensor([-2.0, -1.0, -31.0, -3.0]),
        ("rollout", ""): torch.tensor([-1.0, -2.0, -1.5, -3.0]),
        ("advantage", "main"): torch.tensor([-1.0, 1.0, -30.0, 0.0]),
        ("trigger", "main"): torch.tensor([1.0, 0.0, 1.0, 0.0]),
        ("routable", "main"): torch.tensor([1.0, 1.0, 0.0, 0.0]),
        ("candidates", "main"): torch.tensor([3.0, 9.0, 0.0, 9.0]),
        ("strength", "main"): torch.tensor([1.0, 7.0, 5.0, 7.0]),
        ("mass student", "main"): torch.tensor([0.9, 0.8, 0.7, 1.0]),
        ("mass T", "main"): torch.tensor([1.0, 1.0, 0.5, 1.0]),
        ("clipped strength", "main"): torch.tensor([0.0, 0.0, 1.0, 0.0]),
    }
    own = torch.tensor([True, True, False, True])
    found = statistics(values, own)
    want = {
        "logratio_mean": -7.5, "logratio_negative": 0.5, "kl_sampled": 0.0, "teacher_rejects": 0.25,
        "rollout_gap": 0.125, "advantage_mean": -7.5, "advantage_min": -30.0,
        "advantage_negative": 0.5, "routing_trigger": 0.5, "routing_routable": 0.5,
        "routing_candidates": 1.5, "routing_mass": 0.25, "support_student": 0.85,
        "support_tail": 0.15, "support_tail_max": 0.3, "support_teacher": 0.875,
        "clipped_strength": 0.25,
    }  # fmt: skip
    assert {k: found[k] for k in want} == pytest.approx(want, abs=1e-6)


def test_parts_of_a_batch_join_to_the_whole():
    torch.manual_seed(0)
    whole = {("advantage", "main"): torch.randn(100), ("trigger", "main"): torch.rand(100) < 0.3}
    cuts = [slice(0, 10), slice(10, 64), slice(64, 100)]
    parts = []
    for cut in cuts:
        part = {k: v[cut] for k, v in whole.items()}
        record = statistics(part, None)
        parts.append(record | {"tokens": len(part["advantage", "main"]), "loss": 0.25, "lr": 1e-3})
    joined = merged(parts)
    want = statistics(whole, None) | {"tokens": 100, "loss": 0.75, "lr": 1e-3}
    assert joined == pytest.approx(want)


# ---- distributions ---------------------------------------------------------------------------------


def test_divergences_are_those_of_their_definitions():
    torch.manual_seed(1)
    V = 40
    logp, logq = (torch.randn(7, V).log_softmax(-1) for _ in range(2))
    found = distributions.compare(logp, logq, eos=3)
    p, q = logp.double().exp(), logq.double().exp()
    ratio = p.log() - q.log()
    k = distributions.top_of(V)
    shared = [
        len(set(a.topk(k)[1].tolist()) & set(b.topk(k)[1].tolist())) / k for a, b in zip(p, q)
    ]
    want = {
        "kl_teacher": float((q * -ratio).sum(-1).mean()),
        "energy": float(((p * ratio**2).sum(-1) - (p * ratio).sum(-1) ** 2).mean()),
        "teacher_entropy": float(-(q * q.log()).sum(-1).mean()),
        "teacher_uniformity": float(-(q * q.log()).sum(-1).mean()) / math.log(V),
        "eos": float(p[:, 3].mean()),
        "teacher_eos": float(q[:, 3].mean()),
        "overlap": sum(shared) / len(shared),
    }
    assert {n: found[n] for n in want} == pytest.approx(want, rel=1e-5)
    same = distributions.compare(logp, logp, eos=None)
    assert same["overlap"] == 1.0 and same["kl_teacher"] == pytest.approx(0, abs=1e-7)
    assert same["energy"] == pytest.approx(0, abs=1e-7) and "eos" not in same


def test_a_word_that_one_side_excludes_makes_no_nan():
    logp = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    logq = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
    found = distributions.compare(logp, logq, eos=0)
    assert not any(math.isnan(x) for x in found.values())
    assert found["kl_teacher"] == math.inf  # the student cannot say what the teacher may


def test_lists_give_lower_bounds_and_the_exact_value_when_they_hold_every_word():
    from types import SimpleNamespace

    torch.manual_seed(2)
    B, T, V = 3, 4, 24
    z, logq = torch.randn(B, T, V), torch.randn(B, T, V).log_softmax(-1)
    rows = SimpleNamespace(
        mask=torch.ones(B, T, dtype=torch.bool), own=torch.ones(B, dtype=torch.bool)
    )
    forward = SimpleNamespace(vocabulary=V, logits=lambda x: x)
    logp = z.log_softmax(-1)
    exact = float((logp.exp() * (logp - logq)).sum(-1).mean())
    bounds = []
    for k in (4, 12, V):
        values, ids = logq.topk(k)
        again = torch.cat([ids, ids[..., :1], torch.full_like(ids[..., :1], -1)], -1)
        values = torch.cat(
            [values, values[..., :1], torch.full_like(values[..., :1], -torch.inf)], -1
        )
        scores = Scores(logprobs=logq[..., 0], top_ids=again, top_logprobs=values)
        bounds.append(distributions.compare_lists(forward, rows, z, scores)["kl_listed"])
    assert bounds[0] <= bounds[1] + 1e-6 <= exact + 2e-6
    assert bounds[2] == pytest.approx(exact, rel=1e-4)


# ---- in a run --------------------------------------------------------------------------------------


def run_all(tmp_path, pair, method, **more):
    train(method, settings(tmp_path, pair, **more))
    out = tmp_path / "out"
    return out, read_lines(out / "metrics.jsonl")


@pytest.mark.parametrize("fused", [False, True])
def test_measuring_changes_no_parameter(tmp_path, pair, fused, monkeypatch):
    if fused:
        monkeypatch.setattr("opdsl.train.setup.FUSED_FROM", 10)
    more = {"report": False}
    on, seen = run_all(tmp_path / "on", pair, opdsl.load("cr_opd"), measure_every=1, **more)
    off, bare = run_all(tmp_path / "off", pair, opdsl.load("cr_opd"), measure_every=0, **more)
    files = [out / "student" / "model.safetensors" for out in (on, off)]
    assert files[0].read_bytes() == files[1].read_bytes()
    for one, two in zip(seen, bare):
        assert {k: one[k] for k in two} == two  # and no figure either
        assert len(one) > len(two) + 20


def test_every_figure_is_in_the_catalogue_and_the_catalogue_in_the_document(tmp_path, pair):
    keys = set()
    for i, name in enumerate(("cr_opd", "gae_opd", "sampled_rtg")):
        _, lines = run_all(
            tmp_path / str(i), pair, opdsl.load(name), steps=1, measure_every=1, report=False
        )
        keys |= {k for line in lines for k in line}
    unknown = sorted(k for k in keys if find(k) is None)
    assert not unknown, f"no entry in opd_metrics.CATALOGUE: {unknown}"
    for wanted in ("kl", "kl_teacher", "overlap", "support_tail", "advantage_std", "eos",
                   "routing_routable", "routing_mass", "clipped_strength", "teacher_uniformity",
                   "truncated", "length_max", "critic_ev", "returned_mean"):  # fmt: skip
        assert wanted in keys or any(k.startswith(wanted + "/") for k in keys), wanted
    assert len({m.name for m in CATALOGUE}) == len(CATALOGUE)
    text = DOCUMENT.read_text(encoding="utf-8")
    made = re.sub(
        r"(<!-- generated[^\n]*\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}\n{table()}\n\n{m[2]}",
        text,
        flags=re.DOTALL,
    )
    if os.environ.get("OPDSL_UPDATE_GOLDEN"):
        DOCUMENT.write_text(made, encoding="utf-8")
        return
    assert made == text, "docs/watching.md: pytest tests/test_report_metrics.py --regenerate"


def test_figures_do_not_depend_on_the_split(tmp_path, pair):
    more = {"measure_every": 1, "steps": 1, "report": False}
    one = run_all(tmp_path / "a", pair, opdsl.load("cr_opd"), **more)[1]
    two = run_all(tmp_path / "b", pair, opdsl.load("cr_opd"), micro_batch=3, **more)[1]
    numbers = {k: v for k, v in one[0].items() if isinstance(v, (int, float))}
    assert {k: two[0][k] for k in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-5)


def test_tokens_are_recorded_and_a_resumed_run_writes_the_same(tmp_path, pair):
    more = {"eval_every": 2, "save_every": 2, "measure_every": 2}
    method = opdsl.load("cr_opd")
    whole, _ = run_all(tmp_path / "a", pair, method, steps=4, **more)
    first = settings(tmp_path / "b", pair, steps=2, **more)
    train(opdsl.load("cr_opd"), first)
    again = settings(tmp_path / "b", pair, steps=4, resume=True, **more)
    train(opdsl.load("cr_opd"), again)
    for name in ("metrics", "samples"):
        mine, other = (
            (root / f"{name}.jsonl").read_bytes() for root in (whole, tmp_path / "b" / "out")
        )
        assert mine == other, name
    records = read_lines(whole / "samples.jsonl")
    assert [r["step"] for r in records] == [1, 2, 4]
    for row in records[0]["rows"]:
        counts = {len(row["text"]), *(len(v) for v in row["values"].values())}
        assert len(counts) == 1
        ratio = [t - s for s, t in zip(row["values"]["log student"], row["values"]["log teacher"])]
        assert row["values"]["log-ratio"] == pytest.approx(ratio, abs=1e-2)
        assert row["values"]["advantage"] == pytest.approx(ratio, abs=1e-2)


def test_a_broken_instrument_is_told_once_and_stops_nothing(tmp_path, pair, monkeypatch):
    def broken(method):
        raise RuntimeError("no such instrument")

    monkeypatch.setattr(meters, "Instruments", broken)
    heard = Heard()
    summary = train(
        opdsl.load("cr_opd"), settings(tmp_path, pair, measure_every=1, report=False), heard
    )
    assert summary.steps == 3
    assert sum("no such instrument" in line for line in heard.lines) == 1


def test_pieces_of_a_text_show_every_token():
    class Words:
        eos = 9

        def response_text(self, ids):
            # 7 is half a character: it shows only with the 8 behind it
            text = "".join({1: "a", 2: " b", 8: "é"}.get(i, "") for i in ids)
            return text

    assert pieces([1, 2, 7, 8, 9], Words()) == ["a", " b", "⟨7⟩", "é", "⟨end⟩"]
