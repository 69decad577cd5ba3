"""TRL: the divergences over the full vocabulary of GKD, GOLD and the stable DistillationTrainer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from peers.parity import FLOAT32, Case, Row, check, row, rows

pytestmark = pytest.mark.peers

GKD = "trl.experimental.gkd.GKDTrainer.generalized_jsd_loss"
GOLD = "trl.experimental.gold.GOLDTrainer.generalized_jsd_loss"
ULD = "trl.experimental.gold.gold_trainer.ULDLoss"
STABLE = "trl.trainer.distillation_trainer._chunked_divergence_loss"


def gkd_loss(c: Case, beta: float, temperature: float = 1.0) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(
        c.student, c.teacher, labels=c.labels, beta=beta, temperature=temperature
    )


@row("trl", GKD, "trl_gkd", setting="beta 0.5")
def gkd_half(c: Case) -> Tensor:
    return gkd_loss(c, 0.5)


@row("trl", GKD, "gkd", setting="beta 0.1", knobs={"beta": 0.1})
def gkd_tenth(c: Case) -> Tensor:
    return gkd_loss(c, 0.1)


@row("trl", GKD, "gkd_forward", setting="beta 0", unlike="gkd_reverse")
def gkd_zero(c: Case) -> Tensor:
    return gkd_loss(c, 0)


@row("trl", GKD, "gkd_reverse", setting="beta 1", unlike="gkd_forward")
def gkd_one(c: Case) -> Tensor:
    return gkd_loss(c, 1)


@row("trl", GOLD, "trl_gold", setting="temperature 0.9", unlike="gkd",
     remark="the sampler's temperature tempers the loss too")  # fmt: skip
def gold_jsd(c: Case) -> Tensor:
    from trl.experimental.gold import GOLDTrainer

    return GOLDTrainer.generalized_jsd_loss(
        c.student, c.teacher, labels=c.labels, beta=0.5, temperature=0.9
    )


class Logits:
    """A model that answers with the logits of a batch, one prompt token before the response."""

    def __init__(self, logits: Tensor):
        self.logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1)

    def __call__(self, **_) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)

    def eval(self) -> None:
        pass


def whole(c: Case, cls: type, **settings) -> Tensor:
    """compute_loss: forwards, the shift by one position, the mask, the batch's token count."""
    trainer = object.__new__(cls)
    trainer.__dict__.update(teacher_model=Logits(c.teacher), beta=0.5, **settings)
    prompt = torch.zeros_like(c.tokens[:, :1])
    inputs = {
        "input_ids": torch.cat([prompt, c.tokens], 1),
        "attention_mask": torch.cat([prompt + 1, c.mask.long()], 1),
        "labels": torch.cat([prompt - 100, c.labels], 1),
    }
    return trainer.compute_loss(Logits(c.student), inputs, num_items_in_batch=c.mask.sum())


@row("trl", "trl.experimental.gkd.GKDTrainer.compute_loss", "trl_gkd", setting="defaults")
def gkd_whole(c: Case) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    return whole(c, GKDTrainer)


@row("trl", "trl.experimental.gold.GOLDTrainer.compute_loss", "trl_gold", setting="one tokenizer",
     unlike="trl_gkd")  # fmt: skip
def gold_whole(c: Case) -> Tensor:
    from trl.experimental.gold import GOLDTrainer

    return whole(c, GOLDTrainer, temperature=0.9, use_uld_loss=False, teacher_tokenizer=None)


