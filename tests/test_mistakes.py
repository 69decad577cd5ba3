"""Several mistakes in one file give exactly that many reports, each with its code on its line."""

from __future__ import annotations

import random

import pytest
from support import mutate, plants

from opdsl.compilation import Compilation
from opdsl.diagnostics import Severity
from opdsl.source import Source

BASES = [  # not those in folders, which import from their own place
    (name, text) for name, text in mutate.shipped() if name.count("/") == 1 and "\nmethod " in text
]
CALM = [(name, text) for name, text in BASES if name in ("specs/gkd.opd", "specs/sampled_opd.opd")]
ROUNDS = 300


def reports(text: str, severity: Severity | None = Severity.ERROR) -> list[tuple[str, int]]:
    """(code, line) of everything of a severity that a text gives."""
    found = Compilation(Source("planted.opd", text, str(mutate.PLACE))).diagnostics
    return sorted(
        (d.code, d.primary.span.line) for d in found
        if d.overridden is None and severity in (None, d.severity)
    )  # fmt: skip


def test_the_bases_are_clean():
    assert len(BASES) >= 10 and len(CALM) == 2
    for name, text in BASES:
        assert reports(text, None) == [], name


@pytest.mark.parametrize("plant", plants.PLANTS, ids=lambda p: f"{p.code} {p.line or p.gone}")
def test_each_mistake_alone_gives_its_code(plant):
    fitting = 0
    for i, (name, text) in enumerate(BASES):
        made = plants.planted(random.Random(i), text, [plant])
        if made is not None:
            assert reports(made[0]) == made[1], name
            fitting += 1
    assert fitting >= 3


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_planted_mistakes_give_exactly_their_reports(count):
    """Of every kind, in different statements, in any order: nothing hides and nothing follows."""
    done, kinds = 0, set()
    for seed in range(ROUNDS):
        r = random.Random(1000 * count + seed)
        name, text = r.choice(BASES)
        chosen = r.sample(plants.PLANTS, count)
        made = plants.planted(r, text, chosen)
        if made is None:
            continue
        assert len(made[1]) == count
        assert reports(made[0]) == made[1], (name, [p.line or p.gone for p in chosen])
        done += 1
        kinds |= {p.kind for p in chosen}
    assert done >= ROUNDS // 2 and kinds == {"syntax", "name", "unit", "section"}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_damaged_statements_give_one_report_each(count):
    """What a statement that was not read would have declared is not reported as missing."""
    for seed in range(ROUNDS):
        r = random.Random(1000 * count + seed)
        name, text = r.choice(BASES)
        made, wanted = plants.damaged(r, text, count)
        assert reports(made) == wanted, (name, made)


@pytest.mark.parametrize("plant", plants.BIAS, ids=lambda p: p.code)
def test_each_bias_alone_gives_its_warning(plant):
    found = 0
    for i, (_, text) in enumerate(CALM):
        made = plants.planted(random.Random(i), text, [plant])
        found += made is not None and reports(made[0], None) == made[1]
    assert found >= 1


def test_planted_biases_give_exactly_their_warnings():
    name, text = next(base for base in CALM if base[0] == "specs/sampled_opd.opd")
    for seed in range(60):
        r = random.Random(seed)
        made = plants.planted(r, text, r.sample(plants.BIAS, r.randint(1, 4)))
        assert made is not None and reports(made[0], None) == made[1], (name, made)


def test_an_import_that_fails_is_one_report():
    text = 'opd 1\nimport "./nowhere.opd" (base)\nmethod m extends base { credit immediate }\n'
    assert reports(text) == [("OPD113", 2)]
    text = 'opd 1\nimport "./sampled_opd.opd" (sampled_odp)\nmethod m extends sampled_odp { }\n'
    assert reports(text) == [("OPD115", 2)]


def test_a_fault_in_an_imported_file_is_one_report(tmp_path):
    (tmp_path / "base.opd").write_text("opd 1\nmethod base {{\n  state rollouts(student)\n}\n")
    main = tmp_path / "main.opd"
    main.write_text('opd 1\nimport "./base.opd" (base)\nmethod m extends base { }\n')
    found = Compilation(Source("main.opd", main.read_text(), str(main))).errors
    assert [d.primary.span.source.name.rsplit("/", 1)[-1] for d in found] == ["base.opd"]
