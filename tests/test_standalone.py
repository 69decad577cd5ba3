"""`opdsl emit`: the file runs where opdsl is not, and equals the loss it came from."""

from __future__ import annotations

import ast
import subprocess
import sys
import types

import pytest
import torch

import opdsl
from opdsl.resources import methods, specs

SHIPPED = methods(failures=True)


def arguments(seed: int = 0, dtype=torch.float64):
    """Logits, tokens, mask and every optional argument, for 4 sequences with one empty."""
    g = torch.Generator().manual_seed(seed)
    B, T, V = 4, 5, 11

    def logits():
        return torch.randn(B, T, V, generator=g, dtype=dtype)

    tokens = torch.randint(0, V, (B, T), generator=g)
    mask = torch.rand(B, T, generator=g) < 0.8
    mask[1] = False
    sampled = torch.log_softmax(logits(), -1).gather(2, tokens[..., None])[..., 0]
    more = dict(
        initial_logits=logits(),
        outcome=torch.randint(0, 2, (B,), generator=g).to(dtype),
        group=torch.arange(B) // 2,
        values=torch.randn(B, T + 1, generator=g, dtype=dtype),
        special=torch.rand(B, T, generator=g) < 0.2,
        prompt=[{"domain": ("math", "code")[i % 2]} for i in range(B)],
        rollout_logprobs=sampled,
        step=3,
        total_steps=10,
    )
    return logits().requires_grad_(True), logits(), logits(), tokens, mask, more


def module_of(text: str) -> types.ModuleType:
    module = types.ModuleType("emitted")
    exec(compile(text, "emitted", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_equals_the_loss(path):
    method = opdsl.load(path)
    text = method.source()
    assert len(text.splitlines()) <= 800
    z, t, given, tokens, mask, more = arguments()
    teachers = {"math": t, "code": more["initial_logits"]} if method.spec.routed else {"T": t}
    golden = opdsl.Batch.from_logits(given, tokens=tokens, mask=mask)
    batch = opdsl.Batch.from_logits(z, teachers, tokens=tokens, mask=mask, golden=golden, **more)
    want = method.loss(batch).loss
    (gradient,) = torch.autograd.grad(want, z)
    loss = module_of(text).Loss()(z, teachers, tokens, mask, golden=(given, tokens, mask), **more)
    (found,) = torch.autograd.grad(loss, z)
    assert abs(float(loss.detach() - want.detach())) <= 1e-12
    assert float((found - gradient).abs().max()) <= 1e-12


def test_needs_torch_alone(tmp_path):
    file = tmp_path / "loss.py"
    file.write_text(opdsl.load("cr_opd").source())
    imported = {
        (n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).split(".")[0]
        for n in ast.walk(ast.parse(file.read_text()))
        if isinstance(n, ast.Import | ast.ImportFrom)
    }
    assert imported == {"math", "torch"}
    code = (
        "import sys, torch; sys.path.insert(0, '.'); import loss\n"
        "z = torch.randn(2, 3, 9, requires_grad=True)\n"
        "y = torch.randint(0, 9, (2, 3))\n"
        "loss.Loss()(z, torch.randn(2, 3, 9), y, torch.ones(2, 3)).backward()\n"
        "assert z.grad.abs().sum() > 0 and 'opdsl' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_words_of_the_user_cannot_leave_their_place():
    source = specs().joinpath("gkd.opd").read_text()
    evil = "a '''\\n  import os # \\u2028"
    text = opdsl.compile(
        source.replace("Generalised knowledge distillation, JSD(beta)", evil)
    ).source()
    module_of(text)
    assert not any(line.strip().startswith("import os") for line in text.splitlines())
