"""vLLM's HTTP server as a teacher.

Scores of response tokens and the teacher's own top k come from `/v1/completions` with
`prompt_logprobs`: one dictionary per prompt token from the second on, its keys token ids, with the
token that stands there and the k most probable ones. Scores of given tokens come from
`/inference/v1/generate` with `prompt_logprob_token_ids` (one list per position) and
`prompt_logprob_start`, as a base64 `.npy` matrix; older releases lack it, or take one list for all
positions, and then nothing but their own top k is to be had.

Prompt log-probabilities have temperature 1 whatever is asked, one token is always generated, −∞ is
written as −9999, and more entries than `--max-logprobs` (20 unless it is raised) are refused.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from opdsl.train.teachers.capabilities import NONE, PER_POSITION, Capabilities, Wants
from opdsl.train.teachers.servers import Server, column, entries, model_named
from opdsl.train.teachers.sources import Source
from opdsl.train.teachers.transport import Client, Fault
from opdsl.train.teachers.wire import Row, RowScores, Want

MOST_LOGPROBS = 20  # what a server allows unless it was started with --max-logprobs
IMPOSSIBLE = -9990.0  # anything below was −∞
SCORING = {"max_tokens": 1, "temperature": 1.0}


class VllmServer(Server):
    """A vLLM server; `ids` of `capabilities` says whether it scores given tokens."""

    @classmethod
    def connect(cls, client: Client, source: Source, wants: Wants) -> VllmServer:
        info = model_named(client.json("GET", "/v1/models", limit=client.first), source.model)
        name = str(info["id"])
        top = cls._most(client, name, max(1, wants.top))
        ids, most, notes = NONE, 0, ()
        if wants.ids:
            ids, most, notes = cls._ids(client, name, wants.ids)
        can = Capabilities("this vLLM server", True, top, ids, most)
        context = info.get("max_model_len")
        return cls(
            client,
            name,
            can,
            context=int(context) - 1 if context else None,  # room for the token it generates
            per_request=8_192,
            at_once=4,
            notes=notes,
        )

    @staticmethod
    def _most(client: Client, name: str, k: int) -> int:
        """How many entries per position are given, at least as far as `k` goes."""
        body = {"model": name, "prompt": [[1, 2]], "prompt_logprobs": k, **SCORING}
        try:
            client.json("POST", "/v1/completions", body, limit=client.deadline / 2)
            return k
        except Fault as fault:
            if "HTTP 400" not in fault.text or k <= 1:
                raise
            said = re.search(r"max allowed: (\d+)", fault.text)
            return int(said[1]) if said else min(k - 1, MOST_LOGPROBS)

    @staticmethod
    def _ids(client: Client, name: str, k: int) -> tuple[str, int, tuple[str, ...]]:
        """(how given tokens are scored, at most how many, notes), by asking for as many."""
        wide = list(range(k + 1))  # the response token rides along
        params = {**SCORING, "prompt_logprob_token_ids": [wide, wide], "prompt_logprob_start": 0}
        body = {"model": name, "token_ids": [1, 2, 3], "sampling_params": params}
        try:
            answer = client.json("POST", "/inference/v1/generate", body, limit=client.deadline / 2)
            if _matrix(answer.get("prompt_token_id_logprobs")).shape == (2, k + 1):
                return PER_POSITION, k, ()
        except Fault as fault:
            said = re.search(r"max allowed: (\d+)", fault.text)
            if said and "HTTP 400" in fault.text:
                return PER_POSITION, int(said[1]) - 1, ()
            if fault.passing and "HTTP" not in fault.text:
                raise
        return NONE, 0, ("this vLLM does not score given tokens at every position",)

    def score(self, rows: Sequence[Row], want: Want, limit: float) -> list[RowScores]:
        if rows[0].ids is not None:
            return [self._by_ids(row, want, limit) for row in rows]
        body = {
            "model": self.model,
            "prompt": [list(r.tokens) for r in rows],
            "prompt_logprobs": max(1, want.top),
            **SCORING,
        }
        answer = self.client.json("POST", "/v1/completions", body, limit=limit)
        self._same_model(answer)
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != len(rows):
            raise Fault(f"{len(choices or ())} rows came back for {len(rows)}", tries=3)
        found: list[RowScores | None] = [None] * len(rows)
        for choice in choices:
            index = choice.get("index")
            if not isinstance(index, int) or not 0 <= index < len(rows) or found[index]:
                raise Fault(f"a row numbered {index!r} came back", tries=3)
            found[index] = from_prompt_logprobs(choice.get("prompt_logprobs"), rows[index], want)
        return found  # type: ignore[return-value]

    def _by_ids(self, row: Row, want: Want, limit: float) -> RowScores:
        assert row.ids is not None
        y_T1 = torch.tensor(row.tokens[row.prompt :])[:, None]
        params: dict[str, Any] = {
            **SCORING,
            "prompt_logprob_token_ids": torch.cat([y_T1, row.ids], 1).tolist(),
            "prompt_logprob_start": row.prompt - 1,
        }
        if want.top:
            params["prompt_logprobs"] = want.top
        body = {"model": self.model, "token_ids": list(row.tokens), "sampling_params": params}
        answer = self.client.json("POST", "/inference/v1/generate", body, limit=limit)
        matrix = torch.from_numpy(_matrix(answer.get("prompt_token_id_logprobs")))
        shape = (row.response, 1 + row.ids.shape[1])
        if tuple(matrix.shape) != shape:
            raise Fault(f"scores of {tuple(matrix.shape)} came back for {shape}", tries=3)
        matrix = matrix.masked_fill(matrix < IMPOSSIBLE, -torch.inf)
        top: dict[str, torch.Tensor | None] = {}
        if want.top:
            one = from_prompt_logprobs(answer.get("prompt_logprobs"), row, want)
            top = {"top_ids": one.top_ids, "top_logprobs": one.top_logprobs}
        return RowScores(matrix[:, 0], ids_logprobs=matrix[:, 1:].contiguous(), **top)

    def _same_model(self, answer: Any) -> None:
        from opdsl.train.teachers.servers import Changed

        said = answer.get("model") if isinstance(answer, dict) else None
        if said is not None and said != self.model:
            raise Changed(f"it serves the model {said!r}, before {self.model!r}")

    def tokens_of(self, text: str) -> list[int] | None:
        return tokenized(self.client, self.model, text)


def tokenized(client: Client, model: str, text: str) -> list[int] | None:
    """What `/tokenize` makes of a text, or None where there is no such path."""
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    try:
        answer = client.json("POST", "/tokenize", body, limit=client.first)
    except Fault:
        return None
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    plain = isinstance(tokens, list) and all(type(t) is int for t in tokens)
    return tokens if plain else None


def from_prompt_logprobs(given: Any, row: Row, want: Want) -> RowScores:
    """The scores of a row out of `prompt_logprobs`. Raises Fault."""
    if not isinstance(given, list) or len(given) != len(row.tokens):
        count = len(given) if isinstance(given, list) else "no"
        raise Fault(f"{count} scores came back for {len(row.tokens)} tokens", tries=3)
    sampled, lists = [], []
    for token, found in zip(row.tokens[row.prompt :], given[row.prompt :]):
        try:
            here = {int(k): _logprob(v["logprob"]) for k, v in found.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise Fault("the scores of a position have an unknown form", tries=3) from None
        if token not in here:
            raise Fault(f"the scores do not belong to the row: token {token} has none", tries=3)
        sampled.append(here[token])
        lists.append([(logp, k) for k, logp in here.items()])
    response = row.tokens[row.prompt :]
    top = entries(lists, want.top, response) if want.top else (None, None)
    return RowScores(column(sampled, "scores"), *top)


def _logprob(x: Any) -> float:
    return -math.inf if x is None or x < IMPOSSIBLE else float(x)


def _matrix(text: Any) -> np.ndarray:
    """A base64 `.npy` matrix as float32; never unpickled. Raises Fault."""
    try:
        raw = base64.b64decode(text, validate=True)
        found = np.load(io.BytesIO(raw), allow_pickle=False)
        return np.ascontiguousarray(found, dtype=np.float32)
    except (TypeError, ValueError, OSError, EOFError):
        raise Fault("the scores of given tokens are missing or damaged", tries=3) from None
