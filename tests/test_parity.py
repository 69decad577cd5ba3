"""Every emitted path equals the float64 oracle, in value and in gradient.

Two hundred generated specs and every shipped one, on batches with holes, an empty sequence and a
one-token sequence; whole and in micro-batches; full logits, hidden states, served teachers; padded
vocabularies; extreme logits. Tolerances: `support.TOLERANCE`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from support import TOLERANCE, batches, generate, relative

import opdsl
from opdsl.emit import budget
from opdsl.emit.batch import Batch
from opdsl.emit.kernels import head
from opdsl.method import Method
from opdsl.resources import methods, specs

GENERATED = 200
SHIPPED = sorted(str(p.relative_to(specs())) for p in methods())
CASES = [*range(GENERATED), *SHIPPED]


@dataclass(frozen=True)
class Case:
    method: Method
    inputs: batches.Inputs
    features: frozenset[str]


@cache
def method_of(which: int | str) -> tuple[Method, int, frozenset[str]]:
    """A generated spec by its seed, a shipped one by its path."""
    if isinstance(which, int):
        text = generate.spec(which)
        return generate.compiled(text.text), which, text.features
    return opdsl.load(specs() / which), sum(which.encode()), frozenset({"shipped"})


def case(which: int | str, padding: int = 0, spread: float = 1.0, on_policy: bool = False) -> Case:
    method, seed, features = method_of(which)
    inputs = batches.draw(
        seed,
        B=4 + seed % 2,
        T=3 + seed % 4,
        V=7 + padding + seed % 7,
        teachers=tuple(t.name for t in method.spec.teachers if t.kind != "initial") or ("T",),
        critics=tuple(c.name for c in method.spec.critics),
        padding=padding,
        spread=spread,
        on_policy=on_policy,
    )
    return Case(method, inputs, features)


def value_scale(terms: dict[str, float]) -> float:
    """Terms may cancel: the loss is compared at the size of the largest of them."""
    return max((abs(x) for x in terms.values()), default=0.0)


def assert_equal(method: Method, batch: Batch, leaf: torch.Tensor, tolerance: float) -> None:
    """Whole batch and splits into 2 and 4, against the oracle."""
    oracle = method.reference(batch)
    result = method.loss(batch)
    found = [("whole", result.loss, torch.autograd.grad(result.loss, leaf, retain_graph=True)[0])]
    for n in (2, 4):
        parts = batch.split(n)
        losses = [method.loss(p, c).loss for p, c in zip(parts, method.loss.prepare(parts))]
        total = torch.stack(losses).sum()
        (grad,) = torch.autograd.grad(total, leaf, retain_graph=True)
        found.append((f"split in {n}", total, grad))
    for what, value, grad in found:
        error = relative(value.detach(), oracle.loss, value_scale(oracle.terms))
        assert error <= tolerance, f"{what}: value off by {error:.2e}"
        error = relative(grad, oracle.grad_logits)
        assert error <= tolerance, f"{what}: gradient off by {error:.2e}"
    for name, x in oracle.terms.items():
        assert relative(result.metrics[f"loss/{name}"], x, value_scale(oracle.terms)) <= tolerance


def on_an_edge(method: Method, inputs: batches.Inputs, nudge: float) -> bool:
    """Whether a nudge of the logits flips a comparison: a threshold met to within rounding.

    There the two sides of a gate are both right; such cases are counted, not compared.
    """
    g = torch.Generator().manual_seed(1)
    shift = nudge * torch.randn(inputs.student_BTV.shape, generator=g, dtype=torch.float64)
    a = method.reference(batches.logits(inputs)[0])
    b = method.reference(batches.logits(replace(inputs, student_BTV=inputs.student_BTV + shift))[0])
    return relative(b.grad_logits, a.grad_logits) > 1e3 * nudge


@pytest.mark.parametrize("which", CASES)
def test_float64(which: int | str) -> None:
    c = case(which)
    batch, leaf = batches.logits(c.inputs)
    try:
        assert_equal(c.method, batch, leaf, TOLERANCE["float64"])
    except AssertionError:
        if on_an_edge(c.method, c.inputs, 1e-11):
            pytest.skip("a threshold is met to within rounding")
        raise


@pytest.mark.parametrize("which", CASES)
def test_float32(which: int | str) -> None:
    c = case(which)
    batch, leaf = batches.logits(c.inputs, torch.float32)
    try:
        assert_equal(c.method, batch, leaf, TOLERANCE["float32"])
    except AssertionError:
        if on_an_edge(c.method, c.inputs, 1e-6):
            pytest.skip("a threshold is met to within rounding")
        raise


@pytest.mark.parametrize("which", [*range(0, GENERATED, 4), *SHIPPED])
def test_hidden_states(which: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused route in chunks and strips that do not divide the rows: value, d/dhidden, d/dhead."""
    monkeypatch.setitem(head.CHUNK_RANGE, "cpu", (4, 4))
    c = case(which)
    inputs = batches.as_hidden(c.inputs)
    three_rows = 3 * 4 * inputs.student_BTV.shape[-1]
    monkeypatch.setattr(budget, "STRIP_BYTES", {"dense": three_rows, "listed": three_rows})
    dense, _ = batches.logits(inputs)
    oracle = c.method.reference(dense)
    want_h = oracle.grad_logits @ inputs.weight_VH
    want_w = torch.einsum("btv,bth->vh", oracle.grad_logits, inputs.hidden_BTH)
    if oracle.grad_golden is not None:
        want_w = want_w + torch.einsum("btv,bth->vh", oracle.grad_golden, inputs.golden.hidden_BTH)
    for dtype in (torch.float64, torch.float32):
        tolerance = TOLERANCE[str(dtype).removeprefix("torch.")]
        batch, leaves = batches.hidden(inputs, dtype)
        for parts in ([batch], batch.split(2)):
            contexts = c.method.loss.prepare(parts)
            total = torch.stack([c.method.loss(p, x).loss for p, x in zip(parts, contexts)]).sum()
            got_h, got_w = torch.autograd.grad(total, leaves, retain_graph=True)
            errors = (
                relative(total.detach(), oracle.loss, value_scale(oracle.terms)),
                relative(got_h, want_h),
                relative(got_w, want_w),
            )
            if max(errors) > tolerance and on_an_edge(c.method, inputs, 1e-6):
                pytest.skip("a threshold is met to within rounding")
            assert max(errors) <= tolerance, errors


