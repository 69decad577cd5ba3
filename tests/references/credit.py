"""Independent references of specs/credit: (loss, logit gradient [B, T, V]) by hand.

r_t is the log-ratio log q(y) − log μ(y) unless said otherwise; G_t its return.
"""

from __future__ import annotations

import numpy as np
from references.arrays import Arrays
from references.losses import added, kl


def _advantage(x, credit):
    a = Arrays(x)
    return a.mean(*a.score(credit(a)))


def sampled_opd(x, coef: float = 1.0):
    """A_t = r_t (tinker-cookbook, train_on_policy)."""
    return _advantage(x, lambda a: coef * a.r_mu)


def sampled_rtg(x, coef: float = 1.0):
    """A_t = Σ_{k ≥ t} r_k less the mean of the group's others at t (arXiv 2306.08543)."""
    return _advantage(x, lambda a: a.less_others(a.returns(coef * a.r_mu)))


def minillm(x):
    """KL(p ‖ q) at the state, and the return of the tokens after it less the others' mean on the
    sampled one (arXiv 2306.08543, appendix)."""
    a = Arrays(x)
    future = a.less_others(a.later(a.returns(a.r_mu)))
    return a.mean(*added(a.reverse(a.lq), a.score(future)))


def discounted_opd(x, gamma: float = 0.95, coef: float = 1.0):
    """A_t = Σ_{k ≥ t} γ^(k − t) r_k, summed over tokens (tinker-cookbook, kl_discount_factor)."""
    a = Arrays(x)
    return a.total(*a.score(a.returns(coef * a.r_mu, gamma)))


def full_return_opd(x, coef: float = 1.0):
    """A_t = Σ_k r_k, on every token: REINFORCE on the sequence (arXiv 2306.08543)."""
    return _advantage(x, lambda a: a.wide(a.sum_t(coef * a.r_mu)))


def rloo_opd(x, coef: float = 1.0):
    """The same less the mean of the group's other rollouts (arXiv 2402.14740)."""
    return _advantage(x, lambda a: a.less_others(a.wide(a.sum_t(coef * a.r_mu))))


def windowed_opd(x, n: int = 50, coef: float = 1.0):
    """A_t = Σ_{t ≤ k < t + n} r_k less the others' mean at t."""

    def credit(a):
        window = a.each(coef * a.r_mu, lambda v: [v[t : t + n].sum() for t in range(len(v))])
        return a.less_others(window)

    return _advantage(x, credit)


def gae_opd(x, lam: float = 0.95, coef: float = 1.0):
    """GAE with γ = 1 on log-ratio rewards (arXiv 2606.22793 as this library defines it)."""
    return _advantage(x, lambda a: a.gae(coef * a.r_mu, a.values["V"], 1.0, lam))


def gae_discounted(x, gamma: float = 0.99, lam: float = 0.95, coef: float = 1.0):
    """GAE(γ, λ) (arXiv 1506.02438) on log-ratio rewards."""
    return _advantage(x, lambda a: a.gae(coef * a.r_mu, a.values["V"], gamma, lam))


def gae_residual(x, lam: float = 0.95):
    """GAE with γ = 1 on r_t + κ_t − κ_{t+1}, κ = KL(p ‖ q): the own token's mean is in κ."""

    def credit(a):
        known = kl(a.lp, a.lq)
        return a.gae(a.r_mu + known - a.later(known), a.values["V"], 1.0, lam)

    return _advantage(x, credit)


def vopd(x):
    """A_t = r_t − V, V = −KL(p ‖ q) in closed form (arXiv 2605.07865)."""
    return _advantage(x, lambda a: a.r_mu + kl(a.lp, a.lq))


def vopd_topk(x, k: int = 16):
    """The same with V summed over the teacher's top k, raw probabilities."""

    def credit(a):
        return a.r_mu + np.where(a.top(a.lq, k), a.p * (a.lp - a.lq), 0).sum(-1)

    return _advantage(x, credit)


def ketchup(x, K: int = 8):
    """G_t = Q(s_t, y_t) − max_a Q(s_{t+K}, a), Q the teacher's log-probabilities, 0 past the end
    (arXiv 2504.19024)."""
    return _advantage(x, lambda a: a.at_y(a.lq) - a.later(a.lq.max(-1), K))


def oppo(x, edge: float = 0.05, reach: float = 5.0, weight: float = 1.0):
    """A_t = σ(ℓ_t + log λ_t) − σ(ℓ_t), ℓ_{t+1} = ℓ_t + log λ_t, log λ = log q(y) − log p(y) within
    ±reach, σ(ℓ_0) the group's pass rate kept off 0 and 1 (arXiv 2605.21851)."""

    def credit(a):
        prior = np.clip(a.group_mean(a.R), edge, 1 - edge)
        evidence = np.clip(a.r, -reach, reach)
        belief = a.wide(np.log(prior / (1 - prior))) + a.before(evidence)
        sigma = [1 / (1 + np.exp(-b)) for b in (belief + evidence, belief)]
        return weight * (sigma[0] - sigma[1])

    return _advantage(x, credit)
