"""Plans and costs: the class a method is given, and what its passes are then seen to do.

A dispatch mode watches every tensor operation of a loss: products with the head are counted against
the plan's U, and no tensor with an entry per word may be larger than a tile.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from support import batches
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import opdsl
from opdsl.cli import cli
from opdsl.emit.batch import Batch
from opdsl.emit.cost import Shapes, cost, machine
from opdsl.emit.kernels import head
from opdsl.emit.kernels.linear_restricted import linear_restricted
from opdsl.emit.plan import describe, plans
from opdsl.resources import methods, specs

SHIPPED = sorted(str(p.relative_to(specs())) for p in methods())
TEXT = """opd 1
method probe {{
  state     rollouts(student, group = 2)
  teacher   T = external(access = logits)
  {body}
  aggregate mean(over = tokens)
}}
"""
CLASSES = {
    "support top(4, of = T, tail = renormalize) feedback loss KL(T || student)": "S0",
    "support sampled feedback reward logratio(T, rollout) credit immediate": "S1",
    "support top(4, of = T, tail = bin) feedback loss KL(student || T)": "S1",
    "support full feedback loss 0 - entropy(student)": "S1e",
    "support full feedback loss KL(T || student)": "D1",
    "support sampled feedback reward logratio(T, student) credit return_to_go": "S1, coupled",
    "support sampled feedback reward logratio(T, rollout) credit return_to_go":
        "S1, coupled, cheap",
    "support full feedback loss KL(T || student) gate early(3)":
        "D1, gated before the pass",
    "support sampled feedback reward logratio(T, student) credit immediate "
    "gate logratio(T, student) > 0": "S1, gated before the products backward",
}  # fmt: skip


@pytest.mark.parametrize("body", CLASSES, ids=lambda b: CLASSES[b])
def test_classes(body: str) -> None:
    m = opdsl.compile(TEXT.format(body=body), set=None)
    (plan,) = plans(m.compilation.emitted)
    assert plan.label == CLASSES[body]


HYBRID = """opd 1
method probe {
  state     rollouts(student, group = 2)
  teacher   T = external(access = logits)
  teacher   S = external(access = sampled)
  term dense { support full    feedback loss KL(student || T)  gate H(student) > 0.5 nats }
  term score { support sampled feedback reward logratio(%s) credit return_to_go }
  aggregate mean(over = tokens)
}
"""


@pytest.mark.parametrize(
    ("ratio", "label", "units", "others"),
    [
        ("S, rollout", "D1, coupled, cheap", 3.0, ["S", "T"]),
        ("S, student", "D1, coupled", 4.0, ["S", "T"]),
    ],
)
def test_an_earlier_pass_computes_what_couples_rows(
    ratio: str, label: str, units: float, others: list[str]
) -> None:
    """The dense term's value and gate wait for the last pass, whose logits they need anyway."""
    (plan,) = plans(opdsl.compile(HYBRID % ratio).compilation.emitted)
    assert (plan.label, plan.units(), sorted(plan.others)) == (label, units, others)


# ---- what the passes are seen to do --------------------------------------------------------------

N, H, V, ROWS = 48, 5, 397, 8


