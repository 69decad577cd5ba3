"""How far two methods agree: in value and gradient on every batch, up to a factor, or on average.

Agreement sample by sample is judged by the float64 oracle on random batches; agreement in
expectation by enumerating all responses of small models, with the batch-wide denominators of
`aggregate` left out (they do not exist for one rollout).

Legend: B sequences, T positions, N rows, V vocabulary, S states.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from opdsl.emit.batch import Batch, DenseDist
from opdsl.emit.module import emit
from opdsl.emit.routed import add_routed
from opdsl.emit.runtime import LossModule
from opdsl.ir.interpret import Evaluator, dense64, reference
from opdsl.ir.program import Program
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.quantity import Info
from opdsl.passport import enumerate as exact
from opdsl.passport.diff import Side
from opdsl.passport.diff_batches import Law, Scene, Twin, World, laws, world
from opdsl.passport.returns import critic_targets, critic_term

TOLERANCE = 1e-9  # relative to the largest entry of a batch
CONSTANT = 1e-7  # relative spread of a factor that counts as constant
SLOW = 160  # width from which the oracle's plain loops are left to the emitted passes
FLOOR = 1e-6
RARE = 0.5  # batches that agree, above which a difference is one of rare branches
CAP = 3  # tokens of the longest response that is enumerated

KINDS = ("equal", "gradient", "scaled", "expected", "expected scaled", "different")


@dataclass(frozen=True)
class Agreement:
    """kind: one of KINDS, strongest first. fresh: only where the student itself drew the tokens.
    factor: B's gradient over A's. critic: "any", or "exact", "zero" where it holds only there."""

    kind: str
    fresh: bool = False
    factor: float = 1.0
    critic: str = "any"

    @property
    def rank(self) -> tuple[int, bool, int]:
        """Lower is stronger."""
        return KINDS.index(self.kind), self.fresh, ("any", "exact", "zero").index(self.critic)

    @property
    def sample_by_sample(self) -> bool:
        return self.kind in ("equal", "gradient", "scaled")


DIFFERENT = Agreement("different")


@contextmanager
def one_thread() -> Iterator[None]:
    """Two spinning threads make tiny tensors ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- one batch ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """Two methods on one batch. factor: B's gradient over A's, None where not parallel;
    0 or infinity where one of them is zero, NaN where both are. golden: the gradients on given
    text agree."""

    fresh: bool
    value: bool
    gradient: bool
    factor: float | None
    error: float
    golden: bool = True


def trial(a: Side, b: Side, twin: Twin, emitted: bool = False) -> Trial | None:
    """None where neither method has finite numbers (a probe too wide for both). emitted: by the
    emitted passes instead of the oracle."""
    la, ga = outcome(a.program, twin, 0, emitted)
    lb, gb = outcome(b.program, twin, 1, emitted)
    fine = [
        bool(torch.isfinite(g).all()) and abs(x) < float("inf") for x, g in ((la, ga), (lb, gb))
    ]
    if not any(fine):
        return None
    if not all(fine):
        return Trial(twin.fresh, False, False, None, float("inf"))
    off = _apart(ga, gb)
    size = max(abs(la), abs(lb), 1e-2)
    value = abs(la - lb) <= TOLERANCE * size
    error = max(off, abs(la - lb) / size)
    given = _main_size(twin)
    golden = _apart(ga[given:], gb[given:]) <= TOLERANCE
    return Trial(twin.fresh, value, off <= TOLERANCE, factor(ga, gb), error, golden)


def _main_size(twin: Twin) -> int:
    b, t = twin.a.shape
    return b * t * twin.width


@lru_cache(maxsize=1024)
def outcome(program: Program, twin: Twin, side: int, emitted: bool = False) -> tuple[float, Tensor]:
    """Loss and logit gradient (flat, golden rows last) of the method on its side of a twin."""
    batch = twin.b if side else twin.a
    slow = twin.width > SLOW and any(
        n.op == "union" for n in nodes_below([p.total for p in program.parts])
    )
    if emitted or slow:
        return _emitted(program, batch)
    found = reference(program, batch)
    parts = [found.grad_logits.flatten()]
    golden = batch.golden
    if found.grad_golden is not None:
        parts.append(found.grad_golden.flatten())
    elif golden is not None:  # a method without golden text has no gradient there
        size = golden.shape[0] * golden.shape[1] * twin.width
        parts.append(torch.zeros(size, dtype=torch.float64))
    return found.loss, torch.cat(parts)


