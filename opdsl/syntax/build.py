"""Concrete tree to AST: one method per grammar rule, spans kept, Greek letters canonicalised.

The tree's depth is bounded before building (`too_deep`), so plain recursion is safe here and in
every later pass.
"""

from __future__ import annotations

from typing import Any

from opdsl.diagnostics import Diagnostic
from opdsl.source import Source, Span
from opdsl.syntax import messages
from opdsl.syntax import tree as ast
from opdsl.syntax.keywords import AXES, GRADES, KINDS, UNITS, VERSION, canonical
from opdsl.syntax.lalr import Node
from opdsl.syntax.tokens import Token

MAX_EXPRESSION_DEPTH = 128
_NO_LEVEL = frozenset(("arglist", "plain_arg", "named_arg", "mix_arg", "ramp_arg"))
_SPELLINGS = {"≤": "<=", "≥": ">=", "≠": "!="}


def too_deep(root: Node, limit: int = MAX_EXPRESSION_DEPTH) -> Node | None:
    """The first expression that lies deeper than `limit` levels, or None. Does not recurse."""
    stack = [(root, 0)]
    while stack:
        node, depth = stack.pop()
        if depth > limit:
            return node
        inner = depth + (node.data not in _NO_LEVEL)
        stack.extend((child, inner) for child in node.children if isinstance(child, Node))
    return None


