"""Reading one row of a data file, and saying what is wrong with it.

A row's text is data: it is decoded, checked and passed on, never interpreted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from opdsl.train.errors import problem

MAX_ROW = 16_000_000  # bytes of one row; a longer one is a mistake, not a prompt
TARGETS = ("prompt", "reference", "response")  # columns with a meaning; all others are fields
_SURROGATE_OR_NUL = re.compile("[\ud800-\udfff\0]")


class Fault(Exception):
    """What is wrong with one row, in words that follow its number."""


def parse_columns(text: str | None) -> dict[str, str]:
    """`prompt=question,reference=meta.answer` as {name here: column}. Raises RunProblem OPD112.

    A column may be a path through objects, written with dots.
    """
    columns: dict[str, str] = {}
    for word in (text or "").split(","):
        name, equals, column = (part.strip() for part in word.partition("="))
        if not word.strip():
            continue
        if not equals or not column or not re.fullmatch(r"\w{1,60}", name):
            raise problem(
                "OPD112",
                f"--columns takes NAME=COLUMN, not {word.strip()!r}",
                helps=["--columns prompt=question,reference=answer,domain=subject"],
                exit_code=2,
            )
        if name in columns:
            raise problem("OPD112", f"--columns names `{name}` twice", exit_code=2)
        columns[name] = column
    return columns


def decode(line: bytes | str) -> Any:
    """The JSON value of one line. Raises Fault: bytes that are not UTF-8, text that is not JSON,
    NaN or Infinity, a key that is there twice, nesting without end."""
    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
        return json.loads(text, parse_constant=_not_a_number, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise Fault(f"not UTF-8 (byte {error.start + 1})") from None
    except ValueError as error:
        raise Fault(f"not JSON ({error})") from None
    except RecursionError:
        raise Fault("nested too deeply") from None


def _not_a_number(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Fault(f"the key `{shown(twice)}` is there twice")
    return found


def check_row(row: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """{"messages", "reference", "response", "fields"} of a decoded row. Raises Fault.

    columns: see `parse_columns`. A chat that ends with an assistant's message gives that message
    as the response. Fields are texts; whole numbers, numbers and truth values become texts.
    """
    if not isinstance(row, Mapping):
        raise Fault(f"not an object but {type(row).__name__}")
    prompt = _column(row, "prompt", columns)
    reference, response = (_column(row, name, columns) for name in TARGETS[1:])
    if prompt is None and columns.get("prompt", "prompt") not in row:
        raise Fault(f"no `{columns.get('prompt', 'prompt')}`")
    messages = _messages(prompt)
    if messages[-1]["role"] == "assistant":
        if len(messages) == 1:
            raise Fault("`prompt` is an assistant's message alone")
        if response is not None:
            raise Fault("`prompt` ends with an assistant's message, and there is a `response`")
        *before, last = messages
        messages, response = tuple(before), last["content"]
    if not messages[-1]["content"].strip():
        raise Fault("`prompt` is empty")
    if isinstance(reference, (int, float)) and not isinstance(reference, bool):
        if not math.isfinite(reference):
            raise Fault("`reference` is not a finite number")
        reference = repr(reference)
    if not isinstance(reference, (str, type(None))):
        raise Fault("`reference` is neither a text nor a number")
    if not isinstance(response, (str, type(None))) or response == "":
        raise Fault("`response` is not a text")
    fields = _fields(row, columns)
    _check_texts([m["content"] for m in messages], [response, reference], fields.values())
    return {
        "messages": messages,
        "reference": reference,
        "response": response,
        "fields": fields,
    }


def _column(row: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> Any:
    """The value of a column, or of a path of columns; None where there is none."""
    column = columns.get(name, name)
    if column in row:
        return row[column]
    value: Any = row
    for step in column.split("."):
        if not isinstance(value, Mapping) or step not in value:
            return None
        value = value[step]
    return value


def _messages(prompt: Any) -> tuple[dict[str, str], ...]:
    """A prompt as chat messages: a text is one message of the user."""
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    if isinstance(prompt, list) and prompt:
        found = [_message(m) for m in prompt]
        if all(m is not None for m in found):
            return tuple(m for m in found if m is not None)
    raise Fault("`prompt` is neither a text nor a list of {role, content} messages")


def _message(value: Any) -> dict[str, str] | None:
    """One {role, content} message, or None. Content in parts is joined if all are text."""
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return None
    content = value.get("content")
    if isinstance(content, list) and content:
        texts = [p.get("text") if isinstance(p, Mapping) else None for p in content]
        content = "".join(texts) if all(isinstance(t, str) for t in texts) else None
    if not isinstance(content, str) or not value["role"].strip():
        return None
    return {"role": value["role"], "content": content}


def _fields(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """The row's fields as texts, under their own names and under those `--columns` gives them."""
    used = {columns.get(name, name) for name in ("prompt", "response")}
    values = {k: v for k, v in row.items() if k not in used and isinstance(k, str)}
    values |= {n: _column(row, n, columns) for n in columns if n not in ("prompt", "response")}
    found = {}
    for name, value in values.items():
        if name == "reference" and not isinstance(value, str):
            continue  # it is kept as the reference
        if isinstance(value, bool):
            value = "true" if value else "false"
        elif isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
            value = repr(value)
        if isinstance(value, str):
            found[name] = value
    return found


def _check_texts(*groups: Iterable[str | None]) -> None:
    for group in groups:
        for text in group:
            bad = _SURROGATE_OR_NUL.search(text) if text else None
            if bad and bad[0] == "\0":
                raise Fault("a NUL character")
            if bad:
                raise Fault("a lone surrogate character (half of an escaped pair)")


def shown(text: str) -> str:
    """A name from a file as it may stand in a message: short, no control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:40])
