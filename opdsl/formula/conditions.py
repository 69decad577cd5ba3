"""Tests in the words of mathematics: the part of the printer that writes conditions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdsl.formula.algebra import Atom, Poly
from opdsl.formula.notation import ZERO, Call, Join, Math, Rel, Sym, Text, words
from opdsl.formula.symbols import Named, Symbols
from opdsl.meaning.graph import static_value
from opdsl.meaning.node import SET_OPS, Node
from opdsl.meaning.quantity import Axis

if TYPE_CHECKING:
    from opdsl.formula.normal import Normal

_FLIP = {"<": ">", "≤": "≥", ">": "<", "≥": "≤", "=": "=", "≠": "≠"}
_NOT = {"<": "≥", "≤": ">", ">": "≤", "≥": "<", "=": "≠", "≠": "="}


class Conditions:
    """What `Printer` knows about conditions; it brings `normal`, `symbols` and the rest."""

    normal: Normal
    symbols: Symbols

    if TYPE_CHECKING:

        def expr(self, n: Node, at: str = "v") -> Math: ...
        def poly(self, a: Poly) -> Math: ...
        def index(self, at: str) -> Math: ...
        def named(self, x: Atom) -> Math: ...

    def literal(self, x: Atom, positive: bool) -> Math:
        """The condition of an indicator atom, or its opposite."""
        if isinstance(x.key, Named):
            if x.key.style == "some":
                s = x.key.at(self.time)
                return Rel("≠" if positive else "=", s, Sym("∅", r"\emptyset"))
            return self.named(x)
        if x.kind == "in":
            s = self.symbols.set(self.normal.sets[x.key])  # type: ignore[index]
            inside = Rel("∈" if positive else "∉", self.index(x.at), s or Sym("V", "V"))
            return inside
        if x.key == "y":
            return Rel("=" if positive else "≠", self.index(x.at), self.index("y"))
        return self.condition(self.normal.nodes[x.key], x.at or "v", positive)  # type: ignore[index]

    def condition(self, n: Node, at: str = "v", positive: bool = True) -> Math:
        """A test in words of mathematics."""
        if n.id in self.normal.names:
            _, atom = self.normal.names[n.id]
            return self.literal(Atom(atom.kind, atom.key, at if atom.at else ""), positive)
        match n.op:
            case "not":
                return self.condition(n.args[0], at, not positive)
            case "and" | "or":
                items = tuple(self._flat(n, n.op, at, positive))
                return Join(n.op if positive else {"and": "or", "or": "and"}[n.op], items)
            case "lt" if n.args[0].attr("name") == "noise":
                chance = Call(Sym("chance", words("chance")), (self.expr(n.args[1], at),))
                return chance if positive else Call(Sym("not", words("not")), (chance,))
            case "lt" | "le" | "eq":
                return self._compared(n, at, positive)
            case "is_y":
                return self.literal(Atom("ind", "y", at), positive)
            case "in_set":
                return self.literal(Atom("in", self.normal.set_id(n.args[0]), at), positive)
            case "input" if n.attr("name") == "special":
                return Sym("y_t special" if positive else "y_t not special",
                           r"y_t\ \mathrm{special}" if positive else r"y_t\ \mathrm{not\ special}")  # fmt: skip
            case "input" if n.attr("field") == "@source":
                who = n.attr("equals")
                return Sym(f"y {'' if positive else 'not '}from {who}",
                           rf"y\ \mathrm{{{'' if positive else 'not '}from\ {who}}}")  # fmt: skip
            case "input" if n.attr("name") == "field":
                return Rel(
                    "=" if positive else "≠",
                    Text(f"x.{n.attr('field')}"),
                    Text(f"{n.attr('equals')}"),
                )
            case "const":
                return Text("always" if bool(n.value) == positive else "never")
        inner = self.expr(n, at)
        return inner if positive else Rel("=", inner, ZERO)

    def _flat(self, n: Node, op: str, at: str, positive: bool) -> list[Math]:
        if n.op == op and n.id not in self.normal.names:
            return [m for a in n.args for m in self._flat(a, op, at, positive)]
        return [self.condition(n, at, positive)]

    def _compared(self, n: Node, at: str, positive: bool) -> Math:
        op = {"lt": "<", "le": "≤", "eq": "="}[n.op]
        a, b = n.args
        wider = static_value(a) is not None or a.q.axis < min(b.q.axis, Axis.TOK)
        if wider or (_reads_teacher(b) and not _reads_teacher(a)):
            a, b, op = b, a, _FLIP[op]
        op = op if positive else _NOT[op]
        if a.is_const(0) or b.is_const(0):
            sides = self._sides(self.normal.poly(b if a.is_const(0) else a, at))
            if sides is not None:
                left, right = sides
                op = _FLIP[op] if a.is_const(0) else op
                if _of_student(left) and not _of_student(right):
                    left, right, op = right, left, _FLIP[op]
                return Rel(op, self.poly(left), self.poly(right))
        return Rel(op, self.expr(a, at), self.expr(b, at))

    def _sides(self, a: Poly) -> tuple[Poly, Poly] | None:
        """x − y compared with 0 is x compared with y."""
        above = {m: c for m, c in a.items() if c > 0}
        below = {m: -c for m, c in a.items() if c < 0}
        if len(above) != 1 or len(below) != 1 or not all(above) or not all(below):
            return None
        kinds = {x.kind for m in (*above, *below) for x, _ in m}
        return (above, below) if kinds <= {"P", "node", "named"} else None


def _of_student(a: Poly) -> bool:
    return any(x.kind == "P" and "student" in str(x.key) for m in a for x, _ in m)


def _reads_teacher(n: Node) -> bool:
    """Whether a teacher's probability is part of the value (not only of the choice of a set)."""
    stack, seen = [n], set()
    while stack:
        x = stack.pop()
        if x.op == "logp" and x.attr("dist") not in ("student", "initial"):
            return True
        if x.id not in seen and x.op not in SET_OPS:
            seen.add(x.id)
            stack += x.args
    return False
