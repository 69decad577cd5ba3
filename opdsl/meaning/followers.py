"""Reports that only follow from another one: of what a statement that was not read would have given.

A statement with a syntax error is left out, and an import that fails brings nothing. What they
would have declared is missing then; saying so again would bury the one mistake under others.
"""

from __future__ import annotations

import re

from opdsl.diagnostics import Diagnostic, Severity
from opdsl.syntax.recover import ANYTHING

# Reports about something that is not there, by its name.
ABSENT = frozenset({"OPD101", "OPD105", "OPD108", "OPD109", "OPD120", "OPD303"})
_QUOTED = re.compile(r"`([^`]+)`")
_WORD = re.compile(r"[^\W\d]\w*")


def follows(d: Diagnostic, lost: frozenset[str]) -> bool:
    """Whether a report may be due to lost words alone (`syntax.recover.lost`, names of imports).

    A judgement about a whole method (3xx, 4xx) needs all of its statements; that a section is
    written twice does not.
    """
    if not lost or d.severity is not Severity.ERROR or d.code[3] == "0":
        return False
    if d.code in ABSENT:
        named = _QUOTED.findall(f"{d.message} {d.primary.text}")
        words = {word for text in named for word in _WORD.findall(text)}
        return ANYTHING in lost or not words.isdisjoint(lost)
    return d.code[3] in "34" and d.code != "OPD304"
