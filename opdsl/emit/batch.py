"""The batch: response tokens of several rollouts, packed, with what was measured on them.

Legend: B sequences, T positions, N kept tokens (response tokens of the batch), K candidates,
V vocabulary, H hidden. `_N` values are packed in reading order; padding never enters arithmetic
because it never enters the batch (semantics §6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from opdsl.emit.kernels.head import Head
from opdsl.emit.kernels.parallel import same_split


class BatchError(ValueError):
    """The batch does not hold what the method reads, or its shapes disagree."""


ALONE = -(1 << 62)  # group ids from here down are of sequences for which no group was named


@dataclass(frozen=True)
class Layout:
    """Which row belongs to which sequence; statistics of the whole batch are taken over it."""

    length_B: Tensor  # int64
    group_B: Tensor  # int64; ids up to ALONE: the sequence has no mates
    seq_N: Tensor  # int64: sequence of a row
    pos_N: Tensor  # int64: response position of a row, from 0

    @property
    def n_rows(self) -> int:
        return int(self.seq_N.numel())

    @property
    def n_seqs(self) -> int:
        return int(self.length_B.numel())


@dataclass(frozen=True)
class DenseDist:
    """Full logits [N, V]."""

    logits_NV: Tensor


@dataclass(frozen=True)
class HiddenDist:
    """Hidden states and the head that turns them into logits; never materialised as [N, V]."""

    hidden_NH: Tensor
    head: Head


@dataclass(frozen=True)
class SparseDist:
    """What a served teacher gives: log-probabilities of its top K and of the sampled token."""

    ids_NK: Tensor | None
    logp_NK: Tensor | None
    logp_N: Tensor | None


@dataclass(frozen=True)
class RoutedDist:
    """One of several distributions, chosen per row (`routed(a, b)` of unlike teachers)."""

    parts: tuple[DenseDist | HiddenDist | SparseDist, ...]
    choice_N: Tensor  # int64: which part


Distribution = DenseDist | HiddenDist | SparseDist | RoutedDist


@dataclass(frozen=True)
class Batch:
    """See `from_logits` and `from_hidden`; `split` gives micro-batches that know the whole."""

    layout: Layout
    tokens_N: Tensor
    dists: Mapping[str, Distribution]
    rollout_N: Tensor | None = None
    outcome_B: Tensor | None = None
    values: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # ([N], boot [B])
    special_N: Tensor | None = None
    prompt: tuple[Mapping[str, object], ...] | None = None
    step: int = 0
    total_steps: int = 1
    golden: Batch | None = None
    shape: tuple[int, int] = (0, 0)  # (B, T) as handed in
    place_N: Tensor | None = None  # flat index b * T + t of every row
    dropped: int = 0  # empty sequences left out
    source: Tensor | None = None  # the student tensor as handed in (for gradients)
    memory: int | None = None  # bytes that loss and gradient may take, see `from_hidden`

    # -- construction --------------------------------------------------------------------
    @classmethod
    def from_logits(
        cls,
        student_logits: Tensor,
        teacher_logits: Tensor | Mapping[str, Tensor] | None = None,
        *,
        tokens: Tensor,
        mask: Tensor,
        rollout_logprobs: Tensor | None = None,
        initial_logits: Tensor | None = None,
        outcome: Tensor | None = None,
        group: Tensor | None = None,
        values: Tensor | Mapping[str, Tensor] | None = None,
        step: int = 0,
        total_steps: int = 1,
        special: Tensor | None = None,
        prompt: Sequence[Mapping[str, object]] | None = None,
        golden: Batch | None = None,
        teacher_topk_ids: Tensor | Mapping[str, Tensor] | None = None,
        teacher_topk_logprobs: Tensor | Mapping[str, Tensor] | None = None,
        teacher_logprobs: Tensor | Mapping[str, Tensor] | None = None,
    ) -> Batch:
        """Logits [B, T, V] where index t predicts tokens[:, t]; mask [B, T] marks response tokens.

        rollout_logprobs [B, T]: log-probabilities under the sampling distribution (default: the
        student, detached). outcome, group [B]. values [B, T + 1]: V(s_0 … s_T), the entry after
        the last response token is 0 after EOS and the critic's bootstrap at the length cap.
        Raises BatchError when shapes disagree.
        """
        b_, t_, v_ = _shape3(student_logits, "student_logits")
        plan = _Plan(tokens, mask, b_, t_)
        plan.check_tokens(v_)
        dists: dict[str, Distribution] = {"student": DenseDist(plan.rows(student_logits))}
        for name, x in _named(teacher_logits, "T").items():
            _expect(x, (b_, t_, x.shape[-1]), f"teacher_logits[{name!r}]")
            if x.shape[-1] != v_:
                raise BatchError(
                    f"teacher_logits[{name!r}] has {x.shape[-1]} entries, the student has {v_}; "
                    "cut both to the tokenizer's vocabulary first"
                )
            dists[name] = DenseDist(plan.rows(x))
        _sparse(dists, plan, teacher_topk_ids, teacher_topk_logprobs, teacher_logprobs)
        if initial_logits is not None:
            dists["initial"] = DenseDist(plan.rows(initial_logits))
        return plan.finish(
            cls, dists, rollout_logprobs, outcome, group, values, step, total_steps, special,
            prompt, golden, student_logits,
        )  # fmt: skip

    @classmethod
    def from_hidden(
        cls,
        hidden: Tensor,
        lm_head: Tensor | torch.nn.Linear | Head,
        *,
        tokens: Tensor,
        mask: Tensor,
        teacher_hidden: Tensor | Mapping[str, Tensor] | None = None,
        teacher_head: object = None,
        teacher_logits: Tensor | Mapping[str, Tensor] | None = None,
        teacher_topk_ids: Tensor | Mapping[str, Tensor] | None = None,
        teacher_topk_logprobs: Tensor | Mapping[str, Tensor] | None = None,
        teacher_logprobs: Tensor | Mapping[str, Tensor] | None = None,
        rollout_logprobs: Tensor | None = None,
        initial_hidden: Tensor | None = None,
        initial_head: object = None,
        outcome: Tensor | None = None,
        group: Tensor | None = None,
        values: Tensor | Mapping[str, Tensor] | None = None,
        step: int = 0,
        total_steps: int = 1,
        special: Tensor | None = None,
        prompt: Sequence[Mapping[str, object]] | None = None,
        golden: Batch | None = None,
        memory: int | None = None,
    ) -> Batch:
        """The fused route: hidden [B, T, H] and a head [V, H]; no [B, T, V] tensor is made.

        memory: bytes that loss and gradient may take beyond what is handed in; the rows at a time
        follow from it. None: as many as are fast. Too little raises BudgetError with the loss.

        A head sharded over processes by words (`Head.shard`) wants those of the other models split
        at the same words; their logits may be whole or this process's columns. A head that is a
        DTensor (FSDP2) is gathered here, see `Head.gathered`.
        """
        b_, t_, _ = _shape3(hidden, "hidden")
        plan = _Plan(tokens, mask, b_, t_)
        head = as_head(lm_head)
        plan.check_tokens(head.words)
        dists: dict[str, Distribution] = {"student": HiddenDist(plan.rows(hidden), head)}
        heads = _named(teacher_head, "T") if teacher_head is not None else {}
        for name, x in _named(teacher_hidden, "T").items():
            if name not in heads:
                raise BatchError(f"teacher_hidden[{name!r}] comes without teacher_head")
            dists[name] = HiddenDist(plan.rows(x), _alike(as_head(heads[name]), head, name))
        for name, x in _named(teacher_logits, "T").items():
            dists[name] = DenseDist(plan.rows(_columns(x, head)))
        _sparse(dists, plan, teacher_topk_ids, teacher_topk_logprobs, teacher_logprobs)
        if initial_hidden is not None:
            own = head if initial_head is None else as_head(initial_head)
            dists["initial"] = HiddenDist(plan.rows(initial_hidden), _alike(own, head, "initial"))
        made = plan.finish(
            cls, dists, rollout_logprobs, outcome, group, values, step, total_steps, special,
            prompt, golden, hidden,
        )  # fmt: skip
        return made if memory is None else made.within(memory)

    # -- views ---------------------------------------------------------------------------
    def within(self, memory: int) -> Batch:
        """The batch, and its reference texts, with a stated memory in bytes."""
        golden = None if self.golden is None else self.golden.within(memory)
        return replace(self, memory=memory, golden=golden)

    def split(self, n: int) -> list[Batch]:
        """At most n micro-batches of whole sequences, in order; their losses sum to the whole's.

        The golden rows travel with the first part.
        """
        total = self.layout.n_seqs
        n = max(1, min(n, total)) if total else 1
        edges = [round(i * total / n) for i in range(n + 1)]
        return [
            self._cut(lo, hi, self.golden if i == 0 else None)
            for i, (lo, hi) in enumerate(pairwise(edges))
            if hi > lo or n == 1
        ]

    def numbered(self, first: int) -> Batch:
        """The same sequences as first, first + 1, … of a batch that is spread over processes.

        Messages count from there, and methods that toss a coin toss another one on every process.
        """
        assert self.place_N is not None
        b_, t_ = self.shape
        return replace(self, shape=(first + b_, t_), place_N=self.place_N + first * t_)

    def _cut(self, lo: int, hi: int, golden: Batch | None) -> Batch:
        lay = self.layout
        rows = torch.nonzero((lay.seq_N >= lo) & (lay.seq_N < hi)).flatten()

        def take(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        layout = Layout(
            lay.length_B[lo:hi], lay.group_B[lo:hi], lay.seq_N[rows] - lo, lay.pos_N[rows]
        )
        dists: dict[str, Distribution] = {}
        for name, d in self.dists.items():
            if isinstance(d, DenseDist):
                dists[name] = DenseDist(d.logits_NV[rows])
            elif isinstance(d, HiddenDist):
                dists[name] = HiddenDist(d.hidden_NH[rows], d.head)
            elif isinstance(d, SparseDist):
                dists[name] = SparseDist(take(d.ids_NK), take(d.logp_NK), take(d.logp_N))
        return replace(
            self,
            layout=layout,
            tokens_N=self.tokens_N[rows],
            dists=dists,
            rollout_N=take(self.rollout_N),
            outcome_B=None if self.outcome_B is None else self.outcome_B[lo:hi],
            values={k: (v[rows], boot[lo:hi]) for k, (v, boot) in self.values.items()},
            special_N=take(self.special_N),
            prompt=None if self.prompt is None else self.prompt[lo:hi],
            golden=golden,
            place_N=take(self.place_N),
        )


def place(batch: Batch, row: int) -> str:
    """Where a row sits in the tensors handed in."""
    assert batch.place_N is not None
    b, t = divmod(int(batch.place_N[row]), max(batch.shape[1], 1))
    return f"sequence {b}, position {t}"


def as_head(x: object) -> Head:
    """A head, whole where a trainer keeps it in parts (`Head.gathered`)."""
    if isinstance(x, Head):
        return x.gathered()
    if isinstance(x, torch.nn.Linear):
        return Head(x.weight, x.bias).gathered()
    if isinstance(x, Tensor):
        return Head(x).gathered()
    raise BatchError(f"a head is a [V, H] tensor, a Linear or a Head, this is {type(x).__name__}")


def _alike(other: Head, student: Head, name: str) -> Head:
    """The head of another model, split over processes as the student's is."""
    why = same_split(student, other)
    if why:
        raise BatchError(f"the head of {name!r} must be split at the words of the student's: {why}")
    return other


