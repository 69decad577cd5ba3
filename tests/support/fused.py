"""Methods on hidden states alone: cases, batches, and what the oracle says of hidden states and head.

Every model comes as hidden states and a head of its own, so that nothing of size [N, V] is given.

Legend: B sequences, T positions, N kept tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count

import torch
from torch import Tensor

import opdsl
from opdsl.diagnostics import CompileError
from opdsl.emit.batch import Batch
from opdsl.emit.feed import INFINITE
from opdsl.emit.kernels.head import Head
from opdsl.emit.module import emit
from opdsl.emit.routed import add_routed
from opdsl.emit.runtime import LossModule
from opdsl.ir.interpret import Evaluator, dense64, reference
from opdsl.ir.program import Program, lower
from opdsl.meaning.quantity import Axis, Info, Quantity
from opdsl.meaning.spec import Spec
from opdsl.method import Method
from opdsl.records import replace as changed
from opdsl.resources import methods, specs
from support import batches, generate

SHIPPED = sorted(p.relative_to(specs()).as_posix() for p in methods(failures=True))
GENERATED = 200
LARGEST = float(torch.finfo(torch.float32).max)


@cache
def generated(which: int) -> Method:
    """The generated spec of a number; where the compiler rejects its text, another takes its place."""
    for seed in count(which, 1000):
        try:
            return generate.compiled(generate.spec(seed).text)
        except CompileError:
            continue
    raise AssertionError


@cache
def method_of(which: int | str) -> Method:
    """A generated spec by its number, a shipped one by its path."""
    return generated(which) if isinstance(which, int) else opdsl.load(specs() / which)


def inputs(which: int | str, golden_rows: int = 0, **options) -> batches.Inputs:
    """A batch with holes, an empty sequence and one of a single token, for what a method reads.

    options: arguments of `batches.draw`. golden_rows: as many sequences of reference text.
    """
    method = method_of(which)
    seed = which if isinstance(which, int) else sum(which.encode())
    sizes = {"B": 5, "T": 4 + seed % 3, "V": 131 + seed % 11, "H": 7} | options
    roles = {
        "teachers": tuple(t.name for t in method.spec.teachers if t.kind != "initial") or ("T",),
        "critics": tuple(c.name for c in method.spec.critics),
    }
    drawn = batches.draw(seed, **sizes, **roles)
    if golden_rows:
        text = batches.draw(seed + 1, **sizes | {"B": golden_rows}, **roles, golden=False)
        drawn = replace(drawn, golden=text)
    return batches.as_hidden(drawn)


def near(x: batches.Inputs, closeness: float) -> batches.Inputs:
    """The inputs with teachers of the student's head, their states this much like the student's."""
    g = torch.Generator().manual_seed(1)

    def state() -> Tensor:
        noise = torch.randn(x.hidden_BTH.shape, generator=g, dtype=torch.float64)
        return closeness * x.hidden_BTH + (1 - closeness**2) ** 0.5 * noise

    return replace(x, teacher_hidden={k: (state(), x.weight_VH) for k in x.teacher_hidden})


def widened(x: batches.Inputs, largest: float) -> batches.Inputs:
    """The inputs with the heads scaled, so that the largest row of logits spans `largest` nats.

    Tokens are drawn from the student, who is taken to have sampled them.
    """

    def spans(z_BTV: Tensor) -> float:
        z_NV = z_BTV[x.mask_BT]
        return float((z_NV.amax(-1) - z_NV.amin(-1)).max())

    own = largest / spans(x.student_BTV)
    others = {k: largest / spans(z) for k, z in x.teachers.items()}

    def go(y: batches.Inputs) -> batches.Inputs:
        z = y.student_BTV * own
        g = torch.Generator().manual_seed(1)
        noise = -(-torch.rand(z.shape, generator=g, dtype=z.dtype).log()).log()
        tokens = (z + noise).argmax(-1)
        rollout = torch.log_softmax(z, -1).gather(2, tokens[..., None]).squeeze(-1)
        return replace(
            y,
            weight_VH=y.weight_VH * own,
            student_BTV=z,
            teacher_hidden={k: (h, w * others[k]) for k, (h, w) in y.teacher_hidden.items()},
            teachers={k: t * others[k] for k, t in y.teachers.items()},
            tokens_BT=tokens,
            rollout_BT=rollout,
        )

    return batches.as_hidden(replace(go(x), golden=None if x.golden is None else go(x.golden)))


def batch_of(
    x: batches.Inputs, dtype: torch.dtype = torch.float32, **more
) -> tuple[Batch, tuple[Tensor, Tensor]]:
    """(batch, (hidden, head weight)) with the models' numbers in `dtype`, all else at least float32.

    more: arguments of `Batch.from_hidden`.
    """
    h = x.hidden_BTH.to(dtype, copy=True).requires_grad_()
    w = x.weight_VH.to(dtype, copy=True).requires_grad_()
    wide = dtype if dtype == torch.float64 else torch.float32

    def make(y: batches.Inputs, hidden: Tensor, golden: Batch | None) -> Batch:
        return Batch.from_hidden(
            hidden,
            Head(w),
            teacher_hidden={k: p[0].to(dtype) for k, p in y.teacher_hidden.items()},
            teacher_head={k: Head(p[1].to(dtype)) for k, p in y.teacher_hidden.items()},
            initial_hidden=y.hidden_BTH.to(dtype) * 0.5,
            initial_head=Head(w.detach() * 0.7),
            golden=golden,
            **batches._cast(y, wide),
            **more,
        )

    golden = None
    if x.golden is not None:  # its rows come through the same head
        golden = make(x.golden, x.golden.hidden_BTH.to(dtype), None)
    return make(x, h, golden), (h, w)


# ---- what is wanted, and what is got -----------------------------------------------------------


@dataclass(frozen=True)
class Numbers:
    """A loss and its gradients, float64; size: Σ |loss| over rows and terms, which may cancel."""

    value: float
    hidden_BTH: Tensor
    weight_VH: Tensor
    size: float = 0.0
    logits_BTV: Tensor | None = None

    @property
    def finite(self) -> bool:
        all_ = torch.cat([self.hidden_BTH.flatten(), self.weight_VH.flatten()])
        return abs(self.value) < float("inf") and bool(torch.isfinite(all_).all())

    @property
    def in_range(self) -> bool:
        """Whether float32 can hold every gradient, and no row's loss passes for infinite."""
        most = max(float(self.hidden_BTH.abs().max()), float(self.weight_VH.abs().max()))
        return self.finite and most < LARGEST and self.size < INFINITE


