"""A deterministic stream of inputs for the compiler: `draw(seed)` is always the same text.

Well-formed specs of `generate`, damaged copies of every spec, library file, example and bad file
of the repository, and texts from the grammar. What is large or deep on purpose: `extremes.py`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from opdsl.codes import CODES
from opdsl.source import Source
from opdsl.syntax import keywords, tokens
from support import phrases
from support.generate import spec

ROOT = Path(__file__).parent.parent.parent
PLACE = ROOT / "specs" / "fuzz.opd"


@dataclass(frozen=True)
class Input:
    """One text and how it came about."""

    kind: str
    text: str
    folder: Path = ROOT / "specs"  # imports are found from here

    @property
    def source(self) -> Source:
        return Source("fuzz.opd", self.text, str(self.folder / "fuzz.opd"))


@cache
def corpus() -> tuple[tuple[str, str], ...]:
    """(name, text) of every file of the language in the repository."""
    folders = (ROOT / "specs", ROOT / "examples", ROOT / "tests" / "bad", ROOT / "tests" / "good")
    paths = [p for folder in folders for p in sorted(folder.rglob("*.opd"))]
    return tuple((str(p.relative_to(ROOT)), p.read_text(encoding="utf-8")) for p in paths)


@cache
def shipped() -> tuple[tuple[str, str], ...]:
    return tuple((n, t) for n, t in corpus() if n.startswith(("specs", "examples")))


# ---- pieces of a text --------------------------------------------------------------------


def pieces(text: str) -> list[tuple[int, int, str]]:
    """(start, end, kind) of every token."""
    return [(t.start, t.end, t.kind) for t in tokens.scan(Source("piece", text))[0]]


def cut(text: str, start: int, end: int, new: str) -> str:
    return text[:start] + new + text[end:]


def statements(text: str) -> list[str]:
    """The text in parts that begin at each line with a keyword; joined they are the text."""
    parts = [""]
    for line in text.splitlines(True):
        word = line.split(None, 1)[0] if line.strip() else ""
        if word in keywords.ALL_KEYWORDS and parts[-1]:
            parts.append("")
        parts[-1] += line
    return parts


def blocks(text: str) -> list[str]:
    """The text in parts that begin at each item at the left margin."""
    parts = [""]
    for line in text.splitlines(True):
        if line.startswith(("method", "def", "run", "import")) and parts[-1]:
            parts.append("")
        parts[-1] += line
    return parts


def shuffled(r: random.Random, parts: list[str]) -> str:
    """Parts with one deleted, doubled, moved or swapped."""
    parts = list(parts)
    i, j = r.randrange(len(parts)), r.randrange(len(parts))
    match r.randrange(4):
        case 0:
            del parts[i]
        case 1:
            parts.insert(j, parts[i])
        case 2:
            parts[i], parts[j] = parts[j], parts[i]
        case _:
            parts.insert(j, parts.pop(i))
    return "".join(parts)


# ---- mutations: text to text -------------------------------------------------------------

Mutation = Callable[[random.Random, str], str]


def token_lost(r: random.Random, text: str) -> str:
    start, end, _ = r.choice(pieces(text) or [(0, 0, "")])
    return cut(text, start, end, r.choice(("", text[start:end] + " " + text[start:end])))


def tokens_swapped(r: random.Random, text: str) -> str:
    found = pieces(text)
    if len(found) < 2:
        return text
    i = r.randrange(len(found) - 1)
    j = min(len(found) - 1, i + r.choice((1, 1, 2, 5)))
    (a, b, _), (c, d, _) = found[i], found[j]
    return text if c < b else text[:a] + text[c:d] + text[b:c] + text[a:b] + text[d:]


def token_replaced(r: random.Random, text: str) -> str:
    """A token becomes another one of its kind, or of any."""
    start, end, kind = r.choice(pieces(text) or [(0, 0, "")])
    word = text[start:end]
    if kind == "number":
        new = r.choice((*phrases.NUMBERS, *phrases.WRONG, "linear(1 -> 0 over 10 steps)"))
    elif word in keywords.ALL_KEYWORDS:
        new = r.choice(keywords.ALL_KEYWORDS)
    elif word in keywords.UNITS + keywords.AXES:
        new = r.choice((*keywords.UNITS, *keywords.AXES, *keywords.KINDS))
    elif kind == "word":
        new = r.choice(phrases.FUNCTIONS if text[end : end + 1] == "(" else phrases.NAMES)
    elif kind == "string":
        new = r.choice(('""', '"' + "long " * 2000 + '"', '"\t\u202e"', '"%s{0}\\n"', "'a'", '"'))
    elif kind == "op" and word not in "()[]{}":
        new = r.choice(phrases.OPERATORS)
    else:
        new = r.choice(("(", ")", "[", "]", "{", "}", ""))
    if r.random() < 0.1:
        new = r.choice((*phrases.WRONG, *phrases.OPERATORS, *keywords.ALL_KEYWORDS))
    return cut(text, start, end, new)


def value_replaced(r: random.Random, text: str) -> str:
    """What a pair of brackets holds, or an operand, becomes another expression."""
    found = pieces(text)
    openers = [i for i, (a, _, _) in enumerate(found) if text[a] in "(["]
    new = phrases.expression(r, 2)
    if openers and r.random() < 0.5:
        depth, i = 0, r.choice(openers)
        for a, _, _ in found[i:]:
            depth += (text[a] in "([{") - (text[a] in ")]}")
            if depth == 0:
                return cut(text, found[i][1], a, new)
    operands = [(a, b) for a, b, kind in found if kind in ("word", "number")]
    return cut(text, *r.choice(operands), new) if operands else text


def statement_added(r: random.Random, text: str) -> str:
    parts = statements(text)
    new = r.choice((phrases.statement, lambda r: phrases.definition(r, r.choice("fgh"))))(r)
    parts.insert(r.randrange(len(parts) + 1), f"  {new}\n")
    return "".join(parts)


def value_of_a_section(r: random.Random, text: str) -> str:
    """A statement is replaced by another one with the same keyword."""
    parts = statements(text)
    i = r.randrange(len(parts))
    word = parts[i].split(None, 1)[0] if parts[i].strip() else ""
    for _ in range(60):
        new = phrases.statement(r)
        if new.split(None, 1)[0] == word:
            parts[i] = f"  {new}\n"
            break
    return "".join(parts)


def section_borrowed(r: random.Random, text: str) -> str:
    """A section is replaced by one of another generated method: often well-formed still."""
    parts, theirs = statements(text), statements(spec(r.randrange(10**6)).text)
    i = r.randrange(len(parts))
    word = parts[i].split(None, 1)[0] if parts[i].strip() else ""
    fitting = [part for part in theirs if part.split(None, 1)[:1] == [word]]
    return "".join([*parts[:i], r.choice(fitting), *parts[i + 1 :]]) if fitting else text


ALLOWS = "".join(
    f'  allow {row.slug} "fuzz"\n' for row in CODES.values() if row.code[3] in "35" or row.rule
)


def allowed(r: random.Random, text: str) -> str:
    """Every finding that can be accepted is, so that more texts reach the later passes."""
    return re.sub(r"(method[^{]*\{[^\n]*\n)", lambda m: m.group() + ALLOWS, text, count=1)


STRANGE = (
    "\0", "\ufeff", "\u202e", "\u200b", "日本", "e\u0301", "\U0001f600", "\ue000", "\ud800", "\x1b[2J",
    "\r", "\f", "\v", "\u2028", "\u00a0", "λ_0", "π", "−", "“a”", "\t\t", "£", "\x7f", "﷽", "ß",
)  # fmt: skip


def characters(r: random.Random, text: str) -> str:
    """Bytes deleted, doubled or inserted anywhere."""
    for _ in range(r.randrange(1, 4)):
        at = r.randrange(len(text) + 1)
        stop = min(len(text), at + r.choice((0, 0, 1, 3, 30)))
        new = r.choice(("", text[at:stop] * 2, r.choice(STRANGE), chr(r.randrange(32, 127))))
        text = cut(text, at, stop, new)
    return text


def lines_changed(r: random.Random, text: str) -> str:
    return shuffled(r, text.splitlines(True) or [""])


def sections_changed(r: random.Random, text: str) -> str:
    return shuffled(r, statements(text))


def blocks_changed(r: random.Random, text: str) -> str:
    return shuffled(r, blocks(text))


def spliced(r: random.Random, text: str) -> str:
    """The beginning of this text and the end of another, or sections of both."""
    other = r.choice(shipped())[1]
    if r.random() < 0.4:
        return text[: r.randrange(len(text) + 1)] + other[r.randrange(len(other)) :]
    mine, theirs = statements(text), statements(other)
    i = r.randrange(len(mine))
    return "".join([*mine[:i], *r.sample(theirs, min(3, len(theirs))), *mine[i:]])


def brackets(r: random.Random, text: str) -> str:
    at = r.randrange(len(text) + 1)
    new = "".join(r.choice("()[]{}") for _ in range(r.randrange(1, 5)))
    return cut(text, at, at, new)


def layout(r: random.Random, text: str) -> str:
    """Line ends, tabs, a byte order mark, one long line, one very long comment, name or text."""
    place = r.randrange(len(text) + 1)
    match r.randrange(8):
        case 0:
            return text.replace("\n", "\r\n")
        case 1:
            return text.replace("  ", "\t")
        case 2:
            return "\ufeff" + text
        case 3:
            return " ".join(line.split("#")[0].strip() for line in text.splitlines())
        case 4:
            return cut(text, place, place, "# " + "comment " * r.choice((10, 9000)) + "\n")
        case 5:
            return cut(text, place, place, " " + "x" * r.choice((300, 60_000)) + " ")
        case 6:
            return cut(text, place, place, " " * 50_000)
        case _:
            return text.replace("\n", "\r")


def renamed(r: random.Random, text: str) -> str:
    """One name becomes another everywhere: built in, in use, or new."""
    names = sorted({text[a:b] for a, b, kind in pieces(text) if kind == "word"})
    if not names:
        return text
    old, new = r.choice(names), r.choice((*names, *phrases.NAMES, *phrases.FUNCTIONS, "λ"))
    out, last = [], 0
    for a, b, _ in pieces(text):
        out += [text[last:a], new if text[a:b] == old else text[a:b]]
        last = b
    return "".join([*out, text[last:]])


def number_changed(r: random.Random, text: str) -> str:
    numbers = [(a, b) for a, b, kind in pieces(text) if kind == "number"]
    new = r.choice((*phrases.NUMBERS, *phrases.NUMBERS, "linear(1 -> 0 over 10 steps)", "-1"))
    return cut(text, *r.choice(numbers), new) if numbers else text


GENTLE: tuple[Mutation, ...] = (  # the parser accepts the result
    section_borrowed, section_borrowed, value_of_a_section, statement_added, number_changed,
    value_replaced, renamed,
)  # fmt: skip
ROUGH: tuple[Mutation, ...] = (
    token_lost, tokens_swapped, token_replaced, token_replaced, characters, lines_changed,
    sections_changed, blocks_changed, spliced, brackets, layout,
)  # fmt: skip


def mutated(r: random.Random, text: str) -> tuple[str, str]:
    """A text after one to three mutations, and their names."""
    names = []
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        change = r.choice(GENTLE if r.random() < 0.6 else ROUGH)
        names.append(change.__name__)
        text = change(r, text)
    if r.random() < 0.5:
        names.append("allowed")
        text = allowed(r, text)
    return "+".join(names), text


# ---- the stream --------------------------------------------------------------------------


def draw(seed: int) -> Input:
    """The input of a seed."""
    r = random.Random(f"opdsl {seed}")
    kind = r.randrange(20)
    if kind < 10:
        name, text = r.choice(shipped() if kind < 8 else corpus())
        how, text = mutated(r, text)
        return Input(f"{name}: {how}", text, (ROOT / name).parent)
    if kind < 12:
        return Input("generated", allowed(r, spec(r.randrange(10**6)).text))
    if kind < 15:
        how, text = mutated(r, spec(r.randrange(10**6)).text)
        return Input(f"generated: {how}", text)
    if kind < 18:
        return Input("statements", allowed(r, phrases.method(r)))
    if kind < 19:
        return Input("grammar", phrases.derive(r))
    words = [*keywords.ALL_KEYWORDS, *phrases.NAMES, *phrases.WRONG, *phrases.OPERATORS, *STRANGE]
    words += [*"()[]{}", "\n", "\n  ", '"s"', "# c\n"]
    return Input("words", "opd 1\n" + " ".join(r.choices(words, k=r.randrange(80))))


def stream(start: int, stop: int) -> Iterator[tuple[int, Input]]:
    for seed in range(start, stop):
        yield seed, draw(seed)
