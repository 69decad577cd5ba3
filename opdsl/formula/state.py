"""One state to look at: what student and teacher say about the next token, and which one was drawn.

`toy` is a fixed one; `read` takes the JSON of `opdsl explain --state`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MOST = 60  # tokens a figure can show
FLOOR = 1e-9  # the least probability: logarithms stay finite
KEYS = ("student", "teacher", "initial", "tokens", "sampled")


@dataclass(frozen=True)
class State:
    """Distributions over V named tokens. `teachers`: by name; "" stands for every teacher."""

    tokens: tuple[str, ...]
    student: np.ndarray  # [V]
    teachers: dict[str, np.ndarray] = field(repr=False)
    initial: np.ndarray = field(repr=False)
    y: int  # the sampled token
    given: bool = False

    def teacher(self, name: str) -> np.ndarray:
        return self.teachers.get(name, self.teachers.get("", next(iter(self.teachers.values()))))


def toy() -> State:
    """3 · 4 + 2 = …: an improbable wrong token was drawn; the teacher wants 14, which the student
    can reach; the student's own first choice, 12, is wrong as well."""
    rows = [("12", 0.52, 0.06), ("14", 0.18, 0.70), ("20", 0.08, 0.005), ("16", 0.06, 0.03),
            ("Wait", 0.05, 0.12), ("11", 0.04, 0.02), ("24", 0.03, 0.015), ("So", 0.02, 0.03),
            ("?", 0.02, 0.02)]  # fmt: skip
    student = np.array([r[1] for r in rows])
    teacher = np.array([r[2] for r in rows])
    return State(tuple(r[0] for r in rows), student, {"": teacher}, student, 2)


def read(text: str) -> State:
    """The state of a JSON object; ValueError with one sentence for anything else."""
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except (json.JSONDecodeError, RecursionError) as e:
        where = (
            f" (line {e.lineno}, column {e.colno})" if isinstance(e, json.JSONDecodeError) else ""
        )
        raise ValueError(f"this is not JSON{where}") from None
    if not isinstance(data, dict):
        raise ValueError("a state is an object with student, teacher, tokens and sampled")
    for key in data:
        if key not in KEYS:
            raise ValueError(f"a state has no {key!r}; it has {', '.join(KEYS)}")
    for key in ("student", "teacher", "sampled"):
        if key not in data:
            raise ValueError(f"{key!r} is missing")
    student = _distribution(data["student"], "student")
    size = len(student)
    if isinstance(data["teacher"], dict):
        if not data["teacher"]:
            raise ValueError("'teacher' is empty")
        found = {str(k): _distribution(v, f"teacher {k}", size) for k, v in data["teacher"].items()}
    else:
        found = {"": _distribution(data["teacher"], "teacher", size)}
    initial = student if "initial" not in data else _distribution(data["initial"], "initial", size)
    tokens = _names(data.get("tokens", [str(i) for i in range(size)]), size)
    return State(tokens, student, found, initial, _sampled(data["sampled"], tokens), True)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _distribution(x: Any, what: str, size: int | None = None) -> np.ndarray:
    """Probabilities that add up to 1, or logits: any finite numbers of which one is outside [0, 1]."""
    if not isinstance(x, list) or not all(_is_number(v) for v in x):
        raise ValueError(f"{what} is a list of numbers, one per token")
    if not 2 <= len(x) <= MOST:
        raise ValueError(f"{what} has {len(x)} tokens; a state has 2 to {MOST}")
    if size is not None and len(x) != size:
        raise ValueError(f"{what} has {len(x)} tokens, student has {size}")
    p = np.array(x, dtype=float)
    if not np.isfinite(p).all():
        raise ValueError(f"{what} is not finite everywhere")
    if (p < 0).any() or (p > 1).any():
        p = np.exp(p - p.max())
    elif abs(p.sum() - 1) > 1e-3:
        raise ValueError(
            f"the probabilities of {what} add up to {p.sum():.4g}, not to 1 (logits have a value"
            " below 0 or above 1)"
        )
    p = np.maximum(p / p.sum(), FLOOR)
    return p / p.sum()


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e300


def _names(x: Any, size: int) -> tuple[str, ...]:
    if not isinstance(x, list) or not all(isinstance(t, str) for t in x):
        raise ValueError("tokens is a list of texts")
    if len(x) != size:
        raise ValueError(f"tokens has {len(x)} names, student has {size} tokens")
    return tuple(x)


def _sampled(x: Any, tokens: tuple[str, ...]) -> int:
    if isinstance(x, str):
        if tokens.count(x) != 1:
            many = "more than one token is" if x in tokens else "no token is"
            raise ValueError(f"sampled: {many} named {x!r}")
        return tokens.index(x)
    if not isinstance(x, int) or isinstance(x, bool) or not 0 <= x < len(tokens):
        raise ValueError(
            f"sampled is the name of a token, or its index from 0 to {len(tokens) - 1}"
        )
    return x


__all__ = ["FLOOR", "MOST", "State", "read", "toy"]
