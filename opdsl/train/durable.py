"""Files that are on the disk when the call returns, and a folder only one process writes to.

Tensors are written in the safetensors format block by block, so a checkpoint needs no second
copy of the model in memory, and an error of the file system keeps its number (a full disk is
told from a folder that cannot be written). Every call of the system goes through `os` by name:
the tests put a layer there that fails or kills the process at the k-th call.

Format: eight bytes with the length of a JSON header, the header, the bytes of the tensors
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opdsl.train.errors import RunProblem, problem

BLOCK = 1 << 23  # bytes per write

_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Writer:
    """A new file; `put` writes and hashes, `close` flushes it to the disk and tells its facts."""

    def __init__(self, path: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._file = os.open(path, flags, 0o666)  # permissions follow the umask
        self._hash, self._size = hashlib.sha256(), 0

    def put(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK):
            block = view[start : start + BLOCK]
            self._hash.update(block)
            self._size += len(block)
            while block:
                block = block[os.write(self._file, block) :]

    def close(self) -> dict[str, Any]:
        os.fsync(self._file)
        file, self._file = self._file, -1
        os.close(file)
        return {"size": self._size, "sha256": self._hash.hexdigest()}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:  # left by an error, which is the one to report
            with contextlib.suppress(OSError):
                os.close(self._file)


def write_bytes(path: Path, data: bytes) -> dict[str, Any]:
    """Write a new file through to the disk; returns {"size", "sha256"}. Raises OSError."""
    with Writer(path) as file:
        file.put(data)
        return file.close()


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Write tensors by name as a safetensors file; returns {"size", "sha256"}.

    Raises OSError, and ValueError for a dtype without a name in `_DTYPES`.
    """
    import torch

    # Wide items first, so that every tensor starts at a multiple of its item's size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in _DTYPES:
            raise ValueError(f"{name}: {kind} tensors have no place in a checkpoint")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[kind],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with Writer(path) as file:
        file.put(len(text).to_bytes(8, "little") + text)
        for name in order:
            plain = tensors[name].detach().cpu().contiguous().reshape(-1)
            if plain.numel():
                file.put(plain.view(torch.uint8).numpy())
        return file.close()


def facts_of(path: Path) -> dict[str, Any]:
    """{"size", "sha256"} of a file as it lies on the disk. Raises OSError."""
    found, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
            size += len(block)
    return {"size": size, "sha256": found.hexdigest()}


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    if os.name == "nt":  # folders cannot be opened there; the rename is journalled
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Flush a file that something else writes; nothing happens where it does not exist."""
    with contextlib.suppress(FileNotFoundError):
        handle = os.open(path, os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def unwritable(what: str, error: OSError, size: int = 0) -> RunProblem:
    """OPD704 for a write that failed. what: "a checkpoint in runs/x"; size: bytes it needs."""
    kept = "earlier checkpoints are untouched"
    if error.errno in NO_ROOM:
        needs = f": it needs about {size / 1e6:.1f} MB" if size else ""
        why = (error.strerror or "").lower()
        return problem(
            "OPD704",
            f"no room for {what}{needs}",
            notes=[why, kept] if why else [kept],
            helps=["make room and start again with --resume; --keep 1 keeps fewer checkpoints"],
        )
    return problem(
        "OPD704",
        f"cannot write {what}: {(error.strerror or str(error)).lower()}",
        notes=[kept],
        helps=["make the folder writable and start again with --resume"],
    )


# ---- one run per folder --------------------------------------------------------------------------


class FolderLock:
    """Only one process writes to an output folder.

    The operating system's file lock does the work, so a killed run leaves no stale lock; host
    and process id are in the file for the message. Raises RunProblem OPD710 if held, OPD704 if
    the folder cannot be created or written.
    """

    def __init__(self, folder: Path):
        self.path = folder / ".lock"

    def __enter__(self) -> FolderLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+")
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise problem(
                "OPD704",
                f"cannot write to the output folder {self.path.parent}: {reason}",
                helps=["--out DIR with a folder you can write to"],
            ) from None
        try:
            _lock(self._file)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise problem(
                "OPD710",
                f"the output folder {self.path.parent} is in use by {holder}",
                helps=["wait for that run, or choose another --out"],
            ) from None
        with contextlib.suppress(OSError):  # on a full disk the lock holds, only nameless
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._file.truncate(0)
        with contextlib.suppress(OSError):  # closing releases the lock
            self._file.close()


def _lock(file) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
