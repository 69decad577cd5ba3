"""What the numerical tests share: tolerances, batches, generated specs, small exact models."""

from __future__ import annotations

import torch

torch.set_num_threads(1)

# One table for every numerical test. Errors are relative to the scale of what is compared
# (`support.batches.scales`), absolute where that scale is below 1e-2.
TOLERANCE = {
    "float64": 1e-9,  # emitted against the oracle, both in float64
    "float32": 1e-5,  # emitted in float32 against the float64 oracle
    "bfloat16": 2e-2,  # bfloat16 inputs, float32 arithmetic
    "standalone": 1e-12,  # the emitted file against the module it was made from
    "difference": 1e-6,  # central differences in float64
    "exact": 1e-12,  # identities of the theory on enumerable models
    "identity": 1e-10,  # two spellings of one method
}


def relative(got: object, want: object, scale: float | None = None) -> float:
    """Largest error over the scale of what was wanted; infinite where a number is not finite."""
    x = torch.as_tensor(got, dtype=torch.float64)
    y = torch.as_tensor(want, dtype=torch.float64)
    assert x.shape == y.shape, (x.shape, y.shape)
    if not x.numel():
        return 0.0
    if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
        return float("inf")
    size = float(y.abs().max()) if scale is None else scale
    return float((x - y).abs().max()) / max(size, 1e-2)
