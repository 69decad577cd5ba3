"""What every answer of a teacher must satisfy before a loss may see it.

A server can be up and wrong: rows missing or shifted by one, NaN, scores above 0, ids of another
vocabulary, a distribution that was cut and renormalised. Each is found here and named; a caller
asks again, and gives up after a few times.

Shapes: T response tokens of a row, K own top entries, I ids asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from opdsl.train.teachers.transport import Fault
from opdsl.train.teachers.wire import Row, RowScores, Want

ABOVE_ZERO = 1e-3  # nats that rounding may put a log-probability above 0
MASS = 1e-3  # what the probabilities of a list may exceed 1 by
AGREEMENT = 0.05  # nats between the same score in two places of one answer
TRIES = 3  # implausible answers in a row that are enough


def implausible(text: str) -> Fault:
    return Fault(text, tries=TRIES)


def check(rows: Sequence[Row], found: Sequence[RowScores], want: Want, vocabulary: int) -> None:
    """Raise Fault for the first thing about the answer that cannot be right."""
    if len(found) != len(rows):
        raise implausible(f"{len(found)} rows came back for {len(rows)}")
    for i, (row, one) in enumerate(zip(rows, found)):
        T = row.response
        if len(one.sampled) != T:
            raise implausible(f"row {i} has {len(one.sampled)} scores for {T} response tokens")
        _numbers(one.sampled, f"row {i}")
        if want.top:
            _list(one, T, want.top, vocabulary, i)
            _agree(row, one, i)
        if row.ids is not None:
            if one.ids_logprobs is None or one.ids_logprobs.shape != row.ids.shape:
                raise implausible(f"row {i} lacks scores of the ids asked for")
            _numbers(one.ids_logprobs, f"row {i}, ids")
        if want.whole and (one.whole is None or len(one.whole) != T):
            raise implausible(f"row {i} lacks whole distributions")


def _numbers(x: torch.Tensor, where: str) -> None:
    if bool(torch.isnan(x).any()):
        raise implausible(f"{where}: a score is NaN")
    if x.numel() and float(x.max()) > ABOVE_ZERO:
        raise implausible(f"{where}: a log-probability of {float(x.max()):.3g}, above 0")


def _list(one: RowScores, T: int, k: int, vocabulary: int, i: int) -> None:
    ids_TK, logp_TK = one.top_ids, one.top_logprobs
    if ids_TK is None or logp_TK is None or ids_TK.shape != (T, k) or logp_TK.shape != (T, k):
        raise implausible(f"row {i} lacks the top {k}")
    _numbers(logp_TK, f"row {i}, top {k}")
    if ids_TK.numel() and not 0 <= int(ids_TK.min()) <= int(ids_TK.max()) < vocabulary:
        worst = int(ids_TK.max()) if int(ids_TK.min()) >= 0 else int(ids_TK.min())
        raise implausible(f"row {i}: id {worst} is outside the vocabulary of {vocabulary}")
    mass = float(logp_TK.double().exp().sum(-1).max()) if T else 0.0
    if mass > 1 + MASS:
        raise implausible(f"row {i}: the top {k} have a probability of {mass:.4f} together")


def _agree(row: Row, one: RowScores, i: int) -> None:
    """The response token, where it is in the list, has the same score there; and nothing outside
    the list is more probable than what is in it."""
    assert one.top_ids is not None and one.top_logprobs is not None
    y_T1 = torch.tensor(row.tokens[row.prompt :])[:, None]
    same_TK = (one.top_ids == y_T1) & (one.top_logprobs > -math.inf)
    given_T1 = one.sampled[:, None].expand_as(one.top_logprobs)
    apart = (given_T1 - one.top_logprobs)[same_TK].abs()
    if apart.numel() and float(apart.max()) > AGREEMENT:
        raise implausible(
            f"row {i}: the scores of the response tokens and the lists of top tokens disagree by"
            f" {float(apart.max()):.3g} nats, as when one is shifted by a position"
        )
    best_T = one.top_logprobs.max(-1).values
    over = (one.sampled - best_T)[~same_TK.any(-1)]
    if over.numel() and float(over.max()) > AGREEMENT:
        raise implausible(
            f"row {i}: a response token scores above the most probable one of its position"
        )