def wanted(program: Program, batch: Batch, leaves: tuple[Tensor, Tensor]) -> Numbers:
    """The oracle on exactly the numbers of the batch, its gradient pulled through the head."""
    found = reference(program, batch)
    h, w = (x.detach().double() for x in leaves)
    weight = torch.einsum("btv,bth->vh", found.grad_logits, h)
    if found.grad_golden is not None and batch.golden is not None:
        rows = batch.golden.dists["student"].hidden_NH.detach().double()
        g_NV = found.grad_golden.flatten(0, 1)[batch.golden.place_N]
        weight = weight + g_NV.T @ rows
    return Numbers(
        found.loss, found.grad_logits @ w, weight, _size(program, batch), found.grad_logits
    )


def _size(program: Program, batch: Batch) -> float:
    """Σ |loss of a row and term|: what a loss with terms of both signs is a small difference of."""
    total = 0.0
    for part in program.parts:
        rows = batch if part.rows == "main" else batch.golden
        if rows is None:
            continue
        rows = add_routed(rows, program.spec.routed)
        run = Evaluator(rows, dense64(rows, "student"))
        for row in part.terms:
            x = run(row.loss).detach()
            total += float((x if x.dim() else x.expand(rows.layout.n_rows)).abs().sum())
    return total


def got(loss: LossModule, parts: Sequence[Batch], leaves: tuple[Tensor, Tensor]) -> Numbers:
    """Loss and gradients of a batch in parts, each part backward on its own."""
    h, w = leaves
    h.grad = w.grad = None
    value = 0.0
    for part, context in zip(parts, loss.prepare(parts)):
        result = loss(part, context)
        value += float(result.loss.detach().double())
        if result.loss.requires_grad:
            result.loss.backward(retain_graph=True)
    grads = (torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)
    return Numbers(value, *(g.double() for g in grads))


def of_rounded_logits(
    method: Method, x: batches.Inputs, batch: Batch, leaves: tuple[Tensor, Tensor]
) -> Numbers:
    """The same loss where logits and their gradient pass through the leaves' type; all arithmetic on
    either side of them is float64."""
    h, w = leaves

    def rounded(states: Tensor, weight: Tensor) -> Tensor:
        z = states.detach().to(h.dtype).double() @ weight.detach().to(h.dtype).double().T
        return z.to(h.dtype).double()

    z_BTV = rounded(h, w).requires_grad_()
    given = Batch.from_logits(
        z_BTV,
        {k: rounded(*pair) for k, pair in x.teacher_hidden.items()},
        **batches._cast(x, torch.float64),
    )
    result = method.loss(given)
    (g_BTV,) = torch.autograd.grad(result.loss, z_BTV)
    g_BTV = g_BTV.to(h.dtype).double()
    weight_VH = torch.einsum("btv,bth->vh", g_BTV, h.detach().double())
    hidden_BTH = (g_BTV @ w.detach().double()).to(h.dtype).double()
    return Numbers(float(result.loss.detach()), hidden_BTH, weight_VH)


