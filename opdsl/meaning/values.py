"""What an expression can evaluate to while a method is being elaborated."""

from __future__ import annotations

from typing import Any

from opdsl.meaning.node import Builder, Node
from opdsl.meaning.quantity import Axis, Info, Quantity
from opdsl.records import record
from opdsl.source import NOWHERE, Span
from opdsl.syntax import tree


class Value:
    """Base of everything below."""

    kind = "value"


@record
class Bad(Value):
    """Something already reported; using it stays silent."""

    kind = "bad"


@record
class Num(Value):
    node: Node
    kind = "number"


@record
class Str(Value):
    text: str
    kind = "text"


@record
class Field(Value):
    """`prompt.name`"""

    name: str
    kind = "prompt field"


@record
class Word(Value):
    """A name with no value of its own (`prompt`, `data`, `golden`)."""

    name: str
    kind = "word"


@record
class IndexY(Value):
    kind = "index"


@record
class IndexT(Value):
    offset: int = 0
    kind = "index"


@record
class IndexV(Value):
    domain: Domain
    kind = "index"


@record
class IndexI(Value):
    kind = "index"


@record
class Domain(Value):
    """An index set with its tail rule and, for `{v in S: …}`, a condition."""

    set: Node
    base: Node
    tail: str | None = None
    mask: Node | None = None
    kind = "index set"

    @property
    def single(self) -> bool:
        """One entry, whichever it is."""
        return self.base.op == "sampled" or (self.base.op == "top" and self.base.attr("k") == 1)

    @property
    def plain(self) -> Domain:
        """The entries alone: no bucket, no renormalisation."""
        return Domain(self.base, self.base, None, self.mask)


@record
class Rows(Value):
    """Index sets over tokens and rollouts: group others sequence batch same_position."""

    name: str
    kind = "index set"


@record
class Closure(Value):
    definition: tree.Def
    scope: Any  # meaning.names.Scope of the file that defines it
    kind = "definition"


@record
class Builtin(Value):
    name: str
    kind = "function"


@record
class Critic(Value):
    """`critic(…)` before it has a name."""

    init: str
    lr: float
    warmup: int
    kind = "critic"


@record
class RoutedTeachers(Value):
    """`routed(a, b)` before it has a name."""

    parts: tuple[str, ...]
    kind = "dist"


# ---- distributions -----------------------------------------------------------------------


class Dist(Value):
    """A distribution over the vocabulary at every state."""

    kind = "dist"
    live = False

    def full(self, b: Builder) -> Node:
        """Log-probabilities over the whole vocabulary."""
        raise TypeError("abstract")

    def on_set(self, b: Builder, set_: Node) -> Node:
        return b.at_set(self.full(b), set_)

    def at_y(self, b: Builder) -> Node:
        full = self.full(b)
        return b.at_y(full)

    def on(self, b: Builder, d: Domain) -> Node:
        """Log-probabilities on a domain under its tail rule."""
        inner = self.on_set(b, d.base)
        if d.tail == "renormalize":
            return b.sub(inner, b.lse_v(inner, d.base))
        return b.add_bin(inner, d.base) if d.set is not d.base else inner

    def leaves(self) -> tuple[str, ...]:
        return ()


@record
class LeafDist(Dist):
    name: str
    is_live: bool = False
    temperature: float = 1.0

    @property
    def live(self) -> bool:  # type: ignore[override]
        return self.is_live

    def full(self, b: Builder) -> Node:
        return b.logp(self.name, self.is_live, self.temperature)

    def leaves(self) -> tuple[str, ...]:
        return (self.name,)


@record
class SamplerDist(Dist):
    """`rollout`: the policy that sampled; only the sampled log-probability is known."""

    name = "rollout"

    def at_y(self, b: Builder) -> Node:
        q = Quantity(Axis.TOK, "logprob", float("-inf"), 0.0, Info.ACTION)
        return b.input("rollout_logp", q)


@record
class MixDist(Dist):
    """Probability-space mixture Σ w_i p_i; weights are numbers ≥ 0."""

    parts: tuple[tuple[Node, Dist], ...]

    @property
    def live(self) -> bool:  # type: ignore[override]
        return any(d.live for _, d in self.parts)

    def _mix(self, b: Builder, terms: list[Node]) -> Node:
        total: Node | None = None
        for (w, _), lp in zip(self.parts, terms):
            if w.is_const(0):
                continue
            piece = b.add(lp, b.log(w))
            total = piece if total is None else b.logaddexp(total, piece)
        assert total is not None
        return total

    def full(self, b: Builder) -> Node:
        return self._mix(b, [d.full(b) for _, d in self.parts])

    def on_set(self, b: Builder, set_: Node) -> Node:
        return self._mix(b, [d.on_set(b, set_) for _, d in self.parts])

    def at_y(self, b: Builder) -> Node:
        return self._mix(b, [d.at_y(b) for _, d in self.parts])

    def on(self, b: Builder, d: Domain) -> Node:
        """Mixing and restricting commute only without renormalisation: restrict the parts,
        so that a mixture is compared on the same (renormalised, binned) footing as they are."""
        return self._mix(b, [p.on(b, d) for _, p in self.parts])

    def leaves(self) -> tuple[str, ...]:
        return tuple(n for _, d in self.parts for n in d.leaves())


@record
class FrozenDist(Dist):
    """sg(dist)"""

    inner: Dist

    def full(self, b: Builder) -> Node:
        return b.sg(self.inner.full(b))

    def on_set(self, b: Builder, set_: Node) -> Node:
        return b.sg(self.inner.on_set(b, set_))

    def at_y(self, b: Builder) -> Node:
        return b.sg(self.inner.at_y(b))

    def on(self, b: Builder, d: Domain) -> Node:
        return b.sg(self.inner.on(b, d))

    def leaves(self) -> tuple[str, ...]:
        return self.inner.leaves()


@record
class SetDist(Dist):
    """normalize(v in S: weight): a distribution on an index set, zero elsewhere."""

    domain: Domain
    logp: Node  # log-probability on domain.base
    names: tuple[str, ...] = ()
    span: Span = NOWHERE

    @property
    def live(self) -> bool:  # type: ignore[override]
        return self.logp.q.live

    def full(self, b: Builder) -> Node:
        if self.domain.base.op == "full":
            return self.logp
        raise LookupError("a normalised distribution is known on its own index set only")

    def on_set(self, b: Builder, set_: Node) -> Node:
        if set_ is self.domain.base:
            return self.logp
        return b.at_set(self.full(b), set_)

    def at_y(self, b: Builder) -> Node:
        inside = b.is_y(self.domain.base)
        picked = b.where(inside, b.exp(self.logp), b.const(0.0))
        return b.log(b.sum_v(picked, self.domain.base))

    def leaves(self) -> tuple[str, ...]:
        return self.names