@pytest.mark.parametrize("which", [*range(1, GENERATED, 4), *SHIPPED])
def test_padded_vocabulary(which: int | str) -> None:
    """Rows of −inf in every model change nothing and receive nothing."""
    padding = 2
    c = case(which, padding)
    batch, leaf = batches.logits(c.inputs)
    assert_equal(c.method, batch, leaf, TOLERANCE["float64"])
    assert not bool(c.method.reference(batch).grad_logits[..., -padding:].any())

    def cut(x: batches.Inputs) -> batches.Inputs:
        return replace(
            x,
            student_BTV=x.student_BTV[..., :-padding],
            teachers={k: v[..., :-padding] for k, v in x.teachers.items()},
            initial_BTV=x.initial_BTV[..., :-padding],
            golden=None if x.golden is None else cut(x.golden),
        )

    short = c.method.reference(batches.logits(cut(c.inputs))[0])
    long = c.method.reference(batch)
    assert relative(long.loss, short.loss, value_scale(short.terms)) <= TOLERANCE["float64"]
    gap = relative(long.grad_logits[..., :-padding], short.grad_logits)
    assert gap <= TOLERANCE["float64"]


@pytest.mark.parametrize("which", CASES)
def test_needs_are_enough(which: int | str) -> None:
    """A teacher that gives exactly what `needs` names gives the same loss and gradient."""
    c = case(which)
    access = c.method.needs.teachers
    if all(level in ("logits", "score_ids") for level in access.values()):
        return  # reads whole distributions: a served teacher's lists are not enough
    full, leaf = batches.logits(c.inputs)
    oracle = c.method.reference(full)
    for dtype in (torch.float64, torch.float32):
        tolerance = TOLERANCE[str(dtype).removeprefix("torch.")]
        batch, leaf = batches.sparse(c.inputs, access, dtype)
        result = c.method.loss(batch)
        (grad,) = torch.autograd.grad(result.loss, leaf)
        errors = (
            relative(result.loss.detach(), oracle.loss, value_scale(oracle.terms)),
            relative(grad, oracle.grad_logits),
        )
        assert max(errors) <= tolerance, errors
        assert relative(c.method.reference(batch).grad_logits, oracle.grad_logits) <= 1e-5


LARGEST = float(torch.finfo(torch.float32).max)


