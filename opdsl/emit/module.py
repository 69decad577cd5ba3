"""From a program to readable PyTorch text: one function per pass, a value used once in its place.

The text is built from validated numbers and names made here; nothing a user wrote is copied into
code (their words appear in comments, stripped of anything but printable characters). `check`
parses the result and refuses anything outside a short list of syntax.
"""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from opdsl.ir.program import Program
from opdsl.ir.stages import Stage, Staged, stage
from opdsl.meaning.node import COUPLING_OPS, OPS, SET_OPS, Node
from opdsl.meaning.quantity import Axis


@dataclass(frozen=True)
class Emitted:
    """text: the passes of a program; staged: what they are."""

    text: str
    staged: tuple[Staged, ...]

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        return tuple(sorted({n for s in self.staged for st in s.stages for n in _inputs(st)}))


def emit(program: Program, comments: bool = False) -> Emitted:
    """The passes of a program; with comments, what each group of statements comes from."""
    staged = tuple(stage(program, p) for p in program.parts)
    chunks = [text for s in staged for text in _part(s, comments)]
    text = "\n\n\n".join(chunks) + "\n"
    check(text)
    return Emitted(text, staged)


def _part(s: Staged, comments: bool) -> Iterable[str]:
    for st in s.stages:
        yield Writer(s, st, comments).function()


def function_name(rows: str, st: Stage) -> str:
    return f"{rows}_{st.kind}_{st.level + 1}"


def _inputs(st: Stage) -> list[str]:
    return [
        input_key(n) for n in st.nodes if n.op == "input" and n.attr("name") not in ("one", "step")
    ]


def input_key(n: Node) -> str:
    """Name under which the driver hands in an input."""
    name = str(n.attr("name"))
    if name == "field":
        return f"field_{_mangle(str(n.attr('field')))}_{_stable(str(n.attr('equals')))}"
    if name == "values":
        return f"values_{_mangle(str(n.attr('critic')))}"
    if name == "noise":
        return f"noise_{n.attr('k')}"
    return name


def _mangle(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):x}_" for c in text)[:60]


def _stable(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:8]


def number(value: float) -> str:
    assert math.isfinite(value), value
    return repr(float(value))


GATHERS = ("at_y", "at_set", "top", "top_p")  # what reads a distribution without all of its entries
INLINE = frozenset(
    [
        "add",
        "sub",
        "mul",
        "neg",
        "div",
        "exp",
        "tanh",
        "sigmoid",
        "lt",
        "le",
        "eq",
        "and",
        "or",
        "not",
    ]
)
INLINE_WIDTH = 60  # characters of a value that is written where it is used, if it is used once


