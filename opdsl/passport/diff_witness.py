"""The smallest batch on which two methods differ, with numbers that can be read.

Batches are tried from small to large: one state with two tokens, then more tokens, more states,
more rollouts; probabilities are multiples of 1/20. What neither method reads is left out.

Legend: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdsl.emit.batch import Batch
from opdsl.meaning.graph import nodes_below
from opdsl.passport.diff import Side
from opdsl.passport.diff_batches import (
    LONGEST,
    Scene,
    Size,
    Twin,
    batch_of,
    more_twins,
    random_twins,
)
from opdsl.passport.diff_measure import outcome

TRIES = 16
CLEAR, FAINT = 2e-2, 1e-6  # relative gap of a witness worth showing, and of one at all
UNITS = 20
SHOWN = 6  # entries of a wide vocabulary that are printed


@dataclass(frozen=True)
class Witness:
    """Where A and B differ. rows: token -> its numbers; others: the other states of the batch;
    context: what else the methods read there."""

    sequences: int
    positions: int
    vocabulary: int
    fresh: bool
    place: tuple[int, int]  # (sequence, position)
    given_text: bool
    rows: tuple[dict[str, Any], ...]
    losses: tuple[float, float]
    gap: float  # largest difference of the gradients (of the losses where gradients agree)
    others: tuple[dict[str, Any], ...]
    context: dict[str, Any]


def witness(
    a: Side, b: Side, where: Scene, value: bool = False, fresh_too: bool = True
) -> Witness | None:
    """The smallest witness; None where no batch tells the methods apart.

    value: compare losses instead of gradients. fresh_too: also where the student drew the tokens.
    """
    for fresh in (True, False) if fresh_too else (False,):
        if not fresh and not any(s.asks("rollout_logp") for s in (a, b)):
            break
        for size in _sizes(a, b, where):
            best = _best(a, b, where, replace(size, fresh=fresh), value, CLEAR)
            if best is not None:
                return _described(a, b, where, *best)
    for twin in itertools.chain(
        random_twins(where), more_twins(where, 48)
    ):  # nothing small: any batch of the probe set
        if _gap(a, b, twin, value)[1] > FAINT:
            return _described(a, b, where, twin, {})
    return None


def _sizes(a: Side, b: Side, where: Scene) -> list[Size]:
    small = [(1, 1, 2), (1, 1, 3), (1, 2, 2), (1, 2, 3), (2, 1, 2), (2, 2, 2), (2, 2, 3), (1, 3, 3)]
    small += [(3, 2, 3), (1, 1, 5), (4, 3, 4)]
    nodes = [n for s in (a, b) for n in nodes_below(s.roots) if n.op == "top"]
    for k in sorted({int(n.attr("k")) for n in nodes}):  # type: ignore[call-overload]
        small += [(1, 1, k + 1), (1, 1, k + 3)]
    for n in sorted({min(s.reach, LONGEST) for s in (a, b)} - {0, 1, 2}):
        small += [(1, n, 2), (1, n + 1, 2), (1, n + 2, 2)]
    out = [Size(B, T, V, group=B) for B, T, V in small]
    return [*out, *(Size(1, 1, 2, step=step) for step in where.steps[1:])]


def _best(
    a: Side, b: Side, where: Scene, size: Size, value: bool, least: float
) -> tuple[Twin, dict] | None:
    """The clearest of a few batches of one size."""
    best: tuple[float, Twin, dict] | None = None
    for i in range(TRIES):
        x = _draw(where, size, i)
        golden = batch_of(where, 0, x, size, None), batch_of(where, 1, x, size, None)
        one, two = (batch_of(where, j, x, size, golden[j]) for j in (0, 1))
        twin = Twin(one, two, size.fresh, size.V)
        gap, share = _gap(a, b, twin, value)
        if share > least and (best is None or gap > best[0] * 1.2):
            best = gap, twin, x
    return None if best is None else best[1:]


def _gap(a: Side, b: Side, twin: Twin, value: bool) -> tuple[float, float]:
    """(largest difference, over the largest number)."""
    (la, ga), (lb, gb) = outcome(a.program, twin, 0), outcome(b.program, twin, 1)
    if value:
        x, y = torch.tensor([la]), torch.tensor([lb])
    else:
        x, y = ga, gb
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        return 0.0, 0.0  # a readable witness has numbers
    size = max(float(x.abs().max()), float(y.abs().max()), 1e-4)
    gap = float((x - y).abs().max())
    return gap, gap / size


def _draw(where: Scene, size: Size, seed: int) -> dict:
    """Numbers of one tiny batch. The first half of the seeds keeps everything but the policies
    plain: critics at zero, passed, nothing special, step 0."""
    g = torch.Generator().manual_seed(seed)
    B, T, V = size.B, size.T, size.V
    plain = seed < TRIES // 2

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=g)

    def policy() -> Tensor:
        units = max(UNITS, 2 * V)
        draws = whole(V, B, T, units - V)
        if seed % 2:  # peaked
            draws = torch.where(
                torch.rand(B, T, units - V, generator=g) < 0.6, draws[..., :1], draws
            )
        count = torch.ones(B, T, V).scatter_add_(2, draws, torch.ones(B, T, units - V))
        return (count.double() / units).log()

    student, law = policy(), policy()
    teachers = [policy() for _ in where.roles.teachers]
    tokens = whole(V, B, T)
    drawn = student if size.fresh else law
    many = len(where.roles.critics)
    return {
        "student": student,
        "teachers": teachers[:1] * len(teachers) if where.one_model else teachers,
        "initial": policy(),
        "tokens": tokens,
        "mask": torch.ones(B, T, dtype=torch.bool),
        "rollout": drawn.gather(2, tokens[..., None]).squeeze(-1),
        "outcome": (1 - whole(2, B) * (not plain)).double(),
        "values": [-whole(5, B, T + 1).double() / 4 * (not plain) for _ in range(many)],
        "special": (whole(4, B, T) == 0) & (not plain),
        "prompt": [dict(where.prompts[seed % len(where.prompts)])] * B,
    }


# ---- as a table ------------------------------------------------------------------------------------


def _described(a: Side, b: Side, where: Scene, twin: Twin, x: dict) -> Witness:
    la, ga = outcome(a.program, twin, 0)
    lb, gb = outcome(b.program, twin, 1)
    B, T = twin.a.shape
    V, main = twin.width, B * T * twin.width
    apart = (ga - gb).abs()
    flat = int(apart.argmax()) if float(apart.max()) > 0 else 0
    given = flat >= main
    batch = twin.a.golden if given else twin.a
    other = twin.b.golden if given else twin.b
    assert batch is not None and batch.place_N is not None and other is not None
    ga, gb = (g[main:] if given else g[:main] for g in (ga, gb))
    cell = (flat - main * given) // V
    row_of = {int(p): n for n, p in enumerate(batch.place_N)}
    names = {
        left or right: batch.dists[left].logits_NV  # type: ignore[union-attr, index]
        for left, right in where.roles.teachers
        if left is not None
    }
    if not names:
        names = {n: d.logits_NV for n, d in other.dists.items() if n not in ("student", "initial")}  # type: ignore[union-attr]
    if where.one_model:
        names = dict(list(names.items())[:1])
    sides = (a, b)
    read = {str(n.attr("dist")) for s in sides for n in nodes_below(s.roots) if n.op == "logp"}
    tables = {"student": batch.dists["student"].logits_NV, **names}  # type: ignore[union-attr]
    if "initial" in read:
        tables["initial"] = batch.dists["initial"].logits_NV  # type: ignore[union-attr]

    def at(cell: int, v: int) -> dict[str, Any]:
        n = row_of[cell]
        out: dict[str, Any] = {"token": _name(v, V), "sampled": int(batch.tokens_N[n]) == v}
        for name, z in tables.items():
            out[name] = float(torch.softmax(z[n].double(), -1)[v])
        out["A"], out["B"] = float(ga[cell * V + v]), float(gb[cell * V + v])
        return out

    shown = list(range(V))
    if V > SHOWN + 2:
        gaps = (ga - gb).abs()[cell * V : (cell + 1) * V]
        y = int(batch.tokens_N[row_of[cell]])
        shown = sorted({*gaps.topk(SHOWN).indices.tolist(), y})
    elsewhere = tuple(
        {"place": (c // T, c % T), **at(c, int(batch.tokens_N[n]))}
        for c, n in row_of.items()
        if c != cell
    )
    gap = float((ga - gb).abs().max())
    return Witness(
        B, T, V, twin.fresh, (cell // T, cell % T), given, tuple(at(cell, v) for v in shown),
        (la, lb), gap if gap > 0 else abs(la - lb), elsewhere, _context(sides, batch, other, row_of[cell], twin.fresh),
    )  # fmt: skip


def _context(
    sides: tuple[Side, Side], batch: Batch, other: Batch, n: int, fresh: bool
) -> dict[str, Any]:
    """What else the methods read, in words of the language."""
    out: dict[str, Any] = {}
    asked = {
        k
        for k in ("outcome", "special", "field", "values", "step")
        if any(s.asks(k) for s in sides)
    }
    seq = int(batch.layout.seq_N[n])
    if "outcome" in asked:
        out["outcome"] = [float(o) for o in batch.outcome_B]
    if "special" in asked and batch.special_N is not None and bool(batch.special_N.any()):
        out["special(y)"] = [bool(x) for x in batch.special_N]
    if ("field" in asked or any(s.spec.routed for s in sides)) and batch.prompt:
        out["prompt"] = dict(batch.prompt[seq])
    if "values" in asked:
        value_N, end_B = next(iter((batch.values or other.values).values()))
        out["critic"] = [float(v) for v in value_N] + [float(v) for v in end_B[seq : seq + 1]]
    if "step" in asked or any(s.reads("schedule") for s in sides):
        out["step"] = batch.step
    if not fresh:
        out["drawn with probability"] = float(batch.rollout_N.exp()[n])
    return out


def _name(v: int, vocabulary: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[v] if vocabulary <= 26 else f"token {v}"
