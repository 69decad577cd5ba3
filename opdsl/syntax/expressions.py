"""Expressions as documents for the pretty printer, with as few brackets as the grammar needs."""

from __future__ import annotations

from typing import Any

from opdsl.source import Source
from opdsl.syntax import tree as ast
from opdsl.syntax.pretty import HARD, SOFT, SPACE, Alt, Cat, Doc, Group, Nest, cat, join, layout

# Binding strength of operators; a looser operand gets parentheses.
_LEVEL = {"or": 1, "and": 2, "<": 4, "<=": 4, ">": 4, ">=": 4, "==": 4, "!=": 4,
          "+": 5, "-": 5, "*": 6, "/": 6, "^": 8}  # fmt: skip
_NOT, _MINUS, _POSTFIX = 3, 7, 9


class Expressions:
    """Expressions as documents; `comments` are those inside the statement being printed."""

    def __init__(self, comments: tuple[ast.Comment, ...] = ()):
        self.comments = comments
        self.placed = 0  # comments that found a place between arguments

    def doc(self, node: ast.Expr, level: int = 0) -> Doc:
        made, own = self.bare(node)
        return cat("(", made, ")") if own < level else made

    def bare(self, node: ast.Expr) -> tuple[Doc, int]:
        """The document of a node and how strongly it binds."""
        if isinstance(node, ast.Name):
            return node.name, _POSTFIX
        if isinstance(node, ast.Number):
            return number(node), _POSTFIX
        if isinstance(node, ast.Text):
            return f'"{node.value}"', _POSTFIX
        if isinstance(node, ast.Unary):
            own = _NOT if node.op == "not" else _MINUS
            return cat("not " if node.op == "not" else "-", self.doc(node.operand, own)), own
        if isinstance(node, ast.Binary):
            return self.binary(node)
        if isinstance(node, ast.Cond):
            parts = cat(
                "if ", self.doc(node.test), SPACE, "then ", self.doc(node.yes), SPACE, "else ",
                self.doc(node.no),
            )  # fmt: skip
            return Group(Nest(2, parts)), 0
        return self.postfix(node), _POSTFIX

    def binary(self, node: ast.Binary) -> tuple[Doc, int]:
        own = _LEVEL[node.op]
        if node.op == "^":
            return cat(self.doc(node.left, _POSTFIX), "^", self.doc(node.right, _MINUS)), own
        if own == 4:
            sides = self.doc(node.left, 5), self.doc(node.right, 5)
            return Group(Nest(2, cat(sides[0], SPACE, f"{node.op} ", sides[1]))), own
        chain: list[tuple[str, ast.Expr]] = []
        first: ast.Expr = node
        while isinstance(first, ast.Binary) and _LEVEL[first.op] == own:
            chain.append((first.op, first.right))
            first = first.left
        parts: list[Doc] = [self.doc(first, own)]
        for op, right in reversed(chain):
            parts += [SPACE, f"{op} ", self.doc(right, own + 1)]
        return Group(Nest(2, Cat(tuple(parts)))), own

    def postfix(self, node: ast.Expr) -> Doc:
        if isinstance(node, ast.Index):
            return cat(self.doc(node.base, _POSTFIX), "[", self.doc(node.index), "]")
        if isinstance(node, ast.Attr):
            level = _POSTFIX + isinstance(node.base, ast.Number)  # `5.x` would be a bad number
            return cat(self.doc(node.base, level), ".", node.name)
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.Divergence):
            head = cat(self.doc(node.left), SPACE, "|| ", self.doc(node.right))
            inside: Doc = cat(SOFT, head)
            if node.args:
                rest = self.args(node.args, node.right.span.end, node.span.end)
                inside = cat(SOFT, head, ",", SPACE, rest)
            return Group(cat(self.doc(node.func, _POSTFIX), "(", Nest(2, inside), ")"))
        if isinstance(node, ast.Reduce):
            head = cat(f"{node.var.name} in ", self.doc(node.domain), ":")
            body = Nest(2, cat(head, SPACE, self.doc(node.body)))
            return Group(cat(self.doc(node.func, _POSTFIX), "(", body, ")"))
        if isinstance(node, ast.SetLiteral):
            items = join(cat(",", SPACE), [self.doc(item) for item in node.items])
            return Group(cat("{", Nest(2, cat(SOFT, items)), "}"))
        assert isinstance(node, ast.SetWhere)
        head = cat(f"{node.var.name} in ", self.doc(node.domain), ":")
        return Group(cat("{", Nest(2, cat(head, SPACE, self.doc(node.condition))), "}"))

    def call(self, node: ast.Call) -> Doc:
        func = self.doc(node.func, _POSTFIX)
        if not node.args:
            return cat(func, "()")
        args = self.args(node.args, node.func.span.end, node.span.end)
        return Group(cat(func, "(", Nest(2, cat(SOFT, args)), ")"))

    def args(self, args: tuple[Any, ...], start: int, end: int) -> Doc:
        """Arguments with the comments between them, which lie between `start` and `end`."""
        names = [len(a.name) for a in args if isinstance(a, ast.Arg) and a.name]
        pad = max(names) if len(names) == len(args) else 0
        parts: list[Doc] = []
        for comment in self.comments:
            if start <= comment.span.start < args[0].span.start:
                self.placed += 1
                parts += [comment.text, HARD]
        for i, arg in enumerate(args):
            last = i == len(args) - 1
            made = self.arg(arg, pad)
            stop = end if last else args[i + 1].span.start
            after = [c for c in self.comments if arg.span.end <= c.span.start < stop]
            self.placed += len(after)
            parts += [made] if last else [made, ","]
            if after and same_line(arg.span.source, arg.span.end, after[0].span.start):
                parts.append(f"  {after.pop(0).text}")
                parts.append(HARD if last or after else "")
            elif after:
                parts.append(HARD)
            for comment in after:
                parts += [comment.text, HARD]
            if not last:
                trailing = bool(parts) and isinstance(parts[-1], str) and "#" in parts[-1]
                if parts[-1] is not HARD:
                    parts.append(HARD if trailing or parts[-1] == "" else SPACE)
        return Cat(tuple(parts))

    def arg(self, arg: Any, pad: int) -> Doc:
        if isinstance(arg, ast.MixArg):
            return cat(self.doc(arg.weight), ": ", self.doc(arg.value))
        if isinstance(arg, ast.RampArg):
            return cat(
                self.doc(arg.start), " -> ", self.doc(arg.stop), " over ", self.doc(arg.over)
            )
        if arg.name is None:
            return self.doc(arg.value)
        space = " " * max(0, pad - len(arg.name))
        return cat(arg.name, Alt(space, ""), " = ", self.doc(arg.value))


def number(node: ast.Number) -> str:
    if node.unit is None:
        return node.text
    return node.text + node.unit if node.unit == "%" else f"{node.text} {node.unit}"


def flat(doc: Doc) -> str:
    return layout(doc, 0, 0, 1 << 30)


def type_text(node: ast.TypeExpr | None) -> str:
    if node is None:
        return ""
    return " ".join((node.unit, "per", *node.axes)) if node.axes else node.unit


def domain_text(node: ast.Domain | None) -> str:
    if node is None:
        return ""
    show = Expressions()
    if isinstance(node, ast.Choice):
        return "{" + ", ".join(flat(show.doc(item)) for item in node.items) + "}"
    low, high = flat(show.doc(node.low)), flat(show.doc(node.high))
    return f"{'(' if node.low_open else '['}{low}, {high}{')' if node.high_open else ']'}"


def same_line(source: Source, start: int, end: int) -> bool:
    return "\n" not in source.text[start:end]
