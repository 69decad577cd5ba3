"""Mistakes to plant in a spec that works: each a line of its own, with the code it must give.

`planted` puts some of them between the statements of a method and says where they ended up.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from opdsl.syntax import keywords


@dataclass(frozen=True)
class Plant:
    """A wrong statement. `gone` is a keyword instead: the section is taken out."""

    kind: str  # syntax | name | unit | section | bias
    code: str
    line: str = ""
    gone: str = ""


PLANTS = (
    Plant("syntax", "OPD001", "suport  full"),
    Plant("syntax", "OPD001", "wieght  early(3)"),
    Plant("syntax", "OPD004", "gate"),
    Plant("syntax", "OPD004", "gate early(3) early(4)"),
    Plant("syntax", "OPD004", "let half 0.5"),
    Plant("syntax", "OPD004", "accept immediate_credit"),
    Plant("syntax", "OPD003", "weight exp(-entropy(student)"),
    Plant("syntax", "OPD005", "gate position − 3 > 0"),
    Plant("syntax", "OPD006", 'cite arxiv "2306.13649'),
    Plant("syntax", "OPD007", "gate 0 < position < 9"),
    Plant("syntax", "OPD012", "weight 1e999"),
    Plant("syntax", "OPD013", "gate early(3))"),
    Plant("syntax", "OPD014", "feedback KL(student || initial)"),
    Plant("syntax", "OPD015", "weight 2 ** 3"),
    Plant("name", "OPD101", "gate nowhere(student)"),
    Plant("name", "OPD101", "weight position + nothing"),
    Plant("name", "OPD102", "let step = 1"),
    Plant("name", "OPD104", "weight overlap(student, initial, kk = 4)"),
    Plant("name", "OPD105", "weight overlap(student)"),
    Plant("name", "OPD110", "param planted : real in [0, 1] = 2"),
    Plant("name", "OPD117", 'accept nothing_like_it "a slip"'),
    Plant("name", "OPD119", "optimize { lrate = 1e-6 }"),
    Plant("name", "OPD120", "gate nobody: early(3)"),
    Plant("unit", "OPD204", "weight entropy(student) + student[y]"),
    Plant("unit", "OPD205", "gate entropy(student)"),
    Plant("unit", "OPD206", "gate 2 * student[y]"),
    Plant("unit", "OPD207", "weight 0 - student[y]"),
    Plant("unit", "OPD202", "weight student"),
    Plant("section", "OPD303", gone="aggregate"),
    Plant("section", "OPD303", gone="state"),
    Plant("section", "OPD304", "aggregate mean(over = tokens)"),
)
BIAS = (
    Plant("bias", "OPD512", "gate passed()"),
    Plant("bias", "OPD513", "gate student[y] > T[y]"),
    Plant("bias", "OPD515", "regularize 0.01 * KL(student || initial)"),
    Plant("bias", "OPD518", "gate entropy(student) > quantile(entropy(student), 0.5)"),
    Plant("bias", "OPD523", "regularize 0.1 * sft(data = golden)"),
)


def places(lines: list[str]) -> list[int]:
    """Indices of the lines before which a statement of the last method may stand."""
    first = max(i for i, line in enumerate(lines) if line.startswith("method"))
    last = next(i for i in range(first, len(lines)) if lines[i].startswith("}"))
    found = []
    for i in range(first + 1, last + 1):
        word = re.match(r"  ([a-z]+)\b", lines[i])
        if i == last or (word and word.group(1) in keywords.METHOD_KEYWORDS):
            found.append(i)
    return found


def without(lines: list[str], keyword: str) -> list[str] | None:
    """The lines without a section that stands on one line; None where there is no such."""
    stands = [i for i in places(lines) if lines[i].split()[:1] == [keyword]]
    if len(stands) != 1 or lines[stands[0]].count("(") != lines[stands[0]].count(")"):
        return None
    return lines[: stands[0]] + lines[stands[0] + 1 :]


def planted(
    r: random.Random, text: str, plants: list[Plant]
) -> tuple[str, list[tuple[str, int]]] | None:
    """The text with the mistakes, and the (code, line) of each; None where they do not fit."""
    lines = text.splitlines()
    if not any(line.startswith("method") for line in lines):
        return None
    own = {p.line.split()[0] for p in plants if p.line}
    if own & {p.gone for p in plants}:
        return None
    if ("optimize" in own and "optimize" in text) or (
        own & {"optimize", "aggregate"} and " extends " in text  # inherited: another code
    ):
        return None
    for plant in plants:
        if plant.gone:
            shorter = without(lines, plant.gone)
            if shorter is None:
                return None
            lines = shorter
    inserted = [(r.choice(places(lines)), p) for p in plants if not p.gone]
    for at, plant in sorted(inserted, key=lambda x: -x[0]):
        lines.insert(at, f"  {plant.line}")
    head = max(i for i, line in enumerate(lines) if line.startswith("method"))
    wanted = [(p.code, head + 1) for p in plants if p.gone]
    last = max((i for i, line in enumerate(lines) if line.split()[:1] == ["aggregate"]),
               default=0)  # fmt: skip
    for _, plant in inserted:
        at = lines.index(f"  {plant.line}")
        wanted.append((plant.code, (last if plant.code == "OPD304" else at) + 1))
    return "\n".join(lines) + "\n", sorted(wanted)


def _misspelt(line: str) -> str:
    word = line.split()[0]
    return line.replace(word, word[:2] + word[3:] if len(word) > 4 else word + word[-1], 1)


DAMAGE = {  # of a statement that is there: code -> the damaged line
    "OPD001": _misspelt,
    "OPD003": lambda line: line.rstrip()[:-1],
    "OPD005": lambda line: line.rstrip() + " €",
    "OPD006": lambda line: line.rstrip() + ' "',
    "OPD013": lambda line: line.rstrip() + ")",
    "OPD015": lambda line: line.rstrip() + " ;",
}


def damaged(r: random.Random, text: str, count: int) -> tuple[str, list[tuple[str, int]]]:
    """The text with up to `count` of its own statements made unreadable, and where."""
    lines = text.splitlines()
    whole = []  # statements on one line
    found = places(lines) if any(line.startswith("method") for line in lines) else []
    for i in found[:-1]:
        code = lines[i].split("#")[0]
        if code.count("(") == code.count(")") and "{" not in code and (i + 1) in found:
            whole.append(i)
    wanted = []
    for i in r.sample(whole, min(count, len(whole))):
        code = lines[i].split("#")[0]
        kinds = [k for k in DAMAGE if k != "OPD003" or code.rstrip().endswith(")")]
        kinds = [k for k in kinds if k != "OPD001" or code.split()[0] not in ("allow", "let")]
        kind = r.choice(kinds)
        lines[i] = DAMAGE[kind](code)
        wanted.append((kind, i + 1))
    return "\n".join(lines) + "\n", sorted(wanted)
