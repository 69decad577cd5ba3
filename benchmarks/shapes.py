"""Shapes of the tables and random inputs for them: a student, a teacher near it, what is served.

N rows (B sequences of T tokens), H hidden, V vocabulary, K served candidates. Logits have a
standard deviation of about 3, tokens are drawn from the student.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

K = 64


@dataclass(frozen=True)
class Shape:
    name: str
    B: int
    T: int
    H: int
    V: int

    @property
    def N(self) -> int:
        return self.B * self.T

    @property
    def chunk(self) -> int:
        """Rows per tile of the bare products: a tile of about 64 MB, at most 256 rows."""
        return min(256, (64 << 20) // (4 * self.V))


SHAPES = {
    "A": Shape("A", 16, 128, 512, 32768),
    "B": Shape("B", 8, 128, 128, 151936),
    "C": Shape("C", 32, 128, 512, 32768),
    "Q": Shape("Q", 4, 128, 512, 32768),  # for --quick
}


@dataclass
class Data:
    """hidden [N, H], weight [V, H] of student (h, W), teacher (ht, Wt); golden rows h_gold.

    y [N] sampled tokens; ids, logp [N, K] the teacher's most probable candidates; logp_y,
    rollout_y, initial_y [N] log-probabilities of y under teacher, sampler and initial student;
    entropy [N] of the student, teacher_entropy [N]; special [N] bool, true of four rows in five;
    values [B, T + 1] of a critic; outcome [B].
    """

    shape: Shape
    h: Tensor
    W: Tensor
    ht: Tensor
    Wt: Tensor
    y: Tensor
    ids: Tensor
    logp: Tensor
    logp_y: Tensor
    rollout_y: Tensor
    initial_y: Tensor
    entropy: Tensor
    teacher_entropy: Tensor
    special: Tensor
    values: Tensor
    h_gold: Tensor
    y_gold: Tensor

    def seqs(self, x: Tensor) -> Tensor:
        """[N, …] -> [B, T, …]"""
        return x.reshape(self.shape.B, self.shape.T, *x.shape[1:])


def make(shape: Shape, seed: int = 0) -> Data:
    """Inputs of one shape; every number from `seed`."""
    gen = torch.Generator().manual_seed(seed)
    N, H, V = shape.N, shape.H, shape.V

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen)

    h, W = normal(N, H), normal(V, H) * (3 / H**0.5)
    ht = 0.9 * h + 0.436 * normal(N, H)
    Wt = 0.9 * W + 0.436 * normal(V, H) * (3 / H**0.5)
    n_gold = shape.B // 4 * shape.T
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, N, shape.chunk):
        rows = slice(start, start + shape.chunk)
        s = torch.log_softmax(h[rows] @ W.T, -1)
        t = torch.log_softmax(ht[rows] @ Wt.T, -1)
        noise = torch.empty(s.shape).exponential_(generator=gen)
        y = (s - noise.log()).argmax(-1)
        logp, ids = t.topk(K, -1)
        found = {
            "y": y,
            "ids": ids,
            "logp": logp,
            "logp_y": t.gather(1, y[:, None])[:, 0],
            "own_y": s.gather(1, y[:, None])[:, 0],
            "entropy": -(s.exp() * s).sum(-1),
            "teacher_entropy": -(t.exp() * t).sum(-1),
        }
        for k, v in found.items():
            parts.setdefault(k, []).append(v)
    whole = {k: torch.cat(v) for k, v in parts.items()}
    own = whole.pop("own_y")
    return Data(
        shape=shape,
        h=h,
        W=W,
        ht=ht,
        Wt=Wt,
        **whole,
        rollout_y=(own + 0.05 * normal(N)).clamp(max=-1e-4),
        initial_y=(own + 0.3 * normal(N)).clamp(max=-1e-4),
        special=torch.rand(N, generator=gen) < 0.8,
        values=0.3 * normal(shape.B, shape.T + 1),
        h_gold=normal(n_gold, H),
        y_gold=torch.randint(V, (n_gold,), generator=gen),
    )
