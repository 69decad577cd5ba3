"""The canonical layout of a file: `opdsl fmt`.

Two spaces of indent; keywords, parameters and settings aligned within a group (statements
without a blank line between them); at most one blank line; Latin spelling of Greek letters.
Comments stay where they are: before a statement, after it on its line, between arguments, or at
the end of a block. One in the middle of an expression moves above its statement. Formatting
changes neither the tree nor a second time the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opdsl.diagnostics import CompileError
from opdsl.records import fields
from opdsl.source import Source, Span
from opdsl.syntax import tree as ast
from opdsl.syntax.expressions import Expressions, domain_text, flat, same_line, type_text
from opdsl.syntax.pretty import SOFT, SPACE, Cat, Doc, Group, Nest, cat, layout
from opdsl.syntax.tokens import scan

WIDTH = 100


def format_source(source: Source) -> str:
    """The canonical text of a source. Raises CompileError when it has syntax errors."""
    from opdsl.syntax import parse

    file, diagnostics = parse(source)
    if diagnostics or file is None:
        raise CompileError(diagnostics)
    return _File(file).text()


def format_file(file: ast.File) -> str:
    """The canonical text of a parsed file. Raises CompileError when its text has errors."""
    return format_source(file.source)


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal up to spans (comments by their texts)."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if type(a) is not type(b):
        return False
    if isinstance(a, (Span, Source)):
        return True
    if fields(a):
        return all(same(getattr(a, n), getattr(b, n)) for n in fields(a))
    return a == b


# ---- statements and blocks ---------------------------------------------------------------


@dataclass(slots=True)
class _Row:
    """One statement ready to print: columns to align, then a document, then perhaps a block.

    Rows of one `kind` next to each other share column widths.
    """

    kind: str
    columns: tuple[str, ...]
    doc: Doc = ""
    block: list[str] | None = None  # finished lines below, when the statement has a body
    leading: list[str] = field(default_factory=list)
    trailing: str = ""
    blank: bool = False  # a blank line before it


class _File:
    def __init__(self, file: ast.File):
        self.file = file
        self.source = file.source
        self.tokens, self.comments = scan(file.source)
        self.braces = self._match()

    def _match(self) -> dict[int, int]:
        """Offset of each `}` to the offset of its `{`."""
        stack: list[int] = []
        found: dict[int, int] = {}
        for token in self.tokens:
            if token.type == "LBRACE":
                stack.append(token.start)
            elif token.type == "RBRACE" and stack:
                found[token.start] = stack.pop()
        return found

    def between(self, start: int, end: int) -> list[ast.Comment]:
        return [c for c in self.comments if start <= c.span.start < end]

    def text(self) -> str:
        items: list[Any] = [*self.file.imports, *self.file.items]
        header = next((t.end for t in self.tokens[1:2]), 0)
        out = [c.text for c in self.between(0, header)]
        head = f"opd {self.file.version}"
        start = header
        own = self.between(header, items[0].span.start if items else len(self.source.text))
        if own and same_line(self.source, header, own[0].span.start):
            head += f"  {own[0].text}"
            start = own[0].span.end
        if out and self.blank_before(self.tokens[0].start):
            out.append("")
        out += [head, ""]
        rows, tail = self.rows(items, start, len(self.source.text))
        for i, row in enumerate(rows):
            separate = not (i and isinstance(items[i], ast.Import))
            row.blank = bool(i) and (separate or row.blank)
        out += self.lines(rows, 0)
        if tail:
            out += ([""] if out[-1] and tail[0] else []) + tail
        while out and not out[-1]:
            out.pop()
        return "\n".join(out) + "\n"

    def rows(self, items: list[Any], start: int, end: int) -> tuple[list[_Row], list[str]]:
        """A row per statement with its comments, and the comments after the last one."""
        rows: list[_Row] = []
        at = start
        for item in items:
            found = self.between(at, item.span.start)
            if found and rows and same_line(self.source, at, found[0].span.start):
                rows[-1].trailing = found.pop(0).text
            row = self.row(item)
            row.leading = self.block_of(found) + row.leading
            first = found[0].span.start if found else item.span.start
            row.blank = bool(rows) and self.blank_before(first)
            if found and self.blank_before(item.span.start):
                row.leading.insert(len(self.block_of(found)), "")
            rows.append(row)
            at = item.span.end
        found = self.between(at, end)
        if found and rows and same_line(self.source, at, found[0].span.start):
            rows[-1].trailing = found.pop(0).text
        tail = self.block_of(found)
        if tail and rows and self.blank_before(found[0].span.start):
            tail.insert(0, "")
        return rows, tail

    def block_of(self, comments: list[ast.Comment]) -> list[str]:
        """Comment lines, with at most one blank line where the text has some."""
        lines: list[str] = []
        for comment in comments:
            if lines and self.blank_before(comment.span.start):
                lines.append("")
            lines.append(comment.text)
        return lines

    def blank_before(self, offset: int) -> bool:
        text = self.source.text[:offset]
        return text[len(text.rstrip(" \t\r\n\f\u00a0")) :].count("\n") > 1

    def lines(self, rows: list[_Row], indent: int) -> list[str]:
        """The rows as text lines; runs of one kind are aligned."""
        out: list[str] = []
        ends: list[tuple[int, str]] = []  # (index of the line, trailing comment)
        for i, row in enumerate(rows):
            if row.blank:
                out.append("")
            out += [" " * indent + line if line else "" for line in row.leading]
            text = " " * indent + self.columns(rows, i)
            text += layout(row.doc, len(text), len(text), WIDTH)
            out += text.rstrip().split("\n") if row.block is None else [text.rstrip()]
            if row.trailing and row.block is None:
                ends.append((len(out) - 1, row.trailing))
            if row.block is not None:
                out += [" " * indent + line if line else "" for line in row.block]
                if row.trailing:
                    out[-1] += f"  {row.trailing}"
        self.attach(out, ends)
        return out

    def attach(self, out: list[str], ends: list[tuple[int, str]]) -> None:
        """Comments at the ends of lines; on neighbouring lines they start in one column."""
        run: list[tuple[int, str]] = []
        for i, (index, text) in enumerate(ends):
            run.append((index, text))
            if i + 1 == len(ends) or ends[i + 1][0] != index + 1:
                column = max(len(out[line]) for line, _ in run) + 2
                for line, comment in run:
                    out[line] = f"{out[line]:<{column}}{comment}"
                run = []

    def columns(self, rows: list[_Row], i: int) -> str:
        row = rows[i]
        low = high = i
        while low > 0 and rows[low - 1].kind == row.kind and not rows[low].blank:
            low -= 1
        while high + 1 < len(rows) and rows[high + 1].kind == row.kind and not rows[high + 1].blank:
            high += 1
        peers = [peer.columns for peer in rows[low : high + 1] if peer.columns]
        widths = [max((len(p[k]) for p in peers if k < len(p)), default=0) for k in range(8)]
        cells = [f"{cell:<{widths[k]}}" for k, cell in enumerate(row.columns) if widths[k]]
        text = " ".join(cells)
        return text + " " if text and row.doc != "" else text

    # ---- one row per kind of statement ---------------------------------------------------

    def row(self, node: Any) -> _Row:
        inner = self.inside(node)
        show = Expressions(tuple(inner))
        row = getattr(self, "row_" + type(node).__name__.lower())(node, show)
        if show.placed != len(inner):  # some comment has no place: all of them go above
            row = getattr(self, "row_" + type(node).__name__.lower())(node, Expressions())
            row.leading = self.block_of(inner) + row.leading
        return row

    def inside(self, node: Any) -> list[ast.Comment]:
        """Comments inside a statement but not inside its block, which keeps its own."""
        body = self.body(node)
        found = self.between(node.span.start, node.span.end)
        if body is None:
            return found
        start, end = body
        return [c for c in found if not start <= c.span.start < end]

    def body(self, node: Any) -> tuple[int, int] | None:
        """Offsets between the braces of a node's block; None when it has none."""
        if isinstance(node, ast.Override):
            node = node.statement
        is_block = isinstance(node, (ast.Method, ast.Run, ast.Optimize, ast.TermBlock))
        if not (is_block or (isinstance(node, ast.Def) and node.is_block)):
            return None
        close = node.span.end - 1
        return self.braces[close] + 1, close

    def block(self, items: tuple[Any, ...], node: Any) -> tuple[list[str], str]:
        """The lines of a block with its closing brace, and the comment after the opening one."""
        body = self.body(node)
        assert body is not None
        start, end = body
        found = self.between(start, items[0].span.start if items else end)
        head = ""
        if found and same_line(self.source, start, found[0].span.start):
            head = f"  {found[0].text}"
            start = found[0].span.end
        rows, tail = self.rows(list(items), start, end)
        lines = self.lines(rows, 2) + ["  " + line if line else "" for line in tail]
        return [*lines, "}"], head

    def row_import(self, node: ast.Import, show: Expressions) -> _Row:
        target = f'"{node.target}"' if node.is_file else node.target
        names = ", ".join(name.name for name in node.names)
        return _Row("import", (f"import {target}",), f"({names})")

    def row_method(self, node: ast.Method, show: Expressions) -> _Row:
        parts: list[Doc] = [f"method {node.name.name}"]
        if node.extends is not None:
            parts.append(f" extends {node.extends.base.name}")
            if node.extends.args:
                extends = node.extends
                args = show.args(extends.args, extends.base.span.end, extends.span.end)
                parts.append(Group(cat("(", Nest(2, cat(SOFT, args)), ")")))
        if node.title is not None:
            parts.append(f' "{node.title}"')
        return self.with_block("method", (), Cat(tuple(parts)), node.body, node)

    def with_block(
        self, kind: str, columns: tuple[str, ...], head: Doc, items: tuple[Any, ...], node: Any
    ) -> _Row:
        lines, comment = self.block(items, node)
        if lines == ["}"] and not comment:
            return _Row(kind, columns, cat(head, " { }"))
        return _Row(kind, columns, cat(head, " {" + comment), lines)

    def row_run(self, node: ast.Run, show: Expressions) -> _Row:
        head = f"run {node.name.name} of {node.method.name}"
        return self.with_block("run", (), head, node.settings, node)

    def row_def(self, node: ast.Def, show: Expressions) -> _Row:
        head = self.signature(node)
        doc = [f'  "{node.doc}"'] if node.doc is not None else []
        if node.is_block:
            ending = ast.Binding(  # `return` prints as the last line of the block
                ast.Ident("return", node.result.span), None, node.result,
                self.return_span(node),
            )  # fmt: skip
            lines, comment = self.block((*node.bindings, ending), node)
            if doc:
                return _Row("def", (), head, [*doc, "{" + comment, *lines])
            return _Row("def", (), f"{head} {{{comment}", lines)
        result = show.doc(node.result)
        if doc:
            value = "  = " + layout(result, 4, 4, WIDTH)
            return _Row("def", (), head, [*doc, *value.split("\n")])
        return _Row("def", (), cat(head, Group(Nest(2, cat(SPACE, "= ", result)))))

    def return_span(self, node: ast.Def) -> Span:
        """The span of `return …`: the word is the last one before the result."""
        before = [t for t in self.tokens if t.text == "return" and t.end <= node.result.span.start]
        last = self.tokens[-1].end
        close = node.span.end - 1
        for token in self.tokens:
            if token.end <= close:
                last = token.end
        return Span(self.source, before[-1].start, last)

    def signature(self, node: ast.Def) -> str:
        """`def name(parameters) : type`, filled to the width, hanging from the bracket."""
        text = f"def {node.name.name}("
        hang, column, lines = len(text), len(text), [text]
        tail = f") : {type_text(node.type)}" if node.type else ")"
        for i, param in enumerate(node.params):
            last = i == len(node.params) - 1
            piece = self.formal(param) + (tail if last else ",")
            space = 0 if column == hang else 1
            if column > hang and column + space + len(piece) + (0 if last else 1) > WIDTH:
                lines.append(" " * hang)
                column, space = hang, 0
            lines[-1] += " " * space + piece
            column += space + len(piece)
        if not node.params:
            lines[-1] += tail
        return "\n".join(lines)

    def formal(self, node: ast.FormalParam) -> str:
        text = node.name.name
        if node.type is not None:
            text += f" : {type_text(node.type)}"
        if node.domain is not None:
            text += f" in {domain_text(node.domain)}"
        if node.default is not None:
            text += f" = {flat(Expressions().doc(node.default))}"
        return text

    def row_binding(self, node: ast.Binding, show: Expressions) -> _Row:
        name = node.name.name
        if name == "return":
            return _Row("return", ("return",), show.doc(node.value))
        if node.subscript is not None:
            name += f"[{flat(show.doc(node.subscript))}]"
        return _Row("binding", (name,), cat("= ", show.doc(node.value)))

    def row_cite(self, node: ast.Cite, show: Expressions) -> _Row:
        return _Row("section", ("cite",), f'{node.kind} "{node.value}"')

    def row_evidence(self, node: ast.Evidence, show: Expressions) -> _Row:
        return _Row("section", ("evidence",), node.grade)

    def row_accept(self, node: ast.Accept, show: Expressions) -> _Row:
        return _Row("section", (node.keyword,), f'{node.rule.name} "{node.reason}"')

    def row_param(self, node: ast.Param, show: Expressions) -> _Row:
        type_ = f": {type_text(node.type)}" if node.type is not None else ""
        domain = f"in {domain_text(node.domain)}" if node.domain is not None else ""
        columns = ("param", node.name.name, type_, domain)
        return _Row("param", columns, cat("= ", show.doc(node.default)))

    def row_let(self, node: ast.Let, show: Expressions) -> _Row:
        type_ = f" : {type_text(node.type)}" if node.type is not None else ""
        return _Row("let", ("let",), cat(f"{node.name.name}{type_} = ", show.doc(node.value)))

    def row_teacher(self, node: ast.Teacher, show: Expressions) -> _Row:
        value = show.doc(node.value)
        if node.when is not None:
            value = Group(Nest(2, cat(value, SPACE, "when ", show.doc(node.when))))
        return _Row("section", ("teacher",), cat(f"{node.name.name} = ", value))

    def row_section(self, node: ast.Section, show: Expressions) -> _Row:
        value = show.doc(node.value)
        keyword = node.keyword.name
        if node.term is not None:
            return _Row(f"{keyword}:", (f"{keyword} {node.term.name}:",), value)
        if node.route is not None:
            value = cat(f"{node.route} ", value)
        if node.message is not None:
            value = cat(value, f' "{node.message}"')
        return _Row("section", (keyword,), value)

    def row_termblock(self, node: ast.TermBlock, show: Expressions) -> _Row:
        return self.compact("term", f"term {node.name.name}", node.body, node, 1)

    def row_termuse(self, node: ast.TermUse, show: Expressions) -> _Row:
        return _Row("use", ("term", node.name.name), cat("= ", show.doc(node.value)))

    def row_optimize(self, node: ast.Optimize, show: Expressions) -> _Row:
        return self.compact("optimize", "optimize", node.settings, node, 8)

    def compact(self, kind: str, head: str, items: tuple[Any, ...], node: Any, most: int) -> _Row:
        """A block kept on one line where it was on one line, fits, and is short enough."""
        row = self.with_block(kind, (), head, items, node)
        start, end = self.body(node) or (0, 0)
        if row.block is None or len(items) > most or not same_line(self.source, start, end):
            return row
        pieces = [self.row(item) for item in items]
        line = "  ".join(" ".join((*p.columns, flat(p.doc))).rstrip() for p in pieces)
        text = f"{head} {{ {line} }}"
        return _Row(kind, (), text) if len(text) <= WIDTH - 4 else row

    def row_setting(self, node: ast.Setting, show: Expressions) -> _Row:
        return _Row("setting", (node.name.name,), cat("= ", show.doc(node.value)))

    def row_sweep(self, node: ast.Sweep, show: Expressions) -> _Row:
        items = ", ".join(flat(show.doc(value)) for value in node.values)
        return _Row("setting", ("sweep",), f"{node.name.name} in {{ {items} }}")

    def row_override(self, node: ast.Override, show: Expressions) -> _Row:
        row = getattr(self, "row_" + type(node.statement).__name__.lower())(node.statement, show)
        if row.columns:
            columns = (f"override {row.columns[0]}", *row.columns[1:])
            return _Row(f"override {row.kind}", columns, row.doc, row.block)
        return _Row(f"override {row.kind}", (), cat("override ", row.doc), row.block)
