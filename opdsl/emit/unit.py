"""Coupled credit before a frozen head (or under LoRA): two head products instead of four.

Where rows are coupled through live statistics of the student, the weight of a row is known only
after every row was scored. If the loss then moves nothing but log π(y), a row's gradient with
respect to its hidden state is that weight times a vector which the scoring pass can give: the unit
gradient ∂ log π(y) / ∂h = scale · Wᵀ(e_y − π). The last pass is arithmetic on one number per row.
A trained head has no such shortcut: its gradient sums over rows.
"""

from __future__ import annotations

from opdsl.emit.module import Writer
from opdsl.ir.stages import Stage, Staged
from opdsl.meaning.node import SET_OPS
from opdsl.meaning.quantity import Axis


def unit_stage(staged: Staged) -> Stage | None:
    """The scoring pass that may give the unit gradients; None: the last pass needs logits."""
    last = staged.last
    scoring = [
        st
        for st in staged.stages[:-1]
        if st.kind == "rows"
        and any(n.op == "logp" and n.attr("dist") == "student" for n in st.nodes)
    ]
    if not scoring or len(staged.cotangents) != 1:
        return None
    (c,) = staged.cotangents
    if c.at_y is None or c.at_sets or c.dense is not None or c.temperature != 1.0:
        return None
    for n in last.nodes:
        if n.op == "logp":
            if n is not c.leaf or any(u.op != "at_y" for u in last.nodes if n in u.args):
                return None
        elif n.q.axis is Axis.VOCAB or n.op in SET_OPS:
            return None
    return scoring[-1]


class Weighed(Writer):
    """Writes the last pass; it returns ∂L/∂ log π(y) [n] instead of a cotangent per word."""

    def function(self) -> str:
        text = super().function()
        return text.replace("    v = d['student'].z.shape[1]\n", "    v = 0\n")

    def finish(self) -> None:
        (c,) = self.staged.cotangents
        value, weight = self.names[self.staged.total.id], self.names[c.at_y.id]
        self.lines.append(f"return {value}, {weight}, {{{self.extras()}}}")


def weighed(staged: Staged) -> str:
    """The text of the last pass of a method that has a `unit_stage`."""
    return Weighed(staged, staged.last).function()


__all__ = ["unit_stage", "weighed"]
