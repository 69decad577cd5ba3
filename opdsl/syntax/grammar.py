"""Parse tables of `grammars/opd.lark`: computed by Lark once and shipped beside the grammar.

While the grammar is being edited the shipped tables do not fit; then they are computed again and
kept in the user's cache.

Lark checks the grammar and computes the LALR(1) tables, which takes half a second; driving them
takes forty lines (`lalr.py`). Kept as JSON, the tables load in a few milliseconds, a warm
`opdsl check` never imports Lark, and a file in a cache folder can do no harm: it holds data, not
a pickle. The file is keyed by grammar text, Lark version and Python version, carries a checksum,
must belong to the user, and is written under a temporary name first, so that two processes can
race. Any trouble just means no cache.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import stat
import sys
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from opdsl import resources

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Rule:
    """One production and the shape of the node it makes.

    `plan` lists what becomes a child, in order: the position of a kept symbol, or -1 for an
    optional part `[…]` that is absent. `expand`: a node with one child is that child (`?rule`).
    `splice`: the children join the parent's (rules whose names begin with `_`).
    """

    origin: str
    size: int
    name: str
    expand: bool
    splice: bool
    plan: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tables:
    """`actions[state][symbol]`: shift to (or go to) state n >= 0, or reduce by rule -n - 1."""

    start: int
    end: int
    actions: tuple[dict[str, int], ...]
    rules: tuple[Rule, ...]


@cache
def tables() -> Tables:
    """The parse tables, from the cache where possible."""
    text = resources.grammar_text()
    data = shipped(text)
    if data is None:  # only while the grammar is being edited
        data = _cached(text)
    rules = tuple(Rule(*row[:5], tuple(row[5])) for row in data["rules"])
    return Tables(data["start"], data["end"], tuple(data["actions"]), rules)


def digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def shipped(text: str) -> dict[str, Any] | None:
    """The tables that come with opdsl, if they are those of this grammar."""
    try:
        found = json.loads((resources.grammars() / "opd.tables.json").read_bytes())
        return found["tables"] if found["grammar"] == digest(text) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_shipped() -> None:
    """Regenerate `grammars/opd.tables.json` (`python -m opdsl.syntax.grammar`)."""
    text = resources.grammar_text()
    value = {"grammar": digest(text), "tables": compile_tables(text)}
    target = resources.grammars() / "opd.tables.json"
    target.write_text(json.dumps(value, separators=(",", ":"), sort_keys=True) + "\n")


def _cached(text: str) -> dict[str, Any]:
    """The tables from the user's cache, else computed and cached."""
    key = _key(text)
    place = _cache_file(key)
    data = _load(place, key) if place is not None else None
    if data is None:
        data = compile_tables(text)
        if place is not None:
            _save(data, place, key)
    return data


def lark_parser(text: str, strict: bool = False) -> Any:
    """Lark's own parser for the grammar; `strict` also proves it free of conflicts."""
    import lark

    return lark.Lark(
        text, parser="lalr", lexer="contextual", propagate_positions=True,
        maybe_placeholders=True, strict=strict,
    )  # fmt: skip


def compile_tables(text: str) -> dict[str, Any]:
    """The tables of a grammar as plain JSON values."""
    parser = lark_parser(text)
    table = parser.parser.parser._parse_table
    number = {rule: i for i, rule in enumerate(parser.rules)}
    actions: list[dict[str, int]] = [{} for _ in range(max(table.states) + 1)]
    for state, row in table.states.items():
        for symbol, (action, argument) in row.items():
            shift = action.name == "Shift"
            actions[state][symbol] = argument if shift else -number[argument] - 1
    (start,), (end,) = table.start_states.values(), table.end_states.values()
    rules = [_rule_row(rule) for rule in parser.rules]
    return {"start": start, "end": end, "actions": actions, "rules": rules}


def _rule_row(rule: Any) -> list[Any]:
    """A Lark rule as the fields of `Rule`; follows lark.parse_tree_builder."""
    symbols, options = rule.expansion, rule.options
    gaps = [0] * (len(symbols) + 1)  # absent optional parts before each symbol
    if options.empty_indices:
        bits = "".join(str(int(absent)) for absent in options.empty_indices)
        gaps = [len(ones) for ones in bits.split("0")]
    plan: list[int] = []
    for i, symbol in enumerate(symbols):
        plan += [-1] * gaps[i]
        if options.keep_all_tokens or not (symbol.is_term and symbol.filter_out):
            plan.append(i)
    plan += [-1] * gaps[-1]
    origin = str(rule.origin.name)
    expand = bool(options.expand1 and not rule.alias)
    name = str(rule.alias or origin)
    return [origin, len(symbols), name, expand, origin.startswith("_"), plan]


# ---- the cache ---------------------------------------------------------------------------


def cache_folder() -> Path | None:
    """The user's own cache folder for opdsl (`OPDSL_CACHE_DIR` overrides); None without a home."""
    override = os.environ.get("OPDSL_CACHE_DIR")
    if override:
        return Path(override)
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("opdsl", appauthor=False))
    return folder if folder.is_absolute() else None


def _key(grammar: str) -> str:
    """Everything the tables depend on; kept inside the file and compared on reading."""
    spec = importlib.util.find_spec("lark")
    version = ""
    if spec is not None and spec.origin:  # names the version; importing Lark would cost 50 ms
        version = Path(spec.origin).read_text(encoding="utf-8")
    return "\0".join((str(FORMAT), sys.version, version, grammar))


def _cache_file(key: str) -> Path | None:
    """Where these tables belong; None when there is no usable private folder."""
    try:
        folder = cache_folder()
        if folder is None:
            return None
        folder = folder / "grammar"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _private(folder):
            os.chmod(folder, 0o700)
            if not _private(folder):
                return None
    except (OSError, RuntimeError, ValueError):
        return None
    return folder / f"opd-{zlib.crc32(key.encode()):08x}.json"


def _private(place: Path) -> bool:
    """Whether the user owns this path and nobody else may write to it."""
    info = os.lstat(place)
    if stat.S_ISLNK(info.st_mode):
        return False
    if hasattr(os, "getuid"):
        return info.st_uid == os.getuid() and not info.st_mode & 0o022
    return True


def _load(place: Path, key: str) -> dict[str, Any] | None:
    """The cached tables; None when missing, foreign, damaged or of another grammar."""
    try:
        if not _private(place):
            return None
        checksum, _, payload = place.read_bytes().partition(b"\n")
        if b"%08x" % zlib.crc32(payload) != checksum:
            return None
        found = json.loads(payload)
        return found["tables"] if found["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _save(data: dict[str, Any], place: Path, key: str) -> None:
    """Write atomically; failure is silent."""
    import tempfile

    payload = json.dumps({"key": key, "tables": data}, separators=(",", ":")).encode()
    try:
        handle, name = tempfile.mkstemp(dir=place.parent, prefix=".opd-", suffix=".tmp")
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(b"%08x\n" % zlib.crc32(payload) + payload)
        os.replace(name, place)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)


if __name__ == "__main__":
    write_shipped()
