"""Heads and batches spread over processes: the numbers of one process, on real gloo groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import generate, spread, trainers
from support.ranks import Pool

from opdsl.diagnostics import CompileError
from opdsl.emit import sharded
from opdsl.emit.kernels.parallel import VocabShard
from opdsl.meaning.node import Node
from opdsl.resources import methods, specs

SHIPPED = sorted(str(p.relative_to(specs())) for p in methods())
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(3)
    yield made
    made.close()


def spec(body: str, before: str = "", teachers: str = "T = external(access = logits)") -> str:
    lines = "\n".join(f"  teacher   {t}" for t in teachers.split("; "))
    return f"""opd 1
{before}
method probe {{
  state     rollouts(student, group = 2)
{lines}
  {body}
  aggregate mean(over = tokens)
}}
"""


WHITENED = """
def whitened(r : nats per token) : nats per token
  "Return to go with zero mean and unit scale over the batch"
{
  G[t] = r[t] + G[t + 1]
  return (G - mean(G)) / (std(G) + 1e-8)
}
"""
GROUPED = """
def grouped(r : nats per token) : nats per token
  "Return to go, normalised among the group's rollouts at the same position"
{
  G[t] = r[t] + G[t + 1]
  return (G - mean(i in group: G)) / (std(i in group: G) + 0.0001)
}
"""
CASES = {
    "sampled": spec("support sampled feedback reward logratio(T, rollout) credit immediate"),
    "reverse KL": spec("support full feedback loss KL(student || T)"),
    "forward KL": spec("support full feedback loss KL(T || student)"),
    "JSD": spec("support full feedback loss JSD(T || student, beta = 0.3)"),
    "truncated": spec("support top(5, of = T, tail = drop) feedback loss KL(T || student)"),
    "renormalised": spec(
        "support top(5, of = T, tail = renormalize) feedback loss KL(student || T)"
    ),
    "tail bin": spec("support top(5, of = student, tail = bin) feedback loss KL(student || T)"),
    "entropy gate": spec("support full feedback loss KL(student || T) gate H(student) > 2.4 nats"),
    "known gate": spec("support full feedback loss KL(T || student) gate early(2)"),
    "whitened": spec(
        "support sampled feedback reward logratio(T, student) credit whitened", WHITENED
    ),
    "grouped": spec("support sampled feedback reward logratio(T, student) credit grouped", GROUPED),
    "hybrid": spec(
        """term dense { support full    feedback loss KL(student || T)  gate H(T) > 2 nats }
  term score { support sampled feedback reward logratio(S, student) credit return_to_go }""",
        "",
        "T = external(access = logits); S = external(access = logits)",
    ),
}


def check(found: list[dict[str, float]], tolerance: float) -> None:
    worst = {k: max(f[k] for f in found) for k in found[0]}
    assert max(worst.values()) <= tolerance, worst


# ---- a vocabulary in parts -------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_vocabulary_in_parts(pool: Pool, name: str) -> None:
    check(pool(2, spread.vocabulary, CASES[name], "plain"), TOLERANCE["float64"])


@pytest.mark.parametrize("kind", ["frozen", "curved", "barred"])
@pytest.mark.parametrize("name", ["JSD", "renormalised", "whitened", "hybrid"])
def test_heads_of_every_kind(pool: Pool, name: str, kind: str) -> None:
    """Frozen heads (unit gradients), bias, scale and soft cap, a word of probability 0."""
    check(pool(3, spread.vocabulary, CASES[name], kind), TOLERANCE["float64"])


@pytest.mark.parametrize("name", ["cr_opd", "gkd", "verifier_hybrid", "topk_match"])
def test_shipped_methods_in_single_precision(pool: Pool, name: str) -> None:
    check(pool(3, spread.vocabulary, name, "plain", "float32"), TOLERANCE["float32"])


def test_partial_gradients_of_hidden_states(pool: Pool) -> None:
    for name in ("forward KL", "renormalised", "whitened"):
        found = pool(2, spread.vocabulary, CASES[name], "frozen", "float64", True)
        check(found, TOLERANCE["float64"])


# ---- a batch in parts ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["logits", "hidden"])
@pytest.mark.parametrize("name", CASES)
def test_a_batch_in_parts(pool: Pool, name: str, form: str) -> None:
    """Two processes, two micro-batches each, a group that crosses them."""
    found = pool(2, spread.parted, CASES[name], (3,), 2, form)
    check(found, TOLERANCE["float64"])


@pytest.mark.parametrize("name", ["whitened", "grouped", "gae_opd", "verifier_hybrid"])
def test_a_process_without_tokens(pool: Pool, name: str) -> None:
    found = pool(3, spread.parted, CASES.get(name, name), (0, 3))
    check(found, TOLERANCE["float64"])


@pytest.mark.parametrize("name", ["grouped", "tropd"])
def test_batches_that_every_process_makes(pool: Pool, name: str) -> None:
    """Sequences without a group stay alone, and coins differ from process to process."""
    check(pool(2, spread.strangers, CASES.get(name, name)), TOLERANCE["float64"])


# ---- heads that a trainer shards -----------------------------------------------------------------


@pytest.mark.parametrize("how", ["whole", "tied", "own", "teacher"])
def test_heads_under_fsdp(pool: Pool, how: str) -> None:
    """Two micro-batches on each of two processes; one gather for both."""
    for name in ("reverse KL", "renormalised", "grouped"):
        check(pool(2, trainers.fsdp, CASES[name], how, 2), TOLERANCE["float64"])


def test_fsdp_with_a_process_without_tokens(pool: Pool) -> None:
    check(pool(3, trainers.fsdp, CASES["whitened"], "own", 1), TOLERANCE["float64"])


def test_a_head_gathered_in_another_type(pool: Pool) -> None:
    check(pool(2, trainers.fsdp, CASES["sampled"], "half", 1), 1e-5)


def test_a_head_is_gathered_once_per_step(pool: Pool) -> None:
    assert pool(2, trainers.gathers) == [1, 1]


def test_ddp_with_a_process_without_tokens(pool: Pool) -> None:
    check(pool(3, trainers.ddp, CASES["whitened"]), TOLERANCE["float64"])


# ---- the rest ------------------------------------------------------------------------------------


def test_primitives(pool: Pool) -> None:
    check(pool(3, spread.primitives), TOLERANCE["float64"])


def test_refusals(pool: Pool) -> None:
    first, second = pool(2, spread.refusals)
    assert first.keys() == second.keys()
    for name, text in {
        "no word": "rank 1 holds no word: rows 29 to 32 of 29 words",
        "totals": "the ranks of a VocabShard name different totals: [29, 30]",
        "short": "29 words, but the ranks hold 20 rows: 10, 10",
        "vocab": "a sharded head takes its words from VocabShard(total=…), not vocab",
        "whole teacher": "the head of 'T' must be split at the words of the student's: "
        "one head is sharded by words, the other is whole",
        "other split": "the head of 'T' must be split at the words of the student's: "
        "one head is split at ((0, 19), (19, 29)), the other at ((0, 13), (13, 29))",
        "no part": "every process prepares at least one part; an empty batch will do",
    }.items():
        assert first[name] == second[name] == text
    assert first["rows"] == "the shard has 19 rows, its weight 18"
    assert first["token"].startswith("a token outside the vocabulary of 29 entries")


def test_without_processes() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        VocabShard(None, 3, 3)


def test_unknown_operations_are_refused_by_name() -> None:
    """A new operation over the words must be thought about here before it runs in parts."""
    old = next(n for n in nodes("forward KL") if n.op == "sum_v")
    new = Node(old.id, "sg", old.args, old.attrs, old.q)
    writer = sharded.Sharded(*passes("forward KL"))
    with pytest.raises(
        sharded.ShardError, match=r"stop-gradient.*not defined over a vocabulary in parts"
    ):
        writer.statement(new)


def passes(name: str):
    staged = spread.method_of(CASES[name]).compilation.emitted.staged[0]
    return staged, staged.last


def nodes(name: str):
    return passes(name)[1].nodes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["JSD", "renormalised", "tail bin", "whitened"])
def test_nccl(name: str, tmp_path: Path) -> None:
    """One GPU is one process: the calls and types of NCCL, half-precision products included."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/it", rank=0, world_size=1)
    try:
        check([spread.on_gpu(dist.group.WORLD, CASES[name])], 2e-2)
    finally:
        dist.destroy_process_group()


# ---- every shipped method ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_method(pool: Pool, name: str) -> None:
    name = name.rsplit("/", 1)[-1].removesuffix(".opd")
    for kind in ("plain", "barred"):
        check(pool(3, spread.vocabulary, name, kind), TOLERANCE["float64"])
    check(pool(2, spread.parted, name, (3,), 2, "hidden"), TOLERANCE["float64"])
    check(pool(3, spread.parted, name, (0, 3)), TOLERANCE["float64"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_generated_methods(pool: Pool, seed: int) -> None:
    text = generate.spec(seed).text
    try:
        generate.compiled(text)
    except CompileError:
        pytest.skip("the compiler rejects it")
    check(pool(3, spread.vocabulary, text, "barred"), 10 * TOLERANCE["float64"])
    check(pool(3, spread.parted, text, (0, 3)), 10 * TOLERANCE["float64"])


@pytest.mark.slow
def test_parts_of_the_batch_and_of_the_vocabulary() -> None:
    four = Pool(4)
    try:
        for name in ("whitened", "grouped", "hybrid", "renormalised"):
            check(four(4, spread.crossed, CASES[name]), TOLERANCE["float64"])
    finally:
        four.close()