@lru_cache(maxsize=64)
def module(program: Program) -> LossModule:
    return LossModule(program, emit(program))


@lru_cache(maxsize=64)
def per_rollout(program: Program) -> Program:
    """The program without batch-wide denominators. Raises enumerate.Coupled."""
    return exact.summed(program)


def _emitted(program: Program, batch: Batch) -> tuple[float, Tensor]:
    """By the emitted passes, which have no loops over pairs of entries."""
    parts, total = [], torch.zeros((), dtype=torch.float64)
    leaves, golden = [], batch.golden
    dressed = []
    for rows in (batch, golden):
        if rows is None:
            dressed.append(None)
            continue
        leaf = dense64(rows, "student").requires_grad_()
        leaves.append((rows, leaf))
        dressed.append(replace(rows, dists={**rows.dists, "student": DenseDist(leaf)}))
    assert dressed[0] is not None
    total = module(program)(replace(dressed[0], golden=dressed[1])).loss
    grads = torch.autograd.grad(total, [x for _, x in leaves], allow_unused=True)
    for (rows, leaf), grad in zip(leaves, grads):
        b, t = rows.shape
        out = torch.zeros(b * t, leaf.shape[-1], dtype=torch.float64)
        if grad is not None:
            assert rows.place_N is not None
            out[rows.place_N] = grad
        parts.append(out.flatten())
    return float(total.detach()), torch.cat(parts)


def _apart(x: Tensor, y: Tensor) -> float:
    if not x.numel():
        return 0.0
    size = max(float(x.abs().max()), float(y.abs().max()), FLOOR)
    return float((x - y).abs().max()) / size


def factor(x: Tensor, y: Tensor, within: float = TOLERANCE) -> float | None:
    """c with y = c x, or None; 0, infinity or NaN where one side or both are zero."""
    big_x, big_y = (float(t.abs().max()) if t.numel() else 0.0 for t in (x, y))
    if big_x < 1e-14 or big_y < 1e-14:
        return (
            float("nan")
            if big_x == big_y or max(big_x, big_y) < 1e-14
            else (0.0 if big_y < big_x else float("inf"))
        )
    c = float((x * y).sum() / (x * x).sum())
    return c if float((y - c * x).abs().max()) <= within * big_y else None


def judged(trials: Iterable[Trial]) -> Agreement:
    """The strongest statement that all batches support.

    Agreement on fresh batches alone counts where drifted ones differ as a rule: a rare branch
    that only some of them reach is a difference, not a condition.
    """
    every = list(trials)
    whole = _judged(every)
    fresh = [t for t in every if t.fresh]
    if not fresh or len(fresh) == len(every):
        return whole
    some = replace(_judged(fresh), fresh=True)
    if some.kind == "different" or share_equal([t for t in every if not t.fresh]) > RARE:
        return whole
    return min(whole, some, key=lambda x: x.rank)


def share_equal(trials: list[Trial]) -> float:
    return sum(t.gradient for t in trials) / max(len(trials), 1)


def _judged(trials: list[Trial]) -> Agreement:
    if not trials:
        return DIFFERENT
    if all(t.gradient for t in trials):
        return Agreement("equal" if all(t.value for t in trials) else "gradient")
    c = constant([t.factor for t in trials])
    return DIFFERENT if c is None else Agreement("scaled", factor=c)


def constant(factors: list[float | None]) -> float | None:
    """The one positive factor of all batches that have a gradient."""
    seen = [c for c in factors if c is None or c == c]
    if not seen or any(c is None or not 0 < c < float("inf") for c in seen):
        return None
    first = seen[0]
    assert first is not None
    same = all(abs(c - first) <= CONSTANT * first for c in seen if c is not None)
    return first if same else None


