"""Index sets over the vocabulary: top, top_p, union, intersection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdsl.meaning import values as vl
from opdsl.meaning.builtins import named, tail_argument, with_tail
from opdsl.syntax import tree

if TYPE_CHECKING:
    from opdsl.meaning.infer import Elaborator, Env

MAX_K = 65536


def make_set(el: Elaborator, name: str, e: tree.Call, env: Env) -> vl.Domain:
    """`top(k, of = T)`, `top_p(p, of = T, at_most = k)`, `union(…)`, `intersection(…)`."""
    tail, rest = tail_argument(el, e.args)
    call = tree.Call(e.func, rest, e.span)
    if name in ("union", "intersection"):
        parts = [_part(el, a, env) for a in call.args]
        if len(parts) < 2:
            el.fail(
                "OPD105", e.span, f"`{name}` joins at least two index sets", f"{len(parts)} given"
            )
        node = el.b.set_(name, tuple(p.base for p in parts))
        return with_tail(el, vl.Domain(node, node), tail)
    known = ("k", "of") if name == "top" else ("p", "of", "at_most")
    args = named(el, call, known, known[:2])
    for key in known[:2]:
        if key not in args:
            example = "top(32, of = T)" if name == "top" else "top_p(0.9, of = student)"
            el.fail(
                "OPD105", e.span, f"`{name}` needs `{key}`", f"`{key}` is missing", helps=[example]
            )
    dist = el.dist(args["of"], env)
    logp = _leaf(el, dist, args["of"])
    if name == "top":
        k = _whole(el, args["k"], env, "k")
        node = el.b.set_("top", (logp,), k=k)
    else:
        p = el.static(args["p"], env, "the mass of a nucleus")
        if not 0 < p <= 1:
            el.fail("OPD110", args["p"].span, f"a mass lies in (0, 1], this is {p:g}", "outside")
        k = _whole(el, args["at_most"], env, "at_most") if "at_most" in args else 256
        node = el.b.set_("top_p", (logp,), p=p, k=k)
    return with_tail(el, vl.Domain(node, node), tail)


def _part(el: Elaborator, arg: object, env: Env) -> vl.Domain:
    assert isinstance(arg, tree.Arg | tree.MixArg | tree.RampArg)
    if not isinstance(arg, tree.Arg) or arg.name is not None:
        el.fail("OPD104", arg.span, "expected an index set or `tail = …`", "unexpected argument")
    domain = el.domain(arg.value, env)  # type: ignore[union-attr]
    if domain.mask is not None:
        el.fail("OPD202", arg.span, "a filtered set cannot be joined", "filter the union instead")
    return domain


def _whole(el: Elaborator, expr: tree.Expr, env: Env, what: str) -> int:
    k = el.static(expr, env, f"`{what}`")
    if not float(k).is_integer() or not 1 <= k <= MAX_K:
        el.fail(
            "OPD110",
            expr.span,
            f"`{what}` is a whole number from 1 to {MAX_K}, this is {k:g}",
            "not such a number",
        )
    return int(k)


def _leaf(el: Elaborator, dist: vl.Dist, expr: tree.Expr):
    if isinstance(dist, vl.SamplerDist):
        el.fail(
            "OPD406",
            expr.span,
            "the sampling policy's own top tokens are not recorded",
            "only rollout[y] is known",
            helps=["top(k, of = student)"],
        )
    node = el.b.sg(dist.full(el.b))
    return node.args[0] if node.op == "sg" else node
