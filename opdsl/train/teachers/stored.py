"""Scores written before the run, and the teacher that reads them.

    scores.json          what the scores are of: teacher, tokenizer, data, vocabulary, shards
    scores-00001.safetensors
        keys [R, 32] uint8      SHA-256 of a row: prompt as the teacher reads it, and response
        starts [R + 1] int64    where a row's positions begin
        logprobs [N] float32    of the response tokens
        top_ids [N, k] int32    the teacher's own most probable tokens, falling
        top_logprobs [N, k] float32

Rows are looked up by what they are, so order, epochs and batch sizes of the run do not matter, and
a score can never be taken for another text's. Only texts that exist before the run can be scored:
`sequences(data)` and `sequences(golden)`.

Shapes: R rows, N response tokens of all rows, B rows of a batch, T response tokens, k own top.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from opdsl.train.errors import problem
from opdsl.train.teachers import Scores
from opdsl.train.teachers.capabilities import NO_LIMIT, Capabilities
from opdsl.train.teachers.sources import MANIFEST
from opdsl.train.teachers.wire import Row, RowScores

FORMAT = "opdsl scores 1"
SHARD_BYTES = 256 << 20


def row_key(row: Row) -> bytes:
    """SHA-256 of prompt and response."""
    text = f"{row.prompt}:" + ",".join(map(str, row.tokens))
    return hashlib.sha256(text.encode()).digest()


# ---- writing -------------------------------------------------------------------------------------


class Writer:
    """Writes rows into shards; `close` writes the manifest last, so a folder without one is none."""

    def __init__(self, folder: Path, about: dict[str, Any], shard_bytes: int = SHARD_BYTES):
        self.folder, self.about, self.most = folder, about, shard_bytes
        self.seen: set[bytes] = set()
        self.shards: list[dict[str, Any]] = []
        self._rows: list[tuple[bytes, RowScores]] = []
        self._size = 0
        folder.mkdir(parents=True, exist_ok=True)

    def fresh(self, row: Row) -> bool:
        """Whether this row has no scores yet."""
        return row_key(row) not in self.seen

    def add(self, row: Row, scores: RowScores) -> None:
        key = row_key(row)
        if key in self.seen:
            return
        self.seen.add(key)
        self._rows.append((key, scores))
        wide = 0 if scores.top_ids is None else scores.top_ids.shape[1]
        self._size += 40 + len(scores.sampled) * (4 + 8 * wide)
        if self._size >= self.most:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        counts = torch.tensor([0] + [len(s.sampled) for _, s in self._rows])
        tensors = {
            "keys": torch.tensor([list(key) for key, _ in self._rows], dtype=torch.uint8),
            "starts": counts.cumsum(0),
            "logprobs": torch.cat([s.sampled for _, s in self._rows]),
        }
        if self._rows[0][1].top_ids is not None:
            tensors["top_ids"] = torch.cat([s.top_ids for _, s in self._rows]).to(torch.int32)  # type: ignore[misc]
            tensors["top_logprobs"] = torch.cat([s.top_logprobs for _, s in self._rows])  # type: ignore[misc]
        name = f"scores-{len(self.shards) + 1:05d}.safetensors"
        path = self.folder / name
        save_file(tensors, path)
        path.chmod(0o666 & ~_umask())  # safetensors leaves files at 0600
        self.shards.append(
            {"file": name, "rows": len(self._rows), "bytes": path.stat().st_size,
             "sha256": _sha256(path)}
        )  # fmt: skip
        self._rows, self._size = [], 0

    def close(self) -> dict[str, Any]:
        """Write what is left and the manifest; returns the manifest."""
        self._flush()
        manifest = {"format": FORMAT, **self.about, "rows": len(self.seen), "shards": self.shards}
        temporary = self.folder / (MANIFEST + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / MANIFEST)
        return manifest


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- reading -------------------------------------------------------------------------------------


def read_manifest(name: str, folder: str) -> dict[str, Any]:
    """The manifest of a folder of scores. Raises RunProblem OPD733."""
    path = Path(folder).expanduser() / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise _broken(name, folder, f"its format is {manifest['format']!r}, not {FORMAT!r}")
        int(manifest["top"]), int(manifest["vocabulary"]), list(manifest["shards"])
        return manifest
    except OSError as error:
        raise _broken(name, folder, (error.strerror or "cannot be read").lower()) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _broken(name, folder, f"its {MANIFEST} is damaged") from None


def capabilities_of(manifest: dict[str, Any]) -> Capabilities:
    k = int(manifest["top"])
    everything = k >= int(manifest["vocabulary"])
    most = NO_LIMIT if everything else k
    return Capabilities(f"this folder of stored scores (top {k})", True, most)


def _broken(name: str, folder: str, why: str):
    return problem(
        "OPD733",
        f"teacher {name}: the scores in {folder} cannot be used: {why}",
        helps=["write them again with `opdsl score`"],
    )


class StoredTeacher:
    """Scores out of a folder. view: prompt -> the tokens the teacher read.

    needed: whether a prompt's rows are read of this teacher at all.
    """

    ids_from = ()

    def __init__(
        self,
        name: str,
        folder: str,
        manifest: dict[str, Any],
        view: Callable[[Any], Sequence[int]],
        device: Any,
        top: int,
        needed: Callable[[Any], bool] = lambda prompt: True,
    ):
        self.name, self.folder, self.manifest = name, folder, manifest
        self.view, self.device, self.needed = view, device, needed
        self.top = min(top, int(manifest["top"]))
        self.places: dict[bytes, tuple[int, int, int]] = {}
        self.shards = [self._open(number, shard) for number, shard in enumerate(manifest["shards"])]

    def _open(self, number: int, shard: dict[str, Any]):
        """One verified shard; its rows enter `places`."""
        path = Path(self.folder).expanduser() / Path(str(shard["file"])).name
        try:
            if path.stat().st_size != shard["bytes"] or _sha256(path) != shard["sha256"]:
                raise _broken(self.name, self.folder, f"{path.name} is damaged")
            file = safe_open(path, framework="pt")
            starts = file.get_tensor("starts").tolist()
            keys = file.get_tensor("keys").numpy()
        except OSError as error:
            why = f"{path.name}: {(error.strerror or 'cannot be read').lower()}"
            raise _broken(self.name, self.folder, why) from None
        except (SafetensorError, KeyError):
            raise _broken(self.name, self.folder, f"{path.name} is damaged") from None
        for i, key in enumerate(keys):
            self.places[key.tobytes()] = (number, starts[i], starts[i + 1])
        return file

    def score(self, prompts: Sequence[Any], tokens_BT, lengths_B, ids_BTK=None) -> Scores:
        """Stored scores of a batch. Raises RunProblem OPD733 for a row that has none."""
        B, T = tokens_BT.shape
        logprobs_BT = torch.zeros(B, T)
        ids_BTk = torch.zeros(B, T, self.top, dtype=torch.int64)
        logp_BTk = torch.full((B, T, self.top), -torch.inf)
        for i, (prompt, n) in enumerate(zip(prompts, lengths_B.tolist())):
            if not self.needed(prompt):
                continue
            view = tuple(self.view(prompt))
            place = self.places.get(
                row_key(Row(view + tuple(tokens_BT[i, :n].tolist()), len(view)))
            )
            if place is None:
                raise self._missing(prompt)
            number, start, stop = place
            file = self.shards[number]
            logprobs_BT[i, :n] = file.get_slice("logprobs")[start:stop]
            if self.top:
                ids_BTk[i, :n] = file.get_slice("top_ids")[start:stop, : self.top].to(torch.int64)
                logp_BTk[i, :n] = file.get_slice("top_logprobs")[start:stop, : self.top]
        lists = (ids_BTk.to(self.device), logp_BTk.to(self.device)) if self.top else (None, None)
        return Scores(logprobs=logprobs_BT.to(self.device), top_ids=lists[0], top_logprobs=lists[1])

    def _missing(self, prompt: Any):
        line = getattr(prompt, "line", 0)
        where = f"the row of line {line}" if line else "a row of this batch"
        return problem(
            "OPD733",
            f"teacher {self.name}: {self.folder} holds no scores of {where}",
            notes=["a row is known by its tokens: prompt, context and response must be the same"],
            helps=["write them again with `opdsl score`, with this spec, data and seed"],
        )

    def after_update(self) -> None:
        """Stored scores do not change."""

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Stored scores have nothing to load."""
