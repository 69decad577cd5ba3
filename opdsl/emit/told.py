"""Things a user should know once in a process, however often they come up."""

from __future__ import annotations

import sys

_told: set[str] = set()


def tell_once(text: str) -> None:
    """Prints a line to standard error, the first time it is said."""
    if text not in _told:
        _told.add(text)
        print(f"opdsl: {text}", file=sys.stderr)


__all__ = ["tell_once"]
