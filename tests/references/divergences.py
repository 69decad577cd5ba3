"""Independent references of specs/divergences: (loss, logit gradient [B, T, V]) by hand, and the
gradient on golden rows where a method has them."""

from __future__ import annotations

import numpy as np
from references.arrays import Arrays
from references.losses import added, log_softmax, scaled

# ---- alpha-beta divergences (arXiv 2505.04560, ghwang-s/abkd), q with exponent α, p with β ----------


def abkd(x, alpha: float = 0.5, beta: float = 0.5):
    """−1/(αβ) Σ [q^α p^β − α/(α+β) q^(α+β) − β/(α+β) p^(α+β)]."""
    a = Arrays(x)
    return a.mean(*a.ab(alpha, beta))


def abkd_alpha0(x, beta: float = 0.5):
    """α → 0: 1/β² Σ [p^β log(p^β / q^β) − p^β + q^β]."""
    a = Arrays(x)
    p, q, gap = a.p**beta, a.q**beta, a.lp - a.lq
    value = (p * beta * gap - p + q).sum(-1) / beta**2
    return a.mean(value, a.through(a.p ** (beta - 1) * gap))


def abkd_alpha0_released(x, beta: float = 0.5):
    """The same with the code's prefactor 1/β."""
    value, grad = abkd_alpha0(x, beta)
    return beta * value, beta * grad


def abkd_beta0(x, alpha: float = 0.5):
    """β → 0: 1/α² Σ [q^α log(q^α / p^α) − q^α + p^α]."""
    a = Arrays(x)
    p, q = a.p**alpha, a.q**alpha
    value = (q * alpha * (a.lq - a.lp) - q + p).sum(-1) / alpha**2
    return a.mean(value, a.through((p - q) / a.p / alpha))


def abkd_beta0_released(x, alpha: float = 0.5):
    """The same with the code's prefactor 1/α."""
    value, grad = abkd_beta0(x, alpha)
    return alpha * value, alpha * grad


def abkd_opposite(x, alpha: float = 0.5):
    """β → −α: 1/α² Σ [log(p^α / q^α) + q^α / p^α − 1]."""
    a = Arrays(x)
    u = np.exp(alpha * (a.lq - a.lp))
    value = (alpha * (a.lp - a.lq) + u - 1).sum(-1) / alpha**2
    return a.mean(value, a.through((1 - u) / a.p / alpha))


def abkd_log_square(x):
    """α = β = 0: ½ Σ (log q − log p)²."""
    a = Arrays(x)
    gap = a.lp - a.lq
    return a.mean(0.5 * (gap**2).sum(-1), a.through(gap / a.p))


def power_divergence(x, alpha: float = 5.0):
    """The divergence with the policy-gradient weight q^α − p^α of PowerOPD (arXiv 2606.17199):
    Σ p^(α+1)/(α+1) − p q^α + α/(α+1) q^(α+1)."""
    a = Arrays(x)
    n = alpha + 1
    value = (a.p**n / n - a.p * a.q**alpha + alpha / n * a.q**n).sum(-1)
    return a.mean(value, a.through(a.p**alpha - a.q**alpha))


# ---- both directions -------------------------------------------------------------------------------


def _both(a, forward, reverse):
    return added(scaled(forward, a.forward(a.lq)), scaled(reverse, a.reverse(a.lq)))


def mixed_kl(x, beta: float = 0.5):
    """β KL(q ‖ p) + (1 − β) KL(p ‖ q) (EasyOPD's "generalized JSD")."""
    a = Arrays(x)
    return a.mean(*_both(a, beta, 1 - beta))


def jeffreys(x):
    """KL(q ‖ p) + KL(p ‖ q)."""
    a = Arrays(x)
    return a.mean(*_both(a, 1.0, 1.0))


def _akl(x, within, sign: int, first: bool):
    """Shares by the gap Σ|q − p|, frozen, over a part of the vocabulary sorted by q and the rest."""
    a = Arrays(x)
    order = np.argsort(sign * a.q, -1)
    inside = within(np.cumsum(np.take_along_axis(a.q, order, 2), -1))
    if first:
        inside[..., 0] = True
    part = np.zeros_like(inside)
    np.put_along_axis(part, order, inside, 2)
    gap = np.abs(a.q - a.p)
    share = (gap * part).sum(-1) / gap.sum(-1)
    return a, share


def akl(x, cut: float = 0.5):
    """g_h/(g_h + g_t) KL(q ‖ p) + g_t/(g_h + g_t) KL(p ‖ q); head: sorted by q downwards while the
    cumulative mass is at most ½, and the first entry (arXiv 2404.02657, wutaiqiang/LLM_KD_AKL)."""
    a, head = _akl(x, lambda mass: mass <= cut, -1, first=True)
    return a.mean(*_both(a, head, 1 - head))


def akl_ascending(x, cut: float = 0.5):
    """Tail: sorted upwards while the cumulative mass is at most ½ (criterions of ToDi and DSKD),
    1 − cut where the head is to hold another share."""
    a, tail = _akl(x, lambda mass: mass <= 1 - cut, 1, first=False)
    return a.mean(*_both(a, 1 - tail, tail))


