"""Forward recurrences, ranks and maxima along a sequence, chances, and who drew a text."""

from __future__ import annotations

import pytest
import torch
from support import TOLERANCE

import opdsl

HEAD = """opd 1
def carried(x : nats per token, c : real) : nats per token
{
  C[t] = x[t] + c * C[t - 1]
  return C
}
method m {
  state     mix(0.5: rollouts(student, group = 2), 0.5: sequences(data))
  teacher   T = external(access = logits)
  support   full
  feedback  loss KL(student || T)
"""


def compiled(lines: str, aggregate: str = "mean(over = tokens)") -> opdsl.Method:
    return opdsl.compile(f"{HEAD}{lines}\n  aggregate {aggregate}\n}}\n")


def batch(seed: int = 0, step: int = 3, **more) -> opdsl.Batch:
    g = torch.Generator().manual_seed(seed)
    z, t = (torch.randn(4, 5, 6, generator=g).double() for _ in range(2))
    mask = torch.arange(5)[None] < torch.tensor([5, 1, 0, 4])[:, None]
    sources = ("student", "student", "data", "data")
    return opdsl.Batch.from_logits(
        z.requires_grad_(), t, tokens=torch.randint(0, 6, (4, 5), generator=g), mask=mask,
        group=torch.tensor([0, 0, 1, 1]), prompt=[{"@source": s} for s in sources], step=step,
        **more,
    )  # fmt: skip


LINES = {
    "a sum so far": "  weight exp(-carried(KL(student || T), c = 1)[t - 1])",
    "a live sum so far": "  weight live(1 / (1 + carried(entropy(student), c = exp(-entropy(student)))))",
    "a rank": "  gate rank(t in sequence: entropy(student)) >= 0.5",
    "a maximum": "  weight live(entropy(student) / (0.1 + max(t in sequence: entropy(student))))",
    "a minimum": "  weight 1 + min(t in sequence: entropy(T))",
    "shares": "  weight softmax(t in sequence: entropy(T))",
    "a chance": "  gate chance(min(1, T[y] / student[y]))",
    "two chances": "  gate chance(0.5)\n  weight if chance(0.5) then 2 else 1",
    "a source": "  gate drawn(student)",
}


@pytest.mark.parametrize("name", LINES)
def test_emitted_equals_oracle(name: str) -> None:
    m = compiled(LINES[name])
    whole = batch()
    oracle = m.reference(whole)
    result = m.loss(whole)
    assert float(result.loss.detach()) == pytest.approx(oracle.loss, rel=1e-10)
    (grad,) = torch.autograd.grad(result.loss, whole.source)
    want = torch.as_tensor(oracle.grad_logits)
    assert float((grad - want).abs().max()) <= TOLERANCE["exact"] * float(want.abs().max())
    parts = whole.split(2)
    contexts = m.loss.prepare(parts)
    total = sum(float(m.loss(p, c).loss.detach()) for p, c in zip(parts, contexts))
    assert total == pytest.approx(oracle.loss, rel=1e-10)


def metrics_of(lines: str, **more) -> torch.Tensor:
    """Which tokens keep a gradient, as the oracle sees it [B, T]."""
    grad = torch.as_tensor(compiled(lines).reference(batch(**more)).grad_logits)
    return grad.abs().sum(-1) > 0


def test_a_rank_keeps_the_top_half_of_each_sequence() -> None:
    assert metrics_of(LINES["a rank"]).sum(1).tolist() == [2, 0, 0, 2]
    kept = "  gate rank(t in sequence: entropy(student)) * length >= length - max(1, 0.5 * length)"
    assert metrics_of(kept).sum(1).tolist() == [2, 1, 0, 2]


def test_a_source_keeps_its_own_rows() -> None:
    assert metrics_of(LINES["a source"]).any(1).tolist() == [True, True, False, False]


def test_a_chance_is_the_same_for_the_same_step_and_fair() -> None:
    assert torch.equal(metrics_of("  gate chance(0.5)"), metrics_of("  gate chance(0.5)"))
    assert not torch.equal(
        metrics_of("  gate chance(0.5)"), metrics_of("  gate chance(0.5)", step=4)
    )
    from opdsl.emit.prelude import uniform

    draws = uniform(torch.arange(200_000), 7, 1)
    assert (
        abs(float(draws.mean()) - 0.5) < 3e-3 and float(draws.min()) >= 0 > float(draws.max()) - 1
    )
    again = uniform(torch.arange(200_000), 7, 2)
    assert abs(float(torch.corrcoef(torch.stack([draws, again]))[0, 1])) < 0.01


def test_the_past_is_part_of_the_state() -> None:
    """A sum up to the last token is known before y is drawn: a baseline of it is allowed."""
    text = """opd 1
def total_before(r : nats per token) : nats per token
{
  C[t] = r[t] + C[t - 1]
  return C[t - 1]
}
def baseline_past(G : nats per token, q : dist) : nats per token
  = G - 0.1 * total_before(logratio(q, student))
method m {
  state rollouts(student)
  teacher T = external(access = sampled)
  support sampled
  feedback reward logratio(T, rollout)
  credit return_to_go(baseline = past(q = T))
  aggregate sum(over = tokens)
}
"""
    from support import toy

    from opdsl.passport import enumerate as exact

    m = opdsl.compile(text)
    w = exact.tree()
    student, teacher = toy.models(w)
    got = exact.expected(m.program, w, student, teacher).gradient
    want = exact.gradient(lambda z: exact.sequence_kl(w, z, teacher), student)
    assert float((got - want).norm() / want.norm()) < 1e-12


@pytest.mark.parametrize(
    "line, code",
    [
        ("  gate drawn(golden)", "OPD101"),
        ("  gate drawn(1)", "OPD202"),
        ("  gate chance(entropy(T))", "OPD201"),
        ("  weight rank(i in group: entropy(T))", "OPD101"),
    ],
)
def test_mistakes(line: str, code: str) -> None:
    with pytest.raises(opdsl.CompileError) as e:
        compiled(line)
    assert code in {d.code for d in e.value.diagnostics}


def test_a_recurrence_runs_one_way() -> None:
    with pytest.raises(opdsl.CompileError, match="one way"):
        opdsl.compile(HEAD.replace("c * C[t - 1]", "c * C[t - 1] + C[t + 1]") +
                      "  weight carried(KL(student || T), c = 1)\n  aggregate sum(over = tokens)\n}\n")  # fmt: skip
