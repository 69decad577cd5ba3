"""Errors of the machine that a run meets, as messages: a full disk, exhausted memory.

Anything else is a fault of opdsl or of a library and keeps its stack trace.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from opdsl.train import durable
from opdsl.train.errors import GuardStop, RunProblem, out_of_memory

# The disk itself; a refused connection is an OSError too and is not meant.
_DISK = (*durable.NO_ROOM, errno.EROFS, errno.EIO)


def explained(error: Exception, out: Path, place: tuple[int, str]) -> RunProblem | None:
    """The message for an error that came up in a run, or None where it is not one of these.

    out: the output folder. place: (step, what was being done).
    """
    from opdsl.train.memory import is_out_of_memory
    from opdsl.train.rollout import NonFiniteLogits

    step, doing = place
    found = disk_error(error)
    if found is not None:
        return durable.unwritable(f"the records of this run in {out}", found)
    if is_out_of_memory(error):
        return out_of_memory(step, doing, 1, str(error))
    if isinstance(error, NonFiniteLogits):
        note = f"while {doing}: response {error.row} of the batch"
        return GuardStop("the student's output", step, error.row, error.position, note)
    return None


def disk_error(error: Exception) -> OSError | None:
    """The OSError of a disk that is full, failing or read-only; also as safetensors words it."""
    if isinstance(error, OSError):
        number = error.errno
    else:
        words = re.search(r"\(os error (\d+)\)", str(error))
        number = int(words[1]) if words else None
    if number not in _DISK:
        return None
    return OSError(number, os.strerror(number))
