"""Which distribution of a batch plays a role, and teachers chosen per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from opdsl.emit.batch import (
    Batch,
    BatchError,
    DenseDist,
    Distribution,
    HiddenDist,
    RoutedDist,
)
from opdsl.meaning.spec import Routed


def resolve(batch: Batch, name: str) -> str:
    """The distribution of the batch under this name; one unnamed teacher plays any role.

    Raises BatchError naming what to pass.
    """
    if name in batch.dists:
        return name
    others = [k for k in batch.dists if k not in ("student", "initial")]
    if name != "initial" and len(others) == 1:
        return others[0]
    have = ", ".join(others) or "none"
    what = "initial_logits" if name == "initial" else f"teacher_logits={{{name!r}: …}}"
    raise BatchError(f"this method reads the distribution {name!r}: pass {what} (here: {have})")


def add_routed(batch: Batch, routed: Sequence[Routed]) -> Batch:
    """The batch with every `routed(a, b)` distribution its parts allow.

    A prompt that meets no condition uses the part without one; raises BatchError if none is left.
    """
    dists = dict(batch.dists)
    for r in routed:
        if r.name in dists or not all(p in dists for p in r.parts):
            continue
        choice_B = _choices(batch, r)
        dists[r.name] = _select([dists[p] for p in r.parts], choice_B[batch.layout.seq_N])
    return replace(batch, dists=dists)


def _choices(batch: Batch, r: Routed) -> torch.Tensor:
    if batch.prompt is None:
        raise BatchError(f"`{r.name}` is routed by a field of the prompt: pass `prompt`")
    out = []
    for i, fields in enumerate(batch.prompt):
        hits = [k for k, c in enumerate(r.conditions) if c and str(fields.get(c[0])) == c[1]]
        hits += [k for k, c in enumerate(r.conditions) if c is None]
        if not hits:
            raise BatchError(f"prompt {i} has no teacher: `{r.name}` covers {r.conditions}")
        out.append(hits[0])
    return torch.tensor(out, dtype=torch.int64, device=batch.layout.seq_N.device)


def _select(parts: list, choice_N: torch.Tensor) -> Distribution:
    """One distribution where the parts are alike; otherwise all of them, chosen row by row."""

    def pick(xs: list[torch.Tensor]) -> torch.Tensor:
        out = xs[0]
        for k, x in enumerate(xs[1:], 1):
            test = choice_N == k
            out = torch.where(test[:, None] if x.dim() == 2 else test, x, out)
        return out

    if all(isinstance(p, DenseDist) for p in parts):
        return DenseDist(pick([p.logits_NV for p in parts]))
    if all(isinstance(p, HiddenDist) for p in parts) and len({_head(p) for p in parts}) == 1:
        return HiddenDist(pick([p.hidden_NH for p in parts]), parts[0].head)
    return RoutedDist(tuple(parts), choice_N)


def _head(d: HiddenDist) -> tuple:
    h = d.head
    return id(h.weight), id(h.bias), h.scale, h.soft_cap, h.vocab


class Chosen:
    """What the passes read of a `RoutedDist`: every part is asked, each row takes its own."""

    def __init__(self, parts: list, choice_n: torch.Tensor):
        self.parts, self.choice = parts, choice_n

    def tempered(self, temperature: float) -> Chosen:
        return Chosen([p.tempered(temperature) for p in self.parts], self.choice)

    def rescaled(self, temperature: float, out: torch.Tensor) -> None:
        """Every part keeps its logits over the temperature itself; one buffer would not hold them."""
        self.tempered(temperature)

    def measure(self, out: torch.Tensor) -> None:
        for p in self.parts:
            p.measure(out)

    def full(self) -> torch.Tensor:
        return self._pick([p.full() for p in self.parts])

    def at(self, ids: torch.Tensor) -> torch.Tensor:
        return self._pick([p.at(ids) for p in self.parts])

    def at_y(self) -> torch.Tensor:
        return self._pick([p.at_y() for p in self.parts])

    def top(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._set([p.top(k) for p in self.parts])

    def top_p(self, p: float, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._set([part.top_p(p, k) for part in self.parts])

    def _pick(self, xs: list[torch.Tensor]) -> torch.Tensor:
        out = xs[0]
        for k, x in enumerate(xs[1:], 1):
            test = self.choice == k
            out = torch.where(test[:, None] if x.dim() == 2 else test, x, out)
        return out

    def _set(self, sets: list) -> tuple[torch.Tensor, torch.Tensor]:
        """A served teacher may give fewer entries than asked for: missing ones do not count."""
        width = max(ids.shape[1] for ids, _ in sets)

        def widen(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(x, (0, width - x.shape[1]))

        return (
            self._pick([widen(ids) for ids, _ in sets]),
            self._pick([widen(valid) for _, valid in sets]),
        )
