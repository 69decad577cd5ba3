"""`opdsl diff`: same, equal as tested, equal on average, or different; and where methods meet."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache

import pytest
from click.testing import CliRunner
from support import generate

from opdsl.cli import cli
from opdsl.compilation import Compilation
from opdsl.formula.diff import Difference, difference
from opdsl.formula.diff_text import case, data, markdown, text, verdict
from opdsl.resources import methods, specs
from opdsl.source import Source
from opdsl.syntax import read_source
from opdsl.syntax.fmt import format_source

SHIPPED = {p.stem: p for p in methods(failures=True)}
LOG_RATIO = "support sampled\n  feedback reward logratio(T, rollout)\n  credit "


def shipped(name: str, **knobs: float) -> Compilation:
    return Compilation(read_source(SHIPPED[name]), None, knobs)


def spec(
    body: str,
    state: str = "rollouts(student, group = 4)",
    teacher: str = "T = external(access = logits)",
    defs: str = "",
    aggregate: str = "mean(over = tokens)",
    **knobs: float,
) -> Compilation:
    source = (
        f"opd 1\n{defs}\nmethod mine {{\n  state {state}\n  teacher {teacher}\n"
        f"  {body}\n  aggregate {aggregate}\n}}\n"
    )
    return Compilation(Source("<test>", source), None, knobs)


def loss(value: str, support: str = "full", **rest) -> Compilation:
    return spec(f"support {support}\n  feedback loss {value}", **rest)


@lru_cache
def between(x: str, y: str) -> Difference:
    return difference(shipped(x), shipped(y))


def meets(d: Difference) -> list[str]:
    return [case(c) for c in d.cases]


def changed(d: Difference) -> set[str]:
    return {x.name for x in d.axes if x.changed}


# ---- the same method ---------------------------------------------------------------------------


def test_other_names_and_comments_are_the_same_method():
    plain = spec(
        "param k : int in [1, 64] = 8\n  let Target = 0.5 * T + 0.5 * initial\n"
        "  support top(k, of = T, tail = bin)\n  feedback loss KL(student || Target)"
    )
    renamed = spec(
        "param width : int in [1, 99] = 8  # how many\n  let Mix = 0.5 * Q + 0.5 * initial\n"
        "  support top(width, of = Q, tail = bin)\n  feedback loss KL(student || Mix)",
        teacher="Q = external(access = logits)",
    )
    d = difference(plain, renamed)
    assert (d.kind, d.equal, changed(d)) == ("same", True, set())
    assert d.roles.renamed == (("T", "Q"),) and "B says Q" in text(d)


def test_what_is_no_part_of_the_method_is_said_all_the_same():
    d = difference(
        loss("KL(student || T)"),
        loss("KL(student || T)", teacher="T = external(access = logits)",
             defs="", aggregate="mean(over = tokens)\n  optimize { lr = 1e-5 }"),
    )  # fmt: skip
    assert d.kind == "same" and changed(d) == {"optimize"}
    assert "lr = 1e-05" in text(d)


def test_the_same_method_needs_no_torch():
    code = (
        "import sys\nfrom opdsl.cli import cli\n"
        "cli.main(['diff', 'cr_opd', 'cr_opd'], standalone_mode=False)\n"
        "sys.exit('loaded torch' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", range(0, 60, 5))
def test_a_formatted_spec_is_itself(seed):
    written = generate.compiled(generate.spec(seed).text).compilation.source.text
    formatted = format_source(Source("<generated>", written))
    assert formatted is not None
    a, b = (Compilation(Source("<generated>", x)) for x in (written, formatted))
    assert difference(a, b).kind == "same"


# ---- equal as tested ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, y",
    [
        ("KL(student || T)", "sum(v in full: student[v] * log(student[v] / T[v]))"),
        ("KL(T || student)", "sum(v in full: T[v] * log(T[v])) + sum(v in full: -T[v] * log(student[v]))"),
        ("JSD(T || student, beta = 0.5)", "0.5 * (KL(T || 0.5 * T + 0.5 * student) + KL(student || 0.5 * student + 0.5 * T))"),
    ],
)  # fmt: skip
def test_rewritten_formulas_are_equal_as_tested(x, y):
    d = difference(loss(x), loss(y))
    assert d.kind in ("same", "equal") and d.equal
    if d.kind == "equal":
        assert d.batches >= 15 and d.worst < 1e-9 and d.witness is None
        assert "equal as tested" in verdict(d)


def test_cross_entropy_has_the_gradient_of_the_divergence():
    d = difference(loss("KL(T || student)"), loss("-sum(v in full: T[v] * log(student[v]))"))
    assert (d.kind, d.equal) == ("gradient", True)
    assert d.witness is not None and d.witness.losses[0] != pytest.approx(d.witness.losses[1])
    assert all(row["A"] == pytest.approx(row["B"]) for row in d.witness.rows)


def test_a_coefficient_is_a_factor():
    d = difference(loss("KL(student || T)"), loss("2 * KL(student || T)"))
    assert d.kind == "scaled" and not d.equal and d.agreement.factor == pytest.approx(2)


def test_k2_differentiated_is_k1_rewarded_where_the_student_drew():
    d = difference(loss("k2(student, T)", "sampled"), spec(LOG_RATIO + "immediate"))
    assert d.kind == "gradient" and d.agreement.fresh and not d.equal
    assert d.witness is not None and not d.witness.fresh
    on_policy = spec("support sampled\n  feedback reward logratio(T, student)\n  credit immediate")
    d = difference(loss("k2(student, T)", "sampled"), on_policy)
    assert d.kind == "gradient" and not d.agreement.fresh


def test_other_samplers_are_other_states():
    a = loss("KL(student || T)")
    d = difference(a, loss("KL(student || T)", state="rollouts(student, top_p = 0.9)"))
    assert (d.kind, d.states, d.equal) == ("equal", "different", False)
    assert "different states" in verdict(d) and changed(d) == {"state"}
    d = difference(a, loss("KL(student || T)", state="rollouts(student, group = 8)"))
    assert (d.kind, d.states, d.equal) == ("equal", "rollouts", False)


@pytest.mark.parametrize(
    "x, y",
    [
        ("window(n = 40)", "window(n = 60)"),
        ("immediate\n  gate position < 50", "immediate"),
        ("immediate\n  gate entropy(T) < 5", "immediate"),
        ("immediate\n  weight if step < 1500 then 1 else 2", "immediate"),
        ("immediate\n  shape clip(-20, 20)", "immediate"),
    ],
)
def test_what_happens_far_away_is_not_missed(x, y):
    d = difference(spec(LOG_RATIO + x), spec(LOG_RATIO + y))
    assert d.kind == "different" and d.witness is not None


def test_sets_wider_than_a_small_vocabulary_are_told_apart():
    tops = (f"top({k}, of = T, tail = renormalize)" for k in (20, 40))
    d = difference(*(loss("KL(student || T)", s) for s in tops))
    assert d.kind == "different" and changed(d) == {"support"}
    assert d.witness is not None and d.witness.vocabulary > 20


# ---- equal in expectation ------------------------------------------------------------------------


def test_a_baseline_of_the_state_changes_the_variance_only():
    d = difference(
        spec(LOG_RATIO + "immediate(baseline = kl_state)"), spec(LOG_RATIO + "immediate")
    )
    assert d.kind == "expected" and not d.equal
    assert d.variances is not None and d.variances.a != pytest.approx(d.variances.b)
    assert changed(d) == {"credit"} and "B/A" in text(d)


def test_the_closed_form_is_the_mean_of_the_sample():
    d = difference(loss("KL(student || T)"), spec(LOG_RATIO + "immediate"))
    assert d.kind == "expected" and d.variances.a < d.variances.b
    assert between("sampled_rtg", "minillm").kind == "expected"


def test_the_sampler_counts_in_expectation():
    """Off the student's own law a sampled estimate is no longer the divergence."""
    warm = "rollouts(student, temperature = 1.5)"
    d = difference(
        loss("KL(student || T)", state=warm),
        spec("support sampled\n  feedback reward logratio(T, student)\n  credit immediate",
             state=warm),
    )  # fmt: skip
    assert d.kind == "different"


