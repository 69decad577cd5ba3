"""Row kernels: their text for every spec (without Triton), and their numbers in its interpreter.

The default suite reads texts. `pip install triton && pytest -m triton tests/test_triton.py` runs
every kernel on the CPU in the interpreter, with blocks of 64 words so that every loop runs, and
compiles a sample for an H100, which needs no GPU. `pytest -m gpu tests/test_triton.py` runs them
on a GPU. The measure is always the plain pass in float64 and the oracle.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from support import TOLERANCE, batches, generate, relative, tiles
from support.tiles import HAVE, Tile

import opdsl
from opdsl.emit.kernels import head, triton_launch
from opdsl.emit.kernels.triton_launch import check_pass
from opdsl.emit.triton_rows import Generated
from opdsl.emit.triton_rows import generate as kernels_of
from opdsl.emit.triton_source import Kernel, check_kernel
from opdsl.method import Method
from opdsl.resources import methods, specs

GENERATED = 50
SHIPPED = sorted(str(p.relative_to(specs())) for p in methods())
CASES = [*range(GENERATED), *SHIPPED]
V = 150  # three blocks, the last one in part


@cache
def method_of(which: int | str) -> tuple[Method, int]:
    if isinstance(which, int):
        return generate.compiled(generate.spec(which).text), which
    return opdsl.load(specs() / which), sum(which.encode())


def inputs_of(which: int | str, **more) -> batches.Inputs:
    method, seed = method_of(which)
    names = tuple(t.name for t in method.spec.teachers if t.kind != "initial") or ("T",)
    critics = tuple(c.name for c in method.spec.critics)
    sizes = {"B": 4, "T": 3, "V": V, **more}
    return batches.draw(seed, teachers=names, critics=critics, **sizes)


def passes(which: int | str) -> Iterator[Generated]:
    for staged in method_of(which)[0].loss.emitted.staged:
        for st in staged.stages:
            if st.kind == "rows":
                yield kernels_of(staged, st)


# ---- text, without Triton ------------------------------------------------------------------------


@pytest.mark.parametrize("which", CASES)
def test_every_pass_has_kernels(which: int | str) -> None:
    for found in passes(which):
        check_pass(found.text)
        for kernel in found.kernels:
            check_kernel(kernel.text)
            assert "float64" not in kernel.text


def test_text_is_the_same_each_time() -> None:
    for which in (*range(5), *SHIPPED[:20]):
        method = method_of(which)[0]
        again = opdsl.compile(method.spec.source.text) if hasattr(method.spec, "source") else method
        for a, b in zip(passes(which), (kernels_of(s, st) for s in again.loss.emitted.staged
                                        for st in s.stages if st.kind == "rows")):  # fmt: skip
            assert a == b


METHOD = """opd 1
method m {{
  state rollouts(student)
  teacher T = external(access = logits)
  support full
  feedback {}
  {}
  aggregate mean(over = tokens)
}}
"""


def reads(kernel: Kernel) -> int:
    """Tiles of logits it reads."""
    return len(re.findall(r"tl\.load\(p\d", kernel.text))


@pytest.mark.parametrize(
    "loss, sweeps",
    [
        ("KL(student || T)", 2),
        ("KL(T || student)", 2),
        ("JSD(T || student, beta = 0.5)", 3),
        ("KL(student || T) + 0.5 * KL(T || student)", 2),
    ],
)
def test_sweeps(loss: str, sweeps: int) -> None:
    """A divergence reads the logits for its sums and for its cotangent; a mixture once more."""
    m = opdsl.compile(METHOD.format(f"loss {loss}", "gate entropy(student) > 0.5"))
    (staged,) = m.loss.emitted.staged
    found = kernels_of(staged, staged.last)
    assert len(found.kernels) == sweeps
    assert all(reads(k) <= 2 for k in found.kernels)


def test_probabilities_are_compared_by_logarithms() -> None:
    """A kernel's exponential may differ from torch's in the last bit; one sweep finds the maximum."""
    weight = (
        "weight if max(v in top(5, of = T): student[v]) >= max(v in full: student[v]) then 1 else 0"
    )
    m = opdsl.compile(METHOD.format("loss KL(T || student)", weight))
    (staged,) = m.loss.emitted.staged
    found = kernels_of(staged, staged.last)
    assert len(found.kernels) == 2
    assert "exp(" not in found.text


@pytest.mark.parametrize(
    "text",
    [
        "def kernel(p1):\n    import os\n",
        "def kernel(p1):\n    tl.inline_asm_elementwise(p1)\n",
        "def kernel(p1):\n    x1 = 'text'\n",
        "def kernel(p1):\n    open(p1)\n",
        "def kernel(p1):\n    x1 = p1.__class__\n",
    ],
)
def test_other_kernels_are_refused(text: str) -> None:
    with pytest.raises(AssertionError):
        check_kernel(text)


# ---- numbers, in the interpreter -------------------------------------------------------------------


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles.interpret(monkeypatch)


def on_an_edge(tile: Tile, inputs: batches.Inputs, nudge: float = 1e-6) -> bool:
    """Whether a nudge of the logits changes the plain pass by far more than the nudge."""
    g = torch.Generator().manual_seed(1)

    def moved(x: batches.Inputs) -> batches.Inputs:
        shift = nudge * torch.randn(x.student_BTV.shape, generator=g, dtype=torch.float64)
        golden = None if x.golden is None else moved(x.golden)
        return replace(x, student_BTV=x.student_BTV + shift, golden=golden)

    batch = batches.logits(moved(inputs))[0]
    other = next(
        t for t in tiles.tiles(tile.method, batch)
        if t.staged.rows == tile.staged.rows and t.stage.level == tile.stage.level
    )  # fmt: skip
    return tiles.error(other.plain(), tile.plain()) > 10 * nudge


def compared(which: int | str, device: str, block: int, **sizes) -> None:
    method, _ = method_of(which)
    inputs = inputs_of(which, **sizes)
    oracle_batch = batches.logits(inputs)[0]
    oracle = method.reference(oracle_batch)
    for tile in tiles.tiles(method, oracle_batch):
        want = tile.plain()
        got = tile.kernels(block=block, device=device)
        error = tiles.error(got, want)
        if error > TOLERANCE["float32"] and on_an_edge(tile, inputs):
            continue
        assert error <= TOLERANCE["float32"], f"{tile.staged.rows} pass {tile.stage.level}: {error}"
        shut = tiles.closed(tile, want)
        if shut is not None and got.dz is not None:
            assert not bool(got.dz[shut].any()), "a row without weight has a gradient"
        if tile.last and tile.staged.rows == "main" and got.dz is not None:
            kept = oracle.grad_logits[inputs.mask_BT]
            assert relative(got.dz, kept) <= TOLERANCE["float32"]


@pytest.mark.triton
@pytest.mark.parametrize("which", CASES)
def test_interpreted(which: int | str, interpreter: None) -> None:
    """Value, extras and cotangent of every row pass; rows without weight; the oracle."""
    compared(which, "cpu", 64)


@pytest.mark.gpu
@pytest.mark.parametrize("which", CASES)
def test_on_a_gpu(which: int | str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA")
    compared(which, "cuda", 1024, V=3000)


@pytest.mark.triton
@pytest.mark.parametrize(
    "which", [*range(0, GENERATED, 4), *SHIPPED[::8], "divergences/selectkd.opd"]
)
def test_whole_loss(which: int | str, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From hidden states, in chunks and micro-batches: value, d/dhidden and d/dhead."""
    monkeypatch.setitem(head.CHUNK_RANGE, "cpu", (4, 4))
    method, _ = method_of(which)
    inputs = batches.as_hidden(inputs_of(which, V=70 if isinstance(which, int) else 10))
    oracle = method.reference(batches.logits(inputs)[0])
    want_w = torch.einsum("btv,bth->vh", oracle.grad_logits, inputs.hidden_BTH)
    if oracle.grad_golden is not None:
        assert inputs.golden is not None
        want_w += torch.einsum("btv,bth->vh", oracle.grad_golden, inputs.golden.hidden_BTH)
    batch, leaves = batches.hidden(inputs, torch.float32)
    parts = batch.split(2)
    contexts = method.loss.prepare(parts)
    loss = torch.stack([method.loss(p, c).loss for p, c in zip(parts, contexts)]).sum()
    got_h, got_w = torch.autograd.grad(loss, leaves)
    size = max((abs(x) for x in oracle.terms.values()), default=0.0)
    errors = (
        relative(loss.detach(), oracle.loss, size),
        relative(got_h, oracle.grad_logits @ inputs.weight_VH),
        relative(got_w, want_w),
    )
    if max(errors) > TOLERANCE["float32"]:
        whole = next(tiles.tiles(method, batches.logits(inputs)[0]))
        assert on_an_edge(whole, inputs), errors


