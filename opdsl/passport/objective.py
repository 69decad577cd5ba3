"""What a method really descends: objective, conservativeness and fixed point, from structure.

Temporal credit is read off the graph of the advantage (what is scanned, at which rate, from which
token on); the signal and the state-level fields are recognised by their values (`field`), so a
formula written by hand is treated like the library's. Theory: T1–T9, §6, §7, §11.6.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from opdsl.ir.derive import cotangents
from opdsl.ir.program import expand_tails
from opdsl.meaning.graph import dists_below, nodes_below, static_value
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Info
from opdsl.meaning.spec import Schedule, Spec, Term
from opdsl.passport import field

RKL, FKL = "KL(student||T)", "KL(T||student)"


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


# ---- terms -----------------------------------------------------------------------------------


class View:
    """A term as the passport sees it."""

    def __init__(self, spec: Spec, term: Term):
        self.spec, self.term = spec, term
        self.credit = credit_of(term)

    @cached_property
    def shape(self) -> field.Shape | None:
        """The expected field of the term at a state, its credit taken as immediate."""
        b, term = self.spec.builder, self.term
        if term.route == "reward" and term.signal is not None:
            lp = b.at_y(b.logp("student", True))
            return field.shape(self.spec, b.neg(b.mul(term.signal, lp)))
        return field.shape(self.spec, term.loss)

    @cached_property
    def sampled(self) -> bool:
        """Whether the field reads the sampled token only."""
        found = cotangents(self.spec.builder, expand_tails(self.spec.builder, self.term.loss))
        return all(c.dense is None and not c.at_sets for c in found)

    @property
    def plain(self) -> bool:
        """Neither gated nor weighted by more than a fixed number."""
        return self.term.gate.op == "const" and static_value(self.term.weight) is not None

    @cached_property
    def reads_student(self) -> bool:
        """A frozen factor of the field that moves with the student."""
        live = [self.term.gate, self.term.weight]
        return any(
            n.op == "logp" and n.attr("dist") == "student" for n in nodes_below(live)
        )

    @cached_property
    def cut(self) -> str | None:
        """The tail rule of a cut support that the loss runs over."""
        tail, s = self.term.support.tail, self.term.support
        used = any(
            n.op in ("sum_v", "lse_v") and n.args[1] in (s.set, s.base)
            for n in nodes_below([self.term.loss])
        )
        return tail if used else None

    @cached_property
    def divergence(self) -> str:
        """The loss in words of distributions, `KL(student ‖ T)`; else as it was written."""
        found = field.divergence(self.spec, self.term)
        if found is not None:
            return re.sub(r"\bT\b", self.teacher, found)
        return " ".join(self.term.written.get("feedback", "a loss").split())

    @cached_property
    def teacher(self) -> str:
        read = self.term.teachers or dists_below([self.term.loss])
        return read[0] if len(read) == 1 else "T"

    # -- what it descends -----------------------------------------------------------------------
    @cached_property
    def objective(self) -> str:
        term = self.term
        if term.route == "sft":
            return f"cross-entropy on given text: {self.divergence}"
        if term.route == "reward":
            return self._reward()
        if term.route == "scores" or (self.sampled and term.teachers):
            return self._expected()
        where = " at visited states"
        if self.sampled:
            where = " over sampled tokens"
        return self.divergence + where + self._support() + self._gated()

    def _support(self) -> str:
        how = {
            "bin": ", the mass outside the support as one entry",
            "renormalize": ", both sides renormalised on the support",
            "drop": ", mass outside the support dropped",
            "detach": ", mass outside the support dropped, logarithms held",
            "sampled": ", the tail by its sampled token",
        }
        return how.get(self.cut or "", "")

    def _gated(self) -> str:
        return "" if self.term.gate.op == "const" else ", gated"

    def _expected(self) -> str:
        s = self.shape
        if s is None:
            return "not decided"
        if s.zero:
            return "none: the expected gradient is zero"
        if s.parts is not None:
            return f"{combination(s.parts, self.teacher)} at visited states, in expectation over y"
        if s.scaled is not None:
            return f"{pretty(s.scaled, self.teacher)} at visited states, reweighted by state"
        return "no known divergence (not decided)"

    def _reward(self) -> str:
        term, s, credit = self.term, self.shape, self.credit
        if not term.teachers and term.signal is not None and not dists_below([term.signal]):
            return "expected reward of whole sequences"
        kl = self._signal_name()
        match credit.kind:
            case "immediate":
                if s is not None and s.zero:
                    return "none: the expected gradient is zero"
                text = f"Σ_t {kl} at visited states, states held fixed (J_fro)"
                if term.routing.kind in ("suppress", "proportional"):
                    return text
                return text + "; punished tokens rerouted, so no scalar objective as a whole"
            case "return_to_go" | "full":
                return f"{kl} of whole sequences (J_seq)"
            case "future":
                return f"the part of {kl} of whole sequences that runs through later states"
            case "gae":
                if credit.gamma == 1:
                    return f"{kl} of whole sequences (J_seq), up to the critic's error"
                return "not the gradient of any objective (discounted return)"
            case "discounted":
                return f"not the gradient of any objective (discounted return, γ = {credit.gamma:g})"
            case "window":
                return f"between J_fro and J_seq: {kl} of the next {credit.tokens} tokens"
        return "not decided"

    def _signal_name(self) -> str:
        s = self.shape
        if s is None:
            return "a divergence (not decided)"
        if s.parts is not None and s.parts:
            return combination(s.parts, self.teacher)
        if s.scaled is not None:
            return f"{pretty(s.scaled, self.teacher)} reweighted by state"
        if self.monotone:
            return f"a reshaped {pretty(RKL, self.teacher)} with the same minimiser"
        return "a signal that is no known divergence"

    @cached_property
    def monotone(self) -> bool:
        """A bounded or bent log-ratio: same sign, zero where both agree (theory §6.3)."""
        world = field.random_world(3)
        run = field.Evaluator(world)
        try:
            r = run.token(self.term.signal) if self.term.signal is not None else None
        except (field.Unknown, ValueError):
            return False
        if r is None:
            return False
        gap = world.teacher[:, 0] - world.student[:, 0]
        return bool((r * gap >= -1e-12).all() and (r * gap > 0).any())

    # -- conservative? -----------------------------------------------------------------------------
    def conservative(self, on_policy: bool) -> bool | None:
        """Whether the term's field is a gradient of a scalar; None is not decided (T4, T9)."""
        term, credit = self.term, self.credit
        if term.rows == "golden":
            return True
        if term.route == "reward":
            if credit.kind == "none":
                return None
            if term.routing.kind != "suppress" or not on_policy:
                return False if credit.kind in ("immediate", "discounted", "window") else None
            if credit.exact and self.plain:
                if self.spec.aggregate in ("sequences", "response_length"):
                    return False if credit.kind == "return_to_go" else None
                return None if _tilted(self.spec) else True
            if credit.kind == "gae":
                if credit.gamma is not None and credit.gamma < 1:
                    return False
                return True if credit.lam == 1 and self.plain and not _tilted(self.spec) else None
            if credit.kind in ("immediate", "discounted", "window"):
                return False
            return None
        if self.shape is not None and self.shape.zero:
            return True
        if on_policy:
            return False
        if term.route == "scores":
            return True if self.shape is not None and self.shape.parts is not None else None
        if self.reads_student or not self._row_local():
            return None
        return None if self.cut in ("detach", "sampled") or _holds_student(term.loss) else True

    def _row_local(self) -> bool:
        from opdsl.meaning.node import COUPLING_OPS

        return not any(n.op in COUPLING_OPS for n in nodes_below([self.term.loss]))


