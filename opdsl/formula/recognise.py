"""Divergences, entropies and distances found in a normal form, whatever they were called.

Works on the sums Σ_v of one set: Σ p (log p − log q) is KL(p ‖ q), a weighted pair of KLs to the
mixture of its own sides is a Jensen-Shannon divergence, and so on. Nothing here reads a name that
a user or the standard library gave.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdsl.formula.algebra import (
    UNIT,
    Atom,
    Dist,
    Mono,
    Poly,
    frozen,
    held,
    in_order,
    plus,
    scaled,
    thaw,
    times,
)


@dataclass(frozen=True, slots=True)
class Divergence:
    """kind: KL H cross TV chi2 hellinger L2 mass JSD. p, q: distributions; set: id of the index
    set; weight: β of a JSD; detached: the logarithms are held constant."""

    kind: str
    set: int
    p: Dist
    q: Dist | None = None
    weight: frozenset | None = None
    detached: bool = False


def recognised(a: Poly, known: bool = True) -> Poly:
    """The same polynomial with every known comparison as one `div` atom; with `known` off only
    summands of one Σ are taken together."""
    sums: dict[tuple[int, Mono], Poly] = {}
    out: Poly = {}
    for m, c in a.items():
        inner = [(x, p) for x, p in m if x.kind == "sum"]
        if len(inner) == 1 and inner[0][1] == 1:
            sid, body = inner[0][0].key  # type: ignore[misc]
            group = sums.setdefault((sid, m - frozenset(inner)), {})
            sums[sid, m - frozenset(inner)] = plus(group, {body: c})
        else:
            out = plus(out, {m: c})
    for (sid, outer), body in sums.items():
        found, left, extra = [], body, 0.0
        if known:
            found, left = _split(sid, body)
            distances, left, extra = _distances(sid, left, out.get(outer, 0.0))
            found = [*found, *distances]
        for div, c in found:
            out = plus(out, {outer | {(Atom("div", div), 1.0)}: c})
        if extra:
            out = plus(out, {outer: extra})
        for body in _shared(left):
            if len(body) == 1:
                ((m, c),) = body.items()
                out = plus(out, {outer | {(Atom("sum", (sid, m)), 1.0)}: c})
            else:
                k = _scale(body)
                whole = Atom("total", (sid, frozen(scaled(body, 1 / k))))
                out = plus(out, {outer | {(whole, 1.0)}: k})
    return _symmetric(out) if known else out


def _scale(a: Poly) -> float:
    """The number that stands before every summand."""
    sizes = {round(abs(c), 12) for c in a.values()}
    return sizes.pop() if len(sizes) == 1 else 1.0


def _shared(a: Poly) -> list[Poly]:
    """What is summed, by the conditions it is summed under."""
    out: dict[Mono, Poly] = {}
    for m, c in a.items():
        tests = frozenset((x, p) for x, p in m if x.kind in ("ind", "in"))
        out.setdefault(tests, {})[m] = c
    return list(out.values())


def _split(sid: int, body: Poly) -> tuple[list[tuple[Divergence, float]], Poly]:
    """KLs, entropies and cross-entropies of a sum over a set; what is left of it."""
    table: dict[Dist, dict[Dist, float]] = {}
    left: Poly = {}
    for m, c in body.items():
        kinds = {x.kind: x for x, p in m if p == 1}
        if len(m) == 2 and set(kinds) == {"P", "L"}:
            table.setdefault(kinds["P"].key, {})[kinds["L"].key] = c  # type: ignore[arg-type,index]
        else:
            left[m] = c
    found: list[tuple[Divergence, float]] = []
    for p, logs in table.items():
        own = next((d for d in logs if d == p), None)
        own = own or next((d for d in logs if thaw(d) == thaw(p)), None)
        others = [d for d in logs if d is not own]
        k = logs.get(own, 0.0) if own is not None else 0.0
        total = -sum(logs[d] for d in others)
        detached = own is not None and own != p
        if others and abs(k - total) < 1e-9 and (not k or all(logs[d] * k < 0 for d in others)):
            found += [(Divergence("KL", sid, p, d, None, detached), -logs[d]) for d in others]
            continue
        if k and others and all(logs[d] * k < 0 for d in others):  # KL, and entropy beside it
            found += [(Divergence("KL", sid, p, d, None, detached), -logs[d]) for d in others]
            found.append((Divergence("H", sid, p, None, None, detached), total - k))
            continue
        if k:
            found.append((Divergence("H", sid, p, None, None, detached), -k))
        found += [(Divergence("cross", sid, p, d), -logs[d]) for d in others]
    return found, left


def _distances(
    sid: int, body: Poly, free: float
) -> tuple[list[tuple[Divergence, float]], Poly, float]:
    """TV, χ², Hellinger, squared distance: from what `_split` left and the constant beside it."""
    found: list[tuple[Divergence, float]] = []
    left = dict(body)
    extra = 0.0
    for m, c in body.items():
        powers = dict(m)
        atoms = list(powers)
        if len(atoms) == 1 and atoms[0].kind == "abs" and powers[atoms[0]] == 1:
            pair = _difference(in_order(atoms[0].key))  # type: ignore[call-overload]
            if pair is not None:
                found.append((Divergence("TV", sid, *pair), 2 * c))
                left.pop(m, None)
            continue
        if len(atoms) != 2 or any(x.kind != "P" for x in atoms):
            continue
        a, b = sorted(atoms, key=lambda x: x.order)
        by = {powers[a]: a, powers[b]: b}
        if set(by) == {2.0, -1.0}:  # Σ p²/q, and −2 Σp + Σq or their values
            p, q = by[2.0], by[-1.0]
            extra += _take(found, left, m, Divergence("chi2", sid, p.key, q.key), c,  # type: ignore[arg-type]
                           {_one(p): -2 * c, _one(q): c}, free + extra, -c)  # fmt: skip
        elif powers[a] == powers[b] == 0.5 and c < 0:
            a, b = sorted((a, b), key=_student_last, reverse=True)
            extra += _take(found, left, m, Divergence("hellinger", sid, a.key, b.key), -c,  # type: ignore[arg-type]
                           {_one(a): -c / 2, _one(b): -c / 2}, free + extra, -c)  # fmt: skip
        elif powers[a] == powers[b] == 1 and c < 0:
            wanted = {frozenset({(a, 2.0)}): -c / 2, frozenset({(b, 2.0)}): -c / 2}
            if all(abs(left.get(k, 0.0) - v) < 1e-12 for k, v in wanted.items()):
                _drop(left, [m, *wanted])
                a, b = sorted((a, b), key=_student_last, reverse=True)
                found.append((Divergence("L2", sid, a.key, b.key), -c / 2))  # type: ignore[arg-type]
    return found, left, extra


def _one(x: Atom) -> Mono:
    return frozenset({(x, 1.0)})


def _drop(left: Poly, monos: list[Mono]) -> None:
    for m in monos:
        left.pop(m, None)


def _take(
    found: list, left: Poly, m: Mono, div: Divergence, c: float, linear: dict[Mono, float],
    free: float, constant: float,
) -> float:  # fmt: skip
    """Adds a distance whose linear part is present, as sums or as their value 1; the constant
    that this used up, negated."""
    if all(abs(left.get(k, 0.0) - v) < 1e-12 for k, v in linear.items()):
        _drop(left, [m, *linear])
        found.append((div, c))
        return 0.0
    if not any(k in left for k in linear) and abs(free - constant) < 1e-12:
        _drop(left, [m])
        found.append((div, c))
        return -constant
    return 0.0


def _difference(a: Poly) -> tuple[Dist, Dist] | None:
    """(p, q) of p(v) − q(v), in an order that does not depend on the spelling."""
    if len(a) != 2:
        return None
    atoms = []
    for m, c in a.items():
        if len(m) != 1 or abs(abs(c) - 1) > 1e-12:
            return None
        ((atom, p),) = m
        if atom.kind != "P" or p != 1:
            return None
        atoms.append((c, atom))
    if atoms[0][0] == atoms[1][0]:
        return None
    first, second = sorted((x for _, x in atoms), key=_student_last)
    return second.key, first.key  # type: ignore[return-value]


def _student_last(x: Atom) -> tuple[bool, tuple]:
    return "student" in str(x.key), x.order


def _symmetric(a: Poly) -> Poly:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q is JSD_β(p ‖ q)."""
    kls = [
        (m, c, next(x for x, _ in m if x.kind == "div"))
        for m, c in a.items()
        if any(x.kind == "div" and x.key.kind == "KL" and x.key.q[0] == "mix" for x, _ in m)  # type: ignore[attr-defined]
    ]
    for i, (m, c, x) in enumerate(kls):
        for n, d, y in kls[i + 1 :]:
            div, other = x.key, y.key
            assert isinstance(div, Divergence) and isinstance(other, Divergence)
            if div.q != other.q or div.set != other.set:
                continue
            weights = {p: in_order(w) for w, p in div.q[1]}  # type: ignore[index]
            if set(weights) != {div.p, other.p}:
                continue
            left = times(weights[div.p], {n - {(y, 1.0)}: d})
            right = times(weights[other.p], {m - {(x, 1.0)}: c})
            if plus(left, right, -1.0):
                continue
            p, q = (div, other) if "student" not in str(div.p) else (other, div)
            found = Divergence("JSD", div.set, p.p, q.p, frozen(weights[p.p]))
            rest = _divided({m - {(x, 1.0)}: c}, weights[div.p])
            if rest is None:
                continue
            out = {k: v for k, v in a.items() if k not in (m, n)}
            merged = times(rest, {frozenset({(Atom("div", found), 1.0)}): 1.0})
            return _symmetric(plus(out, merged))
    return a


