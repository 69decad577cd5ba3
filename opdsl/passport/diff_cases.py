"""Special cases: knob values, ends of ranges and critics at which two methods coincide.

Closed ends and 0, 1/2 and 1 inside a range are set exactly. An open end is approached: B's gradient
must become a multiple of A's, with an error that falls with the distance to the end. Pairs of
knobs are tried at their ends only.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from opdsl.meaning.spec import ParamValue, Schedule
from opdsl.meaning.structure import parse_number
from opdsl.passport.diff import Roles, Side, same_states
from opdsl.passport.diff_batches import Scene, Twin, more_twins, random_twins, scene, silenced
from opdsl.passport.diff_measure import (
    DIFFERENT,
    RARE,
    Agreement,
    expectation,
    field,
    judged,
    outcome,
    per_rollout,
    share_equal,
    trial,
    worlds,
)
from opdsl.passport.enumerate import Coupled

if TYPE_CHECKING:
    from torch import Tensor

Settings = tuple[tuple[str, float], ...]  # knob, value

INSIDE = (0.0, 0.5, 1.0)
STEPS = (1e-3, 1e-4, 1e-5)  # distances to an open end
CLOSE = 2e-2  # relative rest at the last step
PAIRS = 6  # pairs of knobs tried at most, on each side
STATES = ("same", "rollouts", "different")


@dataclass(frozen=True)
class Case:
    """Where two methods come together. settings: knob -> value, or -> the open end approached.

    scale: with what the gradient of that side shrinks or grows on the way ("" for none).
    """

    side: str  # whose knobs; "" for a critic alone
    settings: tuple[tuple[str, float], ...]
    approached: tuple[str, ...]
    agreement: Agreement
    states: str  # "same" | "rollouts" | "different"
    scale: str = ""
    covers: bool = False  # a size so large that the set is the whole vocabulary

    @property
    def rank(self) -> tuple:
        return self.agreement.rank, STATES.index(self.states)


@dataclass(frozen=True)
class Range:
    """A knob with the ends of its domain; None where it has no such end."""

    name: str
    value: float | None
    whole: bool
    low: float | None
    high: float | None
    low_open: bool
    high_open: bool

    @property
    def closed(self) -> list[float]:
        ends = ((self.low, self.low_open), (self.high, self.high_open))
        return [x for x, open_ in ends if x is not None and math.isfinite(x) and not open_]

    @property
    def open(self) -> list[tuple[float, int]]:
        """(end, direction into the range)."""
        if self.whole:
            return []
        ends = ((self.low, self.low_open, 1), (self.high, self.high_open, -1))
        return [(x, d) for x, o, d in ends if x is not None and o and math.isfinite(x)]

    @property
    def inside(self) -> list[float]:
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return [x for x in INSIDE if low < x < high and (not self.whole or x != 0.5)]


def ranges(side: Side) -> list[Range]:
    return [_range(p) for p in side.spec.params]


def _range(p: ParamValue) -> Range:
    value = None if isinstance(p.value, Schedule) else float(p.value)
    found = re.fullmatch(r"([\[(])([^,]+),([^,]+)([\])])", p.domain_text.strip())
    whole = p.unit in ("int", "bool")
    if found is None:
        return Range(p.name, value, whole, None, None, True, True)
    left, low, high, right = found.groups()
    return Range(
        p.name, value, whole, parse_number(low), parse_number(high), left == "(", right == ")"
    )


# ---- the search ------------------------------------------------------------------------------------


class Search:
    """Looks for settings that agree better than the methods do as they are."""

    def __init__(
        self, a: Side, b: Side, roles: Roles, base: Agreement, tell: Callable[[str], None]
    ):
        self.sides, self.roles, self.tell = (a, b), roles, tell
        self.base = Case("", (), (), base, same_states(a, b, roles))
        self.found: list[Case] = []
        self.made: dict[tuple, Side | None] = {}

    def run(self) -> list[Case]:
        self._critics(*self.sides, "", ())
        for i in (0, 1):
            for r in ranges(self.sides[i]):
                self.tell(f"{self.sides[i].label}: {r.name}")
                self._one(i, r)
        for i in (0, 1):
            pairs = itertools.combinations([r for r in ranges(self.sides[i]) if not r.whole], 2)
            for x, y in itertools.islice(pairs, PAIRS):
                self.tell(f"{self.sides[i].label}: {x.name}, {y.name}")
                self._corners(i, x, y)
        return sorted(self.found, key=lambda c: (c.rank, c.side, len(c.settings)))

    # -- plumbing ----------------------------------------------------------------------------------
    def _at(self, i: int, settings: Settings) -> Side | None:
        key = (i, *settings)
        if key not in self.made:
            self.made[key] = self.sides[i].at(dict(settings))
        return self.made[key]

    def _pair(self, i: int, changed: Side) -> tuple[Side, Side]:
        return (changed, self.sides[1]) if i == 0 else (self.sides[0], changed)

    @property
    def _kinds(self) -> tuple[str, ...]:
        critics = any(s.spec.critics for s in self.sides)
        return ("any", "exact", "zero") if critics else ("any",)

    def _keep(self, case: Case) -> None:
        """A case counts where it says more than the methods as they are, and than wider cases."""
        base = self.base.agreement.kind
        multiple = base == ("scaled" if case.agreement.sample_by_sample else "expected scaled")
        if case.agreement.kind == "different" or (case.scale and multiple):
            return  # a multiple everywhere is no news at an end
        if not any(_says_as_much(w, case) for w in (self.base, *self.found)):
            self.found.append(case)

    # -- one knob ----------------------------------------------------------------------------------
    def _one(self, i: int, r: Range) -> None:
        if r.whole and self._sizes(i, r):
            return
        for x in dict.fromkeys((*r.closed, *r.inside)):
            if x != r.value:
                self._set(i, ((r.name, x),))
        for end, direction in r.open:
            self._approach(i, r.name, end, direction, ())

    def _sizes(self, i: int, r: Range) -> bool:
        """A knob that sets how many entries are taken: 1, as many as the other, or all."""
        if r.low is None or r.high is None:
            return False
        tried = [self._at(i, ((r.name, r.low + n),)) for n in range(3) if r.low + n <= r.high]
        if len({s.widest for s in tried if s is not None}) < 2:
            return False
        if r.low != r.value:
            self._set(i, ((r.name, r.low),))
        other = self.sides[1 - i].widest
        if r.low < other <= r.high and other != r.value:
            self._set(i, ((r.name, float(other)),))
        wide = max(other, 11) + 6  # at least the widest vocabulary of the plain batches
        if wide <= min(r.high, 200):
            self._set(i, ((r.name, float(wide)),), covers=wide)
        return True

    def _set(self, i: int, settings: Settings, covers: int = 0) -> None:
        changed = self._at(i, settings)
        if changed is not None:
            self._critics(*self._pair(i, changed), changed.label, settings, covers)

    def _critics(self, a: Side, b: Side, label: str, settings: Settings, covers: int = 0) -> None:
        """How two sides agree with any critic, an exact one, none."""
        states = same_states(a, b, self.roles)
        for critic in self._kinds:
            if critic != "any" or settings:  # the methods as they are were judged before
                agreed = agreement(a, b, self.roles, critic, covers)
                self._keep(Case(label, settings, (), agreed, states, covers=bool(covers)))

    # -- open ends -----------------------------------------------------------------------------------
    def _approach(self, i: int, name: str, end: float, direction: int, fixed: Settings) -> None:
        """The limit of one knob, others held at `fixed`."""
        for critic in self._kinds:
            for kind in ("gradient", "expected"):
                if kind == "gradient" and critic != "any":
                    continue
                factors = self._limit(i, name, end, direction, fixed, kind, critic)
                if factors is None:
                    continue
                power = round(math.log10(factors[-2] / factors[-1]))
                size = factors[-1] / STEPS[-1] ** power
                settings = (*fixed, (name, end))
                self._keep(
                    Case(
                        self.sides[i].label,
                        settings,
                        (name,),
                        Agreement(kind, critic=critic),
                        self._states(i, settings, (*fixed, (name, end + direction * STEPS[-1]))),
                        _scale(size, power, name, end, direction),
                    )
                )
                break

    def _limit(
        self, i: int, name: str, end: float, direction: int, fixed: Settings, kind: str, critic: str
    ) -> list[float] | None:
        """Factors of the own gradient over the other's on the way, if the two become parallel."""
        errors, factors = [], []
        for d in reversed(STEPS):
            side = self._at(i, (*fixed, (name, end + direction * d)))
            if side is None:
                return None
            measure = _samples if kind == "gradient" else _means
            pairs = []
            for pair in measure(*self._pair(i, side), self.roles, critic):
                pairs.append(pair if i else (pair[1], pair[0]))
                fit = _fit(pairs)
                if fit is None or fit[0] > 0.5 or (d == STEPS[-1] and fit[0] > CLOSE):
                    return None
            fit = _fit(pairs)
            if fit is None:
                return None
            errors.insert(0, fit[0])
            factors.insert(0, fit[1])
        return factors if _falls(errors) else None

    def _states(self, i: int, at_end: Settings, near: Settings) -> str:
        """States at the end itself where the method allows it, else near it."""
        changed = self._at(i, at_end) or self._at(i, near)
        assert changed is not None
        return same_states(*self._pair(i, changed), self.roles)

    # -- two knobs -------------------------------------------------------------------------------------
    def _corners(self, i: int, x: Range, y: Range) -> None:
        for p, q in itertools.product(x.closed, y.closed):
            if p != x.value and q != y.value:
                self._set(i, ((x.name, p), (y.name, q)))
        for open_, closed in ((x, y), (y, x)):
            for (end, direction), q in itertools.product(open_.open, closed.closed):
                if q != closed.value:
                    self._approach(i, open_.name, end, direction, ((closed.name, q),))


