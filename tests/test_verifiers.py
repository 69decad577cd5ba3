"""Verifiers: what each says, and that a failure is an error and never a score of 0."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opdsl.train.errors import RunProblem
from opdsl.train.sandbox import Limited, Limits, Stopped, parse_limits
from opdsl.train.verifiers import FORMS, make_judge
from opdsl.train.verifiers.command import read_verdict
from opdsl.train.verify import Case, Verdict, get_verifier

USUAL = Limits(time=20.0)  # a machine may be busy; only what stalls gets less
PYTHON = sys.executable


def judged(spec, *pairs, limits=USUAL) -> list[Verdict]:
    """Verdicts on (response, reference) pairs."""
    judge = make_judge(spec, limits)
    judge.check()
    try:
        return judge([Case("prompt", *pair) for pair in pairs])
    finally:
        judge.close()


def scores(spec, *pairs) -> list[float | None]:
    return [v.score for v in judged(spec, *pairs)]


def refused(spec, limits=USUAL) -> str:
    with pytest.raises(RunProblem) as caught:
        make_judge(spec, limits).check()
    found = caught.value.diagnostic
    return " ".join([found.code, found.message, *found.helps])


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "reference", "score"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", 1),
        (r"\boxed{\dfrac12}", "1/2", 1),
        (r"-\frac{1}{2}", "-0.5", 1),
        (r"2\frac{1}{2}", "2.5", 1),
        ("it is 2 1/2", "2.5", 1),
        ("2½ cups", "2.5", 1),
        ("3 × 10^5", "300000", 1),
        (r"3 \times 10^{-2}", "0.03", 1),
        ("50%", "0.5", 1),
        ("50%", "50", 1),  # the question asked for percent, and the reference leaves the sign out
        ("0.5", "50%", 1),
        ("5%", "50", 0),
        ("1\u202f024", "1024", 1),
        (r"1{,}024", "1024", 1),
        (r"\boxed{\$1,200.50}", "1200.5", 1),
        (r"\boxed{x = 5\text{ cm}}", "5", 1),
        (r"\boxed{90^\circ}", "90", 1),
        (r"\boxed{6} no, \boxed{7}", "7", 1),
        (r"\boxed{} so 7", "7", 1),
        (r"\boxed{2\sqrt{3}}", "3", 0),  # not a number, so not its last number either
        (r"\boxed{(3, 4)}", "4", 0),
        ("10^2", "100", 0),  # read, never evaluated
        ("#### Step 3\nso it is 4", "4", 1),
        ("#### 1. Add\nso it is 4", "4", 1),
        ("#### 12 apples\n13", "12", 1),
        ("1000004", "1000003", 0),  # whole numbers are compared exactly
        ("1000003.0000001", "1000003", 1),
        ("0.333333", "1/3", 1),
        ("0.3333", "1/3", 0),
        ("1e999", "1e999", 1),
        ("1e999", "1e-999", 0),
        ("5", "-5", 0),
        ("room 3-2", "2", 1),
    ],
)
def test_numbers(response, reference, score):
    assert get_verifier("numeric")(response, reference) == Verdict(float(score))


@pytest.mark.parametrize("piece", ["1", "1 ", "\\boxed{", "\\frac{1", "1,111", "#### 1", "1/", "½",
                                   "1 1/1 ", "1×10^", "-$", "\\text{", "1.", "####" + " " * 20,
                                   "{,}", "1\u2009", "1e"])  # fmt: skip
def test_long_texts_take_time_in_proportion(piece):
    """A pass that looks at every pair of places would need minutes here."""
    numeric = get_verifier("numeric")
    text = (piece * 100_000)[:100_000]
    assert numeric(text, "2").score is not None
    assert numeric(text + "x", "2") == Verdict(None, "text longer than 100,000 characters")


def test_text_keeps_what_makes_numbers_differ():
    same = get_verifier("text")
    assert same("The answer: -5.", "answer 5").score == 0
    assert same("3.5", "35").score == 0 and same("1,000!", "1,000").score == 1
    assert same("Co-op", "co op").score == 1


# ---- names ---------------------------------------------------------------------------------------


def test_names_and_mistakes(tmp_path):
    assert {"exact", "numeric", "text", "math"} <= set(FORMS)
    assert "OPD112 there is no verifier 'exakt'" in refused("exakt")
    assert "command:PROGRAM" in refused("exact:x") and refused("math:x").startswith("OPD112")
    assert "nothing stands behind" in refused("regex:")
    assert "not a pattern" in refused("regex:(a")
    assert refused(f"jsonschema:{tmp_path}/none").startswith("OPD702")
    assert "OPD712 the verifier's program ./none is not there" in refused("command:./none")
    (tmp_path / "judge").write_text("")
    assert "chmod +x" in refused(f"command:{tmp_path}/judge")
    assert refused("command:'x").startswith("OPD112") and refused("command: ").startswith("OPD112")


def test_a_missing_package_is_one_message(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs the package math-verify" in refused("math")
    assert "opdsl[jsonschema]" in refused("jsonschema")


def test_without_a_name_the_reference_decides():
    assert scores(None, ("so 4.0", "4"), ("The cat", "cat"), ("4 5", "4")) == [1, 1, 0]
    (verdict,) = judged(None, ("4", None))
    assert verdict == Verdict(None, "the row has no reference")


# ---- workers ---------------------------------------------------------------------------------------


def test_regex():
    assert scores("regex", ("abc", "b+"), ("aaa", "b")) == [1, 0]
    assert judged("regex", ("a", "("))[0].error.startswith("error: missing )")
    assert scores(r"regex:\bcat\b", ("a cat", None), ("cats", None)) == [1, 0]
    found = scores(r"regex:answer: (\S+)", ("answer: 4 answer: 5.0", "5"), ("none", "5"),
                   ("answer: Blue!", "blue"), ("answer: 4", None))  # fmt: skip
    assert found == [1, 0, 1, None]


def test_a_pattern_that_explodes_is_an_error_and_the_next_case_is_judged():
    judge = make_judge("regex:(a+)+$", Limits(time=0.5))
    bomb, fine = Case("", "a" * 40 + "b", "a"), Case("", "aa", "aa")
    found = judge([bomb, fine, bomb, fine, bomb, bomb, fine, fine])
    judge.close()
    assert [v.score for v in found] == [None, 1, None, 1, None, None, None, None]
    assert found[0].error == "no answer for 0.5 s"
    assert "not judged, after 4 stops" in found[-1].error, "restarts are bounded"


@pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="needs the extra `math`")
def test_math():
    found = scores(
        "math",
        (r"so $\frac{2}{4}$", "1/2"),
        (r"\boxed{2\sqrt{3}}", r"2\sqrt{3}"),
        ("2", r"2\sqrt{3}"),
        (r"\boxed{x^2 - 1}", "$(x-1)(x+1)$"),
        ("no idea", "3"),
        ("72", "48 + 24 = 72 #### 72"),
    )
    assert found == [1, 1, 0, 1, 0, 1]
    bomb, fine = judged("math", (r"$9^{9^{9^9}}$", "3"), ("3", "3"), limits=Limits(time=3))
    assert bomb == Verdict(None, "no answer for 3 s") and fine.score == 1


@pytest.mark.skipif(not importlib.util.find_spec("jsonschema"), reason="needs `jsonschema`")
def test_json_schema(tmp_path):
    place = tmp_path / "schema.json"
    place.write_text(json.dumps({"type": "object", "required": ["a"]}))
    spec = f"jsonschema:{place}"
    fenced = 'Here:\n```json\n{"a": 1}\n```\nDone.'
    found = scores(spec, ('{"a": 1}', None), ('{"b": 1}', None), (fenced, None), ("a", None),
                   ('{"a": NaN}', None))  # fmt: skip
    assert found == [1, 0, 1, 0, 0]
    assert scores("jsonschema", ("3", '{"type": "integer"}'), ("3", '{"type": 3}')) == [1, None]
    far = judged("jsonschema", ("3", '{"$ref": "http://127.0.0.1:9/x"}'))[0]
    assert far.score is None and "Unresolvable" in far.error, "nothing is fetched"
    bomb = json.dumps({"type": "string", "pattern": "(a+)+$"})
    stuck = judged("jsonschema", (json.dumps("a" * 40 + "b"), bomb), limits=Limits(time=1))
    assert stuck[0].score is None
    place.write_text('{"type": 3}')
    assert "SchemaError" in refused(spec)


# ---- commands --------------------------------------------------------------------------------------


def program(folder: Path, body: str, name="judge.py") -> str:
    """A program of Python lines that sees `rows` and `say(verdict)`."""
    place = folder / name
    place.write_text(
        f"#!{PYTHON} -IS\nimport json, os, sys, time\n"
        "def say(value): print(json.dumps(value), flush=True)\n"
        "rows = map(json.loads, sys.stdin)\n" + body
    )
    place.chmod(place.stat().st_mode | stat.S_IXUSR)
    return f"command:{place}"


RIGHT = "for r in rows: say(r['response'] == r['reference'])\n"
CASES = [("a", "a"), ("b", "a"), ("c", "c")]


def test_a_program_judges_a_batch(tmp_path):
    assert scores(program(tmp_path, RIGHT), *CASES) == [1, 0, 1]
    seen = program(tmp_path, "for r in rows: say(float(r == {'id': 0, 'prompt': 'p', 'response': 'r',"
                             " 'reference': None, 'fields': {'k': 'é'}}))")  # fmt: skip
    assert make_judge(seen, USUAL)([Case("p", "r", None, {"k": "é"})]) == [Verdict(1.0)]
    assert not make_judge(seen, USUAL).needs_reference and judged(seen) == []
    shell = tmp_path / "judge.sh"
    shell.write_text("#!/bin/sh\nwhile read line; do echo 0.5; done\n")
    shell.chmod(0o755)
    assert scores(f"command:{shell}", *CASES) == [0.5] * 3


def test_files_named_in_the_command_are_found_from_its_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rubric.txt").write_text("a")
    program(tmp_path, "word = open(sys.argv[1]).read()\nassert os.listdir('.') == []\n"
                      "for r in rows: say(r['response'] == word)\n")  # fmt: skip
    assert scores("command:./judge.py rubric.txt", ("a", None), ("b", None)) == [1, 0]


FAILURES = {  # body -> scores of three cases, what the first error says
    "import time; time.sleep(60)": ([None] * 3, "no answer for 1 s"),
    "for r in rows: say(1) if r['id'] != 1 or len(r['prompt']) else time.sleep(60)": ([1, 1, 1], ""),
    "for r in rows:\n  if r['response'] == 'b': time.sleep(60)\n  say(1)": ([1, None, 1], "no answer"),
    "for r in rows:\n  if r['response'] == 'b': sys.exit('oh no')\n  say(1)":
        ([1, None, 1], "ended with status 1: oh no"),
    "for r in rows:\n  if r['response'] == 'b': os.kill(os.getpid(), 9)\n  say(1)":
        ([1, None, 1], "killed by signal 9"),
    "for r in rows: say(1)\nsys.exit(3)": ([1, 1, 1], ""),
    "for r in rows: say(1); say(1)": ([None] * 3, "printed 6 verdicts for 3 responses"),
    "for r in list(rows)[1:]: say(1)": ([1, 1, None], "printed 2 verdicts for 3 responses"),
    "for r in rows: say([float('nan'), '1', None][r['id']])": ([None] * 3, "no score from 0 to 1"),
    "for r in rows: say([2, -1, {'score': 7}][r['id']])": ([None] * 3, "no score from 0 to 1"),
    "for r in rows: say([{'error': 'no gcc'}, True, {'score': 0.25}][r['id']])":
        ([None, 1, 0.25], "no gcc"),
    "for r in rows: say({'id': 2 - r['id'], 'score': 1})": ([None, 1, None], "printed the verdict of"),
    "for r in rows: print('what?')": ([None] * 3, "which is not JSON"),
    "raise SystemExit(0)": ([None] * 3, "printed 0 verdicts for 3"),
    "for r in rows: say(1)\nwhile True: print('x' * 1000)": ([None] * 3, "bytes of output"),
    "x = bytearray(3 * 10**9)": ([None] * 3, "MemoryError"),
    "for r in rows: say(1)\nif os.fork() == 0: os.setsid(); time.sleep(60)": ([1, 1, 1], ""),
}  # fmt: skip


@pytest.mark.parametrize("body", FAILURES)
def test_whatever_a_program_does_is_an_error_and_never_a_zero(tmp_path, body):
    stalls = "sleep(60)" in body and "fork" not in body and "len(" not in body
    limits = Limits(time=1.0 if stalls else 20.0, memory=10**9, output=50_000)
    expected, says = FAILURES[body]
    found = judged(program(tmp_path, body), *CASES, limits=limits)
    assert [v.score for v in found] == expected
    assert says in next((v.error for v in found if v.score is None), "")
    assert not any(v.score == 0 for v in found)


def test_verdicts_are_read_strictly():
    for line in (b"", b"NaN", b"Infinity", b"1e999", b'"1"', b"null", b"[1]", b"{}", b"\xff",
                 b"1 1", b"[" * 100_000, b'{"score": true, "id": 4}', b"1.0000001"):  # fmt: skip
        assert read_verdict(line, 0).score is None, line
    assert read_verdict(b'{"score": 1, "id": 4}', 4) == Verdict(1.0)
    assert len(read_verdict(b'{"error": "' + b"x" * 9999 + b'"}', 0).error) == 200


# ---- the fence -------------------------------------------------------------------------------------


def inside(code: str, limits=USUAL, **options) -> list[bytes]:
    """Lines that Python code prints in a limited process."""
    with Limited([PYTHON, "-IS", "-c", code], limits, **options) as process:
        return process.exchange(b"")


def stopped(code: str, **limits) -> str:
    with pytest.raises(Stopped) as caught:
        inside(code, Limits(**{"time": 20.0} | limits))
    return caught.value.reason


def test_nothing_of_the_environment_is_inherited_but_the_path(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    (line,) = inside(
        "import os, json; print(json.dumps([dict(os.environ), os.getcwd(), os.listdir()]))"
    )
    env, folder, listing = json.loads(line)
    assert set(env) <= {"PATH", "HOME", "TMPDIR", "LANG", "LC_CTYPE", "OMP_NUM_THREADS",
                        "OPENBLAS_NUM_THREADS"}  # fmt: skip
    assert env["PATH"] == os.environ["PATH"] and env["HOME"] == folder and listing == []
    assert not Path(folder).exists(), "it goes with the process"
    (line,) = inside("import os, sys; print(os.getsid(0) != int(sys.argv[-1]))" .replace(
        "int(sys.argv[-1])", str(os.getsid(0))))  # fmt: skip
    assert line == b"True"


def test_limits():
    assert stopped("while True: pass", cpu=1) == "more CPU time than its limit"
    assert "MemoryError" in stopped("bytearray(2 * 10**9)", memory=10**9)
    assert "File too large" in stopped("open('a', 'w').write('x' * 10**6)", files=10**5)
    assert "10,000 bytes of output" in stopped("print('x' * 10**6)", output=10_000)
    assert "10,000 bytes" in stopped(
        "import sys; print('x' * 10**6, file=sys.stderr)", output=10_000
    )
    assert stopped("import time; time.sleep(60)", time=0.2) == "no answer for 0.2 s"
    late = "import os, time; os.close(1); time.sleep(60)"
    assert stopped(late, time=0.5) == "it closed its output and did not end"


def alive(marker: str) -> bool:
    shown = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    return any(marker in line for line in shown.splitlines())


FAMILY = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: time.sleep(600)
        os._exit(0)
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are found by /proc")
def test_a_whole_family_is_killed_daemons_included():
    marker = f"# family {os.getpid()} a"
    assert stopped(FAMILY + marker, time=1.0).startswith("no answer")
    assert not alive(marker)


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are found by /proc")
def test_nothing_outlives_a_trainer_that_was_killed(tmp_path):
    marker = f"# family {os.getpid()} b"
    code = (
        "from opdsl.train.sandbox import *\n"
        f"p = Limited([{PYTHON!r}, '-IS', '-c', {FAMILY + marker!r}], Limits(time=60))\n"
        "print(p.ask(b''), flush=True)\nimport time; time.sleep(60)\n"
    )
    trainer = subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE)
    assert re.match(rb"b'\d+'", trainer.stdout.readline()) and alive(marker)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 10
    while alive(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(marker)


def test_limits_are_read_from_words():
    assert parse_limits(None) == Limits()
    found = parse_limits("time=5, cpu=7s,memory=2GB,output=1.5MB,files=10kb")
    assert found == Limits(5.0, 7.0, 2 * 10**9, 1_500_000, 10_000)
    for bad in ("time", "time=0", "time=5GB", "memory=-1", "memory=2s", "cores=2", "time=1e9"):
        with pytest.raises(RunProblem, match="OPD112"):
            parse_limits(bad)
