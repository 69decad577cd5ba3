"""Row passes through torch.compile, where somebody asked for it: `method.loss.compile()`.

What is compiled is the text of the in-place pass (`fused.py`) with every buffer a fresh tensor: the
compiler sees values instead of memory and keeps most of them in registers. The products with the
head stay outside, and so does the tile of logits, which goes in and holds the cotangent afterwards.
The number of rows is dynamic, so a shorter last chunk compiles nothing. A pass that cannot be
compiled (no C++ compiler, something that is not traced) runs as it did, and the reason is told once.

Off by default: a pass takes seconds to compile, and a method is compiled in a tenth of one.

Shapes: n rows of a strip, V vocabulary, K ids of a served list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType

import torch
from torch import Tensor

from opdsl.emit import prelude
from opdsl.emit.fused import is_dense
from opdsl.emit.routed import Chosen
from opdsl.emit.told import tell_once
from opdsl.ir.stages import Stage

LISTS = ("ids", "logp", "logp_y")  # of a served teacher
Layout = tuple[tuple[object, ...], ...]


@dataclass
class Flat:
    """What a pass reads, as tensors in one order; `layout` says what they are."""

    tensors: list[Tensor] = field(default_factory=list)
    layout: list[tuple[object, ...]] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)

    def tensor(self, x: Tensor | None) -> int:
        """Its place; −1 for none."""
        if x is None:
            return -1
        self.tensors.append(x)
        return len(self.tensors) - 1

    def part(self, x: prelude.Dense | prelude.Sparse) -> tuple[object, ...]:
        if isinstance(x, prelude.Dense):
            return ("dense", self.tensor(x.z))
        return ("sparse", *(self.tensor(getattr(x, name)) for name in LISTS))


def flat(d: Mapping[str, object], r: Mapping[str, object]) -> Flat:
    """Distributions and rows of a strip. A single number that is no tensor stays one."""
    out = Flat()
    for name, x in d.items():
        if isinstance(x, Chosen):
            parts = tuple(out.part(p) for p in x.parts)
            out.layout.append(("chosen", name, out.tensor(x.choice), parts))
        else:
            out.layout.append(("one", name, out.part(x)))  # type: ignore[arg-type]
    for name, x in r.items():
        if isinstance(x, Tensor):
            out.layout.append(("row", name, out.tensor(x)))
        else:
            out.numbers[name] = x  # type: ignore[assignment]
    return out


def built(layout: Layout, tensors: list[Tensor], numbers: Mapping[str, float]):
    """(d, r) as the text of a pass reads them. Tiles are values: the pass may write over them."""
    r: dict[str, object] = dict(numbers)
    d: dict[str, object] = {}
    for kind, name, at, *_ in layout:
        if kind == "row":
            r[name] = tensors[at]  # type: ignore[index]

    def part(of: tuple) -> prelude.Dense | prelude.Sparse:
        if of[0] == "dense":
            return prelude.Dense(tensors[of[1]].clone(), r["y"])
        ids, logp, logp_y = (None if i < 0 else tensors[i] for i in of[1:])
        return prelude.Sparse(ids, logp, logp_y, r["y"])

    for kind, name, at, *parts in layout:
        if kind == "one":
            d[name] = part(at)  # type: ignore[arg-type]
        elif kind == "chosen":
            d[name] = Chosen([part(p) for p in parts[0]], tensors[at])  # type: ignore[union-attr,index]
    return d, r


def tiles_of(d: Mapping[str, object]) -> list[prelude.Dense]:
    """The distributions with logits of their own, in order."""
    every = [p for x in d.values() for p in getattr(x, "parts", [x])]
    return [p for p in every if isinstance(p, prelude.Dense)]


def worthwhile(st: Stage) -> bool:
    """Whether a pass computes with entries. Exponentials and their sum alone gain nothing."""
    return any(n.op != "logp" and is_dense(n) for n in st.nodes)


class CompiledPass:
    """fn(d, r, like, w) of `fused.py`, compiled for every kind of input it meets."""

    def __init__(self, fn: Callable, st: Stage):
        self.fn = fn
        self.moves = any(n.op == "schedule" or n.attr("name") == "step" for n in st.nodes)
        self.regions: dict[object, Callable] = {}
        self.reason = ""

    def __call__(self, d, r, like, w):
        if self.reason:
            return self.fn(d, r, like, w)
        given = flat(d, r)
        if not self.moves:  # else every step would be compiled anew
            given.numbers.clear()
        key = (tuple(given.layout), like, len(given.tensors))
        if key not in self.regions:
            body = region(self.fn, key[0], like)
            self.regions[key] = torch.compile(body, fullgraph=True, backend=steadied)
        for x in given.tensors:
            if x.dim() and len(x) > 1:  # one row is a kind of its own to the compiler
                torch._dynamo.maybe_mark_dynamic(x, 0)
        try:
            with torch.no_grad():
                found, lses = self.regions[key](given.tensors, given.numbers)
        except Exception as problem:  # of the compiler: nothing has run yet
            self.reason = cause(problem)
            tell_once(f"a row pass runs without torch.compile: {self.reason}")
            return self.fn(d, r, like, w)
        for x, lse in zip(tiles_of(d), lses):
            x._lse = lse
        if isinstance(found, dict):
            return found
        value, moved, extras = found
        return value, d["student"].z if moved else None, extras


def region(fn: Callable, layout: Layout, like: torch.dtype) -> Callable:
    """What is compiled: (tensors, numbers) -> (results, log-sum-exps); dz in the student's tile."""
    (home,) = (at[1] for kind, name, at, *_ in layout if (kind, name) == ("one", "student"))  # type: ignore[index]

    def body(tensors: list[Tensor], numbers: dict[str, float]):
        d, r = built(layout, tensors, numbers)
        found = fn(d, r, like, lambda i: torch.empty_like(tensors[home]))
        if isinstance(found, dict):
            return found, [x._lse for x in tiles_of(d)]
        value, dz, extras = found
        if dz is not None:
            _ = d["student"].lse  # asked for afterwards, when its tile holds something else
            tensors[home].copy_(dz)
        return (value, dz is not None, extras), [x._lse for x in tiles_of(d)]

    # the compiler counts what it has made of one code object, and gives up after eight
    code = body.__code__.replace()
    return FunctionType(code, body.__globals__, body.__name__, None, body.__closure__)


