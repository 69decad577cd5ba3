"""Runs generated row kernels: when they can run, how their text is loaded, how they are launched.

`compiled(staged, st)` is a row pass `fn(d, r, like, w, out=None)` with the meaning of the in-place
passes (`opdsl/emit/fused.py`), or None where no kernels can be generated for it. `chosen` also asks
whether they can run here. Legend: n rows of a tile, K ids, V vocabulary.

Kernel text is loaded as a module of its own whose loader can give the source back, which is what
Triton reads; it is checked first (`check_kernel`) and never touches the disk.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from functools import cache
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from torch import Tensor

from opdsl.emit import prelude, triton_available
from opdsl.emit.kernels.triton_calls import learn, mask, mass, pieces, scored
from opdsl.emit.module import _ALLOWED, _ROOTS
from opdsl.emit.told import tell_once
from opdsl.emit.triton_rows import Generated, generate
from opdsl.emit.triton_source import Kernel, Unsupported, check_kernel
from opdsl.ir.stages import Stage, Staged

BLOCK = 4096  # words of a row in flight; larger blocks spill
EXACT = {"enable_fp_fusion": False}  # a value is the same in every kernel that computes it

# ---- whether kernels can run ---------------------------------------------------------------------


def available(device: torch.device | str) -> tuple[bool, str]:
    """(whether row kernels run on this device, the reason why not).

    The first question about a GPU compiles and launches one kernel there: Triton needs a C
    compiler and a driver that answer, and a run should not die of either.
    """
    found = triton_available.reason(device)
    if not found and torch.device(device).type == "cuda" and not triton_available.interpreted():
        found = refused(torch.device(device))
    return not found, found


@cache
def refused(device: torch.device) -> str:
    """Why a first kernel fails on a GPU; "" where it gives the right number."""
    try:
        return trial(device)
    except Exception as problem:  # whatever compiler, driver or assembler say
        said = str(problem).strip().splitlines() or [""]
        return f"a first kernel failed: {type(problem).__name__}: {said[0]}"[:200]


def trial(device: torch.device) -> str:
    """Runs one kernel; "" if its result is right."""
    from opdsl.emit.kernels.triton_score import lse

    z_nV = torch.arange(64.0, device=device).reshape(2, 32)
    right = torch.allclose(lse(z_nV), torch.logsumexp(z_nV, 1))
    return "" if right else "a first kernel gave a wrong number"


def tell(reason: str) -> None:
    """Prints once why rows run without kernels. A CPU, or a wish, is no surprise."""
    expected = "rows are on" in reason or reason.startswith("OPDSL_TRITON")
    if reason and not expected:
        tell_once(f"no Triton row kernels: {reason}")


def usable(device: torch.device, like: torch.dtype) -> bool:
    """Whether kernels run here; where a GPU goes without, the reason is told."""
    if like != torch.float32:  # float64 is for checks against an oracle
        return False
    fine, reason = available(device)
    if not fine and device.type == "cuda":
        tell(reason)
    return fine


def chosen(staged: Staged, st: Stage, device: torch.device, like: torch.dtype) -> RowPass | None:
    """The pass with kernels, or None: then the in-place torch pass runs (and the reason is told)."""
    if not usable(device, like):
        return None
    found = compiled(staged, st)
    if found is None:
        tell(triton_available.why_not(staged, st))
    return found


def gathered(device: torch.device, like: torch.dtype):
    """What reads the student at ids in plan class S0: by kernels, or `linear_restricted.Gathered`."""
    from opdsl.emit.kernels.linear_restricted import Gathered

    if not usable(device, like):
        return Gathered
    from opdsl.emit.kernels.triton_restricted import GatheredByKernel

    return GatheredByKernel


def scorer(device: torch.device, like: torch.dtype, k: int | None):
    """What scores a tile in one read (`triton_score.score`), or None: torch does."""
    if not usable(device, like):
        return None
    from opdsl.emit.kernels.triton_score import MOST, score

    return score if (k or 0) <= MOST else None


_compiled: dict[tuple[int, int], tuple[Stage, RowPass | None]] = {}


def compiled(staged: Staged, st: Stage) -> RowPass | None:
    """A row pass whose sweeps over the vocabulary are kernels; None where there is none. Cached."""
    key = (id(staged), st.level)
    if len(_compiled) > 512:  # a sweep over many methods
        _compiled.clear()
    if key not in _compiled or _compiled[key][0] is not st:
        try:
            made = RowPass(generate(staged, st))
        except Unsupported:
            made = None
        _compiled[key] = (st, made)
    return _compiled[key][1]


# ---- a pass ----------------------------------------------------------------------------------------


class RowPass:
    """fn(d, r, like, w, out=None) -> (value [n], dz [n, V], extras) or a dict of numbers.

    d          distributions by name (`prelude.Dense` and the like), float32 or bfloat16 logits
    w          w(i) -> the i-th scratch buffer [n, V]
    out        where the cotangent goes, float32 or bfloat16 [n, V]; None: over the student's logits
    """

    def __init__(self, generated: Generated, block: int | None = None):
        check_pass(generated.text)
        self.generated, self.block = generated, block
        self._run = None

    def __call__(self, d, r, like, w, out: Tensor | None = None):
        if like != torch.float32:
            raise TypeError(f"row kernels compute in float32, not {like}")
        if self._run is None:
            launcher = Launcher(self.generated.kernels, self.block)
            self._run = bound(self.generated, launcher)
        return self._run(d, r, like, w, out)


def bound(generated: Generated, launcher: Launcher):
    """The function of the pass, with the names it may use."""
    space = {k: v for k, v in vars(prelude).items() if not k.startswith("__")}
    space |= {"launch": launcher.launch, "at_points": launcher.at_points}
    space |= {f.__name__: f for f in (learn, scored, mask, mass, pieces)}
    module = load(generated.text + "\n", space)
    return getattr(module, generated.name)


_LAUNCH_ROOTS = {
    "out", "launch", "at_points", "learn", "scored", "mask", "mass", "pieces",
}  # fmt: skip


def check_pass(text: str) -> None:
    """Raises AssertionError if the text of a pass holds anything it has no business holding."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.IfExp | ast.Is):  # `d['student'].z if out is None else out`
            continue
        assert isinstance(node, _ALLOWED), f"emitted {type(node).__name__}"
        if isinstance(node, ast.Name):
            generated = node.id[:1] in "xsvwzel" and node.id[1:].isdigit()
            known = node.id in _ROOTS or node.id in _LAUNCH_ROOTS
            assert generated or known, f"emitted name {node.id}"
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), f"emitted attribute {node.attr}"


