"""Which axes of two methods differ: read off the graphs, said in words of the language.

An axis counts as changed where its graph differs once roles are matched, earlier stages are
replaced by a letter (the signal inside credit, the advantage inside routing, the index set inside
the feedback) and knobs are compared by name; a knob's value is an axis of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from opdsl.formula.naming import Names, named
from opdsl.formula.notation import number, unicode
from opdsl.meaning.node import Node
from opdsl.meaning.spec import ParamValue, Schedule, Spec, StateSource, TeacherDecl, Term
from opdsl.passport.diff import Roles, Side, Table, same_states

NONE = "–"


@dataclass(frozen=True)
class Axis:
    """One axis: how each method says it, and whether they mean the same."""

    name: str
    a: str
    b: str
    changed: bool


def axes(a: Side, b: Side, roles: Roles) -> list[Axis]:
    """Every axis of two methods in the order of a spec."""
    pair = Pair(a, b, roles)
    out = [pair.states(), pair.teachers()]
    matched = _matched(a.spec, b.spec, pair)
    for ta, tb in matched:
        out += pair.term(ta, tb, len(matched) > 1)
    out += [pair.aggregate(), *pair.regularizers(), pair.critics(), pair.knobs(), pair.optimize()]
    return [x for x in out if x.a != NONE or x.b != NONE or x.changed]


# ---- the two methods --------------------------------------------------------------------------------


class Pair:
    """Two methods whose parts can be compared."""

    def __init__(self, a: Side, b: Side, roles: Roles):
        self.sides, self.roles = (a, b), roles
        self.specs = (a.spec, b.spec)
        self.tables = tuple(Table(roles, by, loose=True) for by in ("value", "name"))
        self.names: tuple[Names, Names] = (named(a.spec, True), named(b.spec, True))
        self.knob_changes = {_short(p) for pair in self._changed_knobs() for p in pair if p}

    def alike(
        self,
        x: Node | None,
        y: Node | None,
        leaves: tuple[Mapping[int, str], Mapping[int, str]] = ({}, {}),
        sets: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset()),
    ) -> bool:
        """Whether two graphs mean the same, at equal knobs."""
        if x is None or y is None:
            return x is y
        return any(
            t.number(0, x, leaves[0], sets[0]) == t.number(1, y, leaves[1], sets[1])
            for t in self.tables
        )

    # -- states and teachers -----------------------------------------------------------------------
    def states(self) -> Axis:
        texts = [_mixture(s.states) for s in self.specs]
        changed = same_states(*self.sides, self.roles) != "same"
        return Axis("state", texts[0], texts[1], changed)

    def teachers(self) -> Axis:
        texts = [", ".join(_teacher(t) for t in s.teachers) or NONE for s in self.specs]
        dist = self.tables[0].dist
        plain = [
            sorted(
                (dist(i, t.name), t.kind, t.access, t.k or 0, t.context or "", t.decay or 0.0,
                 t.every, t.when or ())
                for t in s.teachers
            )
            for i, s in enumerate(self.specs)
        ]  # fmt: skip
        return Axis("teacher", texts[0], texts[1], plain[0] != plain[1])

    # -- terms --------------------------------------------------------------------------------------
    def term(self, x: Term | None, y: Term | None, several: bool) -> list[Axis]:
        names = [t.name for t in (x, y) if t is not None]
        name = next((n for n in names if n != "main"), names[0])
        head = f"{name}: " if several and name != "main" else ""
        if x is None or y is None:
            texts = [NONE if t is None else _text(t, "feedback") for t in (x, y)]
            return [Axis(f"term {name}", texts[0], texts[1], True)]
        terms = (x, y)
        sets = tuple(frozenset({t.support.set.id, t.support.base.id}) for t in terms)
        signal = tuple({t.feedback.id: "r"} if t.feedback is not None else {} for t in terms)
        credit = tuple({t.signal.id: "r"} if t.signal is not None else {} for t in terms)
        routed = tuple(_letters(s, t) for s, t in zip(self.specs, terms))
        out = [self._support(x, y)]
        out.append(self._feedback(x, y, sets))
        if x.route == y.route == "reward":
            out.append(self._written("shape", terms, [t.signal for t in terms], signal, sets))
            out.append(self._written("credit", terms, [t.advantage for t in terms], credit, sets))
            out += self._routing(terms, routed, sets)
        elif "reward" in (x.route, y.route):
            for key in ("shape", "credit", "routing"):
                texts = [_text(t, key) for t in terms]
                out.append(Axis(key, texts[0], texts[1], texts[0] != texts[1]))
        for key in ("gate", "weight"):
            nodes = [getattr(t, key) for t in terms]
            same = self.alike(*nodes, routed, sets)  # type: ignore[misc]
            out.append(Axis(key, *(self._printed(i, n) for i, n in enumerate(nodes)), not same))
        return [Axis(head + v.name, v.a, v.b, v.changed) for v in out]

    def _support(self, x: Term, y: Term) -> Axis:
        s, t = x.support, y.support
        same = s.tail == t.tail and self.alike(s.base, t.base)
        texts = [_text(u, "support") for u in (x, y)]
        if same or texts[0] != texts[1]:
            return Axis("support", texts[0], texts[1], not same)
        shown = [unicode(n.symbols.described(u.support.base)) for n, u in zip(self.names, (x, y))]
        return Axis("support", shown[0], shown[1], not self._by_knobs(texts[0]))

    def _feedback(self, x: Term, y: Term, sets: tuple) -> Axis:
        same = x.route == y.route and self.alike(x.feedback, y.feedback, sets=sets)
        return self._said("feedback", (x, y), [x.feedback, y.feedback], same)

    def _written(self, key: str, terms: tuple, nodes: list, leaves: tuple, sets: tuple) -> Axis:
        return self._said(key, terms, nodes, self.alike(*nodes, leaves, sets))

    def _said(self, key: str, terms: tuple, nodes: list, same: bool) -> Axis:
        """As written; as formulas where the same words mean two things."""
        texts = [_text(t, key) for t in terms]
        if not same and texts[0] == texts[1]:
            route = [f"{t.route} " if key == "feedback" else "" for t in terms]
            texts = [r + self._printed(i, n) for i, (r, n) in enumerate(zip(route, nodes))]
        return Axis(key, texts[0], texts[1], not same)

    def _routing(self, terms: tuple, leaves: tuple, sets: tuple) -> list[Axis]:
        """Part by part where both reroute to candidates."""
        hows = [t.routing for t in terms]
        if {h.kind for h in hows} == {"counterfactual"}:
            out = []
            parts = ("trigger", "candidates", "raw_target", "strength")
            words = ("when", "among", "toward", "strength")
            for part, word in zip(parts, words):
                nodes = [getattr(h, part) for h in hows]
                same = self.alike(*nodes, leaves, sets)
                if part == "candidates":
                    same = same and self.alike(*(h.domain for h in hows), sets=sets)
                texts = [_argument(_text(t, "routing"), word) for t in terms]
                out.append(Axis(f"routing, {word}", texts[0], texts[1], not same))
            others = [h.otherwise for h in hows]
            out.append(Axis("routing, otherwise", *others, others[0] != others[1]))
            if any(x.changed for x in out):
                return [x for x in out if x.changed]
            return [Axis("routing", "counterfactual", "counterfactual", False)]
        texts = [_text(t, "routing") for t in terms]
        texts = ["suppress" if x == NONE else x for x in texts]
        same = self.alike(*(t.loss for t in terms), leaves, sets)
        return [Axis("routing", texts[0], texts[1], not same)]

    def _printed(self, i: int, n: Node | None) -> str:
        if n is None or n.is_const(1):
            return NONE
        return unicode(self.names[i].meaning(n))

    def _by_knobs(self, text: str) -> bool:
        """Whether words that differ in meaning do so by the value of a knob in them."""
        return bool(set(re.findall(r"\w+", text)) & self.knob_changes)

    # -- the rest --------------------------------------------------------------------------------------
    def aggregate(self) -> Axis:
        words = {
            "sum": "sum(over = tokens)",
            "tokens": "mean(over = tokens)",
            "kept_tokens": "mean(over = kept_tokens)",
            "sequences": "mean(over = sequences)",
            "response_length": "mean(over = response_length)",
        }
        x, y = (words[s.aggregate] for s in self.specs)
        return Axis("aggregate", x, y, x != y)

    def regularizers(self) -> list[Axis]:
        """Those that only one side has; one row for all that both have."""
        left, right = ([t for t in s.terms if t.kind == "regularizer"] for s in self.specs)
        common, rest = [], list(right)
        only = []
        for t in left:
            twin = next((u for u in rest if t.rows == u.rows and self.alike(t.loss, u.loss)), None)
            if twin is None:
                only.append(t)
            else:
                rest.remove(twin)
                common.append(_text(t, "feedback"))
        out = []
        if common:
            out.append(Axis("regularize", "; ".join(common), "; ".join(common), False))
        for i in range(max(len(only), len(rest))):
            texts = [_text(ts[i], "feedback") if i < len(ts) else NONE for ts in (only, rest)]
            out.append(Axis("regularize", texts[0], texts[1], True))
        return out

    def critics(self) -> Axis:
        found = [[(c.init, c.lr, c.warmup) for c in s.critics] for s in self.specs]
        texts = ["; ".join(f"critic(init = {i}, lr = {r:g}, warmup = {w} steps)" for i, r, w in f)
                 for f in found]  # fmt: skip
        return Axis("critic", texts[0] or NONE, texts[1] or NONE, found[0] != found[1])

    def _changed_knobs(self) -> list[tuple[ParamValue | None, ParamValue | None]]:
        """Knobs whose values differ; a knob under another name with an equal value is no change."""
        left, right = list(self.specs[0].params), list(self.specs[1].params)
        out: list[tuple[ParamValue | None, ParamValue | None]] = []
        for p in list(left):
            twin = next((q for q in right if _short(q) == _short(p)), None)
            if twin is not None:
                left.remove(p)
                right.remove(twin)
                if _value(p) != _value(twin):
                    out.append((p, twin))
        for p in list(left):
            twin = next((q for q in right if _value(q) == _value(p)), None)
            if twin is not None:
                left.remove(p)
                right.remove(twin)
        return [*out, *((p, None) for p in left), *((None, q) for q in right)]

    def knobs(self) -> Axis:
        changed = self._changed_knobs()
        if not changed:
            texts = [", ".join(f"{_short(p)} = {_value(p)}" for p in s.params) for s in self.specs]
            return Axis("knobs", texts[0] or NONE, texts[1] or NONE, False)
        cells = [
            ", ".join(f"{_short(p)} = {_value(p)}" for p in side if p is not None) or NONE
            for side in zip(*changed)
        ]
        return Axis("knobs", cells[0], cells[1], True)

    def optimize(self) -> Axis:
        x, y = (dict(s.optimize) for s in self.specs)
        if x == y:
            text = _settings(x)
            return Axis("optimize", text, text, False)
        keys = [k for k in {**x, **y} if x.get(k) != y.get(k)]
        cells = [_settings({k: v[k] for k in keys if k in v}) for v in (x, y)]
        return Axis("optimize", cells[0], cells[1], True)


def _letters(spec: Spec, t: Term) -> dict[int, str]:
    """The advantage, and what its negative folds to."""
    if t.advantage is None:
        return {}
    return {spec.builder.neg(t.advantage).id: "-A", t.advantage.id: "A"}


def _matched(a: Spec, b: Spec, pair: Pair) -> list[tuple[Term | None, Term | None]]:
    """Terms that correspond: by name, by an equal loss, by route, in order."""
    left, right = list(a.feedback_terms), list(b.feedback_terms)
    if len(left) == len(right) == 1:
        return [(left[0], right[0])]
    found: dict[int, Term] = {}
    tests: list[Callable[[Term, Term], bool]] = [
        lambda x, y: x.name == y.name,
        lambda x, y: pair.alike(x.loss, y.loss),
        lambda x, y: x.route == y.route,
    ]
    for test in tests:
        for x in left:
            if id(x) not in found:
                twin = next((y for y in right if test(x, y)), None)
                if twin is not None:
                    found[id(x)] = twin
                    right.remove(twin)
    return [*((x, found.get(id(x))) for x in left), *((None, y) for y in right)]


# ---- words -------------------------------------------------------------------------------------------


def _text(t: Term, key: str) -> str:
    """A section as written, on one line, without comments."""
    text = t.written.get(key, "")
    lines = (line.split("#")[0] for line in text.splitlines())
    out = re.sub(r"\s+", " ", " ".join(lines)).strip()
    out = re.sub(r"([(\[{]) ", r"\1", out)
    if key == "feedback" and out and t.kind == "feedback":
        out = f"{t.route} {out}"
    return out or NONE


def _argument(text: str, word: str) -> str:
    """`word = …` of a call, as written."""
    found = re.search(rf"\b{word}\s*=\s*", text)
    if found is None:
        return text
    depth, start = 0, found.end()
    for i, c in enumerate(text[start:], start):
        depth += (c in "([{") - (c in ")]}")
        if depth < 0 or (depth == 0 and c == ","):
            return text[start:i].strip()
    return text[start:].strip()


def _mixture(found: tuple[StateSource, ...]) -> str:
    if len(found) == 1:
        return _state(found[0])
    return "mix(" + ", ".join(f"{_share(s)}: {_state(s)}" for s in found) + ")"


def _share(s: StateSource) -> str:
    x = s.share
    return f"{number(x.start)} -> {number(x.stop)}" if isinstance(x, Schedule) else f"{x:g}"


def _state(s: StateSource) -> str:
    who = f"old({s.lag})" if s.policy == "old" else s.policy
    if s.kind == "sequences":
        return f"sequences({who})"
    bits = [who]
    for key, value, plain in (
        ("temperature", s.temperature, None),
        ("top_p", s.top_p, 1.0),
        ("top_k", s.top_k, None),
        ("group", s.group, 1),
        ("max_tokens", s.max_tokens, None),
        ("prefix", s.prefix, None),
    ):
        if value is not None and value != plain:
            bits.append(f"{key} = {value:g}")
    return f"rollouts({', '.join(bits)})"


def _teacher(t: TeacherDecl) -> str:
    access = f"top({t.k})" if t.access == "top" else t.access
    context = "" if t.context is None else f'context = "{t.context}"'
    match t.kind:
        case "self":
            what = f'self(context = "{t.context or ""}", access = {access})'
        case "ema":
            steps = [f"every = {t.every} steps"] if t.every > 1 else []
            parts = ["student", f"decay = {t.decay:g}", *steps, *([context] if context else [])]
            what = f"ema({', '.join(parts)})"
        case "initial":
            what = f"initial({context})" if context else "initial"
        case _:
            what = f"external(access = {access}{', ' + context if context else ''})"
    when = f' when prompt.{t.when[0]} == "{t.when[1]}"' if t.when else ""
    return f"{t.name} = {what}{when}"


def _short(p: ParamValue) -> str:
    return p.name.split(".")[-1]


def _value(p: ParamValue) -> str:
    if isinstance(p.value, Schedule):
        over = "the run" if p.value.over is None else f"{p.value.over:g} steps"
        return f"{number(p.value.start)} -> {number(p.value.stop)} over {over}"
    return f"{p.value:g}" + (f" {p.unit}" if p.unit == "nats" else "")


def _settings(x: Mapping[str, object]) -> str:
    def one(v: object) -> str:
        if isinstance(v, tuple) and len(v) == 2 and isinstance(v[1], dict):
            return f"{v[0]}({', '.join(f'{k} = {w}' for k, w in v[1].items())})"
        return f"{v:g}" if isinstance(v, float) else str(v)

    return ", ".join(f"{k} = {one(v)}" for k, v in x.items()) or NONE
