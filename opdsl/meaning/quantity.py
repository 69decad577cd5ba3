"""What the type system knows of a value: axis, unit, range, information level, gradient.

Joins take the maximum; most bias rules are one comparison on this lattice (theory §11.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum


class Axis(IntEnum):
    """What a value varies over. VOCAB is per token and per entry of some index set."""

    CONST = 0
    PROMPT = 1  # `group` in the language: all rollouts of one prompt share it
    SEQ = 2
    TOK = 3
    VOCAB = 4


class Info(IntEnum):
    """What must be known to compute a value (measurability)."""

    STATIC = 0
    PROMPT = 1
    STATE = 2  # a function of s_t
    ACTION = 3  # also reads the sampled token y_t
    FUTURE = 4  # also reads later tokens, the length or the outcome


AXIS_WORDS = {
    Axis.CONST: "one number",
    Axis.PROMPT: "per group",
    Axis.SEQ: "per sequence",
    Axis.TOK: "per token",
    Axis.VOCAB: "per token vocab",
}

INF = math.inf


@dataclass(frozen=True, slots=True)
class Quantity:
    axis: Axis = Axis.CONST
    unit: str = "real"
    low: float = -INF
    high: float = INF
    info: Info = Info.STATIC
    live: bool = False  # a gradient can flow through it into the student

    def describe(self) -> str:
        """`prob per token`, as messages say it."""
        words = AXIS_WORDS[self.axis]
        return self.unit if self.axis is Axis.CONST else f"{self.unit} {words}"

    def range_text(self) -> str:
        return f"[{_num(self.low)}, {_num(self.high)}]"

    def with_(self, **changes: object) -> Quantity:
        return replace(self, **changes)


def _num(x: float) -> str:
    if x == INF:
        return "∞"
    if x == -INF:
        return "-∞"
    return f"{x:g}"


def join(*qs: Quantity) -> Quantity:
    """Axis, information and gradient of a value computed from several others."""
    return Quantity(
        axis=max(q.axis for q in qs),
        info=max(q.info for q in qs),
        live=any(q.live for q in qs),
    )


# ---- interval arithmetic ---------------------------------------------------------------


def _mul(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


def interval_add(a: Quantity, b: Quantity) -> tuple[float, float]:
    return _sum(a.low, b.low, -INF), _sum(a.high, b.high, INF)


def _sum(x: float, y: float, otherwise: float) -> float:
    total = x + y
    return otherwise if math.isnan(total) else total


def interval_sub(a: Quantity, b: Quantity) -> tuple[float, float]:
    return _sum(a.low, -b.high, -INF), _sum(a.high, -b.low, INF)


def interval_mul(a: Quantity, b: Quantity) -> tuple[float, float]:
    corners = [_mul(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    return min(corners), max(corners)


def interval_div(a: Quantity, b: Quantity) -> tuple[float, float]:
    if b.low > 0 or b.high < 0:
        inverse = Quantity(low=1 / b.high, high=1 / b.low)
        return interval_mul(a, inverse)
    if b.low == 0 and a.low >= 0:  # positive divisor that may touch zero
        return (0.0 if b.high == INF else a.low / b.high), INF
    return -INF, INF


def safe_exp(x: float) -> float:
    if x == -INF:
        return 0.0
    return INF if x > 700 else math.exp(x)


def safe_log(x: float) -> float:
    if x <= 0:
        return -INF
    return INF if x == INF else math.log(x)


def interval_pow(a: Quantity, n: float) -> tuple[float, float]:
    def power(x: float) -> float:
        try:
            return float(x**n)
        except (OverflowError, ZeroDivisionError):
            return INF

    if a.low >= 0:
        ends = power(a.low), power(a.high)
        return min(ends), max(ends)
    if float(n).is_integer():
        even = int(n) % 2 == 0
        if n < 0:
            return (0.0 if even else -INF), INF
        low, high = power(a.low), power(a.high)
        if not even:
            return low, high
        return (0.0 if a.low <= 0 <= a.high else min(low, high)), max(low, high)
    return -INF, INF
