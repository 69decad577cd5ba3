"""Polynomials in named things: the algebra behind the normal form of formulas.

A polynomial maps monomials (products of atoms with powers) to numbers, in order of appearance.
Conditions multiply like conditions (1[a]² = 1[a]); everything else is ordinary algebra.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from opdsl.meaning.node import Node


@dataclass(frozen=True, slots=True)
class Atom:
    """L log-probability, P probability, node opaque, ind condition, in membership, sum Σ over a
    set, count size of a set, exp / abs / group of a whole polynomial, log of a knob, div a
    recognised divergence, diff difference of two log-probabilities, named a definition, e the
    sampled token's unit vector."""

    kind: str
    key: object
    at: str = ""  # "" per token, or the index it is read at

    @property
    def varies(self) -> bool:
        return self.at == "v"

    @property
    def order(self) -> tuple[str, str, str]:
        return self.kind, key_text(self.key), self.at


def key_text(key: object) -> str:
    """A key as text that depends neither on hashing nor on how many nodes were made before."""
    if isinstance(key, frozenset):
        return "{" + ",".join(sorted(key_text(k) for k in key)) + "}"
    if isinstance(key, tuple):
        return "(" + ",".join(key_text(k) for k in key) + ")"
    if isinstance(key, int):  # ids of nodes: by age
        return f"{key:012d}"
    return _atom_text(key) if isinstance(key, Atom) else str(key)


@lru_cache(4096)
def _atom_text(atom: Atom) -> str:
    return key_text(atom.order)


@lru_cache(4096)
def _extent(key: object) -> int:
    if isinstance(key, Atom):
        return 1 + _extent(key.key)
    return sum(_extent(k) for k in key) if isinstance(key, frozenset | tuple) else 0


def extent(a: Poly) -> int:
    """How many atoms a polynomial would show, those inside other atoms included."""
    return sum(_extent(m) for m in a)


Mono = frozenset  # of (Atom, power)
Poly = dict  # Mono -> coefficient, in order of appearance
UNIT: Mono = frozenset()

# distributions are tuples: ("leaf", name, temperature, frozen), ("renorm", dist, set id),
# ("mix", ((weight polynomial, dist), …)), ("bin", dist, set id) for the bucket's log-probability
Dist = tuple


def leaf(name: str, temperature: float = 1.0, frozen: bool = False) -> Dist:
    return ("leaf", name, temperature, frozen)


# ---- algebra ---------------------------------------------------------------------------------


def constant(x: float) -> Poly:
    return {UNIT: x} if x else {}


def single(atom: Atom, power: float = 1.0) -> Poly:
    return {frozenset({(atom, power)}): 1.0}


def plus(a: Poly, b: Poly, scale: float = 1.0) -> Poly:
    out = dict(a)
    for m, c in b.items():
        total = out.get(m, 0.0) + scale * c
        if abs(total) < 1e-13:
            out.pop(m, None)
        else:
            out[m] = total
    return out


def scaled(a: Poly, k: float) -> Poly:
    return {m: c * k for m, c in a.items()} if k else {}


def join(a: Mono, b: Mono) -> Mono:
    powers: dict[Atom, float] = dict(a)
    for atom, p in b:
        if atom.kind in ("ind", "in", "e"):
            powers[atom] = 1.0
            continue
        total = powers.get(atom, 0.0) + p
        if abs(total) < 1e-13:
            powers.pop(atom, None)
        else:
            powers[atom] = total
    return frozenset(powers.items())


def times(a: Poly, b: Poly) -> Poly:
    out: Poly = {}
    for m, c in a.items():
        out = plus(
            out, {join(m, n): c * d for n, d in b.items()} if len(b) == 1 else _each(m, c, b)
        )
    return out


def _each(m: Mono, c: float, b: Poly) -> Poly:
    out: Poly = {}
    for n, d in b.items():
        out = plus(out, {join(m, n): c * d})
    return out


def power(a: Poly, k: float) -> Poly | None:
    """a^k for one monomial, or a small whole k; None where it would not stay a polynomial."""
    if len(a) == 1:
        ((m, c),) = a.items()
        if c > 0 or float(k).is_integer():
            return {frozenset((x, p * k) for x, p in m): c**k}
        return None
    if k in (2.0, 3.0):
        out = a
        for _ in range(int(k) - 1):
            out = times(out, a)
        return out
    return None


def frozen(a: Poly) -> frozenset:
    return frozenset(a.items())


def in_order(a: frozenset) -> Poly:
    """A frozen polynomial with its monomials in an order that does not depend on hashing."""
    return dict(sorted(a, key=lambda t: (t[1] < 0, key_text(t[0]))))


def atoms_of(a: Poly) -> list[Atom]:
    """Every atom once, in an order that does not depend on hashing."""
    return sorted({x for m in a for x, _ in m}, key=lambda x: x.order)


def thaw(dist: Dist) -> Dist:
    """Without stop-gradient marks."""
    if dist[0] == "leaf":
        return leaf(dist[1], dist[2])
    if dist[0] in ("renorm", "bin"):
        return (dist[0], thaw(dist[1]), dist[2])
    if dist[0] == "mix":
        return ("mix", tuple((w, thaw(d)) for w, d in dist[1]))
    return dist


