"""The GPU table in one command: `python -m benchmarks.gpu [--rows …] [--quick] [--no-tests]`.

Runs the kernels' correctness suite (`pytest -m gpu`), then every row of the GPU table: the bare
products (the floor, measured here, in the chunks ours uses), ours with generated row kernels, ours
with torch rows, and the peers that are installed. Writes results/gpu.json. bfloat16 weights and
hidden states, float32 logits, gradients of both. Milliseconds are medians of CUDA events; memory is
the peak of the allocator above what the inputs hold. `--dry` walks through everything at tiny
shapes on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.specs import compiled
from opdsl.emit.kernels.head import largest, row_chunks

T = 64  # tokens of a sequence
K = 64  # served candidates


@dataclass(frozen=True)
class Row:
    """One row of the table. Ht: hidden width of the teacher, 0 without one. target in ms."""

    spec: str
    N: int
    H: int
    V: int
    Ht: int = 0
    target: float | None = None
    given: str = "sampled"  # what the batch holds beside the student
    products: int = 3  # of the student's head in the floor; 0: none

    @property
    def name(self) -> str:
        width = f"({self.H} <- {self.Ht})" if self.Ht not in (0, self.H) else f"{self.H}"
        return f"{self.spec} {self.N} x {width} x {self.V}"


ROWS = (
    Row("sampled", 8192, 4096, 131072, target=42.0),
    Row("sampled", 8192, 4096, 151936, target=49.0),
    Row("reverse KL", 8192, 2048, 128256, 4096, 38.0, "dense"),
    Row("JSD", 8192, 2048, 128256, 4096, 38.0, "dense"),
    Row("JSD", 8192, 4096, 128256, 4096, 55.0, "dense"),
    Row("top-64 renormalised", 8192, 4096, 151936, target=12.0, given="list", products=0),
    Row("top-64 tail bin", 8192, 4096, 151936, given="list"),
    Row("sampled", 32768, 1024, 151936, target=61.9),
    Row("reverse KL", 32768, 1024, 151936, 1024, 82.6, "dense"),
    Row("whitened returns", 8192, 4096, 128256, target=55.0, products=4),
)


@dataclass
class Data:
    """h, ht [N, H], W, Wt [V, H] in bfloat16; y, logp_y, rollout_y [N]; ids, logp [N, K]."""

    row: Row
    h: Tensor
    W: Tensor
    ht: Tensor | None
    Wt: Tensor | None
    y: Tensor
    ids: Tensor
    logp: Tensor
    logp_y: Tensor
    rollout_y: Tensor

    def seqs(self, x: Tensor) -> Tensor:
        return x.reshape(-1, T, *x.shape[1:])


def make(row: Row, device: str) -> Data:
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=g, device=device) * scale).to(kind)

    h, W = normal(row.N, row.H), normal(row.V, row.H, scale=3 / row.H**0.5)
    ht = normal(row.N, row.Ht) if row.Ht else None
    Wt = normal(row.V, row.Ht, scale=3 / row.Ht**0.5) if row.Ht else None
    some = torch.rand(row.N, K, generator=g, device=device)
    ids = torch.stack([torch.randperm(row.V, generator=g, device=device)[:K] for _ in range(64)])
    y = torch.randint(row.V, (row.N,), generator=g, device=device)
    logp = torch.log_softmax(8 * some, -1).sort(1, descending=True).values
    logp_y = -torch.rand(row.N, generator=g, device=device) - 0.1
    return Data(row, h, W, ht, Wt, y, ids.repeat(-(-row.N // 64), 1)[: row.N], logp, logp_y, logp_y - 0.05)  # fmt: skip


# ---- variants: () -> loss or None, with the leaves whose gradient is taken -----------------------

Loss = Callable[[], Tensor | None]


def floor(d: Data) -> tuple[Loss, list[Tensor]]:
    """The products alone, written into buffers that are reused."""
    row, device = d.row, d.h.device
    chunks = row_chunks(row.N, row.V, device)
    c = largest(chunks)
    mixed = {"out_dtype": torch.float32} if device.type == "cuda" else {}
    z, u = (torch.empty(c, row.V, device=device) for _ in range(2))
    low = torch.zeros(c, row.V, dtype=d.h.dtype, device=device)
    dh = torch.empty(row.N, row.H, device=device)
    dW = torch.zeros(row.V, row.H, device=device)

    def run() -> None:
        for start, stop in chunks:
            h, n = d.h[start:stop], stop - start
            for _ in range(row.products - 2):  # a coupled method computes its logits twice
                torch.mm(h, d.W.T, out=z[:n], **mixed)
            if d.ht is not None and d.Wt is not None:
                torch.mm(d.ht[start:stop], d.Wt.T, out=u[:n], **mixed)
            torch.mm(low[:n], d.W, out=dh[start:stop], **mixed)
            torch.addmm(dW, low[:n].T, h, out=dW, **mixed)

    return run, []


def ours(d: Data, kernels: bool) -> tuple[Loss, list[Tensor]]:
    from opdsl import Batch

    os.environ["OPDSL_TRITON"] = "1" if kernels else "0"
    module = compiled(d.row.spec).loss
    h, W = d.h.detach().requires_grad_(), d.W.detach().requires_grad_()
    more: dict[str, object] = {"rollout_logprobs": d.seqs(d.rollout_y)}
    if d.row.given == "dense":
        more |= {"teacher_hidden": d.seqs(d.ht), "teacher_head": d.Wt}  # type: ignore[arg-type]
    elif d.row.given == "list":
        more |= {"teacher_topk_ids": d.seqs(d.ids), "teacher_topk_logprobs": d.seqs(d.logp)}
    else:
        more |= {"teacher_logprobs": {"T": d.seqs(d.logp_y)}}
    mask = torch.ones(d.row.N // T, T, dtype=torch.bool, device=h.device)
    more["group"] = torch.arange(d.row.N // T, device=h.device) // 4

    def run() -> Tensor:
        os.environ["OPDSL_TRITON"] = "1" if kernels else "0"
        batch = Batch.from_hidden(d.seqs(h), W, tokens=d.seqs(d.y), mask=mask, **more)  # type: ignore[arg-type]
        return module(batch).loss

    return run, [h, W]


def liger(d: Data) -> tuple[Loss, list[Tensor]]:
    """The sampled row against its fused cross entropy (the same work), dense rows against its JSD."""
    h, W = d.h.detach().requires_grad_(), d.W.detach().requires_grad_()
    if d.row.given == "dense":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        beta = {"reverse KL": 1.0, "forward KL": 0.0}.get(d.row.spec, 0.5)
        f = LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta)
        return lambda: f(h, W, d.ht, d.Wt, d.y), [h, W]
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    f = LigerFusedLinearCrossEntropyLoss()
    return lambda: f(W, h, d.y), [h, W]


def trl(d: Data) -> tuple[Loss, list[Tensor]]:
    h, W = d.h.detach().requires_grad_(), d.W.detach().requires_grad_()
    if d.row.given == "dense":
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as F

        beta = {"reverse KL": 1.0, "forward KL": 0.0}.get(d.row.spec, 0.5)
        return lambda: F.apply(h, W, None, d.ht, d.Wt, None, beta)[0].mean(), [h, W]
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as width

    args = (None, d.y, 1.0, width, None, 1.0, ())
    return lambda: -ChunkedLogProbFunction.apply(h, W, *args)[0].mean(), [h, W]


def naive(d: Data) -> tuple[Loss, list[Tensor]]:
    h, W = d.h.detach().requires_grad_(), d.W.detach().requires_grad_()

    def run() -> Tensor:
        s = torch.log_softmax((h @ W.T).float(), -1)
        if d.ht is None or d.Wt is None:
            return -s.gather(1, d.y[:, None]).mean()
        with torch.no_grad():
            t = torch.log_softmax((d.ht @ d.Wt.T).float(), -1)
        return (s.exp() * (s - t)).sum(-1).mean()

    return run, [h, W]


def variants(row: Row) -> dict[str, Callable]:
    found: dict[str, Callable] = {"floor": floor} if row.products else {}
    found |= {"ours": partial(ours, kernels=True), "ours, torch rows": partial(ours, kernels=False)}
    if row.spec in ("sampled", "reverse KL", "JSD"):
        found |= {"naive": naive} if row.spec != "JSD" else {}
        peers = {"Liger": ("liger_kernel", liger), "TRL": ("trl", trl)}
        found |= {k: f for k, (name, f) in peers.items() if importlib.util.find_spec(name)}
    return found


# ---- measuring -------------------------------------------------------------------------------------


def timed(make_: Callable, d: Data, repeats: int) -> dict[str, object]:
    """Median and spread in ms, peak in MB, loss and size of each gradient; or why it failed."""
    cuda = d.h.is_cuda
    try:
        run, leaves = make_(d)
        runs, loss = [], None
        for i in range(repeats + 2):
            for x in leaves:
                x.grad = None
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                marks[0].record()
            start = time.perf_counter()
            loss = run()
            if loss is not None:
                loss.backward()
            if cuda:
                marks[1].record()
                torch.cuda.synchronize()
            ms = marks[0].elapsed_time(marks[1]) if cuda else 1e3 * (time.perf_counter() - start)
            runs += [ms] if i >= 2 else []
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if cuda else 0.0
        facts = {} if loss is None else {"loss": float(loss.detach())}
        facts |= {f"norm_{i}": float(x.grad.float().norm()) for i, x in enumerate(leaves)}
        spread = [round(min(runs), 3), round(max(runs), 3)]
        ms = round(statistics.median(runs), 3)
        return {"ms": ms, "spread": spread, "peak_mb": round(peak, 1), **facts}
    except Exception as error:  # out of memory, a peer of another version: the table goes on
        return {"failed": f"{type(error).__name__}: {error}"[:200]}
    finally:
        if cuda:
            torch.cuda.empty_cache()


def scoring(row: Row, device: str, repeats: int) -> dict[str, object]:
    """A tile of a teacher's logits: log-probabilities of 64 ids, entropy, the top 64."""
    d = make(replace(row, N=min(row.N, 4096), H=64, Ht=0), device)
    z = (d.h @ d.W.T).contiguous()

    def torch_rows(_: Data) -> tuple[Loss, list[Tensor]]:
        def run() -> None:
            logp = torch.log_softmax(z.float(), -1)
            logp.gather(1, d.ids), logp.topk(K, -1), -(logp.exp() * logp).sum(-1)

        return run, []

    def one_read(_: Data) -> tuple[Loss, list[Tensor]]:
        from opdsl.emit.kernels.triton_score import score

        return lambda: (score(z, d.ids, K), None)[1], []

    def copy(_: Data) -> tuple[Loss, list[Tensor]]:
        other = torch.empty_like(z)
        return lambda: (other.copy_(z), None)[1], []

    found = {"copy of the tile": timed(copy, d, repeats), "torch": timed(torch_rows, d, repeats)}
    return {"row": f"scores {tuple(z.shape)} {z.dtype}", "variants": {**found, "ours": timed(one_read, d, repeats)}}  # fmt: skip


