"""The passport's claims against exact measurement on small models.

`pytest tests/test_probe.py` runs about sixty generated specs and every shipped one. The five
hundred, and how many claims are left open, are in the slow part:

    pytest tests/test_probe.py -m slow -s
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support import TOLERANCE, generate, relative, toy

import opdsl
from opdsl.cli import cli
from opdsl.compilation import Compilation
from opdsl.ir.interpret import reference
from opdsl.ir.program import lower
from opdsl.passport import enumerate as exact
from opdsl.passport.claims import claims
from opdsl.passport.local import Claims
from opdsl.passport.measure import Measurement, measure
from opdsl.passport.model import Small
from opdsl.passport.probe import DISAGREES, OPEN, probe
from opdsl.passport.small import small
from opdsl.syntax import read_source

SPECS = Path(__file__).parent.parent / "specs"
FIRST, HYBRIDS = sorted(SPECS.glob("*.opd")), sorted(SPECS.glob("hybrids/*.opd"))
LOG_RATIO = "logratio(T, rollout)"
OPEN_SHARE = 0.15  # of all claims about 500 generated specs
NAMES = ("zero", "stationary", "conservative", "j_seq", "j_fro")


def measured(method, seed: int = 1, **rest) -> Measurement:
    return measure(small(method.spec, seed=seed), **rest)


# ---- the measurement itself ------------------------------------------------------------------------


def test_v1_returns_follow_the_sequence() -> None:
    for credit in ("return_to_go", "full_return", "return_to_go(baseline = kl_state)"):
        m = measured(toy.reward(LOG_RATIO, credit))
        assert m.bias["J_seq"].none and m.bias["J_seq"].k == pytest.approx(1)
        assert m.conservative and not m.bias["J_fro"].none


def test_v2_immediate_credit_follows_the_frozen_states() -> None:
    for m in (measured(toy.reward(LOG_RATIO)), measured(toy.loss("KL(student || T)"))):
        assert m.bias["J_fro"].none and m.bias["J_fro"].k == pytest.approx(1)
        assert m.bias["J_seq"].residual > 0.05
    twice = measured(toy.reward(f"2 * {LOG_RATIO}"))
    assert twice.bias["J_fro"].none and twice.bias["J_fro"].k == pytest.approx(2)


def test_v3_curl_by_directions_is_the_whole_asymmetry() -> None:
    for gamma, at_least in ((0.0, 0.05), (0.5, 0.02), (1.0, 0.0)):
        m = measured(toy.reward(LOG_RATIO, f"discounted(gamma = {gamma})"))
        assert m.curl is not None
        assert m.curl > at_least if at_least else m.curl < 1e-8


def test_v4_a_baseline_of_the_action_is_biased() -> None:
    own = (
        "def baseline_own(G : nats per token, q : dist) : nats per token\n"
        "  = G - 0.5 * logratio(q, student)"
    )
    m = measured(toy.reward(LOG_RATIO, "return_to_go(baseline = own(q = T))", defs=own))
    assert m.bias["J_seq"].residual > 0.05 and not m.conservative


def critic(credit: str):
    return toy.method(
        f"let Value : nats per token = critic(init = zero, lr = 0.01)\nsupport sampled\n"
        f"feedback reward {LOG_RATIO}\ncredit {credit}"
    )


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_v5_an_exact_critic_and_a_wrong_one(lam: float) -> None:
    m = critic(f"gae(V = Value, gamma = 1, lam = {lam})")
    right, wrong = measured(m), measured(m, wrong=True)
    assert right.bias["J_seq"].none and right.conservative
    assert wrong.bias["J_seq"].none == (lam == 1)


def test_the_exact_critic_is_the_value_of_theory() -> None:
    m = small(critic("gae(V = Value, gamma = 1, lam = 0.5)").spec, seed=3)
    case, z = m.cases[0], m.student_PSV[0]
    source = m.spec.states[0]
    rollout = torch.log_softmax(z, -1)[m.tree.state_BT, m.tree.tokens_BT]
    weight = exact.log_probability(m.tree, z).exp()
    (found,) = m._values(case, source, z, weight, rollout, False).values()  # type: ignore[union-attr]
    want, _ = exact.returns(m.tree, z, case.teachers["T"])
    assert relative(found, want) < TOLERANCE["exact"]


def test_uncoupled_methods_are_measured_as_enumerate_does() -> None:
    for text in ("return_to_go(baseline = leave_one_out)", "immediate(baseline = group_mean)"):
        method = toy.reward(LOG_RATIO, text, group=2)
        m = small(method.spec, seed=2)
        found = m.field(m.student_PSV)
        case, z = m.cases[0], m.student_PSV[0]
        want = exact.expected(method.program, m.tree, z, case.teachers["T"], group=2)
        assert relative(found.gradient[0], want.gradient) < TOLERANCE["exact"]
        assert found.variance == pytest.approx(want.variance, rel=1e-9)


COUPLED = {
    "batch_mean": ("immediate(baseline = batch_mean)", ""),
    "position": ("return_to_go(baseline = position)", "aggregate mean(over = tokens)"),
    "maximum": ("immediate", "weight entropy(student) / (0.1 + max(i in batch: entropy(student)))"),
    "quantile": ("immediate", "gate entropy(student) >= quantile(entropy(student), 0.5)\n"
                              "aggregate mean(over = kept_tokens)"),
    "live": ("immediate", "weight live(entropy(student) / (0.5 + mean(entropy(student))))\n"
                          "aggregate mean(over = sequences)"),
}  # fmt: skip


@pytest.mark.parametrize("name", COUPLED)
def test_a_coupled_draw_is_a_batch(name: str) -> None:
    """Against the oracle, every pair of responses a batch of its own."""
    credit, more = COUPLED[name]
    method = toy.reward(LOG_RATIO, credit, more, group=2)
    m = small(method.spec, exact.tree(3, 2), seed=4)
    assert m.coupled and m.group == 2
    case, z, w = m.cases[0], m.student_PSV[0], m.tree
    own = torch.log_softmax(z, -1)[w.state_BT, w.tokens_BT]
    weight = exact.log_probability(w, z).exp()
    total = torch.zeros_like(z)
    for i in range(len(w.responses)):
        for j in range(len(w.responses)):
            pick = torch.tensor([i, j])
            batch = m._batch(case, z[w.state_BT[pick]], pick, own, None)
            grad = reference(lower(m.spec), batch).grad_logits
            total.index_put_((w.state_BT[pick],), weight[i] * weight[j] * grad, accumulate=True)
    assert relative(m.field(m.student_PSV).gradient[0], total) < 1e-10


def test_prompts_have_models_of_their_own() -> None:
    text = opdsl.load("verifier_hybrid")
    m = small(text.spec, seed=1)
    assert [c.prompt for c in m.cases] == [{"domain": "code"}, {"domain": "math"}]
    teachers = m.at_teacher()
    assert teachers is not None
    assert torch.equal(teachers[0], m.cases[0].teachers["code"])
    assert torch.equal(teachers[1], m.cases[1].teachers["math"])


def test_a_method_is_cut_to_fit() -> None:
    method = toy.reward(LOG_RATIO, "window(n = 64)", "gate position < 100\nweight 1 + entropy(T)")
    m = small(method.spec, seed=1)
    assert any("64" in n for n in m.notes) and any("100" in n for n in m.notes)
    found = measure(m)
    assert not found.bias["J_seq"].none and not found.conservative


def test_given_text_is_not_drawn_from_the_student() -> None:
    direct = toy.method("support full\nfeedback loss KL(student || T)").spec
    (rollouts,) = direct.states
    data = opdsl.records.replace(rollouts, kind="sequences", policy="data")
    m = measure(small(opdsl.records.replace(direct, states=(data,)), seed=1))
    assert m.conservative and m.bias["J_fro"].none and not m.bias["J_seq"].none


# ---- chances, mixed samplers, sums so far ------------------------------------------------------------


def test_a_chance_counts_as_its_probability() -> None:
    m = measured(toy.reward(LOG_RATIO, "immediate", "gate chance(0.3)"))
    assert m.bias["J_fro"].none and m.bias["J_fro"].k == pytest.approx(0.3)
    one = toy.reward(LOG_RATIO, "return_to_go", "weight if chance(0.5) then 2 else 1")
    assert measured(one).bias["J_seq"].k == pytest.approx(1.5) and claims(one.spec).j_seq


def test_one_chance_in_two_factors_is_not_measured() -> None:
    twice = (
        "def twice() : weight per token\n"
        "{\n  c = chance(0.4)\n  return (if c then 2 else 1) * (if c then 3 else 1)\n}"
    )
    both = toy.reward(LOG_RATIO, "immediate", "weight twice()", twice)
    found = probe(both.compilation)
    assert "chance" in found.failed and claims(both.spec) == Claims()


def test_a_blended_sampler_weighs_its_policies() -> None:
    direct = toy.method("support full\nfeedback loss KL(student || T)").spec
    (rollouts,) = direct.states
    mixed = opdsl.records.replace(rollouts, policy="blend", parts=((0.7, "student"), (0.3, "T")))
    m = small(opdsl.records.replace(direct, states=(mixed,)), seed=1)
    case, z = m.cases[0], m.student_PSV[0]
    want = 0.7 * torch.softmax(z, -1) + 0.3 * torch.softmax(case.teachers["T"], -1)
    assert relative(m.law(mixed, case, z).exp(), want) < TOLERANCE["exact"]
    draft = opdsl.records.replace(mixed, policy="interleaved", accept=2)
    p = m.law(draft, case, z).exp()
    assert relative(p.sum(-1), torch.ones(len(p))) < TOLERANCE["exact"]
    assert measure(m).bias["J_fro"].none and not measure(m).conservative


def test_terms_may_ask_who_wrote_the_text() -> None:
    text = """opd 1
