"""Effects of the rules on credit, routing, factors and whole methods (see `effects`)."""

from __future__ import annotations

import torch

import opdsl
from opdsl.passport import enumerate as exact

from . import toy
from .effects import (
    J_FRO,
    J_SEQ,
    REVERSE,
    SMALL_S,
    SMALL_T,
    STUDENT,
    TEACHER,
    WON,
    A,
    B,
    agrees,
    apart,
    at,
    at_token,
    by_state,
    effect,
    field,
    measured,
    off,
    probs,
    small,
    turned,
    variant,
)  # fmt: skip

# ---- credit: R30-R38 ---------------------------------------------------------------------------------


@effect("OPD501", "distance to the gradient of the sequence KL")
def _(m):
    return apart(field(m), J_SEQ)


@effect("OPD506", "distance to the nearer of both objectives, any scale")
def _(m):
    return min(off(field(m), J_SEQ), off(field(m), J_FRO))


@effect("OPD527", "distance to the gradient of the sequence KL")
def _(m):
    return apart(field(m), J_SEQ)


@effect("OPD532", "digits to which it is the gradient of the sequence KL", 9)
def _(m):
    return agrees(field(m), J_SEQ)


@effect("OPD315", "distance to the gradient of the sequence KL")
def _(m):
    return apart(field(m), J_SEQ)


@effect("OPD505", "shrinkage of the gradient")
def _(m):
    one = exact.tree(5, 1, None)
    s, t = toy.models(one, 4)
    want = exact.gradient(lambda z: exact.sequence_kl(one, z, t), s)
    got = exact.expected(m.program, one, s, t, group=3).gradient
    return apart(got, want)


@effect("OPD509", "distance to the gradient of the sequence KL with a noisy critic")
def _(m):
    value_S, _ = exact.returns(A, STUDENT, TEACHER)
    noise = torch.randn(value_S.shape, generator=torch.Generator().manual_seed(0)).double()
    return apart(field(m, values_S=value_S + noise), J_SEQ)


@effect("OPD318", "distance to the objective of the aggregate, any scale")
def _(m):
    lengths = A.mask_BT.sum(1).double() if m.spec.aggregate == "sequences" else 1.0

    def objective(z):
        lp, lq = exact.log_probability(A, z), exact.log_probability(A, TEACHER)
        return (lp.exp() * (lp - lq) / lengths).sum()

    return off(field(m), exact.gradient(objective, STUDENT))


@effect("OPD514", "share of the field that no weight per state explains")
def _(m):
    return by_state(field(m), J_FRO)[1]


@effect("OPD521", "growth of the second moment as π_T(y) falls from 1e-3 to 1e-12", 1.0)
def _(m):
    def moment(log_tail: float) -> float:
        s = torch.zeros(2, 4).double()[:1]
        t = torch.tensor([[0.0, 0.0, 0.0, log_tail]]).double()
        one = exact.tree(4, 1, None)
        return exact.expected(m.program, one, s, t).variance

    return moment(-27.6) / moment(-6.9) - 1


@effect("OPD533", "variance added to that of the free value")
def _(m):
    free = variant(m, ("min(V, 0)", "V"), ('  accept value_sign "as a case"\n', ""))
    value_S = _value(lambda b: 3 * WON)
    bound = measured(m, values_S=value_S).variance
    return bound / measured(free, values_S=value_S).variance - 1


def _value(outcome):
    """Exact value of Σ r + outcome on every token, by enumeration [S]."""
    lp, lq = (torch.log_softmax(z, -1) for z in (STUDENT, TEACHER))
    r_BT = ((lq - lp)[A.state_BT, A.tokens_BT] + outcome(None)[:, None]) * A.mask_BT
    go_BT = r_BT.flip(1).cumsum(1).flip(1)
    law_B = exact.log_probability(A, STUDENT).exp()
    total, mass = (torch.zeros(A.size[0]).double() for _ in range(2))
    for t in range(A.cap):
        on = A.mask_BT[:, t]
        total.index_add_(0, A.state_BT[on, t], (law_B * go_BT[:, t])[on])
        mass.index_add_(0, A.state_BT[on, t], law_B[on])
    return total / mass


