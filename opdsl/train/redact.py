"""No key in an artefact: what may have been typed or configured is written without secrets.

Keys belong in the environment, and nothing of opdsl writes the environment anywhere. Someone may
still type one into an address or an option; these patterns take it out before a command or a
setting reaches a report, a log or a sink.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
_NAME = r"[\w-]*(?:key|token|secret|passw(?:or)?d|authorization|bearer|credential)[\w-]*"
_PATTERNS = (
    (re.compile(r"(\w+://)[^/@\s]+@"), rf"\1{HIDDEN}@"),  # user:password@host
    (re.compile(rf"(?i)([?&;]{_NAME}=)[^&\s]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"\b(?:sk|hf|ghp|gho|glpat|xox[abp])[-_][\w-]{16,}"), HIDDEN),
)
_ASSIGNED = re.compile(rf"(?i)^(-*{_NAME})=(.+)$")
_OPTION = re.compile(rf"(?i)^--?{_NAME}$")
# Words with `key` or `token` in them that name no secret: counts, ids, names of variables.
_HARMLESS = re.compile(
    r"(?i)^-*(?:[\w-]+[-_]env|(?:\w+[-_])?(?:tokens|tokenizer)(?:[-_]\w+)?"
    r"|(?:max|min|eos|bos|pad|end)[-_]token(?:[-_]\w+)?)$"
)


def redacted(text: str) -> str:
    """A text without what looks like a key."""
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def redacted_words(words: Sequence[str]) -> list[str]:
    """The words of a command, likewise; the value of an option named after a key is hidden."""
    out, hide = [], False
    for word in words:
        assigned = _ASSIGNED.match(word)
        if hide:
            out.append(HIDDEN)
        elif assigned and not _HARMLESS.match(assigned[1]):
            out.append(f"{assigned[1]}={HIDDEN}")
        else:
            out.append(redacted(word))
        hide = not hide and bool(_OPTION.match(word)) and not _HARMLESS.match(word)
    return out


def redacted_value(value: Any, name: str = "") -> Any:
    """A JSON-like value without keys; entries whose name is that of a key are hidden."""
    if name and _OPTION.match("-" + name) and not _HARMLESS.match(name):
        return HIDDEN if value not in (None, "", {}, []) else value
    if isinstance(value, Mapping):
        return {str(k): redacted_value(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted_value(v) for v in value]
    return redacted(value) if isinstance(value, str) else value
