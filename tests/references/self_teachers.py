"""Independent references of specs/self: (loss, logit gradient [B, T, V]) by hand.

q is the same model with more (or less) in its context, or an average of it, always held fixed.
"""

from __future__ import annotations

import numpy as np
from references.arrays import Arrays
from references.losses import added, entropy, log_softmax, scaled

# ---- SDFT (arXiv 2601.19897) and SDPO (arXiv 2601.20802) -------------------------------------------


def sdft(x):
    """KL(p ‖ q)."""
    a = Arrays(x)
    return a.mean(*a.reverse(a.lq))


def sdft_trl(x, k: int = 100, alpha: float = 0.5):
    """min(p/μ, 2) JSD on the student's top 100, both rescaled; a mean per response (TRL
    experimental/sdft)."""
    a = Arrays(x)
    return a.by_sequence(*a.jsd_inside(a.top(a.lp, k), alpha), w=np.minimum(a.rho, 2))


def sdft_tinker(x, k: int = 20, skip: int = 3):
    """−Σ q̂ log p over the teacher's top 20, q̂ rescaled, the first 3 tokens left out
    (tinker-cookbook distillation/sdft)."""
    a = Arrays(x)
    target = np.exp(a.inside(a.top(a.lq, k), a.lq))
    return a.mean(*a.candidates(target), w=a.position >= skip)


def _sdpo(x, loss):
    a = Arrays(x)
    told = a.field("reprompted", "yes")
    return a.mean(*loss(a), w=told * np.minimum(a.rho, 2), keep=told)


def sdpo(x, k: int = 100, alpha: float = 0.5):
    """min(p/μ, 2) JSD on the student's top 100 with a tail, on rows that got feedback
    (lasgroup/SDPO)."""
    return _sdpo(x, lambda a: a.jsd_binned(a.top(a.lp, k), alpha))


def sdpo_rich(x):
    """α = 1: KL(p ‖ q) on the student's top 20 with a tail."""
    return _sdpo(x, lambda a: a.binned(a.top(a.lp, 20)))


def sdpo_trl(x):
    """min(p/μ, 2) sg[log p − log q] log p of the sampled token, a mean per response over all of
    them (TRL experimental/sdpo)."""
    a = Arrays(x)
    return a.by_sequence(*a.score(a.r), w=a.field("reprompted", "yes") * np.minimum(a.rho, 2))


# ---- OPSD (arXiv 2601.18734, siyan-zhao/OPSD) ------------------------------------------------------


def _tempered(x, tau: float, loss):
    a = Arrays(x)
    value, grad = loss(a.tempered(tau))
    return a.mean(value, grad / tau)


def opsd(x, beta: float = 0.5, tau: float = 1.1):
    """JSD(β) at temperature 1.1 on both sides."""
    return _tempered(x, tau, lambda b: b.jsd(b.lq, beta))


def opsd_ema(x, beta: float = 0.5, tau: float = 1.1):
    """The same towards an average of the student."""
    return opsd(x, beta, tau)


def opsd_topk(x, beta: float = 0.5, tau: float = 1.1, k: int = 50):
    """JSD on the teacher's top 50, the logits cut out before the softmax."""
    return _tempered(x, tau, lambda b: b.jsd_inside(b.top(b.lq, k), beta))


def opsd_clip(x, tau: float = 1.1, cap: float = 0.05):
    """Σ_v min(q log(q/p), 0.05) at temperature 1.1."""

    def capped(b):
        each = b.q * (b.lq - b.lp)
        return np.minimum(each, cap).sum(-1), b.through(np.where(each < cap, -b.q / b.p, 0))

    return _tempered(x, tau, capped)


def opsd_sampled(x):
    """A = log q(y) − log p(y): its optional sampled loss."""
    a = Arrays(x)
    return a.mean(*a.score(a.r))


# ---- context distillation --------------------------------------------------------------------------


def opsdc(x):
    """KL(p ‖ q), q under an instruction to be concise (arXiv 2603.05433)."""
    return sdft(x)


def nopd(x):
    """KL(p ‖ q), q reading the clean prompt (arXiv 2607.23125)."""
    return sdft(x)


def _opcd(a, k):
    return a.reverse_raw(a.top(a.lp, k))


def opcd(x, k: int = 256):
    """Σ_{top k of p} p (log p − log q) (arXiv 2602.12275, LMOps/opcd)."""
    a = Arrays(x)
    return a.mean(*_opcd(a, k))


def opcd_renormalized(x, k: int = 256):
    """With kl_renorm_topk: both rescaled on it."""
    a = Arrays(x)
    return a.mean(*a.reverse_inside(a.top(a.lp, k)))


