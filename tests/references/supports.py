"""Independent references of specs/supports: (loss, logit gradient [B, T, V]) by hand."""

from __future__ import annotations

import numpy as np
from references.arrays import Arrays
from references.losses import added, entropy, scaled

# ---- Many Faces (arXiv 2605.11182, ulab-uiuc/Open-On-Policy-Distillation) ----------------------------


def _faces(x, longest: int, loss):
    a = Arrays(x)
    return a.by_sequence(*loss(a), w=a.wide(a.length <= longest))


def many_faces_tail(x, k: int = 20, longest: int = 8192):
    """KL(p ‖ q) on the student's top k and a tail bucket; long responses count as zero."""
    return _faces(x, longest, lambda a: a.binned(a.top(a.lp, k)))


def many_faces_notail(x, k: int = 20, longest: int = 8192):
    """Σ_{top k of p} p (log p − log q)."""
    return _faces(x, longest, lambda a: a.reverse_raw(a.top(a.lp, k)))


def many_faces_notail_sg(x, k: int = 20, longest: int = 8192):
    """Σ_{top k of p} p (sg log p − log q)."""
    return _faces(x, longest, lambda a: a.reverse_raw(a.top(a.lp, k), held=True))


def many_faces_intersect(x, k: int = 20, longest: int = 8192):
    """Σ p̂ (sg log p̂ − log q̂), rescaled where both top k meet, 0 where they do not."""
    return _faces(x, longest, lambda a: a.reverse_inside(a.top(a.lp, k) & a.top(a.lq, k)))


# ---- Rethinking OPD (arXiv 2604.13016, thunlp/OPD): −Σ_S sg[w (log q − log p)] log p ---------------


def _rethinking(x, k: int, choose, rescaled: bool = True):
    a = Arrays(x)
    w = np.where(choose(a.top(a.lp, k), a.top(a.lq, k)), a.p, 0)
    if rescaled:
        total = w.sum(-1, keepdims=True)
        w = w / np.where(total > 0, total, 1)
    return a.mean(*a.candidates(w * (a.lq - a.lp)))


def rethinking_only_student(x, k: int = 16):
    """S = top k of p, w = p rescaled on it."""
    return _rethinking(x, k, lambda own, theirs: own)


def rethinking_only_teacher(x, k: int = 16):
    """S = top k of q."""
    return _rethinking(x, k, lambda own, theirs: theirs)


def rethinking_intersection(x, k: int = 16):
    """S = both."""
    return _rethinking(x, k, np.logical_and)


def rethinking_union(x, k: int = 16):
    """S = either."""
    return _rethinking(x, k, np.logical_or)


def rethinking_difference(x, k: int = 16):
    """S = exactly one of them, w = p as it is."""
    return _rethinking(x, k, np.logical_xor, rescaled=False)


# ---- Revisiting OPD (arXiv 2603.25562, hhh675597/revisiting_opd) -------------------------------------


def topk_match(x, k: int = 32):
    """KL(p̂ ‖ q̂) rescaled on the teacher's top k, without special tokens."""
    a = Arrays(x)
    kept = 1.0 - a.special
    return a.mean(*a.reverse_inside(a.top(a.lq, k)), w=kept, keep=kept)


def _surest_left_out(a, share: float):
    """1 on the max(1, ⌊share · length⌋) tokens of each response with the highest entropy of p."""

    def best(h):
        out = np.zeros_like(h)
        out[np.argsort(-h)[: max(1, int(share * len(h)))]] = 1
        return out

    return a.each(entropy(a.lp), best)


def revisiting_lsm(x, k: int = 32, share: float = 0.2):
    """KL(p̂ ‖ q̂) on the teacher's top 32 at the least certain fifth of each response's tokens."""
    a = Arrays(x)
    kept = _surest_left_out(a, share)
    return a.mean(*a.reverse_inside(a.top(a.lq, k)), w=kept, keep=kept)


def revisiting_append(x, k: int = 32, share: float = 0.2):
    """The same on the top 32 and the sampled token."""
    a = Arrays(x)
    kept = _surest_left_out(a, share)
    return a.mean(*a.reverse_inside(a.top(a.lq, k) | (a.ey > 0)), w=kept, keep=kept)


def revisiting_k1(x):
    """A = clip(log q − log μ, −5, 5) of the sampled token."""
    a = Arrays(x)
    return a.mean(*a.score(np.clip(a.r_mu, -5, 5)))


def revisiting_pg(x, k: int = 50):
    """A = −KL(p̂ ‖ q̂) of the state, on whichever token was sampled."""
    a = Arrays(x)
    return a.mean(*a.score(-a.reverse_inside(a.top(a.lq, k))[0]))


# ---- tail buckets ------------------------------------------------------------------------------------


def student_topk_jsd(x, k: int = 100, beta: float = 0.5):
    """JSD on the student's top 100 with a tail bucket, times min(p/μ, 2) (arXiv 2601.20802)."""
    a = Arrays(x)
    return a.mean(*a.jsd_binned(a.top(a.lp, k), beta), w=np.minimum(a.rho, 2))


def topk_bin_forward(x, k: int = 32):
    """KL(q ‖ p) on the teacher's top k with a tail bucket."""
    a = Arrays(x)
    return a.mean(*a.binned(a.top(a.lq, k), reverse=False))


def topk_bin_reverse(x, k: int = 32):
    """KL(p ‖ q) on the teacher's top k with a tail bucket."""
    a = Arrays(x)
    return a.mean(*a.binned(a.top(a.lq, k)))


def topk_sampled_tail(x, k: int = 32):
    """Σ_S p log(p/q) raw, and where y lies outside ℓ = log(p/q)(y), whose score is sg(ℓ + 1): the
    pairing that is unbiased for KL(p ‖ q) (LunjunZhang/ema-pg)."""
    a = Arrays(x)
    s = a.top(a.lq, k)
    outside = ~(s & (a.ey > 0)).any(-1)
    tail = -a.r, a.score(a.r - 1)[1]
    return a.mean(*added(a.reverse_raw(s), scaled(outside, tail)))


def two_entries(x):
    """KL(p ‖ q) between the sampled token and everything else (TRL iw_opd: loss_top_k 1 with
    loss_add_tail)."""
    a = Arrays(x)
    return a.mean(*a.binned(a.ey > 0))
