"""What a method does on one small model: bias, zero field, fixed teacher, curl, variance, descent.

Every number is exact up to rounding, except the curl, which is taken by central differences along
a few random directions: for the gradient of a scalar, a · (∂F/∂b) = b · (∂F/∂a).

Legend: P prompts, S states, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdsl.passport.model import Small

ZERO = 1e-9  # a field below this, relative to 1 nat, is zero
STILL = 1e-5  # at the teacher, relative to the field elsewhere
CURL = 1e-5  # relative asymmetry of the Jacobian
BIAS = 1e-6  # relative residual
STEP, DIRECTIONS = 1e-5, 4


@dataclass(frozen=True)
class Bias:
    """Distance of the expected gradient F from a gradient G. k: the best positive factor of G (0:
    none helps). residual: ‖F − kG‖ / ‖F‖. cosine: between both."""

    k: float
    residual: float
    cosine: float

    @property
    def none(self) -> bool:
        return self.k > 0 and self.residual < BIAS


@dataclass(frozen=True)
class Measurement:
    """size: ‖F‖. at_teacher: ‖F‖ there over ‖F‖ here, None without a teacher; jumps: it is another
    number a hair beside. curl: ‖J − Jᵀ‖ / ‖J‖. bias: by objective. descent: KL -> objective ->
    cosine of −F with the direction of steepest descent."""

    size: float
    at_teacher: float | None
    jumps: bool
    curl: float | None
    bias: dict[str, Bias]
    descent: dict[str, float]
    variance: float

    @property
    def zero(self) -> bool:
        return self.size < ZERO

    @property
    def stationary(self) -> bool | None:
        if self.at_teacher is None or self.jumps:
            return None
        return self.at_teacher < STILL

    @property
    def conservative(self) -> bool | None:
        return None if self.curl is None else self.curl < CURL

    def unbiased(self, name: str) -> bool | None:
        return self.bias[name].none if name in self.bias else None


def measure(m: Small, curl: bool = True, wrong: bool = False) -> Measurement:
    """All of it for one model. wrong: with a wrong critic."""
    z = m.student_PSV
    found = m.field(z, wrong)
    f = found.gradient
    size = float(f.norm())
    taught = m.at_teacher()
    at_teacher, jumps = None, False
    if taught is not None:
        scale = min(max(size, 1e-3), 1.0)
        g = torch.Generator().manual_seed(7)
        noise = 1e-9 * torch.randn(z.shape, generator=g, dtype=z.dtype)
        at_teacher = float(m.field(taught, wrong).gradient.norm()) / scale
        beside = float(m.field(taught + noise, wrong).gradient.norm()) / scale
        jumps = (at_teacher < STILL) != (beside < STILL)
    bias, descent = {}, {}
    if taught is not None:
        seq, fro = m.sequence_gradient(z), m.frozen_gradient(z)
        bias = {"J_seq": _bias(f, seq), "J_fro": _bias(f, fro)}
        ways = {
            "KL(student||T)": fro,
            "KL(T||student)": m.frozen_gradient(z, True),
            "KL(student||T) of sequences": seq,
            "KL(T||student) of sequences": m.sequence_gradient(z, True),
        }
        descent = {name: _cosine(f, g) for name, g in ways.items()}
    return Measurement(
        size,
        at_teacher,
        jumps,
        (_curl(m, wrong) if size >= ZERO else 0.0) if curl else None,
        bias,
        descent,
        found.variance,
    )


def _bias(f: Tensor, g: Tensor) -> Bias:
    norm = float(f.norm())
    k = max(float((f * g).sum() / g.square().sum().clamp_min(1e-300)), 0.0)
    if norm < ZERO:
        return Bias(0.0, 1.0, 0.0)
    return Bias(k, float((f - k * g).norm()) / norm, _cosine(f, g))


def _cosine(f: Tensor, g: Tensor) -> float:
    return float((f * g).sum() / (f.norm() * g.norm()).clamp_min(1e-300))


def _curl(m: Small, wrong: bool) -> float:
    z = m.student_PSV
    g = torch.Generator().manual_seed(11)
    n = min(DIRECTIONS, z.numel())
    a = torch.linalg.qr(torch.randn(z.numel(), n, generator=g, dtype=z.dtype)).Q
    columns = []
    for i in range(n):
        shift = (STEP * a[:, i]).reshape(z.shape)
        ahead, behind = m.field(z + shift, wrong).gradient, m.field(z - shift, wrong).gradient
        columns.append(((ahead - behind) / (2 * STEP)).reshape(-1))
    j = a.T @ torch.stack(columns, 1)
    return float((j - j.T).norm() / j.norm().clamp_min(1e-300))
