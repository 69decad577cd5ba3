"""`method.loss.compile()`: the same numbers, one compilation for any number of rows, and a way back."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from support import TOLERANCE, batches, relative

import opdsl
from opdsl.emit import budget, told
from opdsl.emit.compiled import steady, worthwhile
from opdsl.emit.kernels import head
from opdsl.resources import methods

SPEC = """opd 1
method m {{
  state rollouts(student)
  teacher T = external(access = logits)
  support {}
  feedback {}
  {}
  aggregate mean(over = tokens)
}}
"""
DENSE = {
    "JSD": ("full", "loss JSD(T || student, beta = 0.4)", "weight linear(1 -> 0.5 over 4 steps)"),
    "gate": ("full", "loss KL(student || T)", "gate entropy(student) > 2"),
}


@pytest.fixture
def compiler() -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "_told", set())


def inputs(seed: int, T: int, V: int = 5000, names: tuple[str, ...] = ("T",)) -> batches.Inputs:
    return batches.draw(seed, B=3, T=T, V=V, teachers=names, golden=False, step=seed)


def results(m: opdsl.Method, x: batches.Inputs, kind: torch.dtype = torch.float32):
    batch, leaves = batches.hidden(x, kind)
    loss = m.loss(batch).loss
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSE)
def test_the_same_numbers_compiled_once(
    name: str, compiler: None, untold: None, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """In chunks, strips and shorter last ones, at another step: one kind of input, one program.

    The measure is float64, as for the passes as they are: sums over 5000 words keep their digits.
    """
    monkeypatch.setitem(head.CHUNK_RANGE, "cpu", (8, 8))
    monkeypatch.setitem(budget.STRIP_BYTES, "dense", 4 * 5000 * 3)  # three rows
    m, plain = (opdsl.compile(SPEC.format(*DENSE[name])) for _ in range(2))
    assert m.loss.compile() is m.loss
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step, T in ((0, 9), (1, 9), (2, 8), (3, 6)):
        x = inputs(step, T)
        want, eager = results(plain, x, torch.float64), results(plain, x)
        for got, as_is, exact in zip(results(m, x), eager, want):
            assert relative(got, exact) <= max(1e-6, 2 * relative(as_is, exact))
    (made,) = m.loss.compiled.values()
    assert not made.reason and capsys.readouterr().err == ""
    made_of = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert made_of <= 2  # one row alone is a program of its own


def test_only_passes_that_compute_with_entries() -> None:
    """Exponentials and their sum gain nothing; neither does a short list."""
    cases = {
        True: (DENSE["JSD"], DENSE["gate"], ("full", "loss KL(T || student)", "")),
        False: (
            ("sampled", "reward logratio(T, student)", "credit immediate"),
            ("top(5, of = T, tail = bin)", "loss KL(T || student)", ""),
        ),
    }
    for wanted, specs in cases.items():
        for spec in specs:
            (staged,) = opdsl.compile(SPEC.format(*spec)).loss.emitted.staged
            assert worthwhile(staged.last) is wanted, spec


def test_a_pass_that_cannot_be_compiled_runs_as_it_did(
    untold: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reason is told once, and asked for no more."""
    calls = []

    def broken(*_, **__):
        def region(*_):
            calls.append(1)
            raise RuntimeError("outer") from OSError("no C++ compiler\nmore")

        return region

    monkeypatch.setattr(torch, "compile", broken)
    m, plain = (opdsl.compile(SPEC.format(*DENSE["gate"])) for _ in range(2))
    m.loss.compile()
    for seed in range(2):
        x = inputs(seed, 4, 50)
        for got, want in zip(results(m, x), results(plain, x)):
            assert torch.equal(got, want)
    said = capsys.readouterr().err
    assert said == "opdsl: a row pass runs without torch.compile: OSError: no C++ compiler\n"
    assert len(calls) == 1


def test_off_by_default_and_not_for_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", None)
    m = opdsl.compile(SPEC.format(*DENSE["gate"]))
    results(m, inputs(0, 3, 20))
    m.loss.compile()
    m.loss(batches.logits(inputs(0, 3, 20))[0])
    assert not m.loss.compiled


@pytest.mark.parametrize("V", [100, 1024, 2048, 5000])
def test_steady_sums(V: int) -> None:
    x = torch.rand(3, V, generator=torch.Generator().manual_seed(V))
    for keep in (False, True):
        found = steady(x, 1, keepdim=keep)
        assert found.shape == x.sum(1, keepdim=keep).shape
        assert relative(found, x.double().sum(1, keepdim=keep)) <= 2e-7


@pytest.mark.parametrize(
    "fused, device, said", [(True, "cpu", 0), (False, "cpu", 1), (True, "cuda", 1)]
)
def test_the_option_says_where_it_changes_nothing(fused: bool, device: str, said: int) -> None:
    from opdsl.train.setup import _compile

    m = opdsl.compile(SPEC.format(*DENSE["gate"]))
    notes: list[str] = []
    place = SimpleNamespace(device=torch.device(device))
    _compile(m, place, fused, SimpleNamespace(note=notes.append))  # type: ignore[arg-type]
    assert len(notes) == said and m.loss.compiling is (said == 0)


@pytest.mark.slow
def test_shipped_methods_compiled(compiler: None, untold: None) -> None:
    """Every twelfth method with a dense pass: the same numbers, and nearly all of it compiled.

    A pass that branches on a number of the whole batch is not traced, and says so.
    """
    dense, reasons, made = [], [], 0
    for path in methods():
        m = opdsl.load(path)
        stages = [st for s in m.loss.emitted.staged for st in s.stages if st.kind == "rows"]
        dense += [path] if any(worthwhile(st) for st in stages) else []
    for path in dense[::12]:
        m, plain = opdsl.load(path), opdsl.load(path)
        m.loss.compile()
        names = tuple(t.name for t in m.spec.teachers if t.kind != "initial") or ("T",)
        critics = tuple(c.name for c in m.spec.critics)
        x = batches.draw(1, B=4, T=4, V=60, teachers=names, critics=critics)
        for got, want in zip(results(m, x), results(plain, x)):
            assert relative(got, want) <= TOLERANCE["float32"], path
        made += len(m.loss.compiled)
        reasons += [c.reason for c in m.loss.compiled.values() if c.reason]
    assert made and len(reasons) <= made // 4, reasons
    assert all("Data-dependent" in reason for reason in reasons), reasons
