"""Diagnostics as text, JSON and annotations."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys

import golden
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdsl.codes import make
from opdsl.diagnostics import Diagnostic, Edit, Fix, Label, Safety
from opdsl.render import render, render_github, render_json, render_text, summary, wants_color
from opdsl.source import NOWHERE, Source, Span
from opdsl.syntax import highlight, parse, read_source
from opdsl.wrapping import cells, wrapped

SPEC = """opd 1
method m {
  state     rollouts(student)
  teacher   T = external(access = sampled)
  support   top(32, of = T, tail = bin)
  credit    immediate
  feedback  loss logratio(student, T)
}
"""


def span(source: Source, text: str) -> Span:
    start = source.text.index(text)
    return Span(source, start, start + len(text))


def sample() -> Diagnostic:
    source = Source("my.opd", SPEC)
    return make(
        "OPD302", span(source, "logratio(student, T)"),
        "this loss names a teacher that cannot influence its gradient",
        "its gradient is that of log student[y]; T has dropped out",
        secondary=(Label(span(source, "external(access = sampled)"), "the teacher"),
                   Label(span(source, "loss"), "differentiated")),
        notes=("averaged over student samples it is exactly zero",),
        helps=("feedback reward logratio(T, rollout)       policy gradient\n"
               "feedback loss   0.5 * logratio(student, T)^2   the same gradient",),
        fixes=(Fix("use a reward", (Edit(span(source, "loss"), "reward"),),
                   Safety.CHANGES_FORMULA),),
    )  # fmt: skip


def test_the_example_of_the_language_page():
    source = Source("my.opd", "\n" * 8 + "  feedback  loss logratio(student, T)\n")
    diagnostic = make(
        "OPD302", span(source, "logratio(student, T)"),
        "this loss names a teacher that cannot influence its gradient",
        "its gradient is that of log student[y]; T has dropped out",
        notes=("averaged over student samples it is exactly zero",),
        helps=("feedback reward logratio(T, rollout)       policy gradient of KL(student || T)\n"
               "feedback loss   0.5 * logratio(student, T)^2   the same gradient, differentiated",),
    )  # fmt: skip
    assert render_text([diagnostic], width=100) == (
        "error[OPD302] teacher_free_gradient: "
        "this loss names a teacher that cannot influence its gradient\n"
        "  --> my.opd:9:18\n"
        "   |\n"
        " 9 |   feedback  loss logratio(student, T)\n"
        "   |                  ^^^^^^^^^^^^^^^^^^^^ "
        "its gradient is that of log student[y]; T has dropped out\n"
        "   |\n"
        "   = note: averaged over student samples it is exactly zero\n"
        "   = help: feedback reward logratio(T, rollout)       policy gradient of KL(student || T)\n"
        "           feedback loss   0.5 * logratio(student, T)^2   "
        "the same gradient, differentiated\n"
        "   = more: opdsl explain OPD302\n"
    )


def test_several_labels_on_one_line_and_far_apart():
    text = render_text([sample()], width=100)
    assert text.splitlines()[2:10] == [
        "   |",
        " 4 |   teacher   T = external(access = sampled)",
        "   |                 -------------------------- the teacher",
        "...",
        " 7 |   feedback  loss logratio(student, T)",
        "   |                  ^^^^^^^^^^^^^^^^^^^^ "
        "its gradient is that of log student[y]; T has dropped out",
        "   |             ---- differentiated",
        "   |",
    ]
    assert text.count("= help") == 1  # a fix that changes the formula is not advertised


def test_one_line_between_is_shown():
    source = Source("a.opd", "a\nb\nc\n")
    diagnostic = make(
        "OPD004", Span(source, 0, 1), "m", "x", secondary=(Label(Span(source, 4, 5), "y"),)
    )
    assert " 2 | b" in render_text([diagnostic]) and "..." not in render_text([diagnostic])


def test_labels_in_another_file():
    here, there = Source("here.opd", "abc\n"), Source("there.opd", "\n\n  xyz\n")
    diagnostic = make(
        "OPD107", Span(here, 0, 3), "m", "p", secondary=(Label(Span(there, 4, 7), "first written"),)
    )
    lines = render_text([diagnostic]).splitlines()
    assert "  ::: there.opd:3:3" in lines and "   |   --- first written" in lines
    assert lines.index("  --> here.opd:1:1") < lines.index("  ::: there.opd:3:3")


def carets(text: str) -> tuple[str, str]:
    """What stands above the carets, and the line with them."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if "^" in line)
    start, stop = lines[at].index("^"), lines[at].rindex("^") + 1
    return lines[at - 1][start:stop], lines[at]


