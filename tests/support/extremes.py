"""Texts that are large or deep on purpose: nesting, chains, doubling names, files of 5 MB."""

from __future__ import annotations

import random
from collections.abc import Iterator

from support.mutate import Input, shipped

FRAME = """opd 1
method m {{
  state     rollouts(student)
  teacher   T = external(access = logits)
  support   full
  feedback  loss KL(T || student)
  weight    {}
  aggregate mean(over = tokens)
}}
"""
NESTED = {
    "parentheses": ("(", "1", ")"),
    "open parentheses": ("(", "", ""),
    "closed parentheses": ("", "1", ")"),
    "calls": ("exp(", "0", ")"),
    "sums of sets": ("sum(v in full: ", "student[v]", ")"),
    "choices": ("if ", "1 > 0", " then 1 else 1"),
    "choices to the right": ("if 1 > 0 then 1 else ", "1", ""),
    "minus": ("- ", "1", ""),
    "not": ("not ", "passed()", ""),
    "powers": ("1 ^ ", "1", ""),
    "sum": ("1 + ", "1", ""),
    "indices": ("", "student", "[y]"),
    "attributes": ("", "prompt", ".a"),
    "sets": ("{", "1", "}"),
    "set conditions": ("{v in ", "full", ": student[v] > 0}"),
    "divergences": ("KL(", "T", " || student)"),
    "definition": ("max(1, ", "1", ")"),
}


def extremes() -> Iterator[Input]:
    """Deep and large texts; each is drawn when it is asked for."""
    for name, (left, middle, right) in NESTED.items():
        for n in (10, 60, 120, 1_000, 100_000):
            yield Input(f"{n} {name}", FRAME.format(left * n + middle + right * n))
    for n in (10, 1_000, 100_000):
        yield Input(f"{n} blocks", "opd 1\n" + "method m {\n" * n + "}\n" * n)
        yield Input(f"{n} terms", "opd 1\nmethod m {\n" + "term a {\n" * n + "}\n" * n + "}\n")
        calls = "".join(f"def f{i}() : real = f{i + 1}() + f{i + 1}()\n" for i in range(n))
        yield Input(f"{n} definitions", f"opd 1\n{calls}def f{n}() : real = 1\n")
        yield Input(f"{n} lines", FRAME.format("1") + "# a\n" * n)
    for n in (5, 40, 400):
        lets = "".join(f"  let a{i} = a{i - 1} * a{i - 1}\n" for i in range(1, n))
        text = FRAME.format(f"a{n - 1}").replace(
            "  weight", f"  let a0 = student[y]\n{lets}  weight"
        )
        yield Input(f"{n} squares", text)
        calls = "".join(f"def f{i}() : real = f{i + 1}() * f{i + 1}()\n" for i in range(n))
        text = FRAME.format("f0()").replace("method", f"{calls}def f{n}() = student[y]\nmethod", 1)
        yield Input(f"{n} doubling definitions", text)
        terms = "".join(
            f"  term t{i} {{ support full feedback loss KL(T || student) }}\n" for i in range(n)
        )
        yield Input(f"{n} terms side by side", FRAME.format("1").replace("  weight    1", terms))
    size = 5 * 2**20
    spec_text = shipped()[0][1]
    yield Input("5 MB of specs", spec_text * (size // len(spec_text) + 1))
    yield Input("5 MB in one line", FRAME.format("1 + " * (size // 4) + "1"))
    yield Input("5 MB of one name", FRAME.format("x" * size))
    yield Input("5 MB of spaces", " " * size)
    yield Input("5 MB of lines", "\n" * size)
    yield Input("5 MB of brackets", "([{" * (size // 3))
    r = random.Random(5)
    yield Input("5 MB of random bytes", r.randbytes(size).decode("latin-1"))
    for n in (1, 100, 200):  # below the limit of a file, and as hard as it gets
        for piece in ("suport x\n", "gate (\n", "}\n", "{\n", "'", '"', "a = \n", "0 <", "1.2.3 ", "λ",
                      "method m {\n", "term a {\n", "if ", "opd 1 ", "def f(\n", "x ", "|| ", "((((", "#"):  # fmt: skip
            yield Input(
                f"{n} KB of {piece!r}", "opd 1\nmethod m {\n" + piece * (n * 1024 // len(piece))
            )
    for piece in ("  gate early(3)\n", "  let {n} = 1\n", '  accept nope{n} "x"\n', "  weight nope{n}\n",
                  "  regularize 0.1 * KL(student || initial)\n", "  param {n} : real in [0, 1] = 2\n",
                  "  support full\n", "  optimize { nope = {n} }\n", '  cite arxiv "{n}"\n'):  # fmt: skip
        for n in (100, 3_000):
            rows = "".join(piece.replace("{n}", f"q{i}") for i in range(n))
            yield Input(
                f"{n} x {piece.strip()!r}", FRAME.format("1").replace("  weight", rows + "  weight")
            )
    bare = FRAME.format("1").removeprefix("opd 1\n")
    for n in (20, 600):
        many = "".join(bare.replace("method m ", f"method m{i} ") for i in range(n))
        yield Input(f"{n} methods", f"opd 1\n{many}")
        yield Input(f"{n} methods of one name", f"opd 1\n{bare * n}")
    yield Input("5000 definitions of one name", "opd 1\n" + "def f() : real = 1\n" * 5000)
    yield Input("5000 imports", "opd 1\n" + 'import "./no.opd" (a)\n' * 5000)
    for n in (8, 30, 300):
        chain = "".join(f'method m{i} extends m{i + 1} "x" {{ }}\n' for i in range(n))
        last = bare.replace("method m ", f"method m{n} ")
        yield Input(f"{n} bases", f"opd 1\n{last}{chain}run r of m0 {{ }}\n")
        terms = "".join(
            f"method n{i} {{\n  teacher T = external(access = logits)\n  support full\n"
            f"  term a = n{i + 1}(T = T)\n  term b = n{i + 1}(T = T)\n}}\n"
            for i in range(n)
        )
        last = bare.replace("method m ", f"method n{n} ")
        main = bare.replace("feedback  loss KL(T || student)", "term a = n0(T = T)")
        yield Input(f"{n} doubling terms", f"opd 1\n{last}{terms}{main}")
