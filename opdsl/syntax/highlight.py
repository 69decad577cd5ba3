"""Writes `grammars/opd.tmLanguage.json`, the highlighting of editors, from the keyword list.

Run `python -m opdsl.syntax.highlight` after a change of `keywords.py`; a test compares the file.
A TextMate grammar sees one line at a time, so it colours a keyword only at the start of a
statement: at the start of a line, after `{` or `}`, or after `override`. Elsewhere the same word
is a name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from opdsl import resources
from opdsl.syntax import keywords as k


def _words(words: Iterable[str]) -> str:
    return r"\b(" + "|".join(words) + r")\b"


def textmate() -> dict[str, Any]:
    """The TextMate grammar as plain values."""
    statements = (*k.TOP_KEYWORDS, *k.METHOD_KEYWORDS, "sweep", "return")
    routes = "|".join(k.ROUTES)
    units = "|".join(k.QUANTITY_UNITS)
    patterns = [
        {"name": "comment.line.number-sign.opd", "match": r"#.*$"},
        {"name": "string.quoted.double.opd", "match": r'"[^"\n]*"'},
        {
            "match": rf"(?:^|(?<=[{{}}]))\s*(feedback)\s+({routes})\b",
            "captures": {
                "1": {"name": "keyword.control.section.opd"},
                "2": {"name": "storage.modifier.route.opd"},
            },
        },
        {
            "match": rf"(?:^|(?<=[{{}}]))\s*(?:(override)\s+)?{_words(statements)}(?!\s*[=.(\[])",
            "captures": {
                "1": {"name": "storage.modifier.override.opd"},
                "2": {"name": "keyword.control.section.opd"},
            },
        },
        {
            "match": rf"(?<=:)\s*{_words(k.UNITS + k.KINDS)}((?:\s+per\b[a-z\s]*)?)",
            "captures": {
                "1": {"name": "storage.type.unit.opd"},
                "2": {"name": "storage.type.axis.opd"},
            },
        },
        {
            "name": "constant.numeric.opd",
            "match": rf"(?<![\w.])[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?:[ \t]*(?:{units}))?",
        },
        {"name": "keyword.operator.word.opd", "match": _words(k.JOINERS)},
        {"name": "variable.language.opd", "match": _words(k.BUILT_IN_NAMES)},
        {"name": "support.function.opd", "match": _words(k.BUILT_IN_FUNCTIONS) + r"(?=\s*\()"},
        {"name": "entity.name.function.opd", "match": r"[A-Za-z_\u0370-\u03FF]\w*(?=\s*\()"},
        {"name": "keyword.operator.opd", "match": r"\|\||‖|->|<=|>=|==|!=|[-+*/^<>=≤≥≠]"},
    ]  # fmt: skip
    return {
        "$schema": "https://raw.githubusercontent.com/martinring/tmlanguage/master/tmlanguage.json",
        "name": "opd",
        "scopeName": "source.opd",
        "fileTypes": ["opd"],
        "patterns": patterns,
    }


def text() -> str:
    return json.dumps(textmate(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (resources.grammars() / "opd.tmLanguage.json").write_text(text(), encoding="utf-8")
