"""Recurrences along a sequence: G[t] = a[t] + b[t] * G[t + 1] from any linear spelling."""

from __future__ import annotations

from opdsl.meaning.node import Builder, Node


class NotAffine(Exception):
    """The right-hand side is not linear in its own next value."""


def affine(b: Builder, node: Node, hole: Node) -> tuple[Node, Node]:
    """(a, c) with node = a + c * hole and neither reading the hole. Raises NotAffine."""
    zero = b.const(0.0)
    memo: dict[int, tuple[Node, Node]] = {}

    def go(n: Node) -> tuple[Node, Node]:
        if n.id in memo:
            return memo[n.id]
        memo[n.id] = out = split(n)
        return out

    def split(n: Node) -> tuple[Node, Node]:
        if n is hole:
            return zero, b.const(1.0)
        parts = [go(a) for a in n.args]
        if all(c.is_const(0) for _, c in parts):
            return n, zero
        match n.op:
            case "add":
                return b.add(parts[0][0], parts[1][0]), b.add(parts[0][1], parts[1][1])
            case "sub":
                return b.sub(parts[0][0], parts[1][0]), b.sub(parts[0][1], parts[1][1])
            case "neg":
                return b.neg(parts[0][0]), b.neg(parts[0][1])
            case "mul":
                for (a0, c0), free in ((parts[0], n.args[1]), (parts[1], n.args[0])):
                    if go(free)[1].is_const(0):
                        return b.mul(a0, free), b.mul(c0, free)
            case "div" if parts[1][1].is_const(0):
                return b.div(parts[0][0], n.args[1]), b.div(parts[0][1], n.args[1])
            case "where" if parts[0][1].is_const(0):
                test = n.args[0]
                return (
                    b.where(test, parts[1][0], parts[2][0]),
                    b.where(test, parts[1][1], parts[2][1]),
                )
            case "sg":
                return b.sg(parts[0][0]), b.sg(parts[0][1])
        raise NotAffine

    return go(node)
