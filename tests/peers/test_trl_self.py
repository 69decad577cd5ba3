"""TRL: the losses of SDFT and SDPO, as unbound methods of a stand-in trainer."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from peers.parity import Case, Row, check, row, rows, served

pytestmark = pytest.mark.peers

SDFT = "trl.experimental.sdft.SDFTTrainer"
SDPO = "trl.experimental.sdpo.SDPOTrainer"


class SelfDistillation:
    """The settings and services that SDFT's and SDPO's loss methods read of their trainer."""

    def __init__(self, c: Case, mode: str, alpha: float, topk: int | None = None,
                 tail: bool = False, clip: float | None = 2.0):  # fmt: skip
        self.case = c
        self.args = SimpleNamespace(
            distillation_mode=mode, distillation_alpha=alpha, distillation_topk=topk,
            distillation_add_tail=tail, distillation_is_clip=clip,
        )  # fmt: skip
        self.accelerator = SimpleNamespace(gather=lambda x: x)
        self.model = SimpleNamespace(training=True)
        self.state = SimpleNamespace(global_step=0)
        self._last_loaded_step = 0
        self.num_loss_tokens_to_skip = 0
        self._metrics = defaultdict(lambda: defaultdict(list))

    def _log_self_distillation_metric(self, mode: str, value: float) -> None:
        pass

    def _forward_logits(self, **_) -> Tensor:
        return self.case.student

    def _get_teacher_token_logprobs_from_server(self, inputs: dict, keep: int) -> dict:
        return served(self.case, self.args.distillation_topk or 1)

    @property
    def inputs(self) -> dict:
        ids, mask = self.case.tokens, self.case.mask.long()
        return dict(completion_ids=ids, completion_mask=mask, old_per_token_logps=self.case.rollout,
                    prompt_ids=ids[:, :1], prompt_mask=mask[:, :1])  # fmt: skip


def sdft_loss(c: Case, *settings, **more) -> Tensor:
    from trl.experimental.sdft.sdft_trainer import DistillationLogits, SDFTTrainer

    trainer = SelfDistillation(c, *settings, **more)
    logits = DistillationLogits(
        completion_ids=c.tokens, loss_mask=c.mask.long(),
        student_logits=c.student, teacher_logits=c.teacher,
    )  # fmt: skip
    return SDFTTrainer._compute_self_distillation_loss(
        trainer, trainer.model, trainer.inputs, logits
    )


@row("trl", f"{SDFT}._compute_self_distillation_loss", "sdft_trl", setting="top 4, alpha 0.5",
     knobs={"k": 4}, unlike="sdft", remark="mean per sequence; renormalised")  # fmt: skip
def sdft_topk(c: Case) -> Tensor:
    return sdft_loss(c, "topk_logits", 0.5, 4)


FULL = """opd 1
method full_logits {{
  state     rollouts(student)
  teacher   T = self(context = "{{demonstration}}")
  support   {support}
  feedback  loss {loss}
  {weight}
  aggregate mean(over = sequences)
}}
"""
CAPPED = "weight truncated_ratio(student, rollout, cap = 2)"


@row("trl", f"{SDFT}._compute_self_distillation_loss",
     FULL.format(support="full", loss="KL(T || student)", weight=CAPPED),
     setting="full logits, alpha 0")  # fmt: skip
def sdft_forward(c: Case) -> Tensor:
    return sdft_loss(c, "full_logits", 0.0)


@row("trl", f"{SDFT}._compute_self_distillation_loss",
     FULL.format(support="full", loss="KL(student || T)", weight=""),
     setting="full logits, alpha 1, no clip", unlike="sdft")  # fmt: skip
def sdft_reverse(c: Case) -> Tensor:
    return sdft_loss(c, "full_logits", 1.0, clip=None)


@row("trl", f"{SDFT}._compute_self_distillation_loss",
     FULL.format(support="top(4, of = student, tail = bin)", loss="JSD(T || student, beta = 0.3)",
                 weight=CAPPED),
     setting="top 4, tail, alpha 0.3")  # fmt: skip
def sdft_tail(c: Case) -> Tensor:
    return sdft_loss(c, "topk_logits", 0.3, 4, tail=True)


@row("trl", f"{SDFT}._compute_server_distillation_loss",
     FULL.format(support="top(4, of = T, tail = renormalize)",
                 loss="JSD(T || student, beta = 0.5)", weight=CAPPED),
     setting="top 4, alpha 0.5", unlike="sdft_trl",
     remark="the server's top k, not the student's")  # fmt: skip
def sdft_server(c: Case) -> Tensor:
    from trl.experimental.sdft.sdft_trainer import SDFTTrainer

    trainer = SelfDistillation(c, "topk_logits", 0.5, 4)
    return SDFTTrainer._compute_server_distillation_loss(trainer, trainer.model, trainer.inputs)


def feedback_rows(c: Case) -> Tensor:
    """Which rows were prompted again with feedback [B]."""
    return torch.tensor([p["reprompted"] == "yes" for p in c.inputs.prompt])


def sdpo_loss(c: Case, *settings, **more) -> Tensor:
    from trl.experimental.sdpo.sdpo_trainer import DistillationLogits, SDPOTrainer

    trainer = SelfDistillation(c, *settings, **more)
    logits = DistillationLogits(
        completion_ids=c.tokens, completion_mask=c.mask.long(),
        loss_mask=(c.mask & feedback_rows(c)[:, None]).long(),
        student_logits=c.student, teacher_logits=c.teacher,
    )  # fmt: skip
    return SDPOTrainer._compute_self_distillation_loss(
        trainer, trainer.model, trainer.inputs, logits
    )


@row("trl", f"{SDPO}._compute_self_distillation_loss", "sdpo_trl", setting="sampled token")
def sdpo_sampled(c: Case) -> Tensor:
    return sdpo_loss(c, "sampled_token", 1.0)


@row("trl", f"{SDPO}._compute_server_distillation_loss", "sdpo_trl", setting="sampled token")
def sdpo_server(c: Case) -> Tensor:
    from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer

    trainer = SelfDistillation(c, "sampled_token", 1.0)
    inputs = {**trainer.inputs, "self_distillation_mask": feedback_rows(c).long()}
    return SDPOTrainer._compute_server_distillation_loss(trainer, trainer.model, inputs)


def policy_loss(c: Case, kind: str) -> Tensor:
    """The policy term with the log-ratio as advantage, [B, T] being accepted there."""
    from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer

    trainer = SelfDistillation(c, "sampled_token", 1.0)
    trainer.importance_sampling_level, trainer.loss_type = "token", kind
    trainer.epsilon_low = trainer.epsilon_high = 0.2
    inputs = {**trainer.inputs, "advantages": c.teacher_logp - c.rollout}
    return SDPOTrainer._compute_policy_loss(trainer, inputs, c.student)


@row("trl", f"{SDPO}._compute_policy_loss", "slime_opd", setting="grpo", value=False,
     unlike="sampled_opd")  # fmt: skip
def policy_grpo(c: Case) -> Tensor:
    return policy_loss(c, "grpo")


@row("trl", f"{SDPO}._compute_policy_loss", "roll_pure", setting="dapo", value=False)
def policy_dapo(c: Case) -> Tensor:
    return policy_loss(c, "dapo")


@pytest.mark.parametrize("r", rows(__name__), ids=lambda r: r.id)
def test_trl_self(r: Row) -> None:
    check(r)
