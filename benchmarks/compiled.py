"""What `method.loss.compile()` is worth on a CPU: `python -m benchmarks.compiled`.

Two tables, written to results/compiled.json. *Passes*: the last row pass of a method on one tile of
logits, in the strips the sweep hands it, as it is and through torch.compile, in turns in one
process. *Losses*: loss and gradient of a whole batch, products included, in processes of their own
(`measure.py`). Processor seconds, one thread. `method.loss.compile()` leaves passes without
arithmetic on entries (sampled) as they are; the first table compiles them all the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

from benchmarks import measure

measure.one_thread()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import shapes, specs  # noqa: E402
from benchmarks.measure import Variant  # noqa: E402

TILES = ((256, 32768), (105, 151936))  # rows of a tile as the budget has them
SHAPES = (shapes.Shape("Q", 4, 128, 512, 32768), shapes.Shape("B/2", 4, 128, 128, 151936))
PASSES = ("sampled", "reverse KL", "JSD", "gate of student")


def knob(row: str) -> float | None:
    """The threshold of a gate that some rows pass."""
    return 1.0 if row == "gate of student" else None


class Tile:
    """One tile of logits, and the last pass of a method over it."""

    def __init__(self, row: str, n: int, V: int):
        from opdsl.emit.module import function_name, input_key, key

        module = specs.compiled(row, knob(row)).loss
        (staged,) = module.emitted.staged
        self.stage = staged.last
        self.fn = module.in_place[function_name(staged.rows, self.stage)]
        g = torch.Generator().manual_seed(0)
        self.z, self.u = (3 * torch.randn(n, V, generator=g) for _ in range(2))
        self.work = {"student": self.z.clone(), "T": self.u.clone()}
        self.buffers: dict[int, Tensor] = {}
        self.rows: dict[str, object] = {"y": torch.randint(V, (n,), generator=g)}
        self.logp = -torch.rand(n, generator=g)
        for x in self.stage.nodes:
            if x.op == "input" and x.attr("name") not in ("one", "step"):
                self.rows[input_key(x)] = -torch.rand(n, generator=g)
        for x in self.stage.imports:
            whole = x.q.axis.name == "CONST"
            self.rows[key(x)] = torch.tensor(float(n)) if whole else torch.full((n,), 1.0 / n)
        self.dense = row != "sampled"

    def reset(self) -> None:
        self.work["student"].copy_(self.z)
        self.work["T"].copy_(self.u)

    @torch.no_grad()
    def run(self, fn: Callable) -> Tensor:
        """The cotangent, in the tile of the student."""
        from opdsl.emit import prelude
        from opdsl.emit.budget import strip_rows

        z = self.work["student"]
        n, V = z.shape
        tall = strip_rows(V, self.dense)
        for start in range(0, n, tall):
            rows = slice(start, start + tall)
            r = {k: x[rows] if getattr(x, "dim", int)() else x for k, x in self.rows.items()}
            y = r["y"]
            d: dict[str, object] = {"student": prelude.Dense(z[rows], y)}
            d["T"] = (
                prelude.Dense(self.work["T"][rows], y)
                if self.dense
                else prelude.Sparse(None, None, self.logp[rows], y)
            )
            _, dz, _ = fn(d, r, torch.float32, lambda i, rows=rows: self.buffer(i)[rows])
            if dz.data_ptr() != z[rows].data_ptr():
                z[rows] = dz
        return z

    def buffer(self, i: int) -> Tensor:
        if i not in self.buffers:
            self.buffers[i] = torch.empty_like(self.z)
        return self.buffers[i]


def passes(row: str, n: int, V: int, rounds: int) -> dict[str, object]:
    from opdsl.emit.compiled import CompiledPass, worthwhile

    tile = Tile(row, n, V)
    compiled = CompiledPass(tile.fn, tile.stage)
    start = time.process_time(), time.perf_counter()
    tile.reset()
    ours = tile.run(compiled).clone()
    first = time.process_time() - start[0], time.perf_counter() - start[1]
    tile.reset()
    away = float((ours - tile.run(tile.fn)).abs().max() / ours.abs().max())
    spent: dict[str, list[float]] = {"eager": [], "compiled": []}
    for _ in range(rounds):
        for name, fn in (("eager", tile.fn), ("compiled", compiled)):
            tile.reset()
            begun = time.process_time()
            tile.run(fn)
            spent[name].append(1e3 * (time.process_time() - begun))
    ratio = statistics.median(a / b for a, b in zip(spent["eager"], spent["compiled"]))
    return {
        "row": row,
        "tile": [n, V],
        "ms": {k: round(statistics.median(x), 2) for k, x in spent.items()},
        "least_ms": {k: round(min(x), 2) for k, x in spent.items()},
        "faster": round(ratio, 3),
        "first_seconds": {"processor": round(first[0], 2), "wall": round(first[1], 2)},
        "differs": float(f"{away:.2g}"),
        "chosen": worthwhile(tile.stage),
        "reason": compiled.reason,
    }


def made(row: str, data: shapes.Data, compiled: bool):
    """The loss of a row and its leaves, inside a worker."""
    leaves = [data.h.detach().requires_grad_(), data.W.detach().requires_grad_()]
    loss = specs.loss_of(row, data, knob(row), compiled)
    return partial(loss, *leaves), leaves


def losses(row: str, data: shapes.Data, rounds: int) -> dict[str, object]:
    found = measure.interleaved(
        [
            Variant("eager", partial(made, row, data, False)),
            Variant("compiled", partial(made, row, data, True), compiled=True),
        ],
        rounds,
    )
    ratio = measure.ratio(found["eager"], found["compiled"])
    return {
        "row": row,
        "shape": [data.shape.N, data.shape.H, data.shape.V],
        "variants": {k: s.summary() for k, s in found.items()},
        "faster": None if ratio is None else round(ratio, 3),
        "differs": measure.disagreement(found["eager"], found["compiled"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", default=";".join(PASSES), help="names, separated by ;")
    args = parser.parse_args()
    names, tables = args.rows.split(";"), {"passes": [], "losses": []}
    for n, V in TILES:
        for row in names:
            p = passes(row, n, V, args.rounds)
            tables["passes"].append(p)
            print(f"pass {row:16} {n} x {V}: {p['ms']} ms, {p['faster']} x faster, "
                  f"first {p['first_seconds']}, differs by {p['differs']}", p["reason"], flush=True)  # fmt: skip
    for shape in SHAPES:
        data = shapes.make(shape)
        for row in names:
            if row == "sampled":  # its pass is left as it is
                continue
            x = losses(row, data, max(2, args.rounds // 2))
            tables["losses"].append(x)
            seconds = {k: v.get("seconds", v.get("failed")) for k, v in x["variants"].items()}  # type: ignore[union-attr]
            print(f"loss {row:16} {x['shape']}: {seconds} s, {x['faster']} x faster", flush=True)
    print("written to", measure.save("compiled", {"rounds": args.rounds, **tables}))


if __name__ == "__main__":
    main()