def ctx_anchor(x, k: int = 256, anchor: float = 0.1):
    """OPCD + anchor KL(π_0 ‖ p) (arXiv 2606.11627)."""
    a = Arrays(x)
    return a.mean(*added(_opcd(a, k), scaled(anchor, a.forward(a.l0))))


def opsdl(x):
    """A = log q(y) − log μ(y), q reading the relevant passage alone (arXiv 2604.17535)."""
    a = Arrays(x)
    return a.mean(*a.score(a.r_mu))


def rubric_sd(x, beta: float = 0.5):
    """JSD(β) to oneself with a rubric (arXiv 2606.12507)."""
    a = Arrays(x)
    return a.mean(*a.jsd(a.lq, beta))


def rcsd(x):
    """KL(q ‖ p), q with a rubric (arXiv 2606.19327)."""
    a = Arrays(x)
    return a.mean(*a.forward(a.lq))


def rupi(x, tau: float = 1.0):
    """min(τ, KL(p ‖ q)) per token, mean over sequences (arXiv 2608.02948)."""
    a = Arrays(x)
    value, grad = a.reverse(a.lq)
    return a.by_sequence(np.minimum(value, tau), (value < tau)[..., None] * grad)


# ---- outcome advantages that the self-teacher bends ------------------------------------------------


def cepo(x, worth: float = 1.0, eps_w: float = 0.2):
    """PPO(A [(1 − λ) + λ clip((q⁺/q⁻)^sign(A), 1 ± ε)]), λ ½ → 0 in 25 steps (2605.19436)."""
    a = Arrays(x, "right")
    lam = a.ramp(0.5, 0.0, 25)
    tilt = np.exp(np.sign(a.advantage()) * (a.of("right") - a.of("wrong")))
    adv = a.advantage() * (1 - lam + lam * np.clip(tilt, 1 - eps_w, 1 + eps_w))
    return a.mean(*a.ppo(worth * adv))


def amr_sd(x, up: float = 0.2, down: float = 0.1, edge: float = 0.1, worth: float = 1.0):
    """PPO(A (1 + Δ)), Δ = 0.2 ReLU(d − edge) where A > 0, 0.1 ReLU(−d − edge) where A ≤ 0, at most
    1, fading over 200 steps (arXiv 2605.18529)."""
    a = Arrays(x)
    base, d = a.advantage(), a.r_mu
    push = np.where(base > 0, up * np.maximum(d - edge, 0), down * np.maximum(-d - edge, 0))
    adv = base * (1 + a.ramp(1.0, 0.0, 200) * np.minimum(push, 1))
    return a.mean(*a.ppo(worth * adv))


def antisd(x, lam: float = 0.5, level: float = 0.3, worth: float = 1.0):
    """PPO(A − λ 1[H(q) > level] ½ (softplus(d) − log 2)) (arXiv 2605.11609)."""
    a = Arrays(x)
    score = 0.5 * (np.logaddexp(0, a.r_mu) - np.log(2))
    return a.mean(*a.ppo(worth * a.advantage() - lam * (entropy(a.lq) > level) * score))


# ---- targets made of several models ----------------------------------------------------------------


def ad_opsd(x, tau: float = 1.0, rho: float = 0.2):
    """KL(p ‖ q); on the 20 % of a response with the highest H(p) towards ∝ (1 − w) q + w π_0,
    w = σ(p (log p − log q) / τ) per entry, frozen (arXiv 2607.10805)."""
    a = Arrays(x)
    w = 1 / (1 + np.exp(-a.p * (a.lp - a.lq) / tau))
    mixed = (1 - w) * a.q + w * np.exp(a.l0)
    blended = np.log(mixed / mixed.sum(-1, keepdims=True))
    hesitant = a.rank(entropy(a.lp)) >= 1 - rho
    target = np.where(hesitant[..., None], blended, a.lq)
    return a.mean(*a.reverse(target))


def beta_opsd(x, beta: float = 2.0):
    """A_t = Σ_{k ≥ t} log(target/μ)(y_k) less the others' mean, target ∝ π_0^(1 − 1/β) q^(1/β)
    (arXiv 2607.28582)."""
    a = Arrays(x)
    target = log_softmax((1 - 1 / beta) * a.l0 + a.lq / beta)
    return a.mean(*a.score(a.less_others(a.returns(a.at_y(target) - a.mu))))


def ar_opd(x, alpha: float = 0.5):
    """KL(p ‖ target), target ∝ q_partial (q_full / q_partial)^α (arXiv 2606.10385)."""
    a = Arrays(x, "part_view")
    residual = a.teachers["full_view"] - a.lq
    return a.mean(*a.reverse(log_softmax(a.lq + alpha * residual)))
