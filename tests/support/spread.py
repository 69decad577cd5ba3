"""What one process of a pool does: its part of a batch or of a head, compared with all of it.

Every process makes the whole batch from the same seed, so that it has something to compare with.

Legend: B sequences, T positions, V words, H hidden, R rows of a head (V plus padding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import opdsl
from opdsl.emit.batch import Batch
from opdsl.emit.kernels import head as heads
from opdsl.emit.kernels import linear_logprobs, linear_score
from opdsl.emit.kernels.head import Head
from opdsl.emit.kernels.parallel import VocabShard
from opdsl.method import Method
from support import batches, generate

V = 29
ROWS = {2: (19, 13), 3: (7, 15, 9)}  # of the head on every rank: uneven, some padding at the end


@cache
def method_of(text: str) -> Method:
    """A spec by its text, or a shipped one."""
    return generate.compiled(text) if "\n" in text else opdsl.load(text)


def inputs(text: str, seed: int = 5, **options: Any) -> batches.Inputs:
    """Six sequences in three groups, with holes, an empty one and one of a single token."""
    spec = method_of(text).spec
    drawn = batches.draw(
        seed,
        **{"B": 6, "T": 4, "V": V, "H": 6} | options,
        teachers=tuple(t.name for t in spec.teachers if t.kind != "initial") or ("T",),
        critics=tuple(c.name for c in spec.critics),
    )
    return batches.as_hidden(drawn)


def chunks_of(rows: int) -> None:
    """Chunks of at most so many rows, so that a small batch has several."""
    heads.CHUNK_RANGE["cpu"] = (rows, rows)


def error(got: Tensor | float | None, want: Tensor | float | None) -> float:
    """Largest difference over the largest number wanted; infinite where something is missing."""
    if got is None or want is None:
        return 0.0 if got is want else float("inf")
    x, y = (torch.as_tensor(z, dtype=torch.float64) for z in (got, want))
    assert x.shape == y.shape, (x.shape, y.shape)
    same = (x == y) | (x.isnan() & y.isnan())  # infinite where one process has it, too
    if bool(same.all()):
        return 0.0
    size = float(torch.where(y.isfinite(), y.abs(), 0.0).max())
    worst = float((x - y)[~same].abs().max()) / max(size, 1e-6)
    return worst if worst == worst else float("inf")


# ---- a vocabulary in parts -------------------------------------------------------------------


def cut(x: Tensor, shard: VocabShard | None, rows: int) -> Tensor:
    """This process's rows of a weight [V, …], with the padding that is there."""
    if shard is None:
        return x
    padded = torch.cat([x, torch.full_like(x[: rows - len(x)], 7.0)])  # no word may read it
    start = sum(ROWS[len(shard.bounds)][: shard.rank])
    return padded[start : start + shard.rows]


def build(
    x: batches.Inputs, dtype: torch.dtype, shard: VocabShard | None, kind: str, rows: int
) -> tuple[Batch, dict[str, Tensor]]:
    """A batch of hidden states and its leaves; the first teacher by its head, others by logits.

    kind: "plain", "frozen" (the head takes no gradient), "curved" (bias, scale, soft cap),
    "barred" (a word of probability 0)
    """
    wide = dtype if dtype == torch.float64 else torch.float32
    h = x.hidden_BTH.to(dtype, copy=True).requires_grad_()
    leaves = {"hidden": h}
    w = cut(x.weight_VH.to(dtype, copy=True), shard, rows)
    w = w.clone().requires_grad_(kind != "frozen")
    leaves["weight"] = w
    bias, curve = None, {}
    if kind in ("curved", "barred"):
        bias_V = torch.linspace(-1, 1, len(x.weight_VH), dtype=dtype)
        if kind == "barred":
            never = min(set(range(V)) - set(x.tokens_BT.flatten().tolist()))
            bias_V[never] = -torch.inf
        bias = cut(bias_V, shard, rows).clone().requires_grad_()
        leaves["bias"] = bias
    if kind == "curved":
        curve = {"scale": 0.7, "soft_cap": 3.0}

    def make(y: batches.Inputs, hidden: Tensor, golden: Batch | None) -> Batch:
        first, *others = y.teachers
        th, tw = y.teacher_hidden[first]
        return Batch.from_hidden(
            hidden,
            Head(w, bias, **curve, shard=shard),
            teacher_hidden={first: th.to(dtype)},
            teacher_head={first: Head(cut(tw.to(dtype), shard, rows), shard=shard)},
            teacher_logits={k: y.teachers[k].to(dtype) for k in others} or None,
            initial_hidden=y.hidden_BTH.to(dtype) * 0.5,
            initial_head=Head(cut(x.weight_VH.to(dtype) * 0.7, shard, rows), shard=shard),
            golden=golden,
            **batches._cast(y, wide),
        )

    golden = None
    if x.golden is not None:
        golden = make(x.golden, x.golden.hidden_BTH.to(dtype), None)
    return make(x, h, golden), leaves


