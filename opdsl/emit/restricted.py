"""Plan class S0: passes that read the student on given ids alone, inside renormalised softmaxes."""

from __future__ import annotations

from opdsl.emit.module import Writer, number
from opdsl.ir.stages import Staged
from opdsl.meaning.node import Node


def is_restricted(staged: Staged) -> bool:
    """Whether the last pass reads the student only as log-softmax over index sets it is given.

    Every gather of the student's log-probabilities is used as x − lse(x) over its own set and in no
    other way; then the sum over the vocabulary cancels in value and gradient.
    """
    last = staged.last
    users: dict[int, list[Node]] = {}
    for n in last.nodes:
        for a in n.args:
            users.setdefault(a.id, []).append(n)
    roots = {staged.total.id, *(n.id for _, n in (*staged.terms, *staged.gates))}
    roots |= {r.id for c in staged.cotangents for r in c.roots}
    leaves = [n for n in last.nodes if n.op == "logp" and n.attr("dist") == "student"]
    if not leaves or any(c.at_y or c.dense for c in staged.cotangents):
        return False
    for leaf in leaves:
        for gather in users.get(leaf.id, []):
            if gather.op != "at_set" or gather.args[1].op == "full" or gather.id in roots:
                return False
            lse = [u for u in users.get(gather.id, []) if u.op == "lse_v"]
            if any(u.args[1] is not gather.args[1] for u in lse):
                return False
            rest = [u for u in users.get(gather.id, []) if u.op != "lse_v"]
            rest += [u for s in lse for u in users.get(s.id, [])]
            if not rest or any(s.id in roots for s in lse):
                return False
            if not all(u.op == "sub" and u.args[0] is gather and u.args[1] in lse for u in rest):
                return False
    return True


class Restricted(Writer):
    """Writes the last pass; it returns cotangents at ids instead of one per word."""

    def function(self) -> str:
        text = super().function()
        return text.replace("    v = d['student'].z.shape[1]\n", "    v = 0\n")

    def finish(self) -> None:
        pieces = []
        for c in self.staged.cotangents:
            dist = self.dist(c.leaf)
            for s, x in c.at_sets:
                ids = self.names[s.id]
                value = f"entries({self.entry(x)}, {ids}, 0.0, n, v)"
                if c.temperature != 1.0:
                    value = f"{value} / {number(c.temperature)}"
                pieces.append(f"({dist}.asked({ids}[0]), {value})")
        value = self.names[self.staged.total.id]
        self.lines.append(f"return {value}, [{', '.join(pieces)}], {{{self.extras()}}}")


def restricted(staged: Staged) -> str:
    """The text of the last pass of a method that `is_restricted`."""
    return Restricted(staged, staged.last).function()
