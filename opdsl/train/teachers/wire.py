"""The protocol of `opdsl serve`: what a scoring request and its answer look like.

Two encodings of the same content, chosen by the content type. JSON is for people and for other
programs; safetensors is what the trainer uses: exact, compact, and no pickle.

    POST /score
    {"rows": [{"tokens": [1, 5, 9, 4, 2], "prompt_length": 3, "ids": [[4, 7], [2, 8]]}],
     "top": 2, "entropy": false, "temperature": 1.0}

    {"model": "…", "weights": "…", "vocabulary": 44, "rows": [
      {"sampled": [-0.1, -2.3], "top_ids": [[4, 6], [3, 2]], "top_logprobs": [[-0.1, …], …],
       "ids_logprobs": [[-0.1, -7.0], [-2.3, -9.1]]}]}

A row is prompt and response in one list of token ids; the answer has one entry per response token,
predicted from everything before it. `ids` asks for further tokens, K at every response position.
`whole` asks for "logits" or "hidden" (states that the head of `GET /head` turns into logits; both
in safetensors only). Log-probabilities are in nats; one of −∞ is `null` in JSON.

Shapes: R rows, T response tokens of a row, N response tokens of all rows, K ids, k own top, V
vocabulary, H hidden.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

JSON, BINARY = "application/json", "application/safetensors"
MAX_ROWS, MAX_IDS = 4096, 4096
WHOLE = ("", "logits", "hidden")


class BadMessage(ValueError):
    """A request or an answer that is not of the protocol; one sentence, for the other side."""


@dataclass(frozen=True)
class Row:
    """Prompt and response in one list; ids [T, K] further tokens to score, or None."""

    tokens: tuple[int, ...]
    prompt: int  # how many of the tokens are the prompt, from 1
    ids: torch.Tensor | None = None

    @property
    def response(self) -> int:
        return len(self.tokens) - self.prompt


@dataclass(frozen=True)
class Want:
    """What is asked about every row. vocabulary: words the distribution is over, None: all."""

    top: int = 0
    entropy: bool = False
    whole: str = ""
    temperature: float = 1.0
    vocabulary: int | None = None


@dataclass(frozen=True)
class RowScores:
    """Scores of one row, float32 on the CPU, in nats; None where not asked for."""

    sampled: torch.Tensor  # [T]
    top_ids: torch.Tensor | None = None  # [T, k] int64
    top_logprobs: torch.Tensor | None = None  # [T, k]
    ids_logprobs: torch.Tensor | None = None  # [T, K]
    entropy: torch.Tensor | None = None  # [T]
    whole: torch.Tensor | None = None  # [T, V] logits, or [T, H] hidden states in their own type


FIELDS = ("sampled", "top_ids", "top_logprobs", "ids_logprobs", "entropy", "whole")


# ---- requests ------------------------------------------------------------------------------------


def encode_request(rows: Sequence[Row], want: Want, meta: dict[str, Any]) -> bytes:
    """A request in safetensors. meta: plain values such as the model's name."""
    tensors = {
        "tokens": torch.tensor([t for r in rows for t in r.tokens], dtype=torch.int32),
        "lengths": torch.tensor([len(r.tokens) for r in rows], dtype=torch.int32),
        "prompts": torch.tensor([r.prompt for r in rows], dtype=torch.int32),
    }
    if rows[0].ids is not None:
        tensors["ids"] = torch.cat([r.ids for r in rows if r.ids is not None]).to(torch.int32)
    asked = {k: getattr(want, k) for k in Want.__dataclass_fields__}
    return save_tensors(tensors, {"opdsl": json.dumps(asked | meta)})


def decode_request(body: bytes, content_type: str) -> tuple[list[Row], Want, dict[str, Any]]:
    """(rows, what is asked, everything else that was said). Raises BadMessage."""
    if content_type.split(";")[0].strip() == BINARY:
        said, rows = _binary_rows(body)
    else:
        said, rows = _json_rows(body)
    if not rows:
        raise BadMessage("the request has no rows")
    if len(rows) > MAX_ROWS:
        raise BadMessage(f"the request has {len(rows)} rows, at most {MAX_ROWS} are taken")
    for i, row in enumerate(rows):
        _check_row(row, i)
    wide = {None if r.ids is None else r.ids.shape[1] for r in rows}
    if len(wide) > 1:
        raise BadMessage("rows ask for different numbers of ids")
    return rows, _want(said), said


def _check_row(row: Row, i: int) -> None:
    if not 1 <= row.prompt < len(row.tokens):
        raise BadMessage(
            f"row {i}: a prompt of {row.prompt} in {len(row.tokens)} tokens leaves no response"
            if row.prompt >= 1
            else f"row {i}: the prompt has no tokens, so nothing predicts the first response token"
        )
    if row.ids is not None and (row.ids.dim() != 2 or len(row.ids) != row.response):
        shape = "×".join(map(str, row.ids.shape))
        raise BadMessage(f"row {i}: ids are {shape} for {row.response} response tokens")
    if row.ids is not None and not 0 < row.ids.shape[1] <= MAX_IDS:
        raise BadMessage(f"row {i}: {row.ids.shape[1]} ids at a position; 1 to {MAX_IDS} are taken")


