"""A term as one state sees it: its own field there, and the rewards of later tokens it counts.

Whatever is needed and one state does not say raises `Unknown`.

Legend: S states, Y sampled tokens (all of them), V vocabulary, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from opdsl.ir.derive import cotangents
from opdsl.ir.program import expand_tails
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node
from opdsl.meaning.spec import Schedule, Spec, StateSource, Term
from opdsl.passport import field, kernel
from opdsl.passport.evaluate import S, Unknown, V
from opdsl.passport.returns import credit_of
from opdsl.passport.strict import PLACES, STEP, STEPS, Scene, Strict, scene

SPREADS = ((41, 1.3), (42, 3.0))  # (seed, spread) of the random states


@dataclass(frozen=True)
class Later:
    """A reward of later tokens: kernel [T, T] above the diagonal, its mean at a state."""

    kernel: np.ndarray
    mean: Callable[[Scene], np.ndarray]  # [S]


@dataclass(frozen=True)
class Piece:
    """One term. own: descent direction at a state [S, V]; weight: of a token [S, Y]."""

    own: Callable[[Scene], np.ndarray]
    weight: Callable[[Scene], np.ndarray] | None = None
    later: tuple[Later, ...] = ()
    sequences: tuple[tuple[np.ndarray, ...], ...] = ()  # ρ of every length, per reward of the whole


def per_token(spec: Spec, loss: Node, at: Scene) -> np.ndarray:
    """Descent direction [S, Y, V] of a per-token loss; NaN where one state does not say. Raises
    Unknown."""
    b, run = spec.builder, Strict(at)
    total = np.zeros((S, V, V))
    try:
        for c in cotangents(b, expand_tails(b, loss)):
            total = total + field._logits(c, run, at)
    except ValueError:
        raise Unknown("shapes of a whole batch") from None
    return total


def whole(spec: Spec, term: Term) -> Node:
    b = spec.builder
    return b.mul(b.mul(term.weight, term.gate), term.loss)


def mean_of(at: Scene, u_SYV: np.ndarray) -> np.ndarray:
    """Expectation over the token drawn; a token that is never drawn counts nothing."""
    law = at.law[:, :, None]
    with np.errstate(invalid="ignore", over="ignore"):
        out = np.where(law > 0, law * u_SYV, 0.0).sum(1)
    if not np.isfinite(out).all():
        raise Unknown("a value that couples tokens or rollouts")
    return out


def piece(spec: Spec, term: Term, exact: bool) -> Piece:
    """A term as one state sees it. Raises Unknown."""
    node = whole(spec, term)
    if not _credited(term):
        return Piece(lambda at: mean_of(at, per_token(spec, node, at)))
    if _closed(spec, term):
        return Piece(lambda at: np.zeros((S, V)))
    try:
        forms = {n: _with_exact_critics(spec, term, n) for n in (2, 3, PLACES)}
    except kernel.NotLinear as e:
        raise Unknown(str(e)) from None
    main = forms[PLACES]
    for n, form in forms.items():
        for i, (_, k) in main.tokens.items():
            small = form.tokens.get(i, (None, np.zeros((n, n))))[1]
            if np.abs(small - k[:n, :n]).max() > 1e-9:
                raise Unknown("credit that depends on the length")
    if not exact:
        raise Unknown("returns under another sampler")
    if main.others is not None and np.abs(np.triu(main.others, 1)).max() > 0:
        raise Unknown("other rollouts at later positions")
    return _reward(spec, term, main, forms)


def _credited(term: Term) -> bool:
    """A score of an advantage that reads more than one state."""
    return (
        term.route == "reward"
        and term.advantage is not None
        and term.routing.kind == "suppress"
        and not kernel._one_token(term.advantage)
    )


def _closed(spec: Spec, term: Term) -> bool:
    """Gate or weight are zero everywhere."""
    b = spec.builder
    at = scene(spec, StateSource("rollouts", "student"), *SPREADS[0])
    try:
        x = Strict(at).token(b.mul(term.weight, term.gate))
    except (Unknown, ValueError):
        return False
    return bool((x == 0).all()) and not (term.gate.q.live or term.weight.q.live)


def _with_exact_critics(spec: Spec, term: Term, n: int) -> kernel.Linear:
    """The credit's kernels, an exact critic replaced by the rewards it predicts."""
    assert term.advantage is not None
    found = kernel.linear(term.advantage, n)
    critics = dict(found.critics)
    out = kernel.Linear(found.tokens, found.sequences, {}, found.others)
    for name, k in critics.items():
        later = np.triu(k, 1)
        if not later.any():
            continue  # a baseline
        source = learner(spec, name)
        if source is None or source.signal is None:
            raise kernel.NotLinear("a critic nobody trains")
        gamma = credit_of(source).gamma
        gamma = 1.0 if gamma is None else gamma
        gap = np.arange(n)[None, :] - np.arange(n)[:, None]
        ahead = np.where(gap >= 0, float(gamma) ** np.maximum(gap, 0), 0.0)
        signal = kernel.linear(source.signal, n)
        if signal.critics or signal.others is not None:
            raise kernel.NotLinear("a critic of a critic")
        if name in found.bounded and not _never_positive(spec, signal):
            raise kernel.NotLinear("a bounded critic")
        out = out.plus(signal.map(lambda m, a=later @ ahead: a @ m))
    return out


