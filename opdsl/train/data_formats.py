"""Files of rows, read as a stream: JSON lines, JSON, CSV; Parquet and data sets in `data_tables`.

Every reader yields `Found`: a row as decoded, or what is wrong with it, with its number. A file
is read once, front to back; while it passes, its bytes (of tables: its values) go into the digest
that a resumed run must match.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdsl.train.errors import problem
from opdsl.train.rows import MAX_ROW, Fault, decode

PIECE = 1 << 20  # bytes read at a time
HELP = "--data FILE: .jsonl, .json, .csv, .tsv or .parquet, a folder of a data set, or ORG/NAME"
# What a file starts with that is packed in some way.
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2"}
_HUB = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")


@dataclass(frozen=True)
class Found:
    """A row, or the fault of one. number: its line, or its place among the rows, from 1."""

    number: int
    row: Any = None
    fault: str | None = None


@dataclass(frozen=True)
class Source:
    """Something rows can be read from.

    name: for messages. unit: what the numbers count, "line" or "row". kind: "file" where the
    digest is of the bytes, "rows" where it is of the values. read(digest) yields the rows.
    """

    name: str
    unit: str
    kind: str
    read: Callable[[Any], Iterator[Found]]


def open_source(text: str) -> Source:
    """What `--data` names: a file by its ending (no known ending: JSON lines), a folder, or a
    data set of the hub, both with `,split=…` and `,config=…` behind it.

    Raises RunProblem OPD702 for what is not there or cannot be read.
    """
    path = Path(text)
    try:
        if path.is_dir():
            return _data_set(text, {})
        if path.exists():
            return _file(path)
    except OSError as error:  # a name no file can have
        raise _unreadable(text, error) from None
    name, options = _options(text)
    if options and Path(name).is_dir():
        return _data_set(name, options)
    if _HUB.fullmatch(name) and not re.search(r"\.(jsonl?|ndjson|csv|tsv|parquet|txt)$", name):
        return _data_set(name, options)
    raise _unreadable(text, FileNotFoundError(2, "no such file or directory"))


def stem(text: str) -> str:
    """A short name for the output folder of a run on these data."""
    name = Path(_options(text)[0]).stem or "data"
    return re.sub(r"[^\w.-]+", "-", name)


def _options(text: str) -> tuple[str, dict[str, str]]:
    """`NAME,split=…,config=…` apart; a comma without such a word belongs to the name."""
    name, *words = text.split(",")
    options = {}
    for word in words:
        key, _, value = word.partition("=")
        if key.strip() not in ("split", "config") or not value.strip():
            return text, {}
        options[key.strip()] = value.strip()
    return name, options


def _data_set(name: str, options: dict[str, str]) -> Source:
    from opdsl.train.data_tables import data_set

    return data_set(name, options)


def _file(path: Path) -> Source:
    ending = path.suffix.lower()
    if path.is_block_device() or path.is_char_device() or path.is_socket():
        raise _unreadable(str(path), OSError(0, "it is no file"))
    if ending == ".parquet":
        from opdsl.train.data_tables import parquet

        return Source(path.name, "row", "rows", lambda digest: parquet(path, digest))
    readers = {".json": _json, ".csv": _csv, ".tsv": _csv}
    reader = readers.get(ending, _json_lines)

    def read(digest) -> Iterator[Found]:
        try:
            with path.open("rb") as file:
                start = file.peek(8)[:8]
                _check_start(path, start)
                bytes_of = _Hashed(file, digest)
                if start.startswith(codecs.BOM_UTF8):
                    bytes_of.readline(len(codecs.BOM_UTF8))
                yield from reader(bytes_of, path)
        except OSError as error:
            raise _unreadable(str(path), error) from None

    return Source(path.name, "line", "file", read)


def _unreadable(name: str, error: OSError):
    reason = (error.strerror or str(error)).lower()
    return problem("OPD702", f"cannot read the data file {name}: {reason}", helps=[HELP])


def _check_start(path: Path, start: bytes) -> None:
    """Refuse at once what a whole file of bad rows would say less clearly."""
    for magic, name in _PACKED.items():
        if start.startswith(magic):
            raise problem("OPD702", f"{path.name} is packed ({name})", helps=["unpack it first"])
    if start.startswith(b"PAR1"):
        raise problem("OPD702", f"{path.name} is a Parquet file", helps=["name it *.parquet"])
    marked = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if marked or (start[1:4:2] == b"\0\0" and start[:1] != b"\0"):
        raise problem(
            "OPD703", f"{path.name} is not UTF-8 but looks like UTF-16", helps=["save it as UTF-8"]
        )


class _Hashed:
    """A file whose every byte goes into the digest on its way."""

    def __init__(self, file, digest):
        self.file, self.digest = file, digest

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        return data

    def readline(self, limit: int) -> bytes:
        data = self.file.readline(limit)
        self.digest.update(data)
        return data

    def lines(self) -> Iterator[bytes | None]:
        """Line after line; None for one of more than MAX_ROW bytes."""
        while line := self.readline(MAX_ROW + 1):
            if len(line) <= MAX_ROW or line.endswith(b"\n"):
                yield line
                continue
            while (line := self.readline(PIECE)) and not line.endswith(b"\n"):
                pass
            yield None


_TOO_LONG = f"longer than {MAX_ROW // 10**6} MB"


def _json_lines(file: _Hashed, path: Path) -> Iterator[Found]:
    for number, line in enumerate(file.lines(), 1):
        if line is None:
            yield Found(number, fault=_TOO_LONG)
        elif line.strip():
            yield _decoded(number, line)


def _decoded(number: int, text: bytes | str) -> Found:
    try:
        return Found(number, decode(text))
    except Fault as fault:
        return Found(number, fault=str(fault))


# ---- JSON ----------------------------------------------------------------------------------

_WRAPPED = re.compile(r'\{\s*"(?:data|rows|examples|items|train)"\s*:\s*\[')
_SPACE = re.compile(r"[ \t\r\n]*")


def _json(file: _Hashed, path: Path) -> Iterator[Found]:
    """A list of objects, such a list under `data` (or rows, examples, items, train), or JSON
    lines after all.

    Rows are decoded one by one as the text comes in, so that the file is never in memory as a
    whole; one that is broken has no rows after that place.
    """
    text = _Text(file, path.name)
    first = text.skip()
    wrapped = _WRAPPED.match(text.buffer, text.at)
    if first not in ("[", "{", ""):
        yield Found(text.line, fault="neither a list nor an object")
        return
    if first == "[" or wrapped:
        text.advance(wrapped.end() if wrapped else text.at + 1)
    inside = bool(first == "[" or wrapped)
    while char := text.skip():
        if inside and char == ",":
            text.advance(text.at + 1)
        elif inside and char == "]":
            text.advance(text.at + 1)
            if not wrapped and text.skip():
                yield Found(text.line, fault="something follows the end of the list")
            break
        else:
            yield text.value()
            if text.broken:
                return
    else:
        if inside:
            yield Found(text.line, fault="the list does not end")
    while text.more():  # what follows counts for the digest
        text.at = len(text.buffer)


class _Text:
    """JSON text that comes in piece by piece; `at` is the place reached in `buffer`, in `line`.
    broken: nothing after that place can be read."""

    def __init__(self, file: _Hashed, name: str):
        self.file, self.name = file, name
        self.buffer, self.at, self.line, self.broken = "", 0, 1, False
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        # Only where a value ends is asked of it: numbers are not converted.
        self._scan = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len).raw_decode

    def more(self) -> bool:
        """Read on, doubling what is in memory; False at the end of the file."""
        data = self.file.read(max(PIECE, len(self.buffer) - self.at))
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError:
            raise problem(
                "OPD703", f"{self.name} is not UTF-8", helps=["save it as UTF-8"]
            ) from None
        self.buffer, self.at = self.buffer[self.at :] + text, 0
        return bool(data)

    def advance(self, to: int) -> None:
        self.line += self.buffer.count("\n", self.at, to)
        self.at = to

    def skip(self) -> str:
        """The next character that is not white space, which `at` then points to; "" at the end."""
        while True:
            self.advance(_SPACE.match(self.buffer, self.at).end())  # type: ignore[union-attr]
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more():
                return ""

    def value(self) -> Found:
        """The value at `at`, as a row."""
        while True:
            try:
                _, end = self._scan(self.buffer, self.at)
            except RecursionError:
                self.broken = True
                return Found(self.line, fault="nested too deeply")
            except ValueError as error:
                if len(self.buffer) - self.at > MAX_ROW:
                    self.broken = True
                    return Found(self.line, fault=f"{_TOO_LONG}, or not JSON")
                if self.more():
                    continue
                self.broken = True
                return Found(self.line, fault=f"not JSON ({error})")
            found = _decoded(self.line, self.buffer[self.at : end])
            self.advance(end)
            return found


# ---- CSV -----------------------------------------------------------------------------------


_ESCAPED = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8


def _csv(file: _Hashed, path: Path) -> Iterator[Found]:
    """Comma- or tab-separated text with a row of names; empty cells count as absent."""
    csv.field_size_limit(MAX_ROW)
    tab = path.suffix.lower() == ".tsv"
    text = io.TextIOWrapper(_Raw(file), encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter="\t" if tab else ",", strict=True)
    names: list[str] | None = None
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Found(reader.line_num, fault=f"not CSV ({error})")
            continue
        if cells is None:
            return
        number = reader.line_num
        if not cells:
            continue
        bad = any(map(_ESCAPED.search, cells))
        if names is None:
            twice = [n for n in cells if cells.count(n) > 1]
            if bad or twice:
                why = "are not UTF-8" if bad else f"hold `{twice[0]}` twice"
                raise problem("OPD703", f"{path.name}: the names in its first line {why}")
            names = [name.strip() for name in cells]
        elif bad:
            yield Found(number, fault="not UTF-8")
        elif len(cells) != len(names):
            yield Found(number, fault=f"{len(cells)} cells, and {len(names)} names in line 1")
        else:
            yield Found(number, {n: c for n, c in zip(names, cells) if c != ""})


class _Raw(io.RawIOBase):
    """The hashed file as what TextIOWrapper reads from."""

    def __init__(self, file: _Hashed):
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
