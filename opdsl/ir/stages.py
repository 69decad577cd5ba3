"""Which pass computes what: row passes (one fused sweep over tokens) and batch passes between.

Level -1 is a batch pass over inputs alone (denominators). Even levels are row passes: they see the distributions of one block of rows. Odd levels are batch
passes: they see one number per token of the whole batch and couple rows (returns, baselines,
denominators). A value with entries of the vocabulary never crosses a pass; it is recomputed.
The last pass yields the loss of every row and its logit cotangent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from opdsl.ir.derive import Cotangent, strip, without_multiples
from opdsl.ir.program import Part, Program, lift_token
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import COUPLING_OPS, SET_OPS, Node
from opdsl.meaning.quantity import Axis
from opdsl.records import replace

FREE = -2  # computable anywhere from the batch's own inputs


@dataclass(frozen=True, slots=True)
class Stage:
    level: int
    nodes: tuple[Node, ...]  # in order of computation
    imports: tuple[Node, ...]  # computed by an earlier stage
    exports: tuple[Node, ...]  # read by a later one

    @property
    def kind(self) -> str:
        return "rows" if self.level % 2 == 0 else "batch"


@dataclass(frozen=True, slots=True)
class Staged:
    rows: str
    stages: tuple[Stage, ...]
    total: Node
    terms: tuple[tuple[str, Node], ...]
    gates: tuple[tuple[str, Node], ...]
    cotangents: tuple[Cotangent, ...]

    @property
    def last(self) -> Stage:
        return self.stages[-1]

    @property
    def coupled(self) -> bool:
        """A batch pass reads live statistics of the student (not just the batch's inputs)."""
        return any(
            n.op == "logp" and n.attr("dist") == "student"
            for s in self.stages[:-1]
            if s.kind == "rows"
            for n in s.nodes
        )


def levels(roots: list[Node]) -> dict[int, int]:
    """Level of every node below the roots."""
    out: dict[int, int] = {}
    for n in nodes_below(roots):
        below = max((out[a.id] for a in n.args), default=FREE)
        if n.op in COUPLING_OPS:  # of inputs alone: level -1, before the first row pass
            out[n.id] = below if below % 2 == 1 else below + 1
        elif _entries(n) or _reads_entries(n):
            base = max(below, 0)
            out[n.id] = base if base % 2 == 0 else base + 1
        else:
            out[n.id] = below
    return out


def _reads_entries(n: Node) -> bool:
    return any(a.q.axis is Axis.VOCAB for a in n.args)


def stage(program: Program, part: Part) -> Staged:
    """The passes of one part."""
    b = program.builder
    total = strip(b, part.total)
    terms = tuple((r.term.name, lift_token(b, strip(b, r.loss))) for r in part.terms)
    gates = tuple(
        (r.term.name, lift_token(b, strip(b, r.term.gate)))
        for r in part.terms
        if r.term.gate.op != "const"
    )
    outputs = [total, *(n for _, n in terms), *(n for _, n in gates)]
    slopes = tuple(
        c if c.dense is None else replace(c, dense=without_multiples(b, c.dense, c.leaf))
        for c in part.cotangents
    )
    for c in slopes:
        outputs += [*c.roots, *(s for s, _ in c.at_sets)]
    level = levels(outputs)
    top = max([level[n.id] for n in outputs] + [0])
    final = top if top % 2 == 0 else top + 1
    late = _late(outputs, level, final)
    wanted: dict[int, list[Node]] = {final: outputs}
    stages: list[Stage] = []
    for k in range(final, FREE, -1):
        roots = wanted.get(k, [])
        if not roots and k != final:
            continue
        nodes, imports = _needed(roots, level, k, late if k == final else set())
        for n in imports:
            wanted.setdefault(level[n.id], []).append(n)
        exports = () if k == final else tuple(_unique(roots))
        stages.append(Stage(k, tuple(nodes), tuple(imports), exports))
    stages.reverse()
    return Staged(part.rows, tuple(stages), total, terms, gates, slopes)


def _unique(nodes: list[Node]) -> list[Node]:
    return list({n.id: n for n in nodes}.values())


def _late(outputs: list[Node], level: dict[int, int], final: int) -> set[int]:
    """What the last pass computes itself, although an earlier one could.

    An earlier row pass exists for the batch passes that couple rows; whatever else it computed
    would cost a product with every head it needs. So a number of a row is imported only where rows
    are coupled through it, or where the earlier pass has logits at hand that the last one lacks.
    """
    nodes = nodes_below(outputs)
    coupled = {x.id for n in nodes if n.op in COUPLING_OPS for x in nodes_below([n])}
    early = _models(n for n in nodes if n.id in coupled and 0 <= level[n.id] < final)
    here = {"student"} | _models(_needed(outputs, level, final, set())[0])
    late: set[int] = set()
    below: dict[int, set[str]] = {}  # the models whose logits computing a node would take
    for n in nodes:
        below[n.id] = _models([n]).union(*(below[a.id] for a in n.args))
        if n.id in coupled or not 0 <= level[n.id] < final:
            below[n.id] = below[n.id] if _entries(n) else set()
        elif _entries(n) or below[n.id] <= here or not below[n.id] <= early:
            late.add(n.id)
        else:
            below[n.id] = set()
    return late


def _models(nodes: Iterable[Node]) -> set[str]:
    """The models whose logits are read."""
    return {str(n.attr("dist")) for n in nodes if n.op == "logp"}


def _entries(n: Node) -> bool:
    return n.q.axis is Axis.VOCAB or n.op in SET_OPS


def _needed(
    roots: list[Node], level: dict[int, int], k: int, late: set[int]
) -> tuple[list[Node], list[Node]]:
    """(nodes to compute in stage k in order, nodes to import from earlier stages)."""
    nodes: list[Node] = []
    imports: list[Node] = []
    seen: set[int] = set()
    stack: list[tuple[Node, bool]] = [(r, False) for r in reversed(roots)]
    while stack:
        n, done = stack.pop()
        if done:
            nodes.append(n)
            continue
        if n.id in seen:
            continue
        seen.add(n.id)
        home = level[n.id]
        if home not in (FREE, k) and not _entries(n) and n.id not in late:
            imports.append(n)
            continue
        stack.append((n, True))
        stack += [(a, False) for a in reversed(n.args) if a.id not in seen]
    return nodes, imports