def _want(said: dict[str, Any]) -> Want:
    top, entropy, whole = said.get("top", 0), said.get("entropy", False), said.get("whole", "")
    temperature, vocabulary = said.get("temperature", 1.0), said.get("vocabulary")
    if not isinstance(top, int) or isinstance(top, bool) or top < 0:
        raise BadMessage(f"`top` is a whole number from 0, not {top!r}")
    if not isinstance(entropy, bool):
        raise BadMessage(f"`entropy` is true or false, not {entropy!r}")
    if whole not in WHOLE:
        raise BadMessage(f"`whole` is one of {WHOLE}, not {whole!r}")
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 1e-3 <= temperature <= 1e3:
        raise BadMessage(f"`temperature` is a number in [0.001, 1000], not {temperature!r}")
    if vocabulary is not None and (not isinstance(vocabulary, int) or vocabulary < 1):
        raise BadMessage(f"`vocabulary` is a whole number from 1, not {vocabulary!r}")
    return Want(top, entropy, whole, float(temperature), vocabulary)


def _json_rows(body: bytes) -> tuple[dict[str, Any], list[Row]]:
    try:
        said = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"the body is not JSON ({str(error)[:80]})") from None
    if not isinstance(said, dict) or not isinstance(said.get("rows"), list):
        raise BadMessage("the body is no object with a list `rows`")
    rows = []
    for i, row in enumerate(said.pop("rows")):
        if not isinstance(row, dict) or not _whole_numbers(row.get("tokens")):
            raise BadMessage(f"row {i} is no object with a list `tokens` of token ids")
        prompt, ids = row.get("prompt_length"), row.get("ids")
        if not isinstance(prompt, int) or isinstance(prompt, bool):
            raise BadMessage(f"row {i}: `prompt_length` is a whole number, not {prompt!r}")
        if ids is not None:
            even = isinstance(ids, list) and ids and all(_whole_numbers(x) for x in ids)
            if not even or len({len(x) for x in ids}) != 1:
                raise BadMessage(f"row {i}: `ids` is one list of token ids per response token")
            ids = torch.tensor(ids, dtype=torch.int64)
        rows.append(Row(tuple(row["tokens"]), prompt, ids))
    return said, rows


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and abs(x) < 2**31 for x in value)


def _binary_rows(body: bytes) -> tuple[dict[str, Any], list[Row]]:
    said, tensors = unpack(body)
    try:
        lengths, prompts = tensors["lengths"].tolist(), tensors["prompts"].tolist()
        tokens = tensors["tokens"].tolist()
    except KeyError as error:
        raise BadMessage(f"the body holds no tensor {error}") from None
    ids = tensors.get("ids")
    if len(lengths) != len(prompts) or min(lengths, default=1) < 1 or sum(lengths) != len(tokens):
        raise BadMessage("`lengths` do not add up to the number of tokens")
    counts = [n - p for n, p in zip(lengths, prompts)]
    if ids is not None and (ids.dim() != 2 or min(counts) < 0 or sum(counts) != len(ids)):
        raise BadMessage("`ids` is [response tokens of all rows, K]")
    if any(x.is_floating_point() for x in tensors.values()):
        raise BadMessage("token ids are whole numbers")
    parts = ids.to(torch.int64).split(counts) if ids is not None else [None] * len(lengths)
    rows, start = [], 0
    for n, p, part in zip(lengths, prompts, parts):
        rows.append(Row(tuple(tokens[start : start + n]), p, part))
        start += n
    return said, rows


# ---- answers -------------------------------------------------------------------------------------


def encode_answer(scores: Sequence[RowScores], meta: dict[str, Any], content_type: str) -> bytes:
    """An answer in the encoding that was asked for."""
    if content_type == BINARY:
        tensors = {
            name: torch.cat([getattr(s, name) for s in scores]).contiguous()
            for name in FIELDS
            if getattr(scores[0], name) is not None
        }
        tensors["counts"] = torch.tensor([len(s.sampled) for s in scores], dtype=torch.int32)
        if "top_ids" in tensors:
            tensors["top_ids"] = tensors["top_ids"].to(torch.int32)
        return save_tensors(tensors, {"opdsl": json.dumps(meta)})
    rows = []
    for one in scores:
        row = {name: getattr(one, name) for name in FIELDS[:-1]}
        rows.append({k: _listed(v) for k, v in row.items() if v is not None})
    return json.dumps(meta | {"rows": rows}, allow_nan=False).encode()


def _listed(x: torch.Tensor) -> list:
    return [_listed(y) if y.dim() else _number(y.item()) for y in x]


def _number(x: float) -> float | int | None:
    return None if x == -math.inf else x


def decode_answer(body: bytes) -> tuple[list[RowScores], dict[str, Any]]:
    """(scores of every row, what else was said) of an answer in safetensors. Raises BadMessage."""
    said, tensors = unpack(body)
    if "counts" not in tensors or "sampled" not in tensors:
        raise BadMessage("the answer holds no scores")
    counts = tensors.pop("counts").tolist()
    if min(counts, default=-1) < 0 or any(len(x) != sum(counts) for x in tensors.values()):
        raise BadMessage(f"the answer's parts do not have {sum(counts)} positions each")
    columns: dict[str, Sequence[Any]] = {}
    for name in FIELDS:
        x = tensors.get(name)
        if x is None:
            columns[name] = [None] * len(counts)
            continue
        if name == "top_ids":
            x = x.to(torch.int64)
        elif name != "whole":
            x = x.float()
        columns[name] = x.split(counts)
    return [RowScores(*parts) for parts in zip(*(columns[n] for n in FIELDS))], said


def unpack(body: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(the JSON object in the metadata, the tensors) of a safetensors body. Raises BadMessage."""
    try:
        tensors = load_tensors(body)
        size = int.from_bytes(body[:8], "little")
        said = json.loads(json.loads(body[8 : 8 + size])["__metadata__"]["opdsl"])
        if not isinstance(said, dict):
            raise ValueError
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        raise BadMessage("the body is no safetensors file of this protocol") from None
    return said, tensors
