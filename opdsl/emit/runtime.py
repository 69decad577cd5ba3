"""Runs emitted passes over a batch: logits as they are, or hidden states through the fused head.

The passes are text (see `module.py`); this file feeds them rows, hands numbers from pass to pass
and turns the last pass's cotangent into a gradient. Splitting the batch changes nothing: batch
passes always see the whole batch (`prepare`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from opdsl.emit import prelude
from opdsl.emit.batch import (
    Batch,
    BatchError,
    DenseDist,
    Distribution,
    HiddenDist,
    RoutedDist,
    SparseDist,
    place,
)
from opdsl.emit.fused import fused
from opdsl.emit.kernels.head import accumulate_type
from opdsl.emit.kernels.linear_rowwise import linear_rowwise
from opdsl.emit.module import Emitted, _mangle, check, function_name, input_key, key
from opdsl.emit.routed import Chosen, add_routed, resolve
from opdsl.ir.program import Program
from opdsl.ir.stages import Stage, Staged
from opdsl.meaning.quantity import Axis

Numbers = dict[str, Tensor]


@dataclass(frozen=True)
class LossResult:
    """loss: scalar, differentiable w.r.t. what the batch was made from. metrics: plain numbers."""

    loss: Tensor
    metrics: dict[str, float]


@dataclass(frozen=True)
class Context:
    """Values of earlier passes for one micro-batch, by part ("main", "golden")."""

    imports: Mapping[str, Numbers]


def load(text: str) -> dict[str, object]:
    """The functions of emitted passes. The text is checked against a short list of syntax first."""
    check(text)
    space: dict[str, object] = {k: v for k, v in vars(prelude).items() if not k.startswith("__")}
    exec(compile(text, "<opdsl emitted>", "exec"), space)
    return space


class LossModule(nn.Module):
    """The loss of a method: `module(batch)`; for micro-batches see `prepare`."""

    def __init__(self, program: Program, emitted: Emitted):
        super().__init__()
        self.program, self.emitted = program, emitted
        self.functions = load(emitted.text)
        self.scratch = Scratch()

    @cached_property
    def in_place(self) -> dict[str, object]:
        """The row passes for logits that are scratch memory."""
        texts = [fused(s, st) for s in self.emitted.staged for st in s.stages if st.kind == "rows"]
        return load("\n\n\n".join(texts) + "\n")

    @property
    def needs_prepare(self) -> bool:
        """Whether rows are coupled through statistics of the live student."""
        return any(s.coupled for s in self.emitted.staged)

    # -- public ----------------------------------------------------------------------------
    def forward(self, batch: Batch, context: Context | None = None) -> LossResult:
        """Loss and metrics; with a context, this part's share of the whole batch's loss."""
        if context is None:
            (context,) = self.prepare([batch])
        total: Tensor | None = None
        metrics: dict[str, float] = {}
        for staged in self.emitted.staged:
            rows = self._rows_of(batch, staged)
            if rows is None or rows.layout.n_rows == 0:
                continue
            value, found = self._last(staged, rows, context.imports[staged.rows])
            total = value if total is None else total + value
            metrics.update(found)
        if total is None:
            total, metrics = _zero(batch), {"tokens": 0.0}
        metrics = {"loss": float(total.detach()), **metrics}
        return LossResult(total, metrics)

    def prepare(self, parts: Sequence[Batch]) -> list[Context]:
        """Contexts of micro-batches: every pass but the last, over all of them together."""
        contexts: list[dict[str, Numbers]] = [{} for _ in parts]
        with torch.no_grad():
            for staged in self.emitted.staged:
                rows = [self._rows_of(p, staged) for p in parts]
                # a part without tokens (no golden text, or every sequence empty) takes no pass
                present = [(i, r) for i, r in enumerate(rows) if r is not None and r.layout.n_rows]
                if not present:
                    continue
                stores: list[Numbers] = [{} for _ in present]
                for st in staged.stages[:-1]:
                    if st.kind == "rows":
                        for store, (_, r) in zip(stores, present):
                            store.update(self._score(staged, st, r, store))
                    else:
                        self._couple(staged, st, [r for _, r in present], stores)
                for store, (i, _) in zip(stores, present):
                    contexts[i][staged.rows] = store
        return [Context(c) for c in contexts]

    # -- passes ------------------------------------------------------------------------------
    def _rows_of(self, batch: Batch, staged: Staged) -> Batch | None:
        rows = batch if staged.rows == "main" else batch.golden
        return None if rows is None else add_routed(rows, self.program.spec.routed)

    def _function(self, staged: Staged, st: Stage):
        return self.functions[function_name(staged.rows, st)]

    def _couple(self, staged: Staged, st: Stage, rows: list[Batch], stores: list[Numbers]) -> None:
        """A batch pass over all micro-batches; its exports go back to each."""
        like = _dtype(rows[0])
        seq, length, group, pos = [], [], [], []
        start = 0
        for r in rows:
            seq.append(r.layout.seq_N + start)
            start += r.layout.n_seqs
            length.append(r.layout.length_B)
            group.append(r.layout.group_B)
            pos.append(r.layout.pos_N)
        coupling = prelude.Coupling(
            torch.cat(seq), torch.cat(pos), torch.cat(length), torch.cat(group)
        )
        x: dict[str, object] = {
            "step": float(rows[0].step),
            "total_steps": float(rows[0].total_steps),
        }
        for n in st.imports:
            found = [s[key(n)] for s in stores]
            x[key(n)] = (
                found[0] if n.q.axis is Axis.CONST else torch.cat([_like(f, like) for f in found])
            )
        for n in st.nodes:
            if n.op == "input" and n.attr("name") not in ("one", "step"):
                for k in _keys(n):
                    x[k] = torch.cat([seq_input(r, n, k, like) for r in rows])
        out = self._function(staged, st)(coupling, x, like)  # type: ignore[operator]
        exports = {key(n): n for n in st.exports}
        offset = 0
        for r, store in zip(rows, stores):
            size = r.layout.n_rows
            for k, value in out.items():
                whole = exports[k].q.axis is Axis.CONST
                tensor = _tensor(value, like, r.tokens_N.device)
                store[k] = tensor if whole or tensor.dim() == 0 else tensor[offset : offset + size]
            offset += size

    def _on_tiles(self, staged: Staged, st: Stage, batch: Batch):
        """A row pass over tiles of logits: fn(d, r, like), in place where every entry is real."""
        if not _plain_entries(batch, st):
            return self._function(staged, st)
        fn = self.in_place[function_name(staged.rows, st)]
        scratch = self.scratch

        def run(d, r, like):
            return fn(d, r, like, scratch.like(d["student"].z))  # type: ignore[operator]

        return run

    def _score(self, staged: Staged, st: Stage, batch: Batch, store: Numbers) -> Numbers:
        """A row pass that only measures."""
        fn = self._function(staged, st)
        inputs = row_inputs(batch, st, store)
        if not _is_hidden(batch):
            d = dense_dists(batch, st, inputs["y"])
            out = fn(d, {**_scalars(batch, store, st), **inputs}, _dtype(batch))  # type: ignore[operator]
            _refuse_broken(_sound(d), batch)
            return {k: _expand(v, batch) for k, v in out.items()}
        scalars, fn = _scalars(batch, store, st), self._on_tiles(staged, st, batch)

        def program(logits: dict[str, Tensor], rows: dict[str, Tensor]):
            d = _dists(logits, rows, batch, st)
            like = logits["student"].dtype
            found = fn(d, {**scalars, **rows}, like)  # type: ignore[operator]
            size = rows["y"].numel()
            out = {k: _tensor(v, like, rows["y"].device).expand(size) for k, v in found.items()}
            return rows["y"].new_zeros(size, dtype=torch.float32), None, {**out, **_sound(d)}

        _, _, extras = self._sweep(batch, st, program, inputs)
        return _refuse_broken(extras, batch)

    def _last(
        self, staged: Staged, batch: Batch, store: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        st = staged.last
        fn = self._function(staged, st)
        inputs = row_inputs(batch, st, store)
        scalars = _scalars(batch, store, st)
        if _is_hidden(batch):
            fn = self._on_tiles(staged, st, batch)

            def program(logits: dict[str, Tensor], rows: dict[str, Tensor]):
                d = _dists(logits, rows, batch, st)
                value, dz, extra = fn(d, {**scalars, **rows}, logits["student"].dtype)  # type: ignore[operator]
                size = rows["y"].numel()
                like, device = logits["student"].dtype, rows["y"].device
                spread = {k: _tensor(v, like, device).expand(size) for k, v in extra.items()}
                value = _overflow(_tensor(value, like, device).expand(size))
                return value, dz, {**spread, **_sound(d)}

            total, _, extras = self._sweep(batch, st, program, inputs)
            return total, _metrics(staged, _refuse_broken(extras, batch), batch)
        with torch.no_grad():
            d = dense_dists(batch, st, inputs["y"])
            value, dz, extras = fn(d, {**scalars, **inputs}, _dtype(batch))  # type: ignore[operator]
            value = _overflow(_expand(value, batch))
            _refuse_broken(_sound(d), batch)
        student = batch.dists["student"]
        assert isinstance(student, DenseDist)
        total = value.sum(dtype=torch.float64).to(value.dtype)
        total = _WithGradient.apply(student.logits_NV, total, dz)
        return total, _metrics(staged, {k: _expand(v, batch) for k, v in extras.items()}, batch)

    def _sweep(self, batch: Batch, st: Stage, program, inputs: Numbers):
        """`linear_rowwise` with every distribution this pass reads."""
        student = batch.dists["student"]
        assert isinstance(student, HiddenDist)
        others, rows = _sources(batch, st)
        return linear_rowwise(
            student.hidden_NH, student.head, program, rows={**inputs, **rows}, others=others
        )


class Scratch:
    """Buffers shaped like a tile, kept across chunks and steps."""

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}

    def like(self, tile_nV: Tensor):
        """w(i) -> the i-th buffer [n, V]; grows to the tallest tile."""

        def w(i: int) -> Tensor:
            have = self.buffers.get(i)
            same = have is not None and (have.shape[1], have.dtype, have.device) == (
                tile_nV.shape[1],
                tile_nV.dtype,
                tile_nV.device,
            )
            if have is None or not same or len(have) < len(tile_nV):
                have = self.buffers[i] = torch.empty_like(tile_nV)
            return have[: len(tile_nV)]

        return w


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradient w.r.t. the logits is already known."""

    @staticmethod
    def forward(ctx, logits: Tensor, total: Tensor, dz: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*(() if dz is None else (dz,)))
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return total.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        if not ctx.saved_tensors:
            return torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad.device), None, None
        (dz,) = ctx.saved_tensors
        return (dz * grad).to(ctx.dtype), None, None


