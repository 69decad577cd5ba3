"""A stated memory: rows at a time follow from it, and what is then allocated stays within it.

    pytest tests/test_budget.py -m "slow or not slow" -s

takes every shipped and two hundred generated specs through the measurement (ten minutes on one
core) and shows the closest. Measured is the most memory alive at once behind the tensors that
operations return, models, hidden states and inputs aside.
"""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from support import fused
from support.memory import Allocations
from support.models import tiny
from torch import Tensor

import opdsl
from opdsl.cli import cli
from opdsl.emit import budget
from opdsl.emit.batch import Batch
from opdsl.emit.budget import BudgetError, amount, parse_bytes
from opdsl.emit.footprint import Place, Shapes, peak, rows_within
from opdsl.emit.held import held
from opdsl.emit.kernels.head import row_chunks
from opdsl.emit.limit import place_of, plans_of, shapes_of
from opdsl.emit.plan import plans

V, H = 6000, 3
QUICK = [
    "sampled_opd.opd", "gkd.opd", "cr_opd.opd", "topk_match.opd", "verifier_hybrid.opd",
    "minillm.opd", "divergences/akl.opd", "supports/revisiting_append.opd", 69, 118, 158, 198,
]  # fmt: skip
REST = [x for x in [*fused.SHIPPED, *range(fused.GENERATED)] if x not in QUICK]
EVERY = [*QUICK, *(pytest.param(x, marks=pytest.mark.slow) for x in REST)]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four to 64 rows at a time, in strips of 12 or 30."""
    monkeypatch.setitem(budget.CHUNK_RANGE, "cpu", (4, 64))
    monkeypatch.setitem(budget.STRIP_BYTES, "dense", 4 * V * 12)
    monkeypatch.setitem(budget.STRIP_BYTES, "listed", 4 * V * 30)


def given_to(batch: Batch) -> list[Tensor]:
    """Hidden states and heads of every model, reference texts included."""
    found = [batch.tokens_N]
    for part in (batch, batch.golden):
        for d in {} if part is None else part.dists.values():
            found += [d.hidden_NH, d.head.weight]
    return found


def predicted(method: opdsl.Method, batch: Batch, n: int) -> int:
    """Bytes of the largest part with n rows at a time."""
    made = plans_of(method.loss)
    found = []
    for plan in made:
        staged = next(s for s in method.loss.emitted.staged if s.rows == plan.rows)
        rows = method.loss._rows_of(batch, staged)
        if rows is not None and rows.layout.n_rows:
            found.append(peak([plan], shapes_of(plan, staged, rows, made), place_of(rows), n))
    return max(found)


@pytest.mark.parametrize("which", EVERY)
def test_what_is_allocated_stays_within_the_memory(which: int | str, small_tiles: None) -> None:
    """The least that works, a third of what it may use, and all of it: value and gradient."""
    method = fused.method_of(which)
    x = fused.inputs(which, B=12, T=14, V=V, H=H, golden_rows=6)
    batch, _ = fused.batch_of(x)
    least, most = predicted(method, batch, 4), predicted(method, batch, 64)
    values = []
    for memory in (least, least + (most - least) // 3, most):
        batch, leaves = fused.batch_of(x, memory=memory)
        method.loss.scratch.buffers.clear()
        with Allocations([*leaves, *given_to(batch)]) as seen:
            loss = method.loss(batch).loss
            if loss.requires_grad:
                loss.backward()
        values.append(float(loss.detach()))
        assert seen.peak <= memory, f"{seen.peak / memory:.3f} of the memory"
    method.loss.scratch.buffers.clear()
    assert values == pytest.approx([values[0]] * 3, rel=1e-4, abs=1e-6)


def test_more_memory_is_used(small_tiles: None) -> None:
    method = fused.method_of("gkd.opd")
    x = fused.inputs("gkd.opd", B=12, T=14, V=V, H=H)
    batch, _ = fused.batch_of(x)
    least, most = predicted(method, batch, 4), predicted(method, batch, 64)
    peaks = []
    for memory in (least, (least + most) // 2, most):
        method.loss.scratch.buffers.clear()
        batch, leaves = fused.batch_of(x, memory=memory)
        with Allocations([*leaves, *given_to(batch)]) as seen:
            method.loss(batch).loss.backward()
        peaks.append(seen.peak / memory)
    assert min(peaks) > 0.7, peaks


def test_too_little_names_the_least_that_works(small_tiles: None) -> None:
    method = fused.method_of("gkd.opd")
    x = fused.inputs("gkd.opd", B=12, T=14, V=V, H=H)
    with pytest.raises(BudgetError, match="the least that works is ") as told:
        method.loss(fused.batch_of(x, memory=1000)[0])
    least = parse_bytes(str(told.value).rsplit(" is ", 1)[1])
    assert method.loss(fused.batch_of(x, memory=least)[0]).loss.requires_grad


def test_parts_and_reference_texts_keep_the_memory() -> None:
    batch, _ = fused.batch_of(fused.inputs("gkd.opd"), memory=1 << 30)
    assert batch.golden is not None and batch.golden.memory == 1 << 30
    assert {p.memory for p in batch.split(3)} == {1 << 30}


def test_the_first_chunk_is_one_of_the_largest() -> None:
    cpu = torch.device("cpu")
    for rows, chunk in ((0, 4), (1, 4), (7, 3), (23, 12), (120, 64)):
        found = row_chunks(rows, 10, cpu, chunk)
        sizes = [b - a for a, b in found]
        assert sum(sizes) == rows and all(0 < n <= chunk for n in sizes)
        assert not sizes or (sizes[0] == max(sizes) and max(sizes) - min(sizes) <= 1)


def test_amounts() -> None:
    assert parse_bytes("2GiB") == 2 << 30 and parse_bytes("1.5 GB") == 1_500_000_000
    assert parse_bytes("800mib") == 800 << 20 and parse_bytes("4096") == 4096
    for size in (1, 5 << 20, (3 << 29) + 1, 11 << 30):
        assert parse_bytes(amount(size)) >= size
    for text in ("", "lots", "2 XB", "-1GiB", "0"):
        with pytest.raises(ValueError, match="no amount of memory"):
            parse_bytes(text)


# ---- memory of a pass, read off its text -----------------------------------------------------------


def test_tiles_of_a_text() -> None:
    text = (
        "def f(d, r, like, w):\n    z1 = d['T'].z\n    w1 = w(1)\n    e1 = d['T'].measure(w1)\n"
        "    v1 = torch.exp(z1)\n    v2 = v1 > 0.0\n    x1 = ratio(v1, z1).sum(1)\n    return x1, w1, {}"
    )
    found = held(text)
    assert found.scratch == 1 and found.peak == 1 + 0.25 + 1 + 1.25 + 1 - 1
    sets = "def f(d, r, like):\n    s1 = d['T'].top(5)\n    s2 = union(s1, (y[:, None], z))\n    x1 = d['student'].at(s2[0])\n    return x1"
    assert held(sets).asked == 6


def test_rows_follow_memory_and_device() -> None:
    made = plans(opdsl.load("gkd").compilation.emitted)
    at = Shapes(8192, 4096, 151_936, bytes=2)
    rows = [rows_within(made, at, Place("cuda"), x << 30) for x in (6, 8, 16, 80)]
    assert rows == sorted(rows) and rows[0] >= 256 and rows[-1] == 4096
    for n, x in zip(rows, (6, 8, 16, 80)):
        assert peak(made, at, Place("cuda"), n) <= x << 30
    frozen = Shapes(8192, 4096, 151_936, bytes=2, frozen_head=True)
    assert rows_within(made, frozen, Place("cuda"), 6 << 30) > rows[0]


# ---- commands --------------------------------------------------------------------------------------


def run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(cli, [str(w) for w in words])
    assert done.exit_code == code, done.output
    return " ".join(done.output.split()) if code else done.output


def test_explain_takes_a_memory() -> None:
    words = ("explain", "gkd", "--cost", "--device", "h200", "--shape", "8192,4096,151936")
    shown = run(*words, "--memory", "6GiB")
    assert "of the 6 GiB stated" in shown
    found = json.loads(run(*words, "--memory", "6GiB", "--format", "json"))
    assert found["memory"] == 6 << 30 and found["parts"][0]["bytes"] <= 6 << 30
    told = run(*words, "--memory", "1GiB", code=2)
    least = told.rsplit("the least that works is ", 1)[1].strip()
    run(*words, "--memory", least.replace(" ", ""))
    assert "goes with --cost" in run("explain", "gkd", "--memory", "1GiB", code=2)
    assert "no amount" in run(*words, "--memory", "lots", code=2)


RUN = """opd 1
import "./gkd.opd" (gkd)
run small of gkd {{
  student = "{0}"
  teacher = "{0}"
  task = "chain"
  memory = "{1}"
}}
"""


def test_a_dry_run_says_what_the_loss_costs(tmp_path, monkeypatch) -> None:
    """The real shapes: rows of a micro-batch, hidden and vocabulary of the configurations."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("opdsl.train.setup.FUSED_FROM", 10)
    model = tiny(tmp_path / "model", 0)
    words = ("run", "gkd", "--student", model, "--teacher", model, "--task", "chain", "--dry-run",
             "--prompts", 4, "--micro-batch", 8, "--device", "cpu")  # fmt: skip
    shown = run(*words)
    assert "hidden 16, vocabulary 44" in shown and "D1: 3 U, U of T" in shown
    assert "tokens at a time" in shown and "for loss and gradient" in shown
    found = json.loads(run(*words, "--json"))["cost"]
    (part,) = found["parts"]
    assert found["shape"][0] % 8 == 0 and part["units"] == 3 and part["bytes"] > 0
    adapted = json.loads(run(*words, "--set", "optimize.adapter=lora(rank = 2)", "--json"))["cost"]
    assert adapted["frozen_head"] and adapted["parts"][0]["units"] == 2
    assert "of the 1 MiB stated" in run(*words, "--memory", "1MiB")
    told = run(*words, "--memory", "9KiB", code=2)
    assert "the least that works" in told and "Traceback" not in told
    assert "no amount" in run(*words, "--memory", "much", code=2)
    spec = tmp_path / "small.opd"
    spec.write_text(RUN.format(model, "1MiB"))
    assert "of the 1 MiB stated" in run("run", spec, "--run", "small", "--dry-run")


def test_a_run_trains_within_a_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("opdsl.train.setup.FUSED_FROM", 10)
    model = tiny(tmp_path / "model", 0)
    words = ("run", "gkd", "--student", model, "--teacher", model, "--task", "chain",
             "--prompts", 4, "--steps", 1, "--out")  # fmt: skip
    run(*words, tmp_path / "out", "--memory", "1MiB")
    told = run(*words, tmp_path / "none", "--memory", "9KiB", code=2)
    assert "the least that works" in told and not (tmp_path / "none" / "student").exists()
