"""How many rows a tile of logits has: bytes of memory against how often the head is read again.

Without torch, so that a cost can be predicted before anything is loaded.
"""

from __future__ import annotations

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
