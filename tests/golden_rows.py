"""The golden facts of the semantics: specs that share no spelling with the library, and measures.

Models as in `support.effects`: A has 13 states over 4 tokens, B one state over 12; float64, every
response enumerated. `tests/test_golden_facts.py` reads the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from gallery import FORWARD, inside, shrunk
from support import toy
from support.effects import (
    J_FRO,
    J_SEQ,
    REVERSE,
    SMALL_S,
    SMALL_T,
    STUDENT,
    TEACHER,
    A,
    B,
    apart,
    off,
    small,
)  # fmt: skip
from torch import Tensor

import opdsl
from opdsl.codes import CODES
from opdsl.diagnostics import Severity
from opdsl.method import Method
from opdsl.passport import enumerate as exact


@dataclass(frozen=True)
class Fact:
    """One spelling of a row. codes: what `check` reports. prints: text on the page of `explain`.
    passport: entries of it. zero: errors that must vanish; large: effects that must not."""

    row: str
    body: str
    defs: str = ""
    codes: tuple[str, ...] = ()
    prints: tuple[str, ...] = ()
    passport: dict[str, object] = field(default_factory=dict)
    zero: Callable[[Method], dict[str, float]] = lambda m: {}
    large: Callable[[Method], dict[str, float]] = lambda m: {}

    @property
    def text(self) -> str:
        """The spec; the teacher is called W, so that nothing can rest on the name T."""
        lines = "\n".join(f"  {x.strip()}" for x in self.body.strip().splitlines())
        if "aggregate" not in self.body:
            lines += "\n  aggregate sum(over = tokens)"
        return (
            f"opd 1\n{self.defs}\nmethod unnamed {{\n  state rollouts(student)\n"
            f"  teacher W = external(access = logits)\n{lines}\n}}\n"
        )

    @property
    def overridden(self) -> str:
        """With its errors allowed."""
        lines = "".join(
            f'  allow {c} "to be measured"\n'
            for c in self.codes
            if CODES[c].severity is Severity.ERROR
        )
        return self.text.replace("method unnamed {\n", "method unnamed {\n" + lines)


# ---- measures --------------------------------------------------------------------------------------


def flow(m: Method, student: Tensor = STUDENT, **more) -> Tensor:
    """Expected gradient on model A."""
    return exact.expected(m.program, A, student, {"W": TEACHER}, **more).gradient


def at_B(m: Method, student: Tensor = SMALL_S, teacher: Tensor = SMALL_T) -> Tensor:
    return small(m, student, {"W": teacher})


def norm(x: Tensor) -> float:
    return float(x.norm())


def sampled_is(want: Tensor) -> Callable[[Method], dict[str, float]]:
    return lambda m: {"distance to the gradient it is said to have": apart(at_B(m), want)}


OCCUPANCY = exact.occupancy(A, STUDENT, TEACHER)
TINY_TREE = exact.tree(3, 3)
TINY_S, TINY_T = toy.models(TINY_TREE, 5)


def curl(m: Method) -> float:
    """Asymmetry of the Jacobian: 0 for the gradient of any scalar."""

    def f(z: Tensor) -> Tensor:
        return exact.expected(m.program, TINY_TREE, z, {"W": TINY_T}).gradient

    return exact.asymmetry(f, TINY_S)


def ratio_gradient(h: Callable[[Tensor], Tensor]) -> Tensor:
    """∇ of Σ π f(π_T / π) by autograd, at B."""

    def f(z: Tensor) -> Tensor:
        p, q = torch.softmax(z, -1), torch.softmax(SMALL_T, -1)
        return (p * h(q / p)).sum()

    return exact.gradient(f, SMALL_S)


def corrected(h: Callable[[Tensor], Tensor]) -> float:
    """Distance of the score form with weight f − u f′ from the gradient of the divergence."""
    p, q = torch.softmax(SMALL_S, -1), torch.softmax(SMALL_T, -1)
    u = (q / p).requires_grad_()
    (slope,) = torch.autograd.grad(h(u).sum(), u)
    weight = (h(u) - u * slope).detach()
    score = exact.gradient(lambda z: (p * weight * torch.log_softmax(z, -1)).sum(), SMALL_S)
    return apart(score, ratio_gradient(h))


def value_as_reward(h: Callable[[Tensor], Tensor]) -> dict[str, object]:
    return dict(
        zero=lambda m: {"the corrected weight": corrected(h)},
        large=lambda m: {"distance to the divergence": off(at_B(m), ratio_gradient(h))},
    )


def raised(m: Method, name: str, centred: bool) -> dict[str, float]:
    """Routed steps that raise KL(student ‖ T) or KL(T ‖ student), over 40 pairs of distributions.
    centred: tokens above the mean log-ratio are routed, else those above 0."""
    bad = cases = 0
    for seed in range(40):
        s, t = toy.models(B, 200 + seed, 1.5)
        lp, lq = torch.log_softmax(s, -1)[0], torch.log_softmax(t, -1)[0]
        kl = (lp.exp() * (lp - lq)).sum()
        grad = lp.exp() * (lp - lq - kl) if name == "student" else lp.exp() - lq.exp()
        for y in range(12):
            if lp[y] - lq[y] > (kl if centred else 0):
                z = s.reshape(1, 1, -1).clone().requires_grad_()
                batch = opdsl.Batch.from_logits(
                    z, {"W": t.reshape(1, 1, -1)}, tokens=torch.tensor([[y]]),
                    mask=torch.tensor([[True]]),
                )  # fmt: skip
                (g,) = torch.autograd.grad(m.loss(batch).loss, z)
                cases += 1
                bad += float((g.reshape(-1) * grad).sum()) < -1e-12
    assert cases > 100
    return {f"steps that raise KL of {name}, of {cases}": float(bad)}


# ---- the rows ----------------------------------------------------------------------------------------

CALM = """def calm(p : dist, q : dist) : nats per token
  = q[y]/p[y] - 1 - log(q[y]/p[y])"""
GAP = """def gap(p : dist, q : dist) : nats per token
  = log(p[y] / q[y])"""
REST = """def rest(s : nats per token) : nats per token
{{
  H[t] = s[t] + H[t + 1]
  return {}
}}"""
SIGNAL = "support sampled\nfeedback reward log(W[y]) - log(student[y])\n"
ZERO = {"zero_expected_gradient": True, "objective": "none: the expected gradient is zero"}
BLIND = "no divergence: the reward has one sign, whichever way the student errs"
CUT = "support top(2, of = W, tail = {})\nfeedback loss "
RAW = "sum(v in support: student[v] * log(student[v] / W[v]))"
OTHER = "sum(v in support: W[v] * log(W[v]) - W[v] * log(student[v]))"
BY_HAND = "sum(v in support: student[v] / mass(student) * log(student[v] * mass(W) / (W[v] * mass(student))))"
ROUTED = """support full
feedback reward log(W[y] / student[y])
credit immediate
routing counterfactual(when = {}, among = {{v in full: v != y and student[v] < W[v] and student[v] >= 0.0001}}, toward = W[v] - student[v], strength = min(5, max(-A, 0)), otherwise = drop)"""
MIXED = """def mixed(a : dist, b : dist, x : real) : nats per token
{
  m = x * a + (1 - x) * b
  return x * sum(v in full: a[v] * log(a[v] / m[v])) + (1 - x) * sum(v in full: b[v] * log(b[v] / m[v]))
}"""


def blind_to_mass(m: Method) -> dict[str, float]:
    """Logits that rise together on the support move mass and nothing else."""
    top = SMALL_T.topk(2, -1).indices
    return {
        "pull on the mass": abs(float(at_B(m).gather(-1, top).sum())),
        "left at the teacher's shape with other mass": norm(at_B(m, shrunk(0.2))),
    }


def two_tails(m: Method) -> dict[str, float]:
    """KL(student ‖ T) minus the value is the KL inside the one entry."""
    p, q = (torch.softmax(x, -1).reshape(-1) for x in (SMALL_S, SMALL_T))
    top = torch.zeros(12).bool().scatter(0, SMALL_T.reshape(-1).topk(2).indices, True)
    a, b = p[~top], q[~top]
    tail = float(a.sum() * ((a / a.sum()) * ((a / a.sum()) / (b / b.sum())).log()).sum())
    batch = opdsl.Batch.from_logits(
        SMALL_S[None], {"W": SMALL_T[None]}, tokens=torch.tensor([[0]]),
        mask=torch.tensor([[True]]),
    )  # fmt: skip
    gap = float((p * (p / q).log()).sum()) - float(m.reference(batch).loss)
    return {"error, less the KL of the tails": abs(gap - tail), "left at T": norm(at_B(m, SMALL_T))}


def hellinger(u: Tensor) -> Tensor:
    return 1 - 2 * u.sqrt() + u


def chi2(u: Tensor) -> Tensor:
    return (u - 1) ** 2


def js(u: Tensor) -> Tensor:
    return 0.5 * (u * u.log() - (1 + u) * ((1 + u) / 2).log())


def of_states(m: Method) -> dict[str, float]:
    """∇ of the visits alone, the KL of each state held."""
    kl = exact.state_kl(STUDENT, TEACHER)
    want = exact.gradient(lambda z: (exact.visits(A, z) * kl).sum(), STUDENT)
    return {"distance to the occupancy term": apart(flow(m), want)}


def sequence(m: Method) -> dict[str, float]:
    return {"distance to the gradient of the sequence KL": apart(flow(m), J_SEQ)}


FACTS = [
    # 1 sampled, loss k1
    *(
        Fact(
            "direct k1", f"support sampled\nfeedback loss {loss}", defs,
            codes=("OPD302",), prints=("OPD302", "none: the expected gradient is zero"),
            passport=ZERO, zero=lambda m: {"expected gradient": norm(flow(m))},
        )
        for loss, defs in (
            ("misfit(student, W)", "def misfit(a : dist, b : dist) : nats per token\n"
             "{\n  gain = b[y] / a[y]\n  return -log(gain)\n}"),
            ("log(student[y]^2 / (W[y] * student[y]))", ""),
            ("2 * log(student[y]^0.5 / W[y]^0.5) + 3 nats", ""),
        )
    ),
    # 2 sampled, loss k2
    *(
        Fact(
            "direct k2", f"support sampled\nfeedback loss {loss}", defs,
            prints=("KL(student ‖ W) at visited states, in expectation over y",),
            passport={"objective": "KL(student ‖ W) at visited states, in expectation over y",
                      "fixed_point": "π_W", "zero_expected_gradient": False},
            zero=sampled_is(REVERSE),
        )
        for loss, defs in (
            ("halved(student, W)", "def halved(a : dist, b : dist) : nats per token\n"
             "{\n  u = b[y] / a[y]\n  return log(u) * log(u) / 2\n}"),
            ("(log(student[y])^2 - 2 * log(student[y]) * log(W[y]) + log(W[y])^2) / 2", ""),
        )
    ),
    # 3 sampled, loss k3
    *(
        Fact(
            "direct k3", f"support sampled\nfeedback loss {loss}", defs, codes=("OPD525",),
            prints=("OPD525", "KL(W ‖ student) at visited states, in expectation over y"),
            passport={"objective": "KL(W ‖ student) at visited states, in expectation over y"},
            zero=sampled_is(FORWARD),
        )
        for loss, defs in (
            ("calm(student, W)", CALM),
            ("exp(log(W[y]) - log(student[y])) + log(student[y]) - log(W[y]) - 1", ""),
        )
    ),
    # 4 sampled, reward -k3
    *(
        Fact(
            "reward -k3", f"support sampled\nfeedback reward {reward}\ncredit {credit}", defs,
            codes=("OPD310", "OPD501"),
            prints=("OPD310", "[KL(student ‖ W) − KL(W ‖ student)]", "does not attract"),
            passport={"conservative": False},
            zero=sampled_is(REVERSE - FORWARD),
        )
        for reward, credit, defs in (
            ("0 - calm(student, W)", "immediate", CALM),
            ("1 + log(W[y] / rollout[y]) - W[y] / rollout[y]", "same",
             "def same(s : nats per token) : nats per token = s"),
        )
    ),
    # 5 sampled, reward -k2 and -abs
    *(
        Fact(
            "sign-blind reward", f"support sampled\nfeedback reward {reward}\ncredit immediate",
            GAP, codes=("OPD310", "OPD501"), prints=("sign-blind", BLIND, "does not attract"),
            passport={"objective": BLIND},
            large=lambda m: {"KL after 60 steps over that before, minus 1": grown(m) - 1},
        )
        for reward in (
            "-(gap(student, W) * gap(student, W)) / 2",
            "min(gap(student, W), gap(W, student))",
        )
    ),
    # 6 a value of the state as a reward
    Fact(
        "state value", "support top(2, of = W, tail = bin)\n"
        "feedback reward sum(v in support: student[v] * log(W[v] / student[v]))\ncredit immediate",
        codes=("OPD307",), prints=("OPD307", "none: the expected gradient is zero"), passport=ZERO,
        zero=lambda m: {"expected gradient": norm(flow(m))},
    ),
    Fact(
        "state value, returned", "support full\nfeedback reward near(student || W)\ncredit rest",
        "def near(p : dist, q : dist) : nats per token = sum(w in full: p[w] * (log(q[w]) - log(p[w])))\n"
        + REST.format("H"), codes=("OPD520",),
        prints=("only the occupancy part: which states are visited, not which token is right",),
        zero=of_states,
    ),
    # 7 the log-ratio, immediate
    *(
        Fact(
            "immediate", f"support sampled\nfeedback reward {reward}\ncredit {credit}", defs,
            codes=("OPD501",),
            prints=("Σ_t KL(student ‖ W) at visited states, states held fixed (J_fro)", "OPD501",
                    "no (immediate credit drops E[∇log π_t · W(s_{t+1})]"),
            passport={"conservative": False, "unbiased": {"J_seq": False, "J_fro": True}},
            zero=lambda m: {"distance to J_fro": apart(flow(m), J_FRO),
                            "dropped, less E[∇log π W]": apart(J_SEQ - flow(m), OCCUPANCY)},
            large=lambda m: {"curl": curl(m), "distance to J_seq": apart(flow(m), J_SEQ)},
        )
        for reward, credit, defs in (
            ("log(W[y] / student[y])", "mine",
             "def mine(s : nats per token) : nats per token = 0.5 * s + 0.5 * s"),
            ("log(W[y]) - log(rollout[y])", "cut_off", REST.format("H - H[t + 1]").replace("rest", "cut_off")),
        )
    ),
    # 8 return to go, with and without a baseline of the state
    *(
        Fact(
            "return to go", SIGNAL + f"credit rest{baseline}",
            REST.format(rule) + "\ndef baseline_flat(Z : nats per token) : nats per token"
            " = Z - 2 * entropy(student)",
            prints=("KL(student ‖ W) of whole sequences (J_seq)", "unbiased"),
            passport={"objective": "KL(student ‖ W) of whole sequences (J_seq)",
                      "conservative": True, "unbiased": {"J_seq": True, "J_fro": False}},
            zero=lambda m: {**sequence(m), "curl": curl(m) * 1e-3},
        )
        for rule, baseline in (("H", ""), ("s + H[t + 1]", ""), ("0.5 * (H + s + H[t + 1])", ""),
                               ("H", "(baseline = flat)"), ("s + H[t + 1]", "(baseline = flat)"))
    ),
    # 9 discounted
    *(
        Fact(
            "discounted", SIGNAL + "credit fades",
            f"def fades(s : nats per token) : nats per token\n{{\n  H[t] = {rule}\n  return H\n}}",
            codes=("OPD506",), prints=("OPD506", "not the gradient of any objective"),
            passport={"conservative": False, "unbiased": {"J_seq": False, "J_fro": False}},
            large=lambda m: {"curl": curl(m), "distance to J_seq": off(flow(m), J_SEQ),
                             "distance to J_fro": off(flow(m), J_FRO)},
        )
        for rule in ("s[t] + 0.7 * H[t + 1]", "0.5 * (2 * s[t] + H[t + 1])")
    ),
    # 10 a raw top-k, KL(student ‖ T)
    *(
        Fact(
            "drop, reverse", CUT.format("drop") + loss, defs, codes=("OPD502",),
            prints=("OPD502", "total mass π_W(Ω)/e", "not stationary at π_W"),
            passport={"stationary_at_teacher": False},
            zero=lambda m: {"left at mass P/e": norm(at_B(m, shrunk(inside(SMALL_T) / torch.e)))},
            large=lambda m: {"left at the teacher": norm(at_B(m, SMALL_T))},
        )
        for loss, defs in (
            (RAW, ""),
            ("leak(student || W)", "def leak(a : dist, b : dist) : nats per token\n"
             "  = -sum(w in support: a[w] * log(b[w] / a[w]))"),
        )
    ),
    # 11 a raw top-k, KL(T ‖ student)
    *(
        Fact(
            "drop, forward", CUT.format("drop") + loss, codes=("OPD502",),
            prints=("π_W renormalised on the support; everything outside is erased",
                    "not stationary at π_W"),
            passport={"stationary_at_teacher": False},
            zero=lambda m: {"left at T renormalised": norm(at_B(m, shrunk(1 - 1e-14)))},
            large=lambda m: {"mass gained by the support in 60 steps": gained(m)},
        )
        for loss in (OTHER, "-sum(v in support: W[v] * log(student[v]))")
    ),
    # 12 renormalised
    *(
        Fact(
            "renormalised", CUT.format(tail) + loss, codes=("OPD503",),
            prints=("blind to the mass outside", "mass outside is free"),
            passport={"fixed_point": "any student with the shape of π_W inside the support; "
                      "mass outside is free"},
            zero=blind_to_mass,
        )
        for tail, loss in (("renormalize", RAW), ("drop", BY_HAND))
    ),
    # 13 one entry for the rest
    *(
        Fact(
            "bin", CUT.format(tail) + loss,
            prints=("π_W on the support and in total outside it", "tail mass × KL of the"),
            passport={"stationary_at_teacher": True},
            zero=two_tails,
        )
        for tail, loss in (
            ("bin", RAW),
            ("drop", RAW + " + (1 - mass(student)) * log((1 - mass(student)) / (1 - mass(W)))"),
        )
    ),
    # 14 the value of an f-divergence
    *(
        Fact(
            "value as reward", f"support sampled\nfeedback reward {reward}\ncredit immediate",
            "def u(a : dist, b : dist) : real per token = b[y] / a[y]",
            codes=("OPD319", "OPD501"), prints=("the right one is f − u f′",),
            **value_as_reward(h),
        )
        for reward, h in (
            ("2 * u(student, W)^0.5 - 1 - u(student, W)", hellinger),
            ("-(W[y] / student[y] - 1)^2", chi2),
            ("-0.5 * (u(student, W) * log(u(student, W)) - (1 + u(student, W)) * "
             "log((1 + u(student, W)) / 2))", js),
        )
    ),
    # 15 the ends of a mixture
    *(
        Fact(
            "ends of a mixture", f"support full\nfeedback loss mixed({sides}, x = {x})", MIXED,
            codes=("OPD308",), prints=("OPD308", "none: the expected gradient is zero"),
            passport=ZERO, zero=lambda m: {"value": values(m)},
        )
        for sides, x in (("student || W", 0), ("student || W", 1), ("W || student", 0),
                         ("W || student", 1))
    ),
    # 16 a return over the length
    *(
        Fact(
            "over the length", f"support sampled\nfeedback reward {reward}\ncredit rest\n"
            f"aggregate {aggregate}", REST.format(rule), codes=("OPD318",),
            prints=("OPD318", "with a bias: the length depends on the tokens"),
            passport={"conservative": False, "unbiased": {"J_seq": False, "J_fro": False}},
            large=lambda m: {"distance to J_seq, any scale": off(flow(m), J_SEQ),
                             "distance to its mean per token": off(flow(m), PER_TOKEN)},
        )
        for reward, rule, aggregate in (
            ("log(W[y] / student[y])", "H", "mean(over = sequences)"),
            ("log(W[y] / student[y])", "H / length", "sum(over = tokens)"),
            ("log(W[y] / student[y])", "H / max(length - position, 1)", "sum(over = tokens)"),
            ("log(W[y] / student[y]) / length", "H", "sum(over = tokens)"),
        )
    ),
    # 17 routing to deficits
    Fact(
        "routing, centred", ROUTED.format("A < -sum(v in full: student[v] * log(student[v] / W[v]))"),
        codes=("OPD501",),
        prints=("KL(student ‖ W), KL(W ‖ student): guaranteed on routed tokens",),
        zero=lambda m: {**raised(m, "student", True), **raised(m, "teacher", True)},
    ),
    Fact(
        "routing, plain", ROUTED.format("log(student[y]) > log(W[y])"), codes=("OPD501",),
        prints=("not guaranteed (counterexample at one state)", "guaranteed on routed tokens"),
        zero=lambda m: raised(m, "teacher", False),
        large=lambda m: raised(m, "student", False),
    ),
]  # fmt: skip


def grown(m: Method) -> float:
    z = start = SMALL_T + 0.5 * B.random(9)
    for _ in range(60):
        z = z - (3.0 * at_B(m, z)).clamp(-0.5, 0.5)
    return float(exact.state_kl(z, SMALL_T).sum() / exact.state_kl(start, SMALL_T).sum())


def gained(m: Method) -> float:
    z = SMALL_T.clone()
    for _ in range(60):
        z = z - 3.0 * at_B(m, z)
    return float(inside(z) - inside(SMALL_T))


def values(m: Method) -> float:
    batch = opdsl.Batch.from_logits(
        SMALL_S[None].requires_grad_(), {"W": SMALL_T[None]}, tokens=torch.tensor([[0]]),
        mask=torch.tensor([[True]]),
    )  # fmt: skip
    return abs(float(m.reference(batch).loss)) + float(
        torch.as_tensor(m.reference(batch).grad_logits).norm()
    )


def _per_token() -> Tensor:
    lengths = A.mask_BT.sum(1)

    def objective(z: Tensor) -> Tensor:
        lp, lq = exact.log_probability(A, z), exact.log_probability(A, TEACHER)
        return (lp.exp() * (lp - lq) / lengths).sum()

    return exact.gradient(objective, STUDENT)


PER_TOKEN = _per_token()
