"""The driver: one object per method, one cached property per phase.

text -> tree -> flat method -> typed spec -> program -> {emitted passes, oracle, formula, passport}.
Every caller (command line, Python, editor) goes through it; phases import what they need lazily,
so that `check` never loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from opdsl.diagnostics import CompileError, Diagnostic, Report, Severity
from opdsl.source import Source

if TYPE_CHECKING:
    from opdsl.ir.program import Program
    from opdsl.meaning.names import Loader, Scope
    from opdsl.meaning.spec import Spec
    from opdsl.syntax import tree


class Compilation:
    """One method of one source. `method` picks by name; the default is the last in the file."""

    def __init__(
        self,
        source: Source,
        method: str | None = None,
        settings: Mapping[str, object] | None = None,
    ):
        self.source, self.wanted, self.settings = source, method, dict(settings or {})
        self.report = Report()

    # -- text to tree ----------------------------------------------------------------------
    @cached_property
    def _loaded(self) -> tuple[Loader, Scope, tree.File | None]:
        from opdsl.meaning.names import Loader
        from opdsl.resources import specs
        from opdsl.syntax import parse, read_source

        loader = Loader(parse, read_source, specs(), self.report)
        scope, file = loader.load_main(self.source)
        return loader, scope, file

    @property
    def tree(self) -> tree.File | None:
        return self._loaded[2]

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods the file defines itself, or that its run blocks bind."""
        _, scope, _ = self._loaded
        own = [n for n, (_, s) in scope.methods.items() if s is scope]
        bound = [r.method.name for r in scope.runs.values() if r.method.name in scope.methods]
        return tuple(own or dict.fromkeys(bound))

    def of(self, method: str) -> Compilation:
        """Another method of the same file, which is not read again."""
        other = Compilation(self.source, method, self.settings)
        other.__dict__["_loaded"] = self._loaded
        return other

    # -- tree to spec ----------------------------------------------------------------------
    @cached_property
    def spec(self) -> Spec | None:
        """None when an error stands in the way (see `diagnostics`)."""
        from opdsl.meaning.access import check_access
        from opdsl.meaning.limits import bounded, too_many
        from opdsl.meaning.structure import Elaboration

        loader, scope, file = self._loaded
        if file is None or not self.methods:
            self._no_method(file)
            return None
        if too_many(self.methods, scope, self.report):
            return None
        name = self.wanted or self.methods[-1]
        if name not in self.methods:
            from opdsl.codes import make
            from opdsl.meaning.names import closest

            near = closest(name, self.methods)
            self.report.add(
                make(
                    "OPD109",
                    file.span,
                    f"{self.source.name} defines no method named `{name}`",
                    f"did you mean `{near}`?" if near else "unknown method",
                    notes=[f"it defines: {', '.join(self.methods)}"],
                )
            )
            return None
        decl, where = scope.methods[name]
        elaboration = Elaboration(self.report, loader.std(), self.settings)
        spec = bounded(decl, self.report, lambda: elaboration.method(decl, where, scope.runs))
        if spec is not None:
            check_access(spec, self.report)
        return spec

    def _no_method(self, file: tree.File | None) -> None:
        if file is not None and not self.report.failed:
            from opdsl.codes import make

            defs = [i for i in file.items]
            if defs:
                return  # a library of definitions
            self.report.add(
                make(
                    "OPD303",
                    file.span,
                    "this file defines no method",
                    "nothing to compile",
                    helps=["`opdsl new my_method` writes a starting point"],
                )
            )

    @cached_property
    def program(self) -> Program | None:
        from opdsl.ir.program import lower

        return lower(self.spec) if self.spec is not None and not self.report.failed else None

    # -- checks ------------------------------------------------------------------------------
    @cached_property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """Everything there is to say, errors first in file order; overridden ones included."""
        _ = self.spec
        lost = frozenset(self._loaded[0].lost)
        if lost:
            from opdsl.meaning.followers import follows

            self.report.items[:] = [d for d in self.report.items if not follows(d, lost)]
        if self.spec is not None and not self.report.failed:
            from opdsl.passport.rules import boundaries

            boundaries(self.spec, self.report)
            self._apply_overrides()
        return tuple(sorted(self.report.items, key=_order))

    @cached_property
    def notes(self) -> tuple[Diagnostic, ...]:
        """What is worth knowing and needs no acceptance: printed by `explain`, `check --notes`."""
        if self.errors or self.spec is None:
            return ()
        from opdsl.passport.report import passport
        from opdsl.passport.rules import notes

        return notes(self.spec, str(passport(self)["fixed_point"]))

    def _apply_overrides(self) -> None:
        from opdsl.passport.acceptance import apply_acceptances

        assert self.spec is not None
        apply_acceptances(self.spec, self.report)

    @property
    def errors(self) -> tuple[Diagnostic, ...]:
        return tuple(
            d for d in self.diagnostics if d.severity is Severity.ERROR and d.overridden is None
        )

    def require(self) -> tuple[Spec, Program]:
        """Spec and program, or CompileError with every diagnostic."""
        if self.errors or self.spec is None or self.program is None:
            raise CompileError(self.errors or (self._library(),))
        return self.spec, self.program

    def _library(self) -> Diagnostic:
        """What is said of a file that only defines things, where a method is asked for."""
        from opdsl.codes import make
        from opdsl.source import Span

        names = [item.name.name for item in self.tree.items] if self.tree is not None else []
        return make(
            "OPD303",
            Span(self.source, 0, 0),
            "this file defines no method, only definitions",
            "a library",
            notes=[f"it defines: {', '.join(names)}"],
            helps=[f"`opdsl explain {names[0]}` shows a definition"] if names else [],
        )

    # -- program to code -----------------------------------------------------------------------
    @cached_property
    def emitted(self) -> Any:
        from opdsl.emit.module import emit

        return emit(self.require()[1])

    def dump_ir(self) -> str:
        from opdsl.ir.dump import dump

        return dump(self.require()[1])


def _order(d: Diagnostic) -> tuple:
    rank = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.NOTE: 2}
    span = d.primary.span
    return rank[d.severity], span.source.name, span.start, d.code
