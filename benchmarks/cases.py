"""The rows of the head tables: a spec, its floor, its peers, its targets.

A target is (measure, against, bound): `time` is ours / floor or ours / another variant and must
be at most the bound, `speedup` is another variant's time over ours and must be at least it,
`peak` is in MB and must be at most it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from benchmarks import peers
from benchmarks.shapes import Data

Peer = Callable[[Data, Tensor, Tensor], Tensor]
Target = tuple[str, str, float]


@dataclass(frozen=True)
class Case:
    """One row. heads: teachers' products in the floor, None: it has none.

    own: other rows of ours timed beside it (for ratios to ourselves).
    """

    name: str
    heads: int | None
    peers: Mapping[str, Peer]
    targets: Mapping[str, tuple[Target, ...]]
    own: tuple[str, ...] = ()
    tau: Callable[[Data], float] | None = None
    slow: tuple[str, ...] = ()  # peers left out of --quick and of shape C
    shapes: tuple[str, ...] = field(default=("A", "B"))


def everywhere(*targets: Target) -> dict[str, tuple[Target, ...]]:
    return {"": targets}


def dense(name: str, beta: float, bound: float, c_rows: bool = False) -> Case:
    liger = {"Liger compiled": partial(_liger, beta, True)}
    if c_rows:
        liger["Liger"] = partial(_liger, beta, False)
    common = (
        ("time", "floor", bound),
        ("speedup", "TRL", 2.2),
        ("speedup", "Liger compiled", 1.1),
    )
    targets = {"A": (*common, ("peak", "", 300.0)), "B": common, "C": common}
    return Case(
        name,
        1,
        {
            "naive": partial(_dense, peers.naive_dense, beta),
            "TRL": partial(_dense, peers.trl_dense, beta),
            **liger,
        },
        targets,
        slow=("Liger compiled", "Liger", *(("TRL",) if c_rows else ())),
        shapes=("A", "B", "C") if c_rows else ("A", "B"),
    )


def _dense(f, beta: float, data: Data, h: Tensor, W: Tensor) -> Tensor:
    return f(data, beta, h, W)


def _liger(beta: float, compiled: bool, data: Data, h: Tensor, W: Tensor) -> Tensor:
    return peers.liger_dense(data, beta, compiled, h, W)


def _torch_lce(data: Data, h: Tensor, W: Tensor) -> Tensor:
    return peers.sampled(data, partial(peers.logprob_torch, data.shape.chunk), h, W)


def _sampled(logprob, data: Data, h: Tensor, W: Tensor) -> Tensor:
    return peers.sampled(data, logprob, h, W)


def _topk(tail: str, logprob, data: Data, h: Tensor, W: Tensor) -> Tensor:
    return peers.topk(data, tail, logprob, h, W)


def _renormalised(data: Data, h: Tensor, W: Tensor) -> Tensor:
    return peers.renormalised(data, peers.logprob_naive, h, W)


def _routed(data: Data, h: Tensor, W: Tensor) -> Tensor:
    return peers.routed(data, 32, h, W)


def _known(data: Data, h: Tensor, W: Tensor) -> Tensor:
    return peers.gated_dense(data, ~data.special, 0.0, h, W)


def _of_student(data: Data, h: Tensor, W: Tensor) -> Tensor:
    return peers.gated_dense(data, None, student_tau(data), h, W)


def _coupled(kind: str, logprob, data: Data, h: Tensor, W: Tensor) -> Tensor:
    return peers.coupled(data, kind, logprob, h, W)


def _rollout_returns(data: Data, h: Tensor, W: Tensor) -> Tensor:
    logp = peers.logprob_naive(h, W, data.y[:, None])[:, 0]
    r = data.seqs(data.logp_y - data.rollout_y)
    return -(peers.returns(r).flatten() * logp).mean()


def student_tau(data: Data) -> float:
    """The entropy that one row in five exceeds."""
    return float(data.entropy.quantile(0.8))


def teacher_tau(data: Data) -> float:
    return float(data.teacher_entropy.median())


PARTS = ("dense", "score", "reference", "sft")


def _hybrid(kernels, data: Data, h: Tensor, W: Tensor) -> Tensor:
    return peers.hybrid(data, teacher_tau(data), PARTS, kernels, h, W)


def s1(bound: float, *more: Target) -> dict[str, tuple[Target, ...]]:
    return {
        "A": (("time", "floor", bound), *more, ("peak", "", 170.0)),
        "B": (("time", "floor", bound), *more, ("peak", "", 250.0)),
    }


def coupled(name: str, kind: str) -> Case:
    return Case(
        name,
        0,
        {
            "naive": partial(_coupled, kind, peers.logprob_naive),
            "Liger": partial(_coupled, kind, peers.logprob_liger),
            "TRL": partial(_coupled, kind, peers.logprob_trl),
        },
        everywhere(("time", "ours: sampled", 1.36)),
        own=("sampled",),
        slow=("TRL", "Liger"),
        shapes=("A",) if kind != "whitened" else ("A", "B"),
    )


CASES = (
    dense("reverse KL", 1.0, 1.15),
    dense("forward KL", 0.0, 1.15),
    dense("JSD", 0.5, 1.25, c_rows=True),
    Case(
        "sampled",
        0,
        {
            "naive": partial(_sampled, peers.logprob_naive),
            "selective": partial(_sampled, peers.logprob_selective),
            "TRL": partial(_sampled, peers.logprob_trl),
            "Liger": partial(_sampled, peers.logprob_liger),
            "torch linear_cross_entropy": _torch_lce,
        },
        s1(1.10, ("speedup", "TRL", 2.0), ("speedup", "Liger", 1.5)),
        slow=("selective", "torch linear_cross_entropy"),
    ),
    Case(
        "top-64 truncated",
        0,
        {
            "naive": partial(_topk, "drop", peers.logprob_naive),
            "selective": partial(_topk, "drop", peers.logprob_selective),
        },
        s1(1.20),
        slow=("selective",),
    ),
    Case(
        "top-64 tail bin",
        0,
        {
            "naive": partial(_topk, "bin", peers.logprob_naive),
            "TRL": peers.topk_checkpoint,
        },
        s1(1.20, ("speedup", "TRL", 2.0)),
        slow=(),
    ),
    Case("routed", 0, {"naive": _routed}, s1(1.20)),
    Case(
        "top-64 renormalised",
        None,
        {"naive": _renormalised, "full logits": peers.renormalised_logits},
        {"A": (("speedup", "naive", 10.0),), "B": (("speedup", "naive", 15.0),)},
        slow=("full logits",),
    ),
    Case(
        "gate known",
        None,
        {"naive": _known, "rows picked by hand": peers.picked_dense},
        everywhere(("speedup", "naive", 4.0)),
        slow=("rows picked by hand",),
    ),
    Case(
        "gate of student",
        None,
        {"naive": _of_student},
        everywhere(("speedup", "naive", 1.8)),
        tau=student_tau,
    ),
    Case(
        "returns of rollout",
        0,
        {"naive": _rollout_returns},
        everywhere(("time", "ours: sampled", 1.1)),
        own=("sampled",),
        shapes=("A",),
    ),
    coupled("whitened returns", "whitened"),
    coupled("GAE", "gae"),
    coupled("group norm", "group"),
    Case(
        "hybrid",
        1,
        {
            "naive": partial(_hybrid, (peers.naive_per_token, peers.logprob_naive)),
            "peers' sum": partial(_hybrid, (peers.trl_per_token, peers.logprob_liger)),
        },
        everywhere(("time", "ours: reverse KL", 1.3), ("speedup", "peers' sum", 3.0)),
        own=("reverse KL",),
        tau=teacher_tau,
        slow=("peers' sum",),
    ),
    Case(
        "hybrid, one teacher",
        1,
        {},
        {},
        tau=teacher_tau,
        shapes=("A",),
    ),
)

BY_NAME = {c.name: c for c in CASES}
