"""Rows of Parquet files and of data sets of the `datasets` library: the extra `data`.

Their digest is of the values, row by row, so that it does not depend on how they are stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from opdsl.train.data_formats import Found, Source
from opdsl.train.errors import problem
from opdsl.train.models import hub_answers
from opdsl.train.rows import MAX_ROW

BATCH = 1024  # rows decoded at a time
MAX_GROUP = 8 * 10**9  # bytes of one unpacked row group, which is held in memory as a whole
INSTALL = "pip install 'opdsl[data]'"


def parquet(path: Path, digest) -> Iterator[Found]:
    """The rows of a Parquet file, `BATCH` at a time. Raises RunProblem OPD702."""
    _need("pyarrow", f"reading {path.name}")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            largest = max((g.total_byte_size for g in groups), default=0)
            if largest > MAX_GROUP:
                raise problem(
                    "OPD702",
                    f"{path.name} unpacks {largest / 1e9:.1f} GB at once",
                    helps=["write it with smaller row groups"],
                )
            names = [f.name for f in file.schema_arrow if not _heavy(f.type, pa)]
            number = 0
            for batch in file.iter_batches(batch_size=BATCH, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield _found(number, row, digest)
    except (pa.ArrowException, OSError) as error:
        (first, *_) = str(error).splitlines() or [type(error).__name__]
        raise problem("OPD702", f"cannot read the data file {path}: {first[:200]}") from None


def _heavy(kind: Any, pa: Any) -> bool:
    """Pictures and sounds: bytes are no text, and are left out before they are unpacked."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _found(number: int, row: dict[str, Any], digest) -> Found:
    """A row without its empty cells. Values that are neither text, number nor a nest of these go
    into the digest by their text and are otherwise let through; `check_row` judges them."""
    kept = {name: value for name, value in row.items() if value is not None}
    text = json.dumps(kept, sort_keys=True, default=str, ensure_ascii=True)
    digest.update(text.encode() + b"\n")
    if len(text) > MAX_ROW:
        return Found(number, fault=f"longer than {MAX_ROW // 10**6} MB")
    return Found(number, kept)


def data_set(name: str, options: dict[str, str]) -> Source:
    """A folder that `save_to_disk` wrote, a folder of data files, or a data set of the hub.

    options: split and config. Raises RunProblem OPD702, also where a split must be chosen.
    """
    folder = Path(name).is_dir()
    _need("datasets", f"reading the {'folder' if folder else 'data set'} {name}")
    found = _load(name, folder, options)
    label = Path(name).name + (f":{options['split']}" if "split" in options else "")

    def read(digest) -> Iterator[Found]:
        for number, row in enumerate(found, 1):
            yield _found(number, row, digest)

    return Source(label, "row", "rows", read)


def _load(name: str, folder: bool, options: dict[str, str]) -> Any:
    """One split, its pictures and sounds left packed."""
    import datasets

    datasets.disable_progress_bars()
    if not folder and not hub_answers():  # what is in the cache is still there
        import huggingface_hub.constants as hub

        hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    saved = folder and any(
        (Path(name) / part).is_file() for part in ("state.json", "dataset_dict.json")
    )
    try:
        if saved:
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, options.get("config"))
    except Exception as error:  # the library raises dozens of kinds
        (first, *_) = str(error).splitlines() or [type(error).__name__]
        where = "the folder" if folder else "the data set"
        raise problem(
            "OPD702",
            f"cannot read {where} {name}: {first[:300]}",
            helps=["a folder of `save_to_disk` or of .parquet, .jsonl or .csv files"]
            if folder
            else ["download it first, or give a folder or a file", f"{name},config=NAME,split=…"],
        ) from None
    if hasattr(found, "column_names") and not isinstance(found, dict):
        if options.get("split") not in (None, str(found.split)):
            raise problem("OPD702", f"{name} is the split {found.split}, not {options['split']}")
    else:
        found = _split(name, dict(found), options.get("split"))
    heavy = [
        c for c, f in found.features.items() if type(f).__name__ in ("Image", "Audio", "Video")
    ]
    return found.remove_columns(heavy) if heavy else found


def _split(name: str, splits: dict[str, Any], wanted: str | None) -> Any:
    """The split asked for; else `train`, or the only one."""
    if wanted is None:
        wanted = "train" if "train" in splits or len(splits) != 1 else next(iter(splits))
    if wanted not in splits:
        raise problem(
            "OPD702",
            f"{name} has no split `{wanted}`",
            helps=[f"--data {name},split=NAME with one of: {', '.join(map(str, splits))}"],
        )
    return splits[wanted]


def _need(package: str, doing: str) -> None:
    """Raises RunProblem OPD702 where an optional package is missing."""
    if find_spec(package) is None:
        raise problem(
            "OPD702", f"{doing} needs the package {package}", helps=[INSTALL], exit_code=3
        )
