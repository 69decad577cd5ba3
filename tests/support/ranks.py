"""Real processes for the tests of what is spread over them, and what they are asked to do.

One pool of gloo processes serves all tests of a module: a task is a function of this file's
neighbours, called on the first `world` of them with their process group.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PATIENCE = 120.0  # seconds for one task, on a busy machine too


class Pool:
    """Processes that stay: `pool(world, function, *args)` gives the result of every rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        place = Path(self.folder.name) / "store"
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, self.size, str(place), there), daemon=True
            )
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, world: int, function: Callable, *args: Any) -> list[Any]:
        if not self.processes:
            self.start()
        for pipe in self.pipes[:world]:
            pipe.send((world, function, args))
        waiting = dict(enumerate(self.pipes[:world]))
        found: dict[int, Any] = {}
        until = time.monotonic() + PATIENCE
        while waiting:
            for rank, pipe in list(waiting.items()):
                if pipe.poll(0.002):
                    found[rank] = self.answer(rank)
                    del waiting[rank]
            broken = [f"rank {r}: {x}" for r, (fine, x) in found.items() if not fine]
            # a rank that failed leaves the others in a collective call: a moment, then the message
            if broken:
                until = min(until, time.monotonic() + 1.0)
            if time.monotonic() > until:
                self.close()
                raise AssertionError("\n".join(broken) or f"no answer from {list(waiting)}")
        if broken:
            self.close()
            raise AssertionError("\n".join(broken))
        return [found[r][1] for r in range(world)]

    def answer(self, rank: int) -> tuple[bool, Any]:
        try:
            return self.pipes[rank].recv()
        except EOFError:
            return False, "the process ended"

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()
        if self.processes:
            self.folder.cleanup()
        self.pipes, self.processes = [], []


def serve(rank: int, size: int, place: str, pipe: Connection) -> None:
    """A process of the pool, until it is ended."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE),
    )
    groups = {w: dist.new_group(list(range(w))) for w in range(2, size + 1)}
    while True:
        try:
            world, function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, function(groups[world], *args)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send(answer)


__all__ = ["Pool"]
