"""Comparisons of probabilities, by their logarithms.

`student[v] >= max(u in full: student[u])` must be true of the most probable word. The two sides
may be computed by different code, a kernel and torch, whose exponentials differ in the last bit;
the log-probabilities they are taken of do not (a logit minus the same log-sum-exp). The order of
exponentials is the order of what they are taken of, so such comparisons move to logarithms.
"""

from __future__ import annotations

from collections.abc import Callable

from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import SET_OPS, Node

COMPARED = ("lt", "le", "eq")
NEVER_EMPTY = ("full", "sampled", "top", "top_p", "union")
# what a pass can compute again from its own logits
AGAIN = frozenset({"logp", "at_y", "at_set", "max_v", "neg", "min", "max", "const", *SET_OPS})


class Logarithms:
    """Comparisons of a pass that are made elsewhere: `instead` by id, `nodes` they need."""

    def __init__(self, nodes: tuple[Node, ...], dense: Callable[[Node], bool]):
        self.made: dict[tuple, Node] = {}
        self.instead: dict[int, Node] = {}
        self.dense = dense
        self.nodes: list[Node] = []
        have = {n.id for n in nodes}
        for n in nodes:
            found = self.of(n) if n.op in COMPARED else None
            if found is not None:
                self.instead[n.id] = found
                below = [x for x in nodes_below([found]) if x.id not in have and x is not found]
                have |= {x.id for x in below}
                self.nodes += [*below, found]
            self.nodes.append(n)

    def of(self, n: Node) -> Node | None:
        """The comparison of logarithms, where both sides have one and a sweep computes either."""
        sides = [self.log(a) for a in n.args]
        if None in sides:
            return None
        found = self.make(n.op, tuple(s for s in sides if s is not None), n)
        below = nodes_below([found])[:-1]
        sweeps = any(self.dense(x) for x in below)
        return found if sweeps and all(x.op in AGAIN for x in below) else None

    def log(self, n: Node) -> Node | None:
        """What a value is the exponential of."""
        if n.op == "exp":
            return n.args[0]
        if n.op in ("min", "max"):
            sides = [self.log(a) for a in n.args]
            return None if None in sides else self.make(n.op, tuple(sides), n)  # type: ignore[arg-type]
        if n.op == "max_v" and n.args[1].op in NEVER_EMPTY:
            inner = self.log(n.args[0])
            return None if inner is None else self.make("max_v", (inner, n.args[1]), n)
        if n.op == "neg":  # a minimum is −max(−x)
            inner = n.args[0]
            if (
                inner.op == "max_v"
                and inner.args[0].op == "neg"
                and inner.args[1].op in NEVER_EMPTY
            ):
                x = self.log(inner.args[0].args[0])
                if x is not None:
                    minus = self.make("neg", (x,), inner.args[0])
                    top = self.make("max_v", (minus, inner.args[1]), inner)
                    return self.make("neg", (top,), n)
        return None

    def make(self, op: str, args: tuple[Node, ...], like: Node) -> Node:
        """A node of this pass alone; equal ones are one."""
        key = (op, *(a.id for a in args))
        if key not in self.made:
            q = like.q if op in COMPARED else like.q.with_(low=-float("inf"), high=float("inf"))
            self.made[key] = Node(-1000 - len(self.made), op, args, (), q)
        return self.made[key]


__all__ = ["Logarithms"]
