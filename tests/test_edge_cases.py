"""Numbers at the edge: the twelve cases of methods_a §6 and the rules of semantics §6."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support import TOLERANCE, batches, relative, toy
from torch import Tensor

import opdsl
from opdsl.emit.kernels.head import Head
from opdsl.ir.derive import TAIL_FLOOR

B, T, V = 3, 4, 9
TOKENS = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [8, 0, 2, 4]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
LR = "logratio(T, rollout)"
BIN = "top(3, of = T, tail = bin)"


def models(seed: int = 0, dtype=torch.float64, width: int = V) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(2, B, T, width, generator=g, dtype=torch.float64).to(dtype)
    return z[0].clone().requires_grad_(), z[1].clone()


def batch(
    student: Tensor, teacher: Tensor | None = None, mask: Tensor = MASK, **rest
) -> opdsl.Batch:
    return opdsl.Batch.from_logits(
        student, teacher, tokens=rest.pop("tokens", TOKENS), mask=mask, **rest
    )


def run(m, student: Tensor, *args, **rest) -> tuple[float, Tensor]:
    loss = m.loss(batch(student, *args, **rest)).loss
    (grad,) = torch.autograd.grad(loss, student)
    return float(loss.detach()), grad


def lists(teacher: Tensor, k: int = 3) -> dict:
    lp = torch.log_softmax(teacher, -1)
    logps, ids = lp.topk(k, -1)
    sampled = lp.gather(2, TOKENS[..., None]).squeeze(-1)
    return dict(teacher_topk_ids=ids, teacher_topk_logprobs=logps, teacher_logprobs=sampled)


# ---- 1 missing, failed and impossible teacher scores ------------------------------------------------


def test_1_a_failed_scoring_call_is_refused_with_its_place() -> None:
    m = toy.loss("KL(student || T)", BIN, access="top(3)")
    z, t = models()
    for key in ("teacher_topk_logprobs", "teacher_logprobs"):
        for bad in (math.nan, math.inf, 0.5):
            given = lists(t)
            given[key][1, 2] = bad
            with pytest.raises(opdsl.BatchError, match="sequence 1, position 2"):
                run(m, z, **given)
    z[0, 1, 3].detach().fill_(0)
    for name, place in (("T", t), ("student", z.detach())):
        with torch.no_grad():
            place[0, 1, 3] = math.nan
        with pytest.raises(opdsl.BatchError, match=f"{name} .*sequence 0, position 1"):
            run(m, z, t)
        place[0, 1, 3] = 0.0
    wrong = TOKENS.clone()
    wrong[1, 3] = V
    with pytest.raises(opdsl.BatchError, match="sequence 1, position 3"):
        run(m, z, t, tokens=wrong)
    with pytest.raises(opdsl.BatchError, match=r"rollout_logprobs.*sequence 0, position 0"):
        run(m, z, t, rollout_logprobs=torch.full((B, T), -math.inf))


def test_1_even_where_a_clip_would_hide_it() -> None:
    """min and max of NaN pick the bound: the score is checked, not the loss."""
    m = toy.reward(LR, more="shape clip(-5, 5)")
    z, t = models()
    t[1, 0, :] = math.nan
    with pytest.raises(opdsl.BatchError, match="T are not finite at sequence 1, position 0"):
        run(m, z, t)


def test_1_masked_positions_may_hold_anything() -> None:
    m = toy.loss("KL(student || T)")
    z, t = models()
    want, want_grad = run(m, z, t)
    t[0, 3] = math.nan
    t[2] = math.inf
    with torch.no_grad():
        z[0, 3] = math.nan
        z[2] = -math.inf
    got, grad = run(m, z, t)
    assert got == want and torch.equal(grad, want_grad)
    assert not bool(grad[~MASK].any())


def test_1_an_impossible_sampled_token_is_infinite_not_huge() -> None:
    z, t = models()
    t[1, 1, TOKENS[1, 1]] = -math.inf
    loss = toy.reward(LR).loss(batch(z, t)).loss
    assert math.isinf(float(loss.detach()))
    assert math.isinf(float(toy.loss("KL(student || T)").loss(batch(z, t)).loss.detach()))
    bounded, grad = run(toy.reward(LR, more="shape clip(-5, 5)"), z, t)
    assert math.isfinite(bounded) and bool(torch.isfinite(grad).all())


def test_1_an_impossible_entry_of_a_list_does_not_count() -> None:
    m = toy.loss("KL(student || T)", BIN, access="top(3)")
    z, t = models()
    given = lists(t)
    given["teacher_topk_logprobs"][0, 0, 2] = -math.inf
    loss, grad = run(m, z, **given)
    assert math.isfinite(loss) and bool(torch.isfinite(grad).all())
    reference = m.reference(batch(z, **given))
    assert relative(grad, reference.grad_logits) <= TOLERANCE["float64"]


def test_1_what_is_missing_is_named() -> None:
    z, t = models()
    given = lists(t)
    del given["teacher_logprobs"]
    with pytest.raises(ValueError, match="teacher_logprobs"):
        run(toy.reward(LR, access="top(3)"), z, **given)
    with pytest.raises(opdsl.BatchError, match="teacher_topk_logprobs"):
        batch(z, teacher_topk_ids=given["teacher_topk_ids"])
    with pytest.raises(opdsl.BatchError, match="'T'"):
        run(toy.loss("KL(student || T)"), z)
    outcome = toy.loss("KL(student || T)", more="gate passed()")
    with pytest.raises(opdsl.BatchError, match="outcome"):
        run(outcome, z, t)


# ---- 2 zero times infinity ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["KL(student || T)", "KL(T || student)", "JSD(student || T)", "TV(student || T)",
                                  "hellinger(student || T)", "chi2(student || T)", "power(student || T)",
                                  "alpha_beta(student || T)", "skew_KL(T || student)",
                                  "sum(v in full: (student[v] - T[v]) ^ 2 / T[v])"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_2_a_row_that_no_model_has(name: str, dtype: torch.dtype) -> None:
    m = toy.loss(name)
    z, t = models(dtype=dtype)
    with torch.no_grad():
        z[..., 2] = -math.inf
        t[..., 2] = -math.inf
    tokens = torch.where(TOKENS == 2, 3, TOKENS)
    loss, grad = run(m, z, t, tokens=tokens)
    keep = [0, 1, *range(3, V)]
    short = z.detach()[..., keep].clone().requires_grad_()
    moved = torch.where(tokens > 2, tokens - 1, tokens)
    want, want_grad = run(m, short, t[..., keep], tokens=moved)
    assert loss == pytest.approx(want, rel=1e-6)
    assert relative(grad[..., keep], want_grad) <= 1e-6
    assert not bool(grad[..., 2].any())


@pytest.mark.parametrize("name, side", [("KL(T || student)", "T"), ("KL(student || T)", "student"),
                                        ("JSD(student || T)", "T"), ("JSD(student || T)", "student"),
                                        ("TV(student || T)", "T")])  # fmt: skip
def test_2_one_sided_zeros_of_finite_divergences(name: str, side: str) -> None:
    m = toy.loss(name)
    z, t = models()
    with torch.no_grad():
        (t if side == "T" else z)[..., 2] = -math.inf
    tokens = torch.where(TOKENS == 2, 3, TOKENS)
    loss, grad = run(m, z, t, tokens=tokens)
    assert math.isfinite(loss) and bool(torch.isfinite(grad).all())
    oracle = m.reference(batch(z, t, tokens=tokens))
    assert relative(grad, oracle.grad_logits) <= TOLERANCE["float64"]


# ---- 3 the bucket for the rest ------------------------------------------------------------------------


@pytest.mark.parametrize("peak", [5.0, 20.0, 60.0, 300.0])
def test_3_peaked_rows_keep_a_finite_bucket(peak: float) -> None:
    m = toy.loss("KL(student || T)", BIN)
    for dtype in (torch.float32, torch.float64):
        z, t = models(dtype=dtype)
        with torch.no_grad():
            z[..., 4] += peak
            t[..., 4] += peak
        loss, grad = run(m, z, t)
        assert math.isfinite(loss) and bool(torch.isfinite(grad).all())
        oracle = m.reference(batch(z, t))
        # the bucket's floor is log 1e-6: below it float32 sums of probabilities are noise
        assert abs(loss - oracle.loss) <= 1e-5
        assert float((grad.double() - oracle.grad_logits).abs().max()) <= 2e-5


def test_3_the_floor_is_a_mass_of_a_millionth() -> None:
    assert math.exp(TAIL_FLOOR) == pytest.approx(1e-6)


def test_3_an_id_counts_once() -> None:
    m = toy.loss("KL(student || T)", "union(sampled, top(3, of = T), tail = bin)", access="top(3)")
    z, t = models()
    given = lists(t)
    want, want_grad = run(m, z, **given)
    doubled = {k: torch.cat([v, v[..., :1]], -1) for k, v in given.items() if v.dim() == 3}
    doubled["teacher_topk_ids"][..., [1, 3]] = doubled["teacher_topk_ids"][..., [3, 1]]
    doubled["teacher_topk_logprobs"][..., [1, 3]] = doubled["teacher_topk_logprobs"][..., [3, 1]]
    four = toy.loss(
        "KL(student || T)", "union(sampled, top(4, of = T), tail = bin)", access="top(4)"
    )
    got, grad = run(four, z, **{**given, **doubled})
    assert got == pytest.approx(want, rel=1e-12)
    assert relative(grad, want_grad) <= TOLERANCE["float64"]
    oracle = four.reference(batch(z, **{**given, **doubled}))
    assert oracle.loss == pytest.approx(want, rel=1e-12)


# ---- 4 cut without a rule for the rest ------------------------------------------------------------------


def test_4_a_negative_raw_value_keeps_its_gradient() -> None:
    m = toy.loss("KL(student || T)", "top(2, of = T, tail = drop)")
    z, t = models(3)
    with torch.no_grad():
        z[..., :] = -t
    loss, grad = run(m, z, t)
    assert loss < 0
    assert float(grad[MASK].abs().amax(-1).min()) > 1e-4  # clamping at 0 would have removed it


# ---- 5 singletons and empty sets ---------------------------------------------------------------------------


def test_5_nothing_in_common() -> None:
    z, t = models()
    with torch.no_grad():
        z[...] = -t
    for tail in ("drop", "renormalize", "detach", "bin"):
        m = toy.loss(
            "KL(student || T)", f"intersection(top(1, of = T), top(1, of = student), tail = {tail})"
        )
        loss, grad = run(m, z, t)
        assert loss == 0.0 and not bool(grad.any()), tail
    for how in ("max", "min", "mean"):
        m = toy.loss(f"1 nats * {how}(v in {{u in full: T[u] > 0.99}}: student[v] * T[v])")
        assert run(m, z, t)[0] == 0.0


@pytest.mark.parametrize("aggregate", ["tokens", "kept_tokens", "sequences", "response_length"])
def test_5_every_gate_closed(aggregate: str) -> None:
    m = toy.loss("KL(student || T)", more=f"gate position < 0\naggregate mean(over = {aggregate})")
    loss, grad = run(m, *models())
    assert loss == 0.0 and not bool(grad.any())


def test_5_groups_of_one() -> None:
    z, t = models()
    alone = toy.loss("KL(student || T)", more="weight softmax(i in group: perplexity(student))")
    assert run(alone, z, t)[0] == pytest.approx(
        run(toy.loss("KL(student || T)"), z, t)[0], rel=1e-12
    )
    loo = toy.reward(LR, "return_to_go(baseline = leave_one_out)")
    assert run(loo, z, t)[0] == pytest.approx(
        run(toy.reward(LR, "return_to_go"), z, t)[0], rel=1e-12
    )


# ---- 6 floors that kill gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [10.0, 60.0, 200.0])
def test_6_a_token_far_below_is_still_pulled_up(depth: float) -> None:
    for support in ("full", BIN):
        m = toy.loss("KL(T || student)", support)
        z, t = models(dtype=torch.float32)
        with torch.no_grad():
            z[..., 4] -= depth
            t[..., 4] += 6.0
        _, grad = run(m, z, t)
        p, q = torch.softmax(z.detach(), -1), torch.softmax(t, -1)
        if support == "full":
            assert relative(grad[MASK], (p - q)[MASK]) <= TOLERANCE["float32"]
        assert float(grad[MASK][:, 4].max()) < -0.1


# ---- 7 one-sided and unbounded signals ---------------------------------------------------------------------------


def test_7_ranges_are_known() -> None:
    m = toy.reward(LR, more="shape clip(-2, 3)")
    (term,) = m.spec.feedback_terms
    assert (term.signal.q.low, term.signal.q.high) == (-2.0, 3.0)
    m = toy.reward("-k2(student, T)")
    (term,) = m.spec.feedback_terms
    assert term.signal.q.high <= 0.0  # never a reward
    m = toy.reward(LR, more="shape tanh(2)")
    (term,) = m.spec.feedback_terms
    assert (term.signal.q.low, term.signal.q.high) == (-2.0, 2.0)


# ---- 8 the ends of families ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0, 1])
def test_8_a_degenerate_jsd_is_refused(beta: int) -> None:
    with pytest.raises(opdsl.CompileError, match="OPD208"):
        toy.loss(f"JSD(T || student, beta = {beta})")


def test_8_near_the_ends_jsd_is_a_scaled_kl() -> None:
    z, t = models()
    small = 1e-6
    near, grad = run(toy.loss(f"JSD(T || student, beta = {small})"), z, t)
    full, full_grad = run(toy.loss("KL(T || student)"), z, t)
    assert near / small == pytest.approx(full, rel=1e-4)
    assert relative(grad / small, full_grad) <= 1e-4
    near, grad = run(toy.loss(f"JSD(T || student, beta = {1 - small})"), z, t)
    full, full_grad = run(toy.loss("KL(student || T)"), z, t)
    assert near / small == pytest.approx(full, rel=1e-4)
    assert relative(grad / small, full_grad) <= 1e-4


@pytest.mark.parametrize("name", ["KL(student || T)", "KL(T || student)", "JSD(student || T)", "skew_KL(student || T)",
                                  "alpha_beta(student || T)", "TV(student || T)", "hellinger(student || T)",
                                  "chi2(student || T)", "power(student || T)", "k2(student, T)", "k3(student, T)"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_8_at_the_teacher_nothing_is_left(name: str, dtype: torch.dtype) -> None:
    sampled = name.startswith("k")
    z, _ = models(dtype=dtype)
    supports = ["sampled"] if sampled else ["full", BIN, "top(3, of = T, tail = renormalize)"]
    tiny = 5e-6 if dtype is torch.float32 else 1e-14  # the sum over seven rows
    for support in supports:
        loss, grad = run(toy.loss(name, support), z, z.detach().clone())
        assert abs(loss) <= tiny, (support, loss)
        assert float(grad.abs().max()) <= tiny, support
    if not sampled:
        value, _ = run(toy.loss(name), *models(5, dtype))
        assert value > 0


# ---- 9 widths ------------------------------------------------------------------------------------------------------


def test_9_vocabularies_must_agree() -> None:
    z, t = models()
    with pytest.raises(opdsl.BatchError, match="cut both"):
        batch(z, t[..., :-1])
    x = batches.as_hidden(batches.draw(1, B=3, T=4, V=12, padding=2))
    m = toy.loss("KL(student || T)")
    dense, leaf = batches.logits(replace(x, golden=None))
    want = m.loss(dense).loss
    fused, (h, _) = batches.hidden(replace(x, golden=None), padding=2)
    got = m.loss(fused).loss
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    (dz,) = torch.autograd.grad(want, leaf)
    (dh,) = torch.autograd.grad(got, h)
    assert relative(dh, dz @ x.weight_VH) <= TOLERANCE["float64"]


def test_9_a_token_beyond_the_head_is_refused() -> None:
    hidden, weight = torch.randn(1, 2, 4), torch.randn(10, 4)
    with pytest.raises(opdsl.BatchError, match="vocabulary of 8"):
        opdsl.Batch.from_hidden(
            hidden, Head(weight, vocab=8), tokens=torch.tensor([[0, 9]]), mask=torch.ones(1, 2)
        )


# ---- 10 special and end tokens ----------------------------------------------------------------------------------------


def test_10_special_tokens_are_left_out() -> None:
    m = toy.loss("KL(student || T)", more="gate not special(y)\naggregate mean(over = kept_tokens)")
    z, t = models()
    special = torch.zeros(B, T, dtype=torch.bool)
    special[1, 2] = True
    loss, grad = run(m, z, t, special=special)
    mask = MASK.clone()
    mask[1, 2] = False
    want, want_grad = run(m, z, t, mask)
    assert loss == pytest.approx(want, rel=1e-12)
    assert relative(grad, want_grad) <= TOLERANCE["float64"]
    assert not bool(grad[1, 2].any())


def test_10_a_response_cut_at_the_cap_bootstraps() -> None:
    """0 after the end token, the critic's value where the cap cut the response."""
    m = toy.method(
        "let Value : nats per token = critic(init = zero, lr = 0.01)\nsupport sampled\n"
        f"feedback reward {LR}\ncredit gae(V = Value, gamma = 0.5, lam = 0)"
    )
    z, t = models()
    values = torch.zeros(B, T + 1, dtype=torch.float64)
    ended, _ = run(m, z, t, values=values)
    values[1, 4] = -8.0
    cut, _ = run(m, z, t, values=values)
    lp = torch.log_softmax(z.detach(), -1)[1, 3, TOKENS[1, 3]]
    assert cut - ended == pytest.approx(float(-(0.5 * -8.0) * lp), rel=1e-12)