def _holds_student(loss: Node) -> bool:
    """A stop-gradient of a student quantity inside the loss."""
    return any(
        n.op == "sg" and any(x.op == "logp" and x.q.live for x in nodes_below([n]))
        for n in nodes_below([loss])
    )


def _tilted(spec: Spec) -> bool:
    return any(
        s.kind == "rollouts" and (s.temperature != 1 or s.top_p != 1 or s.top_k or s.policy == "old")
        for s in spec.states
    )


def on_policy(spec: Spec) -> bool:
    """Whether any visited state moves with the student."""
    return any(
        s.kind == "rollouts" and s.policy in ("student", "old") and _share(s.share) > 0
        for s in spec.states
    )


def _share(x: float | Schedule) -> float:
    return max(x.start, x.stop) if isinstance(x, Schedule) else x


def pretty(name: str, teacher: str) -> str:
    return name.replace("||", " ‖ ").replace("T", teacher)


def combination(parts: dict[str, float], teacher: str) -> str:
    """`KL(student ‖ T)`, or a signed sum; a common positive factor is left out."""
    values = list(parts.values())
    unit = abs(values[0])
    out = ""
    for name, k in parts.items():
        x = k / unit
        sign = "" if not out and x > 0 else "−" if not out else " + " if x > 0 else " − "
        size = "" if abs(abs(x) - 1) < 1e-6 else f"{abs(x):.3g} "
        out += f"{sign}{size}{pretty(name.lstrip('-'), teacher) if not name.startswith('-') else pretty(name, teacher)}"
    return out