def _columns(logits_BTV: Tensor, head: Head) -> Tensor:
    """The columns of this process, where the head is sharded and the logits are whole."""
    if head.shard is None or logits_BTV.shape[-1] == head.width:
        return logits_BTV
    return logits_BTV[..., head.shard.words]


def _named(x: object, default: str) -> dict:
    if x is None:
        return {}
    return dict(x) if isinstance(x, Mapping) else {default: x}


def _shape3(x: Tensor, what: str) -> tuple[int, int, int]:
    if x.dim() != 3:
        raise BatchError(f"{what} is [B, T, …], this has shape {tuple(x.shape)}")
    return x.shape[0], x.shape[1], x.shape[2]


def _expect(x: Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(x.shape) != shape:
        raise BatchError(f"{what} has shape {tuple(x.shape)}, expected {shape}")


def _sparse(dists: dict, plan: _Plan, ids: object, logps: object, sampled: object) -> None:
    ids_, logps_, sampled_ = (_named(x, "T") for x in (ids, logps, sampled))
    for name in {*ids_, *sampled_}:
        if name in dists:
            continue
        i, lp, s = ids_.get(name), logps_.get(name), sampled_.get(name)
        if i is not None and lp is None:
            raise BatchError(f"teacher_topk_ids[{name!r}] comes without teacher_topk_logprobs")
        dists[name] = SparseDist(
            None if i is None else plan.rows(i),
            None if lp is None else plan.logprobs(lp, f"teacher_topk_logprobs[{name!r}]"),
            None if s is None else plan.logprobs(s, f"teacher_logprobs[{name!r}]"),
        )


class _Plan:
    """Packing: drops padding and empty sequences, keeps reading order."""

    def __init__(self, tokens: Tensor, mask: Tensor, b_: int, t_: int):
        _expect(tokens, (b_, t_), "tokens")
        _expect(mask, (b_, t_), "mask")
        mask = mask.to(torch.bool)
        self.shape = (b_, t_)
        length_all = mask.sum(1)
        self.kept_B = torch.nonzero(length_all > 0).flatten()
        self.length_B = length_all[self.kept_B]
        self.place_N = torch.nonzero(mask.reshape(-1)).flatten()
        row_B = torch.full((b_,), -1, dtype=torch.int64, device=mask.device)
        row_B[self.kept_B] = torch.arange(self.kept_B.numel(), device=mask.device)
        self.seq_N = row_B[self.place_N // max(t_, 1)]
        pos = (mask.cumsum(1) - 1).reshape(-1)
        self.pos_N = pos[self.place_N]
        self.tokens_N = tokens.reshape(-1)[self.place_N].to(torch.int64)
        self.mask = mask
        self.dropped = b_ - int(self.kept_B.numel())

    def rows(self, x: Tensor) -> Tensor:
        """[B, T, …] -> [N, …]"""
        if tuple(x.shape[:2]) != self.shape:
            raise BatchError(
                f"expected [{self.shape[0]}, {self.shape[1]}, …], got {tuple(x.shape)}"
            )
        return x.reshape(-1, *x.shape[2:])[self.place_N]

    def logprobs(self, x: Tensor, what: str, floor: float | None = None) -> Tensor:
        """[N, …] log-probabilities: numbers, at most 0 (and above `floor`). −inf is a token that
        cannot be drawn; a failed scoring call must not pass for one."""
        x_N = self.rows(x)
        bad = ~(x_N <= 1e-3) if floor is None else ~((x_N <= 1e-3) & (x_N > floor))
        self.refuse(bad, f"{what} holds something that is no log-probability")
        return x_N

    def refuse(self, bad: Tensor, message: str) -> None:
        """Raises BatchError naming the first sample where `bad` [N, …] holds."""
        rows = torch.nonzero(bad.flatten(1).any(1) if bad.dim() > 1 else bad).flatten()
        if rows.numel():
            b, t = divmod(int(self.place_N[rows[0]]), max(self.shape[1], 1))
            raise BatchError(f"{message} at sequence {b}, position {t}")

    def check_tokens(self, v_: int) -> None:
        """Every sampled token is a row of the student's head."""
        bad = (self.tokens_N < 0) | (self.tokens_N >= v_)
        self.refuse(bad, f"a token outside the vocabulary of {v_} entries")

    def seqs(self, x: Tensor, what: str) -> Tensor:
        _expect(x, (self.shape[0],), what)
        return x[self.kept_B]

    def critic(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values at the rows, and the value after the last response token of each sequence."""
        b_, t_ = self.shape
        if x.dim() != 2 or x.shape[0] != b_ or x.shape[1] not in (t_, t_ + 1):
            raise BatchError(f"values has shape {tuple(x.shape)}, expected ({b_}, {t_ + 1})")
        boot = x.new_zeros(b_)
        if x.shape[1] == t_ + 1:
            index = torch.arange(t_, device=x.device)
            last = (
                torch.where(self.mask, index, index.new_tensor(-1)).amax(1)
                if t_
                else index.new_full((b_,), -1)
            )
            boot = x.gather(1, (last + 1)[:, None]).squeeze(1)
        return self.rows(x[:, :t_]), boot[self.kept_B]

    def finish(
        self,
        cls,
        dists,
        rollout,
        outcome,
        group,
        values,
        step,
        total,
        special,
        prompt,
        golden,
        source,
    ) -> Batch:
        kept = self.kept_B
        group_B = (
            ALONE - torch.arange(kept.numel(), device=kept.device)
            if group is None
            else self.seqs(group, "group")
        )
        if prompt is not None and len(prompt) != self.shape[0]:
            raise BatchError(f"prompt has {len(prompt)} entries, expected {self.shape[0]}")
        return cls(
            layout=Layout(self.length_B, group_B.to(torch.int64), self.seq_N, self.pos_N),
            tokens_N=self.tokens_N,
            dists=dists,
            rollout_N=None
            if rollout is None
            else self.logprobs(rollout, "rollout_logprobs", -torch.inf).detach(),
            outcome_B=None if outcome is None else self.seqs(outcome, "outcome").detach(),
            values={
                k: tuple(y.detach() for y in self.critic(v)) for k, v in _named(values, "").items()
            },
            special_N=None if special is None else self.rows(special).to(torch.bool),
            prompt=None if prompt is None else tuple(prompt[i] for i in kept.tolist()),
            step=step,
            total_steps=total,
            golden=golden,
            shape=self.shape,
            place_N=self.place_N,
            dropped=self.dropped,
            source=source,
        )
