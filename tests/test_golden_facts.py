"""The golden facts of the semantics, for specs that share no spelling with the library.

Every row: the fact is printed (by `check`, by `explain`, in the passport) for definitions, knobs
and algebra nobody has seen before, and it is true, measured by enumeration.
"""

from __future__ import annotations

import itertools
import json
from functools import cache

import pytest
from golden_rows import FACTS, Fact

import opdsl
from opdsl.compilation import Compilation
from opdsl.diagnostics import CompileError
from opdsl.method import Method
from opdsl.source import Source

TINY, SEEN = 1e-9, 1e-3
ROWS = [f.row for f in FACTS]
NAMES = [f"{f.row} {ROWS[:i].count(f.row)}".replace(" ", "-") for i, f in enumerate(FACTS)]
EVERY = pytest.mark.parametrize("fact", FACTS, ids=NAMES)


@cache
def compiled(text: str) -> Method:
    return opdsl.compile(text)


def test_every_row_of_the_table_is_here():
    assert len(set(ROWS)) == 19  # 17 rows; the sixth and the last have two faces


@EVERY
def test_the_fact_is_reported(fact: Fact):
    found = Compilation(Source("fact.opd", fact.text)).diagnostics
    assert {d.code for d in found} == set(fact.codes)


@EVERY
def test_the_fact_is_printed(fact: Fact):
    m = compiled(fact.overridden)
    page = " ".join(m.explain().split())
    for line in fact.prints:
        assert line in page, page
    found = json.loads(m.explain("json"))["passport"]
    assert {k: found[k] for k in fact.passport} == fact.passport
    assert set(fact.codes) <= {b["code"] for b in found["biases"]}


@EVERY
def test_the_fact_is_true(fact: Fact):
    m = compiled(fact.overridden)
    small_ones, large_ones = fact.zero(m), fact.large(m)
    assert small_ones or large_ones
    for what, size in small_ones.items():
        assert size < TINY, what
    for what, size in large_ones.items():
        assert size > SEEN, what


def test_the_library_refuses_the_ends_of_jsd():
    body = "support full\nfeedback loss JSD(W || student, beta = {})"
    for beta in ("0", "1", "2 - 1"):
        with pytest.raises(CompileError) as e:
            opdsl.compile(Fact("", body.format(beta)).text)
        (d,) = e.value.diagnostics
        assert d.code == "OPD208" and any("KL(" in h for h in d.helps)


def test_no_fact_is_spelled_as_the_library_spells_it():
    words = ("k1(", "k2(", "k3(", "logratio(", " KL(", "return_to_go", "discounted", "hellinger(")
    for fact, word in itertools.product(FACTS, words):
        assert word not in f" {fact.body} {fact.defs}", (fact.row, word)
