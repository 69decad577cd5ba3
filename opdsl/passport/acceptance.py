"""Which reports a specification has acknowledged, and acknowledgements that nothing needs."""

from __future__ import annotations

from opdsl.codes import make
from opdsl.diagnostics import Diagnostic, Report
from opdsl.meaning.allowed import covers
from opdsl.meaning.spec import Spec


def apply_acceptances(spec: Spec, report: Report) -> None:
    """Marks what was accepted; reports acceptances of this file that accept nothing."""
    used: set[int] = set()
    items: list[Diagnostic] = []
    for d in report.items:
        hit = None
        for i, a in enumerate(spec.acceptances):
            if covers(a, d):
                used.add(i)
                hit = hit or a
        items.append(d.with_override(hit.reason) if hit is not None else d)
    for i, a in enumerate(spec.acceptances):
        if i in used or a.inherited:
            continue
        items.append(
            make(
                "OPD118",
                a.span,
                f"nothing here needs `{a.keyword} {a.rule}`",
                "this boundary is not crossed",
                helps=["remove the line"],
            )
        )
    report.items[:] = items
