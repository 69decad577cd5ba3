"""The failure gallery: `specs/failures/*.opd` read as what they document, and measured.

A file's comment says where the mistake was seen, what was meant, what it does, and the cure as
lines to take out (`-`) and to put in (`+`). `CASES[name]` says what its passport must say and how
large the effect is. Models as in `support.effects`: A has 13 states over 4 tokens, B one state over
12; float64, every response enumerated.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from support import effects_rest  # noqa: F401  registers its effects
from support.effects import (
    EFFECTS,
    J_FRO,
    J_SEQ,
    REVERSE,
    SMALL_S,
    SMALL_T,
    STUDENT,
    A,
    B,
    apart,
    at,
    by_state,
    lost,
    measured,
    off,
    outward,
    small,
    turned,
)  # fmt: skip
from support.effects import field as expected
from torch import Tensor

import opdsl
from opdsl.codes import BY_SLUG, CODES
from opdsl.method import Method
from opdsl.passport import enumerate as exact
from opdsl.resources import specs

FOLDER = specs() / "failures"
FILES = sorted(FOLDER.glob("*.opd"))
ACKNOWLEDGED = re.compile(r"^ *(accept|allow) +(\w+) +\".*\"\n", re.MULTILINE)
BY_RULE = {c.rule: c.code for c in CODES.values() if c.rule and str(c.severity) == "error"}


# ---- what a file says ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """One file of the gallery."""

    name: str
    text: str

    @property
    def comment(self) -> str:
        """The comment before the first definition, without its marks."""
        lines = [x[1:].removeprefix(" ") for x in self.text.splitlines() if x.startswith("#")]
        return "\n".join(lines)

    def said(self, word: str) -> str:
        """What stands after `Meant:`, `Does:` or `Cure:`, and before them all for ``."""
        parts = re.split(r"^(Meant|Does|Cure): *", self.comment, flags=re.MULTILINE)
        found = dict(zip(["", *parts[1::2]], parts[::2]))[word]
        return " ".join(x for x in found.splitlines() if not re.match(r" +[-+] ", x)).strip()

    @property
    def codes(self) -> set[str]:
        """The diagnostics it acknowledges."""
        out = set()
        for _, name in ACKNOWLEDGED.findall(self.text):
            out.add(BY_SLUG[name].code if name in BY_SLUG else BY_RULE.get(name, name))
        return out

    @property
    def bare(self) -> str:
        """Without acknowledgements."""
        return ACKNOWLEDGED.sub("", self.text)

    @property
    def cured(self) -> str:
        """Without acknowledgements and with the lines of the cure. Raises ValueError where a line
        to take out is not there."""
        text = [x for x in self.bare.splitlines() if not x.startswith("#")]
        place = None
        for sign, wanted in re.findall(r"^# +([-+]) (.*)$", self.text, re.MULTILINE):
            if sign == "-":
                hits = [i for i, x in enumerate(text) if x.split() == wanted.split()]
                if len(hits) != 1:
                    raise ValueError(f"{self.name}: {len(hits)} lines read {wanted!r}")
                place = hits[0]
                del text[place]
            else:
                assert place is not None
                text.insert(place, "  " + wanted)
                place += 1
        return "\n".join(text) + "\n"


PAGES = {p.stem: Page(p.stem, p.read_text(encoding="utf-8")) for p in FILES}


def method(page: Page, cured: bool = False, k: int = 2) -> Method:
    """The method as shipped or cured; small supports, since the models are small."""
    text = page.cured if cured else page.text
    return opdsl.compile(text, set={"k": k} if "param k " in text else None)


# ---- what it does, in numbers --------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """says: the effect `measure` gives, above `tolerance` as shipped and below it cured. passport:
    entries as printed, `…` for any text. exactly: further facts, each a relative error below
    1e-9 for the method as shipped."""

    says: str
    measure: Callable[[Method], float]
    tolerance: float = 1e-6
    passport: dict[str, object] = field(default_factory=dict)
    exactly: Callable[[Method], float] = lambda m: 0.0


def wanted(kl: Callable[[Tensor], Tensor], student: Tensor = SMALL_S) -> Tensor:
    return exact.gradient(lambda z: kl(z).sum(), student)


FORWARD = wanted(lambda z: exact.state_kl(SMALL_T, z))


def at_rest(m: Method) -> float:
    """‖E g‖ at student = teacher over that elsewhere."""
    group = {"group": m.spec.states[0].group} if m.needs.group else {}
    group = {"group": 2} if group else {}
    return float(small(m, SMALL_T, **group).norm() / small(m, **group).norm())


def descent(m: Method, steps: int = 100, rate: float = 3.0, start: Tensor = SMALL_S) -> Tensor:
    """The student after exact gradient steps at model B's state."""
    z = start.clone()
    for _ in range(steps):
        z = z - (rate * small(m, z)).clamp(-0.5, 0.5)
    return z


