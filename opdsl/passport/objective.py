"""What a method really descends: objective, conservativeness and fixed point, from structure.

Temporal credit is read off the graph of the advantage (what is scanned, at which rate, from which
token on); the signal and the state-level fields are recognised by their values (`field`), so a
formula written by hand is treated like the library's. Theory: T1–T9, §6, §7, §11.6.
"""

from __future__ import annotations

import re
from functools import cached_property

import numpy as np

from opdsl.ir.derive import cotangents
from opdsl.ir.program import expand_tails
from opdsl.meaning.graph import dists_below, nodes_below, reads, static_value
from opdsl.meaning.quantity import Info
from opdsl.meaning.spec import Schedule, Spec, Term
from opdsl.passport import field
from opdsl.passport.local import Claims
from opdsl.passport.returns import credit_of, scales_only

RKL, FKL = "KL(student||T)", "KL(T||student)"


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
            if self.credit.kind == "immediate" and term.advantage is not None:
                own = field.shape(self.spec, b.neg(b.mul(term.advantage, lp)), self.teacher)
                if own is not None or not scales_only(term):
                    return own
            return field.shape(self.spec, b.neg(b.mul(term.signal, lp)), self.teacher)
        return field.shape(self.spec, term.loss, self.teacher)

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
        return any(n.op == "logp" and n.attr("dist") == "student" for n in nodes_below(live))

    @cached_property
    def misdrawn(self) -> bool:
        """Reads sampled tokens as its own student's, which another policy drew (T8)."""
        if drawn_as_is(self.spec) or reads(self.term.weight, "rollout_logp"):
            return False
        found = cotangents(self.spec.builder, expand_tails(self.spec.builder, self.term.loss))
        return self.term.rows == "main" and any(c.at_y is not None for c in found)

    @cached_property
    def cut(self) -> str | None:
        """The tail rule of a cut support that the loss runs over, written out or not."""
        s = self.term.support
        used = any(
            n.op in ("sum_v", "lse_v") and n.args[1] in (s.set, s.base)
            for n in nodes_below([self.term.loss])
        )
        return self._named[1] if used else None

    @cached_property
    def _named(self) -> tuple[str | None, str | None]:
        return field.named(self.spec, self.term)

    @cached_property
    def divergence(self) -> str:
        """The loss in words of distributions, `KL(student ‖ T)`; else as it was written."""
        found = self._named[0]
        if found is not None:
            return re.sub(r"\bT\b", self.teacher, found)
        return " ".join(self.term.written.get("feedback", "a loss").split())

    @cached_property
    def teacher(self) -> str:
        """The teacher that T stands for in this term."""
        return next((t for t in self.term.teachers if t != "initial"), "T")

    # -- what it descends -----------------------------------------------------------------------
    @cached_property
    def objective(self) -> str:
        text = self._follows()
        given = [s.policy for s in self.spec.states if s.policy not in MOVING]
        alone = given and len(given) == len(self.spec.states) and not self.term.teachers
        if alone and self.term.route == "loss" and self.sampled:
            return f"likelihood of text from {' and '.join(dict.fromkeys(given))}"
        if self.misdrawn and "not decided" not in text:
            text += " (if the student, as it is now, had drawn the tokens)"
        return text

    def _follows(self) -> str:
        term = self.term
        if term.route == "sft":
            return f"cross-entropy on given text: {self.divergence}"
        if term.route == "reward":
            return self._reward()
        if self.shape is not None and self.shape.zero and self.plain and not self.misdrawn:
            return "none: the expected gradient is zero"
        if term.route == "scores" or (self.sampled and term.teachers):
            return self._expected()
        where = " at visited states"
        if self.sampled:
            where = " over sampled tokens"
        elif self._named[0] is None and self.shape is not None and self.shape.parts:
            return self._expected() + self._support() + self._gated()
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
        term = self.term
        if term.gate.q.live or term.weight.q.live:
            return ", times a live weight"
        out = "" if term.gate.op == "const" else ", gated"
        return out + ("" if static_value(term.weight) is not None else ", weighted")

    def _expected(self) -> str:
        s = self.shape
        if s is None:
            return "not decided"
        if s.zero:
            if max(self.term.gate.q.info, self.term.weight.q.info) >= Info.ACTION:
                return "not decided (only what reads the sampled token beside it has a mean)"
            return "none: the expected gradient is zero"
        if s.parts is not None:
            return f"{combination(s.parts, self.teacher)} at visited states, in expectation over y"
        if s.scaled is not None:
            return f"{pretty(s.scaled, self.teacher)} at visited states, reweighted by state"
        return "no known divergence (not decided)"

    def _reward(self) -> str:
        term, s, credit = self.term, self.shape, self.credit
        if outcome_alone(term):
            return "expected reward of whole sequences"
        if s is not None and s.zero:
            if credit.kind == "immediate":
                return "none: the expected gradient is zero"
            return "only the occupancy part: which states are visited, not which token is right"
        kl, known = self._signal_name()
        if not known:
            return kl
        rerouted = {
            "suppress": "",
            "drop": "" if credit.kind == "immediate" else "; punished tokens ignored",
        }.get(term.routing.kind, "; punished tokens rerouted, so no scalar objective as a whole")
        match credit.kind:
            case "immediate":
                if term.routing.kind == "drop":
                    kl = f"a one-sided {kl} with the same minimiser"
                return f"Σ_t {kl} at visited states, states held fixed (J_fro){self._gated()}{rerouted}"
            case "return_to_go" | "full":
                text = f"{kl} of whole sequences (J_seq)"
                if self.by_length:
                    return (
                        text
                        + " divided by their length"
                        + (
                            ", with a bias: the length depends on the tokens"
                            if credit.kind == "return_to_go"
                            else ""
                        )
                    )
                return text + self._gated() + rerouted
            case "future":
                return (
                    f"the part of {kl} of whole sequences that runs through later states{rerouted}"
                )
            case "gae":
                if credit.gamma == 1:
                    return f"{kl} of whole sequences (J_seq), up to the critic's error{rerouted}"
                return "not the gradient of any objective (discounted return)"
            case "discounted":
                return (
                    f"not the gradient of any objective (discounted return, γ = {credit.gamma:g})"
                )
            case "window":
                return f"between J_fro and J_seq: {kl} of the next {credit.tokens} tokens"
        return "not decided"

    @property
    def by_length(self) -> bool:
        by = self.spec.aggregate in ("sequences", "response_length")
        return by or self.credit.by_length

    def _signal_name(self) -> tuple[str, bool]:
        """What the signal pulls down, and whether that is a divergence at all."""
        s = self.shape
        if s is None:
            return "not decided", False
        if s.parts:
            text = combination(s.parts, self.teacher)
            return (f"[{text}]" if len(s.parts) > 1 else text), True
        if s.scaled is not None:
            return f"{pretty(s.scaled, self.teacher)} reweighted by state", True
        if self.monotone:
            return f"a reshaped {pretty(RKL, self.teacher)} with the same minimiser", True
        if self.one_sided:
            return "no divergence: the reward has one sign, whichever way the student errs", False
        return "no known divergence (not decided)", False

    @cached_property
    def _signal(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(signal, log π_T − log π) [S, Y] on random states."""
        world = field.random_world(3)
        try:
            r = field.Evaluator(world).token(self.term.signal) if self.term.signal else None
        except (field.Unknown, ValueError):
            return None
        return None if r is None else (r, world.teacher[:, 0] - world.student[:, 0])

    @cached_property
    def one_sided(self) -> bool:
        """The same sign for tokens above and below the teacher."""
        if self._signal is None:
            return False
        r, _ = self._signal
        return bool((r <= 1e-12).all() or (r >= -1e-12).all())

    @cached_property
    def monotone(self) -> bool:
        """A bounded or bent log-ratio: the sign of the gap, or a number that grows with it and
        with nothing else; what is added to all tokens alike has no mean field (theory §6.3)."""
        if self._signal is None:
            return False
        r, gap = self._signal
        if not np.isfinite(r).all():
            return False
        steps = np.diff(r.ravel()[np.argsort(gap, axis=None)])
        if steps.min() >= -1e-12 < 1e-12 < steps.max():
            return True
        same = np.sign(r) * np.sign(gap)  # as a product it may overflow
        return bool((same[np.abs(r) > 1e-12] >= 0).all() and (same > 0).any())


def drawn_as_is(spec: Spec) -> bool:
    """Every response is drawn from the student of now, neither tempered nor cut."""
    return all(
        s.kind == "rollouts"
        and s.policy == "student"
        and s.temperature == 1
        and s.top_p == 1
        and not s.top_k
        for s in spec.states
        if _share(s.share) > 0
    )


MOVING = ("student", "old", "blend", "interleaved")  # what the student has a hand in


def on_policy(spec: Spec) -> bool:
    """Whether any visited state moves with the student."""
    return any(
        s.kind == "rollouts" and s.policy in MOVING and _share(s.share) > 0 for s in spec.states
    )


def _share(x: float | Schedule) -> float:
    return max(x.start, x.stop) if isinstance(x, Schedule) else x


def pretty(name: str, teacher: str) -> str:
    return name.replace("||", " ‖ ").replace("T", teacher)


def combination(parts: dict[str, float], teacher: str) -> str:
    """`KL(student ‖ T)`, or a signed sum; a common positive factor is left out."""
    unit = abs(next(iter(parts.values())))
    out = ""
    for name, k in parts.items():
        x = (-k if name.startswith("-") else k) / unit
        sign = ("" if x > 0 else "−") if not out else (" + " if x > 0 else " − ")
        size = "" if abs(abs(x) - 1) < 1e-6 else f"{abs(x):.3g} "
        out += f"{sign}{size}{pretty(name.lstrip('-'), teacher)}"
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
        texts.insert(
            0, f"{name} of whole sequences (J_seq): own token in closed form, the rest by returns"
        )
    return texts[0] if len(texts) == 1 else texts


def conservative_reason(spec: Spec, found: list[View], claim: Claims) -> str:
    """Why the field is the gradient of a scalar, or is not."""
    moving = on_policy(spec)
    if claim.conservative is None:
        return "not decided"
    if not claim.conservative:
        return _why_not(found, moving)
    if claim.zero:
        return "the zero field"
    if any(v.credit.kind == "gae" and v.credit.lam != 1 for v in found):
        return "with an exact critic; otherwise (1 − λ) times its error is left over"
    if claim.j_seq:
        return "the sequence objective"
    return "an objective of whole sequences" if moving else "states do not move with the student"


def outcome_alone(term: Term) -> bool:
    """A reward of the verifier without a word of a teacher."""
    signal = term.signal
    return not term.teachers and signal is not None and not dists_below([signal])


def _why_not(found: list[View], moving: bool) -> str:
    kinds = {v.credit.kind for v in found if not outcome_alone(v.term)}
    if "discounted" in kinds or any(
        v.credit.kind == "gae" and (v.credit.gamma or 0) < 1 for v in found
    ):
        return "discounted credit"
    if "window" in kinds:
        return "returns cut short"
    if any(v.by_length and v.credit.kind == "return_to_go" for v in found):
        return "returns divided by the length"
    if len(found) == 1 and "immediate" in kinds and found[0].shape and found[0].shape.only(RKL):
        return "immediate credit drops E[∇log π_t · W(s_{t+1})], W the KL still to come"
    if "immediate" in kinds:
        return "immediate credit"
    return "frozen states" if moving else "frozen factors"
