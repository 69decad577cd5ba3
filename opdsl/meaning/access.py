"""Least teacher access a method needs, from how its nodes read each teacher (theory §3.2)."""

from __future__ import annotations

from opdsl.codes import make
from opdsl.diagnostics import Label, Report
from opdsl.meaning.allowed import marked
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node
from opdsl.meaning.spec import ACCESS_ORDER, Spec
from opdsl.records import record
from opdsl.source import Span


@record
class Requirement:
    level: str
    k: int | None
    span: Span

    @property
    def text(self) -> str:
        return f"top({self.k})" if self.level == "top" else self.level

    def join(self, other: Requirement) -> Requirement:
        a, b = ACCESS_ORDER.index(self.level), ACCESS_ORDER.index(other.level)
        best = self if a >= b else other
        k = max(self.k or 0, other.k or 0) or None
        return Requirement(best.level, k, best.span)


def requirements(spec: Spec) -> dict[str, Requirement]:
    """Distribution (teacher or routed teachers) -> what is asked of it."""
    out: dict[str, Requirement] = {}

    def ask(name: str, level: str, k: int | None, span: Span) -> None:
        new = Requirement(level, k, span)
        out[name] = out[name].join(new) if name in out else new

    for n in nodes_below(
        [t.loss for t in spec.terms] + [t.gate for t in spec.terms] + [t.weight for t in spec.terms]
    ):
        leaves = [
            a for a in n.args if a.op == "logp" and a.attr("dist") not in ("student", "initial")
        ]
        for leaf in leaves:
            name = str(leaf.attr("dist"))
            tempered = leaf.attr("temperature") != 1.0
            if n.op == "at_y":
                ask(name, "logits" if tempered else "sampled", None, n.span)
            elif n.op == "top":
                ask(name, "top", int(n.attr("k")), n.span)  # type: ignore[call-overload]
            elif n.op == "at_set":
                ask(name, *_set_level(n.args[1], name, tempered), n.span)
            else:
                ask(name, "logits", None, n.span)
    return out


def _set_level(s: Node, name: str, tempered: bool) -> tuple[str, int | None]:
    k = _own_top(s, name)
    if tempered:
        return "logits", None
    if k is None:
        return "score_ids", None
    return ("top", k) if k else ("sampled", None)


def _own_top(s: Node, name: str) -> int | None:
    """Largest k if the set lies inside {sampled} ∪ top k of this teacher; else None."""
    if s.op == "sampled":
        return 0
    if s.op == "top" and s.args[0].op == "logp" and s.args[0].attr("dist") == name:
        return int(s.attr("k"))  # type: ignore[call-overload]
    if s.op in ("union", "with_bin"):
        parts = [_own_top(a, name) for a in s.args]
        return None if None in parts else max(p for p in parts if p is not None)
    if s.op == "intersection":
        parts = [p for p in (_own_top(a, name) for a in s.args) if p is not None]
        return min(parts) if parts else None
    return None


def check_access(spec: Spec, report: Report) -> None:
    """Reports OPD401 where a teacher's declared access is below what the method asks."""
    decls = {t.name: t for t in spec.teachers}
    routed = {r.name: r for r in spec.routed}
    for name, need in requirements(spec).items():
        for part in routed[name].parts if name in routed else (name,):
            decl = decls.get(part)
            if decl is None:
                continue
            have = ACCESS_ORDER.index(decl.access)
            short = have < ACCESS_ORDER.index(need.level)
            few = decl.access == "top" and need.level == "top" and (decl.k or 0) < (need.k or 0)
            if not (short or few):
                continue
            gives = f"top({decl.k})" if decl.access == "top" else decl.access
            message = (
                f"this asks for {need.k} entries, the teacher `{part}` gives {decl.k}"
                if few
                else f"this asks the teacher `{part}` for more than it gives"
            )
            helps = [f"teacher {part} = external(access = {need.text})"]
            if few:
                helps.append(f"ask for at most {decl.k}, or use `tail = bin` on a smaller support")
            found = make(
                "OPD401",
                need.span,
                message,
                f"needs access = {need.text}",
                secondary=[Label(decl.span, f"gives access = {gives}")],
                helps=helps,
            )
            report.add(marked(spec.acceptances, found))
