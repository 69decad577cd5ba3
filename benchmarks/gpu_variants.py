"""The rows of the GPU table, their inputs, and who computes them: bare products, ours, peers.

A variant is made once and called again and again: () -> loss, with the leaves whose gradient is
taken. bfloat16 weights and hidden states; whoever can keeps logits and statistics in float32.

Shapes: N rows, H hidden, V vocabulary, K served candidates, B sequences of T tokens.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import peers
from benchmarks.specs import compiled
from opdsl.emit.kernels import head
from opdsl.emit.kernels.head import largest, row_chunks

T = 64  # tokens of a sequence
K = 64  # served candidates
NLL_ROWS = 256  # of a chunk, where trainers compute a cross entropy in chunks


@dataclass(frozen=True)
class Row:
    """One row of the table. Ht: hidden width of the teacher, 0 without one. target in ms."""

    spec: str
    N: int
    H: int
    V: int
    Ht: int = 0
    target: float | None = None
    given: str = "sampled"  # what the batch holds beside the student
    products: int = 3  # of the student's head in the floor; 0: none

    @property
    def name(self) -> str:
        width = f"({self.H} <- {self.Ht})" if self.Ht not in (0, self.H) else f"{self.H}"
        return f"{self.spec} {self.N} x {width} x {self.V}"


ROWS = (
    Row("sampled", 8192, 4096, 131072, target=42.0),
    Row("sampled", 8192, 4096, 151936, target=49.0),
    Row("reverse KL", 8192, 2048, 128256, 4096, 38.0, "dense"),
    Row("JSD", 8192, 2048, 128256, 4096, 38.0, "dense"),
    Row("JSD", 8192, 4096, 128256, 4096, 55.0, "dense"),
    Row("top-64 renormalised", 8192, 4096, 151936, target=12.0, given="list", products=0),
    Row("top-64 tail bin", 8192, 4096, 151936, given="list"),
    Row("sampled", 32768, 1024, 151936, target=61.9),
    Row("reverse KL", 32768, 1024, 151936, 1024, 82.6, "dense"),
    Row("whitened returns", 8192, 4096, 128256, target=55.0, products=4),
)


@dataclass
class Data:
    """h, ht [N, H], W, Wt [V, H] in bfloat16; y, logp_y, rollout_y [N]; ids, logp [N, K]."""

    row: Row
    h: Tensor
    W: Tensor
    ht: Tensor | None
    Wt: Tensor | None
    y: Tensor
    ids: Tensor
    logp: Tensor
    logp_y: Tensor
    rollout_y: Tensor

    def seqs(self, x: Tensor) -> Tensor:
        return x.reshape(-1, T, *x.shape[1:])

    def leaves(self) -> list[Tensor]:
        return [self.h.detach().requires_grad_(), self.W.detach().requires_grad_()]


def make(row: Row, device: str) -> Data:
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=g, device=device) * scale).to(kind)

    h, W = normal(row.N, row.H), normal(row.V, row.H, scale=3 / row.H**0.5)
    ht = normal(row.N, row.Ht) if row.Ht else None
    Wt = normal(row.V, row.Ht, scale=3 / row.Ht**0.5) if row.Ht else None
    some = torch.rand(row.N, K, generator=g, device=device)
    lists = torch.stack([torch.randperm(row.V, generator=g, device=device)[:K] for _ in range(64)])
    ids = lists.repeat(-(-row.N // 64), 1)[: row.N]
    y = torch.randint(row.V, (row.N,), generator=g, device=device)
    # the list of a teacher holds nine tenths of its mass
    logp = torch.log_softmax(8 * some, -1).sort(1, descending=True).values - 0.105
    logp_y = -torch.rand(row.N, generator=g, device=device) - 0.1
    return Data(row, h, W, ht, Wt, y, ids, logp, logp_y, logp_y - 0.05)


Loss = Callable[[], Tensor | None]
Made = tuple[Loss, list[Tensor]]

# ---- the floor, and ours -----------------------------------------------------------------------------


def floor(d: Data) -> Made:
    """The products alone, in the chunks ours takes, into buffers that are reused.

    The cotangent holds numbers: a product of zeros draws less power, and a GPU is faster then.
    """
    row, device = d.row, d.h.device
    chunks = row_chunks(row.N, row.V, device)
    c = largest(chunks)
    low = torch.randn(c, row.V, device=device).mul_(1e-3).to(d.h.dtype)
    z, dh, dW = (torch.empty(n, w, device=device) for n, w in ((c, row.V), d.h.shape, d.W.shape))

    def run() -> None:
        dW.zero_()
        for start, stop in chunks:
            h, n = d.h[start:stop], stop - start
            for _ in range(row.products - 2):  # a coupled method computes its logits twice
                product(h, d.W.T, z[:n])
            if d.ht is not None and d.Wt is not None:
                product(d.ht[start:stop], d.Wt.T, z[:n])
            product(low[:n], d.W, dh[start:stop])
            add_product(dW, low[:n].T, h)

    return run, []


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    head.product(a, b, out) if a.is_cuda else torch.mm(a, b, out=out)


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    head.add_product(into, a, b, 1.0) if a.is_cuda else into.addmm_(a, b)


def ours(d: Data, kernels: bool) -> Made:
    from opdsl import Batch

    module = compiled(d.row.spec).loss
    h, W = d.leaves()
    more: dict[str, object] = {"rollout_logprobs": d.seqs(d.rollout_y)}
    if d.row.given == "dense":
        more |= {"teacher_hidden": d.seqs(d.ht), "teacher_head": d.Wt}  # type: ignore[arg-type]
    elif d.row.given == "list":
        more |= {"teacher_topk_ids": d.seqs(d.ids), "teacher_topk_logprobs": d.seqs(d.logp)}
    else:
        more |= {"teacher_logprobs": {"T": d.seqs(d.logp_y)}}
    mask = torch.ones(d.row.N // T, T, dtype=torch.bool, device=h.device)
    more["group"] = torch.arange(d.row.N // T, device=h.device) // 4

    def run() -> Tensor:
        os.environ["OPDSL_TRITON"] = "1" if kernels else "0"
        batch = Batch.from_hidden(d.seqs(h), W, tokens=d.seqs(d.y), mask=mask, **more)  # type: ignore[arg-type]
        return module(batch).loss

    return run, [h, W]


# ---- peers: log-probabilities of the sampled tokens, and what the row makes of them -----------------


def naive_logp(d: Data, h: Tensor, W: Tensor) -> Tensor:
    return torch.log_softmax((h @ W.T).float(), -1).gather(1, d.y[:, None])[:, 0]


def trl_logp(d: Data, h: Tensor, W: Tensor) -> Tensor:
    return peers.logprob_trl(h, W, d.y[:, None])[:, 0]


def chunked_logp(d: Data, h: Tensor, W: Tensor) -> Tensor:
    """A chunked cross entropy: some rows at a time, logits computed again in backward."""

    def rows(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
        return -F.cross_entropy((h @ W.T).float(), y, reduction="none")

    parts = zip(h.split(NLL_ROWS), d.y.split(NLL_ROWS))
    return torch.cat([checkpoint(rows, x, W, y, use_reentrant=False) for x, y in parts])


def liger_logp(d: Data, h: Tensor, W: Tensor) -> Tensor:
    """Its scaled cross entropy: CuTe kernels on an H100 or H200 where they are installed."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as F_,
    )

    found = F_.apply(h, W, d.y)
    return -(found[0] if isinstance(found, tuple) else found)


