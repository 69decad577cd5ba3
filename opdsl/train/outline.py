"""A method in named words, so that a resumed run can say what has changed in its spec.

Whether two methods are the same is decided by their fingerprint; the outline only says where
they differ. Comments and layout are left out of it.
"""

from __future__ import annotations

import re
from typing import Any

_STATE = (
    "kind", "policy", "share", "temperature", "top_p", "top_k", "group", "max_tokens", "lag",
    "prefix", "parts", "accept",
)  # fmt: skip
_TEACHER = ("kind", "context", "decay", "every", "when")


def outline(method) -> dict[str, str]:
    """{"teacher T decay": "0.99", "term main support": "full", …} of a compiled method."""
    spec = method.spec
    found: dict[str, Any] = {"aggregate": getattr(spec, "aggregate", None)}
    for i, state in enumerate(spec.states, 1):
        found |= {f"state {i} {key}": getattr(state, key) for key in _STATE}
    for teacher in spec.teachers:
        found |= {f"teacher {teacher.name} {key}": getattr(teacher, key) for key in _TEACHER}
    for critic in spec.critics:
        found |= {f"critic {critic.name} {k}": getattr(critic, k) for k in ("init", "lr", "warmup")}
    for param in spec.params:
        found[f"param {param.name}"] = param.value
    for term in getattr(spec, "terms", ()):
        found |= {f"term {term.name} {section}": text for section, text in term.written.items()}
    return {key: _plain(value) for key, value in found.items() if value is not None}


def _plain(value: Any) -> str:
    """Without comments, on one line."""
    return " ".join(re.sub(r"#[^\n]*", "", str(value)).split())


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Lines "term main credit: was immediate, is discounted(0.9)"."""
    return [
        f"{key}: was {before.get(key, 'not there')}, is {now.get(key, 'not there')}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]
