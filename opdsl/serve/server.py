"""HTTP around a scorer: paths, limits, keys, back-pressure and a clean end.

    GET  /health       {"status": "ok", "queued": 0, …}; 503 while shutting down; needs no key
    GET  /v1/models    the model: name, vocabulary, tokenizer hash, weights, what it can give
    GET  /head         the output head in safetensors, for clients that read hidden states
    POST /score        see `opdsl.train.teachers.wire`

A bad request gets 400 and one sentence. 401 without the key, 411 and 413 for the body, 429 with
Retry-After when the queue is full, 503 when the server ends or memory has run out, 500 when the
model gives something that is no number. Every connection serves one request.

Bodies are JSON or safetensors; nothing is ever unpickled, and nothing that was sent is kept.
"""

from __future__ import annotations

import hmac
import json
import math
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from safetensors.torch import save as save_tensors

from opdsl.serve.jobs import Closing, Full, Jobs
from opdsl.train.memory import is_out_of_memory
from opdsl.train.runtime import threads_for
from opdsl.train.teachers.scorer import Scorer
from opdsl.train.teachers.wire import (
    BINARY,
    JSON,
    BadMessage,
    RowScores,
    Want,
    decode_request,
    encode_answer,
)

READ_SECONDS = 30.0  # between two signs of life of a client
BODY_SECONDS = 120.0  # for a whole request to arrive
MOST_SECONDS = 3600.0  # that a request may wait and compute
CONNECTIONS = 64  # at the same time


