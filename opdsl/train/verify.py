"""Verifiers: is a response right?

    verifier = get_verifier("numeric")
    verdict = verifier("… so the answer is 1,024.", "1024")     # Verdict(score=1.0)

A verdict is a score in 0..1 or an *error*; an error is never a score of 0, because a broken
verifier would otherwise teach the student that everything is wrong. Model text is data: it is
matched by bounded patterns and parsed by `Decimal`, never evaluated. The verifiers here run in
process because they run nothing that a text could make long; all others run in a limited
subprocess (`verifiers`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

MAX_TEXT = 100_000  # characters; longer responses are an error, not a long wait


@dataclass(frozen=True)
class Verdict:
    """score in 0..1, or None with the reason in `error`."""

    score: float | None
    error: str = ""


@dataclass(frozen=True)
class Case:
    """One response to judge. reference: the row's right answer, or None; fields: its text fields."""

    prompt: str
    response: str
    reference: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)


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
    """The last number of the response agrees with the reference's: whole numbers exactly, others
    to a relative error of 1e-6.

    A boxed answer, or failing that a line behind `####`, wins over later numbers; see
    `verifiers.numbers` for what can be read. A response without a number scores 0; a reference
    without one is an error.
    """
    from opdsl.train.verifiers.numbers import last_number

    wanted = last_number(reference)
    if wanted is None:
        raise ValueError(f"the reference {reference[:40]!r} holds no number")
    found = last_number(response)
    return 0.0 if found is None else float(found.agrees(wanted))


_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(string: str) -> str:
    """Lower case, compatibility forms unified, punctuation and articles out, single spaces.

    A sign before a digit, a decimal point and a thousands comma stay: -5 is not 5, 3.5 not 35.
    """
    string = unicodedata.normalize("NFKC", string).casefold().replace("−", "-")
    kept = "".join(
        c if unicodedata.category(c)[0] not in "PSC" or _numeric_sign(string, i) else " "
        for i, c in enumerate(string)
    )
    return " ".join(_ARTICLES.sub(" ", kept).split())


def _numeric_sign(string: str, i: int) -> bool:
    """Whether the mark at `i` belongs to a number."""
    after = string[i + 1 : i + 2].isdigit()
    before = string[i - 1 : i] if i else ""
    if string[i] in ".,":
        return after and before.isdigit()
    return string[i] == "-" and after and not before.isalnum()