def vocabulary(
    group: Any, text: str, kind: str, kinds: str = "float64", partial: bool = False
) -> dict[str, float]:
    """Errors of loss, metrics and gradients against a head that is whole."""
    chunks_of(5)
    dtype = getattr(torch, kinds)
    rows = ROWS[dist.get_world_size(group)]
    rank = dist.get_rank(group)
    shard = VocabShard(group, rows[rank], V, partial_hidden=partial)
    x, loss = inputs(text), method_of(text).loss
    want, leaves = run(loss, *build(x, dtype, None, kind, 0))
    got, found = run(loss, *build(x, dtype, shard, kind, sum(rows)))
    assert got.metrics.keys() == want.metrics.keys()
    out = {"loss": error(got.metrics["loss"], want.metrics["loss"])}
    for k in want.metrics:
        out[k] = error(got.metrics[k], want.metrics[k])
    for name, leaf in leaves.items():
        slope = found[name].grad
        if name == "hidden":
            if partial:
                dist.all_reduce(slope, group=group)
            out[name] = error(slope, leaf.grad)
        elif leaf.grad is not None:
            out[name] = error(slope[: shard.columns], leaf.grad[shard.words])
            assert not slope[shard.columns :].any()  # padding has no gradient
        else:
            assert slope is None
    return out