def _divided(a: Poly, b: Poly) -> Poly | None:
    from opdsl.formula.algebra import power

    inverse = power(b, -1.0) if len(b) == 1 else None
    return None if inverse is None else times(a, inverse)


# ---- mixtures ----------------------------------------------------------------------------------


def unmixed(a: Poly) -> Poly:
    """Uses Σ w_i p_i = m where p_i / m appears, if that makes the polynomial shorter."""
    below = {x for m in a for x, p in m if x.kind == "P" and x.key[0] == "mix" and p < 0}  # type: ignore[index]
    for atom in sorted(below, key=lambda x: x.order):
        parts = [(in_order(w), Atom("P", d, atom.at)) for w, d in atom.key[1]]  # type: ignore[index]
        for i, (weight, part) in enumerate(parts):
            inverse = _divided({UNIT: 1.0}, weight)
            if inverse is None:
                continue
            others: Poly = {frozenset({(atom, 1.0)}): 1.0}
            for j, (w, x) in enumerate(parts):
                if j != i:
                    others = plus(others, times(w, {frozenset({(x, 1.0)}): 1.0}), -1.0)
            instead = times(inverse, others)
            out: Poly = {}
            for m, c in a.items():
                powers = dict(m)
                if powers.get(atom, 0) < 0 and powers.get(part, 0) == 1:
                    rest = frozenset((x, p) for x, p in m if x is not part and x != part)
                    out = plus(out, times({rest: c}, instead))
                else:
                    out = plus(out, {m: c})
            if len(out) < len(a):
                return unmixed(out)
    return a


