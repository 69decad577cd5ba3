"""One HTTP request, and a batch of them, within a deadline: the part of remote teachers that fails.

Every request has a connect and a read time-out, and a watch that cuts the connection when its
time is over, so that a server which answers one byte a minute cannot hold a run. What may pass
(no connection, a time-out, 429, 500, 502, 503, 504, a broken or implausible answer) is tried
again with capped exponential back-off and jitter until the deadline of the batch; a `Retry-After`
is honoured. What will not pass (401, 404, another model) ends at once.

Redirects are not followed, so that a key never travels to another host.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from opdsl.train.teachers.sources import Source

CONNECT_TIMEOUT = 5.0  # seconds
BACKOFF, BACKOFF_MOST = 0.1, 8.0  # seconds: the first and the longest wait between two tries
LARGEST_ANSWER = 4 << 30  # bytes
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
KEY_VARIABLE = "OPDSL_TEACHER_KEY"  # where a server's key is looked for if nothing else is said

Result = TypeVar("Result")


class Fault(Exception):
    """A request that gave no usable answer. One clause, without the address.

    passing: whether another try may succeed. after: seconds the server asked to wait.
    there: whether something answered at all. tries: how many in a row are enough of this fault,
    None for as many as the deadline allows.
    """

    def __init__(
        self,
        text: str,
        passing: bool = True,
        after: float = 0.0,
        there: bool = True,
        tries: int | None = None,
    ) -> None:
        super().__init__(text)
        self.text, self.passing, self.after, self.there = text, passing, after, there
        self.tries = tries


@dataclass
class Counts:
    """What happened on the wire, for the summary of a run."""

    requests: int = 0
    retries: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, text: str) -> None:
        with self.lock:
            self.faults[text] = self.faults.get(text, 0) + 1


class Client:
    """Requests to one server.

    key: sent as a bearer token; read from the environment by `key_from`, kept nowhere else.
    deadline: seconds for a batch with all its tries; a single try gets half of it, so that there
    is always time for a second one.
    """

    def __init__(self, source: Source, deadline: float, key: str | None = None):
        self.source, self.deadline, self._key = source, deadline, key
        self.first = min(10.0, deadline)  # seconds for a question that needs no computing
        self.counts = Counts()
        self.troubled = False  # a fault since somebody last looked
        self.stopped: Callable[[], bool] = lambda: False  # whether the run was asked to end
        # A generator of its own: the run's random streams must not depend on the network.
        self._jitter = random.Random()

    # ---- one request ---------------------------------------------------------------------

    def call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        content_type: str = "application/json",
        accept: str = "application/json",
        limit: float | None = None,
    ) -> bytes:
        """The body of a 200 answer. Raises Fault. limit: seconds for everything."""
        limit = self.deadline / 2 if limit is None else limit
        host = self.source.host
        context = ssl.create_default_context() if self.source.tls else None
        connection: http.client.HTTPConnection
        if context is not None:
            connection = http.client.HTTPSConnection(
                host, self.source.port, timeout=min(CONNECT_TIMEOUT, limit), context=context
            )
        else:
            connection = http.client.HTTPConnection(
                host, self.source.port, timeout=min(CONNECT_TIMEOUT, limit)
            )
        headers = {"Accept": accept, "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = content_type
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        with self.counts.lock:
            self.counts.requests += 1
        over = threading.Event()

        def cut() -> None:
            over.set()
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

        watch = threading.Timer(limit, cut)
        watch.daemon = True
        watch.start()
        there = False
        try:
            connection.connect()
            there = True
            connection.sock.settimeout(limit)
            connection.request(method, self.source.prefix + path, body, headers)
            answer = connection.getresponse()
            content = _all_of(answer)
            if over.is_set():
                raise TimeoutError
            if answer.length:  # a body without an end is only known by what is missing of it
                raise Fault("the answer broke off")
        except ssl.SSLCertVerificationError:
            raise Fault("its certificate is not trusted", passing=False) from None
        except (OSError, http.client.HTTPException) as error:
            if over.is_set() or isinstance(error, TimeoutError):
                text = f"no answer within {limit:.3g} s" if there else "no connection in time"
                raise Fault(text, there=there) from None
            raise Fault(_reason(error), there=there) from None
        finally:
            watch.cancel()
            connection.close()
        if answer.status != 200:
            raise _refused(answer.status, answer.getheader("Retry-After"), content)
        return content

    def json(self, method: str, path: str, body: Any = None, **more: Any) -> Any:
        """The same for JSON in and out."""
        data = None if body is None else json.dumps(body).encode()
        content = self.call(method, path, data, **more)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise Fault("the answer is not JSON") from None

    # ---- trying again --------------------------------------------------------------------

    def retried(self, attempt: Callable[[float], Result], until: float) -> Result:
        """`attempt(seconds it may take)`, again after every passing fault until the monotonic
        time `until`. Raises the last Fault."""
        number = 0
        while True:
            left = until - time.monotonic()
            try:
                return attempt(max(0.05, min(left, self.deadline / 2)))
            except Fault as fault:
                self.counts.fault(fault.text)
                self.troubled = True
                wait = min(BACKOFF_MOST, BACKOFF * 2**number) * (0.5 + self._jitter.random())
                wait = max(wait, fault.after)
                enough = fault.tries is not None and number + 1 >= fault.tries
                if not fault.passing or enough or time.monotonic() + wait >= until:
                    raise
            number += 1
            with self.counts.lock:
                self.counts.retries += 1
            self._sleep(wait)
            if self.stopped():
                raise Fault("the run was asked to end")

    def _sleep(self, seconds: float) -> None:
        """In short naps, so that a signal is seen."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.stopped():
            time.sleep(min(0.1, left))


