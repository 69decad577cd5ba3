"""Every rule is falsifiable: its code is reported exactly where its effect is measured.

`tests/rules/Rnn_OPDnnn.bad.opd` crosses the boundary, `.good.opd` is its nearest neighbour that
does not. `pytest --regenerate` writes docs/rules.md from what was measured.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from support import effects_rest  # noqa: F401  registers its effects
from support.effects import EFFECTS

from opdsl.codes import CODES
from opdsl.compilation import Compilation
from opdsl.diagnostics import Severity
from opdsl.method import Method
from opdsl.passport.rules import notes
from opdsl.source import Source
from opdsl.syntax import read_source

HERE = Path(__file__).parent / "rules"
PAGE = Path(__file__).parent.parent / "docs" / "rules.md"
CASES = sorted(HERE.glob("*.bad.opd"))
RUNTIME = {"OPD403": "R28"}  # raised when models are bound: tests/test_run_cli.py
WORDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.NOTE: "note"}


def code_of(path: Path) -> str:
    return path.name.split(".")[0].split("_")[1]


def good(path: Path) -> Path:
    return path.with_name(path.name.replace(".bad.", ".good."))


def load(path: Path) -> Method:
    """The case, its errors overridden by `allow`."""
    compilation = Compilation(read_source(path, name=path.name))
    lines = "".join(f'  allow {d.code} "as a case"\n' for d in compilation.errors)
    text = path.read_text().replace("method case {\n", "method case {\n" + lines)
    return Method(Compilation(Source(path.name, text)))


def reported(path: Path) -> set[str]:
    """Codes of a file, notes included."""
    compilation = Compilation(read_source(path, name=path.name))
    found = {d.code for d in compilation.diagnostics if d.overridden is None}
    if compilation.errors:
        return found
    method = Method(compilation)
    return found | {d.code for d in notes(method.spec, str(method.passport["fixed_point"]))}


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.name.split(".")[0])
def test_a_rule_reports_exactly_what_is_measured(path: Path) -> None:
    torch.manual_seed(0)
    code = code_of(path)
    effect = EFFECTS[code]
    for file, crossed in ((path, True), (good(path), False)):
        size = effect.measure(load(file))
        assert (size > effect.tolerance) == crossed, f"{file.name}: {effect.says} {size:.3g}"
        assert (code in reported(file)) == crossed, f"{file.name}: {effect.says} {size:.3g}"


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.name.split(".")[0])
def test_a_case_crosses_one_boundary(path: Path) -> None:
    for file in (path, good(path)):
        found = {c for c in reported(file) if CODES[c].severity is not Severity.NOTE}
        assert found <= {code_of(path)}, file.name


def test_every_rule_has_its_case() -> None:
    rules = {c.code: c.rule for c in CODES.values() if c.rule}
    assert {code_of(p) for p in CASES} | set(RUNTIME) == set(rules)
    numbers = [*range(1, 11), *range(20, 39), *range(40, 48), *range(50, 56), *range(60, 67)]
    assert set(rules.values()) == {f"R{n:02}" for n in numbers}


# ---- the table -------------------------------------------------------------------------------------------


def table() -> str:
    rows = [
        "# Rules and what they measure",
        "",
        "Written by `pytest tests/test_rules.py --regenerate`. Each code is reported exactly where",
        "the effect exceeds its tolerance, measured in float64 on models small enough to enumerate",
        "(`tests/rules/` holds both specs of a row, `tests/support/effects.py` the measures).",
        "",
        "| Rule | Code | | Effect measured | bad | good | tolerance |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in CASES:
        code = CODES[code_of(path)]
        effect = EFFECTS[code.code]
        bad, well = (effect.measure(load(f)) for f in (path, good(path)))
        rows.append(
            f"| {code.rule} | {code.code} `{code.slug}` | {WORDS[code.severity]} | {effect.says} "
            f"| {number(bad)} | {number(well)} | {effect.tolerance:g} |"
        )
    rows += [
        "",
        "R28 (`OPD403` `vocabulary_mismatch`) needs models: it is raised when a run binds them.",
        "",
    ]
    return "\n".join(rows)


def number(x: float) -> str:
    return "0" if abs(x) < 1e-9 else f"{x:.3g}"


def test_the_table_is_what_was_measured() -> None:
    text = table()
    if os.environ.get("OPDSL_UPDATE_GOLDEN"):
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text
