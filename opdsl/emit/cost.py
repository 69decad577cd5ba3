"""Memory and time of a step in front of the vocabulary, predicted from its plan for given shapes.

Only what the loss itself takes is counted: tiles, scratch, gradients of head and hidden states; not
the models behind the hidden states. On the machine at hand the rates are measured for a quarter of
a second; for GPUs they are constants of the data sheets at the share that large products reach.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from opdsl.emit.footprint import Place, Shapes, even, listed, peak, rows_within, usual
from opdsl.emit.plan import Plan, Sweep


@dataclass(frozen=True)
class Machine:
    """FLOP/s of the three products with a head, and seconds an element of a tile takes by kind."""

    kind: str  # cpu or cuda
    name: str
    forward: float
    to_hidden: float
    to_weight: float
    element: dict[str, float]
    gather: float  # bytes/s of rows gathered and scattered
    threads: int = 1


@dataclass(frozen=True)
class Cost:
    """bytes: the peak beyond the inputs; seconds: loss and gradient; chunk: rows of a tile."""

    chunk: int
    bytes: int
    seconds: float
    tiles: int


GPUS = {  # dense bf16 FLOP/s that large products reach, and memory bytes/s
    "h100": (700e12, 2.9e12),
    "h200": (790e12, 4.3e12),
    "a100": (260e12, 1.6e12),
    "b200": (1600e12, 7.0e12),
}


def machine(name: str, hidden: int = 512, vocab: int = 8192) -> Machine:
    """`cpu` (measured now) or one of `GPUS`. Raises KeyError for another name."""
    if name == "cpu":
        return measured(hidden, vocab)
    flops, rate = GPUS[name]
    # a value of 4 bytes read and written once; exp and log hide behind the memory
    one = 8 / rate
    element = {"move": one, "exp": one, "log": one, "logaddexp": 1.5 * one, "sum": one / 2,
               "top": 2 * one}  # fmt: skip
    return Machine("cuda", name, flops, flops, flops, element, rate / 2)


def measured(hidden: int, vocab: int) -> Machine:
    """Rates of this CPU: those of one thread, times the threads torch uses now."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = _one_thread(hidden, vocab)
    finally:
        torch.set_num_threads(threads)
    if threads == 1:
        return one
    k = 0.9 * threads  # two threads give 1.8 to 2 times one
    element = {name: x / k for name, x in one.element.items()}
    name = f"this CPU, {threads} threads"
    return Machine("cpu", name, k * one.forward, k * one.to_hidden, k * one.to_weight, element,
                   k * one.gather, threads)  # fmt: skip


def _one_thread(hidden: int, vocab: int) -> Machine:
    import torch

    # as many columns as keep the head out of the caches, as a real one is
    columns, rows = min(vocab, max(4096, (32 << 20) // (4 * hidden))), 128
    h, w = torch.randn(rows, hidden), torch.randn(columns, hidden)
    z, dh, dw = torch.empty(rows, columns), torch.empty(rows, hidden), torch.zeros(columns, hidden)
    flop = 2.0 * rows * hidden * columns
    fwd = flop / _time(lambda: torch.mm(h, w.T, out=z))
    back = flop / _time(lambda: torch.mm(z, w, out=dh))
    weight = flop / _time(lambda: dw.addmm_(z.T, h))
    x, y = torch.randn(128, 32768), torch.empty(128, 32768)
    size = x.numel()
    element = {
        "move": _time(lambda: torch.mul(x, 0.5, out=y)) / size,
        "exp": _time(lambda: torch.exp(x, out=y)) / size,
        "log": _time(lambda: torch.log(y, out=y)) / size,
        "logaddexp": _time(lambda: torch.logaddexp(x, x, out=y)) / size,
        "sum": _time(lambda: x.sum(1)) / size,
        "top": _time(lambda: x.topk(32, -1)) / size,
    }
    ids = torch.randint(0, columns, (64, 64))
    taken = _time(lambda: dw.index_add_(0, ids.flatten(), w[ids].flatten(0, 1)))
    gather = 3 * ids.numel() * hidden * 4 / taken
    return Machine("cpu", "this CPU, 1 thread", fwd, back, weight, element, gather)


def _time(f, budget: float = 0.03) -> float:
    """Seconds of processor time of the fastest call within a budget, the first one left out."""
    f()
    best, spent = float("inf"), 0.0
    while spent < budget:
        start = time.process_time()  # on a shared machine steadier than the clock
        f()
        took = max(time.process_time() - start, 1e-7)
        best, spent = min(best, took), spent + took
    return best


def cost(
    plan: Plan,
    at: Shapes,
    on: Machine,
    tile_bytes: int | None = None,
    memory: int | None = None,
) -> Cost:
    """The prediction for one plan; `tile_bytes` is another budget for one tile, `memory` one for
    the peak. Raises BudgetError where the memory is too little."""
    place = Place(on.kind, on.threads)
    if memory is None:
        chunk = usual(plan, at, place, tile_bytes)
    else:
        chunk = rows_within([plan], at, place, memory)
    chunk = even(plan, at, chunk)
    tiles = 0 if plan.kind == "S0" else _tiles(plan.gradient, at)
    weight = 0 if at.frozen_head else at.vocab * at.hidden
    seconds = sum(_seconds(s, plan, at, on, backward=False) for s in plan.statistics)
    seconds += _seconds(plan.gradient, plan, at, on, backward=True)
    moved = weight * (1 + (at.bytes / 4 if at.bytes != 4 else 0)) * on.element["move"]
    return Cost(chunk, peak([plan], at, place, chunk), seconds + moved, tiles)


def _tiles(s: Sweep, at: Shapes) -> int:
    """Logits of every model that gives them, and scratch."""
    return len(listed(s, at)) + ("student" in s.reads) + s.scratch


def _seconds(s: Sweep, plan: Plan, at: Shapes, on: Machine, backward: bool) -> float:
    before = at.kept if plan.gated == "known" and backward else 1.0
    after = at.kept if plan.gated and backward else 1.0
    U = 2.0 * at.rows * at.vocab
    if plan.unit and at.frozen_head and backward:  # in the scoring pass, see `emit/unit.py`
        work = 3 * on.element["move"] + on.element["exp"] + on.element["sum"]
        return U * at.hidden / on.to_hidden + at.rows * at.vocab * work
    total = before * sum(U * at.width(n) / on.forward for n in listed(s, at))
    if plan.kind == "S0" and backward:
        rows = 3 * 4 * at.rows * plan.ids * at.hidden / on.gather
        lists = _sets(s, at, on) if listed(s, at) else 0.0
        return total + before * (rows + lists)
    if "student" in s.reads:
        total += before * U * at.hidden / on.forward
    if backward:
        total += after * U * at.hidden / on.to_hidden
        total += 0.0 if at.frozen_head else after * U * at.hidden / on.to_weight
    served = len([n for n in s.reads if n in at.served])
    work = dict(s.work)
    for kind, times in (("move", 2), ("exp", 1), ("sum", 1)):  # a list needs no log-sum-exp
        work[kind] = max(0, work[kind] - times * served)
    return total + before * at.rows * at.vocab * sum(n * on.element[k] for k, n in work.items())


def _sets(s: Sweep, at: Shapes, on: Machine) -> float:
    return at.rows * at.vocab * (s.work["top"] * on.element["top"] + 3 * on.element["move"])


__all__ = ["GPUS", "Cost", "Machine", "Shapes", "cost", "machine"]
