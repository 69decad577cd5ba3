"""A bounded queue of scoring requests and the one thread that works through it.

One thread, because one model is one queue anyway, and because an answer must not depend on what
else is asked: requests are never merged. Back-pressure is a full queue, and a request whose asker
has stopped waiting is not computed.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from opdsl.train.teachers.wire import Row, RowScores, Want


class Full(Exception):
    """The queue takes no more; `after` seconds is when to ask again."""

    def __init__(self, after: int):
        super().__init__(f"ask again in {after} s")
        self.after = after


class Closing(Exception):
    """The server is shutting down."""


@dataclass
class Job:
    """One request under way. expires: monotonic time at which its asker gives up."""

    rows: Sequence[Row]
    want: Want
    expires: float
    done: threading.Event = field(default_factory=threading.Event)
    scores: list[RowScores] | None = None
    error: BaseException | None = None

    def finish(self, scores: list[RowScores] | None, error: BaseException | None) -> None:
        self.scores, self.error = scores, error
        self.done.set()


class Jobs:
    """The queue and its thread. work(rows, want) computes; setting(): a context for the thread."""

    def __init__(
        self,
        work: Callable[[Sequence[Row], Want], list[RowScores]],
        size: int,
        setting: Callable[[], Any],
    ):
        self.work, self.setting = work, setting
        self.queue: queue.Queue[Job | None] = queue.Queue(size)
        self.closing = threading.Event()
        self.answered = self.expired = 0
        self.seconds = 0.0  # mean time of a request, of the last ones most
        self.thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self.thread.start()

    def __len__(self) -> int:
        return self.queue.qsize()

    def put(self, rows: Sequence[Row], want: Want, within: float) -> Job:
        """Queue a request. Raises Full or Closing."""
        if self.closing.is_set():
            raise Closing
        job = Job(rows, want, time.monotonic() + within)
        try:
            self.queue.put_nowait(job)
        except queue.Full:
            raise Full(max(1, round(self.seconds * self.queue.maxsize))) from None
        if self.closing.is_set():  # closed in between: nobody may be left to work on it
            job.finish(None, Closing())
        return job

    def close(self, seconds: float = 30.0) -> None:
        """Finish the request in progress, refuse the others, and end."""
        self.closing.set()
        while True:
            try:
                job = self.queue.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job.finish(None, Closing())
        self.queue.put(None)
        self.thread.join(seconds)

    def _run(self) -> None:
        with self.setting():
            while (job := self.queue.get()) is not None:
                if self.closing.is_set():
                    job.finish(None, Closing())
                elif time.monotonic() >= job.expires:
                    self.expired += 1
                    job.finish(None, TimeoutError())
                else:
                    self._compute(job)

    def _compute(self, job: Job) -> None:
        began = time.monotonic()
        try:
            scores = self.work(job.rows, job.want)
        except BaseException as error:  # the asker hears of it; the thread goes on
            job.finish(None, error)
            return
        took = time.monotonic() - began
        self.seconds = took if not self.answered else 0.8 * self.seconds + 0.2 * took
        self.answered += 1
        job.finish(scores, None)
