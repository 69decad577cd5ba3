"""What a step of a method costs in front of the vocabulary: plan class, head products, buffers.

Everything here is read off the passes (`ir/stages.py`) and the text of the in-place passes, without
torch. U = 2·N·H·V FLOP is one product with the head. Classes (static tests on the passes):

- S0  the student is read on given ids inside renormalised softmaxes: K rows of the head, no U
- S1  log-sum-exp and gathers only: one tile, 3 U
- S1e entries of the student, but of no other model: 3 U
- D1  entries of another model: a second tile, 3 U and one product with that model's head

`coupled`: a statistics pass over the live student comes first, + 1 U. `coupled, cheap`: rows are
coupled through values known before the pass, + 0. `gated`: rows with closed gates are left out,
before the pass where the gates are known, before the two products backward where they are not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from opdsl.emit.fused import fused
from opdsl.emit.gating import all_gated, known_stage
from opdsl.emit.held import held
from opdsl.emit.module import GATHERS, Emitted, Writer, _mangle
from opdsl.emit.restricted import is_restricted, restricted
from opdsl.emit.unit import unit_stage
from opdsl.ir.stages import Stage, Staged
from opdsl.meaning.node import COUPLING_OPS, Node


@dataclass(frozen=True)
class Sweep:
    """One row pass over tiles of logits.

    reads    models whose logits it needs, the student first
    dense    those of them it reads entry by entry
    scratch  tiles beside the logits
    work     {kind: times an element of a tile is visited}; see `KINDS`
    fresh    tiles that torch takes and gives back within the pass
    routed   the same where a teacher is one of two, chosen by row
    plain    tiles of the pass that is not in place: words of probability 0, teachers that differ by
             row (two of them)
    asked    rows of the head that are gathered for a token
    entries  of all index sets of a token
    """

    reads: tuple[str, ...]
    dense: tuple[str, ...]
    scratch: int
    work: dict[str, int]
    fresh: float = 0.0
    routed: float = 0.0
    plain: float = 0.0
    asked: int = 0
    entries: int = 0


@dataclass(frozen=True)
class Plan:
    """The passes over the tokens of a batch ("main") or of its reference texts ("golden")."""

    rows: str
    kind: str  # S0, S1, S1e, D1
    coupled: str  # "", "coupled", "coupled, cheap"
    gated: str  # "", "known", "measured"
    ids: int  # K, the most ids of a set; 0: none
    statistics: tuple[Sweep, ...]
    gradient: Sweep
    unit: bool = False  # a frozen head takes the gradient from the scoring pass

    @property
    def label(self) -> str:
        gated = {"known": "gated before the pass", "measured": "gated before the products backward"}
        return ", ".join(x for x in (self.kind, self.coupled, gated.get(self.gated, "")) if x)

    def units(self, frozen_head: bool = False) -> float:
        """Products with the student's head, in U."""
        if self.unit and frozen_head:
            return 1.0 + sum("student" in s.reads for s in self.statistics)
        first = float(sum("student" in s.reads for s in self.statistics))
        return first if self.kind == "S0" else first + (2.0 if frozen_head else 3.0)

    @property
    def others(self) -> tuple[str, ...]:
        """Models other than the student, once for every pass that needs their logits."""
        sweeps = (*self.statistics, self.gradient)
        return tuple(n for s in sweeps for n in s.reads if n != "student")


def plans(emitted: Emitted) -> tuple[Plan, ...]:
    """One plan for every part of a method."""
    return tuple(_plan(s) for s in emitted.staged)


