"""HTML by construction: every text is escaped, whatever it holds.

`el("p", text)` escapes `text`; only what `el` itself made (`Html`) is put in as it is. Model text,
prompts, names and messages are data and can never become markup. There is no way to make an
`Html` from a string elsewhere than `trusted`, whose callers are the style sheet, the script and
the printer of formulas.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

VOID = frozenset({"meta", "br", "hr", "line", "rect", "circle", "path", "polyline", "mspace"})
_SVG_VOID = frozenset({"line", "rect", "circle", "path", "polyline", "mspace"})


class Html(str):
    """Markup that is known to be well formed."""


def text(value: Any) -> Html:
    """A value as text. Control characters, which HTML forbids, become U+FFFD."""
    if isinstance(value, Html):
        return value
    clean = "".join(c if c >= " " or c in "\n\t" else "\ufffd" for c in str(value))
    clean = clean.encode("utf-8", "replace").decode("utf-8")  # lone surrogates
    return Html(escape(clean, quote=True))


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """An element. `class_` is `class`, underscores inside names become hyphens; None is left out."""
    parts = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        name = {"viewbox": "viewBox", "preserveaspectratio": "preserveAspectRatio"}.get(name, name)
        parts.append(f" {name}" if value is True else f' {name}="{text(value)}"')
    opening = f"<{tag}{''.join(parts)}"
    if tag in VOID:
        return Html(opening + ("/>" if tag in _SVG_VOID else ">"))
    return Html(f"{opening}>{joined(children)}</{tag}>")


def joined(children: Iterable[Any], between: str = "") -> Html:
    """Several pieces, one behind the other; None and "" are left out."""
    flat: list[Html] = []
    for child in children:
        if isinstance(child, (list, tuple)):
            flat.append(joined(child))
        elif child is not None and child != "":
            flat.append(text(child))
    return Html(str(text(between)).join(flat))


def trusted(markup: str) -> Html:
    """Markup made by this package from its own files or by its own printers."""
    return Html(markup)


def table(
    head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str = "", class_: str | None = None
) -> Html:
    """A table with a heading per column; the first cell of a row heads the row."""
    body = [
        el("tr", *(el("th" if i == 0 else "td", c, scope="row" if i == 0 else None)
                   for i, c in enumerate(row)))
        for row in rows
    ]  # fmt: skip
    parts = [el("caption", caption)] if caption else []
    if any(head):
        parts.append(el("thead", el("tr", *(el("th", h, scope="col") for h in head))))
    parts.append(el("tbody", *body))
    return el("div", el("table", *parts, class_=class_), class_="scroll", tabindex="0")


def embedded_json(value: Any) -> Html:
    """JSON that may stand inside a script element: no `<` can close it."""
    raw = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Html(raw.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def number(value: Any, digits: int = 4) -> str:
    """A figure for people: four significant digits, shares and counts as they are."""
    if value is None:
        return "–"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value != value:
        return "not a number"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if abs(value) >= 1e5 or abs(value) < 1e-4:
        return f"{value:.3g}"
    return f"{value:.{digits}g}"
