"""What a definition of the language means: its signature, its text and its formula.

The body is elaborated with arguments that stand for themselves: distributions p and q, a token
signal r, knobs by name. Divergences are written out here, not recognised.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdsl.diagnostics import Report
from opdsl.formula.naming import Names
from opdsl.formula.normal import Normal
from opdsl.formula.notation import Ind, folded, unicode
from opdsl.formula.printer import Printer
from opdsl.formula.sections import letters_used
from opdsl.formula.symbols import Symbols
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis, Info, Quantity
from opdsl.syntax import tree

PREFIXES = ("", "baseline_", "shape_")
WINDOW = 97  # stands for a whole number without a default
_AXES = {"token": Axis.TOK, "sequence": Axis.SEQ, "group": Axis.PROMPT}


@dataclass(frozen=True)
class Definition:
    name: str
    signature: str
    doc: str
    source: str
    place: str
    formula: str  # "" where the body has no formula outside a method
    where: tuple[str, ...]

    def text(self) -> str:
        lines = [f"{self.signature}   {self.place}"]
        if self.doc:
            lines += ["", f"  {self.doc}"]
        if self.formula:
            lines += ["", *broken_line(self.formula)]
            lines += [f"  {'where' if i == 0 else '':<9} {w}" for i, w in enumerate(self.where)]
        lines += ["", *(f"    {line}".rstrip() for line in self.source.splitlines())]
        return "\n".join(lines) + "\n"

    def data(self) -> dict[str, object]:
        return {
            "definition": self.name,
            "signature": self.signature,
            "doc": self.doc,
            "formula": self.formula,
            "where": list(self.where),
            "source": self.source,
            "file": self.place,
        }


def broken_line(formula: str) -> list[str]:
    return folded(f"  {formula}", 100, "      ")


def names_of_library() -> list[str]:
    """Every definition of the standard library."""
    return list(_library()[1].def_names())


def definition(name: str) -> Definition | None:
    """A definition of the standard library by its name (`kl_state` finds `baseline_kl_state`)."""
    report, std = _library()
    for prefix in PREFIXES:
        found = std.find_def(prefix + name)
        if found is not None:
            return _described(found[0], found[1], std, report)
    return None


def _library():
    from opdsl.meaning.names import Loader
    from opdsl.resources import specs
    from opdsl.syntax import parse, read_source

    report = Report()
    loader = Loader(parse, read_source, specs(), report)
    return report, loader.std()


def _described(d: tree.Def, scope, std, report: Report) -> Definition:
    from opdsl.meaning.arguments import signature

    formula, where = _formula(d, scope, std, report)
    of = f" : {d.type.span.text.strip()}" if d.type is not None else ""
    return Definition(
        d.name.name,
        signature(d) + of,
        d.doc or "",
        d.span.text.strip(),
        f"specs/std/{d.span.source.name.split('/')[-1]}",
        formula,
        where,
    )


def _formula(d: tree.Def, scope, std, report: Report) -> tuple[str, tuple[str, ...]]:
    """(`KL(p ‖ q) = …`, what its letters mean); empty where the body needs a method around it."""
    from opdsl.meaning import values as vl
    from opdsl.meaning.infer import Elaborator, Env, Stop
    from opdsl.meaning.node import Builder

    b = Builder()
    el = Elaborator(b, report, std)
    full = b.set_("full")
    before = len(report.items)
    advantage = _variable(b, "A", Axis.TOK, "nats")
    context = {
        "support": vl.Domain(full, full),
        "advantage": advantage,
        "teacher": vl.LeafDist("T"),
    }
    try:
        with el.context(**context):
            args = tuple(_argument(b, p) for p in d.params)
            value = el.inline(vl.Closure(d, scope), (), d.span, Env(scope), args)
    except Stop:
        del report.items[before:]
        return "", ()
    if not isinstance(value, vl.Num):
        return "", ()
    node = value.node
    right, where = _printed(d, node)
    if right == "1":  # a statement about a cut support
        omega = b.set_("top", (b.logp("'support", False),), k=WINDOW)
        context["support"] = vl.Domain(omega, omega, "drop")
        with el.context(**context):
            again = el.inline(vl.Closure(d, scope), (), d.span, Env(scope), args)
        right, where = _printed(d, again.node)  # type: ignore[union-attr]
        where = ("Ω = the support",)
    return f"{_left(d, node)} = {right}", where


def _printed(d: tree.Def, node: Node) -> tuple[str, tuple[str, ...]]:
    symbols = Symbols({p.name.name: p.name.name for p in d.params})
    printer = Printer(Normal(), symbols)
    printer.written_out = True
    right = Ind(printer.condition(node)) if node.q.unit == "bool" else printer.expr(node)
    text = unicode(right)
    for p in d.params:  # a whole number that became part of an operation
        if p.type is not None and p.type.unit == "int":
            text = text.replace(f"t+{WINDOW - 1}", f"t+{p.name.name}−1")
    names = Names.__new__(Names)
    names.symbols, names.printer = symbols, printer
    found = [
        f"{unicode(s)} = {unicode(symbols.described(n))}"
        for key, n in symbols.used.items()
        if key[0] == "set" and isinstance(n, Node) and (s := symbols.set(n)) is not None
    ]
    found += [f"{unicode(x.left)} {x.op} {unicode(x.right)}" for x in letters_used(names)]
    return text, tuple(found)


def _left(d: tree.Def, node: Node) -> str:
    from opdsl.formula.symbols import GREEK

    dists = [p.name.name for p in d.params if p.type is not None and p.type.unit == "dist"]
    others = [p.name.name for p in d.params if p.name.name not in dists]
    directed = len(dists) == 2 and node.q.unit == "nats" and node.q.info <= Info.STATE
    pair = (" ‖ " if directed else ", ").join(dists)
    return f"{d.name.name}({', '.join(x for x in (pair, *(GREEK.get(n, n) for n in others)) if x)})"


def _argument(b, p: tree.FormalParam):
    """A value that prints as the parameter's own name."""
    from opdsl.meaning import values as vl

    name, unit = p.name.name, p.type.unit if p.type else "real"
    if unit == "dist":
        return vl.LeafDist(f"'{name}")
    axes = p.type.axes if p.type else ()
    if axes:
        return vl.Num(_variable(b, name, _AXES.get(axes[0], Axis.TOK), unit))
    value = float(WINDOW) if unit == "int" else 0.5
    if p.default is not None and isinstance(p.default, tree.Number):
        value = p.default.value
    if p.default is not None and isinstance(p.default, tree.Unary):
        value = -p.default.operand.value if isinstance(p.default.operand, tree.Number) else value
    return vl.Num(b.param(name, value, unit))


def _variable(b, name: str, axis: Axis, unit: str) -> Node:
    return b.input("variable", Quantity(axis, unit, info=Info.ACTION), of=name)


__all__ = ["Definition", "definition", "names_of_library"]
