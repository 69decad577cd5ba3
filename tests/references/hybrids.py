"""Independent references of specs/hybrids: (loss, logit gradient [B, T, V]) by hand.

A is GRPO's group-relative advantage, PPO(A) its clipped score (0.2 unless said otherwise), d the
log-ratio log q(y) − log p(y) with the student the formula names.
"""

from __future__ import annotations

import numpy as np
from references.arrays import Arrays
from references.losses import added, entropy, plus, scaled


def grpo(x, worth: float = 1.0, eps: float = 0.2):
    """PPO((R − mean) / (std + 1e-6)) (arXiv 2402.03300)."""
    a = Arrays(x)
    return a.mean(*a.ppo(worth * a.advantage(), eps, eps))


def _beside(x, more):
    """GRPO plus a token loss, both over all valid tokens."""
    a = Arrays(x)
    return a.mean(*added(a.ppo(a.advantage()), more(a)))


def _failed(a):
    return a.wide(a.R < 1)


def dgrpo(x, beta: float = 0.1):
    """+ β KL(p ‖ q) on every rollout (arXiv 2605.12227)."""
    return _beside(x, lambda a: scaled(beta, a.reverse(a.lq)))


def hypereyes(x, beta: float = 0.1):
    """+ β KL(p ‖ q) on failed rollouts (arXiv 2605.07177)."""
    return _beside(x, lambda a: scaled(beta * _failed(a), a.reverse(a.lq)))


def vold(x, beta: float = 1.0):
    """+ β (1 − R) KL(q ‖ p) (arXiv 2510.23497)."""
    return _beside(x, lambda a: scaled(beta * a.wide(1 - a.R), a.forward(a.lq)))


def kdrl(x, beta: float = 0.002):
    """+ β ½ (log p − log q)², differentiated (arXiv 2506.02208)."""
    return _beside(x, lambda a: scaled(beta, a.k2()))


def kdrl_annealed(x):
    """β from 5e-3 down to 1e-3 by 5e-5 a step."""
    return _beside(x, lambda a: scaled(max(5e-3 - 5e-5 * a.step, 1e-3), a.k2()))


def kdrl_masked(x, beta: float = 0.002):
    """No distillation where the rollout is correct."""
    return _beside(x, lambda a: scaled(beta * a.wide(a.R != 1), a.k2()))


def skill_sd(x, lam: float = 0.001):
    """+ λ ρ k3, ρ = p/μ held (arXiv 2604.10674)."""
    return _beside(x, lambda a: scaled(lam * a.rho, a.k3()))


def sdar(x, beta: float = 5.0, lam: float = 0.01):
    """+ λ sg σ(β d) (log q − log p), differentiated: gradient −λ σ ∇ log p; + 0.01 KL(p ‖ π_0)
    (arXiv 2605.15155, ZJU-REAL/SDAR, sdar_utils)."""

    def gated(a):
        gate = lam / (1 + np.exp(-beta * a.r))
        distilled = scaled(gate, (a.r, a.nll()[1]))  # −log p(y) and log q(y) − log p(y) move alike
        return added(distilled, scaled(0.01, a.reverse(a.l0)))

    return _beside(x, gated)


def dgpo(x, beta: float = 0.1, worth: float = 1.0):
    """PPO of the sequence reward: 1 where correct, else −β Σ (log μ − log q) (2508.20324)."""
    a = Arrays(x)
    reward = np.where(a.R == 1, worth, beta * a.sum_t(a.r_mu))
    return a.mean(*a.ppo(a.wide(reward)))


def gapd(x, worth: float = 1.0, bound: float = 5.0):
    """PPO(A + clip(d, ±bound)) (arXiv 2605.29584)."""
    a = Arrays(x)
    return a.mean(*a.ppo(worth * a.advantage() + np.clip(a.r_mu, -bound, bound)))


def opid(x, w_episode: float = 0.001, w_step: float = 0.001, worth: float = 1.0):
    """PPO(A + w Δ^episode + w Δ^step), Δ = log q(y) − log p_old(y) under a skill, + 0.01 KL(p ‖ π_0)
    (arXiv 2606.26790)."""
    a = Arrays(x, "episode")
    gains = w_episode * a.r_mu + w_step * (a.of("turn") - a.mu)
    start = scaled(0.01, a.reverse(a.l0))
    return a.mean(*added(a.ppo(worth * a.advantage() + gains), start))


def codistill_grpo(x, alpha: float = 0.1, worth: float = 1.0):
    """PPO of R + α mean d, whitened in the group as one number (arXiv 2605.08873)."""
    a = Arrays(x)
    score = worth * a.R + alpha * a.mean_t(a.r_mu)
    return a.mean(*a.ppo(a.wide(worth * a.whitened(score, 1e-6 * worth))))


def grpd(x):
    """PPO(sign(A) max(0, sign(A) d)) (arXiv 2608.24696)."""
    a = Arrays(x)
    sign = np.sign(a.advantage())
    return a.mean(*a.ppo(sign * np.maximum(sign * a.r, 0)))


def opdvr(x):
    """+max(0, d) on correct rollouts, −max(0, −d) on wrong ones (arXiv 2608.24696)."""
    a = Arrays(x)
    right = a.wide(a.R == 1) > 0
    return a.mean(*a.score(np.where(right, np.maximum(a.r, 0), -np.maximum(-a.r, 0))))


def rwopd(x):
    """R KL(q ‖ p) (arXiv 2605.13501)."""
    a = Arrays(x)
    return a.mean(*a.forward(a.lq), w=a.wide(np.clip(a.R, 0, 1)))


