"""The same losses in other people's code, and the bare products nobody can be faster than.

Every function takes (data, h, W) with leaves h [N, H], W [V, H] and returns the scalar loss. A
served teacher is served here too: nobody pays for a teacher's head that ours does not pay for.
`naive` is plain torch as a trainer would write it, `selective` the same with gather − logsumexp.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import Data


def floor(data: Data, heads: int, h: Tensor, W: Tensor) -> Tensor:
    """The products alone, in buffers that are reused: student logits, `heads` teachers, dH, dW."""
    shape = data.shape
    z, u, dh, dW = _floor_buffers(shape)
    with torch.no_grad():
        dW.zero_()
        for i in range(0, shape.N, shape.chunk):
            rows = slice(i, min(i + shape.chunk, shape.N))
            z_n = z[: rows.stop - i]
            torch.mm(h[rows], W.T, out=z_n)
            for _ in range(heads):
                torch.mm(data.ht[rows], data.Wt.T, out=u[: rows.stop - i])
            torch.mm(z_n, W, out=dh[rows])
            dW.addmm_(z_n.T, h[rows])
    return dW[0, 0]


@functools.cache
def _floor_buffers(shape) -> tuple[Tensor, ...]:
    tile = (shape.chunk, shape.V)
    sizes = (tile, tile, (shape.N, shape.H), (shape.V, shape.H))
    return tuple(torch.empty(s) for s in sizes)


# ---- dense --------------------------------------------------------------------------------------


def divergence(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """[n] from log-probabilities [n, V]: 0 KL(T ‖ S), 1 KL(S ‖ T), else JSD as GKD trainers have it."""
    if beta == 0:
        return F.kl_div(s, t, reduction="none", log_target=True).sum(-1)
    if beta == 1:
        return F.kl_div(t, s, reduction="none", log_target=True).sum(-1)
    pair = torch.stack([s + math.log(1 - beta), t + math.log(beta)])
    m = torch.logsumexp(pair, 0)
    kl_t = F.kl_div(m, t, reduction="none", log_target=True)
    kl_s = F.kl_div(m, s, reduction="none", log_target=True)
    return (beta * kl_t + (1 - beta) * kl_s).sum(-1)


def teacher(data: Data) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(data.ht @ data.Wt.T, -1)


def naive_dense(data: Data, beta: float, h: Tensor, W: Tensor) -> Tensor:
    return divergence(torch.log_softmax(h @ W.T, -1), teacher(data), beta).mean()


def trl_dense(data: Data, beta: float, h: Tensor, W: Tensor) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    out, _ = ChunkedDivergenceFunction.apply(h, W, None, data.ht, data.Wt, None, beta)
    return out.mean()


def liger_dense(data: Data, beta: float, compiled: bool, h: Tensor, W: Tensor) -> Tensor:
    return _liger(beta, compiled, data.shape.chunk)(h, W, data.ht, data.Wt, data.y)


@functools.cache
def _liger(beta: float, compiled: bool, chunk: int):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, compiled=compiled, chunk_size=chunk)


# ---- log-probabilities of given tokens ----------------------------------------------------------


def logprob_naive(h: Tensor, W: Tensor, ids: Tensor) -> Tensor:
    """[N, K] by log_softmax."""
    return torch.log_softmax(h @ W.T, -1).gather(1, ids)


def logprob_selective(h: Tensor, W: Tensor, ids: Tensor) -> Tensor:
    z = h @ W.T
    return z.gather(1, ids) - torch.logsumexp(z, -1, keepdim=True)


def logprob_trl(h: Tensor, W: Tensor, ids: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as width

    args = (h, W, None, ids[:, 0], 1.0, width, None, 1.0, ())  # no optional outputs
    return ChunkedLogProbFunction.apply(*args)[0][:, None]


def logprob_liger(h: Tensor, W: Tensor, ids: Tensor) -> Tensor:
    from liger_kernel.chunked_loss.fused_linear_ppo import (
        _SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE,
        _ChunkedSelectiveLogProbFunction,
    )

    width = _SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    return _ChunkedSelectiveLogProbFunction.apply(h, W, ids[:, 0], None, 1.0, width)[:, None]


def logprob_torch(chunk: int, h: Tensor, W: Tensor, ids: Tensor) -> Tensor:
    """`F.linear_cross_entropy`, with the chunk size ours has."""
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
    out = F.linear_cross_entropy(h, W, ids[:, 0], reduction="none", options=options)
    return -out[:, None]


def sampled(data: Data, logprob, h: Tensor, W: Tensor) -> Tensor:
    logp = logprob(h, W, data.y[:, None])[:, 0]
    return -((data.logp_y - data.rollout_y) * logp).mean()


# ---- served candidates ---------------------------------------------------------------------------


def log_rest(logp_nK: Tensor) -> Tensor:
    """log(1 − Σ p) [n, 1]"""
    return torch.log1p(-logp_nK.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))


def topk(data: Data, tail: str, logprob, h: Tensor, W: Tensor) -> Tensor:
    """KL(T ‖ S) over the teacher's top K: `drop` truncated, `bin` with one entry for the rest."""
    s, t = logprob(h, W, data.ids), data.logp
    if tail == "bin":
        s, t = torch.cat([s, log_rest(s)], -1), torch.cat([t, log_rest(t)], -1)
    return (t.exp() * (t - s)).sum(-1).mean()