class Writer:
    """Writes the function of one pass."""

    across = ""  # where the functions that reduce or gather over the words come from

    def __init__(self, staged: Staged, st: Stage, comments: bool = False):
        self.staged, self.st, self.comments = staged, st, comments
        self.topic = ""
        self.names: dict[int, str] = {}
        self.lines: list[str] = []
        self.rows = st.kind == "rows"
        self.count = 0

    def function(self) -> str:
        name = function_name(self.staged.rows, self.st)
        if self.rows:
            head = [f"def {name}(d, r, like):", "    y = r['y']", "    n = y.numel()"]
            if any(True for n in self.st.nodes if n.q.axis is Axis.VOCAB) or self.last:
                head.append("    v = d['student'].z.shape[1]")
        else:
            head = [f"def {name}(b, x, like):"]
        for n in self.st.imports:
            value = f"{'r' if self.rows else 'x'}['{key(n)}']"
            if self.uses[n.id] == 1 and self.axis(n) is not Axis.SEQ:
                self.names[n.id] = value
                continue
            var = self.fresh(n)
            if self.axis(n) is Axis.SEQ:  # crosses passes as one number per row
                value = f"b.per_seq({value})"
            self.lines.append(f"{var} = {value}")
        for n in self.st.nodes:
            self.statement(n)
        self.finish()
        return "\n".join([*head, *(f"    {line}" for line in self.lines)])

    @property
    def last(self) -> bool:
        return self.st is self.staged.last

    def fresh(self, n: Node) -> str:
        self.count += 1
        prefix = "s" if n.op in SET_OPS else "x"
        self.names[n.id] = f"{prefix}{self.count}"
        return self.names[n.id]

    # -- shapes ----------------------------------------------------------------------------
    def axis(self, n: Node) -> Axis:
        """Axis as laid out here: inside row passes sequence values are per row already."""
        a = n.q.axis
        if a is Axis.PROMPT:
            a = Axis.SEQ
        return Axis.TOK if a is Axis.SEQ and self.rows else a

    def use(self, n: Node, axis: Axis) -> str:
        """A value lined up with values of `axis`."""
        var, have = self.names[n.id], self.axis(n)
        if have is Axis.SEQ and axis is Axis.TOK:
            var = f"{var}[b.seq]"
            have = Axis.TOK
        if have is Axis.TOK and axis is Axis.VOCAB:
            var = f"{var}[:, None]"
        return var

    def args(self, n: Node) -> list[str]:
        return [self.use(a, self.axis(n)) for a in n.args]

    def full(self, n: Node, axis: Axis) -> str:
        """A value expanded to [N] or [B] (constants are plain numbers otherwise)."""
        var = self.use(n, axis)
        return f"b.{'rows' if axis is Axis.TOK else 'seqs'}({var}, like)"

    def tensor(self, n: Node, var: str) -> str:
        """Numbers of the method are plain or [], everything that varies is a tensor already."""
        device = "y.device" if self.rows else "b.seq.device"
        constant = n.q.axis is Axis.CONST
        return f"torch.as_tensor({var}, dtype=like, device={device})" if constant else var

    def entry(self, n: Node) -> str:
        """A value as a tensor that lines up with the entries of a set."""
        return self.tensor(n, self.use(n, Axis.VOCAB))

    # -- statements --------------------------------------------------------------------------
    def statement(self, n: Node) -> None:
        if n.op in ("const", "full"):  # written where they are used
            value = self._const(n) if n.op == "const" else "None"
            self.names[n.id] = f"({value})" if value.startswith("-") else value
            return
        if n.op == "logp" and not self._read_dense(n):
            return  # gathers below read the distribution itself
        right = getattr(self, f"_{n.op}", None)
        text = right(n) if right is not None else self.simple(n)
        if n.op == "input" and "[" in text and self.uses[n.id] == 1:
            self.names[n.id] = text
            return
        if n.op in INLINE and self.uses[n.id] == 1 and len(text) <= INLINE_WIDTH:
            call = n.op in ("exp", "tanh", "sigmoid")
            self.names[n.id] = text if call else f"({text})"
            return
        line = f"{self.fresh(n)} = {text}"
        note = self.note(n) if self.comments and "#" not in line else ""
        self.lines.append(f"{line}  # {note}" if note else line)

    @cached_property
    def uses(self) -> Counter[int]:
        """How often the text of a value is written in this pass; what leaves it counts twice."""
        found: Counter[int] = Counter()
        for n in self.st.nodes:
            twice = n.op in ("min", "max")
            for a in n.args:
                found[a.id] += 2 if twice else 1
        leaving = list(self.st.exports)
        if self.last:
            s = self.staged
            leaving += [s.total, *(n for _, n in (*s.terms, *s.gates))]
            leaving += [r for c in s.cotangents for r in c.roots]
        for n in leaving:
            found[n.id] += 2
        return found

    # -- comments ------------------------------------------------------------------------------
    def note(self, n: Node) -> str:
        """What a statement is, or the text that this and the next statements come from."""
        if n.op in ("at_y", "at_set") and n.args[0].op == "logp":
            return f"log {self.words(n.args[0])}[{'y' if n.op == 'at_y' else 'v'}]"
        if n.op == "add_bin":
            return "with the log of the remaining mass"
        if n.op in COUPLING_OPS:
            return OPS[n.op]
        topic = comment_text(n.span.text) or "derived"
        if n.op == "logp" or topic == self.topic:
            return ""
        self.topic = topic
        return topic

    @staticmethod
    def words(leaf: Node) -> str:
        name = comment_text(str(leaf.attr("dist")))
        t = float(leaf.attr("temperature"))  # type: ignore[arg-type]
        return name if t == 1.0 else f"{name} at temperature {t:g}"

    def simple(self, n: Node) -> str:
        a = self.args(n)
        table = {
            "add": "{0} + {1}",
            "sub": "{0} - {1}",
            "mul": "{0} * {1}",
            "neg": "-{0}",
            "lt": "{0} < {1}",
            "le": "{0} <= {1}",
            "eq": "{0} == {1}",
        }
        if n.op in table:
            return table[n.op].format(*a)
        if n.op in ("exp", "tanh", "sigmoid"):
            return f"torch.{n.op}({bare(self.tensor(n.args[0], a[0]))})"
        if n.op == "abs":
            return f"abs({a[0]})"
        raise AssertionError(n.op)

    def _const(self, n: Node) -> str:
        value = float(n.attr("value"))  # type: ignore[arg-type]
        if n.q.unit == "bool":
            return "True" if value else "False"
        return number(value)

    def _param(self, n: Node) -> str:
        return f"{number(float(n.attr('value')))}  # {_mangle(str(n.attr('name')))}"  # type: ignore[arg-type]

    def _schedule(self, n: Node) -> str:
        over = n.attr("over")
        kind = "cosine" if n.attr("kind") == "cosine" else "linear"
        store = "r" if self.rows else "x"
        start, stop = number(float(n.attr("start"))), number(float(n.attr("stop")))  # type: ignore[arg-type]
        length = "None" if over is None else number(float(over))  # type: ignore[arg-type]
        return f"schedule('{kind}', {start}, {stop}, {length}, {store}['step'], {store}['total_steps'])"

    def _input(self, n: Node) -> str:
        store = "r" if self.rows else "x"
        name = n.attr("name")
        if name == "one":
            size = "n" if self.rows else "b.n" if n.q.axis is Axis.TOK else "b.b"
            device = "y.device" if self.rows else "b.seq.device"
            return f"torch.ones({size}, dtype=like, device={device})"
        if name == "step":
            return f"float({store}['step'])"
        return f"{store}['{input_key(n)}']"

    def _logp(self, n: Node) -> str:
        return f"{self.dist(n)}.full()"

    def _read_dense(self, leaf: Node) -> bool:
        users = [u for u in self.st.nodes if leaf in u.args]
        roots = [c.dense for c in self.staged.cotangents] if self.last else []
        return any(u.op not in GATHERS for u in users) or leaf in roots

    def dist(self, leaf: Node) -> str:
        temperature = float(leaf.attr("temperature"))  # type: ignore[arg-type]
        base = f"d['{_mangle(str(leaf.attr('dist')))}']"
        return base if temperature == 1.0 else f"{base}.tempered({number(temperature)})"

    # sets
    def _sampled(self, n: Node) -> str:
        return "(y[:, None], torch.ones_like(y[:, None], dtype=torch.bool))"

    def _top(self, n: Node) -> str:
        x, k = n.args[0], int(n.attr("k"))  # type: ignore[call-overload]
        if x.op != "logp":
            return f"{self.across}top({self.names[x.id]}, {k})"
        # a temperature does not change the order: a served teacher's own list will do
        return f"d['{_mangle(str(x.attr('dist')))}'].top({k})"

    def _top_p(self, n: Node) -> str:
        p, k = number(float(n.attr("p"))), int(n.attr("k"))  # type: ignore[arg-type,call-overload]
        x = n.args[0]
        if x.op == "logp":
            return f"{self.dist(x)}.top_p({p}, {k})"
        return f"{self.across}top_p({self.names[x.id]}, {p}, {k})"

    def _joined(self, n: Node) -> str:
        full = [a for a in n.args if a.op == "full"]
        if full and n.op == "union":
            return "None"
        sets = [self.names[a.id] for a in n.args if a.op != "full"]
        return sets[0] if len(sets) == 1 else f"{n.op}({', '.join(sets)})"

    _union = _intersection = _joined

    def _with_bin(self, n: Node) -> str:
        return f"with_bin({self.names[n.args[0].id]})"

    # gathers
    def _at_y(self, n: Node) -> str:
        return f"{self.dist(n.args[0])}.at_y()"

    def _at_set(self, n: Node) -> str:
        x, s = n.args
        ids = f"{self.names[s.id]}[0]"
        if x.op == "logp":
            return f"{self.dist(x)}.at({ids})"
        return f"{self.use(x, Axis.VOCAB)}.gather(1, {ids})"

    def _put_set(self, n: Node) -> str:
        x, s = n.args
        return f"{self.across}put({self.entry(x)}, {self.names[s.id]}, n, v)"

    def _is_y(self, n: Node) -> str:
        s = n.args[0]
        if s.op == "full":
            return "torch.arange(v, device=y.device)[None, :] == y[:, None]"
        return f"{self.names[s.id]}[0] == y[:, None]"

    def _in_set(self, n: Node) -> str:
        inner, outer = n.args
        ids = (
            "torch.arange(v, device=y.device)[None, :].expand(n, v)"
            if outer.op == "full"
            else f"{self.names[outer.id]}[0]"
        )
        return f"member({ids}, {self.names[inner.id]})"

    def _add_bin(self, n: Node) -> str:
        return f"add_bin({self.use(n.args[0], Axis.VOCAB)}, {self.names[n.args[1].id]})"

    def _head(self, n: Node) -> str:
        return f"{self.names[n.args[0].id]}[:, :-1]"

    def _last(self, n: Node) -> str:
        return f"{self.names[n.args[0].id]}[:, -1]"

    # arithmetic with numbers and tensors
    def _div(self, n: Node) -> str:
        a, c = self.args(n)
        touches_zero = n.args[1].q.low <= 0 <= n.args[1].q.high
        return f"ratio({a}, {c})" if touches_zero else f"{a} / {c}"

    def _log(self, n: Node) -> str:
        return f"log({self.args(n)[0]})"

    def _pow(self, n: Node) -> str:
        a, p = self.args(n)
        return f"{self.tensor(n.args[0], a)} ** {p}"

    def _logaddexp(self, n: Node) -> str:
        a, c = self.args(n)
        return f"torch.logaddexp({a}, {c})"

    def _min(self, n: Node) -> str:
        a, c = self.args(n)
        return f"where({a} <= {c}, {a}, {c}, like)"

    def _max(self, n: Node) -> str:
        a, c = self.args(n)
        return f"where({a} >= {c}, {a}, {c}, like)"

    def _where(self, n: Node) -> str:
        test, yes, no = (bare(a) for a in self.args(n))
        kind = "torch.bool" if n.q.unit == "bool" else "like"
        return f"where({test}, {yes}, {no}, {kind})"

    def _and(self, n: Node) -> str:
        a, c = self.args(n)
        return f"{a} & {c}"

    def _or(self, n: Node) -> str:
        a, c = self.args(n)
        return f"{a} | {c}"

    def _not(self, n: Node) -> str:
        a = self.args(n)[0]
        return f"not {a}" if n.q.axis is Axis.CONST else f"~{a}"

    # reductions over entries
    def _over(self, n: Node, fill: str) -> str:
        x, s = n.args
        return f"entries({bare(self.entry(x))}, {self.names[s.id]}, {fill}, n, v)"

    def _sum_v(self, n: Node) -> str:
        return f"{self._over(n, '0.0')}.sum(1)"

    def _max_v(self, n: Node) -> str:
        return f"largest({self._over(n, 'FLOOR')})"

    def _lse_v(self, n: Node) -> str:
        return f"torch.logsumexp({self._over(n, 'FLOOR')}, 1)"

    # coupling (batch passes)
    def _sum_t(self, n: Node) -> str:
        return f"b.sum_t({self.full(n.args[0], Axis.TOK)})"

    def _max_t(self, n: Node) -> str:
        return f"b.{n.op}({self.full(n.args[0], Axis.TOK)})"

    _rank_t = _max_t

    def _scan(self, n: Node) -> str:
        a, c = (self.full(x, Axis.TOK) for x in n.args)
        return f"b.{n.op}({a}, {c})"

    _scan_fwd = _scan

    def _shift(self, n: Node) -> str:
        x, k = n.args[0], int(n.attr("n"))  # type: ignore[call-overload]
        boot = ""
        if x.op == "input" and x.attr("name") == "values":
            boot = f", x['boot_{input_key(x)}']"
        return f"b.shift({self.full(x, Axis.TOK)}, {k}{boot})"

    def _over_mates(self, n: Node) -> str:
        x = n.args[0]
        token = x.q.axis is Axis.TOK
        value = self.full(x, Axis.TOK if token else Axis.SEQ)
        return f"b.{n.op}{'_rows' if token else ''}({value})"

    _group_sum = _group_max = _others_sum = _over_mates

    def _position_sum(self, n: Node) -> str:
        return f"b.position_sum({self.full(n.args[0], Axis.TOK)})"

    def _whole(self, n: Node) -> str:
        x = n.args[0]
        return self.full(x, Axis.TOK if x.q.axis is Axis.TOK else Axis.SEQ)

    def _sum_b(self, n: Node) -> str:
        return f"{self._whole(n)}.sum()"

    def _max_b(self, n: Node) -> str:
        return f"{self._whole(n)}.amax()"

    def _quantile_b(self, n: Node) -> str:
        return f"b.quantile({self._whole(n)}, {number(float(n.attr('share')))})"  # type: ignore[arg-type]

    # -- what the pass returns -----------------------------------------------------------------
    def finish(self) -> None:
        if not self.last:
            items = []
            for n in self.st.exports:
                var = self.names[n.id]
                if self.axis(n) is Axis.SEQ:
                    var = f"{var}[b.seq]"
                items.append(f"'{key(n)}': {var}")
            self.lines.append("return {" + ", ".join(items) + "}")
            return
        staged = self.staged
        parts = []
        for c in staged.cotangents:
            y = self.names[c.at_y.id] if c.at_y is not None else "None"
            sets = ", ".join(f"({self.names[s.id]}, {self.entry(x)})" for s, x in c.at_sets)
            dense = self.entry(c.dense) if c.dense is not None else "None"
            leaf = c.leaf
            args = f"{number(c.temperature)}, {y}, [{sets}], {dense}"
            dist = f"d['{_mangle(str(leaf.attr('dist')))}']"
            parts.append(f"{self.across}softmax_adjoint({dist}, {args})")
        self.lines.append(f"dz = {' + '.join(parts) if parts else 'None'}")
        self.lines.append(f"return {self.names[staged.total.id]}, dz, {{{self.extras()}}}")

    def extras(self) -> str:
        """Loss of every term and every gate, as entries of a dict."""
        pairs = [("term", self.staged.terms), ("gate", self.staged.gates)]
        return ", ".join(
            f"'{kind}_{i}': {self.names[n.id]}"
            for kind, parts in pairs
            for i, (_, n) in enumerate(parts)
        )


