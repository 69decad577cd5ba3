r"""An explanation for papers and pages: LaTeX (an `align*` of amsmath) and markdown.

Every line of the `align*` is a formula on its own, within what matplotlib's mathtext can set; long
sums are broken at their signs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opdsl.formula.naming import Definition
from opdsl.formula.notation import MUL, Add, Math, latex, unicode
from opdsl.formula.page import as_list
from opdsl.formula.prose import knobs, route, states, teachers
from opdsl.formula.push import Push
from opdsl.formula.sections import Block

if TYPE_CHECKING:
    from opdsl.compilation import Compilation
    from opdsl.formula.explain import Explanation

LINE = 84  # characters of unicode; a longer sum is broken
OPS = {"∝": r"\propto", "=": "="}


@dataclass(frozen=True, slots=True)
class Row:
    """`left op right`, the right side in lines."""

    left: str
    op: str
    right: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """Lines that stand alone."""
        first, *more = self.right
        return [f"{self.left} {self.op} {first}".strip(), *(rf"\quad {x}" for x in more)]

    @property
    def aligned(self) -> str:
        first, *more = self.right
        lines = [f"{self.left} &{self.op} {first}", *(rf"&\quad {x}" for x in more)]
        return " \\\\\n".join(lines)


def paper(e: Explanation) -> str:
    r"""L(θ), its definitions and Δz as a fragment for a paper with \usepackage{amsmath}."""
    body = " \\\\\n".join(r.aligned for r in rows(e))
    return f"% opdsl: {e.spec.name}; needs \\usepackage{{amsmath}}\n\\begin{{align*}}\n{body}\n\\end{{align*}}\n"


def display_math(compilation: Compilation) -> str:
    """The same for notebooks, which set one display at a time."""
    from opdsl.formula.explain import Explanation

    body = " \\\\\n".join(r.aligned for r in rows(Explanation(compilation)))
    return f"$$\\begin{{aligned}}\n{body}\n\\end{{aligned}}$$"


def lines_of(e: Explanation) -> list[str]:
    """The same in lines that stand alone, without an environment."""
    return [line for r in rows(e) for line in r.lines]


def rows(e: Explanation) -> list[Row]:
    f = e.formula
    out = [_block(b, i == 0) for i, b in enumerate(f.blocks)]
    out += [Row("", "", (rf"\quad {b.note_l}",)) for b in f.blocks if b.note_l]
    for d in f.where:
        *lines, last = _broken(d.right, len(unicode(d.left)) + 3)
        out.append(Row(latex(d.left), OPS[d.op], (*lines, last + _note(d))))
    out += [Row(s.l, r"\colon", (rf"\text{{{text}}}",)) for s, text in f.letters]
    first = r"-\frac{\partial L_t}{\partial z_t}"
    several = len(f.push) > 1
    if several:
        out.append(Row(r"\Delta z", "=", (first,)))
    for x in f.push:
        *lines, last = _broken(x.right, len(unicode(x.left)) + 3)
        mark = rf" \quad \text{{({_plain(x.term)})}}" if several else ""
        lines = [*lines, last + mark]
        if not several:
            at = latex(x.left).removeprefix(r"\Delta z")
            lines[0] = rf"-\frac{{\partial L_t}}{{\partial z_t{at}}} = {lines[0]}"
        out.append(Row(latex(x.left), "=", tuple(lines)))
    return out


def _block(b: Block, first: bool) -> Row:
    left, op = (r"L(\theta)", "=") if first else ("", "+")
    braces = len(b.items) > 1 or not b.items[0][0]
    lines = _broken(Add(b.items), len(b.u) + 8)
    if not braces:
        return Row(left, op, (f"{b.l} {latex(b.items[0][1], MUL)}",))
    if len(lines) == 1:
        return Row(left, op, (rf"{b.l} \left\{{ {lines[0]} \right\}}",))
    return Row(left, op, (rf"{b.l} \{{ {lines[0]}", *lines[1:-1], rf"{lines[-1]} \}}"))


def _broken(m: Math, before: int) -> list[str]:
    """A sum in lines of about LINE characters."""
    if not isinstance(m, Add) or before + len(unicode(m)) <= LINE:
        return [latex(m)]
    lines: list[str] = []
    room = 0
    for i, (positive, item) in enumerate(m.items):
        text, size = latex(item, MUL), len(unicode(item, MUL)) + 3
        piece = (
            (text if positive else f"-{text}") if i == 0 else f"{'+' if positive else '-'} {text}"
        )
        if lines and size <= room:
            lines[-1] += f" {piece}"
            room -= size
        else:
            lines.append(piece)
            room = LINE - (before if i == 0 else 4) - size
    return lines


def _note(d: Definition) -> str:
    text = d.note_l or (rf"\text{{{_plain(d.note)}}}" if d.note else "")
    return rf" \quad ({text})" if text else ""


def _plain(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%").replace("#", r"\#").replace("&", r"\&")


def definition_latex(d: Definition) -> str:
    return f"{latex(d.left)} {OPS[d.op]} {latex(d.right)}"


def push_latex(x: Push) -> str:
    return f"{latex(x.left)} = {latex(x.right)}"


# ---- markdown ----------------------------------------------------------------------------------


def markdown(e: Explanation) -> str:
    """The page in markdown: formulas between dollars, the passport as a table."""
    title = [_escaped(e.spec.title), ""] if e.spec.title else []
    out = [f"# {_escaped(e.spec.name)}", "", *title, *mathematics(e), "", *passport_table(e)]
    return "\n".join(out) + "\n"


def mathematics(e: Explanation) -> list[str]:
    """L(θ), what its letters mean, and the push on the logits, as lines of markdown."""
    f, out = e.formula, []
    for i, b in enumerate(f.blocks):
        out += ["$$", *_block(b, i == 0).lines, "$$", ""]
    notes = [b.note_l for b in f.blocks if b.note_l]
    out += [f"- ${x}$" for x in notes]
    for d in f.where:
        note = f" (${d.note_l}$)" if d.note_l else f" ({_escaped(d.note)})" if d.note else ""
        out.append(f"- ${definition_latex(d)}${note}")
    out += [f"- ${s.l}$: {_escaped(text)}" for s, text in f.letters]
    out += ["", r"Gradient: the push of one token on its logits, $\Delta z = -\partial L_t / \partial z_t$.",
            ""]  # fmt: skip
    several = len(f.push) > 1
    for x in f.push:
        out.append(f"- {_escaped(x.term) + ': ' if several else ''}${push_latex(x)}$")
    return out


def passport_table(e: Explanation) -> list[str]:
    """What a method reads and what its passport says, as a table without a heading."""
    p, spec, f = e.passport, e.spec, e.formula
    rows_ = [
        ("states", "; ".join(states(spec))),
        ("teacher", "; ".join(teachers(spec))),
        ("support", "; ".join(e.supports())),
        ("route", route(spec)),
        ("knobs", ", ".join(knobs(f))),
        ("needs", e.needed()),
        ("bias", "; ".join(_biases(e)) or "none found"),
        ("objective", "; ".join(e.objectives())),
        ("conservative", e.conservative()),
        ("unbiased", e.unbiased()),
        ("notes", "; ".join(as_list(p.get("notes")))),
        ("fixed point", e.fixed_point()),
        ("routing", p["routing"]),
        ("descent", e.descent()),
        ("variance", e.variance()),
        ("evidence", p["evidence"] or "not stated"),
    ]
    out = ["| | |", "|---|---|"]
    out += [f"| {k} | {_escaped(v)} |" for k, v in rows_ if v]
    prints = ", ".join(f"{k} `{v}`" for k, v in p["fingerprints"].items())
    return [*out, f"| ids | {prints} |"]


def _biases(e: Explanation) -> list[str]:
    seen: dict[str, str] = {}
    for b in e.passport["biases"]:
        tail = f" (accepted: {b['accepted']})" if b["accepted"] else " (not accepted)"
        seen.setdefault(b["slug"], f"{b['code']} {b['slug']}: {b['statement']}{tail}")
    return list(seen.values())


def _escaped(text: str) -> str:
    """Text that markdown would read as emphasis, a cell border, a tag or mathematics."""
    text = text.replace("\n", " ")
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a lone backquote is a character, a pair of them holds code
        parts = [text]
    for i, part in enumerate(parts):
        signs = ("|",) if i % 2 else ("\\", "|", "_", "*", "<", "$", "`")
        for sign in signs:
            part = part.replace(sign, "\\" + sign)
        parts[i] = part
    return "`".join(parts)


__all__ = [
    "LINE",
    "definition_latex",
    "display_math",
    "lines_of",
    "markdown",
    "mathematics",
    "paper",
    "passport_table",
    "push_latex",
    "rows",
]
