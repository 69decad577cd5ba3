"""How many rows a tile of logits has: bytes of memory against how often the head is read again.

Without torch, so that a cost can be predicted before anything is loaded.
"""

from __future__ import annotations

import math
import re

# Bytes of one float32 tile [n, V]. The tile bounds memory; its row count bounds how often the
# float32 weight gradient is read and written again, which costs about 7/n of the products on a
# CPU and 245/n on a large GPU, hence the two sizes.
TILE_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
CHUNK_RANGE = {"cpu": (16, 256), "cuda": (256, 4096)}
# Bytes of the gathered rows [n, K, H] of a renormalised support, and the K they are sized for.
GATHER_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
EXPECTED_K = 64
# Bytes of the rows of a tile, per thread of a CPU, that a row program sees at a time. With the
# logits of another model at hand most of the work has an entry per word and is 5 to 10 % faster near
# the caches; without them much of it is calls on short lists, which fewer rows only repeat.
STRIP_BYTES = {"dense": 4 << 20, "listed": 16 << 20}


def strip_rows(vocab: int, dense: bool, threads: int = 1, size: int = 4) -> int:
    """Rows of `vocab` values of `size` bytes in a strip."""
    return max(1, STRIP_BYTES["dense" if dense else "listed"] * threads // (size * vocab))


# ---- memory a user states ------------------------------------------------------------------------

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}  # fmt: skip


class BudgetError(ValueError):
    """A stated memory in which not even the fewest rows at a time fit."""


def parse_bytes(text: str) -> int:
    """`2GiB`, `1.5 GB`, `800MiB` or a number of bytes. Raises ValueError saying what is wanted."""
    units = {name.lower(): size for name, size in UNITS.items()}
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", text)
    size = float(found[1]) * units.get(found[2].lower() or "b", 0) if found else 0
    if size < 1:
        raise ValueError(f"{text!r} is no amount of memory: write 2GiB, 500MiB or bytes")
    return int(size)


def amount(size: int) -> str:
    """Bytes in words: what `parse_bytes` reads, rounded up."""
    if size >= 10 << 30:
        return f"{math.ceil(size / 2**30 * 10) / 10:g} GiB"
    if size >= 1 << 30:
        return f"{math.ceil(size / 2**30 * 100) / 100:g} GiB"
    if size >= 1 << 20:
        return f"{math.ceil(size / 2**20)} MiB"
    return f"{max(1, math.ceil(size / 2**10))} KiB"
