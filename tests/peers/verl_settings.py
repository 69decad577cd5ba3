"""What verl's losses read of an actor's configuration, and its advantages of outcomes."""

from __future__ import annotations

import torch
from torch import Tensor

from peers.parity import Case


def actor(clip: float = 0.2, agg: str = "token-mean", dual: float = 3.0):
    """An actor's configuration with no checks run: what the losses read of it."""
    from verl.workers.config import ActorConfig

    config = object.__new__(ActorConfig)
    settings = dict(clip_ratio=clip, clip_ratio_low=clip, clip_ratio_high=clip, clip_ratio_c=dual,
                    global_batch_info={}, loss_agg_mode=agg, loss_scale_factor=None,
                    policy_loss={}, use_kl_loss=False)  # fmt: skip
    for name, x in settings.items():
        object.__setattr__(config, name, x)
    return config


def group_advantages(c: Case) -> Tensor:
    """verl's GRPO advantages of the outcomes, put on the last token, [B, T]."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    scores = torch.zeros_like(c.rollout)
    scores[:, -1] = c.inputs.outcome_B
    return compute_grpo_outcome_advantage(scores, c.mask.double(), c.inputs.group_B.numpy())[0]
