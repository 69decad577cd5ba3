"""An explanation as one screen of text: labelled rows, formulas broken at their signs.

A page that would not fit SCREEN lines is laid out closer: short definitions share lines, and each
accepted bias is one line. Nothing else changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdsl.formula.notation import MUL, Add, Math, broken, folded, unicode
from opdsl.formula.prose import knobs, route, states, teachers
from opdsl.formula.push import Push
from opdsl.formula.sections import Block
from opdsl.meaning.spec import Spec
from opdsl.wrapping import cells
from opdsl.wrapping import wrapped as wrapped_text

if TYPE_CHECKING:
    from opdsl.formula.explain import Explanation

WIDTH, LABEL = 100, 16
SCREEN = 48  # lines; a terminal of 50 has a prompt as well
GAP = " " * 4  # between things that share a line


def page(e: Explanation, width: int = WIDTH) -> str:
    """The text of an explanation; `width` is at least 60 columns."""
    loose = Page(e, width, False).text()
    return loose if loose.count("\n") <= SCREEN else Page(e, width, True).text()


class Page:
    """One layout of an explanation. `close`: as few lines as possible."""

    def __init__(self, e: Explanation, width: int, close: bool):
        self.e, self.close = e, close
        self.width = max(width, 60)
        self.room = self.width - LABEL
        self.later: list[str] = []  # notes that found no room beside L(θ)

    def text(self) -> str:
        e, p = self.e, self.e.passport
        lines = [*self.heading(e.spec), ""]
        lines += self.row("states", "; ".join(states(e.spec)))
        lines += self.column("teacher", self.run_on(teachers(e.spec)) or ["none"])
        lines += self.column("support", self.run_on(e.supports()))
        lines += self.row("route", route(e.spec))
        lines += self.loss() if self.close else ["", *self.loss(), ""]
        lines += self.column("where", self.where())
        lines += self.column("knobs", self.packed(knobs(e.formula)))
        lines += self.column("gradient", self.gradient())
        lines += self.row("needs", e.needed())
        lines += self.column("bias", self.bias())
        lines += self.column("objective", self.listed(e.objectives()))
        items = as_list(p.get("notes"))
        lines += self.column("notes", self.run_on(items) if self.close else items)
        lines += self.row("fixed point", e.fixed_point())
        lines += self.row("routing", p["routing"])
        lines += self.row("variance", e.variance())
        lines += self.beside(
            ("conservative", e.conservative()),
            ("unbiased", e.unbiased()),
            ("descent", e.descent()),
        )
        ids = "   ".join(f"{k} {v}" for k, v in p["fingerprints"].items())
        lines += self.beside(("evidence", p["evidence"] or "not stated"), ("ids", ids))
        return "\n".join(line.rstrip() for line in lines) + "\n"

    # -- rows ----------------------------------------------------------------------------------
    def heading(self, spec: Spec) -> list[str]:
        cites = ", ".join(f"arXiv {v}" if k == "arxiv" else v for k, v in spec.cites)
        left = wrapped(f"{spec.name}   {spec.title or ''}".rstrip(), self.width, "  ")
        if cites and len(left[-1]) + len(cites) + 3 <= self.width:
            return [*left[:-1], left[-1] + cites.rjust(self.width - len(left[-1]))]
        return left + ([cites.rjust(self.width)] if cites else [])

    def row(self, label: str, text: str) -> list[str]:
        """One labelled entry, wrapped under its label."""
        return self.column(label, wrapped(text, self.room)) if text else []

    def column(self, label: str, lines: list[str]) -> list[str]:
        out = [part for line in lines for part in wrapped(line, self.room, "  ")]
        return [f"  {label if i == 0 else '':<{LABEL - 2}}{line}" for i, line in enumerate(out)]

    def beside(self, *rows: tuple[str, str]) -> list[str]:
        """Rows, several on one line where lines are scarce and they fit."""
        out: list[str] = []
        line: tuple[str, str] | None = None
        for label, text in rows:
            both = f"{line[1]}{GAP}{label}  {text}" if line is not None else ""
            if line is not None and self.close and cells(both) <= self.room:
                line = (line[0], both)
                continue
            out += self.row(*line) if line is not None else []
            line = (label, text)
        return out + (self.row(*line) if line is not None else [])

    def run_on(self, items: list[str]) -> list[str]:
        """A list on as few lines as its items allow without breaking one that fits a line."""
        out: list[str] = []
        for i, item in enumerate(items):
            text = item + (";" if i < len(items) - 1 else "")
            if out and cells(out[-1] + " " + text) <= self.room:
                out[-1] += " " + text
            else:
                out += wrapped(text, self.room, "  ")
        return out

    def listed(self, items: list[str]) -> list[str]:
        """A list: an item a line, or run on where lines are scarce."""
        return wrapped("; ".join(items), self.room) if self.close and items else items

    # -- formulas ------------------------------------------------------------------------------
    def loss(self) -> list[str]:
        out: list[str] = []
        for i, b in enumerate(self.e.formula.blocks):
            out += self.block(b, "L(θ) = " if i == 0 else "     + ")
        return out

    def block(self, b: Block, head: str) -> list[str]:
        """One reduction of L(θ), its denominator explained at the right."""
        start, whole = f"  {head}{b.u} ", Add(b.items)
        braces = len(b.items) > 1 or not b.items[0][0]
        single = "{ " + unicode(whole) + " }" if braces else unicode(b.items[0][1], MUL)
        if len(start + single) <= self.width:
            lines = [start + single]
        else:
            inner = start + "{ "
            lines = broken(whole, self.width - 2, inner, " " * len(inner))
            later = " " * (len(inner) + 2)
            lines = [x for line in lines for x in folded(line, self.width - 2, later)]
            lines[-1] += " }"
        if b.note and cells(b.note) + 3 <= self.width - cells(lines[-1]):
            lines[-1] += b.note.rjust(self.width - cells(lines[-1]))
        elif b.note and not self.close:
            lines += [x.rjust(self.width) for x in wrapped(b.note, self.width - 4)]
        elif b.note:
            self.later.append(b.note)
        return lines

    def where(self) -> list[str]:
        """Definitions that no other row has, then letters for what is handed in."""
        rows = []
        for d in self.e.definitions():
            note = f"   ({d.note})" if d.note else ""
            rows.append(self.formula(f"{unicode(d.left)} {d.op} ", d.right, note))
        letters = [*self.e.formula.glossary, *self.later]
        return [*self.shared(rows), *wrapped(", ".join(letters), self.room)]

    def gradient(self) -> list[str]:
        """Δz of every term, terms with the same one together."""
        groups: dict[str, list[Push]] = {}
        for x in self.e.formula.push:
            groups.setdefault(unicode(x.right), []).append(x)
        rows: list[list[str]] = []
        for same in groups.values():
            names = ", ".join(x.term.split(".")[-1] for x in same)
            head = f"{names}: " if len(groups) > 1 else ""
            rows.append(self.formula(f"{head}{unicode(same[0].left)} = ", same[0].right, ""))
        factors = [x for t in self.e.spec.terms for x in (t.gate, t.weight)]
        scaled = any(not x.is_const(1) and not x.q.live for x in factors)
        times = "   (before gates and weights)" if scaled else ""
        means = [f"Δz = −∂L_t/∂z_t{times}"]
        first = rows[0][0].replace("Δz = ", "Δz = −∂L_t/∂z_t = ", 1) + times
        if len(rows[0]) == 1 and "Δz = " in rows[0][0] and cells(first) <= self.room:
            rows[0], means = [first], []
        return [*self.shared(rows), *means]

    def shared(self, rows: list[list[str]]) -> list[str]:
        """Rows below each other; in a close layout short ones side by side."""
        if not self.close:
            return [line for lines in rows for line in lines]
        out: list[list[str]] = []
        for lines in rows:
            room = self.room - len(GAP) - cells(lines[0])
            place = next((x for x in out if len(x) == 1 and cells(x[0]) <= room), None)
            if place is not None and len(lines) == 1:
                place[0] += GAP + lines[0]
            else:
                out.append(list(lines))
        return [line for lines in out for line in lines]

    def packed(self, parts: list[str]) -> list[str]:
        """Things side by side, as many on a line as fit."""
        out: list[str] = []
        for part in parts:
            if out and cells(out[-1] + GAP + part) <= self.room:
                out[-1] += GAP + part
            else:
                out.append(part)
        return out

    def formula(self, head: str, right: Math, tail: str) -> list[str]:
        """`head = right` under a label, broken at the signs of the sum."""
        indent = " " * min(len(head), self.room // 3)
        whole = head + unicode(right)
        if len(whole + tail) <= self.room:
            return [whole + tail]
        lines = broken(right, self.room, head, indent)
        lines = [x for line in lines for x in folded(line, self.room, indent + "  ")]
        if len(lines[-1] + tail) <= self.room:
            lines[-1] += tail
        else:
            lines += [indent + x for x in wrapped(tail.strip(), self.room - len(indent))]
        return lines

    # -- passport ------------------------------------------------------------------------------
    def bias(self) -> list[str]:
        """Boundaries that are crossed. What is accepted is one line each in a close layout."""
        out: dict[str, str] = {}
        bare: list[str] = []  # accepted, and nothing more of it fits a line
        for b in self.e.passport["biases"]:
            head = f"{b['code']} {b['slug']}"
            why = f" (accepted: {b['accepted']})" if b["accepted"] else " (not accepted)"
            tries = [f"{head}: {b['statement']}{why}"]
            if self.close and b["accepted"]:
                tries += [f"{head}: {b['statement']} (accepted)", f"{head}{why}"]
                tries = [x for x in tries if cells(x) <= self.room]
            if tries:
                out.setdefault(head, tries[0])
            elif head not in bare:
                bare.append(head)
        accepted = wrapped(f"{', '.join(bare)} (accepted)", self.room, "  ") if bare else []
        return [*accepted, *out.values()] or ["none found"]


# ---- lines -------------------------------------------------------------------------------------


def wrapped(text: str, width: int, later: str = "") -> list[str]:
    """Lines of at most `width` cells; `later` begins all but the first."""
    if cells(text) <= width:
        return [text] if text.strip() else []
    lead = text[: len(text) - len(text.lstrip())]
    first, *more = wrapped_text(text.strip(), width - len(lead or later))
    return [lead + first, *((lead or later) + x for x in more)]


def as_list(x: object) -> list[str]:
    """An entry of the passport as texts: one, several, or records of a code and a statement."""
    rows = [x] if isinstance(x, str) else list(x or [])  # type: ignore[call-overload]
    return [r if isinstance(r, str) else f"{r['statement']} ({r['code']})" for r in rows]


__all__ = ["SCREEN", "WIDTH", "Page", "as_list", "page", "wrapped"]
