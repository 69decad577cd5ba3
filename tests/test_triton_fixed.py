"""The kernels that are not generated: scores in one read, and products at given ids.

As `test_triton.py`: `pytest -m triton tests/test_triton_fixed.py` runs Triton's interpreter on a
CPU, `pytest -m gpu tests/test_triton_fixed.py` a GPU. The measure is torch in float64.
"""

from __future__ import annotations

import pytest
import torch
from support import batches, relative, tiles

import opdsl
from opdsl.emit.kernels import Head, linear_logprobs, linear_score, triton_launch


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles.interpret(monkeypatch)


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA")
    assert triton_launch.available("cuda") == (True, "")
    return "cuda"


# ---- scores ------------------------------------------------------------------------------------------


@pytest.mark.triton
@pytest.mark.parametrize("N, K, V, k", [(0, 2, 40, 3), (1, 1, 33, 1), (5, 0, 64, 2), (7, 6, 301, 64),
                                        (9, 3, 16, 16), (4, 300, 70, None), (3, 2, 300, 299)])  # fmt: skip
def test_scoring_in_one_read(
    N: int, K: int, V: int, k: int | None, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`linear_score` and `linear_logprobs` by the kernel are those of torch in float64."""
    from opdsl.emit.kernels import triton_score

    monkeypatch.setattr(triton_score, "BLOCK", 64)
    g = torch.Generator().manual_seed(N)
    h, w = torch.randn(N, 8, generator=g), torch.randn(V, 8, generator=g) * 2
    ids = torch.randint(0, V, (N, K), generator=g)
    if K > 1:
        ids[:, 1] = ids[:, 0]  # a word asked for twice
    calls = []
    score = triton_score.score
    monkeypatch.setattr(triton_score, "score", lambda *a: calls.append(a) or score(*a))
    more = {"temperature": 1.3, "entropy": True, "chunk": 4}
    got = linear_score(h, Head(w), ids=ids, k=k, **more)
    want = linear_score(h.double(), Head(w.double()), ids=ids, k=k, **more)
    assert bool(calls) == (N > 0 and (k or 0) <= triton_score.MOST)
    for name in ("lse", "logp", "entropy", "top_logp"):
        if getattr(want, name) is not None:
            assert relative(getattr(got, name), getattr(want, name)) <= 2e-6, name
    if k:
        assert got.top_ids.dtype == torch.int64 and torch.equal(got.top_ids, want.top_ids)
    grads = []
    for x, y in ((h, w), (h.double(), w.double())):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        logp, lse, entropy = linear_logprobs(leaves[0], Head(leaves[1]), ids, **more)
        total = logp.sum() + (lse * 0.3).sum() + (entropy**2).sum()
        grads.append(torch.autograd.grad(total, leaves) if N else leaves)
    for x, y in zip(*grads):
        assert relative(x, y.detach()) <= 1e-5


@pytest.mark.triton
def test_words_that_do_not_exist(interpreter: None) -> None:
    """Scores and logits of them are NaN, which the guards report; no memory beyond is touched."""
    from opdsl.emit.kernels import triton_restricted as r
    from opdsl.emit.kernels import triton_score

    ids = torch.tensor([[0, -1, 40, 2**40], [5, 39, -(2**40), 41]])
    bad = (ids < 0) | (ids >= 40)
    found = triton_score.score(torch.randn(2, 40), ids)
    assert torch.equal(torch.isnan(found.logp), bad)
    h, w = torch.randn(2, 8), torch.randn(40, 8)
    assert torch.equal(torch.isnan(r.gather_product(h, w, ids)), bad)
    good, g = torch.where(bad, 0, ids), torch.randn(2, 4)
    want = r.pull_hidden(good, torch.where(bad, 0.0, g), w)
    assert torch.equal(r.pull_hidden(ids, g, w), want)
    a, b = torch.zeros(40, 8), torch.zeros(40, 8)
    r.pull_weight(ids, g, h, a)
    r.pull_weight(good, torch.where(bad, 0.0, g), h, b)
    assert relative(a, b) <= 1e-6


@pytest.mark.triton
def test_the_first_row_stays_its_own(interpreter: None) -> None:
    """The last program has fewer entries than it has room for; a broken row 0 is no filling."""
    from opdsl.emit.kernels import triton_restricted as r

    h = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    h[0] = torch.nan
    into = torch.zeros(40, 8)
    r.pull_weight(torch.tensor([[4], [5], [6]]), torch.ones(3, 1), h, into)
    assert torch.equal(into[5:7], h[1:]) and bool(torch.isnan(into[4]).all())


@pytest.mark.triton
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [0, 1, 7, 64])
def test_scores(kind: torch.dtype, k: int, interpreter: None, monkeypatch) -> None:
    from opdsl.emit.kernels import triton_score

    monkeypatch.setattr(triton_score, "BLOCK", 64)
    g = torch.Generator().manual_seed(k)
    z = (8 * torch.randn(5, 301, generator=g)).to(kind)
    ids = torch.randint(0, 301, (5, 6), generator=g)
    found = triton_score.score(z, ids, k, temperature=1.5)
    logp = torch.log_softmax(z.double() / 1.5, -1)
    assert relative(found.lse, torch.logsumexp(z.double() / 1.5, -1)) <= 1e-6
    assert relative(found.entropy, -(logp.exp() * logp).sum(-1)) <= 1e-5
    assert relative(found.logp, logp.gather(1, ids)) <= 1e-6
    if k:
        assert found.top_ids is not None
        best = logp.topk(k).values
        assert relative(found.top_logp, best) <= 1e-6
        assert relative(logp.gather(1, found.top_ids), best) <= 1e-12
        assert all(len(set(row.tolist())) == k for row in found.top_ids)


@pytest.mark.triton
def test_scores_with_log_zero(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words without probability, a whole block of them first."""
    from opdsl.emit.kernels import triton_score

    monkeypatch.setattr(triton_score, "BLOCK", 16)
    z = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    z[:, :20] = -torch.inf
    ids = torch.tensor([[0, 30]] * 3)
    found = triton_score.score(z, ids, 4)
    p = torch.distributions.Categorical(logits=z[:, 20:].double())
    assert relative(found.entropy, p.entropy()) <= 1e-6
    assert bool((found.logp[:, 0] == -torch.inf).all())
    assert relative(found.logp[:, 1], p.logits[:, 10]) <= 1e-6
    assert relative(found.top_logp, p.logits.topk(4).values) <= 1e-6


@pytest.mark.triton
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_restricted_products(kind: torch.dtype, interpreter: None) -> None:
    """Logits at ids and both adjoints; one id asked for by every row, one never."""
    from opdsl.emit.kernels import triton_restricted as r

    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(9, 70, generator=g).to(kind), torch.randn(40, 70, generator=g).to(kind)
    ids = torch.randint(0, 39, (9, 19), generator=g)
    ids[:, 0] = 7
    c = torch.randn(9, 19, generator=g)
    hd, wd, cd = h.double(), w.double(), c.double()
    z = torch.einsum("nkh,nh->nk", wd[ids], hd)
    assert relative(r.gather_product(h, w, ids), z) <= 1e-6
    assert relative(r.pull_hidden(ids, c, w), torch.einsum("nkh,nk->nh", wd[ids], cd)) <= 1e-6
    outer = (cd[:, :, None] * hd[:, None]).flatten(0, 1)
    want = torch.ones(40, 70, dtype=torch.float64).index_add_(0, ids.flatten(), outer)
    into = torch.ones(40, 70)
    r.pull_weight(ids, c, h, into)
    assert relative(into, want) <= 1e-6


@pytest.mark.triton
def test_restricted_loss(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan class S0 with kernels for its products."""
    from opdsl.emit.kernels import linear_restricted
    from opdsl.emit.kernels.triton_restricted import GatheredByKernel

    monkeypatch.setattr(linear_restricted, "Gathered", GatheredByKernel)
    m = opdsl.load("topk_match")
    inputs = batches.as_hidden(batches.draw(3, V=40))
    oracle = m.reference(batches.logits(inputs)[0])
    batch, leaves = batches.hidden(inputs, torch.float32)
    loss = m.loss(batch).loss
    got_h, got_w = torch.autograd.grad(loss, leaves)
    want_w = torch.einsum("btv,bth->vh", oracle.grad_logits, inputs.hidden_BTH)
    assert relative(loss.detach(), oracle.loss) <= 1e-5
    assert relative(got_h, oracle.grad_logits @ inputs.weight_VH) <= 1e-5
    assert relative(got_w, want_w) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N, K, V, k", [(300, 7, 5003, 64), (1, 1, 33, 1), (70, 64, 151936, 200)])
def test_scoring_on_a_gpu(N: int, K: int, V: int, k: int, kind: torch.dtype, gpu: str) -> None:
    g = torch.Generator().manual_seed(N)
    h, w = torch.randn(N, 16, generator=g).to(kind), torch.randn(V, 16, generator=g).to(kind)
    ids = torch.randint(0, V, (N, K), generator=g)
    more = {"k": k, "temperature": 1.3, "entropy": True}
    want = linear_score(h.double(), Head(w.double()), ids=ids, **more)
    got = linear_score(h.to(gpu), Head(w.to(gpu)), ids=ids.to(gpu), **more)
    for name in ("lse", "logp", "entropy", "top_logp"):
        assert relative(getattr(got, name).cpu(), getattr(want, name)) <= 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_products_of_given_ids_on_a_gpu(kind: torch.dtype, gpu: str) -> None:
    from opdsl.emit.kernels import triton_restricted as r

    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 1100, generator=g).to(kind) for n in (300, 900))
    ids = torch.randint(0, 900, (300, 65), generator=g)
    ids[:, 0] = 7
    c = torch.randn(300, 65, generator=g)
    rows = w.double()[ids]
    on = [x.to(gpu) for x in (ids, c, h, w)]
    z = r.gather_product(on[2], on[3], on[0]).cpu()
    assert relative(z, torch.einsum("nkh,nh->nk", rows, h.double())) <= 1e-5
    dh = r.pull_hidden(on[0], on[1], on[3]).cpu()
    assert relative(dh, torch.einsum("nkh,nk->nh", rows, c.double())) <= 1e-5
    into = torch.zeros(900, 1100, device=gpu)
    r.pull_weight(on[0], on[1], on[2], into)
    outer = (c.double()[:, :, None] * h.double()[:, None]).flatten(0, 1)
    want = torch.zeros(900, 1100, dtype=torch.float64).index_add_(0, ids.flatten(), outer)
    assert relative(into.cpu(), want) <= 1e-5
