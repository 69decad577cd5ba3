"""The shipped methods as a library that can be asked: one entry each, and conditions over axes.

`specs/index.jsonl` ships with the specs: one line for every method, with everything `opdsl list`
shows. A line holds as long as the texts it follows from (the spec, what it imports, the standard
library) have the hash it names; an entry whose line is missing or old is made by compiling its
spec. `pytest tests/test_library.py --regenerate` writes the index.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from opdsl.resources import methods, specs

if TYPE_CHECKING:
    from opdsl.compilation import Compilation

IMPORT = re.compile(r'^\s*import\s+"([^"]+)"', re.MULTILINE)
CORE = "core"  # the shelf of specs that lie in no folder


@dataclass(frozen=True)
class Entry:
    """One method. path: inside the folder of specs. lines: neither empty nor comment. axes: as in
    `vocabulary.AXES`; objective and the axes of the passport are there once it was made."""

    name: str
    path: str
    key: str
    title: str
    evidence: str
    cites: tuple[tuple[str, str], ...]
    extends: tuple[str, ...]
    lines: int
    axes: dict[str, tuple[str, ...]] = field(repr=False)
    objective: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        return group_of(self.path)

    @property
    def measured(self) -> bool:
        return bool(self.objective)

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(f"arXiv {v}" if k == "arxiv" else v for k, v in self.cites)

    @property
    def source(self) -> str:
        return ", ".join(self.sources)

    def values(self, axis: str) -> tuple[str, ...]:
        """The values on an axis, or of a text column."""
        texts = {"name": (self.name,), "title": (self.title,), "source": (self.source,),
                 "extends": self.extends, "objective": self.objective}  # fmt: skip
        return texts[axis] if axis in texts else self.axes.get(axis, ())

    def to_json(self) -> dict[str, object]:
        """Plain values, as in the index and in `opdsl list --format json`."""
        return {
            "name": self.name,
            "path": self.path,
            "key": self.key,
            "title": self.title,
            "evidence": self.evidence,
            "cites": [list(c) for c in self.cites],
            "extends": list(self.extends),
            "lines": self.lines,
            "objective": list(self.objective),
            "axes": {k: list(v) for k, v in self.axes.items()},
        }

    @classmethod
    def read(cls, row: dict) -> Entry:
        """Raises KeyError, TypeError or ValueError for what is no entry."""
        texts = {k: str(row[k]) for k in ("name", "path", "key", "title", "evidence")}
        return cls(
            **texts,
            cites=tuple((str(k), str(v)) for k, v in row["cites"]),
            extends=tuple(map(str, row["extends"])),
            lines=int(row["lines"]),
            axes={str(k): tuple(map(str, v)) for k, v in row["axes"].items()},
            objective=tuple(map(str, row["objective"])),
        )


def group_of(path: str) -> str:
    head, _, rest = path.partition("/")
    return head if rest else CORE


def shelved(found: Iterable[Entry]) -> list[Entry]:
    """By shelf, in the order of `SHELVES` (others behind them), then by name."""
    from opdsl.formula.vocabulary import SHELVES

    order = {shelf: i for i, shelf in enumerate(SHELVES)}
    return sorted(found, key=lambda e: (order.get(e.group, len(order)), e.group, e.name))


def code_lines(text: str) -> int:
    return sum(1 for line in text.splitlines() if line.split("#")[0].strip())


# ---- entries -------------------------------------------------------------------------------------


def entries(
    measured: bool = False, tell: Callable[[str], None] = lambda _: None
) -> tuple[list[Entry], list[str]]:
    """(every shipped method by name, the files left out because they do not compile).

    measured: with what the passport says. `tell` hears the name of each method that is compiled.
    """
    kept = {e.path: e for e in index()}
    found, broken = [], []
    texts: dict[Path, str] = {}
    for path in methods():
        place = path.relative_to(specs()).as_posix()
        entry = kept.get(place)
        if entry is None or entry.key != key_of(path, texts):
            tell(path.stem)
            entry = compiled(path, measured)
        if entry is None:
            broken.append(place)
        else:
            found.append(entry)
    return sorted(found, key=lambda e: e.name), broken


def compiled(path: Path, measured: bool = True) -> Entry | None:
    """The entry of a spec, made anew; None for a spec with errors."""
    from opdsl.compilation import Compilation
    from opdsl.diagnostics import CompileError
    from opdsl.syntax import read_source

    try:
        compilation = Compilation(read_source(path))
    except CompileError:  # moved or locked a moment ago
        return None
    return entry_of(compilation, path, measured)


def entry_of(compilation: Compilation, path: Path, measured: bool = True) -> Entry | None:
    """None for a spec with errors."""
    from opdsl.formula.axes import axes

    spec = compilation.spec
    if spec is None or compilation.report.failed or (measured and compilation.errors):
        return None
    place = path.relative_to(specs()).as_posix()
    found = {**axes(spec), "evidence": (spec.evidence or "none",), "group": (group_of(place),)}
    objective: tuple[str, ...] = ()
    if measured:
        from opdsl.passport.report import passport

        p = passport(compilation)
        word = {True: "yes", False: "no", None: "undecided"}
        found["conservative"] = (word[p["conservative"]],)
        found["stationary"] = (word[p["stationary_at_teacher"]],)
        text = p["objective"]
        objective = (text,) if isinstance(text, str) else tuple(text)
    return Entry(
        path.stem, place, key_of(path), spec.title or "", spec.evidence or "", spec.cites,
        spec.extends, code_lines(compilation.source.text), found, objective,
    )  # fmt: skip


# ---- the index -----------------------------------------------------------------------------------


def index_file() -> Path:
    return specs() / "index.jsonl"


def index() -> list[Entry]:
    """What the index holds; nothing where it is missing or cannot be read."""
    out = []
    try:
        lines = index_file().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    for line in lines:
        try:
            out.append(Entry.read(json.loads(line)))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # of another version
    return out


def index_text(found: Iterable[Entry]) -> str:
    rows = sorted(found, key=lambda e: e.name)
    return "".join(json.dumps(e.to_json(), ensure_ascii=False) + "\n" for e in rows)


def key_of(path: Path, texts: dict[Path, str] | None = None) -> str:
    """Hash of a spec, of all it imports, and of the standard library. texts: files read before."""
    texts = {} if texts is None else texts
    digest = hashlib.sha256()
    root = specs().resolve()
    todo, seen = [path.resolve(), *_standard(root)], set()
    while todo:
        at = todo.pop(0)
        if at in seen:
            continue
        seen.add(at)
        if at not in texts:
            texts[at] = _read(at)
        digest.update(f"{at.name}\0{texts[at]}\0".encode())
        if at.parent.name != "std":
            found = IMPORT.findall(texts[at])
            todo += [Path(os.path.normpath(at.parent / target)) for target in found]
    return digest.hexdigest()[:16]


@cache
def _standard(root: Path) -> tuple[Path, ...]:
    return tuple(sorted(root.glob("std/*.opd")))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


# ---- asking --------------------------------------------------------------------------------------

TEXTS = ("name", "title", "source", "extends", "objective")


class QueryError(ValueError):
    """A condition that cannot be understood; the message says what was expected."""


@dataclass(frozen=True)
class Condition:
    """axis = value, axis != value (no value of the axis is it), axis ~ text (one contains it)."""

    axis: str
    sign: str
    value: str

    def holds(self, entry: Entry) -> bool:
        wanted = _folded(self.value)
        found = [_folded(x) for x in entry.values(self.axis)]
        if self.sign == "~":
            return any(wanted in x for x in found)
        return (wanted in found) == (self.sign == "=")


def _folded(text: str) -> str:
    """Spelling that does not count: case, spaces, ‖ for ||."""
    return re.sub(r"\s+", "", text).replace("‖", "||").casefold()


def conditions(texts: Iterable[str]) -> list[Condition]:
    """Conditions of `--where` words: several of them, or several in one, apart by commas.

    Raises QueryError for anything else and for an unknown axis.
    """
    from opdsl.formula.vocabulary import AXES

    out = []
    for part in (p for text in texts for p in _parts(text)):
        found = re.fullmatch(r"\s*(\w+)\s*(!=|=|~)\s*(.*?)\s*", part)
        if found is None or not found[3]:
            raise QueryError(
                f"a condition is AXIS=VALUE, AXIS!=VALUE or AXIS~TEXT, not {part.strip()!r}"
            )
        axis = found[1].casefold()
        if axis not in AXES and axis not in TEXTS:
            near = _near(axis, [*AXES, *TEXTS])
            raise QueryError(f"there is no axis {found[1]}{near}\naxes: {', '.join(AXES)}")
        out.append(Condition(axis, found[2], found[3]))
    return out


def _parts(text: str) -> list[str]:
    """At commas outside brackets."""
    depth, out = 0, [""]
    for c in text:
        depth += (c in "([") - (c in ")]")
        if c == "," and depth <= 0:
            out.append("")
        else:
            out[-1] += c
    return out


def chosen(found: Sequence[Entry], wanted: Sequence[Condition]) -> list[Entry]:
    """The entries for which every condition holds. Raises QueryError for a value that its axis
    cannot have."""
    for c in wanted:
        if c.sign != "~" and c.axis not in TEXTS:
            _known(c, found)
    return [e for e in found if all(c.holds(e) for c in wanted)]


def _known(c: Condition, found: Sequence[Entry]) -> None:
    there = values_of(c.axis, found)
    if _folded(c.value) in map(_folded, there):
        return
    near = _near(c.value, there)
    raise QueryError(f"{c.axis} is never {c.value}{near}\nvalues of {c.axis}: {', '.join(there)}")


def values_of(axis: str, found: Sequence[Entry]) -> list[str]:
    """What an axis can be: the words of the vocabulary, then what else there is."""
    from opdsl.formula.vocabulary import VALUES

    known = list(VALUES.get(axis, ()))
    return known + sorted({x for e in found for x in e.values(axis)} - set(known))


def _near(word: str, known: Iterable[str]) -> str:
    from opdsl.meaning.names import closest

    near = closest(word, known)
    return f": did you mean {near}?" if near else ""


def needs_passport(wanted: Iterable[Condition]) -> bool:
    from opdsl.formula.vocabulary import MEASURED

    return any(c.axis in MEASURED for c in wanted)


__all__ = ["Condition", "Entry", "QueryError", "chosen", "conditions", "entries", "needs_passport"]