def blocks(row: Row, repeats: int) -> dict[str, object]:
    """Ours with other widths of the row kernels' blocks."""
    from opdsl.emit.kernels import triton_launch

    d, found, usual = make(row, "cuda"), {}, triton_launch.BLOCK
    for width in (1024, 2048, 4096, 8192):
        triton_launch.BLOCK = width
        found[f"blocks of {width}"] = timed(partial(ours, kernels=True), d, repeats)
    triton_launch.BLOCK = usual
    return {"row": f"{row.name}, by block", "variants": found}


def table(rows: list[Row], device: str, repeats: int) -> list[dict[str, object]]:
    out = []
    for row in rows:
        d = make(row, device)
        found = {name: timed(f, d, repeats) for name, f in variants(row).items()}
        us, base = found["ours"].get("ms"), found.get("floor", {}).get("ms")
        entry: dict[str, object] = {"row": row.name, "target_ms": row.target, "variants": found}
        if us and base:
            entry["times_floor"] = round(us / base, 3)  # type: ignore[operator]
        if us and row.target and device == "cuda":
            entry["met"] = us <= row.target  # type: ignore[operator]
        out.append(entry)
        show(entry)
        del d
    return out


def show(entry: dict) -> None:
    print(entry["row"], "" if "times_floor" not in entry else f"  {entry['times_floor']} x floor")
    for name, v in entry["variants"].items():
        what = v.get("failed") or f"{v['ms']:9.2f} ms {v['peak_mb']:9.0f} MB"
        print(f"    {name:20} {what}", flush=True)


