"""Independent references of specs/teams: several teachers. (loss, logit gradient [B, T, V])."""

from __future__ import annotations

import numpy as np
from references.arrays import Arrays
from references.losses import added, scaled

DOMAINS = ("math", "code")  # one teacher each; the prompt's domain names it


def routed_opd(x):
    """A = log q_dom(x)(y) − log μ(y) (arXiv 2606.30406)."""
    a = Arrays(x, DOMAINS)
    return a.mean(*a.score(a.r_mu))


def mopd(x, low: float = 0.5, high: float = 2.0):
    """κ 1[low ≤ κ ≤ high] sg(log q_dom − log p), κ = p/μ, 1/|y| per response (arXiv 2601.02780)."""
    a = Arrays(x, DOMAINS)
    return a.by_sequence(*a.score(a.r), w=a.rho * ((a.rho >= low) & (a.rho <= high)))


def mopd_outcome(x, low: float = 0.5, high: float = 2.0, alpha: float = 1.0):
    """The same with + α A of the outcome."""
    a = Arrays(x, DOMAINS)
    band = (a.rho >= low) & (a.rho <= high)
    return a.by_sequence(*a.score(a.r + alpha * a.advantage()), w=a.rho * band)


def glm5_opd(x, beta: float = 2.0):
    """PPO(0.2, 0.28) of sg(log q_dom − log p) inside the band [1/β, β] of p/μ (2602.15763)."""
    a = Arrays(x, DOMAINS)
    return a.by_sequence(*a.ppo(a.r, 0.2, 0.28), w=(a.rho >= 1 / beta) & (a.rho <= beta))


def nemotron3_ultra(x):
    """sg(log q_dom − log p) times p/μ held in [0.2, 5], no PPO ratio (NVIDIA-NeMo/RL, mopd)."""
    a = Arrays(x, DOMAINS)
    return a.mean(*a.score(a.r), w=np.clip(a.rho, 0.2, 5))


def nemotron_cascade2(x, cap: float = 2.0):
    """sg(log q_dom − log p) times min(p/μ, cap), mean over valid tokens (arXiv 2603.19220)."""
    a = Arrays(x, DOMAINS)
    return a.mean(*a.score(a.r), w=np.minimum(a.rho, cap))


def overlapping_teachers(x, broad: float = 0.3, sharp: float = 0.7):
    """PPO(0.3 (log q_general − log μ) + 0.7 1[maths] (log q_expert − log μ)) (alibaba/ROLL)."""
    a = Arrays(x, "general")
    ours = a.field("domain", "math")
    adv = broad * (a.of("general") - a.mu) + sharp * ours * (a.of("expert") - a.mu)
    return a.mean(*a.ppo(adv))


def deepseek_v4_opd(x, w: float = 0.5):
    """Σ_i w_i KL(p ‖ q_i) over the vocabulary (arXiv 2606.19348)."""
    a = Arrays(x, "first")
    second = a.reverse(a.teachers["second"])
    return a.mean(*added(scaled(w, a.reverse(a.lq)), scaled(1 - w, second)))


def smopd(x, lam: float = 1.0):
    """GRPO + λ KL(mean of the teachers ‖ p) (arXiv 2608.03092)."""
    a = Arrays(x, "first")
    mixture = np.log((np.exp(a.lq) + np.exp(a.teachers["second"])) / 2)
    return a.mean(*added(a.ppo(a.advantage()), scaled(lam, a.forward(mixture))))


def qwen3_distill(x):
    """KL(p ‖ q) (arXiv 2505.09388, one reading)."""
    a = Arrays(x)
    return a.mean(*a.reverse(a.lq))


def qwen3_distill_forward(x):
    """KL(q ‖ p), the other."""
    a = Arrays(x)
    return a.mean(*a.forward(a.lq))
