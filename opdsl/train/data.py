"""Where prompts come from: the embedded tasks, or a user's data.

Both (for the tasks see `bindings.TaskData`) give the same things to the trainer (`Data`); every
batch is a pure function of (seed, step), with a curriculum of (seed, step, recorded pass rates).
Prompts travel as token ids from here on.

A row of a user's data has `prompt` (text, or a list of chat messages) and optionally `reference`
(the right answer, for the verifier), `response` (a text to imitate, for `sequences(data)` and
`golden`) and further fields such as `domain`, which a spec can ask for as `prompt.domain`. How
files are read: `data_formats`, `data_tables`, `rows`; how rows become examples: `data_load`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Protocol

from opdsl.train.curriculum import Curriculum, parse_curriculum
from opdsl.train.data_load import Example, FileOptions, Loader, numbers, prompt_ids
from opdsl.train.errors import problem
from opdsl.train.rows import parse_columns
from opdsl.train.sandbox import parse_limits
from opdsl.train.streams import epoch_rows, seed_for
from opdsl.train.verifiers import make_judge
from opdsl.train.verify import Case, Verdict

HELD_OUT_SHARE, HELD_OUT_LEAST, HELD_OUT_MOST = 0.05, 100, 200

__all__ = ["Data", "Example", "FileData", "FileOptions"]


class Data(Protocol):
    """What the trainer asks of a source of prompts.

    prompts / golden / sequences: the batch of one step for rollouts, for `sft(data = golden)`,
    for `sequences(data)`. judge gives one verdict for each response. finish is told, after a
    step's responses were judged, what came of the student's own ones (None: no verdict), and
    gives figures for the step's record. Data with `state()` and `load_state(tensors)` are part of
    the checkpoint.
    """

    name: str
    pad: int
    eos: int
    max_new_tokens: int
    special_ids: frozenset[int]
    verifiable: bool
    rows: int | None
    fingerprint: str
    notes: list[str]

    def prompts(self, step: int, n: int) -> list[Any]: ...
    def golden(self, step: int, n: int) -> list[Any]: ...
    def sequences(self, step: int, n: int) -> list[Any]: ...
    def held_out(self) -> dict[str, list[Any]]: ...
    def judge(self, prompts: Sequence[Any], responses: Sequence[Any]) -> list[Verdict]: ...
    def finish(self, step: int, prompts: Sequence[Any], scores: Sequence[float | None]) -> dict: ...
    def context_ids(self, prompt: Any, template: str | None) -> Sequence[int]: ...
    def prompt_text(self, prompt: Any) -> str: ...
    def response_text(self, ids: Sequence[int]) -> str: ...


class FileData:
    """A user's data as a source of prompts.

    Without evaluation data every 20th row (by a hash of its prompt, so that no seed moves it; at
    most 200) is held out, if there are at least 100 rows.

    Raises RunProblem OPD702 (unreadable), OPD703 (bad rows, with their numbers), OPD707 (no
    usable row), OPD709 (prompts too long), OPD712 (a verifier that cannot work here), OPD112 (an
    option that makes no sense).
    """

    def __init__(self, path: str, tokenizer, options: FileOptions, eval_path: str | None = None):
        self.tokenizer, self.options = tokenizer, options
        self.pad = _pad_id(tokenizer)
        self.eos = tokenizer.eos_token_id
        self.max_new_tokens = options.max_new_tokens
        self.special_ids = frozenset(tokenizer.all_special_ids)
        parse_columns(options.columns)  # mistakes in words are found before files are read
        band = parse_curriculum(options.curriculum) if options.curriculum else None
        self._judge = make_judge(options.verifier, parse_limits(options.verifier_limits))
        self._judge.check()
        digest = hashlib.sha256()
        loader = Loader(tokenizer, options, digest)
        self.name, examples = loader.load(path)
        held_out: list[Example] = []
        if eval_path:
            _, held_out = loader.load(eval_path)
        elif len(examples) >= HELD_OUT_LEAST:
            examples, held_out = _hold_out(examples)
        self.notes = loader.notes
        self._train = examples
        self._held_out = [e.unpacked() for e in held_out]
        self._written = [i for i, e in enumerate(examples) if len(e.golden)]
        self.rows = len(examples)
        kind = "rows" if "rows" in loader.kinds else "file"
        self.fingerprint = f"{kind}:{digest.hexdigest()}"
        self._check_references()
        self._curriculum = Curriculum(band, len(examples), options.seed) if band else None
        # Step and size of the last draw, its prompts, whether what came of them is recorded.
        self._drawn: tuple[tuple[int, int], list[int]] = ((-1, 0), [])
        self._recorded = True

    def _check_references(self) -> None:
        """Whether responses can be judged, and if the method asks for it, that they can."""
        every = [*self._train, *self._held_out]
        without = [e.line for e in every if e.reference is None]
        self.verifiable = not (self._judge.needs_reference and without)
        if self.verifiable:
            return
        if self.options.needs_reference or self.options.curriculum:
            what = "method" if self.options.needs_reference else "curriculum"
            raise problem(
                "OPD703",
                f"{self.name}: {len(without)} rows have no `reference` {numbers(without)}",
                notes=[f"the {what} asks for the outcome of each response"],
                helps=[
                    'give each row the right answer: {"prompt": …, "reference": "42"}',
                    "or name its column: --columns reference=COLUMN",
                ],
            )

    # ---- batches -----------------------------------------------------------------------

    def prompts(self, step: int, n: int) -> list[Example]:
        if self._curriculum is None:
            return self._take("prompts", step, n, range(len(self._train)))
        if self._drawn[0] != (step, n):
            self._drawn, self._recorded = ((step, n), self._curriculum.draw(n)), False
        return [self._train[i].unpacked(i) for i in self._drawn[1]]

    def golden(self, step: int, n: int) -> list[Example]:
        return self._take("golden", step, n, self._written)

    def sequences(self, step: int, n: int) -> list[Example]:
        return self._take("sequences", step, n, self._written)

    def _take(self, stream: str, step: int, n: int, rows: Sequence[int]) -> list[Example]:
        seed = seed_for(self.options.seed, stream)
        chosen = [rows[i] for i in epoch_rows(len(rows), step * n, n, seed)]
        return [self._train[i].unpacked(i) for i in chosen]

    def held_out(self) -> dict[str, list[Example]]:
        return {"held-out": self._held_out} if self._held_out else {}

    # ---- what came of them -------------------------------------------------------------

    def judge(
        self, prompts: Sequence[Example], responses: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """A verdict for each response; without a verifier's name, references that are numbers
        are compared as numbers and all others as normalised text."""
        cases = [
            Case(self.prompt_text(p), self.response_text(r), p.reference, p.fields)
            for p, r in zip(prompts, responses)
        ]
        return self._judge(cases)

    def verify(self, prompt: Example, response: Sequence[int]) -> float | None:
        """The score of one response; None where there is no verdict."""
        return self.judge([prompt], [response])[0].score

    def finish(
        self, step: int, prompts: Sequence[Example], scores: Sequence[float | None]
    ) -> dict[str, float]:
        """Record what a step drew and how its responses were judged; figures of the curriculum.

        Prompts that a step drew and no response came of count as drawn: otherwise one that is
        always left out would fill every batch.
        """
        if self._curriculum is None or self._recorded or self._drawn[0][0] != step:
            return {}
        judged = [(p.index, s) for p, s in zip(prompts, scores) if s is not None and p.index >= 0]
        self._curriculum.record(self._drawn[1], judged)
        self._recorded = True
        return self._curriculum.figures()

    def state(self) -> dict[str, Any]:
        return self._curriculum.state() if self._curriculum else {}

    def load_state(self, tensors: dict[str, Any]) -> None:
        if self._curriculum:
            self._curriculum.load_state(tensors)

    # ---- text --------------------------------------------------------------------------

    def context_ids(self, prompt: Example, template: str | None) -> Sequence[int]:
        """Prompt tokens behind a context template; `{prompt}` and row fields are filled in.

        Without `{prompt}` in it, the context is put before the last user message. Row text is
        data: it is inserted once and never read as a template itself.
        """
        if template is None:
            return prompt.teacher_ids
        known = prompt.fields | ({"reference": prompt.reference} if prompt.reference else {})
        last = prompt.messages[-1]["content"]

        def fill(match: re.Match) -> str:
            name = match[1]
            if name == "prompt":
                return last
            if name not in known:
                raise problem(
                    "OPD703",
                    f"{self.name}:{prompt.line}: the teacher's context names {{{name}}},"
                    " and the row has no such field",
                    helps=[f"fields of this row: {', '.join(sorted(known)) or 'none'}"],
                )
            return known[name]

        text = re.sub(r"\{(\w+)\}", fill, template)
        if "{prompt}" not in template:
            text = f"{text}\n\n{last}"
        messages = [*prompt.messages[:-1], {**prompt.messages[-1], "content": text}]
        return (*prompt_ids(self.tokenizer, messages), *prompt.forced)

    def prompt_text(self, prompt: Example) -> str:
        return prompt.messages[-1]["content"]

    def response_text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def _hold_out(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """(training rows, held-out rows); equal prompts stay on one side."""
    keys = [hashlib.sha256(repr(tuple(e.ids)).encode()).digest() for e in examples]
    wanted = min(HELD_OUT_MOST, max(1, int(len(examples) * HELD_OUT_SHARE)))
    chosen = set(sorted(set(keys))[:wanted])
    train = [e for e, key in zip(examples, keys) if key not in chosen]
    held = [e for e, key in zip(examples, keys) if key in chosen]
    return (train, held) if train else (examples, [])


def _pad_id(tokenizer) -> int:
    """Padding is masked by length everywhere, so any id that exists will do."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
