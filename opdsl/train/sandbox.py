"""A subprocess with limits: for whatever a text could make long, large or harmful.

    with Limited(["/path/judge.sh"], Limits(time=30)) as process:
        lines = process.exchange(b'{"response": "42"}\n')

It gets an empty temporary folder as its home and working folder, a session of its own, no
environment but PATH, and limits on address space, CPU seconds, file size, output and time. A
keeper process (`sandbox_child`) kills all of it when it is done with, when a limit is broken, or
when the trainer itself is killed. Needs a POSIX system.

This is a fence against accidents and against texts, not against an enemy with the user's rights:
the network and the user's files stay reachable.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from opdsl.train.errors import problem

CHILD = Path(__file__).with_name("sandbox_child.py")
ERROR_TEXT = 2000  # bytes of the process's stderr that are kept for a message
PIECE = 65_536  # bytes read or written at a time
_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Limits:
    """time: seconds without an answer. cpu: seconds of one process, None = `time` for each answer
    it owes. memory: bytes of address space of one process. output: bytes it may print. files:
    bytes of one file it may write."""

    time: float = 30.0
    cpu: float | None = None
    memory: int = 4 * 10**9
    output: int = 4 * 10**6
    files: int = 100 * 10**6


def parse_limits(text: str | None) -> Limits:
    """`time=10,memory=2GB` as Limits. Raises RunProblem OPD112."""
    limits = Limits()
    for word in (text or "").split(","):
        name, _, value = (part.strip() for part in word.partition("="))
        if not word.strip():
            continue
        size = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([KMG]?B|s)?", value, re.IGNORECASE)
        unit = (size[2] or "").upper() if size else ""
        if name in ("time", "cpu") and size and unit in ("", "S") and float(size[1]) > 0:
            limits = replace(limits, **{name: float(size[1])})
        elif name in ("memory", "output", "files") and size and unit != "S" and float(size[1]) > 0:
            limits = replace(limits, **{name: int(float(size[1]) * _SIZES[unit])})
        else:
            raise problem(
                "OPD112",
                f"--verifier-limits does not understand {word.strip()!r}",
                helps=[
                    "--verifier-limits time=30,cpu=60,memory=4GB,output=4MB,files=100MB, or some of these"
                ],
                exit_code=2,
            )
    return limits


class Stopped(Exception):
    """The process broke a limit or ended early. lines: what it had answered until then."""

    def __init__(self, reason: str, lines: list[bytes]):
        super().__init__(reason)
        self.reason, self.lines = reason, lines


class Limited:
    """One process under limits, spoken to in lines.

    answers: how many answers it owes in its life, for the CPU limit; None: no CPU limit, for a
    process that lives as long as the run. Raises RunProblem OPD712 where there is no such thing
    as a limited process (Windows) or none can be started.
    """

    def __init__(self, command: Sequence[str], limits: Limits, answers: int | None = 1):
        if os.name != "posix":
            raise problem("OPD712", "this verifier runs in a limited process, which needs POSIX")
        self.limits, self._read, self._lines = limits, 0, b""
        self._error = b""
        folder = tempfile.mkdtemp(prefix="opdsl-")
        cpu = limits.cpu
        if cpu is None and answers is not None:
            cpu = limits.time * (answers + 1)
        kernel = {"cpu": cpu and max(1, round(cpu)), "memory": limits.memory, "file": limits.files}
        ours, theirs = socket.socketpair()
        words = [sys.executable, "-I", "-S", str(CHILD), str(theirs.fileno()), folder]
        try:
            self._process = subprocess.Popen(
                [*words, json.dumps(kernel), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(folder),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            os.rmdir(folder)
            ours.close()
            raise problem("OPD712", f"cannot start a process: {error.strerror or error}") from None
        finally:
            theirs.close()
        self._socket = ours
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            os.set_blocking(pipe.fileno(), False)  # type: ignore[union-attr]
        self._end = weakref.finalize(self, _end, self._process, ours)

    def __enter__(self) -> Limited:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the process and everything it started; harmless when repeated."""
        self._end()

    def ask(self, line: bytes, patience: float | None = None) -> bytes:
        """One line in, one line out, the process goes on. Raises Stopped; then it is closed.

        patience: seconds to wait, instead of `limits.time`.
        """
        self._read = 0
        (answer,) = self._talk(line + b"\n", 1, patience or self.limits.time)
        return answer

    def exchange(self, data: bytes) -> list[bytes]:
        """All lines the process prints for `data`; it must then end with status 0.

        Raises Stopped when nothing is answered for `limits.time` seconds, at too much output, or
        when it ends otherwise. Either way the process is closed.
        """
        lines = self._talk(data, None, self.limits.time)
        status = self._status(self.limits.time)
        reason = self._ending(status)
        self.close()
        if status != "exit 0":
            raise Stopped(reason, lines)
        return lines

    # ---- inside ------------------------------------------------------------------------

    def _talk(self, data: bytes, wanted: int | None, patience: float) -> list[bytes]:
        """Write `data`, read `wanted` lines (None: until the end of the output)."""
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        lines: list[bytes] = []
        view = memoryview(data)
        deadline = time.monotonic() + patience
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not stderr.closed:
                selector.register(stderr, selectors.EVENT_READ)
            selector.register(stdin, selectors.EVENT_WRITE)
            while True:
                left = deadline - time.monotonic()
                events = selector.select(left) if left > 0 else []
                if not events and left <= 0:
                    self.close()
                    raise Stopped(f"no answer for {patience:g} s", lines)
                for key, _ in events:
                    if key.fileobj is stdin:
                        view = self._write(stdin, view)
                        if not view:
                            selector.unregister(stdin)
                            if wanted is None and not stdin.closed:
                                stdin.close()
                        continue
                    piece = os.read(key.fd, PIECE)
                    self._read += len(piece)
                    if self._read > self.limits.output:
                        self.close()  # and nothing of what it said is worth keeping
                        raise Stopped(f"more than {self.limits.output:,} bytes of output", [])
                    if key.fileobj is stderr:
                        self._error = (self._error + piece)[:ERROR_TEXT]
                        if not piece:
                            selector.unregister(stderr)
                            stderr.close()
                        continue
                    *whole, self._lines = (self._lines + piece).split(b"\n")
                    if not piece and self._lines.strip():
                        whole, self._lines = [self._lines], b""  # a last line without its end
                    whole = [line for line in whole if line.strip()]
                    if whole:
                        lines += whole
                        deadline = time.monotonic() + patience
                    if wanted is not None and len(lines) >= wanted:
                        return lines
                    if not piece and wanted is None:
                        return lines
                    if not piece:
                        reason = self._ending(self._status(1.0))
                        self.close()
                        raise Stopped(reason, lines)

    def _write(self, stdin, view: memoryview) -> memoryview:
        """What is still to be written; a reader that has gone away needs nothing more."""
        try:
            return view[os.write(stdin.fileno(), view[:PIECE]) :] if view else view
        except BlockingIOError:
            return view
        except BrokenPipeError:
            return view[:0]

    def _status(self, patience: float) -> str:
        """How the process ended, in the keeper's words; `still running` after `patience`."""
        self._socket.settimeout(patience)
        try:
            return self._socket.recv(64).decode().strip() or "signal 9"
        except (TimeoutError, OSError):
            return "still running"

    def _ending(self, status: str) -> str:
        kind, _, number = status.partition(" ")
        stderr = self._process.stderr
        if not stderr.closed:
            with suppress(BlockingIOError):
                self._error = (self._error + os.read(stderr.fileno(), PIECE))[:ERROR_TEXT]
        said = self._error.decode("utf-8", "replace").strip().splitlines()
        words = f": {said[-1][:200]}" if said else ""
        if kind == "signal" and number == str(int(getattr(signal, "SIGXCPU", 0))):
            return f"more CPU time than its limit{words}"
        if kind == "signal" and number == str(int(getattr(signal, "SIGXFSZ", 0))):
            return f"a file larger than {self.limits.files:,} bytes{words}"
        if kind == "signal":
            return f"killed by signal {number}{words}"
        if kind == "exit":
            return f"ended with status {number}{words}"
        return "it closed its output and did not end"


def _environment(folder: str) -> dict[str, str]:
    """PATH is the only thing inherited; the rest are constants."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _end(process: subprocess.Popen, lifeline: socket.socket) -> None:
    """Close the line to the keeper, which then kills everything; wait for it, at most 5 s."""
    lifeline.close()
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()  # type: ignore[union-attr]
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)
