"""verl: the distillation losses, whole.

`distillation_loss` gets what its workers hand it: packed model outputs (a prompt of one token per
sequence), padded responses, a configuration. The Megatron variant of the top-k loss does not
import without megatron-core and repeats the FSDP one on a split vocabulary.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from peers.parity import FLOAT32, Case, Row, check, row, rows
from peers.verl_settings import actor, group_advantages

pytestmark = pytest.mark.peers

LOSSES = "verl.trainer.distillation.losses"
DISTILL = f"{LOSSES}.distillation_loss"


def packed(c: Case, x: Tensor) -> Tensor:
    """[B, T, …] to [total tokens, …]: scores of the next token, one prompt token before each row."""
    pad = torch.zeros_like(x[:, :1])
    return torch.cat([torch.cat([r[m], p]) for r, m, p in zip(x, c.mask, pad)])


def nested(c: Case, x: Tensor) -> Tensor:
    """`packed` with the rows' boundaries."""
    lengths = c.mask.sum(1) + 1
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return torch.nested.nested_tensor_from_jagged(packed(c, x), offsets=offsets)


def batch(c: Case, advantages: Tensor | None = None):
    """A worker's micro-batch that is the whole batch of one rank."""
    from tensordict import NonTensorData, TensorDict

    n = len(c.tokens)
    ones = torch.ones(n, 1, dtype=torch.long)
    return TensorDict(
        {
            "prompts": ones,
            "responses": c.tokens,
            "attention_mask": torch.cat([ones, c.mask.long()], 1),
            "response_mask": c.mask.double(),
            "old_log_probs": c.rollout,
            "advantages": torch.zeros_like(c.rollout) if advantages is None else advantages,
            "teacher_logprobs": nested(c, c.teacher_logp[..., None]),
            "dp_size": NonTensorData(1),
            "batch_num_tokens": NonTensorData(int(c.mask.sum())),
            "global_batch_size": NonTensorData(n),
        },
        batch_size=[n],
    )


def distillation(c: Case, sums: dict | None = None, agg: str = "token-mean", **settings) -> Tensor:
    from verl.trainer.distillation.losses import distillation_loss
    from verl.workers.config import DistillationLossConfig

    config = SimpleNamespace(distillation_loss=DistillationLossConfig(**settings))
    output = {"log_probs": packed(c, c.student_logp), **(sums or {})}
    return distillation_loss(actor(agg=agg), config, output, batch(c))[0]


NO_CLAMPS = dict(loss_max_clamp=None, log_prob_min_clamp=None, use_policy_gradient=False)
YAML = dict(loss_mode="k3", topk=32, use_task_rewards=True, distillation_loss_coef=1.0, **NO_CLAMPS)


@row("verl", f"{LOSSES}.distillation_ppo_loss", "verl_yaml", setting="YAML", contiguous=True,
     value=False, unlike="kdrl",
     remark="PPO on the outcome and k3, cut")  # fmt: skip
def yaml(c: Case) -> Tensor:
    from verl.trainer.distillation.losses import distillation_ppo_loss
    from verl.workers.config import DistillationLossConfig

    config = SimpleNamespace(distillation_loss=DistillationLossConfig(**YAML))
    output = {"log_probs": packed(c, c.student_logp)}
    return distillation_ppo_loss(actor(), config, output, batch(c, group_advantages(c)))[0]


@row("verl", DISTILL, "k3_direct", setting="k3", contiguous=True, spread=0.5, unlike="k2_opd",
     remark="below its clamps; the gradient of KL(T ‖ student)")  # fmt: skip
def yaml_k3(c: Case) -> Tensor:
    return distillation(c, loss_mode="k3", **NO_CLAMPS)


@row("verl", DISTILL, "k2_opd", setting="k2", contiguous=True, unlike="k3_direct")
def direct_k2(c: Case) -> Tensor:
    return distillation(c, loss_mode="k2", **NO_CLAMPS)


DIRECT = """opd 1
method direct {{
  state     rollouts(student)
  teacher   T = external(access = sampled)
  support   sampled
  feedback  loss {loss}
  aggregate {aggregate}
}}
"""
ABS = "abs(log(student[y]) - log(T[y]))"
MEAN = "mean(over = tokens)"


@row("verl", DISTILL, DIRECT.format(loss=ABS, aggregate=MEAN), setting="abs", contiguous=True)  # fmt: skip
def direct_abs(c: Case) -> Tensor:
    return distillation(c, loss_mode="abs", **NO_CLAMPS)


