"""Which distribution of a batch plays a role, and teachers chosen per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from opdsl.emit.batch import Batch, BatchError, DenseDist, HiddenDist, SparseDist
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
        dists[r.name] = _select([dists[p] for p in r.parts], choice_B[batch.layout.seq_N], r.name)
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


def _select(parts: list, choice_N: torch.Tensor, name: str):
    if all(isinstance(p, DenseDist) for p in parts):
        out = parts[0].logits_NV
        for k, p in enumerate(parts[1:], 1):
            out = torch.where((choice_N == k)[:, None], p.logits_NV, out)
        return DenseDist(out)
    if all(isinstance(p, SparseDist) for p in parts):

        def pick(field: str):
            xs = [getattr(p, field) for p in parts]
            if any(x is None for x in xs):
                return None
            out = xs[0]
            for k, x in enumerate(xs[1:], 1):
                test = choice_N == k
                out = torch.where(test[:, None] if x.dim() == 2 else test, x, out)
            return out

        return SparseDist(pick("ids_NK"), pick("logp_NK"), pick("logp_N"))
    if all(isinstance(p, HiddenDist) for p in parts) and len({id(p.head.weight) for p in parts}) == 1:
        out = parts[0].hidden_NH
        for k, p in enumerate(parts[1:], 1):
            out = torch.where((choice_N == k)[:, None], p.hidden_NH, out)
        return HiddenDist(out, parts[0].head)
    raise BatchError(f"`{name}`: teachers with different heads cannot share one fused pass; pass their logits")
