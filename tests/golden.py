"""Golden files: each `tests/bad/OPDnnn_slug.opd` has its full rendered report in `.expected`.

Run `pytest --regenerate` to write them anew, then read the diff.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from opdsl.diagnostics import Diagnostic
from opdsl.render import render_text
from opdsl.source import Source
from opdsl.syntax import read_source

HERE = Path(__file__).parent
BAD = HERE / "bad"
GOOD = HERE / "good"

Diagnose = Callable[[Source], Iterable[Diagnostic]]


def bad_files(pattern: str = "OPD*.opd") -> list[Path]:
    """The bad files, by name; `pattern` picks a family, e.g. `OPD0*.opd` for syntax."""
    return sorted(BAD.glob(pattern))


def check_bad(path: Path, diagnose: Diagnose) -> None:
    """Diagnose one bad file, compare with its golden report, and look for the code in its name."""
    found = list(diagnose(read_source(path, name=path.name)))
    compare(path.with_suffix(".expected"), render_text(found))
    code = path.name.partition("_")[0]
    assert any(diagnostic.code == code for diagnostic in found), f"{path.name} does not give {code}"


def compare(golden: Path, text: str) -> None:
    """Compare a text with a golden file, or write the file when updating."""
    if os.environ.get("OPDSL_UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
        return
    assert golden.is_file(), f"{golden.name} is missing: run pytest --regenerate"
    assert text == golden.read_text(encoding="utf-8")
