"""Verifiers: is a response right?

    verifier = get_verifier("numeric")
    verdict = verifier("… so the answer is 1,024.", "1024")     # Verdict(score=1.0)

A verdict is a score in 0..1 or an *error*; an error is never a score of 0, because a broken
verifier would otherwise teach the student that everything is wrong. Model text is data: it is
matched by bounded patterns and parsed by `Decimal`, never evaluated. The verifiers here run in
process because they run nothing that a text could make long; anything that executes a text
belongs in a limited subprocess.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

MAX_TEXT = 100_000  # characters; longer responses are an error, not a long wait
MAX_DIGITS = 400  # digits of one number, exponent included in its value


@dataclass(frozen=True)
class Verdict:
    """score in 0..1, or None with the reason in `error`."""

    score: float | None
    error: str = ""


Verifier = Callable[[str, str], Verdict]

_REGISTRY: dict[str, Verifier] = {}


def register(name: str) -> Callable[[Callable[[str, str], float]], Verifier]:
    """Decorator: register `function(response, reference) -> score` under a name.

    An exception inside becomes an error verdict, and so does a score outside 0..1.
    Raises ValueError if the name is taken.
    """

    def decorate(function: Callable[[str, str], float]) -> Verifier:
        if name in _REGISTRY:
            raise ValueError(f"a verifier named {name!r} is registered already")

        def verifier(response: str, reference: str) -> Verdict:
            if len(response) > MAX_TEXT or len(reference) > MAX_TEXT:
                return Verdict(None, f"text longer than {MAX_TEXT:,} characters")
            try:
                score = float(function(response, reference))
            except Exception as error:  # whatever a verifier raises is its failure, not a 0
                return Verdict(None, f"{type(error).__name__}: {error}")
            if not 0.0 <= score <= 1.0:
                return Verdict(None, f"score {score} is outside 0..1")
            return Verdict(score)

        verifier.__doc__ = function.__doc__
        verifier.__name__ = function.__name__
        _REGISTRY[name] = verifier
        return verifier

    return decorate


def get_verifier(name: str) -> Verifier:
    """The verifier of that name; KeyError lists the names there are."""
    if name not in _REGISTRY:
        raise KeyError(f"no verifier {name!r}; there are: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def names() -> tuple[str, ...]:
    """Names of the registered verifiers, sorted."""
    return tuple(sorted(_REGISTRY))


# ---- the built-in verifiers ------------------------------------------------------------


@register("exact")
def exact(response: str, reference: str) -> float:
    """The response is the reference, character for character, white space at the ends aside."""
    return float(response.strip() == reference.strip())


@register("text")
def text(response: str, reference: str) -> float:
    """The same words: case, punctuation, articles, accents' encoding and spacing set aside."""
    return float(normalise(response) == normalise(reference))


@register("numeric")
def numeric(response: str, reference: str) -> float:
    """The last number of the response equals the reference's last number, relative error 1e-6.

    A boxed answer (`\\boxed{...}`), or failing that a line after `####`, wins over later
    numbers. Understands signs, thousands separators, decimals, exponents, percent signs and
    simple fractions. A response without a number scores 0; a reference without one is an error.
    """
    wanted = last_number(reference)
    if wanted is None:
        raise ValueError(f"the reference {reference[:40]!r} holds no number")
    found = last_number(response)
    if found is None:
        return 0.0
    # Compared as Decimal: 0.1 + 0.2 questions do not arise, and big integers stay exact.
    return float(abs(found - wanted) <= abs(wanted) * Decimal("1e-6"))


_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(string: str) -> str:
    """Lower case, compatibility forms unified, punctuation and articles out, single spaces."""
    string = unicodedata.normalize("NFKC", string).casefold()
    kept = "".join(c if unicodedata.category(c)[0] not in "PSC" else " " for c in string)
    return " ".join(_ARTICLES.sub(" ", kept).split())


_DIGITS = rf"\d{{1,{MAX_DIGITS}}}"
_UNSIGNED = rf"(?:\d{{1,3}}(?:,\d{{3}})+(?:\.{_DIGITS})?|{_DIGITS}(?:\.{_DIGITS})?|\.{_DIGITS})"
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>[-+−]?)\$?(?P<top>{_UNSIGNED})(?!\d)(?:[eE](?P<exp>[-+]?\d{{1,3}}))?"
    rf"(?:\s?/\s?(?P<bottom>{_UNSIGNED}))?(?P<percent>\s?%)?",
    re.ASCII,
)
_BOXED = re.compile(r"\\boxed\s*\{([^{}]{1,200})\}")
_HASHES = re.compile(r"####\s*([^\n]{1,200})")


def last_number(string: str) -> Decimal | None:
    """The number a text ends on, or None; see `numeric` for what counts."""
    for marker in (_BOXED, _HASHES):
        marked = marker.findall(string)
        if marked and (value := _last(marked[-1])) is not None:
            return value
    return _last(string)


def _last(string: str) -> Decimal | None:
    matches = list(_NUMBER.finditer(string))
    if not matches:
        return None
    match = matches[-1]
    try:
        value = Decimal(match["top"].replace(",", ""))
        if match["exp"]:
            value = value.scaleb(int(match["exp"]))
        if match["bottom"]:
            value /= Decimal(match["bottom"].replace(",", ""))
        if match["percent"]:
            value /= 100
    except (InvalidOperation, ZeroDivisionError):
        return None
    return -value if match["sign"] in ("-", "−") else value
