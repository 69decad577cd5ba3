"""Random streams as pure functions of (run seed, stream name, step).

Nothing in the trainer holds a generator across steps, so a run resumed at step k draws exactly
the numbers the uninterrupted run would have drawn, and needs one integer to do so.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from functools import lru_cache


def seed_for(seed: int, stream: str, step: int = 0) -> int:
    """A 63-bit seed for one stream at one step, well mixed in all three arguments."""
    digest = hashlib.sha256(f"{seed}\x1f{stream}\x1f{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def torch_generator(seed: int, stream: str, step: int = 0):
    """A CPU torch.Generator for one stream at one step."""
    import torch

    return torch.Generator().manual_seed(seed_for(seed, stream, step))


@contextlib.contextmanager
def callers_generators_kept():
    """Put the generators of `seed_everything` back afterwards: they are the caller's."""
    import torch

    before, on_cpu = random.getstate(), torch.get_rng_state()
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(before)
        torch.set_rng_state(on_cpu)
        if on_cuda:
            torch.cuda.set_rng_state_all(on_cuda)


def seed_everything(seed: int, step: int) -> None:
    """Seed the generators that code outside the trainer may draw from, for one step.

    Nothing here uses them; a model's dropout or a user's verifier might. Seeded by the step they
    need no place in a checkpoint.
    """
    import torch

    number = seed_for(seed, "everything", step)
    random.seed(number)
    torch.manual_seed(number)


def allocate(shares: list[float], n: int, seed: int, step: int) -> list[int]:
    """Which of several sources each of `n` slots goes to; shares are probabilities, sum 1.

    Systematic sampling: one uniform number places a comb of n teeth over the cumulated shares,
    so that source i gets ⌊n·share⌋ or ⌈n·share⌉ slots and its expected number exactly. Slots are
    then shuffled, so that the source is independent of the prompt's place in the batch.

    Raises ValueError for negative shares or shares that do not sum to 1 within 1e-6.
    """
    if any(s < -1e-9 for s in shares) or abs(sum(shares) - 1.0) > 1e-6:
        raise ValueError(f"shares of the state sources must be ≥ 0 and sum to 1, not {shares}")
    if len(shares) == 1:
        return [0] * n
    rng = random.Random(seed_for(seed, "mixture", step))
    offset = rng.random()
    slots, source, reached = [], 0, shares[0]
    for i in range(n):
        tooth = (i + offset) / n
        while tooth >= reached and source < len(shares) - 1:
            source += 1
            reached += shares[source]
        slots.append(source)
    rng.shuffle(slots)
    return slots


def epoch_rows(total: int, start: int, n: int, seed: int) -> list[int]:
    """Row numbers start … start+n−1 of the endless stream of shuffled passes over `total` rows.

    Each pass is a permutation seeded by (seed, "data", pass number).
    """
    rows: list[int] = []
    while len(rows) < n:
        epoch, offset = divmod(start + len(rows), total)
        rows += _epoch_order(total, seed, epoch)[offset : offset + n - len(rows)]
    return rows


@lru_cache(maxsize=2)  # the current pass and, where a batch straddles two, the next
def _epoch_order(total: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(total))
    random.Random(seed_for(seed, "data", epoch)).shuffle(order)
    return tuple(order)