def from_logp(logp: Callable, d: Data) -> Made:
    h, W = d.leaves()

    def run() -> Tensor:
        x = logp(d, h, W)
        if d.row.spec == "whitened returns":
            A = peers.advantages(d, "whitened", d.seqs(d.logp_y - x.detach())).flatten()  # type: ignore[arg-type]
        else:
            A = d.logp_y - d.rollout_y
        return -(A * x).mean()

    return run, [h, W]


def liger_ce(d: Data) -> Made:
    """Its fused cross entropy; every advantage of this row is the same number."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    (h, W), f, A = d.leaves(), LigerFusedLinearCrossEntropyLoss(), 0.05
    return lambda: A * f(W, h, d.y), [h, W]


# ---- peers: dense rows, and lists ------------------------------------------------------------------


def beta_of(row: Row) -> float:
    """The weight of the student in the mixture, as GKD trainers have it."""
    return {"reverse KL": 1.0, "forward KL": 0.0}.get(row.spec, 0.5)


def naive_dense(d: Data) -> Made:
    h, W = d.leaves()

    def run() -> Tensor:
        assert d.ht is not None and d.Wt is not None
        with torch.no_grad():
            t = torch.log_softmax((d.ht @ d.Wt.T).float(), -1)
        s = torch.log_softmax((h @ W.T).float(), -1)
        return peers.divergence(s, t, beta_of(d.row)).mean()

    return run, [h, W]


def liger_chunked(d: Data) -> Made:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    (h, W), f = d.leaves(), LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta_of(d.row))
    return lambda: f(h, W, d.ht, d.Wt, d.y), [h, W]


def liger_fused(d: Data) -> Made:
    from liger_kernel.transformers import LigerFusedLinearJSD

    (h, W), f = d.leaves(), LigerFusedLinearJSD(jsd_beta=beta_of(d.row))
    return lambda: f(h, W, d.ht, d.Wt, None), [h, W]


def trl_dense(d: Data) -> Made:
    h, W = d.leaves()
    return lambda: peers.trl_dense(d, beta_of(d.row), h, W), [h, W]  # type: ignore[arg-type]


def naive_list(d: Data) -> Made:
    h, W = d.leaves()

    def logits(h: Tensor, W: Tensor, ids: Tensor) -> Tensor:
        return (h @ W.T).gather(1, ids).float()

    def logp(h: Tensor, W: Tensor, ids: Tensor) -> Tensor:
        return torch.log_softmax((h @ W.T).float(), -1).gather(1, ids)

    if "renormalised" in d.row.spec:
        return lambda: peers.renormalised(d, logits, h, W), [h, W]  # type: ignore[arg-type]
    return lambda: peers.topk(d, "bin", logp, h, W), [h, W]  # type: ignore[arg-type]


def variants(row: Row) -> dict[str, Callable[[Data], Made]]:
    """Everybody who computes a row and is installed."""
    found: dict[str, Callable] = {"floor": floor} if row.products else {}
    found |= {"ours": partial(ours, kernels=True), "ours, torch rows": partial(ours, kernels=False)}
    have = {name: importlib.util.find_spec(name) for name in ("liger_kernel", "trl")}
    if row.given == "list":
        found["naive"] = naive_list
    elif row.given == "dense":
        found["naive"] = naive_dense
        if have["liger_kernel"]:
            found |= {"Liger chunked": liger_chunked, "Liger fused": liger_fused}
        if have["trl"]:
            found["TRL"] = trl_dense
    else:
        logps = {"naive": naive_logp, "chunked cross entropy": chunked_logp}
        logps |= {"Liger scaled": liger_logp} if have["liger_kernel"] else {}
        logps |= {"TRL": trl_logp} if have["trl"] else {}
        found |= {name: partial(from_logp, f) for name, f in logps.items()}
        if have["liger_kernel"] and row.spec == "sampled":
            found["Liger cross entropy"] = liger_ce
    return found
