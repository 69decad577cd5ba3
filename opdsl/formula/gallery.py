"""The gallery: a page for every shipped method, one table over all axes, a section of the README.

Everything on a page comes from the compiled spec, but for the comments of its file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opdsl.compilation import Compilation
from opdsl.formula.explain import Explanation
from opdsl.formula.library import Entry, entry_of
from opdsl.formula.page import WIDTH, Page
from opdsl.formula.paper import mathematics, passport_table
from opdsl.formula.vocabulary import AXES, SHELVES

MADE = "<!-- made by opdsl list --gallery; the source is the spec -->"
NONE = ("none",)


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


def gallery(folder: Path, tell: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Write a page per shipped method and README.md to a folder; pages of methods that are gone
    are removed. Raises CompileError for a spec with errors, OSError where it cannot write."""
    from opdsl.resources import methods

    found: dict[str, Shown] = {}
    for path in methods():
        tell(path.stem)
        found[path.stem] = shown(path)
    texts = {f"{name}.md": page(x, found) for name, x in found.items()}
    texts["README.md"] = contents([x.entry for x in found.values()])
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.md"):
        if old.name not in texts and MADE in old.read_text(encoding="utf-8"):
            old.unlink()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


# ---- a page --------------------------------------------------------------------------------------


def page(x: Shown, library: dict[str, Shown]) -> str:
    """The page of a method; `library` has its parent and its children."""
    e, entry = x.explanation, x.entry
    spec = e.spec
    out = [f"# {entry.name}", "", MADE, ""]
    out += [f"**{_text(entry.title)}**", ""] if entry.title else []
    out += [" · ".join(_facts(entry)), ""]
    for paragraph in comments(x.compilation.source.text):
        out += [_text(paragraph), ""]
    out += ["## Formula", "", "```text", *_formula(e), "```", "", *mathematics(e), ""]
    out += ["## Passport", "", *passport_table(e), ""]
    out += _accepted(spec)
    parent = next((library[name] for name in spec.extends if name in library), None)
    if parent is not None:
        out += _against(parent, x)
    children = [n for n, y in library.items() if y.entry.extends[:1] == (entry.name,)]
    if children:
        links = ", ".join(f"[{n}]({n}.md)" for n in sorted(children))
        out += ["## Built on it", "", links, ""]
    body = without_comments(x.compilation.source.text)
    out += ["## Spec", "", f"`specs/{entry.path}`, {entry.lines} lines:", "", "```opd", body, "```"]
    return "\n".join(out) + "\n"


def _facts(entry: Entry) -> list[str]:
    source = ", ".join(_link(kind, value) for kind, value in entry.cites)
    base = [f"extends [{n}]({n}.md)" for n in entry.extends[:1]]
    return [f"shelf `{entry.group}`", f"evidence: {entry.evidence or 'not stated'}", *base,
            *([source] if source else [])]  # fmt: skip


def _link(kind: str, value: str) -> str:
    if kind == "arxiv":
        return f"[arXiv {value}](https://arxiv.org/abs/{value})"
    if kind == "doi":
        return f"[doi {value}](https://doi.org/{value})"
    return f"<{value}>" if value.startswith("http") else _text(value)


def _formula(e: Explanation) -> list[str]:
    """L(θ), its letters and the push in unicode, as `explain` prints them."""
    p = Page(e, WIDTH, False)
    lines = p.loss()
    for label, found in (("where", p.where()), ("gradient", p.gradient())):
        lines += ["", *p.column(label, found)] if found else []
    return [line[2:].rstrip() if line.startswith("  ") else line.rstrip() for line in lines]


def _accepted(spec) -> list[str]:
    """Why the author accepts what the passport reports."""
    rows = [f"- `{a.keyword} {a.rule}`: {_text(a.reason)}" for a in spec.acceptances]
    return ["Acknowledged in the spec:", "", *rows, ""] if rows else []


def _against(parent: Shown, x: Shown) -> list[str]:
    """Axes and passport rows in which a method differs from the one it extends."""
    from opdsl.formula.diff import ROWS, passport_row, passport_title, side
    from opdsl.formula.diff_axes import axes
    from opdsl.passport.diff import roles

    a, b = side("A", parent.compilation), side("B", x.compilation)
    changed = [row for row in axes(a, b, roles(a.spec, b.spec)) if row.changed]
    name = parent.entry.name
    out = [f"## Against [{name}]({name}.md)", "", f"| | {name} | {x.entry.name} |", "|---|---|---|"]
    out += [f"| {_cell(r.name)} | {_cell(r.a)} | {_cell(r.b)} |" for r in changed]
    for key in ROWS:
        left, right = (passport_row(key, y.explanation.passport) for y in (parent, x))
        if left != right:
            title = passport_title(key)
            out.append(f"| *{title}* | {_cell(left, False)} | {_cell(right, False)} |")
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


# ---- tables --------------------------------------------------------------------------------------


