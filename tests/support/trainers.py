"""What one process of a pool does under DDP and FSDP2: its part of a batch, against all of it.

Legend: B sequences, T positions, V words, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from opdsl.emit.batch import Batch
from opdsl.emit.kernels.head import Head
from support.spread import V, error, inputs, method_of, summed


class Model(nn.Module):
    """Words to hidden states, and a head: its own, or the embedding's weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(V, 6, dtype=torch.float64)
        self.trunk = nn.Linear(6, 6, dtype=torch.float64)
        self.head = nn.Linear(6, V, bias=not tied, dtype=torch.float64)
        if tied:
            self.head.weight = self.embed.weight
        for p in self.parameters():
            nn.init.normal_(p, generator=generator)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.trunk(self.embed(tokens_BT)).tanh()


def fsdp(group: Any, text: str, how: str, micro: int) -> dict[str, float]:
    """Errors of every parameter's gradient under FSDP2 against one process.

    how: "whole" (one unit of parameters), "tied" (head and embedding are one), "own" (the head is a
    unit of its own), "teacher" (own, and the teacher's head is a DTensor too), "half" (the head is
    gathered in float32)
    """
    loss, x = method_of(text).loss, inputs(text, golden=False)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mesh = DeviceMesh.from_group(group, "cpu")
    B = len(x.tokens_BT)

    def batch(model: Model, lo: int, hi: int, head: Any, teacher: Tensor):
        own = {k: v[lo:hi] if isinstance(v, Tensor | tuple) else v for k, v in x.rest.items()}
        th = next(iter(x.teacher_hidden.values()))[0]
        states = model(own["tokens"])
        leaf = states.detach().requires_grad_()  # the parts go back to here, the trunk goes once
        given = {"teacher_hidden": th[lo:hi], "teacher_head": teacher}
        return Batch.from_hidden(leaf, head, **given, **own), states, leaf

    teacher = next(iter(x.teacher_hidden.values()))[1]
    alone = Model(how == "tied")
    whole, states, leaf = batch(alone, 0, B, alone.head, teacher)
    want = loss(whole).loss
    want.backward()
    states.backward(leaf.grad)

    model = Model(how == "tied")
    if how not in ("whole", "tied"):
        fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    head: Any = model.head
    if how == "half":
        head = Head(model.head.weight, model.head.bias).gathered(torch.float32)
    if how == "teacher":
        teacher = distribute_tensor(teacher, mesh, [Shard(0)])
    edge = [0, 3, B] if world == 2 else [0, 3, 3, B]  # one of three has no sequence
    own, states, leaf = batch(model, edge[rank], edge[rank + 1], head, teacher)
    parts = own.split(micro)
    total = torch.zeros((), dtype=torch.float64)
    for part, context in zip(parts, loss.prepare(parts, group)):
        value = loss(part, context).loss
        total += value.detach()
        (value * world).backward(retain_graph=True)  # FSDP takes the mean
    states.backward(leaf.grad)
    out = {"loss": error(summed(total, group), want.detach())}
    for (name, p), q in zip(model.named_parameters(), alone.parameters()):
        got = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        out[name] = error(got, q.grad)
    return out


def ddp(group: Any, text: str) -> dict[str, float]:
    """Errors of every parameter's gradient under DDP against one process."""
    loss, x = method_of(text).loss, inputs(text, golden=False)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    th, tw = next(iter(x.teacher_hidden.values()))

    def batch(states: Tensor, model: Model, lo: int, hi: int) -> Batch:
        own = {k: v[lo:hi] if isinstance(v, Tensor | tuple) else v for k, v in x.rest.items()}
        given = {"teacher_hidden": th[lo:hi], "teacher_head": tw}
        return Batch.from_hidden(states, model.head, **given, **own)

    alone, model = Model(False), Model(False)
    loss(batch(alone(x.tokens_BT), alone, 0, 6)).loss.backward()
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=group)
    lo, hi = ((0, 4), (4, 4), (4, 6))[rank]  # the one in the middle has nothing
    own = batch(wrapped(x.tokens_BT[lo:hi]), model, lo, hi)
    (context,) = loss.prepare([own], group)
    (loss(own, context).loss * world).backward()
    pairs = zip(model.named_parameters(), alone.parameters())
    return {name: error(p.grad, q.grad) for (name, p), q in pairs}


def gathers(group: Any) -> int:
    """How often the head of a step with three micro-batches is gathered."""
    x, loss = inputs("gkd"), method_of("gkd").loss
    mesh = DeviceMesh.from_group(group, "cpu")
    weight = distribute_tensor(x.weight_VH, mesh, [Shard(0)]).requires_grad_()
    calls = []
    before = DTensor.full_tensor
    DTensor.full_tensor = lambda self, **k: calls.append(1) or before(self, **k)
    try:
        th, tw = x.teacher_hidden["T"]
        batch = Batch.from_hidden(
            x.hidden_BTH, weight, teacher_hidden=th, teacher_head=tw, **x.rest
        )
        parts = batch.split(3)
        for part, context in zip(parts, loss.prepare(parts, group)):
            loss(part, context).loss.backward()
    finally:
        DTensor.full_tensor = before
    assert isinstance(weight.grad, DTensor) and weight.grad.placements == weight.placements
    return len(calls)


__all__ = ["ddp", "fsdp", "gathers"]
