"""torchrl: DistillationLoss, the KL terms of GRPO and SFT, the KL rewards.

The losses run whole: a stand-in policy writes the log-probabilities of a leaf into the tensordict.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from peers.parity import Case, Row, check, row, rows

pytestmark = pytest.mark.peers

DISTILL = "torchrl.objectives.llm.DistillationLoss.forward"
GRPO = "torchrl.objectives.llm.GRPOLoss"
TRANSFORMS = "torchrl.envs.llm.transforms"


def distillation(c: Case, **settings) -> Tensor:
    """DistillationLoss over one stacked tensordict: masks, scores, and a policy that looks up."""
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.objectives.llm import DistillationLoss

    policy = TensorDictModule(
        lambda _: c.student_logp, in_keys=[("history", "full")], out_keys=[("log_probs", "full")]
    )
    data = TensorDict(
        {
            ("history", "full"): c.tokens,
            ("masks", "all_assistant_mask"): c.mask,
            ("masks", "all_attention_mask"): torch.ones_like(c.mask),
            ("next", "teacher_log_probs", "full"): c.teacher_logp,
        },
        batch_size=[len(c.tokens)],
    )
    return DistillationLoss(policy, **settings)(data).loss_distill


@row("torchrl", DISTILL, "torchrl_distillation", setting="reverse", unlike="k2_opd",
     remark="k3, differentiated: the gradient of KL(T ‖ student)")  # fmt: skip
def reverse(c: Case) -> Tensor:
    return distillation(c)


FORWARD = """opd 1
method forward_direction {
  state     sequences(T)
  teacher   T = external(access = sampled)
  support   sampled
  feedback  loss k3(T, student)
  aggregate mean(over = sequences)
}
"""


@row("torchrl", DISTILL, FORWARD, setting="forward", unlike="torchrl_distillation",
     remark="the roles of k3 exchanged")  # fmt: skip
def forward(c: Case) -> Tensor:
    return distillation(c, kl_direction="forward")


K3 = """opd 1
method k3_term {{
  state     rollouts(student)
  teacher   T = external(access = sampled)
  support   sampled
  feedback  loss {coef} * k3(student, {other})
  aggregate {aggregate}
}}
"""


@row("torchrl", DISTILL,
     K3.format(coef=1, other="T", aggregate="sum(over = tokens)"),
     setting="sum, not by length")  # fmt: skip
def summed(c: Case) -> Tensor:
    return distillation(c, reduction="sum", normalize_by_seq_length=False)


@row("torchrl", "torchrl.objectives.llm.distillation.k3_kl_token_estimate", "k3_direct",
     unlike="k2_opd")  # fmt: skip
def estimate(c: Case) -> Tensor:
    from torchrl.objectives.llm.distillation import k3_kl_token_estimate

    return k3_kl_token_estimate(c.teacher_logp, c.student_logp)[c.mask].mean()


# ---- GRPO --------------------------------------------------------------------------------


def grpo(c: Case, cls: str = "GRPOLoss", advantage: Tensor | None = None,
         old: Tensor | None = None, **settings):  # fmt: skip
    """The whole loss module; the policy's distribution is the leaf under the response mask."""
    import torchrl.objectives.llm as llm
    from tensordict import TensorDict

    advantage = torch.zeros_like(c.rollout) if advantage is None else advantage
    dist = SimpleNamespace(mask=c.mask, log_prob=lambda _: c.student_logp)
    loss = getattr(llm, cls)(
        SimpleNamespace(get_dist=lambda *_, **__: dist), entropy_bonus=False, **settings
    )
    data = TensorDict(
        {
            ("tokens", "full"): c.tokens,
            ("log_probs", "full"): c.rollout if old is None else old,
            "advantage": advantage[..., None],
            ("next", "ref_log_probs", "full"): c.teacher_logp,
        },
        batch_size=[len(c.tokens)],
    )
    return loss, loss(data)


def all_tokens(c: Case) -> Tensor:
    """torchrl's KL terms divide by every position, masked ones too: undone here, and said."""
    return c.mask.numel() / c.mask.sum().double()


@row("torchrl", f"{GRPO}._kl_to_ref", K3.format(coef=0.3, other="T",
     aggregate="mean(over = tokens)"), setting="kl_to_ref_coeff 0.3",
     remark="divides by all positions, masked ones included; here by the response's")  # fmt: skip
def kl_to_reference(c: Case) -> Tensor:
    _, out = grpo(c, kl_to_ref_coeff=0.3)
    return out.loss_kl_to_ref * all_tokens(c)


DRIFT = """opd 1
method drift {
  allow     OPD317 "a bare term"
  state     rollouts(student)
  support   sampled
  feedback  loss 0.2 * k3(student, rollout)
  aggregate mean(over = tokens)
}
"""


@row("torchrl", f"{GRPO}._kl_to_ref", DRIFT, setting="kl_to_inference_coeff 0.2",
     remark="as above")  # fmt: skip
def kl_to_inference(c: Case) -> Tensor:
    _, out = grpo(c, kl_to_inference_coeff=0.2)
    return out.loss_kl_to_inference * all_tokens(c)


@row("torchrl", f"{GRPO}.forward", "roll_pure", setting="log-ratio as advantage", value=False,
     unlike="sampled_opd")  # fmt: skip