def run(loss: Any, batch: Batch, leaves: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    result = loss(batch)
    if result.loss.requires_grad:
        result.loss.backward()
    return result, leaves


# ---- a batch in parts ----------------------------------------------------------------------------


def parted(
    group: Any, text: str, edges: Sequence[int], micro: int = 1, form: str = "logits"
) -> dict[str, float]:
    """Errors of losses and gradients summed over processes against one process.

    edges: sequences of the batch before every process's end; micro: parts of each of them.
    """
    loss, x, rank = method_of(text).loss, inputs(text), dist.get_rank(group)
    whole, leaves = _formed(x, form)
    want = loss(whole)
    want.loss.backward(retain_graph=True)  # the parts are cut from it
    slopes = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    B = len(whole.layout.length_B)
    edge = [0, *edges, B]
    # the golden rows are the last process's
    golden = whole.golden if rank == len(edge) - 2 else None
    own = whole._cut(edge[rank], edge[rank + 1], golden)
    parts = own.split(micro)
    total = torch.zeros((), dtype=torch.float64)
    kept: dict[str, float] = {}
    for part, context in zip(parts, loss.prepare(parts, group)):
        found = loss(part, context)
        total += found.loss.detach()
        for k, v in found.metrics.items():
            shares = k == "tokens" or k.startswith("loss/")
            kept[k] = kept.get(k, 0.0) + v * (1.0 if shares else found.metrics["tokens"])
        if found.loss.requires_grad:
            found.loss.backward(retain_graph=True)
    out = {"loss": error(summed(total, group), want.loss.detach())}
    for leaf, slope in zip(leaves, slopes):
        mine = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        out[f"gradient {tuple(leaf.shape)}"] = error(summed(mine, group), slope)
    names = [k for k in want.metrics if k.startswith("loss/")]
    for k in names:
        mine = torch.tensor(kept.get(k, 0.0), dtype=torch.float64)
        out[k] = error(summed(mine, group), want.metrics[k])
    return out


def _formed(x: batches.Inputs, form: str) -> tuple[Batch, tuple[Tensor, ...]]:
    if form == "hidden":
        return batches.hidden(x)
    batch, leaf = batches.logits(x)
    return batch, (leaf,)


def summed(x: Tensor, group: Any) -> Tensor:
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def strangers(group: Any, text: str) -> dict[str, float]:
    """Batches that every process makes itself, without groups: nobody has mates elsewhere."""
    loss, x, rank = method_of(text).loss, inputs(text, golden=False), dist.get_rank(group)
    rest = {**x.rest, "group": None}

    def batch(lo: int, hi: int) -> tuple[Batch, Tensor]:
        z = x.student_BTV[lo:hi].clone().requires_grad_()
        own = {k: v if v is None or not hasattr(v, "__getitem__") else v[lo:hi]
               for k, v in rest.items() if k not in ("step", "total_steps", "values")}  # fmt: skip
        teachers = {k: t[lo:hi] for k, t in x.teachers.items()}
        made = Batch.from_logits(z, teachers, initial_logits=x.initial_BTV[lo:hi], **own)
        return replace(made, step=x.step, total_steps=x.total_steps), z

    whole, z = batch(0, 6)
    want = loss(whole)
    want.loss.backward()
    lo, hi = 3 * rank, 3 * rank + 3
    own, mine = batch(lo, hi)
    own = own.numbered(lo)
    (context,) = loss.prepare([own], group)
    got = loss(own, context)
    got.loss.backward()
    return {
        "loss": error(summed(got.loss.detach(), group), want.loss.detach()),
        "gradient": error(mine.grad, z.grad[lo:hi]),
    }


def crossed(group: Any, text: str) -> dict[str, float]:
    """Errors where four processes hold two halves of a batch and two parts of the vocabulary."""
    rank = dist.get_rank(group)
    words = [dist.new_group(pair) for pair in ([0, 1], [2, 3])][rank // 2]
    halves = [dist.new_group(pair) for pair in ([0, 2], [1, 3])][rank % 2]
    x, loss = inputs(text, golden=False), method_of(text).loss
    shard = VocabShard(words, ROWS[2][rank % 2], V)
    whole, leaves = build(x, torch.float64, None, "curved", 0)
    want, _ = run(loss, whole, leaves)
    spread, found = build(x, torch.float64, shard, "curved", sum(ROWS[2]))
    own = spread._cut(*((0, 2) if rank < 2 else (2, spread.layout.n_seqs)), None)
    (context,) = loss.prepare([own], halves)
    got = loss(own, context).loss
    got.backward()
    out = {"loss": error(summed(got.detach(), halves), want.loss.detach())}
    for name, leaf in leaves.items():
        slope = summed(found[name].grad, halves)
        part = (slice(None),) if name == "hidden" else (slice(0, shard.columns),)
        wanted = leaf.grad if name == "hidden" else leaf.grad[shard.words]
        out[name] = error(slope[part], wanted)
    return out


def primitives(group: Any) -> dict[str, float]:
    """Errors of log-probabilities, entropy, top and their gradients, on the kernels themselves."""
    chunks_of(3)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    shard = VocabShard(group, ROWS[world][rank], V)
    x = inputs("gkd")
    h, ids = x.hidden_BTH.flatten(0, 1), torch.arange(96).reshape(24, 4) * 7 % V
    out: dict[str, float] = {}
    kept = []
    for part in (None, shard):
        hidden = h.clone().requires_grad_()
        weight = cut(x.weight_VH, part, sum(ROWS[world])).clone().requires_grad_()
        head = Head(weight, scale=0.9, soft_cap=4.0, shard=part)
        logp, lse, entropy = linear_logprobs(hidden, head, ids, temperature=1.3, entropy=True)
        ((logp * ids).sum() + (lse * lse).sum() + (entropy * h[:, 0]).sum()).backward()
        score = linear_score(hidden, head, ids=ids, k=V if part is None else 12, entropy=True)
        kept.append((logp, lse, entropy, hidden.grad, weight.grad, score))
    for name, want, got in zip(("logp", "lse", "entropy", "hidden"), kept[0], kept[1]):
        out[name] = error(got.detach(), want.detach())
    out["weight"] = error(kept[1][4][: shard.columns], kept[0][4][shard.words])
    want, got = kept[0][5], kept[1][5]
    out["top"] = float(not torch.equal(got.top_ids, want.top_ids[:, :12]))
    for name in ("lse", "logp", "entropy"):
        out[f"score {name}"] = error(getattr(got, name), getattr(want, name))
    out["score top"] = error(got.top_logp, want.top_logp[:, :12])
    return out


def on_gpu(group: Any, text: str, device: str = "cuda") -> dict[str, float]:
    """Errors in bfloat16 on a GPU: a head of one shard and padding against a whole one."""
    x, loss, kind = inputs(text, golden=False), method_of(text).loss, torch.bfloat16
    found = []
    for shard in (None, VocabShard(group, V + 3, V)):
        h = x.hidden_BTH.to(device, kind).requires_grad_()
        w = x.weight_VH.to(device, kind)
        if shard is not None:
            w = torch.cat([w, torch.full_like(w[:3], 7.0)])
        w = w.clone().requires_grad_()
        rest = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in x.rest.items()}
        for k in ("rollout_logprobs", "outcome"):
            rest[k] = rest[k].float()
        rest["values"] = None
        batch = Batch.from_hidden(
            h,
            Head(w, shard=shard),
            teacher_hidden={k: p[0].to(device, kind) for k, p in x.teacher_hidden.items()},
            teacher_logits=None,
            teacher_head={
                k: Head(torch.cat([p[1], p[1][: len(w) - V]]).to(device, kind), shard=shard)
                for k, p in x.teacher_hidden.items()
            },
            **rest,
        )
        result = loss(batch, loss.prepare([batch], group)[0])
        result.loss.backward()
        found.append((result.loss.detach(), h.grad, w.grad[:V]))
    return {name: error(b, a) for name, a, b in zip(("loss", "hidden", "weight"), *found)}


def refusals(group: Any) -> dict[str, str]:
    """What is said of shards that fit neither one another nor their heads."""
    rank = dist.get_rank(group)
    x = inputs("gkd")
    shard = VocabShard(group, ROWS[2][rank], V)
    other = VocabShard(group, (13, 16)[rank], V)
    w = cut(x.weight_VH, shard, 32)
    head = Head(w, shard=shard)
    th, tw = x.teacher_hidden["T"]
    given = {**x.rest, "teacher_hidden": th}
    tries: dict[str, Callable[[], object]] = {
        "no word": lambda: VocabShard(group, (29, 3)[rank], V),
        "totals": lambda: VocabShard(group, 20, (29, 30)[rank]),
        "short": lambda: VocabShard(group, 10, V),
        "rows": lambda: Head(w[:-1], shard=shard),
        "vocab": lambda: Head(w, vocab=3, shard=shard),
        "whole teacher": lambda: Batch.from_hidden(x.hidden_BTH, head, teacher_head=tw, **given),
        "other split": lambda: Batch.from_hidden(
            x.hidden_BTH, head, teacher_head=Head(tw[: other.rows], shard=other), **given
        ),
        "token": lambda: Batch.from_hidden(
            x.hidden_BTH, head, tokens=x.tokens_BT + V, mask=x.mask_BT
        ),
        "no part": lambda: method_of("gkd").loss.prepare([], group),
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
            found[name] = ""
        except ValueError as e:
            found[name] = str(e)
    return found


__all__ = ["crossed", "on_gpu", "parted", "primitives", "refusals", "strangers", "vocabulary"]