def tests() -> dict[str, object]:
    """The correctness suite on this GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_triton.py", "tests/test_kernels.py"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr[-300:]]
    print("correctness:", last[0], flush=True)
    return {"command": " ".join(command[1:]), "passed": done.returncode == 0, "summary": last[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", help="beginnings of names, separated by ;")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="an eighth of the rows of each shape")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--blocks", action="store_true", help="also other widths of kernel blocks")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU; writes nothing")
    args = parser.parse_args()
    rows = list(ROWS)
    if args.rows:
        rows = [r for r in rows if any(r.name.startswith(x) for x in args.rows.split(";"))]
    if args.dry:
        tiny = [replace(r, N=512, H=16, V=384, Ht=min(r.Ht, 32), target=None) for r in rows]
        table(tiny, "cpu", 1)
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured (try --dry)")
        return 1
    if args.quick:
        rows = [replace(r, N=r.N // 8, target=None) for r in rows]
    suite = {} if args.no_tests else tests()
    found = [*table(rows, "cuda", args.repeats), scoring(ROWS[1], "cuda", args.repeats)]
    show(found[-1])
    if args.blocks:
        for row in (ROWS[1], ROWS[3]):
            found.append(blocks(row, args.repeats))
            show(found[-1])
    versions = {x: importlib.metadata.version(x) for x in ("torch", "triton")}
    gpu = {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **versions}
    print("written to", measure.save("gpu", {"gpu": gpu, "correctness": suite, "rows": found}))
    return 0 if suite.get("passed", True) else 1


if __name__ == "__main__":
    sys.exit(main())
