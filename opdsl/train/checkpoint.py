"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder `step-000050` of safetensors files and one JSON file, sealed by
`manifest.json`, which lists every file with size and SHA-256. It is written as
`step-000050.tmp-…`: each file is flushed to the disk, the manifest comes last, the folder is
flushed and renamed, and the parent is flushed. Older checkpoints are deleted only after the new
one has been read back and verified. A folder without a matching manifest does not exist.

No pickle anywhere: optimizer states are tensors with names, everything else is JSON.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdsl.train.errors import problem

SCHEMA = 1
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: tensors by file and name, and the JSON state."""

    folder: Path
    step: int
    tensors: dict[str, dict[str, Any]]
    state: dict[str, Any]


def write(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Any],
    identity: Mapping[str, str],
    keep: int = 3,
) -> Path:
    """Write `root/step-NNNNNN` and delete all but the `keep` newest good checkpoints.

    tensors: file stem -> {name: tensor}. state: JSON values. identity: fingerprints that a
    resuming run must match (method, tokenizer).

    Raises RunProblem OPD704 if the disk is full or the folder cannot be written; the checkpoints
    that were there before stay untouched and no half-written folder stays behind.
    """
    final = root / f"{_PREFIX}{step:06d}"
    temporary = root / f"{final.name}.tmp-{os.getpid()}-{time.monotonic_ns()}"
    size = 0
    try:
        from safetensors.torch import save

        temporary.mkdir(parents=True)
        files: dict[str, dict[str, Any]] = {}
        for stem, group in sorted(tensors.items()):
            plain = {n: t.detach().cpu().contiguous().clone() for n, t in group.items()}
            data = save(plain, metadata={"format": "pt"})
            size += len(data)
            files[f"{stem}.safetensors"] = _write_file(temporary / f"{stem}.safetensors", data)
        text = json.dumps({**state, "step": step}, indent=1, sort_keys=True).encode()
        files["state.json"] = _write_file(temporary / "state.json", text)
        manifest = {"schema": SCHEMA, "step": step, "identity": dict(identity), "files": files}
        _write_file(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
        _sync_folder(temporary)
        if final.exists():  # the same step of an earlier attempt
            doomed = root / f"{final.name}.tmp-old-{time.monotonic_ns()}"
            os.rename(final, doomed)
        os.rename(temporary, final)
        _sync_folder(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _unwritable(root, size, error) from None
    fault = verify(final)
    if fault is not None:
        raise problem("OPD704", f"the checkpoint {final} does not read back: {fault}")
    clean(root)
    for old in _folders(root)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write_file(path: Path, data: bytes) -> dict[str, Any]:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there; the rename is journalled
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(root: Path, size: int, error: OSError):
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return problem(
            "OPD704",
            f"no room for a checkpoint in {root}: it needs about {max(size, 1) / 1e6:.1f} MB",
            notes=["earlier checkpoints are untouched"],
            helps=["make room and start again with --resume"],
        )
    reason = (error.strerror or str(error)).lower()
    return problem("OPD704", f"cannot write a checkpoint to {root}: {reason}")


# ---- reading -------------------------------------------------------------------------------


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if it is whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if manifest["schema"] != SCHEMA:
            return f"schema {manifest['schema']}, this version reads {SCHEMA}"
        files = manifest["files"]
        for name, facts in files.items():
            if Path(name).name != name:
                return f"odd file name {name!r}"
            data = (folder / name).read_bytes()
            if len(data) != facts["size"]:
                return f"{name} has {len(data)} bytes, not {facts['size']}"
            if hashlib.sha256(data).hexdigest() != facts["sha256"]:
                return f"{name} is damaged"
        if "state.json" not in files:
            return "state.json is not listed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json is damaged ({type(error).__name__})"
    return None


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not root.is_dir():
        return []
    found = [
        p for p in root.iterdir() if p.name.startswith(_PREFIX) and p.name[len(_PREFIX) :].isdigit()
    ]
    return sorted(found, key=lambda p: int(p.name[len(_PREFIX) :]), reverse=True)


def clean(root: Path) -> None:
    """Remove what interrupted writes left. Call only while holding the folder's lock."""
    if root.is_dir():
        for path in root.glob(f"{_PREFIX}*.tmp-*"):
            shutil.rmtree(path, ignore_errors=True)


def newest(root: Path, say: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
    """The newest good checkpoint; `say` gets one line for every newer one that is damaged.

    Returns None where there is no checkpoint at all. Raises RunProblem OPD705 if there are
    checkpoints and none is good.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    faults = []
    for folder in _folders(root):
        fault = verify(folder)
        if fault is None:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            try:
                tensors = {
                    Path(name).stem: load((folder / name).read_bytes())
                    for name in manifest["files"]
                    if name.endswith(".safetensors")
                }
                state = json.loads((folder / "state.json").read_bytes())
            except (SafetensorError, ValueError, OSError) as error:
                fault = f"cannot be read ({type(error).__name__})"
            else:
                state["identity"] = manifest["identity"]
                for line in faults:
                    say(f"{line}; using {folder.name} instead")
                return Checkpoint(folder, manifest["step"], tensors, state)
        faults.append(f"checkpoint {folder.name} is unusable: {fault}")
    if faults:
        raise problem(
            "OPD705",
            f"no usable checkpoint in {root}",
            notes=faults,
            helps=["start afresh with another --out"],
            exit_code=3,
        )
    return None


# ---- optimizer state without pickle ------------------------------------------------------------


def optimizer_tensors(optimizer, names: list[str]) -> dict[str, Any]:
    """State of a torch optimizer as named tensors; `names` are those of its parameters."""
    import torch

    state = optimizer.state_dict()["state"]
    tensors = {}
    for index, entry in state.items():
        for key, value in entry.items():
            tensor = value if torch.is_tensor(value) else torch.tensor(float(value))
            tensors[f"{names[index]}|{key}"] = tensor
    return tensors


def load_optimizer(optimizer, names: list[str], tensors: Mapping[str, Any]) -> None:
    """Put back what `optimizer_tensors` gave; hyper-parameters come from the run itself."""
    state: dict[int, dict[str, Any]] = {}
    index = {name: i for i, name in enumerate(names)}
    for key, tensor in tensors.items():
        name, part = key.rsplit("|", 1)
        state.setdefault(index[name], {})[part] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


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
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.truncate(0)
        self._file.close()  # closing releases the lock


def _lock(file) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
