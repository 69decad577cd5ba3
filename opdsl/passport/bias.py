"""Bias boundaries: legal, published, but not what the symbols suggest (theory §11.3).

Decided from types, measurability and the graph of the loss and its derived cotangent; no rule
looks at the name of a method or of a definition.
"""

from __future__ import annotations

from opdsl.codes import make
from opdsl.diagnostics import Label, Report
from opdsl.ir.derive import cotangents
from opdsl.meaning.graph import dists_below, nodes_below, reads
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import INF, Info
from opdsl.meaning.spec import Spec, Term
from opdsl.passport.returns import Credit, credit_of
from opdsl.passport.whole import regularizers, states
from opdsl.source import Span


def boundaries(spec: Spec, report: Report) -> None:
    """Adds every boundary a specification crosses."""
    for term in spec.terms:
        _Term(spec, term, report).run()
    states(spec, report)
    regularizers(spec, report)


# ---- one term -------------------------------------------------------------------------------------


class _Term:
    def __init__(self, spec: Spec, term: Term, report: Report):
        self.spec, self.term, self.report = spec, term, report
        self.b = spec.builder

    def span(self, *keys: str) -> Span:
        for key in keys:
            if key in self.term.spans:
                return self.term.spans[key]
        return self.spec.span

    def add(self, code: str, span: Span, message: str, label: str = "", **more) -> None:
        self.report.add(make(code, span, message, label, **more))

    def run(self) -> None:
        if self.term.route == "loss":
            self._gradient()
        if self.term.kind == "feedback":
            self._support()
            if self.term.route == "reward":
                self._reward()
                self._routing()
            self._factors()

    # -- direct losses -------------------------------------------------------------------------
    def _gradient(self) -> None:
        term = self.term
        field = cotangents(self.b, term.loss)
        roots = [r for c in field for r in c.roots]
        span = self.span("feedback")
        if not roots:
            named = ", ".join(term.teachers)
            self.add(
                "OPD308",
                span,
                "this loss does not depend on the student: its gradient is zero everywhere",
                "nothing to descend",
                notes=[f"it reads {named}, which is frozen"] if named else [],
                helps=[
                    "feedback loss KL(student || T)",
                    "stop-gradients and a detached tail remove the gradient",
                ],
            )
            return
        teachers = [t for t in dists_below([term.feedback or term.loss])]
        if term.teacher_named and not dists_below(roots) and teachers:
            t = teachers[0]
            text = term.written.get("feedback", "")
            self.add(
                "OPD302",
                span,
                "this loss names a teacher that cannot influence its gradient",
                f"{t} has dropped out of the gradient",
                notes=["averaged over student samples it is exactly zero"]
                if self._sampled_only(field)
                else [],
                helps=[
                    f"feedback reward logratio({t}, rollout)            policy gradient of KL(student || {t})",
                    f"feedback loss   0.5 * logratio(student, {t})^2    the same gradient, differentiated",
                ]
                if self._sampled_only(field)
                else [f"check what `{text[:40]}` leaves of {t} once it is differentiated"],
            )
            return
        self._own_samples(field)

    def _sampled_only(self, field) -> bool:
        return all(c.dense is None and not c.at_sets for c in field)

    def _own_samples(self, field) -> None:
        """Likelihood of the student's own samples, chosen by nobody: it teaches itself."""
        term = self.term
        on_policy = any(
            s.kind == "rollouts" and s.policy in ("student", "old") for s in self.spec.states
        )
        if (
            term.kind != "feedback"
            or term.teachers
            or not on_policy
            or not self._sampled_only(field)
        ):
            return
        if (
            reads(term.gate, "outcome")
            or reads(term.weight, "outcome")
            or reads(term.loss, "outcome")
        ):
            return
        self.add(
            "OPD317",
            self.span("feedback"),
            "this raises the likelihood of the student's own samples, whatever they are",
            "no teacher, no verifier",
            notes=["its expected gradient is zero; what remains is drift toward the last batch"],
            helps=[
                "gate passed()    keeps rollouts the verifier accepts",
                "regularize 0.1 * sft(data = golden)",
            ],
        )

    def _support(self) -> None:
        term, tail = self.term, self.term.support.tail
        if tail not in ("drop", "renormalize") or term.route != "loss":
            return
        set_ = term.support.set
        used = [
            n for n in nodes_below([term.loss]) if n.op in ("sum_v", "lse_v") and n.args[1] is set_
        ]
        if not used:
            return
        support = self.span("support")
        if tail == "drop":
            self.add(
                "OPD502",
                support,
                "a divergence over a cut support is not a divergence: it can be negative",
                "mass outside the support is forgotten",
                secondary=[
                    Label(self.span("feedback"), "its lowest value is not at student = teacher")
                ],
                notes=["`--fix` is not offered: the repairs are different methods"],
                helps=[
                    "tail = bin            keep the remaining mass as one extra entry",
                    "tail = renormalize    compare shapes inside the support",
                    "support full          no cut",
                ],
            )
        else:
            self.add(
                "OPD503",
                support,
                "a renormalised support is blind to the mass outside it",
                "the student may move mass in or out freely",
                helps=[
                    "tail = bin keeps the remaining mass as one entry",
                    'accept renormalized_support "why"',
                ],
            )

    # -- rewards -------------------------------------------------------------------------------
    def _reward(self) -> None:
        term = self.term
        assert term.advantage is not None and term.signal is not None
        a, r = term.advantage, term.signal
        if r.q.info <= Info.STATE and r.value is None:
            self._state_signal(a, self.span("credit", "feedback"))
            return
        self._mismatch()
        credit = credit_of(term)
        self._credit(credit)
        self._self_baseline(nodes_below([a]))
        if credit.kind not in ("immediate", "full"):
            self._length()

    def _state_signal(self, a: Node, span: Span) -> None:
        if a.q.info <= Info.STATE:
            self.add(
                "OPD307",
                self.span("feedback"),
                "this reward is the same whichever token was sampled: its expected gradient is zero",
                "a function of the state alone",
                notes=["E[∇ log π(y) | s] = 0: a state-only advantage is pure noise"],
                helps=[
                    "feedback loss …     differentiate the divergence instead",
                    "feedback reward logratio(T, rollout)",
                ],
            )
        else:
            self.add(
                "OPD520",
                self.span("feedback"),
                "a state-only reward with returns teaches only which states to visit",
                "no local matching: the token's own choice is not compared",
                helps=["feedback reward logratio(T, rollout)", 'accept occupancy_only "why"'],
            )

    def _credit(self, credit: Credit) -> None:
        """What the rule of credit leaves out (T3, T4, T10 and theory §8.2)."""
        span = self.span("credit", "feedback")
        if credit.kind == "immediate":
            self.add(
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
        elif credit.kind == "gae" and not (credit.gamma == 1 and credit.lam == 1):
            self.add(
                "OPD509",
                span,
                "with lam or gamma below 1 the critic's error is the bias",
                "bias = (1 - lam) × the critic's error at later states",
                helps=[
                    "lam = 1 is unbiased for any critic",
                    'accept value_drift "the report prints its explained variance"',
                ],
            )
        elif credit.kind == "discounted":
            self.add(
                "OPD506",
                span,
                "a discounted return is the gradient of no objective",
                f"gamma = {credit.gamma:g}: biased for the sequence-level and for the token-level KL",
                helps=[
                    "gamma = 1 is the sequence objective, immediate credit the token-level one",
                    'accept discounted_target "why"',
                ],
            )
        elif credit.kind == "window":
            self.add(
                "OPD527",
                span,
                f"a window of {credit.tokens} tokens drops what happens after it",
                "between the token-level and the sequence-level objective",
                helps=["credit return_to_go keeps everything", 'accept truncated_return "why"'],
            )

    def _self_baseline(self, below: list[Node]) -> None:
        if not any(n.op == "group_sum" and n.args[0].op != "input" for n in below):
            return
        self.add(
            "OPD505",
            self.span("credit"),
            "this baseline contains the rollout's own return: it shrinks the gradient by 1 - 1/group",
            "own rollout included",
            helps=["baseline = leave_one_out", 'accept baseline_includes_self "why"'],
        )

    def _length(self) -> None:
        if self.spec.aggregate not in ("sequences", "response_length"):
            return
        self.add(
            "OPD318",
            self.span("credit"),
            "returns divided by the length are biased: the length depends on the tokens",
            "`aggregate` divides every sequence by its own length",
            notes=[
                "the exact estimator of a length-normalised objective is the full return on every token"
            ],
            helps=[
                "aggregate mean(over = tokens)",
                "aggregate sum(over = tokens) is exactly neutral",
            ],
        )

    def _mismatch(self) -> None:
        if reads(self.term.weight, "rollout_logp"):
            return
        for s in self.spec.states:
            if s.kind == "rollouts" and s.policy == "old":
                self.add(
                    "OPD507",
                    s.span,
                    "these rollouts come from an older student and no ratio corrects for it",
                    f"{s.lag} step{'s' if s.lag != 1 else ''} behind",
                    helps=[
                        "weight truncated_ratio(student, rollout)",
                        'accept stale_rollouts "why"',
                    ],
                )
            elif s.kind == "rollouts" and s.policy == "student" and _tilted(s):
                self.add(
                    "OPD504",
                    s.span,
                    "tokens are drawn from a changed student but scored with the plain one",
                    _tilt(s),
                    secondary=[Label(self.span("feedback"), "a reward on the sampled token")],
                    notes=["on the loss route this would only change which states are visited"],
                    helps=[
                        "temperature = 1, top_p = 1",
                        "weight ratio(student, rollout)",
                        'accept sampler_mismatch "why"',
                    ],
                )

    # -- routing ---------------------------------------------------------------------------------
    def _routing(self) -> None:
        routing = self.term.routing
        if routing.kind in ("drop",):
            self._one_sided(routing.span)
        if routing.kind != "counterfactual":
            return
        assert routing.candidates is not None and routing.strength is not None
        below = nodes_below([routing.candidates])
        teacher = any(
            n.op == "logp" and n.attr("dist") not in ("student", "initial") for n in below
        )
        student = any(n.op == "logp" and n.attr("dist") == "student" for n in below)
        if not (teacher and student):
            missing = "teacher" if not teacher else "student"
            self.add(
                "OPD517",
                routing.span,
                f"the candidates have no condition on the {missing}",
                "mass may go to tokens the teacher does not support"
                if missing == "teacher"
                else "mass may go to tokens the student cannot reach",
                helps=[
                    "among = {v in support: T[v] > student[v] and student[v] >= 0.001}",
                    'accept unguarded_candidates "why"',
                ],
            )
        elif not _deficit_guard(routing.candidates):
            self.add(
                "OPD510",
                routing.span,
                "these candidates need not be in deficit: routing changes the fixed point",
                "no descent of either KL is guaranteed",
                helps=["add  T[v] > student[v]  to `among`", 'accept routed_target "why"'],
            )
        if routing.strength.q.high == INF:
            self.add(
                "OPD516",
                routing.span,
                "the strength of this routing has no bound",
                "one very unlikely token can dominate the step",
                helps=["strength = min(5 nats, -A)", 'accept unbounded_strength "why"'],
            )

    def _one_sided(self, span: Span) -> None:
        self.add(
            "OPD526",
            span,
            "punished tokens are ignored: this is no longer the reverse KL",
            "the teacher stays a fixed point, the way there is slower",
            helps=["routing proportional", 'accept one_sided_signal "why"'],
        )

    # -- gates and weights -------------------------------------------------------------------------
    def _factors(self) -> None:
        term = self.term
        for kind, node in (("gate", term.gate), ("weight", term.weight)):
            if node.op == "const":
                continue
            below = nodes_below([node])
            if any(n.op in ("quantile_b", "max_b", "position_sum") for n in below):
                self.add(
                    "OPD518",
                    self.span(kind),
                    f"this {kind} is relative to the batch: the same token counts differently elsewhere",
                    "computed over the whole optimizer batch",
                    helps=["use a fixed threshold", 'accept batch_relative "why"'],
                )
            if node.q.info is Info.FUTURE:
                self.add(
                    "OPD512",
                    self.span(kind),
                    f"this {kind} reads what happens after the token",
                    "each state's field is reweighted by the outcome it led to",
                    notes=[
                        "that is often the point of a verifier gate; it is no longer the plain objective"
                    ],
                    helps=['accept outcome_weight "why"'],
                )
            elif node.q.info is Info.ACTION and self._sampled_field() and not _harmless(below):
                self.add(
                    "OPD513",
                    self.span(kind),
                    f"this {kind} reads the sampled token: it reshapes the signal itself",
                    "equivalent to another per-token signal",
                    helps=['accept action_weight "why"'],
                )

    def _sampled_field(self) -> bool:
        return self._sampled_only(cotangents(self.b, self.term.loss))


def _harmless(below: list[Node]) -> bool:
    """Importance ratios and special-token masks are action weights by design."""
    inputs = {n.attr("name") for n in below if n.op == "input"}
    return "rollout_logp" in inputs or "special" in inputs


def _tilted(s) -> bool:
    return s.temperature != 1 or s.top_p != 1 or s.top_k is not None


def _tilt(s) -> str:
    parts = []
    if s.temperature != 1:
        parts.append(f"temperature {s.temperature:g}")
    if s.top_p != 1:
        parts.append(f"the top {s.top_p:.0%} of the mass")
    if s.top_k is not None:
        parts.append(f"the top {s.top_k} tokens")
    return "the sampler: " + ", ".join(parts)


def _deficit_guard(mask: Node) -> bool:
    """A conjunct student[v] < teacher[v] (in probability or log-probability)."""
    stack, conjuncts = [mask], []
    while stack:
        n = stack.pop()
        if n.op == "and":
            stack += n.args
        else:
            conjuncts.append(n)
    for c in conjuncts:
        if c.op in ("lt", "le"):
            low, high = dists_or_student(c.args[0]), dists_or_student(c.args[1])
            if low == {"student"} and high and "student" not in high:
                return True
    return False


def dists_or_student(node: Node) -> set[str]:
    return {
        str(n.attr("dist")) for n in nodes_below([node]) if n.op == "logp" and _value_leaf(node, n)
    }


def _value_leaf(root: Node, leaf: Node) -> bool:
    """Whether the leaf is read for its value, not to choose an index set."""
    from opdsl.meaning.node import SET_OPS

    seen: set[int] = set()
    stack = [root]
    while stack:
        n = stack.pop()
        if n is leaf:
            return True
        if n.id in seen or n.op in SET_OPS:
            continue
        seen.add(n.id)
        stack += n.args
    return False
