"""Numbers per token of what a method is made of: signal, advantage, gates, support, routing.

The quantities are nodes of the method's program. They are compiled once, like a loss, into passes
without a gradient, so every route (logits, hidden states, lists of a served teacher) and every
spec is measured by the same code, and nothing here looks at a method's name. The passes run beside
the loss and write nowhere: parameters are bitwise the same with and without them.

Shapes: B rows, T response tokens, N kept tokens of the batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Builder, Node
from opdsl.meaning.quantity import Axis, Info, Quantity

TRUTH = Quantity(Axis.TOK, "bool", 0, 1, Info.FUTURE)
LISTED = ("top", "score_ids", "logits")  # access levels that give more than the sampled token


@dataclass(frozen=True)
class Probe:
    """One number per token. what: "advantage", "trigger", …; of: a term, a teacher, or ""."""

    what: str
    of: str
    node: Node


class Instruments:
    """Compiled probes of one method.

    Raises nothing of its own; what cannot be compiled raises what compiling a loss raises.
    """

    def __init__(self, method: Any):
        from opdsl.emit.module import emit, key
        from opdsl.emit.runtime import LossModule
        from opdsl.ir.derive import strip
        from opdsl.ir.program import Part, Program, expand_tails, lift_token

        builder: Builder = method.program.builder
        self.probes = tuple(probes_of(method))
        total = builder.const(0.0)
        self.keys: list[str] = []
        for probe in self.probes:
            node = strip(builder, expand_tails(builder, probe.node))
            node = lift_token(builder, node)
            if not _leans_on_logits(node):
                node = _pinned(builder, node)
            self.keys.append(key(node))
            # What a batch pass sums and the last pass reads crosses both, as one number per token.
            quantity = node.q.with_(axis=Axis.CONST, low=float("-inf"), high=float("inf"))
            both = builder.add(node, builder.make("sum_b", (node,), quantity))
            total = builder.add(total, both)
        program = Program(method.spec, (Part("main", (), lift_token(builder, total), ()),))
        self.module = LossModule(program, emit(program))

    @torch.no_grad()
    def __call__(self, parts: Sequence[Any]) -> dict[tuple[str, str], torch.Tensor]:
        """{(what, of): float32 [N]} over all parts of a batch, in their order."""
        found: dict[tuple[str, str], torch.Tensor] = {}
        contexts = [c.imports.get("main", {}) for c in self.module.prepare(parts)]
        for probe, key in zip(self.probes, self.keys):
            pieces = [c[key].float().reshape(-1) for c in contexts if key in c]
            if pieces:
                found[probe.what, probe.of] = torch.cat(pieces)
        return found


def probes_of(method: Any) -> list[Probe]:
    """What there is to measure in a method's terms on sampled text."""
    builder: Builder = method.program.builder
    found = [Probe("logp", "", builder.at_y(builder.logp("student", False)))]
    found.append(Probe("rollout", "", _rollout(builder)))
    access = {name: level.split("(")[0] for name, level in method.needs.teachers.items()}
    for name, level in access.items():
        if level != "text":
            found.append(Probe("logp", name, builder.at_y(builder.logp(name, False))))
    for term in method.spec.terms:
        if term.rows == "main":
            found += _of_term(builder, term, access)
    return found


def _of_term(builder: Builder, term: Any, access: dict[str, str]) -> list[Probe]:
    found = []
    for what in ("signal", "returned", "advantage", "gate", "weight"):
        node = getattr(term, what)
        if node is None or node.value is not None:
            continue  # 1 everywhere: nothing to look at
        if node.q.axis is not Axis.VOCAB:
            found.append(Probe(what, term.name, node))
    # One number, not two, where there is no baseline or no credit beyond the own token.
    same = [w for w in ("signal", "returned") if getattr(term, w) is term.advantage]
    found = [p for p in found if p.what not in same or term.advantage is None]
    factors = _factors(term)
    if len(factors) > 1:
        found += [Probe(f"gate {i + 1}", term.name, node) for i, node in enumerate(factors)]
    found += _of_support(builder, term, access)
    found += _of_routing(builder, term)
    found += _of_bounds(builder, term)
    return found


