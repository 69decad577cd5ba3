"""The expected logit field of a term at one state, on small random students and teachers.

Evaluates the derived coefficients (`opdsl.ir.derive`) with every token y taken once and weighted
by π(y). That decides cheaply and for any spelling: is the field zero, is it a gradient of
KL(π ‖ π_T) or of KL(π_T ‖ π), does it vanish at π = π_T, which divergence has these values.

Legend: S states, Y sampled tokens (all of them), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opdsl.ir.derive import Cotangent, cotangents
from opdsl.ir.program import expand_tails
from opdsl.meaning.graph import nodes_below, static_value
from opdsl.meaning.node import Node
from opdsl.meaning.spec import Spec, Term
from opdsl.passport.evaluate import CUT, TINY, Evaluator, S, Unknown, V, World, random_world

# ---- fields ----------------------------------------------------------------------------------


def per_token(spec: Spec, loss: Node, world: World) -> np.ndarray | None:
    """Descent direction u [S, Y, V] of a per-token loss for every sampled token; None if the loss
    reads something this evaluator does not know."""
    b = spec.builder
    try:
        found = cotangents(b, expand_tails(b, loss))
        run = Evaluator(world)
        total = np.zeros((S, V, V))
        for c in found:
            total = total + _logits(c, run, world)
    except (Unknown, ValueError):  # ValueError: shapes that only a whole batch has
        return None
    return total


@np.errstate(all="ignore")  # what overflows is not finite, and every reader asks for that
def _logits(c: Cotangent, run: Evaluator, world: World) -> np.ndarray:
    g = np.zeros((S, V, V))
    if c.at_y is not None:
        g = g + np.eye(V)[None] * run.token(c.at_y)[:, :, None]
    for s, x in c.at_sets:
        g = g + np.where(run.mask(s), run.entries(x)[..., :V], 0.0)
    if c.dense is not None:
        g = g + run.entries(c.dense)[..., :V]
    p = np.exp(world.logp(str(c.leaf.attr("dist")), c.temperature))
    return -(g - g.sum(-1, keepdims=True) * p) / c.temperature


def expected(spec: Spec, loss: Node, world: World) -> np.ndarray | None:
    """Σ_y π(y) u: [S, V]; None where it is not decided."""
    u = per_token(spec, loss, world)
    if u is None:
        return None
    mean = (world.pi[:, :, None] * u).sum(1)
    return mean if np.isfinite(mean).all() else None


@dataclass(frozen=True)
class Shape:
    """What an expected field is: `parts` are the comparisons it descends, with coefficients that
    are the same at every state (None: it is none of these); `scaled` is the one it is parallel to
    with a coefficient that depends on the state."""

    zero: bool
    parts: dict[str, float] | None
    scaled: str | None = None

    def only(self, name: str) -> bool:
        return self.parts is not None and list(self.parts) == [name] and self.parts[name] > 0


def shape(spec: Spec, loss: Node, primary: str = "") -> Shape | None:
    """The shape of the expected field of a loss, the same near and far from agreement; None where
    it is not decided. `primary` is the teacher that T stands for."""
    found = []
    for seed, spread in ((0, 1.3), (1, 4.0)):
        world = random_world(seed, spread, primary)
        u = expected(spec, loss, world)
        if u is None:
            return None
        found.append(fitted(u, world))
    near, far = found
    if near.parts is None or far.parts is None:
        same = near.parts is None and far.parts is None and near.scaled == far.scaled
        return near if same else Shape(False, None)
    agree = set(near.parts) == set(far.parts) and all(
        abs(near.parts[n] - far.parts[n]) < 1e-6 for n in near.parts
    )
    return near if agree and near.zero == far.zero else Shape(False, None)


def fitted(u: np.ndarray, world: World) -> Shape:
    size = np.abs(u).max()
    if size < TINY:
        return Shape(True, {})
    basis = world.gradients()
    names = list(basis)
    for chosen in (["KL(student||T)"], ["KL(T||student)"], names[:2], names):
        a = np.stack([-basis[n].ravel() for n in chosen], 1)
        k, *_ = np.linalg.lstsq(a, u.ravel(), rcond=None)
        if np.abs(a @ k - u.ravel()).max() < 1e-7 * max(size, 1e-3):
            parts = {n: float(x) for n, x in zip(chosen, k) if abs(x) > 1e-7}
            return Shape(False, parts)
    for name in names[:2]:
        g = -basis[name]
        k_S = (u * g).sum(1) / (g * g).sum(1)
        if (k_S >= -TINY).all() and np.abs(u - k_S[:, None] * g).max() < 1e-7 * size:
            return Shape(False, None, name)
    return Shape(False, None)


def vanishes(spec: Spec, loss: Node, world: World) -> bool | None:
    """Whether the expected field is zero at these students."""
    u = expected(spec, loss, world)
    return None if u is None else bool(np.abs(u).max() < 1e-8)


def descends(u: np.ndarray, world: World) -> dict[str, bool]:
    """KL -> whether a small step along u lowers it at every state tried (u is [S, V])."""
    out = {}
    for name in ("KL(student||T)", "KL(T||student)"):
        out[name] = bool(((world.gradients()[name] * u).sum(1) < TINY).all())
    return out


def routed_steps(spec: Spec, term: Term, world: World) -> dict[str, bool] | None:
    """For the tokens a routing acts on: does the trigger imply log π(y) > log π_T(y), and does
    the routed step lower each KL (also KL(π ‖ π_T) with the outside of the support as one entry)
    to first order, in every case tried?"""
    how = term.routing
    if how.trigger is None:
        return None
    run = Evaluator(world)
    try:
        active = run.token(how.trigger)
        if how.routable is not None:
            active = active * run.token(how.routable)
    except (Unknown, ValueError):
        return None
    u = per_token(spec, term.loss, world)
    if u is None or not np.isfinite(active).all() or not np.isfinite(u[active > 0]).all():
        return None
    hit = active > 0
    if not hit.any():
        return None
    excess = world.pi > world.q  # [S, V] as [S, Y]
    g = world.gradients()
    out = {"punishes": bool(excess[hit].all())}
    for name in ("KL(student||T)", "KL(T||student)"):
        change = (g[name][:, None, :] * u).sum(-1)
        out[name] = bool((change[hit] < TINY).all())
    change = (_binned(world, run.mask(term.support.base)) * u).sum(-1)
    out["binned"] = bool((change[hit] < TINY).all())
    return out


def _binned(world: World, mask: np.ndarray) -> np.ndarray:
    """Logit gradient [S, Y, V] of KL(π ‖ π_T) with everything outside the support as one entry."""
    pi, q = world.pi[:, None, :], world.q[:, None, :]
    tail_p = np.where(mask, 0.0, pi).sum(-1, keepdims=True)
    tail_q = np.where(mask, 0.0, q).sum(-1, keepdims=True)
    rest = np.log(np.maximum(tail_p, 1e-300)) - np.log(np.maximum(tail_q, 1e-300))
    gap = np.where(mask, np.log(pi) - np.log(q), np.where(tail_p > 0, rest, 0.0))
    return pi * (gap - (pi * gap).sum(-1, keepdims=True))


# ---- names of losses ---------------------------------------------------------------------------


def divergence(spec: Spec, term: Term) -> str | None:
    """The loss of a term as a sum of known comparisons, by its values: `KL(student ‖ T)`,
    `0.5 JSD_0.3(T ‖ student)`; None if it is none of them."""
    return named(spec, term)[0]


def named(spec: Spec, term: Term) -> tuple[str | None, str | None]:
    """(the loss in known comparisons, the tail rule they are taken under). A loss over a raw
    support may renormalise, or add an entry for the rest, by hand."""
    tail = term.support.tail
    if len([t for t in term.teachers if t != "initial"]) > 1:
        return None, tail
    by_hand = ("renormalize", "bin") if tail == "drop" and not _holds(term.loss) else ()
    for rule in (tail, *by_hand):
        near, far = (
            _fit(spec, term, random_world(*where), rule) for where in ((23, 1.3), (24, 4.0))
        )
        if near is None or far is None or set(near) != set(far):
            continue
        if all(abs(near[n] - far[n]) < 1e-6 for n in near):
            return _sum(near), rule
    return None, tail


def _holds(loss: Node) -> bool:
    """A stop-gradient of something live: values say less than the gradient then."""
    return any(n.op == "sg" and n.args[0].q.live for n in nodes_below([loss]))


@np.errstate(all="ignore")  # values near the largest number fit nothing
def _fit(spec: Spec, term: Term, world: World, tail: str | None) -> dict[str, float] | None:
    """Comparison -> coefficient, for the values of a loss in one world, under a tail rule."""
    try:
        run = Evaluator(world)
        value_SY = run.token(expand_tails(spec.builder, term.loss))
        if not np.abs(value_SY - value_SY[:, :1]).max() <= TINY:  # also where it is NaN
            return None
        pairs = _sides(term, world, run, tail)
    except (Unknown, ValueError):
        return None
    value = value_SY[:, 0]
    if np.abs(value).max() <= TINY:
        return None  # a constant 0 compares nothing
    fixed = {x for n in nodes_below([term.loss]) if (x := static_value(n)) is not None}
    betas = {x for x in (*fixed, *(float(np.exp(x)) for x in fixed if -9 < x < 0)) if 0 < x < 1}
    basis = _values(*pairs, sorted({round(x, 12) for x in betas}))
    size = max(float(np.abs(value).max()), 1e-3)
    for name, x in basis.items():
        k = float((value @ x) / max(float(x @ x), 1e-300))
        if abs(k) > 1e-9 and np.abs(value - k * x).max() < 1e-9 * size:
            return {name: k}
    names = [n for n in basis if n.split("(")[0] in ("KL", "H") and "+" not in n]
    a = np.stack([basis[n] for n in names], 1)
    if not np.isfinite(a).all() or not np.isfinite(value).all():
        return None
    k, *_ = np.linalg.lstsq(a, value, rcond=None)
    found = {n: float(x) for n, x in zip(names, k) if abs(x) > 1e-7}
    return found if len(found) <= 3 and np.abs(a @ k - value).max() < 1e-8 * size else None


def _sides(
    term: Term, world: World, run: Evaluator, tail: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Student, teacher and start [S, W] on the support of a term, under a tail rule."""
    out = []
    mask = np.broadcast_to(run.mask(term.support.base)[:, 0], (S, V))
    for p in (world.pi, world.q, world.p0):
        inside = np.where(mask, p, 0.0)
        if tail == "renormalize":
            mass = inside.sum(1, keepdims=True)  # nothing where the set is empty
            inside = inside / np.where(mass > 0, mass, 1.0)
        if tail == "bin":
            inside = np.concatenate([inside, np.where(mask, 0.0, p).sum(1, keepdims=True)], 1)
        out.append(inside)
    return out[0], out[1], out[2]


