"""What the passes read of a batch: distributions, rows, numbers; and what must not pass in silence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

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
from opdsl.emit.kernels.head import accumulate_type
from opdsl.emit.module import GATHERS, _mangle, input_key, key
from opdsl.emit.routed import Chosen, resolve
from opdsl.emit.sharded import Across
from opdsl.ir.stages import Stage, Staged
from opdsl.meaning.quantity import Axis

Numbers = dict[str, Tensor]


def zero(batch: Batch) -> Tensor:
    """0 that is still connected to the student."""
    d = batch.dists["student"]
    x = d.logits_NV if isinstance(d, DenseDist) else d.hidden_NH  # type: ignore[union-attr]
    nothing = x.sum() * 0.0 if x.numel() == 0 else (x[:0].sum())
    # the head too: what gathered it (FSDP2) or sums its gradient (DDP) waits for every process
    parts = (d.head.weight, d.head.bias) if isinstance(d, HiddenDist) else ()
    spread = [p[:0].sum() for p in parts if p is not None and p.requires_grad]
    return sum(spread, nothing)


def is_hidden(batch: Batch) -> bool:
    return isinstance(batch.dists["student"], HiddenDist)


def finite_entries(batch: Batch, st: Stage) -> bool:
    """Whether every distribution this pass reads entry by entry is one tensor of finite logits."""
    student = batch.dists["student"]
    assert isinstance(student, HiddenDist)
    for n in st.nodes:
        if n.op == "logp" and any(u.op not in GATHERS for u in st.nodes if n in u.args):
            d = batch.dists[resolve(batch, str(n.attr("dist")))]
            if not isinstance(d, HiddenDist | DenseDist):
                return False
    bias, shard = student.head.bias, student.head.shard
    fine = bias is None or bool(torch.isfinite(bias[: student.head.width]).all())
    return fine if shard is None or bias is None else shard.everywhere(fine, bias.device)


def across_of(batch: Batch) -> Across | None:
    """What passes call where the student's head is spread over processes."""
    d = batch.dists["student"]
    shard = d.head.shard if isinstance(d, HiddenDist) else None
    return None if shard is None else Across(shard)


def dtype_of(batch: Batch) -> torch.dtype:
    """float64 stays; everything narrower is computed in float32 (semantics §6)."""
    d = batch.dists["student"]
    if isinstance(d, HiddenDist):
        return accumulate_type(d.hidden_NH.dtype, d.head.weight.dtype)
    assert isinstance(d, DenseDist)
    return torch.float64 if d.logits_NV.dtype == torch.float64 else torch.float32


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def expanded(x: object, batch: Batch) -> Tensor:
    return tensor_of(x, dtype_of(batch), batch.tokens_N.device).expand(batch.layout.n_rows)


def tensor_of(x: object, like: torch.dtype, device: torch.device) -> Tensor:
    """A result of a pass as a tensor; plain numbers must not become float32 in a float64 loss."""
    if isinstance(x, Tensor):
        return x
    return torch.tensor(x, dtype=torch.bool if isinstance(x, bool) else like, device=device)


def read_dists(st: Stage) -> list[str]:
    names = {str(n.attr("dist")) for n in st.nodes if n.op == "logp"}
    return sorted(names - {"student"})


def parts_of(name: str, d: Distribution) -> list[tuple[str, Distribution]]:
    """A distribution under its name; a routed one as its numbered parts."""
    if isinstance(d, RoutedDist):
        return [(f"{name}#{i}", p) for i, p in enumerate(d.parts)]
    return [(name, d)]


def sources(batch: Batch, st: Stage) -> tuple[dict[str, object], Numbers]:
    """What a pass reads beside the student: whole distributions, and tensors of rows."""
    whole: dict[str, object] = {}
    rows: Numbers = {}
    for name in read_dists(st):
        d = batch.dists[resolve(batch, name)]
        if isinstance(d, RoutedDist):
            rows[f"choice:{name}"] = d.choice_N
        for key_, part in parts_of(name, d):
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
    like = dtype_of(batch)
    student = batch.dists["student"]
    assert isinstance(student, DenseDist)
    whole, rows = sources(batch, st)
    logits = {"student": student.logits_NV.detach().to(like)}
    for name, x in whole.items():
        if not isinstance(x, Tensor):
            raise BatchError("hidden states of a teacher need the student's hidden states too")
        logits[name] = x.detach().to(like)
    return dists_of(logits, {"y": y, **rows}, batch, st)


def dists_of(
    logits: dict[str, Tensor],
    rows: dict[str, Tensor],
    batch: Batch,
    st: Stage,
    like: torch.dtype | None = None,
) -> dict[str, object]:
    """Distributions of one block of rows, as the passes read them."""
    y, like = rows["y"], like or logits["student"].dtype
    across = across_of(batch)
    dense = prelude.Dense if across is None else across.dist

    def view(name: str) -> prelude.Dense | prelude.Sparse:
        if name in logits:
            return dense(logits[name], y)
        ids, logp, logp_y = (rows.get(f"{k}:{name}") for k in ("ids", "logp", "logp_y"))
        return prelude.Sparse(
            ids,
            None if logp is None else logp.to(like),
            None if logp_y is None else logp_y.to(like),
            y,
        )

    out: dict[str, object] = {"student": view("student")} if "student" in logits else {}
    for name in read_dists(st):
        d = batch.dists[resolve(batch, name)]
        views = [view(k) for k, _ in parts_of(name, d)]
        routed = isinstance(d, RoutedDist)
        out[_mangle(name)] = Chosen(views, rows[f"choice:{name}"]) if routed else views[0]
    return out


# ---- what must not pass in silence ---------------------------------------------------------------

INFINITE = 1e20  # beyond any sum of nats: an impossible entry (log 0 is held as -1e30) was charged


def overflow(value_n: Tensor) -> Tensor:
    """A loss that charges an impossible entry is infinite, not 1e30."""
    return torch.where(value_n.abs() > INFINITE, value_n * torch.inf, value_n)


def sound(d: Mapping[str, object]) -> Numbers:
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


def refuse_broken(extras: Mapping[str, Tensor], batch: Batch) -> Numbers:
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


def keys_of(n) -> tuple[str, ...]:
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
        return rollout_of(batch).to(like)
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


def rollout_of(batch: Batch) -> Tensor:
    """Log-probabilities under the sampling policy; the student's own, detached, by default."""
    if batch.rollout_N is not None:
        return batch.rollout_N
    d = batch.dists["student"]
    if isinstance(d, DenseDist):
        z = d.logits_NV.detach().to(dtype_of(batch))
        return prelude.Dense(z, batch.tokens_N).at_y()
    from opdsl.emit.kernels.linear_logprobs import linear_logprobs
    from opdsl.emit.limit import logit_rows

    assert isinstance(d, HiddenDist)
    with torch.no_grad():
        chunk = logit_rows(batch, d.head.widest)
        logp, _, _ = linear_logprobs(d.hidden_NH, d.head, batch.tokens_N[:, None], chunk=chunk)
    return logp.squeeze(1)


def row_inputs(batch: Batch, st: Stage, store: Mapping[str, Tensor]) -> Numbers:
    """Per-row tensors of a pass: sampled tokens, inputs, and what earlier passes computed."""
    like = dtype_of(batch)
    out: Numbers = {"y": batch.tokens_N}
    for n in st.nodes:
        if n.op != "input" or n.attr("name") in ("one", "step"):
            continue
        x = seq_input(batch, n, input_key(n), like)
        out[input_key(n)] = x[batch.layout.seq_N] if n.q.axis in (Axis.SEQ, Axis.PROMPT) else x
    for n in st.imports:
        x = store[key(n)]
        if x.dim() > 0:
            out[key(n)] = as_type(x, like)
    return out


def scalars(batch: Batch, store: Mapping[str, Tensor], st: Stage) -> dict[str, object]:
    out: dict[str, object] = {"step": float(batch.step), "total_steps": float(batch.total_steps)}
    across = across_of(batch)
    if across is not None:
        out["shard"] = across
    for n in st.imports:
        if store[key(n)].dim() == 0:
            out[key(n)] = store[key(n)]
    return out


def metrics_of(staged: Staged, extras: Mapping[str, Tensor], batch: Batch) -> dict[str, float]:
    out = {}
    for i, (name, _) in enumerate(staged.terms):
        out[f"loss/{name}"] = float(extras[f"term_{i}"].double().sum())
    for i, (name, _) in enumerate(staged.gates):
        out[f"kept/{name}"] = float(extras[f"gate_{i}"].double().mean())
    if staged.rows == "main":
        out["tokens"] = float(batch.layout.n_rows)
    return out
