"""`report.html` in a real browser: no request, no complaint, and the page does what it says.

Skipped where no Chromium is installed (`apt-get install chromium`). With `--regenerate` the picture
of examples/report.html is taken anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import browser
from support.pages import EVIL, finished

pytestmark = pytest.mark.skipif(browser.found() is None, reason="no Chromium is installed")
EXAMPLE = Path(__file__).parent.parent / "examples" / "report.html"


@pytest.fixture(scope="module")
def tab():
    with browser.Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    path = folder / "report.html"
    path.write_text(finished(folder), encoding="utf-8")
    return path


def load(tab, path, width=1280, height=900):
    tab.requests.clear()
    tab.errors.clear()
    tab.call(
        "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
        mobile=False,
    )  # fmt: skip
    tab.open(path)


def quiet(tab, path):
    """Nothing was asked of the network, and nothing was complained about."""
    assert tab.requests == [path.resolve().as_uri()]
    assert tab.errors == []


@pytest.mark.parametrize("which", ["example", "hostile"])
def test_it_opens_without_a_request_and_without_an_error(tab, hostile, which):
    path = hostile if which == "hostile" else EXAMPLE
    load(tab, path)
    assert tab.run("document.querySelectorAll('svg.chart').length") >= 6
    assert tab.run("document.querySelectorAll('math').length") >= 5
    # Formulas are laid out, not printed as their source.
    assert tab.run("document.querySelector('mfrac').getBoundingClientRect().height") > 20
    assert tab.run("document.images.length + document.querySelectorAll('iframe').length") == 0
    quiet(tab, path)


def test_what_a_model_wrote_is_text(tab, hostile):
    load(tab, hostile)
    told = tab.run("document.querySelector('.said').textContent")
    assert told == EVIL.replace("\x00", "\ufffd").replace("\ud800", "?")
    assert tab.run("document.querySelectorAll('img, svg[onload]').length") == 0
    # Even markup that got into the page could not run: the policy forbids what it does not name.
    tab.run(
        "new Promise(done => { const s = document.createElement('script');"
        " s.textContent = 'window.ran = 1'; document.body.append(s); setTimeout(done, 50); })"
    )
    assert tab.run("window.ran === undefined")
    tab.errors.clear()


def test_a_token_tells_its_numbers_by_pointer_and_by_keyboard(tab, hostile):
    load(tab, hostile)
    tab.run(
        "document.querySelector('.tokens').scrollIntoView({block: 'center', behavior: 'instant'})"
    )
    x, y = tab.run(
        "(() => { const b = document.querySelectorAll('.tokens .tok')[1].getBoundingClientRect();"
        " return [b.left + b.width / 2, b.top + b.height / 2]; })()"
    )
    tab.move(x, y)
    assert tab.run("document.getElementById('tip').style.visibility") == "visible"
    assert "advantage: 1 nats" in tab.run("document.getElementById('tip').textContent")
    tab.move(2, 2)
    assert tab.run("document.getElementById('tip').style.visibility") == "hidden"
    tab.run("document.querySelector('.tokens .tok').focus()")
    tab.key("ArrowRight")
    assert tab.run("document.activeElement === document.querySelectorAll('.tokens .tok')[1]")
    assert tab.run("document.getElementById('tip').style.visibility") == "visible"
    quiet(tab, hostile)


def test_a_curve_tells_its_value_under_the_pointer(tab, hostile):
    load(tab, hostile)
    x, y = tab.run(
        "(() => { const s = document.querySelector('#c1 svg'); s.scrollIntoView({block: 'center', behavior: 'instant'});"
        " const b = s.getBoundingClientRect(); return [b.right - 4, b.top + b.height / 2]; })()"
    )
    tab.move(x, y)
    told = tab.run("document.querySelector('#c1 .readout').textContent")
    assert told.startswith("step 80") and "0.0125" in told
    quiet(tab, hostile)


def test_light_dark_and_as_the_system_says(tab, hostile):
    load(tab, hostile)
    ground = "getComputedStyle(document.body).backgroundColor"
    light = tab.run(ground)
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    tab.call("Emulation.setEmulatedMedia", features=[dark])
    night = tab.run(ground)
    assert light == "rgb(255, 255, 255)" and night != light
    tab.run("document.getElementById('theme').click()")  # light, whatever the system says
    assert tab.run(ground) == light
    tab.call("Emulation.setEmulatedMedia", features=[])
    tab.run("document.getElementById('theme').click()")
    assert tab.run(ground) == night
    quiet(tab, hostile)


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_sticks_out_of_the_page(tab, width):
    load(tab, EXAMPLE, width)
    assert tab.run("document.documentElement.scrollWidth") <= width


def test_it_prints(tab, tmp_path):
    load(tab, EXAMPLE)
    tab.pdf(tmp_path / "report.pdf")
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF") and 2 <= content.count(b"/Type /Page\n") <= 40
    quiet(tab, EXAMPLE)


def test_the_pictures_beside_the_example(tab):
    """The head of the page; and from the responses to the checklist, in the dark theme."""
    head, rest = EXAMPLE.with_suffix(".png"), EXAMPLE.with_name("report_dark.png")
    if os.environ.get("OPDSL_UPDATE_GOLDEN"):
        load(tab, EXAMPLE)
        tab.picture(head, 0, 1660)
        tab.run("document.documentElement.setAttribute('data-theme', 'dark')")
        place = "document.getElementById('{}').getBoundingClientRect().top + scrollY"
        top = tab.run(place.format("samples")) - 20
        tab.picture(rest, top, tab.run(place.format("checklist")) - top - 10)
    for picture in (head, rest):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 50_000
