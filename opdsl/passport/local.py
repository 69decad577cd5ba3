"""The four claims of a method whose terms are sums of rewards of single tokens, decided exactly.

Such a method's expected field at a state s visited with probability d(s) has two parts (T2, T3):

    F(s) = d(s) [ f(s) + E Σ_{k>t} Σ_i ω_i(t) K_i[t, k] ∇log π(y_t) m_i(s_k) ]

f is read off one state; m_i(s) is the mean of reward i there; K_i is the credit's kernel, ω_i a
weight of the position. So F follows J_seq iff f = −c ∇KL and Σ_i ω_i K_i m_i = −c KL for every
t < k; it follows J_fro (states frozen where the method visits them) iff f = −c ∇KL and nothing
comes later; and it is the gradient of a scalar iff f(s_k) = Σ_i ω_i(t) K_i[t, k] ∇m_i(s_k) for
every t < k, which is T4 for any kernel. Each side is evaluated on random states near and far from
agreement. A critic counts as exact: where a credit bootstraps with it, later rewards of its own
signal stand there instead (the tower rule).

Whatever the decision needs and one state does not say raises `Unknown`.

Legend: S states, Y sampled tokens (all of them), V vocabulary, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from opdsl.meaning.spec import Spec
from opdsl.passport import field
from opdsl.passport.evaluate import S, Unknown, V
from opdsl.passport.pieces import SPREADS, Later, Piece, piece, sources
from opdsl.passport.strict import PLACES, Scene, scene

TINY = 1e-7  # relative to the field
STILL = 1e-5  # at the teacher: a bent reward may keep a millionth there (shape power)


@dataclass(frozen=True)
class Claims:
    """None is not decided."""

    zero: bool | None = None
    stationary: bool | None = None
    conservative: bool | None = None
    j_seq: bool | None = None
    j_fro: bool | None = None

    def filled(self, other: Claims) -> Claims:
        """Own answers first."""
        pairs = zip(vars(self).items(), vars(other).values())
        return Claims(**{k: (b if a is None else a) for (k, a), b in pairs})

    def negative(self) -> Claims:
        return Claims(**{k: (False if v is False else None) for k, v in vars(self).items()})


# ---- the whole method ------------------------------------------------------------------------


def derived(spec: Spec, outcome: float | None = None) -> Claims:
    """What one state decides. With an outcome, for a verifier that always gives it: then only
    negative answers hold in general."""
    main = [t for t in spec.terms if t.rows == "main"]
    golden = len(main) < len(spec.terms)
    by_length = spec.aggregate in ("sequences", "response_length")
    taught = any(t != "initial" for term in spec.terms for t in term.teachers)
    views = []
    for s in sources(spec):
        worlds = [scene(spec, s, *where, outcome=outcome) for where in SPREADS]
        pieces = [piece(spec, t, worlds[0].exact) for t in main]
        views.append(_View(worlds, pieces))
    later = any(v.later for v in views)
    if any(p.sequences for v in views for p in v.pieces):
        return _with_sequences(views, by_length, taught) if outcome is None else Claims()
    zero = golden is False and all(v.zero() for v in views)
    if zero and by_length:  # each token's mean may be zero and a multiple by 1/T not
        return Claims()
    stationary = None
    if taught:
        answers = [v.still() for v in views]
        stationary = False if golden or False in answers else (
            None if by_length or None in answers else True
        )  # fmt: skip
    if golden or zero:
        j_seq = j_fro = False
    else:
        j_seq, j_fro = _unbiased(views)
    if by_length and not zero:
        j_seq = j_fro = False
    if not taught:
        j_seq = j_fro = None
    conservative = _conservative(views)
    if by_length:
        conservative = False if conservative is False and not later else None
    return Claims(zero, stationary, conservative, j_seq, j_fro)


def _with_sequences(views: list[_View], by_length: bool, taught: bool) -> Claims:
    """Some reward is a number of the whole response: it pulls wherever the verifier says."""
    if by_length or len(views) > 1:
        return Claims()
    (v,) = views
    level = all(
        np.abs(rho - rho[0]).max() < 1e-9
        for p in v.pieces
        for lengths in p.sequences
        for rho in lengths
    ) and all(v.positional(p) is not None for p in v.pieces if p.sequences)
    steady = level and all(
        np.ptp(v.positional(p)) < 1e-9  # type: ignore[arg-type]
        for p in v.pieces
        if p.sequences
    )
    conservative = _conservative(views) if steady else False
    no = False if taught else None
    return Claims(False, no, conservative, no, no)


class _View:
    """All terms under one source of states."""

    def __init__(self, worlds: list[Scene], pieces: list[Piece]):
        self.worlds, self.pieces = worlds, pieces
        self.own = [self.field(w) for w in worlds]
        self.later = [(p, x) for p in pieces for x in p.later]
        self.size = max(float(np.abs(f).max()) for f in self.own)

    def field(self, at: Scene) -> np.ndarray:
        out = np.zeros((S, V))
        for p in self.pieces:
            out = out + p.own(at)
        return out

    def positional(self, p: Piece) -> np.ndarray | None:
        """ω(t) [T] of a term whose weight is a function of the position; else None."""
        assert p.weight is not None
        rows = [[] for _ in range(PLACES)]
        for w in self.worlds:
            for t, row in zip(w.place[:, 0].astype(int), p.weight(w)):
                rows[t].append(row)
        stacked = [np.concatenate(r) for r in rows]
        if any(np.ptp(x) > 1e-9 for x in stacked):
            return None
        return np.array([x[0] for x in stacked])

    def silent(self, x: Later, worlds: list[Scene]) -> bool:
        """A later reward whose mean is zero at every state."""
        return all(np.abs(x.mean(w)).max() < 1e-9 for w in worlds)

    def zero(self) -> bool | None:
        if self.size > field.TINY:
            return False
        loud = [x for _, x in self.later if not self.silent(x, self.worlds)]
        return True if not loud else _lone(loud)

    def still(self) -> bool | None:
        """Whether the field is zero at the teacher; None where it jumps there."""
        at = [w.at_teacher() for w in self.worlds]
        near = [w.near_teacher() for w in self.worlds]
        scale = min(max(self.size, 1e-3), 1.0)
        here = max(float(np.abs(self.field(w)).max()) for w in at) / scale
        beside = max(float(np.abs(self.field(w)).max()) for w in near) / scale
        if (here < STILL) != (beside < STILL):
            return None
        if here >= STILL:
            return False
        loud = [x for _, x in self.later if max(np.abs(x.mean(w)).max() for w in at) > STILL]
        return True if not loud else _lone(loud)

    def multiple(self) -> float | None:
        """c with f = −c ∇KL at every state."""
        gradients = [w.gradients()["KL(student||T)"] for w in self.worlds]
        k = [-float((f * g).sum() / (g * g).sum()) for f, g in zip(self.own, gradients)]
        c = k[0]
        if max(abs(x - c) for x in k) > 1e-6 * abs(c) or abs(c) < 1e-9:
            return None
        for f, g in zip(self.own, gradients):
            if np.abs(f + c * g).max() > TINY * max(float(np.abs(f).max()), 1e-3):
                return None
        return c

    def occupancy(self) -> np.ndarray | None:
        """Σ_i ω_i K_i β_i [T, T] with m_i = −β_i KL; None where a part is no multiple of KL."""
        total, odd = np.zeros((PLACES, PLACES)), []
        for p, x in self.later:
            if self.silent(x, self.worlds):
                continue
            weight, beta = self.positional(p), _share_of_kl(x, self.worlds)
            if weight is None or beta is None:
                odd.append(x)
            else:
                total = total + weight[:, None] * x.kernel * beta
        if not odd:
            return total
        _lone(odd)
        return None


def _lone(parts: list) -> bool:
    """One part that is not zero cannot cancel; several might."""
    if len(parts) > 1:
        raise Unknown("several returns that may cancel")
    return False


def _share_of_kl(x: Later, worlds: list[Scene]) -> float | None:
    betas = []
    for w in worlds:
        kl = (w.pi * (np.log(w.pi) - np.log(w.q))).sum(1)
        m = x.mean(w)
        beta = -float((m @ kl) / (kl @ kl))
        if np.abs(m + beta * kl).max() > TINY * max(float(np.abs(m).max()), 1e-3):
            return None
        betas.append(beta)
    return betas[0] if np.ptp(betas) < 1e-6 * max(abs(betas[0]), 1e-9) else None


def _unbiased(views: list[_View]) -> tuple[bool, bool]:
    """(J_seq, J_fro), up to a positive factor."""
    scales = [v.multiple() for v in views]
    if any(c is None or c <= 0 for c in scales):
        return False, False
    c = scales[0]
    assert c is not None
    if any(abs(x - c) > 1e-6 * c for x in scales):  # type: ignore[operator]
        return False, False
    above = np.triu(np.ones((PLACES, PLACES)), 1)
    later = [v.occupancy() for v in views]
    j_fro = all(x is not None and np.abs(x).max() < 1e-9 for x in later)
    own = len(views) == 1 and views[0].worlds[0].exact
    j_seq = own and later[0] is not None and np.abs(later[0] - c * above).max() < 1e-6 * c
    return bool(j_seq), bool(j_fro)


# ---- is it a gradient? -------------------------------------------------------------------------


def _conservative(views: list[_View]) -> bool | None:
    moving = [v for v in views if v.worlds[0].moves]
    if len(moving) > 1:
        if any(_beyond_start(v) for v in moving) and not any(v.later for v in moving):
            return False if all(v.worlds[0].moves for v in views) else None
        raise Unknown("several policies that move with the student")
    answers = []
    for v in views:
        if not v.worlds[0].moves:
            answers.append(_symmetric(v, slice(None)))
        elif v.worlds[0].exact:
            answers.append(_telescopes(v) and _symmetric(v, v.worlds[0].place[:, 0] == 0))
        else:
            answers.append(not _beyond_start(v) and _symmetric(v, v.worlds[0].place[:, 0] == 0))
    return all(answers)


def _beyond_start(v: _View) -> bool:
    """A field behind the first token."""
    behind = v.worlds[0].place[:, 0] > 0
    return any(np.abs(f[behind]).max() > field.TINY for f in v.own)


def _telescopes(v: _View) -> bool:
    """f(s_k) = Σ_i ω_i(t) K_i[t, k] ∇m_i(s_k), and Σ_i ω_i(t) K_i[t, k] m_i the same for all t."""
    parts, odd = [], []
    for p, x in v.later:
        if v.silent(x, v.worlds):
            continue
        weight = v.positional(p)
        (odd if weight is None else parts).append((weight, x))
    if odd:
        return _lone(odd)
    for w, f in zip(v.worlds, v.own):
        place = w.place[:, 0].astype(int)
        slopes = [_slope(x.mean, w) for _, x in parts]
        means = [x.mean(w) for _, x in parts]
        scale = max(float(np.abs(f).max()), *(float(np.abs(g).max()) for g in slopes), 1e-3)
        for s in np.flatnonzero(place > 0):
            k = place[s]
            rows = [[q[t] * x.kernel[t, k] for q, x in parts] for t in range(k)]  # type: ignore[index]
            for row in rows:
                want = sum((a * g[s] for a, g in zip(row, slopes)), np.zeros(V))
                if np.abs(want - f[s]).max() > 1e-6 * scale:
                    return False
            totals = [sum(a * m[s] for a, m in zip(row, means)) for row in rows]
            if totals and np.ptp(totals) > 1e-6 * scale:
                return False
    return True


STEP_Z = 1e-5


def _slope(f: Callable[[Scene], np.ndarray], at: Scene) -> np.ndarray:
    """∂f/∂z [S, …, V] with respect to the student's logits at the state."""
    parts = [(f(at.nudged(i, STEP_Z)) - f(at.nudged(i, -STEP_Z))) / (2 * STEP_Z) for i in range(V)]
    return np.stack(parts, -1)


def _symmetric(v: _View, rows: slice | np.ndarray) -> bool:
    """Whether the field of a state is the gradient of a scalar of that state's logits."""
    w, f = v.worlds[0], v.own[0]
    if np.abs(f[rows]).max() < field.TINY:
        return True
    j = _slope(v.field, w)[rows]
    return bool(np.abs(j - j.swapaxes(1, 2)).max() < 1e-5 * max(float(np.abs(j).max()), 1e-6))