def openclaw_rl(x, w_rl: float = 1.0, w_opd: float = 1.0):
    """PPO(w_rl R + w_opd (log q − log μ)) (arXiv 2603.10165)."""
    a = Arrays(x)
    return a.mean(*a.ppo(w_rl * a.wide(a.R) + w_opd * a.r_mu))


def openclaw_topk(x, k: int = 50):
    """Σ_{top k of q} p (log p − log q), differentiated (Gen-Verse/OpenClaw-RL)."""
    a = Arrays(x)
    return a.mean(*a.reverse_raw(a.top(a.lq, k)))


def _modulated(a, lam: float, weight):
    return a.advantage() * (1 - lam + lam * weight)


def rlsd(x, worth: float = 1.0, eps_w: float = 0.2):
    """PPO(A [(1 − λ) + λ clip(exp(sign(A) Δ), 1 ± ε)]), Δ = log q − log p_old, λ ½ → 0 in 50 steps
    (arXiv 2604.03128)."""
    a = Arrays(x)
    tilt = np.exp(np.sign(a.advantage()) * a.r_mu)
    adv = _modulated(a, a.ramp(0.5, 0.0, 50), np.clip(tilt, 1 - eps_w, 1 + eps_w))
    return a.mean(*a.ppo(worth * adv))


def rlrt(x, worth: float = 1.0):
    """PPO(0.2, 0.28) of A clip((p/q)^sign(A), 0, 2) where R = 1, of A elsewhere (2605.10781)."""
    a = Arrays(x)
    turned = np.clip(np.exp(-np.sign(a.advantage()) * a.r_mu), 0, 2)
    adv = _modulated(a, 1.0, np.where(a.wide(a.R == 1) > 0, turned, 1))
    return a.mean(*a.ppo(worth * adv, 0.2, 0.28))


def rlcsd(x, worth: float = 1.0, tau: float = 0.02, lam: float = 0.5, bound: float = 2.0,
          delta: float = 0.02):  # fmt: skip
    """e = log q_c − log mean_k q_wk; A + clip(λ tanh(e/τ), ±B) where the addition exceeds δ, cut
    where it would turn the sign (arXiv 2606.11709, THU-BPM/RLCSD)."""
    a = Arrays(x, "right")
    wrong = (np.exp(a.of("wrong")) + np.exp(a.of("other"))) / 2
    push = lam * np.tanh((a.of("right") - np.log(wrong)) / tau)
    base = a.advantage()
    adv = base + np.where(np.abs(push) > delta, np.clip(push, -bound, bound), 0)
    adv = np.where(base > 0, np.maximum(adv, 0), np.minimum(adv, 0))
    return a.mean(*a.ppo(worth * adv))


def luffy(x, gamma: float = 0.1, worth: float = 1.0):
    """Student rows: PPO(A); the teacher's: −A f(p), f = p / (p + γ), no clip; A over both
    (arXiv 2504.14945, mix_core_alg)."""
    a = Arrays(x, "initial")
    adv, p = worth * a.advantage(), np.exp(a.ly)
    shaped = scaled(adv, (-p / (p + gamma), scaled(gamma * p / (p + gamma) ** 2, a.nll())[1]))
    return a.mean(*added(scaled(a.drawn("student"), a.ppo(adv)), scaled(a.drawn("T"), shaped)))


def srpo(x, k: int = 100):
    """A > 0: PPO(A); else H(q) min(p/μ, 2) JSD on the student's top k with a tail (2604.02288)."""
    a = Arrays(x)
    adv = a.advantage()
    far = scaled(entropy(a.lq) * np.minimum(a.rho, 2), a.jsd_binned(a.top(a.lp, k)))
    return a.mean(*added(scaled(adv > 0, a.ppo(adv)), scaled(adv <= 0, far)))


def sdpo_grpo(x, w: float = 0.5):
    """(1 − w) GRPO + w SDPO (TRL), SDPO on rows with feedback."""
    a = Arrays(x, "S")
    self = scaled(np.minimum(a.rho, 2), a.jsd_binned(a.top(a.lp, 100)))
    told = a.field("reprompted", "yes")
    return a.mean(*added(scaled(1 - w, a.ppo(a.advantage())), scaled(w * told, self)))


def uni_opd(x, delta: float = 0.4):
    """d + shift where correct, d − shift where wrong, shift = ½ max(0, δ − (mean right − mean
    wrong)) of the group's mean d, 0 where all agree; |d| ≥ 10 masked; PPO 0.2/0.28 (2605.03677).
    """
    a = Arrays(x)
    score, right = a.mean_t(a.r_mu), a.R == 1
    shift = np.zeros(a.B)
    for b in range(a.B):
        mates = a.group == a.group[b]
        good, bad = score[mates & right], score[mates & ~right]
        if len(good) and len(bad):
            shift[b] = max(0, delta - (good.mean() - bad.mean())) / 2
    adv = a.r_mu + a.wide(np.where(right, shift, -shift))
    return a.mean(*a.ppo(adv, 0.2, 0.28), w=np.abs(a.r_mu) < 10)


def hdpo(x, lam: float = 1.0):
    """GRPO on the student's rows; λ JSD on passing rows of the self-teacher where every rollout of
    the student failed (arXiv 2603.23871)."""
    a = Arrays(x)
    own = a.drawn("student")[:, 0]
    cliff = a.group_sum(own * (a.R == 1)) == 0
    imitated = a.drawn("T") * a.wide((a.R == 1) & cliff)
    return plus(
        a.mean(*a.ppo(a.advantage()), w=a.drawn("student")),
        a.mean(*a.jsd(a.lq), w=lam * imitated),
    )


SOURCES = {
    "luffy": ("student", "student", "T"),
    "hdpo": ("student", "student", "T"),
}