def left(m: Method) -> float:
    """KL(student ‖ T) after 100 exact steps over that before."""
    start = SMALL_T + 0.5 * B.random(9)
    end = descent(m, start=start)
    return float(exact.state_kl(end, SMALL_T).sum() / exact.state_kl(start, SMALL_T).sum())


def inside(z: Tensor, k: int = 2) -> Tensor:
    """Mass on the teacher's top k."""
    top = SMALL_T.topk(k, -1).indices
    return torch.softmax(z, -1).gather(-1, top).sum()


def missing_mass(m: Method) -> float:
    return abs(float(inside(SMALL_T) - inside(descent(m, 150, 6.0))))


def shrunk(total: Tensor | float) -> Tensor:
    """Logits with the teacher's shapes inside and outside its top 2, and this mass inside."""
    q = torch.softmax(SMALL_T, -1)
    top = torch.zeros_like(q).bool().scatter(-1, SMALL_T.topk(2, -1).indices, True)
    mass = q[top].sum()
    return torch.where(top, q * total / mass, q * (1 - total) / (1 - mass)).log()


def dead_states(m: Method) -> float:
    """Share of random states near agreement without any gradient."""
    dead = 0
    for seed in range(60):
        t = B.random(400 + seed)
        dead += float(small(m, t + 0.3 * B.random(500 + seed), t).norm()) < 1e-12
    return dead / 60


def unmoved(m: Method) -> float:
    """Share of the pull on the mass of the support that is lost: along logits that rise together
    inside, the gradient of KL(T ‖ student) is π(Ω) − π_T(Ω)."""
    top = SMALL_T.topk(2, -1).indices
    pull, should = (x.gather(-1, top).sum() for x in (small(m), FORWARD))
    return 1 - min(1.0, abs(float(pull / should)))


def neighbours(m: Method) -> float:
    """Change of a row's gradient with the rows beside it."""
    g = torch.Generator().manual_seed(8)
    z, t = (torch.randn(6, 3, 5, generator=g).double() for _ in range(2))
    z = z * torch.arange(1, 7)[:, None, None]  # ever more certain: few tokens pass beside the first

    def grad(n: int) -> Tensor:
        batch = opdsl.Batch.from_logits(
            z[:n], t[:n], tokens=torch.zeros(n, 3, dtype=torch.int64),
            mask=torch.ones(n, 3, dtype=torch.bool),
        )  # fmt: skip
        return torch.as_tensor(m.reference(batch).grad_logits)[:2] * n  # mean over tokens

    return apart(grad(6), grad(2))


def stale(m: Method) -> float:
    law = STUDENT + 0.5 * A.random(5)
    return apart(expected(m, sampler_SV=law), at(law))


ZERO = {
    "zero_expected_gradient": True,
    "objective": "none: the expected gradient is zero",
    "fixed_point": "every student: the expected field is zero",
}
NOWHERE = {
    "zero_expected_gradient": False,
    "fixed_point": "π_T is stationary, but does not attract",
}
BLIND = {
    **NOWHERE,
    "objective": "no divergence: the reward has one sign, whichever way the student errs",
}
NEITHER = {"unbiased": {"J_seq": False, "J_fro": False}}
BY_LENGTH = (
    "KL(student ‖ T) of whole sequences (J_seq) divided by their length, with a bias: the length "
    "depends on the tokens"
)