@pytest.mark.triton
@pytest.mark.parametrize("which", [*range(GENERATED), *SHIPPED[::3]])
def test_served_teachers(which: int | str, interpreter: None) -> None:
    """A teacher that gives lists: they are gathered from, no kernel reads them."""
    method, _ = method_of(which)
    access = method.needs.teachers
    if all(level in ("logits", "score_ids") for level in access.values()):
        pytest.skip("reads whole distributions")
    inputs = inputs_of(which)
    batch = batches.sparse(inputs, access)[0]
    for tile in tiles.tiles(method, batch):
        got, want = tile.kernels(), tile.plain()
        error = tiles.error(got, want)
        assert error <= TOLERANCE["float32"] or on_an_edge(tile, inputs), error


LOSSES = {
    "reverse KL": ("loss KL(student || T)", "gate entropy(student) > 0.5"),
    "forward KL": ("loss KL(T || student)", "gate entropy(T) > 0.5"),
    "JSD": ("loss JSD(T || student, beta = 0.3)", "weight 0.5 + entropy(student) / 1 nats"),
    "sampled": ("reward logratio(T, student)", "credit immediate"),
    "tempered": ("loss KL(tempered(student, 2.0) || tempered(T, 2.0))", "gate position > 0"),
    "top of teacher": (
        "loss -sum(v in top(5, of = T): T[v] * log(student[v]))",
        "gate position > 0",
    ),
}