def contents(found: Sequence[Entry]) -> str:
    """README.md of the gallery: what the axes are, and the table of each shelf."""
    found = sorted(found, key=lambda e: e.name)
    out = ["# Methods", "", MADE, ""]
    out += [f"{len(found)} methods, each a spec of {_average(found)} lines on average. The tables",
            "are read off the compiled specs; `opdsl list --where AXIS=VALUE` asks the same questions.",
            ""]  # fmt: skip
    out += ["| Axis | What it says |", "|---|---|"]
    out += [f"| {axis} | {text} |" for axis, text in AXES.items()]
    for shelf, entries in _shelves(found):
        about = SHELVES.get(shelf, "")
        out += ["", f"## {shelf}", "", *([about[0].upper() + about[1:] + ".", ""] if about else [])]
        out += table(entries, linked=True).splitlines()
    return "\n".join(out) + "\n"


def _average(found: Sequence[Entry]) -> str:
    return f"{sum(e.lines for e in found) / max(1, len(found)):.0f}"


def _shelves(found: Iterable[Entry]) -> list[tuple[str, list[Entry]]]:
    by: dict[str, list[Entry]] = {}
    for e in found:
        by.setdefault(e.group, []).append(e)
    known = [s for s in SHELVES if s in by]
    return [(s, by[s]) for s in (*known, *sorted(set(by) - set(known)))]


COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("state", ("state",)),
    ("teacher", ("teacher", "access")),
    ("support", ("support", "tail")),
    ("route", ("route",)),
    ("feedback", ("feedback",)),
    ("credit", ("credit", "baseline")),
    ("routing", ("routing",)),
    ("gate", ("gate",)),
    ("weight", ("weight",)),
    ("divided by", ("aggregate",)),
    ("regularize", ("regularize",)),
    ("conservative", ("conservative",)),
    ("at T", ("stationary",)),
    ("evidence", ("evidence",)),
)


def table(found: Iterable[Entry], linked: bool = False) -> str:
    """All axes of some methods as one table of markdown."""
    heads = ["method", *(head for head, _ in COLUMNS), "source"]
    out = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for e in found:
        name = f"[{e.name}]({e.name}.md)" if linked else e.name
        cells = [_joined(e, axes) for _, axes in COLUMNS]
        source = ", ".join(_link(k, v) for k, v in e.cites) if linked else e.source
        out.append("| " + " | ".join([name, *cells, source]) + " |")
    return "\n".join(out) + "\n"


def _joined(e: Entry, axes: tuple[str, ...]) -> str:
    """`top-T; bin`: the values of each axis that has any."""
    parts = [", ".join(e.values(a)) for a in axes if e.values(a) not in ((), NONE, ("implicit",))]
    return _cell("; ".join(parts), False) or "–"


def summary(found: Sequence[Entry], pages: str = "docs/methods") -> str:
    """The section of the README: the core methods in a table, the others by shelf."""
    shelves = dict(_shelves(sorted(found, key=lambda e: e.name)))
    out = ["| Spec | Method | Route · credit | Evidence | Source |", "|---|---|---|---|---|"]
    for e in shelves.pop("core", []):
        credit = ", ".join(v for v in e.values("credit") if v != "none")
        route = " + ".join(e.values("route"))
        source = ", ".join(_link(k, v) for k, v in e.cites) or "–"
        cells = [f"[`{e.name}`]({pages}/{e.name}.md)", _text(e.title),
                 f"{route} · {credit}" if credit else route, e.evidence or "–", source]  # fmt: skip
        out.append("| " + " | ".join(cells) + " |")
    out += ["", "| Shelf | | Methods |", "|---|---|---|"]
    for shelf, entries in shelves.items():
        links = ", ".join(f"[{e.name}]({pages}/{e.name}.md)" for e in entries)
        out.append(f"| `{shelf}` | {SHELVES.get(shelf, '')} | {links} |")
    out += ["", f"{len(found)} methods in {_average(found)} lines each on average; the table over all"
            f" axes: [{pages}]({pages}/README.md)."]  # fmt: skip
    return "\n".join(out) + "\n"


def between(text: str, mark: str, new: str) -> str:
    """A document with the lines between `<!-- MARK:begin -->` and `<!-- MARK:end -->` replaced.

    Raises ValueError where the marks are missing.
    """
    begin, end = f"<!-- {mark}:begin -->\n", f"<!-- {mark}:end -->"
    if begin not in text or end not in text:
        raise ValueError(f"no section {mark} in the document")
    head, rest = text.split(begin, 1)
    return head + begin + new.rstrip("\n") + "\n" + end + rest.split(end, 1)[1]


# ---- markdown ------------------------------------------------------------------------------------


def _text(text: str) -> str:
    """Prose that markdown would read as emphasis, a tag, a table or mathematics."""
    text = text.replace("\n", " ")
    parts = text.split("`")  # what stands between backticks is code already
    for i in range(0, len(parts), 2):
        for sign in ("\\", "|", "*", "<", "$", "_"):
            parts[i] = parts[i].replace(sign, "\\" + sign)
    return "`".join(parts)


def _cell(text: str, code: bool = True) -> str:
    """A cell of a table; `code` sets it in one width."""
    text = text.replace("\n", " ")
    if not code:
        return _text(text)
    return f"`{text}`".replace("|", "\\|") if text and text != "–" else "–"


__all__ = ["MADE", "Shown", "between", "contents", "gallery", "page", "shown", "summary", "table"]