CASES: dict[str, Case] = {
    "inert_topk_reward": Case(
        "share of the expected gradient lost", lambda m: lost(expected(m), J_FRO), 0.5, ZERO
    ),
    "direct_log_ratio": Case(
        "share of the expected gradient lost", lambda m: lost(expected(m), J_FRO), 0.5, ZERO
    ),
    "k3_reward": Case(
        "KL(student ‖ T) after 100 exact steps, over that before",
        left,
        1.0,
        {
            **NOWHERE,
            "conservative": False,
            "objective": "Σ_t [KL(student ‖ T) − KL(T ‖ student)] at visited states, "
            "states held fixed (J_fro)",
        },
        lambda m: apart(small(m), REVERSE - FORWARD),
    ),
    "k3_direct": Case(
        "angle to the gradient of KL(student ‖ T), 1 − cos",
        lambda m: turned(small(m), REVERSE),
        passport={"objective": "KL(T ‖ student) at visited states, in expectation over y"},
        exactly=lambda m: apart(small(m), FORWARD),
    ),
    "k2_reward": Case("KL(student ‖ T) after 100 exact steps, over that before", left, 1.0, BLIND),
    "abs_reward": Case("KL(student ‖ T) after 100 exact steps, over that before", left, 1.0, BLIND),
    "truncated_reverse_kl": Case(
        "mass missing from the support after 150 exact steps",
        missing_mass,
        0.01,
        {
            "stationary_at_teacher": False,
            "fixed_point": "the shape of π_T on the support with total mass π_T(Ω)/e: "
            "mass is pushed out",
        },
        lambda m: float(small(m, shrunk(inside(SMALL_T) / torch.e)).norm()),
    ),
    "clamped_forward_kl": Case(
        "share of states without any gradient",
        dead_states,
        passport={
            "stationary_at_teacher": False,
            "fixed_point": "no single point: the field is zero wherever the bound acts",
        },
    ),
    "renormalised_topk": Case(
        "pull on the mass of the support lost, share",
        unmoved,
        0.5,
        {
            "fixed_point": "any student with the shape of π_T inside the support; "
            "mass outside is free"
        },
        lambda m: float(small(m, shrunk(0.1)).norm()),
    ),
    "one_entry_renormalised": Case(
        "share of the gradient lost", lambda m: lost(small(m), REVERSE), 0.9, ZERO
    ),
    "rest_at_minus_100": Case(
        "gradient left at student = teacher, over that before",
        at_rest,
        passport={
            "stationary_at_teacher": False,
            "fixed_point": "π_T renormalised on the support; everything outside is erased",
        },
        exactly=lambda m: float(small(m, shrunk(1 - 1e-14)).norm()),
    ),
    "tail_pairing_raw": Case(
        "push ∇π(support) left over, in units of ∇KL's",
        lambda m: EFFECTS["OPD531"].measure(m),
        passport={"stationary_at_teacher": False},
        exactly=lambda m: apart(small(m) - REVERSE, outward(SMALL_S)),
    ),
    "rollout_normaliser": Case(
        "share of the field that no weight per state explains",
        lambda m: by_state(expected(m), J_FRO)[1],
        passport={
            "objective": "Σ_t KL(student ‖ T) at visited states, states held fixed (J_fro), weighted",
            **NEITHER,
        },
    ),
    "whitened_sum": Case(
        "change of the log-ratio's coefficient when outcomes spread three times wider",
        lambda m: EFFECTS["OPD524"].measure(m),
        passport={"objective": "not decided"},
    ),
    "returns_by_length": Case(
        "distance to the gradient of the sequence KL, any scale",
        lambda m: off(expected(m), J_SEQ),
        passport={"objective": BY_LENGTH, "conservative": False, **NEITHER},
    ),
    "mean_of_sequences": Case(
        "distance to the gradient of the sequence KL, any scale",
        lambda m: off(expected(m), J_SEQ),
        passport={"objective": BY_LENGTH, "conservative": False, **NEITHER},
    ),
    "counted_twice": Case(
        "distance to the gradient of the sequence KL, any scale",
        lambda m: off(expected(m), J_SEQ),
        passport={
            "objective": [
                "KL(student ‖ T) at visited states",
                "not the gradient of any objective (discounted return, γ = 0.95)",
            ],
            "conservative": False,
        },
    ),
    "entropy_twice": Case(
        "gradient left at student = teacher, over that before",
        at_rest,
        passport={"stationary_at_teacher": False},
    ),
    "own_samples": Case(
        "variance of the gradient at one state, over its squared mean",
        lambda m: (
            measured(m, B, SMALL_S, SMALL_T, initial_SV=SMALL_S).variance
            / float(small(m).square().sum())
        ),
        passport={
            "objective": [
                "none: the expected gradient is zero",
                "KL(student ‖ T) at visited states",
            ]
        },
        exactly=lambda m: apart(small(m), 0.5 * REVERSE),
    ),
    "batch_relative_gate": Case(
        "change of a row's gradient with the rows beside it",
        neighbours,
        passport={"objective": "KL(student ‖ T) at visited states, gated"},
    ),
    "stale_rollouts": Case(
        "distance to ∇KL(student ‖ T) at the visited states",
        stale,
        passport={
            "objective": "Σ_t KL(student ‖ T) at visited states, states held fixed (J_fro) "
            "(if the student, as it is now, had drawn the tokens)",
            **NEITHER,
        },
    ),
    "tempered_student": Case(
        "gradient left at student = teacher, over that before",
        at_rest,
        passport={
            "stationary_at_teacher": False,
            "fixed_point": "none in closed form; not π_T",
            **NEITHER,
        },
        exactly=lambda m: float(small(m, 0.7 * SMALL_T).norm()),
    ),
}
