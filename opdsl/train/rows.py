"""Reading one row of a data file, and saying what is wrong with it.

A row's text is data: it is decoded, checked and passed on, never interpreted.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from opdsl.train.errors import problem


def read_bytes(path: str) -> bytes:
    """The file, or RunProblem OPD702 saying why it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise problem(
            "OPD702",
            f"cannot read the data file {path}: {reason.lower()}",
            helps=["--data FILE: one JSON object a line with a `prompt`"],
        ) from None


def parse_row(line: bytes) -> tuple[dict[str, Any], str | None]:
    """One line as (messages, reference, response, fields) and, if it is bad, why."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return {}, "not UTF-8"
    except ValueError as error:
        return {}, f"not JSON ({error})"
    except RecursionError:
        return {}, "nested too deeply"
    if not isinstance(row, dict):
        return {}, f"not an object but {type(row).__name__}"
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        messages: tuple[dict[str, str], ...] = ({"role": "user", "content": prompt},)
    elif isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        messages = tuple({"role": m["role"], "content": m["content"]} for m in prompt)
    elif "prompt" not in row:
        return {}, "no `prompt`"
    else:
        return {}, "`prompt` is neither a text nor a list of {role, content} messages"
    if not messages[-1]["content"].strip():
        return {}, "`prompt` is empty"
    reference, response = row.get("reference"), row.get("response")
    if isinstance(reference, (int, float)) and not isinstance(reference, bool):
        reference = repr(reference)
    if not isinstance(reference, (str, type(None))):
        return {}, "`reference` is neither a text nor a number"
    if not isinstance(response, (str, type(None))) or response == "":
        return {}, "`response` is not a text"
    kept = {k: v for k, v in row.items() if isinstance(v, str) and k not in ("prompt", "response")}
    texts = [m["content"] for m in messages] + [t for t in (response, *kept.values()) if t]
    if any(0xD800 <= ord(ch) <= 0xDFFF for text in texts for ch in text):
        return {}, "a lone surrogate character (half of an escaped pair)"
    found = {"messages": messages, "reference": reference, "response": response, "fields": kept}
    return found, None


def is_number(reference: str) -> bool:
    """Whether a reference is a number and nothing else, or marks one as the answer."""
    plain = re.fullmatch(r"\s*[-+−]?\$?[\d.,/ ]*\d[\d.,]*(?:[eE][-+]?\d+)?\s?%?\s*", reference)
    return bool(plain) or "####" in reference or "\\boxed" in reference


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )
