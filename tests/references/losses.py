"""Losses of one token and their logit gradients by hand: (value [B, T], gradient [B, T, V]).

The student p is a softmax of the logits, the teacher q is fixed. A loss with derivative d(v) in
p(v) has the logit gradient p (d − Σ p d). A score with a frozen coefficient c has −c ∇ log p; its
value is −c log p, also where the coefficient is a ratio (no surrogate of a ratio is differentiated
anywhere, so a PPO ratio enters as the number it is).
"""

from __future__ import annotations

from copy import copy

import numpy as np


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def entropy(lx: np.ndarray) -> np.ndarray:
    return -(np.exp(lx) * lx).sum(-1)


def kl(lx: np.ndarray, ly: np.ndarray) -> np.ndarray:
    """KL(x ‖ y) over the vocabulary."""
    return (np.exp(lx) * (lx - ly)).sum(-1)


def plus(*parts):
    """The sum of losses that were divided already."""
    return sum(v for v, _ in parts), sum(g for _, g in parts)


def scaled(c, loss):
    """c times a token loss; c a number, [B, 1] or [B, T]."""
    c = np.asarray(c, dtype=np.float64)
    return c * loss[0], (c[..., None] if c.ndim else c) * loss[1]


def added(*parts):
    """The sum of token losses."""
    return sum(v for v, _ in parts), sum(g for _, g in parts)


