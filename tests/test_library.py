"""The library as a whole: every shipped spec, the index, `opdsl list`, the gallery.

That every method trains is in `test_short_runs`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import opdsl
from opdsl.cli import cli
from opdsl.compilation import Compilation
from opdsl.diagnostics import Severity
from opdsl.formula import library
from opdsl.formula.table import MADE, between, contents, summary, table
from opdsl.formula.vocabulary import AXES, SHELVES
from opdsl.resources import methods, specs
from opdsl.syntax import read_source
from opdsl.wrapping import cells

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "methods"
SHIPPED = methods()
NAMES = [path.stem for path in SHIPPED]
OURS = re.compile(r"\bours\b|nobody (has )?published|unpublished", re.IGNORECASE)


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compilation]:
    return {path.stem: Compilation(read_source(path)) for path in SHIPPED}


@pytest.fixture(scope="module")
def found(request) -> list[library.Entry]:
    """The entries, and with --regenerate the index."""
    entries, broken = library.entries(measured=True)
    assert not broken, f"these specs have errors: {broken}"
    if request.config.getoption("--regenerate"):
        library.index_file().write_text(library.index_text(entries), encoding="utf-8")
    return entries


# ---- the specs -----------------------------------------------------------------------------------


def test_names_are_unique_and_those_of_the_files(compiled):
    assert len(NAMES) == len(set(NAMES))
    assert {n: c.spec.name for n, c in compiled.items()} == {n: n for n in NAMES}
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", n) for n in NAMES)
    assert {library.group_of(p.relative_to(specs()).as_posix()) for p in SHIPPED} <= set(SHELVES)


def test_every_spec_is_clean_when_warnings_are_denied(compiled):
    left = {
        name: [
            d.code for d in c.diagnostics if d.overridden is None and d.severity != Severity.NOTE
        ]
        for name, c in compiled.items()
    }
    assert {n: codes for n, codes in left.items() if codes} == {}


def test_every_spec_says_how_it_is_known(compiled):
    for name, c in compiled.items():
        assert c.spec.evidence in ("hypothesis", "reported", "replicated"), name
        assert c.spec.title, name
        assert c.spec.cites or OURS.search(c.source.text), (
            f"{name} neither cites nor says it is ours"
        )
        if not c.spec.cites:
            assert c.spec.evidence == "hypothesis", name


def test_what_is_known_by_its_abstract_is_a_hypothesis(compiled):
    survey = [n for n, c in compiled.items() if ("arxiv", "2606.22793") in c.spec.cites]
    assert {"gae_opd", "cr_opd"} <= set(survey)
    assert {n: compiled[n].spec.evidence for n in survey} == dict.fromkeys(survey, "hypothesis")


def test_specs_are_short_and_need_no_python(compiled):
    lines = {n: library.code_lines(c.source.text) for n, c in compiled.items()}
    mean = sum(lines.values()) / len(lines)
    longest = sorted(lines, key=lines.__getitem__)[-3:]
    print(f"\n{len(lines)} specs, {mean:.1f} lines on average; longest: "
          + ", ".join(f"{n} {lines[n]}" for n in longest))  # fmt: skip
    assert len(lines) >= 80 and mean <= 20
    outside = [p for p in specs().rglob("*") if p.is_file() and p.suffix not in (".opd", ".jsonl")]
    assert outside == []


def test_no_two_specs_are_the_same_method(compiled):
    """The same update twice is one method, unless the file says whose it is again."""
    by: dict[str, list[str]] = {}
    for name in compiled:
        by.setdefault(opdsl.load(name).fingerprints["method"], []).append(name)
    silent = []
    for names in by.values():
        text = {n: compiled[n].source.text for n in names}
        pairs = [(n, o) for n in names for o in names if n != o and re.search(rf"\b{o}\b", text[n])]
        silent += [names] if len(names) > 1 and set(sum(pairs, ())) != set(names) else []
    assert silent == [], "the same method under several names"


WHEEL = """
import json, sys
from pathlib import Path
import opdsl
from opdsl.cli import cli
root = Path(sys.argv[1])
assert Path(opdsl.__file__).is_relative_to(root), opdsl.__file__
cli.main(["list", "--where", "route=reward,credit=gae", "--format", "json"], standalone_mode=False)
heavy = {"torch", "transformers", "sympy", "numpy", "accelerate", "lark"} & set(sys.modules)
assert not heavy, heavy
from opdsl.compilation import Compilation
from opdsl.resources import methods
from opdsl.syntax import read_source
assert all(p.is_relative_to(root) for p in methods())
new = root / "opdsl" / "specs" / "gates" / "brand_new.opd"
new.write_text('opd 1\\n\\nimport "../gkd.opd" (gkd)\\n\\nmethod brand_new extends gkd "New" {\\n'
               "  override feedback loss KL(student || T)\\n}\\n")