def uld(beta: float, vocabulary: int):
    """ULDLoss of two equal tokenizers: every entry of the vocabulary is matched."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    config = SimpleNamespace(
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.0,
        uld_teacher_temperature=1.0, uld_skip_student_eos=False, uld_skip_teacher_eos=False,
        use_extended_uld=False, uld_token_merge_strategy="bayesian", uld_use_hybrid_loss=True,
        uld_hybrid_matched_weight=None, uld_hybrid_unmatched_weight=None, beta=beta,
    )  # fmt: skip
    loss = ULDLoss(config)
    loss._vocab_mapping = {i: i for i in range(vocabulary)}
    loss.mapping_tensor = torch.arange(vocabulary)
    loss._teacher_matched_ids = loss._student_matched_ids = set(range(vocabulary))
    return loss


@row("trl", f"{ULD}._compute_jsd_loss_for_matched_tokens", "gkd", setting="beta 0.5")
def uld_matched(c: Case) -> Tensor:
    loss = uld(0.5, c.student.shape[-1])
    p, q = c.student.softmax(-1)[c.mask], c.teacher.softmax(-1)[c.mask]
    return loss._compute_jsd_loss_for_matched_tokens(p, q)


MEAN_OF_SEQUENCES = """opd 1
method matched_vocabularies {
  state     rollouts(student)
  teacher   T = external(access = logits)
  support   full
  feedback  loss JSD(T || student, beta = 0.5)
  aggregate mean(over = sequences)
}
"""


@row("trl", f"{ULD}.__call__", MEAN_OF_SEQUENCES, setting="hybrid, one tokenizer", contiguous=True,
     unlike="gkd", remark="averages per sequence, the same-tokenizer path per token")  # fmt: skip
def uld_hybrid(c: Case) -> Tensor:
    first = torch.zeros_like(c.student[:, :1])

    def shifted(logits: Tensor) -> Tensor:  # logits at t predict the token at t + 1
        return torch.cat([logits, first], dim=1)

    ids = torch.cat([c.tokens[:, :1], c.tokens], dim=1)
    labels = torch.cat([torch.full_like(c.labels[:, :1], -100), c.labels], dim=1)
    loss = uld(0.5, c.student.shape[-1])
    return loss(shifted(c.student), shifted(c.teacher), labels, labels, ids, ids)


def stable_loss(c: Case, beta: float, temperature: float = 1.0) -> Tensor:
    """The tiled kernel over hidden states; with the identity as head those are the logits."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    head = torch.eye(c.student.shape[-1])
    return _chunked_divergence_loss(
        c.student.float(), c.teacher.float(), head, head, c.mask, beta, temperature=temperature
    )[0]


@row("trl", STABLE, "trl_distillation", setting="beta 1", tolerance=FLOAT32)
def stable_reverse(c: Case) -> Tensor:
    return stable_loss(c, 1.0)


@row("trl", STABLE, "gkd", setting="beta 0.3", knobs={"beta": 0.3}, tolerance=FLOAT32)
def stable_jsd(c: Case) -> Tensor:
    return stable_loss(c, 0.3)


@row("trl", STABLE, "gkd_forward", setting="beta 0", tolerance=FLOAT32)
def stable_forward(c: Case) -> Tensor:
    return stable_loss(c, 0.0)


@row("trl", STABLE, "trl_gold", setting="beta 0.5, temperature 0.7", knobs={"tau": 0.7},
     tolerance=FLOAT32)  # fmt: skip
def stable_tempered(c: Case) -> Tensor:
    return stable_loss(c, 0.5, 0.7)


class Backbone:
    """A model whose last hidden states are the logits of a batch, its head being the identity."""

    def __init__(self, logits: Tensor):
        self.hidden = logits.float()
        head = SimpleNamespace(weight=torch.eye(logits.shape[-1]), bias=None)
        self.get_output_embeddings = lambda: head
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def eval(self) -> None:
        pass


@row("trl", "trl.trainer.DistillationTrainer._compute_loss", "trl_distillation",
     setting="defaults", tolerance=FLOAT32, unlike="trl_gkd")  # fmt: skip
def stable_whole(c: Case) -> Tensor:
    from trl.trainer.distillation_trainer import DistillationTrainer

    trainer = SimpleNamespace(
        teacher_model=Backbone(c.teacher), beta=1.0, temperature=1.0,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        _get_last_hidden_state=lambda model, *_, **__: model.hidden,
        _forward_redirection=lambda wrapper, model, call, *args, **more: call(*args, **more),
    )  # fmt: skip
    prompt = torch.zeros_like(c.tokens[:, :1])
    inputs = dict(prompt_ids=prompt, prompt_mask=prompt + 1, completion_ids=c.tokens,
                  completion_mask=c.mask.long())  # fmt: skip
    loss = DistillationTrainer._compute_loss
    return loss(trainer, Backbone(c.student), inputs, num_items_in_batch=c.mask.sum())[0]


@pytest.mark.parametrize("r", rows(__name__), ids=lambda r: r.id)
def test_trl(r: Row) -> None:
    check(r)