# ---- differences of log-probabilities -------------------------------------------------------------


def differences(a: Poly) -> Poly:
    """Pairs L_a − L_b as one `diff` atom wherever that shortens the polynomial."""
    a = _paired(a)
    logs = sorted({x for m in a for x, _ in m if x.kind == "L"}, key=lambda x: x.order)
    logs.sort(key=lambda x: "student" not in str(x.key))
    best = a
    for i, x in enumerate(logs):
        for y in logs[i + 1 :]:
            if x.at != y.at:
                continue
            gap = Atom("diff", (x.key, y.key), x.at)
            instead = {frozenset({(y, 1.0)}): 1.0, frozenset({(gap, 1.0)}): 1.0}
            out: Poly = {}
            for m, c in a.items():
                powers = dict(m)
                k = powers.get(x, 0)
                if not float(k).is_integer() or k < 0 or k > 3:
                    out = None  # type: ignore[assignment]
                    break
                rest = frozenset((z, p) for z, p in m if z != x)
                piece: Poly = {rest: c}
                for _ in range(int(k)):
                    piece = times(piece, instead)
                out = plus(out, piece)
            if out is not None and len(out) < len(best):
                best = out
    return differences(best) if best is not a else a


def _paired(a: Poly) -> Poly:
    """k L_a − k L_b with the same factors beside them: k (L_a − L_b)."""
    groups: dict[Mono, list[tuple[Atom, float]]] = {}
    for m, c in a.items():
        logs = [x for x, p in m if x.kind == "L" and p == 1]
        if len(logs) == 1 and not any(x.kind == "L" and p != 1 for x, p in m):
            groups.setdefault(m - {(logs[0], 1.0)}, []).append((logs[0], c))
    out = dict(a)
    for outer, logs in groups.items():
        order = sorted(logs, key=lambda t: ("student" not in str(t[0].key), t[0].order))
        for i, (x, k) in enumerate(order):
            for j in range(i + 1, len(order)):
                y, other = order[j]
                if x.at != y.at or k * other >= 0:
                    continue
                size = min(abs(k), abs(other)) * (1 if k > 0 else -1)
                out = plus(out, {outer | {(x, 1.0)}: -size})
                out = plus(out, {outer | {(y, 1.0)}: size})
                out = plus(out, {outer | {(Atom("diff", (x.key, y.key), x.at), 1.0)}: size})
                k -= size
                order[j] = y, other + size
    return out


def expanded(a: Poly) -> Poly:
    """`diff` atoms written out again."""
    out: Poly = {}
    for m, c in a.items():
        piece: Poly = {frozenset((x, p) for x, p in m if x.kind != "diff"): c}
        for x, p in m:
            if x.kind == "diff":
                left, right = x.key  # type: ignore[misc]
                gap = {
                    frozenset({(Atom("L", left, x.at), 1.0)}): 1.0,
                    frozenset({(Atom("L", right, x.at), 1.0)}): -1.0,
                }
                for _ in range(int(p)):
                    piece = times(piece, gap)
        out = plus(out, piece)
    return out


__all__ = ["Divergence", "differences", "expanded", "held", "recognised", "scaled", "unmixed"]
