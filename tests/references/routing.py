"""Independent references of specs/routing: (loss, logit gradient [B, T, V]) by hand."""

from __future__ import annotations

import numpy as np
from references.arrays import Arrays
from references.losses import added, plus, scaled


def _aopd(x, k: int, tau: float, loss: str):
    a = Arrays(x)
    s = a.top(a.lq, k)
    imitated = np.exp(a.at_y(a.lq)) - np.exp(a.ly) <= tau
    local = a.forward_inside(s) if loss == "forward" else a.jsd_inside(s)
    return plus(a.by_sequence(*a.score(a.r), w=~imitated), a.by_sequence(*local, w=imitated))


def aopd(x, k: int = 32, tau: float = 0.0):
    """1/|y| Σ (1 − G) PG + G KL(q̂ ‖ p̂) on the teacher's top k, G = 1[q(y) − p(y) ≤ τ]
    (arXiv 2605.06387)."""
    return _aopd(x, k, tau, "forward")


def aopd_jsd(x, k: int = 32, tau: float = 0.0):
    """The same with the Jensen-Shannon divergence."""
    return _aopd(x, k, tau, "jsd")


def tgpo(x, coef: float = 1.0):
    """GRPO with clip .2 plus w CE on the teacher's own token, w → 0 by step 200 (2605.13230)."""
    a = Arrays(x)
    lead = a.advantage()
    best = a.top(a.lq, 1)
    w = coef * max(1 - a.step / 200, 0)
    ce = -np.where(best, a.lp, 0).sum(-1), a.p - best
    return plus(a.mean(*a.score(lead), w=a.clipped(lead)), a.mean(*ce, w=w))


def dopd(x, k: int = 128, far: float = 0.5, sure: float = 0.5):
    """Four routes by |log q⁺ − log p⁺| and by which of them likes y better (arXiv 2606.30626)."""
    a = Arrays(x)
    lown = a.teachers["own"]
    lead = a.at_y(a.lq) - a.at_y(lown)
    gap = np.abs(lead)
    kept, close = gap <= np.quantile(a.tokens(gap), 0.95), gap <= far
    firm = a.q.max(-1) >= sure
    return plus(
        a.mean(*a.binned(a.top(a.lq, k)), w=0.6 * (kept & close & firm)),
        a.mean(*a.reverse(lown), w=0.3 * (kept & close & ~firm)),
        a.mean(*a.jsd(a.lq), w=kept & ~close & (lead >= 0)),
        a.mean(*a.reverse(lown), w=0.6 * (kept & ~close & (lead < 0))),
    )


# ---- counterfactual routing ------------------------------------------------------------------------


def _routed(x, k=32, reach=1e-3, cap=5.0, toward="deficit", strength="score", centred=True,
            otherwise="proportional"):  # fmt: skip
    """−A log p(y); where A + KL(p ‖ q) < 0 and a candidate v ≠ y with q > p ≥ reach exists:
    m (log p(y) − Σ ρ log p); where none exists: only the logit of y moves (theory §9)."""
    a = Arrays(x)
    top, y = a.top(a.lq, k), a.ey > 0
    kl, _ = a.binned(top | y)
    adv = a.r_mu
    n = adv + kl * centred < 0
    c = (top | y) & ~y & (a.q > a.p) & (a.p >= reach)
    excess = {"deficit": a.q - a.p, "uniform": np.ones_like(a.p),
              "gain": a.p * np.maximum(a.lq - a.lp + kl[..., None], 0)}[toward]  # fmt: skip
    share = np.where(c, excess, 0)
    total = share.sum(-1, keepdims=True)
    found = total[..., 0] > 0
    rho = share / np.where(total > 0, total, 1)
    m = np.minimum(cap, -adv) if strength == "score" else np.maximum(
        np.exp(a.ly) - np.exp(a.at_y(a.lq)), 0
    )  # fmt: skip
    moved = a.candidates(m[..., None] * (rho - a.ey))
    alone = a.candidates(adv[..., None] * (a.ey - 1 / a.V))
    if otherwise == "local":
        alone = a.binned(top | y, reverse=False)
    parts = (scaled(~n, a.score(adv)), scaled(n & found, moved), scaled(n & ~found, alone))
    return a.mean(*added(*parts))


def cr_opd(x):
    return _routed(x)


def cr_opd_bounded(x):
    return _routed(x, strength="excess")


def cr_opd_uniform(x):
    return _routed(x, toward="uniform")


def cr_opd_reachable(x):
    return _routed(x, toward="gain")


def cr_opd_raw(x):
    return _routed(x, centred=False)


def cr_opd_local(x):
    return _routed(x, otherwise="local")
