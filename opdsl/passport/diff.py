"""Two methods side by side: which roles correspond, and whether the methods are the same.

Nothing here is run. Two methods are the same when their programs, states, teachers and critics
are equal after roles have been renamed; names of methods, lets and knobs do not count, values do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from opdsl.ir.program import Program
from opdsl.meaning.graph import nodes_below, static_value
from opdsl.meaning.node import Node
from opdsl.meaning.spec import Schedule, Spec, StateSource, TeacherDecl

COMMUTE = frozenset({"add", "mul", "min", "max", "and", "or", "eq", "union", "logaddexp"})
UNSEEN = frozenset({"unit", "depth", "id", "of"})  # attributes that carry no meaning


@dataclass(frozen=True)
class Side:
    """One of the two methods. `at` gives it at other knob values, None where they are refused."""

    label: str  # "A" | "B"
    program: Program
    at: Callable[[Mapping[str, float]], Side | None] = field(repr=False, compare=False)

    @property
    def spec(self) -> Spec:
        return self.program.spec

    @property
    def roots(self) -> list[Node]:
        return [p.total for p in self.program.parts]

    def reads(self, *ops: str) -> bool:
        return any(n.op in ops for n in nodes_below(self.roots))

    def asks(self, name: str) -> bool:
        """Whether an input of the batch is read."""
        return any(n.op == "input" and n.attr("name") == name for n in nodes_below(self.roots))

    @property
    def sizes(self) -> set[int]:
        """The k of every set it takes."""
        nodes = nodes_below(self.roots)
        return {int(n.attr("k")) for n in nodes if n.op == "top"}  # type: ignore[call-overload]

    @property
    def widest(self) -> int:
        return max(self.sizes, default=0)

    def marks(self, *inputs: str) -> set[int]:
        """Whole numbers that inputs such as `position` are compared or combined with."""
        out: set[int] = set()
        nodes = nodes_below(self.roots)
        below: dict[int, bool] = {}
        for n in nodes:
            own = n.op == "input" and n.attr("name") in inputs
            below[n.id] = own or any(below[x.id] for x in n.args)
            numbers = [static_value(x) for x in n.args if not below[x.id]] if below[n.id] else []
            out |= {math.ceil(abs(x)) for x in numbers if x is not None and abs(x) < 1e6}
        return out

    @property
    def reach(self) -> int:
        """How many tokens away it looks: windows, and places where `position` is told apart."""
        nodes = nodes_below(self.roots)
        shifts = {int(n.attr("n")) for n in nodes if n.op == "shift"}  # type: ignore[call-overload]
        return max({0, *shifts, *self.marks("position", "length")})


# ---- roles -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roles:
    """Pairs (name in A, name in B); None where one side has no such role."""

    teachers: tuple[tuple[str | None, str | None], ...]
    critics: tuple[tuple[str | None, str | None], ...]
    routed: tuple[tuple[str | None, str | None], ...]
    why_not: str = ""  # why no batch can serve both

    @property
    def renamed(self) -> tuple[tuple[str, str], ...]:
        """Teachers and critics that correspond under different names."""
        pairs = (*self.teachers, *self.critics)
        return tuple((a, b) for a, b in pairs if a and b and a != b)

    def common(self, side: int) -> dict[str, str]:
        """Name on a side -> one name for both; all teachers are one where counts differ."""
        out = {"student": "student", "initial": "initial"}
        for kind in ("teachers", "routed", "critics"):
            for i, pair in enumerate(getattr(self, kind)):
                if pair[side] is not None:
                    merged = self.why_not and kind != "critics"
                    out[f"{kind}:{pair[side]}"] = "teacher" if merged else f"{kind} {i}"
        return out


def roles(a: Spec, b: Spec) -> Roles:
    """Roles that correspond: by name where the names are the same, otherwise in order."""
    mine, yours = _asked(a), _asked(b)
    why = ""
    if mine and yours and len(mine) != len(yours):
        why = f"A asks {_count(len(mine), 'teacher')}, B asks {_count(len(yours), 'teacher')}"
    return Roles(
        _pairs([t.name for t in mine], [t.name for t in yours]),
        _pairs([c.name for c in a.critics], [c.name for c in b.critics]),
        _pairs([r.name for r in a.routed], [r.name for r in b.routed]),
        why,
    )


def _asked(spec: Spec) -> list[TeacherDecl]:
    return [t for t in spec.teachers if t.kind != "initial" or t.context is not None]


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _pairs(a: list[str], b: list[str]) -> tuple[tuple[str | None, str | None], ...]:
    if set(a) == set(b):
        return tuple((x, x) for x in a)
    longest = max(len(a), len(b))
    fill: list[str | None] = [None]
    return tuple(zip(a + fill * (longest - len(a)), b + fill * (longest - len(b))))


# ---- programs as plain values ------------------------------------------------------------------


class Table:
    """Numbers for graphs: equal numbers mean equal structure, also between two methods.

    by: "value" counts a knob as its number, "name" as its name. loose: operands that commute may
    come in either order.
    """

    def __init__(self, pairing: Roles, by: str = "value", loose: bool = False):
        self.names = (pairing.common(0), pairing.common(1))
        self.by, self.loose = by, loose
        self.keys: dict[tuple, int] = {}

    def number(
        self,
        side: int,
        root: Node,
        leaves: Mapping[int, str] | None = None,
        sets: frozenset[int] = frozenset(),
    ) -> int:
        """The number of a graph. `leaves` are nodes that count as a letter; `sets` are spellings
        of the support, whose choice and tail rule are left out of what is summed over it."""
        done: dict[int, int] = {}
        for n in nodes_below([root]):
            args = [done.get(x.id, -1) for x in n.args]
            if leaves and n.id in leaves:
                letter = self._of(("leaf", leaves[n.id].lstrip("-")))
                minus = leaves[n.id].startswith("-")
                done[n.id] = self._of(("neg", (), letter)) if minus else letter
            elif n.id in sets:
                done[n.id] = self._of(("support",))
            elif _bare(n, sets):
                done[n.id] = args[0]
            else:
                if self.loose and n.op in COMMUTE:
                    args.sort()
                done[n.id] = self._of((*self._head(side, n), *args))
        return done[root.id]

    def _of(self, key: tuple) -> int:
        return self.keys.setdefault(key, len(self.keys))

    def _head(self, side: int, n: Node) -> tuple:
        if n.op in ("param", "const"):
            by_name = n.op == "param" and self.by == "name"
            return ("const", str(n.attr("name")).split(".")[-1] if by_name else n.attr("value"))
        attrs = {k: v for k, v in n.attrs if k not in UNSEEN}
        if "dist" in attrs:
            attrs["dist"] = self.dist(side, str(attrs["dist"]))
        if "critic" in attrs:
            attrs["critic"] = self.names[side].get(f"critics:{attrs['critic']}", attrs["critic"])
        return (n.op, tuple(sorted(attrs.items(), key=str)))

    def dist(self, side: int, name: str) -> str:
        names = self.names[side]
        for kind in ("routed", "teachers"):
            if f"{kind}:{name}" in names:
                return names[f"{kind}:{name}"]
        return names.get(name, name)


def _bare(n: Node, sets: frozenset[int]) -> bool:
    """A value taken at the support, with its bucket, or renormalised on it (x − log Σ exp x)."""
    if n.op in ("at_set", "add_bin"):
        return n.args[1].id in sets
    rest = n.args[1] if n.op == "sub" else n
    return (
        rest.op == "lse_v"
        and n.op == "sub"
        and rest.args[0] is n.args[0]
        and rest.args[1].id in sets
    )


def same(a: Side, b: Side, pairing: Roles) -> bool:
    """Whether two methods are one, up to the names of roles, lets and knobs."""
    if len(a.program.parts) != len(b.program.parts) or pairing.why_not:
        return False
    table = Table(pairing)
    whole = []
    for i, side in enumerate((a, b)):
        spec = side.spec
        whole.append(
            (
                [(p.rows, table.number(i, p.total)) for p in side.program.parts],
                sources(spec, table, i, every=True),
                _declared(spec, table, i),
                [[table.dist(i, p) for p in r.parts] for r in spec.routed],
                [(c.init, c.lr, c.warmup) for c in spec.critics],
            )
        )
    return whole[0] == whole[1]


def _declared(spec: Spec, table: Table, side: int) -> list[tuple]:
    """What the teachers are; what they can be asked for is no part of the method."""
    out = []
    for t in spec.teachers:
        plain = t.kind == "initial" and t.context is None
        name = "initial" if plain else table.dist(side, t.name)
        out.append((name, t.kind, t.context, t.decay, t.every, t.when))
    return sorted(out, key=str)


def sources(spec: Spec, table: Table, side: int, every: bool = False) -> list[tuple]:
    """State sources that are visited at all; with `every`, also how many rollouts per prompt."""
    out = []
    for s in spec.states:
        share = _share(s)
        if share != 0:
            group = (s.group,) if every else ()
            law = (s.temperature, s.top_p, s.top_k, s.max_tokens, s.lag, s.prefix)
            out.append((s.kind, table.dist(side, s.policy), share, *law, *group))
    return sorted(out, key=str)


def _share(s: StateSource) -> object:
    x = s.share
    return (x.kind, x.start, x.stop, x.over) if isinstance(x, Schedule) else float(x)


def same_states(a: Side, b: Side, pairing: Roles) -> str:
    """ "same", "rollouts" (only their number per prompt differs) or "different"."""
    table = Table(pairing)
    if sources(a.spec, table, 0, True) == sources(b.spec, table, 1, True):
        return "same"
    if sources(a.spec, table, 0) == sources(b.spec, table, 1):
        return "rollouts"
    return "different"