def topk_checkpoint(data: Data, h: Tensor, W: Tensor) -> Tensor:
    """TRL's asynchronous trainer: 256 rows at a time, recomputed in backward, a tail bucket."""
    from trl.experimental.async_distillation.async_distillation_trainer import _chunked_jsd_loss

    real = torch.ones_like(data.ids, dtype=torch.bool)
    out = _chunked_jsd_loss(
        h, W, None, 1.0, None, data.ids, data.logp, real, 0.0, 1.0, True, None, 1, 256
    )
    return out[0] / data.shape.N


def renormalised(data: Data, logprob, h: Tensor, W: Tensor) -> Tensor:
    """KL(S ‖ T) of both sides rescaled to the teacher's top K."""
    s = torch.log_softmax(logprob(h, W, data.ids), -1)
    t = torch.log_softmax(data.logp, -1)
    return (s.exp() * (s - t)).sum(-1).mean()


def renormalised_logits(data: Data, h: Tensor, W: Tensor) -> Tensor:
    """The same without a log-sum-exp over the vocabulary, from full logits."""
    return renormalised(data, lambda h, W, ids: (h @ W.T).gather(1, ids), h, W)


def routed(data: Data, k: int, h: Tensor, W: Tensor) -> Tensor:
    """specs/cr_opd.opd in plain torch: its formula is on the method's page."""
    logp = torch.log_softmax(h @ W.T, -1)
    y = data.y[:, None]
    s, t, ids = logp.gather(1, data.ids[:, :k]), data.logp[:, :k], data.ids[:, :k]
    s_y, t_y = logp.gather(1, y)[:, 0], data.logp_y
    with torch.no_grad():
        inside = (ids == y).any(1)
        own = torch.where(inside, -torch.inf, s_y)[:, None]
        other = torch.where(inside, -torch.inf, t_y)[:, None]
        a, b = torch.cat([s, own], 1), torch.cat([t, other], 1)
        rest_a, rest_b = log_rest(a)[:, 0], log_rest(b)[:, 0]
        gap = torch.where(a > -torch.inf, a - b, 0.0)
        kl = (a.exp() * gap).sum(1) + rest_a.exp() * (rest_a - rest_b)
        A = t_y - data.rollout_y
        punished = A + kl < 0
        p, q = s.exp(), t.exp()
        push = torch.where((ids != y) & (q > p) & (p >= 1e-3), q - p, 0.0)
        total = push.sum(1)
        some = total > 0
        rho = push / total.clamp(min=1e-30)[:, None]
        strength = (-A).clamp(max=5.0)
    kept = -A * s_y
    moved = strength * (s_y - (rho * s).sum(1))
    spread = A * (logp.mean(1) - s_y)
    return torch.where(punished, torch.where(some, moved, spread), kept).mean()


