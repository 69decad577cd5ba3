"""Counterexamples to the claims of a passport, by enumerating tiny models.

Three tokens, responses of one or two (then three) tokens, random policies. One model that breaks a
claim refutes it; none proves nothing. `explain` answers within two seconds, so the work is counted
beforehand and what would be too much is left out: the answer depends on the method alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdsl.meaning.spec import Spec
from opdsl.passport.local import Claims

if TYPE_CHECKING:
    from opdsl.passport.model import Small

BUDGET = 600.0  # milliseconds of one core, by the estimate of `_cost`
MODELS = ((2, 7001, 1.0), (2, 7002, 2.0), (3, 7003, 1.2))  # (length cap, seed, spread)


def search(spec: Spec, known: Claims) -> Claims:
    """False where a tiny model refutes a claim that is not decided yet, else None."""
    from opdsl.passport.enumerate import tree
    from opdsl.passport.measure import DIRECTIONS, measure
    from opdsl.passport.small import small

    out, spent = known, 0.0
    for cap, seed, spread in MODELS:
        if None not in vars(out).values():
            break
        try:
            m = small(spec, tree(3, cap), seed, spread)
            plain, curl = _cost(m, 3), _cost(m, 3 + 2 * DIRECTIONS)
            if spent + plain > BUDGET:
                break
            whirls = out.conservative is None and spent + curl <= BUDGET
            spent += curl if whirls else plain
            found = measure(m, curl=whirls)
        except (ArithmeticError, ValueError):
            continue
        refuted = Claims(
            zero=False if not found.zero else None,
            stationary=False if found.stationary is False else None,
            conservative=False if found.conservative is False else None,
            j_seq=False if found.unbiased("J_seq") is False else None,
            j_fro=False if found.unbiased("J_fro") is False else None,
        )
        out = out.filled(refuted)
    return out


def _cost(m: Small, fields: int) -> float:
    """Milliseconds of so many expected fields: each a pass per prompt and source of states, and,
    where draws are coupled by the batch, per draw. Fitted to passes over 20 to 140 operations."""
    from opdsl.passport.coupling import roots
    from opdsl.passport.pieces import sources

    draws = len(m._draws[1]) if m.looped else 1
    passes = len(m.cases) * len(list(sources(m.spec))) * draws
    return fields * passes * (1.3 + 0.03 * len(roots(m.module.program)))
