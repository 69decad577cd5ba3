"""Device, precision, threads, and signals of one run.

CUDA trains with float32 weights under bfloat16 autocast and keeps frozen models in bfloat16;
the CPU computes in float32. Below a million parameters exactly one thread is used: with tensors
that small, waiting threads cost more than they help, and results do not depend on the machine.

One process per run: under a launcher with several processes the run is refused rather than
quietly trained several times over.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

from opdsl.train.errors import problem

SMALL_MODEL = 1_000_000  # parameters


@dataclass(frozen=True)
class Runtime:
    """Where and in which precision tensors are computed.

    accelerator: accelerate's object, or None for tiny models on the CPU, which need none.
    """

    device: Any  # torch.device
    precision: str  # "fp32" | "bf16"
    accelerator: Any = None

    @property
    def half(self) -> bool:
        return self.precision == "bf16"

    @property
    def frozen_dtype(self):
        """Dtype of models that are never updated."""
        import torch

        return torch.bfloat16 if self.half else torch.float32

    def autocast(self):
        """Context of every forward pass through a model's trunk."""
        return self.accelerator.autocast() if self.accelerator else contextlib.nullcontext()

    def backward(self, loss) -> None:
        if self.accelerator:
            self.accelerator.backward(loss)
        else:
            loss.backward()


def make_runtime(device: str | None, precision: str | None, tiny: bool) -> Runtime:
    """The runtime asked for, or the best one here. Raises RunProblem OPD701.

    tiny: the models are below a million parameters and no device was named: the CPU is faster.
    """
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise problem(
            "OPD701",
            "opdsl trains in one process, and this launcher started several",
            helps=["call `opdsl run` directly"],
            exit_code=3,
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise problem(
            "OPD701",
            f"unknown device {device!r}",
            helps=["--device cpu | cuda | cuda:1"],
            exit_code=2,
        ) from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise problem(
            "OPD701", "no CUDA device is available", helps=["--device cpu, or leave --device out"]
        )
    if (
        place.type == "cuda"
        and place.index is not None
        and place.index >= torch.cuda.device_count()
    ):
        raise problem("OPD701", f"there is no device {device}", helps=["--device cuda"])
    if precision is None:
        precision = "bf16" if place.type == "cuda" else "fp32"
    if precision not in ("fp32", "bf16"):
        raise problem(
            "OPD112", f"precision {precision!r} is not known", helps=["precision: fp32 or bf16"]
        )
    if tiny and place.type == "cpu" and precision == "fp32":
        return Runtime(place, precision)
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=place.type == "cpu", mixed_precision="bf16" if precision == "bf16" else "no"
    )
    return Runtime(place, precision, accelerator)


@contextlib.contextmanager
def threads_for(parameters: int, device_type: str):
    """One thread for small models on the CPU; torch's setting is put back afterwards."""
    import torch

    before = torch.get_num_threads()
    if parameters < SMALL_MODEL and device_type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Signals:
    """SIGINT and SIGTERM end the run after the step in progress; SIGUSR1 saves and goes on.

    A second SIGINT or SIGTERM acts at once, by the handler that was there before. Outside the
    main thread (notebooks' worker threads, tests) no handler can be set and none is.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False
        self._before: dict[int, Any] = {}

    def _on_stop(self, number: int, frame: Any) -> None:
        if self.stop is not None:
            signal.signal(number, self._before.get(number) or signal.SIG_DFL)
            signal.raise_signal(number)
        self.stop = number

    def _on_save(self, number: int, frame: Any) -> None:
        self.save = True

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM"):
                number = getattr(signal, name)
                self._before[number] = signal.signal(number, self._on_stop)
            if hasattr(signal, "SIGUSR1"):
                self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_save)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
