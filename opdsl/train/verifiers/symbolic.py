"""The verifier `math`: the package math-verify, as a worker runs it.

Its own time-outs use a signal that works in one thread only and turns into a wrong answer
elsewhere, so they are off and the worker's limit stands in. A reference that it cannot read is
an error; a response in which it finds no answer scores 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache


def prepare(_: None) -> Callable[[str, str], float]:
    """(response, reference) -> 1.0 or 0.0; ImportError without math-verify."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # it warns at every call that its time-outs are off

    def read(text: str) -> list:
        return parse(text, parsing_timeout=None, raise_on_error=True)

    @lru_cache(4096)
    def gold(reference: str) -> tuple:
        text = reference.rpartition("####")[2].strip()
        # A bare formula is taken for prose, of which only the first number counts.
        marked = any(sign in text for sign in ("$", "\\boxed", "\\[", "\\("))
        found = read(text if marked else f"${text}$")
        if not found:
            raise ValueError(f"math-verify cannot read the reference {reference[:80]!r}")
        return tuple(found)

    def judge(response: str, reference: str) -> float:
        wanted = list(gold(reference))
        return float(verify(wanted, read(response), timeout_seconds=None, raise_on_error=True))

    return judge