# ---- loading -----------------------------------------------------------------------------------------


class _Text(InspectLoader):
    """A module from checked text; `inspect` and Triton get its source from here."""

    def __init__(self, text: str, space: dict[str, object]):
        self.text, self.space = text, space

    def get_source(self, fullname: str) -> str:
        return self.text

    def get_code(self, fullname: str):
        return self.source_to_code(self.text, f"{fullname}.py")

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.space)
        super().exec_module(module)


def load(text: str, space: dict[str, object]) -> ModuleType:
    """A module of checked text in which the names of `space` are known."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    name = f"opdsl.emit.kernels.generated_{digest}_{len(_loaded)}"
    origin = f"{name}.py"
    loader = _Text(text, space)
    module = importlib.util.module_from_spec(ModuleSpec(name, loader, origin=origin))
    module.__file__ = origin
    sys.modules[name] = module
    _loaded.append(name)
    loader.exec_module(module)
    return module


_loaded: list[str] = []


POINTS = ("ids", "given", "out")


@cache
def jitted(text: str):
    """A checked kernel as a Triton function; the same text is compiled once."""
    import triton
    import triton.language as tl

    check_kernel(text)
    fn = load(text, {"tl": tl}).kernel
    # Numbers of rows are slices at any offset: no variant of the kernel for each alignment.
    code = fn.__code__
    rows = [x for x in code.co_varnames[: code.co_argcount] if x[0] in "ro" or x in POINTS]
    return triton.jit(fn, do_not_specialize_on_alignment=rows)


class Launcher:
    """Launches the kernels of one pass by number."""

    def __init__(self, kernels: tuple[Kernel, ...], block: int | None = None):
        self.kernels, self.block = kernels, block

    def width(self, kernel: Kernel, size: int) -> tuple[int, int]:
        """(words in flight, warps)"""
        most = self.block or (BLOCK if len(kernel.tiles) <= 2 else BLOCK // 2)
        block = min(most, max(16, 1 << (max(size, 1) - 1).bit_length()))
        return block, max(1, min(8, block // 256))

    def arguments(self, kernel: Kernel, tiles: list, rows: list, y: Tensor) -> list:
        n = y.numel()
        found: list = []
        for t in tiles:
            if len(t) < n or (t.stride(-1) != 1 and t.shape[-1] > 1):  # a copy would lose writes
                raise ValueError(f"a tile must be [{n}, V] in rows of one piece, got {t.stride()}")
            found += [t, t.stride(0)]
        return found + [number_of(x, n, y) for x in rows]

    def launch(self, i: int, tiles: list, rows: list, y: Tensor, v: int) -> Tensor:
        """Numbers per row [results, n] of a sweep over V words; tiles may be written."""
        kernel, n = self.kernels[i], y.numel()
        out = torch.empty(kernel.results, n, dtype=torch.float32, device=y.device)
        if n:
            block, warps = self.width(kernel, v)
            arguments = self.arguments(kernel, tiles, rows, y)
            with on_device(y.device):
                jitted(kernel.text)[(n,)](
                    *arguments, *out, v, BLOCK=block, num_warps=warps, **EXACT
                )
        return out

    def at_points(
        self, s: tuple[Tensor, Tensor], i: int, tiles: list, rows: list, y: Tensor, v: int
    ) -> Tensor:
        """Values [n, K] at ids [n, K], with what is given for each id."""
        kernel, (ids, given) = self.kernels[i], s
        out = torch.empty_like(given)
        if given.numel():
            block, warps = self.width(kernel, min(ids.shape[1], 256))
            arguments = self.arguments(kernel, tiles, rows, y)
            with on_device(y.device):
                jitted(kernel.text)[(len(ids),)](
                    *arguments, ids, given, out, ids.shape[1], BLOCK=block, num_warps=warps, **EXACT
                )
        return out


def on_device(device: torch.device):
    """A context in which kernels start where their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()


def number_of(x: object, n: int, y: Tensor) -> Tensor:
    """A number per row, float32 [n] in one piece (the sampled tokens stay integers)."""
    if x is y:
        return y.contiguous()
    if not isinstance(x, Tensor):
        return torch.full((n,), float(x), dtype=torch.float32, device=y.device)  # type: ignore[arg-type]
    found = x.to(y.device, torch.float32)
    return found.expand(n).contiguous()
