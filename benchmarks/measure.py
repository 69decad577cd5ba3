"""How time and memory are measured: one thread, processor time, one process per variant, in turns.

A machine is rarely idle, so wall-clock time says little. Every variant of a row (the bare products,
ours, the peers) lives in its own process, forked from one parent that holds the inputs; the
parent lets them run one after the other, round after round, so that whatever else happens on the
machine happens to all of them. Seconds are processor seconds of the process (user and system, all
threads). A ratio is the median of the ratios of neighbouring runs.

Memory is the peak of the process (VmHWM, reset before the call) above what it held before its
first real call: inputs, libraries and the interpreter do not count, gradients of the caller do.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import multiprocessing as mp
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("opdsl", "torch", "transformers", "trl", "liger-kernel", "numpy")

Loss = Callable[[], "object"]
"""() -> a scalar loss that is differentiable in what the worker was given."""


def one_thread() -> None:
    """Before torch is imported: OpenMP, MKL and the compile pool use one thread each."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import torch

    torch.set_num_threads(1)


def environment() -> dict[str, object]:
    """Versions and hardware, for the JSON."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    flags = ""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
        if line.startswith("flags"):
            flags = line
            break
    vector = [x for x in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {x}" in flags]
    return {
        "versions": versions,
        "python": platform.python_version(),
        "cpu": model,
        "vector_units": vector,
        "cores": os.cpu_count(),
        "threads": 1,
        "date": time.strftime("%Y-%m-%d"),
    }


def save(name: str, content: Mapping[str, object]) -> Path:
    """Write results/NAME.json: `content` beside the environment."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **content}, indent=1) + "\n")
    return path


def read(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def status_mb(key: str) -> float:
    """VmRSS or VmHWM of this process, in MB (10^6 bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(key)


def reset_peak() -> None:
    """VmHWM := VmRSS (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def trim() -> None:
    """Give freed memory back: what the parent left behind would hide what a call takes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass
class Series:
    """The runs of one variant: processor seconds, peak MB, and what it computed."""

    seconds: list[float] = field(default_factory=list)
    first_seconds: float = 0.0
    peak_mb: float = 0.0
    facts: dict[str, float] = field(default_factory=dict)
    failed: str = ""

    def summary(self) -> dict[str, object]:
        if self.failed:
            return {"failed": self.failed}
        s = self.seconds
        return {
            "seconds": round(statistics.median(s), 4),
            "spread": [round(min(s), 4), round(max(s), 4)],
            "runs": [round(x, 4) for x in s],
            "first_seconds": round(self.first_seconds, 4),
            "peak_mb": round(self.peak_mb, 1),
            **{k: float(f"{v:.7g}") for k, v in self.facts.items()},
        }


class Variant:
    """A variant in a process of its own: `start`, then `run` as often as wanted, then `stop`."""

    def __init__(
        self,
        name: str,
        make: Callable[[], tuple[Loss, list]],
        compiled: bool = False,
        short: bool = False,
    ):
        """compiled: the first call compiles. short: fewer rounds, and the first call counts."""
        self.name, self.make, self.compiled, self.short = name, make, compiled, short
        self.series = Series()

    def start(self) -> None:
        context = mp.get_context("fork")
        self.here, there = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(self.make, self.compiled, there), daemon=True
        )
        self.process.start()
        there.close()

    def ask(self, what: str) -> dict:
        """One answer of the worker; a worker that failed or died is marked and not asked again."""
        if self.series.failed:
            return {}
        try:
            self.here.send(what)
            answer = self.here.recv()
        except (EOFError, BrokenPipeError):
            answer = {"failed": f"the process ended with {self.process.exitcode}"}
        if "failed" in answer:
            self.series.failed = answer["failed"]
        return answer

    def warm(self) -> None:
        answer = self.ask("warm")
        self.series.first_seconds = answer.get("seconds", 0.0)
        self.series.facts = answer.get("facts", {})
        if self.short and not self.compiled and "seconds" in answer:
            self.series.seconds.append(answer["seconds"])
            self.series.peak_mb = answer["peak_mb"]

    def run(self) -> None:
        answer = self.ask("run")
        if "seconds" in answer:
            self.series.seconds.append(answer["seconds"])
            self.series.peak_mb = max(self.series.peak_mb, answer["peak_mb"])

    def stop(self) -> None:
        if not self.series.failed:
            self.here.send("stop")
        self.process.join()


def _serve(make, compiled: bool, pipe) -> None:
    """The worker: builds the loss, then answers `warm` and `run` until `stop`."""
    parent = os.getppid()
    try:
        loss, leaves = make()
        gc.collect()
        trim()
        before = status_mb("VmRSS")
        while (what := _next(pipe, parent)) != "stop":
            for x in leaves:
                x.grad = None
            gc.collect()
            reset_peak()
            start = time.process_time()
            value = loss()
            if leaves:
                value.backward()  # type: ignore[attr-defined]
            seconds = time.process_time() - start
            answer = {"seconds": seconds, "peak_mb": status_mb("VmHWM") - before}
            if what == "warm":
                answer["facts"] = _facts(value, leaves)
                if compiled:  # the compiler's own modules are no memory of the loss
                    for x in leaves:
                        x.grad = None
                    value = None
                    gc.collect()
                    before = status_mb("VmRSS")
            pipe.send(answer)
    except Exception as error:  # the parent goes on with the other variants
        lines = traceback.format_exc().strip().splitlines()
        pipe.send({"failed": f"{type(error).__name__}: {error}"[:300], "trace": lines[-6:]})


def _next(pipe, parent: int) -> str:
    """The next request; "stop" once the parent is gone, however it went."""
    while not pipe.poll(1.0):
        if os.getppid() != parent:
            return "stop"
    return pipe.recv()


def _facts(value, leaves) -> dict[str, float]:
    """Numbers two variants must agree in: the loss, and the size and a projection of each gradient."""
    import torch

    if not leaves:
        return {}
    found = {"loss": float(value.detach())}
    for i, x in enumerate(leaves):
        g = x.grad.detach()
        found[f"norm_{i}"] = float(g.float().norm())
        wave = torch.sin(torch.arange(g.shape[-1], dtype=torch.float32))
        found[f"along_{i}"] = float((g.float() @ wave).double().pow(2).sum().sqrt())
    return found


def interleaved(
    variants: list[Variant], rounds: int, say: Callable[[str], None] = print
) -> dict[str, Series]:
    """Start every variant, warm each, then `rounds` rounds in turns; two fewer for short ones."""
    for v in variants:
        v.start()
        v.warm()
        if v.series.failed:
            say(f"    {v.name}: {v.series.failed}")
    for i in range(rounds):
        for v in variants:
            if not v.short or i < max(1, rounds - 2):
                v.run()
    for v in variants:
        v.stop()
    return {v.name: v.series for v in variants}


def ratio(a: Series, b: Series) -> float | None:
    """Median over rounds of a's seconds per b's."""
    if a.failed or b.failed or not a.seconds or not b.seconds:
        return None
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds))


def disagreement(a: Series, b: Series) -> float | None:
    """Largest relative difference of loss and gradient sizes; None where one did not run."""
    shared = a.facts.keys() & b.facts.keys()
    if a.failed or b.failed or not shared:
        return None
    scale = {k: max(abs(a.facts[k]), abs(b.facts[k]), 1e-12) for k in shared}
    return max(abs(a.facts[k] - b.facts[k]) / scale[k] for k in shared)