@effect("OPD524", "change of the log-ratio's coefficient when outcomes spread three times wider")
def _(m):
    def slope(scale: float) -> float:
        g = torch.Generator().manual_seed(4)
        z = torch.randn(8, 1, 5, generator=g).double()
        t = torch.randn(8, 1, 5, generator=g).double()
        y = torch.arange(8).reshape(8, 1) % 5
        won = scale * (torch.arange(8) % 2).double()
        batch = opdsl.Batch.from_logits(
            z, t, tokens=y, mask=torch.ones(8, 1, dtype=torch.bool), outcome=won
        )
        grad = torch.as_tensor(m.reference(batch).grad_logits)
        p = torch.softmax(z, -1)
        a = -(grad.gather(-1, y[..., None]) / (1 - p.gather(-1, y[..., None]))).reshape(-1)
        gap = (torch.log_softmax(t, -1) - torch.log_softmax(z, -1)).gather(-1, y[..., None])
        basis = torch.stack([gap.reshape(-1), won, torch.ones(8).double()], 1)
        return float(torch.linalg.lstsq(basis, a[:, None]).solution[0])

    return abs(slope(3.0) / slope(1.0) - 1)


@effect("OPD534", "distance to the gradient of the sequence KL, any scale")
def _(m):
    return off(field(m), J_SEQ)


# ---- routing: R40-R47 ------------------------------------------------------------------------------------


def punished() -> list[int]:
    """Tokens that a centred trigger punishes."""
    p, q = probs()
    gap = (p / q).log()
    return [int(y) for y in (gap > (p * gap).sum()).nonzero()]


@effect("OPD320", "share of punished tokens that move no mass")
def _(m):
    still = [float(at_token(m, y).norm()) < 1e-12 for y in punished()]
    return sum(still) / len(still)


def landed(m, y: int, where: torch.Tensor) -> float:
    """Share of the upward push that falls on the given tokens."""
    up = (-at_token(m, y)).clamp_min(0)
    up[y] = 0
    return float(up[where].sum() / up.sum().clamp_min(1e-30))


@effect("OPD517", "largest share of the push on tokens above the teacher")
def _(m):
    p, q = probs()
    return max(landed(m, y, p > q) for y in punished())


@effect("OPD313", "share of the push outside every candidate where there is none")
def _(m):
    student = SMALL_S.clone()
    student[0, 3] += 9  # one token holds the mass: nothing else is within reach
    up = (-at_token(m, 3, student)).clamp_min(0)
    return float(up.sum())


@effect("OPD516", "nats of push beyond 5 for a token with π_T(y) = 1e-12")
def _(m):
    teacher = torch.zeros(1, 12).double()
    teacher[0, 0] = -27.6
    student = torch.zeros(1, 12).double()
    student[0, 0] = 1.0
    return max(float(at_token(m, 0, student, teacher).abs().max()) - 5, 0.0)


@effect("OPD510", "share of punished tokens whose step raises KL(T ‖ student)")
def _(m):
    rises = cases = 0
    for seed in range(30):
        s, t = toy.models(B, 200 + seed, 1.5)
        p, q = (torch.softmax(x, -1).reshape(-1) for x in (s, t))
        gap = (p / q).log()
        for y in (gap > (p * gap).sum()).nonzero():
            cases += 1
            rises += float((at_token(m, int(y), s, t) * (p - q)).sum()) < -1e-12
    return rises / cases


@effect("OPD526", "angle to the gradient of KL(student ‖ T), 1 − cos")
def _(m):
    return turned(small(m), REVERSE)


@effect("OPD522", "share of the routed push that the other term makes as well", 0.5)
def _(m):
    direct = [t for t in m.spec.terms if t.route == "loss"]
    if not direct:
        return 0.0
    already = (-REVERSE).reshape(-1) > 0
    alone = toy.method(
        """support full
        feedback reward log(T[y] / student[y])
        credit immediate
        routing counterfactual(when = A + KL(student || T) < 0, among = {v in full: v != y and T[v] > student[v] and student[v] >= 0.01}, toward = T[v] - student[v], strength = min(5, -A), otherwise = drop)"""
    )
    return sum(landed(alone, y, already) for y in punished()) / len(punished())


@effect("OPD535", "change of strength between states with one log-ratio of y")
def _(m):
    def strength(p_y: float) -> float:
        p = torch.full((12,), (1 - p_y) / 11).double()
        q = torch.full((12,), (1 - p_y / 4) / 11).double()
        p[0], q[0] = p_y, p_y / 4
        return float(at_token(m, 0, p.log()[None], q.log()[None])[0])

    return abs(strength(0.5) / strength(0.1) - 1)


# ---- gates and weights: R50-R55, R64-R66 ---------------------------------------------------------------------