def learner(spec: Spec, critic: str) -> Term | None:
    for t in spec.terms:
        nodes = nodes_below([t.advantage]) if t.advantage is not None else []
        if any(n.op == "input" and n.attr("critic") == critic for n in nodes):
            return t
    return None


def _never_positive(spec: Spec, signal: kernel.Linear) -> bool:
    """Whether the expected return of these rewards cannot be above zero (theory §8.2)."""
    if signal.sequences or any((k < 0).any() for _, k in signal.tokens.values()):
        return False
    means = [_mean(spec, n) for n, _ in signal.tokens.values()]
    at = scene(spec, StateSource("rollouts", "student"), *SPREADS[0])
    return all((m(at) <= 1e-12).all() for m in means)


def _mean(spec: Spec, reward: Node) -> Callable[[Scene], np.ndarray]:
    return lambda at: (at.law * _token(spec, reward, at)).sum(1)


def _token(spec: Spec, node: Node, at: Scene) -> np.ndarray:
    """Value [S, Y] of a node. Raises Unknown where one state does not say."""
    try:
        x = Strict(at).token(expand_tails(spec.builder, node))
    except ValueError:
        raise Unknown("shapes of a whole batch") from None
    if not np.isfinite(x).all():
        raise Unknown("a value that couples tokens or rollouts")
    return x


def _reward(spec: Spec, term: Term, main: kernel.Linear, forms: dict[int, kernel.Linear]) -> Piece:
    b = spec.builder
    factor = b.mul(term.weight, term.gate)
    if factor.q.live:
        raise Unknown("a live weight of a return")

    def weight(at: Scene) -> np.ndarray:
        return _token(spec, factor, at)

    def own(at: Scene) -> np.ndarray:
        place = at.place[:, 0].astype(int)
        r = np.zeros((S, V))
        for n, k in main.tokens.values():
            if np.diag(k).any():
                r = r + np.diag(k)[place][:, None] * _token(spec, n, at)
        c = at.law * weight(at) * r
        return c - c.sum(1, keepdims=True) * at.pi

    later = tuple(
        Later(np.triu(k, 1), _mean(spec, n)) for n, k in main.tokens.values() if np.triu(k, 1).any()
    )
    rho = tuple(
        tuple(f.sequences[i][1] for f in forms.values() if i in f.sequences) for i in main.sequences
    )
    return Piece(own, weight, later, rho)


def sources(spec: Spec) -> list[StateSource]:
    """Where states come from, halfway through a run."""

    return [s for s in spec.states if share_of(s) > 0] or [StateSource("rollouts", "student")]


def share_of(s: StateSource) -> float:
    """Its share of the prompts."""
    return s.share.at(STEP, STEPS) if isinstance(s.share, Schedule) else float(s.share)
