"""Row passes on their own: one tile of logits, the plain pass and the pass with kernels side by side."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from opdsl.emit import feed, prelude
from opdsl.emit.batch import Batch
from opdsl.emit.kernels.triton_launch import RowPass
from opdsl.emit.module import function_name
from opdsl.emit.triton_rows import generate
from opdsl.ir.stages import Stage, Staged
from opdsl.method import Method
from support import relative

HAVE = importlib.util.find_spec("triton") is not None


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switches Triton's interpreter on, or skips with the reason."""
    if not HAVE:
        pytest.skip("triton is not installed")
    if "triton" in sys.modules and not os.environ.get("OPDSL_TEST_INTERPRETED"):
        pytest.skip("triton was imported before its interpreter was switched on")
    os.environ["OPDSL_TEST_INTERPRETED"] = "1"
    os.environ["TRITON_INTERPRET"] = "1"
    import triton  # noqa: F401

    monkeypatch.setenv("TRITON_INTERPRET", "1")


@dataclass(frozen=True)
class Result:
    """value, extras or exports [n] by name, float64, and dz [n, V] of a last pass."""

    numbers: dict[str, Tensor]
    dz: Tensor | None


@dataclass(frozen=True)
class Tile:
    """One row pass of a method over all rows of a batch.

    `found` holds what the kernels of earlier passes gave: entries are compared with a maximum of
    an earlier pass, which must be one of them to the last bit.
    """

    method: Method
    batch: Batch
    staged: Staged
    stage: Stage
    store: dict[str, Tensor]
    found: dict[str, Tensor]

    @property
    def last(self) -> bool:
        return self.stage is self.staged.last

    def dists(self, kind: torch.dtype, device: str = "cpu") -> dict[str, object]:
        """Distributions with logits of their own, rounded to `kind` in between."""
        y = self.batch.tokens_N
        found = feed.dense_dists(self.batch, self.stage, y)
        for d in found.values():
            for part in getattr(d, "parts", [d]):
                part.y = y.to(device)
                if isinstance(part, prelude.Dense):
                    part.z = part.z.to(kind).to(device, copy=True)
                else:
                    part.ids, part.logp, part.logp_y = (
                        None if x is None else x.to(device, kind if x.is_floating_point() else None)
                        for x in (part.ids, part.logp, part.logp_y)
                    )
            if hasattr(d, "choice"):
                d.choice = d.choice.to(device)
        return found

    def inputs(self, device: str = "cpu") -> dict[str, object]:
        rows = feed.row_inputs(self.batch, self.stage, self.store)
        both = {**feed.scalars(self.batch, self.store, self.stage), **rows}
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in both.items()}

    def plain(self, rounded: torch.dtype = torch.float64) -> Result:
        """The pass in torch, float64, on logits that were rounded."""
        fn = self.method.loss.functions[function_name(self.staged.rows, self.stage)]
        d = self.dists(rounded)
        for x in d.values():
            for part in getattr(x, "parts", [x]):
                if isinstance(part, prelude.Dense):
                    part.z = part.z.double()
        return self.read(fn(d, self.inputs(), torch.float64))

    def kernels(
        self,
        kind: torch.dtype = torch.float32,
        out: torch.dtype | None = None,
        block: int = 64,
        device: str = "cpu",
    ) -> Result:
        """The pass with kernels over blocks of 64 words; dz in place unless `out` is a type."""
        fn = RowPass(generate(self.staged, self.stage), block)
        d, rows = self.dists(kind, device), self.inputs(device)
        rows = {
            k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in rows.items()
        }
        for k in rows.keys() & self.found.keys():
            rows[k] = self.found[k].to(rows[k])  # type: ignore[call-overload]
        z = d["student"].z  # type: ignore[attr-defined]

        def w(i: int) -> Tensor:
            return torch.full_like(z, float("nan"), dtype=torch.float32)

        buffer = None if out is None else torch.full_like(z, float("nan"), dtype=out)
        result = self.read(fn(d, rows, torch.float32, w, buffer))
        if not self.last:
            self.found.update(result.numbers)
        return result

    def read(self, found: object) -> Result:
        if isinstance(found, dict):
            return Result(self.numbers(found), None)
        value, dz, extras = found  # type: ignore[misc]
        numbers = self.numbers({"value": value, **extras})
        return Result(numbers, None if dz is None else dz.double().cpu())

    def numbers(self, found: dict[str, object]) -> dict[str, Tensor]:
        n = self.batch.layout.n_rows
        as_numbers = {k: torch.as_tensor(x).double().cpu() for k, x in found.items()}
        return {k: x.expand(n) for k, x in as_numbers.items()}


def tiles(method: Method, batch: Batch) -> Iterator[Tile]:
    """Every row pass of a method that has rows in this batch."""
    stores = method.loss.prepare([batch])[0].imports
    for staged in method.loss.emitted.staged:
        part = batch if staged.rows == "main" else batch.golden
        if part is None or not part.layout.n_rows:
            continue
        part = method.loss._rows_of(batch, staged)
        found: dict[str, Tensor] = {}
        for st in staged.stages:
            if st.kind == "rows":
                yield Tile(method, part, staged, st, dict(stores[staged.rows]), found)


def error(got: Result, want: Result) -> float:
    """The largest relative error of values, extras and cotangent; values at the size of the largest."""
    names = [k for k in want.numbers if not k.startswith("gate")]
    size = max(
        (float(want.numbers[k].abs().max()) for k in names if want.numbers[k].numel()), default=0
    )
    found = [relative(got.numbers[k], want.numbers[k], size) for k in names]
    found += [relative(got.numbers[k], want.numbers[k]) for k in want.numbers if k not in names]
    assert (got.dz is None) == (want.dz is None)
    if want.dz is not None and got.dz is not None:
        found.append(relative(got.dz, want.dz))
    return max(found, default=0.0)


def closed(tile: Tile, want: Result) -> Tensor | None:
    """Rows [n] in which every gate is 0; None where some term has none."""
    if not tile.last or not tile.staged.gates or len(tile.staged.gates) < len(tile.staged.terms):
        return None
    gates = [x for k, x in want.numbers.items() if k.startswith("gate")]
    return (torch.stack(gates) == 0).all(0)


__all__ = ["HAVE", "Result", "Tile", "closed", "error", "interpret", "tiles"]
