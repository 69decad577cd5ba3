"""What every rule sees: one term of a typed specification, and where to report."""

from __future__ import annotations

import math
from functools import cached_property

from opdsl.codes import make
from opdsl.diagnostics import Report
from opdsl.ir.derive import Cotangent, cotangents
from opdsl.meaning.builtins import SOURCE_FIELD
from opdsl.meaning.graph import nodes_below, reads
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Info
from opdsl.meaning.spec import Spec, StateSource, Term
from opdsl.passport.returns import Credit, credit_of
from opdsl.source import Span

KL_S, KL_T = "KL(student||T)", "KL(T||student)"  # keys of the evaluated fields


class Case:
    """A term under the rules. Everything is computed on demand: a rule that structure decides
    never evaluates anything."""

    def __init__(self, spec: Spec, term: Term, report: Report):
        self.spec, self.term, self.report = spec, term, report
        self.b = spec.builder

    def span(self, *keys: str) -> Span:
        for key in keys:
            if key in self.term.spans:
                return self.term.spans[key]
        return self.spec.span

    def factors(self) -> list[tuple[str, Node, Span]]:
        """Every gate and weight as it was written: kind, value, place."""
        found = []
        for kind, whole in (("gate", self.term.gate), ("weight", self.term.weight)):
            parts = [
                (kind, self.b.nodes[int(key.partition("%")[2])], span)
                for key, span in self.term.spans.items()
                if key.startswith(f"{kind} %")
            ]
            found += parts or [(kind, whole, self.span(kind))]
        return found

    def add(self, code: str, span: Span, message: str, label: str = "", **more) -> None:
        self.report.add(make(code, span, message, label, **more))

    @cached_property
    def field(self) -> tuple[Cotangent, ...]:
        return tuple(cotangents(self.b, self.term.loss))

    @cached_property
    def sampled(self) -> bool:
        """Whether the field reads the sampled token only."""
        return all(c.dense is None and not c.at_sets for c in self.field)

    @cached_property
    def credit(self) -> Credit:
        return credit_of(self.term)

    @property
    def teachers(self) -> tuple[str, ...]:
        return tuple(t for t in self.term.teachers if t != "initial")

    @property
    def teacher(self) -> str:
        return next(iter(self.teachers), "T")

    @cached_property
    def states(self) -> tuple[StateSource, ...]:
        """The sources of text that the term's gate lets through (`gate drawn(student)`)."""
        return tuple(s for s in self.spec.states if _gate_of(self.term.gate, s.policy) != 0)

    @cached_property
    def on_policy(self) -> bool:
        """Whether any text of the term is sampled by the student."""
        return any(s.kind == "rollouts" and s.policy in ("student", "old") for s in self.states)

    @cached_property
    def by_length(self) -> bool:
        by = self.spec.aggregate in ("sequences", "response_length")
        return by or self.credit.by_length

    @cached_property
    def tail(self) -> str | None:
        """The tail rule of the support, also where a loss over raw entries spells another one."""
        tail = self.term.support.tail
        if tail != "drop" or self.term.route != "loss":
            return tail
        from opdsl.passport import field

        return field.named(self.spec, self.term)[1]

    @cached_property
    def shape(self):
        """The expected field at a state, credit taken as immediate; None where unknown (NumPy)."""
        from opdsl.passport.objective import View

        return View(self.spec, self.term).shape

    @cached_property
    def follows(self) -> dict[str, float] | None:
        """Comparison -> coefficient of the expected field, if it is made of known ones."""
        s = self.shape
        return None if s is None or s.parts is None else dict(s.parts)

    @cached_property
    def rests(self) -> bool | None:
        """Whether the term's own expected field vanishes at student = teacher (NumPy)."""
        from opdsl.passport import field
        from opdsl.passport.evaluate import random_world

        return field.vanishes(
            self.spec, self.term.loss, random_world(11, 1.3, self.teacher).at_teacher()
        )

    def teacher_part(self, name: str) -> bool:
        """Whether a comparison of `follows` is one with the teacher."""
        return name in (KL_S, KL_T)

    def reads_rollout(self) -> bool:
        """A ratio to the sampling policy among the weights."""
        return reads(self.term.weight, "rollout_logp")


def _gate_of(gate: Node, policy: str) -> float | None:
    """What a gate is on text of one policy, where that alone decides it; else None."""
    known: dict[int, float | None] = {}
    for n in nodes_below([gate]):
        x = [known[a.id] for a in n.args]
        match n.op:
            case "input" if n.attr("field") == SOURCE_FIELD:
                value = float(n.attr("equals") == policy)
            case "not":
                value = None if x[0] is None else 1.0 - x[0]
            case "sg":
                value = x[0]
            case "and" | "mul" if 0.0 in x:
                value = 0.0
            case "or" if 1.0 in x:
                value = 1.0
            case "and" | "or" | "mul" if None not in x:
                value = math.prod(x) if n.op != "or" else max(x)  # type: ignore[arg-type,type-var]
            case "where" if x[0] is not None:
                value = x[1] if x[0] else x[2]
            case _:
                value = n.value
        known[n.id] = value
    return known[gate.id]


def critic_values(below: list[Node]) -> list[Node]:
    return [n for n in below if n.op == "input" and n.attr("name") == "values"]


def info_beside(root: Node, given: Node) -> Info:
    """What must be known to compute `root` once `given` is: the measurability of a baseline.

    Statistics of `given` alone over other rollouts or the batch count as known.
    """
    memo = {given.id: Info.STATIC}
    for n in nodes_below([root]):
        if n.id in memo:
            continue
        below = max((memo[a.id] for a in n.args), default=n.q.info)
        if n.op == "shift" and int(n.attr("n")) < 0:  # type: ignore[call-overload]
            memo[n.id] = min(below, n.q.info)  # an earlier token's action is part of the state
            continue
        raises = n.q.info > max((a.q.info for a in n.args), default=n.q.info)
        memo[n.id] = n.q.info if raises and below > Info.STATIC else below
    return memo[root.id]


def below_until(root: Node, stop: Node | None) -> list[Node]:
    """Nodes of `root` that are not reached through `stop` alone."""
    seen: set[int] = set() if stop is None else {stop.id}
    out, stack = [], [root]
    while stack:
        n = stack.pop()
        if n.id in seen:
            continue
        seen.add(n.id)
        out.append(n)
        stack += n.args
    return out
