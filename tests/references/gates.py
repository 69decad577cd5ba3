"""Independent references of specs/gates.

Each function takes the arrays of a batch and gives (loss, logit gradient [B, T, V]), written from
the formula in its docstring (which names the source) with the gates and weights held fixed.
"""

from __future__ import annotations

import numpy as np
from references.arrays import Arrays
from references.losses import entropy, plus


def eopd(x, k: int = 16, tau: float = 0.8, alpha: float = 1.0):
    """1/N Σ { −A log p(y) + α 1[H(q) > τ] Σ_{v ∈ top-k(q)} q log(q/p) } (arXiv 2603.07079)."""
    a = Arrays(x)
    hesitant = entropy(a.lq) > tau
    return plus(a.mean(*a.score(a.r_mu)),
                a.mean(*a.forward_raw(a.top(a.lq, k)), w=alpha * hesitant))  # fmt: skip


def eopd_renormalized(x, k: int = 16, tau: float = 0.8, alpha: float = 1.0):
    """The same with both sides rescaled on the top k."""
    a = Arrays(x)
    hesitant = entropy(a.lq) > tau
    return plus(a.mean(*a.score(a.r_mu)),
                a.mean(*a.forward_inside(a.top(a.lq, k)), w=alpha * hesitant))  # fmt: skip


def reopold_a(x, lam: float = 0.3, beta: float = 0.2, turn: int = 500):
    """1/ΣM Σ ρ max(R, f) M, f = log λ/(1 − λ); M = 1[R ≥ f], from step `turn` on the share β of
    highest student entropy (arXiv 2603.11137)."""
    return _reopold(x, np.log(lam) / (1 - lam), beta, turn)


def reopold_b(x, lam: float = 0.3, beta: float = 0.2, turn: int = 500):
    """The same with f = log(λ/(1 − λ))."""
    return _reopold(x, np.log(lam / (1 - lam)), beta, turn)


def _reopold(x, floor: float, beta: float, turn: int):
    a = Arrays(x)
    h = entropy(a.lp)
    keep = a.r >= floor if a.step < turn else h >= np.quantile(a.tokens(h), 1 - beta)
    return a.mean(*a.score(np.maximum(a.r, floor)), w=keep * a.rho, keep=keep)


def paced(x, alpha: float = 1.0, beta: float = 1.0, turn: int = 100):
    """p̂^α (1 − p̂)^β times KL(q ‖ p), from step `turn` on KL(p ‖ q) (arXiv 2603.11178)."""
    a = Arrays(x)
    rate = a.group_mean(a.R == 1)
    loss = a.forward(a.lq) if a.step < turn else a.reverse(a.lq)
    return a.mean(*loss, w=(rate**alpha * (1 - rate) ** beta)[:, None])


def paced_released(x, temper: float = 1.0):
    """N softmax(R/β) over the batch, times JSD at ½."""
    a = Arrays(x)
    e = np.exp(a.R / temper)
    return a.mean(*a.jsd(a.lq), w=(a.B * e / e.sum())[:, None])


def tip(x, rho: float = 0.5):
    """KL(p ‖ q) where ĥ + δ̂ − ĥ δ̂ is in the top ρ, both scores min-max scaled (2604.14084)."""
    a = Arrays(x)
    kl, grad = a.reverse(a.lq)

    def scaled(u):
        v = a.tokens(u)
        return (u - v.min()) / (v.max() - v.min())

    h, d = scaled(entropy(a.lp)), scaled(kl)
    s = h + d - h * d
    keep = s >= np.quantile(a.tokens(s), 1 - rho) - 1e-12
    return a.mean(kl, grad, w=keep, keep=keep)


def ta_opd(x, k: int = 16, keep: float = 0.05):
    """KL(p ‖ q) where disagreement × q(top-k of p), each scaled by its 5 and 95 % quantiles, is in
    the top share (arXiv 2605.26844); scores within 1e-3 of the last one kept are kept as well."""
    a = Arrays(x)
    kl, grad = a.reverse(a.lq)

    def robust(u):
        low, high = np.quantile(a.tokens(u), [0.05, 0.95])
        return np.clip((u - low) / max(high - low, 1e-8), 0, 1)

    s = robust(kl) * robust(np.where(a.top(a.lp, k), a.q, 0).sum(-1))
    kept = s >= np.quantile(a.tokens(s), 1 - keep) - 1e-3
    return a.mean(kl, grad, w=kept, keep=kept)


