"""The language of the embedded suite: modular-arithmetic chains, their rules and streams.

A prompt is `bos, step_1 … step_n, start digit`; a step is one token holding an operator and
a digit. The response shows the running results mod 10, then `eos`:

    *9 -2 +4 | 7   →   3 1 5          (9*7 = 63 → 3;  3-2 = 1;  1+4 = 5)

The start digit comes last, so that everything the next result needs (the previous result and
the step to apply) sits at one constant relative distance. With that layout a two-layer model
learns the task in seconds; with the start digit first it does not. Any digit is a legal
running result, so a teacher is competent on every prefix a student can write.

A *rule* is a table [30 steps, 10 digits] → digit. `RIGHT` is arithmetic; the others are the
systematic mistakes that weak students and flawed teachers are made of.

Every random choice of the suite comes from `stream(...)`, a generator that is a pure function
of its labels: nothing has a position that a resumed run would have to restore.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

# Token ids. MARK is the spare marker: "no hint" in `fork`, "old rules" in `retain`.
PAD, BOS, EOS, MARK = 0, 1, 2, 3
DIGIT = 4  # ids 4..13 are the digits 0..9
STEP = 14  # ids 14..43 are the steps: STEP + 10 * operator + digit
OPERATORS = "+-*"
ROUTE_A, ROUTE_B = 44, 45  # `fork` only: show the work / answer at once
VOCABULARY = 44
VOCABULARY_FORK = 46
SPECIAL_IDS = frozenset({PAD, BOS, EOS, MARK})


def stream(*labels: object) -> np.random.Generator:
    """A generator that is a pure function of its labels, e.g. `stream("chain", seed, step)`.

    Philox keyed by 128 bits of SHA-256 over the labels; streams with different labels are
    independent for every practical purpose.
    """
    digest = hashlib.sha256("|".join(map(str, labels)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _table(function) -> np.ndarray:
    """Rule table [30, 10] of `function(operator, digit, running result)`, taken mod 10."""
    return np.array(
        [[function(op, d, r) % 10 for r in range(10)] for op in OPERATORS for d in range(10)],
        dtype=np.int64,
    )


def _arithmetic(op: str, d: int, r: int) -> int:
    return r + d if op == "+" else r - d if op == "-" else r * d


RIGHT = _table(_arithmetic)
NEAR_MISS = _table(lambda op, d, r: _arithmetic(op, d, r) + 1)
# Operators mistaken for one another: + read as -, - as *, * as +.
ROTATED = _table(lambda op, d, r: _arithmetic({"+": "-", "-": "*", "*": "+"}[op], d, r))
# A teacher that never learned the upper end of the multiplication table.
FLAWED = _table(lambda op, d, r: _arithmetic(op, d, r) + (3 if op == "*" and d >= 7 else 0))
# The rules `retain` calls the old skill: right in their own context, and the very habit that
# learning the new skill has to break.
OLD = _table(lambda op, d, r: _arithmetic(op, d, r) + 1)

RULES = {
    "right": RIGHT,
    "near_miss": NEAR_MISS,
    "rotated": ROTATED,
    "flawed": FLAWED,
    "old": OLD,
}


def draw(generator: np.random.Generator, count: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` random problems: steps [count, n] in 0..29 and start digits [count] in 0..9."""
    steps_Bn = generator.integers(0, 30, size=(count, n))
    start_B = generator.integers(0, 10, size=count)
    return steps_Bn, start_B


def run(steps_Bn: np.ndarray, start_B: np.ndarray, rule: np.ndarray = RIGHT) -> np.ndarray:
    """Running results [B, n] of each problem under one rule table."""
    result_B = start_B
    results = []
    for i in range(steps_Bn.shape[1]):
        result_B = rule[steps_Bn[:, i], result_B]
        results.append(result_B)
    return np.stack(results, 1)


def run_mixture(
    generator: np.random.Generator,
    steps_Bn: np.ndarray,
    start_B: np.ndarray,
    mixture: Sequence[tuple[str, float]],
) -> np.ndarray:
    """Running results [B, n] where every single step draws its rule from `mixture`.

    `mixture` holds (rule name, probability) pairs; the probabilities sum to 1. A wrong result
    is carried on, as in a student's own writing.
    """
    names = [name for name, _ in mixture]
    bounds = np.cumsum([share for _, share in mixture])
    tables = np.stack([RULES[name] for name in names])
    choice_Bn = np.searchsorted(bounds, generator.random(steps_Bn.shape), side="right")
    choice_Bn = np.minimum(choice_Bn, len(names) - 1)
    result_B = start_B
    results = []
    for i in range(steps_Bn.shape[1]):
        result_B = tables[choice_Bn[:, i], steps_Bn[:, i], result_B]
        results.append(result_B)
    return np.stack(results, 1)


def text(ids: Sequence[int]) -> str:
    """A readable line for token ids: `*9 -2 +4 | 7`, or `3 1 5` for a response.

    Padding, bos and eos are left out; the bar separates the steps from what follows. Unknown
    ids are shown as `<id>` rather than refused: a student may write anything.
    """
    words: list[str] = []
    previous_was_step = False
    for i in map(int, ids):
        if i in (PAD, BOS, EOS):
            continue
        is_step = STEP <= i < STEP + 30
        if previous_was_step and not is_step:
            words.append("|")
        if is_step:
            words.append(OPERATORS[(i - STEP) // 10] + str((i - STEP) % 10))
        elif DIGIT <= i < DIGIT + 10:
            words.append(str(i - DIGIT))
        else:
            words.append({MARK: "~", ROUTE_A: "A", ROUTE_B: "B"}.get(i, f"<{i}>"))
        previous_was_step = is_step
    return " ".join(words)