# ---- inputs -------------------------------------------------------------------------------------


def _zero(batch: Batch) -> Tensor:
    """0 that is still connected to the student."""
    d = batch.dists["student"]
    x = d.logits_NV if isinstance(d, DenseDist) else d.hidden_NH  # type: ignore[union-attr]
    return x.sum() * 0.0 if x.numel() == 0 else (x[:0].sum())


def _is_hidden(batch: Batch) -> bool:
    return isinstance(batch.dists["student"], HiddenDist)


def _plain_entries(batch: Batch, st: Stage) -> bool:
    """Whether every distribution this pass reads entry by entry is one tensor of finite logits."""
    student = batch.dists["student"]
    assert isinstance(student, HiddenDist)
    gathers = ("at_y", "at_set", "top", "top_p")
    for n in st.nodes:
        if n.op == "logp" and any(u.op not in gathers for u in st.nodes if n in u.args):
            d = batch.dists[resolve(batch, str(n.attr("dist")))]
            if not isinstance(d, HiddenDist | DenseDist):
                return False
    bias = student.head.bias
    return bias is None or bool(torch.isfinite(bias[: student.head.width]).all())


def _dtype(batch: Batch) -> torch.dtype:
    """float64 stays; everything narrower is computed in float32 (semantics §6)."""
    d = batch.dists["student"]
    if isinstance(d, HiddenDist):
        return accumulate_type(d.hidden_NH.dtype, d.head.weight.dtype)
    assert isinstance(d, DenseDist)
    return torch.float64 if d.logits_NV.dtype == torch.float64 else torch.float32


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _expand(x: object, batch: Batch) -> Tensor:
    return _tensor(x, _dtype(batch), batch.tokens_N.device).expand(batch.layout.n_rows)


