"""Rules on gates and weights by what they read: R51, R52, R55 (theory T5, §6.3, V15)."""

from __future__ import annotations

from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Info
from opdsl.passport.rules.base import Case
from opdsl.passport.rules.rewards import drawn_by
from opdsl.passport.rules.routing import one_sided
from opdsl.source import Span

BATCHWIDE = {"quantile_b", "max_b", "position_sum", "sum_b"}


def factors(case: Case) -> None:
    """A factor of the state reweights states. One of the action or the future does more, but
    only where the field itself comes from sampled tokens."""
    term = case.term
    if term.route == "loss" and case.sampled and case.teachers:
        drawn_by(case)
    for kind, node, span in case.factors():
        if node.op == "const":
            continue
        below = nodes_below([node])
        if any(_batchwide(n) for n in below):
            _relative(case, kind, span)
        if not samples(case):
            continue
        if node.q.info is Info.FUTURE:
            _outcome(case, kind, span)
        elif node.q.info is Info.ACTION and not _harmless(below):
            if kind == "gate" and term.route == "reward" and one_sided(case):
                continue  # said as a one-sided signal
            _action(case, kind, span)


def samples(case: Case) -> bool:
    """Whether the field at a state differs by the sampled token."""
    return case.term.route == "reward" or any(c.at_y is not None for c in case.field)


def _batchwide(n: Node) -> bool:
    if n.op not in BATCHWIDE:
        return False
    return not (n.args[0].op == "input" and n.args[0].attr("name") == "one")


def _relative(case: Case, kind: str, span: Span) -> None:
    case.add(
        "OPD518",
        span,
        f"this {kind} is relative to the batch: the same token counts differently elsewhere",
        "computed over the whole optimizer batch",
        helps=["use a fixed threshold", 'accept batch_relative "why"'],
    )


def _outcome(case: Case, kind: str, span: Span) -> None:
    case.add(
        "OPD512",
        span,
        f"this {kind} reads what happens after the token",
        "each state's field is reweighted by the outcome it led to",
        notes=[
            "that is often the point of a verifier gate; it is no longer the plain objective",
        ],
        helps=['accept outcome_weight "why"'],
    )


def _action(case: Case, kind: str, span: Span) -> None:
    case.add(
        "OPD513",
        span,
        f"this {kind} reads the sampled token: it reshapes the signal itself",
        "equivalent to another per-token signal",
        helps=['accept action_weight "why"'],
    )


def _harmless(below: list[Node]) -> bool:
    """Importance ratios and special-token masks are action weights by design."""
    inputs = {n.attr("name") for n in below if n.op == "input"}
    return "rollout_logp" in inputs or "special" in inputs
