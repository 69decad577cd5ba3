"""The rules R01…R66 (theory §11.3): legal, published, but not what the symbols suggest.

Decided from types, measurability and the derived coefficients; where structure does not decide,
from the values of the field on random states. No rule looks at the name of a method or of a
definition. Errors and warnings are reported by `boundaries`; notes by `notes`, for `explain`.
"""

from __future__ import annotations

from opdsl.diagnostics import Diagnostic, Report
from opdsl.meaning.spec import Spec
from opdsl.passport.rules.base import Case
from opdsl.passport.rules.credit import credit
from opdsl.passport.rules.direct import direct
from opdsl.passport.rules.factors import factors
from opdsl.passport.rules.rewards import rewards
from opdsl.passport.rules.routing import routing
from opdsl.passport.rules.support import support
from opdsl.passport.rules.whole import whole


def boundaries(spec: Spec, report: Report) -> None:
    """Adds every boundary a specification crosses."""
    cases = [Case(spec, term, report) for term in spec.terms]
    for case in cases:
        if case.term.route == "loss":
            direct(case)
        if case.term.kind != "feedback":
            continue
        support(case)
        if case.term.route == "reward":
            if rewards(case):
                credit(case)
            routing(case)
        factors(case)
    whole(spec, cases, report)


def notes(spec: Spec, target: str | None = None) -> tuple[Diagnostic, ...]:
    """What is worth knowing and needs no acceptance. `target` is the passport's fixed point."""
    from opdsl.passport.rules.remarks import collect

    return collect(spec, target)