class Builder:
    """Builds the AST of one source; `build` is the entry.

    The grammar leaves units, axes, grades and the version open; they are checked here, and the
    reports gathered in `problems`. What is wrong with them is left out of the tree.
    """

    def __init__(self, source: Source):
        self.source = source
        self.problems: list[Diagnostic] = []
        self.limit = len(source.text)

    # ---- helpers -------------------------------------------------------------------------

    def span(self, node: Node | Token) -> Span:
        return Span(self.source, min(node.start, self.limit), min(node.end, self.limit))

    def ident(self, token: Token) -> ast.Ident:
        return ast.Ident(canonical(token.text), self.span(token))

    def __call__(self, node: Any) -> Any:
        if node is None:
            return None
        return getattr(self, node.data)(node, node.children)

    def all(self, nodes: Any) -> tuple[Any, ...]:
        built = (self(node) for node in nodes)
        return tuple(value for value in built if value is not None)

    @staticmethod
    def string(token: Token | None) -> str | None:
        return None if token is None else token.text[1:-1]

    # ---- file ----------------------------------------------------------------------------

    def build(self, root: Node, comments: tuple[ast.Comment, ...]) -> ast.File:
        """Methods whose header was blanked (`hole`) are left out: they have no name."""
        version = 1
        imports: list[ast.Import] = []
        items: list[ast.Method | ast.Def | ast.Run] = []
        for child in root.children:
            if child.data == "header":
                number = child.children[1]
                version = int(number.text)
                if version != VERSION:
                    self.problems.append(messages.version(self.span(number), version))
            elif child.data in ("import_std", "import_file"):
                imports.append(self(child))
            elif child.data != "hole":
                items.append(self(child))
        whole = Span(self.source, 0, self.limit)
        return ast.File(self.source, version, tuple(imports), tuple(items), comments, whole)

    def import_std(self, node: Node, kids: list[Any]) -> ast.Import:
        _, path, names = kids
        parts = [token.text for token in path.children]
        idents = tuple(self.ident(token) for token in names.children)
        return ast.Import(".".join(parts), False, idents, self.span(node), self.span(path))

    def import_file(self, node: Node, kids: list[Any]) -> ast.Import:
        _, text, names = kids
        idents = tuple(self.ident(token) for token in names.children)
        return ast.Import(self.string(text) or "", True, idents, self.span(node), self.span(text))

    def method(self, node: Node, kids: list[Any]) -> ast.Method:
        name, rest = kids[1], kids[2:]
        extends = title = None
        if rest and isinstance(rest[0], Node) and rest[0].data == "extends":
            extends = self(rest.pop(0))
        if rest and isinstance(rest[0], Token):
            title = self.string(rest.pop(0))
        return ast.Method(self.ident(name), extends, title, self.all(rest), self.span(node))

    def extends(self, node: Node, kids: list[Any]) -> ast.Extends:
        args = self.arglist(kids[2]) if len(kids) > 2 else ()
        return ast.Extends(self.ident(kids[1]), args, self.span(node))

    # ---- statements ----------------------------------------------------------------------

    def override(self, node: Node, kids: list[Any]) -> ast.Override:
        return ast.Override(self(kids[1]), self.span(node))

    def cite(self, node: Node, kids: list[Any]) -> ast.Cite:
        return ast.Cite(kids[1].text, self.string(kids[2]) or "", self.span(node))

    def evidence(self, node: Node, kids: list[Any]) -> ast.Evidence | None:
        if kids[1].text not in GRADES:
            self.problems.append(messages.grade(self.span(kids[1]), kids[1].text))
            return None
        return ast.Evidence(kids[1].text, self.span(node))

    def accept(self, node: Node, kids: list[Any]) -> ast.Accept:
        keyword, rule, reason = kids
        return ast.Accept(
            keyword.text, self.ident(rule), self.string(reason) or "", self.span(node)
        )

    def param(self, node: Node, kids: list[Any]) -> ast.Param:
        _, name, type_, _in, domain, default = kids
        return ast.Param(
            self.ident(name), self(type_), self(domain), self(default), self.span(node)
        )

    def let(self, node: Node, kids: list[Any]) -> ast.Let:
        _, name, type_, value = kids
        return ast.Let(self.ident(name), self(type_), self(value), self.span(node))

    def teacher(self, node: Node, kids: list[Any]) -> ast.Teacher:
        _, name, value, _when, when = kids
        return ast.Teacher(self.ident(name), self(value), self(when), self.span(node))

    def section(self, node: Node, kids: list[Any]) -> ast.Section:
        return ast.Section(self.ident(kids[0]), self(kids[1]), self.span(node))

    def targeted(self, node: Node, kids: list[Any]) -> ast.Section:
        keyword, term, value = kids
        return ast.Section(self.ident(keyword), self(value), self.span(node), term=self.ident(term))

    def feedback(self, node: Node, kids: list[Any]) -> ast.Section:
        keyword, route, value = kids
        return ast.Section(self.ident(keyword), self(value), self.span(node), route=route.text)

    def assertion(self, node: Node, kids: list[Any]) -> ast.Section:
        message = self.string(kids[2]) if len(kids) > 2 else None
        return ast.Section(self.ident(kids[0]), self(kids[1]), self.span(node), message=message)

    def term_block(self, node: Node, kids: list[Any]) -> ast.TermBlock:
        return ast.TermBlock(self.ident(kids[1]), self.all(kids[2:]), self.span(node))

    def term_use(self, node: Node, kids: list[Any]) -> ast.TermUse:
        return ast.TermUse(self.ident(kids[1]), self(kids[2]), self.span(node))

    def optimize(self, node: Node, kids: list[Any]) -> ast.Optimize:
        return ast.Optimize(self.all(kids[1].children), self.span(node))

    def run_block(self, node: Node, kids: list[Any]) -> ast.Run:
        _, name, _of, method, block = kids
        return ast.Run(
            self.ident(name), self.ident(method), self.all(block.children), self.span(node)
        )

    def setting(self, node: Node, kids: list[Any]) -> ast.Setting:
        return ast.Setting(self.ident(kids[0]), self(kids[1]), self._upto(node, kids[-1]))

    def sweep(self, node: Node, kids: list[Any]) -> ast.Sweep:
        return ast.Sweep(self.ident(kids[1]), self.all(kids[3:]), self.span(node))

    def _upto(self, node: Node, last: Any) -> Span:
        """A setting's span without the comma that may follow it."""
        whole = self.span(node)
        text = whole.text
        if text.endswith(","):
            return Span(self.source, whole.start, whole.start + len(text[:-1].rstrip()))
        return whole

    # ---- definitions ---------------------------------------------------------------------

    def def_expr(self, node: Node, kids: list[Any]) -> ast.Def:
        _, name, params, type_, doc, result = kids
        return ast.Def(
            self.ident(name), self.all(params.children), self(type_), self.string(doc), (),
            self(result), False, self.span(node),
        )  # fmt: skip

    def def_block(self, node: Node, kids: list[Any]) -> ast.Def:
        _, name, params, type_, doc, *bindings, _return, result = kids
        return ast.Def(
            self.ident(name), self.all(params.children), self(type_), self.string(doc),
            self.all(bindings), self(result), True, self.span(node),
        )  # fmt: skip

    def fparam(self, node: Node, kids: list[Any]) -> ast.FormalParam:
        name, type_, _in, domain, default = kids
        return ast.FormalParam(
            self.ident(name), self(type_), self(domain), self(default), self.span(node)
        )

    def binding(self, node: Node, kids: list[Any]) -> ast.Binding:
        subscript = self(kids[1]) if isinstance(kids[1], Node) and len(kids) > 2 else None
        return ast.Binding(self.ident(kids[0]), subscript, self(kids[-1]), self.span(node))

    def type(self, node: Node, kids: list[Any]) -> ast.TypeExpr | None:
        unit, axes = kids[0], kids[2:]
        before = len(self.problems)
        if unit.text not in UNITS and unit.text not in KINDS:
            self.problems.append(messages.unit(self.span(unit), unit.text))
        for token in axes:
            if token.text not in AXES:
                self.problems.append(messages.axis(self.span(token), token.text))
        if len(self.problems) > before:
            return None
        return ast.TypeExpr(unit.text, tuple(token.text for token in axes), self.span(node))

    def interval(self, node: Node, kids: list[Any]) -> ast.Interval:
        left, low, high, right = kids
        return ast.Interval(
            self(low), self(high), left.type == "LPAR", right.type == "RPAR", self.span(node)
        )

    def choice(self, node: Node, kids: list[Any]) -> ast.Choice:
        return ast.Choice(self.all(kids), self.span(node))

    # ---- expressions ---------------------------------------------------------------------

    def name(self, node: Node, kids: list[Any]) -> ast.Name:
        return ast.Name(canonical(kids[0].text), self.span(node))

    def number(self, node: Node, kids: list[Any]) -> ast.Number:
        text = kids[0].text
        unit = None
        if kids[0].type == "QUANTITY":
            digits = text.rstrip("%abcdefghijklmnopqrstuvwxyz \t")
            unit = text[len(digits) :].strip()
            text = digits
        return ast.Number(float(text), text, unit, self.span(node))

    def text(self, node: Node, kids: list[Any]) -> ast.Text:
        return ast.Text(self.string(kids[0]) or "", self.span(node))

    def unary(self, node: Node, kids: list[Any]) -> ast.Unary:
        return ast.Unary(kids[0].text, self(kids[1]), self.span(node))

    def binary(self, node: Node, kids: list[Any]) -> ast.Binary:
        left, op, right = kids
        op = _SPELLINGS.get(op.text, op.text)
        return ast.Binary(op, self(left), self(right), self.span(node))

    def cond(self, node: Node, kids: list[Any]) -> ast.Cond:
        _, test, _, yes, _, no = kids
        return ast.Cond(self(test), self(yes), self(no), self.span(node))

    def index(self, node: Node, kids: list[Any]) -> ast.Index:
        return ast.Index(self(kids[0]), self(kids[1]), self.span(node))

    def attr(self, node: Node, kids: list[Any]) -> ast.Attr:
        return ast.Attr(self(kids[0]), canonical(kids[1].text), self.span(node))

    def call(self, node: Node, kids: list[Any]) -> ast.Call:
        args = self.arglist(kids[1]) if len(kids) > 1 else ()
        return ast.Call(self(kids[0]), args, self.span(node))

    def divergence(self, node: Node, kids: list[Any]) -> ast.Divergence:
        func, left, _, right = kids[:4]
        args = self.arglist(kids[4]) if len(kids) > 4 else ()
        return ast.Divergence(self(func), self(left), self(right), args, self.span(node))

    def reduce(self, node: Node, kids: list[Any]) -> ast.Reduce:
        func, var, _, domain, body = kids
        return ast.Reduce(self(func), self.ident(var), self(domain), self(body), self.span(node))

    def set_literal(self, node: Node, kids: list[Any]) -> ast.SetLiteral:
        return ast.SetLiteral(self.all(kids), self.span(node))

    def set_where(self, node: Node, kids: list[Any]) -> ast.SetWhere:
        var, _, domain, condition = kids
        return ast.SetWhere(self.ident(var), self(domain), self(condition), self.span(node))

    # ---- arguments -----------------------------------------------------------------------

    def arglist(self, node: Node) -> tuple[ast.Arg | ast.MixArg | ast.RampArg, ...]:
        return self.all(node.children)

    def named_arg(self, node: Node, kids: list[Any]) -> ast.Arg:
        return ast.Arg(canonical(kids[0].text), self(kids[1]), self.span(node))

    def plain_arg(self, node: Node, kids: list[Any]) -> ast.Arg:
        return ast.Arg(None, self(kids[0]), self.span(node))

    def mix_arg(self, node: Node, kids: list[Any]) -> ast.MixArg:
        return ast.MixArg(self(kids[0]), self(kids[1]), self.span(node))

    def ramp_arg(self, node: Node, kids: list[Any]) -> ast.RampArg:
        start, stop, _, over = kids
        return ast.RampArg(self(start), self(stop), self(over), self.span(node))
