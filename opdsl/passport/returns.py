"""Temporal credit, read off the graph of the advantage: what is summed, at which rate, from when."""

from __future__ import annotations

from dataclasses import dataclass, replace

from opdsl.meaning.graph import nodes_below, reads, static_value
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis
from opdsl.meaning.spec import Spec, Term


@dataclass(frozen=True, slots=True)
class Credit:
    """kind: immediate | return_to_go | future | full | discounted | window | gae | other."""

    kind: str
    gamma: float | None = 1.0
    lam: float | None = 1.0
    tokens: int | None = None
    by_length: bool = False  # a return, or its rewards, are scaled by a number of the length

    @property
    def exact(self) -> bool:
        """Unbiased for the sequence objective whatever is subtracted (T2, T5)."""
        return self.kind in ("return_to_go", "full")


def credit_of(term: Term) -> Credit:
    """How later signals count for a token."""
    found = _kind(term)
    if found.kind in ("none", "immediate", "gae", "other"):
        return found
    assert term.signal is not None
    odd = [f for f in _factors(term) if not _number(f)]
    if not odd:
        return replace(found, by_length=reads(term.signal, "length"))
    if all(_of_length(f) for f in odd):
        return replace(found, by_length=True)
    return Credit("other", None)


def _kind(term: Term) -> Credit:
    signal, advantage = term.signal, term.advantage
    if term.route != "reward" or signal is None or advantage is None:
        return Credit("none")
    below = nodes_below([advantage])
    after = {n.id for n in below if any(x is signal for x in nodes_below([n]))}
    critic = [n for n in below if n.op == "input" and n.attr("name") == "values"]
    over = [n for n in below if n.op in ("scan", "sum_t", "shift") and n.id in after]
    scans = [n for n in over if n.op == "scan"]
    if not over:
        bootstraps = any(n.op == "shift" and n.args[0] in critic for n in below)
        return Credit("gae", _slope(advantage), 0.0) if bootstraps else Credit("immediate", 0.0)
    if critic and scans:
        rate, gamma = static_value(scans[0].args[1]), _slope(scans[0].args[0])
        if any(n.op == "shift" and n.args[0] in critic for n in below):
            lam = None if rate is None or not gamma else rate / gamma
            return Credit("gae", gamma, lam)
    if len(scans) > 1:
        return Credit("other", None)
    rate = static_value(scans[0].args[1]) if scans else 1.0
    if rate is None or not 0 <= rate <= 1:
        return Credit("other", None)
    if rate < 1:
        return Credit("discounted", rate)
    return _summed(_row(term), any(n.op == "sum_t" for n in over))


def _summed(row: list[float] | None, whole: bool) -> Credit:
    """The kind of a return from the weights of the rewards 0, 1, 2, … tokens later."""
    if row is None or max(row) <= 0:
        return Credit("other", None)
    first, rest = row[0], row[1:]
    level = all(x == rest[0] for x in rest)
    if level and first == rest[0]:
        return Credit("full" if whole else "return_to_go")
    if level and first == 0:
        return Credit("future")
    if level and rest[0] == 0:
        return Credit("immediate", 0.0)
    n = next((j for j, x in enumerate(row) if x != first), len(row))
    if all(x == 0 for x in row[n:]):
        return Credit("window", 1.0, None, n)
    return Credit("other", None)


def _row(term: Term) -> list[float] | None:
    """Weights of the rewards 0, 1, 2, … tokens later where nothing fades; the last one stands for
    all that follow. None where they are not fixed numbers. Factors that are no numbers count as 1
    here (`_factors` finds them)."""
    assert term.advantage is not None and term.signal is not None
    mixes: dict[int, Mix | None] = {}
    for n in nodes_below([term.advantage]):
        mixes[n.id] = {("own", 0): 1.0} if n is term.signal else _mix(n, mixes)
    found = mixes[term.advantage.id]
    if found is None:
        return None
    size = max([0, *(k for _, k in found)]) + 2
    row = [0.0] * size
    for (kind, k), x in found.items():
        for j in range(size):
            if kind == "sum" or (j >= k if kind == "scan" else j == k):
                row[j] += x
    return [0.0 if abs(x) < 1e-12 else x for x in row]


Mix = dict[tuple[str, int], float]  # (own | scan | sum, tokens later) -> weight


def _mix(n: Node, mixes: dict[int, Mix | None]) -> Mix | None:
    """What a node is a weighted sum of; {} where it does not read the rollout's own signal."""
    parts = [mixes[a.id] for a in n.args]
    if n.op in BESIDE or all(x == {} for x in parts):
        return {}
    if any(x is None for x in parts):
        return None
    first = parts[0] or {}
    match n.op:
        case "add" | "sub":
            out, sign = dict(first), 1.0 if n.op == "add" else -1.0
            for key, x in (parts[1] or {}).items():
                out[key] = out.get(key, 0.0) + sign * x
            return out
        case "neg":
            return {key: -x for key, x in first.items()}
        case "sg" | "live":
            return first
        case "mul" | "div" if len(parts) == 2 and {} in parts and (n.op == "mul" or first):
            own, k = (first, n.args[1]) if first else (parts[1] or {}, n.args[0])
            size = static_value(k)
            size = 1.0 if size is None else size
            return {key: x * size if n.op == "mul" else x / size for key, x in own.items()}
        case "scan" | "sum_t" if set(first) == {("own", 0)}:
            return {(n.op.removesuffix("_t"), 0): first["own", 0]}
        case "shift" if "sum" not in {kind for kind, _ in first}:
            later = int(n.attr("n"))  # type: ignore[call-overload]
            return {(kind, k + later): x for (kind, k), x in first.items()}
    return None


# ---- what a return is multiplied by ------------------------------------------------------------

BESIDE = frozenset(
    ["group_sum", "group_max", "others_sum", "sum_b", "max_b", "quantile_b", "position_sum"]
)
LINEAR = frozenset(["add", "sub", "neg", "sg", "live", "mul", "div", "scan", "sum_t", "shift"])


def _factors(term: Term) -> list[Node]:
    """What multiplies the rollout's own signal on its way to the advantage; where the way is not
    linear, the operation itself."""
    own: dict[int, bool] = {}
    assert term.advantage is not None and term.signal is not None
    for n in nodes_below([term.advantage]):
        own[n.id] = n is term.signal or (
            n.op not in BESIDE and any(own.get(a.id, False) for a in n.args)
        )
    out, stack, seen = [], [term.advantage], set()
    while stack:
        n = stack.pop()
        if n is term.signal or n.id in seen:
            continue
        seen.add(n.id)
        mine = [a for a in n.args if own.get(a.id, False)]
        product = len(mine) == 2 if n.op == "mul" else n.op == "div" and mine != [n.args[0]]
        if n.op not in LINEAR or product:
            out.append(n)
            continue
        if n.op in ("mul", "div"):
            out += [a for a in n.args if a not in mine]
        stack += mine
    return out


def scales_only(term: Term) -> bool:
    """Whether the own signal reaches the advantage times a positive number, beside a baseline."""
    row = _row(term)
    return row is not None and row[0] > 0 and all(_number(f) for f in _factors(term))


def _number(factor: Node) -> bool:
    """One number for the whole batch: a constant, or a step size as whitening divides by."""
    return factor.q.axis is Axis.CONST or factor.attr("name") == "one"


def _of_length(factor: Node) -> bool:
    """Reads the length of the response, and nothing that moves but the position."""
    names = {n.attr("name") for n in nodes_below([factor]) if n.op == "input"}
    return "length" in names and names <= {"length", "position", "one"}


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