class ScoringServer(ThreadingHTTPServer):
    """A scorer on a port. Port 0 takes a free one; `url` says which. Call `start`, then `close`.

    queue: requests that may wait. max_body: bytes of the largest request. key: what must come as a
    bearer token, None for nothing.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self,
        scorer: Scorer,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        queue: int = 16,
        max_body: int = 256 << 20,
        key: str | None = None,
    ):
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), Handler)
        self.scorer, self.max_body, self.key = scorer, max_body, key
        device = scorer.device.type
        self.jobs = Jobs(scorer.score, queue, lambda: threads_for(scorer.parameters, device))
        self.slots = threading.BoundedSemaphore(CONNECTIONS)
        self.began, self.refused = time.monotonic(), 0
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else str(host)
        return f"http://{shown}:{port}"

    def start(self) -> ScoringServer:
        """Serve in a thread of its own."""
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Refuse what waits, finish what is being computed, free the port."""
        self.jobs.close()
        if self._thread is not None:
            self.shutdown()
            self._thread.join(5)
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for each connection, up to CONNECTIONS of them."""
        if not self.slots.acquire(blocking=False):
            self.refused += 1
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is the client's affair."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: ScoringServer
    server_version, sys_version = "opdsl", ""
    protocol_version = "HTTP/1.1"
    timeout = READ_SECONDS

    def do_GET(self) -> None:
        jobs, scorer = self.server.jobs, self.server.scorer
        if self.path == "/health":
            ending = jobs.closing.is_set()
            status = {
                "status": "ending" if ending else "ok",
                "queued": len(jobs),
                "answered": jobs.answered,
                "refused": self.server.refused,
                "expired": jobs.expired,
                "seconds": round(time.monotonic() - self.server.began, 1),
            }
            self._send(503 if ending else 200, JSON, json.dumps(status).encode())
        elif not self._allowed():
            self._fail(401, "this server asks for a key: Authorization: Bearer …")
        elif self.path == "/v1/models":
            body = {"object": "list", "data": [scorer.info()]}
            self._send(200, JSON, json.dumps(body).encode())
        elif self.path == "/head":
            if scorer.head is None:
                self._fail(400, "this model's head is more than a product; ask for logits")
                return
            tensors, numbers = scorer.head_tensors()
            self._send(200, BINARY, save_tensors(tensors, {"opdsl": json.dumps(numbers)}))
        else:
            self._fail(404, "paths: GET /health, /v1/models, /head; POST /score")

    def do_POST(self) -> None:
        body = self._body()
        if body is None:
            return
        if self.path != "/score":
            self._fail(404, "paths: GET /health, /v1/models, /head; POST /score")
            return
        try:
            found, meta = self._scores(body)
            accept = BINARY if BINARY in self.headers.get("Accept", "") else JSON
            answer = encode_answer(found, meta, accept)
        except BadMessage as error:
            self._fail(400, str(error))
        except Full as full:
            self._fail(429, "too many requests are waiting", full.after)
        except Closing:
            self._fail(503, "the server is shutting down", 5)
        except TimeoutError:
            self._fail(503, "the request waited too long", 1)
        except Exception as error:
            if is_out_of_memory(error):
                self._fail(503, "out of memory even for one row; a smaller row may fit", 5)
            else:
                self._fail(500, f"{type(error).__name__} while scoring")
        else:
            self._send(200, accept, answer)

    def _scores(self, body: bytes) -> tuple[list[RowScores], dict[str, Any]]:
        scorer = self.server.scorer
        rows, want, said = decode_request(body, self.headers.get("Content-Type", JSON))
        model = said.get("model")
        if model is not None and model != scorer.name:
            raise BadMessage(f"this server has the model {scorer.name!r}, not {model!r}")
        if want.whole and BINARY not in self.headers.get("Accept", ""):
            raise BadMessage(f"whole distributions are sent as {BINARY} only")
        scorer.check(rows, want)
        self._fits(rows, want)
        within = said.get("within", MOST_SECONDS)
        number = isinstance(within, (int, float)) and not isinstance(within, bool)
        if not number or not 0 < within <= MOST_SECONDS:
            raise BadMessage(f"`within` is a number of seconds up to {MOST_SECONDS:g}")
        job = self.server.jobs.put(rows, want, within)
        if not job.done.wait(within + 1):
            raise TimeoutError
        if job.error is not None:
            raise job.error
        assert job.scores is not None
        for one in job.scores:
            if bool(torch.isnan(one.sampled).any()):
                raise ArithmeticError("NaN")
        meta = {"model": scorer.name, "weights": scorer.weights, "temperature": want.temperature,
                "vocabulary": want.vocabulary or scorer.vocabulary}  # fmt: skip
        return job.scores, meta

    def _fits(self, rows: list[Any], want: Want) -> None:
        """An answer may be as large as the largest request."""
        N = sum(r.response for r in rows)
        scorer = self.server.scorer
        width = {"": 0, "logits": want.vocabulary or scorer.vocabulary, "hidden": scorer.width}
        wide = width[want.whole]
        size = N * 4 * (1 + 2 * want.top + wide)
        if size > 4 * self.server.max_body:
            raise BadMessage(
                f"the answer would have {size >> 20} MB, at most"
                f" {4 * self.server.max_body >> 20} are sent; ask for fewer rows"
            )

    # ---- the request and the answer ----------------------------------------------------------

    def _allowed(self) -> bool:
        key = self.server.key
        given = self.headers.get("Authorization", "")
        return key is None or hmac.compare_digest(given.encode(), f"Bearer {key}".encode())

    def _body(self) -> bytes | None:
        """What was sent, or None after an error was answered."""
        length = self.headers.get("Content-Length", "")
        if not self._allowed():
            self._fail(401, "this server asks for a key: Authorization: Bearer …")
        elif not length.isdecimal() or len(length) > 15:
            self._fail(411, "a request says how long its body is (Content-Length)")
        elif int(length) > self.server.max_body:
            self._fail(413, f"a request has at most {self.server.max_body >> 20} MB")
        else:
            try:
                return self._read(int(length))
            except TimeoutError:
                self._fail(408, f"the body did not arrive within {BODY_SECONDS:g} s")
            except OSError:
                pass
        return None

    def _read(self, length: int) -> bytes | None:
        """The body, within its time however slowly it drips."""
        until, pieces = time.monotonic() + BODY_SECONDS, []
        while length:
            if time.monotonic() > until:
                raise TimeoutError
            piece = self.rfile.read1(min(length, 1 << 20))
            if not piece:
                self._fail(400, "the body is shorter than its Content-Length")
                return None
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces)

    def _fail(self, status: int, message: str, after: int | None = None) -> None:
        if status != 401:
            self.server.refused += 1
        body = json.dumps({"error": message}).encode()
        more = {} if after is None else {"Retry-After": str(math.ceil(after))}
        self._send(status, JSON, body, more)

    def _send(
        self, status: int, content_type: str, body: bytes, more: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are counted, not logged: they hold what people wrote."""
