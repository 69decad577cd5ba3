"""The IR as text: one operation a line, with its type."""

from __future__ import annotations

from opdsl.ir.program import Program
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import AXIS_WORDS, Axis


def dump(program: Program) -> str:
    lines = [f"opd-ir 1  {program.spec.name}"]
    for part in program.parts:
        lines.append(f"rows {part.rows}")
        roots = [part.total]
        for c in part.cotangents:
            roots += [*c.roots, *(s for s, _ in c.at_sets)]
        names: dict[int, str] = {}
        for n in nodes_below(roots):
            names[n.id] = f"%{len(names)}"
            lines.append(f"  {names[n.id]:>5} = {_right(n, names):<44} : {_type(n)}")
        lines.append(f"  loss     {names[part.total.id]}")
        for c in part.cotangents:
            bits = []
            if c.at_y is not None:
                bits.append(f"y: {names[c.at_y.id]}")
            bits += [f"{names[s.id]}: {names[x.id]}" for s, x in c.at_sets]
            if c.dense is not None:
                bits.append(f"v: {names[c.dense.id]}")
            tau = "" if c.temperature == 1 else f" at temperature {c.temperature:g}"
            lines.append(f"  dL/dlogp({c.leaf.attr('dist')}){tau}  {'  '.join(bits)}")
    return "\n".join(lines)


def _right(n: Node, names: dict[int, str]) -> str:
    attrs = " ".join(
        f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}"
        for k, v in n.attrs
        if v is not None and k != "unit"
    )
    return " ".join(x for x in (n.op, *(names[a.id] for a in n.args), attrs) if x)


def _type(n: Node) -> str:
    axis = {a: w.removeprefix("per ") for a, w in AXIS_WORDS.items()}[n.q.axis]
    shape = "" if n.q.axis is Axis.CONST else f" [{axis}]"
    return f"{n.q.unit}{shape}{'  live' if n.q.live else ''}"
