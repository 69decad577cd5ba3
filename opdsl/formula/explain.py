"""`explain`: the derived formula, its gradient, what it needs, and the passport.

Everything comes from the typed specification and its program; models, data and other settings of
a `run` block never change a character (the run fingerprint belongs to a run, so it reads "–" here).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from opdsl.formula.gradient import STEP, Field
from opdsl.formula.naming import Definition
from opdsl.formula.notation import unicode
from opdsl.formula.page import WIDTH, page
from opdsl.formula.paper import definition_latex, lines_of, markdown, paper, push_latex
from opdsl.formula.prose import knob, states, teachers
from opdsl.formula.sections import display, formula, one_line
from opdsl.meaning.node import Node
from opdsl.meaning.spec import Term

if TYPE_CHECKING:
    from opdsl.compilation import Compilation

FORMATS = ("text", "json", "latex", "markdown")


def explain(compilation: Compilation, format: str = "text", width: int = WIDTH) -> str:
    """The explanation of a compiled method in one of FORMATS; `width` is that of the text.

    Raises ValueError for another format and CompileError when the spec has errors.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: use {', '.join(FORMATS)}")
    return printed(Explanation(compilation), format, width)


def printed(e: Explanation, format: str, width: int = WIDTH, push: dict | None = None) -> str:
    """An explanation in a format; `push` are the numbers of a figure, for json."""
    match format:
        case "text":
            return page(e, width)
        case "latex":
            return paper(e)
        case "markdown":
            return markdown(e)
    data = e.data() if push is None else {**e.data(), "push": push}
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


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

    # -- phrases -------------------------------------------------------------------------------
    def supports(self) -> list[str]:
        """The index sets of the feedback terms, with the letters the formula has for them."""
        return list(dict.fromkeys(self._support(t) for t in self.spec.feedback_terms))

    def _support(self, term: Term) -> str:
        base, tail = term.support.base, term.support.tail
        if base.op == "full":
            return "the full vocabulary"
        if base.op == "sampled":
            return "the sampled token"
        letter = self._letter(base)
        text = unicode(self.formula.names.symbols.described(base))
        hat = f": π̂(v) = π(v)/π({letter})" if letter else ""
        how = {
            "bin": f"{letter}⁺ with one entry for the rest" if letter else "one entry for the rest",
            "renormalize": f"renormalised on it{hat}",
            "drop": "the rest dropped",
            "detach": "the rest dropped, logarithms held",
            "sampled": "the rest by its sampled token",
        }
        return (f"{letter} = " if letter else "") + text + (f", {how[tail]}" if tail else "")

    def _letter(self, base: Node) -> str:
        symbols = self.formula.names.symbols
        s = symbols.set(base) if ("set", base.id) in symbols.used else None
        return "" if s is None else s.u

    def definitions(self) -> list[Definition]:
        """Definitions beside those that `supports` has said."""
        said = {self._letter(t.support.base) for t in self.spec.feedback_terms}
        return [d for d in self.formula.where if unicode(d.left) not in said]

    def needed(self) -> str:
        parts = [f"{n} with access {a}" for n, a in self.needs.teachers.items()]
        tensors = [t.replace("_", " ") for t in self.needs.tensors]
        if tensors:
            parts.append("with the batch: " + ", ".join(tensors))
        parts.append("a first pass without gradient" if self.needs.coupled else "one student pass")
        return "; ".join(parts)

    def objectives(self) -> list[str]:
        found = self.passport["objective"]
        return [found] if isinstance(found, str) else list(found)

    def conservative(self) -> str:
        decided, reason = self.passport["conservative"], self.passport["conservative_reason"]
        word = {True: "yes", False: "no", None: "not decided"}[decided]
        return f"{word} ({reason})" if reason and reason != word else word

    def unbiased(self) -> str:
        """The objectives whose gradient the expected one is, up to a positive factor."""
        known = self.passport["unbiased"]
        full = {"J_seq": "J_seq (whole sequences)", "J_fro": "J_fro (states frozen)"}
        if yes := [full[k] for k, v in known.items() if v]:
            exact = ", with an exact critic" if self.spec.critics else ""
            return f"{' and '.join(yes)}, up to a positive factor{exact}"
        if None not in known.values():
            return "neither J_seq nor J_fro"
        open_ = [k for k, v in known.items() if v is None]
        no = [f"not {k}; " for k, v in known.items() if v is False]
        return "".join(no) + f"{' and '.join(open_)}: not decided"

    def fixed_point(self) -> str:
        text, answer = self.passport["fixed_point"], self.passport["stationary_at_teacher"]
        if answer is None or (answer and text.startswith("π_")):
            return text
        at = f"stationary at π_{self.teacher()}"
        return f"{text}; {at}" if answer else f"{text}; not {at}"

    def teacher(self) -> str:
        """The name that π_T stands for; T where a method has several."""
        names = {t for term in self.spec.terms for t in term.teachers if t != "initial"}
        return names.pop() if len(names) == 1 else "T"

    def descent(self) -> str:
        parts: dict[str, list[str]] = {}
        for name, text in self.passport["descent"].items():
            name = name.replace("||", " ‖ ").replace("T", self.teacher())
            parts.setdefault(text, []).append(name)
        if list(parts) == ["not decided"]:
            return "not decided"
        return "; ".join(f"{', '.join(names)}: {text}" for text, names in parts.items())

    def variance(self) -> str:
        """Without a part that another part begins with."""
        parts = self.passport["variance"].split("; ")
        said = [x for x in parts if not any(y != x and y.startswith(x) for y in parts)]
        return "; ".join(said)

    # -- data ----------------------------------------------------------------------------------
    def data(self) -> dict[str, Any]:
        """What `--format json` prints. gradient: Δz = −∂L_t/∂z_t of each term; coefficients: c
        with Δz = c − (Σ_v c) π_θ; latex_lines: the formula in lines that stand alone."""
        spec, f = self.spec, self.formula
        return {
            "method": spec.name,
            "title": spec.title,
            "cites": [{"kind": k, "value": v} for k, v in spec.cites],
            "route": "+".join(dict.fromkeys(t.route for t in spec.feedback_terms)),
            "states": states(spec),
            "teachers": teachers(spec),
            "support": self.supports(),
            "formula": one_line(f),
            "where": [_definition(d) for d in f.where],
            "letters": list(f.glossary),
            "latex": display(f),
            "where_latex": [definition_latex(d) for d in f.where],
            "latex_lines": lines_of(self),
            "gradient": [
                {"term": x.term, "push": f"{unicode(x.left)} = {unicode(x.right)}"} for x in f.push
            ],
            "gradient_latex": [push_latex(x) for x in f.push],
            "coefficients": [*(_field(x) for x in f.gradient), STEP],
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


def _definition(d: Definition) -> str:
    text = f"{unicode(d.left)} {d.op} {unicode(d.right)}"
    return f"{text}   ({d.note})" if d.note else text


def _field(f: Field) -> str:
    place = f",  {unicode(f.place)}" if f.place is not None else ""
    place += f"  (logits at temperature {f.temperature:g})" if f.temperature != 1 else ""
    return f"{f.term}: {unicode(f.left)} = {unicode(f.right)}{place}"


__all__ = ["FORMATS", "WIDTH", "Explanation", "explain", "printed"]
