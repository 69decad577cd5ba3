"""Is this server right? Asked once at the start of a run, and the canary that asks again.

A server that is off by one, cuts and renormalises, or remembers stale answers gives numbers that
look like log-probabilities. A few rows with known relations between them tell:

    other order    the same rows, asked in the reverse order, have the same scores
    last token     changing a row's last token changes that score and none before it
    best token     the token a server calls the most probable scores exactly that where it stands
    given tokens   the tokens of the row itself, asked for by id, have the row's scores

Every relation holds exactly in exact arithmetic; servers round to bfloat16 and batch as they like,
so `answers.AGREEMENT` nats are allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from opdsl.train.teachers.answers import AGREEMENT, implausible
from opdsl.train.teachers.link import Link
from opdsl.train.teachers.servers import Changed
from opdsl.train.teachers.transport import Fault
from opdsl.train.teachers.wire import Row, RowScores, Want

MOVED = 0.1  # nats, mean over the canary's tokens, beyond which a server is another one


@dataclass(frozen=True)
class Canary:
    """Rows and the scores they had at the start."""

    rows: tuple[Row, ...]
    scores: tuple[torch.Tensor, ...]

    def check(self, link: Link) -> None:
        """Raises Changed if the scores are others now, Fault if there are none."""
        link.client.troubled = False
        still = getattr(link.server, "check_still", None)
        if still is not None:
            still()
        found = link.ask(self.rows, Want(vocabulary=link.vocabulary))
        moved = [_apart(a.sampled, b) for a, b in zip(found, self.scores)]
        if sum(moved) / len(moved) > MOVED:
            raise Changed(
                f"rows scored at the start score {sum(moved) / len(moved):.2g} nats apart now"
            )


def examine(link: Link, rows: Sequence[Row], want: Want) -> tuple[Canary, list[str]]:
    """(canary, notes) of a server that answered as it must. Raises Fault naming what did not.

    rows: short rows of tokens in use; want: what the run will ask.
    """
    rows = list(rows)
    asked = replace(want, top=max(1, want.top) if link.server.capabilities.top else 0)
    plain = replace(asked, whole="")
    first = link.ask(rows, plain)
    again = link.ask(rows[::-1], plain)[::-1]
    worst = max(_worst(a.sampled, b.sampled) for a, b in zip(first, again))
    if worst > AGREEMENT:
        raise implausible(
            f"the same rows in another order score up to {worst:.2g} nats apart; with a prefix"
            " cache that keeps scores, start the server without it"
        )
    _last_token(link, rows, first, plain)
    if plain.top:
        _best_token(link, rows, first, plain)
    if link.wants.ids and not want.whole:
        _given_tokens(link, rows, first, plain)
    _not_uniform(first, link)
    exact = worst == 0.0
    notes = [] if exact else [f"repeated scores differ by up to {worst:.1g} nats"]
    return Canary(tuple(rows), tuple(s.sampled for s in first)), notes


def _last_token(link: Link, rows: list[Row], first: list[RowScores], want: Want) -> None:
    """Only the last score depends on the last token."""
    long = [i for i, r in enumerate(rows) if r.response > 1]
    if not long:
        return
    other = [replace(rows[i], tokens=_other_end(rows[i])) for i in long]
    found = link.ask(other, want)
    before = max(_worst(a.sampled[:-1], first[i].sampled[:-1]) for i, a in zip(long, found))
    last = max(_worst(a.sampled[-1:], first[i].sampled[-1:]) for i, a in zip(long, found))
    if before > AGREEMENT or last <= AGREEMENT / 10:
        raise implausible(
            f"another last token changes earlier scores by {before:.2g} nats and its own by"
            f" {last:.2g}: the scores are shifted against the tokens"
        )


def _other_end(row: Row) -> tuple[int, ...]:
    """The row's tokens with another last one, taken from the row itself where it has one."""
    others = [t for t in row.tokens if t != row.tokens[-1]]
    return (*row.tokens[:-1], others[-1] if others else (row.tokens[-1] + 1) % 2)


def _best_token(link: Link, rows: list[Row], first: list[RowScores], want: Want) -> None:
    """Put the most probable first token there: it must score what the list said of it."""
    best = []
    for row, one in zip(rows, first):
        assert one.top_ids is not None
        tokens = (*row.tokens[: row.prompt], int(one.top_ids[0, 0]))
        best.append(Row(tokens, row.prompt))
    found = link.ask(best, want)
    for one, there in zip(first, found):
        assert one.top_logprobs is not None
        apart = abs(float(one.top_logprobs[0, 0]) - float(there.sampled[0]))
        if apart > AGREEMENT:
            raise implausible(
                f"the most probable token scores {apart:.2g} nats apart in its list and in its"
                " place: lists and scores belong to different positions"
            )


def _given_tokens(link: Link, rows: list[Row], first: list[RowScores], want: Want) -> None:
    """The row's own tokens and its best ones, asked for by id, score as before."""
    asking = []
    for row, one in zip(rows, first):
        own = torch.tensor(row.tokens[row.prompt :])[:, None]
        ids = own if one.top_ids is None else torch.cat([own, one.top_ids[:, :1]], 1)
        asking.append(replace(row, ids=ids))
    for one, there in zip(first, link.ask(asking, want)):
        assert there.ids_logprobs is not None
        apart = _worst(one.sampled, there.ids_logprobs[:, 0])
        if one.top_logprobs is not None and there.ids_logprobs.shape[1] > 1:
            apart = max(apart, _worst(one.top_logprobs[:, 0], there.ids_logprobs[:, 1]))
        if apart > AGREEMENT:
            raise implausible(
                f"tokens asked for by id score {apart:.2g} nats apart from the same tokens in"
                " their place"
            )


def _not_uniform(first: list[RowScores], link: Link) -> None:
    """A server whose weights are zeros gives every token the same score."""
    scores = torch.cat([s.sampled for s in first])
    if len(scores) > 8 and float(scores.max() - scores.min()) < 1e-4:
        raise Fault(
            f"every token scores {float(scores[0]):.4f} nats (ln of 1/{math.exp(-scores[0]):,.0f}):"
            " it has lost its weights",
            passing=False,
            tries=1,
        )


def _worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference; two −∞ are equal."""
    same = a == b
    return float(torch.where(same, 0.0, (a - b).abs()).max()) if a.numel() else 0.0


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    same = a == b
    return float(torch.where(same, 0.0, (a - b).abs()).clamp(max=10.0).mean())
