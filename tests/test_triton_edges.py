"""Row kernels at the edges of shapes, their launches, bfloat16, and where none of them run.

As `test_triton.py`: `pytest -m triton tests/test_triton_edges.py` runs Triton's interpreter on a
CPU. The reasons for going without kernels are tested without Triton.
"""

from __future__ import annotations

import pytest
import torch
from support import TOLERANCE, batches, relative, tiles

import opdsl
from opdsl.emit import told, triton_available
from opdsl.emit.kernels import Head, head, triton_launch
from opdsl.emit.kernels.triton_launch import Launcher, number_of


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles.interpret(monkeypatch)


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """No interpreter, and nothing told yet."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(told, "_told", set())
    triton_launch.refused.cache_clear()
    yield
    triton_launch.refused.cache_clear()


# ---- why there are no kernels ----------------------------------------------------------------------


def test_the_reason_is_told_once(
    untold: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (staged,) = opdsl.load("gkd").loss.emitted.staged
    monkeypatch.setattr(triton_available, "version", lambda: None)
    fine, reason = triton_launch.available("cuda")
    assert not fine and "not installed" in reason
    for _ in range(2):
        found = triton_launch.chosen(staged, staged.last, torch.device("cuda"), torch.float32)
        assert found is None
    assert capsys.readouterr().err.count("not installed") == 1
    monkeypatch.setattr(triton_available, "version", lambda: (3, 5))
    assert "older than 3.6" in triton_launch.available("cuda")[1]
    monkeypatch.setattr(triton_available, "version", lambda: (3, 6))
    assert triton_available.reason("cuda:1") == ""
    assert not triton_launch.available("cpu")[0]
    assert triton_launch.chosen(staged, staged.last, torch.device("cpu"), torch.float32) is None
    assert triton_launch.compiled(staged, staged.last) is not None
    assert "no Triton" not in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["compiler", "number"])
def test_a_gpu_where_no_kernel_starts(
    wrong: str, untold: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Triton is there, but its first kernel fails: torch rows, and the reason once."""

    def trial(device: torch.device) -> str:
        if wrong == "number":
            return "a first kernel gave a wrong number"
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(triton_available, "version", lambda: (3, 6))
    monkeypatch.setattr(triton_launch, "trial", trial)
    (staged,) = opdsl.load("gkd").loss.emitted.staged
    for _ in range(2):
        assert not triton_launch.usable(torch.device("cuda"), torch.float32)
        assert (
            triton_launch.chosen(staged, staged.last, torch.device("cuda"), torch.float32) is None
        )
    said = capsys.readouterr().err
    assert said.count("opdsl: no Triton row kernels: a first kernel") == 1
    assert ("Failed to find C compiler." in said) == (wrong == "compiler")
    assert not triton_launch.usable(torch.device("cuda"), torch.float64)
    assert capsys.readouterr().err == ""


