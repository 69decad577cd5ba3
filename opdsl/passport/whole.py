"""Bias boundaries of a whole method: whose text it reads, and what its regularizers add."""

from __future__ import annotations

from opdsl.codes import make
from opdsl.diagnostics import Label, Report
from opdsl.meaning.graph import reads
from opdsl.meaning.spec import Spec


def states(spec: Spec, report: Report) -> None:
    """Sampled-token rewards on text the student did not write (R09)."""
    foreign = [
        s for s in spec.states if s.kind == "sequences" or s.policy not in ("student", "old")
    ]
    for term in spec.feedback_terms:
        if term.route != "reward" or not foreign or reads(term.weight, "rollout_logp"):
            continue
        s = foreign[0]
        report.add(
            make(
                "OPD316",
                term.spans.get("feedback", spec.span),
                "a sampled-token reward on text the student did not sample estimates another objective",
                "reads the sampled token as if the student had drawn it",
                secondary=[Label(s.span, f"text from {s.policy}")],
                notes=["under other text the mean of log student - log T is not KL(student || T)"],
                helps=["feedback loss KL(T || student)", "state rollouts(student)"],
            )
        )


def regularizers(spec: Spec, report: Report) -> None:
    feedback = [t for t in spec.feedback_terms]
    imitates = any(t.teachers for t in feedback)
    for term in spec.terms:
        if term.kind != "regularizer" or not imitates:
            continue
        if term.route == "sft":
            if any(s.kind == "rollouts" for s in spec.states):
                report.add(
                    make(
                        "OPD523",
                        term.spans["regularize"],
                        "given text and own rollouts are two different averages",
                        "this term is averaged over its own rows",
                        helps=['accept two_estimands "why"'],
                    )
                )
        elif term.route == "loss":
            report.add(
                make(
                    "OPD515",
                    term.spans["regularize"],
                    "this regularizer moves the target away from the teacher",
                    "the minimiser is no longer the teacher",
                    helps=['accept target_shift "why"'],
                )
            )
