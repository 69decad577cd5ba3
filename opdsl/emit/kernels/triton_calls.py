"""What the text of a row pass with kernels may call, beside the prelude and the launches.

Shapes: n rows, K ids, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opdsl.emit import prelude


class Tempered:
    """`prelude.Dense` at another temperature without a tile of its own."""

    def __init__(self, of: prelude.Dense, temperature: float, lse: Tensor):
        self.of, self.t, self.y, self.lse = of, temperature, of.y, lse

    def at(self, ids: Tensor) -> Tensor:
        z = self.of.z.gather(1, ids).to(self.lse.dtype)
        return (z / self.t - self.lse).clamp_min_(prelude.FLOOR)

    def at_y(self) -> Tensor:
        return self.at(self.y[:, None]).squeeze(1)

    def top_p(self, p: float, k: int) -> tuple[Tensor, Tensor]:
        best, ids = self.of.z.topk(min(k, self.of.z.shape[1]), -1)
        prob = (best.to(self.lse.dtype) / self.t - self.lse).exp()
        return ids, prob.cumsum(-1) - prob < p


def learn(dist: prelude.Dense, temperature: float, lse_n: Tensor) -> None:
    """Hands a distribution its log-sum-exp."""
    if temperature == 1.0:
        dist._lse = lse_n[:, None]
    else:
        dist._at[temperature] = Tempered(dist, temperature, lse_n[:, None])


def scored(dist: object, temperature: float) -> None:
    """The log-sum-exp of a distribution that is only gathered from; lists have theirs."""
    for part in getattr(dist, "parts", [dist]):
        if isinstance(part, prelude.Dense):
            from opdsl.emit.kernels.triton_score import lse

            learn(part, temperature, lse(part.z, temperature))


def mask(s: tuple[Tensor, Tensor], n: int, v: int) -> Tensor:
    """Whether a word lies in a set, [n, V] of bytes; rows start where 16 bytes can be read."""
    ids, valid = s
    width = -(-(v + 1) // 16) * 16
    out = torch.zeros(n, width, dtype=torch.uint8, device=ids.device)
    return out.scatter_(1, torch.where(valid, ids, v), 1)[:, :v]


def mass(at_y, sets: list, dense, y: Tensor, like: torch.dtype) -> Tensor:
    """Σ g over everything a cotangent of log π holds, [n]."""
    total = torch.as_tensor(dense, dtype=like, device=y.device).expand(y.numel()).clone()
    total += torch.as_tensor(at_y, dtype=like, device=y.device)
    for s, x in sets:
        total += prelude.entries(x, s, 0.0, y.numel(), 0).to(like).sum(1)
    return total


def pieces(parts: list, y: Tensor, like: torch.dtype) -> tuple[Tensor, Tensor]:
    """All ids with a cotangent of their own, [n, K], and what it is (an id may come twice)."""
    n, ids, values = y.numel(), [], []
    for temperature, at_y, sets in parts:
        ids.append(y[:, None])
        x = torch.as_tensor(at_y, dtype=like, device=y.device).expand(n)
        values.append(x[:, None] / temperature)
        for s, x in sets:
            ids.append(s[0])
            x = prelude.entries(x, s, 0.0, n, 0).to(like).expand(s[0].shape)
            values.append(x / temperature)
    return torch.cat(ids, 1).contiguous(), torch.cat(values, 1).contiguous()