def clipped(c: Case) -> Tensor:
    _, out = grpo(c, advantage=c.teacher_logp - c.rollout)
    return out.loss_objective


BAND = """opd 1
method clamped_ratio {
  accept    immediate_credit "as shipped"
  state     rollouts(old(1), group = 2)
  teacher   T = external(access = sampled)
  support   sampled
  feedback  reward logratio(T, rollout)
  credit    immediate
  gate      student[y] / rollout[y] >= 0.8 and student[y] / rollout[y] <= 1.2
  weight    ratio(student, rollout)
  aggregate mean(over = tokens)
}
"""


@row("torchrl", "torchrl.objectives.llm.CISPOLoss.forward", BAND, value=False, unlike="roll_pure",
     setting="log-ratio as advantage",
     remark="the clamped ratio is differentiated: no gradient outside the band")  # fmt: skip
def cispo(c: Case) -> Tensor:
    _, out = grpo(c, "CISPOLoss", advantage=c.teacher_logp - c.rollout)
    return out.loss_objective


# ---- SFT ---------------------------------------------------------------------------------


@row("torchrl", "torchrl.objectives.llm.SFTLoss._kl_to_ref",
     K3.format(coef=0.1, other="T", aggregate="mean(over = tokens)"),
     setting="kl_to_ref_coeff 0.1")  # fmt: skip
def sft_reference(c: Case) -> Tensor:
    from torchrl.objectives.llm import SFTLoss

    def lists(x: Tensor) -> list[Tensor]:
        return [y[m] for y, m in zip(x, c.mask)]

    loss = SimpleNamespace(kl_to_ref_coeff=0.1)
    return SFTLoss._kl_to_ref(loss, lists(c.student_logp), lists(c.teacher_logp))[0]


MINOR = """opd 1
method minor_sft {
  state     sequences(data)
  teacher   T = external(access = sampled)
  support   sampled
  feedback  loss -log(sigmoid(0.1 * mean(t in sequence: log(student[y]) - log(T[y]))))
  aggregate mean(over = sequences)
}
"""


@row("torchrl", "torchrl.objectives.llm.sft.minor_sft_loss", MINOR, setting="beta 0.1")
def minor(c: Case) -> Tensor:
    from torchrl.objectives.llm.sft import minor_sft_loss

    def means(x: Tensor) -> Tensor:
        return (x * c.mask).sum(1) / c.mask.sum(1)

    return minor_sft_loss(means(c.student_logp), means(c.teacher_logp), 0.1, "mean")


# ---- rewards -----------------------------------------------------------------------------


@row("torchrl", f"{TRANSFORMS}.KLComputation", "sampled_opd", setting="coeff 0.5, into GRPOLoss",
     knobs={"coef": 0.5}, value=False)  # fmt: skip
def kl_reward(c: Case) -> Tensor:
    """The transform's reward, 0 - coeff (log μ - log T), as the advantage of a first pass."""
    from tensordict import TensorDict, lazy_stack
    from torchrl.envs.llm.transforms.kl import KLComputation

    scores = [
        TensorDict(
            {
                ("log_probs", "full"): mu[m],
                ("ref_log_probs", "full"): nu[m],
                "reward": torch.zeros(int(m.sum()), 1, dtype=mu.dtype),
            }
        )
        for mu, nu, m in zip(c.rollout, c.teacher_logp, c.mask)
    ]
    data = lazy_stack([TensorDict({"next": s}) for s in scores])
    reward = KLComputation(coeff=0.5)(data)["next"].get("reward", as_list=True)
    advantage = torch.zeros_like(c.rollout)
    advantage[c.mask] = torch.cat([r.squeeze(-1) for r in reward])
    return grpo(c, advantage=advantage, old=c.student_logp.detach())[1].loss_objective


@row("torchrl", f"{TRANSFORMS}.KLRewardTransform + GRPOLoss", "sampled_opd",
     setting="coef 0.5", knobs={"coef": 0.5}, value=False)  # fmt: skip
def legacy_reward(c: Case) -> Tensor:
    """The older transform: it asks the reference model itself, here a look-up."""
    from tensordict import TensorDict
    from torchrl.envs.llm.transforms.kl import KLRewardTransform

    key = ("log_probs", "full")
    transform = SimpleNamespace(
        action_key="text", missing_tolerance=False, pad_output=True, assistant_only=True,
        log_prob_full_key=key, padding_side="left", add_to_reward=True, coef=0.5,
        in_keys=["reward"], out_keys=["reward", "kl_penalty", "ref_log_probs"],
        ref_model=lambda _: TensorDict({key: c.teacher_logp}, batch_size=[len(c.tokens)]),
    )  # fmt: skip
    size = [len(c.tokens)]
    data = TensorDict(
        {"text": c.tokens, key: c.rollout, ("masks", "all_assistant_mask"): c.mask}, batch_size=size
    )
    after = TensorDict({"reward": torch.zeros_like(c.rollout)[..., None]}, batch_size=size)
    advantage = KLRewardTransform._step(transform, data, after)["reward"].squeeze(-1)
    return grpo(c, advantage=advantage, old=c.student_logp.detach())[1].loss_objective


@pytest.mark.parametrize("r", rows(__name__), ids=lambda r: r.id)
def test_torchrl(r: Row) -> None:
    check(r)
