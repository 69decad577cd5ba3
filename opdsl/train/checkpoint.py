"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder `step-000050` of safetensors files and one JSON file, sealed by
`manifest.json`, which lists every file with size and SHA-256. It is written as
`step-000050.tmp-…`: each file is flushed to the disk, the manifest comes last, the folder is
flushed and renamed, and the parent is flushed. Older checkpoints are deleted only after the new
one has been read back and verified. A folder without a matching manifest does not exist.

No pickle anywhere: optimizer states are tensors with names, everything else is JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdsl.train import durable
from opdsl.train.durable import FolderLock as FolderLock  # the lock of the folder, for the loop
from opdsl.train.errors import RunProblem, problem

SCHEMA = 2  # what is written
OLDEST = 1  # what can still be read; schema 1 lacks versions, outline and memories
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: tensors by file and name, and the JSON state."""

    folder: Path
    step: int
    tensors: dict[str, dict[str, Any]]
    state: dict[str, Any]
    schema: int = SCHEMA


def write(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Any],
    identity: Mapping[str, str],
    keep: int = 3,
) -> Path:
    """Write `root/step-NNNNNN` and delete all but the `keep` newest checkpoints.

    tensors: file stem -> {name: tensor}. state: JSON values. identity: fingerprints that a
    resuming run must match (method, tokenizer).

    Raises RunProblem OPD704 if the disk is full or the folder cannot be written; the checkpoints
    that were there before stay untouched and no half-written folder stays behind.
    """
    final = root / f"{_PREFIX}{step:06d}"
    temporary = root / f"{final.name}.tmp-{os.getpid()}-{time.monotonic_ns()}"
    size = sum(t.numel() * t.element_size() for g in tensors.values() for t in g.values())
    text = json.dumps({**state, "step": step}, indent=1, sort_keys=True).encode()
    try:
        os.makedirs(temporary)
        files: dict[str, dict[str, Any]] = {}
        for stem, group in sorted(tensors.items()):
            name = f"{stem}.safetensors"
            files[name] = durable.write_tensors(temporary / name, group)
        files["state.json"] = durable.write_bytes(temporary / "state.json", text)
        manifest = {"schema": SCHEMA, "step": step, "identity": dict(identity), "files": files}
        durable.write_bytes(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
        durable.sync_folder(temporary)
        _put_in_place(temporary, final)
        durable.sync_folder(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise durable.unwritable(f"a checkpoint in {root}", error, size + len(text)) from None
    fault = verify(final)
    if fault is not None:
        raise problem(
            "OPD704",
            f"the checkpoint {final} does not read back: {fault}",
            notes=["earlier checkpoints are untouched"],
            helps=["look at the disk, then start again with --resume"],
        )
    clean(root)
    _rotate(root, step, keep)
    return final


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename; a checkpoint of the same step steps aside and comes back if that fails.

    A kill between the two renames leaves only the one set aside: `clean` brings it back.
    """
    aside = None
    if final.exists():
        aside = final.with_name(f"{final.name}.tmp-old-{time.monotonic_ns()}")
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        if aside is not None:
            os.rename(aside, final)
        raise


def _rotate(root: Path, step: int, keep: int) -> None:
    """Delete what is behind the `keep` newest up to `step`, which has just been verified.

    Higher numbers are those a resumed run passed over because they are damaged: were they
    counted, they would push out good ones.
    """
    folders = _folders(root)
    passed_over = [f for f in folders if _number(f) > step]
    for old in passed_over + folders[len(passed_over) + max(1, keep) :]:
        shutil.rmtree(old, ignore_errors=True)


# ---- reading -------------------------------------------------------------------------------


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if it is whole.

    Raises RunProblem OPD705 for a whole manifest of a schema this version cannot read: an older
    checkpoint must not quietly be taken instead.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        schema, files = manifest["schema"], manifest["files"]
        if not isinstance(schema, int):
            return "manifest.json is damaged (schema)"
        if not OLDEST <= schema <= SCHEMA:
            raise _other_schema(folder, schema)
        for name, facts in files.items():
            if Path(name).name != name:
                return f"odd file name {name!r}"
            found = durable.facts_of(folder / name)
            if found["size"] != facts["size"]:
                return f"{name} has {found['size']} bytes, not {facts['size']}"
            if found["sha256"] != facts["sha256"]:
                return f"{name} is damaged"
        if "state.json" not in files:
            return "state.json is not listed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json is damaged ({type(error).__name__})"
    return None


def _other_schema(folder: Path, schema: int) -> RunProblem:
    reads = str(SCHEMA) if OLDEST == SCHEMA else f"{OLDEST} to {SCHEMA}"
    age = "a newer" if schema > SCHEMA else "an older"
    cure = "update opdsl" if schema > SCHEMA else "finish that run with the version that began it"
    return problem(
        "OPD705",
        f"{folder} was written by {age} opdsl: schema {schema}, and this version reads {reads}",
        notes=["nothing was changed"],
        helps=[f"{cure}, or start afresh with another --out"],
        exit_code=3,
    )


def _number(folder: Path) -> int:
    return int(folder.name[len(_PREFIX) :])


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not root.is_dir():
        return []
    found = [
        p for p in root.iterdir() if p.name.startswith(_PREFIX) and p.name[len(_PREFIX) :].isdigit()
    ]
    return sorted(found, key=_number, reverse=True)


def clean(root: Path) -> None:
    """Remove what interrupted writes left. Call only while holding the folder's lock."""
    if not root.is_dir():
        return
    for path in root.glob(f"{_PREFIX}*.tmp-*"):
        name, _, rest = path.name.partition(".tmp-")
        final = root / name
        if rest.startswith("old-") and not final.exists() and verify(path) is None:
            os.rename(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def newest(root: Path, say: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
    """The newest good checkpoint; `say` gets one line for every newer one that is damaged.

    Returns None where there is no checkpoint at all. Raises RunProblem OPD705 if there are
    checkpoints and none is good, or if the newest is of another schema.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    faults = []
    for folder in _folders(root):
        fault = verify(folder)
        if fault is None:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            try:
                tensors = {
                    Path(name).stem: load_file(folder / name)
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
                return Checkpoint(folder, manifest["step"], tensors, state, manifest["schema"])
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
        # A copy: the file behind a loaded tensor goes when the checkpoint is rotated out.
        state.setdefault(index[name], {})[part] = tensor.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
