"""Identities of the gated and routed specs, and what the rules know about gates and outcomes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from references.arrays import Arrays
from support import TOLERANCE, batches, relative

import opdsl


def inputs(seed: int = 0, step: int = 3, V: int = 80, **more) -> batches.Inputs:
    return batches.draw(seed, B=8, T=9, V=V, group=4, step=step, spread=2.0, **more)


def gradient(method: opdsl.Method, x: batches.Inputs) -> torch.Tensor:
    batch, leaf = batches.logits(x)
    (grad,) = torch.autograd.grad(method.loss(batch).loss, leaf)
    return grad


# ---- identities --------------------------------------------------------------------------------------

LOCAL = """opd 1
method local {
  accept   immediate_credit "compared"
  accept   length_coupling "compared"
  state     rollouts(student)
  teacher   T = external(access = top(32))
  support   sampled
  feedback  reward logratio(T, student)
  credit    immediate
  routing   local(KL(T || student), top(32, of = T, tail = renormalize))
  aggregate mean(over = sequences)
}
"""


@pytest.mark.parametrize("seed", range(4))
def test_aopd_is_local_routing_at_zero_and_sampled_opd_below(seed: int) -> None:
    x = inputs(seed)
    assert relative(gradient(opdsl.load("aopd"), x), gradient(opdsl.compile(LOCAL), x)) < 1e-12
    plain = LOCAL[: LOCAL.index("  routing")] + "  aggregate mean(over = sequences)\n}\n"
    never = opdsl.load("aopd", set={"tau": -1})
    assert relative(gradient(never, x), gradient(opdsl.compile(plain), x)) < 1e-12


def test_tropd_tosses_one_coin_for_both_of_its_branches() -> None:
    """Its mean over steps is a PG + (1 − a) FKL on the top 64, a = min(q/p, 1) of the token."""
    m, x, n = opdsl.load("tropd"), inputs(1), 600
    a = Arrays(x)
    trust = np.minimum(np.exp(a.r), 1)
    one, other = (
        torch.as_tensor(a.mean(*f)[1]) for f in (a.score(a.r), a.forward_raw(a.top(a.lq, 64)))
    )
    share = torch.zeros(a.size, a.T, 1, dtype=torch.float64)
    share[a.rows, :, 0] = torch.as_tensor(trust)
    each = torch.stack([gradient(m, replace(x, step=s)) for s in range(n)])
    gap = (each.mean(0) - (share * one + (1 - share) * other)).abs()
    error = (one - other).abs() * (share * (1 - share) / n) ** 0.5
    assert bool((gap <= 5.5 * error + 1e-12).all())
    near = torch.minimum((each - one).abs().amax(-1), (each - other).abs().amax(-1))
    assert float(near.max()) < 1e-12  # every token has exactly one branch


def test_tip_released_keeps_as_many_tokens_as_it_says() -> None:
    m, x, n = opdsl.load("tip_released"), inputs(2), 400
    a = Arrays(x)
    lm = np.log((a.p + a.q) / 2)
    jsd = 0.5 * (a.p * (a.lp - lm) + a.q * (a.lq - lm)).sum(-1)
    s = -(a.p * a.lp).sum(-1) * jsd * a.m
    chance = np.minimum(1, 0.5 * a.length[:, None] * s / s.sum(1, keepdims=True))
    kept = torch.zeros(a.size, a.T, dtype=torch.float64)
    for step in range(n):
        kept += (gradient(m, replace(x, step=step)).abs().amax(-1) > 0).double() / n
    want = torch.zeros_like(kept)
    want[a.rows] = torch.as_tensor(chance * a.m)
    assert float((kept - want).abs().max()) < 5.5 * 0.5 / n**0.5


def test_reopold_changes_its_mask_at_the_turn() -> None:
    m = opdsl.load("reopold_a", set={"turn": 5})
    x = inputs(0)
    early, late = (gradient(m, replace(x, step=s)).abs().amax(-1) > 0 for s in (4, 5))
    a = Arrays(x)
    floor = np.log(0.3) / 0.7
    assert early[a.rows].numpy().tolist() == ((a.r >= floor) & (a.m > 0)).tolist()
    h = -(a.p * a.lp).sum(-1)
    assert not (late[a.rows].numpy() & (h < np.quantile(a.tokens(h), 0.8))).any()


# ---- recipes -----------------------------------------------------------------------------------------

RECIPE = """opd 1
import "./recipes/masks.opd" (ordinary, icepop, sure_gap, entropy_top, horizon, calm_sequence)
import "./recipes/rewards.opd" (shape_floor_a, shape_floor_b, shape_skewed, shape_max_abs)
import "./recipes/schedules.opd" (warm_up, anneal, trapezoid)
import "./recipes/anchors.opd" (pull, spread)
method m {{
  state      rollouts(student, group = 4)
  teacher    T = external(access = logits)
  support    sampled
  feedback   reward logratio(T, student)
  credit     immediate
  {line}
  aggregate  mean(over = tokens)
}}
"""
LINES = [
    "gate ordinary()", "gate icepop(student, rollout)", "gate sure_gap(T, student, bound = 2)",
    "gate entropy_top(student)", "gate horizon(first = 1, growth = 1)",
    "gate calm_sequence(student, rollout, delta = 0.01)", "shape floor_a(lam = 0.3)",
    "shape floor_b(lam = 0.3)", "shape skewed(lam = 0.1)", "shape max_abs",
    "weight warm_up(over = 10)", "weight anneal(from = 2, over = 4)",
    "weight trapezoid(up = 5, down = 8, end = 12)", "regularize pull()", "regularize spread()",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_every_recipe_compiles_and_equals_the_oracle(line: str, tmp_path) -> None:
    (tmp_path / "m.opd").write_text(RECIPE.format(line=line))
    m, x = opdsl.load(tmp_path / "m.opd"), inputs(3)
    plain = opdsl.compile(RECIPE[: RECIPE.index("import")] + RECIPE.format(line="")[RECIPE.index("method"):])  # fmt: skip
    grad = gradient(m, x)
    batch, _ = batches.logits(x)
    assert relative(grad, m.reference(batch).grad_logits) < TOLERANCE["float64"]
    assert relative(gradient(plain, x), grad) > 1e-6  # it does something here


# ---- what the rules know -----------------------------------------------------------------------------

MIXED = """opd 1
method m {{
  accept    immediate_credit "measured elsewhere"
  state     mix(0.5: rollouts(student), 0.5: sequences(golden))
  teacher   T = external(access = sampled)
  support   sampled
  term follow {{ feedback reward logratio(T, student)
    credit immediate
    {gate} }}
  term copy {{ feedback loss -log(student[y])
    gate {copied} }}
  aggregate mean(over = tokens)
}}
"""


@pytest.mark.parametrize(
    "gate, copied, codes",
    [
        ("gate drawn(student)", "drawn(golden)", set()),
        ("gate not drawn(golden)", "not drawn(student) and position < 3", set()),
        ("", "drawn(golden)", {"OPD316"}),
        ("gate drawn(golden)", "drawn(golden)", {"OPD316"}),
        ("gate drawn(student) or position < 1", "drawn(golden)", {"OPD316"}),
        ("gate drawn(student)", "drawn(student)", {"OPD317"}),
    ],
)
def test_a_term_is_judged_by_the_text_its_gate_lets_through(gate, copied, codes) -> None:
    c = opdsl.compilation.Compilation(text(MIXED.format(gate=gate, copied=copied)))
    assert {d.code for d in c.diagnostics if d.severity.name == "ERROR"} == codes


def text(body: str):
    from opdsl.source import Source

    return Source("m.opd", body)


PLAIN = """opd 1
method m {{
  state     rollouts(student, group = 4)
  teacher   T = external(access = top(1))
  support   sampled
  {feedback}
  aggregate mean(over = tokens)
}}
"""


@pytest.mark.parametrize(
    "feedback, wanted",
    [
        ("feedback reward 1 nats * verifier credit immediate", None),
        ("feedback reward 1 nats * verifier + logratio(T, student) credit immediate", "OPD501"),
        ("feedback loss -sum(v in top(1, of = T): log(student[v]))", None),
        ("feedback loss -log(student[y]) + 0 * log(T[y])", "OPD317"),
    ],
)
def test_outcomes_and_the_teachers_own_token(feedback: str, wanted: str | None) -> None:
    c = opdsl.compilation.Compilation(text(PLAIN.format(feedback=feedback)))
    codes = {d.code for d in c.diagnostics} & {"OPD501", "OPD302", "OPD317"}
    assert codes == ({wanted} if wanted else set())


def test_a_mean_lies_among_what_it_averages() -> None:
    m = opdsl.compile(
        PLAIN.format(
            feedback="feedback loss KL(student || T, on = top(1, of = T, tail = bin))\n"
            "  weight 1 - mean(i in group: passed())"
        )
    )
    assert m.spec.terms[0].weight.q.low >= 0