def _plan(staged: Staged) -> Plan:
    first = [st for st in staged.stages[:-1] if st.kind == "rows"]
    batch = any(st.kind == "batch" and _couples(st) for st in staged.stages)
    gradient = _sweep(staged, staged.last)
    others = [d for d in gradient.dense if d != "student"]
    if is_restricted(staged):
        kind = "S0"
    else:
        kind = "D1" if others else "S1e" if "student" in gradient.dense else "S1"
    gated = "" if not all_gated(staged) else "known" if known_stage(staged) else "measured"
    return Plan(
        staged.rows,
        kind,
        "coupled" if staged.coupled else "coupled, cheap" if batch else "",
        gated,
        max((_width(n) for st in staged.stages for n in st.nodes), default=0),
        tuple(_sweep(staged, st) for st in first),
        gradient,
        unit_stage(staged) is not None,
    )


def _couples(st: Stage) -> bool:
    """A batch pass that does more than count rows."""
    return any(n.op in COUPLING_OPS and n.op != "sum_b" for n in st.nodes)


def _width(n: Node) -> int:
    return int(n.attr("k")) if n.op in ("top", "top_p") else 0  # type: ignore[call-overload]


def _sweep(staged: Staged, st: Stage) -> Sweep:
    reads: dict[str, bool] = {}
    roots = {r.id for c in staged.cotangents for r in c.roots} if st is staged.last else set()
    for n in st.nodes:
        if n.op == "logp":
            whole = n.id in roots or any(u.op not in GATHERS for u in st.nodes if n in u.args)
            name = str(n.attr("dist"))
            reads[name] = reads.get(name, False) or whole
    names = sorted(reads, key=lambda x: (x != "student", x))
    if st is staged.last and "student" not in names:
        names.insert(0, "student")
    text = fused(staged, st)
    dense = tuple(n for n in names if reads.get(n))
    in_place = takes = held(text)
    if st is staged.last and is_restricted(staged):
        takes = held(restricted(staged), measured=tuple(_mangle(n) for n in names))
    plain = held(Writer(staged, st).function(), parts=2).peak
    return Sweep(
        tuple(names),
        dense,
        in_place.scratch,
        _work(text),
        takes.peak,
        held(text, parts=2).peak,
        plain,
        takes.asked,
        sum(takes.widths.values()),
    )


KINDS = {  # how often the text of an in-place pass visits a tile, by what it does there
    "move": r"torch\.(add|sub|mul|div|reciprocal|abs|clamp_min|clamp_max|minimum|maximum)\(\{?[zwve]"
    r"|multiple_into|adjoint_into|\.add_\(|masked_into|^v\d+ = ",
    "exp": r"measure\(|torch\.(exp|sigmoid|tanh)\([zwve]\d|lse_into",
    "log": r"torch\.(log|pow)\([zwve]\d",
    "logaddexp": r"torch\.logaddexp",
    "sum": r"\.sum\(1\)|measure\(|lse_into|largest\([zwve]\d+\)",
    "top": r"\.top\(|\.top_p\(|\btop\(|top_p\(",
}


def _work(text: str) -> dict[str, int]:
    lines = [line.strip() for line in text.splitlines()]
    found = {k: sum(1 for line in lines if re.search(p, line)) for k, p in KINDS.items()}
    found["move"] += 2 * sum("measure(" in line for line in lines)  # max, and the difference
    return found


def describe(plan: Plan, served: frozenset[str] = frozenset(), frozen_head: bool = False) -> str:
    """One line: class, products, tiles. What `served` models give costs no product."""
    head = f"{plan.units(frozen_head):g} U"
    if plan.kind == "S0":
        head = f"{plan.ids} rows of the head per token" + (f", {head}" if plan.units() else "")
    others = [n for n in plan.others if n not in served]
    for name in dict.fromkeys(others):
        times = others.count(name)
        head += f", {times} U of {name}" if times > 1 else f", U of {name}"
    logits = sum(n not in served for n in plan.gradient.reads)
    tiles = logits + plan.gradient.scratch - (plan.kind == "S0")
    return f"{plan.label}: {head}; {tiles} {'tile' if tiles == 1 else 'tiles'}"


__all__ = ["KINDS", "Plan", "Sweep", "describe", "plans"]
