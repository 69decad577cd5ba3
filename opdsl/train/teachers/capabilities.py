"""What a kind of teacher can give, what a method asks of each teacher, and the refusal between.

Nothing here loads anything: the plan of a run is refused from the specification and the words of
the command line alone, and again, before any model is loaded, from what a server says of itself.

    sampled   log-probability of the response token
    top       the teacher's own k most probable tokens
    ids       tokens of somebody else's choice: one list per request, or one per position
    whole     the whole distribution, as logits or as hidden states with their head
    writes    text of its own (`rollouts(T)`), which needs the model in this process
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from opdsl.codes import make
from opdsl.diagnostics import Label
from opdsl.meaning.access import Requirement, requirements
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node
from opdsl.meaning.spec import Spec
from opdsl.train.errors import WRONG_USAGE, RunProblem

NO_LIMIT = 1 << 30
MARGIN = 4  # tokens of the student's list asked for beyond those that are read, see `asked`
NONE, PER_REQUEST, PER_POSITION = "none", "per request", "per position"


@dataclass(frozen=True)
class Capabilities:
    """top: most entries of its own list. ids: how tokens may be asked for, and at most how many
    at a position. what: the kind of teacher, for messages."""

    what: str
    sampled: bool = True
    top: int = 0
    ids: str = NONE
    most_ids: int = NO_LIMIT
    whole: bool = False
    writes: bool = False

    def text(self) -> str:
        """What is given, in words."""
        parts = ["log-probabilities of the sampled tokens"] if self.sampled else []
        if self.top:
            parts.append("its own top" + ("" if self.top >= NO_LIMIT else f" {self.top}"))
        if self.ids != NONE:
            parts.append("scores of given tokens")
        if self.whole:
            parts.append("whole distributions")
        return ", ".join(parts) or "nothing"


IN_PROCESS = Capabilities("a model in this process", True, NO_LIMIT, PER_POSITION,
                          whole=True, writes=True)  # fmt: skip


@dataclass(frozen=True)
class Wants:
    """What a method asks of one teacher.

    top: entries of its own list. ids_from: (distribution, k) for every list of another
    distribution's k most probable tokens that it must score. whole, writes: as in `Capabilities`.
    need: where in the spec the most is asked, None if it is only asked to write.
    """

    top: int = 0
    ids_from: tuple[tuple[str, int], ...] = ()
    whole: bool = False
    writes: bool = False
    need: Requirement | None = None

    @property
    def ids(self) -> int:
        """Tokens per position to be scored on request, at most."""
        return sum(k + (MARGIN if who == "student" else 0) for who, k in self.ids_from)


def wants(spec: Spec) -> dict[str, Wants]:
    """Teacher role -> what the method asks of it, directly or through `routed(…)`."""
    asked = requirements(spec)
    routed = {r.name: r.parts for r in spec.routed}
    found: dict[str, Wants] = {t.name: Wants() for t in spec.teachers}
    for name, need in asked.items():
        from_sets = _lists(spec, name) if need.level == "score_ids" else ()
        whole = need.level == "logits" or from_sets is None
        for part in routed.get(name, (name,)):
            others = tuple(
                (who, k)
                for dist, k in from_sets or ()
                for who in routed.get(dist, (dist,))  # the lists of all it may be routed to
                if who != part
            )
            if part in found:
                one = Wants(need.k or 0, others, whole, False, need)
                found[part] = _joined(found[part], one)
    for source in spec.states:
        for name in [source.policy, *(name for _, name in source.parts)]:
            if name in found:
                found[name] = _joined(found[name], Wants(writes=True))
    return found


def _joined(a: Wants, b: Wants) -> Wants:
    most: dict[str, int] = dict(a.ids_from)
    for name, k in b.ids_from:
        most[name] = max(k, most.get(name, 0))
    need = a.need.join(b.need) if a.need and b.need else a.need or b.need
    return Wants(
        max(a.top, b.top), tuple(most.items()), a.whole or b.whole, a.writes or b.writes, need
    )


def _lists(spec: Spec, name: str) -> tuple[tuple[str, int], ...] | None:
    """(distribution, k) of every list that makes up the sets `name` is read on; None where one
    of them is not a list of somebody's most probable tokens, so that only logits will do.

    A set inside such lists is asked for as the whole lists: what is not in it is not read.
    """
    most: dict[str, int] = {}
    roots = [x for t in spec.terms for x in (t.loss, t.gate, t.weight)]
    for n in nodes_below(roots):
        if n.op != "at_set" or not _is(n.args[0], name):
            continue
        for leaf in _leaves(n.args[1]):
            if leaf.op == "sampled":
                continue
            if leaf.op not in ("top", "top_p") or leaf.args[0].op != "logp":
                return None
            dist = str(leaf.args[0].attr("dist"))
            if dist != name:
                most[dist] = max(int(leaf.attr("k")), most.get(dist, 0))  # type: ignore[call-overload]
    return tuple(most.items())


def _is(n: Node, name: str) -> bool:
    return n.op == "logp" and n.attr("dist") == name


def _leaves(s: Node) -> list[Node]:
    """The sets a set is made of; of an intersection only its first, which holds it."""
    if s.op == "intersection":
        return _leaves(s.args[0])
    if s.op in ("union", "with_bin"):
        return [leaf for a in s.args for leaf in _leaves(a)]
    return [s]


def refuse_unable(spec: Spec, given: Mapping[str, tuple[str, Capabilities]]) -> None:
    """Raise RunProblem OPD407 if a teacher is asked for what it cannot give.

    given: teacher role -> (the model it is bound to, what that can give). The message points at
    the expression of the spec that asks, and names the cure.
    """
    asked = wants(spec)
    spans = {t.name: t.span for t in spec.teachers}
    for name, (source, can) in given.items():
        want = asked[name]
        lack = _lack(want, can)
        if lack is None:
            continue
        what, cure = lack
        span = want.need.span if want.need is not None else spans[name]
        label = f"needs access = {want.need.text}" if want.need is not None else "asked here"
        raise RunProblem(
            make(
                "OPD407",
                span,
                f"the method asks the teacher `{name}` for {what}, which {source} cannot give",
                label,
                secondary=[Label(spans[name], f"bound to {source}")] if spans[name] != span else [],
                notes=[f"{can.what} gives {can.text()}"],
                helps=[cure.replace("NAME", name)],
            ),
            WRONG_USAGE,
        )


def _lack(want: Wants, can: Capabilities) -> tuple[str, str] | None:
    """(what is missing, what to do), or None."""
    local = "--teacher NAME=FOLDER loads the model into this process"
    ours = "`opdsl serve MODEL` gives it: --teacher NAME=http://HOST:PORT"
    if want.writes and not can.writes:
        return "text of its own", local
    if want.whole and not can.whole:
        return "its whole distribution", (
            f"{ours}; or a support of its own top tokens: support top(32, of = NAME, tail = bin)"
        )
    if want.ids and can.ids == NONE:
        names = ", ".join(f"top {k} of {who}" for who, k in want.ids_from)
        return f"scores of given tokens ({names})", (
            f"{ours}; or a support of its own top tokens: support top(32, of = NAME, tail = bin)"
        )
    if want.ids > can.most_ids:
        return f"scores of {want.ids} given tokens at a position", (
            f"at most {can.most_ids} are given here: a smaller support, or a higher"
            " --max-logprobs of the server"
        )
    if want.top and not can.top:
        return f"its own top {want.top} tokens", f"{ours}; or `support sampled`"
    if want.top > can.top:
        return f"its own top {want.top} tokens", (
            f"at most {can.top} are given here: support top({can.top}, of = NAME, tail = bin), or"
            " a higher --max-logprobs of the server"
        )
    if want.need is not None and not can.sampled:
        return "log-probabilities", local
    return None