def _tensor(x: object, like: torch.dtype, device: torch.device) -> Tensor:
    """A result of a pass as a tensor; plain numbers must not become float32 in a float64 loss."""
    if isinstance(x, Tensor):
        return x
    return torch.tensor(x, dtype=torch.bool if isinstance(x, bool) else like, device=device)


def _read_dists(st: Stage) -> list[str]:
    names = {str(n.attr("dist")) for n in st.nodes if n.op == "logp"}
    return sorted(names - {"student"})


def _parts(name: str, d: Distribution) -> list[tuple[str, Distribution]]:
    """A distribution under its name; a routed one as its numbered parts."""
    if isinstance(d, RoutedDist):
        return [(f"{name}#{i}", p) for i, p in enumerate(d.parts)]
    return [(name, d)]


def _sources(batch: Batch, st: Stage) -> tuple[dict[str, object], Numbers]:
    """What a pass reads beside the student: whole distributions, and tensors of rows."""
    whole: dict[str, object] = {}
    rows: Numbers = {}
    for name in _read_dists(st):
        d = batch.dists[resolve(batch, name)]
        if isinstance(d, RoutedDist):
            rows[f"choice:{name}"] = d.choice_N
        for key_, part in _parts(name, d):
            if isinstance(part, DenseDist):
                whole[key_] = part.logits_NV
            elif isinstance(part, HiddenDist):
                whole[key_] = (part.hidden_NH, part.head)
            else:
                assert isinstance(part, SparseDist)
                lists = {"ids": part.ids_NK, "logp": part.logp_NK, "logp_y": part.logp_N}
                rows |= {f"{k}:{key_}": x for k, x in lists.items() if x is not None}
    return whole, rows


def dense_dists(batch: Batch, st: Stage, y: Tensor) -> dict[str, object]:
    """Distributions of a pass from full logits (or a served teacher's lists)."""
    like = _dtype(batch)
    student = batch.dists["student"]
    assert isinstance(student, DenseDist)
    whole, rows = _sources(batch, st)
    logits = {"student": student.logits_NV.detach().to(like)}
    for name, x in whole.items():
        if not isinstance(x, Tensor):
            raise BatchError("hidden states of a teacher need the student's hidden states too")
        logits[name] = x.detach().to(like)
    return _dists(logits, {"y": y, **rows}, batch, st)


def _dists(
    logits: dict[str, Tensor], rows: dict[str, Tensor], batch: Batch, st: Stage
) -> dict[str, object]:
    """Distributions of one block of rows, as the passes read them."""
    y, like = rows["y"], logits["student"].dtype

    def view(name: str) -> prelude.Dense | prelude.Sparse:
        if name in logits:
            return prelude.Dense(logits[name], y)
        ids, logp, logp_y = (rows.get(f"{k}:{name}") for k in ("ids", "logp", "logp_y"))
        return prelude.Sparse(
            ids,
            None if logp is None else logp.to(like),
            None if logp_y is None else logp_y.to(like),
            y,
        )

    out: dict[str, object] = {"student": view("student")}
    for name in _read_dists(st):
        d = batch.dists[resolve(batch, name)]
        views = [view(k) for k, _ in _parts(name, d)]
        routed = isinstance(d, RoutedDist)
        out[_mangle(name)] = Chosen(views, rows[f"choice:{name}"]) if routed else views[0]
    return out


# ---- what must not pass in silence ---------------------------------------------------------------

INFINITE = 1e20  # beyond any sum of nats: an impossible entry (log 0 is held as -1e30) was charged


def _overflow(value_n: Tensor) -> Tensor:
    """A loss that charges an impossible entry is infinite, not 1e30."""
    return torch.where(value_n.abs() > INFINITE, value_n * torch.inf, value_n)


def _sound(d: Mapping[str, object]) -> Numbers:
    """Log-sum-exp of every distribution a pass read: NaN or infinite where its scores are."""
    out: Numbers = {}
    for name, x in d.items():
        if isinstance(x, prelude.Dense):
            out[f"lse:{name}"] = x.lse.squeeze(1)
        elif isinstance(x, Chosen):  # of a teacher only the rows that chose it matter
            for i, part in enumerate(x.parts):
                if isinstance(part, prelude.Dense):
                    out[f"lse:{name}#{i}"] = torch.where(x.choice == i, part.lse.squeeze(1), 0.0)
    return out


def _refuse_broken(extras: Mapping[str, Tensor], batch: Batch) -> Numbers:
    """The extras without the soundness checks. Raises BatchError naming the first bad sample."""
    checks = {k: v for k, v in extras.items() if k.startswith("lse:")}
    if checks and not bool(torch.isfinite(torch.stack([v.sum() for v in checks.values()])).all()):
        for name, lse_N in checks.items():
            bad = torch.nonzero(~torch.isfinite(lse_N)).flatten()
            if bad.numel():
                where = place(batch, int(bad[0]))
                raise BatchError(
                    f"the scores of {name.removeprefix('lse:')} are not finite at {where}"
                )
    return {k: v for k, v in extras.items() if k not in checks}