def test_special_tokens_and_prompts_count_in_expectation():
    a = spec(LOG_RATIO + "immediate\n  gate not special(y)")
    assert difference(a, spec(LOG_RATIO + "immediate")).kind == "different"


# ---- different, with a witness -------------------------------------------------------------------


def test_another_strength_is_a_witness_at_one_state():
    source = SHIPPED["cr_opd"].read_text().replace("min(cap, -A)", "min(cap, -2 * A)")
    d = difference(shipped("cr_opd"), Compilation(Source("<copy>", source)))
    assert d.kind == "different" and changed(d) == {"routing, strength"}
    w = d.witness
    assert w is not None and (w.sequences, w.positions) == (1, 1) and w.vocabulary <= 5
    gaps = [abs(row["A"] - row["B"]) for row in w.rows]
    assert max(gaps) == pytest.approx(w.gap) and w.gap > 1e-3


def test_a_witness_has_the_states_it_needs():
    d = difference(spec(LOG_RATIO + "immediate"), spec(LOG_RATIO + "return_to_go"))
    assert d.witness is not None and (d.witness.sequences, d.witness.positions) == (1, 2)
    assert d.witness.place == (0, 0) and d.witness.others


def test_knob_settings():
    d = difference(shipped("gkd"), shipped("gkd", beta=0.3))
    assert d.kind == "different" and changed(d) == {"knobs"}
    assert difference(shipped("gkd", beta=0.3), shipped("gkd", beta=0.3)).kind == "same"


