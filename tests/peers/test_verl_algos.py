"""verl: KL penalties, aggregations, and policy losses with the log-ratio as the advantage."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from peers.parity import Case, Row, check, row, rows
from peers.verl_settings import actor, group_advantages

pytestmark = pytest.mark.peers

PENALTY = "verl.trainer.ppo.core_algos.kl_penalty"
POLICY = "verl.trainer.ppo.core_algos"
MEAN = "mean(over = tokens)"
DIRECT = """opd 1
method direct {{
  state     rollouts(student)
  teacher   T = external(access = sampled)
  support   sampled
  feedback  loss {loss}
  aggregate {aggregate}
}}
"""

# ---- the penalties alone -------------------------------------------------------------------


def penalty(c: Case, kind: str) -> Tensor:
    from verl.trainer.ppo.core_algos import kl_penalty

    return kl_penalty(c.student_logp, c.teacher_logp, kind)


def token_mean(c: Case, losses: Tensor, mode: str = "token-mean") -> Tensor:
    from verl.trainer.ppo.core_algos import agg_loss

    return agg_loss(losses, c.mask.double(), mode)


@row("verl", PENALTY, "k3_plus", setting="k3+", spread=0.5, unlike="k3_direct",
     remark="value of k3, gradient of k2")  # fmt: skip
def k3_plus(c: Case) -> Tensor:
    return token_mean(c, penalty(c, "k3+"))


@row("verl", PENALTY, "k3_plus", setting="low_var_kl+", spread=0.5)
def low_variance_plus(c: Case) -> Tensor:
    return token_mean(c, penalty(c, "low_var_kl+"))


K1_PLUS = DIRECT.format(loss="k2(student, T) + sg(k1(student, T) - k2(student, T))", aggregate=MEAN)


@row("verl", PENALTY, K1_PLUS, setting="k1+", unlike="direct_log_ratio")
def k1_plus(c: Case) -> Tensor:
    return token_mean(c, penalty(c, "k1+"))


@row("verl", PENALTY, "k2_opd", setting="mse")
def mse(c: Case) -> Tensor:
    return token_mean(c, penalty(c, "mse"))


CUT = DIRECT.format(
    loss="min(exp(clip(logratio(T, student), -20, 20)) - 1 - clip(logratio(T, student), -20, 20), 10)",
    aggregate=MEAN,
)


@row("verl", PENALTY, CUT, setting="k3, far apart", spread=4.0, unlike="k3_direct",
     remark="log-ratio cut at ±20, k3 at 10: no gradient beyond")  # fmt: skip
def k3_far(c: Case) -> Tensor:
    return token_mean(c, penalty(c, "k3"))


# ---- aggregation ---------------------------------------------------------------------------


@row("verl", f"{POLICY}.agg_loss", "torchrl_distillation", spread=0.5,
     setting="k3, seq-mean-token-mean", tolerance=5e-8)  # fmt: skip
def sequence_means(c: Case) -> Tensor:
    return token_mean(c, penalty(c, "k3"), "seq-mean-token-mean")


@row("verl", f"{POLICY}.agg_loss", DIRECT.format(loss="k3(student, T)",
     aggregate="sum(over = tokens)"),
     setting="k3, token-sum", spread=0.5)  # fmt: skip
def token_sum(c: Case) -> Tensor:
    return token_mean(c, penalty(c, "k3"), "token-sum")


PER_SEQUENCE = """opd 1
method sum_per_sequence {
  state     rollouts(student)
  teacher   T = external(access = sampled)
  support   sampled
  feedback  loss length * k3(student, T)
  aggregate mean(over = sequences)
}
"""


@row("verl", f"{POLICY}.agg_loss", PER_SEQUENCE, setting="k3, seq-mean-token-sum", spread=0.5)
def sequence_sums(c: Case) -> Tensor:
    return token_mean(c, penalty(c, "k3"), "seq-mean-token-sum")


@row("verl", f"{POLICY}.agg_loss", PER_SEQUENCE.replace("length *", "length / 7 *"),
     setting="k3, seq-mean-token-sum-norm", spread=0.5)  # fmt: skip
def sequence_sums_normalised(c: Case) -> Tensor:
    """Divided by the padded width, 7 here, unless loss_scale_factor is set."""
    return token_mean(c, penalty(c, "k3"), "seq-mean-token-sum-norm")


# ---- policy losses with the log-ratio as advantage ------------------------------------------


def policy(c: Case, name: str, advantages: Tensor, weights: Tensor | None = None,
           clip: float = 0.2, dual: float = 3.0) -> Tensor:  # fmt: skip
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    return get_policy_loss_fn(name)(
        old_log_prob=c.rollout, log_prob=c.student_logp, advantages=advantages,
        response_mask=c.mask.double(), config=actor(clip, dual=dual), rollout_is_weights=weights,
    )[0]  # fmt: skip


def reward(c: Case) -> Tensor:
    """verl's own penalised reward: 0 - 1 · (log μ - log T)."""
    from verl.trainer.ppo.core_algos import compute_rewards

    return compute_rewards(torch.zeros_like(c.rollout), c.rollout, c.teacher_logp, 1.0)


