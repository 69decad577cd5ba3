"""Predicted against measured: peak memory and processor time of ten methods and shapes.

    python -m benchmarks.costs            # one subprocess per row; writes results/costs.json

The prediction is that of `opdsl explain --cost`; the measurement is loss and gradient on one
thread, memory the peak of a fresh process beyond its inputs.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROWS = (
    ("gkd_reverse", 512, 512, 32768),
    ("gkd", 512, 512, 32768),
    ("gkd_forward", 256, 128, 151936),
    ("sampled_opd", 1024, 256, 16384),
    ("topk_match", 1024, 512, 32768),
    ("cr_opd", 512, 128, 50000),
    ("sampled_rtg", 512, 256, 32768),
    ("entropy_aware", 512, 128, 32768),
    ("minillm", 512, 256, 32768),
    ("veto_reverse", 512, 512, 16384),
)
RESULTS = Path(__file__).parent / "results" / "costs.json"


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def measure(name: str, n: int, h: int, v: int) -> dict[str, object]:
    """One row, in this process: hidden states for the student and every teacher."""
    import torch

    import opdsl
    from opdsl.emit.cost import Shapes, cost, machine
    from opdsl.emit.plan import plans

    torch.set_num_threads(1)
    method = opdsl.load(name)
    g = torch.Generator().manual_seed(0)
    rows, length = 8, n // 8

    def hidden() -> torch.Tensor:
        return torch.randn(rows, length, h, generator=g)

    student, weight = hidden().requires_grad_(), torch.randn(v, h, generator=g).mul_(0.13)
    weight.requires_grad_()
    teacher, head = hidden(), torch.randn(v, h, generator=g).mul_(0.13)
    names = [t.name for t in method.spec.teachers if t.kind != "initial"] or ["T"]
    tokens = torch.randint(0, v, (rows, length), generator=g)

    def step() -> None:
        student.grad = weight.grad = None
        batch = opdsl.Batch.from_hidden(
            student, opdsl.Head(weight), tokens=tokens,
            mask=torch.ones(rows, length, dtype=torch.bool),
            teacher_hidden=dict.fromkeys(names, teacher),
            teacher_head=dict.fromkeys(names, opdsl.Head(head)),
            rollout_logprobs=torch.full((rows, length), -3.0), outcome=torch.ones(rows),
            group=torch.arange(rows) // 4, values=torch.zeros(rows, length + 1),
        )  # fmt: skip
        method.loss(batch).loss.backward()

    step()
    student.grad = weight.grad = None
    method.loss.scratch.buffers.clear()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, seconds = status("VmRSS"), []
    for _ in range(3):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    peak, took = status("VmHWM") - before, min(seconds)
    (plan,) = plans(method.compilation.emitted)
    said = cost(plan, Shapes(n, h, v), machine("cpu", h, v))
    return {
        "method": name, "N": n, "H": h, "V": v, "plan": plan.label,
        "predicted_mb": round(said.bytes / 2**20, 1), "measured_mb": round(peak / 2**20, 1),
        "predicted_s": round(said.seconds, 3), "measured_s": round(took, 3),
        "memory_ratio": round(said.bytes / peak, 2), "time_ratio": round(said.seconds / took, 2),
    }  # fmt: skip


def main() -> None:
    import torch

    found = []
    for row in ROWS:
        out = subprocess.run(
            [sys.executable, "-m", "benchmarks.costs", *map(str, row)],
            capture_output=True, text=True, check=True,
            # freed tiles go back at once, so that the peak is what was in use together
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
        ).stdout  # fmt: skip
        found.append(json.loads(out))
        r = found[-1]
        print(f"{r['method']:14} {r['N']}x{r['H']}x{r['V']:<7} {r['plan']:28} memory "
              f"{r['memory_ratio']:.2f}   time {r['time_ratio']:.2f}", flush=True)  # fmt: skip
    environment = {"python": platform.python_version(), "torch": torch.__version__,
                   "machine": platform.processor() or platform.machine()}  # fmt: skip
    RESULTS.write_text(json.dumps({"environment": environment, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:5]))))
    else:
        main()
