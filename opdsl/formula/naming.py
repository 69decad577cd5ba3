"""Which quantities of a method get a letter, and what each letter means.

A letter is given by role in the graph (the frozen signal, the result of credit, what a scan adds
up, trigger, candidates, target and strength of a routing), never by a name from the spec.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from opdsl.formula.algebra import Atom
from opdsl.formula.normal import Normal
from opdsl.formula.notation import Call, Join, Math, Rel, Sym, Text, Wrap, add, extent, mul
from opdsl.formula.printer import Printer
from opdsl.formula.symbols import Named, Symbols, primed, short_names
from opdsl.ir.derive import strip
from opdsl.ir.program import expand_tails
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis
from opdsl.meaning.spec import Spec, Term


@dataclass(frozen=True, slots=True)
class Definition:
    """`left op right`, with a remark."""

    left: Math
    op: str
    right: Math
    note: str = ""
    note_l: str = ""  # the note in LaTeX, where it has mathematics in it


@dataclass(slots=True)
class Names:
    """Letters of one method and the printer that writes with them."""

    spec: Spec
    symbols: Symbols
    printer: Printer
    definitions: list[Definition] = field(default_factory=list)
    routed: dict[str, tuple[Named, ...]] = field(default_factory=dict)
    factors: dict[int, Math] = field(default_factory=dict)  # gates and weights with a letter
    targets: set[object] = field(default_factory=set)  # letters that add up to 1 over tokens
    _counts: dict[str, int] = field(default_factory=dict)
    _rank: int = 0

    # -- letters --------------------------------------------------------------------------------
    def letter(self, u: str, l: str, style: str = "value") -> Named:
        count = self._counts.get(u, 0)
        self._counts[u] = count + 1
        self._rank += 1
        return primed(u, l, count, style, self._rank)

    def give(self, n: Node, name: Named, kind: str = "named", at: str = "") -> None:
        """The node, its negative and its form without stop-gradients are written as this letter."""
        b, table = self.spec.builder, self.printer.normal.names
        for node in (n, strip(b, n), strip(b, expand_tails(b, n))):
            table[node.id] = (1.0, Atom(kind, name, at))
            if kind == "named":
                table[b.neg(node).id] = (-1.0, Atom(kind, name, at))

    def meaning(self, n: Node, at: str = "v") -> Math:
        """What a named node stands for: written without its own letter."""
        names = self.printer.normal.names
        n = strip(self.spec.builder, n)
        hidden = {}
        for node in (n, self.spec.builder.neg(n)):
            if node.id in names:
                hidden[node.id] = names.pop(node.id)
        normal = Normal(names)
        normal.sets, normal.nodes = self.printer.normal.sets, self.printer.normal.nodes
        old, self.printer.normal = self.printer.normal, normal
        try:
            if n.q.unit == "bool" and n.op != "where":
                return self.printer.condition(n, at)
            return self.printer.expr(n, at)
        finally:
            names.update(hidden)
            self.printer.normal = old

    def define(self, left: Math, op: str, right: Math, note: str = "", note_l: str = "") -> None:
        self.definitions.append(Definition(left, op, right, note, note_l))


def named(spec: Spec, plain: bool = False) -> Names:
    """Letters for every term of a method."""
    short = short_names([p.name for p in spec.params])
    teachers = {t for term in spec.terms for t in term.teachers if t != "initial"}
    symbols = Symbols(short, next(iter(teachers)) if len(teachers) == 1 else None, plain)
    names = Names(spec, symbols, Printer(Normal(), symbols))
    for term in spec.terms:
        _parts(names, term)
        if term.signal is not None and term.kind == "feedback":
            _signal(names, term)
        if term.routing.trigger is not None:
            _routing(names, term)
    return names


# ---- parts of a signal --------------------------------------------------------------------------

LONG = 6  # nodes: what is shorter than this may be written twice
WIDE = 8  # symbols: what a factor repeats gets a letter beyond this


def _parts(names: Names, term: Term) -> None:
    """Letters for what is read at another token, for long parts that a signal, a gate or a weight
    repeats, and for long frozen parts that a loss repeats (the weight of a mixture)."""
    loss = [term.loss] if term.route == "loss" and term.loss is not None else []
    held = _repeated_frozen(nodes_below(loss))
    roots = [x for x in (term.signal, term.gate, term.weight) if x is not None]
    roots += loss if held else []
    below = nodes_below(roots)
    shifted = {_bare(n.args[0]).id for n in below if n.op == "shift"}
    signal = nodes_below([term.signal]) if term.signal is not None else []
    repeated = _repeated(signal) if term.route == "reward" else set()
    factors = _repeated(nodes_below([term.gate, term.weight]))
    factors -= {
        n.id for n in nodes_below(loss)
    }  # a divergence that is also the loss keeps its name
    factors |= held
    table = names.printer.normal.names
    u = "b" if all(p.name.split(".")[-1] != "b" for p in names.spec.params) else "u"
    for n in below:  # arguments before users: a part may read the letters of its own parts
        if n.id in table or n is term.signal or n.op in SPELLED or n.q.axis is Axis.CONST:
            continue
        kept = n.id in repeated or (n.id in shifted and n.op not in TIMED)
        if not kept and (n.id not in factors or n.op in CALLED):
            continue
        meaning = names.meaning(n)
        if kept or extent(meaning, WIDE) > WIDE:
            b = names.letter(u, u)
            if n.q.axis is not Axis.TOK:
                b = replace(b, timed=False, style="row" if n.q.axis is Axis.SEQ else "value")
            names.give(n, b)
            names.define(b.at("t"), "=", meaning)


CALLED = frozenset(["sum_v", "max_v", "lse_v"])  # printed as one call: KL(p ‖ q), H(p), π(Ω)
SPELLED = frozenset(["const", "param", "input", "schedule", "at_y", "sg", "live", "neg"])
TIMED = frozenset(["scan", "scan_fwd", "shift"])  # printed at any time


def _bare(n: Node) -> Node:
    while n.op in ("sg", "live", "neg"):
        n = n.args[0]
    return n


def _users(nodes: list[Node]) -> dict[int, set[int]]:
    users: dict[int, set[int]] = {}
    for n in nodes:
        for a in n.args:
            users.setdefault(a.id, set()).add(n.id)
    return users


def _repeated_frozen(nodes: list[Node]) -> set[int]:
    """Long scalars behind a stop-gradient that has more than one user."""
    users = _users(nodes)
    return {
        n.args[0].id
        for n in nodes
        if n.op == "sg" and n.q.axis not in (Axis.VOCAB, Axis.CONST)
        and len(users.get(n.id, ())) > 1 and len(nodes_below([n])) >= LONG
    }  # fmt: skip


def _repeated(nodes: list[Node]) -> set[int]:
    """Long parts with more than one user, where they do not lie inside another one with the same."""
    users = _users(nodes)
    found: set[int] = set()
    for n in nodes:
        scalar = n.q.axis is not Axis.VOCAB and n.q.unit not in ("bool", "dist")
        if scalar and len(users.get(n.id, ())) > 1 and len(nodes_below([n])) >= LONG:
            found.add(n.id)
    return found


# ---- the reward route ---------------------------------------------------------------------------


def _signal(names: Names, term: Term) -> None:
    signal, advantage = term.signal, term.advantage
    assert signal is not None
    if term.route == "scores":
        s = names.letter("ς", r"\varsigma")
        names.give(signal, s, "named", "v")
        left = Call(s.at("t"), (Sym("v", "v"),))
        names.define(left, "=", names.meaning(signal), "frozen")
        return
    if advantage is None or advantage.op in ("const", "param"):
        return
    a = names.letter("A", "A")
    if signal is advantage:
        names.give(advantage, a)
        names.define(a.at("t"), "=", names.meaning(advantage), "own token only, frozen")
        return
    if _spread(signal, advantage):
        names.give(advantage, a)
        names.define(a.at("t"), "=", names.meaning(signal), "frozen")
        return
    if signal.op not in ("const", "param") and signal.q.axis is not Axis.CONST:
        r = names.letter("r", "r")
        names.give(signal, r)
        names.define(r.at("t"), "=", names.meaning(signal), "frozen")
    _returns(names, signal, advantage)
    names.give(advantage, a)
    names.define(a.at("t"), "=", names.meaning(advantage))


def _spread(signal: Node, advantage: Node) -> bool:
    """Whether the advantage is a number of the sequence, written on every token."""
    if advantage.op != "mul" or signal not in advantage.args:
        return False
    return any(a.attr("name") == "one" for a in advantage.args)


def _returns(names: Names, signal: Node, advantage: Node) -> None:
    """δ for what a scan adds up, G for what a baseline compares between rollouts."""
    table = names.printer.normal.names
    below = nodes_below([advantage])
    for n in below:
        if n.op == "scan" and n.args[0].id not in table and n.args[0].op not in ("const", "input"):
            d = names.letter("δ", r"\delta")
            names.give(n.args[0], d)
            names.define(d.at("t"), "=", names.meaning(n.args[0]))
    rows = ("others_sum", "group_sum", "position_sum", "sum_b")
    for n in below:
        x = n.args[0] if n.op in rows else None
        if x is None or x.op == "input" or x.id in table or x is advantage:
            continue
        if any(s.op in ("scan", "shift", "sum_t") for s in nodes_below([x])):
            g = names.letter("G", "G")
            names.give(x, g)
            names.define(g.at("t"), "=", names.meaning(x))


# ---- routing ------------------------------------------------------------------------------------


def _routing(names: Names, term: Term) -> None:
    how = term.routing
    assert how.trigger is not None
    n = names.letter("n", "n", "flag")
    trigger = names.meaning(how.trigger)
    names.give(how.trigger, n, "ind")
    from opdsl.formula.notation import Ind

    names.define(n.at("t"), "=", Ind(trigger))
    names.routed[term.name] = (n,)
    if how.kind != "counterfactual":
        return
    assert how.candidates is not None and how.target is not None and how.strength is not None
    assert how.domain is not None and how.routable is not None and how.raw_target is not None
    c = names.letter("C", "C", "some")
    rho, m = names.letter("ρ", r"\rho"), names.letter("m", "m")
    tests = _conjuncts(names, how.candidates)
    place = names.symbols.set(how.domain)
    v = Sym("v", "v")
    over = Rel("∈", v, place if place is not None else Text("the vocabulary"))
    names.define(c.at("t"), "=", Wrap("set", Join(",", (Rel(":", over, tests[0]), *tests[1:]))))
    weight = names.meaning(how.raw_target)
    over_c = "positive part, over " if _signed(how) else "over "
    some = c.at("t")
    names.define(
        Call(rho.at("t"), (v,)), "∝", weight, over_c + some.u, rf"\text{{{over_c}}} {some.l}"
    )
    names.define(m.at("t"), "=", names.meaning(how.strength))
    names.give(how.routable, c, "ind")
    names.give(how.target, rho, "named", "v")
    names.targets.add(rho)
    names.give(how.strength, m)
    names.routed[term.name] = (n, c, rho, m)


def _conjuncts(names: Names, mask: Node) -> list[Math]:
    stack, out = [strip(names.spec.builder, mask)], []
    while stack:
        x = stack.pop()
        if x.op == "and":
            stack += [x.args[1], x.args[0]]
        else:
            out.append(names.printer.condition(x, "v"))
    return out


def _signed(how) -> bool:
    """Whether the target can be negative on a candidate (its positive part is taken)."""
    raw, stack = how.raw_target, [how.candidates]
    raw = raw.args[0] if raw.op == "sg" else raw
    if raw.q.low >= 0:
        return False
    while stack:
        x = stack.pop()
        if x.op == "and":
            stack += x.args
        elif x.op in ("lt", "le") and raw.op == "sub" and raw.args == (x.args[1], x.args[0]):
            return False
    return True


__all__ = ["Definition", "Names", "add", "mul", "named"]
