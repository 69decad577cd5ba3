"""The tasks of the embedded suite: prompts, verifiers, data, and which models belong to them.

    chain          fresh prompts, a student that is wrong in systematic ways
    fork           the teacher sees a hint and likes a shortcut the student cannot take
    fork_muddled   the same with a weaker student
    flawed         a teacher that never learned *7, *8, *9
    retain         a student with an old skill the teacher has never seen
    scarce         16 training prompts
    hinted         a student that is right where its context shows the answer

All are families of modular-arithmetic chains (see `chain`). Streams are pure functions of
(seed, stream name, step); prompts for training never contain a held-out problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from opdsl.train.embedded import chain, recipes
from opdsl.train.embedded.chain import BOS, DIGIT, EOS, MARK, PAD, ROUTE_A, ROUTE_B, STEP

HELD_OUT = 1000  # problems in every held-out set


@dataclass(frozen=True)
class Prompt:
    """One problem.

    ids: what the student is conditioned on
    teacher_ids: what the teacher is conditioned on; other than `ids` only in the fork tasks
    hinted: what a reader with a privileged context is conditioned on, where the task has one
    answer: the right last result, 0..9
    golden: a right response, end token included (from `data_batch`: the data set's response)
    fields: what a spec can ask for as `prompt.NAME`
    """

    ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    answer: int
    golden: tuple[int, ...]
    fields: dict[str, str]
    hinted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Task:
    """One task; every method is a pure function of its arguments.

    n: steps of a problem.  fork: the response starts with a route token, the prompt has a slot
    for the hint.  slot: the slot without routes, shown to readers with a context only.  few:
    number of training prompts, None for fresh ones.  old_skill: the student masters a second set
    of rules, announced by the first token.  data_rule: the rule the data set was written by (the
    teacher's).
    """

    name: str
    title: str
    pair: recipes.PairRecipe
    n: int = 5
    fork: bool = False
    slot: bool = False
    few: int | None = None
    old_skill: bool = False
    data_rule: str = "right"

    pad = PAD
    bos = BOS
    eos = EOS
    special_ids = chain.SPECIAL_IDS

    @property
    def vocab_size(self) -> int:
        return chain.VOCABULARY_FORK if self.fork else chain.VOCABULARY

    @property
    def hints(self) -> bool:
        """Whether a reader with a context sees more than the plain prompt."""
        return self.fork or self.slot

    @property
    def max_new_tokens(self) -> int:
        """Room for the longest right response, end token included."""
        return self.n + (3 if self.fork else 1)

    # ---- streams -----------------------------------------------------------------------

    def prompts(self, seed: int, step: int, n: int) -> list[Prompt]:
        """The `n` training prompts of one step."""
        generator = chain.stream("opd prompts", self._problems, seed, step)
        if self.few is not None:
            return self._few(generator, n)
        return self._problem_prompts(*self._fresh(generator, n))

    def held_out(self) -> list[Prompt]:
        """The 1,000 held-out prompts, the same for every seed."""
        return self._problem_prompts(*self._held_out)

    def extra_eval(self) -> dict[str, list[Prompt]]:
        """Further held-out sets by title; `retain` has its old skill, the others none."""
        if not self.old_skill:
            return {}
        return {"old skill": self._problem_prompts(*self._held_out, rule="old")}

    def golden_batch(self, seed: int, step: int, n: int) -> list[Prompt]:
        """Right answers for `sft(data = golden)`: replay of the old skill in `retain`,
        elsewhere right answers to training prompts, from a stream of their own."""
        generator = chain.stream("golden", self._problems, seed, step)
        if self.old_skill:
            return self._problem_prompts(*self._fresh(generator, n), rule="old")
        if self.few is not None:
            return self._few(generator, n)
        return self._problem_prompts(*self._fresh(generator, n))

    def data_batch(self, seed: int, step: int, n: int) -> list[Prompt]:
        """Prompts whose `golden` is the response of a fixed data set, for `sequences(data)`.

        The data set is written as the teacher would: by its rule, and in the fork tasks with
        its preference for the shortcut. `scarce` has one fixed answer for each of 16 prompts.
        """
        generator = chain.stream("data", self._problems, seed, step)
        if self.few is not None:
            return self._few(generator, n)
        steps, start = self._fresh(generator, n)
        shortcut = generator.random(n) < recipes.TEACHER_SHORTCUT if self.fork else None
        return self._problem_prompts(steps, start, shown_rule=self.data_rule, shortcut=shortcut)

    def hinted(self, prompt: Prompt, wrong: int = 0) -> tuple[int, ...]:
        """The prompt for a reader with a privileged context: with the answer in the slot, or
        with the digit `wrong` places after it; the plain prompt where the task has no slot."""
        ids = prompt.hinted or prompt.teacher_ids
        if not (wrong and self.hints):
            return ids
        return (*ids[:-2], DIGIT + (prompt.answer + wrong) % 10, ids[-1])

    # ---- answers -----------------------------------------------------------------------

    def verify(self, prompt: Prompt, response: Sequence[int]) -> float:
        """1.0 if the response ends and its last result is right, else 0.0."""
        response = [int(i) for i in response]
        if EOS not in response:
            return 0.0
        end = response.index(EOS)
        return float(end > 0 and response[end - 1] == DIGIT + prompt.answer)

    def decode_text(self, ids: Sequence[int]) -> str:
        """A readable line, e.g. `*9 -2 +4 | 7` for a prompt and `3 1 5` for a response."""
        return chain.text(ids)

    # ---- inside ------------------------------------------------------------------------

    @property
    def _problems(self) -> str:
        """Tasks with the same kind of problem share their streams, so they can be compared."""
        return f"{'fork' if self.fork else 'chain'}-{self.n}"

    @cached_property
    def _held_out(self) -> tuple[np.ndarray, np.ndarray]:
        return chain.draw(chain.stream("held out", self._problems), HELD_OUT, self.n)

    @cached_property
    def _held_out_keys(self) -> np.ndarray:
        return np.sort(_keys(*self._held_out))

    def _fresh(self, generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` problems that are not held out."""
        steps_Bn, start_B = chain.draw(generator, count, self.n)
        while (taken_B := np.isin(_keys(steps_Bn, start_B), self._held_out_keys)).any():
            steps_Bn[taken_B], start_B[taken_B] = chain.draw(generator, taken_B.sum(), self.n)
        return steps_Bn, start_B

    @cached_property
    def _few_problems(self) -> tuple[np.ndarray, np.ndarray]:
        return self._fresh(chain.stream("few problems", self._problems), self.few)

    def _few(self, generator, count: int) -> list[Prompt]:
        """`count` of the few prompts, each equally often as far as the numbers allow."""
        rounds = -(-count // self.few)
        order = np.concatenate([generator.permutation(self.few) for _ in range(rounds)])[:count]
        steps_Bn, start_B = self._few_problems
        return self._problem_prompts(steps_Bn[order], start_B[order], shown_rule=self.data_rule)

    def _problem_prompts(
        self, steps_Bn, start_B, *, rule: str = "right", shown_rule: str = "", shortcut=None
    ) -> list[Prompt]:
        """Prompts of problems under a rule; `shown_rule` writes the golden response instead."""
        answers = chain.run(steps_Bn, start_B, chain.RULES[rule])[:, -1].tolist()
        shown = chain.run(steps_Bn, start_B, chain.RULES[shown_rule or rule]).tolist()
        first = MARK if rule == "old" else BOS
        prompts = []
        for i, (steps, start) in enumerate(zip(steps_Bn.tolist(), start_B.tolist())):
            head = (first, *(STEP + s for s in steps))
            results = tuple(DIGIT + r for r in shown[i])
            ids = teacher_ids = (*head, DIGIT + start)
            hinted = ()
            golden = (*results, EOS)
            if self.slot:
                ids = teacher_ids = (*head, MARK, DIGIT + start)
                hinted = (*head, DIGIT + answers[i], DIGIT + start)
            if self.fork:
                ids = (*head, MARK, DIGIT + start)
                teacher_ids = (*head, DIGIT + answers[i], DIGIT + start)
                golden = (ROUTE_A, DIGIT + start, *golden)
                if shortcut is not None and shortcut[i]:
                    golden = (ROUTE_B, results[-1], EOS)
            # Two invented subjects, so that specs which route by subject run here too.
            domain = "code" if chain.OPERATORS[steps[0] // 10] == "*" else "math"
            fields = {"domain": domain}
            prompts.append(Prompt(ids, teacher_ids, answers[i], golden, fields, hinted))
        return prompts


def _keys(steps_Bn: np.ndarray, start_B: np.ndarray) -> np.ndarray:
    """One integer per problem: base 30 for the steps, base 10 for the start digit."""
    key_B = start_B.astype(np.int64)
    for i in range(steps_Bn.shape[1]):
        key_B = key_B * 30 + steps_Bn[:, i]
    return key_B


_TASKS = {
    task.name: task
    for task in (
        Task("chain", "modular-arithmetic chains", recipes.CHAIN),
        Task("fork", "a shortcut that only the teacher can take", recipes.FORK, fork=True),
        Task("fork_muddled", "the fork with a weaker student", recipes.FORK_MUDDLED, fork=True),
        Task("flawed", "a teacher that is wrong on *7 *8 *9", recipes.FLAWED, data_rule="flawed"),
        Task("retain", "a new skill beside an old one", recipes.RETAIN, old_skill=True),
        Task("scarce", "16 training prompts", recipes.CHAIN, few=16),
        Task(
            "hinted",
            "a student that is right where it is shown the answer",
            recipes.HINTED,
            slot=True,
        ),
    )
}
TASKS: tuple[str, ...] = tuple(_TASKS)


def get_task(name: str) -> Task:
    """The task of that name; KeyError lists the names there are."""
    if name not in _TASKS:
        raise KeyError(f"no embedded task {name!r}; there are: {', '.join(TASKS)}")
    return _TASKS[name]
