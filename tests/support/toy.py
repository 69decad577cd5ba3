"""Short spec texts and small exact models for the identities of the theory."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from opdsl.method import Method
from opdsl.passport import enumerate as exact

from .generate import compiled

_names = itertools.count()


def method(body: str, defs: str = "", access: str = "logits", group: int = 1) -> Method:
    """The method with these sections (one a line), a fresh name and `sum(over = tokens)`."""
    lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
    if "aggregate" not in body:
        lines += "\n  aggregate sum(over = tokens)"
    return compiled(
        f'opd 1\n\n{defs}\nmethod identity_{next(_names)} "generated" {{\n'
        f"  state rollouts(student, group = {group})\n"
        f"  teacher T = external(access = {access})\n{lines}\n}}\n"
    )


def reward(
    signal: str, credit: str = "immediate", more: str = "", defs: str = "", **rest
) -> Method:
    body = f"support sampled\nfeedback reward {signal}\ncredit {credit}\n{more}"
    return method(body, defs, **rest)


def loss(value: str, support: str = "full", more: str = "", defs: str = "", **rest) -> Method:
    return method(f"support {support}\nfeedback loss {value}\n{more}", defs, **rest)


def models(w: exact.Tree, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """(student, teacher) logits [S, V]."""
    return w.random(2 * seed + 1, spread), w.random(2 * seed + 2, spread)


def adjoint(student_SV: Tensor, c_SV: Tensor) -> Tensor:
    """Gradient of −Σ_v sg(c_v) log π_v: the shared softmax adjoint of a coefficient field."""
    p = torch.softmax(student_SV, -1)
    return c_SV.sum(-1, keepdim=True) * p - c_SV
