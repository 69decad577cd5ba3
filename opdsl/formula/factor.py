"""Laying out a polynomial so that a person can read it: cases, common factors, order of letters."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from opdsl.formula.algebra import Atom, Mono, Poly, plus
from opdsl.formula.notation import (
    ONE,
    Add,
    Big,
    Fn,
    Ind,
    Join,
    Math,
    Num,
    Pow,
    Root,
    Sym,
    add,
    frac,
    mul,
    unicode,
)
from opdsl.formula.recognise import differences, expanded
from opdsl.formula.symbols import Named

if TYPE_CHECKING:
    from opdsl.formula.printer import Printer

_RANK = {
    "node": 2, "group": 4, "named": 3, "count": 4, "exp": 5, "P": 5, "abs": 6, "log": 6,
    "diff": 7, "L": 7, "window": 8, "sum": 9, "mean": 9, "total": 9, "div": 8, "e": 10,
}  # fmt: skip
MAX_CONDITIONS = 4


class Layout:
    """Poly -> Math."""

    def __init__(self, printer: Printer):
        self.printer = printer

    def __call__(self, a: Poly) -> Math:
        k = max((abs(c) for c in a.values()), default=1.0)
        same = all(abs(abs(c) - k) <= 1e-9 * k for c in a.values())
        if len(a) > 1 and same and abs(k - 1.0) > 1e-9 and _conditions(a):
            # one number before all cases
            return mul([Num(k), self({m: 1.0 if c > 0 else -1.0 for m, c in a.items()})])
        items: list[tuple[bool, Math]] = []
        for literals, part in self.cases(a):
            value = self.factored(part)
            tests = self._literals(literals)
            sign = True
            if isinstance(value, Add) and not value.items[0][0] and (
                len(value.items) == 1 or (tests and all(not s for s, _ in value.items))
            ):  # fmt: skip
                sign, value = False, add([(not s, x) for s, x in value.items])
            if tests:
                items.append((sign, mul([*tests, value])))
            elif sign and isinstance(value, Add):
                items += value.items
            else:
                items.append((sign, value))
        if any(isinstance(x.key, Named) for x in _conditions(a)):
            return Add(tuple(items)) if items else add([])  # cases keep their order
        return add(items)

    # -- cases ---------------------------------------------------------------------------------
    def cases(self, a: Poly) -> list[tuple[list[tuple[Atom, bool]], Poly]]:
        """The polynomial as a list of (conditions, value): named flags split it first."""
        flags = [x for x in _conditions(a) if isinstance(x.key, Named)]
        if flags:
            first = min(flags, key=lambda x: x.key.rank)  # type: ignore[attr-defined]
            off, on = _set(a, first, 0.0), _set(a, first, 1.0)
            trigger = first.key.style == "flag"  # type: ignore[attr-defined]
            order = ((False, off), (True, on)) if trigger else ((True, on), (False, off))
            return [
                ([(first, side), *literals], part)
                for side, branch in order
                for literals, part in self.cases(differences(expanded(branch)))
                if branch
            ]
        conditions = sorted(_conditions(a), key=lambda x: unicode(self.printer.literal(x, True)))
        if not conditions:
            return [([], a)] if a else []
        if len(conditions) > MAX_CONDITIONS:
            return self._as_written(a)
        return self._cubes(a, conditions)

    def _as_written(self, a: Poly) -> list[tuple[list[tuple[Atom, bool]], Poly]]:
        out: dict[Mono, Poly] = {}
        for m, c in a.items():
            tests = frozenset((x, p) for x, p in m if x.kind in ("ind", "in"))
            out[tests] = plus(out.get(tests, {}), {m - tests: c})
        return [
            ([(x, True) for x, _ in sorted(t, key=lambda y: y[0].order)], p) for t, p in out.items()
        ]

    def _cubes(self, a: Poly, xs: list[Atom]) -> list[tuple[list[tuple[Atom, bool]], Poly]]:
        """The fewest disjoint blocks of conditions on which the value is the same."""
        table = {}
        for bits in product((True, False), repeat=len(xs)):
            part = a
            for x, bit in zip(xs, bits):
                part = _set(part, x, float(bit))
            table[bits] = part
        never = {
            bits
            for bits in table
            for i, x in enumerate(xs)
            for j, y in enumerate(xs)
            if i < j and bits[i] and bits[j] and self.printer.normal.opposite(x, y)
        }
        alive = [bits for bits, part in table.items() if part and bits not in never]
        cubes: list[tuple[tuple[bool | None, ...], frozenset]] = []
        for cube in product((None, True, False), repeat=len(xs)):
            inside = frozenset(
                c
                for c in table
                if c not in never and all(w is None or w == h for w, h in zip(cube, c))
            )
            if inside and inside <= set(alive) and len({_key(table[c]) for c in inside}) == 1:
                cubes.append((cube, inside))
        cubes.sort(key=lambda c: (-len(c[1]), sum(w is not None for w in c[0])))
        chosen = _cover(alive, cubes, len(alive)) or []
        return [
            (
                [(x, b) for x, b in zip(xs, cube) if b is not None],
                table[min(inside, key=alive.index)],
            )
            for cube, inside in chosen
        ]

    def _literals(self, literals: list[tuple[Atom, bool]]) -> list[Math]:
        out: list[Math] = []
        plain: list[Math] = []
        for x, positive in literals:
            if isinstance(x.key, Named) and x.key.style == "flag":
                n = self.printer.named(x)
                out.append(n if positive else Add(((True, ONE), (False, n))))
            elif isinstance(x.key, Named):
                out.append(Ind(self.printer.literal(x, positive), True))
            else:
                plain.append(self.printer.literal(x, positive))
        if plain:
            out.append(Ind(plain[0] if len(plain) == 1 else Join("and", tuple(plain))))
        return out

    # -- factors ---------------------------------------------------------------------------------
    def factored(self, a: Poly) -> Math:
        """Common factors in front, then the sum; two groups where that is shorter."""
        if len(a) <= 1:
            return self._sum(a)
        common, k = _common(a)
        if common or k != 1:
            rest = {_without(m, common): c / k for m, c in a.items()}
            rest = differences(expanded(rest))
            inner = self.factored(rest)
            front = self._front(common, abs(k), inner)
            return front if k >= 0 else add([(False, front)])
        square = _square(a)
        if square is not None:
            base = self.printer.poly(square)
            if isinstance(base, Add) and len(base.items) == 1:
                base = base.items[0][1]  # (−x)² is x²
            return Pow(base, Num(2))
        if len(a) >= 3:
            grouped = self._grouped(a)
            if grouped is not None:
                return grouped
        return self._sum(a)

    def _front(self, common: Mono, scale: float, inner: Math) -> Math:
        """Common factors before a bracket; a unit vector goes behind it."""
        last = frozenset((x, p) for x, p in common if x.kind == "e")
        first = common - last
        if first and scale == 1 and not last and all(p < 0 for _, p in first):
            return frac(
                inner,
                mul(
                    [
                        self._mono(frozenset({(x, -p)}), 1.0)[1]
                        for x, p in sorted(first, key=lambda t: t[0].order)
                    ]
                ),
            )
        items: list[Math] = []
        if first or scale != 1:
            items.append(self._mono(first, scale)[1])
        items.append(inner)
        if last:
            items.append(self._mono(last, 1.0)[1])
        return mul(items)

    def _grouped(self, a: Poly) -> Math | None:
        counts: dict[tuple[Atom, float], int] = {}
        for m in a:
            for x, p in m:
                if x.kind in ("P", "named", "e", "node", "div", "sum") and p > 0:
                    counts[x, p] = counts.get((x, p), 0) + 1
        best = [(n, x, p) for (x, p), n in counts.items() if 2 <= n < len(a)]
        if not best:
            return None
        _, x, p = min(best, key=lambda b: (-b[0], b[1].kind != "P", b[1].order))
        with_it = {m: c for m, c in a.items() if (x, p) in m}
        without = {m: c for m, c in a.items() if (x, p) not in m}
        return add([(True, self.factored(with_it)), (True, self.factored(without))])

    def _sum(self, a: Poly) -> Math:
        return add([self._mono(m, c, len(a) == 1) for m, c in a.items()])

    def _mono(self, m: Mono, c: float, alone: bool = False) -> tuple[bool, Math]:
        """(positive?, product) of one monomial."""
        sign, size = c >= 0, abs(c)
        if len(m) == 1 and size == 1:
            ((x, p),) = m
            if x.kind == "diff" and p == 1 and alone:
                return sign, self.printer.difference(x, False)
        top: list[tuple[tuple, Math]] = []
        bottom: list[tuple[tuple, Math]] = []
        for x, p in sorted(m, key=lambda t: t[0].order):  # letters are given in this order
            if x.kind == "diff" and not sign and p == 1 and not self._own(x):
                x, sign = Atom("diff", (x.key[1], x.key[0]), x.at), True  # type: ignore[index]
            base = self.printer.atom(x)
            if isinstance(base, Add) and len(base.items) == 1 and p % 2 == 1:
                sign, base = not sign, base.items[0][1]  # −min is not a factor with a sign inside
            raised = (
                base if abs(p) == 1 else Root(base) if abs(p) == 0.5 else Pow(base, Num(abs(p)))
            )
            (top if p > 0 else bottom).append((_rank(x, self.printer), raised))
        above: list[Math] = [x for _, x in sorted(top, key=lambda t: t[0])]
        below = [x for _, x in sorted(bottom, key=lambda t: t[0])]
        if not below:
            return sign, mul([*([Num(size)] if size != 1 or not above else []), *above])
        after = [x for x in above if isinstance(x, Fn | Big)]  # log and Σ stand behind a fraction
        inside = [x for x in above if x not in after]
        ratio = frac(mul([*([Num(size)] if size != 1 else []), *inside]), mul(below))
        return sign, mul([ratio, *after])

    def _own(self, x: Atom) -> bool:
        """Whether a difference has a letter of its own (ℓ)."""
        return isinstance(self.printer.difference(x, False), Sym) or not isinstance(
            self.printer.difference(x, False), Add
        )


def _rank(x: Atom, printer: Printer) -> tuple:
    rank = _RANK.get(x.kind, 6)
    if x.kind == "node":
        n = printer.normal.nodes[x.key]  # type: ignore[index]
        rank = 1 if n.op in ("param", "schedule") else 2 if n.q.axis == 0 else 6
    if x.kind == "named" and x.at:
        rank = 6
    return rank, x.at != "y", x.order


def _conditions(a: Poly) -> list[Atom]:
    found = {x for m in a for x, _ in m if x.kind in ("ind", "in")}
    return sorted(found, key=lambda x: (not isinstance(x.key, Named), x.order))


def _set(a: Poly, x: Atom, value: float) -> Poly:
    """The polynomial with one condition decided."""
    out: Poly = {}
    for m, c in a.items():
        if (x, 1.0) not in m:
            out = plus(out, {m: c})
        elif value:
            out = plus(out, {m - {(x, 1.0)}: c})
    return out


def _key(a: Poly) -> frozenset:
    return frozenset((m, round(c, 12)) for m, c in a.items())


def _cover(todo: list, cubes: list, limit: int) -> list | None:
    """The fewest disjoint cubes that cover `todo`, at most `limit`; None if there are none."""
    if not todo:
        return []
    if limit <= 0:
        return None
    best: list | None = None
    for cube, inside in cubes:
        if todo[0] not in inside or not inside <= set(todo):
            continue
        rest = _cover([t for t in todo if t not in inside], cubes, limit - 1)
        if rest is not None and (best is None or len(rest) + 1 < len(best)):
            best = [(cube, inside), *rest]
            limit = len(best) - 1
    return best


def _common(a: Poly) -> tuple[Mono, float]:
    """The product and the number that divide every monomial."""
    monos = list(a)
    powers = dict(monos[0])
    for m in monos[1:]:
        have = dict(m)
        for x in list(powers):
            p, q = powers[x], have.get(x, 0.0)
            if p * q <= 0:
                del powers[x]
            else:
                powers[x] = min(p, q) if p > 0 else max(p, q)
    values = list(a.values())
    size = abs(values[0])
    if any(abs(abs(c) - size) > 1e-12 for c in values):
        size = 1.0
    sign = -1.0 if all(c < 0 for c in values) else 1.0
    return frozenset(powers.items()), sign * size


def _square(a: Poly) -> Poly | None:
    """x − y of x² − 2xy + y²."""
    if len(a) != 3:
        return None
    cross = [m for m, c in a.items() if c == -2 and len(m) == 2 and all(p == 1 for _, p in m)]
    if len(cross) != 1:
        return None
    x, y = sorted((z for z, _ in cross[0]), key=lambda z: z.order)
    squares = {frozenset({(z, 2.0)}): 1.0 for z in (x, y)}
    if any(a.get(m) != 1 for m in squares):
        return None
    first, second = (y, x) if x.kind == "node" and y.kind != "node" else (x, y)
    return {frozenset({(first, 1.0)}): 1.0, frozenset({(second, 1.0)}): -1.0}


def _without(m: Mono, common: Mono) -> Mono:
    out = dict(m)
    for x, p in common:
        left = out.pop(x) - p
        if left:
            out[x] = left
    return frozenset(out.items())


__all__ = ["Layout"]
