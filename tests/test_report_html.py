"""`report.html` as text: well formed, closed to the network and to what models write."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fake_method import FakeMethod
from support.pages import EVIL, SECRET, finished, parsed

import opdsl
from opdsl.resources import methods
from opdsl.train import html_report
from opdsl.train.checklist import Run, checklist
from opdsl.train.html_curves import Chart, Series, draw, smoothed, thinned
from opdsl.train.html_math import mathml
from opdsl.train.html_samples import level
from opdsl.train.html_text import el, embedded_json, number
from opdsl.train.plan import make_plan
from opdsl.train.settings import RunSettings

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "report.html"
STYLE = (ROOT / "opdsl" / "train" / "html" / "report.css").read_text(encoding="utf-8")
ALLOWED = set(
    """html head meta title style body header main footer section nav h1 h2 h3 p a ul li div span
    button dl dt dd strong table caption thead tbody tr th td details summary pre script figure
    figcaption svg desc g line rect circle path polyline text math mrow mi mo mn mtext mspace mfrac
    msqrt msub msup msubsup munder mover munderover""".split()  # noqa: SIM905
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def elements(page):
    return parsed(page)


# ---- closed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["hostile", "example"])
def test_nothing_is_loaded_and_nothing_foreign_can_run(which, page):
    text = page if which == "hostile" else EXAMPLE.read_text(encoding="utf-8")
    found = parsed(text)
    assert {e.tag for e in found} <= ALLOWED, {e.tag for e in found} - ALLOWED
    for e in found:
        for name, value in e.attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "style", "action")
            assert "url(" not in (value or "") or name in ("title", "aria-label", "alttext")
            if name == "href":
                assert value.startswith("#")
    assert "http" not in STYLE and "url(" not in STYLE and "@import" not in STYLE
    scripts = [e for e in found if e.tag == "script"]
    assert sum(e.attributes.get("type") != "application/json" for e in scripts) == 1
    for e in scripts[:-1]:
        json.loads(e.text)


def test_the_policy_names_exactly_the_style_and_the_script(page):
    policy = re.search(r'content="(default-src[^"]*)"', page)[1].replace("&#x27;", "'")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for tag in ("style", "script"):
        source = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert len(source) == 1
        digest = base64.b64encode(hashlib.sha256(source[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_texts_arrive_as_they_are(elements):
    """Model text is shown in full, escaped, whatever it holds."""
    told = EVIL.replace("\x00", "\ufffd").replace("\ud800", "?")
    said = [e.text for e in elements if e.attributes.get("class") == "said"]
    assert said.count(told) >= 5  # prompts, and the table of greedy responses
    heads = [e.text for e in elements if e.tag == "li"]
    assert told in heads  # a note


def test_no_key_is_written(page):
    assert SECRET not in page
    assert "--api-key &#x27;***&#x27;" in page and "http://***@host/" in page


def test_json_inside_a_script_cannot_close_it():
    made = embedded_json({"a": "</script><!--", "b": "&"})
    assert (
        "<" not in made and ">" not in made and json.loads(made) == {"a": "</script><!--", "b": "&"}
    )


def test_elements_escape_text_and_attributes():
    assert el("p", "<b>", title='"x"') == '<p title="&quot;x&quot;">&lt;b&gt;</p>'
    assert el("p", el("b", "x"), None, "", [1, 2]) == "<p><b>x</b>12</p>"


# ---- what it says ----------------------------------------------------------------------------------


def test_every_section_is_there(page, elements):
    ids = [e.attributes["id"] for e in elements if "id" in e.attributes]
    assert len(set(ids)) == len(ids)
    for wanted in ("curves", "samples", "method", "passport", "checklist", "pace", "repeat"):
        assert wanted in ids
    links = {e.attributes["href"][1:] for e in elements if e.tag == "a"}
    assert links <= set(ids)
    assert "opdsl run cr_opd" in page and "--out NEW" in page and "version, torch" in page


def test_figures_can_be_read_by_those_who_do_not_see_them(elements):
    ids = {e.attributes.get("id"): e for e in elements}
    charts = [e for e in elements if e.tag == "svg" and e.attributes.get("class") == "chart"]
    assert len(charts) >= 6
    for chart in charts:
        title, text = (ids[i] for i in chart.attributes["aria-labelledby"].split())
        assert title.tag == "title" and title.text.strip()
        assert text.tag == "desc" and "step" in text.text
    figures = sum(e.tag == "figure" for e in elements)
    tables = [e for e in elements if e.tag == "summary" and e.text == "Numbers"]
    assert len(tables) >= figures == len(charts)
    html = next(e for e in elements if e.tag == "html")
    assert html.attributes["lang"] == "en"
    assert sum(e.tag == "h1" for e in elements) == 1


def test_tokens_show_their_numbers_without_colour(elements):
    tokens = [e for e in elements if e.tag == "span" and e.attributes.get("title")]
    assert len(tokens) == 6
    for word in ("log-ratio: -2 nats", "advantage: -2 nats", "gate: 0", "trigger: yes"):
        assert word in tokens[0].attributes["title"]
    classes = tokens[0].attributes["class"].split()
    assert "shut" in classes and "routed" in classes and any(c[0] == "n" for c in classes)
    assert [level(x, 2.0) for x in (-9, -2, -0.6, 0.01, 0.6, 2)] == [-4, -4, -2, 0, 2, 4]


def a_run(name, metrics=(), **settings):
    from support.pages import a_summary

    method = opdsl.load(name) if isinstance(name, str) else name
    plan = make_plan(method, RunSettings(out="nowhere", steps=3, task="chain", **settings))
    lines = list(metrics) or [{"step": 1, "loss": 1.0}]
    facts = html_report.explained(method)
    return Run(method, plan, a_summary(plan, Path("nowhere"), lines), facts, lines, {})


def test_the_checklist_tells_what_ran():
    figures = [{"step": s, "routing_routable": s / 4, "kl": 1.0 / s} for s in (1, 2, 4)]
    entries = checklist(a_run("cr_opd", figures))
    assert [e.number for e in entries] == list(range(1, 17))
    by = {e.number: " | ".join([*e.answers, *e.measured]) for e in entries}
    assert "temperature 1" in by[1] and "16 prompts × 4 responses" in by[1]
    assert "top(32)" in by[2]
    assert "logratio(T, rollout)" in by[3] and "kl 1 → 0.25" in by[3]
    assert "immediate" in by[6]
    assert "counterfactual" in by[7] and "#" not in by[7] and "routing_routable 0.25 → 1" in by[7]
    assert "mean over the tokens of the whole batch" in by[11]
    assert "OPD501" in by[14] and "lower variance" in by[14] and "hypothesis" in by[14]
    assert "seed 0" in by[16] and "greedy" in by[16] and "sampled" in by[16]


def test_the_checklist_knows_ratios_gates_critics_and_outcomes():
    reopold = {e.number: " ".join(e.answers) for e in checklist(a_run("reopold_a"))}
    assert "known from the" in reopold[8]
    critic = {e.number: " ".join(e.answers) for e in checklist(a_run("gae_opd"))}
    assert "γ = " in critic[6] and "critic" in critic[6]
    grpo = {e.number: " ".join(e.answers) for e in checklist(a_run("grpo"))}
    assert "importance ratio" in grpo[12] and "outcome enters its" in grpo[13]
    stand_in = checklist(a_run(FakeMethod("reverse")))
    assert len(stand_in) == 16


def test_a_method_without_a_page_of_its_own_still_gets_a_report(tmp_path):
    run = a_run(FakeMethod("reverse"))
    found = html_report.render(tmp_path, run.summary, run.method, run.plan, {}, run.metrics, [])
    parsed(found)
    assert "a formula" in found


# ---- formulas ----------------------------------------------------------------------------------------


def formulas(name):
    facts = json.loads(opdsl.load(name).explain("json"))
    return [*facts["latex_lines"], *facts["where_latex"], *facts["gradient_latex"]]


@pytest.mark.parametrize("name", ["cr_opd", "gkd", "verifier_hybrid", "gae_opd", "reopold_a"])
def test_formulas_become_mathml(name):
    for latex in formulas(name):
        root = ElementTree.fromstring(mathml(latex, "spoken"))
        assert root.tag == "math" and root.get("alttext") == "spoken"
        assert "\\" not in "".join(root.itertext())


@pytest.mark.slow
def test_every_shipped_formula_becomes_mathml():
    for path in methods(failures=True):
        for latex in formulas(path.stem):
            ElementTree.fromstring(mathml(latex))


@pytest.mark.parametrize("latex", ["\\unknown", "a}", "\\frac{1}", "{a", "\\left( a", "a & b"])
def test_other_latex_is_refused_not_guessed(latex):
    with pytest.raises(ValueError):
        mathml(latex)


def test_signs_scripts_and_names():
    made = mathml("m_t = \\min(c, -A_t')")
    assert 'form="prefix"' in made and "<msub><mi>m</mi><mi>t</mi></msub>" in made
    assert "<msubsup>" in made and "′" in made


# ---- curves and colours --------------------------------------------------------------------------------


def test_long_curves_keep_their_spikes():
    points = [(float(i), 0.0) for i in range(10_000)]
    points[5_123] = (5_123.0, 9.0)
    points[7_777] = (7_777.0, -9.0)
    short = thinned(points, 300)
    assert len(short) <= 300 and (5_123.0, 9.0) in short and (7_777.0, -9.0) in short
    assert [x for x, _ in short] == sorted(x for x, _ in short)
    assert smoothed([(0.0, 3.0), (1.0, 3.0)]) == [(0.0, 3.0), (1.0, 3.0)]


@pytest.mark.parametrize(
    "points", [((1.0, 5.0),), ((1.0, 0.0), (2.0, 0.0)), ((1.0, -1e9), (9.0, 1e9))]
)
def test_odd_curves_are_drawn(points):
    made = draw(Chart("x", "odd", "nats", (Series("a", points),)))
    parsed(made)
    numbers = re.findall(r'points="([^"]*)"', made)[0]
    assert all(-1 <= float(v) <= 500 for v in re.split("[ ,]", numbers))


def test_numbers_for_people():
    shown = [number(x) for x in (None, 3, 1234567, 0.12345, 1e-7, -2.5, float("nan"), True)]
    assert shown == ["–", "3", "1,234,567", "0.1235", "1e-07", "-2.5", "not a number", "True"]


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one, two):
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_pair_of_colours_has_the_contrast_it_needs():
    """Text 4.5 to 1, curves 3 to 1 (WCAG 2.1 AA), in light, dark and print."""
    blocks = re.findall(r":root[^{]*\{([^}]*--page[^}]*)\}", STYLE)
    assert len(blocks) == 4
    for block in blocks:
        colours = dict(re.findall(r"--(\w+):\s*(#[0-9a-f]{6})", block))
        for ground in ("page", "card"):
            for text in ("text", "soft", "link"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground, colours)
        for i in range(8):
            assert contrast(colours[f"s{i}"], colours["card"]) >= 3, (i, colours)
        for token in ("zero", *(f"{s}{i}" for s in "pn" for i in range(1, 5))):
            assert contrast(colours["tok"], colours[token]) >= 4.5, (token, colours)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_valid():
    script = ROOT / "opdsl" / "train" / "html" / "report.js"
    done = subprocess.run(["node", "--check", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
