"""SGLang's HTTP server as a teacher.

`POST /generate` with `input_ids`, `return_logprob` and `logprob_start_len` one before the response
gives `input_token_logprobs`, entries (log-probability, id, text); the first belongs to the last
prompt token and holds None, because nothing before it is scored. `top_logprobs_num` adds
`input_top_logprobs` in the same layout, possibly with fewer entries than asked for.
`token_ids_logprob` takes one list of ids for all positions of a request: rows with lists of their
own at every position are sent in short segments, each with the ids of its positions; the server's
prefix cache serves what lies before a segment.

No token is generated, and log-probabilities of input tokens have temperature 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from opdsl.train.teachers.capabilities import NO_LIMIT, PER_REQUEST, Capabilities, Wants
from opdsl.train.teachers.servers import Changed, Server, column, entries
from opdsl.train.teachers.sources import Source
from opdsl.train.teachers.transport import Client, Fault
from opdsl.train.teachers.vllm import tokenized
from opdsl.train.teachers.wire import Row, RowScores, Want

SEGMENT = 32  # response tokens whose ids are asked for together


class SglangServer(Server):
    """An SGLang server: own top k of any length, ids per request."""

    @classmethod
    def connect(cls, client: Client, source: Source, wants: Wants) -> SglangServer:
        info = _model_info(client)
        path = str(info["model_path"])
        if source.model is not None and source.model not in (path, path.rsplit("/", 1)[-1]):
            raise Fault(f"it serves {path}, not {source.model}", passing=False)
        if info.get("is_generation") is False:
            raise Fault(f"{path} does not generate, so it has no log-probabilities", passing=False)
        can = Capabilities("this SGLang server", True, NO_LIMIT, PER_REQUEST)
        context = info.get("context_length")
        return cls(
            client, path, can, context=int(context) if context else None, per_request=1, at_once=8
        )

    def score(self, rows: Sequence[Row], want: Want, limit: float) -> list[RowScores]:
        return [self._row(row, want, limit) for row in rows]

    def _row(self, row: Row, want: Want, limit: float) -> RowScores:
        step = row.response if row.ids is None else SEGMENT
        parts = [
            self._segment(row, start, min(start + step, row.response), want, limit)
            for start in range(0, row.response, step)
        ]
        if len(parts) == 1:
            return parts[0]
        joined = {
            name: torch.cat([getattr(p, name) for p in parts])
            for name in ("sampled", "top_ids", "top_logprobs", "ids_logprobs")
            if getattr(parts[0], name) is not None
        }
        return RowScores(**joined)

    def _segment(self, row: Row, start: int, stop: int, want: Want, limit: float) -> RowScores:
        """Scores of response tokens start … stop − 1."""
        asked = sorted(set(row.ids[start:stop].flatten().tolist())) if row.ids is not None else None
        body: dict[str, Any] = {
            "input_ids": list(row.tokens[: row.prompt + stop]),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": row.prompt + start - 1,
            "top_logprobs_num": want.top,
            "return_text_in_logprobs": False,
        }
        if asked is not None:
            body["token_ids_logprob"] = asked
        answer = self.client.json("POST", "/generate", body, limit=limit)
        meta = answer.get("meta_info") if isinstance(answer, dict) else None
        if not isinstance(meta, dict):
            raise Fault("the answer has no meta_info", tries=3)
        tokens = row.tokens[row.prompt + start : row.prompt + stop]
        sampled = column(_scores(meta, tokens), "scores")
        top = (None, None)
        if want.top:
            lists = _lists(meta, "input_top_logprobs", stop - start)
            top = entries(lists, want.top, tokens)
        ids_logprobs = None
        if asked is not None and row.ids is not None:
            known = [
                {token: logp for logp, token in found}
                for found in _lists(meta, "input_token_ids_logprobs", stop - start)
            ]
            try:
                values = [
                    [here[i] for i in ids] for here, ids in zip(known, row.ids[start:stop].tolist())
                ]
            except KeyError as error:
                raise Fault(f"id {error} was asked for and is not in the answer", tries=3) from None
            ids_logprobs = column(values, "scores of given tokens")
        return RowScores(sampled, *top, ids_logprobs)

    def check_still(self) -> None:
        """Raise Changed if another model answers."""
        path = str(_model_info(self.client).get("model_path"))
        if path != self.model:
            raise Changed(f"it serves the model {path!r}, before {self.model!r}")

    def tokens_of(self, text: str) -> list[int] | None:
        return tokenized(self.client, self.model, text)


def _model_info(client: Client) -> dict[str, Any]:
    """What the server serves; newer releases have a second name for the path."""
    try:
        info = client.json("GET", "/get_model_info", limit=client.first)
    except Fault as fault:
        if "HTTP 404" not in fault.text:
            raise
        info = client.json("GET", "/model_info", limit=client.first)
    if not isinstance(info, dict) or "model_path" not in info:
        raise Fault("what answers does not say which model it serves", passing=False)
    return info


def _scores(meta: dict[str, Any], tokens: Sequence[int]) -> list[float]:
    """Log-probabilities of the tokens; their ids are echoed and must be the ones sent."""
    given = _after_first(meta, "input_token_logprobs", len(tokens))
    found = []
    for entry, token in zip(given, tokens):
        if not isinstance(entry, (list, tuple)) or len(entry) < 2:
            raise Fault("the scores have an unknown form", tries=3)
        # The last words of the vocabulary are echoed as 0.
        if entry[1] != token and entry[1] != 0:
            raise Fault(
                f"the scores do not belong to the row: token {token} came back as {entry[1]}",
                tries=3,
            )
        found.append(_logprob(entry[0]))
    return found


def _lists(meta: dict[str, Any], name: str, count: int) -> list[list[tuple[float, int]]]:
    """(log-probability, id) pairs of every position."""
    try:
        return [
            [(_logprob(e[0]), int(e[1])) for e in here or ()]
            for here in _after_first(meta, name, count)
        ]
    except (TypeError, ValueError, IndexError):
        raise Fault(f"{name} has an unknown form", tries=3) from None


def _after_first(meta: dict[str, Any], name: str, count: int) -> list[Any]:
    given = meta.get(name)
    if not isinstance(given, list) or len(given) != count + 1:
        size = len(given) - 1 if isinstance(given, list) else "no"
        raise Fault(f"{size} entries of {name} came back for {count} tokens", tries=3)
    return given[1:]


def _logprob(x: Any) -> float:
    return -math.inf if x is None or x < -9990.0 else float(x)