def _keys(n) -> tuple[str, ...]:
    k = input_key(n)
    return (k, f"boot_{k}") if n.attr("name") == "values" else (k,)


def seq_input(batch: Batch, n, k: str, like: torch.dtype) -> Tensor:
    """An input in its own layout: [B] for sequence values, [N] for token values."""
    lay, name = batch.layout, n.attr("name")
    if name == "length":
        return lay.length_B.to(like)
    if name == "position":
        return lay.pos_N.to(like)
    if name == "outcome":
        if batch.outcome_B is None:
            raise BatchError("this method reads `outcome`: pass the verifier's result [B]")
        return batch.outcome_B.to(like)
    if name == "rollout_logp":
        return _rollout(batch).to(like)
    if name == "special":
        if batch.special_N is None:
            return torch.zeros(lay.n_rows, dtype=torch.bool, device=lay.seq_N.device)
        return batch.special_N
    if name == "noise":
        assert batch.place_N is not None
        return prelude.uniform(batch.place_N, batch.step, int(n.attr("k"))).to(like)
    if name == "field":
        if batch.prompt is None and n.attr("field") == "@source":
            raise BatchError('this method asks who drew a text: pass `prompt` with "@source"')
        if batch.prompt is None:
            raise BatchError(f"this method reads prompt.{n.attr('field')}: pass `prompt`")
        hits = [str(p.get(n.attr("field"))) == n.attr("equals") for p in batch.prompt]
        return torch.tensor(hits, dtype=torch.bool, device=lay.seq_N.device)
    assert name == "values", name
    critic = str(n.attr("critic"))
    found = batch.values.get(critic, batch.values.get(""))
    if found is None:
        raise BatchError(f"this method reads the critic {critic!r}: pass `values` [B, T + 1]")
    return found[1 if k.startswith("boot_") else 0].to(like)


def _rollout(batch: Batch) -> Tensor:
    """Log-probabilities under the sampling policy; the student's own, detached, by default."""
    if batch.rollout_N is not None:
        return batch.rollout_N
    d = batch.dists["student"]
    if isinstance(d, DenseDist):
        z = d.logits_NV.detach().to(_dtype(batch))
        return prelude.Dense(z, batch.tokens_N).at_y()
    from opdsl.emit.kernels.linear_logprobs import linear_logprobs

    assert isinstance(d, HiddenDist)
    with torch.no_grad():
        logp, _, _ = linear_logprobs(d.hidden_NH, d.head, batch.tokens_N[:, None])
    return logp.squeeze(1)


def row_inputs(batch: Batch, st: Stage, store: Mapping[str, Tensor]) -> Numbers:
    """Per-row tensors of a pass: sampled tokens, inputs, and what earlier passes computed."""
    like = _dtype(batch)
    out: Numbers = {"y": batch.tokens_N}
    for n in st.nodes:
        if n.op != "input" or n.attr("name") in ("one", "step"):
            continue
        x = seq_input(batch, n, input_key(n), like)
        out[input_key(n)] = x[batch.layout.seq_N] if n.q.axis in (Axis.SEQ, Axis.PROMPT) else x
    for n in st.imports:
        x = store[key(n)]
        if x.dim() > 0:
            out[key(n)] = _like(x, like)
    return out


def _scalars(batch: Batch, store: Mapping[str, Tensor], st: Stage) -> dict[str, object]:
    out: dict[str, object] = {"step": float(batch.step), "total_steps": float(batch.total_steps)}
    for n in st.imports:
        if store[key(n)].dim() == 0:
            out[key(n)] = store[key(n)]
    return out


def _metrics(staged: Staged, extras: Mapping[str, Tensor], batch: Batch) -> dict[str, float]:
    out = {}
    for i, (name, _) in enumerate(staged.terms):
        out[f"loss/{name}"] = float(extras[f"term_{i}"].double().sum())
    for i, (name, _) in enumerate(staged.gates):
        out[f"kept/{name}"] = float(extras[f"gate_{i}"].double().mean())
    if staged.rows == "main":
        out["tokens"] = float(batch.layout.n_rows)
    return out
