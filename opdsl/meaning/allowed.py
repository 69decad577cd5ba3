"""`accept` and `allow`: what a specification may acknowledge, and what it may override.

`accept` names a warning; `allow` names an error by its rule (R01…R66), code or slug, so that
published code can be reproduced as it is. An allowed error is reported all the same, marked with
its reason, and elaboration goes on with the meaning each rule's page states.
"""

from __future__ import annotations

from collections.abc import Iterable

from opdsl.codes import CODES
from opdsl.diagnostics import Diagnostic, Severity
from opdsl.meaning.spec import Acceptance


def covers(a: Acceptance, d: Diagnostic) -> bool:
    """Whether an acceptance speaks of a report: families 2xx to 5xx, errors only by `allow`."""
    if a.keyword == "accept" and d.severity is Severity.ERROR:
        return False
    return a.rule in {d.code, d.slug, CODES[d.code].rule} and d.code[3] in "2345"


def marked(acceptances: Iterable[Acceptance], d: Diagnostic) -> Diagnostic:
    """The report, overridden where an acceptance covers it."""
    for a in acceptances:
        if covers(a, d):
            return d.with_override(a.reason)
    return d