assert opdsl.load("brand_new").title == "New"
cli.main(["list", "--where", "name=brand_new"], standalone_mode=False)
print("broken", [p.name for p in methods(failures=True) if Compilation(read_source(p)).errors])
"""


def test_imports_resolve_in_an_installed_wheel(tmp_path, found):
    """Package, grammar and specs as a wheel lays them out, away from the checkout."""
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "opdsl", tmp_path / "site" / "opdsl", ignore=skip)
    for name in ("grammars", "specs"):
        shutil.copytree(ROOT / name, tmp_path / "site" / "opdsl" / name, ignore=skip)
    done = subprocess.run(
        [sys.executable, "-c", WHEEL, str(tmp_path / "site")], capture_output=True, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    head, _, broken = done.stdout.rpartition("broken")
    rows, _, new = head.partition("]\ngates: ")
    assert "gae_opd" in {row["name"] for row in json.loads(rows + "]")}
    assert "brand_new  New" in new  # one file more is one method more
    assert broken.strip() == "[]"


# ---- the index -----------------------------------------------------------------------------------


def test_the_index_is_that_of_the_specs(found):
    there = {e.name: e.key for e in library.index()}
    assert there == {e.name: e.key for e in found}, "run pytest --regenerate tests/test_library.py"
    assert all(e.measured for e in library.index())
    text = library.index_file().read_text(encoding="utf-8")
    assert text == library.index_text(library.index())


@pytest.mark.slow
def test_the_index_says_what_the_specs_say(request):
    fresh = [e for path in SHIPPED if (e := library.compiled(path)) is not None]
    if request.config.getoption("--regenerate"):
        library.index_file().write_text(library.index_text(fresh), encoding="utf-8")
    assert library.index_file().read_text(encoding="utf-8") == library.index_text(fresh)


def test_old_and_unreadable_lines_are_made_anew(tmp_path, monkeypatch, found):
    rows = [json.loads(line) for line in library.index_text(found).splitlines()]
    by = {row["name"]: row for row in rows}
    by["gkd"]["key"], by["gkd"]["title"] = "0" * 16, "of another day"
    del by["gae_opd"]["axes"]
    text = "".join(json.dumps(row) + "\n" for row in rows if row["name"] != "abkd")
    (tmp_path / "index.jsonl").write_text(text + "not json\n", encoding="utf-8")
    monkeypatch.setattr(library, "index_file", lambda: tmp_path / "index.jsonl")
    told: list[str] = []
    again, broken = library.entries(True, told.append)
    assert sorted(told) == ["abkd", "gae_opd", "gkd"]
    assert again == found and not broken


def test_a_line_follows_the_spec_its_imports_and_the_standard_library(tmp_path, monkeypatch):
    shutil.copytree(specs(), tmp_path / "specs")
    root = tmp_path / "specs"
    monkeypatch.setattr(library, "specs", lambda: root)
    library._standard.cache_clear()
    child, parent = root / "divergences/akl_ascending.opd", root / "divergences/akl.opd"
    keys = [library.key_of(child)]
    for path in (child, parent, root / "std/shapes.opd", root / "routing/tgpo.opd"):
        path.write_text(path.read_text(encoding="utf-8") + "# more\n", encoding="utf-8")
        library._standard.cache_clear()
        keys.append(library.key_of(child))
    assert len(set(keys[:4])) == 4 and keys[4] == keys[3]


# ---- opdsl list ----------------------------------------------------------------------------------


def listed(*words: str, columns: int = 100):
    return CliRunner().invoke(cli, ["list", *words], env={"COLUMNS": str(columns)})


def test_list_starts_light_and_fast(found):
    code = (
        "import sys\nfrom opdsl.cli import cli\n"
        "cli.main(['list', '--where', 'route=reward,credit=gae'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'sympy', 'numpy', 'accelerate', 'rich', 'lark'}\n"
        "sys.exit(f'loaded {heavy}' if (heavy := heavy & set(sys.modules)) else 0)"
    )
    times = []
    for _ in range(2):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert "gae_opd" in done.stdout and "sampled_opd" not in done.stdout
    assert min(times) < 1.5  # about 0.4 s on an idle machine


def names(*words: str) -> set[str]:
    return {row["name"] for row in json.loads(listed(*words, "--format", "json").stdout)}


def test_conditions(found):
    gae = names("--where", "route=reward,credit=gae")
    assert "gae_opd" in gae and gae == names("--where", "credit=GAE", "--where", "route = reward")
    assert names("--where", "credit!=gae") == set(NAMES) - names("--where", "credit=gae")
    assert "topk_match" in names("--where", "support=top-T,tail=renormalize,title~local")
    assert names("--where", "feedback=KL(student||T)") == names(
        "--where", "feedback=KL(student ‖ T)"
    )
    assert names("--where", "conservative=yes,name=minillm") == {"minillm"}
    assert names("--where", "title~no such words") == set()
    assert "no method has title~no" in listed("--where", "title~no such words").output


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("rout=reward", ["no axis rout", "did you mean route?", "axes: state"]),
        ("route=rewad", ["route is never rewad", "did you mean reward?", "loss, reward, scores"]),
        ("evidence!=prooved", ["evidence is never prooved", "replicated"]),
        ("route", ["AXIS=VALUE", "'route'"]),
        ("route=", ["AXIS=VALUE"]),
    ],
)
def test_a_wrong_condition_is_told(condition, words):
    result = listed("--where", condition)
    assert result.exit_code == 2
    assert all(w in result.output for w in words), result.output


@pytest.mark.parametrize("columns", [50, 80, 120])
@pytest.mark.parametrize("what", ["specs", "failures", "std", "axes", "codes"])
def test_lists_fit_their_width(columns, what, found):
    result = listed(what, columns=columns)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    wide = [s for s in lines if cells(s) > columns and " " in s.strip()]  # a URL stays whole
    assert wide == [] and not any(line.endswith(" ") for line in lines)
    assert "\x1b" not in result.stdout


def test_every_method_is_listed_once_with_its_title_and_source(found):
    text = listed(columns=80).stdout
    flat = re.sub(r"\s+", " ", text)
    for e in found:
        assert re.search(rf"^  {e.name}( |$)", text, re.MULTILINE), e.name
        assert re.sub(r"\s+", " ", e.title) in flat
        assert all(s in flat for s in e.sources)
    assert text.rstrip().endswith(f"{len(NAMES)} of {len(NAMES)} methods")


def test_what_was_asked_about_is_shown(found):
    text = listed("--where", "gate~entropy").stdout
    assert "gate: " in text and "entropy(T)" in text


def test_formats(found):
    rows = json.loads(listed("--format", "json").stdout)
    assert [row["name"] for row in rows] == sorted(NAMES)
    assert all(set(AXES) == set(row["axes"]) for row in rows)
    assert listed("--format", "markdown").stdout == table(found)
    for what in ("failures", "std", "axes", "codes"):
        assert json.loads(listed(what, "--format", "json").stdout)
        assert listed(what, "--format", "markdown").stdout.startswith("| ")
    assert listed("codes", "--where", "route=loss").exit_code == 2


# ---- the gallery ---------------------------------------------------------------------------------


def test_the_gallery_has_the_page_of_every_method(request, found):
    """Each page carries a hash of what it was made from; --regenerate writes those that changed."""
    from opdsl.formula.gallery import gallery, stale

    if request.config.getoption("--regenerate"):
        gallery(PAGES, only=stale(PAGES, found))
    told = "run pytest --regenerate tests/test_library.py"
    assert sorted(p.stem for p in PAGES.glob("*.md")) == sorted([*NAMES, "README"]), told
    assert stale(PAGES, found) == [], told
    assert (PAGES / "README.md").read_text(encoding="utf-8") == contents(found), told


@pytest.mark.slow
def test_the_gallery_is_what_the_compiler_says(tmp_path, request):
    from opdsl.formula.gallery import gallery

    folder = PAGES if request.config.getoption("--regenerate") else tmp_path
    for path in gallery(folder):
        assert path.read_text(encoding="utf-8") == (PAGES / path.name).read_text(encoding="utf-8")


def test_pages_say_what_they_must(found):
    for e in found:
        text = (PAGES / f"{e.name}.md").read_text(encoding="utf-8")
        assert (
            MADE in text and "$$" in text and "\n## Passport\n" in text and "| objective |" in text
        )
        assert f"evidence: {e.evidence}" in text and "```opd\nopd 1\n" in text
        assert all(value.split("://")[-1].rstrip("/") in text for _, value in e.cites), e.name
        assert ("\n## Against [" in text) == bool(e.extends), e.name
        assert "mathrm{?" not in text, e.name  # a letter that mathematics has no sign for
        assert len(text.splitlines()) <= 160, e.name


def test_pages_that_are_gone_are_removed_and_others_kept(tmp_path, found):
    from opdsl.formula.gallery import gallery

    (tmp_path / "gone.md").write_text(f"# gone\n\n{MADE}\n")
    (tmp_path / "notes.md").write_text("# mine\n")
    written = gallery(tmp_path, only=["gkd"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "gkd.md", "notes.md"]
    assert sorted(p.name for p in written) == ["README.md", "gkd.md"]


def test_the_readme_counts_what_ships(request, found):
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = between(text, "methods", summary(found))
    if request.config.getoption("--regenerate"):
        path.write_text(new, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == new, "run pytest --regenerate tests/test_library.py"


def test_what_the_page_of_coverage_calls_shipped_ships():
    text = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(methods/(\w+)\.md\)", text))
    assert len(linked) >= 80 and linked <= set(NAMES), sorted(linked - set(NAMES))
    reasons = set(re.findall(r"outside: \*([^*]+)\*", text))
    assert all(f"\n| {reason} | " in text for reason in reasons)