def _says_as_much(w: Case, case: Case) -> bool:
    """Whether a case that holds more widely already says what this one says."""
    return (
        w.side in ("", case.side)
        and set(w.settings) <= set(case.settings)
        and w.agreement.critic in ("any", case.agreement.critic)
        and w.agreement.rank[:2] <= case.agreement.rank[:2]
        and STATES.index(w.states) <= STATES.index(case.states)
    )


def special_cases(
    a: Side, b: Side, roles: Roles, base: Agreement, tell: Callable[[str], None] = lambda _: None
) -> list[Case]:
    """Where A and B agree better than `base`, strongest first."""
    return Search(a, b, roles, base, tell).run()


# ---- measures --------------------------------------------------------------------------------------


def agreement(a: Side, b: Side, roles: Roles, critic: str, covers: int = 0) -> Agreement:
    """Sample by sample where that holds, otherwise in expectation."""
    where = scene(a, b, roles)
    if covers:  # the vocabulary is as wide as the set that covers it
        where = replace(where, widest=max(0, covers - 5), narrow=True)
    found = _by_samples(a, b, where, critic)
    if found is not None:
        return found
    mean = expectation(a, b, where, critic).agreement
    if mean.kind != "different" and critic != "exact":
        twins = random_twins(where)
        if critic == "zero":
            twins = (silenced(t) for t in twins)
        if share_equal([t for w in twins if (t := trial(a, b, w)) is not None]) > RARE:
            return DIFFERENT
    return mean


