"""How the embedded teachers and students are made: data, numbers, stopping rules.

A recipe is a frozen value; its hash is part of the cache key, so changing a number here makes
new models. The numbers are tuned so that the tasks separate methods (see the tests marked
`slow`), not so that any one method looks good.

Students are trained to competence first and then *muddled*: trained on for a while on answers
in which every step uses a random rule. They keep the features of the task and lose the habit,
so a method can only succeed by moving probability, which is what on-policy distillation does.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace

import numpy as np

from opdsl.train.embedded import chain
from opdsl.train.embedded.chain import BOS, DIGIT, EOS, MARK, PAD, ROUTE_A, ROUTE_B, STEP

TEACHER_SHORTCUT = 0.6  # share of the shortcut in the fork teacher's answers


@dataclass(frozen=True)
class Phase:
    """One stretch of supervised training.

    title: for progress lines.  mixture: rules of each step, (name, share) pairs.
    steps: at most that many, `least` at the least; in between, every `check` steps, training
    ends once the accuracy of `measure` is inside `band`. Then `anneal` steps follow in which
    the rate falls linearly to 0. measure: "exact" is the share of wholly right responses
    (teacher-forced), "greedy" the verifier's score of greedy responses.
    lr: peak rate (Adam), warmup in steps, batch in rows, smoothing: label smoothing.
    hint: share of rows whose hint slot holds the answer (recipes with a slot); such rows follow
    the right rules whatever the mixture. shortcut: share of route B (fork only).
    old: share of rows that show the old skill (retain only).
    """

    title: str
    mixture: tuple[tuple[str, float], ...] = (("right", 1.0),)
    steps: int = 600
    least: int = 0
    check: int = 25
    anneal: int = 0
    measure: str = "exact"
    band: tuple[float, float] = (0.97, 1.0)
    lr: float = 4e-3
    warmup: int = 20
    batch: int = 64
    smoothing: float = 0.0
    hint: float = 0.0
    shortcut: float = 0.0
    old: float = 0.0


@dataclass(frozen=True)
class ModelRecipe:
    """One Llama-style model and the phases that train it.

    Two layers and 85,056 parameters at a vocabulary of 44. The short rotary base and the wide
    initial weights are what makes chains learnable within seconds; the short memory of Adam
    (betas) then halves the time, and evens it out between seeds. fork: two routes, and a slot
    for a hint before the start digit; slot: the slot alone.
    """

    role: str
    phases: tuple[Phase, ...]
    n: int = 5
    fork: bool = False
    slot: bool = False
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    mlp: int = 128
    rope_theta: float = 100.0
    initializer_range: float = 0.1
    betas: tuple[float, float] = (0.8, 0.9)
    weight_decay: float = 0.01
    clip: float = 1.0

    @property
    def vocab_size(self) -> int:
        return chain.VOCABULARY_FORK if self.fork else chain.VOCABULARY

    def fingerprint(self) -> str:
        """Hash of every number of the recipe, and of the rules it names."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for name in sorted(chain.RULES):
            digest.update(chain.RULES[name].tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class PairRecipe:
    teacher: ModelRecipe
    student: ModelRecipe


@dataclass(frozen=True)
class Rows:
    """Training rows: tokens [B, L] padded on the right, and the mask [B, L] of the tokens to
    be predicted (the response, end token included)."""

    tokens: np.ndarray
    target: np.ndarray


def rows(generator: np.random.Generator, recipe: ModelRecipe, phase: Phase, count: int) -> Rows:
    """`count` rows of a phase's data."""
    steps_Bn, start_B = chain.draw(generator, count, recipe.n)
    results_Bn = chain.run_mixture(generator, steps_Bn, start_B, phase.mixture)
    first_B = np.full(count, BOS)
    right_Bn = chain.run(steps_Bn, start_B)
    hinted_B = np.full(count, phase.hint >= 1)
    if 0 < phase.hint < 1:
        hinted_B = generator.random(count) < phase.hint
        results_Bn[hinted_B] = right_Bn[hinted_B]
    if phase.old:
        old_B = generator.random(count) < phase.old
        first_B[old_B] = MARK
        results_Bn[old_B] = chain.run(steps_Bn[old_B], start_B[old_B], chain.OLD)
    head = [first_B[:, None], STEP + steps_Bn]
    end_B1 = np.full((count, 1), EOS)
    start_B1 = DIGIT + start_B[:, None]
    answer_B1 = DIGIT + right_Bn[:, -1:]
    if recipe.fork or recipe.slot:
        head.append(np.where(hinted_B[:, None], answer_B1, MARK))
    prompt_BP = np.concatenate([*head, start_B1], 1)
    P = prompt_BP.shape[1]
    if not recipe.fork:
        tokens_BL = np.concatenate([prompt_BP, DIGIT + results_Bn, end_B1], 1)
        target_BL = np.zeros(tokens_BL.shape, dtype=bool)
        target_BL[:, P:] = True
        return Rows(tokens_BL, target_BL)
    route_B1 = np.full((count, 1), ROUTE_A)
    tokens_BL = np.concatenate([prompt_BP, route_B1, start_B1, DIGIT + results_Bn, end_B1], 1)
    target_BL = np.zeros(tokens_BL.shape, dtype=bool)
    target_BL[:, P:] = True
    short_B = generator.random(count) < phase.shortcut
    tokens_BL[short_B, P] = ROUTE_B
    tokens_BL[short_B, P + 1] = answer_B1[short_B, 0]
    tokens_BL[short_B, P + 2] = EOS
    tokens_BL[short_B, P + 3 :] = PAD
    target_BL[short_B, P + 3 :] = False
    return Rows(tokens_BL, target_BL)


# ---- the recipes -----------------------------------------------------------------------

HARD = (("right", 0.15), ("near_miss", 0.48), ("rotated", 0.37))
MILD = (("right", 0.45), ("near_miss", 0.25), ("rotated", 0.30))
WEAK = (("right", 0.72), ("near_miss", 0.15), ("rotated", 0.13))
SOUND = (("right", 0.90), ("near_miss", 0.05), ("rotated", 0.05))


def _muddle(mixture, least: int = 150, until: float = 1.0, **changes) -> Phase:
    """A gentler phase on answers by random rules, until greedy accuracy is at most `until`."""
    return Phase(
        "picking up wrong rules",
        mixture=mixture,
        lr=2e-3,
        least=least,
        steps=400,
        measure="greedy",
        band=(0.0, until),
        **changes,
    )


_LEARN = Phase("learning the chains")
_TEACHER = ModelRecipe("teacher", (replace(_LEARN, anneal=50, smoothing=0.03),))

CHAIN = PairRecipe(_TEACHER, ModelRecipe("student", (_LEARN, _muddle(HARD, until=0.25))))

FLAWED = PairRecipe(
    ModelRecipe(
        "teacher",
        (Phase("learning flawed rules", (("flawed", 1.0),), anneal=50, smoothing=0.03),),
    ),
    ModelRecipe("student", (_LEARN, _muddle(MILD, until=0.6))),
)

RETAIN = PairRecipe(
    _TEACHER,
    ModelRecipe(
        "student",
        (
            Phase("learning two skills", old=0.5, steps=1000),
            _muddle(HARD, until=0.25, old=0.5),
        ),
    ),
)

# The long route alone first: together with the shortcut it takes three times as long to learn.
_FORK_TEACHER = ModelRecipe(
    "teacher",
    (
        Phase("learning the long route", hint=1.0, smoothing=0.01, steps=1000),
        Phase(
            "learning the shortcut",
            hint=1.0,
            shortcut=TEACHER_SHORTCUT,
            smoothing=0.01,
            lr=3e-3,
            least=50,
            steps=300,
            anneal=50,
        ),
    ),
    fork=True,
)


def _fork_student(mixture, least: int) -> ModelRecipe:
    """The muddling phase also shows the shortcut, with the right answer, which the student can
    only guess: arithmetic mod 10 makes even results likely, so a guess is right in 1 of 5."""
    learn = Phase("learning the long route", steps=1000)
    return ModelRecipe("student", (learn, _muddle(mixture, least, shortcut=0.45)), fork=True)


FORK = PairRecipe(_FORK_TEACHER, _fork_student(SOUND, least=100))
FORK_MUDDLED = PairRecipe(_FORK_TEACHER, _fork_student(WEAK, least=150))

# A student that has lost the habit, but not where the answer is shown to it: what it says with
# the hint in its context is worth learning without.
_HINTED = Phase("learning the chains", hint=0.5)
HINTED = PairRecipe(
    ModelRecipe("teacher", (replace(_HINTED, anneal=50, smoothing=0.03),), slot=True),
    ModelRecipe("student", (_HINTED, _muddle(HARD, until=0.25, hint=0.5)), slot=True),
)


def validation(phase: Phase) -> Phase:
    """The phase whose rows an accuracy check uses: the long route, and for the measure
    "greedy" right answers and the new skill only, without a hint where rows may go without."""
    if phase.measure == "exact":
        return replace(phase, shortcut=0.0)
    hint = phase.hint if phase.hint >= 1 else 0.0
    return replace(phase, mixture=(("right", 1.0),), shortcut=0.0, old=0.0, hint=hint)