# ---- the whole method ---------------------------------------------------------------------------


def views(spec: Spec) -> list[View]:
    return [View(spec, t) for t in spec.terms]


def split_kl(found: list[View]) -> tuple[View, View] | None:
    """The exact KL at the state and the future return of the same KL: together J_seq (T9)."""
    exact = [
        v for v in found
        if v.term.route == "loss" and v.plain and v.shape is not None and v.shape.only(RKL)
    ]  # fmt: skip
    later = [
        v for v in found
        if v.credit.kind == "future" and v.plain and v.shape is not None and v.shape.only(RKL)
        and v.term.routing.kind == "suppress"
    ]  # fmt: skip
    if len(exact) != 1 or len(later) != 1:
        return None
    sizes = [
        v.shape.parts[RKL] * (static_value(v.term.weight) or 0)  # type: ignore[union-attr,index]
        for v in (exact[0], later[0])
    ]
    return (exact[0], later[0]) if abs(sizes[0] - sizes[1]) < 1e-6 * abs(sizes[0]) else None


def objective(found: list[View]) -> str | list[str]:
    pair = split_kl(found)
    rest = [v for v in found if pair is None or v not in pair]
    texts = [v.objective for v in rest]
    if pair is not None:
        name = pretty(RKL, pair[0].teacher)
        texts.insert(0, f"{name} of whole sequences (J_seq): own token in closed form, the rest by returns")
    return texts[0] if len(texts) == 1 else texts


def conservative(spec: Spec, found: list[View]) -> tuple[bool | None, str]:
    """(decision, reason)."""
    moving = on_policy(spec)
    pair = split_kl(found)
    if pair is not None and moving and not _tilted(spec) and spec.aggregate in ("sum", "tokens"):
        rest = [v for v in found if v not in pair]
        answers = [True, *(v.conservative(moving) for v in rest)]
    else:
        answers = [v.conservative(moving) for v in found]
    if False in answers and answers.count(None) == 0:
        return False, _why_not(found, moving)
    if all(a is True for a in answers):
        return True, "the sequence objective" if moving else "states do not move with the student"
    if False in answers:
        return False, _why_not(found, moving)
    kinds = {v.credit.kind for v in found}
    if "gae" in kinds:
        return None, "yes with an exact critic; otherwise (1 − λ) times its error is left over"
    return None, "not decided"


def _why_not(found: list[View], moving: bool) -> str:
    kinds = {v.credit.kind for v in found}
    if "discounted" in kinds or any(v.credit.kind == "gae" and (v.credit.gamma or 0) < 1 for v in found):
        return "discounted credit"
    if "window" in kinds:
        return "returns cut short"
    if "immediate" in kinds:
        return "immediate credit"
    return "frozen states" if moving else "frozen factors"


def state_signal(term: Term) -> bool:
    """An advantage that does not read the sampled token: E[∇ log π(y)] = 0."""
    if term.route != "reward" or term.signal is None or term.advantage is None:
        return False
    return term.signal.q.info <= Info.STATE and term.advantage.q.info <= Info.STATE