def test_long_lines_are_trimmed_around_the_span():
    source = Source("a.opd", "x" * 500 + "HERE" + "y" * 500)
    text = render_text([make("OPD004", span(source, "HERE"), "m", "label")])
    assert carets(text)[0] == "HERE"
    assert all(len(line) <= 80 for line in text.splitlines()) and text.count("…") == 2
    source = Source("a.opd", "HERE" + "y" * 500)
    assert carets(render_text([make("OPD004", span(source, "HERE"), "m")]))[0] == "HERE"
    whole = make("OPD004", Span(source, 0, 504), "m", "l")
    assert max(len(line) for line in render_text([whole]).splitlines()) <= 80


def test_tabs_wide_and_combining_characters_keep_the_carets_in_place():
    source = Source("a.opd", "\tgate\tx\n")
    assert carets(render_text([make("OPD004", span(source, "x"), "m")]))[0] == "x"
    source = Source("a.opd", '"日本" e\u0301 x\n')
    line = carets(render_text([make("OPD004", span(source, "x"), "m")]))[1]
    assert line.index("^") - len("   | ") == 9  # columns on screen: 1+4+1+1, then 1+1


def test_a_label_stands_beside_its_carets_or_below_them():
    """Beside where it fits, else below from the same column, else below and further left."""
    source = Source("a.opd", "gate  short_name  and_a_longer_name_here\n")
    for text, long in (("short_name", False), ("and_a_longer_name_here", True)):
        label = "what was expected at this place of the text"
        lines = render_text([make("OPD004", span(source, text), "m", label)]).splitlines()
        at = next(i for i, line in enumerate(lines) if "^" in line)
        column = lines[at].index("^")
        assert lines[at - 1][column : column + len(text)] == text
        assert (label in lines[at]) is not long
        if long:
            assert lines[at + 1].index("what") <= column and lines[at + 1].endswith(label)
    narrow = render_text([make("OPD004", span(source, "short_name"), "m", "word " * 20)], width=50)
    assert max(map(len, narrow.splitlines())) <= 50 and narrow.count("word") == 20


@pytest.mark.parametrize(
    "text", ["\tgate\tHERE", '"日本" HERE', "e\u0301e\u0301 HERE", "x" * 300 + "HERE"]
)
def test_carets_stay_in_place_when_labels_wrap(text):
    """Tabs, wide characters, combining marks and a trimmed line, with a label of several lines."""
    source = Source("a.opd", text + " and more of the same line " * 4)
    found = render_text([make("OPD004", span(source, "HERE"), "m", "why it is wrong " * 12)])
    lines = found.splitlines()
    at = next(i for i, line in enumerate(lines) if "^" in line)
    before, marked = lines[at - 1].split("HERE")[0], lines[at].split("^")[0]
    assert cells(before) == cells(marked) and lines[at].count("^") == 4
    assert max(cells(line) for line in lines) <= 80


def test_endless_words_and_lines_are_cut():
    source = Source("a.opd", "λ" * 100_000 + " x " + "y" * 100_000)
    second = Label(span(source, "yyyy"), "z" * 5000)
    report = make("OPD004", Span(source, 0, 9), "no `" + "n" * 5000 + "`", secondary=(second,),
                  notes=("n" * 5000,), helps=("word " * 5000,))  # fmt: skip
    text = render_text([report])
    assert len(text) < 5000 and max(cells(line) for line in text.splitlines()) <= 80


WORDS = st.sampled_from(["a", "word", "`code in quotes`", "KL(student || T)", "x[t + 1]", "日本",
                         "averyveryveryverylongwordthatgoeson", "", "gap  ", "  ", "(in", "out)"])  # fmt: skip


@given(st.lists(WORDS, max_size=25).map(" ".join), st.integers(20, 90), st.integers(15, 90))
def test_wrapping_keeps_every_word_and_the_width(text, room, first):
    lines = wrapped(text, room, first)
    assert "".join("".join(lines).split()) == "".join(text.split())
    for i, line in enumerate(lines):
        limit = first if i == 0 else room
        assert cells(line) <= limit or " " not in line.strip().split("`")[0], (line, limit)


