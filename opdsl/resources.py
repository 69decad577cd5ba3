"""Finding `grammars/` and `specs/`: inside the package in a wheel, beside it in a checkout.

A wheel carries them as `opdsl/grammars` and `opdsl/specs`; an editable install and a checkout
have them next to the package folder. Nothing else in opdsl knows where they are.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


@cache
def folder(name: str) -> Path:
    """The folder `grammars` or `specs`. Raises FileNotFoundError naming both places tried."""
    tried = (_PACKAGE / name, _PACKAGE.parent / name)
    for place in tried:
        if place.is_dir():
            return place
    places = " and ".join(str(place) for place in tried)
    raise FileNotFoundError(f"opdsl cannot find its folder `{name}`: looked in {places}")


def is_file(place: Path) -> bool:
    """Whether a regular file is there; False for what no file system can hold."""
    try:
        return place.is_file()
    except (OSError, ValueError):  # a name too long, a NUL
        return False


def is_folder(place: Path) -> bool:
    try:
        return place.is_dir()
    except (OSError, ValueError):
        return False


def resolved(place: Path) -> Path:
    """The path without links; as it stands where they lead nowhere (a loop, a NUL)."""
    try:
        return place.resolve()
    except (OSError, RuntimeError, ValueError):
        return place


def here() -> Path:
    """The working folder; the root where it has been deleted."""
    try:
        return Path.cwd().resolve()
    except OSError:
        return Path("/")


def grammars() -> Path:
    return folder("grammars")


def specs() -> Path:
    return folder("specs")


def methods(failures: bool = False) -> list[Path]:
    """The shipped methods; `failures` adds the gallery of known mistakes. The standard library
    and the recipes hold definitions, not methods."""
    apart = {"std", "recipes"} | (set() if failures else {"failures"})
    return sorted(p for p in specs().glob("**/*.opd") if p.parent.name not in apart)


def grammar_text() -> str:
    """The text of `opd.lark`."""
    return (grammars() / "opd.lark").read_text(encoding="utf-8")


def page(code: str) -> str | None:
    """The lesson of a diagnostic code in Markdown, or None when none is written."""
    place = _PACKAGE / "pages" / f"{code}.md"
    return place.read_text(encoding="utf-8") if place.is_file() else None
