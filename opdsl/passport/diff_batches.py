"""Batches that two methods can be given alike: the same numbers under each method's own names.

Random batches serve the comparison sample by sample, trees of all responses the expectations.

Legend: B sequences, T positions, V vocabulary, S states, M draws (groups of responses).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from opdsl.emit.batch import Batch
from opdsl.meaning.graph import nodes_below
from opdsl.passport import enumerate as exact
from opdsl.passport.diff import Roles, Side

Prompt = tuple[tuple[str, str], ...]  # field, value


@dataclass(frozen=True, eq=False)
class Twin:
    """One batch under the names of A and of B. fresh: the sampler is the student itself."""

    a: Batch
    b: Batch
    fresh: bool
    width: int


@dataclass(frozen=True)
class Scene:
    """What the two methods read: their roles, the prompts every teacher covers, set sizes."""

    roles: Roles
    prompts: tuple[Prompt, ...]
    sizes: tuple[int, ...]  # how many entries the sets take
    widest: int
    grouped: bool
    steps: tuple[int, ...]  # where schedules and tests of the step may matter
    reach: int  # how many tokens away the methods look
    one_model: bool  # every teacher is the same model
    narrow: bool = False  # no vocabulary that is wider than the sets ask for

    def named(self, side: int, kind: str, values: list[Tensor]) -> dict[str, Tensor]:
        pairs = getattr(self.roles, kind)
        return {p[side]: x for p, x in zip(pairs, values) if p[side] is not None}


def scene(a: Side, b: Side, roles: Roles, one_model: bool = False) -> Scene:
    sides = left, right = a, b
    grouped = ("group_sum", "group_max", "others_sum")
    return Scene(
        roles,
        _prompts(sides),
        tuple(k for k in sorted({*left.sizes, *right.sizes}) if 2 < k <= 128),
        max(left.widest, right.widest),
        any(s.reads(*grouped) for s in sides),
        _steps(sides),
        max(s.reach for s in sides),
        one_model or bool(roles.why_not),
    )


def _steps(sides: tuple[Side, Side]) -> tuple[int, ...]:
    out = {0}
    for s in sides:
        if s.reads("schedule"):
            out |= {300, TOTAL_STEPS}
        out |= {x for m in s.marks("step") for x in (m - 1, m + 1) if 0 <= x <= TOTAL_STEPS}
    return tuple(sorted(out))


def _prompts(sides: tuple[Side, Side]) -> tuple[Prompt, ...]:
    """Prompts on which tests of their fields go either way and some teacher always fits."""
    values: dict[str, list[str]] = {}
    for side in sides:
        tests = [t.when for t in side.spec.teachers if t.when]
        for n in nodes_below(side.roots):
            if n.op == "input" and n.attr("name") == "field":
                tests.append((str(n.attr("field")), str(n.attr("equals"))))
        for key, value in tests:
            found = values.setdefault(key, [])
            if value not in found:
                found.append(value)
    routed = [r for side in sides for r in side.spec.routed]
    out = []
    every = [[(k, v) for v in (*vs, "something else")] for k, vs in values.items()]
    for combination in itertools.islice(itertools.product(*every), 64):
        prompt = dict(combination)
        if all(any(c is None or prompt[c[0]] == c[1] for c in r.conditions) for r in routed):
            out.append(combination)
    return tuple(out) or ((),)


# ---- random batches ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    B: int
    T: int
    V: int
    spread: float = 1.0
    group: int = 2
    fresh: bool = True
    step: int = 0
    temperature: float = 1.0
    padding: int = 0
    teacher_spread: float | None = None  # as the student's
    near: bool = False  # teachers equal the student but for a few entries


SIZES = (
    Size(1, 1, 3),
    Size(2, 3, 4, fresh=False, step=1),
    Size(4, 5, 7, spread=2.0),
    Size(4, 5, 7, spread=2.0, fresh=False, step=40),
    Size(6, 4, 5, group=3, spread=0.5, step=400),
    Size(6, 3, 9, group=3, fresh=False, step=10_000),
    Size(4, 6, 11, spread=6.0, temperature=0.7),
    Size(5, 4, 8, group=1, spread=6.0, fresh=False, step=3),
    Size(4, 4, 6, spread=15.0, step=7),
    Size(4, 4, 6, spread=15.0, fresh=False),
    Size(8, 3, 5, group=8, spread=1.5, temperature=1.6, step=90),
    Size(3, 2, 10, group=3, padding=2, fresh=False),
)
TOTAL_STEPS = 10_000
OUTCOMES = (1.0, 0.0, 1.0, 0.0, 0.5, -1.0)
LONGEST = 300  # tokens of the longest response that is tried


def random_twins(where: Scene, mild: bool = False) -> Iterator[Twin]:
    """The probe set: several shapes, spreads and steps, halves of batches as batches, and
    vocabularies wider than any set the methods take. mild: without extreme log-ratios."""
    for i, size in enumerate(SIZES):
        if mild and size.spread > 2:
            continue
        twin = random_twin(where, size, i)
        yield twin
        if i in (2, 3):
            yield from halves(twin)
    if where.widest > 4:
        wide = where.widest + 5
        for fresh, spread in ((True, 1.0), (False, 4.0)):
            if spread < 2 or not mild:
                yield random_twin(where, Size(3, 2, wide, spread, 3, fresh), 50)
    if not where.narrow:
        yield random_twin(where, Size(2, 2, 400, 0.3), 60)
    for step in where.steps[1:]:
        yield random_twin(where, Size(4, 3, 5, step=step), 70)
    if where.reach > 3:
        long = min(where.reach, LONGEST) + 3
        for fresh in (True, False):
            yield random_twin(where, Size(3, long, 4, fresh=fresh, group=3), 80)


def more_twins(where: Scene, count: int) -> Iterator[Twin]:
    """Further batches, for methods that agree so far: student and teacher peaked or flat apart,
    more rows, vocabularies just wider than each set."""
    r = random.Random(7)
    for i in range(count):
        spread, sharp = (math.exp(r.uniform(-1, 2.7)) for _ in range(2))
        wide = where.sizes and i % 3 == 0
        V = r.choice(where.sizes) + r.randint(1, 4) if wide else r.randint(3, 10)
        B, T, group = r.choice(((8, 4, 4), (6, 3, 2), (9, 3, 3), (8, 3, 1)))
        step = r.choice(where.steps)
        fresh, near = i % 2 == 0, i % 4 in (1, 2)
        size = Size(B, T, V, spread, group, fresh, step, teacher_spread=sharp, near=near)
        yield random_twin(where, size, 300 + i)


@lru_cache(maxsize=64)
def halves(twin: Twin) -> tuple[Twin, ...]:
    parts = zip(twin.a.split(2), twin.b.split(2))
    return tuple(replace(twin, a=x, b=y) for x, y in parts)


@lru_cache(maxsize=64)
def silenced(twin: Twin) -> Twin:
    """The same batch with every critic at zero."""

    def quiet(batch: Batch) -> Batch:
        values = {
            k: (x.new_zeros(x.shape), y.new_zeros(y.shape)) for k, (x, y) in batch.values.items()
        }
        return replace(batch, values=values)

    return replace(twin, a=quiet(twin.a), b=quiet(twin.b))


@lru_cache(maxsize=256)
def random_twin(where: Scene, size: Size, seed: int) -> Twin:
    g = torch.Generator().manual_seed(seed)
    x = _draw(where, size, g)
    golden = _draw(where, replace(size, B=2, T=2, group=1), g)
    a, b = (batch_of(where, i, x, size, batch_of(where, i, golden, size, None)) for i in (0, 1))
    return Twin(a, b, size.fresh, size.V)


def _draw(where: Scene, size: Size, g: torch.Generator) -> dict:
    """The numbers of one batch: uneven masks with a hole, an empty sequence, one of one token."""
    B, T, V = size.B, size.T, size.V

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def logits(spread: float = size.spread) -> Tensor:
        z = spread * normal(B, T, V) / size.temperature
        if size.padding:
            z[..., V - size.padding :] = -torch.inf
        return z

    student = logits()
    sharp = size.spread if size.teacher_spread is None else size.teacher_spread
    teachers = [
        shifted(student, sharp, g) if size.near else logits(sharp) for _ in where.roles.teachers
    ]
    if where.one_model:
        teachers = teachers[:1] * len(teachers)
    mask = torch.rand(B, T, generator=g) < 0.8
    mask[0] = torch.arange(T) != 1
    if B > 3:
        mask[1] = False
        mask[2] = torch.arange(T) == 0
    law = student if size.fresh else student + 0.4 * normal(B, T, V)
    gumbel = -(-torch.rand(B, T, V, generator=g, dtype=torch.float64).log()).log()
    tokens = (law + gumbel).argmax(-1)
    rare = torch.randint(0, V - size.padding, (B, T), generator=g)  # what can be drawn counts
    tokens = torch.where(torch.rand(B, T, generator=g) < 0.5, rare, tokens)
    rollout = torch.log_softmax(law, -1).gather(2, tokens[..., None]).squeeze(-1)
    shift = int(torch.randint(0, len(where.prompts), (1,), generator=g))
    prompts = [
        dict(where.prompts[(i // size.group + shift) % len(where.prompts)]) for i in range(B)
    ]
    return {
        "student": student,
        "teachers": teachers,
        "initial": logits(),
        "tokens": tokens,
        "mask": mask,
        "rollout": rollout,
        "outcome": torch.tensor(OUTCOMES, dtype=torch.float64)[
            torch.randint(0, len(OUTCOMES), (B,), generator=g)
        ],
        "values": [normal(B, T + 1) for _ in where.roles.critics],
        "special": torch.rand(B, T, generator=g) < 0.2,
        "prompt": prompts,
    }


def shifted(z: Tensor, by: float, g: torch.Generator) -> Tensor:
    """Logits a little off everywhere, and far off at a quarter of the entries."""
    few = torch.rand(z.shape, generator=g) < 0.25
    small, large = (torch.randn(z.shape, generator=g, dtype=torch.float64) for _ in range(2))
    down = torch.rand(z.shape[:-1], generator=g)[..., None] < 0.6  # most of the mass stays
    large = torch.where(down, -large.abs(), large)
    return z + 0.2 * small + few * by * large


def batch_of(where: Scene, side: int, x: dict, size: Size, golden: Batch | None) -> Batch:
    """The numbers of `_draw` under the names of one side."""
    return Batch.from_logits(
        x["student"],
        where.named(side, "teachers", x["teachers"]) or None,
        tokens=x["tokens"],
        mask=x["mask"],
        rollout_logprobs=x["rollout"],
        initial_logits=x["initial"],
        outcome=x["outcome"],
        group=torch.arange(len(x["outcome"])) // size.group,
        values=where.named(side, "critics", x["values"]) or None,
        special=x["special"],
        prompt=x["prompt"],
        step=size.step,
        total_steps=TOTAL_STEPS,
        golden=golden,
    )


# ---- trees: every response, so that an expectation is a sum ------------------------------------


@dataclass(frozen=True, eq=False)
class World:
    """All draws of `group` responses from one small model, with their probabilities."""

    tree: exact.Tree
    group: int
    twin: Twin
    weight_M: Tensor
    states: Tensor  # [B, T]
    student_SV: Tensor
    teacher_SV: Tensor

    def mean_and_spread(self, dz_BTV: Tensor) -> tuple[Tensor, float]:
        """(E g [S, V], E‖g − E g‖²) of the gradient of one draw, per response."""
        draws, g = len(self.weight_M), self.group
        per_draw = torch.zeros(draws, *self.tree.size, dtype=dz_BTV.dtype)
        draw_of = torch.arange(draws).repeat_interleave(g)[:, None].expand(-1, self.tree.cap)
        per_draw.index_put_((draw_of, self.states), dz_BTV / g, accumulate=True)
        mean_SV = (self.weight_M[:, None, None] * per_draw).sum(0)
        gap_M = (per_draw - mean_SV).square().sum((1, 2))
        return mean_SV, float((self.weight_M * gap_M).sum())


@dataclass(frozen=True)
class Law:
    """Who draws the responses, as far as it matters at a state."""

    policy: str = "student"  # | "teacher" | "other"
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None

    def logits(self, student_SV: Tensor, teacher_SV: Tensor, other_SV: Tensor) -> Tensor:
        table = {"student": student_SV, "teacher": teacher_SV}
        z = table.get(self.policy, other_SV) / self.temperature
        if self.top_k is not None and self.top_k < z.shape[1]:
            z = z.masked_fill(z < z.topk(self.top_k, -1).values[:, -1:], -1e3)
        if self.top_p < 1:
            p, order = torch.softmax(z, -1).sort(-1, descending=True)
            cut = (p.cumsum(-1) - p >= self.top_p).scatter(1, order, p.cumsum(-1) - p >= self.top_p)
            z = z.masked_fill(cut, -1e3)
        return z


def laws(side: Side) -> tuple[Law, ...]:
    """The laws of a method's own state sources."""
    teachers = {t.name for t in side.spec.teachers}
    out = []
    for s in side.spec.states:
        if s.share == 0:
            continue
        if s.kind == "rollouts" and s.policy == "student":
            out.append(Law("student", s.temperature, s.top_p, s.top_k))
        else:
            out.append(Law("teacher" if s.policy in teachers else "other"))
    return tuple(dict.fromkeys(out)) or (Law(),)