def test_another_number_of_teachers_has_no_common_batch():
    d = difference(shipped("cr_opd"), shipped("verifier_hybrid"))
    assert d.kind == "different" and "A asks 1 teacher, B asks 2" in verdict(d)
    assert d.roles.why_not and "rescue: routing" not in changed(d)


# ---- where methods meet --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "divergence, end, scale",
    [("KL(T || student)", 0, "beta"), ("KL(student || T)", 1, "(1 - beta)")],
)
def test_gkd_becomes_a_divergence_at_the_ends_of_beta(divergence, end, scale):
    same = "mix(0.5: rollouts(student, temperature = 0.9), 0.5: sequences(data))"
    d = difference(shipped("gkd"), loss(divergence, state=same))
    assert d.kind == "different"
    (found,) = d.cases
    assert (found.settings, found.approached) == ((("beta", float(end)),), ("beta",))
    assert (found.agreement.kind, found.scale, found.states) == ("gradient", scale, "same")
    (mirrored,) = difference(loss(divergence, state=same), shipped("gkd")).cases
    assert (mirrored.side, mirrored.scale) == ("B", scale)


GAE = (
    "param gam : real in [0, 1] = 0.9\n  param lam : real in [0, 1] = 0.9\n"
    "  let V : nats per token = critic(init = zero, lr = 0.01)\n  "
    + LOG_RATIO
    + "gae(V = V, gamma = gam, lam = lam)"
)


def test_corners_of_gae():
    now = meets(difference(spec(GAE), spec(LOG_RATIO + "immediate")))
    assert "lam = 0 in A, with V = 0: the same loss and gradient" in now
    later = meets(difference(spec(GAE), spec(LOG_RATIO + "return_to_go")))
    assert "gam = 1 and lam = 1 in A: equal in expectation" in later
    assert "gam = 1 in A, with an exact critic: equal in expectation" in later
    vopd = meets(difference(spec(GAE), spec(LOG_RATIO + "immediate(baseline = kl_state)")))
    assert "gam = 0 in A, with an exact critic: the same loss and gradient" in vopd


def test_shipped_critics():
    found = meets(difference(shipped("gae_opd"), shipped("minillm")))
    assert "lam = 1 in A: equal in expectation" in found
    assert "with an exact critic: equal in expectation" in found
    found = meets(difference(shipped("sampled_opd"), shipped("gae_opd")))
    assert found == ["lam = 0 in B, with V = 0: the same loss and gradient"]


def test_a_knob_that_switches_a_term_off_and_a_set_that_covers_everything():
    found = meets(difference(loss("KL(student || T)"), shipped("entropy_aware")))
    assert "alpha = 0 in B: the same loss and gradient" in found
    cut = spec(
        "param k : int in [1, 64] = 4\n  support top(k, of = T, tail = renormalize)\n"
        "  feedback loss KL(student || T)"
    )
    assert meets(difference(loss("KL(student || T)"), cut)) == [
        "k covers the vocabulary in B: the same loss and gradient"
    ]


def test_nothing_meets_by_accident():
    assert not difference(shipped("cr_opd"), shipped("sampled_opd")).cases
    assert not difference(loss("KL(student || T)"), loss("KL(T || student)")).cases


# ---- both ways, every format ------------------------------------------------------------------------


PAIRS = [
    ("gkd", "topk_match"), ("gae_opd", "sampled_rtg"), ("sampled_rtg", "minillm"),
    ("entropy_aware", "sampled_opd"), ("squeeze_guard", "cr_opd"),
]  # fmt: skip