@effect("OPD511", "spread of the weight between states, its direction kept")
def _(m):
    k_S, rest = by_state(field(m), J_FRO)
    assert rest < 1e-9
    return float(k_S.max() - k_S.min()) / float(k_S.max())


@effect("OPD513", "share of the field that no weight per state explains")
def _(m):
    return by_state(field(m), J_FRO)[1]


@effect("OPD512", "share of the field that no weight per state explains")
def _(m):
    return by_state(field(m), J_FRO)[1]


@effect("OPD207", "how far it climbs KL(student ‖ T), cos")
def _(m):
    return max(turned(field(m), J_FRO) - 1, 0.0)


def scale(m, other: str) -> float:
    """Size of the gradient of a batch, over that under another denominator."""
    g = torch.Generator().manual_seed(8)
    z, t = (torch.randn(4, 3, 5, generator=g).double() for _ in range(2))
    batch = opdsl.Batch.from_logits(
        z, t, tokens=torch.zeros(4, 3, dtype=torch.int64), mask=torch.ones(4, 3, dtype=torch.bool)
    )
    mine, theirs = m, variant(m, (f"over = {m.spec.aggregate}", f"over = {other}"))
    a, b = (torch.as_tensor(x.reference(batch).grad_logits).norm() for x in (mine, theirs))
    return float(a / b)


@effect("OPD536", "share of the step the gate takes away")
def _(m):
    return 1 - scale(m, "kept_tokens")


@effect("OPD519", "how much larger the step is than per token")
def _(m):
    return scale(m, "tokens") - 1


@effect("OPD518", "change of a row's gradient with the rows beside it")
def _(m):
    g = torch.Generator().manual_seed(8)
    z, t = (torch.randn(6, 3, 5, generator=g).double() for _ in range(2))
    t = t * torch.arange(1, 7)[:, None, None]  # ever more certain: few rows pass beside the first

    def grad(rows: slice) -> torch.Tensor:
        n = z[rows].shape[0]
        batch = opdsl.Batch.from_logits(
            z[rows], t[rows], tokens=torch.zeros(n, 3, dtype=torch.int64),
            mask=torch.ones(n, 3, dtype=torch.bool),
        )  # fmt: skip
        return torch.as_tensor(m.reference(batch).grad_logits)

    return apart(grad(slice(0, 2)), grad(slice(0, 6))[:2])


@effect("OPD508", "distance to ∇KL(student ‖ T) at the visited states")
def _(m):
    law = STUDENT / m.spec.states[0].temperature
    return apart(field(m, sampler_SV=law), at(law))


@effect("OPD538", "share of the gradient on special tokens")
def _(m):
    g = torch.Generator().manual_seed(8)
    z, t = (torch.randn(4, 3, 5, generator=g).double() for _ in range(2))
    y = torch.randint(0, 5, (4, 3), generator=g)
    batch = opdsl.Batch.from_logits(
        z, t, tokens=y, mask=torch.ones(4, 3, dtype=torch.bool), special=y == 0
    )
    grad = torch.as_tensor(m.reference(batch).grad_logits)
    return float(grad[y == 0].norm() / grad.norm())


# ---- whole methods: R60-R63 -----------------------------------------------------------------------------------


@effect("OPD537", "gradient left at student = teacher")
def _(m):
    return float(small(m, SMALL_T).norm())


@effect("OPD515", "gradient left at student = teacher")
def _(m):
    return float(small(m, SMALL_T).norm())


@effect("OPD306", "turn of the field when outcomes are ten times larger and what the spec says "
        "a unit is worth ten times smaller, 1 − cos")  # fmt: skip
def _(m):
    again = variant(m, ("0.5 * outcome", "0.05 * outcome"))
    return turned(field(again, outcome_B=10 * WON), field(m, outcome_B=WON))


@effect("OPD523", "gradient left by given text at student = teacher")
def _(m):
    def rows(seed: int):
        g = torch.Generator().manual_seed(seed)
        z = torch.randn(2, 2, 5, generator=g).double().requires_grad_()
        y = torch.randint(0, 5, (2, 2), generator=g)
        return z, {"tokens": y, "mask": torch.ones(2, 2, dtype=torch.bool)}

    z, main = rows(1)
    w, given = rows(2)
    batch = opdsl.Batch.from_logits(
        z, z.detach(), **main, golden=opdsl.Batch.from_logits(w, w.detach(), **given)
    )
    grads = torch.autograd.grad(m.loss(batch).loss, [z, w], allow_unused=True)
    return sum(float(x.norm()) for x in grads if x is not None)


__all__ = ["REVERSE"]