@lru_cache(maxsize=256)
def world(
    where: Scene,
    tree: exact.Tree,
    group: int,
    seed: int,
    spread: float = 1.0,
    law: Law = Law(),
    step: int = 0,
    teacher_spread: float = 0.0,
    shift: float = 0.0,
) -> World:
    """All responses of a random model in groups of `group`; critics are random tables.

    teacher_spread: 0 for the student's. shift: teachers are the student, moved at a few entries.
    """
    n = len(tree.responses)
    pick = torch.cartesian_prod(*[torch.arange(n)] * group).reshape(-1)
    draws = n**group
    states = tree.state_BT[pick]
    g = torch.Generator().manual_seed(seed)
    student, initial, other = (tree.random(1000 * seed + i, spread) for i in range(3))
    teachers = []
    for i in range(len(where.roles.teachers)):
        if where.one_model and teachers:
            teachers.append(teachers[0])
        elif shift:
            teachers.append(shifted(student, shift, g))
        else:
            teachers.append(tree.random(1000 * seed + 10 + i, teacher_spread or spread))
    first = teachers[0] if teachers else other
    drawn = law.logits(student, first, other)
    log_law = exact.log_probability(tree, drawn)
    weight_M = log_law[pick].reshape(draws, group).sum(1).exp()
    rollout_SV = torch.log_softmax(drawn, -1)
    values_S = torch.randn(tree.size[0], generator=g, dtype=torch.float64)
    values_BT = exact.critic(tree, values_S)[pick]
    special_SV = torch.rand(*tree.size, generator=g) < 0.25
    outcome_B = torch.randint(0, 2, (n,), generator=g).double()
    prompt = dict(where.prompts[seed % len(where.prompts)])
    tokens = tree.tokens_BT[pick]

    def batch(side: int) -> Batch:
        return Batch.from_logits(
            student[states],
            where.named(side, "teachers", [t[states] for t in teachers]) or None,
            tokens=tokens,
            mask=tree.mask_BT[pick],
            rollout_logprobs=rollout_SV[states, tokens],
            initial_logits=initial[states],
            outcome=outcome_B[pick],
            group=torch.arange(draws).repeat_interleave(group),
            values=where.named(side, "critics", [values_BT] * len(where.roles.critics)) or None,
            special=special_SV[states, tokens],
            prompt=[prompt] * len(pick),
            step=step,
            total_steps=TOTAL_STEPS,
        )

    fresh = law == Law()
    twin = Twin(batch(0), batch(1), fresh, tree.vocab)
    return World(tree, group, twin, weight_M, states, student, first)
