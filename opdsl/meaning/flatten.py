"""`extends` and `override`: one flat method, each statement with the file it was written in."""

from __future__ import annotations

from dataclasses import dataclass, field

from opdsl.codes import make
from opdsl.diagnostics import Fix, Label, Report
from opdsl.meaning.names import RESERVED, Scope, closest
from opdsl.records import record
from opdsl.source import Span
from opdsl.syntax import tree

SINGLE = ("state", "support", "feedback", "credit", "routing", "shape", "aggregate")

# which sections a bias boundary is about: overriding one drops the inherited acceptance
ABOUT: dict[str, tuple[str, ...]] = {
    "immediate_credit": ("credit",),
    "discounted_target": ("credit",),
    "truncated_return": ("credit",),
    "value_drift": ("credit",),
    "baseline_includes_self": ("credit",),
    "unbounded_return": ("credit",),
    "occupancy_only": ("credit", "feedback"),
    "not_a_divergence": ("support", "feedback"),
    "renormalized_support": ("support", "feedback"),
    "sampler_mismatch": ("state",),
    "stale_rollouts": ("state",),
    "routed_target": ("routing",),
    "unbounded_strength": ("routing",),
    "unguarded_candidates": ("routing",),
    "length_coupling": ("aggregate",),
}


@record
class Scoped:
    """A statement with the file it was written in and how it got here."""

    stmt: object
    scope: Scope
    inherited: bool = False


@dataclass(eq=False)
class Flat:
    """A method after `extends` and `override`: one entry per statement that counts."""

    decl: tree.Method
    scope: Scope
    title: str | None = None
    evidence: str | None = None
    cites: list[tuple[str, str]] = field(default_factory=list)
    accepts: list[Scoped] = field(default_factory=list)
    params: dict[str, Scoped] = field(default_factory=dict)
    param_args: dict[str, tuple[tree.Arg, Scope]] = field(default_factory=dict)
    lets: dict[str, Scoped] = field(default_factory=dict)
    teachers: dict[str, Scoped] = field(default_factory=dict)
    sections: dict[str, Scoped] = field(default_factory=dict)  # single-valued ones
    gates: list[Scoped] = field(default_factory=list)
    weights: list[Scoped] = field(default_factory=list)
    regularizers: list[Scoped] = field(default_factory=list)
    asserts: list[Scoped] = field(default_factory=list)
    terms: dict[str, Scoped] = field(default_factory=dict)
    optimize: Scoped | None = None
    bases: tuple[str, ...] = ()
    orphan: bool = False  # its base could not be found: what is missing is not its fault

    def names(self) -> list[str]:
        return [*self.params, *self.lets, *self.teachers]


