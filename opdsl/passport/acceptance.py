"""`accept` and `allow`: which reports a specification has acknowledged, and which it need not."""

from __future__ import annotations

from opdsl.codes import CODES, make
from opdsl.diagnostics import Diagnostic, Report, Severity
from opdsl.meaning.spec import Spec


def apply_acceptances(spec: Spec, report: Report) -> None:
    """Marks what was accepted; reports acceptances of this file that accept nothing."""
    used: set[int] = set()
    items: list[Diagnostic] = []
    for d in report.items:
        hit = None
        for i, a in enumerate(spec.acceptances):
            if _covers(a.keyword, a.rule, d):
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


def _covers(keyword: str, rule: str, d: Diagnostic) -> bool:
    if keyword == "accept" and d.severity is Severity.ERROR:
        return False
    named = {d.code, d.slug, CODES[d.code].rule}
    return rule in named and d.code[3] in "2345"
