"""Sources of row kernels: expressions over the vocabulary as Triton text, one program per row.

A kernel walks over a row of V words in blocks. It reads tiles [n, V] (logits, masks) once per
block, numbers of the row before the loop, and computes any of

    lse     log Σ exp x, online: the running maximum is moved to, sums are rescaled
    mean    Σ exp(x) u / Σ exp(x) for the x of an lse, in the same sweep
    sum     Σ x, one partial sum per lane
    max     the largest x
    tile    x itself, written out
    points  x at given ids only, plus what is given for those ids

Everything is float32 whatever the tiles hold. Names are made here (a letter and a number) and
numbers are printed by `repr`: nothing a user wrote reaches a kernel. `check_kernel` parses the
text and refuses anything else.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from opdsl.emit.module import number
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis

FLOOR = "-1e+30"  # log 0, as in prelude.py
Leaf = tuple[str, float]  # a distribution at a temperature


class Unsupported(Exception):
    """A value that no kernel here computes."""


@dataclass(frozen=True)
class Kernel:
    """A kernel and what its launch passes, as texts of the pass that launches it.

    text       def kernel(p1, q1, …, r1, …, o1, …, V, BLOCK): tiles with row strides, rows, results
    tiles      [n, V] tensors, those that are written included
    rows       numbers per row, or one for all
    results    how many numbers per row it gives
    points     whether it works at ids: three more pointers (ids, given, out [n, K]) and K for V
    """

    text: str
    tiles: tuple[str, ...]
    rows: tuple[str, ...]
    results: int
    points: bool = False


class Body:
    """Collects one kernel. `names`: text of each row number; `lse`: of each log-sum-exp.

    `instead`: what is compared in place of a comparison (`triton_exact.py`).
    """

    def __init__(
        self,
        names: Mapping[int, str],
        tile_text: Callable[[Node], str],
        lse: Mapping[Leaf, str],
        logits: Callable[[Leaf], str],
        instead: Mapping[int, Node],
    ):
        self.names, self.tile_text, self.lse, self.logits = names, tile_text, lse, logits
        self.instead = instead
        self.tiles: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self.start: list[str] = []  # before the loop
        self.loop: list[str] = []
        self.end: list[str] = []
        self.values: dict[object, str] = {}
        self.results = self.made = 0

    # -- leaves ----------------------------------------------------------------------------------
    def fresh(self, prefix: str) -> str:
        self.made += 1
        return f"{prefix}{self.made}"

    def let(self, key: object, text: str, prefix: str = "x") -> str:
        """A value of one block, computed once."""
        if key not in self.values:
            self.values[key] = self.fresh(prefix)
            self.loop.append(f"{self.values[key]} = {text}")
        return self.values[key]

    def tile(self, text: str) -> str:
        i = self.tiles.setdefault(text, len(self.tiles) + 1)
        load = f"tl.load(p{i} + row * q{i} + col, mask=real, other=0.0).to(tl.float32)"
        return self.let(("tile", text), load, "z")

    def row(self, text: str) -> str:
        """A number of the row; the same text is read once."""
        if text not in self.rows:
            i = self.rows[text] = len(self.rows) + 1
            self.start.append(f"a{i} = tl.load(r{i} + row)")
        return f"a{self.rows[text]}"

    def scaled(self, leaf: Leaf) -> str:
        """Logits over the temperature."""
        z = self.tile(self.logits(leaf))
        return (
            z
            if leaf[1] == 1.0
            else self.let(("scaled", leaf), f"tl.div_rn({z}, {number(leaf[1])})")
        )

    def combination(self, parts: tuple[tuple[Leaf, float], ...]) -> str:
        """Σ c z / T, differences of logits taken first."""
        key = ("combination", parts)
        if key in self.values:
            return self.values[key]
        text = ""
        for leaf, c in parts:
            z = self.scaled(leaf)
            factor = z if abs(c) == 1.0 else f"{number(abs(c))} * {z}"
            sign = "-" if c < 0 else "+"
            text = f"{text} {sign} {factor}" if text else factor if c > 0 else f"-{factor}"
        if len(parts) == 1 and parts[0][1] == 1.0:
            return text
        return self.let(key, text or "0.0")

    # -- what a kernel gives -----------------------------------------------------------------------
    def result(self, text: str) -> int:
        self.results += 1
        self.end.append(f"tl.store(o{self.results} + row, {text})")
        return self.results - 1

    def online(self, x: str, means: tuple[str, ...] = ()) -> list[int]:
        """log Σ exp x and the exp(x)-weighted means of other values, in one sweep."""
        m, e, top, w = (self.fresh(c) for c in "mehw")
        sums = [self.fresh("s") for _ in means]
        self.start += [f"{m} = float('-inf')", f"{e} = 0.0", *(f"{s} = 0.0" for s in sums)]
        self.loop += [
            f"{w} = tl.where(real, {x}, float('-inf'))",
            f"{top} = tl.maximum({m}, tl.max({w}, 0))",
            f"{w} = tl.exp({w} - {top})",
            f"{m} = tl.exp({m} - {top})",
            f"{e} = {e} * {m} + tl.sum({w}, 0)",
        ]
        for s, u in zip(sums, means):
            self.loop.append(f"{s} = {s} * {m} + tl.sum(tl.where(real, {w} * {u}, 0.0), 0)")
        self.loop.append(f"{m} = {top}")
        return [self.result(f"{m} + tl.log({e})"), *(self.result(f"{s} / {e}") for s in sums)]

    def sum(self, x: str) -> int:
        s = self.fresh("s")
        self.start.append(f"{s} = tl.zeros([BLOCK], tl.float32)")
        self.loop.append(f"{s} += tl.where(real, {x}, 0.0)")
        return self.result(f"tl.sum({s}, 0)")

    def largest(self, x: str) -> int:
        """0 of no real entry, as prelude.largest."""
        m = self.fresh("m")
        self.start.append(f"{m} = tl.full([BLOCK], float('-inf'), tl.float32)")
        self.loop.append(f"{m} = tl.maximum({m}, tl.where(real, {x}, float('-inf')))")
        self.end.append(f"{m} = tl.max({m}, 0)")
        return self.result(f"tl.where({m} > -5e+29, {m}, 0.0)")

    def write(self, text: str, x: str) -> None:
        """Entries into a tile [n, V]. Its own block was read before, so logits may be written over."""
        i = self.tiles.setdefault(text, len(self.tiles) + 1)
        self.loop.append(f"tl.store(p{i} + row * q{i} + col, {x}, mask=real)")

    # -- expressions -------------------------------------------------------------------------------
    def value(self, n: Node) -> str:
        """A node as a block of entries, a number of the row, or a literal."""
        if n.value is not None:
            if n.q.unit == "bool":
                return "(col >= 0)" if n.value else "(col < 0)"
            text = number(n.value)
            return f"({text})" if text.startswith("-") else text
        if n.q.axis is not Axis.VOCAB:
            text = self.row(self.names[n.id])
            if n.q.unit != "bool":
                return text
            return self.let(("test", n.id), f"{text} + tl.zeros([BLOCK], tl.float32) != 0.0")
        if n.id not in self.values:
            rule = getattr(self, f"_{n.op}", None)
            text = rule(n) if rule is not None else self.simple(n)
            self.let(n.id, text)
        return self.values[n.id]

    def simple(self, n: Node) -> str:
        table = {
            "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "neg": "-{0}",
            "lt": "{0} < {1}", "le": "{0} <= {1}", "eq": "{0} == {1}",
            "and": "{0} & {1}", "or": "{0} | {1}", "not": "tl.where({0}, 0.0, 1.0) > 0.5",
            "exp": "tl.exp({0})", "abs": "tl.abs({0})", "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))",
            "min": "tl.where({0} <= {1}, {0}, {1})", "max": "tl.where({0} >= {1}, {0}, {1})",
            "where": "tl.where({0}, {1}, {2})",
        }  # fmt: skip
        if n.op not in table:
            raise Unsupported(n.op)
        args = self.instead.get(n.id, n).args
        return table[n.op].format(*(self.value(a) for a in args))

    def _logp(self, n: Node) -> str:
        leaf = leaf_of(n)
        return f"{self.scaled(leaf)} - {self.row(self.lse[leaf])}"

    def _div(self, n: Node) -> str:
        (a, b), (_, bottom) = (self.value(x) for x in n.args), n.args
        if not bottom.q.low <= 0 <= bottom.q.high:
            return f"{a} / {b}"
        if n.args[0].value is not None:
            zero = n.args[0].value == 0
            return f"tl.where({b} == 0.0, 0.0, {a} / {b})" if zero else f"{a} / {b}"
        return f"tl.where({a} == 0.0, tl.where({b} == 0.0, 0.0, {a} / {b}), {a} / {b})"

    def _log(self, n: Node) -> str:
        x = self.value(n.args[0])
        return f"tl.where({x} > 0.0, tl.log(tl.where({x} > 0.0, {x}, 1.0)), {FLOOR})"

    def _tanh(self, n: Node) -> str:
        """By the exponential, and by its series where that cancels."""
        x = self.value(n.args[0])
        t = self.let(("tanh", n.id), f"tl.exp(-2.0 * tl.abs({x}))")
        u = self.let(("square", n.id), f"{x} * {x}")
        far = f"tl.where({x} < 0.0, {t} - 1.0, 1.0 - {t}) / (1.0 + {t})"
        near = f"{x} * (1.0 - {u} * (0.3333333333 - {u} * (0.1333333333 - {u} * 0.0539682540)))"
        return f"tl.where(tl.abs({x}) < 0.1, {near}, {far})"

    def _logaddexp(self, n: Node) -> str:
        a, b = (self.value(x) for x in n.args)
        return f"tl.maximum({a}, {b}) + tl.log(1.0 + tl.exp(-tl.abs({a} - {b})))"

    def _pow(self, n: Node) -> str:
        x, p = n.args
        if x.op == "exp":
            return f"tl.exp({self.value(x.args[0])} * {self.value(p)})"
        a, power = self.value(x), p.value
        if power is not None and abs(power) <= 4 and power == int(power):
            text = " * ".join([a] * int(abs(power))) or "tl.where(real, 1.0, 1.0)"
            return text if power >= 0 else f"1.0 / ({text})"
        if x.q.low < 0:
            raise Unsupported("a power of a number that may be negative")
        b = self.value(p)
        zero = f"tl.where({b} + tl.zeros([BLOCK], tl.float32) > 0.0, 0.0, tl.where({b} == 0.0, 1.0, float('inf')))"
        return f"tl.where({a} > 0.0, tl.exp({b} * tl.log(tl.where({a} > 0.0, {a}, 1.0))), {zero})"

    def _is_y(self, n: Node) -> str:
        return f"col == {self.row('y')}"

    def _in_set(self, n: Node) -> str:
        return f"{self.tile(self.tile_text(n))} != 0.0"

    def _put_set(self, n: Node) -> str:
        return self.tile(self.tile_text(n))

    # -- the text ----------------------------------------------------------------------------------
    def arguments(self) -> list[str]:
        tiles = [x for i in range(1, len(self.tiles) + 1) for x in (f"p{i}", f"q{i}")]
        return [*tiles, *(f"r{i}" for i in range(1, len(self.rows) + 1))]

    def kernel(self) -> Kernel:
        """A sweep over the row."""
        outs = [f"o{i}" for i in range(1, self.results + 1)]
        lines = [
            f"def kernel({', '.join([*self.arguments(), *outs, 'V'])}, BLOCK: tl.constexpr):",
            "    row = tl.program_id(0).to(tl.int64)",
            "    lane = tl.arange(0, BLOCK)",
            *(f"    {line}" for line in self.start),
            "    for start in range(0, V, BLOCK):",
            "        col = start + lane",
            "        real = col < V",
            *(f"        {line}" for line in self.loop),
            *(f"    {line}" for line in self.end),
        ]
        return self._made(lines, False)

    def points(self, x: str) -> Kernel:
        """The value at ids [n, K], plus the sum of what is given for the same id."""
        lines = [
            f"def kernel({', '.join([*self.arguments(), 'ids', 'given', 'out', 'K'])}, "
            "BLOCK: tl.constexpr):",
            "    row = tl.program_id(0).to(tl.int64)",
            "    lane = tl.arange(0, BLOCK)",
            *(f"    {line}" for line in self.start),
            "    for start in range(0, K, BLOCK):",
            "        place = start + lane",
            "        real = place < K",
            "        col = tl.load(ids + row * K + place, mask=real, other=0)",
            *(f"        {line}" for line in self.loop),
            "        more = tl.zeros([BLOCK], tl.float32)",
            "        for k in range(0, K):",
            "            same = col == tl.load(ids + row * K + k)",
            "            more += tl.where(same, tl.load(given + row * K + k), 0.0)",
            f"        tl.store(out + row * K + place, {x} + more, mask=real)",
        ]
        return self._made(lines, True)

    def _made(self, lines: list[str], points: bool) -> Kernel:
        text = "\n".join(lines) + "\n"
        check_kernel(text)
        return Kernel(text, tuple(self.tiles), tuple(self.rows), self.results, points)


def leaf_of(n: Node) -> Leaf:
    return str(n.attr("dist")), float(n.attr("temperature"))  # type: ignore[arg-type]


# ---- the safety net ------------------------------------------------------------------------------

_ALLOWED = (
    ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Expr, ast.Assign, ast.AugAssign, ast.For,
    ast.Name, ast.Load, ast.Store, ast.Constant, ast.Call, ast.Attribute, ast.List, ast.keyword,
    ast.BinOp, ast.UnaryOp, ast.Compare, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub, ast.BitAnd, ast.BitOr, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq,
)  # fmt: skip
_NAMES = {
    "kernel", "tl", "row", "lane", "start", "col", "real", "V", "K", "BLOCK", "place", "ids", "given",
    "out", "more", "same", "k", "range", "float",
}  # fmt: skip
_FUNCTIONS = {
    "load", "store", "where", "exp", "log", "abs", "div_rn", "maximum", "max", "sum", "zeros", "full",
    "arange", "program_id", "to", "float32", "int64", "constexpr",
}  # fmt: skip


def check_kernel(text: str) -> None:
    """Raises AssertionError if a kernel holds anything a kernel has no business holding."""
    for node in ast.walk(ast.parse(text)):
        assert isinstance(node, _ALLOWED), f"kernel with {type(node).__name__}"
        if isinstance(node, ast.Name | ast.arg):
            name = node.id if isinstance(node, ast.Name) else node.arg
            generated = name[:1] in "apqrozxmehws" and name[1:].isdigit()
            assert generated or name in _NAMES, f"kernel with name {name}"
        if isinstance(node, ast.Attribute):
            assert node.attr in _FUNCTIONS, f"kernel with attribute {node.attr}"
        if isinstance(node, ast.Constant):
            fine = isinstance(node.value, int | float) or node.value in ("inf", "-inf")
            assert fine, f"kernel with constant {node.value!r}"
