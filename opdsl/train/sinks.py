"""Where figures of a run go beside its own files: TensorBoard, trackio, Weights & Biases.

`--log NAME` opens one. Each works in a thread of its own behind a queue: a sink that is slow,
broken or asks for something never holds a step up and never stops a run. What it loses is counted
and told once. Only numbers and the plan (without keys, see `redact`) are handed over; keys are
read by the packages themselves, from the environment.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from opdsl.train.errors import problem
from opdsl.train.opd_metrics import find
from opdsl.train.redact import redacted, redacted_value

WAITING = 10_000  # records a sink may be behind before newer ones are lost
PATIENCE = 15.0  # seconds a sink gets to finish after the last step
PROJECT = "opdsl"
THREAD = "opdsl log "  # begins the name of every sink's thread


@dataclass(frozen=True)
class Target:
    """What a sink is opened with. first: steps already done (a resumed run). ident: of this run
    with services that number runs, kept over a resume."""

    out: Path
    config: Mapping[str, Any]
    first: int
    ident: str


class Sink(Protocol):
    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


# ---- the three packages ----------------------------------------------------------------------------


class TensorBoard:
    """Event files under `tensorboard/` of the output folder."""

    def __init__(self, target: Target):
        module = importlib.import_module("torch.utils.tensorboard")
        again = {"purge_step": target.first + 1} if target.first else {}
        self.writer = module.SummaryWriter(log_dir=str(target.out / "tensorboard"), **again)
        text = json.dumps(target.config, indent=1, ensure_ascii=False)
        self.writer.add_text("plan", "    " + text.replace("\n", "\n    "))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """A run in trackio's own folder, or where its environment variables point."""

    def __init__(self, target: Target):
        self.module = importlib.import_module("trackio")
        self.module.init(
            project=PROJECT,
            name=f"{target.out.name}-{target.ident[:6]}",
            config=dict(target.config),
            resume="allow",
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self.module.log(dict(numbers), step=step)

    def close(self) -> None:
        self.module.finish()


class Wandb:
    """A run of the account in the environment; `WANDB_MODE=offline` keeps it in the folder."""

    def __init__(self, target: Target):
        module = importlib.import_module("wandb")
        self.run = module.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=target.out.name,
            dir=str(target.out),
            config=dict(target.config),
            id=target.ident,
            resume="allow",
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


# name -> (class, module that must import, package that brings it)
SINKS: dict[str, tuple[Callable[[Target], Sink], str, str]] = {
    "tensorboard": (TensorBoard, "torch.utils.tensorboard", "tensorboard"),
    "trackio": (Trackio, "trackio", "trackio"),
    "wandb": (Wandb, "wandb", "wandb"),
}


def check(names: Sequence[str]) -> None:
    """Refuse sinks that are unknown (OPD112) or whose package is missing (OPD740)."""
    for name in names:
        if name not in SINKS:
            raise problem("OPD112", f"--log {name}: no such sink", helps=[f"{', '.join(SINKS)}"])
        _, module, package = SINKS[name]
        try:
            importlib.import_module(module)
        except ImportError:
            raise problem(
                "OPD740",
                f"--log {name} needs the package `{package}`, which is not installed",
                helps=[f"pip install 'opdsl[{name}]'", f"or leave --log {name} out"],
            ) from None


# ---- a run's sinks ---------------------------------------------------------------------------------


class Sinks:
    """The open sinks of one run. Every method returns at once and raises nothing."""

    def __init__(
        self,
        names: Sequence[str],
        out: Path,
        config: Mapping[str, Any],
        first: int,
        say: Callable[[str], None],
    ):
        self.say, self.told = say, set[str]()
        unique = list(dict.fromkeys(names))
        ident = _ident(out, fresh=first == 0) if set(unique) - {"tensorboard"} else ""
        target = Target(out, redacted_value(dict(config)), first, ident)
        self.stdout = sys.stdout
        if unique:
            sys.stdout = _Aside(sys.stdout)  # type: ignore[assignment]
        self.workers = [_Worker(name, SINKS[name][0], target) for name in unique]

    def step(self, record: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """The figures of one optimizer step (of `metrics.jsonl` and `timings.jsonl`)."""
        if record.get("step", 0) >= 1:
            self._send(record["step"], {**figures(record), **pace(timing, record)})

    def evaluation(self, step: int, sets: Mapping[str, Any]) -> None:
        """Held-out accuracy, as in `evals.jsonl`."""
        numbers = {
            f"{name}/{mode}": found["accuracy"]
            for name, modes in sets.items()
            for mode, found in modes.items()
            if isinstance(found, Mapping) and found.get("accuracy") is not None
        }
        self._send(step, numbers)

    def close(self) -> dict[str, int]:
        """Finish within PATIENCE seconds; {what was lost: how often}."""
        for worker in self.workers:
            worker.finish()
        lost = {}
        for worker in self.workers:
            worker.join(PATIENCE)
            self._tell(worker)
            if worker.lost:
                lost[f"records lost by --log {worker.name}"] = worker.lost
        if isinstance(sys.stdout, _Aside):
            sys.stdout = self.stdout
        return lost

    def _send(self, step: int, numbers: Mapping[str, float]) -> None:
        for worker in self.workers:
            if numbers:
                worker.put(step, numbers)
            self._tell(worker)

    def _tell(self, worker: _Worker) -> None:
        if worker.fault and worker.name not in self.told:
            self.told.add(worker.name)
            self.say(f"note      --log {worker.name} fails ({worker.fault}); training goes on")


class _Aside:
    """stdout is for results: what a sink's thread prints goes to stderr instead."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        aside = threading.current_thread().name.startswith(THREAD)
        return (sys.stderr if aside else self.stream).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Worker:
    """One sink and its thread. lost: records it did not take; fault: what went wrong first."""

    def __init__(self, name: str, make: Callable[[Target], Sink], target: Target):
        self.name, self.make, self.target = name, make, target
        self.lost, self.fault = 0, ""
        self.queue: queue.Queue = queue.Queue(WAITING)
        self.thread = threading.Thread(target=self._work, name=THREAD + name, daemon=True)
        self.thread.start()

    def put(self, step: int, numbers: Mapping[str, float]) -> None:
        try:
            self.queue.put_nowait((step, dict(numbers)))
        except queue.Full:
            self._failed("it is too slow", 1)

    def finish(self) -> None:
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(None)

    def join(self, seconds: float) -> None:
        self.thread.join(seconds)
        if self.thread.is_alive():
            self._failed(f"not finished after {seconds:g} s", max(1, self.queue.qsize() - 1))

    def _work(self) -> None:
        sink = self._try(lambda: self.make(self.target), 0)
        while (item := self.queue.get()) is not None:
            if sink is None:
                self.lost += 1
                continue
            self._try(lambda item=item: sink.write(*item), 1)
        if sink is not None:
            self._try(sink.close, 0)

    def _try(self, call: Callable[[], Any], lost: int) -> Any:
        try:
            return call()
        except BaseException as error:  # a package may raise SystemExit; a run is not ended by it
            text = (str(error).strip().splitlines() or [""])[0]
            self._failed(redacted(f"{type(error).__name__}: {text}"[:200]), lost)
            return None

    def _failed(self, why: str, lost: int) -> None:
        self.fault = self.fault or why
        self.lost += lost


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a record under `group/name`; what is no finite number is left out."""
    out = {}
    for key, value in record.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or key == "step":
            continue
        if value == value and abs(value) != float("inf"):
            metric = find(key)
            out[f"{metric.group if metric else 'other'}/{key}"] = float(value)
    return out


def pace(timing: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each stage, and response tokens per second over all and by stage."""
    tokens = record.get("tokens") or 0
    out = {}
    for name, value in timing.items():
        if name == "tokens_per_second":
            out["pace/tokens_per_second"] = float(value)
        elif name != "step" and isinstance(value, (int, float)):
            out[f"pace/{name} (s)"] = float(value)
            if value > 0 and name != "seconds":
                out[f"pace/{name} (tokens per second)"] = tokens / value
    return out


def _ident(out: Path, fresh: bool) -> str:
    """A name for this run that a resumed one shares, kept in `sinks.json`."""
    place = out / "sinks.json"
    if not fresh:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(place.read_text(encoding="utf-8"))["id"])
    ident = secrets.token_hex(8)
    with contextlib.suppress(OSError):
        place.write_text(json.dumps({"id": ident}) + "\n", encoding="utf-8")
    return ident
