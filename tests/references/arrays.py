"""A batch as plain float64 arrays, and the gradients that every reference is made of.

Nothing here comes from the compiler: the formulas are those of the papers, the gradients of
log-softmax by hand. Shapes: B sequences, T positions, V vocabulary; sums over tokens run over the
mask. Logit gradients are those of the loss, not of the step.
"""

from __future__ import annotations

import numpy as np


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


class Arrays:
    """What a reference reads: p, q and their logarithms [B, T, V], the tokens, the mask, outcomes.

    `x` has the fields of `support.batches.Inputs`; `sources` names the policy of every row.
    """

    def __init__(self, x, teacher: str = "T"):
        mask = np.asarray(x.mask_BT, dtype=np.float64)
        self.rows = np.flatnonzero(mask.sum(1) > 0)  # an empty response is no sequence
        self.size = mask.shape[0]

        def rows(value) -> np.ndarray:
            return np.asarray(value, dtype=np.float64)[self.rows]

        self.z, self.m = rows(x.student_BTV), rows(mask)
        self.y = np.asarray(x.tokens_BT)[self.rows]
        self.lp = log_softmax(self.z)
        self.p = np.exp(self.lp)
        self.teachers = {k: log_softmax(rows(v)) for k, v in x.teachers.items()}
        self.lq = self.teachers[teacher]
        self.q = np.exp(self.lq)
        self.l0 = log_softmax(rows(x.initial_BTV))
        self.mu, self.R = rows(x.rollout_BT), rows(x.outcome_B)
        self.group = np.asarray(x.group_B)[self.rows]
        self.step = int(x.step)
        self.source = [x.prompt[i].get("@source", "student") for i in self.rows]
        self.length = self.m.sum(1)
        self.position = np.cumsum(self.m, 1) - 1
        self.B, self.T, self.V = self.z.shape

    # -- reading ---------------------------------------------------------------------------------

    def at_y(self, x: np.ndarray) -> np.ndarray:
        """[B, T, V] at the sampled tokens."""
        return np.take_along_axis(x, self.y[..., None], 2)[..., 0]

    @property
    def ey(self) -> np.ndarray:
        return np.eye(self.V)[self.y]

    @property
    def r(self) -> np.ndarray:
        """log q(y) − log p(y) with the student as it is now."""
        return self.at_y(self.lq) - self.at_y(self.lp)

    @property
    def r_mu(self) -> np.ndarray:
        """log q(y) − log μ(y), μ the policy that sampled."""
        return self.at_y(self.lq) - self.mu

    def tokens(self, x: np.ndarray) -> np.ndarray:
        """The values at valid tokens, flat."""
        return x[self.m > 0]

    def mean_t(self, x: np.ndarray) -> np.ndarray:
        """Mean over each response [B]."""
        return (x * self.m).sum(1) / self.length

    def group_sum(self, x: np.ndarray) -> np.ndarray:
        """[B]: the sum over the prompt's rollouts."""
        return np.array([x[self.group == g].sum() for g in self.group])

    def group_mean(self, x: np.ndarray) -> np.ndarray:
        return self.group_sum(x) / self.group_sum(np.ones(self.B))

    def top(self, lx: np.ndarray, k: int) -> np.ndarray:
        """[B, T, V]: whether an entry is among the k most likely."""
        order = np.argsort(-lx, -1, kind="stable")[..., : min(k, self.V)]
        out = np.zeros_like(lx, dtype=bool)
        np.put_along_axis(out, order, True, 2)
        return out

    # -- dividing --------------------------------------------------------------------------------

    def mean(self, value, grad, w=1.0, keep=None):
        """(Σ w·value / N, its gradient). N: valid tokens, or Σ keep where a gate is given."""
        n = ((1.0 if keep is None else keep) * self.m).sum()
        return self._weighted(value, grad, w * self.m / n if n else 0 * self.m)

    def by_sequence(self, value, grad, w=1.0):
        """Mean over each response, then over the sequences."""
        return self._weighted(value, grad, w * self.m / self.length[:, None] / self.B)

    def _weighted(self, value, grad, c):
        out = np.zeros((self.size, self.T, self.V))  # rows that were left out have no gradient
        out[self.rows] = c[..., None] * grad
        return float((c * value).sum()), out

    # -- losses per token: (value [B, T], gradient in the logits [B, T, V]) ---------------------------

    def through(self, d: np.ndarray) -> np.ndarray:
        """The logit gradient of a value whose derivative in p(v) is d (up to a constant over v)."""
        return self.p * (d - (self.p * d).sum(-1, keepdims=True))

    def score(self, a: np.ndarray):
        """−a log p(y), a frozen."""
        return -a * self.at_y(self.lp), -a[..., None] * (self.ey - self.p)

    def reverse(self, lq: np.ndarray):
        """KL(p ‖ q) over the vocabulary."""
        d = self.lp - lq
        return (self.p * d).sum(-1), self.through(d)

    def forward(self, lq: np.ndarray):
        """KL(q ‖ p) over the vocabulary."""
        q = np.exp(lq)
        return (q * (lq - self.lp)).sum(-1), self.p - q

    def forward_raw(self, s: np.ndarray):
        """Σ_{v ∈ S} q log(q / p), raw probabilities."""
        q = np.where(s, self.q, 0)
        return (q * (self.lq - self.lp)).sum(-1), self.p * q.sum(-1, keepdims=True) - q

    def inside(self, s: np.ndarray, lx: np.ndarray) -> np.ndarray:
        """log of x rescaled to 1 on S; −inf outside."""
        lx = np.where(s, lx, -np.inf)
        top = lx.max(-1, keepdims=True)
        return lx - top - np.log(np.exp(lx - top).sum(-1, keepdims=True))

    def forward_inside(self, s: np.ndarray):
        """KL(q̂ ‖ p̂), both rescaled to 1 on S."""
        lq, lp = self.inside(s, self.lq), self.inside(s, self.lp)
        q, p = np.exp(lq), np.exp(lp)
        gap = np.where(s, lq, 0) - np.where(s, lp, 0)
        return (q * gap).sum(-1), p - q

    def jsd(self, lq: np.ndarray, beta: float = 0.5):
        """β KL(q ‖ m) + (1 − β) KL(p ‖ m), m = β q + (1 − β) p."""
        q = np.exp(lq)
        lm = np.log(beta * q + (1 - beta) * self.p)
        value = (beta * q * (lq - lm) + (1 - beta) * self.p * (self.lp - lm)).sum(-1)
        return value, self.through((1 - beta) * (self.lp - lm))

    def jsd_inside(self, s: np.ndarray):
        """The same at β = ½ on S, both rescaled to 1 on it."""
        lq, lp = self.inside(s, self.lq), self.inside(s, self.lp)
        q, p = np.exp(lq), np.exp(lp)
        lm = np.log(np.where(s, (p + q) / 2, 1))
        d = 0.5 * np.where(s, np.where(s, lp, 0) - lm, 0)
        value = (0.5 * q * (np.where(s, lq, 0) - lm)).sum(-1) + (p * d).sum(-1)
        return value, p * (d - (p * d).sum(-1, keepdims=True))

    def binned(self, s: np.ndarray, reverse: bool = True):
        """KL(p ‖ q), or KL(q ‖ p), on S with one entry for the rest."""
        rest_p = np.where(s, 0, self.p).sum(-1)
        rest_q = np.where(s, 0, self.q).sum(-1)
        none = rest_p <= 0
        lr = np.log(np.where(none, 1, rest_p)) - np.log(np.where(none, 1, rest_q))
        l = np.where(s, self.lp - self.lq, lr[..., None])
        if reverse:
            value = np.where(s, self.p * (self.lp - self.lq), 0).sum(-1) + rest_p * lr
            return value, self.through(l)
        value = -np.where(s, self.q * (self.lp - self.lq), 0).sum(-1) - rest_q * lr
        ratio = np.exp(-lr)[..., None]  # rest_q / rest_p
        return value, self.p - np.where(s, self.q, self.p * ratio)
