"""`Method`: what Python code gets from opdsl. See language.md §6 for the contract."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdsl.compilation import Compilation
from opdsl.diagnostics import CompileError
from opdsl.source import Source

if TYPE_CHECKING:
    from opdsl.emit.batch import Batch
    from opdsl.emit.runtime import LossModule
    from opdsl.ir.interpret import Oracle
    from opdsl.ir.needs import Needs
    from opdsl.ir.program import Program
    from opdsl.meaning.spec import Spec


class Method:
    """A compiled method.

    `loss` is a torch module, `reference` the float64 oracle it must equal, `explain` the report.
    Constructing one raises CompileError when the spec has errors.
    """

    def __init__(self, compilation: Compilation):
        self.compilation = compilation
        self.spec: Spec
        self.program: Program
        self.spec, self.program = compilation.require()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def title(self) -> str:
        return self.spec.title or ""

    @cached_property
    def needs(self) -> Needs:
        from opdsl.ir.needs import needs

        return needs(self.program)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        from opdsl.ir.fingerprint import fingerprints

        return fingerprints(self.program)

    @property
    def gae(self) -> tuple[float, float] | None:
        """(γ, λ) of the critic's targets, for methods that read a critic."""
        from opdsl.passport.returns import critic_targets

        return critic_targets(self.spec)

    @cached_property
    def passport(self) -> dict[str, Any]:
        from opdsl.passport.report import passport

        return passport(self.compilation)

    def explain(self, format: str = "text") -> str:
        """The derived formula, gradient, needs and passport; text, json, latex or markdown."""
        from opdsl.formula.explain import explain

        return explain(self.compilation, format)

    def source(self) -> str:
        """The emitted module: one readable file that needs torch alone."""
        from opdsl.emit.standalone import standalone

        return standalone(self.compilation)

    @cached_property
    def loss(self) -> LossModule:
        from opdsl.emit.runtime import LossModule

        return LossModule(self.program, self.compilation.emitted)

    def reference(self, batch: Batch) -> Oracle:
        """Value and logit gradient in float64, by an interpreter that shares no emitted code."""
        from opdsl.ir.interpret import reference

        return reference(self.program, batch)

    def _repr_latex_(self) -> str:
        from opdsl.formula.paper import display_math

        return display_math(self.compilation)

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(self.explain())}</pre>"

    def __repr__(self) -> str:
        return f"<opdsl method {self.name}: {self.title}>"


def find_spec(name_or_path: str | Path) -> Path:
    """A file, or a shipped spec by its name. Raises CompileError (OPD711) with a close name."""
    from opdsl.resources import is_file, is_folder, methods

    path = Path(name_or_path)
    if is_file(path):
        return path
    text = str(name_or_path)
    shipped = {p.stem: p for p in methods(failures=True)}
    if text in shipped:
        return shipped[text]
    from opdsl.codes import make
    from opdsl.meaning.names import closest
    from opdsl.source import NOWHERE

    looks_like_path = text.endswith(".opd") or "/" in text
    if os.path.lexists(path) or (looks_like_path and is_folder(path.parent)):
        from opdsl.syntax import read_source

        read_source(path)  # reports the file that cannot be read
    near = closest(path.stem if looks_like_path else text, shipped)
    raise CompileError(
        [
            make(
                "OPD711",
                NOWHERE,
                f"there is no file and no shipped spec named {text}",
                f"did you mean `{near}`?" if near else "",
                helps=["`opdsl list` shows the shipped specs", "a path ends in .opd"],
            )
        ]
    )


def load(
    name_or_path: str | Path,
    set: Mapping[str, object] | None = None,
    method: str | None = None,
) -> Method:
    """Compile a spec file, or a shipped spec by name (`opdsl.load("cr_opd")`).

    set: knob values, checked against their declared types and ranges. Raises CompileError.
    """
    from opdsl.syntax import read_source

    return Method(Compilation(read_source(find_spec(name_or_path)), method, set))


def compile(
    text_or_path: str | Path, set: Mapping[str, object] | None = None, method: str | None = None
) -> Method:
    """Compile the text of a spec (anything with a line break) or a file. Raises CompileError."""
    text = str(text_or_path)
    if "\n" in text:
        return Method(Compilation(Source("<text>", text), method, set))
    return load(text_or_path, set, method)