class Flattener:
    """Applies `extends` and `override`; reports what does not fit and goes on."""

    def __init__(self, report: Report):
        self.report = report

    def flatten(self, method: tree.Method, scope: Scope, chain: tuple[str, ...] = ()) -> Flat:
        flat = Flat(method, scope)
        base_name = method.extends.base.name if method.extends else None
        if method.extends is not None:
            base = self._base(method.extends, scope, (*chain, method.name.name))
            if base is not None:
                flat = self._inherit(base, method, scope)
            flat.orphan = base is None or base.orphan
        flat.title = method.title or flat.title
        evidence_here, cites_here = None, []
        seen: dict[str, Span] = {}
        for stmt in method.body:
            if isinstance(stmt, tree.Override):
                self._override(flat, stmt, scope, base_name)
            elif isinstance(stmt, tree.Evidence):
                evidence_here = self._evidence(stmt)
            elif isinstance(stmt, tree.Cite):
                cites_here.append((stmt.kind, stmt.value))
            elif isinstance(stmt, tree.Accept):
                flat.accepts.append(Scoped(stmt, scope))
            else:
                self._plain(flat, stmt, scope, seen, base_name)
        flat.evidence = evidence_here or flat.evidence
        flat.cites = cites_here or flat.cites
        return flat

    def _evidence(self, stmt: tree.Evidence) -> str:
        grades = ("hypothesis", "reported", "replicated")
        if stmt.grade not in grades:
            near = closest(stmt.grade, grades)
            self.report.add(
                make(
                    "OPD121",
                    stmt.span,
                    f"`{stmt.grade}` is not an evidence grade",
                    f"did you mean `{near}`?" if near else "one of the three grades",
                    helps=["evidence hypothesis | reported | replicated"],
                )
            )
        return stmt.grade

    def _base(self, ext: tree.Extends, scope: Scope, chain: tuple[str, ...]) -> Flat | None:
        found = scope.find_method(ext.base.name)
        if found is None:
            near = closest(ext.base.name, scope.methods)
            self.report.add(
                make(
                    "OPD109",
                    ext.base.span,
                    f"cannot find a method named `{ext.base.name}`",
                    "not in this file and not imported",
                    helps=[
                        f"did you mean `{near}`?"
                        if near
                        else f'import "./{ext.base.name}.opd" ({ext.base.name})'
                    ],
                )
            )
            return None
        method, base_scope = found
        if ext.base.name in chain:
            self.report.add(
                make(
                    "OPD114",
                    ext.base.span,
                    f"`{ext.base.name}` extends itself",
                    " -> ".join([*chain, ext.base.name]),
                )
            )
            return None
        return self.flatten(method, base_scope, chain)

    def _inherit(self, base: Flat, method: tree.Method, scope: Scope) -> Flat:
        def old(entry: Scoped) -> Scoped:
            return Scoped(entry.stmt, entry.scope, True)

        flat = Flat(
            method,
            scope,
            title=base.title,
            evidence=base.evidence,
            cites=list(base.cites),
            accepts=[old(a) for a in base.accepts],
            params={k: old(v) for k, v in base.params.items()},
            param_args=dict(base.param_args),
            lets={k: old(v) for k, v in base.lets.items()},
            teachers={k: old(v) for k, v in base.teachers.items()},
            sections={k: old(v) for k, v in base.sections.items()},
            gates=[old(g) for g in base.gates],
            weights=[old(w) for w in base.weights],
            regularizers=[old(r) for r in base.regularizers],
            asserts=[old(a) for a in base.asserts],
            terms={k: old(v) for k, v in base.terms.items()},
            optimize=old(base.optimize) if base.optimize else None,
            bases=(base.decl.name.name, *base.bases),
        )
        assert method.extends is not None
        for arg in method.extends.args:
            if not isinstance(arg, tree.Arg) or arg.name is None:
                self.report.add(
                    make(
                        "OPD104",
                        arg.span,
                        "give the base's knobs by name",
                        "which knob is this?",
                        helps=[f"extends {base.decl.name.name}(name = value)"],
                    )
                )
            elif arg.name not in flat.params:
                near = closest(arg.name, flat.params)
                have = ", ".join(flat.params) or "none"
                self.report.add(
                    make(
                        "OPD104",
                        arg.span,
                        f"`{base.decl.name.name}` has no knob named `{arg.name}`",
                        f"did you mean `{near}`?" if near else "unknown knob",
                        notes=[f"its knobs: {have}"],
                    )
                )
            else:
                flat.param_args[arg.name] = (arg, scope)
        return flat

    # -- statements ------------------------------------------------------------------------
    def _override(self, flat: Flat, stmt: tree.Override, scope: Scope, base: str | None) -> None:
        inner = stmt.statement
        entry = Scoped(inner, scope)
        table, key, what = self._slot(flat, inner)
        if table is None:  # several-valued: replace all inherited ones of that kind
            entries = self._list(flat, inner)
            inherited = [e for e in entries if e.inherited]
            if not inherited:
                self._nothing(flat, stmt, what, base)
                return
            entries[:] = [e for e in entries if not e.inherited]
            entries.append(entry)
        else:
            if key not in table or not table[key].inherited:
                self._nothing(flat, stmt, what, base)
                return
            table[key] = entry
            flat.param_args.pop(key, None) if isinstance(inner, tree.Param) else None
        section = inner.keyword.name if isinstance(inner, tree.Section) else ""
        flat.accepts = [
            a
            for a in flat.accepts
            if not (a.inherited and section in ABOUT.get(a.stmt.rule.name, ()))  # type: ignore[attr-defined]
        ]

    def _nothing(self, flat: Flat, stmt: tree.Override, what: str, base: str | None) -> None:
        if flat.orphan:
            return
        helps = (
            [f"`{base}` has no {what}; write it without `override`"]
            if base
            else ["only a method that `extends` another one can override; remove the word"]
        )
        self.report.add(
            make(
                "OPD108",
                stmt.span if len(stmt.span.text) < 90 else _head(stmt.span),
                f"there is no inherited {what} to override",
                "nothing to replace",
                helps=helps,
            )
        )

    def _slot(self, flat: Flat, stmt: object) -> tuple[dict | None, str, str]:
        if isinstance(stmt, tree.Param):
            return flat.params, stmt.name.name, f"param `{stmt.name.name}`"
        if isinstance(stmt, tree.Let):
            return flat.lets, stmt.name.name, f"let `{stmt.name.name}`"
        if isinstance(stmt, tree.Teacher):
            return flat.teachers, stmt.name.name, f"teacher `{stmt.name.name}`"
        if isinstance(stmt, tree.TermBlock | tree.TermUse):
            return flat.terms, stmt.name.name, f"term `{stmt.name.name}`"
        if isinstance(stmt, tree.Optimize):
            table = {"optimize": flat.optimize} if flat.optimize else {}
            return _OptimizeSlot(flat, table), "optimize", "optimize block"
        assert isinstance(stmt, tree.Section)
        kind = stmt.keyword.name
        if kind in SINGLE:
            return flat.sections, kind, f"`{kind}`"
        return None, kind, f"`{kind}`"

    def _list(self, flat: Flat, stmt: object) -> list[Scoped]:
        assert isinstance(stmt, tree.Section)
        kinds = {
            "gate": flat.gates,
            "weight": flat.weights,
            "regularize": flat.regularizers,
            "assert": flat.asserts,
        }
        return kinds[stmt.keyword.name]

    def _plain(
        self, flat: Flat, stmt: object, scope: Scope, seen: dict[str, Span], base: str | None
    ) -> None:
        if isinstance(stmt, tree.Section) and stmt.keyword.name not in SINGLE:
            self._list(flat, stmt).append(Scoped(stmt, scope))
            return
        table, key, what = self._slot(flat, stmt)
        assert table is not None
        span = _head(stmt.span)  # type: ignore[attr-defined]
        named = isinstance(
            stmt, tree.Param | tree.Let | tree.Teacher | tree.TermBlock | tree.TermUse
        )
        if named and stmt.name.name in RESERVED:  # type: ignore[union-attr]
            self.report.add(
                make(
                    "OPD102",
                    stmt.name.span,  # type: ignore[union-attr]
                    f"`{key}` is a built-in name and cannot be redefined",
                    "this name already has a meaning in every spec",
                    helps=[f"choose another name, for example `my_{key}`"],
                )
            )
            return
        if key in table:
            if table[key] is not None and table[key].inherited:
                old = table[key].stmt
                text = old.span.text.split("\n")[0]
                self.report.add(
                    make(
                        "OPD107",
                        span,
                        f"{what} is inherited from {base} and written again",
                        "say `override` if you mean to replace it",
                        secondary=[Label(flat.decl.extends.span, f"already has: {text[:60]}")]
                        if flat.decl.extends
                        else [],
                        helps=[f"--fix will write `override {key}`"],
                        fixes=[_insert(span, "override ")],
                    )
                )
            else:
                code = "OPD103" if named else "OPD304"
                first = table[key].stmt.span if table[key] is not None else span
                self.report.add(
                    make(
                        code,
                        span,
                        f"{what} is written twice",
                        "second time",
                        secondary=[Label(_head(first), "first time")],
                        helps=["keep one of the two"],
                    )
                )
            return
        if named:
            for other in (flat.params, flat.lets, flat.teachers):
                if (
                    other is not table
                    and key in other
                    and not isinstance(stmt, tree.TermBlock | tree.TermUse)
                ):
                    self.report.add(
                        make(
                            "OPD103",
                            stmt.name.span,  # type: ignore[union-attr]
                            f"`{key}` already names something else in this method",
                            "second meaning",
                            secondary=[Label(_head(other[key].stmt.span), "first meaning")],
                            helps=["rename one of them"],
                        )
                    )
                    return
        table[key] = Scoped(stmt, scope)


class _OptimizeSlot(dict):
    """Lets the single `optimize` block be handled like the named statements."""

    def __init__(self, flat: Flat, table: dict):
        super().__init__(table)
        self._flat = flat

    def __setitem__(self, key: str, value: Scoped) -> None:
        super().__setitem__(key, value)
        self._flat.optimize = value


def _head(span: Span) -> Span:
    """The first line of a span, for labels on long statements."""
    text = span.text.split("\n")[0].rstrip()
    return Span(span.source, span.start, span.start + max(len(text), 1))


def _insert(span: Span, text: str) -> Fix:
    from opdsl.diagnostics import Edit, Safety

    at = Span(span.source, span.start, span.start)
    return Fix(f"write `{text.strip()}`", (Edit(at, text),), Safety.SAFE)