def rows_of(x_BTx: Tensor, batch: Batch) -> Tensor:
    """[B, T, …] -> [N, …]"""
    return x_BTx.flatten(0, 1)[batch.place_N]


def apart(found: Numbers, want: Numbers) -> tuple[float, float, float]:
    """As `off`, gradients by the size of the whole difference instead of its largest entry."""

    def error(x: Tensor, y: Tensor) -> float:
        return float((x - y).norm()) / max(float(y.norm()), 1e-6)

    return (
        off(found, want)[0],
        error(found.hidden_BTH, want.hidden_BTH),
        error(found.weight_VH, want.weight_VH),
    )


def off(found: Numbers, want: Numbers) -> tuple[float, float, float]:
    """Relative errors of value, hidden states' gradient and head's gradient.

    A gradient is measured at its largest entry, the value at the sum of its terms' sizes; zeros must
    be met to a millionth of what such a loss could be (1e-6).
    """

    def error(x: Tensor, y: Tensor) -> float:
        if not bool(torch.isfinite(x).all()):
            return float("inf")
        return float((x - y).abs().max()) / max(float(y.abs().max()), 1e-6)

    value = abs(found.value - want.value) / max(abs(want.value), want.size, 1e-6)
    return (
        value if value == value else float("inf"),
        error(found.hidden_BTH, want.hidden_BTH),
        error(found.weight_VH, want.weight_VH),
    )


# ---- rows that do not count ----------------------------------------------------------------------


def closed_after(spec: Spec, first: int) -> Program:
    """The program of a spec with one more gate on every term: position < `first`."""
    b = spec.builder
    position = b.input("position", Quantity(Axis.TOK, "int", 0, info=Info.STATE))
    early = b.compare("<", position, b.const(float(first)))
    terms = [changed(t, gate=b.mul(b.number(t.gate), b.number(early))) for t in spec.terms]
    return lower(changed(spec, terms=type(spec.terms)(terms)))


def module(program: Program) -> LossModule:
    return LossModule(program, emit(program))


def weightless(program: Program, batch: Batch) -> Tensor:
    """Rows [N] of the main part in which gate times weight of every term is zero, by the oracle."""
    part = program.part("main")
    rows = add_routed(batch, program.spec.routed)
    run = Evaluator(rows, dense64(rows, "student"))
    shut = torch.ones(rows.layout.n_rows, dtype=torch.bool)
    for row in part.terms:
        factor = torch.ones(rows.layout.n_rows, dtype=torch.float64)
        for n in (row.term.gate, row.term.weight):
            x = run(n).detach().double()
            factor = factor * (x[rows.layout.seq_N] if n.q.axis in (Axis.SEQ, Axis.PROMPT) else x)
        shut &= factor == 0
    return shut


def on_an_edge(program: Program, x: batches.Inputs, nudge: float = 1e-6) -> bool:
    """Whether a nudge of the hidden states flips a comparison: a threshold met to within rounding.

    There both sides of a gate are right; such a case is counted, not compared.
    """
    g = torch.Generator().manual_seed(1)
    noise = nudge * torch.randn(x.hidden_BTH.shape, generator=g, dtype=torch.float64)
    a = wanted(program, *batch_of(x, torch.float64))
    moved = replace(x, hidden_BTH=x.hidden_BTH + noise)
    b = wanted(program, *batch_of(moved, torch.float64))
    return max(off(b, a)) > 1e3 * nudge


def beyond_float32(program: Program, batch: Batch) -> bool:
    """Whether some number a method names is beyond float32 on this batch: overflow by definition."""
    for part in program.parts:
        rows = batch if part.rows == "main" else batch.golden
        if rows is None:
            continue
        run = Evaluator(add_routed(rows, program.spec.routed), dense64(rows, "student"))
        run(part.total)
        for x in run.memo.values():
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel():
                most = float(torch.nan_to_num(x.detach(), nan=float("inf")).abs().max())
                if most > LARGEST:
                    return True
    return False
