"""LaTeX and markdown of explanations: every formula is set by mathtext here, and the `align*`
fragments compile where a TeX is installed (slow)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.mathtext import MathTextParser
from support import generate

import opdsl
from opdsl.formula.explain import Explanation
from opdsl.formula.paper import lines_of, markdown, paper
from opdsl.resources import methods

SHIPPED = methods()
FEW, MANY = range(0, 40, 2), range(100)
PARSER = MathTextParser("path")


def of(text_or_path) -> Explanation:
    found = opdsl.load(text_or_path) if isinstance(text_or_path, Path) else None
    return Explanation((found or generate.compiled(text_or_path)).compilation)


def check(e: Explanation) -> None:
    fragment = paper(e)
    assert fragment.isascii(), {c for c in fragment if not c.isascii()}
    assert r"\usepackage{amsmath}" in fragment.splitlines()[0]
    assert fragment.count(r"\begin{align*}") == fragment.count(r"\end{align*}") == 1
    for line in lines_of(e):
        PARSER.parse(f"${line}$")
    assert len(lines_of(e)) == fragment.count("&")  # one place to align in every line


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_specs_are_set_by_mathtext(path):
    check(of(path))


@pytest.mark.parametrize("seed", FEW)
def test_generated_specs_are_set_by_mathtext(seed):
    check(of(generate.spec(seed).text))


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("tectonic") or shutil.which("pdflatex")),
    reason="neither tectonic nor pdflatex is installed",
)
def test_everything_compiles(tmp_path):
    found = [of(p) for p in SHIPPED] + [of(generate.spec(seed).text) for seed in MANY]
    body = "\n".join(paper(e) for e in found)
    packages = "\\usepackage{amsmath}\n\\allowdisplaybreaks\n"
    text = f"\\documentclass{{article}}\n{packages}\\begin{{document}}\n{body}\\end{{document}}\n"
    (tmp_path / "all.tex").write_text(text)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    if shutil.which("tectonic"):
        command = ["tectonic", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "all.pdf").is_file()


# ---- markdown ----------------------------------------------------------------------------------


def formulas(text: str) -> list[str]:
    """What stands between dollars; the rest must have none but escaped ones."""
    found = re.findall(r"\$\$(.*?)\$\$|(?<!\\)\$([^$]+?)(?<!\\)\$", text, re.DOTALL)
    rest = re.sub(r"\$\$(.*?)\$\$|(?<!\\)\$([^$]+?)(?<!\\)\$", "", text, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)\$", rest)
    for line in rest.splitlines():  # an underscore or a star would start emphasis
        plain = re.sub(r"`[^`]*`", "", line)
        assert not re.search(r"(?<!\\)[_*]", plain), line
    return [a or b for a, b in found]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_markdown_renders(path):
    check_markdown(of(path))


@pytest.mark.parametrize("seed", FEW)
def test_markdown_of_generated_specs_renders(seed):
    check_markdown(of(generate.spec(seed).text))


def check_markdown(e: Explanation) -> None:
    text = markdown(e)
    for formula in formulas(text):
        for line in formula.strip().splitlines():
            PARSER.parse(f"${line.strip()}$")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows and all(row.replace("\\|", "").count("|") == 3 for row in rows)


def test_a_notebook_gets_one_display():
    text = opdsl.load("gkd")._repr_latex_()
    assert text.startswith("$$\\begin{aligned}") and text.endswith("\\end{aligned}$$")
    assert text.count("$") == 4


def test_names_with_signs_of_tex():
    text = """opd 1
method my_method_1 "50% of A_B & C#" {
  param a_b : real in (0, 1) = 0.5
  state     rollouts(student, group = 4)
  teacher   T_1 = external(access = logits)
  support   full
  feedback  loss a_b * KL(T_1 || student)
  aggregate mean(over = tokens)
}
"""
    e = Explanation(opdsl.compile(text).compilation)
    check(e)
    check_markdown(e)
    assert r"\mathrm{a\_b}" in paper(e)