@pytest.mark.parametrize("which", [*range(2, GENERATED, 3), *SHIPPED])
def test_extreme_logits(which: int | str) -> None:
    """Logits 400 apart, tokens drawn from the student: finite losses and gradients."""
    c = case(which, spread=400.0, on_policy=True)
    oracle = c.method.reference(batches.logits(c.inputs)[0])
    assert bool(torch.isfinite(oracle.grad_logits).all())
    if max(abs(float(oracle.loss)), float(oracle.grad_logits.abs().max())) > LARGEST:
        pytest.skip("unbounded by definition: the value itself is beyond float32")
    for dtype in (torch.float64, torch.float32):
        batch, leaf = batches.logits(c.inputs, dtype)
        result = c.method.loss(batch)
        (grad,) = torch.autograd.grad(result.loss, leaf)
        assert bool(torch.isfinite(result.loss)), dtype
        assert bool(torch.isfinite(grad).all()), dtype


UNLIKE = """opd 1
method unlike {
  state rollouts(student, group = 2)
  teacher left = external(access = top(4)) when prompt.domain == "math"
  teacher right = external(access = logits) when prompt.domain == "code"
  let T = routed(left, right)
  support union(sampled, top(4, of = T), tail = bin)
  feedback loss KL(student || T)
  aggregate mean(over = tokens)
}
"""


def test_teachers_of_unlike_access() -> None:
    """A served teacher for some prompts, a local one for others."""
    m = opdsl.compile(UNLIKE)
    x = batches.draw(3, B=5, T=4, V=9, teachers=("left", "right"))
    want = m.reference(batches.logits(x)[0])
    leaf = x.student_BTV.clone().requires_grad_()
    lp = torch.log_softmax(x.teachers["left"], -1)
    logps, ids = lp.topk(4, -1)
    batch = Batch.from_logits(
        leaf,
        {"right": x.teachers["right"]},
        tokens=x.tokens_BT,
        mask=x.mask_BT,
        prompt=x.prompt,
        teacher_topk_ids={"left": ids},
        teacher_topk_logprobs={"left": logps},
        teacher_logprobs={"left": lp.gather(2, x.tokens_BT[..., None]).squeeze(-1)},
    )
    assert_equal(m, batch, leaf, TOLERANCE["float64"])
    assert relative(m.reference(batch).grad_logits, want.grad_logits) <= TOLERANCE["float64"]


def test_the_generator_covers_the_language() -> None:
    seen: set[str] = set()
    for seed in range(GENERATED):
        seen |= generate.spec(seed).features
    wanted = {
        *(f"tail {t}" for t in generate.TAILS),
        *(f"aggregate {a}" for a in generate.AGGREGATES),
        *(f"route {r}" for r in ("loss", "reward", "scores")),
        *(f"routing {r}" for r in ("suppress", "drop", "proportional", "local", "counterfactual")),
        *(f"otherwise {o}" for o in ("suppress", "drop", "proportional")),
        *(f"credit {c}" for c in ("immediate", "return_to_go", "discounted", "window", "gae",
                                  "future_only", "full_return", "user")),
        *(f"baseline {b}" for b in ("kl_state", "batch_mean", "leave_one_out", "group_mean",
                                    "position", "value", "none")),
        *(f"divergence {d}" for d in ("KL", "JSD", "skew_KL", "alpha_beta", "TV", "hellinger",
                                      "chi2", "power")),
        *(f"teacher {p}" for p in ("logits", "routed", "top", "sampled")),
        *(f"reduce {h}" for h in ("sum", "mean", "max", "min")),
        *(f"set {s}" for s in ("top", "top_p", "union", "intersection")),
        *(f"schedule {s}" for s in ("linear", "cosine")),
        *(f"regularize {x}" for x in ("KL", "entropy", "outcome", "sft", "support")),
        *(f"gate {g}" for g in ("position", "special", "outcome", "group", "log-ratio", "range",
                                "closed", "step", "live", "length", "field", "entropy", "quantile",
                                "overlap", "in top", "sign")),
        *(f"weight {w}" for w in ("ratio", "position", "group softmax", "schedule", "outcome",
                                  "live", "live coupled", "sequence", "drift", "next token", "group",
                                  "entropy", "overlap", "batch", "mass", "ppo_clip")),
        "mixture", "tempered", "initial", "user def", "several terms", "term use", "shape",
        "filtered set", "on = full", "on = set", "critic", "outcome", "support full",
        "support sampled", "sampled loss", "sum of losses", "state reward",
    }  # fmt: skip
    assert not wanted - seen, sorted(wanted - seen)
