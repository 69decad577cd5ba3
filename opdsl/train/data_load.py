"""From a source of rows to checked, tokenised examples.

Text is tokenised exactly once, with the chat template if the tokenizer has one, so no second
start token can slip in. Token ids are kept packed, four bytes each, and unpacked when drawn.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from opdsl.train.data_formats import Found, open_source
from opdsl.train.errors import problem
from opdsl.train.rows import Fault, check_row, parse_columns, shown

CHUNK = 256  # rows tokenised in one call
SHOWN = 5  # bad rows that a message lists


@dataclass(frozen=True)
class Example:
    """One prompt of a file; `line` counts from 1. The embedded `Prompt` has the same fields.

    ids, teacher_ids: prompt tokens of the student and of external teachers
    golden: response tokens with the end token, empty if the row has none
    fields: the row's text fields; reference: the right answer or None
    index: its place among the training rows, -1 in held-out ones
    """

    ids: Sequence[int]
    teacher_ids: Sequence[int]
    golden: Sequence[int]
    fields: dict[str, str]
    reference: str | None = None
    line: int = 0
    messages: tuple[dict[str, str], ...] = ()
    forced: tuple[int, ...] = ()  # response tokens put behind the prompt by the state source
    index: int = -1

    def unpacked(self, index: int = -1) -> Example:
        """The same with plain tuples of ids: what the trainer works on."""
        ids = tuple(self.ids)
        return replace(self, ids=ids, teacher_ids=ids, golden=tuple(self.golden), index=index)


@dataclass(frozen=True)
class FileOptions:
    """How a file is read. context: the longest prompt + response the models take (tokens).

    columns, verifier, verifier_limits, curriculum: in the words of the command line.
    """

    seed: int = 0
    max_new_tokens: int = 512
    context: int = 4096
    skip_bad_rows: bool = False
    long_prompts: str = "refuse"  # refuse | drop | cut
    required_fields: tuple[str, ...] = ()
    needs_response: bool = False
    needs_reference: bool = False
    verifier: str | None = None
    verifier_limits: str | None = None
    columns: str | None = None
    curriculum: str | None = None


def prompt_ids(tokenizer, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
    """Tokens of one prompt, through the chat template if there is one."""
    text, special = _prompt_text(tokenizer, messages)
    return tuple(tokenizer(text, add_special_tokens=special)["input_ids"])


def _prompt_text(tokenizer, messages: Sequence[dict[str, str]]) -> tuple[str, bool]:
    """(text, whether the tokenizer still has to add its special tokens)."""
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        ), False
    return "\n\n".join(m["content"] for m in messages), True


@dataclass
class Loader:
    """Reads sources for one run. notes: what a user should know about rows left out or cut.

    Raises RunProblem OPD702 (unreadable), OPD703 (bad rows, with their numbers), OPD707 (no
    usable row), OPD709 (prompts too long).
    """

    tokenizer: Any
    options: FileOptions
    digest: Any
    notes: list[str] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)  # of the sources read: "file", "rows"

    def load(self, where: str) -> tuple[str, list[Example]]:
        """(name, usable examples) of what `--data` names."""
        source = open_source(where)
        self.kinds.add(source.kind)
        bad = _Bad(source.name, source.unit)
        columns = parse_columns(self.options.columns)
        checked = self._checked(source.read(self.digest), columns, bad)
        examples: list[Example] = []
        while chunk := list(islice(checked, CHUNK)):
            examples += self._tokenised(chunk, bad)
        self._report(bad, columns)
        return source.name, self._usable(examples, source.name, source.unit, bad.seen)

    def _checked(self, rows: Iterator[Found], columns, bad) -> Iterator[tuple[int, dict[str, Any]]]:
        for found in rows:
            bad.seen += 1
            if found.fault is not None:
                bad.add(found.number, found.fault)
                continue
            try:
                row = check_row(found.row, columns)
                self._needed(row)
                row["text"], row["special"] = self._text(row["messages"])
            except Fault as fault:
                bad.add(found.number, str(fault), found.row)
                continue
            yield found.number, row

    def _needed(self, row: dict[str, Any]) -> None:
        """Raises Fault if the method needs something that the row has not."""
        missing = [f for f in self.options.required_fields if f not in row["fields"]]
        if missing:
            raise Fault(f"no field `{missing[0]}`, which the method asks for")
        if self.options.needs_response and row["response"] is None:
            raise Fault("no `response`, which the method imitates")

    def _text(self, messages: Sequence[dict[str, str]]) -> tuple[str, bool]:
        from jinja2 import TemplateError

        try:
            return _prompt_text(self.tokenizer, messages)
        except TemplateError as error:
            raise Fault(f"the chat template refuses it ({str(error)[:100]})") from None

    def _tokenised(self, chunk: list[tuple[int, dict[str, Any]]], bad: _Bad) -> list[Example]:
        """Rows as examples; the tokenizer is called once for prompts and once for responses."""
        special = chunk[0][1]["special"]
        texts = [row["text"] for _, row in chunk]
        all_ids = self.tokenizer(texts, add_special_tokens=special)["input_ids"]
        responses = [row["response"] for _, row in chunk if row["response"] is not None]
        answers = iter(
            self.tokenizer(responses, add_special_tokens=False)["input_ids"] if responses else ()
        )
        found, limit = [], self.options.max_new_tokens - 1
        for (number, row), ids in zip(chunk, all_ids):
            golden = array("i")
            if row["response"] is not None:
                golden = array("i", [*next(answers)[:limit], self.tokenizer.eos_token_id])
            if not ids:
                bad.add(number, "the prompt has no tokens")
                continue
            packed = array("i", ids)
            found.append(
                Example(
                    packed,
                    packed,
                    golden,
                    row["fields"],
                    row["reference"],
                    number,
                    row["messages"],
                )
            )
        return found

    def _report(self, bad: _Bad, columns: dict[str, str]) -> None:
        if not bad.count:
            return
        listing = bad.listing()
        if self.options.skip_bad_rows:
            self.notes.append(f"{bad.name}: {bad.count} bad rows left out ({listing})")
            return
        helps = ["correct the rows, or leave them out with --skip-bad-rows"]
        wanted = columns.get("prompt", "prompt")
        if bad.columns and wanted not in bad.columns:
            there = ", ".join(shown(c) for c in bad.columns[:12])
            helps = [f"its columns are {there}: --columns prompt=COLUMN", *helps]
        raise problem(
            "OPD703",
            f"{bad.name} has {bad.count} bad row{'s' * (bad.count > 1)}: {listing}",
            helps=helps,
        )

    def _usable(self, examples: list[Example], name: str, unit: str, seen: int) -> list[Example]:
        """Without, or with cut, prompts past the context."""
        room = self.options.context - self.options.max_new_tokens
        long = [e for e in examples if len(e.ids) > room]
        if long and self.options.long_prompts == "refuse":
            raise problem(
                "OPD709",
                f"{name}: {len(long)} prompts are longer than {room} tokens"
                f" {numbers([e.line for e in long], unit)}",
                notes=[
                    f"context {self.options.context} less {self.options.max_new_tokens}"
                    " for the response"
                ],
                helps=["--long-prompts drop | cut, or a smaller --max-tokens"],
            )
        if long and self.options.long_prompts == "cut":
            self.notes.append(f"{name}: {len(long)} prompts over {room} tokens cut on the left")
            examples = [replace(e, ids=e.ids[-room:]) if len(e.ids) > room else e for e in examples]
        elif long:
            self.notes.append(f"{name}: {len(long)} prompts over {room} tokens left out")
            examples = [e for e in examples if len(e.ids) <= room]
        if not examples:
            reason = ": it is empty" if not seen else ""
            raise problem(
                "OPD707",
                f"{name} has no usable row{reason}",
                helps=['one JSON object a line: {"prompt": "…", "reference": "…"}'],
            )
        return examples


@dataclass
class _Bad:
    """The bad rows of one source: all counted, the first few kept."""

    name: str
    unit: str
    count: int = 0
    seen: int = 0
    first: list[str] = field(default_factory=list)
    columns: tuple[str, ...] = ()

    def add(self, number: int, why: str, row: Any = None) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{self.unit} {number}: {why}")
        if isinstance(row, dict) and not self.columns:
            self.columns = tuple(map(str, row))

    def listing(self) -> str:
        more = f"; and {self.count - SHOWN} more" if self.count > SHOWN else ""
        return "; ".join(self.first) + more


def numbers(found: list[int], unit: str = "line") -> str:
    """`(lines 3, 7, …)`."""
    shown_ones = ", ".join(map(str, found[:SHOWN]))
    return f"({unit}{'s' * (len(found) > 1)} {shown_ones}{', …' if len(found) > SHOWN else ''})"