class Losses:
    """Mixed into `Arrays`, which has z, lp, p, lq, q, y."""

    # -- sampled tokens and candidates -------------------------------------------------------------

    def through(self, d: np.ndarray) -> np.ndarray:
        """The logit gradient of a value whose derivative in p(v) is d (up to a constant over v)."""
        return self.p * (d - (self.p * d).sum(-1, keepdims=True))

    def score(self, a: np.ndarray):
        """−a log p(y), a frozen."""
        return -a * self.at_y(self.lp), -a[..., None] * (self.ey - self.p)

    def nll(self):
        """−log p(y)."""
        return self.score(np.ones_like(self.m))

    def candidates(self, c: np.ndarray):
        """−Σ_v c(v) log p(v), c frozen, 0 outside its set."""
        return -(c * self.lp).sum(-1), self.p * c.sum(-1, keepdims=True) - c

    def k2(self):
        """½ (log p(y) − log q(y))²."""
        gap = self.at_y(self.lp) - self.at_y(self.lq)
        return 0.5 * gap**2, gap[..., None] * (self.ey - self.p)

    def k3(self):
        """u − 1 − log u, u = q(y) / p(y)."""
        log_u = self.at_y(self.lq) - self.at_y(self.lp)
        u = np.exp(log_u)
        return u - 1 - log_u, (1 - u)[..., None] * (self.ey - self.p)

    # -- the whole vocabulary ----------------------------------------------------------------------

    def tempered(self, tau: float):
        """The same arrays with both sides at temperature τ; its gradients still lack 1/τ."""
        other = copy(self)
        other.lp, other.lq = log_softmax(self.lp / tau), log_softmax(self.lq / tau)
        other.p, other.q = np.exp(other.lp), np.exp(other.lq)
        return other

    def reverse(self, lq: np.ndarray):
        """KL(p ‖ q)."""
        d = self.lp - lq
        return (self.p * d).sum(-1), self.through(d)

    def forward(self, lq: np.ndarray):
        """KL(q ‖ p)."""
        q = np.exp(lq)
        return (q * (lq - self.lp)).sum(-1), self.p - q

    def jsd(self, lq: np.ndarray, beta: float = 0.5):
        """β KL(q ‖ m) + (1 − β) KL(p ‖ m), m = β q + (1 − β) p."""
        q = np.exp(lq)
        lm = np.log(beta * q + (1 - beta) * self.p)
        value = (beta * q * (lq - lm) + (1 - beta) * self.p * (self.lp - lm)).sum(-1)
        return value, self.through((1 - beta) * (self.lp - lm))

    def skew_forward(self, alpha):
        """KL(q ‖ m), m = α q + (1 − α) p, the mixture attached. α: a number or [B, 1]."""
        a = np.asarray(alpha, dtype=np.float64)[..., None]
        m = a * self.q + (1 - a) * self.p
        return (self.q * (self.lq - np.log(m))).sum(-1), self.through(-(1 - a) * self.q / m)

    def skew_reverse(self, alpha, attached: bool = True):
        """KL(p ‖ m), m = (1 − α) q + α p; detached: the p inside the mixture is frozen."""
        a = np.asarray(alpha, dtype=np.float64)[..., None]
        m = (1 - a) * self.q + a * self.p
        gap = self.lp - np.log(m)
        d = gap - a * self.p / m if attached else gap
        return (self.p * gap).sum(-1), self.through(d)

    def tv(self):
        """½ Σ |p − q|."""
        gap = self.p - self.q
        return 0.5 * np.abs(gap).sum(-1), self.through(0.5 * np.sign(gap))

    def ab(self, alpha: float, beta: float):
        """−1/(αβ) Σ [q^α p^β − α/(α+β) q^(α+β) − β/(α+β) p^(α+β)]."""
        s = alpha + beta
        p, q = self.p, self.q
        value = -(q**alpha * p**beta - (alpha * q**s + beta * p**s) / s).sum(-1) / (alpha * beta)
        return value, self.through(-(q**alpha * p ** (beta - 1) - p ** (s - 1)) / alpha)

    # -- a set S of the vocabulary: boolean [B, T, V] ----------------------------------------------

    def forward_raw(self, s: np.ndarray):
        """Σ_{v ∈ S} q log(q / p), raw probabilities."""
        q = np.where(s, self.q, 0)
        return (q * (self.lq - self.lp)).sum(-1), self.p * q.sum(-1, keepdims=True) - q

    def reverse_raw(self, s: np.ndarray, held: bool = False):
        """Σ_{v ∈ S} p log(p / q), raw; held: the inner log p has no gradient."""
        gap = np.where(s, self.lp - self.lq, 0)
        return (self.p * gap).sum(-1), self.through(gap if held else gap + s)

    def inside(self, s: np.ndarray, lx: np.ndarray) -> np.ndarray:
        """log of x rescaled to 1 on S; −inf outside."""
        lx = np.where(s, lx, -np.inf)
        top = np.where(s.any(-1, keepdims=True), lx.max(-1, keepdims=True), 0)
        total = np.exp(lx - top).sum(-1, keepdims=True)
        return lx - top - np.log(np.where(total > 0, total, 1))

    def forward_inside(self, s: np.ndarray):
        """KL(q̂ ‖ p̂), both rescaled to 1 on S."""
        lq, lp = self.inside(s, self.lq), self.inside(s, self.lp)
        q, p = np.exp(lq), np.exp(lp)
        gap = np.where(s, lq, 0) - np.where(s, lp, 0)
        return (q * gap).sum(-1), p - q

    def reverse_inside(self, s: np.ndarray):
        """KL(p̂ ‖ q̂), both rescaled to 1 on S; 0 where S is empty."""
        lq, lp = self.inside(s, self.lq), self.inside(s, self.lp)
        p = np.exp(lp)
        d = np.where(s, lp, 0) - np.where(s, lq, 0)
        value = (p * d).sum(-1)
        return value, p * (d - value[..., None])

    def jsd_inside(self, s: np.ndarray, beta: float = 0.5):
        """β KL(q̂ ‖ m) + (1 − β) KL(p̂ ‖ m), m = β q̂ + (1 − β) p̂, both rescaled to 1 on S."""
        lq, lp = self.inside(s, self.lq), self.inside(s, self.lp)
        q, p = np.exp(lq), np.exp(lp)
        lm = np.log(np.where(s, beta * q + (1 - beta) * p, 1))
        d = (1 - beta) * np.where(s, np.where(s, lp, 0) - lm, 0)
        value = (beta * q * (np.where(s, lq, 0) - lm)).sum(-1) + (p * d).sum(-1)
        return value, p * (d - (p * d).sum(-1, keepdims=True))

    def _rest(self, s: np.ndarray):
        """(mass of p, mass of q) outside S, and where nothing is left outside."""
        rest_p, rest_q = (np.where(s, 0, x).sum(-1) for x in (self.p, self.q))
        none = s.all(-1)
        return np.where(none, 1, rest_p), np.where(none, 1, rest_q), none

    def binned(self, s: np.ndarray, reverse: bool = True):
        """KL(p ‖ q), or KL(q ‖ p), on S with one entry for the rest."""
        rest_p, rest_q, none = self._rest(s)
        lr = np.log(rest_p / rest_q)
        if reverse:
            l = np.where(s, self.lp - self.lq, lr[..., None])
            value = np.where(s, self.p * (self.lp - self.lq), 0).sum(-1)
            return value + np.where(none, 0, rest_p * lr), self.through(l)
        value = -np.where(s, self.q * (self.lp - self.lq), 0).sum(-1)
        ratio = (rest_q / rest_p)[..., None]
        grad = self.p - np.where(s, self.q, self.p * ratio)
        return value - np.where(none, 0, rest_q * lr), grad

    def jsd_binned(self, s: np.ndarray, beta: float = 0.5):
        """β KL(q ‖ m) + (1 − β) KL(p ‖ m) on S with one entry for the rest."""
        rest_p, rest_q, none = self._rest(s)

        def parts(p, q):
            lm = np.log(beta * q + (1 - beta) * p)
            d = (1 - beta) * (np.log(p) - lm)
            return beta * q * (np.log(q) - lm) + p * d, d

        value, d = parts(self.p, self.q)
        rest, dr = parts(rest_p, rest_q)
        d = np.where(s, d, dr[..., None])
        return np.where(s, value, 0).sum(-1) + np.where(none, 0, rest), self.through(d)
