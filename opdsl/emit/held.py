"""Memory a row pass takes beside the logits it is handed, read off its text, without torch.

Unit: one number per row and word in float32, a tile. A condition per word takes a quarter. Names live
to the end of a function, what a call returns until the call around it is done: the text says when
memory is taken and when it is given back. What runs over index sets or rows counts as nothing.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

FLOAT, FLAG = 1.0, 0.25
NARROW = {  # functions that have a number per row, or per entry of a set, of values per word
    "sum", "amax", "gather", "at", "at_y", "top", "top_p", "measure", "largest", "lse_into", "union",
    "intersection", "with_bin", "add_bin", "member", "first", "numel", "schedule", "ones", "zeros",
}  # fmt: skip
WORK = {"ratio": 1.25, "log": 1.25}  # tiles inside of a function, beyond its result
SETS = {"top": 0, "top_p": 1}  # which argument is the size of a set, of a method of a distribution


@dataclass(frozen=True, slots=True)
class Value:
    """wide: tiles a copy would take (0: no entry per word); own: tiles of memory of its own."""

    wide: float = 0.0
    own: float = 0.0


@dataclass
class Held:
    """peak: the most tiles at once; scratch: buffers w(i); asked: rows of the head asked for by id.

    parts: models behind one name where rows choose among several (`routed`).
    """

    parts: int = 1
    peak: float = 0.0
    scratch: int = 0
    asked: int = 0
    now: float = 0.0
    names: dict[str, Value] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)  # of index sets
    known: set[str] = field(default_factory=set)  # distributions with a log-sum-exp, or rescaled

    # -- statements --------------------------------------------------------------------------------
    def function(self, text: str) -> Held:
        (body,) = ast.parse(text).body
        assert isinstance(body, ast.FunctionDef)
        for line in body.body:
            if isinstance(line, ast.Assign):
                (target,) = line.targets
                assert isinstance(target, ast.Name)
                self.widths[target.id] = self.width(line.value)
                value = self.of(line.value)
                self.free(self.names.get(target.id, Value()))
                self.names[target.id] = value
            elif isinstance(line, ast.Expr | ast.Return) and line.value is not None:
                self.free(self.of(line.value))
        return self

    def take(self, size: float) -> Value:
        self.now += size
        self.peak = max(self.peak, self.now)
        return Value(size, size)

    def free(self, *values: Value) -> None:
        self.now -= sum(v.own for v in values)

    def passing(self, size: float) -> None:
        """Memory inside of a call."""
        self.free(self.take(size))

    # -- expressions -------------------------------------------------------------------------------
    def of(self, e: ast.expr) -> Value:
        match e:
            case ast.Name():
                return Value(self.names.get(e.id, Value()).wide)
            case ast.Attribute():
                return Value(FLOAT if e.attr == "z" else 0.0)
            case ast.Call():
                return self.call(e)
            case ast.Compare():
                words = any(ast.unparse(x).startswith("torch.arange(v") for x in (e.left,))
                return self.combined([e.left, *e.comparators], FLAG, words)
            case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
                return self.combined([e.left, e.right], FLAG)
            case ast.BinOp():
                return self.combined([e.left, e.right], FLOAT)
            case ast.UnaryOp(op=ast.Invert()):
                return self.combined([e.operand], FLAG)
            case ast.UnaryOp():
                return self.combined([e.operand], FLOAT)
            case ast.Subscript():
                return self.of(e.value)
            case ast.Tuple() | ast.List():
                self.free(*[self.of(x) for x in e.elts])
            case ast.Dict():
                self.free(*[self.of(x) for x in e.values])
        return Value()

    def combined(self, args: list[ast.expr], size: float, wide: bool = False) -> Value:
        """A new value with entries where an argument has them."""
        found = [self.of(a) for a in args]
        out = self.take(size) if wide or any(x.wide for x in found) else Value()
        self.free(*found)
        return out

    def call(self, e: ast.Call) -> Value:
        name, on = "", None
        if isinstance(e.func, ast.Name):
            name = e.func.id
        elif isinstance(e.func, ast.Attribute):
            name, on = e.func.attr, e.func.value
        if name == "w":
            self.scratch = max(self.scratch, int(ast.literal_eval(e.args[0])))
            return Value(FLOAT)
        base = self.root(on)
        if base:
            return self.of_distribution(ast.unparse(on), base, name, e)
        args = [*([on] if on is not None else []), *e.args, *[k.value for k in e.keywords]]
        if name == "entries":
            return self.entries(e, [self.of(a) for a in args])
        if name == "softmax_adjoint":
            return self.adjoint(e)
        found = [self.of(a) for a in args]
        wide = [x for x in found if x.wide]
        out = Value()
        if name == "put":
            out = self.take(FLOAT)
        elif name in NARROW or not wide or name == "adjoint_into":
            pass
        elif name.endswith("_") or name in ("column", "to", "expand", "as_tensor", "multiple_into"):
            return wide[0]  # the same memory
        elif name == "masked_into" or any(k.arg == "out" for k in e.keywords):
            self.passing(FLAG if name == "masked_into" else 0.0)
            out = Value(FLOAT)
        else:
            flags = [x for x in found[1:3] if x.wide == FLAG] if name == "where" else []
            self.passing(WORK.get(name, FLOAT * len(flags)) + FLOAT)
            out = self.take(FLOAT)
        self.free(*found)
        return out

    def entries(self, e: ast.Call, found: list[Value]) -> Value:
        """On all words the value itself; on a set what it gathered."""
        if isinstance(e.args[1], ast.Constant):  # None
            return found[0] if found[0].wide else Value(FLOAT)
        self.free(*found)
        return Value()

    # -- distributions -----------------------------------------------------------------------------
    def root(self, e: ast.expr | None) -> str:
        """The text of d['…'] below an expression; "" where there is none."""
        while isinstance(e, ast.Call) and isinstance(e.func, ast.Attribute):
            e = e.func.value
        found = isinstance(e, ast.Subscript) and isinstance(e.value, ast.Name) and e.value.id == "d"
        return ast.unparse(e) if found else ""  # type: ignore[arg-type]

    def of_distribution(self, text: str, base: str, name: str, e: ast.Call) -> Value:
        """A method of a distribution `text`, that of `base` or one at another temperature."""
        copies = self.parts if base != "d['student']" else 1
        if name == "rescaled":
            self.known.add(f"{base}.tempered({ast.unparse(e.args[0])})")
            if copies > 1:
                self.take(copies * FLOAT)
            return Value(FLOAT)
        if text != base and text not in self.known:  # kept at this temperature from now on
            self.known.add(text)
            self.take(copies * FLOAT)
        if name == "at" and base == "d['student']":
            self.asked += self.fresh_width(ast.unparse(e.args[0]))
        self.free(*[self.of(a) for a in e.args])
        if name == "measure":
            self.known.add(f"{text} lse")
        elif name in ("full", "at", "at_y", "top", "top_p") and f"{text} lse" not in self.known:
            self.known.add(f"{text} lse")
            self.passing(FLOAT)
        if name != "full":
            return Value()
        self.passing((copies + 1.0 if copies > 1 else 0.0) + FLOAT)
        return self.take(FLOAT)

    def adjoint(self, e: ast.Call) -> Value:
        dist, temperature = ast.unparse(e.args[0]), ast.unparse(e.args[1])
        found = [self.of(a) for a in e.args[2:]]
        text = dist if temperature == "1.0" else f"{dist}.tempered({temperature})"
        if text != dist and text not in self.known:
            self.known.add(text)
            self.take(FLOAT)
        if f"{text} lse" not in self.known:
            self.passing(FLOAT)
        out = self.take(FLOAT)
        self.free(*found)
        return out

    # -- index sets --------------------------------------------------------------------------------
    def width(self, e: ast.expr) -> int:
        """Entries of an index set; 0 of anything else."""
        match e:
            case ast.Name():
                return self.widths.get(e.id, 0)
            case ast.Tuple():
                return 1
            case ast.Call(func=ast.Attribute(attr="top" | "top_p" as name)):
                return int(ast.literal_eval(e.args[SETS[name]]))
            case ast.Call(func=ast.Name(id="top")):
                return int(ast.literal_eval(e.args[1]))
            case ast.Call(func=ast.Name(id="top_p")):
                return int(ast.literal_eval(e.args[2]))
            case ast.Call(func=ast.Name(id="union")):
                return sum(self.width(a) for a in e.args)
            case ast.Call(func=ast.Name(id="intersection")):
                return self.width(e.args[0])
        return 0

    def fresh_width(self, ids: str) -> int:
        """Entries of the set whose ids are asked for, the first time they are."""
        if ids in self.known:
            return 0
        self.known.add(ids)
        return self.widths.get(ids.removesuffix("[0]"), 1)


def held(text: str, parts: int = 1, measured: tuple[str, ...] = ()) -> Held:
    """What the pass with this text takes; see `Held`. measured: models whose log-sum-exp it gets."""
    return Held(parts, known={f"d[{name!r}] lse" for name in measured}).function(text)


__all__ = ["Held", "held"]
