"""Questions about node graphs that every room asks."""

from __future__ import annotations

import math
from collections.abc import Iterable

from opdsl.meaning.node import Node


def nodes_below(roots: Iterable[Node]) -> list[Node]:
    """Every node reachable from the roots, arguments before users."""
    seen: set[int] = set()
    out: list[Node] = []
    stack: list[tuple[Node, bool]] = [(r, False) for r in roots]
    while stack:
        node, done = stack.pop()
        if done:
            out.append(node)
        elif node.id not in seen:
            seen.add(node.id)
            stack.append((node, True))
            stack += [(a, False) for a in node.args if a.id not in seen]
    return out


def dists_below(roots: Iterable[Node]) -> tuple[str, ...]:
    """Names of the distributions other than the student's that the nodes read."""
    names = {str(n.attr("dist")) for n in nodes_below(roots) if n.op == "logp"}
    return tuple(sorted(names - {"student"}))


def reads(node: Node, name: str) -> bool:
    """Whether a value depends on an input of the batch."""
    return any(n.op == "input" and n.attr("name") == name for n in nodes_below([node]))


def static_value(node: Node) -> float | None:
    """The number a node stands for before any batch, or None."""
    if node.value is not None or not node.args:
        return node.value
    known: dict[int, float | None] = {}
    for n in nodes_below([node]):
        known[n.id] = n.value if n.value is not None else _static(n, [known[a.id] for a in n.args])
    return known[node.id]


def _static(node: Node, args: list[float | None]) -> float | None:
    if not args or any(a is None for a in args):
        return None
    x = [float(a) for a in args if a is not None]
    try:
        match node.op:
            case "add":
                return x[0] + x[1]
            case "sub":
                return x[0] - x[1]
            case "mul":
                return x[0] * x[1]
            case "div":
                return x[0] / x[1]
            case "neg":
                return -x[0]
            case "pow":
                return float(x[0] ** x[1])
            case "exp":
                return math.exp(x[0])
            case "log":
                return math.log(x[0])
            case "min":
                return min(x)
            case "max":
                return max(x)
            case "lt":
                return float(x[0] < x[1])
            case "le":
                return float(x[0] <= x[1])
            case "eq":
                return float(x[0] == x[1])
            case "not":
                return float(not x[0])
            case "and":
                return float(bool(x[0]) and bool(x[1]))
            case "or":
                return float(bool(x[0]) or bool(x[1]))
    except (ValueError, ZeroDivisionError, OverflowError, TypeError):
        return None
    return None