def _factors(term: Any) -> list[Node]:
    """The gates of a term, each as it was written; their product is the term's gate."""
    written = {key.rpartition("%")[2] for key in term.spans if key.startswith("gate %")}
    return [n for n in nodes_below([term.gate]) if str(n.id) in written]


def _of_support(builder: Builder, term: Any, access: dict[str, str]) -> list[Probe]:
    """Mass of the student and of each listed teacher on a term's index set."""
    base = term.support.base
    if base.op in ("full", "sampled") or term.support.tail is None:
        return []
    readers = ["student", *(t for t in term.teachers if access.get(t) in LISTED)]
    found = []
    for name in readers:
        logp = builder.at_set(builder.logp(name, False), base)
        mass = builder.sum_v(builder.exp(logp), base)
        found.append(Probe(f"mass {name}", term.name, mass))
    return found


def _of_routing(builder: Builder, term: Any) -> list[Probe]:
    routing = term.routing
    found = []
    if routing.trigger is not None:
        found.append(Probe("trigger", term.name, routing.trigger))
    if routing.routable is not None:
        found.append(Probe("routable", term.name, routing.routable))
        one, zero = builder.const(1.0), builder.const(0.0)
        count = builder.sum_v(builder.where(routing.candidates, one, zero), routing.domain)
        found.append(Probe("candidates", term.name, count))
    if routing.strength is not None:
        found.append(Probe("strength", term.name, routing.strength))
    return found


def _of_bounds(builder: Builder, term: Any) -> list[Probe]:
    """Whether a token's value sits at a constant bound (clip, min, max), by place."""
    found, seen = [], set()
    places = [("signal", term.signal), ("advantage", term.advantage), ("weight", term.weight)]
    places += [("strength", term.routing.strength), ("loss", term.loss)]
    for place, root in places:
        if root is None:
            continue
        below = [n for n in nodes_below([root]) if n.id not in seen]
        seen |= {n.id for n in below}
        hits = [_at_bound(builder, n) for n in below if n.op in ("min", "max")]
        hits = [h for h in hits if h is not None]
        if hits:
            whole = hits[0]
            for hit in hits[1:]:
                whole = builder.make("or", (whole, hit), TRUTH)
            found.append(Probe(f"clipped {place}", term.name, whole))
    return found


def _at_bound(builder: Builder, n: Node) -> Node | None:
    """A condition per token that holds where `n` takes its constant; None where it has none."""
    fixed = [a for a in n.args if a.op in ("const", "param", "schedule")]
    moving = [a for a in n.args if a not in fixed]
    if len(fixed) != 1 or len(moving) != 1 or not Axis.CONST < moving[0].q.axis < Axis.VOCAB:
        return None
    if abs(fixed[0].value or 0.0) >= 1e20:
        return None  # the floor of a log-probability is no bound anyone chose
    order = (fixed[0], moving[0]) if n.op == "min" else (moving[0], fixed[0])
    return builder.make("lt", order, TRUTH)


# ---- values that no pass would hand over ---------------------------------------------------------


def _rollout(builder: Builder) -> Node:
    q = Quantity(Axis.TOK, "logprob", float("-inf"), 0.0, Info.ACTION)
    return builder.input("rollout_logp", q)


def _leans_on_logits(node: Node) -> bool:
    return any(n.op == "logp" for n in nodes_below([node]))


def _pinned(builder: Builder, node: Node) -> Node:
    """The same value as a number of the first row pass: `where(log π(y) < 1, x, 0)`.

    Values of the batch's own inputs are computed wherever they are read and cross no pass. The
    condition always holds, and is made by hand so that nothing folds it away.
    """
    logp = builder.at_y(builder.logp("student", False))
    always = builder.make("lt", (logp, builder.const(1.0)), TRUTH)
    return builder.make("where", (always, node, builder.const(0.0)), node.q.with_(axis=Axis.TOK))
