"""The verifier `regex`, as a worker runs it (a pattern can take for ever on some text).

With a pattern of the user's: it is found in the response; if it has a group, what the group
matched last is compared with the reference, numbers as numbers and all else as text. Without
one, the reference of each row is the pattern.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from opdsl.train.verifiers.numbers import is_number
from opdsl.train.verify import get_verifier


def prepare(pattern: str | None) -> Callable[[str, str | None], float]:
    """(response, reference) -> 1.0 or 0.0; raises re.error for a bad pattern."""
    if pattern is None:
        compiled = lru_cache(1024)(re.compile)
        return lambda response, reference: float(bool(compiled(reference).search(response)))
    fixed = re.compile(pattern)
    if not fixed.groups:
        return lambda response, reference: float(bool(fixed.search(response)))

    def compare(response: str, reference: str | None) -> float:
        found = None
        for match in fixed.finditer(response):
            found = next((g for g in match.groups() if g is not None), found)
        if found is None:
            return 0.0
        kind = "numeric" if is_number(reference) else "text"
        verdict = get_verifier(kind)(found, reference)
        if verdict.score is None:
            raise ValueError(verdict.error)
        return verdict.score

    return compare