# ---- expectations ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expectation:
    """Expected gradients over all responses. why: what keeps it undecided."""

    agreement: Agreement
    why: str = ""


def expectation(a: Side, b: Side, where: Scene, critic: str = "any") -> Expectation:
    """Whether the expected gradients agree under every law the two methods draw with."""
    try:
        pa, pb = per_rollout(a.program), per_rollout(b.program)
    except exact.Coupled as why:
        return Expectation(DIFFERENT, str(why))
    if where.widest + 3 > 1200:
        return Expectation(DIFFERENT, "the sets are too wide to enumerate")
    if where.reach > CAP:
        return Expectation(DIFFERENT, f"a reach of {where.reach} tokens is too far to enumerate")
    factors: list[float | None] = []
    for w in itertools.chain(worlds(a, b, where, critic), more_worlds(a, b, where, critic)):
        if w is None:
            return Expectation(DIFFERENT, "the exact value of the state is not known")
        ma, _ = field(pa, w, 0)
        mb, _ = field(pb, w, 1)
        if not (torch.isfinite(ma).all() and torch.isfinite(mb).all()):
            return Expectation(DIFFERENT, "not finite on the small models")
        factors.append(factor(ma, mb, 1e-8))
        c = constant(factors)
        if c is None and any(f is None or f == f for f in factors):
            return Expectation(DIFFERENT)
    c = constant(factors)
    if c is None:
        return Expectation(DIFFERENT)
    kind = "expected" if abs(c - 1) <= CONSTANT else "expected scaled"
    return Expectation(Agreement(kind, factor=c, critic=critic))


@lru_cache(maxsize=512)
def field(program: Program, w: World, side: int) -> tuple[Tensor, float]:
    """(E g [S, V], E‖g − E g‖²) of a program without batch-wide denominators."""
    dz = _emitted(program, w.twin.b if side else w.twin.a)[1]
    return w.mean_and_spread(dz.reshape(*w.states.shape, w.tree.vocab))


@dataclass(frozen=True)
class Variances:
    """E‖g − E g‖² of one rollout (of one group, per rollout), mean over random models. lower: in
    how many of them A's is the smaller one."""

    a: float
    b: float
    lower: int
    models: int
    model: str


def variances(a: Side, b: Side, where: Scene, models: int = 8) -> Variances:
    """Raises enumerate.Coupled."""
    tree, group = (exact.tree(3, 2), 2) if where.grouped else (exact.tree(4, 3), 1)
    law = laws(a)[0]
    found = []
    for seed in range(models):
        w = world(where, tree, group, 100 + seed, 1.0, law)
        sides = enumerate((a, b))
        found.append([field(per_rollout(side.program), w, i)[1] for i, side in sides])
    of = f" in groups of {group}" if group > 1 else ""
    model = f"{tree.vocab} tokens, at most {tree.cap} long{of}"
    mean = [sum(x) / models for x in zip(*found)]
    return Variances(mean[0], mean[1], sum(x < y for x, y in found), models, model)


def worlds(a: Side, b: Side, where: Scene, critic: str) -> Iterator[World | None]:
    """Small models under every law, prompt and step that may matter; None: no exact value."""
    shapes: list[tuple[exact.Tree, int, float]]
    if where.grouped:
        shapes = [(exact.tree(3, 2), 2, 1.0), (exact.tree(2, 2), 3, 2.0)]
    else:
        shapes = [(exact.tree(3, 2), 1, 1.0), (exact.tree(4, CAP), 1, 2.0)]
    group = 2 if where.grouped else 1
    if where.widest > 1:
        wide = where.widest + 3
        if group == 1 or wide**2 * 2 * wide < 2_000_000:
            shapes.append((exact.tree(wide, 1, None), group, 1.5))
        if group == 1 and wide <= 12:
            shapes.append((exact.tree(wide, 2), 1, 1.5))
    if not where.narrow:  # large log-ratios, high entropies
        shapes.append((exact.tree(5, 1, None), group, 15.0))
        shapes.append((exact.tree(50 if where.grouped else 400, 1, None), group, 0.3))
    drawn: tuple[Law, ...] = tuple(dict.fromkeys((*laws(a), *laws(b))))
    for i, (tree, group, spread) in enumerate(shapes):
        for law in drawn:
            for j in range(len(where.prompts)):
                for step in where.steps:
                    seed = i * len(where.prompts) + j  # the prompt is the seed's
                    w = world(where, tree, group, seed, spread, law, step)
                    alone = world(where, tree, 1, seed, spread, law, step)
                    yield with_critic(a, b, w, alone, critic)