@row("verl", DISTILL, "direct_log_ratio", setting="kl", contiguous=True, unlike="k2_opd",
     remark="`k1` is refused here, its alias `kl` is not: no teacher in the gradient")  # fmt: skip
def direct_k1(c: Case) -> Tensor:
    return distillation(c, loss_mode="kl", **NO_CLAMPS)


@row("verl", DISTILL, "torchrl_distillation", setting="k3, seq-mean-token-mean", contiguous=True,
     spread=0.5, unlike="k3_direct", tolerance=5e-8,
     remark="divides by length + 1e-8")  # fmt: skip
def per_sequence(c: Case) -> Tensor:
    return distillation(c, loss_mode="k3", agg="seq-mean-token-mean", **NO_CLAMPS)


@row("verl", DISTILL, "verl_dataclass", setting="dataclass: k3, policy gradient", contiguous=True,
     spread=2.0, value=False, unlike="sampled_opd",
     remark="climbs KL(T ‖ student)")  # fmt: skip
def dataclass_k3(c: Case) -> Tensor:
    return distillation(c)


@row("verl", DISTILL, "verl_k1", setting="k1, policy gradient", contiguous=True, spread=2.0,
     value=False, unlike="sampled_opd")  # fmt: skip
def gradient_k1(c: Case) -> Tensor:
    return distillation(c, loss_mode="k1")


SURROGATE = """opd 1
method clipped_surrogate {
  let a = clip(sg(logratio(T, student)), -10, 10)
  let rho = student[y] / rollout[y]
  let plain = max(-a * rho, -a * clip(rho, 0.8, 1.2))
  state     rollouts(old(1), group = 2)
  teacher   T = external(access = sampled)
  support   sampled
  feedback  loss if a < 0 nats then min(-a * 3, plain) else plain
  aggregate mean(over = tokens)
}
"""


@row("verl", DISTILL, SURROGATE, setting="k1, the surrogate itself", contiguous=True, spread=2.0)
def surrogate_k1(c: Case) -> Tensor:
    return distillation(c, loss_mode="k1")


def topk(c: Case, k: int, **settings) -> Tensor:
    """Both passes: the logit processor's loss per token, then the aggregation."""
    from verl.trainer.distillation.losses import compute_topk_loss
    from verl.workers.config import DistillationLossConfig

    values, ids = c.teacher_top(k)
    settings = {"loss_mode": "forward_kl_topk", "topk": k, "use_policy_gradient": False, **settings}
    config = SimpleNamespace(distillation_loss=DistillationLossConfig(**settings))
    found = compute_topk_loss(
        SimpleNamespace(strategy="fsdp"), config,
        {"teacher_logprobs": nested(c, values), "teacher_ids": nested(c, ids)},
        packed(c, c.student)[None], "thd",
    )  # fmt: skip
    return distillation(c, sums={name: x[0] for name, x in found.items()}, **settings)


@row("verl", DISTILL, "clamped_forward_kl", setting="YAML: forward_kl_topk, 6 entries",
     knobs={"k": 6}, contiguous=True, tolerance=FLOAT32, unlike="topk_bin_forward",
     remark="raw top k, clamped at 0: no gradient where it acts")  # fmt: skip
def topk_yaml(c: Case) -> Tensor:
    return topk(c, 6, loss_max_clamp=None, log_prob_min_clamp=None)


@row("verl", DISTILL, "verl_forward_topk", setting="dataclass: forward_kl_topk, 6 entries",
     knobs={"k": 6}, contiguous=True, tolerance=FLOAT32, spread=4.0, unlike="clamped_forward_kl",
     remark="and at -10 and 10 nats")  # fmt: skip
def topk_dataclass(c: Case) -> Tensor:
    return topk(c, 6)


@row("verl", DISTILL, "clamped_forward_kl", setting="forward_kl_topk, use_chunked_topk",
     knobs={"k": 6}, contiguous=True, tolerance=FLOAT32)  # fmt: skip
def topk_chunked(c: Case) -> Tensor:
    return topk(c, 6, loss_max_clamp=None, log_prob_min_clamp=None, use_chunked_topk=True)


@pytest.mark.parametrize("r", rows(__name__), ids=lambda r: r.id)
def test_verl(r: Row) -> None:
    check(r)
