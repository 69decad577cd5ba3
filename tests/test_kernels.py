"""The fused primitives against float64 autograd of the formula they compute.

Shapes: N rows, K candidates, H hidden, V vocabulary, R weight rows (V plus padding).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opdsl.emit.kernels import Head, linear_logprobs, linear_rowwise, linear_score

torch.set_num_threads(1)

N, H, V, K, PADDING = 37, 16, 50, 5, 3
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3, "bias": True},
    "soft cap": {"soft_cap": 2.5},
    "padded": {"vocab": V},
    "everything": {"bias": True, "scale": 1.7, "soft_cap": 3.0, "vocab": V},
}


def case(kind: str = "plain", dtype=torch.float32, seed=0, rows=N, width=V, size=H, spread=2.0):
    """(hidden [rows, size], Head) of seeded normal numbers, logits of about `spread`."""
    options = dict(HEADS[kind])
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    total = width + (PADDING if "vocab" in options else 0)
    hidden = draw(rows, size).to(dtype)
    weight = (draw(total, size) * spread / math.sqrt(size)).to(dtype)
    bias = draw(total).to(dtype) if options.pop("bias", False) else None
    if "vocab" in options:
        options["vocab"] = width
    for leaf in (hidden, weight, bias):
        if leaf is not None:
            leaf.requires_grad_()
    return hidden, Head(weight, bias, **options)


def exact(hidden: Tensor, head: Head):
    """Float64 leaves (hidden, weight, bias) and the naive logits [N, V] behind them."""
    leaves = [
        None if t is None else t.detach().double().requires_grad_()
        for t in (hidden, head.weight, head.bias)
    ]
    h, weight, bias = leaves
    z = h @ weight.T
    if bias is not None:
        z = z + bias
    z = z * head.scale
    if head.soft_cap is not None:
        z = head.soft_cap * torch.tanh(z / head.soft_cap)
    return leaves, z[:, : head.width]


def error(got: Tensor, want: Tensor) -> float:
    """Largest absolute error over the largest magnitude."""
    assert got.shape == want.shape
    return ((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-300)).item()


def assert_gradients(hidden: Tensor, head: Head, leaves: list, tolerance: float = 1e-5) -> None:
    for got, want in zip((hidden, head.weight, head.bias), leaves):
        if want is not None:
            assert got.grad.dtype == got.dtype
            assert error(got.grad, want.grad) <= tolerance


# ---- row programs, closed form and in place, as the compiler writes them ------------------------


def reverse_kl(logits, rows):
    z, u = logits["student"], logits["T"]
    z -= z.logsumexp(1, keepdim=True)
    u -= u.logsumexp(1, keepdim=True)
    gap = torch.sub(z, u, out=u)
    p = z.exp_()
    value = (p * gap).sum(1)
    return value, gap.sub_(value[:, None]).mul_(p), {"mass": p.sum(1)}


def jsd(logits, rows):
    """(1 − β) KL(p ‖ m) + β KL(q ‖ m), m = (1 − β) p + β q, all in the log domain."""
    beta = 0.3
    lp, lq = logits["student"].log_softmax(1), logits["T"].log_softmax(1)
    lm = torch.logaddexp(lp + math.log(1 - beta), lq + math.log(beta))
    p, inner = lp.exp(), lp - lm
    kl = (p * inner).sum(1)
    value = (1 - beta) * kl + beta * (lq.exp() * (lq - lm)).sum(1)
    return value, (1 - beta) * p * (inner - kl[:, None]), {}


def sampled(logits, rows):
    z, y, a = logits["student"], rows["token"][:, None], rows["advantage"]
    z -= z.logsumexp(1, keepdim=True)
    value = -a * z.gather(1, y).squeeze(1)
    z.exp_().mul_(a[:, None]).scatter_add_(1, y, -a[:, None])
    return value, z, {}


def tail_bin(logits, rows):
    """KL(T ‖ student) on the teacher's top k plus one bin for everything else."""
    z, ids, lq = logits["student"], rows["ids"], rows["logq"]
    q = lq.exp()
    q_tail = (1 - q.sum(1)).clamp_min(1e-12)
    z -= z.logsumexp(1, keepdim=True)
    lp = z.gather(1, ids)
    p_tail = -torch.expm1(lp.logsumexp(1).clamp_max(-1e-7))
    value = (q * (lq - lp)).sum(1) + q_tail * (q_tail.log() - p_tail.log())
    sparse = lp.exp() * (q_tail / p_tail)[:, None] - q
    z.exp_().mul_(-sparse.sum(1, keepdim=True)).scatter_add_(1, ids, sparse)
    return value, z, {"tail": p_tail}


