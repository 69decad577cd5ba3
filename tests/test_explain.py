"""`explain` and the passport: golden pages, the golden facts of the semantics, the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import opdsl
from opdsl.cli import cli
from opdsl.formula.explain import Explanation, explain
from opdsl.formula.page import Page
from opdsl.passport.report import passport
from opdsl.resources import methods
from opdsl.wrapping import cells

GOOD = Path(__file__).parent / "good"
SHIPPED = methods()


def method(support="sampled", feedback="", credit="", state="", aggregate="", extra=""):
    text = f"""opd 1
method probe "a probe" {{
  {extra}
  state     {state or "rollouts(student, group = 4)"}
  teacher   T = external(access = logits)
  support   {support}
  feedback  {feedback}
  {credit}
  aggregate {aggregate or "mean(over = tokens)"}
}}
"""
    return opdsl.compile(text)


# ---- golden pages ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_golden_page(path, request):
    text = opdsl.load(path).explain()
    golden = GOOD / f"explain_{path.stem}.golden"
    if request.config.getoption("--regenerate", default=False):
        golden.write_text(text, encoding="utf-8")
    assert golden.is_file(), f"{golden.name} is missing: run pytest --regenerate"
    assert text == golden.read_text(encoding="utf-8")


LABELS = ["states", "teacher", "support", "route", "where", "gradient", "needs", "bias",
          "objective", "fixed point", "routing", "variance", "conservative", "evidence"]  # fmt: skip


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_page_fits_a_screen(path):
    text = opdsl.load(path).explain()
    lines = text.splitlines()
    assert max(map(cells, lines)) <= 100
    assert len(lines) <= 50
    labels = [line[2:16].strip() for line in lines if line.startswith("  ") and line[2:3].strip()]
    places = [labels.index(w) for w in LABELS if w in labels or w != "where"]
    assert places == sorted(places)
    assert "descent  " in text and "ids  " in text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_page_wraps_at_80_columns(path):
    found = opdsl.load(path)
    text = explain(found.compilation, "text", 80)
    lines = text.splitlines()
    assert max(map(cells, lines)) <= 80
    assert len(lines) <= 78
    # nothing is lost: the words of the wide page are there, but for what a close layout merges
    for b in found.passport["biases"]:
        assert b["slug"] in text
    for line in lines:  # a label or an indent in front of everything but the heading
        assert not line or line.startswith("  ") or line.startswith(found.name)


def test_a_close_page_says_what_a_loose_one_says():
    e = Explanation(opdsl.load("cr_opd").compilation)
    loose, close = Page(e, 100, False).text(), Page(e, 100, True).text()
    assert close.count("\n") < loose.count("\n")
    words = lambda text: set(text.replace("(accepted)", "").replace(";", "").split())  # noqa: E731
    missing = words(loose) - words(close)
    assert len(missing) < 30 and not missing & {"immediate_credit", "π_T", "counterfactual:"}


def test_a_run_block_changes_nothing():
    text = opdsl.load("gkd").compilation.source.text
    block = '\nrun a of gkd {{ student = "{}"  T = "x/y"  data = "{}"  seed = {} }}\n'
    runs = [
        text,
        text + block.format("a/b", "p.jsonl", 1),
        text + block.format("c/d", "q.jsonl", 2),
    ]
    for fmt in ("text", "json", "latex", "markdown"):
        assert len({opdsl.compile(t).explain(fmt) for t in runs}) == 1
    assert len({opdsl.compile(t).fingerprints["run"] for t in runs}) == 3


# ---- formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_json(path):
    data = json.loads(opdsl.load(path).explain("json"))
    assert {
        "method",
        "route",
        "formula",
        "latex",
        "gradient",
        "needs",
        "passport",
        "fingerprints",
    } <= set(data)
    p = data["passport"]
    assert {"objective", "conservative", "stationary_at_teacher", "fixed_point", "zero_expected_gradient",
            "biases", "descent", "variance", "evidence", "fingerprints"} <= set(p)  # fmt: skip
    assert set(p["descent"]) == {"KL(student||T)", "KL(T||student)"}
    assert set(p["fingerprints"]) == {"method", "optimize", "run"}
    assert all({"code", "slug", "statement", "accepted"} == set(b) for b in p["biases"])
    assert data["formula"].startswith("L(θ) = ") and data["latex"].startswith(r"L(\theta) = ")


HASHED = ("amr_sd", "opsd_clip", "gapd", "distillm2", "luffy", "tgpo")


def test_pages_do_not_depend_on_hashing():
    """Two processes with different hash seeds, and a session that compiled other specs before."""
    program = "import sys, opdsl\nfor n in sys.argv[1:]: print(opdsl.load(n).explain())"
    for seed in ("1", "4"):
        out = subprocess.run(
            [sys.executable, "-c", program, *HASHED],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout  # fmt: skip
        assert out == "".join(opdsl.load(n).explain() + "\n" for n in HASHED)


def test_unknown_format():
    with pytest.raises(ValueError, match="unknown format"):
        explain(opdsl.load("gkd").compilation, "yaml")


# ---- golden facts ----------------------------------------------------------------------------------

LOGRATIO = "reward logratio(T, rollout)"
RKL, FKL = "KL(student||T)", "KL(T||student)"
TOP = "top(4, of = T, tail = {})"

FACTS = [
    # the estimators of theory §6
    (dict(feedback="loss k1(student, T)", extra='allow R01 "to show it"'),
     dict(zero_expected_gradient=True, objective="none: the expected gradient is zero")),
    (dict(feedback="loss k2(student, T)"),
     dict(objective="KL(student ‖ T) at visited states, in expectation over y",
          zero_expected_gradient=False, fixed_point="π_T")),
    (dict(feedback="loss k3(student, T)"),
     dict(objective="KL(T ‖ student) at visited states, in expectation over y")),
    (dict(feedback="loss 0.5 * (log(student[y]) - log(T[y])) ^ 2"),
     dict(objective="KL(student ‖ T) at visited states, in expectation over y")),
    (dict(feedback="reward -k3(student, T)", credit="credit immediate", extra='allow R03 "x"'),
     dict(objective="Σ_t [KL(student ‖ T) − KL(T ‖ student)] at visited states, states held fixed (J_fro)",
          conservative=False)),
    (dict(feedback="reward -k2(student, T)", credit="credit immediate", extra='allow R03 "x"'),
     dict(objective="no divergence: the reward has one sign, whichever way the student errs",
          fixed_point="π_T is stationary, but does not attract")),
    (dict(feedback="reward -abs(logratio(student, T))", credit="credit immediate", extra='allow R03 "x"'),
     dict(objective="no divergence: the reward has one sign, whichever way the student errs")),
    # credit
    (dict(feedback=LOGRATIO, credit="credit immediate"),
     dict(objective="Σ_t KL(student ‖ T) at visited states, states held fixed (J_fro)",
          conservative=False, stationary_at_teacher=True)),
    (dict(feedback=LOGRATIO, credit="credit immediate(baseline = kl_state)"),
     dict(objective="Σ_t KL(student ‖ T) at visited states, states held fixed (J_fro)")),
    (dict(feedback=LOGRATIO, credit="credit return_to_go"),
     dict(objective="KL(student ‖ T) of whole sequences (J_seq)", conservative=True)),
    (dict(feedback=LOGRATIO, credit="credit return_to_go(baseline = leave_one_out)"),
     dict(objective="KL(student ‖ T) of whole sequences (J_seq)", conservative=True)),
    (dict(feedback=LOGRATIO, credit="credit discounted(0.9)"),
     dict(objective="not the gradient of any objective (discounted return, γ = 0.9)", conservative=False)),
    (dict(feedback=LOGRATIO, credit="credit window(4)"), dict(conservative=False)),
    (dict(feedback=LOGRATIO, credit="credit return_to_go", aggregate="mean(over = sequences)",
          extra='allow R34 "x"'), dict(conservative=False)),
    # a value of the state as a reward
    (dict(support=TOP.format("bin"), feedback="reward -KL(student || T)", credit="credit immediate",
          extra='allow R05 "x"'),
     dict(zero_expected_gradient=True, fixed_point="every student: the expected field is zero")),
    (dict(support=TOP.format("bin"), feedback="reward -KL(student || T)", credit="credit return_to_go",
          extra='accept occupancy_only "x"'),
     dict(objective="only the occupancy part: which states are visited, not which token is right")),
    # mass modes of theory §7
    (dict(support=TOP.format("drop"), feedback="loss KL(student || T)"),
     dict(stationary_at_teacher=False,
          fixed_point="the shape of π_T on the support with total mass π_T(Ω)/e: mass is pushed out")),
    (dict(support=TOP.format("drop"), feedback="loss KL(T || student)"),
     dict(stationary_at_teacher=False,
          fixed_point="π_T renormalised on the support; everything outside is erased")),
    (dict(support=TOP.format("detach"), feedback="loss KL(student || T)"),
     dict(fixed_point="π_T on the support; the mass outside is free")),
    (dict(support=TOP.format("renormalize"), feedback="loss KL(student || T)"),
     dict(fixed_point="any student with the shape of π_T inside the support; mass outside is free")),
    (dict(support=TOP.format("bin"), feedback="loss KL(student || T)"),
     dict(stationary_at_teacher=True,
          fixed_point="π_T on the support and in total outside it; the shape outside is free")),
    (dict(support=TOP.format("sampled"), feedback="loss KL(student || T)"),
     dict(stationary_at_teacher=True, fixed_point="π_T")),
    # direct losses
    (dict(support="full", feedback="loss KL(student || T)"),
     dict(objective="KL(student ‖ T) at visited states", conservative=False)),
    (dict(support="full", feedback="loss KL(student || T)", state="sequences(data)"),
     dict(conservative=True)),
    (dict(support="full", feedback="loss JSD(T || student, beta = 0.3)"),
     dict(objective="JSD_0.3(T ‖ student) at visited states", stationary_at_teacher=True)),
    # target algebra of theory §11.6
    (dict(support="full", feedback="loss KL(student || T)",
          aggregate="mean(over = tokens)\n  regularize 0.5 * KL(student || initial)"),
     dict(stationary_at_teacher=False, fixed_point="∝ π_T^0.6667 · π_0^0.3333")),
    (dict(support="full", feedback="loss KL(student || T)",
          aggregate="mean(over = tokens)\n  regularize -0.25 * H(student)"),
     dict(fixed_point="∝ π_T^0.8")),
    (dict(support="full", feedback="loss KL(T || student)",
          aggregate="mean(over = tokens)\n  regularize 0.5 * KL(initial || student)"),
     dict(fixed_point="0.667 π_T + 0.333 π_0")),
]  # fmt: skip


@pytest.mark.parametrize("spec, wanted", FACTS)
def test_golden_facts(spec, wanted):
    found = passport(method(**spec).compilation)
    assert {k: found[k] for k in wanted} == wanted


def test_descent():
    found = passport(method(support="full", feedback="loss KL(student || T)").compilation)[
        "descent"
    ]
    assert found[RKL].startswith("guaranteed")
    found = passport(method(feedback="loss k3(student, T)").compilation)["descent"]
    assert found[FKL].startswith("guaranteed")
    found = passport(
        method(support=TOP.format("drop"), feedback="loss KL(student || T)").compilation
    )
    assert found["descent"][RKL].startswith("not guaranteed")


@pytest.mark.parametrize(
    "old, new, fkl, rkl",
    [
        ("", "", "guaranteed", "guaranteed"),
        ("A + KL(student || T) < 0", "A < 0", "guaranteed", "not"),
        ("T[v] > student[v] and ", "T[v] > 0.01 and ", "not", "not"),
        ("A + KL(student || T) < 0", "A < 100 nats", "not", "not"),
    ],
)
def test_descent_of_routing(old, new, fkl, rkl):
    text = opdsl.load("cr_opd").compilation.source.text
    assert old in text
    found = opdsl.compile(text.replace(old, new)).passport["descent"]
    assert found[FKL].startswith(fkl) and found[RKL].startswith(rkl)


def test_exact_kl_and_future_return_are_the_sequence_objective():
    p = opdsl.load("minillm").passport
    assert "J_seq" in p["objective"] and p["conservative"] is True
    text = opdsl.load("minillm").compilation.source.text
    half = opdsl.compile(
        text.replace("loss KL(student || T)", "loss 0.5 * KL(student || T)")
    ).passport
    assert isinstance(half["objective"], list) and half["conservative"] is not True


def test_biases_carry_what_was_accepted():
    (bias,) = opdsl.load("cr_opd").passport["biases"]
    assert bias["code"] == "OPD501" and bias["accepted"].startswith("lower variance")
    (bias,) = [b for b in method(feedback="loss k1(student, T)", extra='allow R01 "known"').passport["biases"]
               if b["code"] == "OPD302"]  # fmt: skip
    assert bias["accepted"] == "known"


# ---- the command -----------------------------------------------------------------------------------------


def run(*args):
    return CliRunner().invoke(cli, ["explain", *args])


def test_command_explains_specs():
    assert run("gkd").output == opdsl.load("gkd").explain()
    assert "β = 0.1" in run("gkd", "--set", "beta=0.1").output
    assert json.loads(run("gkd", "--format", "json").output)["method"] == "gkd"
    assert "\\begin{align*}\nL(" in run("gkd", "--format", "latex").output


def test_command_explains_codes():
    by_code, by_slug = run("OPD501"), run("immediate_credit")
    assert by_code.exit_code == 0 and by_code.output == by_slug.output
    assert "OPD501" in by_code.output
    assert json.loads(run("opd302", "--format", "json").output)["slug"] == "teacher_free_gradient"


def test_every_code_has_something_to_say():
    from opdsl.cli.explain import _code
    from opdsl.codes import CODES

    for code in CODES:
        text = _code(code, "text")
        assert text and code in text and len(text) > 40


def test_command_explains_definitions():
    text = run("JSD").output
    assert "JSD(p : dist, q : dist" in text and "β Σ_v p(v) log p(v)/m(v)" in text
    assert "def JSD" in text
    assert json.loads(run("KL", "--format", "json").output)["formula"].startswith("KL(p ‖ q)")


@pytest.mark.parametrize("phase, sign", [("ast", "Method"), ("spec", "StateSource"),
                                         ("ir", "opd-ir 1"), ("plan", "pass 1")])  # fmt: skip
def test_dumps(phase, sign):
    found = run("cr_opd", "--dump", phase)
    assert found.exit_code == 0 and sign in found.output


def test_unknown_names_get_a_suggestion():
    found = run("KLL")
    assert found.exception is not None
    (d,) = found.exception.diagnostics
    assert d.code == "OPD711" and "KL" in d.helps[0]


def test_explain_starts_fast_and_without_torch():
    code = (
        "import sys, opdsl\n"
        "for f in ('text', 'json', 'latex', 'markdown'): opdsl.load('cr_opd').explain(f)\n"
        "bad = [m for m in ('torch', 'transformers', 'sympy') if m in sys.modules]\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    command = [sys.executable, "-m", "opdsl", "explain", "verifier_hybrid"]
    times = []
    for seed in ("1", "2"):  # the page does not depend on hashing either
        start = time.perf_counter()
        out = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        times.append(time.perf_counter() - start)
        assert out.stdout == opdsl.load("verifier_hybrid").explain()
    assert min(times) < 4  # about 1 s on an idle machine


@pytest.mark.parametrize("seed", range(0, 60, 2))
def test_generated_specs_are_explained(seed):
    from support import generate

    method = generate.compiled(generate.spec(seed).text)
    for format_ in ("text", "json", "latex"):
        assert method.explain(format_)
