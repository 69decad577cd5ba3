"""Temporal credit, read off the graph of the advantage: what is summed, at which rate, from when."""

from __future__ import annotations

from dataclasses import dataclass

from opdsl.meaning.graph import nodes_below, static_value
from opdsl.meaning.node import Node
from opdsl.meaning.spec import Spec, Term


@dataclass(frozen=True, slots=True)
class Credit:
    """kind: immediate | return_to_go | future | full | discounted | window | gae | other."""

    kind: str
    gamma: float | None = 1.0
    lam: float | None = 1.0
    tokens: int | None = None

    @property
    def exact(self) -> bool:
        """Unbiased for the sequence objective whatever is subtracted (T2, T5)."""
        return self.kind in ("return_to_go", "full")


def credit_of(term: Term) -> Credit:
    """How later signals count for a token."""
    signal, advantage = term.signal, term.advantage
    if term.route != "reward" or signal is None or advantage is None:
        return Credit("none")
    below = nodes_below([advantage])
    reads = {n.id for n in below if any(x is signal for x in nodes_below([n]))}
    critic = [n for n in below if n.op == "input" and n.attr("name") == "values"]
    over = [n for n in below if n.op in ("scan", "sum_t", "shift") and n.id in reads]
    scans = [n for n in over if n.op == "scan"]
    if not over:
        bootstraps = any(n.op == "shift" and n.args[0] in critic for n in below)
        return Credit("gae", _slope(advantage), 0.0) if bootstraps else Credit("immediate", 0.0)
    if critic and scans:
        rate, gamma = static_value(scans[0].args[1]), _slope(scans[0].args[0])
        if any(n.op == "shift" and n.args[0] in critic for n in below):
            lam = None if rate is None or not gamma else rate / gamma
            return Credit("gae", gamma, lam)
    if any(n.op == "sum_t" for n in over) and not scans:
        return Credit("full")
    if len(scans) != 1:
        return Credit("other", None)
    rate = static_value(scans[0].args[1])
    shifts = [int(n.attr("n")) for n in over if n.op == "shift" and n.args[0] is scans[0]]  # type: ignore[call-overload]
    if rate is None or not 0 <= rate <= 1:
        return Credit("other", None)
    if rate < 1:
        return Credit("discounted", rate)
    if not shifts:
        return Credit("return_to_go")
    bare = any(scans[0] in n.args and n.op != "shift" for n in below) or advantage is scans[0]
    if shifts == [1] and not bare:
        return Credit("future")
    return Credit("window", 1.0, None, max(shifts)) if bare else Credit("other", None)


def critic_term(spec: Spec) -> Term | None:
    """The term whose advantage reads a critic."""
    for term in spec.feedback_terms:
        below = nodes_below([term.advantage]) if term.advantage is not None else []
        if any(n.op == "input" and n.attr("name") == "values" for n in below):
            return term
    return None


def critic_targets(spec: Spec) -> tuple[float, float] | None:
    """(γ, λ) of the returns a critic is trained on, read off the advantage that uses it.

    However the rule spells them; a critic that is only a baseline predicts the plain return.
    """
    term = critic_term(spec)
    if term is None:
        return None
    credit = credit_of(term)
    gamma = 1.0 if credit.gamma is None else credit.gamma
    return gamma, (1.0 if credit.lam is None else credit.lam)


def _slope(delta: Node) -> float | None:
    """γ of r_t + γ V(s_{t+1}) − V(s_t): the factor on the critic's next value."""
    for n in nodes_below([delta]):
        if n.op == "mul" and any(_next_value(a) for a in n.args):
            other = next(a for a in n.args if not _next_value(a))
            return static_value(other)
        if n.op in ("add", "sub") and any(_next_value(a) for a in n.args):
            return 1.0
    return 1.0


def _next_value(n: Node) -> bool:
    return n.op == "shift" and n.args[0].op == "input" and n.args[0].attr("name") == "values"
