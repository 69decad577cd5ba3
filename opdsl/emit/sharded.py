"""Row passes where every process holds its own columns of the logits.

The same three texts as on one process (`module`, `fused`, `restricted`), with everything that
crosses the vocabulary handed to `r['shard']`, an `Across`: it finishes a reduction over the
processes, takes numbers at ids from the process that has them, and keeps to its own columns where
a value has an entry per word. What runs over an index set is the same everywhere and stays as it is.

Legend: n rows, K ids, v words of this process, V words of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opdsl.emit import prelude
from opdsl.emit.fused import Fused
from opdsl.emit.kernels.parallel import VocabShard
from opdsl.emit.module import Emitted, Writer
from opdsl.emit.restricted import Restricted, is_restricted
from opdsl.meaning.node import OPS, SET_OPS, Node
from opdsl.meaning.quantity import Axis


class Dense(prelude.Dense):
    """A distribution of which this process has the logits [n, v] of its words."""

    def __init__(self, z: Tensor, y: Tensor, across: Across):
        super().__init__(z, y)
        self.across = across

    @property
    def lse(self) -> Tensor:
        if self._lse is None:
            self._lse = self.across.lse(self.z)[:, None]
        return self._lse

    def tempered(self, temperature: float) -> Dense:
        if temperature == 1.0:
            return self
        if temperature not in self._at:
            self._at[temperature] = Dense(self.z / temperature, self.y, self.across)
        return self._at[temperature]

    def rescaled(self, temperature: float, out: Tensor) -> Tensor:
        z = torch.div(self.z, temperature, out=out)
        self._at[temperature] = Dense(z, self.y, self.across)
        return out

    def measure(self, out: Tensor) -> Tensor:
        top = self.across.most(self.z)[:, None]
        total = self.across.sum(torch.sub(self.z, top, out=out).exp_())
        self._lse = top + total[:, None].log()
        return total

    def at(self, ids: Tensor) -> Tensor:
        return (self.across.at(self.z, ids) - self.lse).clamp_min_(prelude.FLOOR)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        return self.across.top(self.z, k, self.lse)

    def top_p(self, p: float, k: int) -> tuple[Tensor, Tensor]:
        return self.across.top_p(self.z, p, k, self.lse)


class Across:
    """What the texts below call: each function as its namesake in the prelude, over all processes.

    `s` is an index set; None is the whole vocabulary, and only then anything is exchanged.
    """

    def __init__(self, shard: VocabShard):
        self.shard = shard
        self.words = float(shard.total)  # V, exact in every type

    def dist(self, z: Tensor, y: Tensor) -> Dense:
        return Dense(z, y, self)

    # -- reductions: [n, v] -> [n] -----------------------------------------------------------
    def sum(self, x: Tensor, s: object = None) -> Tensor:
        return x.sum(1) if s is not None else self.shard.add(x.sum(1))

    def most(self, x: Tensor) -> Tensor:
        return self.shard.most(x.amax(1))

    def largest(self, x: Tensor, s: object = None) -> Tensor:
        if s is not None:
            return prelude.largest(x)
        best = self.most(x)
        return torch.where(best > prelude.FLOOR / 2, best, 0.0)

    def lse(self, x: Tensor, s: object = None) -> Tensor:
        if s is not None:
            return torch.logsumexp(x, 1)
        return self.lse_into(x, torch.empty_like(x, memory_format=torch.contiguous_format))

    def lse_into(self, x: Tensor, out: Tensor) -> Tensor:
        top = self.most(x)
        return top + self.sum(torch.sub(x, top[:, None], out=out).exp_()).log()

    # -- at ids ------------------------------------------------------------------------------
    def at(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.shard.at(x, ids)

    def top(self, x: Tensor, k: int, lse: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        best, ids = self.shard.largest(x, k)
        return ids, (best - lse) > prelude.FLOOR / 2

    def top_p(
        self, x: Tensor, p: float, k: int, lse: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor]:
        best, ids = self.shard.largest(x, k)
        prob = (best - lse).exp()
        return ids, (prob.cumsum(-1) - prob < p) & (best - lse > prelude.FLOOR / 2)

    def ids(self, y: Tensor) -> Tensor:
        """The words of this process [1, v]."""
        return torch.arange(self.shard.start, self.shard.stop, device=y.device)[None, :]

    # -- adjoints ----------------------------------------------------------------------------
    def put(self, x: Tensor, s: tuple[Tensor, Tensor], n: int, v: int) -> Tensor:
        x = prelude.entries(x, s, 0.0, n, v)
        out = torch.zeros(n, v, dtype=x.dtype, device=x.device)
        return self.shard.scatter_add(out, s[0], x)

    def softmax_adjoint(self, dist: Dense, temperature: float, at_y, at_sets, dense) -> Tensor:
        scaled = dist.tempered(temperature)
        e = torch.empty_like(scaled.z)
        total = scaled.measure(e)
        rest = None
        if dense is not None:
            rest = prelude.entries(dense, None, 0.0, *e.shape).to(e.dtype)
        mass = 0.0 if rest is None else self.sum(rest)
        self.adjoint_into(e, total, dist.y, temperature, at_y, at_sets, mass)
        return e if rest is None else e.add_(rest, alpha=1.0 / temperature)

    def adjoint_into(self, *args) -> None:
        """Numbers at ids go to the process that has the word."""
        prelude.adjoint_into(*args, scatter=self.shard.scatter_add)


# ---- the texts ---------------------------------------------------------------------------------


class ShardError(ValueError):
    """A method does something that is not defined over a vocabulary in parts."""


CROSSING = "sum_v max_v lse_v at_y at_set put_set is_y in_set"
ON_SETS = "add_bin head last"  # of index sets, the same on every process
WORDWISE = (
    "logp add sub mul div neg exp log pow min max abs tanh sigmoid logaddexp log1mexp "
    "lt le eq and or not where"
)
KNOWN = frozenset([*f"{CROSSING} {ON_SETS} {WORDWISE}".split(), *SET_OPS])


class Sharded(Writer):
    """Writes a row pass whose values with entries are a process's own columns."""

    across = "r['shard']."

    def statement(self, n: Node) -> None:
        reads = n.q.axis is Axis.VOCAB or any(a.q.axis is Axis.VOCAB for a in n.args)
        if reads and n.op not in KNOWN:
            raise ShardError(
                f"`{n.span.text or n.op}` needs {OPS[n.op]}, which is not defined over a "
                "vocabulary in parts: give the whole head"
            )
        super().statement(n)

    def _set(self, n: Node) -> str:
        return self.names[n.args[1].id]

    def _sum_v(self, n: Node) -> str:
        return f"r['shard'].sum({self._over(n, '0.0')}, {self._set(n)})"

    def _max_v(self, n: Node) -> str:
        return f"r['shard'].largest({self._over(n, 'FLOOR')}, {self._set(n)})"

    def _lse_v(self, n: Node) -> str:
        return f"r['shard'].lse({self._over(n, 'FLOOR')}, {self._set(n)})"

    def _at_set(self, n: Node) -> str:
        if n.args[0].op == "logp":
            return super()._at_set(n)
        return self.picked(self.use(n.args[0], Axis.VOCAB), f"{self._set(n)}[0]")

    def picked(self, x: str, ids: str) -> str:
        return f"r['shard'].at({x}, {ids})"

    def _is_y(self, n: Node) -> str:
        if n.args[0].op == "full":
            return "r['shard'].ids(y) == y[:, None]"
        return super()._is_y(n)

    def _in_set(self, n: Node) -> str:
        inner, outer = n.args
        if outer.op == "full":
            return f"member(r['shard'].ids(y).expand(n, v), {self.names[inner.id]})"
        return super()._in_set(n)


class ShardedFused(Sharded, Fused):
    """The same in place."""

    words = "r['shard'].words"

    def summed(self, x: str) -> str:
        return f"r['shard'].sum({x})"


class ShardedRestricted(Sharded, Restricted):
    """The last pass of a method that reads the student on given ids alone."""


def texts(emitted: Emitted) -> tuple[str, str, str]:
    """(plain, in place, by ids): the row passes of a method over a vocabulary in parts.

    Raises ShardError naming what of the method cannot be sharded.
    """
    rows = [(s, st) for s in emitted.staged for st in s.stages if st.kind == "rows"]
    found = (
        [Sharded(s, st).function() for s, st in rows],
        [ShardedFused(s, st).function() for s, st in rows],
        [ShardedRestricted(s, s.last).function() for s in emitted.staged if is_restricted(s)],
    )
    return tuple("\n\n\n".join(x) + "\n" for x in found)  # type: ignore[return-value]


__all__ = ["Across", "Dense", "ShardError", "texts"]
