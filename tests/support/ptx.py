"""Compiles row kernels for an H100 with Triton's real compiler, on a machine without a GPU.

`python -c "…; main()"` in a process of its own: the interpreter must be off before Triton is
imported. `launches()` goes through Triton's launcher as well, up to the driver's call. What is
left to a GPU is to run the code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import opdsl
from opdsl.emit.kernels.triton_launch import EXACT, Launcher, RowPass, jitted
from opdsl.emit.triton_rows import generate
from opdsl.emit.triton_source import Kernel
from support import batches, tiles

NAMES = ("gkd", "entropy_aware", "cr_opd", "minillm", "sampled_opd", "topk_match")
TILE = {False: "*fp32", True: "*bf16"}


def compiled(fn, signature: dict[str, str], constants: dict[str, int], warps: int = 8):
    """A Triton function for sm_90: types by argument ("*fp32", "i32"), numbers by constant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    full = {name: "constexpr" if name in constants else signature[name] for name in fn.arg_names}
    places = {(fn.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(fn=fn, signature=full, constexprs=places)
    options = {"num_warps": warps, **EXACT}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def row_kernel(kernel: Kernel, low: bool = False):
    """A generated kernel as its launch would have it for a vocabulary of 151936."""
    fn = jitted(kernel.text)
    block, warps = Launcher((kernel,)).width(kernel, 64 if kernel.points else 151936)
    types = {"ids": "*i64", "V": "i32", "K": "i32"}
    for name in fn.arg_names:
        if name[0] == "q":
            types[name] = "i32"
        elif name[0] == "p":
            types[name] = TILE[low]
        elif name[0] == "r":
            types[name] = "*i64" if kernel.rows[int(name[1:]) - 1] == "y" else "*fp32"
        types.setdefault(name, "*fp32")
    return compiled(fn, types, {"BLOCK": block}, warps)


def spilled(found) -> int:
    """Bytes a compiled kernel spills per thread, as the assembler says."""
    import triton

    tool = next(Path(triton.__file__).parent.rglob("bin/ptxas*"))
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "a.ptx"
        text.write_text(found.asm["ptx"])
        command = [tool, "-v", "-arch=sm_90a", text, "-o", Path(folder) / "a.cubin"]
        said = subprocess.run(command, capture_output=True, text=True).stderr
    return sum(int(x) for x in re.findall(r"(\d+) bytes spill stores", said))


def fixed() -> dict[str, object]:
    """The kernels that are not generated."""
    from opdsl.emit.kernels import triton_restricted as r
    from opdsl.emit.kernels import triton_score as s

    def types(fn, **given: str) -> dict[str, str]:
        return {name: given.get(name, "i32") for name in fn.arg_names}

    f = "*fp32"
    score = types(
        s._score, z="*bf16", ids="*i64", largest=f, logsum=f, entropy=f, logp=f, top_z=f, top_ids="*i32", scale="fp32"
    )  # fmt: skip
    gather = types(r._gather, hidden="*bf16", weight="*bf16", ids="*i64", out=f)
    back = types(r._pull_hidden, g=f, weight="*bf16", ids="*i64", out=f)
    weight = types(r._pull_weight, words="*i64", entries="*i64", g=f, hidden="*bf16", into=f)
    return {
        "score": compiled(s._score, score, {"BLOCK": 4096, "GIVEN": 64, "TOP": 64}),
        "score, no top": compiled(s._score, score, {"BLOCK": 4096, "GIVEN": 1, "TOP": 1}),
        "gather": compiled(r._gather, gather, {"IDS": 16, "BLOCK": 256}, 4),
        "pull hidden": compiled(r._pull_hidden, back, {"BLOCK": 1024}, 4),
        "pull weight": compiled(r._pull_weight, weight, {"RUN": 64, "BLOCK": 1024}, 4),
    }


def main() -> None:
    found = fixed()
    for name in NAMES:
        for staged in opdsl.load(name).loss.emitted.staged:
            for st in staged.stages:
                if st.kind == "rows":
                    for i, kernel in enumerate(generate(staged, st).kernels):
                        found[f"{name} {st.level} {i}"] = row_kernel(kernel)
                        found[f"{name} {st.level} {i} bf16"] = row_kernel(kernel, low=True)
    for name, kernel in found.items():
        print(f"{name:24} {spilled(kernel)} bytes spilled")


# ---- the launcher ----------------------------------------------------------------------------------


class Driver:
    """Stands in for a GPU: kernels are compiled for it, their launches are written down."""

    def __init__(self) -> None:
        self.compiled: Counter[object] = Counter()
        self.launched: list[tuple[tuple[int, int, int], tuple]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        )

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def launcher_cls(self, source, _metadata):
        self.compiled[source.fn] += 1

        def launch(x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
            self.launched.append(((x, y, z), arguments))

        return launch


def launches() -> None:
    """Every way rows come in, twice: no kernel is compiled more often than it has kinds of numbers."""
    from triton.runtime import driver

    from opdsl.emit.kernels import triton_restricted, triton_score

    driver.set_active(fake := Driver())
    for name in ("gkd", "cr_opd"):
        for B, T in ((4, 3), (4, 4), (3, 1), (5, 5)):  # odd numbers of rows move every offset
            for tile in tiles.tiles(*tile_of(name, B, T)):
                run = RowPass(generate(tile.staged, tile.stage))
                d, rows = tile.dists(torch.float32), tile.inputs()
                rows = {k: shifted(v) for k, v in rows.items()}
                run(d, rows, torch.float32, partial(torch.empty, B * T, 160))
    generated = max(fake.compiled.values())
    assert generated <= 3, fake.compiled  # K = 1 and multiples of 16 are kinds of their own
    fake.compiled.clear()
    g = torch.Generator().manual_seed(0)
    z, w, h = torch.randn(9, 160), torch.randn(160, 32), torch.randn(9, 32)
    for K in (1, 2, 3, 16, 17, 33, 64):
        ids = torch.randint(0, 160, (9, K), generator=g)
        triton_score.score(z, ids, K)
        triton_restricted.gather_product(h, w, ids)
        triton_restricted.pull_hidden(ids, torch.ones(9, K), w)
        triton_restricted.pull_weight(ids, torch.ones(9, K), h, torch.zeros(160, 32))
    # score: per power of two; the products: kinds of K (and of n K)
    for fn, count in fake.compiled.items():
        assert count <= (9 if "_score" in str(fn) else 6), (fn, count)
    assert all(grid[0] > 0 and max(grid[1:]) <= 65535 for grid, _ in fake.launched)
    print(len(fake.launched), "launches,", generated, dict(fake.compiled.items()))


def tile_of(name: str, B: int, T: int):
    method = opdsl.load(name)
    names = tuple(t.name for t in method.spec.teachers if t.kind != "initial") or ("T",)
    inputs = batches.draw(1, B, T, 160, teachers=names, golden=False)
    return method, batches.logits(inputs, torch.float32)[0]


def shifted(x: object):
    """The same numbers one entry further in memory."""
    if not isinstance(x, torch.Tensor) or x.dim() != 1:
        return x
    return torch.cat([x[:1], x])[1:]