method two_sources "generated" {
  state mix(0.5: rollouts(student), 0.5: sequences(data))
  teacher T = external(access = logits)
  term own { support full
             feedback loss KL(student || T)
             gate drawn(student) }
  term given { support full
               feedback loss 2 * KL(student || T)
               gate drawn(data) }
  aggregate sum(over = tokens)
}
"""
    m = generate.compiled(text)
    small_one = small(m.spec, seed=1)
    assert len(small_one.cases) == 1
    found = claims(m.spec)
    assert found.j_fro is False and found.stationary and not disagreements(m, found, seed=11)
    equal = generate.compiled(text.replace("2 * KL", "KL"))
    assert claims(equal.spec).j_fro and measured(equal).bias["J_fro"].none


def test_rewards_so_far_are_no_credit() -> None:
    so_far = (
        "def my_credit(r : nats per token) : nats per token\n"
        "{\n  C[t] = r[t] + C[t - 1]\n  return C\n}"
    )
    m = toy.reward(LOG_RATIO, "my_credit", defs=so_far)
    assert claims(m.spec).j_fro and measured(m).bias["J_fro"].none


# ---- claims that were wrong before they were measured ----------------------------------------------

CASES = {
    # spec -> (claim, answer)
    "a gate on the outcome ends the sequence objective": (
        toy.reward(LOG_RATIO, "return_to_go", "gate passed()"), {"j_seq": False, "conservative": False}),
    "so does one that reads the token": (
        toy.reward(LOG_RATIO, "return_to_go", "gate abs(logratio(student, T)) < 0.7"),
        {"j_seq": False, "conservative": False}),
    "a weight of the position tilts returns": (
        toy.reward(LOG_RATIO, "return_to_go", "weight exp(-0.3 * position)"),
        {"j_seq": False, "conservative": False}),
    "a weight of the position on every reward does not": (
        toy.reward(f"exp(-0.3 * position) * {LOG_RATIO}", "return_to_go"),
        {"j_seq": False, "conservative": True}),
    "a closed gate is the zero field": (
        toy.reward(LOG_RATIO, "return_to_go", "gate position < 0"),
        {"zero": True, "conservative": True, "j_seq": False, "j_fro": False}),
    "the first token alone is a gradient": (
        toy.reward(LOG_RATIO, "immediate", "gate position < 1"), {"conservative": True, "j_fro": False}),
    "means over the batch hold the own token": (
        toy.reward(LOG_RATIO, "return_to_go(baseline = batch_mean)", group=2), {"j_seq": False}),
    "the group's mean shrinks by position": (
        toy.reward(LOG_RATIO, "return_to_go(baseline = group_mean)", group=2), {"j_seq": False}),
    "other rollouts are no bias": (
        toy.reward(LOG_RATIO, "return_to_go(baseline = leave_one_out)", group=2),
        {"j_seq": True, "conservative": True}),
    "a bootstrap of half a critic": (
        critic("gae(V = 0.5 * Value, gamma = 1, lam = 0.5)"), {"j_seq": False, "conservative": False}),
    "a critic held below zero": (
        critic("gae(V = min(Value, 0), gamma = 1, lam = 0.5)"), {"j_seq": True}),
    "a shaped return": (
        toy.reward(LOG_RATIO, "return_to_go", "shape clip(-1, 1)"),
        {"j_seq": False, "conservative": False, "stationary": True}),
    "the reward of whole sequences is a gradient": (
        toy.reward("1 nats * outcome", "immediate"), {"conservative": True}),
    "and not one of what is left of it": (
        toy.reward("1 nats * outcome", "return_to_go"), {"conservative": False}),
    "an outcome beside the log-ratio moves the point": (
        toy.reward(f"{LOG_RATIO} + 0.5 * outcome", "full_return"),
        {"j_seq": False, "stationary": False}),
    "the length in the denominator": (
        toy.reward(LOG_RATIO, "immediate", "aggregate mean(over = response_length)"), {"j_fro": False}),
    "two teachers cannot both be met": (
        toy.loss("KL(student || T)", more="regularize 0.1 * KL(student || initial)"),
        {"stationary": False, "j_fro": False}),
    "a state reward teaches nothing at its state": (
        toy.method("support full\nfeedback reward -KL(student || T)\ncredit future_only"),
        {"zero": False, "stationary": True, "j_seq": False}),
    "the exact half and the sampled half": (
        toy.method("""term now { support full
                                 feedback loss KL(student || T) }
                      term later { support sampled
                                   feedback reward logratio(T, rollout)
                                   credit future_only }"""), {"j_seq": True, "conservative": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_claims(name: str) -> None:
    method, wanted = CASES[name]
    found = claims(method.spec)
    assert {k: getattr(found, k) for k in wanted} == wanted
    assert not disagreements(method, found, seed=11)


# ---- every method agrees with its passport ---------------------------------------------------------


def answers(m: Measurement) -> dict[str, bool | None]:
    return {
        "zero": m.zero,
        "stationary": m.stationary,
        "conservative": m.conservative,
        "j_seq": m.unbiased("J_seq"),
        "j_fro": m.unbiased("J_fro"),
    }


def disagreements(method, claimed: Claims, seed: int) -> list[str]:
    """Decided claims that random models contradict: one model refutes a yes; a no says that some
    model is different, so six have to look alike."""
    out: list[str] = []
    doubted = {name for name, said in vars(claimed).items() if said is not None}
    for i, spread in enumerate((1.0, 1.5, 2.0, 0.7, 1.0, 1.5)):
        found = answers(measure(small(method.spec, seed=seed + 50 * i, spread=spread)))
        differs = {n for n in doubted if found[n] not in (None, getattr(claimed, n))}
        out += [f"{n}: claimed yes, measured no" for n in differs if getattr(claimed, n)]
        doubted = {n for n in differs if getattr(claimed, n) is False}
        if not doubted:
            break
    return out + [f"{n}: claimed no, measured yes" for n in sorted(doubted)]


def agrees(path: Path, models: int) -> None:
    found = probe(opdsl.load(path).compilation, models=models)
    assert not found.failed and found.agrees, found.lines()


@pytest.mark.parametrize("path", FIRST, ids=lambda p: p.stem)
def test_shipped_methods_agree_with_their_passports(path: Path) -> None:
    method = opdsl.load(path)
    found = probe(method.compilation)
    assert not found.failed and found.agrees, found.lines()
    assert all(r.claimed is not None and r.verdict != OPEN for r in found.rows)
    assert claims(method.spec) == claims(method.spec, search=False)  # decided without a model


@pytest.mark.parametrize("path", HYBRIDS, ids=lambda p: p.stem)
def test_hybrids_agree_with_their_passports(path: Path) -> None:
    agrees(path, 1)


@pytest.mark.parametrize("path", sorted(SPECS.glob("failures/*.opd")), ids=lambda p: p.stem)
def test_catalogued_failures_agree_with_their_passports(path: Path) -> None:
    agrees(path, 1)


@pytest.mark.slow
def test_the_whole_library_agrees_with_its_passports() -> None:
    for path in sorted(SPECS.glob("*/*.opd")):
        if Compilation(read_source(str(path))).methods:  # the rest are definitions
            agrees(path, 2)


@pytest.mark.parametrize("block", range(6))
def test_generated_methods_agree_with_their_passports(block: int) -> None:
    for seed in range(10 * block, 10 * block + 10):
        method = generate.compiled(generate.spec(seed).text)
        wrong = disagreements(method, claims(method.spec), seed=1)
        assert not wrong, f"spec {seed}: {wrong}"


@pytest.mark.slow
def test_five_hundred_generated_methods() -> None:
    """`pytest tests/test_probe.py -m slow -s` prints the share of open claims."""
    undecided: Counter[str] = Counter()
    wrong: list[str] = []
    count = 500
    for seed in range(count):
        method = generate.compiled(generate.spec(seed).text)
        found = claims(method.spec)
        wrong += [f"spec {seed}: {w}" for w in disagreements(method, found, seed=1)]
        undecided.update(n for n in NAMES if getattr(found, n) is None)
    for n in NAMES:
        print(f"{n:<14}{100 * undecided[n] / count:5.1f} % not decided")
    share = sum(undecided.values()) / (count * len(NAMES))
    print(f"{'together':<14}{100 * share:5.1f} %")
    assert not wrong, "\n".join(wrong)
    assert share <= OPEN_SHARE and max(undecided.values()) <= OPEN_SHARE * count


# ---- the command -----------------------------------------------------------------------------------


def test_explain_with_probe() -> None:
    done = CliRunner().invoke(cli, ["explain", "sampled_opd", "--probe"])
    assert done.exit_code == 0, done.output
    _, _, below = done.output.partition("\n  probe ")
    assert "4 tokens" in below and "agrees: the passport says yes" in below
    assert "disagrees" not in below
    done = CliRunner().invoke(cli, ["explain", "sampled_opd", "--probe", "--format", "json"])
    data = json.loads(done.output)
    assert data["passport"]["unbiased"] == {"J_seq": False, "J_fro": True}
    assert data["probe"]["agrees"] and data["probe"]["bias"]["J_fro"]["residual"] < 1e-9
    assert {r["claim"] for r in data["probe"]["rows"]} >= {"zero field", "conservative", "J_seq"}


def test_probe_measures_methods_only() -> None:
    for args in (["OPD302"], ["gkd", "--format", "latex"], ["gkd", "--dump", "ir"]):
        done = CliRunner().invoke(cli, ["explain", *args, "--probe"])
        assert done.exit_code == 2 and "--probe" in done.output


def test_a_false_claim_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from opdsl.passport import report

    real = report.passport

    def lying(compilation):
        return {**real(compilation), "conservative": True}

    monkeypatch.setattr(report, "passport", lying)
    found = probe(opdsl.load("sampled_opd").compilation, models=1)
    (row,) = [r for r in found.rows if r.claim == "conservative"]
    assert row.verdict == DISAGREES and not found.agrees


def test_without_a_teacher_nothing_is_compared() -> None:
    found = probe(toy.loss("-log(student[y])", "sampled", "gate passed()").compilation, models=1)
    said = {r.claim: r.verdict for r in found.rows}
    assert said["at teacher"] == said["J_seq"] == OPEN


def test_a_small_model_is_random_and_reproducible() -> None:
    spec = opdsl.load("cr_opd").spec

    def field(seed: int) -> torch.Tensor:
        m: Small = small(spec, seed=seed)
        return m.field(m.student_PSV).gradient

    assert torch.equal(field(1), field(1)) and not torch.equal(field(1), field(2))
