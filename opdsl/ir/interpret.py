"""The float64 oracle: evaluates the loss of a program directly and differentiates it by autograd.

It shares nothing with the emitter but the graph: no derived cotangents, no stages, no vectorised
scans. Slow and plain on purpose; every emitted path must equal it in value and gradient.

Legend: B sequences, N rows, K entries of a set, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opdsl.emit.batch import (
    Batch,
    BatchError,
    DenseDist,
    Distribution,
    HiddenDist,
    RoutedDist,
    SparseDist,
)
from opdsl.emit.routed import add_routed, resolve
from opdsl.ir.derive import TAIL_FLOOR
from opdsl.ir.program import Part, Program
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis

FLOOR = -1e30  # log-probability of an impossible entry (padding rows), finite so that 0 · log 0 = 0


@dataclass(frozen=True)
class Oracle:
    """loss: float. grad_logits [B, T, V] float64, zero at masked positions. terms: per term."""

    loss: float
    grad_logits: Tensor
    terms: dict[str, float]
    grad_golden: Tensor | None = None


def reference(program: Program, batch: Batch) -> Oracle:
    """Value and logit gradient of the whole-batch loss. Raises BatchError for missing inputs."""
    loss, grad, terms, golden = 0.0, None, {}, None
    for part in program.parts:
        rows = batch if part.rows == "main" else batch.golden
        if rows is None:
            continue
        rows = add_routed(rows, program.spec.routed)
        value, g, by_term = _part(part, rows)
        loss += value
        terms.update(by_term)
        if part.rows == "main":
            grad = g
        else:
            golden = g
    if grad is None:
        b_, t_ = batch.shape
        grad = torch.zeros(b_, t_, _student(batch).shape[-1], dtype=torch.float64)
    return Oracle(loss, grad, terms, golden)


def _student(batch: Batch) -> Tensor:
    return dense64(batch, "student")


def dense64(batch: Batch, name: str) -> Tensor:
    """Logits [N, V] of a distribution in float64."""
    return _dense64(batch.dists.get(name), name)


def _dense64(d: Distribution | None, name: str) -> Tensor:
    if isinstance(d, DenseDist):
        return d.logits_NV.detach().to(torch.float64)
    if isinstance(d, RoutedDist):
        return torch.stack([_dense64(p, name) for p in d.parts])[
            d.choice_N, torch.arange(len(d.choice_N))
        ]
    if isinstance(d, HiddenDist):
        h = d.head
        x = d.hidden_NH.detach().double() @ h.weight.detach().double().T
        if h.bias is not None:
            x = x + h.bias.detach().double()
        x = x * h.scale
        if h.soft_cap:
            x = h.soft_cap * torch.tanh(x / h.soft_cap)
        return x if h.vocab is None else x[:, : h.vocab]
    raise BatchError(f"the batch has no full distribution named {name!r}")


def _part(part: Part, batch: Batch) -> tuple[float, Tensor, dict[str, float]]:
    z_NV = _student(batch).requires_grad_(True)
    run = Evaluator(batch, z_NV)
    total = run(part.total)
    total = total if total.dim() else total.expand(batch.layout.n_rows)
    value = total.sum()
    b_, t_ = batch.shape
    grad = torch.zeros(b_ * t_, z_NV.shape[-1], dtype=torch.float64)
    if value.requires_grad and z_NV.numel():
        (g_NV,) = torch.autograd.grad(value, z_NV)
        assert batch.place_N is not None
        grad[batch.place_N] = g_NV
    by_term = {
        row.term.name: float(_rows(run(row.loss).detach(), batch).sum()) for row in part.terms
    }
    return float(value.detach()), grad.reshape(b_, t_, z_NV.shape[-1]), by_term


def _rows(x: Tensor, batch: Batch) -> Tensor:
    return x if x.dim() else x.expand(batch.layout.n_rows)


class Evaluator:
    """Evaluates nodes over one batch; `z_NV` are the student's logits, with gradient."""

    def __init__(self, batch: Batch, z_NV: Tensor):
        self.batch, self.z_NV = batch, z_NV
        self.memo: dict[int, object] = {}
        lay = batch.layout
        self.seqs = [
            [n for n in range(lay.n_rows) if int(lay.seq_N[n]) == s] for s in range(lay.n_seqs)
        ]
        self.group = [int(g) for g in lay.group_B]

    def __call__(self, node: Node) -> Tensor:
        for n in nodes_below([node]):
            if n.id not in self.memo:
                args = [self.memo[a.id] for a in n.args]
                self.memo[n.id] = getattr(self, f"_{n.op}")(n, *args)
        return self.memo[node.id]  # type: ignore[return-value]

    # -- shapes ----------------------------------------------------------------------------
    def lift(self, x: Tensor, node: Node, axis: Axis) -> Tensor:
        """Broadcast a value of `node` so that it lines up with values of `axis`."""
        have = node.q.axis
        if have in (Axis.SEQ, Axis.PROMPT) and axis >= Axis.TOK:
            x = x[self.batch.layout.seq_N]
        if have in (Axis.SEQ, Axis.PROMPT, Axis.TOK) and axis is Axis.VOCAB and x.dim() == 1:
            x = x[:, None]
        return x

    def _align(self, n: Node, *xs: Tensor) -> list[Tensor]:
        return [self.lift(x, a, n.q.axis) for x, a in zip(xs, n.args)]

    def number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64)

    # -- leaves ----------------------------------------------------------------------------
    def _const(self, n: Node) -> Tensor:
        return self.number(float(n.attr("value")))  # type: ignore[arg-type]

    _param = _const

    def _schedule(self, n: Node) -> Tensor:
        over = n.attr("over")
        span = float(self.batch.total_steps if over is None else over)  # type: ignore[arg-type]
        x = min(max(self.batch.step / span, 0.0), 1.0)
        if n.attr("kind") == "cosine":
            x = 0.5 * (1 - math.cos(math.pi * x))
        start, stop = float(n.attr("start")), float(n.attr("stop"))  # type: ignore[arg-type]
        return self.number(start + (stop - start) * x)

    def _input(self, n: Node) -> Tensor:
        batch, lay, name = self.batch, self.batch.layout, n.attr("name")
        if name == "one":
            shape = lay.n_rows if n.q.axis is Axis.TOK else lay.n_seqs
            return torch.ones(shape, dtype=torch.float64)
        if name == "length":
            return lay.length_B.double()
        if name == "position":
            return lay.pos_N.double()
        if name == "step":
            return self.number(float(batch.step))
        if name == "rollout_logp":
            if batch.rollout_N is not None:
                return batch.rollout_N.double()
            lp = torch.log_softmax(self.z_NV.detach(), -1)
            return lp.gather(1, batch.tokens_N[:, None]).squeeze(1).clamp_min(FLOOR)
        if name == "outcome":
            return _need(batch.outcome_B, "outcome").double()
        if name == "special":
            if batch.special_N is None:
                return torch.zeros(lay.n_rows, dtype=torch.bool)
            return batch.special_N
        if name == "noise":
            assert batch.place_N is not None
            return torch.tensor(
                [_uniform(int(p), batch.step, int(n.attr("k"))) for p in batch.place_N]
            )  # type: ignore[call-overload]
        if name == "field":
            prompt = _need(batch.prompt, "prompt")
            key, want = n.attr("field"), n.attr("equals")
            return torch.tensor([str(p.get(key)) == want for p in prompt], dtype=torch.bool)
        if name == "values":
            return self.critic(n)[0].double()
        raise AssertionError(name)

    def critic(self, n: Node) -> tuple[Tensor, Tensor]:
        values = self.batch.values
        key = str(n.attr("critic"))
        if key not in values:
            key = "" if "" in values else key
        if key not in values:
            raise BatchError(f"this method reads the critic {n.attr('critic')!r}: pass `values`")
        return values[key]

    def _logp(self, n: Node) -> object:
        name, tau = str(n.attr("dist")), float(n.attr("temperature"))  # type: ignore[arg-type]
        if name == "student":
            z = self.z_NV
        else:
            name = resolve(self.batch, name)
            d = self.batch.dists[name]
            if isinstance(d, RoutedDist) and any(isinstance(p, SparseDist) for p in d.parts):
                return _routed_lists(d, self.batch)
            if isinstance(d, SparseDist):
                return d
            z = dense64(self.batch, name)
        return torch.log_softmax(z / tau, -1).clamp_min(FLOOR)

    # -- sets: (ids [N, K], valid [N, K]); None is the whole vocabulary ----------------------
    def _full(self, n: Node) -> None:
        return None

    def _sampled(self, n: Node) -> tuple[Tensor, Tensor]:
        ids = self.batch.tokens_N[:, None]
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def _top(self, n: Node, x: object) -> tuple[Tensor, Tensor]:
        k = int(n.attr("k"))  # type: ignore[call-overload]
        if isinstance(x, SparseDist):
            ids = _need(x.ids_NK, "teacher_topk_ids")[:, :k]
            valid = _need(x.logp_NK, "teacher_topk_logprobs")[:, :k] > FLOOR / 2
            for i in range(ids.shape[1]):  # an id counts once
                for j in range(i):
                    valid = valid.clone()
                    valid[:, i] &= ids[:, j] != ids[:, i]
            return ids, valid
        assert isinstance(x, Tensor)
        logp, ids = x.detach().topk(min(k, x.shape[1]), -1)
        return ids, logp > FLOOR / 2

    def _top_p(self, n: Node, x: object) -> tuple[Tensor, Tensor]:
        assert isinstance(x, Tensor)
        k, p = int(n.attr("k")), float(n.attr("p"))  # type: ignore[call-overload,arg-type]
        logp, ids = x.detach().topk(min(k, x.shape[1]), -1)
        before = logp.exp().cumsum(-1) - logp.exp()
        return ids, (before < p) & (logp > FLOOR / 2)

    def _union(self, n: Node, *sets: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        ids, valid = _to_full(sets, self.z_NV.shape[1])
        for k in range(ids.shape[1]):
            for j in range(k):
                valid[:, k] &= ~((ids[:, j] == ids[:, k]) & valid[:, j])
        return ids, valid

    def _intersection(self, n: Node, *sets: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        ids, valid = sets[0]
        for other in sets[1:]:
            valid = valid & _member(ids, other)
        return ids, valid

    def _with_bin(self, n: Node, base: tuple[Tensor, Tensor]) -> object:
        return ("bin", base)

    # -- gathers -----------------------------------------------------------------------------
    def _at_y(self, n: Node, x: object) -> Tensor:
        y = self.batch.tokens_N
        if isinstance(x, SparseDist):
            return _need(x.logp_N, "teacher_logprobs").double().clamp_min(FLOOR)
        assert isinstance(x, Tensor)
        return x.gather(1, y[:, None]).squeeze(1)

    def _at_set(self, n: Node, x: object, s: tuple[Tensor, Tensor]) -> Tensor:
        ids, valid = s
        if isinstance(x, SparseDist):
            x = _lookup(x, ids, self.batch.tokens_N).double()
        else:
            assert isinstance(x, Tensor)
            x = x.gather(1, ids)
        # no entry that does not count may reach exp: 0 · inf is not 0 in a gradient
        return torch.where(valid, x, torch.full_like(x, FLOOR))

    def _is_y(self, n: Node, s: object) -> Tensor:
        y = self.batch.tokens_N[:, None]
        if s is None:
            return torch.arange(self.z_NV.shape[1])[None, :] == y
        if s[0] == "bin" if isinstance(s[0], str) else False:  # type: ignore[index]
            ids = s[1][0]  # type: ignore[index]
            return torch.cat([ids == y, torch.zeros_like(y, dtype=torch.bool)], 1)
        return s[0] == y  # type: ignore[index]

    def _in_set(self, n: Node, inner: object, outer: object) -> Tensor:
        v = torch.arange(self.z_NV.shape[1])[None, :].expand(self.batch.layout.n_rows, -1)
        ids = v if outer is None else outer[0]  # type: ignore[index]
        if inner is None:
            return torch.ones_like(ids, dtype=torch.bool)
        return _member(ids, inner)  # type: ignore[arg-type]

    def _add_bin(self, n: Node, x: Tensor, s: tuple[Tensor, Tensor]) -> Tensor:
        lse = torch.logsumexp(x.masked_fill(~s[1], FLOOR), 1)
        rest = 1 - lse.exp()
        floor = math.exp(TAIL_FLOOR)
        tail = torch.where(rest > floor, rest.clamp_min(floor).log(), self.number(TAIL_FLOOR))
        return torch.cat([x, tail[:, None]], 1)

    # -- elementwise -------------------------------------------------------------------------
    def _add(self, n: Node, *xs: Tensor) -> Tensor:
        a, b = self._align(n, *xs)
        return a + b

    def _sub(self, n: Node, *xs: Tensor) -> Tensor:
        a, b = self._align(n, *xs)
        return a - b

    def _mul(self, n: Node, *xs: Tensor) -> Tensor:
        a, b = self._align(n, *xs)
        return a * b

    def _div(self, n: Node, *xs: Tensor) -> Tensor:
        """0 / 0 = 0: an entry that neither side has (padding) weighs nothing."""
        a, b = self._align(n, *xs)
        nothing = (a == 0) & (b == 0)
        return torch.where(
            nothing, torch.zeros_like(b), a / torch.where(nothing, torch.ones_like(b), b)
        )

    def _neg(self, n: Node, x: Tensor) -> Tensor:
        return -x

    def _exp(self, n: Node, x: Tensor) -> Tensor:
        return torch.exp(x)

    def _log(self, n: Node, x: Tensor) -> Tensor:
        safe = torch.where(x > 0, x, torch.ones_like(x))
        return torch.where(x > 0, safe.log(), torch.full_like(x, FLOOR))

    def _pow(self, n: Node, *xs: Tensor) -> Tensor:
        a, b = self._align(n, *xs)
        return a**b

    def _min(self, n: Node, *xs: Tensor) -> Tensor:
        a, b = self._align(n, *xs)
        return torch.where(a <= b, a, b)

    def _max(self, n: Node, *xs: Tensor) -> Tensor:
        a, b = self._align(n, *xs)
        return torch.where(a >= b, a, b)

    def _abs(self, n: Node, x: Tensor) -> Tensor:
        return x.abs()

    def _tanh(self, n: Node, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def _sigmoid(self, n: Node, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def _logaddexp(self, n: Node, *xs: Tensor) -> Tensor:
        a, b = self._align(n, *xs)
        return torch.logaddexp(a, b)

    def _lt(self, n: Node, *xs: Tensor) -> Tensor:
        a, b = self._align(n, *xs)
        return a < b

    def _le(self, n: Node, *xs: Tensor) -> Tensor:
        a, b = self._align(n, *xs)
        return a <= b

    def _eq(self, n: Node, *xs: Tensor) -> Tensor:
        a, b = self._align(n, *xs)
        return a == b

    def _and(self, n: Node, *xs: Tensor) -> Tensor:
        a, b = self._align(n, *xs)
        return a.bool() & b.bool()

    def _or(self, n: Node, *xs: Tensor) -> Tensor:
        a, b = self._align(n, *xs)
        return a.bool() | b.bool()

    def _not(self, n: Node, x: Tensor) -> Tensor:
        return ~x.bool()

    def _where(self, n: Node, *xs: Tensor) -> Tensor:
        test, yes, no = self._align(n, *xs)
        return torch.where(*torch.broadcast_tensors(test.bool(), yes, no))

    def _sg(self, n: Node, x: Tensor) -> Tensor:
        return x.detach()

    def _live(self, n: Node, x: Tensor) -> Tensor:
        return x

    # -- reductions over entries -----------------------------------------------------------
    def _entries(self, x: Tensor, s: object, fill: float) -> Tensor:
        """x on the entries of a set, `fill` where an entry is not valid."""
        n_rows = self.batch.layout.n_rows
        x = x if x.dim() == 2 else x[:, None] if x.dim() == 1 else x.expand(n_rows, 1)
        if s is None:
            return x.expand(n_rows, self.z_NV.shape[1])
        if s[0] == "bin" if isinstance(s[0], str) else False:  # type: ignore[index]
            valid = s[1][1]  # type: ignore[index]
            valid = torch.cat([valid, torch.ones(n_rows, 1, dtype=torch.bool)], 1)
        else:
            valid = s[1]  # type: ignore[index]
        return torch.where(
            valid, x.expand(valid.shape), torch.full_like(valid, fill, dtype=x.dtype)
        )

    def _sum_v(self, n: Node, x: Tensor, s: object) -> Tensor:
        return self._entries(self.lift(x, n.args[0], Axis.VOCAB).double(), s, 0.0).sum(1)

    def _max_v(self, n: Node, x: Tensor, s: object) -> Tensor:
        """0 over an empty set, as a sum of nothing."""
        best = self._entries(self.lift(x, n.args[0], Axis.VOCAB), s, FLOOR).amax(1)
        return torch.where(best > FLOOR / 2, best, torch.zeros_like(best))

    def _lse_v(self, n: Node, x: Tensor, s: object) -> Tensor:
        return torch.logsumexp(self._entries(self.lift(x, n.args[0], Axis.VOCAB), s, FLOOR), 1)

    # -- coupling ----------------------------------------------------------------------------
    def _sum_t(self, n: Node, x: Tensor) -> Tensor:
        x = self._tokens(x)
        zero = self.number(0.0)
        return _stack([sum((x[r] for r in rows), zero) for rows in self.seqs])

    def _tokens(self, x: Tensor) -> Tensor:
        return x.double().expand(self.batch.layout.n_rows) if x.dim() == 0 else x.double()

    def _scan(self, n: Node, a: Tensor, c: Tensor) -> Tensor:
        a = self._tokens(self.lift(a, n.args[0], Axis.TOK))
        c = self._tokens(self.lift(c, n.args[1], Axis.TOK))
        out: list[Tensor] = [self.number(0.0)] * self.batch.layout.n_rows
        for rows in self.seqs:
            after = self.number(0.0)
            for r in reversed(rows):
                after = a[r] + c[r] * after
                out[r] = after
        return _stack(out)

    def _scan_fwd(self, n: Node, a: Tensor, c: Tensor) -> Tensor:
        a = self._tokens(self.lift(a, n.args[0], Axis.TOK))
        c = self._tokens(self.lift(c, n.args[1], Axis.TOK))
        out: list[Tensor] = [self.number(0.0)] * self.batch.layout.n_rows
        for rows in self.seqs:
            before = self.number(0.0)
            for r in rows:
                out[r] = a[r] + before
                before = c[r] * out[r]
        return _stack(out)

    def _max_t(self, n: Node, x: Tensor) -> Tensor:
        x = self._tokens(x)
        zero = self.number(0.0)
        return _stack([x[rows].max() if rows else zero for rows in self.seqs])

    def _rank_t(self, n: Node, x: Tensor) -> Tensor:
        x = self._tokens(x).detach()
        out: list[Tensor] = [self.number(0.0)] * self.batch.layout.n_rows
        for rows in self.seqs:
            for r in rows:
                out[r] = self.number(sum(float(x[o] < x[r]) for o in rows) / len(rows))
        return _stack(out)

    def _shift(self, n: Node, x: Tensor) -> Tensor:
        k = int(n.attr("n"))  # type: ignore[call-overload]
        source = n.args[0]
        boot = None
        if source.op == "input" and source.attr("name") == "values":
            boot = self.critic(source)[1].double()
        x = self._tokens(x)
        out: list[Tensor] = [self.number(0.0)] * self.batch.layout.n_rows
        for s, rows in enumerate(self.seqs):
            for i, r in enumerate(rows):
                j = i + k
                if 0 <= j < len(rows):
                    out[r] = x[rows[j]]
                elif j == len(rows) and boot is not None:
                    out[r] = boot[s]
        return _stack(out)

    def _mates(self, s: int, own: bool) -> list[int]:
        return [o for o, g in enumerate(self.group) if g == self.group[s] and (own or o != s)]

    def _over_mates(self, n: Node, x: Tensor, own: bool, how) -> Tensor:
        if n.args[0].q.axis is Axis.TOK:
            x = self._tokens(x)
            out: list[Tensor] = [self.number(0.0)] * self.batch.layout.n_rows
            for s, rows in enumerate(self.seqs):
                for i, r in enumerate(rows):
                    mates = [
                        x[self.seqs[o][i]] for o in self._mates(s, own) if i < len(self.seqs[o])
                    ]
                    out[r] = how(mates)
            return _stack(out)
        x = x.double().expand(self.batch.layout.n_seqs)
        return _stack([how([x[o] for o in self._mates(s, own)]) for s in range(len(self.seqs))])

    def _total(self, xs: list[Tensor]) -> Tensor:
        return sum(xs, self.number(0.0))

    def _group_sum(self, n: Node, x: Tensor) -> Tensor:
        return self._over_mates(n, x, True, self._total)

    def _group_max(self, n: Node, x: Tensor) -> Tensor:
        return self._over_mates(n, x, True, lambda xs: torch.stack(xs).amax(0))

    def _others_sum(self, n: Node, x: Tensor) -> Tensor:
        return self._over_mates(n, x, False, self._total)

    def _position_sum(self, n: Node, x: Tensor) -> Tensor:
        x = self._tokens(x)
        pos = self.batch.layout.pos_N
        return _stack([x[pos == pos[r]].sum() for r in range(len(pos))])

    def _sum_b(self, n: Node, x: Tensor) -> Tensor:
        return x.double().sum()

    def _max_b(self, n: Node, x: Tensor) -> Tensor:
        return x.double().amax()

    def _quantile_b(self, n: Node, x: Tensor) -> Tensor:
        return torch.quantile(x.detach().double(), float(n.attr("share")))  # type: ignore[arg-type]


def _uniform(place: int, step: int, k: int) -> float:
    """One draw in [0, 1) per place, step and call site: a 31-bit mix, the same everywhere."""
    x = (place * 747796405 + step * 891213001 + k * 277803737 + 12345) & 0x7FFFFFFF
    for factor in (1103515245, 1566083941):
        x = ((x ^ (x >> 15)) * factor) & 0x7FFFFFFF
    return ((x ^ (x >> 13)) & 0x7FFFFFFF) / 2147483648.0


def _stack(xs: list[Tensor]) -> Tensor:
    return torch.stack(xs) if xs else torch.zeros(0, dtype=torch.float64)


def _need(x, what: str):
    if x is None:
        raise BatchError(f"this method reads `{what}`: pass it to the batch")
    return x


def _member(ids: Tensor, s: tuple[Tensor, Tensor]) -> Tensor:
    hit = (ids[:, :, None] == s[0][:, None, :]) & s[1][:, None, :]
    return hit.any(-1)


def _to_full(sets: tuple, v_: int) -> tuple[Tensor, Tensor]:
    n_rows = next((s[0].shape[0] for s in sets if s is not None), 0)
    ids, valid = [], []
    for s in sets:
        if s is None:
            ids.append(torch.arange(v_)[None, :].expand(n_rows, -1))
            valid.append(torch.ones(n_rows, v_, dtype=torch.bool))
        else:
            ids.append(s[0])
            valid.append(s[1])
    return torch.cat(ids, 1), torch.cat(valid, 1)


def _routed_lists(d: RoutedDist, batch: Batch) -> SparseDist:
    """Teachers of different access, chosen per row, as lists of the longest one's length."""
    parts, width = [], 1
    for p in d.parts:
        if not isinstance(p, SparseDist):
            lp = torch.log_softmax(_dense64(p, ""), -1)
            values, ids = lp.sort(dim=1, descending=True, stable=True)
            y = lp.gather(1, batch.tokens_N[:, None]).squeeze(1)
            p = SparseDist(ids, values, y)
        parts.append(p)
        width = max(width, 0 if p.ids_NK is None else p.ids_NK.shape[1])
    n_rows = batch.layout.n_rows
    ids = torch.full((n_rows, width), -1)
    logp = torch.full((n_rows, width), FLOOR, dtype=torch.float64)
    at_y = torch.full((n_rows,), FLOOR, dtype=torch.float64)
    for n in range(n_rows):
        p = parts[int(d.choice_N[n])]
        if p.ids_NK is not None:
            k = p.ids_NK.shape[1]
            ids[n, :k], logp[n, :k] = p.ids_NK[n], p.logp_NK[n].double()
        if p.logp_N is not None:
            at_y[n] = p.logp_N[n]
    return SparseDist(ids, logp, at_y)


def _lookup(d: SparseDist, ids: Tensor, y_N: Tensor) -> Tensor:
    """Log-probabilities at ids from a teacher's top list and its sampled log-probability."""
    out = torch.full(ids.shape, FLOOR, dtype=torch.float64)
    if d.logp_N is not None:
        out = torch.where(ids == y_N[:, None], d.logp_N.double()[:, None], out)
    if d.ids_NK is not None and d.logp_NK is not None:
        same = ids[:, :, None] == d.ids_NK[:, None, :]
        found = torch.where(
            same, d.logp_NK.double()[:, None, :], torch.full_like(same, FLOOR, dtype=torch.float64)
        )
        out = torch.maximum(out, found.amax(-1))
    return out
