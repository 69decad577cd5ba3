"""Bad specs of the meaning families (1xx-5xx): each gives exactly its golden report."""

from __future__ import annotations

import golden
import pytest

from opdsl.codes import CODES
from opdsl.compilation import Compilation
from opdsl.diagnostics import Severity
from opdsl.syntax import read_source

FILES = [p for p in golden.bad_files() if p.name[3] in "12345"]


def diagnose(source):
    return [d for d in Compilation(source).diagnostics if d.overridden is None]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden_report(path):
    golden.check_bad(path, diagnose)


def test_there_are_enough():
    assert len(FILES) >= 45
    assert len(golden.bad_files()) >= 80


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_each_report_appears_once_and_is_readable(path):
    found = diagnose(read_source(path, name=path.name))
    seen = {(d.code, d.primary.span.start, d.message) for d in found}
    assert len(seen) == len(found)
    for d in found:
        assert len(d.message) <= 110, d.message
        assert d.code in CODES
        if d.severity is Severity.ERROR and d.code not in ("OPD103", "OPD304"):
            assert d.helps or d.notes or d.primary.text, d.code
