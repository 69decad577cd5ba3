"""The GPU table in one command: `python -m benchmarks.gpu`.

Runs the kernels' correctness suite (`pytest -m gpu`), then every row of the table
(`gpu_variants.py`): the bare products (the floor, measured here, in the chunks ours takes), ours
with generated row kernels, ours with torch rows, and the peers that are installed
(`pip install "opdsl[bench]"`). Prints Markdown, writes results/gpu.json.

Milliseconds are medians of CUDA events around loss and backward, launches included; memory is the
peak of the allocator above the inputs. Losses and gradients of all variants of a row are compared
with ours. `--check` stops where the suite fails. `--dry` walks through everything at tiny shapes
on a CPU and measures nothing of worth.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks import measure
from benchmarks.gpu_variants import ROWS, Data, K, Made, Row, make, ours, variants

SUITE = (
    "tests/test_triton.py",
    "tests/test_triton_edges.py",
    "tests/test_triton_fixed.py",
    "tests/test_kernels.py",
)
OWN = ("floor", "ours", "ours, torch rows")
WARM = 2  # calls before the first that counts: compilers, caches of the allocator
APART = 2e-2  # results further from ours are marked: a cotangent in bfloat16 is 0.3 % off


def timed(make_: Callable[[Data], Made], d: Data, repeats: int) -> dict[str, object]:
    """Median and spread in ms, peak in MB, loss and sizes of gradients; or why it failed."""
    cuda, before = d.h.is_cuda, 0
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    try:
        run, leaves = make_(d)
        runs, loss = [], None
        for i in range(repeats + WARM):
            for x in leaves:
                x.grad = None
            loss = None  # what it keeps alive is not of the next call
            if i == WARM and cuda:
                torch.cuda.reset_peak_memory_stats()
            loss, ms = called(run, cuda)
            runs += [ms] if i >= WARM else []
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if cuda else 0.0
        facts = {} if loss is None else {"loss": float(loss)}
        facts |= {f"norm_{i}": float(x.grad.float().norm()) for i, x in enumerate(leaves)}
        spread = [round(min(runs), 3), round(max(runs), 3)]
        ms = round(statistics.median(runs), 3)
        return {"ms": ms, "spread": spread, "peak_mb": round(peak, 1), **facts}
    except Exception as error:  # out of memory, a peer of another version: the table goes on
        return {"failed": f"{type(error).__name__}: {error}"[:200]}


def called(run: Callable, cuda: bool) -> tuple[torch.Tensor | None, float]:
    """(loss, milliseconds) of one call and its backward pass."""
    marks = []
    if cuda:
        torch.cuda.synchronize()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
    start = time.perf_counter()
    loss = run()
    if loss is not None:
        loss.backward()
        loss = loss.detach()
    if not cuda:
        return loss, 1e3 * (time.perf_counter() - start)
    marks[1].record()
    torch.cuda.synchronize()
    return loss, marks[0].elapsed_time(marks[1])


def apart(a: dict, b: dict) -> float | None:
    """Largest relative difference of loss and gradient sizes."""
    keys = [k for k in a if (k == "loss" or k.startswith("norm_")) and k in b]
    found = [abs(a[k] - b[k]) / max(abs(a[k]), abs(b[k]), 1e-9) for k in keys]
    return max(found, default=None)


def scoring(row: Row, device: str, repeats: int) -> dict[str, object]:
    """A tile of a teacher's logits: log-probabilities of 64 ids, entropy, the top 64."""
    d = make(replace(row, N=min(row.N, 4096), H=64, Ht=0), device)
    z = (d.h @ d.W.T).contiguous()

    def torch_rows(_: Data) -> Made:
        def run() -> None:
            logp = torch.log_softmax(z.float(), -1)
            logp.gather(1, d.ids), logp.topk(K, -1), -(logp.exp() * logp).sum(-1)

        return run, []

    def one_read(k: int, _: Data) -> Made:
        from opdsl.emit.kernels.triton_score import score

        return lambda: (score(z, d.ids, k), None)[1], []

    def copy(_: Data) -> Made:
        other = torch.empty_like(z)
        return lambda: (other.copy_(z), None)[1], []

    makers = {"floor": copy, "ours": partial(one_read, K), "ours, no top": partial(one_read, 0)}
    makers["torch"] = torch_rows
    found = {name: timed(f, d, repeats) for name, f in makers.items()}
    what = f"scores of {tuple(z.shape)} {str(z.dtype).removeprefix('torch.')}; floor: a copy"
    return judged({"row": what, "target_ms": None, "variants": found})


def blocks(row: Row, device: str, repeats: int) -> dict[str, object]:
    """Ours with other widths of the row kernels' blocks."""
    from opdsl.emit.kernels import triton_launch

    d, found, usual = make(row, device), {}, triton_launch.BLOCK
    for width in (1024, 2048, 4096, 8192):
        triton_launch.BLOCK = width
        found[f"blocks of {width}"] = timed(partial(ours, kernels=True), d, repeats)
    triton_launch.BLOCK = usual
    return {"row": f"{row.name}, by block", "variants": found}


