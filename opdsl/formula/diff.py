"""`diff`: are two methods the same, equal as tested, or different, and on which axes.

Decided in this order: equal programs (nothing is run), agreement sample by sample on a set of
probe batches, agreement in expectation on small models, a witness. Whose prefixes are visited is
compared apart from the loss: equal losses on different states are different methods.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opdsl.compilation import Compilation
from opdsl.formula.diff_axes import Axis, axes
from opdsl.ir.fingerprint import fingerprints
from opdsl.passport.diff import Roles, Side, roles, same, same_states

if TYPE_CHECKING:
    from opdsl.passport.diff_cases import Case
    from opdsl.passport.diff_measure import Agreement, Variances
    from opdsl.passport.diff_witness import Witness

ROWS = ("objective", "conservative", "stationary_at_teacher", "fixed_point",
        "zero_expected_gradient", "biases", "variance")  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """What `diff` found. kind: "same", or the kind of the agreement. states: "same", "rollouts"
    (only their number per prompt differs) or "different"."""

    a: Compilation
    b: Compilation
    kind: str
    states: str
    roles: Roles
    axes: tuple[Axis, ...]
    passport: tuple[tuple[str, str, str], ...] = ()
    agreement: Agreement | None = None
    batches: int = 0
    agreeing: int = 0  # batches with equal gradients
    worst: float = 0.0
    variances: Variances | None = None
    undecided: str = ""  # why expectations could not be compared
    witness: Witness | None = None
    cases: tuple[Case, ...] = ()
    searched: bool = False

    @property
    def equal(self) -> bool:
        """The same method, or the same update on every batch tried and on the same states."""
        if self.kind == "same":
            return True
        fresh = self.agreement is not None and self.agreement.fresh
        return self.kind in ("equal", "gradient") and self.states == "same" and not fresh


def side(label: str, compilation: Compilation) -> Side:
    """A method that can be had at other knob values. Raises CompileError."""
    return _side(label, compilation.require()[1], compilation)


def _side(label: str, program: Any, base: Compilation) -> Side:
    def at(values: Mapping[str, float]) -> Side | None:
        other = Compilation(base.source, base.wanted, {**base.settings, **values})
        found = other.program
        return None if found is None or other.report.failed else _side(label, found, other)

    return Side(label, program, at)


def difference(
    a: Compilation, b: Compilation, tell: Callable[[str], None] = lambda _: None
) -> Difference:
    """Compare two compiled methods. `tell` hears what is being done. Raises CompileError."""
    left, right = side("A", a), side("B", b)
    pairing = roles(left.spec, right.spec)
    states = same_states(left, right, pairing)
    found = tuple(axes(left, right, pairing))
    prints = [fingerprints(s.program)["method"] for s in (left, right)]
    if prints[0] == prints[1] or same(left, right, pairing):
        return Difference(a, b, "same", "same", pairing, found)
    tell("passports")
    rows = _passports(a, b, pairing)
    tell("batches")
    return _measured(a, b, left, right, pairing, states, found, rows, tell)


def _measured(
    a: Compilation, b: Compilation, left: Side, right: Side, pairing: Roles, states: str,
    found: tuple[Axis, ...], rows: tuple, tell: Callable[[str], None],
) -> Difference:  # fmt: skip
    """What needs numbers: from here on torch is loaded."""
    from opdsl.passport.diff_measure import one_thread

    with one_thread():
        kind, numbers = _numbers(left, right, pairing, states, tell)
    return Difference(a, b, kind, states, pairing, found, rows, searched=True, **numbers)


def _numbers(
    left: Side, right: Side, pairing: Roles, states: str, tell: Callable[[str], None]
) -> tuple[str, dict[str, Any]]:
    """The kind of the difference, and the fields of `Difference` that were measured."""
    from opdsl.passport import diff_measure as measure
    from opdsl.passport.diff_batches import more_twins, random_twins, scene
    from opdsl.passport.diff_cases import special_cases
    from opdsl.passport.diff_witness import witness

    where = scene(left, right, pairing)
    trials = [t for w in random_twins(where) if (t := measure.trial(left, right, w)) is not None]
    agreed = measure.judged(trials)
    if agreed.sample_by_sample:
        tell("more batches")
        more = more_twins(where, 48)
        trials += [t for w in more if (t := measure.trial(left, right, w)) is not None]
        agreed = measure.judged(trials)
    why, spread = "", None
    if not agreed.sample_by_sample:
        tell("expectations")
        rare = measure.share_equal(trials) > measure.RARE
        if all(t.golden for t in trials) and not rare:
            mean = measure.expectation(left, right, where)
            agreed, why = mean.agreement, mean.why
        if agreed.kind != "different":
            spread = measure.variances(left, right, where)
    whole = agreed.kind == "equal" and not agreed.fresh and not pairing.why_not
    seen = None
    if not whole:
        tell("the smallest witness")
        fresh = agreed.fresh and agreed.sample_by_sample
        value = agreed.kind == "gradient" and not fresh
        seen = witness(left, right, where, value, fresh_too=not fresh)
    cases = []
    if not (whole and states == "same"):
        tell("special cases")
        cases = special_cases(left, right, pairing, agreed, tell)
    kind = "different" if pairing.why_not else agreed.kind
    errors = [t.error for t in trials if t.error < float("inf")]
    return kind, {
        "agreement": agreed,
        "batches": len(trials),
        "agreeing": sum(t.gradient for t in trials),
        "worst": max(errors, default=0.0),
        "variances": spread,
        "undecided": why,
        "witness": seen,
        "cases": tuple(cases),
    }


# ---- passports ---------------------------------------------------------------------------------------


def _passports(a: Compilation, b: Compilation, pairing: Roles) -> tuple[tuple[str, str, str], ...]:
    """Rows of the passport that differ, B's teachers under A's names."""
    from opdsl.passport.report import passport

    found = [passport(c) for c in (a, b)]
    out = []
    for key in ROWS:
        x, y = (passport_row(key, p) for p in found)
        for mine, yours in pairing.renamed:
            y = re.sub(rf"\b{re.escape(yours)}\b", mine, y)
        if x != y:
            out.append((passport_title(key), x, y))
    return tuple(out)


def passport_row(key: str, passport: Mapping[str, Any]) -> str:
    """An entry of a passport as one text."""
    x = passport[key]
    if key == "biases":
        return ", ".join(dict.fromkeys(row["slug"] for row in x)) or "none found"
    if key == "conservative":
        reason = passport["conservative_reason"]
        return _word(x) + (f" ({reason})" if reason else "")
    if isinstance(x, bool) or x is None:
        return _word(x)
    return x if isinstance(x, str) else "; ".join(x)


def _word(x: bool | None) -> str:
    return {True: "yes", False: "no", None: "not decided"}[x]


def passport_title(key: str) -> str:
    return {"stationary_at_teacher": "at teacher", "zero_expected_gradient": "zero gradient"}.get(
        key, key.replace("_", " ")
    )
