"""Heads and losses on the CPU: `python -m benchmarks.heads [--quick] [--rows …] [--shapes A,B,C]`.

Writes results/heads.json (results/quick.json with --quick): per row and shape the seconds and
peaks of floor, ours and peers, ratios and targets. `--quick` is one small shape, fewer peers, under
three minutes. Peers that are not installed are left out: `pip install "opdsl[bench]"`.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from functools import partial

from benchmarks import measure

measure.one_thread()

from benchmarks import peers, shapes, specs  # noqa: E402
from benchmarks.cases import BY_NAME, CASES, Case, Target  # noqa: E402
from benchmarks.measure import Series, Variant  # noqa: E402

NEEDS = {"TRL": "trl", "Liger": "liger_kernel", "Liger compiled": "liger_kernel"}
QUICK = ("reverse KL", "JSD", "sampled", "top-64 tail bin", "routed", "top-64 renormalised",
         "gate known", "whitened returns", "hybrid")  # fmt: skip


def available(name: str) -> bool:
    needs = ["trl", "liger_kernel"] if name == "peers' sum" else [NEEDS.get(name, "torch")]
    return all(importlib.util.find_spec(x) for x in needs)


def leaves_of(data: shapes.Data):
    return [data.h.detach().requires_grad_(), data.W.detach().requires_grad_()]


def ours(row: str, data: shapes.Data, tau: float | None):
    """Made inside the worker: the spec is compiled there, the module keeps its buffers."""
    leaves = leaves_of(data)
    loss = specs.loss_of(row, data, tau)
    return partial(loss, *leaves), leaves


def peer(f, data: shapes.Data):
    leaves = leaves_of(data)
    return partial(f, data, *leaves), leaves


def bare(heads: int, data: shapes.Data):
    return partial(peers.floor, data, heads, data.h, data.W), []


def variants_of(case: Case, data: shapes.Data, quick: bool) -> list[Variant]:
    tau = case.tau(data) if case.tau else None
    out = []
    if case.heads is not None:
        out.append(Variant("floor", partial(bare, case.heads, data)))
    out.append(Variant("ours", partial(ours, case.name, data, tau)))
    for row in case.own:
        other = BY_NAME[row].tau
        row_tau = other(data) if other else None
        out.append(Variant(f"ours: {row}", partial(ours, row, data, row_tau)))
    light = quick or data.shape.name == "C"
    for name, f in case.peers.items():
        if available(name) and not (light and name in case.slow):
            out.append(Variant(name, partial(peer, f, data), "compiled" in name, short=True))
    return out


def judged(target: Target, found: dict[str, Series]) -> dict[str, object] | None:
    """A target with what was measured; None where the variant did not run."""
    measure_, against, bound = target
    us = found["ours"]
    if us.failed:
        return {"what": measure_, "against": against, "bound": bound, "met": False}
    if measure_ == "peak":
        value = us.peak_mb
    elif against not in found:
        return None
    else:
        value = measure.ratio(us, found[against])
        if value is None:
            return None
        value = 1 / value if measure_ == "speedup" else value
    met = value >= bound if measure_ == "speedup" else value <= bound
    out = {"what": measure_, "against": against, "bound": bound, "measured": round(value, 3)}
    return {**out, "met": met}


def row_of(case: Case, shape: shapes.Shape, found: dict[str, Series]) -> dict[str, object]:
    targets = case.targets.get(shape.name, case.targets.get("", ()))
    if shape.name == "Q":  # ratios of shape A; its peaks belong to its size
        targets = case.targets.get("A", case.targets.get("", ()))
        targets = tuple(t for t in targets if t[0] != "peak")
    against = {
        name: round(r, 3)
        for name in found
        if name != "ours" and (r := measure.ratio(found["ours"], found[name])) is not None
    }
    same = {
        name: float(f"{d:.2g}")
        for name, s in found.items()
        if name in case.peers and (d := measure.disagreement(found["ours"], s)) is not None
    }
    return {
        "row": case.name,
        "shape": shape.name,
        "variants": {k: s.summary() for k, s in found.items()},
        "ours_per": against,
        "difference_of_results": same,
        "targets": [j for t in targets if (j := judged(t, found)) is not None],
    }


def warm_imports() -> None:
    """Once in the parent, so that no worker pays for it."""
    import opdsl

    _ = (opdsl.Batch, opdsl.compile)
    small = shapes.make(shapes.Shape("small", 4, 8, 16, 128))
    for row in specs.SPECS:  # every module of ours, before anybody edits one
        specs.loss_of(row, small)(small.h, small.W)
    if available("TRL"):
        import trl.experimental.async_distillation.async_distillation_trainer
        import trl.kernels.chunked_divergence
        import trl.trainer.utils  # noqa: F401
    if available("Liger"):
        import liger_kernel.chunked_loss  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rows", help="names, separated by ;")
    parser.add_argument("--shapes", default="A,B,C")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    names = args.rows.split(";") if args.rows else QUICK if args.quick else [c.name for c in CASES]
    wanted = ["Q"] if args.quick else args.shapes.split(",")
    title = "quick" if args.quick else "heads"
    warm_imports()
    old = None if args.quick else measure.read(title)
    rows = {(r["shape"], r["row"]): r for r in (old or {"rows": []})["rows"]}
    for letter in wanted:
        data = None
        for name in names:
            case = BY_NAME[name]
            if letter not in (*case.shapes, "Q"):
                continue
            shape = shapes.SHAPES[letter]
            data = data or shapes.make(shape)
            began = time.time()
            rounds = 2 if args.quick else args.rounds
            found = measure.interleaved(variants_of(case, data, args.quick), rounds)
            rows[letter, name] = row_of(case, shape, found)
            measure.save(title, {"rounds": rounds, "rows": list(rows.values())})
            show(rows[letter, name], time.time() - began)


def show(row: dict, wall: float) -> None:
    print(f"{row['shape']} {row['row']}  ({wall:.0f} s)")
    for name, v in row["variants"].items():
        if "failed" in v:
            print(f"    {name:28} {v['failed']}")
            continue
        ratio = row["ours_per"].get(name)
        away = row["difference_of_results"].get(name)
        text = f"    {name:28}{v['seconds']:8.3f} s {v['peak_mb']:8.0f} MB"
        text += f"   ours/this {ratio:.2f}" if ratio else ""
        print(text + (f"   differs by {away:.1g}" if away is not None else ""))
    for t in row["targets"]:
        sign = ">=" if t["what"] == "speedup" else "<="
        state = "met" if t["met"] else "NOT MET"
        print(f"    {t['what']} {t['against']} {t['measured']} {sign} {t['bound']}: {state}")
    print(flush=True)


if __name__ == "__main__":
    main()