def iw_opd(x, gamma: float = 0.5, eps: float = 1e-8):
    """w_t = 1 + γ (1 − Σ_{s<t} |A_s| / max(Σ_s |A_s|, ε)), A = log q − log μ (arXiv 2606.22600,
    TRL experimental/iw_opd)."""
    a = Arrays(x)
    size = np.abs(a.r_mu)
    spent = a.before(size) / np.maximum(a.sum_t(size), eps)[:, None]
    return a.mean(*a.score(a.r_mu), w=1 + gamma * (1 - spent))


def _fire(x, skip: float, alpha: float, beta: float):
    a = Arrays(x)
    likely = a.mean_t(a.at_y(a.lq))
    kept = likely >= np.quantile(likely, skip)
    hq, hp = entropy(a.lq), entropy(a.lp)
    w = (1 + alpha * (1 - hq / a.tokens(hq).max())) * (1 + beta * hp / a.tokens(hp).max())
    return a, kept[:, None] * w * a.clipped(a.r_mu)


def fire_opd(x, skip: float = 0.2, alpha: float = 1.0, beta: float = 1.0):
    """(1 + α(1 − H_q/max))(1 + β H_p/max), least likely fifth skipped, PPO clip; per trajectory
    (arXiv 2606.02684)."""
    a, w = _fire(x, skip, alpha, beta)
    return a.by_sequence(*a.score(a.r_mu), w=w)


def fire_opd_released(x, skip: float = 0.2, alpha: float = 1.0, beta: float = 1.0):
    """The same over all valid tokens, those of skipped rollouts included."""
    a, w = _fire(x, skip, alpha, beta)
    return a.mean(*a.score(a.r_mu), w=w)


def dial_opd(x, beta: float = 1.0, rho: float = 0.2):
    """Top max(1, round(ρT)) tokens of each response by |r|^{1−β} |q − p|^β (DIAL-OPD)."""
    a = Arrays(x)
    size = np.maximum(np.abs(a.r), 1e-9)
    s = size ** (1 - beta) * np.abs(np.exp(a.at_y(a.lq)) - np.exp(a.ly)) ** beta
    keep = np.zeros_like(a.m)
    for b in range(a.B):
        here = np.flatnonzero(a.m[b])
        n = max(1, int(np.floor(rho * len(here) + 0.5)))
        keep[b, here[np.argsort(-s[b, here])[:n]]] = 1
    return a.mean(*a.score(a.r), w=keep, keep=keep)


def prune_opd(x, k: int = 16, tau: float = 0.9, drop: float = 0.02, base: float = 0.0):
    """Σ_{v ∈ top-k(p)} p̃(v) log(q/p)(v), frozen, times clip(1 − drop Σ_{i≤t} bad_i, 0, 1) + base;
    bad: the two top-k sets share less than τ (arXiv 2605.07804)."""
    a = Arrays(x)
    own = a.top(a.lp, k)
    near = (own & a.top(a.lq, k)).sum(-1) / k
    w = np.clip(1 - drop * np.cumsum((near < tau) * a.m, 1), 0, 1) + base
    share = np.where(own, a.p, 0)
    c = share / share.sum(-1, keepdims=True) * (a.lq - a.lp)
    return a.mean(*a.candidates(c), w=w)


def _scope(x, temper: float, sign: float):
    a = Arrays(x)
    right = (a.R == 1).astype(float)

    def share(u, mine):
        return mine * u * a.group_sum(mine) / np.maximum(a.group_sum(mine * u), 1e-300)

    keep = share(np.exp(-sign * a.mean_t(a.ly) / temper), right)
    mend = share(np.exp(a.mean_t(a.at_y(a.lq)) / temper), 1 - right)
    return a, right, keep[:, None], mend[:, None]


