"""The student a method is pulled to: closed forms of the target algebra, each checked by value.

Theory §11.6 and §7; a closed form is printed only if the derived field vanishes there.
"""

from __future__ import annotations

import numpy as np

from opdsl.meaning.node import Node
from opdsl.meaning.spec import Spec, Term
from opdsl.passport import field
from opdsl.passport.objective import FKL, RKL, View

UNDECIDED = "not decided"


# ---- the field at a state --------------------------------------------------------------------


def whole(spec: Spec, term: Term) -> Node:
    """A term with its gate and weight."""
    b = spec.builder
    return b.mul(b.mul(term.weight, term.gate), term.loss)


def main_terms(spec: Spec) -> list[Term]:
    return [t for t in spec.terms if t.rows == "main"]


def total_field(spec: Spec, world: field.World) -> np.ndarray | None:
    """The expected field of all terms at visited states [S, V], if all are known there."""
    total = np.zeros((field.S, field.V))
    for term in main_terms(spec):
        u = field.expected(spec, whole(spec, term), world)
        if u is None:
            return None
        total = total + u
    return total


# ---- fixed point -------------------------------------------------------------------------------


def fixed_point(spec: Spec, found: list[View], stationary: bool | None, zero: bool | None) -> str:
    """The student at which the field vanishes, in closed form where there is one (§11.6)."""
    if zero:
        return "every student: the expected field is zero"
    main = [v for v in found if v.term.rows == "main"]
    teacher = _teacher_name(main)
    if any(v.term.rows == "golden" for v in found):
        return "none in closed form: given text pulls beside the teacher"
    if any(v.credit.kind not in ("none", "immediate") for v in main):
        if stationary and all(v.shape is not None and v.shape.zero for v in main):
            return f"π_{teacher} is stationary, but nothing compares the tokens of one state"
        if stationary:
            whole = any(v.credit.kind in ("return_to_go", "full", "future", "gae") for v in main)
            tilt = f" (at one state ∝ π_{teacher} · exp V: the later tokens count)" if whole else ""
            return f"π_{teacher}{tilt}"
        return UNDECIDED
    cut = _cut_point(spec, main, teacher)
    if cut is not None:
        return cut
    world = world_of(spec, 7)
    total = total_field(spec, world)
    if total is not None:
        closed = _closed_form(spec, field.fitted(total, world), world, teacher)
        if closed is not None:
            return closed
    if stationary:
        pulls = _attracts(spec)
        return f"π_{teacher}" + (
            "" if pulls is not False else " is stationary, but does not attract"
        )
    if stationary is False:
        several = len({t for v in main for t in v.term.teachers if t != "initial"}) > 1
        return "none in closed form" + ("" if several else f"; not π_{teacher}")
    return UNDECIDED


def _attracts(spec: Spec) -> bool | None:
    """Whether students close to the teacher come closer; None where neither is clear."""
    world = world_of(spec, 29)
    noise = np.random.default_rng(31).normal(0, 0.05, world.q.shape)
    here = _near(world, np.log(world.q) + noise)
    total = total_field(spec, here)
    if total is None:
        return None
    if field.descends(total, here)[RKL]:
        return True
    start, z = _distance(here), here.student[:, 0]
    for _ in range(40):  # the field need not lower KL at every step: follow it for a while
        total = total_field(spec, here)
        if total is None:
            return None
        z = z + np.clip(2.0 * total, -0.5, 0.5)
        here = _near(world, z)
    end = _distance(here)
    if (end < 0.9 * start).all():
        return True
    return False if (end > 1.1 * start).any() else None


def _near(world: field.World, z: np.ndarray) -> field.World:
    p = np.exp(z - z.max(1, keepdims=True))
    return world.with_student(p / p.sum(1, keepdims=True))


def _distance(world: field.World) -> np.ndarray:
    return (world.pi * (np.log(world.pi) - np.log(world.q))).sum(1)


def world_of(spec: Spec, seed: int) -> field.World:
    """Random states; T is the first teacher that a term reads."""
    names = [t for term in spec.terms for t in term.teachers if t != "initial"]
    return field.random_world(seed, 1.3, names[0] if names else "")


def _teacher_name(found: list[View]) -> str:
    names = {t for v in found for t in v.term.teachers if t != "initial"}
    return next(iter(names)) if len(names) == 1 else next((v.teacher for v in found), "T")