def more_worlds(
    a: Side, b: Side, where: Scene, critic: str, count: int = 24
) -> Iterator[World | None]:
    """Further models, for methods that agree so far: student and teacher peaked or flat apart."""
    r = random.Random(11)
    drawn = tuple(dict.fromkeys((*laws(a), *laws(b))))
    group = 2 if where.grouped else 1
    for i in range(count):
        spread, sharp = (math.exp(r.uniform(-1, 2.3)) for _ in range(2))
        one_state = i % 4 != 0
        shape = (r.randint(3, 6), 1, None) if one_state else (3, 2, 0)
        law, step, seed = r.choice(drawn), r.choice(where.steps), 400 + i
        args = (seed, spread, law, step, sharp, sharp if i % 3 == 0 else 0.0)
        tree = exact.tree(*shape)
        yield with_critic(
            a, b, world(where, tree, group, *args), world(where, tree, 1, *args), critic
        )


def with_critic(a: Side, b: Side, w: World, alone: World, critic: str) -> World | None:
    """The world with the critics of both sides zero, or exact for their own signals. alone: the
    same models, one response a draw."""
    if critic == "any":
        return w
    batches = []
    for i, side in enumerate((a, b)):
        batch = w.twin.b if i else w.twin.a
        if side.spec.critics:
            zero_S = torch.zeros(w.tree.size[0], dtype=torch.float64)
            value_S = zero_S if critic == "zero" else exact_values(side.program, alone, i)
            if value_S is None:
                return None
            batch = valued(batch, w, value_S)
        batches.append(batch)
    return replace(w, twin=replace(w.twin, a=batches[0], b=batches[1]))


def valued(batch: Batch, w: World, value_S: Tensor) -> Batch:
    """Every critic of the batch says value_S; nothing after the end."""
    assert batch.place_N is not None
    value_N = value_S[w.states.reshape(-1)[batch.place_N]]
    zero_B = torch.zeros(batch.layout.n_seqs, dtype=torch.float64)
    return replace(batch, values={k: (value_N, zero_B) for k in batch.values})


@lru_cache(maxsize=256)
def exact_values(program: Program, alone: World, side: int) -> Tensor | None:
    """V(s) [S] = E[Σ γ^k r] of a method's own signal; None where that is no function of state and
    token."""
    spec = program.spec
    term, targets = critic_term(spec), critic_targets(spec)
    if term is None or targets is None or term.signal is None or term.signal.q.info > Info.ACTION:
        return None
    rows = add_routed(alone.twin.b if side else alone.twin.a, spec.routed)
    r_N = Evaluator(rows, dense64(rows, "student"))(term.signal).detach().double()
    assert rows.place_N is not None and rows.rollout_N is not None
    s_N = alone.states.reshape(-1)[rows.place_N]
    r_SV, p_SV = (torch.zeros(alone.tree.size, dtype=torch.float64) for _ in range(2))
    r_SV[s_N, rows.tokens_N] = r_N.expand(rows.layout.n_rows)
    p_SV[s_N, rows.tokens_N] = rows.rollout_N.exp()
    value_S = torch.zeros(alone.tree.size[0], dtype=torch.float64)
    nothing = value_S.new_zeros(())
    for s in reversed(range(len(value_S))):
        after_V = torch.stack([value_S[c] if c >= 0 else nothing for c in alone.tree.next_SV[s]])
        value_S[s] = (p_SV[s] * (r_SV[s] + targets[0] * after_V)).sum()
    return value_S
