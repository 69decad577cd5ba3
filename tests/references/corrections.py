"""Independent references of specs/corrections: shapes of the sampled signal, ratios to the sampler,
the policy-gradient weights of divergences. (loss, logit gradient [B, T, V]), weights held fixed.
"""

from __future__ import annotations

import numpy as np
from references.arrays import Arrays
from references.losses import plus


def _pg(x, weight):
    """−1/N Σ A log p(y), A a function of u = q(y) / p(y), frozen."""
    a = Arrays(x)
    return a.mean(*a.score(weight(np.exp(a.r))))


# ---- shapes of the log-ratio ---------------------------------------------------------------------


def clip_opd(x, bound: float = 5.0):
    """A = clip(log u, −5, 5): mode `clip` of PowerOPD's code (arXiv 2606.17199)."""
    return _pg(x, lambda u: np.clip(np.log(u), -bound, bound))


def softlog_opd(x):
    """A = sign(d) log(1 + |d|), d = log q(y) − log μ(y) (arXiv 2607.13399)."""
    a = Arrays(x)
    return a.mean(*a.score(np.sign(a.r_mu) * np.log1p(np.abs(a.r_mu))))


def tanh_opd(x, scale: float = 5.0):
    """A = tanh(log u / 5): mode `tanh` of PowerOPD's code."""
    return _pg(x, lambda u: np.tanh(np.log(u) / scale))


def _powers(x, alpha: float):
    a = Arrays(x)
    return a.mean(*a.score(np.exp(alpha * a.at_y(a.lq)) - np.exp(alpha * a.ly)))


def power_opd(x, alpha: float = 5.0):
    """A = q(y)^α − p(y)^α, α = 5 (arXiv 2606.17199, EIT-NLP/PowerOPD)."""
    return _powers(x, alpha)


def prob_diff_opd(x):
    """A = q(y) − p(y): mode `prob_diff`."""
    return _powers(x, 1.0)


def sqrt_diff_opd(x):
    """A = √q(y) − √p(y): mode `sqrt_diff`."""
    return _powers(x, 0.5)


# ---- weights of divergences: D = E_p[f(u)], A = −f + u f' (OPD+, arXiv 2606.01039) ------------------


def opd_plus_fkl(x):
    """KL(q ‖ p): f = u log u, A = u, here less its mean 1."""
    return _pg(x, lambda u: u - 1)


def opd_plus_tv(x):
    """½|u − 1|: A = ½ sign(u − 1)."""
    return _pg(x, lambda u: 0.5 * np.sign(u - 1))


def opd_plus_jsd(x, beta: float = 0.5):
    """JSD with teacher weight β: A = (1 − β) log(β u + 1 − β)."""
    return _pg(x, lambda u: (1 - beta) * np.log(beta * u + 1 - beta))


def opd_plus_skew(x, alpha: float = 0.1):
    """KL(q ‖ αq + (1 − α)p): A = (1 − α) u / (α u + 1 − α)."""
    return _pg(x, lambda u: (1 - alpha) * u / (alpha * u + 1 - alpha))


def opd_plus_skew_reverse(x, alpha: float = 0.1):
    """KL(p ‖ m), m/p = (1 − α) u + α, attached: A = log(m/p) − (1 − α) u / (m/p)."""

    def weight(u):
        m = (1 - alpha) * u + alpha
        return np.log(m) - (1 - alpha) * u / m

    return _pg(x, weight)


def skew_reward(x, alpha: float = 0.1):
    """The same with the mixture detached: A = log((1 − α) u + α) (arXiv 2503.07067)."""
    return _pg(x, lambda u: np.log((1 - alpha) * u + alpha))


# ---- estimators ----------------------------------------------------------------------------------


def k2_opd(x):
    """½ (log p(y) − log q(y))², differentiated (Schulman's k2)."""
    a = Arrays(x)
    return a.mean(*a.k2())


def k3_plus(x):
    """The value of k3 with the gradient of k2 (verl's k3+)."""
    a = Arrays(x)
    return a.mean(a.k3()[0], a.k2()[1])


# ---- ratios to the sampler -----------------------------------------------------------------------


def tis_opd(x, cap: float = 2.0, coef: float = 1.0):
    """min(p/μ, 2) times the log-ratio (slime, verl: truncated importance sampling)."""
    a = Arrays(x)
    return a.mean(*a.score(coef * a.r), w=np.minimum(a.rho, cap))


def icepop_opd(x, coef: float = 1.0):
    """ρ = p/μ inside [0.5, 5], else 0; A = log q − log p (verl's rollout correction)."""
    a = Arrays(x)
    return a.mean(*a.score(coef * a.r), w=a.rho * ((a.rho >= 0.5) & (a.rho <= 5)))


def async_opd(x, coef: float = 1.0):
    """p/μ · sg(log q − log p) on stale rollouts (AsyncOPD, arXiv 2606.24143)."""
    a = Arrays(x)
    return a.mean(*a.score(coef * a.r), w=a.rho)


def async_forward_kl(x):
    """KL(q ‖ p) at the states of stale rollouts, no ratio (arXiv 2606.24143)."""
    a = Arrays(x)
    return a.mean(*a.forward(a.lq))


def lightning_opd(x):
    """A = log q_cached(y) − log p(y) on stored rollouts (arXiv 2604.13010)."""
    return _pg(x, np.log)


def lightning_opd_ratio(x, cap: float = 2.0):
    """The same times min(p/π_0, 2), π_0 having drawn the text."""
    a = Arrays(x)
    return a.mean(*a.score(a.r), w=np.minimum(np.exp(a.ly - a.of("initial")), cap))


def rlad(x, alpha: float = 0.5, worth: float = 1.0):
    """GRPO with r = (p/μ)^α (p/q)^(1 − α) inside the clip of 0.2 (RLAD/TRRD, arXiv 2602.22495)."""
    a = Arrays(x)
    adv = worth * a.advantage()
    ratio = np.exp(alpha * (a.ly - a.mu) + (1 - alpha) * -a.r)
    return a.mean(*a.score(adv), w=ratio * np.where(adv > 0, ratio < 1.2, ratio > 0.8))


# ---- anchors and mixtures ------------------------------------------------------------------------


def stable_opd(x, coef: float = 0.01):
    """Log-ratio on the student's rows, cross-entropy on golden ones, + coef KL(p ‖ π_0)
    (arXiv 2604.08527)."""
    a = Arrays(x)
    return plus(
        a.mean(*a.score(a.r), w=a.drawn("student")),
        a.mean(*a.nll(), w=a.drawn("golden")),
        a.mean(*a.reverse(a.l0), w=coef),
    )


def saf_opd(x, keep: float = 0.2, bound: float = 5.0, coef: float = 0.1):
    """A^GRPO + β(s) γ(s) · sparse bound·tanh(d/bound), PPO clip (arXiv 2607.29209)."""
    a = Arrays(x)
    d = a.r_mu
    sparse = a.rank(np.abs(d)) >= 1 - keep
    pace = min(a.step / 50, 1) * np.clip(1 - (a.step - 150) / 150, 0, 1)
    adv = a.advantage() + coef * pace * sparse * bound * np.tanh(d / bound)
    return a.mean(*a.ppo(adv))


SOURCES = {"stable_opd": ("student", "golden")}
