"""From a flattened method to its typed specification: which sections, in which environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches

from opdsl.codes import BY_SLUG, CODES, make
from opdsl.diagnostics import Label, Report
from opdsl.meaning import sources
from opdsl.meaning import values as vl
from opdsl.meaning.arguments import in_domain
from opdsl.meaning.builtins import named, word
from opdsl.meaning.flatten import Flat, Flattener, Scoped
from opdsl.meaning.graph import static_value
from opdsl.meaning.infer import Context, Elaborator, Env, Stop, Thunk
from opdsl.meaning.names import Scope, closest
from opdsl.meaning.node import Builder, compatible_units
from opdsl.meaning.quantity import Axis, Info, Quantity
from opdsl.meaning.spec import (
    ACCESS_ORDER,
    Acceptance,
    CriticDecl,
    ParamValue,
    Routed,
    RunBlock,
    Spec,
    StateSource,
    TeacherDecl,
    Term,
)
from opdsl.meaning.terms import Parts, build_term, regularizer
from opdsl.source import Span
from opdsl.syntax import tree
from opdsl.wrapping import shortened

AGGREGATES = {
    ("sum", "tokens"): "sum",
    ("mean", "tokens"): "tokens",
    ("mean", "kept_tokens"): "kept_tokens",
    ("mean", "sequences"): "sequences",
    ("mean", "response_length"): "response_length",
}

SetValues = dict[str, object]


@dataclass(eq=False)
class Frame:
    """What elaborating one method (or a method used as a term) has produced so far."""

    flat: Flat
    env: Env
    prefix: str = ""
    params: list[ParamValue] = field(default_factory=list)
    teachers: list[TeacherDecl] = field(default_factory=list)
    routed: list[Routed] = field(default_factory=list)
    critics: list[CriticDecl] = field(default_factory=list)


class Elaboration:
    """Elaborates one method of a file; `spec` is None when an error stands in its way."""

    def __init__(self, report: Report, std: Scope, settings: SetValues | None = None):
        self.report = report
        self.settings = dict(settings or {})
        self.used_settings: set[str] = set()
        self.uses = 0  # of methods as terms, those inside others included
        self.builder = Builder()
        self.el = Elaborator(self.builder, report, std)
        self.flattener = Flattener(report)

    # -- the whole method --------------------------------------------------------------------
    def method(self, decl: tree.Method, scope: Scope, runs: dict[str, tree.Run]) -> Spec | None:
        before = len(self.report.items)
        flat = self.flattener.flatten(decl, scope)
        frame = Frame(flat, Env(scope))
        self.el.acceptances = self._acceptances(flat)
        self._names(frame)
        self._settings_known(frame)
        states = self._states(frame)
        self.el.policies = tuple(dict.fromkeys(s.policy for s in states))
        terms = self._terms(frame, states)
        terms += self._regularizers(frame)
        aggregate = self._aggregate(frame)
        self._asserts(frame)
        optimize = self._optimize(frame)
        run_blocks = self._runs(runs, decl, frame)
        acceptances = self._acceptances(flat)
        if not flat.sections.get("feedback") and not flat.terms:
            self._missing(flat, "feedback", "feedback loss KL(student || T)")
        found = self.report.items[before:]
        if any(d.severity == "error" and d.overridden is None for d in found):
            return None
        return Spec(
            name=decl.name.name,
            title=flat.title and shortened(flat.title, 200),
            evidence=flat.evidence,
            cites=tuple(flat.cites),
            acceptances=acceptances,
            states=states,
            teachers=tuple(frame.teachers),
            routed=tuple(frame.routed),
            params=tuple(frame.params),
            critics=tuple(frame.critics),
            terms=tuple(terms),
            aggregate=aggregate or "tokens",
            optimize=optimize,
            runs=run_blocks,
            builder=self.builder,
            span=decl.name.span,
            extends=flat.bases,
        )

    def _missing(self, flat: Flat, what: str, example: str) -> None:
        decl = flat.decl
        if flat.orphan:
            return
        self.report.add(
            make(
                "OPD303",
                decl.name.span,
                f"the method `{decl.name.name}` has no `{what}`",
                f"`{what}` is missing",
                notes=["there is no default: papers disagree on it"],
                helps=[example],
            )
        )

    # -- names ---------------------------------------------------------------------------------
    def _names(self, frame: Frame) -> None:
        """Knobs, teachers and lets, in that order."""
        for name, entry in frame.flat.params.items():
            frame.env.names[name] = self._param(frame, name, entry)
        for name, entry in frame.flat.teachers.items():
            if name in frame.env.names:
                continue  # bound from outside, by a method that uses this one as a term
            frame.env.names[name] = self._teacher(frame, entry)
        for name, entry in frame.flat.lets.items():
            if name not in frame.env.names:
                frame.env.names[name] = self._let(frame, name, entry)

    def _param(self, frame: Frame, name: str, entry: Scoped) -> vl.Value:
        stmt = entry.stmt
        assert isinstance(stmt, tree.Param)
        if name in frame.env.names:  # given by the method that uses this one as a term
            value = frame.env.names[name]
            span = stmt.default.span
        else:
            arg = frame.flat.param_args.get(name)
            expr, env = (arg[0].value, Env(arg[1])) if arg else (stmt.default, frame.env)
            span = expr.span
            try:
                value = self.el.ev(expr, env)
            except Stop:
                return vl.Bad()
        unit = stmt.type.unit if stmt.type else "real"
        key = frame.prefix + name
        try:
            if key in self.settings:
                value = self._set(key, stmt, unit)
            if isinstance(value, vl.Bad):
                return value
            if not isinstance(value, vl.Num):
                self.el._not_a(stmt.default, value, "a number")
            return self._knob(frame, key, stmt, value, unit, span)  # type: ignore[arg-type]
        except Stop:
            return vl.Bad()

    def _knob(
        self, frame: Frame, key: str, stmt: tree.Param, value: vl.Num, unit: str, span: Span
    ) -> vl.Value:
        node = value.node
        if not compatible_units(node.q.unit, unit):
            self.el.fail(
                "OPD204",
                span,
                f"`{stmt.name.name}` is in {unit}, its value is in {node.q.unit}",
                node.q.describe(),
            )
        if stmt.domain is not None:
            in_domain(self.el, value, stmt.domain, span, f"`{stmt.name.name}`")
        domain = stmt.domain.span.text.strip() if stmt.domain else ""
        if node.op == "schedule":
            frame.params.append(ParamValue(key, sources.schedule_of(node), unit, domain, stmt.span))
            return value
        number = static_value(node)
        if number is None:
            self.el.fail(
                "OPD122",
                span,
                f"the value of `{stmt.name.name}` must be a fixed number or a schedule",
                node.q.describe(),
            )
        assert number is not None
        if unit == "int" and not float(number).is_integer():
            self.el.fail(
                "OPD112",
                span,
                f"`{stmt.name.name}` is a whole number, this is {number:g}",
                "not whole",
            )
        frame.params.append(ParamValue(key, number, unit, domain, stmt.span))
        if unit == "bool":
            return vl.Num(self.builder.flag(bool(number)))
        return vl.Num(self.builder.param(key, number, unit))

    def _set(self, key: str, stmt: tree.Param, unit: str) -> vl.Num:
        """A value from `--set`; its text is parsed as one number with an optional unit."""
        self.used_settings.add(key)
        raw = self.settings[key]
        number = parse_number(raw)
        if number is None:
            self.report.add(
                make(
                    "OPD112",
                    stmt.name.span,
                    f"--set {key}={raw}: not a number",
                    f"`{key}` is {unit}"
                    + (f" in {stmt.domain.span.text.strip()}" if stmt.domain else ""),
                    helps=[f"--set {key}=0.5"],
                )
            )
            raise Stop
        node = self.builder.const(number, unit if unit == "nats" else "real")
        if stmt.domain is not None:
            try:
                in_domain(self.el, vl.Num(node), stmt.domain, stmt.domain.span, f"--set `{key}`")
            except Stop:
                raise
        return vl.Num(node)

    def _settings_known(self, frame: Frame) -> None:
        for key in self.settings:
            if key in self.used_settings:
                continue
            if key.startswith(("optimize.", "run.")):
                continue
            if "." in key and key.split(".")[0] in frame.flat.terms:
                continue  # knobs of terms are checked when the term is elaborated
            known = [p.name for p in frame.params]
            near = closest(key, known)
            have = ", ".join(known) or "none"
            self.report.add(
                make(
                    "OPD111",
                    frame.flat.decl.name.span,
                    f"--set {key}: `{frame.flat.decl.name.name}` has no such knob",
                    f"did you mean `{near}`?" if near else "unknown knob",
                    notes=[f"its knobs: {have}"],
                )
            )

    def _teacher(self, frame: Frame, entry: Scoped) -> vl.Value:
        stmt = entry.stmt
        assert isinstance(stmt, tree.Teacher)
        try:
            decl = sources.teacher(self.el, stmt, frame.env)
        except Stop:
            return vl.Bad()
        frame.teachers.append(decl)
        self.el.access[decl.name] = decl.access
        plain = decl.kind == "initial" and decl.context is None
        return vl.LeafDist("initial" if plain else decl.name)

    def _let(self, frame: Frame, name: str, entry: Scoped) -> vl.Value:
        stmt = entry.stmt
        assert isinstance(stmt, tree.Let)
        env = Env(entry.scope, {}, frame.env)
        func = stmt.value.func if isinstance(stmt.value, tree.Call) else None
        special = func.name if isinstance(func, tree.Name) else ""
        if special not in ("critic", "routed"):
            return Thunk(stmt.value, env, stmt.type)
        try:
            value = self.el.ev(stmt.value, env)
        except Stop:
            return vl.Bad()
        if isinstance(value, vl.Critic):
            key = frame.prefix + name
            frame.critics.append(CriticDecl(key, value.init, value.lr, value.warmup))
            q = Quantity(Axis.TOK, "nats", info=Info.STATE)
            return vl.Num(self.builder.input("values", q, critic=key))
        if isinstance(value, vl.RoutedTeachers):
            by_name = {d.name: d for d in frame.teachers}
            sources.gap(self.el, frame.teachers, value.parts, stmt.value.span)
            conditions = tuple(by_name[p].when if p in by_name else None for p in value.parts)
            frame.routed.append(Routed(name, value.parts, conditions))
            levels = [self.el.access.get(p, "logits") for p in value.parts]
            self.el.access[name] = min(levels, key=ACCESS_ORDER.index)
            return vl.LeafDist(name)
        return value

    # -- sections ------------------------------------------------------------------------------
    def _states(self, frame: Frame) -> tuple[StateSource, ...]:
        entry = frame.flat.sections.get("state")
        if entry is None:
            self._missing(frame.flat, "state", sources.STATE_EXAMPLE)
            return ()
        section = entry.stmt
        assert isinstance(section, tree.Section)
        names = tuple(t.name for t in frame.teachers)
        try:
            found = sources.states(self.el, section.value, frame.env, names)
        except Stop:
            return ()
        self.el.ctx = Context(group=max(s.group for s in found))
        return found

    def _aggregate(self, frame: Frame) -> str | None:
        entry = frame.flat.sections.get("aggregate")
        if entry is None:
            self._missing(frame.flat, "aggregate", "aggregate mean(over = tokens)")
            return None
        section = entry.stmt
        assert isinstance(section, tree.Section)
        e = section.value
        try:
            if not (isinstance(e, tree.Call) and isinstance(e.func, tree.Name)):
                self.el.fail(
                    "OPD121",
                    e.span,
                    "this is not an aggregation",
                    "expected sum or mean",
                    helps=["aggregate mean(over = tokens)"],
                )
            assert isinstance(e, tree.Call)
            how = word(self.el, e.func, ("sum", "mean"), "an aggregation")
            args = named(self.el, e, ("over",), ("over",))
            if "over" not in args:
                self.el.fail("OPD105", e.span, "an aggregation says over what", "`over` is missing",
                             helps=["aggregate mean(over = tokens)"])  # fmt: skip
            overs = tuple(o for h, o in AGGREGATES if h == how)
            over = word(self.el, args["over"], overs, f"something to take the {how} over")
            return AGGREGATES[how, over]
        except Stop:
            return None

    def _terms(self, frame: Frame, states: tuple[StateSource, ...]) -> list[Term]:
        """All feedback terms of a method, its own and those of the methods it uses."""
        flat = frame.flat
        out: list[Term] = []
        names = list(flat.terms)
        self._term_names(flat, names)
        if "feedback" in flat.sections:
            parts = self._parts(frame, "main", flat.decl.name.span, {}, frame.env)
            term = self._finish(frame, parts)
            out += [term] if term else []
        for name, entry in flat.terms.items():
            if isinstance(entry.stmt, tree.TermUse):
                out += self._use(frame, name, entry, states)
                continue
            assert isinstance(entry.stmt, tree.TermBlock)
            out += self._block(frame, name, entry)
        return out

    def _block(self, frame: Frame, name: str, entry: Scoped) -> list[Term]:
        block = entry.stmt
        assert isinstance(block, tree.TermBlock)
        env = Env(entry.scope, {}, frame.env)
        own: dict[str, tree.Section] = {}
        extra: list[tree.Section] = []
        for stmt in block.body:
            if isinstance(stmt, tree.Let):
                env.names[stmt.name.name] = Thunk(stmt.value, env, stmt.type)
            elif stmt.keyword.name in ("gate", "weight"):
                extra.append(stmt)
            elif stmt.keyword.name in ("state", "aggregate", "regularize"):
                self.report.add(
                    make(
                        "OPD305",
                        stmt.keyword.span,
                        f"a term has no `{stmt.keyword.name}` of its own",
                        "the method owns it",
                        helps=["write it in the method, outside the term"],
                    )
                )
            elif stmt.keyword.name in own:
                self.report.add(
                    make(
                        "OPD304",
                        stmt.keyword.span,
                        f"`{stmt.keyword.name}` is written twice in this term",
                        "second time",
                        secondary=[Label(own[stmt.keyword.name].keyword.span, "first time")],
                        helps=["keep one of the two"],
                    )
                )
            else:
                own[stmt.keyword.name] = stmt
        if "feedback" not in own:
            self.report.add(
                make(
                    "OPD303",
                    block.name.span,
                    f"the term `{name}` has no `feedback`",
                    "nothing to learn from",
                    helps=["feedback loss KL(student || T)"],
                )
            )
            return []
        parts = self._parts(frame, name, block.name.span, own, env)
        for section in extra:
            (parts.gates if section.keyword.name == "gate" else parts.weights).append(
                (section, env)
            )
        term = self._finish(frame, parts)
        return [term] if term else []

    def _parts(
        self, frame: Frame, name: str, span: Span, own: dict[str, tree.Section], env: Env
    ) -> Parts:
        """Sections of a term: its own, else the method's where they apply."""
        flat = frame.flat
        parts = Parts(frame.prefix + name, span)
        for key, section in own.items():
            parts.sections[key] = (section, env)
        reward = (own.get("feedback") or _section(flat, "feedback")).route == "reward"  # type: ignore[union-attr]
        shared = ["support", *(("credit", "routing", "shape") if reward or not own else ())]
        for key in ["feedback", *shared]:
            entry = flat.sections.get(key)
            if entry is not None and key not in parts.sections and (key != "feedback" or not own):
                parts.sections[key] = (entry.stmt, Env(entry.scope, {}, frame.env))  # type: ignore[assignment]
        for entries, target in ((flat.gates, parts.gates), (flat.weights, parts.weights)):
            for entry in entries:
                section = entry.stmt
                assert isinstance(section, tree.Section)
                if section.term is None or section.term.name == name:
                    target.append((section, Env(entry.scope, {}, frame.env)))
        return parts

    def _finish(self, frame: Frame, parts: Parts) -> Term | None:
        return build_term(self.el, parts)

    def _term_names(self, flat: Flat, names: list[str]) -> None:
        known = [*names, *(["main"] if "feedback" in flat.sections else [])]
        for entry in [*flat.gates, *flat.weights]:
            section = entry.stmt
            assert isinstance(section, tree.Section)
            if section.term is not None and section.term.name not in known:
                near = closest(section.term.name, known)
                have = ", ".join(names) or "none"
                self.report.add(
                    make(
                        "OPD120",
                        section.term.span,
                        f"this method has no term named `{section.term.name}`",
                        f"did you mean `{near}`?" if near else "unknown term",
                        notes=[f"its terms: {have}"],
                        helps=["without a name a gate applies to every term"],
                    )
                )

    def _use(
        self, frame: Frame, name: str, entry: Scoped, states: tuple[StateSource, ...]
    ) -> list[Term]:
        """`term name = other(T = T, k = 16)`: another method's terms on this method's states."""
        from opdsl.meaning.uses import use_method

        return use_method(self, frame, name, entry, states)

    def _regularizers(self, frame: Frame) -> list[Term]:
        out = []
        support = frame.flat.sections.get("support")
        own = None
        if support is not None and isinstance(support.stmt, tree.Section):
            own = (support.stmt, Env(support.scope, {}, frame.env))
        for i, entry in enumerate(frame.flat.regularizers):
            term = regularizer(self.el, entry, Env(entry.scope, {}, frame.env), i, own)
            if term is not None:
                out.append(term)
        return out

    def _asserts(self, frame: Frame) -> None:
        for entry in frame.flat.asserts:
            section = entry.stmt
            assert isinstance(section, tree.Section)
            try:
                holds = self.el.static(section.value, frame.env, "an assertion")
            except Stop:
                continue
            if not holds:
                self.report.add(
                    make(
                        "OPD110",
                        section.span,
                        section.message or "this assertion does not hold",
                        "false",
                    )
                )

    def _optimize(self, frame: Frame) -> dict[str, object]:
        if frame.flat.optimize is None:
            return {}
        block = frame.flat.optimize.stmt
        assert isinstance(block, tree.Optimize)
        out, _ = sources.settings(self.el, block.settings, frame.env, tuple(sources.OPTIMIZE))
        return out

    def _runs(
        self, runs: dict[str, tree.Run], decl: tree.Method, frame: Frame
    ) -> dict[str, RunBlock]:
        out = {}
        for name, run in runs.items():
            if run.method.name != decl.name.name:
                continue
            values, sweeps = sources.settings(self.el, run.settings, Env(frame.env.scope), None)
            out[name] = RunBlock(name, run.method.name, values, sweeps)
        return out

    def _acceptances(self, flat: Flat) -> tuple[Acceptance, ...]:
        rules = {c.rule for c in CODES.values() if c.rule}
        out = []
        for entry in flat.accepts:
            stmt = entry.stmt
            assert isinstance(stmt, tree.Accept)
            name = stmt.rule.name
            known = (
                set(BY_SLUG) | set(CODES)
                if stmt.keyword == "accept"
                else rules | set(BY_SLUG) | set(CODES)
            )
            if name not in known and not (stmt.keyword == "allow" and _is_rule(name)):
                near = closest(name, known) or next(
                    iter(get_close_matches(name, sorted(known), 1, 0.4)), None
                )
                self.report.add(
                    make(
                        "OPD117",
                        stmt.rule.span,
                        f"`{name}` names no warning of opdsl"
                        if stmt.keyword == "accept"
                        else f"`{name}` names no rule",
                        f"did you mean `{near}`?" if near else "unknown",
                        helps=[
                            "the name is printed with the warning: warning[OPD501] immediate_credit"
                        ],
                    )
                )
                continue
            out.append(Acceptance(stmt.keyword, name, stmt.reason, entry.inherited, stmt.span))
        return tuple(out)


def _is_rule(name: str) -> bool:
    return len(name) == 3 and name[0] == "R" and name[1:].isdigit() and 1 <= int(name[1:]) <= 66


def _section(flat: Flat, key: str) -> tree.Section | None:
    entry = flat.sections.get(key)
    return entry.stmt if entry is not None else None  # type: ignore[return-value]


def parse_number(raw: object) -> float | None:
    """A number given outside a spec: 64, 0.5, "5 nats", "5%". None if it is not one."""
    import math

    if isinstance(raw, bool):
        return float(raw)
    if isinstance(raw, int | float):
        return float(raw) if math.isfinite(raw) else None
    text = str(raw).strip()
    scale = 1.0
    for unit, factor in (
        ("nats", 1.0),
        ("bits", 0.6931471805599453),
        ("%", 0.01),
        ("steps", 1.0),
        ("tokens", 1.0),
    ):
        if text.endswith(unit):
            text, scale = text[: -len(unit)].strip(), factor
            break
    if text in ("true", "false"):
        return 1.0 if text == "true" else 0.0
    try:
        value = float(text) * scale
    except ValueError:
        return None
    return value if math.isfinite(value) else None