def measured(row: Row, device: str, repeats: int) -> dict[str, object]:
    d = make(row, device)
    before = os.environ.get("OPDSL_TRITON")
    found = {name: timed(f, d, repeats) for name, f in variants(row).items()}
    if before is None:
        os.environ.pop("OPDSL_TRITON", None)
    else:
        os.environ["OPDSL_TRITON"] = before
    return judged({"row": row.name, "target_ms": row.target, "variants": found})


def judged(entry: dict) -> dict[str, object]:
    """With ratios to the floor and to the best peer, and whether the target is met."""
    found = entry["variants"]
    us = found["ours"]
    for name, v in found.items():
        if name != "ours" and (away := apart(us, v)) is not None:
            v["differs"] = float(f"{away:.2g}")
    if "ms" not in us:
        return entry
    if "ms" in found.get("floor", {}):
        entry["times_floor"] = round(us["ms"] / found["floor"]["ms"], 3)
    peers = {k: v["ms"] for k, v in found.items() if not k.startswith(OWN) and "ms" in v}
    if peers:
        best = min(peers, key=lambda k: peers[k])
        entry |= {"best_peer": best, "faster": round(peers[best] / us["ms"], 3)}
    if entry["target_ms"]:
        entry["met"] = us["ms"] <= entry["target_ms"]
    return entry


def show(entry: dict) -> None:
    print(entry["row"], "" if "times_floor" not in entry else f"  {entry['times_floor']} x floor")
    for name, v in entry["variants"].items():
        if "failed" in v:
            print(f"    {name:22} {v['failed']}", flush=True)
            continue
        away = v.get("differs")
        text = f"    {name:22}{v['ms']:10.2f} ms {v['peak_mb']:9.0f} MB"
        text += "" if away is None else f"   differs by {away:.1g}"
        print(text + (" DISAGREES" if away and away > APART else ""), flush=True)


def markdown(entries: list[dict]) -> list[str]:
    """The table of the page."""
    out = ["| | floor ms | ours ms | ours/floor | torch rows ms | best peer | ms | faster | ours MB "
           "| peer MB | target ms |", "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for e in entries:
        v = e["variants"]
        if "ours" not in v:
            continue
        peer = v.get(e.get("best_peer", ""), {})
        target = e.get("target_ms")
        mark = "" if e.get("met", True) else " **missed**"
        cells = [
            e["row"],
            cell(v.get("floor"), "ms"),
            cell(v["ours"], "ms"),
            f"{e['times_floor']:.2f}" if "times_floor" in e else "–",
            cell(v.get("ours, torch rows"), "ms"),
            e.get("best_peer", "–"),
            cell(peer, "ms"),
            f"{e['faster']:.2f} ×" if "faster" in e else "–",
            cell(v["ours"], "peak_mb"),
            cell(peer, "peak_mb"),
            f"≤ {target:g}{mark}" if target else "–",
        ]
        out.append(f"| {' | '.join(cells)} |")
    return out


def cell(v: dict | None, what: str) -> str:
    if not v or what not in v:
        return "failed" if v else "–"
    return f"{v[what]:.1f}" if what == "ms" else f"{v[what]:.0f}"


def tests() -> dict[str, object]:
    """The correctness suite on this GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *SUITE]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr[-300:]]
    print("correctness:", last[0], flush=True)
    if done.returncode:
        print(done.stdout[-4000:], flush=True)
    words = " ".join(["python", *command[1:]])
    return {"command": words, "passed": done.returncode == 0, "summary": last[0]}


def tiny(rows: list[Row]) -> list[Row]:
    """Shapes at which a CPU, or Triton's interpreter, goes through every line."""
    return [replace(r, N=64, H=16, V=320, Ht=min(r.Ht, 32), target=None) for r in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", help="beginnings of names, separated by ;")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="an eighth of the rows of each shape")
    parser.add_argument("--check", action="store_true", help="measure only if the suite passes")
    parser.add_argument("--no-tests", action="store_true", help="without the correctness suite")
    parser.add_argument("--blocks", action="store_true", help="also other widths of kernel blocks")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU; writes nothing")
    args = parser.parse_args()
    device, repeats = ("cpu", 1) if args.dry else ("cuda", args.repeats)
    if not args.dry and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured (try --dry)")
        return 1
    rows = list(ROWS)
    if args.rows:
        rows = [r for r in rows if any(r.name.startswith(x) for x in args.rows.split(";"))]
    if args.quick:
        rows = [replace(r, N=r.N // 8, target=None) for r in rows]
    wide, by_block = ROWS[1], [ROWS[1], ROWS[3]]
    if args.dry:
        rows, wide, by_block = tiny(rows), replace(tiny([wide])[0], N=4), tiny(list(by_block))
    suite = {} if args.no_tests or args.dry else tests()
    if args.check and not suite.get("passed", True):
        return 1
    found = []
    for row in rows:
        found.append(measured(row, device, repeats))
        show(found[-1])
    found.append(scoring(wide, device, repeats))
    show(found[-1])
    for row in by_block if args.blocks else ():
        found.append(blocks(row, device, repeats))
        show(found[-1])
    print("", *markdown(found), sep="\n")
    if args.dry:
        return 0
    versions = {x: importlib.metadata.version(x) for x in ("torch", "triton")}
    gpu = {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **versions}
    print("written to", measure.save("gpu", {"gpu": gpu, "correctness": suite, "rows": found}))
    return 0 if suite.get("passed", True) else 1


if __name__ == "__main__":
    sys.exit(main())
