"""Rows that a gate has closed cost nothing: which gates are known before the logits are computed."""

from __future__ import annotations

from opdsl.emit.module import Writer, function_name
from opdsl.ir.stages import Stage, Staged
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import SET_OPS, Node
from opdsl.meaning.quantity import Axis

KNOWN = "known_gates"


def all_gated(staged: Staged) -> bool:
    """Whether a row with every gate closed has no loss and no gradient.

    Read off the cotangents: where returns couple rows, the gradient of one may come from another.
    """
    if not staged.terms or len(staged.gates) != len(staged.terms):
        return False
    closed: dict[int, bool] = {}
    for _, g in staged.gates:
        closed[g.id] = True
        if g.op == "mul" and g.args[0].op == "input" and g.args[0].attr("name") == "one":
            closed[g.args[1].id] = True
    roots = [staged.total, *(r for c in staged.cotangents for r in c.roots)]
    return all(_vanishes(r, closed) for r in roots)


def _vanishes(root: Node, closed: dict[int, bool]) -> bool:
    """Whether a value is 0 where the nodes known to be `closed` are; False where that is not seen."""
    for n in nodes_below([root]):
        if n.id in closed:
            continue
        zero = [closed[a.id] for a in n.args]
        match n.op:
            case "const":
                closed[n.id] = n.is_const(0)
            case "mul":
                closed[n.id] = any(zero)
            case "add" | "sub" | "neg":
                closed[n.id] = all(zero)
            case "where":
                closed[n.id] = zero[2] if zero[0] else zero[1] and zero[2]
            case "div" | "sum_v" | "put_set" | "head" | "last":
                closed[n.id] = zero[0]
            case _:
                closed[n.id] = False
    return closed[root.id]


def known_stage(staged: Staged) -> Stage | None:
    """A pass that gives every gate from the batch's inputs and earlier passes; None: it takes logits."""
    if not all_gated(staged):
        return None
    last = staged.last
    imports = {n.id for n in last.imports}
    needed: list[Node] = []
    seen: set[int] = set()
    stack = [(gate, False) for _, gate in staged.gates]
    while stack:
        n, done = stack.pop()
        if done:
            needed.append(n)
            continue
        if n.id in seen or n.id in imports:
            continue
        seen.add(n.id)
        if n.op == "logp" or n.op in SET_OPS or n.q.axis is Axis.VOCAB:
            return None
        stack.append((n, True))
        stack += [(a, False) for a in n.args]
    gates = tuple({n.id: n for _, n in staged.gates}.values())
    inner = tuple(n for n in last.imports if n.id in {a.id for x in needed for a in x.args})
    inner += tuple(g for g in gates if g.id in imports and g not in inner)
    return Stage(last.level, tuple(needed), inner, gates)


def known_gates(staged: Staged) -> str | None:
    """The text `main_known_gates(d, r, like)` of that pass."""
    st = known_stage(staged)
    if st is None:
        return None
    text = Writer(staged, st).function()
    return text.replace(f"def {function_name(staged.rows, st)}(", f"def {staged.rows}_{KNOWN}(")