# ---- gates, coupled credit, the hybrid -------------------------------------------------------------


def gated_dense(data: Data, open_N: Tensor | None, tau: float, h: Tensor, W: Tensor) -> Tensor:
    """KL(S ‖ T) on some rows: masked after the fact, as trainers have it; None: H(student) > tau."""
    s = torch.log_softmax(h @ W.T, -1)
    if open_N is None:
        with torch.no_grad():
            open_N = -(s.exp() * s).sum(-1) > tau
    return (divergence(s, teacher(data), 1.0) * open_N).mean()


def picked_dense(data: Data, h: Tensor, W: Tensor) -> Tensor:
    """The same for a gate known before: somebody who picks the rows by hand."""
    rows = (~data.special).nonzero()[:, 0]
    s = torch.log_softmax(h[rows] @ W.T, -1)
    with torch.no_grad():
        t = torch.log_softmax(data.ht[rows] @ data.Wt.T, -1)
    return divergence(s, t, 1.0).sum() / data.shape.N


def returns(r: Tensor) -> Tensor:
    """Σ_{k ≥ t} r_k over [B, T]"""
    return r.flip(1).cumsum(1).flip(1)


def advantages(data: Data, kind: str, r: Tensor) -> Tensor:
    """Credit from rewards [B, T]: `whitened` returns, `gae`, `group` normalised returns."""
    if kind == "gae":
        V = data.values
        delta = r + V[:, 1:] - V[:, :-1]
        out, run = torch.empty_like(r), torch.zeros(len(r))
        for t in reversed(range(r.shape[1])):
            run = delta[:, t] + 0.95 * run
            out[:, t] = run
        return out
    G = returns(r)
    if kind == "whitened":
        return (G - G.mean()) / (G.std(correction=0) + 1e-8)
    g = G.reshape(-1, 4, G.shape[1])
    return ((g - g.mean(1, keepdim=True)) / (g.std(1, correction=0, keepdim=True) + 1e-4)).reshape(
        G.shape
    )


def coupled(data: Data, kind: str, logprob, h: Tensor, W: Tensor) -> Tensor:
    logp = logprob(h, W, data.y[:, None])[:, 0]
    r = data.seqs(data.logp_y - logp.detach())
    return -(advantages(data, kind, r).flatten() * logp).mean()


HYBRID = {"dense": 1.0, "score": 0.5, "reference": 0.05, "sft": 0.1}


def hybrid(data: Data, tau: float, parts: tuple[str, ...], kernels, h: Tensor, W: Tensor) -> Tensor:
    """Dense KL behind a gate + return-to-go score + k3 to the initial student + SFT rows.

    kernels: (divergence [N], logprob) of the peer; `parts` are computed one by one, as separate
    losses would be. The gate reads the teacher's entropy, which is handed over.
    """
    dense, logprob = kernels
    total = h.new_zeros(())
    if "dense" in parts:
        per_token = dense(data, h, W)
        total = total + HYBRID["dense"] * (per_token * (data.teacher_entropy > tau)).mean()
    if "score" in parts:
        logp = logprob(h, W, data.y[:, None])[:, 0]
        A = returns(data.seqs(data.logp_y - data.rollout_y)).flatten()
        total = total - HYBRID["score"] * (A * logp).mean()
    if "reference" in parts:
        logp = logprob(h, W, data.y[:, None])[:, 0]
        gap = data.initial_y - logp
        total = total + HYBRID["reference"] * (gap.exp() - 1 - gap).mean()
    if "sft" in parts:
        logp = logprob(data.h_gold, W, data.y_gold[:, None])[:, 0]
        total = total - HYBRID["sft"] * logp.mean()
    return total


def trl_per_token(data: Data, h: Tensor, W: Tensor) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(h, W, None, data.ht, data.Wt, None, 1.0)[0]


def naive_per_token(data: Data, h: Tensor, W: Tensor) -> Tensor:
    return divergence(torch.log_softmax(h @ W.T, -1), teacher(data), 1.0)
