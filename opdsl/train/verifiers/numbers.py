"""The number a text ends on, read by a bounded grammar; nothing is evaluated.

Understood: signs, `$`, thousands separators (comma, thin or fixed space, LaTeX's), decimals,
exponents (`1e3`, `3 × 10^5`), percent, simple and mixed fractions (`3/4`, `2 1/2`, `½`,
`\\frac{3}{4}`). A boxed answer, or failing that a line behind `####`, wins over later numbers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Context, Decimal, DivisionByZero, InvalidOperation, Overflow

MAX_DIGITS = 400  # digits of one number; its exponent lies within ±999
MAX_BOX = 1000  # characters of a marked answer
MARKS = 20  # boxes, or lines behind ####, that are looked at, from the end
TOLERANCE = Decimal("1e-6")  # relative, where a side is not a whole number
# Enough digits for exact differences of any two whole numbers that the grammar admits.
_EXACT = Context(prec=2 * MAX_DIGITS + 2000, traps=[InvalidOperation, DivisionByZero, Overflow])

_DIGITS = rf"\d{{1,{MAX_DIGITS}}}"
_UNSIGNED = (
    rf"(?:\d{{1,3}}(?:,\d{{3}}){{1,130}}(?:\.{_DIGITS})?|{_DIGITS}(?:\.{_DIGITS})?|\.{_DIGITS})"
)
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>[-+]?)\$?"
    rf"(?:(?P<whole>\d{{1,9}})[ ](?P<over>\d{{1,9}})/(?P<under>\d{{1,9}})(?![\d/])"
    rf"|(?P<top>{_UNSIGNED})(?!\d)(?:[eE](?P<exp>[-+]?\d{{1,3}}))?"
    rf"(?:[ ]?(?:×|\\times|\\cdot|·|\*)[ ]?10(?:\^|\*\*)\{{?(?P<ten>[-+]?\d{{1,3}})\}}?)?"
    rf"(?:[ ]?/[ ]?(?P<bottom>{_UNSIGNED}))?)"
    rf"(?P<percent>[ ]?(?:%|percent\b))?",
    re.ASCII,
)
_BOX = re.compile(r"\\f?box(?:ed)?\s{0,3}\{")
# Behind the hashes the number comes first: `#### 12 apples`, and no heading `#### Step 3`, `#### 1. …`
_HASHES = re.compile(
    r"####[ \t]{0,20}(?!\d{1,3}[.):][ \t])(?=[-+−$\\.½]{0,3}[\d½f])([^\n]{1,1000})"
)
_FRACTION = re.compile(
    r"\\[dtc]?frac\s?(?:\{\s?([^{}]{1,400})\}\s?\{\s?([^{}]{1,400})\}|(\d)\s?(\d))"
)
_THIN = re.compile(r"(?<=\d)(?:\\[,!;]|\{,\}|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_DROPPED = re.compile(r"\\(?:left|right|displaystyle|quad|qquad|[,!;: ])|\^\{?\\circ\}?|°")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|operatorname)\s?\{([^{}]{0,200})\}")
_VULGAR = {
    chr(c): unicodedata.normalize("NFKC", chr(c)).replace("\u2044", "/")
    for c in (0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F))
}


@dataclass(frozen=True)
class Number:
    """value: percent already divided by 100. whole: written as a whole number. percent: with %."""

    value: Decimal
    whole: bool = False
    percent: bool = False

    def agrees(self, other: Number) -> bool:
        """Whole numbers exactly, others to 1e-6 of `other`; `50%` is 0.5, and also 50 where the
        other side has no percent sign."""
        if _close(self, other):
            return True
        if self.percent == other.percent:
            return False
        plain = [Number(n.value * 100 if n.percent else n.value, n.whole) for n in (self, other)]
        return _close(plain[0], plain[1])


def _close(found: Number, wanted: Number) -> bool:
    apart = abs(_EXACT.subtract(found.value, wanted.value))
    if found.whole and wanted.whole:
        return apart == 0
    return apart <= _EXACT.multiply(abs(wanted.value), TOLERANCE)


def is_number(reference: str) -> bool:
    """Whether a reference is a number and nothing else, or marks one as the answer."""
    plain = re.fullmatch(r"\s*[-+−]?\$?[\d.,/ ]*\d[\d.,]*(?:[eE][-+]?\d+)?\s?%?\s*", reference)
    return bool(plain) or "####" in reference or "\\boxed" in reference


def last_number(text: str) -> Number | None:
    """The number a text ends on, or None. A marked answer that is more than one number (a pair,
    a root, a formula) is none."""
    for marked in (_boxed(text), reversed(_HASHES.findall(text)[-MARKS:])):
        for content in marked:
            if any(c.isdigit() or c in _VULGAR for c in content):
                return _only(content)
    return _last(_plain(text))


def _boxed(text: str) -> Iterator[str]:
    """What stands in the last boxes of a text, braces matched; the last box first."""
    for match in reversed(list(_BOX.finditer(text))[-MARKS:]):
        depth = 1
        for end in range(match.end(), min(len(text), match.end() + MAX_BOX)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                yield text[match.end() : end]
                break


def _only(content: str) -> Number | None:
    """The one number of a marked answer; units, `x =` and words around it do not matter."""
    content = _plain(_DROPPED.sub("", _TEXT.sub(r" \1 ", content)))
    numbers = list(_NUMBER.finditer(content))
    rest = _NUMBER.sub("", content)
    if len(numbers) != 1 or re.search(r"[\\^*+/√π]|\d", rest):
        return None
    return _read(numbers[0])


def _last(text: str) -> Number | None:
    matches = list(_NUMBER.finditer(text))
    return _read(matches[-1]) if matches else None


def _plain(text: str) -> str:
    """One way of writing: minus signs, separators and fractions as in plain ASCII."""
    text = text.replace("−", "-").replace("\\$", "$").replace("\\%", "%")
    if any(c in text for c in _VULGAR):
        for char, written in _VULGAR.items():
            text = re.sub(rf"(?<=\d){char}", f" {written}", text).replace(char, written)
    if "\\" in text or "{,}" in text or not text.isascii():
        text = _THIN.sub(",", text)
    if "frac" in text:
        text = _FRACTION.sub(_slash, text)
    return text


def _slash(match: re.Match) -> str:
    """`\\frac{a}{b}` as `a/b`, apart from a number before it."""
    before = match.string[match.start() - 1 : match.start()]
    top, bottom = match[1] or match[3], match[2] or match[4]
    return f"{' ' if before.isdigit() else ''}{top.strip()}/{bottom.strip()}"


def _read(match: re.Match) -> Number | None:
    """The value of one match of the grammar, or None (a fraction over 0)."""
    try:
        whole = False
        if match["whole"]:
            over, under = Decimal(match["over"]), Decimal(match["under"])
            if over >= under:  # two numbers beside each other, no mixed fraction
                value = over / under
            else:
                value = Decimal(match["whole"]) + over / under
        else:
            value = Decimal(match["top"].replace(",", ""))
            for power in (match["exp"], match["ten"]):
                if power:
                    value = _EXACT.scaleb(value, int(power))
            if match["bottom"]:
                value = _EXACT.divide(value, Decimal(match["bottom"].replace(",", "")))
            whole = not match["bottom"] and value == value.to_integral_value(context=_EXACT)
        if match["percent"]:
            value, whole = _EXACT.divide(value, Decimal(100)), False
    except (InvalidOperation, DivisionByZero, Overflow):
        return None
    return Number(-value if match["sign"] == "-" else value, whole, bool(match["percent"]))
