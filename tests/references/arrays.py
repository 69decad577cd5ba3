"""A batch as plain float64 arrays: what every reference reads, sums over and divides by.

Nothing here comes from the compiler: the formulas are those of the papers and of their code, the
gradients are by hand (`losses`). Shapes: B sequences with at least one response token, T positions,
V vocabulary; sums over tokens run over the mask, holes in it are no tokens. Logit gradients are
those of the loss, not of the step.
"""

from __future__ import annotations

import numpy as np
from references.losses import Losses, log_softmax


class Arrays(Losses):
    """p, q and their logarithms [B, T, V], the tokens, the mask, outcomes.

    `x` has the fields of `support.batches.Inputs`; its prompts may name the policy a row comes from
    ("@source") and other fields. `teacher` is the one that `q` stands for; a pair of names is
    routed by the prompt's domain, the name being the domain.
    """

    def __init__(self, x, teacher: str | tuple[str, str] = "T"):
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
        self.l0 = log_softmax(rows(x.initial_BTV))
        self.prompt = [x.prompt[i] for i in self.rows]
        if isinstance(teacher, tuple):
            self.lq = np.stack([self.teachers[f["domain"]][i] for i, f in enumerate(self.prompt)])
        else:
            self.lq = self.l0 if teacher == "initial" else self.teachers[teacher]
        self.q = np.exp(self.lq)
        self.mu, self.R = rows(x.rollout_BT), rows(x.outcome_B)
        self.group = np.asarray(x.group_B)[self.rows]
        self.special = np.asarray(x.special_BT)[self.rows]
        self.values = {k: rows(v) for k, v in x.values.items()}
        self.step, self.steps = int(x.step), int(x.total_steps)
        self.source = [f.get("@source", "student") for f in self.prompt]
        self.length = self.m.sum(1)
        self.position = np.cumsum(self.m, 1) - 1
        self.B, self.T, self.V = self.z.shape

    # -- reading -----------------------------------------------------------------------------------

    def at_y(self, x: np.ndarray) -> np.ndarray:
        """[B, T, V] at the sampled tokens."""
        return np.take_along_axis(x, self.y[..., None], 2)[..., 0]

    def of(self, name: str) -> np.ndarray:
        """[B, T]: log-probability of the sampled token under a teacher or the start."""
        return self.at_y(self.l0 if name == "initial" else self.teachers[name])

    @property
    def ey(self) -> np.ndarray:
        return np.eye(self.V)[self.y]

    @property
    def ly(self) -> np.ndarray:
        return self.at_y(self.lp)

    @property
    def r(self) -> np.ndarray:
        """log q(y) − log p(y) with the student as it is now."""
        return self.at_y(self.lq) - self.ly

    @property
    def r_mu(self) -> np.ndarray:
        """log q(y) − log μ(y), μ the policy that sampled."""
        return self.at_y(self.lq) - self.mu

    @property
    def rho(self) -> np.ndarray:
        """p(y) / μ(y)."""
        return np.exp(self.ly - self.mu)

    def drawn(self, *names: str) -> np.ndarray:
        """[B, T]: 1 on the rows that came from one of these policies."""
        return np.array([s in names for s in self.source], dtype=float)[:, None] + 0 * self.m

    def field(self, name: str, value: str) -> np.ndarray:
        """[B, T]: 1 where the prompt's field has this value."""
        return np.array([f.get(name) == value for f in self.prompt], float)[:, None] + 0 * self.m

    def wide(self, x: np.ndarray) -> np.ndarray:
        """[B] spread over the tokens."""
        return x[:, None] + 0 * self.m

    def ramp(self, start: float, stop: float, over: float | None = None) -> float:
        """A number that moves linearly over some steps, or over the run, then stands still."""
        return start + (stop - start) * min(self.step / (over or self.steps), 1)

    def top(self, lx: np.ndarray, k: int) -> np.ndarray:
        """[B, T, V]: whether an entry is among the k most likely."""
        order = np.argsort(-lx, -1, kind="stable")[..., : min(k, self.V)]
        out = np.zeros_like(lx, dtype=bool)
        np.put_along_axis(out, order, True, 2)
        return out

    # -- along the response ------------------------------------------------------------------------

    def tokens(self, x: np.ndarray) -> np.ndarray:
        """The values at valid tokens, flat."""
        return x[self.m > 0]

    def sum_t(self, x: np.ndarray) -> np.ndarray:
        """Sum over each response [B]."""
        return (x * self.m).sum(1)

    def mean_t(self, x: np.ndarray) -> np.ndarray:
        """Mean over each response [B]."""
        return self.sum_t(x) / self.length

    def each(self, x: np.ndarray, f) -> np.ndarray:
        """f of the valid values of every response, in order, put back in their places."""
        out = np.zeros_like(self.m)
        for b in range(self.B):
            here = self.m[b] > 0
            out[b, here] = f(x[b, here])
        return out

    def before(self, x: np.ndarray) -> np.ndarray:
        """Sum over the tokens before this one."""
        return self.each(x, lambda v: np.cumsum(v) - v)

    def rank(self, x: np.ndarray) -> np.ndarray:
        """Share of the response's tokens with a smaller value."""
        return self.each(x, lambda v: (v[None] < v[:, None]).mean(1))

    def later(self, x: np.ndarray, n: int = 1) -> np.ndarray:
        """The value n tokens later; 0 past the end."""
        return self.each(x, lambda v: np.concatenate([v[n:], np.zeros(min(n, len(v)))]))

    def returns(self, r: np.ndarray, gamma: float = 1.0) -> np.ndarray:
        """Σ_{k ≥ t} γ^(k − t) r_k."""

        def back(v):
            out = np.zeros_like(v)
            for t in reversed(range(len(v))):
                out[t] = v[t] + gamma * (out[t + 1] if t + 1 < len(v) else 0)
            return out

        return self.each(r, back)

    def gae(self, r: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
        """A_t = δ_t + γλ A_{t+1}, δ_t = r_t + γ V_{t+1} − V_t; past the last token the value that
        follows it (values: [B, T + 1])."""
        out = np.zeros_like(self.m)
        for b in range(self.B):
            here = np.flatnonzero(self.m[b])
            v = np.append(values[b, here], values[b, here[-1] + 1])
            delta, a = r[b, here] + gamma * v[1:] - v[:-1], 0.0
            for t in reversed(range(len(here))):
                a = delta[t] + gamma * lam * a
                out[b, here[t]] = a
        return out

    # -- within the prompt's rollouts --------------------------------------------------------------

    def group_sum(self, x: np.ndarray) -> np.ndarray:
        """[B]: the sum over the prompt's rollouts."""
        return np.array([x[self.group == g].sum() for g in self.group])

    def group_mean(self, x: np.ndarray) -> np.ndarray:
        return self.group_sum(x) / self.group_sum(np.ones(self.B))

    def whitened(self, x: np.ndarray, eps: float = 1e-6) -> np.ndarray:
        """[B]: x minus the group's mean over the group's spread (population) plus ε."""
        gap = x - self.group_mean(x)
        return gap / (np.sqrt(self.group_mean(gap**2)) + eps)

    def advantage(self) -> np.ndarray:
        """[B, T]: GRPO's group-relative advantage (arXiv 2402.03300), on every token."""
        return self.wide(self.whitened(self.R))

    def less_others(self, g: np.ndarray) -> np.ndarray:
        """g minus the mean over the group's other rollouts at the same response position, where any
        of them is as long."""
        out = np.zeros_like(self.m)
        packed = [g[b, self.m[b] > 0] for b in range(self.B)]
        for b in range(self.B):
            others = [packed[o] for o in range(self.B) if o != b and self.group[o] == self.group[b]]
            means = []
            for i in range(len(packed[b])):
                there = [v[i] for v in others if len(v) > i]
                means.append(np.mean(there) if there else 0.0)
            out[b, self.m[b] > 0] = packed[b] - means
        return out

    def clipped(self, advantage: np.ndarray, low: float = 0.2, high: float = 0.2) -> np.ndarray:
        """The ratio p/μ where the gradient of PPO's clipped surrogate is not zero, else 0."""
        return self.rho * np.where(advantage > 0, self.rho < 1 + high, self.rho > 1 - low)

    def ppo(self, advantage: np.ndarray, low: float = 0.2, high: float = 0.2):
        """Score with this advantage under the clipped ratio."""
        return self.score(advantage * self.clipped(advantage, low, high))

    # -- dividing ----------------------------------------------------------------------------------

    def mean(self, value, grad, w=1.0, keep=None):
        """(Σ w·value / N, its gradient). N: valid tokens, or Σ keep where a gate is given."""
        n = ((1.0 if keep is None else keep) * self.m).sum()
        return self._weighted(value, grad, w * self.m / n if n else 0 * self.m)

    def by_sequence(self, value, grad, w=1.0):
        """Mean over each response, then over the sequences."""
        return self._weighted(value, grad, w * self.m / self.length[:, None] / self.B)

    def total(self, value, grad):
        """Sum over the tokens."""
        return self._weighted(value, grad, self.m)

    def _weighted(self, value, grad, c):
        out = np.zeros((self.size, self.T, self.V))  # rows that were left out have no gradient
        out[self.rows] = c[..., None] * grad
        return float((c * value).sum()), out
