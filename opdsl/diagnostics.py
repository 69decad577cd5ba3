"""Diagnostics as data: what is wrong, where, why, and the cure.

Semantic passes build `Diagnostic` values through the constructors of the registry in
`codes.py`; nothing below the command line formats text. Renderers live in `render.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from opdsl.source import Span


class Severity(StrEnum):
    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Safety(StrEnum):
    """Whether `--fix` may apply a repair: only SAFE ones, never one that changes the formula."""

    SAFE = "safe"
    CHANGES_FORMULA = "changes_formula"
    SHOW_ONLY = "show_only"


@dataclass(frozen=True, slots=True)
class Label:
    """A span with a remark that the source does not already say."""

    span: Span
    text: str = ""


@dataclass(frozen=True, slots=True)
class Edit:
    span: Span
    text: str


@dataclass(frozen=True, slots=True)
class Fix:
    title: str
    edits: tuple[Edit, ...] = ()
    safety: Safety = Safety.SHOW_ONLY


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One report: `error[OPD302] teacher_free_gradient: message` with labels, notes, helps."""

    code: str
    slug: str
    severity: Severity
    message: str
    primary: Label
    secondary: tuple[Label, ...] = ()
    notes: tuple[str, ...] = ()
    helps: tuple[str, ...] = ()
    fixes: tuple[Fix, ...] = ()
    rule: str | None = None  # theory rule that `allow` names, e.g. "R01"
    overridden: str | None = None  # the reason given by `accept` or `allow`

    def with_override(self, reason: str) -> Diagnostic:
        return replace(self, overridden=reason)


class CompileError(Exception):
    """Compilation cannot go on; carries every diagnostic found so far."""

    def __init__(self, diagnostics: Iterable[Diagnostic]):
        self.diagnostics = tuple(diagnostics)
        first = self.diagnostics[0] if self.diagnostics else None
        super().__init__(f"{first.code} {first.message}" if first else "compilation failed")


@dataclass(slots=True)
class Report:
    """Collects diagnostics of a compilation; the one mutable object passes share."""

    items: list[Diagnostic] = field(default_factory=list)
    _seen: set[tuple] = field(default_factory=set)

    def add(self, diagnostic: Diagnostic) -> None:
        """Add once: the same code at the same place (a def used twice) is one report."""
        key = (diagnostic.code, diagnostic.primary.span, diagnostic.message)
        if key not in self._seen:
            self._seen.add(key)
            self.items.append(diagnostic)

    @property
    def failed(self) -> bool:
        return any(d.severity is Severity.ERROR and d.overridden is None for d in self.items)