def _by_samples(a: Side, b: Side, where: Scene, critic: str) -> Agreement | None:
    trials = []
    for twin in _twins(a, b, where, critic):
        if twin is None:
            return None
        t = trial(a, b, twin, emitted=critic == "exact")
        if t is None:
            continue
        trials.append(t)
        if t.fresh and not t.gradient and t.factor is None:
            return None  # not even a multiple
    found = judged(trials) if trials else DIFFERENT
    return replace(found, critic=critic) if found.kind != "different" else None


def _twins(a: Side, b: Side, where: Scene, critic: str) -> Iterator[Twin | None]:
    """Batches whose critics say what is asked for."""
    if critic == "exact":
        yield from (w and w.twin for w in worlds(a, b, where, critic))
        return
    for twin in itertools.chain(random_twins(where), () if where.narrow else more_twins(where, 24)):
        yield silenced(twin) if critic == "zero" else twin


def _samples(a: Side, b: Side, roles: Roles, critic: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients of A and of B on batches without extreme log-ratios."""
    for t in random_twins(scene(a, b, roles), mild=True):
        yield outcome(a.program, t, 0)[1], outcome(b.program, t, 1)[1]


def _means(a: Side, b: Side, roles: Roles, critic: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Expected gradients of A and of B on small models; none where they are not known."""
    try:
        programs = [per_rollout(s.program) for s in (a, b)]
    except Coupled:
        return
    for w in worlds(a, b, scene(a, b, roles), critic):
        if w is None:
            return
        yield field(programs[0], w, 0)[0], field(programs[1], w, 1)[0]


def _fit(pairs: list) -> tuple[float, float] | None:
    """y ≈ c x over several pairs of gradients: (largest relative error, c > 0)."""
    xy = sum(float((x * y).sum()) for x, y in pairs)
    xx = sum(float((x * x).sum()) for x, _ in pairs)
    if not xx > 0 or not math.isfinite(xy) or not xy > 0:
        return None
    c = xy / xx
    sizes = [float((c * x).norm()) for x, _ in pairs]
    errors = [float((y - c * x).norm()) / s for (x, y), s in zip(pairs, sizes) if s > 0]
    return max(errors), c


def _falls(errors: list[float]) -> bool:
    """At least like the square root of the distance, to a small rest."""
    return errors[-1] < CLOSE and all(y < max(0.5 * x, 1e-9) for x, y in itertools.pairwise(errors))


def _scale(size: float, power: int, name: str, end: float, direction: int) -> str:
    """size · distance^power in terms of the knob."""
    short = name.split(".")[-1]
    gap = short if end == 0 else f"({end:g} - {short})" if direction < 0 else f"({short} - {end:g})"
    plain = abs(size - 1) < 1e-2
    if power == 0:
        return "" if plain else f"{size:.4g}"
    gap += "" if power == 1 else f"^{power}"
    return gap if plain else f"{size:.4g} {gap}"