def todi(x, tau: float = 2.0, kd_rate: float = 0.5):
    """½ CE + ½ Σ [s q log(q/p) + (1 − s) p log(p/q)], s = σ(log q − log p) frozen, both at
    temperature 2 without τ² (arXiv 2505.16297, jungseongryong/ToDi)."""
    a = Arrays(x)
    b = a.tempered(tau)
    gap = b.lq - b.lp
    s = 1 / (1 + np.exp(-gap))
    value = (s * b.q * gap - (1 - s) * b.p * gap).sum(-1)
    grad = b.through(-s * b.q / b.p + (1 - s) * (1 - gap)) / tau
    return a.mean(*added(scaled(kd_rate, (value, grad)), scaled(1 - kd_rate, a.nll())))


def selectkd(x, k: int = 5, rest: float = 0.01):
    """KL(q ‖ p) where the student's argmax is in the teacher's top 5, else 0.01 of it
    (arXiv 2510.24021)."""
    a = Arrays(x)
    accepted = (a.top(a.lp, 1) & a.top(a.lq, k)).any(-1)
    return a.mean(*a.forward(a.lq), w=np.where(accepted, 1, rest))


def hpd(x):
    """k = sg[p (log q − log p)]; the label weighs k(y), + q(y) where k(y) > 0, + q(y) again where
    also a negative v ~ p has k(v) < 0; that negative weighs min(0, k(v)) unless it is the label.
    The mean over the negative (arXiv 2604.20244, zwhong714/Hybrid-Policy-Distillation)."""
    a = Arrays(x)
    k = a.p * (a.lq - a.lp)
    label, q = a.at_y(k), a.at_y(a.q)
    worse = np.where(k < 0, a.p, 0).sum(-1)
    label = label + np.where(label > 0, q * (1 + worse), 0)
    negative = a.p * np.minimum(k, 0)
    return a.mean(*a.candidates(np.where(a.ey > 0, label[..., None], negative)))


# ---- targets that hold the student -----------------------------------------------------------------


def taid(x):
    """KL(target ‖ p), target = softmax((1 − t) sg z_p + t z_q), t from 0.4 to 1 (2501.16937)."""
    a = Arrays(x)
    t = a.ramp(0.4, 1.0)
    return a.mean(*a.forward(log_softmax((1 - t) * a.lp + t * a.lq)))


def _veto(a):
    beta = a.ramp(0.8, 0.0)
    return beta, log_softmax(a.lq + beta * a.lp)


def veto_forward(x):
    """KL(Q ‖ p), Q ∝ q p^β frozen, β = 0.8 (1 − i/N) (arXiv 2601.07155)."""
    a = Arrays(x)
    return a.mean(*a.forward(_veto(a)[1]))


def veto_forward_attached(x):
    """The same with the gradient through Q."""
    a = Arrays(x)
    beta, target = _veto(a)
    value, grad = a.forward(target)
    q, gap = np.exp(target), target - a.lp
    return a.mean(value, grad + beta * q * (gap - value[..., None]))


def veto_reverse(x):
    """KL(p ‖ Q): the log-ratio is log q − (1 − β) log p up to a constant."""
    a = Arrays(x)
    return a.mean(*a.reverse(_veto(a)[1]))


# ---- skewed KLs (arXiv 2402.03898, jongwooko/distillm; 2503.07067, distillm-2) ---------------------


def _with_text(x, loss, coef: float):
    a, golden = Arrays(x), Arrays(x.golden)
    value, grad = a.mean(*loss(a))
    text = golden.mean(*golden.nll(), w=coef)
    return value + text[0], grad, text[1]


def distillm_skl(x, alpha: float = 0.1, lm_coef: float = 1.0):
    """KL(q ‖ αq + (1 − α)p) attached, + the likelihood of golden text."""
    return _with_text(x, lambda a: a.skew_forward(alpha), lm_coef)


def distillm_srkl(x, alpha: float = 0.1, lm_coef: float = 1.0):
    """KL(p ‖ (1 − α)q + αp) attached, + the likelihood of golden text."""
    return _with_text(x, lambda a: a.skew_reverse(alpha), lm_coef)


def _pairs(a, alpha_t, alpha_s, beta):
    """Σ over pairs of (2 − β) SKL(teacher's text) + β SRKL(student's text), over the pairs."""
    parts = (
        scaled(2 * (2 - beta) * a.drawn("T"), a.skew_forward(alpha_t)),
        scaled(2 * beta * a.drawn("start"), a.skew_reverse(alpha_s, attached=False)),
    )
    return a.by_sequence(*added(*parts))


def distillm2_released(x, alpha: float = 0.1):
    """β = 1 and both α fixed, as the switches of the code stand."""
    return _pairs(Arrays(x), alpha, alpha, 1.0)


def distillm2(x, alpha: float = 0.1):
    """α = clip(1 − (1 − α0) m / (q̄ − p̄), 0.01, α0), q̄ and p̄ the exponentials of the mean
    log-probabilities, m the batch's mean gap of the same kind of text; β = 1 + ½ min(1, 2 i/N)."""
    a = Arrays(x)
    gap = np.exp(a.mean_t(a.at_y(a.lq))) - np.exp(a.mean_t(a.ly))

    def adapted(gap, kind):
        mine = a.drawn(kind)[:, 0]
        usual = (gap * mine).sum() / max(mine.sum(), 1)
        return np.clip(1 - (1 - alpha) * usual / (gap + 1e-5), 0.01, alpha)[:, None]

    return _pairs(a, adapted(gap, "T"), adapted(-gap, "start"), a.ramp(1.0, 1.5, a.steps / 2))


SOURCES = {
    "distillm2": ("T", "start", "start"),
    "distillm2_released": ("T", "start", "start"),
}