# ---- 11 who sampled and who is scored ------------------------------------------------------------------------------------


def test_11_each_log_probability_belongs_to_a_policy() -> None:
    z, t = models()
    sampler = z.detach() / 0.7
    rollout = torch.log_softmax(sampler, -1).gather(2, TOKENS[..., None]).squeeze(-1)
    by_rollout = toy.reward("logratio(T, rollout)")
    by_student = toy.reward("logratio(T, student)")
    assert run(by_rollout, z, t, rollout_logprobs=rollout)[0] != run(by_student, z, t)[0]
    # without a record the student is taken to have sampled
    assert run(by_rollout, z, t)[0] == run(by_student, z, t)[0]
    ratio = toy.reward("logratio(T, student)", more="weight ratio(student, rollout)")
    assert run(ratio, z, t)[0] == pytest.approx(run(by_student, z, t)[0], rel=1e-14)


@pytest.mark.parametrize("name", ["cr_opd", "minillm", "gkd", "topk_match"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_11_half_precision_logits_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    """The rounding of the inputs is the only loss: arithmetic is float32."""
    m = opdsl.load(name)
    x = batches.draw(4, B=4, T=5, V=11, golden=False)
    rounded = replace(
        x,
        student_BTV=x.student_BTV.to(dtype).double(),
        teachers={k: v.to(dtype).double() for k, v in x.teachers.items()},
        rollout_BT=x.rollout_BT.to(dtype).double(),
    )
    low, leaf = batches.logits(rounded, dtype)
    loss = m.loss(low).loss
    (grad,) = torch.autograd.grad(loss, leaf)
    oracle = m.reference(batches.logits(rounded)[0])
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    assert relative(loss.detach(), oracle.loss) <= TOLERANCE["float32"]
    # the gradient is handed back in the type of the logits: one rounding
    assert relative(grad, oracle.grad_logits) <= 2.0**-8


# ---- 12 denominators, windows, shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cr_opd", "sampled_rtg", "topk_match", "minillm"])
def test_12_nothing_to_train_on(name: str) -> None:
    m = opdsl.load(name)
    z, t = models()
    loss, grad = run(m, z, t, torch.zeros_like(MASK), group=torch.zeros(B, dtype=torch.int64))
    assert loss == 0.0 and not bool(grad.any())
    result = m.loss(batch(z, t, torch.zeros_like(MASK)))
    assert result.metrics["tokens"] == 0
    none = torch.zeros(0, T, V, dtype=torch.float64, requires_grad=True)
    empty = opdsl.Batch.from_logits(
        none, none.detach(), tokens=torch.zeros(0, T, dtype=torch.int64), mask=torch.zeros(0, T)
    )
    assert float(m.loss(empty).loss.detach()) == 0.0
    assert m.reference(empty).loss == 0.0


def test_12_golden_text_may_be_absent_or_empty() -> None:
    m = toy.loss("KL(student || T)", more="regularize 0.5 * sft(data = golden)")
    z, t = models()
    want, _ = run(toy.loss("KL(student || T)"), z, t)
    assert run(m, z, t)[0] == pytest.approx(want, rel=1e-14)
    empty = batch(z.detach(), t, torch.zeros_like(MASK))
    assert run(m, z, t, golden=empty)[0] == pytest.approx(want, rel=1e-14)
    assert len(m.loss.prepare(batch(z, t, golden=empty).split(2))) == 2


@pytest.mark.parametrize("text", ["gate entropy(student) >= quantile(entropy(student), 0.5)",
                                  "weight 1 / (1 + max(i in batch: abs(logratio(student, T))))",
                                  "weight 1 + max(0, mean(i in same_position: T[y]))"])  # fmt: skip
def test_12_whole_batch_statistics_of_nothing(text: str) -> None:
    m = toy.loss("KL(student || T)", more=text)
    loss, grad = run(m, *models(), torch.zeros_like(MASK))
    assert loss == 0.0 and not bool(grad.any())


def test_12_small_shapes() -> None:
    one = torch.zeros(1, 1, 1, dtype=torch.float64, requires_grad=True)
    single = opdsl.Batch.from_logits(
        one, torch.zeros(1, 1, 1, dtype=torch.float64), tokens=torch.zeros(1, 1, dtype=torch.int64),
        mask=torch.ones(1, 1),
    )  # fmt: skip
    for name in ("cr_opd", "sampled_rtg", "topk_match", "gkd", "minillm", "entropy_aware"):
        loss = opdsl.load(name).loss(single).loss
        (grad,) = torch.autograd.grad(loss, one, retain_graph=True)
        assert float(loss.detach()) == 0.0 and float(grad) == 0.0, name
    z, t = models()
    wide = toy.loss("KL(student || T)", "top(500, of = T, tail = bin)")
    whole, whole_grad = run(toy.loss("KL(student || T)"), z, t)
    loss, grad = run(wide, z, t)  # k beyond the vocabulary is all of it, the bucket at its floor
    assert loss == pytest.approx(whole, rel=1e-9)
    assert relative(grad, whole_grad) <= 1e-9
    flat = torch.zeros(B, T, V, dtype=torch.float64, requires_grad=True)
    tied = toy.loss("KL(student || T)", BIN)
    loss, grad = run(tied, flat, torch.zeros(B, T, V, dtype=torch.float64))
    assert loss == pytest.approx(0.0, abs=1e-15) and float(grad.abs().max()) < 1e-15


def test_12_whitening_ignores_padding() -> None:
    defs = "def baseline_white(G : nats per token) : nats per token\n  = whiten(G)"
    m = toy.reward(LR, "immediate(baseline = white)", defs=defs)
    z, t = models()
    want, want_grad = run(m, z, t)
    longer = [torch.cat([x.detach(), 50 * torch.ones(B, 3, V, dtype=x.dtype)], 1) for x in (z, t)]
    longer[0].requires_grad_()
    mask = torch.cat([MASK, torch.zeros(B, 3, dtype=torch.bool)], 1)
    tokens = torch.cat([TOKENS, torch.zeros(B, 3, dtype=torch.int64)], 1)
    got, grad = run(m, longer[0], longer[1], mask, tokens=tokens)
    assert got == pytest.approx(want, rel=1e-12)
    assert relative(grad[:, :T], want_grad) <= TOLERANCE["float64"]


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(
    "name", ["cr_opd", "verifier_hybrid", "topk_match", "sampled_rtg", "minillm", "gae_opd"]
)
def test_12_splitting_changes_nothing(name: str, parts: int) -> None:
    m = opdsl.load(name)
    teachers = tuple(t.name for t in m.spec.teachers)
    x = batches.draw(9, B=6, T=4, V=9, teachers=teachers, critics=("V",), group=3)
    whole, leaf = batches.logits(x)
    want = m.loss(whole).loss
    (want_grad,) = torch.autograd.grad(want, leaf, retain_graph=True)
    pieces = whole.split(parts)
    assert len(pieces) == min(parts, whole.layout.n_seqs)
    total = torch.stack([m.loss(p, c).loss for p, c in zip(pieces, m.loss.prepare(pieces))]).sum()
    (grad,) = torch.autograd.grad(total, leaf)
    assert float(total.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    assert relative(grad, want_grad) <= TOLERANCE["exact"]


# ---- the acceptance set ------------------------------------------------------------------------------------------------------------


FAULTS = ("none", "masked row", "all masked sample", "impossible entry", "repeated id")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("k", [1, 16, 128, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_acceptance(dtype: torch.dtype, k: int | None, fault: str) -> None:
    """float32 and bfloat16, small and large supports, every fault of a real batch: finite."""
    width = 160
    support = "full" if k is None else f"union(sampled, top({k}, of = T), tail = bin)"
    losses = ["JSD(T || student)"] if k is None else ["KL(student || T)", "KL(T || student)"]
    z, t = models(1, dtype, width)
    mask = MASK.clone()
    mask[2] = True
    if fault == "masked row":
        mask[0, 1] = False
        t[0, 1] = math.nan
    if fault == "all masked sample":
        mask[1] = False
    if fault == "impossible entry":
        t[0, 0, 140] = -math.inf
    given: dict = {"teacher": t}
    if fault == "repeated id" and k is not None:
        given = lists(t.float(), max(k, 2))
        given["teacher_topk_ids"][..., 1] = given["teacher_topk_ids"][..., 0]
        given["teacher_topk_logprobs"][..., 1] = given["teacher_topk_logprobs"][..., 0]
    for name in losses:
        m = toy.loss(name, support, more="aggregate mean(over = tokens)")
        loss = m.loss(batch(z, mask=mask, **given)).loss
        (grad,) = torch.autograd.grad(loss, z)
        assert bool(torch.isfinite(loss)) and bool(torch.isfinite(grad).all())
        assert bool(grad.any())
