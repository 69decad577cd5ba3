"""Which shipped spec has an independent reference, and a tape that holds what a formula freezes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from references import losses
from references.arrays import Arrays
from support import batches

import opdsl

GROUPS = (
    "foundations", "divergences", "supports", "gates", "routing", "credit", "corrections",
    "hybrids", "self_teachers", "teams", "extrapolation",
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """(loss, logit gradient [B, T, V]) of one spec, with the gradient on golden rows as a third
    where it has any. sources: the policies its rows come from, in turn."""

    name: str
    group: str
    function: Callable
    sources: tuple[str, ...] = ("student",)

    def __call__(self, x: batches.Inputs, **knobs):
        out = self.function(x, **knobs)
        return (*out, None) if len(out) == 2 else out

    @property
    def knobs(self) -> dict[str, object]:
        """Names and defaults of its constants."""
        own = list(inspect.signature(self.function).parameters.values())[1:]
        return {p.name: p.default for p in own}


def references() -> dict[str, Reference]:
    """Every public function of a group, by the name of the spec that it is the reference of."""
    out: dict[str, Reference] = {}
    for group in GROUPS:
        module = importlib.import_module(f"references.{group}")
        sources = getattr(module, "SOURCES", {})
        for name, f in inspect.getmembers(module, inspect.isfunction):
            if f.__module__ == module.__name__ and not name.startswith("_"):
                assert name not in out, name
                out[name] = Reference(name, group, f, sources.get(name, ("student",)))
    return out


def inputs(m: opdsl.Method, ref: Reference, seed: int, step: int, V: int = 24) -> batches.Inputs:
    """Eight rows in groups of four, one empty and one of a single token, holes in the mask; rows
    take their sources, and a field that some specs gate with, in turn."""
    x = batches.draw(
        seed,
        B=8,
        T=5 + seed % 3,
        V=V,
        group=4,
        step=step,
        spread=2.0,
        teachers=tuple(t.name for t in m.spec.teachers if t.kind != "initial") or ("T",),
        critics=tuple(c.name for c in m.spec.critics),
    )
    fields = tuple(
        {**p, "@source": ref.sources[i % len(ref.sources)], "reprompted": "no" if i % 3 else "yes"}
        for i, p in enumerate(x.prompt)
    )
    return replace(x, prompt=fields)


# ---- what is held ------------------------------------------------------------------------------------

HELD = [
    n for n, f in vars(losses.Losses).items()
    if callable(f) and n not in ("through", "tempered", "inside", "_rest")
]  # fmt: skip


@contextmanager
def tape(record: list, play: bool):
    """The arguments of every token loss, the factors of `scaled` and the weights of a sum are
    recorded at first and played back after, so that only the student inside the losses moves."""
    at = iter(list(record)) if play else None

    def held(*values):
        if at is None:
            record.extend(values)
            return values
        return tuple(next(at) for _ in values)

    def loss(f):
        def wrapped(self, *args, **more):
            return f(self, *held(*args), **more)

        return wrapped

    def weighted(self, value, grad, c):
        return divided(self, value, grad, *held(c))

    def scaled(c, what):
        return times(*held(c), what)

    times, divided = losses.scaled, Arrays._weighted
    before = {n: getattr(losses.Losses, n) for n in HELD}
    modules = [importlib.import_module(f"references.{g}") for g in GROUPS]
    users = [m for m in modules if hasattr(m, "scaled")]
    for n, f in before.items():
        setattr(losses.Losses, n, loss(f))
    Arrays._weighted = weighted
    for m in users:
        m.scaled = scaled
    try:
        yield
    finally:
        for n, f in before.items():
            setattr(losses.Losses, n, f)
        Arrays._weighted = divided
        for m in users:
            m.scaled = times


def slope(ref: Reference, x: batches.Inputs, seed: int = 0, h: float = 1e-5, hold: bool = True):
    """(central difference of the loss along a random direction, what the gradient says)."""
    import torch

    d = np.random.default_rng(seed).standard_normal(tuple(x.student_BTV.shape))
    record: list = []

    def value(by: float) -> float:
        moved = replace(x, student_BTV=x.student_BTV + by * torch.as_tensor(d))
        if not hold:
            return ref(moved)[0]
        with tape(record, play=True):
            return ref(moved)[0]

    with tape(record, play=False):
        _, grad, _ = ref(x)
    return (value(h) - value(-h)) / (2 * h), float((grad * d).sum())