def comment_text(text: str, width: int = 84) -> str:
    """Text a user wrote, safe in a comment or docstring: one line, no quotes, no backslashes."""
    flat = " ".join(text.split()) if width < 200 else text
    kept = "".join(c if c.isprintable() and c != "\\" else " " for c in flat)
    kept = kept.replace('"', "'")
    return kept if len(kept) <= width else kept[: width - 1].rstrip() + "…"


def bare(text: str) -> str:
    """Without parentheses around all of it: an argument stands between commas."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and i < len(text) - 1:
            return text
    return text[1:-1]


def key(n: Node) -> str:
    """Name of a value that crosses passes."""
    return f"x{n.id}"


# ---- the safety net ------------------------------------------------------------------------------

_ALLOWED = (
    ast.Module, ast.FunctionDef, ast.Expr, ast.arguments, ast.arg, ast.Assign, ast.Return, ast.Name, ast.Load,
    ast.Store, ast.Constant, ast.Call, ast.Attribute, ast.Subscript, ast.Slice, ast.Tuple, ast.List,
    ast.Dict, ast.BinOp, ast.UnaryOp, ast.Compare, ast.keyword, ast.Add, ast.Sub, ast.Mult, ast.Div,
    ast.Pow, ast.USub, ast.Not, ast.Invert, ast.BitAnd, ast.BitOr, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq,
)  # fmt: skip
_ROOTS = frozenset(
    [
        "torch",
        "d",
        "r",
        "b",
        "x",
        "y",
        "n",
        "v",
        "like",
        "abs",
        "float",
        "log",
        "where",
        "schedule",
        "member",
        "union",
        "intersection",
        "with_bin",
        "add_bin",
        "entries",
        "put",
        "largest",
        "softmax_adjoint",
        "ratio",
        "top",
        "top_p",
        "FLOOR",
        "TAIL_FLOOR",
        "None",
        "dz",
        "w",
        "column",
        "adjoint_into",
        "lse_into",
        "masked_into",
        "multiple_into",
    ]
)


def check(text: str) -> None:
    """Raises AssertionError if emitted text holds anything a pass has no business holding."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        assert isinstance(node, _ALLOWED), f"emitted {type(node).__name__}"
        if isinstance(node, ast.Name):
            generated = node.id[:1] in "xsvwzel" and node.id[1:].isdigit()
            assert generated or node.id in _ROOTS, f"emitted name {node.id}"
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), f"emitted attribute {node.attr}"
