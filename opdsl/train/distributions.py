"""How student and teacher differ at sampled states: divergences, overlap, entropies, end token.

Where a teacher's whole distribution is known, everything is exact at the tokens that
`guards.measure` looks at (up to 512, evenly spaced). A served teacher that gives a list per token
yields lower bounds, on the list and one bucket for the rest, under names of their own.

Shapes: B rows, T response tokens, N measured tokens, n tokens of one chunk, k most probable
entries, K entries of a teacher's list, V vocabulary. Logarithms are natural.
"""

from __future__ import annotations

import math

import torch

from opdsl.train.forward import Forward
from opdsl.train.states import Rows
from opdsl.train.teachers import Scores

LISTED_TOKENS = 512  # tokens at which a teacher's lists are compared
CHUNK = 1 << 24  # entries of one [n, V] tensor; bounds the memory of measuring
TOP = 16  # entries whose overlap is measured (fewer where the vocabulary is small)
TINY = 1e-12  # mass below which a bucket counts as empty


def top_of(vocabulary: int) -> int:
    """How many entries `overlap` looks at: 16, and at most a quarter of the vocabulary."""
    return max(1, min(TOP, vocabulary // 4))


@torch.no_grad()
def compare(logp_NV: torch.Tensor, logq_NV: torch.Tensor, eos: int | None) -> dict[str, float]:
    """Means over tokens of what tells student p from teacher q, by the names of `opd_metrics`.

    logp_NV, logq_NV: log-probabilities over one vocabulary. eos: id of the end token, if any.
    """
    if logp_NV.shape != logq_NV.shape or logp_NV.dim() != 2:
        raise ValueError(f"student {tuple(logp_NV.shape)}, teacher {tuple(logq_NV.shape)}")
    size = max(1, CHUNK // max(1, logp_NV.shape[-1]))
    chunks = zip(logp_NV.split(size), logq_NV.split(size))
    return _means([_compared(p.float(), q.float(), eos) for p, q in chunks], len(logp_NV))


@torch.no_grad()
def compare_lists(
    forward: Forward, rows: Rows, states: torch.Tensor, scores: Scores
) -> dict[str, float]:
    """The same for a teacher of lists. states: what `forward.states` gave for these rows."""
    if scores.top_ids is None or scores.top_logprobs is None:
        return {}
    mask_BT = rows.mask & rows.own.unsqueeze(-1) if bool(rows.own.any()) else rows.mask
    index = mask_BT.nonzero()
    row, position = index[:: max(1, math.ceil(len(index) / LISTED_TOKENS))].unbind(-1)
    size = max(1, CHUNK // forward.vocabulary)
    found = []
    for b, t in zip(row.split(size), position.split(size)):
        logp_nV = forward.logits(states.detach()[b, t]).float().log_softmax(-1)
        found.append(_on_list(logp_nV, scores.top_ids[b, t], scores.top_logprobs[b, t].float()))
    return _means(found, len(row))


def _means(chunks: list[dict[str, torch.Tensor]], count: int) -> dict[str, float]:
    """Means over tokens, read back from the device once."""
    if not chunks or not count:
        return {}
    sums = [sum(c[key].double().sum() for c in chunks) for key in chunks[0]]
    return dict(zip(chunks[0], (torch.stack(sums) / count).tolist()))


def _compared(logp_nV, logq_nV, eos: int | None) -> dict[str, torch.Tensor]:
    """Student p against a teacher q that is known whole; one number per token."""
    p_nV, q_nV = logp_nV.exp(), logq_nV.exp()
    # A token of probability 0 contributes nothing, and 0 · (−inf) must not become NaN.
    gap_nV = torch.where(p_nV > 0, logp_nV - logq_nV, 0.0)
    back_nV = torch.where(q_nV > 0, logq_nV - logp_nV, 0.0)
    entropy_n = torch.special.entr(q_nV).sum(-1)
    found = {
        "kl_teacher": (q_nV * back_nV).sum(-1),
        "energy": (p_nV * gap_nV.square()).sum(-1) - (p_nV * gap_nV).sum(-1).square(),
        "teacher_entropy": entropy_n,
        "teacher_uniformity": entropy_n / math.log(max(2, logq_nV.shape[-1])),
    }
    if eos is not None and 0 <= eos < logq_nV.shape[-1]:
        found |= {"eos": p_nV[:, eos], "teacher_eos": q_nV[:, eos]}
    k = top_of(logp_nV.shape[-1])
    return found | _overlap(p_nV, q_nV, p_nV.topk(k).indices, q_nV.topk(k).indices)


def _overlap(p_nV, q_nV, ids_nk, theirs_nk) -> dict[str, torch.Tensor]:
    """What the two sets of most probable tokens share.

    overlap_advantage: p̂(v) (log q̂(v) − log p̂(v)) averaged over the shared tokens, with both
    sides renormalised on them (the definition given with arXiv 2604.13016).
    """
    shared_nk = (ids_nk.unsqueeze(-1) == theirs_nk.unsqueeze(-2)).any(-1)
    own_nk, other_nk = p_nV.gather(-1, ids_nk), q_nV.gather(-1, ids_nk)
    p_mass_n = (own_nk * shared_nk).sum(-1)
    q_mass_n = (other_nk * shared_nk).sum(-1)
    p_hat_nk = own_nk / p_mass_n.clamp_min(TINY).unsqueeze(-1)
    q_hat_nk = other_nk / q_mass_n.clamp_min(TINY).unsqueeze(-1)
    ratio_nk = q_hat_nk.clamp_min(TINY).log() - p_hat_nk.clamp_min(TINY).log()
    each_nk = torch.where(shared_nk, p_hat_nk * ratio_nk, 0.0)
    return {
        "overlap": shared_nk.float().mean(-1),
        "overlap_mass": p_mass_n,
        "overlap_teacher_mass": q_mass_n,
        "overlap_advantage": each_nk.sum(-1) / shared_nk.sum(-1).clamp_min(1),
        "student_top_teacher_mass": other_nk.sum(-1),
        "teacher_top_student_mass": p_nV.gather(-1, theirs_nk).sum(-1),
    }


def _on_list(logp_nV, ids_nK, logq_nK) -> dict[str, torch.Tensor]:
    """What a teacher's list allows: divergences on its entries and one bucket for the rest.

    Merging tokens into a bucket never raises a divergence, so both are lower bounds.
    """
    same_nKK = (ids_nK.unsqueeze(-1) == ids_nK.unsqueeze(-2)).tril(-1)
    within_nK = (ids_nK >= 0) & (ids_nK < logp_nV.shape[-1])
    known_nK = within_nK & torch.isfinite(logq_nK) & ~same_nKK.any(-1)  # an id counts once
    ids_nK = torch.where(within_nK, ids_nK, 0)
    q_nK = torch.where(known_nK, logq_nK.exp(), 0.0)
    p_nK = torch.where(known_nK, logp_nV.gather(-1, ids_nK).exp(), 0.0)
    q_n = torch.cat([q_nK, (1 - q_nK.sum(-1, keepdim=True)).clamp_min(0)], -1)
    p_n = torch.cat([p_nK, (1 - p_nK.sum(-1, keepdim=True)).clamp_min(0)], -1)
    ratio_n = p_n.clamp_min(TINY).log() - q_n.clamp_min(TINY).log()
    return {
        "kl_listed": (p_n * ratio_n).sum(-1),
        "kl_teacher_listed": (-q_n * ratio_n).sum(-1),
        "listed_student_mass": p_nK.sum(-1),
        "listed_teacher_mass": q_nK.sum(-1),
    }
