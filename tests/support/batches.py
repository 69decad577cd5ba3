"""Random batches in every form a method can be given them.

One `Inputs` holds the numbers once, in float64; `logits`, `hidden` and `sparse` hand the same
numbers to `opdsl.Batch` in its three forms.

Legend: B sequences, T positions, V vocabulary, H hidden, N kept tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opdsl.emit.batch import Batch
from opdsl.emit.kernels.head import Head

FIELDS = ("math", "code")  # values of prompt.domain


@dataclass(frozen=True)
class Inputs:
    """Everything a method may read, float64."""

    hidden_BTH: Tensor
    weight_VH: Tensor
    student_BTV: Tensor
    teachers: Mapping[str, Tensor]  # [B, T, V]
    teacher_hidden: Mapping[str, tuple[Tensor, Tensor]]
    initial_BTV: Tensor
    tokens_BT: Tensor
    mask_BT: Tensor
    rollout_BT: Tensor | None
    outcome_B: Tensor
    group_B: Tensor
    values: Mapping[str, Tensor]  # [B, T + 1]
    special_BT: Tensor
    prompt: tuple[dict[str, str], ...]
    step: int
    total_steps: int
    golden: Inputs | None = field(default=None, repr=False)

    @property
    def rest(self) -> dict:
        """The arguments that every form of a batch shares."""
        return dict(
            tokens=self.tokens_BT,
            mask=self.mask_BT,
            rollout_logprobs=self.rollout_BT,
            outcome=self.outcome_B,
            group=self.group_B,
            values=dict(self.values) or None,
            special=self.special_BT,
            prompt=self.prompt,
            step=self.step,
            total_steps=self.total_steps,
        )


def draw(
    seed: int = 0,
    B: int = 4,
    T: int = 5,
    V: int = 11,
    H: int = 6,
    *,
    teachers: tuple[str, ...] = ("T",),
    critics: tuple[str, ...] = (),
    spread: float = 1.0,
    group: int = 2,
    step: int = 3,
    golden: bool = True,
    padding: int = 0,
    on_policy: bool = False,
) -> Inputs:
    """Uneven masks with holes, one empty sequence and one of a single token; groups in pairs.

    padding: the last entries of the vocabulary are −inf in every model. on_policy: tokens are drawn
    from the student, otherwise from all of the vocabulary alike, under a drifted sampler.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def model() -> tuple[Tensor, Tensor]:
        return normal(B, T, H), spread * normal(V, H) / H**0.5

    def logits(pair: tuple[Tensor, Tensor]) -> Tensor:
        z = pair[0] @ pair[1].T
        if padding:
            z[..., V - padding :] = -torch.inf
        return z

    own = model()
    others = {name: model() for name in teachers}
    mask = torch.rand(B, T, generator=g) < 0.8
    mask[0] = torch.arange(T) != 1  # a hole
    if B > 2:
        mask[1] = False  # an empty sequence
        mask[2] = torch.arange(T) == 0  # one token
    tokens = torch.randint(0, V - padding, (B, T), generator=g)
    drift = logits((own[0] + 0.3 * normal(B, T, H), own[1]))
    student = logits(own)
    if on_policy:
        drift = student
        gumbel = -(-torch.rand(student.shape, generator=g, dtype=torch.float64).log()).log()
        tokens = (student + gumbel).argmax(-1)
    rollout = torch.log_softmax(drift, -1).gather(2, tokens[..., None]).squeeze(-1)
    values = {name: -normal(B, T + 1).abs() for name in critics}
    return Inputs(
        hidden_BTH=own[0],
        weight_VH=own[1],
        student_BTV=student,
        teachers={k: logits(v) for k, v in others.items()},
        teacher_hidden=others,
        initial_BTV=logits(model()),
        tokens_BT=tokens,
        mask_BT=mask,
        rollout_BT=rollout,
        outcome_B=torch.randint(0, 2, (B,), generator=g).double(),
        group_B=torch.arange(B) // group,
        values=values,
        special_BT=torch.rand(B, T, generator=g) < 0.2,
        prompt=tuple({"domain": FIELDS[(i // group) % 2]} for i in range(B)),
        step=step,
        total_steps=10,
        golden=draw(
            seed + 1, 2, 3, V, H, teachers=teachers, critics=critics, spread=spread,
            group=group, step=step, golden=False, padding=padding, on_policy=on_policy,
        ) if golden else None,
    )  # fmt: skip


def _cast(x: Inputs, dtype: torch.dtype) -> dict:
    rest = x.rest
    for key in ("rollout_logprobs", "outcome"):
        if rest[key] is not None:
            rest[key] = rest[key].to(dtype)
    if rest["values"] is not None:
        rest["values"] = {k: v.to(dtype) for k, v in rest["values"].items()}
    return rest


def logits(x: Inputs, dtype: torch.dtype = torch.float64) -> tuple[Batch, Tensor]:
    """(batch, the leaf its gradient arrives in)."""
    leaf = x.student_BTV.to(dtype, copy=True).requires_grad_()
    golden = None if x.golden is None else logits(x.golden, dtype)[0]
    batch = Batch.from_logits(
        leaf,
        {k: v.to(dtype) for k, v in x.teachers.items()},
        initial_logits=x.initial_BTV.to(dtype),
        golden=golden,
        **_cast(x, dtype),
    )
    return batch, leaf


def hidden(
    x: Inputs, dtype: torch.dtype = torch.float64, padding: int = 0
) -> tuple[Batch, tuple[Tensor, Tensor]]:
    """The fused form: the first teacher by hidden states, the others by logits."""
    h = x.hidden_BTH.to(dtype, copy=True).requires_grad_()
    w = x.weight_VH.to(dtype, copy=True).requires_grad_()
    return _hidden(x, h, w, dtype, padding), (h, w)


def _hidden(x: Inputs, h: Tensor, w: Tensor, dtype: torch.dtype, padding: int) -> Batch:
    vocab = w.shape[0] - padding if padding else None
    first, *others = x.teachers
    th, tw = x.teacher_hidden[first]
    cut = slice(None, vocab)
    golden = None
    if x.golden is not None:  # the golden rows come through the same head
        golden = _hidden(x.golden, x.golden.hidden_BTH.to(dtype), w, dtype, padding)
    return Batch.from_hidden(
        h,
        Head(w, vocab=vocab),
        teacher_hidden={first: th.to(dtype)},
        teacher_head={first: Head(tw.to(dtype), vocab=vocab)},
        teacher_logits={k: x.teachers[k][..., cut].to(dtype) for k in others} or None,
        initial_hidden=x.hidden_BTH.to(dtype) * 0.5,
        initial_head=Head(w.detach() * 0.7, vocab=vocab),
        golden=golden,
        **_cast(x, dtype),
    )


def as_hidden(x: Inputs) -> Inputs:
    """The inputs whose logits form says the same as `hidden(x)`."""

    def go(y: Inputs) -> Inputs:
        initial = (y.hidden_BTH * 0.5) @ (x.weight_VH * 0.7).T
        student = y.hidden_BTH @ x.weight_VH.T
        bad = torch.isinf(y.student_BTV)
        return replace(
            y,
            student_BTV=student.masked_fill(bad, -torch.inf),
            initial_BTV=initial.masked_fill(bad, -torch.inf),
        )

    return replace(go(x), golden=None if x.golden is None else go(x.golden))


def sparse(
    x: Inputs, access: Mapping[str, str], dtype: torch.dtype = torch.float64
) -> tuple[Batch, Tensor]:
    """Teachers give exactly the access a method says it needs ("sampled", "top(k)")."""
    leaf = x.student_BTV.to(dtype, copy=True).requires_grad_()
    dense, ids, logps, sampled = {}, {}, {}, {}
    for name, z in x.teachers.items():
        level = access.get(name, next(iter(access.values()), "logits"))
        lp = torch.log_softmax(z, -1)
        if level == "sampled" or level.startswith("top"):
            sampled[name] = lp.gather(2, x.tokens_BT[..., None]).squeeze(-1).to(dtype)
            if level.startswith("top"):
                k = min(int(level[4:-1]), z.shape[-1])
                values, ids[name] = lp.topk(k, -1)
                logps[name] = values.to(dtype)
        else:
            dense[name] = z.to(dtype)
    golden = None if x.golden is None else sparse(x.golden, access, dtype)[0]
    batch = Batch.from_logits(
        leaf,
        dense or None,
        initial_logits=x.initial_BTV.to(dtype),
        golden=golden,
        teacher_topk_ids=ids or None,
        teacher_topk_logprobs=logps or None,
        teacher_logprobs=sampled or None,
        **_cast(x, dtype),
    )
    return batch, leaf