@pytest.mark.triton
@pytest.mark.parametrize("out", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_tiles(name: str, out: torch.dtype | None, interpreter: None) -> None:
    """Statistics are float32; the cotangent is rounded once, entry by entry."""
    m = opdsl.compile(METHOD.format(*LOSSES[name]))
    batch = batches.logits(batches.draw(4, B=4, T=3, V=V))[0]
    for tile in tiles.tiles(m, batch):
        want = tile.plain(torch.bfloat16)
        got = tile.kernels(torch.bfloat16, out)
        assert tiles.error(replace(got, dz=want.dz), want) <= TOLERANCE["float32"]
        if want.dz is not None and got.dz is not None:
            step = 0.0 if out == torch.float32 else 2.0**-7  # the interpreter cuts, a GPU rounds
            room = step * want.dz.abs() + TOLERANCE["float32"] * want.dz.abs().max()
            assert bool(((got.dz - want.dz).abs() <= room).all())


@pytest.mark.triton
@pytest.mark.parametrize("which", [*range(0, GENERATED, 3), *SHIPPED[::3]])
def test_logits_far_apart(which: int | str, interpreter: None) -> None:
    """Logits 400 apart, tokens drawn from the student: everything is finite."""
    method, _ = method_of(which)
    inputs = inputs_of(which, spread=400.0, on_policy=True)
    for tile in tiles.tiles(method, batches.logits(inputs)[0]):
        want = tile.plain()
        sizes = [x.abs().max() for x in (*want.numbers.values(), want.dz) if x is not None]
        if max(map(float, sizes)) > float(torch.finfo(torch.float32).max):
            continue
        got = tile.kernels()
        for name, x in got.numbers.items():
            assert bool(torch.isfinite(x).all()), name
        assert got.dz is None or bool(torch.isfinite(got.dz).all())


@pytest.mark.triton
def test_no_rows(interpreter: None) -> None:
    m = method_of("gkd.opd")[0]
    inputs = inputs_of("gkd.opd")
    (tile,) = tiles.tiles(m, batches.logits(inputs)[0])
    empty = replace(tile, batch=tile.batch)
    d, rows = empty.dists(torch.float32), empty.inputs()
    for x in d.values():
        x.z, x.y = x.z[:0], x.y[:0]
    rows = {k: v[:0] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in rows.items()}
    fn = triton_launch.compiled(tile.staged, tile.stage)
    assert fn is not None
    value, dz, _ = fn(d, rows, torch.float32, lambda i: torch.empty(0, V))
    assert value.shape == (0,) and dz.shape == (0, V)


@pytest.mark.triton
def test_compiles_for_a_gpu() -> None:
    """The real compiler, target H100, in a process without the interpreter; no GPU is needed."""
    if not HAVE:
        pytest.skip("triton is not installed")
    run_ptx("main()")


@pytest.mark.triton
def test_launches_bind_and_are_compiled_once() -> None:
    """Triton's own launcher in front of a driver that only writes down what it is asked.

    The same kernel for any number of rows, any K and any offset of the numbers of a row: a variant
    is compiled for the first K = 1 and for multiples of 16, and that is all.
    """
    run_ptx("launches()")


def run_ptx(call: str) -> None:
    if not HAVE:
        pytest.skip("triton is not installed")
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET",)}
    code = f"import sys; sys.path.insert(0, 'tests'); from support.ptx import *; {call}"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