def test_a_pass_without_a_kernel(
    untold: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What no kernel computes is named, by the cost report and at the first use."""
    from opdsl.emit.triton_source import Body, Unsupported

    def refuse(self, n):
        raise Unsupported("exp")

    method = opdsl.load("gkd")
    monkeypatch.setattr(triton_available, "version", lambda: (3, 6))
    monkeypatch.setattr(triton_launch, "trial", lambda device: "")
    monkeypatch.setattr(triton_launch, "_compiled", {})
    assert triton_available.reasons(method.compilation.emitted) == []
    monkeypatch.setattr(Body, "simple", refuse)
    (reason,) = triton_available.reasons(method.compilation.emitted)
    assert "no kernel computes exp" in reason
    (staged,) = method.loss.emitted.staged
    assert triton_launch.chosen(staged, staged.last, torch.device("cuda"), torch.float32) is None
    assert capsys.readouterr().err == f"opdsl: no Triton row kernels: {reason}\n"


def test_the_cost_report_says_how_rows_run(untold: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from opdsl.cli.cost import report

    compilation = opdsl.load("gkd").compilation
    shape = "2048,512,32768"
    monkeypatch.setattr(triton_available, "version", lambda: (3, 6))
    assert "row passes  generated Triton kernels" in report(compilation, shape, "h200", "text")
    monkeypatch.setattr(triton_available, "version", lambda: None)
    assert "torch, in place: triton is not" in report(compilation, shape, "h200", "text")
    assert "row passes" not in report(compilation, shape, "cpu", "text")


# ---- launches ----------------------------------------------------------------------------------------


def test_numbers_of_rows_are_float32() -> None:
    """Whatever they come as, and whatever torch's default type is."""
    y = torch.arange(3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for x in (
            2,
            True,
            0.5,
            torch.tensor(1.5).double(),
            torch.ones(3).bool(),
            torch.ones(6)[::2],
        ):
            found = number_of(x, 3, y)
            assert found.dtype == torch.float32 and found.shape == (3,) and found.is_contiguous()
    finally:
        torch.set_default_dtype(before)
    assert number_of(y, 3, y).dtype == torch.int64


def test_tiles_of_other_strides_are_refused() -> None:
    """A copy of a tile would lose what a kernel writes."""
    (staged,) = opdsl.load("gkd").loss.emitted.staged
    pass_ = triton_launch.compiled(staged, staged.last)
    assert pass_ is not None
    kernel, y = pass_.generated.kernels[0], torch.zeros(4, dtype=torch.int64)
    launcher = Launcher(pass_.generated.kernels)
    with pytest.raises(ValueError, match="rows of one piece"):
        launcher.arguments(kernel, [torch.zeros(8, 4).T], [], y)
    with pytest.raises(ValueError, match=r"a tile must be \[4, V\]"):
        launcher.arguments(kernel, [torch.zeros(3, 8)], [], y)


SPEC = """opd 1
method m {{
  state rollouts(student)
  teacher T = external(access = logits)
  support {}
  feedback {}
  aggregate mean(over = tokens)
}}
"""
EDGES = {
    "reverse KL": ("full", "loss KL(student || T)"),
    "JSD": ("full", "loss JSD(T || student, beta = 0.3)"),
    "sampled": ("sampled", "loss k2(student, T)"),
    "top 1": ("top(1, of = T, tail = drop)", "loss KL(T || student)"),
    "top 40": ("top(40, of = T, tail = bin)", "loss KL(T || student)"),
    "union": ("union(top(3, of = T), top(3, of = student), tail = bin)", "loss KL(T || student)"),
}


@pytest.mark.triton
@pytest.mark.parametrize(
    "sizes", [(4, 3, 64), (4, 3, 128), (3, 1, 65), (3, 1, 7), (4, 3, 40), (3, 1, 2)]
)
@pytest.mark.parametrize("name", EDGES)
def test_edges_of_shapes(name: str, sizes: tuple[int, int, int], interpreter: None) -> None:
    """A vocabulary of whole blocks, one word more, less than a block; few rows; more ids than words."""
    B, T, V = sizes
    m = opdsl.compile(SPEC.format(*EDGES[name]))
    for tile in tiles.tiles(m, batches.logits(batches.draw(V, B=B, T=T, V=V, golden=False))[0]):
        want, got = tile.plain(), tile.kernels(block=64)
        assert tiles.error(got, want) <= TOLERANCE["float32"]


@pytest.mark.triton
def test_offsets_beyond_32_bits(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows more than 2^31 entries apart: memory that is asked for and never touched but there."""
    from opdsl.emit.kernels import triton_score

    apart = 2**31 + 64
    try:
        whole = torch.empty(apart + 64, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("this machine gives no 4 GB of untouched memory")
    z = whole.as_strided((2, 40), (apart, 1))
    z.copy_(torch.randn(2, 40, generator=torch.Generator().manual_seed(0)))
    found = triton_score.score(z, torch.tensor([[3], [39]]), 2)
    logp = torch.log_softmax(z.double(), 1)
    assert relative(found.logp[:, 0], logp[[0, 1], [3, 39]]) <= 1e-6
    for tile in tiles.tiles(*_small()):
        for kernel in triton_launch.compiled(tile.staged, tile.stage).generated.kernels:
            assert "row = tl.program_id(0).to(tl.int64)" in kernel.text


def _small():
    method = opdsl.load("gkd")
    return method, batches.logits(batches.draw(0, golden=False))[0]


# ---- the cotangent as bfloat16 -----------------------------------------------------------------------


def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Products of half-precision factors as CUDA has them, in aligned rows; types they were given."""
    seen: list[torch.dtype] = []

    def product(a, b, out, alpha=1.0):
        assert a.dtype == b.dtype and out.dtype == torch.float32
        assert all(max(x.stride()) % 4 == 0 for x in (a, b, out))
        seen.append(a.dtype)
        out.copy_(alpha * (a.float() @ b.float()))

    def add_product(into, a, b, alpha):
        assert a.dtype == b.dtype and into.dtype == torch.float32
        seen.append(a.dtype)
        into.addmm_(a.float(), b.float(), alpha=alpha)

    monkeypatch.setattr(head, "MIXED", ("cpu",))
    monkeypatch.setattr(head, "ALIGN", {"cpu": 64})
    monkeypatch.setattr(head, "product", product)
    monkeypatch.setattr(head, "add_product", add_product)
    return seen


def gradients(
    m, kind: torch.dtype, cap: float | None = None, device: str = "cpu", V: int = 97
) -> list[torch.Tensor]:
    """(loss, d/dhidden, d/dhead) from hidden states rounded to bfloat16, computed in `kind`."""
    x = batches.draw(5, B=4, T=4, V=V, H=16, golden=False)

    def rounded(y: torch.Tensor) -> torch.Tensor:
        return y.bfloat16().to(device, kind)

    h, w = (rounded(y).requires_grad_() for y in (x.hidden_BTH, x.weight_VH))
    th, tw = (rounded(y) for y in x.teacher_hidden["T"])
    batch = opdsl.Batch.from_hidden(
        h, Head(w, scale=1.25, soft_cap=cap, vocab=V - 2),
        teacher_hidden={"T": th}, teacher_head={"T": Head(tw, vocab=V - 2)},
        tokens=(x.tokens_BT % (V - 2)).to(device), mask=x.mask_BT.to(device),
    )  # fmt: skip
    loss = m.loss(batch).loss
    return [y.detach().cpu() for y in (loss, *torch.autograd.grad(loss, (h, w)))]


def bfloat16_spec(loss: str):
    if loss.startswith("reward"):
        return opdsl.compile(SPEC.format("sampled", loss + "\n  credit immediate"))
    return opdsl.compile(SPEC.format("full", loss))


LOSSES = [
    "loss KL(student || T)",
    "loss JSD(T || student, beta = 0.5)",
    "reward logratio(T, student)",
]


@pytest.mark.triton
@pytest.mark.parametrize("cap", [None, 20.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_cotangent_is_written_as_bfloat16(
    loss: str, cap: float | None, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel itself, into what the products read; once rounded, sums in float32."""
    m = bfloat16_spec(loss)
    want = gradients(m, torch.float64, cap)
    seen = on_cpu(monkeypatch)
    copies: list[torch.dtype] = []
    rounded = head.HeadTile._rounded

    def counted(self, cotangent_nV):
        copies.append(cotangent_nV.dtype)
        return rounded(self, cotangent_nV)

    monkeypatch.setattr(head.HeadTile, "_rounded", counted)
    got = gradients(m, torch.bfloat16, cap)
    assert set(seen) == {torch.bfloat16}
    # a slope multiplies the cotangent in float32: it is rounded after that
    assert set(copies) == {torch.float32 if cap else torch.bfloat16}
    assert relative(got[0], want[0]) <= 1e-5
    for x, y in zip(got[1:], want[1:]):
        assert float((x.double() - y).norm() / y.norm()) <= 6e-3  # the interpreter cuts: 2^-8


def test_bfloat16_cotangents_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch rows on such a device: the copy is rounded, and float16 cotangents are not."""
    monkeypatch.setenv("OPDSL_TRITON", "0")
    m = opdsl.compile(SPEC.format("full", LOSSES[0]))
    want = gradients(m, torch.float64)
    on_cpu(monkeypatch)
    got = gradients(m, torch.bfloat16)
    for x, y in zip(got[1:], want[1:]):
        assert float((x.double() - y).norm() / y.norm()) <= 4e-3
    w = torch.zeros(8, 4)
    assert head.takes_low(torch.bfloat16, Head(w.bfloat16()))
    assert not head.takes_low(torch.float16, Head(w.half()))
    assert not head.takes_low(torch.float32, Head(w.bfloat16()))
    assert not head.takes_low(torch.bfloat16, Head(w.bfloat16(), soft_cap=30.0))


@pytest.mark.gpu
@pytest.mark.parametrize("cap", [None, 20.0])
@pytest.mark.parametrize("V", [97, 5003, 8194])
@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_gradients_on_a_gpu(loss: str, V: int, cap: float | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA")
    assert triton_launch.available("cuda") == (True, "")
    m = bfloat16_spec(loss)
    want = gradients(m, torch.float64, cap, V=V)
    got = gradients(m, torch.bfloat16, cap, "cuda", V)
    assert relative(got[0], want[0]) <= 1e-5
    for x, y in zip(got[1:], want[1:]):
        assert float((x.double() - y).norm() / y.norm()) <= 5e-3
