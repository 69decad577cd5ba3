"""A layer between the trainer and the system that fails, or kills the process, at the k-th call.

Only calls that change the disk are counted, in the order a save makes them: folders made, files
opened, bytes written, files and folders flushed, renames. A write that fails has written half.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from opdsl.train import checkpoint, durable

CALLS = ("makedirs", "open", "write", "fsync", "rename")


class Layer:
    """Stands for the module `os`; `fault(name)` is called at the call number `at` (from 0)."""

    def __init__(self, at: int | None = None, fault: Callable[[str], None] = lambda name: None):
        self.at, self.fault, self.seen = at, fault, []

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def called(*args, **kwargs):
            number = len(self.seen)
            self.seen.append(name)
            if number == self.at:
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                self.fault(name)
            return real(*args, **kwargs)

        return called


def install(layer: Layer, monkeypatch=None) -> None:
    """Put the layer in; for good where there is no monkeypatch (a process about to die)."""
    for module in (durable, checkpoint):
        if monkeypatch is None:
            module.os = layer  # type: ignore[attr-defined]
        else:
            monkeypatch.setattr(module, "os", layer)


def failing(number: int) -> Callable[[str], None]:
    """A fault that raises OSError with this number."""

    def fault(name: str) -> None:
        raise OSError(number, os.strerror(number))

    return fault


FULL = failing(errno.ENOSPC)


def dying(name: str) -> None:
    """A fault nothing can catch."""
    os.kill(os.getpid(), signal.SIGKILL)


# ---- processes -------------------------------------------------------------------------------


def forked(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Run `work` in a process of its own; its exit code, negative for the signal that ended it.

    kill_after: seconds after which it is killed, if it still runs.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            code = getattr(error, "exit_code", 1)
            if code == 1:
                import traceback

                traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(
            child, signal.SIGKILL
        )  # the child is not reaped yet, so the number is still its own
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---- what must hold after a kill ---------------------------------------------------------------

RESULTS = ("metrics.jsonl", "evals.jsonl", "student/model.safetensors")


def results(out: Path) -> dict[str, bytes]:
    """Every byte that two equal runs share."""
    names = [*RESULTS, *(f"student-adapter/{n}" for n in ("adapter_model.safetensors",))]
    return {n: (out / n).read_bytes() for n in names if (out / n).exists()}


def faults_of(out: Path) -> list[str]:
    """Checkpoint folders under their final names that are not whole. There must be none."""
    found = []
    for folder in checkpoint._folders(out / "checkpoints"):
        fault = checkpoint.verify(folder)
        if fault is not None:
            found.append(f"{folder.name}: {fault}")
    return found
