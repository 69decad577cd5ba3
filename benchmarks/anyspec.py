"""A random batch for any shipped spec, from what the spec says it needs."""

from __future__ import annotations

import torch
from torch import Tensor


def teachers_of(method) -> list[str]:
    """Names of the models whose distributions the method reads, the initial student aside."""
    return list(method.needs.teachers)


def batch_for(method, B: int, T: int, H: int, V: int, spread: float = 2.0, seed: int = 0):
    """(batch by hidden states, leaves [hidden [B, T, H], weight [V, H]]); every teacher by its own.

    Full masks; groups of four; the student's logits have standard deviation `spread`.
    """
    from opdsl import Batch

    gen = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen)

    def head() -> Tensor:
        return normal(V, H) * (spread / H**0.5)

    needs = method.needs
    h, W = normal(B, T, H).requires_grad_(), head().requires_grad_()
    fields = needs.prompt_fields or ("domain",)
    common: dict = {
        "tokens": torch.randint(V, (B, T), generator=gen),
        "mask": torch.ones(B, T, dtype=torch.bool),
    }
    names = teachers_of(method)
    models = {n: (normal(B, T, H), head()) for n in names}
    golden = None
    if needs.golden:
        golden = Batch.from_hidden(
            normal(B, T, H),
            W,
            prompt=[dict.fromkeys(fields, "math")] * B,
            **common,
            teacher_hidden={n: m[0] for n, m in models.items()} or None,
            teacher_head={n: m[1] for n, m in models.items()} or None,
            initial_hidden=normal(B, T, H),
        )
    batch = Batch.from_hidden(
        h,
        W,
        teacher_hidden={n: m[0] for n, m in models.items()} or None,
        teacher_head={n: m[1] for n, m in models.items()} or None,
        initial_hidden=normal(B, T, H),
        initial_head=head(),
        rollout_logprobs=-normal(B, T).abs() - 0.1,
        outcome=torch.randint(2, (B,), generator=gen).float(),
        group=torch.arange(B) // 4,
        values={n: normal(B, T + 1) for n in needs.values} or None,
        special=torch.rand(B, T, generator=gen) < 0.2,
        prompt=[
            {**dict.fromkeys(fields, ("math", "code")[i % 2]), "@source": "student"}
            for i in range(B)
        ],
        golden=golden,
        step=3,
        total_steps=10,
        **common,
    )
    return batch, [h, W]
