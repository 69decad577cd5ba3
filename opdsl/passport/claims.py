"""The four claims of a passport, and where each answer comes from.

All are about the expected gradient F(θ) of the loss per rollout, for tabular students: every
prefix has logits of its own. States are drawn as the method draws them, so the visits move with
the student where it samples; batch-wide denominators count as step sizes; numbers that move with
the step are taken halfway through a run; a critic is exact (the expected return of its own signal
under the present student), because a wrong one changes with training. Thresholds are looked at from
either side, never across.

zero_expected_gradient   F = 0 at every student.
stationary_at_teacher    F = 0 where the student equals its teacher: with several, the first one a
                         term reads; with a routed one, each prompt's own. A field that jumps there
                         is not decided.
conservative             F is, locally, the gradient of a scalar of the student's logits, visits
                         included.
unbiased                 J_seq: F is a positive multiple of ∇ KL(student ‖ T) over whole responses
                         of the student. J_fro: of Σ_s sg(d(s)) ∇ KL(student ‖ T)(s), d the visits
                         of the method's own states. One factor for all prompts. A zero field is
                         neither.

Positive answers are derived (`local`); negative ones are derived, or are a counterexample found by
enumerating a tiny model (`search`), which loads torch, and only where derivation leaves a claim
open.
"""

from __future__ import annotations

import numpy as np

from opdsl.meaning.node import Node
from opdsl.meaning.spec import Spec, Term
from opdsl.passport import field
from opdsl.passport.evaluate import Unknown
from opdsl.passport.fit import Twice, fitted
from opdsl.passport.local import STILL, Claims, derived
from opdsl.passport.pieces import SPREADS, mean_of, per_token, sources, whole
from opdsl.passport.strict import Scene, Strict, scene

FAR = 10**9  # no set or shift is cut


def claims(spec: Spec, search: bool = True) -> Claims:
    """The four claims; without `search` only what derivation decides."""
    try:
        fit = _cut(spec)
    except Twice:
        return Claims()
    out = _safe(fit, None).filled(_term_by_term(fit))
    if None in vars(out).values():
        for outcome in (0.0, 1.0):  # a verifier that always says the same is a verifier
            if _reads_outcome(fit):
                out = out.filled(_safe(fit, outcome).negative())
    if search and _open(spec, out):
        from opdsl.passport.search import search as searched

        out = out.filled(searched(spec, out))
    return out


def _open(spec: Spec, c: Claims) -> bool:
    taught = any(t != "initial" for term in spec.terms for t in term.teachers)
    names = ("zero", "conservative", *(("stationary", "j_seq", "j_fro") if taught else ()))
    return any(getattr(c, n) is None for n in names)


def _safe(spec: Spec, outcome: float | None) -> Claims:
    try:
        return derived(spec, outcome)
    except (Unknown, FloatingPointError):
        return Claims()


def _reads_outcome(spec: Spec) -> bool:
    from opdsl.meaning.graph import reads

    return any(reads(whole(spec, t), "outcome") for t in spec.terms)


def _cut(spec: Spec) -> Spec:
    """Thresholds moved to where random states lie on both sides."""
    at = scene(spec, sources(spec)[0], *SPREADS[0])

    def values(n: Node) -> np.ndarray | None:
        try:
            return Strict(at)(n)
        except (Unknown, ValueError):
            return None

    return fitted(spec, values, FAR, FAR).spec


# ---- term by term --------------------------------------------------------------------------------


def _term_by_term(spec: Spec) -> Claims:
    """Zero and stationary where every term is so by itself, whatever gates and weights read."""
    main = [t for t in spec.terms if t.rows == "main"]
    if len(main) < len(spec.terms):
        return Claims(zero=False, stationary=False, j_seq=False, j_fro=False) if main else Claims()
    taught = any(t != "initial" for term in spec.terms for t in term.teachers)
    by_length = spec.aggregate in ("sequences", "response_length")
    zero = still = True
    for s in sources(spec):
        for where in SPREADS:
            at = scene(spec, s, *where)
            zero = zero and all(_nothing(spec, t, at, by_length) for t in main)
            same, near = at.at_teacher(), at.near_teacher()
            same, near = _with_critics(spec, same), _with_critics(spec, near)
            still = still and all(
                _nothing(spec, t, x, by_length) for t in main for x in (same, near)
            )
    out = Claims(zero=zero or None, stationary=(still and taught) or None)
    return out.filled(Claims(None, None, True, False, False)) if zero else out


def _with_critics(spec: Spec, at: Scene) -> Scene:
    """At the teacher an exact critic says 0 if every signal is 0 there."""
    from dataclasses import replace

    signals = [t.signal for t in spec.terms if t.advantage is not None and t.signal is not None]
    try:
        quiet = all(np.abs(Strict(at).token(x)).max() < STILL / 10 for x in signals)
    except (Unknown, ValueError):
        return at
    return replace(at, critic_zero=quiet)


def _nothing(spec: Spec, term: Term, at: Scene, by_length: bool) -> bool:
    """No gradient on any sample, or none in the mean over the token where nothing else couples."""
    live = term.gate.q.live or term.weight.q.live
    nodes = [whole(spec, term)] if live else [term.loss, whole(spec, term)]
    for node in nodes:
        try:
            u = per_token(spec, node, at)
        except Unknown:
            continue
        u = np.where(at.law[:, :, None] > 0, u, 0.0)
        if np.isfinite(u).all() and np.abs(u).max() < STILL:
            return True
    if by_length:
        return False
    try:
        return float(np.abs(mean_of(at, per_token(spec, nodes[-1], at))).max()) < field.TINY * 1e3
    except Unknown:
        return False
