"""Documents keep their word: specs in them compile, every raised code has its page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opdsl.codes import CODES
from opdsl.compilation import Compilation
from opdsl.source import Source

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "opdsl" / "pages"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```opd\n(.*?)^```", re.DOTALL | re.MULTILINE)
HEADINGS = ("what", "why", "example", "cure")


def whole_files(path: Path) -> list[str]:
    """The ```opd blocks of a document that are whole files."""
    blocks = FENCE.findall(path.read_text(encoding="utf-8"))
    return [b for b in blocks if b.startswith("opd 1")]


def diagnose(text: str) -> list[str]:
    compilation = Compilation(Source("page.opd", text))
    return [d.code for d in compilation.diagnostics if d.overridden is None]


def raised_codes() -> set[str]:
    """Codes that a source file other than the registry writes as a string."""
    found: set[str] = set()
    for path in (ROOT / "opdsl").rglob("*.py"):
        if path.name != "codes.py":
            found |= set(re.findall(r"\bOPD\d{3}\b", path.read_text(encoding="utf-8")))
    return found & set(CODES)


SPECS = [
    pytest.param(text, id=f"{path.name}-{i}")
    for path in DOCUMENTS
    for i, text in enumerate(whole_files(path))
]


@pytest.mark.parametrize("text", SPECS)
def test_specs_in_documents_compile(text):
    compilation = Compilation(Source("document.opd", text))
    assert not compilation.errors, [f"{d.code} {d.message}" for d in compilation.errors]


def test_the_documents_show_specs():
    assert len(SPECS) >= 8


@pytest.mark.parametrize("code", sorted(raised_codes()))
def test_every_raised_code_has_a_page(code):
    assert (PAGES / f"{code}.md").is_file(), f"{code} {CODES[code].slug} has no page"


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.md")), ids=lambda p: p.stem)
def test_pages_have_one_form(path):
    text = path.read_text(encoding="utf-8")
    code = CODES[path.stem]
    assert text.startswith(f"# {code.code} {code.slug}\n")
    heads = [h.lower() for h in re.findall(r"^## +(.+)$", text, re.MULTILINE)]
    for word in HEADINGS:
        assert any(word in h for h in heads), f"no heading with {word!r}"
    assert len(text.splitlines()) <= 60


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PAGES.glob("OPD[1-5]*.md")) if whole_files(p)],
    ids=lambda p: p.stem,
)
def test_the_example_of_a_page_gives_its_code_and_nothing_else(path):
    for text in whole_files(path):
        assert set(diagnose(text)) == {path.stem}
