"""What a frozen reward does, from how it moves with the student's own log-probability of y.

A detached reward r on the sampled token has the expected field of the potential whose slope is −r
(theory §6.3). Where r never grows with log π(y), that potential is convex and the field pulls
toward where r vanishes; where it grows, tokens the student already over-likes are reinforced.
The log-ratio has slope −1, a clipped one −1 or 0, an importance ratio −u; k2, k3 and |ℓ| as rewards
change sign.

Legend: S states, Y sampled tokens (all of them), H shifts of the own log-probability.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node

SIGNS = {"add", "min", "max", "logaddexp"}  # monotone in every argument
RISING = {"sg", "live", "tanh", "exp", "log", "sigmoid"}


# ---- by structure ------------------------------------------------------------------------------


def never_rises(signal: Node) -> bool:
    """Certain from the operations alone that r does not grow with log π(y)."""
    return _slopes(signal) <= {-1}


def _slopes(signal: Node) -> set[int]:
    """Possible signs of ∂r/∂log π(y); {2} where the operations alone do not say."""
    memo: dict[int, set[int]] = {}
    for n in nodes_below([signal]):
        memo[n.id] = _slope(n, [memo[a.id] for a in n.args])
    return memo[signal.id]


def _slope(n: Node, below: list[set[int]]) -> set[int]:
    if n.op == "at_y" and n.args[0].op == "logp" and n.args[0].attr("dist") == "student":
        return {1}
    if n.op == "input" and n.attr("name") == "rollout_logp":
        return {1}
    if not any(below) or n.op in ("sum_v", "lse_v", "max_v", "top", "at_set"):
        return set()  # functions of the state
    flipped = {-x if x != 2 else 2 for x in below[1]} if len(below) == 2 else set()
    match n.op:
        case op if op in RISING:
            return below[0]
        case op if op in SIGNS:
            return set().union(*below)
        case "neg":
            return {-x if x != 2 else 2 for x in below[0]}
        case "sub":
            return below[0] | flipped
        case "mul" | "div":
            return _product(n, below)
        case "where":
            return below[1] | below[2] if not below[0] else {2}
    return {2}


def _product(n: Node, below: list[set[int]]) -> set[int]:
    """A factor that is fixed in log π(y) and of one sign."""
    for i, j in ((0, 1), (1, 0)):
        if below[j] or (n.op == "div" and i == 1):
            continue
        q = n.args[j].q
        if q.low >= 0:
            return below[i]
        if q.high <= 0:
            return {-x if x != 2 else 2 for x in below[i]}
    return {2}


# ---- by value ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reward:
    """rises: r grows with log π(y) somewhere. of_ratio: r is a function of u = π_T/π at y.
    convex: as −f(u), f is convex. one_signed: r never changes sign."""

    rises: bool
    of_ratio: bool
    convex: bool
    one_signed: bool


def reward(signal: Node, teacher: str) -> Reward | None:
    """What the values of a signal show on random states; None where they are not known."""
    import numpy as np

    from opdsl.passport.evaluate import Unknown, random_world

    world = random_world(41, 1.3, teacher)
    steps = np.linspace(-2.5, 2.5, 41)
    try:
        at = lambda own, other: _shifted(signal, world, own, other)  # noqa: E731
        r_HSY = np.stack([at(h, 0.0) for h in steps])
        both = np.stack([at(h, h) for h in (-0.7, 0.0, 0.4)])
    except (Unknown, ValueError):
        return None
    if not np.isfinite(r_HSY).all() or not np.isfinite(both).all():
        return None
    size = max(float(np.abs(r_HSY).max()), 1e-9)
    rises = bool((np.diff(r_HSY, axis=0) > 1e-9 * size).any())
    of_ratio = bool(np.abs(both - both[1]).max() < 1e-9 * size)
    gap_SY = (world.teacher - world.student)[:, 0]
    return Reward(
        rises,
        of_ratio,
        of_ratio and _convex(r_HSY, gap_SY, steps, size),
        bool((r_HSY[20] <= 1e-9 * size).all() or (r_HSY[20] >= -1e-9 * size).all()),
    )


def _convex(r_HSY, gap_SY, steps, size: float) -> bool:
    """Whether −r is convex in u = e^(gap − h) along each token's line."""
    import numpy as np

    u = np.exp(gap_SY[None] - steps[:, None, None])[::-1]
    f = -r_HSY[::-1]
    slope = np.diff(f, axis=0) / np.diff(u, axis=0)
    return bool((np.diff(slope, axis=0) > -1e-6 * size).all())


def _shifted(signal: Node, world, own: float, other: float):
    """r [S, Y] with the own log-probability of y moved by `own`, the teacher's by `other`."""
    import numpy as np

    from opdsl.passport.evaluate import Evaluator, S, V

    class Moved(Evaluator):
        def _at_y(self, n: Node, x):
            leaf = n.args[0]
            if leaf.op != "logp":
                return super()._at_y(n, x)
            name = leaf.attr("dist")
            moved = {"student": own, world.primary or name: other}.get(name, 0.0)
            return super()._at_y(n, x) + moved

        def _input(self, n: Node):
            if n.attr("name") == "rollout_logp":
                return super()._input(n) + own
            if n.attr("name") in ("outcome", "verifier"):
                return np.float64(1.0)
            return super()._input(n)

    return np.broadcast_to(Moved(world)(signal), (S, V))
