"""Going on with fewer rows at a time when memory runs out.

What is computed does not depend on how many rows a pass takes, so a smaller pass changes time
and nothing else (up to rounding; sampled rollouts draw other numbers of the same law). Sizes
found this way are kept for the rest of the run and go into its checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# What allocators say that do not raise torch.OutOfMemoryError.
_WORDS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a tensor did not fit."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def within_memory(work: Callable[[], Any], shrink: Callable[[], bool]) -> Any:
    """The result of `work`, tried again after every successful `shrink`.

    shrink: makes the next try smaller; False if it cannot, and the error goes on to the caller.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not shrink():
                raise
        # Here the error is gone, and with it the tensors its frames held.
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
