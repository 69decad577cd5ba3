"""Known mistakes: each compiles as it shipped, is named by its codes, says in its passport
what it does, is measured, and measures clean once cured.

`pytest tests/test_failures.py --regenerate` writes docs/failures.md.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from gallery import CASES, FILES, PAGES, Page, method
from support import TOLERANCE, batches, relative

from opdsl.cli import cli
from opdsl.codes import CODES
from opdsl.compilation import Compilation
from opdsl.diagnostics import Severity
from opdsl.source import Source

DOCUMENT = Path(__file__).parent.parent / "docs" / "failures.md"
EVERY = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


def reported(text: str) -> set[str]:
    found = Compilation(Source("failure.opd", text)).diagnostics
    return {d.code for d in found if d.overridden is None}


@cache
def effect(name: str, cured: bool = False) -> float:
    torch.manual_seed(0)
    return CASES[name].measure(method(PAGES[name], cured))


# ---- what is reported ----------------------------------------------------------------------------


def test_the_gallery_is_complete():
    assert set(PAGES) == set(CASES) and len(PAGES) >= 18


def test_every_file_compiles_as_it_shipped():
    found = CliRunner().invoke(cli, ["check", "--deny", "warnings", *map(str, FILES)])
    assert found.exit_code == 0, found.output


def test_they_are_listed_apart():
    run = CliRunner()
    found = json.loads(run.invoke(cli, ["list", "failures", "--format", "json"]).output)
    assert [row["name"] for row in found] == list(PAGES)
    methods = json.loads(run.invoke(cli, ["list", "--format", "json"]).output)
    assert not {row["name"] for row in methods} & set(PAGES)


@EVERY
def test_exactly_what_is_acknowledged_is_reported(page: Page):
    assert reported(page.text) == set()
    assert reported(page.bare) == page.codes


@EVERY
def test_the_comment_says_what_happened(page: Page):
    for word in ("", "Meant", "Does", "Cure"):
        assert page.said(word), word
    assert method(page).spec.evidence and method(page).spec.cites
    names = [d.reason for d in method(page).spec.acceptances]
    assert all(len(reason) > 5 for reason in names)


# ---- what the passport says ------------------------------------------------------------------------


@EVERY
def test_the_passport(page: Page):
    m = method(page)
    wanted, found = CASES[page.name].passport, m.passport
    assert {k: found[k] for k in wanted} == wanted
    assert json.loads(m.explain("json"))["passport"]["objective"] == found["objective"]
    accepted = {b["code"]: b["accepted"] for b in found["biases"]}
    assert set(accepted) == page.codes and all(accepted.values())


@EVERY
def test_the_page_prints_it(page: Page):
    text = " ".join(method(page).explain().split())
    found = method(page).passport
    objectives = found["objective"]
    for line in objectives if isinstance(objectives, list) else [objectives]:
        assert line in text or line == "not decided"
    for bias in found["biases"]:
        assert bias["code"] in text and f"(accepted: {bias['accepted']})" in text


# ---- what is measured ------------------------------------------------------------------------------


@EVERY
def test_the_effect_is_there_as_shipped_and_gone_once_cured(page: Page):
    case = CASES[page.name]
    assert effect(page.name) > case.tolerance >= effect(page.name, cured=True), case.says
    assert case.exactly(method(page)) < 1e-9


@EVERY
def test_the_cure_is_clean(page: Page):
    rest = reported(page.cured)
    assert not any(CODES[c].severity is Severity.ERROR for c in rest)
    assert rest <= {"OPD501"}  # immediate credit is a choice, not a mistake


@EVERY
@pytest.mark.parametrize("cured", [False, True], ids=["shipped", "cured"])
def test_the_emitted_loss_is_the_oracles(page: Page, cured: bool):
    m = method(page, cured)
    batch, leaf = batches.logits(batches.draw(17, B=4, T=5, V=9))
    result, oracle = m.loss(batch), m.reference(batch)
    size = max((abs(x) for x in oracle.terms.values()), default=0.0)
    assert relative(result.loss.detach(), oracle.loss, size) < TOLERANCE["float64"]
    if result.loss.requires_grad:
        (grad,) = torch.autograd.grad(result.loss, leaf)
        assert relative(grad, torch.as_tensor(oracle.grad_logits)) < TOLERANCE["float64"]


# ---- the table ---------------------------------------------------------------------------------------


def table() -> str:
    rows = [
        "# Known mistakes",
        "",
        "Written by `pytest tests/test_failures.py --regenerate`. Each row is a spec in",
        "`specs/failures/` that compiles as the code shipped (or as a setting of it allows), every",
        "report acknowledged; without the acknowledgements `opdsl check` reports the codes (and, on",
        "the reward route, OPD501 where credit is immediate). Effects are exact expectations in float64",
        "on models small enough to enumerate (4 tokens and 13 states, or 12 tokens and one state,",
        "supports of 2), as shipped and with the cure of the file's comment. Frameworks move: each",
        "file names the version that was read.",
        "",
        "| Spec | Seen in | What it does | Reported | Passport | Effect | shipped | cured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for page in PAGES.values():
        case = CASES[page.name]
        codes = [f"{c} `{CODES[c].slug}`" for c in sorted(page.codes - {"OPD501"})]
        cells = [
            f"[`{page.name}`](../specs/failures/{page.name}.opd)",
            page.said(""),
            page.said("Does"),
            "<br>".join(codes) or "–",
            "<br>".join(_entries(case.passport)),
            case.says,
            number(effect(page.name)),
            number(effect(page.name, cured=True)),
        ]
        rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(rows) + "\n"


def _entries(passport: dict[str, object]) -> list[str]:
    out = []
    for name, x in passport.items():
        if isinstance(x, dict):
            x = [f"{k} {'yes' if v else 'no'}" for k, v in x.items()]
        texts = x if isinstance(x, list) else [x]
        shown = "; ".join({True: "yes", False: "no"}.get(t, str(t)) for t in texts)
        out.append(f"{name.replace('_', ' ')}: {shown}")
    return out


def number(x: float) -> str:
    return "0" if abs(x) < 1e-9 else f"{x:.3g}"


def test_the_table_is_what_was_measured():
    text = table()
    if os.environ.get("OPDSL_UPDATE_GOLDEN"):
        DOCUMENT.write_text(text, encoding="utf-8")
    assert DOCUMENT.read_text(encoding="utf-8") == text
    for name in PAGES:
        assert sum(f"[`{name}`]" in line for line in text.splitlines()) == 1
