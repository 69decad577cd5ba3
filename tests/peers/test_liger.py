"""Liger: the chunked losses, which are torch, and what of its Triton kernels a CPU can interpret.

The losses fuse the head: with the identity as weights the hidden states are the logits.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peers.interpreted import run
from peers.parity import FLOAT32, Case, Row, check, row, rows

pytestmark = pytest.mark.peers

JSD = "liger_kernel.chunked_loss.LigerFusedLinearJSDLoss"
GRPO = "liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss"
KERNELS = "liger_kernel.transformers"


def jsd(c: Case, beta: float, **settings) -> Tensor:
    """Its accumulators are float32 whatever the input, hence the tolerance."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    settings = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, **settings}
    loss = LigerFusedLinearJSDLoss(beta=beta, compiled=False, chunk_size=5, **settings)
    head = torch.eye(c.student.shape[-1], dtype=c.student.dtype)
    return loss(c.student.flatten(0, 1), head, c.teacher.flatten(0, 1), head, c.labels.flatten())


@row("liger-kernel", JSD, "gkd", setting="soft, beta 0.5", tolerance=FLOAT32)
def half(c: Case) -> Tensor:
    return jsd(c, 0.5)


@row("liger-kernel", JSD, "gkd", setting="soft, beta 0.1", knobs={"beta": 0.1}, tolerance=FLOAT32)
def tenth(c: Case) -> Tensor:
    return jsd(c, 0.1)


@row("liger-kernel", JSD, "gkd_forward", setting="soft, beta 0", tolerance=FLOAT32,
     unlike="gkd_reverse")  # fmt: skip
def zero(c: Case) -> Tensor:
    return jsd(c, 0.0)


@row("liger-kernel", JSD, "gkd_reverse", setting="soft, beta 1", tolerance=FLOAT32,
     unlike="gkd_forward")  # fmt: skip
def one(c: Case) -> Tensor:
    return jsd(c, 1.0)


@row("liger-kernel", JSD, "liger_jsd", setting="defaults", tolerance=FLOAT32, unlike="gkd",
     remark="half of the default loss is cross-entropy")  # fmt: skip
def defaults(c: Case) -> Tensor:
    return jsd(c, 0.5, weight_hard_loss=0.5, weight_soft_loss=0.5)


TEMPERED = """opd 1
method tempered_soft_loss {
  state     sequences(data)
  teacher   T = external(access = logits)
  support   full
  feedback  loss 0.7 * JSD(tempered(T, 2) || tempered(student, 2), beta = 0.5)
                 - 0.3 * log(student[y])
  aggregate mean(over = tokens)
}
"""


@row("liger-kernel", JSD, TEMPERED, setting="0.3 hard, 0.7 soft, temperature 2", tolerance=FLOAT32,
     unlike="liger_jsd", remark="no temperature in the cross-entropy, no factor T²")  # fmt: skip
def tempered(c: Case) -> Tensor:
    return jsd(c, 0.5, weight_hard_loss=0.3, weight_soft_loss=0.7, temperature=2.0)


@row("liger-kernel", f"{JSD}.distillation_loss_fn", "gkd", setting="beta 0.5, float64")
def function(c: Case) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    total = LigerFusedLinearJSDFunction.distillation_loss_fn(
        c.student.flatten(0, 1), c.teacher.flatten(0, 1), beta=0.5, target=c.labels.flatten()
    )
    return total / c.mask.sum()  # as _compute_loss does


def interpreted(c: Case, kernel: str) -> Tensor:
    """A scalar with the kernel's value and gradient; the kernel ran elsewhere."""
    logits = (x.detach().flatten(0, 1).numpy() for x in (c.student, c.teacher))
    value, gradient = run(kernel, *logits, c.labels.flatten().numpy())
    moved = (c.student - c.student.detach()).flatten(0, 1)
    return float(value) + (moved * torch.from_numpy(gradient)).sum()


TRITON = dict(tolerance=FLOAT32, remark="Triton kernel, interpreted")


@row("liger-kernel", f"{KERNELS}.jsd.LigerJSD", "gkd", setting="beta 0.3", knobs={"beta": 0.3},
     **TRITON)  # fmt: skip
def triton_jsd(c: Case) -> Tensor:
    return interpreted(c, "jsd")


@row("liger-kernel", f"{KERNELS}.fused_linear_jsd.LigerFusedLinearJSD", "gkd_reverse",
     setting="beta 1", unlike="gkd_forward", **TRITON)  # fmt: skip
def triton_fused_jsd(c: Case) -> Tensor:
    return interpreted(c, "fused_jsd")


@row("liger-kernel", f"{KERNELS}.fused_linear_kl_div.LigerFusedLinearKLDivLoss", "gkd_forward",
     unlike="gkd_reverse", **TRITON)  # fmt: skip
def triton_fused_kl(c: Case) -> Tensor:
    return interpreted(c, "fused_kl")


CE_TVD = """opd 1
method cross_entropy_and_total_variation {
  state     sequences(data)
  teacher   T = external(access = logits)
  support   full
  feedback  loss TV(T || student) - log(student[y])
  aggregate mean(over = tokens)
}
"""


@row("liger-kernel", f"{KERNELS}.fused_ce_tvd.LigerFusedCETVDLoss", CE_TVD,
     setting="sum of its two results", **TRITON)  # fmt: skip
def triton_ce_tvd(c: Case) -> Tensor:
    return interpreted(c, "fused_ce_tvd")


# ---- GRPO's KL term: the reference model is where a teacher can sit ------------------------


def grpo(c: Case, kind: str, beta: float, **settings) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=beta, loss_type=kind, compiled=False, chunk_size=2,
                                    **settings)  # fmt: skip
    head = torch.eye(c.student.shape[-1], dtype=c.student.dtype)
    return loss(
        c.student, head, c.tokens, c.mask.double(), torch.zeros(len(c.tokens)).double(),
        ref_per_token_logps=c.teacher_logp, old_per_token_logps=c.rollout,
    )[0]  # fmt: skip


K3 = """opd 1
method k3_term {{
  state     rollouts(student)
  teacher   T = external(access = sampled)
  support   sampled
  feedback  loss {beta} * k3(student, T) {weight}
  aggregate mean(over = {over})
}}
"""


@row("liger-kernel", GRPO, K3.format(beta=0.04, weight="", over="tokens"), tolerance=FLOAT32,
     setting="dapo, A = 0, beta 0.04", unlike="k2_opd")  # fmt: skip
def kl_tokens(c: Case) -> Tensor:
    return grpo(c, "dapo", 0.04)


@row("liger-kernel", GRPO, "torchrl_distillation", setting="grpo, A = 0, beta 1",
     tolerance=FLOAT32)  # fmt: skip
def kl_sequences(c: Case) -> Tensor:
    return grpo(c, "grpo", 1.0)


@row("liger-kernel", GRPO,
     K3.format(beta=1, weight="* (student[y] / rollout[y])", over="tokens"), tolerance=FLOAT32,
     setting="bnpo, A = 0, beta 1, use_bias_correction_kl", unlike="k3_direct",
     remark="the ratio is differentiated as well")  # fmt: skip
def kl_corrected(c: Case) -> Tensor:
    return grpo(c, "bnpo", 1.0, use_bias_correction_kl=True)


@pytest.mark.parametrize("r", rows(__name__), ids=lambda r: r.id)
def test_liger(r: Row) -> None:
    check(r)