class Watch(TorchDispatchMode):
    """Counts products between [n, H] and [V, H], and the largest result with an entry per word."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.widest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if name.startswith(("aten::mm", "aten::addmm")):
            tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
            sizes = {s for x in tensors for s in x.shape}
            if V in sizes:
                self.products[name] += 1
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.shape and x.shape[-1] == V:
                self.widest = max(self.widest, x.numel())
        return out


def inputs_for(method: opdsl.Method, spread: float = 1.0) -> batches.Inputs:
    return batches.draw(
        7, B=6, T=N // 6, V=V, teachers=tuple(t.name for t in method.spec.teachers if t.kind != "initial")
        or ("T",), critics=tuple(c.name for c in method.spec.critics), spread=spread,
    )  # fmt: skip


def all_hidden(x: batches.Inputs) -> tuple[Batch, int]:
    """A batch of hidden states for every model, and the number of its rows."""
    x = batches.as_hidden(x)
    batch, _ = batches.hidden(x, torch.float32)
    return batch, int(batch.layout.n_rows)


@pytest.mark.parametrize("name", SHIPPED)
def test_tiles_bound_what_is_allocated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor with an entry per word is larger than a tile or the logits that were handed in."""
    monkeypatch.setitem(head.CHUNK_RANGE, "cpu", (ROWS, ROWS))
    method = opdsl.load(specs() / name)
    batch, rows = all_hidden(inputs_for(method))
    with Watch() as seen:
        method.loss(batch).loss.backward()
    for plan in plans(method.compilation.emitted):
        if plan.rows != "main":
            return  # reference texts have their own number of rows
    given = {d.logits_NV.numel() for d in batch.dists.values() if hasattr(d, "logits_NV")}
    assert rows > 2 * ROWS
    assert seen.widest <= ROWS * V or seen.widest in given, (seen.widest, ROWS * V)


@pytest.mark.parametrize("name", ["gkd_reverse", "gkd", "sampled_opd", "cr_opd", "gae_opd",
                                  "sampled_rtg", "topk_match", "minillm"])  # fmt: skip
def test_units_are_counted_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk: as many products with a head as the plan says, the teacher's own included."""
    monkeypatch.setitem(head.CHUNK_RANGE, "cpu", (4096, 4096))
    method = opdsl.load(name)
    batch, _ = all_hidden(inputs_for(method))
    (plan,) = plans(method.compilation.emitted)
    context = None
    with Watch() as seen:
        (context,) = method.loss.prepare([batch])
        method.loss(batch, context).loss.backward()
    hidden = {k for k, d in batch.dists.items() if hasattr(d, "hidden_NH")}
    teachers = sum(n in hidden or "T" in hidden for n in plan.others)
    assert seen.products.total() == plan.units() + teachers, (describe(plan), seen.products)


RETURNS = """opd 1
def whitened(r : nats per token) : nats per token "Whitened return to go"
{ G[t] = r[t] + G[t + 1]
  return (G - mean(G)) / (std(G) + 0.0001) }
method probe {
  state rollouts(student, group = 2)  teacher T = external(access = sampled)
  support sampled  feedback reward logratio(T, student)  credit whitened
  aggregate mean(over = tokens)
}
"""


@pytest.mark.parametrize("name", [RETURNS, "gae_residual", "reopold_a", "oppo"],
                         ids=lambda n: n.split()[0])  # fmt: skip
def test_coupled_credit_before_a_frozen_head(name: str) -> None:
    """Two products instead of four, split or whole; the gradient is that of a trained head."""
    method = opdsl.compile(name) if "\n" in name else opdsl.load(name)
    x = batches.as_hidden(inputs_for(method))

    def made(dtype: torch.dtype, frozen: bool):
        batch, (h, w) = batches.hidden(x, dtype)
        w.requires_grad_(not frozen)
        return batch, h

    batch, h = made(torch.float64, frozen=False)
    (want,) = torch.autograd.grad(method.loss(batch).loss, h)
    batch, h = made(torch.float64, frozen=True)
    with Watch() as seen:
        result = method.loss(batch)
        (got,) = torch.autograd.grad(result.loss, h)
    (plan,) = plans(method.compilation.emitted)
    others = sum(n in ("T", "initial") for n in plan.others)
    assert plan.units(frozen_head=True) == 2.0
    assert seen.products.total() == 2 + others
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    batch, h = made(torch.float64, frozen=True)
    parts = batch.split(3)
    contexts = method.loss.prepare(parts)
    sum(method.loss(part, c).loss for part, c in zip(parts, contexts)).backward()
    torch.testing.assert_close(h.grad, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["cr_opd", "gkd", "gkd_reverse", "topk_match", "topk_bin_forward",
                                  "entropy_aware", "gae_opd", "abkd", "f_distill_tv"])  # fmt: skip