def naive(name: str, z: Tensor, u: Tensor, rows: dict[str, Tensor]) -> Tensor:
    """The same losses as textbook float64 formulas, value per row."""
    lp, lq = z.log_softmax(1), u.log_softmax(1)
    p, q = lp.exp(), lq.exp()
    if name == "reverse_kl":
        return (p * (lp - lq)).sum(1)
    if name == "jsd":
        m = 0.7 * p + 0.3 * q
        return 0.7 * (p * (lp - m.log())).sum(1) + 0.3 * (q * (lq - m.log())).sum(1)
    if name == "sampled":
        return -rows["advantage"].double() * lp.gather(1, rows["token"][:, None]).squeeze(1)
    lqk = rows["logq"].double()
    qk, pk = lqk.exp(), p.gather(1, rows["ids"])
    q_tail, p_tail = 1 - qk.sum(1), 1 - pk.sum(1)
    return (qk * (lqk - pk.log())).sum(1) + q_tail * (q_tail / p_tail).log()


PROGRAMS = {"reverse_kl": reverse_kl, "jsd": jsd, "sampled": sampled, "tail_bin": tail_bin}


def row_data(rows: int = N, width: int = V) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    logq, ids = torch.randn(rows, width, generator=generator).mul(2).log_softmax(1).topk(K)
    return {
        "token": torch.randint(width, (rows,), generator=generator),
        "advantage": torch.randn(rows, generator=generator),
        "ids": ids,
        "logq": logq,
    }