@row("verl", f"{POLICY}.compute_policy_loss_gpg", "sampled_opd", setting="reward of the KL penalty")
def gpg(c: Case) -> Tensor:
    return policy(c, "gpg", reward(c))


@row("verl", f"{POLICY}.compute_policy_loss_gpg", "skyrl_opd", setting="with rollout weights",
     unlike="sampled_opd")  # fmt: skip
def gpg_weighted(c: Case) -> Tensor:
    return policy(c, "gpg", reward(c), (c.student_logp - c.rollout).exp().detach())


CISPO = """opd 1
method clipped_weights {
  accept    immediate_credit "as shipped"
  state     rollouts(old(1), group = 2)
  teacher   T = external(access = sampled)
  support   sampled
  feedback  reward logratio(T, rollout)
  credit    immediate
  weight    clip(student[y] / rollout[y], 0.8, 1.2)
  aggregate mean(over = tokens)
}
"""


@row("verl", f"{POLICY}.compute_policy_loss_cispo", CISPO, unlike="roll_pure",
     setting="log-ratio as advantage")  # fmt: skip
def cispo(c: Case) -> Tensor:
    return policy(c, "cispo", reward(c))


TRUST = """opd 1
method trust_region {
  accept    immediate_credit "as shipped"
  let drop = student[y] - rollout[y]
  state     rollouts(old(1), group = 2)
  teacher   T = external(access = sampled)
  support   sampled
  feedback  reward logratio(T, rollout)
  credit    immediate
  gate      if A > 0 then drop <= 0.02 else drop >= -0.02
  weight    truncated_ratio(student, rollout, cap = 20)
  aggregate mean(over = tokens)
}
"""


@row("verl", f"{POLICY}.compute_policy_loss_dppo_tv", TRUST, unlike="skyrl_opd",
     setting="log-ratio as advantage, bound 0.02")  # fmt: skip
def dppo(c: Case) -> Tensor:
    return policy(c, "dppo_tv", reward(c), clip=0.02, dual=20.0)


@row("verl", f"{POLICY}.compute_grpo_outcome_advantage", "verl_grpo", setting="into vanilla",
     value=False, unlike="grpo", remark="the spread of a sample, n - 1 in it")  # fmt: skip
def outcome(c: Case) -> Tensor:
    return policy(c, "vanilla", group_advantages(c))


def estimated(c: Case, name: str) -> Tensor:
    """Advantages before whitening: the estimator's second value, minus the critic's if there is one."""
    from verl.trainer.ppo import core_algos

    mask = c.mask.double()
    if name == "gae":
        values = next(iter(c.inputs.values.values()))[:, :-1] * mask
        _, returns = core_algos.compute_gae_advantage_return(reward(c), values, mask, 1.0, 0.95)
        return (returns - values) * mask
    config = SimpleNamespace(gamma=0.95)
    found = core_algos.compute_reinforce_plus_plus_outcome_advantage(reward(c), mask, config)
    return found[1]


@row("verl", f"{POLICY}.compute_gae_advantage_return", "gae_opd", contiguous=True,
     setting="KL penalty as reward, into gpg", unlike="sampled_opd",
     remark="the teacher in the reference slot; verl whitens afterwards, the spec does not")  # fmt: skip
def gae(c: Case) -> Tensor:
    return policy(c, "gpg", estimated(c, "gae"))


@row("verl", f"{POLICY}.compute_reinforce_plus_plus_outcome_advantage", "discounted_opd",
     setting="gamma 0.95, into gpg", unlike="sampled_opd",
     remark="before its whitening; times the tokens, the spec being a sum")  # fmt: skip
def discounted(c: Case) -> Tensor:
    return policy(c, "gpg", estimated(c, "reinforce++")) * c.mask.sum()


@pytest.mark.parametrize("r", rows(__name__), ids=lambda r: r.id)
def test_verl_algos(r: Row) -> None:
    check(r)
