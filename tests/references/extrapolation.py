"""Independent references of specs/extrapolation: (loss, logit gradient [B, T, V]) by hand."""

from __future__ import annotations

import numpy as np
from references.arrays import Arrays
from references.losses import added, log_softmax, scaled


def _g(x, reach, base: str = "initial"):
    """−A log p(y) min(p/μ, 5), A = λ (log q − log b) − (log p − log b)."""
    a = Arrays(x)
    b = a.of(base)
    adv = reach(a) * (a.of("T") - b) - (a.ly - b)
    return a.mean(*a.score(adv), w=np.minimum(a.rho, 5))


def g_opd(x, lam: float = 1.0):
    """λ = 1 (arXiv 2602.12125, RUCBM/G-OPD)."""
    return _g(x, lambda a: lam)


def exopd(x):
    """λ = 1.25."""
    return _g(x, lambda a: 1.25)


def exopd_corrected(x):
    """λ = 1.25, b the teacher's own base."""
    return _g(x, lambda a: 1.25, "base")


def reopd(x, gamma: float = 0.25):
    """λ_t = 1 + γ q(y_t) (arXiv 2608.11698)."""
    return _g(x, lambda a: 1 + gamma * np.exp(a.of("T")))


def sg_opd(x, far: float = 1.8):
    """λ = 1.8 where log q − log p agrees in sign with the verifier, else 1 (2606.09304)."""
    return _g(x, lambda a: np.where((a.r > 0) == (a.wide(a.R == 1) > 0), far, 1.0))


def compass_opd(x, alpha: float = 1.0):
    """A = (log T − log R) − α (log p − log π_0) (arXiv 2609.10154)."""
    a = Arrays(x)
    adv = a.of("T") - a.of("R") - alpha * (a.ly - a.of("initial"))
    return a.mean(*a.score(adv))


def direct_opd(x, k: int = 16, anchor: float = 0.1):
    """Scores p (log T − log T_before) of the student's top k, + anchor KL(p ‖ π_0) (2607.05394)."""
    a = Arrays(x)
    c = np.where(a.top(a.lp, k), a.p * (a.lq - a.teachers["before"]), 0)
    return a.mean(*added(a.candidates(c), scaled(anchor, a.reverse(a.l0))))


def w2s_opd(x, alpha: float = 1.0):
    """KL(p ‖ softmax(z_base + α (z⁺ − z⁻))) (arXiv 2607.26246)."""
    a = Arrays(x, "plus")
    shift = a.lq - a.teachers["minus"]
    return a.mean(*a.reverse(log_softmax(a.l0 + alpha * shift)))


def tilted_target(x, alpha: float = 1.0):
    """KL(p ‖ target), target ∝ q exp(α (log π⁺ − log π⁻)) (AlignDistil, arXiv 2503.02832)."""
    a = Arrays(x)
    reward = a.teachers["plus"] - a.teachers["minus"]
    return a.mean(*a.reverse(log_softmax(a.lq + alpha * reward)))
