"""Documents keep their word: specs in them compile, every code has its page in one form."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from opdsl.cli import cli
from opdsl.cli.lesson import lesson
from opdsl.codes import CODES
from opdsl.compilation import Compilation
from opdsl.diagnostics import Severity
from opdsl.source import Source
from opdsl.wrapping import cells

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "opdsl" / "pages"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCES = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^```opd\n(.*?)^```", re.DOTALL | re.MULTILINE)
HEADINGS = ("What it means", "Why it matters", "Example", "Cure", "Source")
BETWEEN = ("Accepting it", "Overriding it")  # what may stand before the source
SOURCE = re.compile(r"[Tt]heory (§\d|T\d)|\bR\d\d\b|arXiv \d{4}\.\d{5}|opdsl's own rule")
PATH = re.compile(r"`((?:opdsl|grammars|docs|specs|tests)/[\w/.]+)`")


def whole_files(path: Path) -> list[str]:
    """The ```opd blocks of a document that are whole files."""
    blocks = FENCE.findall(path.read_text(encoding="utf-8"))
    return [b for b in blocks if b.startswith("opd 1")]


def diagnose(text: str) -> list[str]:
    compilation = Compilation(Source("page.opd", text))
    return [d.code for d in compilation.diagnostics if d.overridden is None]


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


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_code_has_a_page(code):
    assert (PAGES / f"{code}.md").is_file(), f"{code} {CODES[code].slug} has no page"


def parts(text: str) -> dict[str, str]:
    """Heading to what stands under it, of a page."""
    _, *pieces = re.split(r"^## +(.+)$", text, flags=re.MULTILINE)
    return {head: body.strip() for head, body in zip(pieces[::2], pieces[1::2], strict=True)}


ALL_PAGES = pytest.mark.parametrize("path", sorted(PAGES.glob("*.md")), ids=lambda p: p.stem)


@ALL_PAGES
def test_pages_have_one_form(path):
    """What, why, an example, the cure and where the fact comes from, in this order."""
    text = path.read_text(encoding="utf-8")
    code = CODES[path.stem]
    assert text.startswith(f"# {code.code} {code.slug}\n")
    found = parts(text)
    assert [head for head in found if head not in BETWEEN] == list(HEADINGS)
    assert list(found)[-1] == "Source" and all(found.values())
    assert len(text.splitlines()) <= 60


@ALL_PAGES
def test_the_source_of_a_page_can_be_found(path):
    source = parts(path.read_text(encoding="utf-8"))["Source"]
    assert SOURCE.search(source), source
    for name in PATH.findall(source):
        assert (ROOT / name).exists(), name
    rule = CODES[path.stem].rule
    assert rule is None or rule in source, f"the registry says {rule}"


@ALL_PAGES
def test_pages_read_well_on_a_terminal(path, monkeypatch):
    """80 columns, nothing left of the markup, and no escape sequence without colour."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = path.read_text(encoding="utf-8")
    plain = lesson(text, 80, False)
    assert "\x1b" not in plain and "```" not in plain and "\n#" not in plain
    code = {row.rstrip() for block in FENCES.findall(text) for row in block.split("\n")}
    for line in plain.splitlines():
        assert cells(line) <= 80 or line.strip() in {row.strip() for row in code}, line
    colored = lesson(text, 80, True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == plain and "\x1b[1m" in colored


def test_explain_finds_a_page_by_code_and_by_slug(monkeypatch):
    run = CliRunner()
    by_code = run.invoke(cli, ["explain", "opd302"])
    by_slug = run.invoke(cli, ["explain", "teacher_free_gradient"])
    assert by_code.exit_code == by_slug.exit_code == 0 and by_code.output == by_slug.output
    assert by_code.output == lesson((PAGES / "OPD302.md").read_text(encoding="utf-8"), 80, False)
    raw = run.invoke(cli, ["explain", "OPD302", "--format", "markdown"])
    assert raw.output == (PAGES / "OPD302.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PAGES.glob("OPD[0-5]*.md")) if whole_files(p)],
    ids=lambda p: p.stem,
)
def test_the_example_of_a_page_gives_its_code_and_nothing_else(path):
    for text in whole_files(path):
        if CODES[path.stem].severity is Severity.NOTE:
            found = Compilation(Source("page.opd", text))
            assert not diagnose(text) and path.stem in {d.code for d in found.notes}
            continue
        assert set(diagnose(text)) == {path.stem}
