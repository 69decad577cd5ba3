"""The oracle against what is written by hand here, and against finite differences.

The oracle judges every emitted path, so it is checked on its own: each definition of the standard
library, each credit, baseline, aggregation and tail rule has a second spelling below, in plain
PyTorch, that knows nothing of the compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support import TOLERANCE, batches, generate, relative, toy
from torch import Tensor

import opdsl
from opdsl.ir.interpret import Evaluator, dense64
from opdsl.meaning.node import Node

X = batches.draw(11, B=6, T=5, V=9, group=2, critics=("Value",))
LP = torch.log_softmax(X.student_BTV, -1)
LT = torch.log_softmax(X.teachers["T"], -1)
LI = torch.log_softmax(X.initial_BTV, -1)
MASK = X.mask_BT
LENGTH = MASK.sum(1)
POSITION = MASK.cumsum(1) - 1


def at_y(x_BTV: Tensor) -> Tensor:
    return x_BTV.gather(2, X.tokens_BT[..., None]).squeeze(-1)


def rows(x_BT: Tensor) -> list[Tensor]:
    """One vector of response tokens per sequence."""
    return [x_BT[b][MASK[b]] for b in range(len(MASK))]


def spread(xs: list[Tensor]) -> Tensor:
    out = torch.zeros(MASK.shape, dtype=torch.float64)
    for b, x in enumerate(xs):
        out[b][MASK[b]] = x.to(torch.float64)
    return out


def oracle(m) -> tuple[float, Tensor]:
    found = m.reference(batches.logits(X)[0])
    return found.loss, found.grad_logits


def check(m, by_hand: Callable[[Tensor], Tensor], tolerance: float = TOLERANCE["identity"]) -> None:
    """by_hand: student logits [B, T, V] -> loss per token [B, T] (summed over response tokens)."""
    z = X.student_BTV.clone().requires_grad_()
    value = (by_hand(z) * MASK).sum()
    (grad,) = torch.autograd.grad(value, z)
    loss, got = oracle(m)
    assert relative(loss, value.detach()) <= tolerance
    assert relative(got, grad) <= tolerance


def lp(z: Tensor) -> Tensor:
    return torch.log_softmax(z, -1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)


def mixed(weight: float, a: Tensor, b: Tensor) -> Tensor:
    return (weight * a.exp() + (1 - weight) * b.exp()).log()


DIRECT: dict[str, Callable[[Tensor], Tensor]] = {
    "KL(student || T)": lambda s: kl(s, LT),
    "KL(T || student)": lambda s: kl(LT, s),
    "JSD(T || student, beta = 0.3)": lambda s: (
        0.3 * kl(LT, mixed(0.3, LT, s)) + 0.7 * kl(s, mixed(0.3, LT, s))
    ),
    "JSD(student || T, beta = 0.3)": lambda s: (
        0.3 * kl(s, mixed(0.3, s, LT)) + 0.7 * kl(LT, mixed(0.3, s, LT))
    ),
    "skew_KL(student || T, alpha = 0.2)": lambda s: kl(s, mixed(0.2, s, LT)),
    "skew_KL(T || student, alpha = 0.2)": lambda s: kl(LT, mixed(0.2, LT, s)),
    "TV(student || T)": lambda s: 0.5 * (s.exp() - LT.exp()).abs().sum(-1),
    "hellinger(student || T)": lambda s: 1 - (0.5 * (s + LT)).exp().sum(-1),
    "chi2(student || T)": lambda s: (2 * s - LT).exp().sum(-1) - 1,
    "power(student || T)": lambda s: 0.5 * (s.exp() - LT.exp()).square().sum(-1),
    "alpha_beta(student || T, alpha = 0.4, beta = 0.5)": lambda s: (
        -(
            (0.4 * s + 0.5 * LT).exp().sum(-1)
            - 0.4 / 0.9 * (0.9 * s).exp().sum(-1)
            - 0.5 / 0.9 * (0.9 * LT).exp().sum(-1)
        )
        / 0.2
    ),
    "KL(tempered(student, 2) || tempered(T, 2))": lambda s: kl(
        torch.log_softmax(s / 2, -1), torch.log_softmax(LT / 2, -1)
    ),
    "KL(0.9 * T + 0.1 * student || student)": lambda s: kl(mixed(0.9, LT, s), s),
    "KL(sg(0.9 * T + 0.1 * student) || student)": lambda s: kl(mixed(0.9, LT, s).detach(), s),
    "-H(student) + 0 * KL(student || T)": lambda s: (s.exp() * s).sum(-1),
    "k2(student, T)": lambda s: 0.5 * (at_y(s) - at_y(LT)) ** 2,
    "k3(student, T)": lambda s: (at_y(LT) - at_y(s)).exp() - 1 - (at_y(LT) - at_y(s)),
    "-log(student[y]) * sg(T[y])": lambda s: -at_y(s) * at_y(LT).exp(),
    "1 nats * overlap(T, student, k = 3)": lambda s: (
        s.exp().gather(-1, LT.topk(3, -1).indices).sum(-1)
    ),
}


@pytest.mark.parametrize("text", DIRECT)
def test_direct_losses(text: str) -> None:
    check(toy.loss(text), lambda z: DIRECT[text](lp(z)))


def pair(z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return lp(z).gather(-1, ids), LT.gather(-1, ids)


TOP = LT.topk(4, -1).indices


def binned(x: Tensor) -> Tensor:
    return torch.cat([x, torch.log1p(-x.exp().sum(-1, keepdim=True))], -1)


TAILS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "drop": lambda s, t: (s, t),
    "bin": lambda s, t: (binned(s), binned(t)),
    "renormalize": lambda s, t: (
        s - s.logsumexp(-1, keepdim=True),
        t - t.logsumexp(-1, keepdim=True),
    ),
}
SHAPES = {
    "KL(student || T)": kl,
    "KL(T || student)": lambda s, t: kl(t, s),
    "TV(student || T)": lambda s, t: 0.5 * (s.exp() - t.exp()).abs().sum(-1),
    "hellinger(student || T)": lambda s, t: (
        0.5 * ((0.5 * s).exp() - (0.5 * t).exp()).square().sum(-1)
    ),
    "JSD(student || T, beta = 0.4)": lambda s, t: (
        0.4 * kl(s, mixed(0.4, s, t)) + 0.6 * kl(t, mixed(0.4, s, t))
    ),
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("text", SHAPES)
def test_tails(text: str, tail: str) -> None:
    m = toy.loss(text, f"top(4, of = T, tail = {tail})")
    check(m, lambda z: SHAPES[text](*TAILS[tail](*pair(z, TOP))))


def test_detached_tail() -> None:
    def by_hand(z: Tensor) -> Tensor:
        s, t = pair(z, TOP)
        return (s.exp() * (s - t).detach()).sum(-1)

    check(toy.loss("KL(student || T)", "top(4, of = T, tail = detach)"), by_hand)


def test_sampled_tail() -> None:
    """The exact head; outside it the estimate body / π(y) with the slope of the body at y."""

    def by_hand(z: Tensor) -> Tensor:
        s, t = pair(z, TOP)
        inside = (X.tokens_BT[..., None] == TOP).any(-1)
        gap = at_y(lp(z)) - at_y(LT)
        score = (gap + 1).detach() * at_y(lp(z))
        tail = gap.detach() + score - score.detach()
        return kl(s, t) + torch.where(inside, 0.0, tail)

    check(toy.loss("KL(student || T)", "top(4, of = T, tail = sampled)"), by_hand)


def test_sets() -> None:
    union = toy.loss("KL(student || T)", "union(sampled, top(3, of = T), tail = bin)")

    def by_hand(z: Tensor) -> Tensor:
        inside = torch.zeros_like(z).scatter(-1, LT.topk(3, -1).indices, 1.0)
        inside = inside.scatter(-1, X.tokens_BT[..., None], 1.0).bool()
        s, t = lp(z), LT
        head = torch.where(inside, s.exp() * (s - t), 0.0).sum(-1)
        a = torch.where(inside, 0.0, s.exp()).sum(-1)
        b = torch.where(inside, 0.0, t.exp()).sum(-1)
        return head + a * (a / b).log()

    check(union, by_hand)
    nucleus = toy.loss("KL(student || T)", "top_p(0.6, of = T, tail = drop)")

    def by_mass(z: Tensor) -> Tensor:
        best, ids = LT.sort(-1, descending=True)
        before = best.exp().cumsum(-1) - best.exp()
        s, t = lp(z).gather(-1, ids), best
        return torch.where(before < 0.6, s.exp() * (s - t), 0.0).sum(-1)

    check(nucleus, by_mass)


# ---- rewards: credit, baseline, shape --------------------------------------------------------------

ROLLOUT = X.rollout_BT
R = at_y(LT) - ROLLOUT
V = X.values["Value"]


def backwards(r: Tensor, rate: float) -> Tensor:
    out, after = torch.zeros_like(r), torch.zeros((), dtype=r.dtype)
    for t in reversed(range(len(r))):
        out[t] = after = r[t] + rate * after
    return out


def gae(gamma: float, lam: float) -> Tensor:
    out = []
    for b, r in enumerate(rows(R)):
        value = V[b, :-1][MASK[b]]
        last = int(torch.nonzero(MASK[b]).max()) if len(r) else -1
        nxt = torch.cat([value[1:], V[b, last + 1 : last + 2]])
        out.append(backwards(r + gamma * nxt - value, gamma * lam))
    return spread(out)


CREDITS: dict[str, Callable[[], Tensor]] = {
    "immediate": lambda: R,
    "return_to_go": lambda: spread([backwards(r, 1.0) for r in rows(R)]),
    "discounted(gamma = 0.6)": lambda: spread([backwards(r, 0.6) for r in rows(R)]),
    "full_return": lambda: spread([r.sum().expand(len(r)) for r in rows(R)]),
    "future_only": lambda: spread([backwards(r, 1.0) - r for r in rows(R)]),
    "window(n = 2)": lambda: spread(
        [r + torch.cat([r[1:], r.new_zeros(1)])[: len(r)] for r in rows(R)]
    ),
    "gae(V = Value, gamma = 0.9, lam = 0.7)": lambda: gae(0.9, 0.7),
}


def score(advantage_BT: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: -advantage_BT * at_y(lp(z))


def credited(credit: str, more: str = "") -> object:
    return toy.method(
        "let Value : nats per token = critic(init = zero, lr = 0.01)\nsupport sampled\n"
        f"feedback reward logratio(T, rollout)\ncredit {credit}\n{more}"
    )


@pytest.mark.parametrize("credit", CREDITS)
def test_credits(credit: str) -> None:
    check(credited(credit), score(CREDITS[credit]()))


def others_mean(g_BT: Tensor, own: bool) -> Tensor:
    out = torch.zeros_like(g_BT)
    gs = rows(g_BT)
    for b, g in enumerate(gs):
        for i in range(len(g)):
            mates = [
                gs[o][i]
                for o in range(len(gs))
                if X.group_B[o] == X.group_B[b] and len(gs[o]) > i and (own or o != b)
            ]
            where = torch.nonzero(MASK[b]).flatten()[i]
            out[b, where] = torch.stack(mates).mean() if mates else 0.0
    return out


def position_mean(g_BT: Tensor) -> Tensor:
    out = torch.zeros_like(g_BT)
    for b, t in torch.nonzero(MASK).tolist():
        same = MASK & (POSITION[b, t] == POSITION)
        out[b, t] = g_BT[same].mean()
    return out


BASELINES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda g: torch.zeros_like(g),
    "kl_state": lambda g: -kl(LP, LT),
    "batch_mean": lambda g: g[MASK].mean().expand(g.shape),
    "leave_one_out": lambda g: others_mean(g, False),
    "group_mean": lambda g: others_mean(g, True),
    "position": position_mean,
    "value(V = Value)": lambda g: V[:, :-1],
}


@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines(baseline: str) -> None:
    g = CREDITS["return_to_go"]()
    check(credited(f"return_to_go(baseline = {baseline})"), score(g - BASELINES[baseline](g)))


REWARD_SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda r: r,
    "clip(-0.5, 1)": lambda r: r.clamp(-0.5, 1),
    "softlog": lambda r: r.sign() * r.abs().log1p(),
    "tanh(2)": lambda r: 2 * (r / 2).tanh(),
    "positive": lambda r: r.clamp_min(0),
    "negative": lambda r: r.clamp_max(0),
    "power(0.5)": lambda r: r.sign() * r.abs().sqrt(),
}


@pytest.mark.parametrize("shape", REWARD_SHAPES)
def test_shapes(shape: str) -> None:
    shaped = REWARD_SHAPES[shape](R)
    check(credited("return_to_go", f"shape {shape}"),
          score(spread([backwards(r, 1.0) for r in rows(shaped)])))  # fmt: skip


def test_whitening() -> None:
    g = R[MASK]
    white = (R - g.mean()) / (g.var(correction=0).sqrt() + 1e-8)
    defs = "def baseline_white(G : nats per token) : nats per token\n  = whiten(G)"
    m = toy.reward("logratio(T, rollout)", "immediate(baseline = white)", defs=defs)
    check(m, score(white))


def test_scores_route() -> None:
    m = toy.method(
        "support top(4, of = T, tail = drop)\nfeedback scores log(T[v]) - log(student[v])"
    )

    def by_hand(z: Tensor) -> Tensor:
        s, t = pair(z, TOP)
        return -((t - s).detach() * s).sum(-1)

    check(m, by_hand)


# ---- routing -----------------------------------------------------------------------------------------


def routed(z: Tensor, otherwise: Callable[[Tensor], Tensor]) -> Tensor:
    s = lp(z)
    p, q = s.detach().exp(), LT.exp()
    ids = torch.zeros_like(z).scatter(-1, LT.topk(4, -1).indices, 1.0)
    ids = ids.scatter(-1, X.tokens_BT[..., None], 1.0).bool()
    not_y = torch.ones_like(z).scatter(-1, X.tokens_BT[..., None], 0.0).bool()
    share = torch.where(ids & not_y & (q > p) & (p >= 0.05), q - p, 0.0)
    total = share.sum(-1, keepdim=True)
    rho = share / total.clamp_min(1e-300)
    strength = (-R).clamp_max(5.0)
    moved = strength * (at_y(s) - (rho * s).sum(-1))
    acts = (R + kl(LP, LT) < 0) & (total.squeeze(-1) > 0)
    plain = -R * at_y(s)
    rest = torch.where(R + kl(LP, LT) < 0, otherwise(z), plain)
    return torch.where(acts, moved, rest)


FALLBACKS: dict[str, Callable[[Tensor], Tensor]] = {
    "suppress": lambda z: -R * at_y(lp(z)),
    "drop": lambda z: torch.zeros_like(R),
    "proportional": lambda z: -R * (at_y(lp(z)) - lp(z).mean(-1)),
}


@pytest.mark.parametrize("otherwise", FALLBACKS)
def test_counterfactual_routing(otherwise: str) -> None:
    m = toy.method(
        f"""support union(sampled, top(4, of = T), tail = drop)
        feedback reward logratio(T, rollout)
        credit immediate
        routing counterfactual(when = A + sum(v in full: student[v] * (log(student[v]) - log(T[v]))) < 0,
          among = {{v in support: v != y and T[v] > student[v] and student[v] >= 0.05}},
          toward = T[v] - student[v], strength = min(5, -A), otherwise = {otherwise})"""
    )
    check(m, lambda z: routed(z, FALLBACKS[otherwise]))


@pytest.mark.parametrize("kind", FALLBACKS)
def test_plain_routings(kind: str) -> None:
    m = credited("immediate", f"routing {kind}")
    check(m, lambda z: torch.where(R < 0, FALLBACKS[kind](z), -R * at_y(lp(z))))


def test_local_routing() -> None:
    m = toy.method(
        "support sampled\nfeedback reward logratio(T, rollout)\ncredit immediate\n"
        "routing local(KL(T || student), top(4, of = T, tail = bin))"
    )
    check(
        m,
        lambda z: torch.where(
            R < 0, kl(binned(LT.gather(-1, TOP)), binned(pair(z, TOP)[0])), -R * at_y(lp(z))
        ),
    )


# ---- gates, weights, aggregation -----------------------------------------------------------------------

OUTCOME = X.outcome_B
FAILED = torch.stack([1 - OUTCOME[(X.group_B == g) & (LENGTH > 0)].max() for g in X.group_B])
ENTROPY_T = -(LT.exp() * LT).sum(-1)
ENTROPY_S = -(LP.exp() * LP).sum(-1)
SURPRISE = torch.stack([x.mean() if len(x) else x.sum() for x in rows(-at_y(LP))])
COUNTED = [b for b in range(len(MASK)) if LENGTH[b] > 0]


def group_softmax() -> Tensor:
    out = torch.zeros(len(MASK), dtype=torch.float64)
    for b in COUNTED:
        mates = [o for o in COUNTED if X.group_B[o] == X.group_B[b]]
        values = torch.stack([SURPRISE[o].exp() for o in mates])
        out[b] = torch.softmax(values, 0)[mates.index(b)]
    return out


FACTORS: dict[str, Callable[[], Tensor]] = {
    "gate position < 2": lambda: (POSITION < 2).double(),
    "gate hesitant(T, 1.8)": lambda: (ENTROPY_T > 1.8).double(),
    "gate confident(T, 1.8)": lambda: (ENTROPY_T <= 1.8).double(),
    "gate not special(y)": lambda: (~X.special_BT).double(),
    "gate passed()": lambda: (OUTCOME == 1).double()[:, None],
    "gate failed()": lambda: (OUTCOME < 1).double()[:, None],
    "gate all_failed()": lambda: FAILED[:, None],
    "gate early(3)": lambda: (POSITION < 3).double(),
    "gate if passed() then 0.5 else position < 1": lambda: torch.where(
        OUTCOME[:, None] == 1, 0.5, (POSITION < 1).double()
    ),
    'gate prompt.domain == "math"': lambda: torch.tensor(
        [float(p["domain"] == "math") for p in X.prompt], dtype=torch.float64
    )[:, None],
    "gate entropy(student) >= quantile(entropy(student), 0.5)": lambda: (
        torch.quantile(ENTROPY_S[MASK], 0.5) <= ENTROPY_S
    ).double(),
    "weight ratio(student, rollout)": lambda: (at_y(LP) - ROLLOUT).exp(),
    "weight truncated_ratio(student, rollout, cap = 1.1)": lambda: (at_y(LP) - ROLLOUT)
    .exp()
    .clamp_max(1.1),
    "weight softmax(i in group: perplexity(student))": lambda: group_softmax()[:, None],
    "weight 1 / length": lambda: 1 / LENGTH.clamp_min(1)[:, None].double(),
    "weight 1 + (position < 2)": lambda: 1 + (POSITION < 2).double(),
    "weight max(0, mean(i in others: outcome))": lambda: torch.stack(
        [
            torch.stack(
                [OUTCOME[o] for o in COUNTED if X.group_B[o] == X.group_B[b] and o != b]
                or [torch.zeros_like(OUTCOME[b])]
            ).mean()
            for b in range(len(MASK))
        ]
    )[:, None],
    "weight linear(1 -> 0.3 over 20 steps)": lambda: torch.tensor(1 - 0.7 * 3 / 20, dtype=torch.float64),
    "weight cosine(1 -> 0.3 over run)": lambda: torch.tensor(
        1 - 0.7 * 0.5 * (1 - math.cos(math.pi * 0.3)), dtype=torch.float64
    ),
    "weight exp(-0.2 * sum(t in sequence: abs(logratio(student, T))))": lambda: torch.stack(
        [(-0.2 * x.sum()).exp() for x in rows((at_y(LP) - at_y(LT)).abs())]
    )[:, None],
}  # fmt: skip


@pytest.mark.parametrize("factor", FACTORS)
def test_gates_and_weights(factor: str) -> None:
    w = FACTORS[factor]().to(torch.float64)
    check(toy.loss("KL(student || T)", more=factor), lambda z: kl(lp(z), LT) * w)


def test_ppo_clip() -> None:
    rho = (at_y(LP) - ROLLOUT).exp()
    keep = torch.where(R > 0, rho < 1.2, rho > 0.8)
    m = credited("immediate", "weight ppo_clip(student, rollout, eps = 0.2)")
    check(m, lambda z: -R * at_y(lp(z)) * torch.where(keep, rho, 0.0))


def test_live_weights_have_gradients() -> None:
    m = toy.loss("k2(student, T)", "sampled", "weight live(ratio(student, rollout))")
    check(m, lambda z: 0.5 * (at_y(lp(z)) - at_y(LT)) ** 2 * (at_y(lp(z)) - ROLLOUT).exp())
    coupled = toy.loss("k2(student, T)", "sampled", "weight live(1 / (1 + mean(-log(student[y]))))")
    check(
        coupled,
        lambda z: 0.5 * (at_y(lp(z)) - at_y(LT)) ** 2 / (1 - at_y(lp(z))[MASK].mean()),
    )


GATE = (ENTROPY_T > 1.8).double()
AGGREGATES: dict[str, Callable[[], Tensor]] = {
    "sum(over = tokens)": lambda: torch.tensor(1.0, dtype=torch.float64),
    "mean(over = tokens)": lambda: 1.0 / MASK.sum().double(),
    "mean(over = kept_tokens)": lambda: 1.0 / (GATE * MASK).sum(),
    "mean(over = sequences)": lambda: 1.0 / (LENGTH.clamp_min(1)[:, None].double() * len(COUNTED)),
    "mean(over = response_length)": lambda: 1.0 / LENGTH.clamp_min(1)[:, None].double(),
}


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_aggregates(aggregate: str) -> None:
    m = toy.loss("KL(student || T)", more=f"gate hesitant(T, 1.8)\naggregate {aggregate}")
    check(m, lambda z: kl(lp(z), LT) * GATE * AGGREGATES[aggregate]())


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_aggregates_beside_a_token_baseline(aggregate: str) -> None:
    """Counts of tokens and of sequences in one program stay apart."""
    gate = GATE if "kept" in aggregate else torch.ones_like(GATE)
    more = f"aggregate {aggregate}" + ("\ngate hesitant(T, 1.8)" if "kept" in aggregate else "")
    m = credited("immediate(baseline = batch_mean)", more)
    a = R - R[MASK].mean()
    check(m, lambda z: -a * at_y(lp(z)) * gate * AGGREGATES[aggregate]())


def test_regularizers() -> None:
    base = "support full\nfeedback loss KL(student || T)\naggregate mean(over = tokens)\n"
    n = 1.0 / MASK.sum().double()
    m = toy.method(base + "regularize 0.3 * KL(student || initial)")
    check(m, lambda z: (kl(lp(z), LT) + 0.3 * kl(lp(z), LI)) * n)
    m = toy.method(base + "regularize -0.3 * H(student)")
    check(m, lambda z: (kl(lp(z), LT) + 0.3 * (lp(z).exp() * lp(z)).sum(-1)) * n)
    m = toy.method(base + "regularize 0.3 * outcome")
    check(m, lambda z: (kl(lp(z), LT) - 0.3 * OUTCOME[:, None] * at_y(lp(z))) * n)
    m = toy.method(base + "regularize 0.3 * sft(data = golden)")
    loss, grad = oracle(m)
    golden = X.golden
    assert golden is not None
    g = torch.log_softmax(golden.student_BTV, -1).gather(2, golden.tokens_BT[..., None]).squeeze(-1)
    want = (kl(LP, LT) * MASK).sum() * n - 0.3 * g[golden.mask_BT].mean()
    assert relative(loss, want) <= TOLERANCE["identity"]
    check(toy.method(base), lambda z: kl(lp(z), LT) * n)
    assert relative(grad, oracle(toy.method(base))[1]) <= TOLERANCE["identity"]


def test_terms_add_up() -> None:
    m = toy.method(
        """term near { support sampled
                       feedback loss k2(student, T)
                       gate position < 2 }
           term far { support full
                      feedback loss KL(T || student)
                      weight 0.5 }
           weight near: 2
           gate far: not special(y)
           aggregate mean(over = kept_tokens)"""
    )
    first, second = (POSITION < 2).double(), (~X.special_BT).double()
    check(
        m,
        lambda z: (
            2 * 0.5 * (at_y(lp(z)) - at_y(LT)) ** 2 * first / (first * MASK).sum()
            + 0.5 * kl(LT, lp(z)) * second / (second * MASK).sum()
        ),
    )


def test_units_do_not_depend_on_the_spelling() -> None:
    """2 and 2 nats, a scaled declared quantity, a coefficient of one: numbers keep their kind."""
    both = toy.loss("1.5 * hellinger(student || T) + 2 * KL(student || T)")
    check(both, lambda z: 1.5 * DIRECT["hellinger(student || T)"](lp(z)) + 2 * kl(lp(z), LT))
    m = toy.method(
        """let two = 2
        support full
        feedback reward two * logratio(T, rollout) + 1 * outcome
        credit immediate
        routing counterfactual(when = student[y] > 2 * T[y], among = {v in full: T[v] > student[v]},
          toward = T[v] - student[v], strength = 2 nats * (student[y] - T[y]), otherwise = drop)"""
    )
    a = 2 * R + OUTCOME[:, None]

    def by_hand(z: Tensor) -> Tensor:
        s, p, q = lp(z), LP.exp(), LT.exp()
        share = (q - p).clamp_min(0)
        share = share.scatter(-1, X.tokens_BT[..., None], 0.0)
        rho = share / share.sum(-1, keepdim=True)
        moved = 2 * (at_y(p) - at_y(q)) * (at_y(s) - (rho * s).sum(-1))
        return torch.where(at_y(p) > 2 * at_y(q), moved, -a * at_y(s))

    check(m, by_hand)


def test_conditions_in_arithmetic_count_as_one_and_zero() -> None:
    m = toy.loss(
        "KL(student || T)",
        more="weight (position < 2) + 2 * (student[y] > 0.1) + sum(v in full: T[v] > 0.1)",
    )
    count = (
        (POSITION < 2).double()
        + 2 * (at_y(LP).exp() > 0.1).double()
        + (LT.exp() > 0.1).double().sum(-1)
    )
    check(m, lambda z: kl(lp(z), LT) * count)


# ---- finite differences ---------------------------------------------------------------------------------


class Frozen(Evaluator):
    """Evaluates at moved logits what `base` says is not frozen."""

    def __init__(self, batch, z_NV: Tensor, base: Evaluator):
        super().__init__(batch, z_NV)
        self.base = base

    def __call__(self, node: Node) -> Tensor:
        from opdsl.meaning.graph import nodes_below

        for n in nodes_below([node]):
            if n.id in self.memo:
                continue
            if n.op in ("sg", "quantile_b", "top", "top_p"):
                self.memo[n.id] = self.base.memo[n.id]
            else:
                args = [self.memo[a.id] for a in n.args]
                self.memo[n.id] = getattr(self, f"_{n.op}")(n, *args)
        return self.memo[node.id]  # type: ignore[return-value]


@pytest.mark.parametrize("which", [*range(3, 200, 8), "cr_opd", "minillm", "gkd", "entropy_aware"])
def test_finite_differences(which: int | str) -> None:
    """Central differences with every stop-gradient held at its value of the base point."""
    if isinstance(which, int):
        text = generate.spec(which)
        m, teachers, critics = generate.compiled(text.text), text.teachers, text.critics
    else:
        m, teachers, critics = opdsl.load(which), ("T",), ()
    x = batches.draw(
        7 + len(str(which)), B=3, T=3, V=7, teachers=teachers, critics=critics, group=3
    )
    batch, _ = batches.logits(x)
    from opdsl.emit.routed import add_routed

    batch = add_routed(batch, m.spec.routed)
    part = m.program.part("main")
    z = dense64(batch, "student")
    base = Evaluator(batch, z)
    base(part.total)
    oracle = m.reference(batch)
    step, n = 1e-5, len(z)
    got = torch.zeros_like(z)
    for i in range(z.numel()):
        values = []
        for sign in (1, -1):
            moved = z.clone().reshape(-1)
            moved[i] += sign * step
            out = Frozen(batch, moved.reshape(z.shape), base)(part.total)
            values.append(float((out if out.dim() else out.expand(n)).sum()))
        got.reshape(-1)[i] = (values[0] - values[1]) / (2 * step)
    want = oracle.grad_logits.reshape(-1, z.shape[1])[batch.place_N]
    assert relative(got, want) <= TOLERANCE["difference"]
