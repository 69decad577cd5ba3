"""Servers on localhost for tests of remote teachers: ours with scripted faults, and stand-ins that
speak vLLM's and SGLang's protocols, all computing with a tiny model of this process."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

from opdsl.serve.server import Handler, ScoringServer
from opdsl.train import models
from opdsl.train.teachers.scorer import Scorer
from opdsl.train.teachers.wire import Row, RowScores, Want


def scorer_of(folder: str, name: str = "tiny", **more: Any) -> Scorer:
    model = models.load_model(folder, "teacher", torch.float32, "cpu").requires_grad_(False)
    return Scorer(model, models.load_tokenizer(folder, "teacher"), name, **more)


# ---- ours, with faults ---------------------------------------------------------------------------


class FaultyServer(ScoringServer):
    """`opdsl serve` that does what `script` says for the next /score requests, then behaves.

    An entry is a status, or a word of `Faulty.do_POST`. always: the same for every request.
    """

    def __init__(self, scorer: Scorer, port: int = 0, **more: Any):
        super().__init__(scorer, port=port, **more)
        self.RequestHandlerClass = Faulty
        self.script: list[Any] = []
        self.always: Any = None
        self.asked = 0
        self.on_score: Callable[[int], None] = lambda number: None
        self.start()

    def kill(self) -> None:
        """Gone at once: the port refuses connections."""
        self.shutdown()
        self.server_close()


class Faulty(Handler):
    server: FaultyServer

    def do_POST(self) -> None:
        server = self.server
        server.asked += 1
        server.on_score(server.asked)
        action = server.always or (server.script.pop(0) if server.script else None)
        if action is None:
            super().do_POST()
        elif isinstance(action, int):
            self._body()
            self._fail(action, "scripted", 0 if action == 429 else None)
        elif action == "cut":
            self._body()
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"half of an ans")
            self.close_connection = True
        elif action == "drip":
            self._body()
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            for _ in range(200):
                try:
                    self.wfile.write(b"x")
                    self.wfile.flush()
                except OSError:
                    break
                time.sleep(0.05)
        elif action == "hang":
            time.sleep(3.0)
        elif action == "not http":
            self.wfile.write(b"\x00\x01\x02 what is this\r\n\r\n")
            self.close_connection = True
        elif action == "garbage":
            self._body()
            self._send(200, "application/safetensors", b"<html>it works</html>")
        else:
            self.spoil = action
            super().do_POST()

    spoil: str | None = None

    def _scores(self, body: bytes):
        found, meta = super()._scores(body)
        if self.spoil is not None:
            found = [spoiled(one, self.spoil) for one in found]
            if self.spoil == "fewer rows":
                found = found[:-1]
            if self.spoil == "other model":
                meta["model"] = "another"
            if self.spoil == "other weights":
                meta["weights"] = "0" * 64
        return found, meta


def spoiled(one: RowScores, how: str) -> RowScores:
    """Scores of a row with a fault in them."""
    if how == "nan":
        return replace(one, sampled=one.sampled.clone().fill_(math.nan))
    if how == "above zero":
        return replace(one, sampled=one.sampled + 50.0)
    if how == "fewer positions":
        return RowScores(**{k: None if v is None else v[:-1] for k, v in vars(one).items()})
    if how == "shift":
        return replace(one, sampled=one.sampled.roll(1))
    if how == "ids beyond" and one.top_ids is not None:
        return replace(one, top_ids=one.top_ids + 1000)
    if how == "too much mass" and one.top_logprobs is not None:
        return replace(one, top_logprobs=torch.zeros_like(one.top_logprobs))
    return one


# ---- the others ----------------------------------------------------------------------------------


class StandIn(ThreadingHTTPServer):
    """A server of another kind; `routes` maps "METHOD /path" to a function body -> (status, JSON)."""

    daemon_threads = True

    def __init__(self, routes: dict[str, Callable[[Any], tuple[int, Any]]]):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.routes = routes
        self.seen: list[tuple[str, Any]] = []
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Answer(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        self._answer(f"GET {self.path}", None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(f"POST {self.path}", body)

    def _answer(self, route: str, body: Any) -> None:
        self.server.seen.append((route, body))
        there = self.server.routes.get(route)
        status, answer = (404, {"detail": "Not Found"}) if there is None else there(body)
        data = json.dumps(answer).encode()  # as these servers do, NaN and Infinity included
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None: ...


def _all_positions(scorer: Scorer, tokens: list[int], top: int, ids: list | None = None):
    """Scores of every token but the first."""
    wide = None if ids is None else torch.tensor(ids)
    row = Row(tuple(tokens), 1, wide)
    want = Want(top=top)
    scorer.check([row], want)
    return scorer.score([row], want)[0]


def vllm(scorer: Scorer, max_logprobs: int = 64, ids: bool = True, name: str = "org/teacher"):
    """A vLLM server as documented, for prompts of token ids."""

    def entry(one: RowScores, t: int, token: int) -> dict[str, Any]:
        assert one.top_ids is not None and one.top_logprobs is not None
        pairs = {int(i): float(p) for i, p in zip(one.top_ids[t], one.top_logprobs[t])}
        pairs[token] = float(one.sampled[t])
        ranked = sorted(pairs.items(), key=lambda x: -x[1])
        return {
            str(i): {"logprob": max(p, -9999.0), "rank": r + 1, "decoded_token": f"t{i}"}
            for r, (i, p) in enumerate(ranked)
        }

    def prompt_logprobs(tokens: list[int], k: int) -> list[Any]:
        one = _all_positions(scorer, tokens, k)
        return [None] + [entry(one, t, token) for t, token in enumerate(tokens[1:])]

    def too_many(k: int) -> tuple[int, Any] | None:
        if k <= max_logprobs:
            return None
        message = (
            f"Requested prompt logprobs of {k}, which is greater than max allowed: {max_logprobs}"
        )
        return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}

    def completions(body: Any) -> tuple[int, Any]:
        k = body["prompt_logprobs"]
        choices = [
            {
                "index": i,
                "text": "x",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "prompt_logprobs": prompt_logprobs(tokens, k),
            }
            for i, tokens in enumerate(body["prompt"])
        ]
        answer = {"id": "cmpl-1", "object": "text_completion", "model": name, "choices": choices}
        return too_many(k) or (200, answer)

    def generate(body: Any) -> tuple[int, Any]:
        params, tokens = body["sampling_params"], body["token_ids"]
        asked, start = params["prompt_logprob_token_ids"], params["prompt_logprob_start"]
        refused = too_many(len(asked[0]))
        if refused:
            return refused
        matrix = []
        for t, row in enumerate(asked):
            one = _all_positions(scorer, tokens[: start + t + 2], 0, [row] * (start + t + 1))
            assert one.ids_logprobs is not None
            matrix.append(one.ids_logprobs[-1].tolist())
        file = io.BytesIO()
        np.save(file, np.array(matrix, dtype=np.float32))
        k = params.get("prompt_logprobs")
        return 200, {
            "request_id": "1",
            "choices": [{"index": 0, "token_ids": [1], "finish_reason": "length"}],
            "prompt_logprobs": prompt_logprobs(tokens, k) if k else None,
            "prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode(),
        }

    card = {"id": name, "object": "model", "owned_by": "vllm", "max_model_len": 64}
    routes: dict[str, Any] = {
        "GET /v1/models": lambda _: (200, {"object": "list", "data": [card]}),
        "POST /v1/completions": completions,
    }
    if ids:
        routes["POST /inference/v1/generate"] = generate
    return StandIn(routes)


def sglang(scorer: Scorer, path: str = "/models/teacher", short: int = 0):
    """An SGLang server as documented; `short` entries are missing from every list."""

    def generate(body: Any) -> tuple[int, Any]:
        tokens, start = body["input_ids"], body["logprob_start_len"]
        k, ids = body["top_logprobs_num"], body.get("token_ids_logprob")
        wide = None if ids is None else [ids] * (len(tokens) - 1)
        one = _all_positions(scorer, tokens, max(1, k), wide)
        last = scorer.vocabulary - 1  # echoed as 0
        scores = [[None, tokens[start] if tokens[start] < last else 0, None]]
        scores += [
            [float(one.sampled[t - 1]), tokens[t] if tokens[t] < last else 0, None]
            for t in range(start + 1, len(tokens))
        ]
        meta: dict[str, Any] = {
            "id": "1",
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(tokens),
            "completion_tokens": 0,
            "input_token_logprobs": scores,
            "output_token_logprobs": [],
        }
        if k:
            assert one.top_ids is not None and one.top_logprobs is not None
            meta["input_top_logprobs"] = [None] + [
                [[float(p), int(i), None] for i, p in zip(one.top_ids[t], one.top_logprobs[t])][
                    : k - short
                ]
                for t in range(start, len(tokens) - 1)
            ]
        if ids is not None:
            assert one.ids_logprobs is not None
            meta["input_token_ids_logprobs"] = [None] + [
                [[float(p), i, None] for i, p in zip(ids, one.ids_logprobs[t])]
                for t in range(start, len(tokens) - 1)
            ]
        return 200, {"text": "", "output_ids": [], "meta_info": meta}

    info = {"model_path": path, "tokenizer_path": path, "is_generation": True}
    return StandIn({"GET /get_model_info": lambda _: (200, info), "POST /generate": generate})