def scope(x, temper: float = 1.0):
    """Correct: NLL × PPL_p^{1/τ}, wrong: OPD × PPL_q^{−1/τ}, normalised in the group (2604.10688)."""
    a, _, keep, mend = _scope(x, temper, 1.0)
    return plus(a.mean(*a.nll(), w=keep), a.mean(*a.score(a.r_mu), w=mend))


def scope_released(x, temper: float = 1.0):
    """PPL_p^{−1/τ} on the correct path, which is averaged over correct tokens."""
    a, right, keep, mend = _scope(x, temper, -1.0)
    kept = np.broadcast_to(right[:, None], a.m.shape)
    nll = a.mean(*a.nll(), w=keep, keep=kept)
    return plus(nll, a.mean(*a.score(a.r_mu), w=mend))


def prefix_opd(x, first: int = 1, growth: int = 256):
    """The log-ratio on the first `first + growth · step` tokens (arXiv 2602.15260)."""
    a = Arrays(x)
    keep = a.position < first + growth * a.step
    return a.mean(*a.score(a.r_mu), w=keep, keep=keep)


def esr(x, n: int = 100):
    """The log-ratio on the first n tokens (arXiv 2605.27028)."""
    a = Arrays(x)
    return a.mean(*a.score(a.r_mu), w=a.position < n, keep=a.position < n)


def ssopd(x, lam: float = 1.0):
    """λ 4 p̂ (1 − p̂) times the log-ratio (arXiv 2605.17497)."""
    a = Arrays(x)
    rate = a.group_mean(a.R == 1)
    return a.mean(*a.score(a.r_mu), w=(lam * 4 * rate * (1 - rate))[:, None])


def sdpg(x, coef: float = 1.0, up: float = 50, down: float = 150, end: float = 200):
    """REINFORCE on R − mean R plus trapezoid · 1[R > mean R] KL(p ‖ q) (arXiv 2606.04036)."""
    a = Arrays(x)
    lead = (a.R - a.group_mean(a.R))[:, None]
    height = min(a.step / up, 1) * np.clip((end - a.step) / (end - down), 0, 1)
    return plus(a.mean(*a.score(lead + 0 * a.m)),
                a.mean(*a.reverse(a.lq), w=coef * height * (lead > 0)))  # fmt: skip


def seed(x, beta: float = 1.0):
    """σ(β d) d as advantage, d the log-ratio (arXiv 2607.14777)."""
    a = Arrays(x)
    return a.mean(*a.score(a.r), w=1 / (1 + np.exp(-beta * a.r)))


def rg_opd(x, k: int = 50, delta: float = 0.0):
    """KL(p ‖ q) on the teacher's top k and a tail, for rollouts with A > 0 and L_q > L_p + δ or
    A ≤ 0 and L_q < L_p − δ, over their tokens (arXiv 2607.04037)."""
    a = Arrays(x)
    lead, gain = a.R - a.group_mean(a.R), (a.r * a.m).sum(1)
    keep = np.where(lead > 0, gain > delta, gain < -delta)[:, None] * np.ones_like(a.m)
    return a.mean(*a.binned(a.top(a.lq, k)), w=keep, keep=keep)


def distilled_rl(x, cap: float = 3.0):
    """q/μ clipped to [1/3, 3] over its geometric mean multiplies positive GRPO advantages only
    (arXiv 2607.17247)."""
    a = Arrays(x)
    lead = a.whitened(a.R)[:, None]
    size = np.clip(np.exp(a.r_mu), 1 / cap, cap)
    size = size / np.exp(a.mean_t(np.log(size)))[:, None]
    return a.mean(*a.score(lead + 0 * a.m), w=np.where(lead > 0, size, 1))


def sa_opd(x, wide: float = 0.9, flat: float = 0.5):
    """Tokens dropped where |log q − log p| is wide and |log q − log q∅| is small (2608.03632)."""
    a = Arrays(x)
    gap = np.abs(a.r)
    moved = np.abs(a.at_y(a.lq) - a.at_y(a.teachers["blind"]))
    lost = (gap > np.quantile(a.tokens(gap), wide)) & (moved < np.quantile(a.tokens(moved), flat))
    return a.mean(*a.score(a.r), w=~lost, keep=~lost)