def freeze(dist: Dist) -> Dist:
    if dist[0] == "leaf":
        return leaf(dist[1], dist[2], dist[1] == "student")
    if dist[0] in ("renorm", "bin"):
        return (dist[0], freeze(dist[1]), dist[2])
    if dist[0] == "mix":
        return ("mix", tuple((w, freeze(d)) for w, d in dist[1]))
    return dist


def normalized_on(dist: Dist, s: Node) -> bool:
    if s.op in ("full", "with_bin"):
        return dist[0] == "leaf" or (
            dist[0] == "mix" and all(normalized_on(d, s) for _, d in dist[1])
        )
    if dist[0] == "mix":
        return all(normalized_on(d, s) for _, d in dist[1])
    return dist[0] == "renorm" and dist[2] == s.id


def only_dist(a: Poly) -> Dist | None:
    """The distribution whose log-probability this is."""
    if len(a) != 1:
        return None
    ((m, c),) = a.items()
    if c != 1 or len(m) != 1:
        return None
    ((atom, p),) = m
    return atom.key if atom.kind == "L" and p == 1 else None  # type: ignore[return-value]


def weighed(a: Poly, at: str) -> tuple[Poly, Dist] | None:
    """(w, p) of log w + log p."""
    dists = [m for m in a if any(x.kind == "L" and x.at == at for x, _ in m)]
    if len(dists) != 1 or a[dists[0]] != 1:
        return None
    dist = only_dist({dists[0]: 1.0})
    rest = {m: c for m, c in a.items() if m is not dists[0]}
    if dist is None or any(x.kind != "log" for m in rest for x, _ in m):
        return None
    return exponential(rest), dist


def mixed(parts: list[tuple[frozenset, Dist]]) -> Dist:
    return ("mix", tuple(sorted(parts, key=lambda p: key_text(p[1]))))


def mixture(a: Poly) -> Atom | None:
    """Σ w_i p_i with fixed weights, as one probability."""
    if len(a) < 2:
        return None
    parts, places = [], set()
    for m, c in a.items():
        probs = [x for x, p in m if x.kind == "P" and p == 1]
        weight = frozenset((x, p) for x, p in m if x.kind != "P")
        if len(probs) != 1 or c <= 0 or len(m) - len(weight) != 1:
            return None
        if any(x.kind != "node" or x.at for x, _ in weight):
            return None
        places.add(probs[0].at)
        parts.append((frozen({weight: c}), probs[0].key))
    if len(places) != 1 or len({d for _, d in parts}) != len(parts):  # type: ignore[misc]
        return None
    return Atom("P", mixed(parts), places.pop())  # type: ignore[arg-type]


def exponential(a: Poly) -> Poly:
    """exp of a polynomial: log-probabilities become probabilities, logs of knobs the knobs."""
    out = constant(1.0)
    left: Poly = {}
    for m, c in a.items():
        if m == UNIT:
            out = scaled(out, math.exp(min(c, 700.0)))
            continue
        if len(m) == 1:
            ((atom, p),) = m
            if atom.kind == "L" and p == 1:
                out = times(out, single(Atom("P", atom.key, atom.at), c))
                continue
            if atom.kind == "log" and p == 1:
                raised = power(in_order(atom.key), c)  # type: ignore[call-overload]
                if raised is not None:
                    out = times(out, raised)
                    continue
        left[m] = c
    for part in _by_power(left):
        out = times(out, single(Atom("exp", frozen(part), level(part))))
    return out


def _by_power(a: Poly) -> list[Poly]:
    """The exponent of T^a q^b in parts, one per power; (p / q)^a and what is no power stay whole."""
    parts: dict[object, Poly] = {}
    for m, c in a.items():
        logs = [(x, p) for x, p in m if x.kind == "L"]
        whole = len(logs) == 1 and logs[0][1] == 1 and not any(x.varies for x, _ in m - set(logs))
        key = (m - set(logs), abs(c)) if whole else None
        parts.setdefault(key, {})[m] = c
    return list(parts.values())


def level(a: Poly) -> str:
    places = {x.at for m in a for x, _ in m}
    return "v" if "v" in places else ""


def held(a: Poly) -> Poly:
    """Behind a stop-gradient: the student's own values are marked frozen."""
    out: Poly = {}
    for m, c in a.items():
        out = plus(out, {frozenset((_held(x), p) for x, p in m): c})
    return out


def _held(x: Atom) -> Atom:
    if x.kind in ("L", "P"):
        return Atom(x.kind, freeze(x.key), x.at)  # type: ignore[arg-type]
    if x.kind == "sum":
        sid, inner = x.key  # type: ignore[misc]
        return Atom("sum", (sid, frozenset((_held(a), p) for a, p in inner)), x.at)
    if x.kind in ("abs", "exp", "group", "log"):
        return Atom(x.kind, frozen(held(in_order(x.key))), x.at)  # type: ignore[call-overload]
    return x