def _values(
    p: np.ndarray, q: np.ndarray, r: np.ndarray, betas: list[float]
) -> dict[str, np.ndarray]:
    """Comparison -> value [S], for the pairs a loss may compare."""

    def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        safe = np.where((a > 0) & (b > 0), a / np.where(b > 0, b, 1.0), 1.0)
        return np.log(safe)

    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * ratio(a, b)).sum(1)

    def entropy(a: np.ndarray) -> np.ndarray:
        return -(a * np.log(np.where(a > 0, a, 1.0))).sum(1)

    out = {
        "KL(student ‖ T)": kl(p, q),
        "KL(T ‖ student)": kl(q, p),
        "KL(student ‖ initial)": kl(p, r),
        "KL(initial ‖ student)": kl(r, p),
        "H(student)": entropy(p),
        "H(T)": entropy(q),
        "TV(student, T)": np.abs(p - q).sum(1) / 2,
        "squared Hellinger(student, T)": ((p**0.5 - q**0.5) ** 2).sum(1) / 2,
        "χ²(student ‖ T)": (np.where(q > 0, (p - q) ** 2 / np.where(q > 0, q, 1.0), 0.0)).sum(1),
        "χ²(T ‖ student)": (np.where(p > 0, (p - q) ** 2 / np.where(p > 0, p, 1.0), 0.0)).sum(1),
        "‖student − T‖²": ((p - q) ** 2).sum(1),
    }
    for beta in betas:
        m = beta * q + (1 - beta) * p
        out[f"JSD_{beta:g}(T ‖ student)"] = beta * kl(q, m) + (1 - beta) * kl(p, m)
        out[f"KL(student ‖ {1 - beta:g} student + {beta:g} T)"] = kl(p, m)
        out[f"KL(T ‖ {1 - beta:g} student + {beta:g} T)"] = kl(q, m)
        out[f"KL({1 - beta:g} student + {beta:g} T ‖ T)"] = kl(m, q)
        out[f"KL({1 - beta:g} student + {beta:g} T ‖ student)"] = kl(m, p)
    return out


def _sum(parts: dict[str, float]) -> str:
    out = ""
    for name, k in parts.items():
        size = "" if abs(abs(k) - 1) < 1e-9 else f"{abs(k):.4g} "
        sign = ("" if k > 0 else "−") if not out else (" + " if k > 0 else " − ")
        out += f"{sign}{size}{name}"
    return out


__all__ = ["CUT", "TINY", "Evaluator", "S", "Shape", "Unknown", "V", "World", "random_world"]
