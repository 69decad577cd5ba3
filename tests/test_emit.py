"""The emitted text: alone it computes the same numbers, it holds nothing it should not, and two
spellings of one method emit the same loss.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import TOLERANCE, batches, generate, relative, toy

import opdsl
from opdsl.emit.module import check
from opdsl.method import Method
from opdsl.resources import methods, specs

SHIPPED = sorted(str(p.relative_to(specs())) for p in methods())

# ---- one file that needs torch alone ---------------------------------------------------------------


def inputs_for(method: Method, seed: int) -> batches.Inputs:
    teachers = tuple(t.name for t in method.spec.teachers if t.kind != "initial")
    critics = tuple(c.name for c in method.spec.critics)
    return batches.draw(seed, B=5, T=5, V=9, teachers=teachers or ("T",), critics=critics)


def arguments(x: batches.Inputs) -> dict:
    """Keyword arguments of an emitted Loss."""
    g = x.golden
    assert g is not None
    return dict(
        teacher_logits=dict(x.teachers),
        tokens=x.tokens_BT,
        mask=x.mask_BT,
        rollout_logprobs=x.rollout_BT,
        initial_logits=x.initial_BTV,
        outcome=x.outcome_B,
        group=x.group_B,
        values=dict(x.values) or None,
        special=x.special_BT,
        prompt=x.prompt,
        step=x.step,
        total_steps=x.total_steps,
        golden=(g.student_BTV, g.tokens_BT, g.mask_BT),
    )


def wanted(method: Method, x: batches.Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    batch, leaf = batches.logits(x)
    loss = method.loss(batch).loss
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


RUNNER = """
import importlib.util, sys, torch
sys.modules["opdsl"] = None  # any import of it fails
torch.set_num_threads(1)
worst = {}
for name, case in torch.load(sys.argv[1]).items():
    spec = importlib.util.spec_from_file_location(f"emitted_{len(worst)}", case["file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    z = case["student"].requires_grad_()
    loss = module.Loss()(z, **case["arguments"])
    (grad,) = torch.autograd.grad(loss, z)
    size = max(float(case["grad"].abs().max()), 1e-3)
    worst[name] = max(float((grad - case["grad"]).abs().max()) / size,
                      float((loss.detach() - case["loss"]).abs()) / max(float(case["loss"].abs()), 1e-3))
print(max(worst.values()), max(worst, key=worst.get))
"""


def test_standalone_files_agree_without_opdsl(tmp_path: Path) -> None:
    cases = {}
    for i, name in enumerate(SHIPPED):
        method = opdsl.load(specs() / name)
        x = inputs_for(method, i)
        text = method.source()
        file = tmp_path / f"case_{i}.py"
        file.write_text(text, encoding="utf-8")
        loss, grad = wanted(method, x)
        given = arguments(x)
        cases[name] = dict(
            file=str(file), student=x.student_BTV, arguments=given, loss=loss, grad=grad
        )
    torch.save(cases, tmp_path / "cases.pt")
    (tmp_path / "run.py").write_text(RUNNER)
    done = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "run.py"), str(tmp_path / "cases.pt")],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) <= TOLERANCE["standalone"], done.stdout


@pytest.mark.parametrize("seed", range(0, 200, 5))
def test_standalone_of_generated_specs(seed: int) -> None:
    text = generate.spec(seed)
    method = generate.compiled(text.text)
    x = batches.draw(seed, B=4, T=4, V=9, teachers=text.teachers, critics=text.critics)
    space: dict = {}
    source = method.source()
    exec(compile(source, "emitted", "exec"), space)
    given = arguments(x)
    z = x.student_BTV.clone().requires_grad_()
    loss = space["Loss"]()(z, **given)
    (grad,) = torch.autograd.grad(loss, z)
    want, want_grad = wanted(method, x)
    assert relative(loss.detach(), want) <= TOLERANCE["standalone"]
    assert relative(grad, want_grad) <= TOLERANCE["standalone"]


@pytest.mark.parametrize("name", SHIPPED)
def test_standalone_files_are_short_and_plain(name: str) -> None:
    text = opdsl.load(specs() / name).source()
    assert len(text.splitlines()) <= 600
    tree = ast.parse(text)
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert imported == {"math", "torch"}
    assert not any(isinstance(n, ast.ImportFrom) for n in ast.walk(tree))
    called = {
        n.func.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    called -= {"function"}  # the pass that `run` was given
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    builtins = {"abs", "all", "dict", "float", "int", "isinstance", "iter", "len", "max", "min",
                "next", "range", "str", "super", "ValueError"}  # fmt: skip
    assert called <= defined | builtins, called - defined - builtins
    unused = [d for d in defined - {"Loss"} if text.count(d) == 1]
    assert not unused, unused
    docstring = ast.get_docstring(tree)
    assert docstring is not None and docstring.startswith(Path(name).stem)


def test_a_served_teacher_in_the_standalone_file() -> None:
    method = opdsl.load("cr_opd", set={"k_teacher": 4})
    space: dict = {}
    exec(method.source(), space)
    x = inputs_for(method, 3)
    lp = torch.log_softmax(x.teachers["T"], -1)
    logps, ids = lp.topk(4, -1)
    sampled = lp.gather(2, x.tokens_BT[..., None]).squeeze(-1)
    given = {**arguments(x), "teacher_logits": (ids, logps, sampled)}
    z = x.student_BTV.clone().requires_grad_()
    loss = space["Loss"]()(z, **given)
    (grad,) = torch.autograd.grad(loss, z)
    want, want_grad = wanted(method, x)
    assert relative(loss.detach(), want) <= TOLERANCE["standalone"]
    assert relative(grad, want_grad) <= TOLERANCE["standalone"]


HOSTILE = (
    r"""opd 1

method hostile "a \ b """
    + "''' + __import__('os').system('x')"
    + r""" # \n {0} %s" {
  cite url "https://x/"""
    + "\\');raise SystemExit #"
    + r""""
  state rollouts(student)
  teacher one = external(access = logits) when prompt.domain == "a\' or 1 #"
  teacher two = external(access = logits) when prompt.domain == "b'] = 1; import os #"
  let T = routed(one, two)
  support full
  feedback loss KL(student || T)
  gate prompt.kind == "\x41' + str(1/0) + '"
  aggregate mean(over = tokens)
}
"""
)


def test_what_a_user_wrote_cannot_break_out() -> None:
    method = opdsl.compile(HOSTILE)
    text = method.source()
    tree = ast.parse(text)
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert not names & {"os", "raise", "__import__", "SystemExit"}
    space: dict = {}
    exec(text, space)
    x = batches.draw(0, teachers=("one", "two"))
    prompt = [
        {"domain": ("a\\' or 1 #", "b'] = 1; import os #")[i % 2], "kind": "\\x41' + str(1/0) + '"}
        for i in range(4)
    ]
    given = {**arguments(x), "prompt": prompt}
    loss = space["Loss"]()(x.student_BTV, **given)
    batch = opdsl.Batch.from_logits(
        x.student_BTV, dict(x.teachers), tokens=x.tokens_BT, mask=x.mask_BT, prompt=prompt
    )
    assert float(loss) == pytest.approx(float(method.loss(batch).loss), rel=1e-12)
    assert float(loss) != 0.0


def test_emitted_text_does_not_depend_on_the_process() -> None:
    code = (
        "import hashlib, opdsl\n"
        "for n in ('cr_opd', 'verifier_hybrid', 'gae_opd'):\n"
        "    m = opdsl.load(n)\n"
        "    text = m.source() + m.compilation.emitted.text\n"
        "    print(hashlib.sha256(text.encode()).hexdigest())\n"
    )
    found = set()
    for seed in ("0", "12345"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


@pytest.mark.parametrize(
    "text",
    [
        "import os",
        "def f(d, r, like):\n    return open('x')",
        "def f(d, r, like):\n    return r.__class__",
        "def f(d, r, like):\n    exec('1')",
        "def f(d, r, like):\n    return [x1 for x1 in r]",
        "x1 = (lambda: 1)()",
    ],
)
def test_the_check_refuses_anything_else(text: str) -> None:
    with pytest.raises(AssertionError):
        check(text)


# ---- two spellings, one loss ----------------------------------------------------------------------

V = 9
LR = "logratio(T, rollout)"
CRITIC = "let Value : nats per token = critic(init = zero, lr = 0.01)\n"
SAME = {
    "full is top(V)": ("support full\nfeedback loss KL(student || T)",
                       f"support top({V}, of = T, tail = drop)\nfeedback loss KL(student || T)"),
    "renormalizing everything": (
        "support full\nfeedback loss JSD(student || T)",
        f"support top({V}, of = student, tail = renormalize)\nfeedback loss JSD(student || T)"),
    "a union with itself": (
        "support top(3, of = T, tail = bin)\nfeedback loss KL(student || T)",
        "support union(top(3, of = T), top(2, of = T), tail = bin)\nfeedback loss KL(student || T)"),
    "an intersection with everything": (
        "support top(3, of = T, tail = drop)\nfeedback loss TV(student || T)",
        f"support intersection(top(3, of = T), top({V}, of = student), tail = drop)\n"
        "feedback loss TV(student || T)"),
    "no discount": (f"support sampled\nfeedback reward {LR}\ncredit return_to_go",
                    f"support sampled\nfeedback reward {LR}\ncredit discounted(gamma = 1)"),
    "full discount": (f"support sampled\nfeedback reward {LR}\ncredit immediate",
                      f"support sampled\nfeedback reward {LR}\ncredit discounted(gamma = 0)"),
    "a window of one": (f"support sampled\nfeedback reward {LR}\ncredit immediate",
                        f"support sampled\nfeedback reward {LR}\ncredit window(n = 1)"),
    "a long window": (f"support sampled\nfeedback reward {LR}\ncredit return_to_go",
                      f"support sampled\nfeedback reward {LR}\ncredit window(n = 64)"),
    "a clip that never acts": (
        f"support sampled\nfeedback reward {LR}\ncredit immediate",
        f"support sampled\nfeedback reward {LR}\nshape clip(-1000, 1000)\ncredit immediate"),
    "half and half": (
        "support full\nfeedback loss KL(student || T)",
        "term a { support full\n feedback loss 0.5 * KL(student || T) }\n"
        "term b { support full\n feedback loss KL(student || T)\n weight 0.5 }"),
    "a gate and its complement": (
        "support full\nfeedback loss KL(T || student)",
        "term a { support full\n feedback loss KL(T || student)\n gate hesitant(T, 1.5) }\n"
        "term b { support full\n feedback loss KL(T || student)\n gate confident(T, 1.5) }"),
    "a weight of one": ("support full\nfeedback loss KL(student || T)",
                        "support full\nfeedback loss KL(student || T)\nweight 1.0\ngate 1"),
    "written out": (
        "support full\nfeedback loss KL(student || T)",
        "support full\nfeedback loss sum(v in full: student[v] * log(student[v] / T[v]))"),
    "k2 written out": (
        "support sampled\nfeedback loss k2(student, T)",
        "support sampled\nfeedback loss (log(student[y]) - log(T[y])) ^ 2 / 2"),
    "a temperature of one": ("support full\nfeedback loss KL(student || T)",
                             "support full\nfeedback loss KL(tempered(student, 1) || tempered(T, 1))"),
    "all of one teacher": ("support full\nfeedback loss KL(student || T)",
                           "support full\nfeedback loss KL(student || 0.25 * T + 0.75 * T)"),
    "the routing that never acts": (
        f"support sampled\nfeedback reward {LR}\ncredit immediate",
        f"support full\nfeedback reward {LR}\ncredit immediate\nrouting counterfactual(when = A < -1000, "
        "among = {v in full: v != y}, toward = T[v], strength = -A, otherwise = drop)"),
    "a value baseline is gae at lam 1": (
        CRITIC + f"support sampled\nfeedback reward {LR}\ncredit return_to_go(baseline = value(V = Value))",
        CRITIC + f"support sampled\nfeedback reward {LR} + 0 * Value\n"
        "credit gae(V = Value, gamma = 1, lam = 1)"),
}  # fmt: skip


def measured(text: str, x: batches.Inputs) -> tuple[float, torch.Tensor]:
    batch, leaf = batches.logits(x)
    loss = toy.method(text).loss(batch).loss
    (grad,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), grad


@pytest.mark.parametrize("name", SAME)
def test_spellings_that_mean_the_same(name: str) -> None:
    x = batches.draw(5, B=6, T=5, V=V, critics=("Value",))
    if "value baseline" in name:  # the bootstrap is no part of a return to go
        ends = {"Value": x.values["Value"] * 0}
        for b, mask in enumerate(x.mask_BT):
            ends["Value"][b, :-1] = torch.where(mask, x.values["Value"][b, :-1], 0.0)
        from dataclasses import replace

        x = replace(x, values=ends)
    (a, ga), (b, gb) = (measured(text, x) for text in SAME[name])
    assert relative(gb, ga) <= TOLERANCE["identity"]
    if name != "the routing that never acts":
        assert relative(b, a) <= TOLERANCE["identity"]


DIFFERENT = {
    "direction": ("KL(student || T)", "KL(T || student)"),
    "beta": ("JSD(student || T, beta = 0.3)", "JSD(student || T, beta = 0.7)"),
    "alpha": ("skew_KL(student || T, alpha = 0.1)", "skew_KL(student || T, alpha = 0.3)"),
    "temperature": ("KL(student || T)", "KL(student || tempered(T, 2))"),
    "stop-gradient": ("KL(0.5 * student + 0.5 * T || student)",
                      "KL(sg(0.5 * student + 0.5 * T) || student)"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_options_that_must_matter(name: str) -> None:
    x = batches.draw(5, B=6, T=5, V=V)
    (_, a), (_, b) = (measured(f"support full\nfeedback loss {t}", x) for t in DIFFERENT[name])
    assert relative(b, a) > 1e-3


@pytest.mark.parametrize("tails", [("drop", "detach"), ("drop", "bin"), ("bin", "renormalize"),
                                   ("drop", "sampled")])  # fmt: skip
def test_tails_that_must_matter(tails: tuple[str, str]) -> None:
    x = batches.draw(5, B=6, T=5, V=V)
    text = "support top(3, of = T, tail = {})\nfeedback loss KL(student || T)"
    (_, a), (_, b) = (measured(text.format(t), x) for t in tails)
    assert relative(b, a) > 1e-3


@pytest.mark.parametrize("name", ["cr_opd", "verifier_hybrid", "gae_opd", "minillm"])
def test_orders_that_do_not_matter(name: str) -> None:
    """Permuted sequences, permuted vocabulary, and padding appended to every sequence."""
    method = opdsl.load(name)
    x = inputs_for(method, 2)
    loss, grad = wanted(method, x)
    order = torch.tensor([3, 0, 4, 2, 1])
    swap = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    back = swap.argsort()
    from dataclasses import replace

    def permuted(y: batches.Inputs) -> batches.Inputs:
        return replace(
            y,
            student_BTV=y.student_BTV[..., swap],
            teachers={k: v[..., swap] for k, v in y.teachers.items()},
            initial_BTV=y.initial_BTV[..., swap],
            tokens_BT=back[y.tokens_BT],
            golden=None if y.golden is None else permuted(y.golden),
        )

    got, got_grad = wanted(method, permuted(x))
    assert relative(got, loss) <= TOLERANCE["identity"]
    assert relative(got_grad[..., back], grad) <= TOLERANCE["identity"]

    shuffled = replace(
        x,
        student_BTV=x.student_BTV[order],
        teachers={k: v[order] for k, v in x.teachers.items()},
        initial_BTV=x.initial_BTV[order],
        tokens_BT=x.tokens_BT[order],
        mask_BT=x.mask_BT[order],
        rollout_BT=x.rollout_BT[order],
        outcome_B=x.outcome_B[order],
        group_B=x.group_B[order],
        values={k: v[order] for k, v in x.values.items()},
        special_BT=x.special_BT[order],
        prompt=tuple(x.prompt[i] for i in order.tolist()),
    )
    got, got_grad = wanted(method, shuffled)
    assert relative(got, loss) <= TOLERANCE["identity"]
    assert relative(got_grad, grad[order]) <= TOLERANCE["identity"]

    def longer(t: torch.Tensor) -> torch.Tensor:
        extra = torch.full((t.shape[0], 2, *t.shape[2:]), 1, dtype=t.dtype)
        return torch.cat([t, extra], 1)

    padded = replace(
        x,
        student_BTV=longer(x.student_BTV),
        teachers={k: longer(v) for k, v in x.teachers.items()},
        initial_BTV=longer(x.initial_BTV),
        tokens_BT=longer(x.tokens_BT),
        mask_BT=torch.cat([x.mask_BT, torch.zeros(5, 2, dtype=torch.bool)], 1),
        rollout_BT=longer(x.rollout_BT) - 1,
        values={k: longer(v) for k, v in x.values.items()},
        special_BT=longer(x.special_BT),
    )
    padded = replace(padded, rollout_BT=torch.cat([x.rollout_BT, -torch.ones(5, 2)], 1))
    got, got_grad = wanted(method, padded)
    assert relative(got, loss) <= TOLERANCE["identity"]
    assert relative(got_grad[:, :-2], grad) <= TOLERANCE["identity"]
    assert not bool(got_grad[:, -2:].any())


def test_the_gradient_scales_with_what_follows() -> None:
    method = opdsl.load("cr_opd")
    x = inputs_for(method, 1)
    batch, leaf = batches.logits(x)
    (grad,) = torch.autograd.grad(method.loss(batch).loss, leaf, retain_graph=True)
    (tripled,) = torch.autograd.grad(3 * method.loss(batch).loss, leaf)
    assert relative(tripled, 3 * grad) <= TOLERANCE["exact"]
