"""TRL: IW-OPD and the losses over a few entries, with a local teacher and behind a server.

Trainer methods are called on an instance made without `__init__` that holds just what they read.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from peers.parity import FLOAT32, Case, Row, check, row, rows, served

pytestmark = pytest.mark.peers

IW = "trl.experimental.iw_opd.IWOPDTrainer"
SERVER = "trl.experimental.server_distillation.ServerDistillationTrainer"
ASYNC = "trl.experimental.async_distillation.async_distillation_trainer"


# ---- IW-OPD ------------------------------------------------------------------------------


def bare(cls: type, **settings):
    """An instance without `__init__`: only what the called method reads."""
    trainer = object.__new__(cls)
    trainer.__dict__.update(
        temperature=1.0, loss_add_tail=True, reverse_kl_top_1_mode="sampled", iw_opd_gamma=0.5,
        iw_opd_epsilon=1e-8, model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)), **settings,
    )  # fmt: skip
    return trainer


def iw_loss(c: Case, rollout: Tensor | None) -> Tensor:
    from trl.experimental.iw_opd import IWOPDTrainer

    return bare(IWOPDTrainer)._compute_iw_opd_loss(
        c.student, c.tokens, c.labels, c.teacher_logp, rollout
    )


@row("trl", f"{IW}._compute_iw_opd_loss", "trl_iw_opd", setting="no cached scores",
     unlike="iw_opd")  # fmt: skip
def iw_student(c: Case) -> Tensor:
    return iw_loss(c, None)


@row("trl", f"{IW}._compute_iw_opd_loss", "iw_opd", setting="cached scores", unlike="trl_iw_opd")
def iw_rollout(c: Case) -> Tensor:
    return iw_loss(c, c.rollout)


@row("trl", f"{IW}._compute_iw_opd_loss", "rollout_normaliser", setting="cached scores, gamma 2",
     knobs={"gamma": 2.0}, unlike="sampled_opd")  # fmt: skip
def iw_gamma(c: Case) -> Tensor:
    from trl.experimental.iw_opd import IWOPDTrainer

    trainer = bare(IWOPDTrainer)
    trainer.iw_opd_gamma = 2.0
    return trainer._compute_iw_opd_loss(c.student, c.tokens, c.labels, c.teacher_logp, c.rollout)


def sparse_jsd(c: Case, beta: float, k: int, tail: bool) -> Tensor:
    from trl.experimental.iw_opd import IWOPDTrainer

    return IWOPDTrainer.generalized_jsd_loss(
        c.student, c.teacher, labels=c.labels, beta=beta, top_k=k, add_tail=tail
    )


@row("trl", f"{IW}.generalized_jsd_loss", "topk_bin_forward", setting="beta 0, top 4, tail",
     knobs={"k": 4})  # fmt: skip
def sparse_forward(c: Case) -> Tensor:
    return sparse_jsd(c, 0, 4, True)


STUDENT_TOP = """opd 1
method students_top {
  state     rollouts(student)
  teacher   T = external(access = score_ids)
  support   top(4, of = student, tail = bin)
  feedback  loss KL(student || T)
  aggregate mean(over = tokens)
}
"""


@row("trl", f"{IW}.generalized_jsd_loss", STUDENT_TOP, setting="beta 1, top 4, tail")
def sparse_reverse(c: Case) -> Tensor:
    return sparse_jsd(c, 1, 4, True)


@row("trl", f"{IW}.generalized_jsd_loss", "trl_union", setting="beta 0.5, top 4, tail",
     knobs={"k": 4})  # fmt: skip
def sparse_union(c: Case) -> Tensor:
    return sparse_jsd(c, 0.5, 4, True)


@row("trl", f"{IW}.generalized_jsd_loss", "renormalised_topk", setting="beta 0, top 4, no tail",
     knobs={"k": 4}, unlike="topk_bin_forward")  # fmt: skip
def sparse_renormalised(c: Case) -> Tensor:
    return sparse_jsd(c, 0, 4, False)


@row("trl", f"{IW}._compute_local_sparse_top_1_divergence_loss", "two_entries", setting="beta 1")
def sparse_sampled(c: Case) -> Tensor:
    from trl.experimental.iw_opd import IWOPDTrainer

    return bare(IWOPDTrainer, beta=1)._compute_local_sparse_top_1_divergence_loss(
        c.student, c.teacher, c.tokens, c.labels
    )


@row("trl", f"{IW}._compute_local_sparse_top_1_divergence_loss", "trl_server", setting="beta 0.5")
def sparse_pair(c: Case) -> Tensor:
    from trl.experimental.iw_opd import IWOPDTrainer

    return bare(IWOPDTrainer, beta=0.5)._compute_local_sparse_top_1_divergence_loss(
        c.student, c.teacher, c.tokens, c.labels
    )


# ---- teachers behind a server ------------------------------------------------------------


@row("trl", f"{SERVER}._compute_server_forward_kl_loss", "topk_bin_forward", setting="top 4, tail",
     knobs={"k": 4})  # fmt: skip
def server_forward(c: Case) -> Tensor:
    from trl.experimental.server_distillation import ServerDistillationTrainer

    trainer = bare(ServerDistillationTrainer, beta=0)
    logps = torch.log_softmax(c.student, -1)
    return trainer._compute_server_forward_kl_loss(served(c, 4), logps, c.labels)


def server_sparse(c: Case, beta: float) -> Tensor:
    from trl.experimental.server_distillation import ServerDistillationTrainer

    return bare(ServerDistillationTrainer, beta=beta)._compute_server_sparse_top_1_divergence_loss(
        served(c, 1), torch.log_softmax(c.student, -1), c.tokens, c.labels
    )


@row("trl", f"{SERVER}._compute_server_sparse_top_1_divergence_loss", "two_entries",
     setting="beta 1", unlike="trl_distillation",
     remark="two entries stand for the vocabulary")  # fmt: skip
def server_reverse(c: Case) -> Tensor:
    return server_sparse(c, 1)


@row("trl", f"{SERVER}._compute_server_sparse_top_1_divergence_loss", "trl_server",
     setting="beta 0.2", knobs={"beta": 0.2})  # fmt: skip
def server_jsd(c: Case) -> Tensor:
    return server_sparse(c, 0.2)


def async_loss(c: Case, beta: float, k: int) -> Tensor:
    """Hidden states with the identity as head; the teacher's list also names the sampled token."""
    from trl.experimental.async_distillation import async_distillation_trainer as module

    values, ids = c.teacher_top(k)
    if beta:
        values = torch.cat([values, c.teacher_logp[..., None]], -1)
        ids = torch.cat([ids, c.tokens[..., None]], -1)
    known = torch.ones_like(ids, dtype=torch.bool)
    if beta:
        ids, values, known = module._narrow_top1_actual_support(ids, values, c.tokens, known, beta)
    head = torch.eye(c.student.shape[-1])
    loss, *_ = module._chunked_jsd_loss(
        c.student[c.mask].float(), head, None, 1.0, None, ids[c.mask], values[c.mask].float(),
        known[c.mask], beta, 1.0, True, None, 1, chunk_size=5,
    )  # fmt: skip
    return loss / c.mask.sum()  # as compute_loss does, by the tokens of all ranks


@row("trl", f"{ASYNC}._chunked_jsd_loss", "topk_bin_forward", setting="beta 0, top 8",
     knobs={"k": 8}, tolerance=FLOAT32)  # fmt: skip
def async_forward(c: Case) -> Tensor:
    return async_loss(c, 0.0, 8)


@row("trl", f"{ASYNC}._chunked_jsd_loss", "trl_server", setting="beta 0.5", tolerance=FLOAT32)
def async_jsd(c: Case) -> Tensor:
    return async_loss(c, 0.5, 8)


@row("trl", f"{ASYNC}._chunked_jsd_loss", "two_entries", setting="beta 1", tolerance=FLOAT32)
def async_reverse(c: Case) -> Tensor:
    return async_loss(c, 1.0, 8)


@pytest.mark.parametrize("r", rows(__name__), ids=lambda r: r.id)
def test_trl_sparse(r: Row) -> None:
    check(r)
