"""Independent references of specs/foundations: (loss, logit gradient [B, T, V]) by hand."""

from __future__ import annotations

import numpy as np
from references.arrays import Arrays
from references.losses import added, plus, scaled


def seq_kd(x):
    """−1/N Σ log p(y) on the teacher's text (arXiv 1606.07947)."""
    a = Arrays(x)
    return a.mean(*a.nll())


def supervised_kd(x):
    """1/N Σ KL(q ‖ p) on given text (arXiv 1503.02531)."""
    a = Arrays(x)
    return a.mean(*a.forward(a.lq))


def supervised_kd_lm(x, kd_ratio: float = 0.5):
    """(1 − kd_ratio) LM + kd_ratio KL(q ‖ p) (microsoft/LMOps, minillm/finetune.py)."""
    a = Arrays(x)
    return a.mean(*added(scaled(kd_ratio, a.forward(a.lq)), scaled(1 - kd_ratio, a.nll())))


def imitkd(x):
    """1/N Σ KL(q ‖ p) on student and given text (arXiv 2009.07253)."""
    return supervised_kd(x)


def f_distill_kl(x):
    """KL(q ‖ p) on teacher samples (arXiv 2307.15190, MANGA-UOFA/fdistill)."""
    return supervised_kd(x)


def f_distill_rkl(x):
    """KL(p ‖ q) on student samples."""
    a = Arrays(x)
    return a.mean(*a.reverse(a.lq))


def f_distill_tv(x):
    """½ TVD on student samples + ½ TVD on teacher samples, TVD = ½ Σ|p − q|, each half over its
    own tokens."""
    a = Arrays(x)
    return plus(*(a.mean(*a.tv(), w=0.5 * k, keep=k) for k in _halves(a)))


def f_distill_js(x, beta: float = 0.5):
    """β KL(p ‖ m) on student samples + (1 − β) KL(q ‖ m) on the teacher's, m = β p + (1 − β) q."""
    a = Arrays(x)
    own, theirs = _halves(a)
    m = beta * a.p + (1 - beta) * a.q
    lm = np.log(m)
    value = (a.p * (a.lp - lm)).sum(-1)
    near = value, a.through(a.lp - lm - beta * a.p / m)
    far = (a.q * (a.lq - lm)).sum(-1), a.through(-beta * a.q / m)
    return plus(
        a.mean(*near, w=beta * own, keep=own), a.mean(*far, w=(1 - beta) * theirs, keep=theirs)
    )


def _halves(a):
    return a.drawn("student"), a.drawn("T")


def gkd_distillm(x):
    """JSD with the teacher at 0.1 (jongwooko/distillm, its `js` with lam 0.9 on the student)."""
    a = Arrays(x)
    return a.mean(*a.jsd(a.lq, 0.1))


def minillm_paper(x):
    """w KL(p ‖ q) at the state and w R_{t+1} log p(y), R the mean of the later log-ratios,
    w = p/μ of the token, μ the mixed sampler; + the likelihood of golden text (arXiv 2306.08543).
    """
    a, golden = Arrays(x), Arrays(x.golden)
    future = a.later(a.returns(a.r)) / np.maximum(a.length[:, None] - a.position - 1, 1)
    own = a.mean(*a.reverse(a.lq), w=a.rho)
    text = golden.mean(*golden.nll())
    value, grad = plus(own, a.mean(*a.score(future), w=a.rho))
    return value + text[0], grad, text[1]


def minillm_released(x, gamma: float = 0.95, kd_ratio: float = 0.5):
    """KL(p ‖ q) on drawn rows; there too PPO(0.2) on the whitened Σ γ^k r / (tokens left),
    r = (log q − log p) / 0.5 within ±100; on given text (1 − kd_ratio) LM + kd_ratio KL(q ‖ p);
    every part over its own tokens (LMOps minillm, losses.py and reward.py)."""
    a = Arrays(x)
    own, text = a.drawn("blend"), a.drawn("data")
    r = np.clip(a.r / 0.5, -100, 100)
    back = a.returns(r, gamma) / np.maximum(a.length[:, None] - a.position, 1)
    here = back[(a.m * own) > 0]
    adv = (back - here.mean()) / np.sqrt(here.var() + 1e-8)
    given = added(scaled(kd_ratio, a.forward(a.lq)), scaled(1 - kd_ratio, a.nll()))
    return plus(
        a.mean(*a.reverse(a.lq), w=own, keep=own),
        a.mean(*a.ppo(adv), w=own, keep=own),
        a.mean(*given, w=text, keep=text),
    )


def minillm_trl(x):
    """KL(p ‖ q) of the step and its own sampled log-ratio, γ = 0 (TRL experimental/minillm)."""
    a = Arrays(x)
    return a.mean(*added(a.reverse(a.lq), a.score(a.r)))


def skd(x):
    """KL(q ‖ p), mean over sequences (arXiv 2410.11325, google-research speculative_kd)."""
    a = Arrays(x)
    return a.by_sequence(*a.forward(a.lq))


def skd_jsd(x, beta: float = 0.5):
    """Its `jsd` as named: teacher weight β."""
    a = Arrays(x)
    return a.by_sequence(*a.jsd(a.lq, beta))


def skd_jsd_released(x):
    """Its `jsd` as coded: ½ KL(m ‖ p) + ½ KL(m ‖ q), m the even mixture."""
    a = Arrays(x)
    m = (a.p + a.q) / 2
    lm = np.log(m)
    value = (m * (lm - (a.lp + a.lq) / 2)).sum(-1)
    d = 0.5 * (lm + 1 - (a.lp + a.lq) / 2) - 0.5 * m / a.p
    return a.by_sequence(value, a.through(d))


def skd_reverse(x):
    """Its `reverse_kl`."""
    a = Arrays(x)
    return a.by_sequence(*a.reverse(a.lq))


def gkd_forward(x):
    """KL(q ‖ p), GKD at β = 0 (arXiv 2306.13649, TRL gkd)."""
    return supervised_kd(x)


def gkd_reverse(x):
    """KL(p ‖ q), GKD at β = 1."""
    return f_distill_rkl(x)


SOURCES = {
    "f_distill_tv": ("student", "T"),
    "f_distill_js": ("student", "T", "T"),
    "minillm_released": ("blend", "data", "blend"),
}
