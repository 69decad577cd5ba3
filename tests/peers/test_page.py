"""docs/parity.md names exactly the rows that are tested (its digits may be another machine's)."""

from __future__ import annotations

import pytest

from peers import table

pytestmark = pytest.mark.peers


def test_page_has_every_row() -> None:
    text = table.PAGE.read_text(encoding="utf-8").split("\n## Not compared")[0]
    found = {table.key(x) for x in text.splitlines() if x.startswith("| `")}
    assert found == table.wanted(table.load())


def test_versions_are_those_of_the_page() -> None:
    text = table.PAGE.read_text(encoding="utf-8")
    for peer in {r.peer for r in table.load()}:
        assert f"\n## {peer} {table.version(peer)} (" in text