def test_spread_400_through_a_head(name: str) -> None:
    """Hidden states that give logits 400 apart: finite values and gradients."""
    method = opdsl.load(name)
    x = inputs_for(method)
    scale = 400 / float((x.hidden_BTH @ x.weight_VH.T).abs().max())
    batch, (h, w) = batches.hidden(
        batches.as_hidden(replace(x, weight_VH=x.weight_VH * scale)), torch.float32
    )
    result = method.loss(batch)
    got = torch.autograd.grad(result.loss, (h, w))
    assert math.isfinite(result.loss.item()) and all(bool(torch.isfinite(g).all()) for g in got)


@pytest.mark.parametrize("gate", ["early(2)", "logratio(T, student) > 0"])
def test_closed_rows_are_exactly_zero(gate: str) -> None:
    body = f"support full feedback loss KL(T || student) gate {gate}"
    if "early" not in gate:
        body = f"support sampled feedback reward logratio(T, student) credit immediate gate {gate}"
    method = opdsl.compile(TEXT.format(body=body))
    batch, (h, _) = batches.hidden(batches.as_hidden(inputs_for(method)), torch.float32)
    result = method.loss(batch)
    (grad,) = torch.autograd.grad(result.loss, (h,))
    moved = grad.abs().sum(-1) > 0
    kept = result.metrics["kept/main"]
    assert 0 < kept < 1 and int(moved.sum()) == round(kept * batch.layout.n_rows)


def test_two_cotangents_at_one_list_of_ids() -> None:
    """Of two temperatures, say: the rows of the head are used once."""
    ids = torch.tensor([[0, 2], [1, 2]])
    h = torch.randn(2, H, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, H, dtype=torch.float64, requires_grad=True)

    def program(student, logits, rows):
        z = student.at(ids)
        return (z * z).sum(1), [(ids, z), (ids, z)], {}

    total, _, _ = linear_restricted(h, opdsl.Head(w), program)
    got = torch.autograd.grad(total, (h, w))
    want = torch.autograd.grad(((h @ w.T).gather(1, ids) ** 2).sum(), (h, w))
    assert all(torch.allclose(a, b) for a, b in zip(got, want))


# ---- costs -----------------------------------------------------------------------------------------


def test_costs_follow_the_plan() -> None:
    """A frozen head saves a third of the products, served teachers their own, gates their share."""
    on = machine("h200")
    (dense,) = plans(opdsl.load("gkd_reverse").compilation.emitted)
    (sampled,) = plans(opdsl.load("sampled_opd").compilation.emitted)
    (restricted,) = plans(opdsl.load("topk_match").compilation.emitted)
    at = Shapes(8192, 4096, 151936, bytes=2)
    served = replace(at, served=frozenset({"T"}))
    assert cost(dense, at, on).seconds > cost(sampled, served, on).seconds
    assert cost(sampled, served, on).seconds > 5 * cost(restricted, served, on).seconds
    frozen = cost(dense, replace(at, frozen_head=True), on)
    assert frozen.seconds < cost(dense, at, on).seconds and frozen.bytes < cost(dense, at, on).bytes
    half = replace(served, kept=0.2)
    assert cost(restricted, half, on).seconds < cost(restricted, served, on).seconds
    assert cost(dense, at, on, tile_bytes=1 << 28).chunk < cost(dense, at, on).chunk


def test_command() -> None:
    run = CliRunner().invoke(cli, ["explain", "cr_opd", "--cost", "--device", "h200"])
    assert run.exit_code == 0 and "S1e: 3 U" in run.output
    assert all(len(line) <= 100 for line in run.output.splitlines())
    run = CliRunner().invoke(cli, ["explain", "gkd", "--cost", "--format", "json", "--device", "h100",
                                   "--shape", "64,32,1000"])  # fmt: skip
    (part,) = json.loads(run.output)["parts"]
    assert part["kind"] == "D1" and part["units"] == 3 and part["bytes"] > 0
    for bad in (["--shape", "5"], ["--probe"], ["--format", "latex"]):
        run = CliRunner().invoke(cli, ["explain", "gkd", "--cost", *bad])
        assert run.exit_code == 2 and "--" in run.output
