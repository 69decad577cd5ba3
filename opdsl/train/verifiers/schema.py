"""The verifier `jsonschema`: is the response JSON of a given shape? As a worker runs it.

The response is JSON as a whole, or its last fenced block is. The schema is the user's file, or
the reference of each row. References to other documents are not fetched: they are errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

_FENCE = re.compile(r"```[ \t]*(?:json)?[ \t]*\n(.*?)\n[ \t]*```", re.DOTALL | re.IGNORECASE)


def prepare(schema: str | None) -> Callable[[str, str | None], float]:
    """(response, reference) -> 1.0 or 0.0; raises for what is no schema."""
    compiled = lru_cache(256)(_validator)
    if schema is None:
        return lambda response, reference: _judge(compiled(reference), response)
    fixed = _validator(schema)
    return lambda response, reference: _judge(fixed, response)


def _validator(text: str) -> Any:
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing.jsonschema import EMPTY_REGISTRY

    schema = json.loads(text, parse_constant=_no_number)
    kind = validator_for(schema, default=Draft202012Validator)
    kind.check_schema(schema)
    return kind(schema, registry=EMPTY_REGISTRY)


def _judge(validator: Any, response: str) -> float:
    fenced = _FENCE.findall(response)
    for text in (response, *fenced[-1:]):
        try:
            value = json.loads(text, parse_constant=_no_number)
        except ValueError:
            continue
        return float(validator.is_valid(value))
    return 0.0


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")