def _all_of(answer: http.client.HTTPResponse) -> bytes:
    """The body, piece by piece: what a length in a header claims is not allocated on its word."""
    pieces, size = [], 0
    while piece := answer.read(1 << 20):
        pieces.append(piece)
        size += len(piece)
        if size > LARGEST_ANSWER:
            raise Fault(f"an answer of more than {LARGEST_ANSWER >> 30} GiB", passing=False)
    return b"".join(pieces)


def key_from(variable: str | None) -> str | None:
    """A server's key out of the environment; None if there is none."""
    key = os.environ.get(variable or KEY_VARIABLE, "").strip()
    if any(ord(c) < 33 or ord(c) > 126 for c in key):
        return None  # not a header value; the server will say that the key is missing
    return key or None


def _refused(status: int, after: str | None, content: bytes) -> Fault:
    """The fault behind an answer that is not 200, with what the server says about it."""
    said = ""
    try:
        body = json.loads(content)
        error = body.get("error", body.get("message", body.get("detail", "")))
        error = error.get("message", "") if isinstance(error, dict) else error
        said = str(error)[:200] if error else ""
    except (ValueError, AttributeError, RecursionError):
        pass
    said = "".join(c if c.isprintable() else " " for c in said)
    try:
        seconds = max(0.0, min(float(after or 0), 60.0))
    except ValueError:
        seconds = 0.0
    known = {
        401: "it asks for a key",
        403: "it does not accept the key",
        404: "it has no such path",
    }
    what = f"HTTP {status}" + (f" ({said or known.get(status)})" if said or status in known else "")
    return Fault(what, passing=status in PASSING, after=seconds)


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, socket.gaierror):
        return "the host name is unknown"
    if isinstance(error, http.client.RemoteDisconnected | ConnectionError):
        return "the connection broke off"
    if isinstance(error, http.client.IncompleteRead):
        return "the answer broke off"
    if isinstance(error, http.client.HTTPException):
        return "what answers does not speak HTTP"
    return (getattr(error, "strerror", None) or type(error).__name__).lower()