@pytest.mark.parametrize("path", sorted(golden.BAD.glob("*.expected")), ids=lambda p: p.stem)
def test_golden_reports_fit_eighty_columns_without_orphans(path):
    """No line is too wide, and no line holds one short word that the line above had room for."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for above, line in itertools.pairwise(lines):
        assert cells(line) <= 80, line
        inside = line.startswith("    ") and " | " not in line and line.strip()
        if inside and " " not in line.strip() and len(line.strip()) < 4:
            assert cells(above) + 1 + len(line.strip()) > 80, (above, line)


def test_empty_span_end_of_file_and_multi_line_span():
    source = Source("a.opd", "ab\ncd")
    end = Span(source, 5, 5)
    assert "   |   ^ here" in render_text([make("OPD004", end, "m", "here")])
    across = Span(source, 1, 4)
    assert " 1 | ab\n   |  ^ l" in render_text([make("OPD004", across, "m", "l")])
    assert "-->" not in render_text([make("OPD900", NOWHERE, "m", "label")])  # nothing to point at


def test_control_characters_never_reach_the_terminal():
    source = Source("a\x1b[31m.opd", "gate \x1b[2J\x07 \u202e x\r\n")
    diagnostic = make("OPD005", Span(source, 5, 6), "bad \x1b[0m", "label\x07", notes=("\x1b",))
    text = render_text([diagnostic])
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)


def test_colour_only_when_asked(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    plain = render_text([sample()])
    colored = render_text([sample()], color=True)
    assert "\x1b[" in colored and "\x1b" not in plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert render_text([sample()], color=True) == plain
    assert not wants_color(sys.stdout) and not wants_color(io.StringIO())


def test_plain_text_does_not_load_rich():
    code = "import sys; from opdsl.render import render_text; print('rich' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_overridden_diagnostics_say_so():
    text = render_text([sample().with_override("the paper does it")])
    assert text.startswith("accepted[OPD302]") and "accepted: the paper does it" in text
    assert summary([sample(), sample().with_override("x")]) == "1 error, 1 accepted"
    assert summary([sample(), sample()]) == "2 errors" and summary([]) == ""


def test_json_has_every_field():
    (item,) = json.loads(render_json([sample()]))
    assert item["code"] == "OPD302" and item["rule"] == "R01" and item["severity"] == "error"
    assert (item["file"], item["line"], item["column"]) == ("my.opd", 7, 18)
    assert (item["end_line"], item["end_column"]) == (7, 38)
    assert SPEC[item["start"] : item["end"]] == "logratio(student, T)"
    assert [label["label"] for label in item["secondary"]] == ["the teacher", "differentiated"]
    assert item["fixes"][0]["safety"] == "changes_formula"
    assert item["fixes"][0]["edits"][0]["text"] == "reward"
    assert json.loads(render_json([])) == []


def test_github_annotations():
    line = render_github([sample()]).splitlines()
    assert len(line) == 1
    assert line[0].startswith("::error file=my.opd,line=7,endLine=7,col=18,endColumn=38,title=OPD")
    assert "%0Ahelp: feedback reward" in line[0]
    source = Source("a,b:c.opd", "x")
    assert "file=a%2Cb%3Ac.opd" in render_github([make("OPD004", Span(source, 0, 1), "50%")])


def test_render_dispatches():
    assert render([sample()], "json") == render_json([sample()])
    assert render([sample()], "github") == render_github([sample()])
    assert render([sample()]) == render_text([sample()])
    with pytest.raises(ValueError, match="text, json or github"):
        render([sample()], "xml")


@pytest.mark.parametrize("path", golden.bad_files("OPD0*.opd"), ids=lambda path: path.stem)
def test_syntax_reports_fit_the_rules(path):
    """A first line of at most 100 columns; every format renders; spans lie inside the text."""
    source = read_source(path, name=path.name)
    _, found = parse(source)
    for diagnostic in found:
        assert len(f"error[{diagnostic.code}] {diagnostic.slug}: {diagnostic.message}") <= 110
        assert diagnostic.message[0].islower() or diagnostic.message[0] in "I`"
    assert len(json.loads(render_json(found))) == len(found)
    assert render_github(found).count("\n") == len(found)


def test_the_highlighting_is_current():
    from opdsl import resources

    place = resources.grammars() / "opd.tmLanguage.json"
    assert place.read_text(encoding="utf-8") == highlight.text(), (
        "run python -m opdsl.syntax.highlight"
    )


def test_highlighting_colours_keywords_only_at_the_start_of_a_statement():
    rules = highlight.textmate()["patterns"]
    section = next(r["match"] for r in rules if "override" in r["match"])
    assert re.search(section, "  support   full")
    assert re.search(section, "  override credit immediate")
    assert re.search(section, "term a {support sampled}".replace("term a ", ""))
    assert not re.search(section, "  gate_x support weight".replace("gate_x", "foo"))
    assert not re.search(section, '  teacher = "x"')
    for rule in rules:
        re.compile(rule["match"])