def _cut_point(spec: Spec, main: list[View], teacher: str) -> str | None:
    """A single divergence on a cut support; the claim is checked on random states."""
    if len(main) != 1 or main[0].cut is None or main[0].term.route != "loss":
        return None
    q, tail, view = f"π_{teacher}", main[0].cut, main[0]
    world = world_of(spec, 7)
    loss = view.term.loss
    if tail == "renormalize":
        return f"any student with the shape of {q} inside the support; mass outside is free"
    if tail in ("bin", "sampled") and field.vanishes(spec, loss, world.at_teacher()):
        if tail == "sampled":
            return q
        return f"{q} on the support and in total outside it; the shape outside is free"
    top = _support(view.term, world)
    if top is None:
        return UNDECIDED
    inside = np.where(top, world.q, 1e-13)
    inside = inside / inside.sum(1, keepdims=True)
    mass = np.where(top, world.q, 0.0).sum(1, keepdims=True)
    if field.vanishes(spec, loss, world.with_student(inside)):
        if field.vanishes(spec, loss, world.with_student(_reshaped(inside))):
            return "no single point: the field is zero wherever the bound acts"
        if _erases(spec, loss, world, top):
            return f"{q} renormalised on the support; everything outside is erased"
    plain = (field.divergence(spec, view.term) or "").endswith("KL(student ‖ T)")
    shrunk = np.where(top, world.q / np.e, world.q * (1 - mass / np.e) / (1 - mass))
    if plain and field.vanishes(spec, loss, world.with_student(shrunk)):
        return (
            f"the shape of {q} on the support with total mass π_{teacher}(Ω)/e: mass is pushed out"
        )
    if field.vanishes(spec, loss, world.at_teacher()):
        return f"{q} on the support; the mass outside is free"
    return UNDECIDED


def _reshaped(p_SV: np.ndarray) -> np.ndarray:
    """Students of a slightly different shape, with mass where p has it."""
    noise = np.random.default_rng(37).normal(0, 0.02, p_SV.shape)
    out = p_SV * np.exp(noise)
    return out / out.sum(1, keepdims=True)


def _support(term: Term, world: field.World) -> np.ndarray | None:
    """The entries of a support [S, V]; None where they differ by the sampled token."""
    try:
        mask = field.Evaluator(world).mask(term.support.base)
    except field.Unknown:
        return None
    return mask[:, 0] if (mask == mask[:, :1]).all() else None


def _erases(spec: Spec, loss: Node, world: field.World, top: np.ndarray) -> bool:
    """Whether a student with the teacher's shapes loses what it holds outside, however little."""
    inside = np.where(top, world.q, 0.0)
    outside = np.where(top, 0.0, world.q)
    inside, outside = (x / x.sum(1, keepdims=True) for x in (inside, outside))
    for share in (1e-2, 1e-4):
        p = (1 - share) * inside + share * outside
        u = field.expected(spec, loss, world.with_student(p))
        if u is None:
            return False
        flow = p * (u - (p * u).sum(1, keepdims=True))  # dπ along the descent direction u
        if not (np.where(top, 0.0, flow).sum(1) < -1e-3 * share**2).all():
            return False
    return True


def _closed_form(spec: Spec, s: field.Shape, world: field.World, teacher: str) -> str | None:
    """∝ π_T^a π_0^b, or a mixture, where the field is made of KLs and entropy; then checked."""
    if s.parts is None or s.zero:
        return None
    k = {n: x for n, x in s.parts.items()}
    q, r = f"π_{teacher}", "π_0"
    if set(k) <= {RKL, FKL}:
        return q if all(x > 0 for x in k.values()) else None
    if set(k) <= {RKL, "KL(student||initial)", "-H(student)"}:
        a, b, h = (k.get(n, 0.0) for n in (RKL, "KL(student||initial)", "-H(student)"))
        total = a + b + h
        if min(a, total) <= 0 or b < 0:
            return None
        p = np.exp((a * np.log(world.q) + b * np.log(world.p0)) / total)
        text = f"∝ {q}^{_power(a / total)}" + (f" · {r}^{_power(b / total)}" if b else "")
    elif set(k) <= {FKL, "KL(initial||student)"} and min(k.values()) > 0:
        a, b = k.get(FKL, 0.0), k.get("KL(initial||student)", 0.0)
        p = (a * world.q + b * world.p0) / (a + b)
        text = f"{a / (a + b):.3g} {q} + {b / (a + b):.3g} {r}"
    else:
        return None
    total_at = total_field(spec, world.with_student(p / p.sum(1, keepdims=True)))
    return text if total_at is not None and np.abs(total_at).max() < 1e-7 else None


def _power(x: float) -> str:
    return f"{x:.4g}"