BLOCK = 1024  # words that are added up before anything else


def steadied(graph: torch.fx.GraphModule, inputs: list):
    """Inductor, with sums over the vocabulary in two steps.

    Its own add 4096 numbers to each lane before they meet another: an error of 2e-6 in Σ exp, and
    ten times that in a gradient near a teacher. Torch's sums are a hundred times closer.
    """
    for node in list(graph.graph.nodes):
        if node.op == "call_method" and node.target == "sum" and node.args[1:] == (1,):
            with graph.graph.inserting_after(node):
                new = graph.graph.call_function(steady, node.args, node.kwargs)
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)
    graph.recompile()
    return torch._dynamo.lookup_backend("inductor")(graph, inputs)


def steady(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Sum over the last axis of [n, V], blocks first."""
    n, V = x.shape
    whole = V // BLOCK * BLOCK
    if whole <= BLOCK:
        return x.sum(1, keepdim=keepdim)
    total = x[:, :whole].reshape(n, -1, BLOCK).sum(2).sum(1, keepdim=keepdim)
    return total if whole == V else total + x[:, whole:].sum(1, keepdim=keepdim)


def cause(problem: BaseException) -> str:
    """The first line of the innermost exception."""
    while (inner := problem.__cause__ or getattr(problem, "inner_exception", None)) is not None:
        problem = inner
    said = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {said[0]}"[:200]


__all__ = ["CompiledPass", "steady", "worthwhile"]
