"""The gallery: a page for every shipped method, and the table over all axes.

Everything on a page comes from the compiled spec, but for the comments of its file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from opdsl.compilation import Compilation
from opdsl.formula import library
from opdsl.formula.explain import Explanation
from opdsl.formula.library import Entry, entry_of
from opdsl.formula.paper import mathematics, passport_table
from opdsl.formula.table import MADE, code, contents, link, text
from opdsl.resources import methods, specs


@dataclass(frozen=True)
class Shown:
    """A method compiled for the gallery."""

    path: Path
    compilation: Compilation
    explanation: Explanation
    entry: Entry


def shown(path: Path) -> Shown:
    """Compile one shipped spec. Raises CompileError where it has errors."""
    from opdsl.syntax import read_source

    compilation = Compilation(read_source(path))
    explanation = Explanation(compilation)
    entry = entry_of(compilation, path)
    assert entry is not None  # Explanation raised otherwise
    return Shown(path, compilation, explanation, entry)


def gallery(
    folder: Path, tell: Callable[[str], None] = lambda _: None, only: Collection[str] | None = None
) -> list[Path]:
    """Write a page per shipped method and README.md to a folder; pages of methods that are gone
    are removed. only: the names whose pages are written, all of them by default.

    Raises CompileError for a spec with errors, OSError where it cannot write.
    """
    entries, _ = library.entries(True)
    paths = {path.stem: path for path in methods()}
    known = {path.stem: path for path in methods(failures=True)}  # a method may extend a mistake
    made: dict[str, Shown] = {}

    def compiled(name: str) -> Shown:
        if name not in made:
            tell(name)
            made[name] = shown(known[name])
        return made[name]

    texts = {}
    for entry in entries:
        if only is None or entry.name in only:
            base = next((compiled(n) for n in entry.extends if n in known), None)
            texts[f"{entry.name}.md"] = page(compiled(entry.name), base, entries)
    texts["README.md"] = contents(entries)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.md"):
        gone = old.stem not in paths and old.name != "README.md"
        if gone and MADE in old.read_text(encoding="utf-8"):
            old.unlink()
    for name, content in texts.items():
        (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in texts]


def stale(folder: Path, entries: Sequence[Entry]) -> list[str]:
    """The methods whose page is missing, or made from other texts than those of today."""
    out = []
    for entry in entries:
        place = folder / f"{entry.name}.md"
        text_ = place.read_text(encoding="utf-8") if place.is_file() else ""
        if _stamp(entry, entries) not in text_:
            out.append(entry.name)
    return out


def _stamp(entry: Entry, entries: Sequence[Entry]) -> str:
    """A comment that changes with everything a page is made from: the spec, what it imports, the
    method it extends, and those built on it."""
    keys = [e.key for e in entries if e.name in entry.extends]
    digest = hashlib.sha256(" ".join([entry.key, *keys, *_built_on(entry, entries)]).encode())
    return f"<!-- {digest.hexdigest()[:16]} -->"


def _built_on(entry: Entry, entries: Sequence[Entry]) -> list[str]:
    return sorted(e.name for e in entries if e.extends[:1] == (entry.name,))


# ---- a page --------------------------------------------------------------------------------------


def page(x: Shown, base: Shown | None, entries: Sequence[Entry]) -> str:
    """The page of a method. base: the one it extends."""
    e, entry = x.explanation, x.entry
    source = x.compilation.source.text
    out = [f"# {entry.name}", "", MADE, _stamp(entry, entries), ""]
    out += [f"**{text(entry.title)}**", ""] if entry.title else []
    out += [" · ".join(_facts(entry)), ""]
    for paragraph in comments(source):
        out += [text(paragraph), ""]
    out += ["## Formula", "", *mathematics(e), "", "## Passport", ""]
    out += [*(row for row in passport_table(e) if not row.startswith("| ids ")), ""]
    out += _accepted(e)
    out += _against(base, x) if base is not None else []
    children = _built_on(entry, entries)
    if children:
        out += ["## Built on it", "", ", ".join(f"[{n}]({n}.md)" for n in children), ""]
    where = f"[`specs/{entry.path}`](../../specs/{entry.path}), {entry.lines} lines:"
    out += ["## Spec", "", where, "", "```opd", without_comments(source), "```"]
    return "\n".join(out) + "\n"


def _facts(entry: Entry) -> list[str]:
    source = ", ".join(link(kind, value) for kind, value in entry.cites)
    base = [f"extends {_linked(n)}" for n in entry.extends[:1]]
    return [f"shelf `{entry.group}`", f"evidence: {entry.evidence or 'not stated'}", *base,
            *([source] if source else [])]  # fmt: skip


def _linked(name: str) -> str:
    """A method's name, linked to its page; that of a known mistake to the page of all of them."""
    mistake = (specs() / "failures" / f"{name}.opd").is_file()
    return f"[{name}]({'../failures' if mistake else name}.md)"


def _accepted(e: Explanation) -> list[str]:
    """What the author acknowledges and the row of biases does not already say."""
    said = {b["accepted"] for b in e.passport["biases"]}
    found = [a for a in e.spec.acceptances if a.reason not in said]
    rows = [f"- `{a.keyword} {a.rule}`: {text(a.reason)}" for a in found]
    return ["Acknowledged in the spec:", "", *rows, ""] if rows else []


def _against(parent: Shown, x: Shown) -> list[str]:
    """Axes and passport rows in which a method differs from the one it extends."""
    from opdsl.formula.diff import ROWS, passport_row, passport_title, side
    from opdsl.formula.diff_axes import axes
    from opdsl.passport.diff import roles

    a, b = side("A", parent.compilation), side("B", x.compilation)
    changed = [row for row in axes(a, b, roles(a.spec, b.spec)) if row.changed]
    name = parent.entry.name
    out = [f"## Against {_linked(name)}", "", f"| | {name} | {x.entry.name} |", "|---|---|---|"]
    out += [f"| {code(r.name)} | {code(r.a)} | {code(r.b)} |" for r in changed]
    for key in ROWS:
        left, right = (passport_row(key, y.explanation.passport) for y in (parent, x))
        if left != right:
            title = passport_title(key)
            out.append(f"| *{title}* | {text(left)} | {text(right)} |")
    return [*out, ""] if len(out) > 4 else [*out[:2], "The same update under another name.", ""]


def comments(text: str) -> list[str]:
    """The comments of a file that stand on lines of their own, a paragraph for each block."""
    out: list[list[str]] = [[]]
    for line in text.splitlines():
        word = line.strip()
        if word.startswith("#"):
            out[-1].append(word.lstrip("#").strip())
        elif out[-1]:
            out.append([])
    return [" ".join(block) for block in out if block]


def without_comments(text: str) -> str:
    """The file without lines that are comment alone, and without gaps they leave."""
    kept = [line.rstrip() for line in text.splitlines() if not line.strip().startswith("#")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


__all__ = ["Shown", "gallery", "page", "shown", "stale"]
