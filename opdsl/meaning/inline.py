"""Definitions: evaluating a body with its parameters bound, declared types, recurrences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdsl.meaning import values as vl
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node, compatible_units
from opdsl.meaning.quantity import Axis, Info, Quantity
from opdsl.meaning.recurrence import NotAffine, affine
from opdsl.records import record
from opdsl.source import Span
from opdsl.syntax import tree

if TYPE_CHECKING:
    from opdsl.meaning.infer import Env


MAX_CALLS = 40


@record
class RecRef(vl.Value):
    """The quantity a recurrence is defining; only its next or its last value may be read."""

    name: str
    next: Node
    last: Node


class Inliner:
    """The part of the elaborator that expands calls of definitions (mixed into `Elaborator`)."""

    def inline(
        self,
        func: vl.Closure,
        args: tuple,
        span: Span,
        env: Env,
        leading: tuple[vl.Value, ...],
        divergence: bool = False,
    ) -> vl.Value:
        """Evaluate a definition's body with its parameters bound."""
        from opdsl.meaning.arguments import bind

        d = func.definition
        if len(self._calls) > MAX_CALLS:
            self.fail(
                "OPD009",
                span,
                "definitions call one another too deeply for anyone to follow",
                f"more than {MAX_CALLS} calls inside one another",
            )
        if any(name == d.name.name for _, name in self._calls):
            self.fail(
                "OPD123",
                span,
                f"`{d.name.name}` is defined through itself",
                "a definition cannot call itself",
                helps=["along the sequence a recurrence does it:  G[t] = r[t] + gamma * G[t + 1]"],
            )
        on = [a for a in args if isinstance(a, tree.Arg) and a.name == "on"]
        declares_on = any(p.name.name == "on" for p in d.params)
        changes: dict[str, object] = {"v_tail": None}
        if on and not declares_on:
            changes["support"] = self.domain(on[0].value, env)
            args = tuple(a for a in args if a is not on[0])
        bound = bind(self, d, args, span, env, leading, divergence)
        from opdsl.meaning.infer import Env

        local = Env(func.scope, bound)
        self._calls.append((span, d.name.name))
        try:
            with self.context(**changes):
                value = self._body(d, local)
        finally:
            self._calls.pop()
        if d.type is not None:
            value = self._declared(value, d, span)
        return value

    def _declared(self, value: vl.Value, d: tree.Def, span: Span) -> vl.Value:
        assert d.type is not None
        if d.type.unit == "dist":
            if not isinstance(value, vl.Dist):
                self._not_a_def(d, value)
            return value
        if isinstance(value, vl.Num):
            return vl.Num(self.check_type(value.node, d.type, span, d.name.name))
        self._not_a_def(d, value)
        return value

    def _not_a_def(self, d: tree.Def, value: vl.Value) -> None:
        assert d.type is not None
        self.fail(
            "OPD203",
            d.type.span,
            f"`{d.name.name}` is declared {d.type.span.text.strip()} but gives a {value.kind}",
            "declared here",
        )

    def check_type(self, node: Node, type_: tree.TypeExpr, span: Span, name: str) -> Node:
        """The node under its declared unit and axis, or a report."""
        axis = declared_axis(type_)
        unit = type_.unit
        have = node.q.unit
        numeric = {"nats", "real", "prob", "weight", "int", "logprob", "bits"}
        fits = (
            compatible_units(have, unit)
            or (unit == "nats" and have in numeric)
            or (unit == "real" and have in numeric)
            or (unit in ("weight", "prob") and have in numeric - {"nats", "logprob"})
        )
        if not fits or (unit in ("gate", "bool") and have not in ("gate", "bool", "real", "prob")):
            self.fail(
                "OPD203",
                span,
                f"`{name}` is declared {type_.span.text.strip()} but is in {have}",
                f"this is {node.q.describe()}",
                helps=[f"declare it `: {node.q.describe()}`, or change what it computes"],
            )
        if node.q.axis > axis:
            self.fail(
                "OPD201",
                span,
                f"`{name}` is declared {type_.span.text.strip()} but varies {node.q.describe()}",
                "varies more than declared",
                helps=["reduce over the support:  sum(v in support: …)"],
            )
        if have == "prob" and unit == "nats":
            return self.b.make(
                node.op, node.args, node.q.with_(unit=unit), **{**dict(node.attrs), "unit": unit}
            )
        return node

    def _body(self, d: tree.Def, env: Env) -> vl.Value:
        for binding in d.bindings:
            env.names[binding.name.name] = self._binding(binding, env)
        return self.ev(d.result, env)

    def _binding(self, binding: tree.Binding, env: Env) -> vl.Value:
        if binding.subscript is None:
            return self.ev(binding.value, env)
        index = self.ev(binding.subscript, env)
        if not isinstance(index, vl.IndexT) or index.offset != 0:
            self.fail(
                "OPD124",
                binding.span,
                "a recurrence defines the value at `t`",
                f"write {binding.name.name}[t] = …",
            )
        name = binding.name.name
        q = Quantity(Axis.TOK, "nats", info=Info.FUTURE, live=True)
        key = {"of": name, "depth": len(self._calls), "id": self.steps}
        holes = RecRef(name, self.b.input("next", q, **key), self.b.input("last", q, **key))
        env.names[name] = holes
        right = self.number(binding.value, env)
        below = nodes_below([right])
        back = holes.last in below
        if back and holes.next in below:
            self.fail(
                "OPD124",
                binding.span,
                "a recurrence runs one way: backward from t + 1 or forward from t - 1",
                f"both {name}[t + 1] and {name}[t - 1] are read",
            )
        try:
            a, c = affine(self.b, right, holes.last if back else holes.next)
        except NotAffine:
            self.fail(
                "OPD124",
                binding.span,
                "a recurrence must be linear in its own neighbour",
                f"{name}[t] = a + b * {name}[t {'-' if back else '+'} 1]",
                helps=["min, max, exp … of the neighbour cannot be compiled to a scan"],
            )
        node = self.b.scan_fwd(a, c) if back else self.b.scan(a, c)
        if node.q.axis < Axis.TOK:
            one = self.b.input("one", Quantity(Axis.TOK, "real", 1, 1, Info.STATE))
            node = self.b.mul(node, one)
        return vl.Num(node)


def declared_axis(type_: tree.TypeExpr) -> Axis:
    table = {"group": Axis.PROMPT, "sequence": Axis.SEQ, "token": Axis.TOK, "vocab": Axis.VOCAB}
    return max((table[a] for a in type_.axes), default=Axis.CONST)