@pytest.mark.parametrize("x, y", PAIRS)
def test_the_verdict_is_the_same_both_ways(x, y):
    d, e = between(x, y), between(y, x)
    assert (d.kind, d.states, changed(d)) == (e.kind, e.states, changed(e))
    swap = str.maketrans("AB", "BA")
    assert sorted(meets(d)) == sorted(m.translate(swap) for m in meets(e))
    if d.variances is not None:
        assert (d.variances.a, d.variances.b) == pytest.approx((e.variances.b, e.variances.a))


@pytest.mark.parametrize("x, y", [("gkd", "gkd"), *PAIRS])
def test_formats(x, y):
    d = between(x, y)
    assert max(map(len, text(d).splitlines())) <= 80
    found = json.loads(json.dumps(data(d)))
    assert {"a", "b", "verdict", "equal", "statement", "states", "tested", "roles", "changed",
            "unchanged", "passport", "variance", "witness", "special_cases"} <= set(found)  # fmt: skip
    assert found["a"]["method"] == x and set(found["a"]["fingerprints"]) >= {"method"}
    assert all(set(row) == {"axis", "a", "b"} for row in found["changed"])
    rows = [line for line in markdown(d).splitlines() if line.startswith("|")]
    assert all(row.replace("\\|", "").count("|") == 4 for row in rows)


@pytest.mark.parametrize("seed", range(1, 40, 6))
def test_generated_pairs(seed):
    a, b = (generate.compiled(generate.spec(s).text).compilation for s in (seed, seed + 1))
    d = difference(a, b)
    assert d.equal == (d.witness is None or d.kind == "gradient")
    assert max(map(len, text(d).splitlines())) <= 80
    json.dumps(data(d))


# ---- the command ---------------------------------------------------------------------------------------


def run(*words, input=None):
    result = CliRunner().invoke(cli, [str(w) for w in words], input=input)
    assert "Traceback" not in result.output
    return result


def test_exit_codes_and_settings():
    assert run("diff", "gkd", "gkd").exit_code == 0
    assert run("diff", "gkd", "gkd", "--set-b", "beta=0.3").exit_code == 1
    assert run("diff", "gkd", "gkd", "--set", "beta=0.3").exit_code == 0
    assert run("diff", "gkd", "gkd", "--set", "beta").exit_code == 2
    assert run("diff", "gkd").exit_code == 2
    assert run("diff", "-", "-").exit_code == 2


def test_standard_input_and_methods_of_one_file(tmp_path):
    source = SHIPPED["gkd"].read_text()
    assert run("diff", "-", "gkd", input=source).exit_code == 0
    path = tmp_path / "two.opd"
    body = source.partition("method gkd")[2]
    path.write_text(f"opd 1\nmethod one{body}\nmethod two{body.replace('= 0.9)', '= 1)')}")
    found = json.loads(run("diff", f"{path}@one", path, "--format", "json").output)
    assert (found["a"]["method"], found["b"]["method"]) == ("one", "two")
    assert found["verdict"] == "equal" and found["states"] == "different"
    assert run("diff", path, path, "--method-a", "two").exit_code == 0
    assert run("diff", f"{path}@one", path, "--method-a", "two").exit_code == 2


@pytest.mark.parametrize("words", [("missing", "gkd"), ("gkd", "no/such.opd")])
def test_a_missing_spec(words):
    with pytest.raises(Exception) as error:
        CliRunner().invoke(cli, ["diff", *words], catch_exceptions=False)
    assert error.value.diagnostics[0].code == "OPD711"


def test_faults_of_both_sides_are_reported(tmp_path):
    good = SHIPPED["sampled_opd"].read_text()
    bad = tmp_path / "bad.opd"
    bad.write_text(good.replace("logratio(T, rollout)", "logratio(Q, rollout)"))
    done = subprocess.run(
        [sys.executable, "-m", "opdsl", "diff", str(bad), "missing"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "OPD101" in done.stderr and "OPD711" in done.stderr


def test_the_page_shows_what_is_printed():
    page = (specs().parent / "docs" / "how-to.md").read_text(encoding="utf-8")
    block = page.partition("$ opdsl diff sampled_opd gae_opd\n")[2].partition("```")[0]
    printed = run("diff", "sampled_opd", "gae_opd").output.splitlines()
    for line in block.splitlines():
        assert line in printed or line == "…", line
