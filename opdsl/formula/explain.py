"""`explain`: the derived formula, its gradient, what it needs, and the passport.

Everything comes from the typed specification and its program; models, data and other settings of
a `run` block never change a character (the run fingerprint belongs to a run, so it reads "–" here).
"""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

from opdsl.formula.gradient import STEP, Field
from opdsl.formula.naming import Definition
from opdsl.formula.notation import MUL, Add, Math, broken, folded, latex, unicode
from opdsl.formula.prose import knob, knobs, route, states, teachers
from opdsl.formula.sections import Block, display, formula, one_line
from opdsl.meaning.spec import Spec

if TYPE_CHECKING:
    from opdsl.compilation import Compilation

WIDTH, LABEL = 100, 16
FORMATS = ("text", "json", "latex", "markdown")


def explain(compilation: Compilation, format: str = "text") -> str:
    """The explanation of a compiled method in one of FORMATS.

    Raises ValueError for another format and CompileError when the spec has errors.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: use {', '.join(FORMATS)}")
    found = Explanation(compilation)
    return {
        "text": found.text,
        "json": found.json,
        "latex": found.latex,
        "markdown": found.markdown,
    }[format]()


class Explanation:
    """One method, ready to be printed."""

    def __init__(self, compilation: Compilation):
        from opdsl.ir.needs import needs
        from opdsl.passport.report import passport

        self.spec, self.program = compilation.require()
        self.formula = formula(self.spec, self.program)
        self.passport = passport(compilation)
        self.needs = needs(self.program)
        prints = {**self.passport["fingerprints"], "run": "–"}
        self.passport["fingerprints"] = prints

    # -- text ----------------------------------------------------------------------------------
    def text(self) -> str:
        p = self.passport
        lines = [_heading(self.spec), ""]
        lines += _row("states", "; ".join(states(self.spec)))
        lines += _row("teacher", "; ".join(teachers(self.spec)) or "none")
        lines += _row("support", "; ".join(self.supports()))
        lines += _row("route", route(self.spec))
        lines += ["", *self._loss(), ""]
        lines += _column("where", self._where())
        lines += _row("knobs", "     ".join(knobs(self.formula)), keep=True)
        lines += _column("gradient", self._gradient())
        lines += _row("needs", self._needs())
        lines += _column("bias", self._bias())
        lines += _column("objective", _as_list(p["objective"]))
        lines += _row("conservative", _answer(p["conservative"], p["conservative_reason"]))
        lines += _row("fixed point", p["fixed_point"] + self._stationary())
        lines += _row("routing", p["routing"])
        lines += _row("descent", self._descent())
        lines += _row("variance", p["variance"])
        lines += _row("evidence", p["evidence"] or "not stated")
        ids = p["fingerprints"]
        lines += _row(
            "ids", f"method {ids['method']}   optimize {ids['optimize']}   run {ids['run']}"
        )
        return "\n".join(line.rstrip() for line in lines) + "\n"

    def _loss(self) -> list[str]:
        out: list[str] = []
        for i, b in enumerate(self.formula.blocks):
            out += _block(b, "L(θ) = " if i == 0 else "     + ")
        return out

    def _where(self) -> list[str]:
        out: list[str] = []
        for d in self.formula.where:
            note = f"   ({d.note})" if d.note else ""
            out += _formula_lines(f"{unicode(d.left)} {d.op} ", d.right, note)
        if self.formula.glossary:
            out += _wrapped(", ".join(self.formula.glossary), WIDTH - LABEL)
        return out

    def _gradient(self) -> list[str]:
        out: list[str] = []
        several = len({f.term for f in self.formula.gradient}) > 1
        for f in self.formula.gradient:
            label = f"{f.term.split('.')[-1]}: " if several else ""
            head = f"{label}{unicode(f.left)} = "
            out += _formula_lines(head, f.right, _where_it_acts(f))
        if not out:
            out.append("c_t = 0")
        remarks = []
        if any(f.shifted for f in self.formula.gradient):
            remarks.append("multiples of π_θ(v) in c cancel")
        if any(not x.is_const(1) for t in self.spec.terms for x in (t.gate, t.weight)):
            remarks.append("gates and weights multiply c")
        return [*out, STEP + (f"   ({'; '.join(remarks)})" if remarks else "")]

    def _needs(self) -> str:
        parts = [f"{n} with access {a}" for n, a in self.needs.teachers.items()]
        tensors = [t.replace("_", " ") for t in self.needs.tensors]
        if tensors:
            parts.append("with the batch: " + ", ".join(tensors))
        parts.append("a first pass without gradient" if self.needs.coupled else "one student pass")
        return "; ".join(parts)

    def _bias(self) -> list[str]:
        seen: dict[str, str] = {}
        for b in self.passport["biases"]:
            if b["slug"] in seen:
                continue
            tail = f" (accepted: {b['accepted']})" if b["accepted"] else " (not accepted)"
            seen[b["slug"]] = f"{b['code']} {b['slug']}: {b['statement']}{tail}"
        if len(seen) > 3:  # many: their statements and reasons are in --format json
            open_ = [k for k in seen if seen[k].endswith("(not accepted)")]
            rest = [k for k in seen if k not in open_]
            text = [f"{', '.join(rest)} (accepted)"] if rest else []
            return [*text, *(seen[k] for k in open_)]
        return list(seen.values()) or ["none found"]

    def _stationary(self) -> str:
        answer = self.passport["stationary_at_teacher"]
        if answer is None or self.passport["fixed_point"].startswith("π_"):
            return ""
        return "; stationary at the teacher" if answer else "; not stationary at the teacher"

    def _descent(self) -> str:
        d = self.passport["descent"]
        parts: dict[str, list[str]] = {}
        for name, text in d.items():
            parts.setdefault(text, []).append(name.replace("||", " ‖ "))
        return "; ".join(f"{', '.join(names)}: {text}" for text, names in parts.items())

    def supports(self) -> list[str]:
        """The index sets of the feedback terms, in words."""
        out: list[str] = []
        tails = {
            "bin": "one entry for the rest",
            "renormalize": "both sides renormalised on it",
            "drop": "the rest dropped",
            "detach": "the rest dropped, logarithms held",
            "sampled": "the rest by its sampled token",
        }
        for t in self.spec.feedback_terms:
            s = t.support
            if s.base.op == "full":
                text = "the full vocabulary"
            elif s.base.op == "sampled":
                text = "the sampled token"
            else:
                text = unicode(self.formula.names.symbols.described(s.base))
                text += f", {tails[s.tail]}" if s.tail else ""
            if text not in out:
                out.append(text)
        return out

    # -- other formats -------------------------------------------------------------------------
    def data(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "method": spec.name,
            "title": spec.title,
            "cites": [{"kind": k, "value": v} for k, v in spec.cites],
            "route": "+".join(dict.fromkeys(t.route for t in spec.feedback_terms)),
            "states": states(spec),
            "teachers": teachers(spec),
            "support": self.supports(),
            "formula": one_line(self.formula),
            "where": [_definition(d) for d in self.formula.where],
            "latex": display(self.formula),
            "where_latex": [_definition_latex(d) for d in self.formula.where],
            "gradient": "\n".join([*(_field(f) for f in self.formula.gradient), STEP]),
            "gradient_latex": [_field_latex(f) for f in self.formula.gradient],
            "knobs": [knob(p) for p in spec.params],
            "needs": {
                "teachers": dict(self.needs.teachers),
                "tensors": list(self.needs.tensors),
                "critics": list(self.needs.values),
                "coupled": self.needs.coupled,
            },
            "passport": self.passport,
            "fingerprints": self.passport["fingerprints"],
        }

    def json(self) -> str:
        return json.dumps(self.data(), indent=2, ensure_ascii=False) + "\n"

    def latex(self) -> str:
        """One formula: L(θ), then its definitions and gradient, each on a line of its own."""
        rows = [display(self.formula)]
        rows += [_definition_latex(d) for d in self.formula.where]
        rows += [_field_latex(f) for f in self.formula.gradient]
        return ",\\qquad\n".join(rows) + "\n"

    def markdown(self) -> str:
        p, spec = self.passport, self.spec
        out = [f"# {spec.name}", "", spec.title or "", ""]
        out += ["$$", display(self.formula), "$$", ""]
        out += [
            f"- ${_definition_latex(d)}$" + (f" ({d.note})" if d.note else "")
            for d in self.formula.where
        ]
        out += [
            "",
            "Gradient, with $\\partial L/\\partial z = (\\sum_v c)\\,\\pi_\\theta - c$:",
            "",
        ]
        out += [f"- ${_field_latex(f)}$" for f in self.formula.gradient]
        rows = [
            ("states", "; ".join(states(spec))),
            ("teacher", "; ".join(teachers(spec))),
            ("support", "; ".join(self.supports())),
            ("route", route(spec)),
            ("knobs", ", ".join(knobs(self.formula))),
            ("needs", self._needs()),
            ("bias", "; ".join(self._bias())),
            ("objective", "; ".join(_as_list(p["objective"]))),
            ("conservative", _answer(p["conservative"], p["conservative_reason"])),
            ("fixed point", p["fixed_point"] + self._stationary()),
            ("routing", p["routing"]),
            ("descent", self._descent()),
            ("variance", p["variance"]),
            ("evidence", p["evidence"] or "not stated"),
            ("ids", ", ".join(f"{k} `{v}`" for k, v in p["fingerprints"].items())),
        ]
        out += ["", "| | |", "|---|---|"]
        out += [f"| {k} | {_cell(v)} |" for k, v in rows if v]
        return "\n".join(out) + "\n"


# ---- lines -------------------------------------------------------------------------------------


def _heading(spec: Spec) -> str:
    cites = ", ".join(f"arXiv {v}" if k == "arxiv" else v for k, v in spec.cites)
    left = f"{spec.name}   {spec.title or ''}".rstrip()
    if cites and len(left) + len(cites) + 3 <= WIDTH:
        return left + cites.rjust(WIDTH - len(left))
    return left + (f"\n{cites.rjust(WIDTH)}" if cites else "")


def _row(label: str, text: str, keep: bool = False) -> list[str]:
    """One labelled entry, wrapped under its label. `keep` keeps runs of blanks inside."""
    if not text:
        return []
    lines = _packed(text, WIDTH - LABEL) if keep else _wrapped(text, WIDTH - LABEL)
    return _column(label, lines)


def _column(label: str, lines: list[str]) -> list[str]:
    out: list[str] = []
    for line in lines:
        out += _wrapped(line, WIDTH - LABEL, "  ")
    return [f"  {label if i == 0 else '':<{LABEL - 2}}{line}" for i, line in enumerate(out)]


def _packed(text: str, width: int) -> list[str]:
    out: list[str] = []
    for part in text.split("     "):
        if out and len(out[-1]) + 5 + len(part) <= width:
            out[-1] += "     " + part
        else:
            out.append(part)
    return out


def _wrapped(text: str, width: int, later: str = "") -> list[str]:
    if len(text) <= width:
        return [text]
    lead = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(
        text.strip(), width, initial_indent=lead, subsequent_indent=lead or later,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _block(b: Block, head: str) -> list[str]:
    """One reduction of L(θ), its denominator explained at the right."""
    start = f"  {head}{b.u} "
    whole = Add(b.items)
    braces = len(b.items) > 1 or not b.items[0][0]
    single = "{ " + unicode(whole) + " }" if braces else unicode(b.items[0][1], MUL)
    if len(start + single) <= WIDTH:
        lines = [start + single]
    else:
        inner = start + "{ "
        lines = broken(whole, WIDTH - 2, inner, " " * len(inner))
        lines = [x for line in lines for x in folded(line, WIDTH - 2, " " * (len(inner) + 2))]
        lines[-1] += " }"
    note = b.note
    if note:
        room = WIDTH - len(lines[-1])
        if len(note) + 3 <= room:
            lines[-1] += note.rjust(room)
        else:
            lines.append(note.rjust(WIDTH))
    return lines


def _formula_lines(head: str, right: Math, tail: str) -> list[str]:
    """`head = right` under a label, broken at the signs of the sum."""
    width, indent = WIDTH - LABEL, " " * len(head)
    whole = head + unicode(right)
    if len(whole + tail) <= width:
        return [whole + tail]
    lines = broken(right, width, head, indent)
    lines = [x for line in lines for x in folded(line, width, indent + "  ")]
    if len(lines[-1] + tail) <= width:
        lines[-1] += tail
    else:
        lines.append(indent + tail.strip())
    return lines


def _definition(d: Definition) -> str:
    text = f"{unicode(d.left)} {d.op} {unicode(d.right)}"
    return f"{text}   ({d.note})" if d.note else text


def _definition_latex(d: Definition) -> str:
    op = {"∝": r"\propto", "=": "="}[d.op]
    return f"{latex(d.left)} {op} {latex(d.right)}"


def _where_it_acts(f: Field) -> str:
    text = f",  {unicode(f.place)}" if f.place is not None else ""
    return text + (f"  (logits at temperature {f.temperature:g})" if f.temperature != 1 else "")


def _field(f: Field) -> str:
    return f"{f.term}: {unicode(f.left)} = {unicode(f.right)}{_where_it_acts(f)}"


def _field_latex(f: Field) -> str:
    place = rf",\ {latex(f.place)}" if f.place is not None else ""
    return f"{latex(f.left)} = {latex(f.right)}{place}"


def _answer(decided: bool | None, reason: str) -> str:
    word = {True: "yes", False: "no", None: "not decided"}[decided]
    return f"{word} ({reason})" if reason and reason != word else word


def _as_list(x: str | list[str]) -> list[str]:
    return [x] if isinstance(x, str) else list(x)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


__all__ = ["FORMATS", "Explanation", "explain"]
