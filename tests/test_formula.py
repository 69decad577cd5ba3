"""Formulas derived from programs: structure is recognised, hand-written equals library, and what
is printed has the value and the gradient of what was compiled."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import opdsl
from opdsl.formula import notation as nt
from opdsl.formula.definition import definition, names_of_library
from opdsl.formula.gradient import fields
from opdsl.formula.naming import named
from opdsl.formula.notation import latex, number, unicode
from opdsl.formula.sections import display, formula, one_line
from opdsl.ir.program import expand_tails
from opdsl.passport import field
from opdsl.passport.evaluate import CUT, Evaluator, S, V, random_world

SPEC = """opd 1
method probe "a probe" {{
  param beta : real in (0, 1) = 0.3
  param alpha : real in (0, 10) = 2
  {extra}
  state     rollouts(student, group = 4)
  teacher   T = external(access = logits)
  support   {support}
  feedback  {feedback}
  {credit}
  aggregate {aggregate}
}}
"""
TOP = "top(4, of = T, tail = {})"


def compiled(feedback, support="full", credit="", aggregate="mean(over = tokens)", extra=""):
    text = SPEC.format(
        feedback=feedback, support=support, credit=credit, aggregate=aggregate, extra=extra
    )
    return opdsl.compile(text)


def printed(feedback, support="full", **more):
    """(loss, [coefficient fields]) as unicode."""
    spec = compiled(feedback, support, **more).spec
    names = named(spec)
    (term,) = spec.terms
    loss = unicode(names.printer.expr(term.loss))
    return loss, [f"{unicode(f.left)} = {unicode(f.right)}" for f in fields(names, term)]


# ---- structure, not names --------------------------------------------------------------------

MIX = "(beta * T[v] + (1 - beta) * student[v])"
PAIRS = [
    ("full", "KL(student || T)", "sum(v in full: student[v] * log(student[v] / T[v]))"),
    ("full", "KL(student || T)", "-sum(v in support: student[v] * (log(T[v]) - log(student[v])))"),
    (
        "full",
        "KL(student || T)",
        "sum(v in full: student[v] * log(student[v])) - sum(v in full: log(T[v]) * student[v])",
    ),
    ("full", "KL(T || student)", "sum(v in full: (log(T[v]) - log(student[v])) * T[v])"),
    (
        "full",
        "JSD(T || student, beta = beta)",
        f"beta * sum(v in full: T[v] * log(T[v] / {MIX}))"
        f" + (1 - beta) * sum(v in full: student[v] * (log(student[v]) - log{MIX}))",
    ),
    (
        "full",
        "JSD(T || student, beta = 0.5)",
        "0.5 * KL(student || 0.5 * student + 0.5 * T) + 0.5 * KL(T || 0.5 * T + 0.5 * student)",
    ),
    ("full", "TV(student || T)", "0.5 * sum(v in full: abs(T[v] - student[v]))"),
    (
        "full",
        "hellinger(student || T)",
        "0.5 * sum(v in full: (T[v] ^ 0.5 - student[v] ^ 0.5) ^ 2)",
    ),
    ("full", "chi2(student || T)", "sum(v in full: (student[v] - T[v]) * (student[v] / T[v] - 1))"),
    (
        TOP.format("bin"),
        "KL(student || T)",
        "sum(v in support: student[v] * log(student[v] / T[v]))",
    ),
    (
        TOP.format("renormalize"),
        "KL(T || student)",
        "sum(v in support: T[v] * log(T[v] / student[v]))",
    ),
    ("sampled", "k2(student, T)", "0.5 * (log(student[y]) - log(T[y])) ^ 2"),
    ("sampled", "k2(student, T)", "0.5 * log(T[y] / student[y]) * log(T[y] / student[y])"),
    ("sampled", "k3(student, T)", "T[y] / student[y] - 1 + log(student[y] / T[y])"),
]


@pytest.mark.parametrize("support, library, hand", PAIRS)
def test_hand_written_prints_like_the_library(support, library, hand):
    assert printed(f"loss {library}", support) == printed(f"loss {hand}", support)


def test_fresh_names_change_nothing():
    text = SPEC.format(
        support="full", feedback="loss banana(student || T)", credit="", extra="",
        aggregate="mean(over = tokens)",
    ).replace(
        "method probe",
        "def banana(a : dist, b : dist) : nats per token\n"
        "  = sum(w in support: a[w] * (log(a[w]) - log(b[w])))\n\nmethod probe",
    )  # fmt: skip
    m, n = opdsl.compile(text), compiled("loss KL(student || T)")
    assert one_line(formula(m.spec, m.program)) == one_line(formula(n.spec, n.program))


@pytest.mark.parametrize(
    "feedback, support, loss, c",
    [
        ("KL(student || T)", "full", "KL(π_θ ‖ π_T)", "c_t(v) = −π_θ(v) ℓ_t(v)"),
        ("KL(T || student)", "full", "KL(π_T ‖ π_θ)", "c_t(v) = π_T(v)"),
        ("JSD(T || student, beta = beta)", "full", "JSD_β(π_T ‖ π_θ)",
         "c_t(v) = (1 − β) π_θ(v) log m(v)/π_θ(v)"),
        ("KL(student || T)", TOP.format("drop"), "KL_Ω(π_θ ‖ π_T)", "c_t(v) = −π_θ(v) (1 + ℓ_t(v))"),
        ("KL(student || T)", TOP.format("detach"), "KLˢᵍ_Ω(π_θ ‖ π_T)", "c_t(v) = −π_θ(v) ℓ_t(v)"),
        ("KL(student || T)", TOP.format("bin"), "KL_Ω⁺(π_θ ‖ π_T)",
         "c_t(v) = π_θ(v) (ℓ_t(rest) − ℓ_t(v))"),
        ("KL(T || student)", TOP.format("renormalize"), "KL_Ω(π̂_T ‖ π̂_θ)",
         "c_t(v) = π̂_T(v) − π̂_θ(v)"),
        ("k2(student, T)", "sampled", "½ ℓ_t²", "c_t = −ℓ_t e_{y_t}"),
        ("k3(student, T)", "sampled", "π_T(y_t)/π_θ(y_t) − 1 + ℓ_t",
         "c_t = (π_T(y_t)/π_θ(y_t) − 1) e_{y_t}"),
        ("-H(student)", "full", "−H(π_θ)", "c_t(v) = −π_θ(v) log π_θ(v)"),
        ("power(student || T)", "full", "½ ‖π_θ − π_T‖²", "c_t(v) = π_θ(v) (π_T(v) − π_θ(v))"),
        ("KL(student || T) + alpha * KL(student || initial)", "full",
         "KL(π_θ ‖ π_T) + α KL(π_θ ‖ π_0)",
         "c_t(v) = −π_θ(v) (ℓ_t(v) + α log π_θ(v)/π_0(v))"),
        ("if H(T) > 1 then KL(student || T) else KL(T || student)", "full",
         "1[H(π_T) > 1] KL(π_θ ‖ π_T) + 1[H(π_T) ≤ 1] KL(π_T ‖ π_θ)",
         "c_t(v) = 1[H(π_T) ≤ 1] π_T(v) − 1[H(π_T) > 1] π_θ(v) ℓ_t(v)"),
    ],
)  # fmt: skip
def test_losses_and_coefficients(feedback, support, loss, c):
    assert printed(f"loss {feedback}", support) == (loss, [c])


def test_nothing_that_cancels_is_printed():
    loss, _ = printed("loss (KL(student || T) + H(student)) + sum(v in full: student[v] * log(T[v]))"
                      " + KL(T || student)")  # fmt: skip
    assert loss == "KL(π_T ‖ π_θ)"
    loss, _ = printed("loss (log(student[y]) - log(T[y])) - (log(student[y]) - log(initial[y]))"
                      " + KL(student || T)")  # fmt: skip
    assert loss == "KL(π_θ ‖ π_T) + log π_0(y_t)/π_T(y_t)"


# ---- credit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "credit, lines",
    [
        ("immediate", ["A_t = log π_T(y_t) − log μ(y_t)"]),
        ("return_to_go", ["r_t = log π_T(y_t) − log μ(y_t)", "A_t = Σ_{k ≥ t} r_k"]),
        ("future_only", ["r_t = log π_T(y_t) − log μ(y_t)", "A_t = Σ_{k > t} r_k"]),
        ("discounted(0.9)", ["r_t = log π_T(y_t) − log μ(y_t)", "A_t = Σ_{k ≥ t} 0.9^(k−t) r_k"]),
        ("window(8)", ["r_t = log π_T(y_t) − log μ(y_t)", "A_t = Σ_{k = t … t+7} r_k"]),
        (
            "return_to_go(baseline = leave_one_out)",
            ["r_t = log π_T(y_t) − log μ(y_t)", "G_t = Σ_{k ≥ t} r_k", "A_t = G_t − mean_{j ≠ i} G_t^j"],
        ),
        ("immediate(baseline = kl_state)",
         ["r_t = log π_T(y_t) − log μ(y_t)", "A_t = r_t + KL(π_θ ‖ π_T)"]),
    ],
)  # fmt: skip
def test_credit(credit, lines):
    spec = compiled("reward logratio(T, rollout)", "sampled", credit=f"credit {credit}").spec
    names = named(spec)
    assert [f"{unicode(d.left)} {d.op} {unicode(d.right)}" for d in names.definitions] == lines
    (f,) = fields(names, spec.terms[0])
    assert f"{unicode(f.left)} = {unicode(f.right)}" == "c_t = A_t e_{y_t}"


def test_gae_with_a_discount():
    text = opdsl.load("gae_opd").compilation.source.text.replace("gamma = 1", "gamma = 0.9")
    text = text.replace('import "./sampled_opd.opd"', 'import "sampled_opd.opd"')
    names = named(opdsl.compile(text).spec)
    rows = [f"{unicode(d.left)} = {unicode(d.right)}" for d in names.definitions]
    assert rows[1:] == [
        "δ_t = r_t + 0.9 V(s_{t+1}) − V(s_t)",
        "A_t = Σ_{k ≥ t} (0.9 · λ)^(k−t) δ_k",
    ]


# ---- counterfactual routing: theory section 9.4 -----------------------------------------------------

ROUTED = [
    "c_t = (1 − n_t) A_t e_{y_t} + n_t [C_t ≠ ∅] m_t (ρ_t − e_{y_t})"
    " + n_t [C_t = ∅] A_t (e_{y_t} − 1/|V|)"
]


def routed(**changes: str):
    """Lines of the formula of cr_opd with some parts of its routing changed."""
    text = opdsl.load("cr_opd").compilation.source.text
    parts = {
        "when": "A + KL(student || T) < 0",
        "among": "{v in support: v != y and T[v] > student[v] and student[v] >= reach}",
        "toward": "T[v] - student[v]",
        "strength": "min(cap, -A)",
        "otherwise": "proportional",
    }
    for key, new in changes.items():
        assert parts[key] in text
        text = text.replace(parts[key], new)
    m = opdsl.compile(text)
    f = formula(m.spec, m.program)
    rows = {unicode(d.left): f"{d.op} {unicode(d.right)}" for d in f.where}
    rows["L"] = one_line(f)
    rows["c"] = unicode(f.gradient[0].right)
    return rows


def test_counterfactual_routing_is_derived():
    rows = routed()
    assert f"c_t = {rows['c']}" == ROUTED[0]
    assert rows["n_t"] == "= 1[A_t + KL_Ω⁺(π_θ ‖ π_T) < 0]"
    assert rows["C_t"] == "= {v ∈ Ω : v ≠ y_t, π_T(v) > π_θ(v), π_θ(v) ≥ reach}"
    assert rows["ρ_t(v)"] == "∝ π_T(v) − π_θ(v)"
    assert rows["m_t"] == "= min(cap, −A_t)"
    assert rows["Ω"] == "= {y_t} ∪ top-32(π_T)"


@pytest.mark.parametrize(
    "part, new, touched",
    [
        ("toward", "T[v]", {"ρ_t(v)"}),
        ("strength", "min(cap, 2 * -A)", {"m_t"}),
        ("among", "{v in support: v != y and T[v] > student[v]}", {"C_t"}),
        ("when", "A < 0", {"n_t", "KL_Ω⁺(p ‖ q)", "Ω"}),
        ("otherwise", "suppress", {"L", "c"}),
        ("otherwise", "drop", {"L", "c"}),
    ],
)
def test_a_change_of_the_routing_changes_its_own_line(part, new, touched):
    before, after = routed(), routed(**{part: new})
    changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    assert changed - {"Ω", "KL_Ω⁺(p ‖ q)"} == touched - {"Ω", "KL_Ω⁺(p ‖ q)"}


def test_fallbacks_of_the_routing():
    head = "(1 − n_t) A_t e_{y_t} + n_t [C_t ≠ ∅] m_t (ρ_t − e_{y_t})"
    assert routed(otherwise="suppress")["c"] == f"{head} + n_t [C_t = ∅] A_t e_{{y_t}}"
    assert routed(otherwise="drop")["c"] == head


# ---- the printed mathematics has the value and gradient of what was compiled ---------------------------

WORLD = random_world(41)


class Reader:
    """Evaluates printed expressions [S, Y, V] on random states, by their letters alone."""

    def __init__(self, spec, names):
        w = WORLD
        dists = {"π_θ": w.student, "π_T": w.teacher, "π_0": w.initial, "μ": w.student}
        self.values = {}
        mask = field.Evaluator(w).mask(spec.terms[0].support.base)
        self.mask = mask
        for name, logp in dists.items():
            p = np.broadcast_to(np.exp(logp), (S, V, V))
            self.values[f"{name}(v)"] = p
            self.values[f"{name}(y_t)"] = np.exp(logp[:, 0])[:, :, None]
            self.values[f"{name}(rest)"] = np.where(mask, 0, p).sum(-1, keepdims=True)
            hat = name[0] + "\u0302" + name[1:]
            inside = np.where(mask, p, 0)
            self.values[f"{hat}(v)"] = inside / inside.sum(-1, keepdims=True)
            self.values[name] = p  # as a vector
            self.values[f"{name}(Ω)"] = inside.sum(-1, keepdims=True)
        for p in spec.params:
            self.values[names.symbols.param(p.name).u] = p.value
        self.definitions = {}
        self.names = names

    def read(self, f):
        for d in f.where:
            self.definitions[unicode(d.left)] = d.right
        return self

    def __call__(self, m):
        key = unicode(m).replace("(w)", "(v)")  # sums keep their axis, so one index does
        if key in self.values:
            return self.values[key]
        if key == "e_{y_t}":
            return np.broadcast_to(np.eye(V)[None], (S, V, V))
        for index in ("(y_t)", "(rest)"):  # ℓ_t(rest) by the definition of ℓ_t(v)
            generic = self.definitions.get(f"{m.head.u}(v)") if isinstance(m, nt.Call) else None
            if generic is not None and key.endswith(index):
                return self.at(generic, index)
        if key in ("ℓ_t",):
            return self.at(self.definitions["ℓ_t(v)"], "(y_t)")
        if key in self.definitions:
            return self(self.definitions[key])
        match m:
            case nt.Num():
                return m.value
            case nt.Add():
                return sum((1 if s else -1) * self(x) for s, x in m.items)
            case nt.Mul():
                parts = np.stack([np.broadcast_to(self(x), (S, V, V)) for x in m.items])
                return np.where((parts == 0).any(0), 0, np.prod(parts, 0))  # 0 outside a set
            case nt.Frac():
                return self(m.top) / self(m.bottom)
            case nt.Pow() if key.startswith("‖"):
                return self.squared(m)
            case nt.Pow():
                return self(m.base) ** self(m.exponent)
            case nt.Root():
                return self(m.body) ** 0.5
            case nt.Fn():
                return np.log(self(m.arg))
            case nt.Ind():
                return np.asarray(self.test(m.test), float)
            case nt.Wrap():
                x = self(m.body)
                return np.abs(x) if m.kind == "abs" else np.maximum(x, 0)
            case nt.Big():
                return self.total(m)
            case nt.Call() if m.head.u in ("min", "max"):
                return (np.minimum if m.head.u == "min" else np.maximum)(*map(self, m.args))
            case nt.Call():
                return self.divergence(m)
        raise AssertionError(key)

    def at(self, m, index):
        text = {k: v for k, v in self.values.items() if k.endswith("(v)")}
        swapped = {
            k: self.values[k.replace("(v)", index)]
            for k in text
            if k.replace("(v)", index) in self.values
        }
        old, self.values = self.values, {**self.values, **swapped}
        try:
            return self(m)
        finally:
            self.values = old

    def over(self, x, under):
        x = np.broadcast_to(x, (S, V, V))
        return np.where(self.mask, x, 0) if "Ω" in under else x

    def total(self, m):
        assert m.sign == "Σ"
        x = self.over(self(m.body), unicode(m.under))
        for part in m.under.items if isinstance(m.under, nt.Join) else (m.under,):
            colon = isinstance(part, nt.Rel) and part.op == ":"
            if colon or part is not m.under:  # Σ over the entries that pass a test
                x = x * self.test(part.right if colon else part)
        return x.sum(-1, keepdims=True)

    def divergence(self, m):
        """KL_…(p ‖ q) by its own printed definition, with p and q put in; a bin is added here."""
        head = m.head.u
        generic = next(d for k, d in self.definitions.items() if k.startswith(head + "("))
        sides = dict(zip("pq", (unicode(a) for a in m.args)))
        for letter, name in sides.items():
            for index in ("(v)", "(rest)"):
                if name + index in self.values:
                    self.values[letter + index] = self.values[name + index]
                elif index == "(v)":
                    self.values[letter + index] = self(self.definitions[name + index])
            self.values[letter + "\u0302(v)"] = self.values[letter + "(v)"]
        total = self(generic) if not head.startswith("JSD") else self.jsd(m)
        if head.endswith("⁺"):
            total = total + self.at(generic.body, "(rest)")
        return total

    def jsd(self, m):
        p, q = self.values["p(v)"], self.values["q(v)"]
        beta = self.values["β"]
        mix = beta * p + (1 - beta) * q
        kl = lambda a: (a * np.log(a / mix)).sum(-1, keepdims=True)  # noqa: E731
        return beta * kl(p) + (1 - beta) * kl(q)

    def squared(self, m):
        gap = self.values["π_θ(v)"] - self.values["π_T(v)"]
        return (gap**2).sum(-1, keepdims=True)

    def test(self, m):
        if isinstance(m, nt.Join):
            parts = [self.test(x) for x in m.items]
            out = parts[0]
            for x in parts[1:]:
                out = (out & x) if m.op == "and" else (out | x)
            return out
        text = unicode(m).replace("w ", "v ", 1)
        if text == "v = y_t":
            return np.eye(V, dtype=bool)[None]
        if text in ("v ∈ Ω", "v ∉ Ω"):
            return self.mask if "∈" in text else ~self.mask
        if text in ("y_t ∈ Ω", "y_t ∉ Ω"):
            inside = np.einsum("syy->sy", self.mask)[:, :, None]
            return inside if "∈" in text else ~inside
        ops = {"<": np.less, ">": np.greater, "≤": np.less_equal, "≥": np.greater_equal}
        return ops[m.op](self(m.left), self(m.right))


VALUES = [
    ("full", "KL(student || T)"),
    ("full", "alpha * KL(T || student)"),
    ("full", "JSD(T || student, beta = beta)"),
    ("full", "skew_KL(student || T)"),
    ("full", "TV(student || T)"),
    ("full", "hellinger(student || T)"),
    ("full", "chi2(student || T)"),
    ("full", "power(student || T)"),
    ("full", "power(student || T, alpha = 2)"),
    ("full", "alpha_beta(T || student)"),
    ("full", "KL(student || T) + alpha * KL(student || initial) - 0.1 * H(student)"),
    ("full", "if H(T) > 1 then KL(student || T) else KL(T || student)"),
    (TOP.format("drop"), "KL(student || T)"),
    (TOP.format("bin"), "KL(student || T)"),
    (TOP.format("bin"), "KL(T || student)"),
    (TOP.format("renormalize"), "KL(student || T)"),
    (TOP.format("renormalize"), "KL(T || student)"),
    (TOP.format("sampled"), "KL(student || T)"),
    (TOP.format("sampled"), "KL(T || student)"),
    ("sampled", "k2(student, T)"),
    ("sampled", "k3(student, T)"),
    ("sampled", "clip(logratio(student, T) ^ 2, -1, 1)"),
]


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("support, feedback", VALUES)
def test_what_is_printed_is_what_was_compiled(support, feedback):
    assert CUT == 4
    m = compiled(f"loss {feedback}", support)
    f = formula(m.spec, m.program)
    (term,), reader = m.spec.terms, Reader(m.spec, f.names).read(f)
    loss = nt.Add(f.blocks[0].items)
    if "clip" not in feedback:
        want = np.broadcast_to(
            Evaluator(WORLD).token(expand_tails(m.spec.builder, term.loss)), (S, V)
        )
        have = np.broadcast_to(np.asarray(reader(loss)), (S, V, V))[:, :, 0]
        assert np.allclose(have, want, atol=1e-9)
    want_u = field.per_token(m.spec, term.loss, WORLD)
    c = np.zeros((S, V, V))
    for g in f.gradient:
        x = np.broadcast_to(np.asarray(reader(g.right)), (S, V, V))
        c = c + (np.where(reader.mask, x, 0) if g.place is not None else x)
    u = c - c.sum(-1, keepdims=True) * reader.values["π_θ(v)"]
    assert np.allclose(u, want_u, atol=1e-8)
    (push,) = f.push
    assert np.allclose(np.broadcast_to(reader(push.right), (S, V, V)), want_u, atol=1e-8)


def test_the_routed_field_is_what_was_compiled():
    m = opdsl.load("cr_opd", set={"reach": 0.2})
    f = formula(m.spec, m.program)
    reader = Reader(m.spec, f.names).read(f)
    defs = {unicode(d.left): d.right for d in f.where}
    values = reader.values
    values["A_t"] = reader(defs["A_t"])
    values["n_t"] = reader(defs["n_t"])
    inside, *tests = defs["C_t"].body.items
    chosen = reader.mask & (np.eye(V) == 0)[None]  # v in Ω, v ≠ y_t
    for test in [inside.right, *tests][1:]:
        chosen = chosen & reader.test(test)
    assert unicode(inside) == "v ∈ Ω : v ≠ y_t"
    weight = np.where(chosen, np.maximum(reader(defs["ρ_t(v)"]), 0), 0)
    total = weight.sum(-1, keepdims=True)
    values["ρ_t"] = weight / np.where(total > 0, total, 1)
    values["m_t"] = reader(defs["m_t"])
    values["[C_t ≠ ∅]"], values["[C_t = ∅]"] = 1.0 * (total > 0), 1.0 * (total == 0)
    values["|V|"] = V
    assert 0 < values["n_t"].mean() < 1 and 0 < values["[C_t = ∅]"].mean() < 1
    c = np.broadcast_to(reader(f.gradient[0].right), (S, V, V))
    u = c - c.sum(-1, keepdims=True) * values["π_θ(v)"]
    want = field.per_token(m.spec, m.spec.terms[0].loss, WORLD)
    assert np.allclose(u, want, atol=1e-9)
    assert np.allclose(np.broadcast_to(reader(f.push[0].right), (S, V, V)), want, atol=1e-9)


# ---- rendering -----------------------------------------------------------------------------------------


def test_numbers():
    assert [number(x) for x in (0.5, -0.25, 3.0, 1e-8, 2.5e-7)] == [
        "½",
        "−¼",
        "3",
        "10⁻⁸",
        "2.5·10⁻⁷",
    ]
    assert number(1e-8, True) == "10^{-8}"


def test_latex_is_understood_by_mathtext():
    from matplotlib.mathtext import MathTextParser

    parser = MathTextParser("path")
    texts = []
    for support, feedback in VALUES:
        m = compiled(f"loss {feedback}", support)
        f = formula(m.spec, m.program)
        texts += [
            display(f),
            *(latex(d.right) for d in f.where),
            *(latex(g.right) for g in f.gradient),
        ]
    for text in texts:
        parser.parse(f"${text}$")


def test_long_formulas_break_outside_brackets():
    lines = nt.folded("a b c d + (e f g h) + i j k l m", 20, "  ")
    assert lines == ["a b c d + (e f g h)", "  + i j k l m"]


# ---- definitions -----------------------------------------------------------------------------------------


def test_every_definition_of_the_library_has_a_formula():
    found = {name: definition(name) for name in names_of_library()}
    assert all(d is not None and d.formula for d in found.values())
    assert found["KL"].formula == "KL(p ‖ q) = Σ_v p(v) log p(v)/q(v)"
    assert found["window"].formula == "window(r, n) = Σ_{k = t … t+n−1} r_k"
    assert found["ppo_clip"].formula.count("1[") == 2
    assert "gae(r : nats" in found["gae"].text()
    assert definition("kl_state").name == "baseline_kl_state"
    assert definition("nothing") is None


# ---- sympy -------------------------------------------------------------------------------------------------


def test_sympy_agrees_on_what_is_the_same():
    from opdsl.formula.to_sympy import same, to_sympy

    m = compiled("loss KL(student || T)")
    b = m.spec.builder
    s, t, full = b.logp("student", True), b.logp("T", False), b.set_("full")
    kl = m.spec.terms[0].loss
    parts = b.sub(
        b.sum_v(b.mul(b.exp(s), s), full), b.sum_v(b.mul(t, b.exp(s)), full)
    )  # fmt: skip
    assert same(kl, parts)
    other = compiled("loss KL(T || student)").spec.terms[0].loss
    assert not same(kl, other)
    assert {x.name for x in to_sympy(kl).atoms() if hasattr(x, "name")} >= {"v"}


# ---- start-up ----------------------------------------------------------------------------------------------


def test_formula_loads_neither_torch_nor_sympy():
    code = (
        "import sys, opdsl.formula, opdsl.formula.explain, opdsl.passport.report\n"
        "bad = [m for m in ('torch', 'transformers', 'sympy') if m in sys.modules]\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
