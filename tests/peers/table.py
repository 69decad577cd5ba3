"""Writes docs/parity.md: `python tests/peers/table.py` in an environment with the extra `peers`."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "parity.md"
MODULES = (
    "test_trl", "test_trl_sparse", "test_trl_self", "test_liger", "test_torchrl",
    "test_verl", "test_verl_algos",
)  # fmt: skip

OPENING = """# Parity with what others ship

Written by `python tests/peers/table.py`; `pytest -m peers tests/peers` checks every line. The peer's
own function computes a scalar from float64 student logits on {batches} random batches of 6 sequences
with uneven masks. Ours is a shipped spec (a link) or, for a bare function that is no method, a few
lines in the test (*inline*). *Value* and *gradient* are the largest errors of `method.loss` and of
the float64 oracle `method.reference` over the batches, relative to the largest entry of ours; the
gradient is the one with respect to the logits. Errors near 1e-7 are the peer's float32. A dash: the
value of a clipped or ratio surrogate means nothing, its gradient alone is compared. *Not `x`*: the
gradient of that spec is measured to differ, by the given part of its own largest entry at least.
"""

OUTSIDE = """
## Not compared

| Peer | What | Why |
|---|---|---|
| TRL | GOLD's loss between two tokenizers (sorted probabilities, merged spans) | the language has no alignment of two texts; with one tokenizer it is compared above |
| TRL | MiniLLM trainer | not in the 1.16.0 wheel; `minillm_trl` is its last version |
| Liger | `LigerKLDIVLoss`, `LigerTVDLoss` | Triton kernels that Triton's interpreter does not run on a CPU; their fused forms are compared above |
| Liger | cosine loss; a teacher with more vocabulary entries (padded with logit 0) | not a function of two distributions |
| verl | `forward_kl_topk` for Megatron | needs megatron-core; the FSDP one is compared above |
| verl | `kl_penalty` "full" | raises NotImplementedError |
| verl | policy losses other than `vanilla` under `distillation_loss` | refused by its configuration; `gpg`, `cispo` and `dppo_tv` are compared on their own |
"""


def load() -> list:
    """The rows of every test file, in the order of the page."""
    sys.path.insert(0, str(ROOT / "tests"))
    for name in MODULES:
        importlib.import_module(f"peers.{name}")
    from peers import parity

    return parity.ROWS


def spec_cell(row) -> str:
    if row.inline:
        return "*inline*"
    from opdsl.method import find_spec

    place = find_spec(row.spec).relative_to(ROOT)
    knobs = ", ".join(f"{k} = {v}" for k, v in row.knobs.items())
    return f"[`{row.spec}`](../{place.as_posix()})" + (f" {knobs}" if knobs else "")


def function_cell(row) -> str:
    return f"`{row.function}`" + (f"<br>{row.setting}" if row.setting else "")


def number(x: float) -> str:
    return "0" if x == 0 else f"{x:.0e}"


def line(row) -> str:
    from peers.parity import measure

    found = measure(row)
    remark = row.remark
    if row.unlike:
        away = f"not `{row.unlike}` ({found.apart:.2g})"
        remark = f"{remark}; {away}" if remark else away
    cells = [function_cell(row), spec_cell(row), number(found.value) if row.value else "–",
             number(found.gradient), remark]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def key(text: str) -> tuple[str, str]:
    """What identifies a line: its first two cells."""
    first, second = text.split(" | ")[:2]
    return first.removeprefix("| "), second


def wanted(rows: list) -> set[tuple[str, str]]:
    return {(function_cell(r), spec_cell(r)) for r in rows}


def page(rows: list) -> str:
    from peers.parity import SEEDS

    parts = [OPENING.format(batches=len(SEEDS))]
    for peer in dict.fromkeys(r.peer for r in rows):
        lines = [line(r) for r in rows if r.peer == peer]
        parts.append(f"\n## {peer} {version(peer)} ({len(lines)})\n")
        parts.append("| Function | Our spec | Value | Gradient | Remark |\n|---|---|---|---|---|")
        parts.extend(lines)
    return "\n".join(parts) + "\n" + OUTSIDE


if __name__ == "__main__":
    PAGE.write_text(page(load()), encoding="utf-8")
