"""The connection of a run to one teacher outside its process: asking, checking, asking again.

`ask` sends the rows of a batch in as many requests as the server takes, checks every answer, and
tries what may pass again until the deadline of the batch. What comes out is right or a `Fault`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from opdsl.train.errors import problem
from opdsl.train.teachers.answers import check
from opdsl.train.teachers.capabilities import Wants
from opdsl.train.teachers.servers import Server, connect
from opdsl.train.teachers.sources import Source
from opdsl.train.teachers.transport import KEY_VARIABLE, Client, Fault, key_from
from opdsl.train.teachers.wire import Row, RowScores, Want

DEADLINE = 300.0  # seconds for the scores of one batch, with all tries


@dataclass(frozen=True)
class Patience:
    """What to do when the scores of a batch cannot be had: `halt`, `pause` until the teacher is
    back, or `drop_batch` up to `most` times in a run."""

    kind: str = "halt"
    most: int = 0

    @classmethod
    def parse(cls, text: str) -> Patience:
        """Raises RunProblem OPD112."""
        found = re.fullmatch(r"drop_batch\(\s*(?:max\s*=?\s*)?(\d+)\s*\)", text.strip())
        if found and int(found[1]) > 0:
            return cls("drop_batch", int(found[1]))
        if text.strip() in ("halt", "pause"):
            return cls(text.strip())
        raise problem(
            "OPD112",
            f"--teacher-failure {text!r} is not known",
            helps=["halt, pause, or drop_batch(N): leave out up to N batches"],
            exit_code=2,
        )


class Link:
    """A server that has answered once, and what this run wants of it.

    vocabulary: words that scores are over and ids lie in; set once the student is known.
    """

    def __init__(self, name: str, server: Server, wants: Wants):
        self.name, self.server, self.wants = name, server, wants
        self.vocabulary = server.vocabulary or 1 << 31

    @property
    def client(self) -> Client:
        return self.server.client

    def ask(self, rows: Sequence[Row], want: Want) -> list[RowScores]:
        """Checked scores of all rows. Raises Fault, or Changed."""
        until = time.monotonic() + self.client.deadline
        pieces = split(rows, self.server.per_request)

        def one(piece: list[Row]) -> list[RowScores]:
            def attempt(limit: float) -> list[RowScores]:
                found = self.server.score(piece, want, limit)
                check(piece, found, want, self.vocabulary)
                return found

            return self.client.retried(attempt, until)

        if len(pieces) == 1 or self.server.at_once == 1:
            parts = [one(piece) for piece in pieces]
        else:
            with ThreadPoolExecutor(min(self.server.at_once, len(pieces))) as pool:
                parts = list(pool.map(one, pieces))
        return [scores for part in parts for scores in part]


def split(rows: Sequence[Row], most: int) -> list[list[Row]]:
    """The rows in their order, in runs whose longest row times their number is at most `most`;
    a row that is longer alone goes alone."""
    pieces: list[list[Row]] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.tokens))
        if not pieces or longest * (len(pieces[-1]) + 1) > most:
            pieces.append([])
            longest = len(row.tokens)
        pieces[-1].append(row)
    return pieces


def open_link(name: str, source: Source, wants: Wants, settings: Any) -> Link:
    """The link to a server. Raises RunProblem OPD730 if it is not there or not what it should be.

    settings: `teacher_timeout` (seconds, None: DEADLINE), `teacher_key_env` (None: KEY_VARIABLE).
    """
    deadline = settings.teacher_timeout or DEADLINE
    variable = settings.teacher_key_env or KEY_VARIABLE
    key = key_from(variable)
    if settings.teacher_key_env and key is None:
        raise problem(
            "OPD730",
            f"teacher {name}: the environment variable {variable} holds no key",
            helps=[f"export {variable}=…"],
        )
    client = Client(source, deadline, key)
    until = time.monotonic() + min(client.first, deadline)
    try:
        server = client.retried(lambda limit: connect(client, source, wants), until)
    except Fault as fault:
        raise absent(name, source, fault, variable) from None
    return Link(name, server, wants)


def absent(name: str, source: Source, fault: Fault, variable: str):
    """The problem of a teacher that is not there at the start of a run."""
    start = {
        "opdsl": f"opdsl serve MODEL --port {source.port}",
        "vllm": f"vllm serve MODEL --port {source.port} --max-logprobs 64",
        "sglang": f"python -m sglang.launch_server --model-path MODEL --port {source.port}",
    }[source.kind]
    if "HTTP 401" in fault.text or "HTTP 403" in fault.text:
        helps = [f"put the server's key into the environment: export {variable}=…"]
    elif fault.there:
        helps = [f"is this the right address? {start}"]
    else:
        helps = [f"start it: {start}"]
    return problem(
        "OPD730", f"teacher {name}: no scores from {source.text}: {fault.text}", helps=helps
    )
