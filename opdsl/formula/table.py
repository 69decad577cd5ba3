"""Tables of the library in Markdown: all axes of all methods, and the section of the README.

Everything is made from the entries of `formula.library`; nothing is compiled here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from opdsl.formula.library import Entry, shelved
from opdsl.formula.vocabulary import AXES, SHELVES, VALUES

MADE = "<!-- made by opdsl list --gallery; the source is the spec -->"
NONE = ("none",)

COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("shelf", ("group",)),
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


def contents(found: Sequence[Entry]) -> str:
    """README.md of the gallery: the shelves, what the axes are, and the table over all axes."""
    found = shelved(found)
    out = ["# Methods", "", MADE, ""]
    out += [f"{len(found)} methods, each a spec of {average(found)} lines on average. The table is",
            "read off the compiled specs; `opdsl list --where AXIS=VALUE` asks the same questions,",
            "and [coverage.md](../coverage.md) says what is not here and why.", ""]  # fmt: skip
    out += ["| Shelf | Methods | What it holds |", "|---|---|---|"]
    for shelf, entries in by_shelf(found):
        out.append(f"| `{shelf}` | {len(entries)} | {text(SHELVES.get(shelf, ''))} |")
    out += ["", "| Axis | What it says |", "|---|---|"]
    out += [f"| {axis} | {about} |" for axis, about in AXES.items()]
    out += ["", "A dash stands for none.", "", *table(found, linked=True).splitlines()]
    return "\n".join(out) + "\n"


def average(found: Sequence[Entry]) -> str:
    return f"{sum(e.lines for e in found) / max(1, len(found)):.0f}"


def by_shelf(found: Iterable[Entry]) -> list[tuple[str, list[Entry]]]:
    """The shelves in their order, each with its entries by name."""
    by: dict[str, list[Entry]] = {}
    for e in shelved(found):
        by.setdefault(e.group, []).append(e)
    return list(by.items())


def table(found: Iterable[Entry], linked: bool = False) -> str:
    """All axes of some methods as one table of Markdown."""
    heads = ["method", *(head for head, _ in COLUMNS), "source"]
    out = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for e in found:
        name = f"[{e.name}]({e.name}.md)" if linked else e.name
        cells = [_joined(e, axes) for _, axes in COLUMNS]
        source = ", ".join(link(k, v) for k, v in e.cites) if linked else e.source
        out.append("| " + " | ".join([name, *cells, source or "–"]) + " |")
    return "\n".join(out) + "\n"


def _joined(e: Entry, axes: tuple[str, ...]) -> str:
    """`top-T; bin`: the values of each axis that has any."""
    parts = [", ".join(e.values(a)) for a in axes if e.values(a) not in ((), NONE, ("implicit",))]
    return text("; ".join(parts)) or "–"


# ---- the README ----------------------------------------------------------------------------------


def summary(found: Sequence[Entry], pages: str = "docs/methods") -> str:
    """The section of the README: how many methods each shelf holds, and how they are known."""
    grades = VALUES["evidence"][::-1]
    heads = ["Shelf", "What it holds", "Methods", *(g.capitalize() for g in grades)]
    out = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for shelf, entries in [*by_shelf(found), ("", list(found))]:
        name, about = (f"`{shelf}`", SHELVES.get(shelf, "")) if shelf else ("all", "")
        counts = [len(entries), *(sum(e.evidence == g for e in entries) for g in grades)]
        out.append("| " + " | ".join([name, text(about), *map(str, counts)]) + " |")
    out += ["", f"A spec is {average(found)} lines on average. Each has a page with its formula, passport"
            f" and source: [{pages}]({pages}/README.md)."]  # fmt: skip
    return "\n".join(out) + "\n"


def between(document: str, mark: str, new: str) -> str:
    """A document with the lines between `<!-- MARK:begin -->` and `<!-- MARK:end -->` replaced.

    Raises ValueError where the marks are missing.
    """
    begin, end = f"<!-- {mark}:begin -->\n", f"<!-- {mark}:end -->"
    if begin not in document or end not in document:
        raise ValueError(f"no section {mark} in the document")
    head, rest = document.split(begin, 1)
    return head + begin + new.rstrip("\n") + "\n" + end + rest.split(end, 1)[1]


# ---- Markdown ------------------------------------------------------------------------------------


def link(kind: str, value: str) -> str:
    """What a spec cites, as a link where it is one."""
    if kind == "arxiv":
        return f"[arXiv {value}](https://arxiv.org/abs/{value})"
    if kind == "doi":
        return f"[doi {value}](https://doi.org/{value})"
    if value.startswith("http"):
        return f"[{value.split('://', 1)[1].rstrip('/')}]({value})"
    return text(value)


def text(words: str) -> str:
    """Prose that Markdown would read as emphasis, a tag, a table or mathematics."""
    parts = words.replace("\n", " ").split("`")  # what stands between backticks is code already
    for i in range(0, len(parts), 2):
        for sign in ("\\", "|", "*", "<", "$", "_"):
            parts[i] = parts[i].replace(sign, "\\" + sign)
    return "`".join(parts)


def code(words: str) -> str:
    """A cell of a table in one width."""
    words = words.replace("\n", " ")
    return f"`{words}`".replace("|", "\\|") if words and words != "–" else "–"


__all__ = ["MADE", "average", "between", "by_shelf", "code", "contents", "link", "summary", "table",
           "text"]  # fmt: skip
