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
