"""Rules on temporal credit, baselines and critics: R30-R34, R36, R37 (theory §5, §8)."""

from __future__ import annotations

from opdsl.meaning.graph import dists_below, nodes_below, reads
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis, Info
from opdsl.passport.rules.base import Case, below_until, critic_values, info_beside


def credit(case: Case) -> None:
    """What the rule of credit, its baseline and its critic do to the mean."""
    assert case.term.advantage is not None
    below = nodes_below([case.term.advantage])
    _rule(case)
    _baseline(case)
    _self_baseline(case, below)
    _critic(case, below)
    _length(case)
    _whitened(case, below)


def _rule(case: Case) -> None:
    """What the rule leaves out (T3, T4, T10 and theory §8.2)."""
    how, span = case.credit, case.span("credit", "feedback")
    if how.kind == "immediate" and _of_the_sequence(case.term.signal):
        return  # the outcome stands on every token as it is: nothing later is left out
    if how.kind == "immediate":
        case.add(
            "OPD501",
            span,
            "immediate credit follows the token-level KL, not the sequence-level KL",
            "bias boundary: every later log-ratio is dropped",
            notes=[
                "what you minimise: the divergence at the visited states, states held fixed",
                "what you leave out: how the token y_t changes the states that follow",
                'a known trade for lower variance; say so with  accept immediate_credit "…"',
            ],
            helps=["credit return_to_go", 'accept immediate_credit "why"'],
        )
    elif how.kind == "gae" and not (how.gamma == 1 and how.lam == 1):
        case.add(
            "OPD509",
            span,
            "with lam or gamma below 1 the critic's error is the bias",
            "bias = (1 - lam) × the critic's error at later states",
            helps=[
                "lam = 1 is unbiased for any critic",
                'accept value_drift "the report prints its explained variance"',
            ],
        )
    elif how.kind == "discounted":
        case.add(
            "OPD506",
            span,
            "a discounted return is the gradient of no objective",
            f"gamma = {how.gamma:g}: biased for the sequence-level and for the token-level KL",
            helps=[
                "gamma = 1 is the sequence objective, immediate credit the token-level one",
                'accept discounted_target "why"',
            ],
        )
    elif how.kind == "window":
        case.add(
            "OPD527",
            span,
            f"a window of {how.tokens} tokens drops what happens after it",
            "between the token-level and the sequence-level objective",
            helps=["credit return_to_go keeps everything", 'accept truncated_return "why"'],
        )


def _of_the_sequence(signal: Node | None) -> bool:
    """A reward of the whole response without a log-ratio beside it."""
    return (
        signal is not None
        and signal.q.axis < Axis.TOK
        and reads(signal, "outcome")
        and not dists_below([signal])
    )


# ---- baselines -----------------------------------------------------------------------------------


def _baseline(case: Case) -> None:
    """R31: what is subtracted must be known before y is drawn (T5)."""
    term = case.term
    assert term.advantage is not None
    subtracts = term.returned is not None and term.advantage is not term.returned
    reads_action = subtracts and info_beside(term.advantage, term.returned) >= Info.ACTION
    inside = term.returned if term.returned is not None else term.advantage
    beside = [n for n in below_until(inside, term.signal) if _own_token(n)]
    if not reads_action and not beside and not _critic_of_action(case):
        return
    case.add(
        "OPD315",
        case.span("credit"),
        "this baseline reads the sampled token: subtracting it changes the objective",
        "a baseline must be known before the token is drawn",
        notes=["E[b ∇ log π(y) | s] is zero only for b of the state, the prompt, other rollouts"],
        helps=[
            "baseline = kl_state, leave_one_out, value(V = V)",
            "what depends on y belongs into `feedback reward`",
            'allow R31 "why"',
        ],
    )


def _own_token(n: Node) -> bool:
    if n.op == "at_y":
        return n.args[0].op == "logp"
    return n.op == "input" and n.attr("name") == "rollout_logp"


