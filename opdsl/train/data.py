"""Where prompts come from: the embedded tasks, or a JSONL file.

Both (for the tasks see `bindings.TaskData`) give the same things to the trainer (`Data`); every batch is a pure function of
(seed, step). Prompts travel as token ids from here on: text is tokenised exactly once, with
the chat template if the tokenizer has one, so no second start token can slip in.

A row of a JSONL file is an object with `prompt` (text, or a list of chat messages) and
optionally `reference` (the right answer, for the verifier), `response` (a text to imitate, for
`sequences(data)` and `golden`) and further text fields such as `domain`, which a spec can ask
for as `prompt.domain`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from opdsl.train.errors import problem
from opdsl.train.rows import is_number, parse_row, read_bytes
from opdsl.train.streams import epoch_rows, seed_for
from opdsl.train.verify import get_verifier, names

HELD_OUT_SHARE, HELD_OUT_LEAST, HELD_OUT_MOST = 0.05, 100, 200


@dataclass(frozen=True)
class Example:
    """One prompt of a file; `line` counts from 1. The embedded `Prompt` has the same fields.

    ids, teacher_ids: prompt tokens of the student and of external teachers
    golden: response tokens with the end token, empty if the row has none
    fields: the row's text fields; reference: the right answer or None
    """

    ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    golden: tuple[int, ...]
    fields: dict[str, str]
    reference: str | None = None
    line: int = 0
    messages: tuple[dict[str, str], ...] = ()
    forced: tuple[int, ...] = ()  # response tokens put behind the prompt by the state source


class Data(Protocol):
    """What the trainer asks of a source of prompts.

    prompts / golden / sequences: the batch of one step for rollouts, for `sft(data = golden)`,
    for `sequences(data)`. verify returns 0..1, or None where no verdict was possible.
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
    def verify(self, prompt: Any, response: Sequence[int]) -> float | None: ...
    def context_ids(self, prompt: Any, template: str | None) -> Sequence[int]: ...
    def prompt_text(self, prompt: Any) -> str: ...
    def response_text(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class FileOptions:
    """How a file is read. context: the longest prompt + response the models take (tokens)."""

    seed: int = 0
    max_new_tokens: int = 512
    context: int = 4096
    skip_bad_rows: bool = False
    long_prompts: str = "refuse"  # refuse | drop | cut
    required_fields: tuple[str, ...] = ()
    needs_response: bool = False
    needs_reference: bool = False
    verifier: str | None = None


class FileData:
    """A JSONL file as a source of prompts.

    Without an evaluation file every 20th row (by a hash of its prompt, so that no seed moves
    it; at most 200) is held out, if the file has at least 100 rows.

    Raises RunProblem OPD702 (file unreadable), OPD703 (bad rows, with their line numbers),
    OPD707 (no usable row), OPD709 (prompts too long).
    """

    def __init__(self, path: str, tokenizer, options: FileOptions, eval_path: str | None = None):
        self.tokenizer, self.options, self.name = tokenizer, options, Path(path).name
        self.pad = _pad_id(tokenizer)
        self.eos = tokenizer.eos_token_id
        self.max_new_tokens = options.max_new_tokens
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.notes: list[str] = []
        if options.verifier is not None and options.verifier not in names():
            raise problem(
                "OPD112",
                f"there is no verifier {options.verifier!r}",
                helps=[f"verifiers: {', '.join(names())}"],
            )
        raw = read_bytes(path)
        examples = self._usable(self._parse(raw, self.name), self.name)
        self._held_out: list[Example] = []
        if eval_path:
            raw_eval = read_bytes(eval_path)
            name = Path(eval_path).name
            self._held_out = self._usable(self._parse(raw_eval, name), name)
            raw += raw_eval
        elif len(examples) >= HELD_OUT_LEAST:
            examples, self._held_out = _hold_out(examples)
        self._train = examples
        self._written = [e for e in examples if e.golden]
        self.rows = len(examples)
        self.fingerprint = "file:" + hashlib.sha256(raw).hexdigest()
        self.verifiable = all(e.reference is not None for e in [*examples, *self._held_out])
        if options.needs_reference and not self.verifiable:
            without = [e.line for e in examples if e.reference is None]
            raise problem(
                "OPD703",
                f"{self.name}: {len(without)} rows have no `reference` {_lines(without)}",
                notes=["the method asks for the outcome of each response"],
                helps=['give each row the right answer: {"prompt": …, "reference": "42"}'],
            )

    # ---- batches -----------------------------------------------------------------------

    def prompts(self, step: int, n: int) -> list[Example]:
        return self._take("prompts", step, n, self._train)

    def golden(self, step: int, n: int) -> list[Example]:
        return self._take("golden", step, n, self._written)

    def sequences(self, step: int, n: int) -> list[Example]:
        return self._take("sequences", step, n, self._written)

    def _take(self, stream: str, step: int, n: int, rows: list[Example]) -> list[Example]:
        seed = seed_for(self.options.seed, stream)
        return [rows[i] for i in epoch_rows(len(rows), step * n, n, seed)]

    def held_out(self) -> dict[str, list[Example]]:
        return {"held-out": self._held_out} if self._held_out else {}

    # ---- answers and text --------------------------------------------------------------

    def verify(self, prompt: Example, response: Sequence[int]) -> float | None:
        """Agreement with the row's reference; None if there is none or no verdict was possible.

        Without a verifier's name, references that are numbers (plain, boxed, or behind ####)
        are compared as numbers and all others as normalised text.
        """
        if prompt.reference is None:
            return None
        kind = self.options.verifier or ("numeric" if is_number(prompt.reference) else "text")
        return get_verifier(kind)(self.response_text(response), prompt.reference).score

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
        return (*self._prompt_ids(messages), *prompt.forced)

    def prompt_text(self, prompt: Example) -> str:
        return prompt.messages[-1]["content"]

    def response_text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    # ---- reading -----------------------------------------------------------------------

    def _prompt_ids(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False
            )
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return tuple(self.tokenizer("\n\n".join(m["content"] for m in messages))["input_ids"])

    def _parse(self, raw: bytes, name: str) -> list[Example]:
        examples, bad = [], []
        for number, line in enumerate(raw.split(b"\n"), 1):
            if not line.strip():
                continue
            row, fault = parse_row(line)
            if fault is None:
                missing = [f for f in self.options.required_fields if f not in row["fields"]]
                if missing:
                    fault = f"no field `{missing[0]}`, which the method asks for"
                elif self.options.needs_response and row["response"] is None:
                    fault = "no `response`, which the method imitates"
            if fault is not None:
                bad.append((number, fault))
                continue
            ids = self._prompt_ids(row["messages"])
            if not ids:
                bad.append((number, "the prompt has no tokens"))
                continue
            golden: tuple[int, ...] = ()
            if row["response"] is not None:
                inner = self.tokenizer(row["response"], add_special_tokens=False)["input_ids"]
                golden = (*inner[: self.max_new_tokens - 1], self.eos)
            examples.append(
                Example(ids, ids, golden, row["fields"], row["reference"], number, row["messages"])
            )
        if bad:
            listing = "; ".join(f"line {n}: {why}" for n, why in bad[:5])
            more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
            if not self.options.skip_bad_rows:
                raise problem(
                    "OPD703",
                    f"{name} has {len(bad)} bad row{'s' * (len(bad) > 1)}: {listing}{more}",
                    helps=["correct the rows, or leave them out with --skip-bad-rows"],
                )
            self.notes.append(f"{name}: {len(bad)} bad rows left out ({listing}{more})")
        return examples

    def _usable(self, examples: list[Example], name: str) -> list[Example]:
        room = self.options.context - self.max_new_tokens
        long = [e for e in examples if len(e.ids) > room]
        if long and self.options.long_prompts == "refuse":
            raise problem(
                "OPD709",
                f"{name}: {len(long)} prompts are longer than {room} tokens"
                f" {_lines([e.line for e in long])}",
                notes=[
                    f"context {self.options.context} less {self.max_new_tokens} for the response"
                ],
                helps=["--long-prompts drop | cut, or a smaller --max-tokens"],
            )
        if long:
            word = "cut on the left" if self.options.long_prompts == "cut" else "left out"
            self.notes.append(f"{name}: {len(long)} prompts over {room} tokens {word}")
            if self.options.long_prompts == "cut":
                examples = [
                    replace(e, ids=e.ids[-room:], teacher_ids=e.ids[-room:]) for e in examples
                ]
            else:
                examples = [e for e in examples if len(e.ids) <= room]
        if not examples:
            raise problem(
                "OPD707",
                f"{name} has no usable row",
                helps=['one JSON object a line: {"prompt": "…", "reference": "…"}'],
            )
        return examples


def _hold_out(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """(training rows, held-out rows); equal prompts stay on one side."""
    keys = [hashlib.sha256(repr(e.ids).encode()).digest() for e in examples]
    wanted = min(HELD_OUT_MOST, max(1, int(len(examples) * HELD_OUT_SHARE)))
    chosen = set(sorted(set(keys))[:wanted])
    train = [e for e, key in zip(examples, keys) if key not in chosen]
    held = [e for e, key in zip(examples, keys) if key in chosen]
    return (train, held) if train else (examples, [])


def _pad_id(tokenizer) -> int:
    """Padding is masked by length everywhere, so any id that exists will do."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _lines(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return f"(line{'s' * (len(numbers) > 1)} {shown}{', …' if len(numbers) > 5 else ''})"
