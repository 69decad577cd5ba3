"""Going on with fewer rows at a time when memory runs out.

What is computed does not depend on how many rows a pass takes, so a smaller pass changes time
and nothing else (up to rounding; sampled rollouts draw other numbers of the same law). Sizes
found this way are kept for the rest of the run and go into its checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from opdsl.train.errors import out_of_memory

# What allocators say that do not raise torch.OutOfMemoryError.
_WORDS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a tensor did not fit."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def within_memory(
    work: Callable[[], Any],
    shrink: Callable[[], bool] = lambda: False,
    place: tuple[int, str] | None = None,
) -> Any:
    """The result of `work`, tried again after every successful `shrink`.

    shrink: makes the next try smaller; False if it cannot. The error then goes on to the caller,
    or, with place (step, what was being done), RunProblem OPD721 says it.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not shrink():
                if place is None:
                    raise
                raise out_of_memory(*place, 1, str(error)) from None
        # Here the error is gone, and with it the tensors its frames held.
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