# ---- values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
def test_head_logits(kind):
    hidden, head = case(kind)
    _, z = exact(hidden, head)
    buffer = torch.full((N + 4, head.width), math.nan)
    got = head.logits(hidden, out=buffer)
    assert got.data_ptr() == buffer.data_ptr() and not got.requires_grad
    assert error(got, z) <= 1e-6 and error(head.logits(hidden), z) <= 1e-6


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_logprobs(kind, entropy, chunk):
    hidden, head = case(kind)
    ids = torch.randint(V, (N, K), generator=torch.Generator().manual_seed(1))
    ids[:, 1] = ids[:, 0]  # a repeated candidate counts twice
    leaves, z = exact(hidden, head)
    lp = (z / 0.8).log_softmax(1)
    wants = [lp.gather(1, ids), (z / 0.8).logsumexp(1), -(lp.exp() * lp).sum(1)]
    gots = linear_logprobs(hidden, head, ids, temperature=0.8, entropy=entropy, chunk=chunk)
    generator = torch.Generator().manual_seed(2)
    loss, target = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for got, want in zip(gots, wants):
        if got is not None:
            weight = torch.randn(got.shape, generator=generator)
            assert got.dtype == torch.float32 and error(got, want) <= 1e-5
            loss, target = loss + (weight * got).sum(), target + (weight.double() * want).sum()
    assert (gots[2] is None) is not entropy
    loss.backward()
    target.backward()
    assert_gradients(hidden, head, leaves)
    assert not head.weight.grad[head.width :].any()


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("kind", ["plain", "everything"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_rowwise(name, kind, chunk):
    hidden, head = case(kind)
    teacher_hidden, teacher = case("soft cap", seed=3, size=H + 4)
    rows = row_data()
    leaves, z = exact(hidden, head)
    want = naive(name, z, exact(teacher_hidden, teacher)[1].detach(), rows)
    total, values, _ = linear_rowwise(
        hidden,
        head,
        PROGRAMS[name],
        rows=rows,
        others={"T": (teacher_hidden, teacher)},
        chunk=chunk,
    )
    assert total.requires_grad and not values.requires_grad and values.dtype == torch.float32
    assert error(values, want) <= 1e-5 and error(total, want.sum()) <= 1e-5
    (total * 0.37).backward()
    (want.sum() * 0.37).backward()
    assert_gradients(hidden, head, leaves)
    assert not head.weight.grad[head.width :].any()
    assert teacher_hidden.grad is None and teacher.weight.grad is None


def test_tail_bin_by_autograd_behind_the_logprobs():
    hidden, head = case("bias")
    rows = row_data()
    leaves, z = exact(hidden, head)
    want = naive("tail_bin", z, z, rows).sum()
    lp, _, _ = linear_logprobs(hidden, head, rows["ids"], chunk=9)
    q = rows["logq"].exp()
    tail = 1 - q.sum(1)
    log_p_tail = torch.log(-torch.expm1(lp.logsumexp(1)))
    loss = (q * (rows["logq"] - lp)).sum() + (tail * (tail.log() - log_p_tail)).sum()
    loss.backward()
    want.backward()
    assert error(loss, want) <= 1e-5
    assert_gradients(hidden, head, leaves)


@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_gradcheck_in_float64(kind):
    hidden, head = case(kind, torch.float64, rows=4, width=6, size=3)
    teacher = torch.randn(4, 6, dtype=torch.float64)
    ids = torch.tensor([[0, 5], [1, 1], [2, 3], [4, 0]])
    options = {"scale": head.scale, "soft_cap": head.soft_cap, "vocab": head.vocab}

    def both(h, weight, bias=None):
        this = Head(weight, bias, **options)
        lp, lse, ent = linear_logprobs(h, this, ids, temperature=1.3, entropy=True, chunk=3)
        return lp, lse, ent, linear_rowwise(h, this, jsd, others={"T": teacher}, chunk=3)[0]

    inputs = [t for t in (hidden, head.weight, head.bias) if t is not None]
    assert torch.autograd.gradcheck(both, inputs)


def test_bfloat16_inputs_keep_float32_logits():
    """Against float64 from the same bfloat16 numbers; the yardstick rounds the logits."""
    hidden, head = case("plain", torch.bfloat16, rows=64, width=2048, size=64, spread=3.0)
    noise = torch.randn(2048, 64, generator=torch.Generator().manual_seed(5)) * 0.02
    teacher = Head((head.weight.detach().float() + noise).bfloat16())
    leaves, z = exact(hidden, head)
    u = exact(hidden, teacher)[1].detach()
    naive("reverse_kl", z, u, {}).sum().backward()
    total, _, _ = linear_rowwise(
        hidden, head, reverse_kl, others={"T": (hidden, teacher)}, chunk=16
    )
    total.backward()
    rounded = [t.detach().clone().requires_grad_() for t in (hidden, head.weight)]
    z_low, u_low = rounded[0] @ rounded[1].T, hidden.detach() @ teacher.weight.T
    naive("reverse_kl", z_low.float(), u_low.float(), {}).sum().backward()
    for got, low, want in zip((hidden, head.weight), rounded, leaves):
        assert got.grad.dtype == torch.bfloat16

        def distance(t, want=want):
            return ((t.grad.double() - want.grad).norm() / want.grad.norm()).item()

        assert distance(got) <= 3e-3
        assert distance(got) <= distance(low) / 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logprobs(dtype):
    hidden, head = case("everything", dtype, spread=4.0)
    ids = torch.randint(V, (N, K), generator=torch.Generator().manual_seed(1))
    leaves, z = exact(hidden, head)
    want = z.log_softmax(1).gather(1, ids)
    got, _, _ = linear_logprobs(hidden, head, ids, chunk=10)
    assert got.dtype == torch.float32 and error(got, want) <= 1e-5
    got.sum().backward()
    want.sum().backward()
    assert_gradients(hidden, head, leaves, tolerance=5e-3)


# ---- rows, gates, edges -------------------------------------------------------------------------


def test_inactive_rows_are_exact_zeros_whatever_they_hold():
    hidden, head = case("bias")
    teacher_hidden, teacher = case("plain", seed=3)
    active = torch.arange(N) % 3 == 0
    leaves, z = exact(hidden, head)
    u = exact(teacher_hidden, teacher)[1].detach()
    naive("reverse_kl", z, u, {})[active].sum().backward()
    with torch.no_grad():
        hidden[~active] = math.nan
        teacher_hidden[~active] = math.inf
    total, values, extras = linear_rowwise(
        hidden,
        head,
        reverse_kl,
        others={"T": (teacher_hidden, teacher)},
        active=active,
        chunk=5,
    )
    total.backward()
    assert_gradients(hidden, head, leaves)
    for zero in (values, extras["mass"], hidden.grad):
        assert (zero[~active] == 0).all() and not zero.signbit()[~active].any()


def test_untouched_rows_are_left_out_of_the_logprob_backward():
    hidden, head = case("soft cap")
    ids = torch.randint(V, (N, K), generator=torch.Generator().manual_seed(1))
    keep = torch.arange(N) % 4 == 1
    leaves, z = exact(hidden, head)
    z.log_softmax(1).gather(1, ids)[keep].sum().backward()
    with torch.no_grad():
        hidden[~keep] = math.nan
    logp, _, entropy = linear_logprobs(hidden, head, ids, entropy=True, chunk=4)
    (logp[keep].sum() + 0 * entropy[keep].sum()).backward()
    assert_gradients(hidden, head, leaves)
    assert (hidden.grad[~keep] == 0).all()


def test_no_rows():
    hidden, head = case("everything", rows=0)
    others = {"T": torch.zeros(0, V)}
    for dtype in (torch.float32, torch.bfloat16):
        h, w = hidden.to(dtype), Head(head.weight.to(dtype), head.bias.to(dtype), vocab=V)
        total, values, extras = linear_rowwise(h, w, reverse_kl, others=others)
        logp, lse, entropy = linear_logprobs(
            h, w, torch.zeros(0, K, dtype=torch.int64), entropy=True
        )
        assert total == 0 and values.shape == (0,) and extras["mass"].shape == (0,)
        assert logp.shape == (0, K) and lse.shape == entropy.shape == (0,)
        (total + logp.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, H) and not head.weight.grad.any() and not head.bias.grad.any()


def test_strided_nonleaf_hidden_and_no_candidates():
    base, head = case(rows=2 * N, size=H)
    hidden = (base * 1.0)[::2]
    assert not hidden.is_contiguous() and not hidden.is_leaf
    (base_exact, weight, _), z = exact(base, head)
    (z[::2].logsumexp(1).sum() * 2).backward()
    logp, lse, _ = linear_logprobs(hidden, head, torch.zeros(N, 0, dtype=torch.int64), chunk=11)
    assert logp.shape == (N, 0)

    def lse_program(logits, rows):
        z = logits["student"]
        value = z.logsumexp(1)
        return value, z.softmax(1), {}

    total, _, _ = linear_rowwise(hidden, head, lse_program, chunk=11)
    (lse.sum() + total).backward()
    assert_gradients(base, head, [base_exact, weight, None])


def test_self_teacher_shares_the_head_and_gets_no_gradient():
    hidden, head = case("everything")
    hint = case("everything", seed=9)[0]
    leaves, z = exact(hidden, head)
    u = exact(hint, head)[1].detach()
    naive("jsd", z, u, {}).sum().backward()
    total, _, _ = linear_rowwise(hidden, head, jsd, others={"T": (hint, head)}, chunk=10)
    total.backward()
    assert_gradients(hidden, head, leaves)
    assert hint.grad is None


def test_given_teacher_logits_survive_an_in_place_program():
    hidden, head = case()
    teacher = torch.randn(N, V)
    before = teacher.clone()
    linear_rowwise(hidden, head, reverse_kl, others={"T": teacher})
    assert torch.equal(teacher, before)


def test_autocast_rounds_nothing():
    hidden, head = case()
    rows, ids = row_data(), row_data()["ids"]
    plain = linear_rowwise(hidden, head, sampled, rows=rows)[1]
    logp = linear_logprobs(hidden, head, ids)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, values, _ = linear_rowwise(hidden, head, sampled, rows=rows)
        logp_auto, _, _ = linear_logprobs(hidden, head, ids)
        assert torch.equal(values, plain) and torch.equal(logp_auto, logp)
        (total + logp_auto.sum()).backward()
    assert hidden.grad.dtype == torch.float32


def test_backward_twice():
    hidden, head = case()
    for loss in (
        linear_rowwise(hidden, head, sampled, rows=row_data())[0],
        linear_logprobs(hidden, head, row_data()["ids"])[0].sum(),
    ):
        hidden.grad = None
        loss.backward(retain_graph=True)
        once = hidden.grad.clone()
        loss.backward()
        assert torch.allclose(hidden.grad, 2 * once)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_nothing_is_differentiated_without_need():
    hidden, head = case()
    frozen = Head(head.weight.detach())
    linear_rowwise(hidden, frozen, sampled, rows=row_data())[0].backward()
    linear_logprobs(hidden, frozen, row_data()["ids"])[0].sum().backward()
    assert hidden.grad is not None
    assert not linear_rowwise(hidden.detach(), frozen, sampled, rows=row_data())[0].requires_grad
    with torch.no_grad():
        assert not linear_rowwise(hidden, head, sampled, rows=row_data())[0].requires_grad
        assert not linear_logprobs(hidden, head, row_data()["ids"])[0].requires_grad

    def constant(logits, rows):
        return logits["student"].amax(1), None, {}

    total, _, _ = linear_rowwise(hidden, head, constant)
    total.backward()
    assert head.weight.grad is not None and not head.weight.grad.any()


def test_score():
    hidden, head = case("everything")
    ids = row_data()["ids"]
    z = exact(hidden, head)[1].detach() / 1.4
    lp = z.log_softmax(1)
    score = linear_score(hidden, head, ids=ids, k=4, entropy=True, temperature=1.4, chunk=6)
    top = lp.topk(4)
    assert torch.equal(score.top_ids, top.indices)
    assert error(score.top_logp, top.values) <= 1e-5
    assert error(score.logp, lp.gather(1, ids)) <= 1e-5
    assert error(score.lse, z.logsumexp(1)) <= 1e-5
    assert error(score.entropy, -(lp.exp() * lp).sum(1)) <= 1e-5
    bare = linear_score(hidden, head)
    assert bare.logp is bare.top_ids is bare.top_logp is bare.entropy is None
    assert not bare.lse.requires_grad


# ---- numerics and memory ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_logit_spread_of_400(name):
    hidden, head = case(spread=400 / 6)
    with torch.no_grad():
        hidden *= 4  # logits up to about ±1000, differences far beyond 400
    assert head.logits(hidden).aminmax().max > 400
    total, values, _ = linear_rowwise(
        hidden, head, PROGRAMS[name], rows=row_data(), others={"T": torch.randn(N, V) * 130}
    )
    logp, lse, entropy = linear_logprobs(hidden, head, row_data()["ids"], entropy=True)
    (total + logp.mean() + lse.mean() + entropy.mean()).backward()
    for tensor in (values, logp, lse, entropy, hidden.grad, head.weight.grad):
        assert torch.isfinite(tensor).all()


def test_forbidden_words_and_common_offsets():
    """A −inf bias removes a word; an offset of 1e4 common to all words changes nothing."""
    hidden, head = case()
    bias = torch.zeros(V)
    bias[3] = -math.inf
    ids = torch.tensor([[0, 1]] * N)
    outputs = []
    for offset in (0.0, 8192.0):  # a power of two, and few bits in the logits: sums stay exact
        h = (hidden.detach() * 8).round().div(8).requires_grad_()
        w = Head((head.weight.detach() * 16).round().div(16), bias + offset)
        logp, _, entropy = linear_logprobs(h, w, ids, entropy=True)
        (logp.sum() + entropy.sum()).backward()
        outputs.append((logp, entropy, h.grad))
    for plain, moved in zip(*outputs):
        assert torch.isfinite(plain).all()
        assert error(moved.detach(), plain.detach().double()) <= 1e-6


class Largest(TorchDispatchMode):
    """Bytes of the largest new storage any operator returned, and the number of operators."""

    def __init__(self, *inputs: Tensor):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in inputs}
        self.bytes = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self.known:  # not a view of an input
                    self.bytes = max(self.bytes, storage.nbytes())
        return result


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_larger_than_a_tile_or_a_gradient(dtype, frozen):
    rows, width, size, chunk = 512, 4096, 64, 32
    hidden, head = case(dtype=dtype, rows=rows, width=width, size=size)
    if frozen:
        head = Head(head.weight.detach())
    teacher_hidden, teacher = case(dtype=dtype, rows=rows, width=width, size=size, seed=3)
    data = row_data(rows, width)
    tile = 4 * chunk * width
    limit = max(tile, 4 * rows * size, 0 if frozen else 4 * width * size)
    assert limit < 4 * rows * width // 4
    with Largest(hidden, head.weight, teacher_hidden, teacher.weight, *data.values()) as seen:
        total, _, _ = linear_rowwise(
            hidden, head, jsd, others={"T": (teacher_hidden, teacher)}, chunk=chunk
        )
        logp, _, entropy = linear_logprobs(hidden, head, data["ids"], entropy=True, chunk=chunk)
        linear_score(hidden, head, ids=data["ids"], k=K, entropy=True, chunk=chunk)
        forward = seen.calls
        (total + logp.sum() + entropy.sum()).backward()
    assert tile <= seen.bytes <= limit
    assert seen.calls > forward + 10  # the hook saw the backward pass as well


# ---- refusals -----------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    hidden, head = case()
    ids, rows = row_data()["ids"], row_data()
    for call, message in (
        (lambda: Head(torch.zeros(3)), "weight must be"),
        (lambda: Head(torch.zeros(3, 2), torch.zeros(2)), "bias must be"),
        (lambda: Head(torch.zeros(3, 2), vocab=4), "vocab = 4"),
        (lambda: Head(torch.zeros(3, 2), soft_cap=0.0), "soft_cap"),
        (lambda: linear_logprobs(hidden[:, 1:], head, ids), "hidden must be"),
        (lambda: linear_logprobs(hidden, head, ids[1:]), "ids must be"),
        (lambda: linear_logprobs(hidden, head, ids.float()), "integers"),
        (lambda: linear_logprobs(hidden, head, ids, temperature=0.0), "temperature"),
        (lambda: linear_logprobs(hidden, head, ids, chunk=0), "chunk"),
        (lambda: linear_score(hidden, head, k=V + 1), "k = 51"),
        (lambda: linear_rowwise(hidden, head, sampled, rows={"token": ids[1:]}), "token"),
        (lambda: linear_rowwise(hidden, head, jsd, others={"T": torch.zeros(N, V + 2)}), "words"),
        (lambda: linear_rowwise(hidden, head, jsd, others={"student": hidden}), "student"),
        (lambda: linear_rowwise(hidden, head, sampled, rows=rows, active=ids), "active"),
        (
            lambda: linear_rowwise(hidden, head, sampled, rows={"advantage": hidden.sum(1)}),
            "detach it",
        ),
        (
            lambda: linear_rowwise(hidden, head, lambda z, r: (z["student"], None, {})),
            "program value",
        ),
        (
            lambda: linear_rowwise(hidden, head, lambda z, r: (z["student"][:, 0],) * 2 + ({},)),
            "program cotangent",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for wrong in (-1, V):
        with pytest.raises(IndexError, match="vocabulary of 50"):
            linear_logprobs(hidden, head, torch.full((N, 1), wrong))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_equals_float64(dtype):
    hidden, head = case("everything", dtype, rows=96, width=512, size=64)
    teacher_hidden, teacher = case("plain", dtype, rows=96, width=512, size=64, seed=3)
    leaves, z = exact(hidden, head)
    naive("jsd", z, exact(teacher_hidden, teacher)[1].detach(), {}).sum().backward()
    ids = torch.arange(96)[:, None]
    z2 = exact(hidden, head)
    z2[1].log_softmax(1).gather(1, ids).sum().backward()
    on = [t.detach().cuda().requires_grad_() for t in (hidden, head.weight, head.bias)]
    moved = Head(on[1], on[2], head.scale, head.soft_cap, head.vocab)
    pair = (teacher_hidden.detach().cuda(), Head(teacher.weight.detach().cuda()))
    total, _, _ = linear_rowwise(on[0], moved, jsd, others={"T": pair}, chunk=40)
    logp, _, _ = linear_logprobs(on[0], moved, ids.cuda(), chunk=40)
    (total + logp.sum()).backward()
    for got, one, two in zip(on, leaves, z2[0]):
        tolerance = 2e-5 if dtype == torch.float32 else 1e-2
        assert error(got.grad.cpu(), one.grad + two.grad) <= tolerance