def _critic_of_action(case: Case) -> bool:
    """A bootstrapped value that reads more than the state (R33)."""
    below = nodes_below([case.term.advantage] if case.term.advantage is not None else [])
    for n in below:
        if n.op != "shift" or not critic_values(nodes_below([n])) or n.args[0].op == "scan":
            continue
        if n.args[0].q.info >= Info.ACTION and not _returns(n.args[0]):
            return True
    return False


def _returns(n: Node) -> bool:
    return any(x.op in ("scan", "sum_t", "shift") for x in nodes_below([n]))


def _self_baseline(case: Case, below: list[Node]) -> None:
    if not any(n.op == "group_sum" and n.args[0].op != "input" for n in below):
        return
    case.add(
        "OPD505",
        case.span("credit"),
        "this baseline contains the rollout's own return: it shrinks the gradient by 1 - 1/group",
        "own rollout included",
        helps=["baseline = leave_one_out", 'accept baseline_includes_self "why"'],
    )


# ---- critics ---------------------------------------------------------------------------------------


def _critic(case: Case, below: list[Node]) -> None:
    """R36: a value that is never positive cannot follow a reward that is."""
    signal = case.term.signal
    if signal is None or not reads(signal, "outcome"):
        return
    bounded = [n for n in below if n.q.high <= 0 and critic_values(nodes_below([n]))]
    if not any(n.op in ("min", "neg", "where", "mul", "sub") for n in bounded):
        return
    case.add(
        "OPD533",
        case.span("credit"),
        "this value is never positive, the reward can be",
        "log-ratio returns are negative on average, outcomes are not",
        helps=["use the critic as it is:  gae(V = V, …)", 'accept value_sign "why"'],
    )


# ---- lengths and scales ---------------------------------------------------------------------------


def _length(case: Case) -> None:
    """R34: a weight 1/T depends on the tokens (T7)."""
    if not case.by_length:
        return
    exact = [
        "the exact estimator of a length-normalised objective is the full return on every token"
    ]
    neutral = [
        "aggregate mean(over = tokens)",
        "aggregate sum(over = tokens) is exactly neutral",
    ]
    if case.credit.kind in ("immediate", "full"):
        case.add(
            "OPD514",
            case.span("credit"),
            "each sequence is divided by its own length, which depends on the sampled tokens",
            "states of short responses count more, whichever token made them short",
            notes=exact if case.credit.kind == "full" else [],
            helps=[*neutral, 'accept length_coupling "why"'],
        )
        return
    inside = case.credit.by_length
    case.add(
        "OPD318",
        case.span("credit"),
        "returns divided by the length are biased: the length depends on the tokens",
        "this return is scaled by a number that knows the length"
        if inside
        else "`aggregate` divides every sequence by its own length",
        notes=exact,
        helps=["credit return_to_go    the plain return"] if inside else neutral,
    )


def _measures(n: Node, name: str) -> bool:
    """Whether an input enters by its size: rollouts that are counted by a test have none."""
    stack, seen = [n], set()
    while stack:
        x = stack.pop()
        if x.id in seen or x.op in ("lt", "le", "eq"):
            continue
        seen.add(x.id)
        if x.op == "input" and x.attr("name") == name:
            return True
        stack += x.args
    return False


def _whitened(case: Case, below: list[Node]) -> None:
    """R37: one scale for a sum of a log-ratio and an outcome."""
    for n in below:
        if n.op != "div" or not dists_below([n.args[0]]) or not reads(n.args[0], "outcome"):
            continue
        scale = nodes_below([n.args[1]])
        if any(x.op in ("sum_b", "group_sum") and _measures(x, "outcome") for x in scale):
            case.add(
                "OPD524",
                case.span("credit"),
                "whitening after the sum: the outcome's spread sets the teacher's coefficient",
                "divided by the spread of log-ratio and outcome together",
                helps=[
                    "whiten the outcome before it is added",
                    "regularize 0.5 * outcome keeps the two apart",
                    'accept scaled_after_sum "why"',
                ],
            )
            return
