"""No text takes `check` or `explain` down: no fault, no hang, a bounded answer for every input.

`pytest tests/test_fuzz.py` runs some 800 inputs and everything that is large or deep; the ten
thousand of a release run with `pytest tests/test_fuzz.py -m slow` (ten minutes).
"""

from __future__ import annotations

import io
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest
from support import extremes, mutate
from support.generate import spec

from opdsl.cli.check import _all as every
from opdsl.cli.common import show
from opdsl.compilation import Compilation
from opdsl.diagnostics import CompileError, Diagnostic, Severity
from opdsl.formula.explain import FORMATS, Explanation, printed
from opdsl.render import render_github, render_json
from opdsl.source import Source
from opdsl.syntax.fmt import format_source
from opdsl.wrapping import cells

QUICK, THOROUGH, CHUNK = 800, 10_000, 500
SECONDS = 2.0  # what one command may take of an idle core: processor time, for the tests share one
HANG = 20  # seconds on the clock after which a command is cut off
MOST_REPORT, MOST_PAGE = 60_000, 60_000  # characters of an answer


class Hang(Exception):
    pass


def _cut_off(signal_number: int, frame: object) -> None:
    raise Hang


@pytest.fixture(autouse=True)
def no_hang(monkeypatch):
    old = signal.signal(signal.SIGALRM, _cut_off)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # they would end up on the user's terminal
        yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


class Stopwatch:
    """Runs commands one by one and keeps the longest time of one."""

    def __init__(self) -> None:
        self.longest = 0.0

    def __call__(self, command):
        signal.setitimer(signal.ITIMER_REAL, HANG)
        start = time.process_time()
        try:
            return command()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.longest = max(self.longest, time.process_time() - start)


def check(source: Source) -> tuple[Compilation, tuple[Diagnostic, ...], str]:
    """What `opdsl check` does with every method of a file, in all of its formats."""
    compilation, found = Compilation(source), every(source, {}, False)
    out = io.StringIO()
    show(found, "text", out)
    machine = len(render_json(found)) + len(render_github(found))
    assert machine <= MOST_REPORT + 4000 * len(found)
    return compilation, found, out.getvalue()


def explained(compilation: Compilation) -> list[str]:
    """What `opdsl explain` prints, in all of its formats."""
    found = Explanation(compilation)
    return [printed(found, format) for format in FORMATS]


def judge(item: mutate.Input) -> tuple[str, float]:
    """(how it ended, the longest command in seconds); AssertionError for what must not be."""
    watch = Stopwatch()
    compilation, found, text = watch(lambda: check(item.source))
    for d in found:
        span = d.primary.span
        assert 0 <= span.start <= span.end <= len(span.source.text), d.code
        assert d.code != "OPD900" and d.message
    assert len(text) <= MOST_REPORT and "\x1b" not in text and "Traceback" not in text
    if compilation.errors or not compilation.methods:
        with pytest.raises(CompileError) as refused:
            watch(lambda: explained(compilation))
        assert refused.value.diagnostics
        return "errors" if found else "nothing", watch.longest
    pages = watch(lambda: explained(compilation))
    assert all(0 < len(page) <= MOST_PAGE for page in pages)
    return "explained", watch.longest


def judged(items: Iterable[tuple[object, mutate.Input]]) -> Counter[str]:
    """Judge them all, then report every failure at once; prints the slowest."""
    ends: Counter[str] = Counter()
    failures, times = [], []
    for name, item in items:
        try:
            end, seconds = judge(item)
        except CompileError:
            end, seconds = "refused", 0.0
        except (Exception, Hang) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            failures.append(f"{name} {item.kind}: {type(error).__name__}: {str(error)[:200]} "
                            f"at {place.filename}:{place.lineno}")  # fmt: skip
            continue
        ends[end] += 1
        times.append((seconds, name, item.kind))
    slowest = sorted(times, key=lambda row: -row[0])[:5]
    print(dict(ends), *(f"{s:.2f} s {name} {kind}" for s, name, kind in slowest), sep="\n  ")
    assert not failures, "\n".join(failures)
    assert not slowest or slowest[0][0] <= SECONDS, slowest
    return ends


# ---- inputs ------------------------------------------------------------------------------


def test_random_and_mutated_inputs():
    ends = judged(mutate.stream(0, QUICK))
    assert ends["explained"] >= QUICK // 10 and ends["errors"] >= QUICK // 3


@pytest.mark.slow
@pytest.mark.parametrize("start", range(QUICK, QUICK + THOROUGH, CHUNK))
def test_ten_thousand_inputs(start):
    """`pytest tests/test_fuzz.py -m slow`: 10,000 further inputs, 500 at a time."""
    judged(mutate.stream(start, start + CHUNK))


def test_large_and_deep_inputs():
    found = {}
    judged((i, item) for i, item in enumerate(remembered(found)))
    for name, codes in found.items():
        if name.startswith("5 MB"):
            assert codes == ["OPD008"], name
        if name.startswith(("1000 ", "100000 ")) and name.split(" ", 1)[1] in extremes.NESTED:
            assert codes and set(codes) <= {"OPD003", "OPD008", "OPD009", "OPD013"}, name


def remembered(found: dict[str, list[str]]):
    """The extreme inputs, and what their diagnostics are."""
    for item in extremes.extremes():
        yield item
        found[item.kind] = [d.code for d in Compilation(item.source).diagnostics]


def test_inputs_are_the_same_every_time():
    assert [item for _, item in mutate.stream(0, 60)] == [item for _, item in mutate.stream(0, 60)]
    kinds = {item.kind.split(":")[0].split("/")[0] for _, item in mutate.stream(0, 400)}
    assert {"specs", "examples", "tests", "generated", "statements", "grammar", "words"} <= kinds


# ---- what a user sees --------------------------------------------------------------------


def test_reports_fit_eighty_columns():
    """Only what cannot be broken (a path, a name) may go beyond the width."""
    for _, item in mutate.stream(0, 300):
        for line in check(item.source)[2].splitlines():
            words = line.replace("`", "").split()
            assert cells(line) <= 80 or cells(max(words, key=len)) > 45, line


def test_json_and_annotations_are_as_many_as_the_reports():
    import json

    for _, item in mutate.stream(0, 150):
        found = Compilation(item.source).diagnostics
        assert len(json.loads(render_json(found))) == len(found)
        assert render_github(found).count("\n") == len(found)


# ---- the formatter -----------------------------------------------------------------------


def fingerprint(source: Source) -> str | None:
    from opdsl.ir.fingerprint import fingerprints

    compilation = Compilation(source)
    program = compilation.program if not compilation.errors else None
    return fingerprints(program)["method"] if program is not None else None


def formatted(sources: Iterable[Source]) -> int:
    """Formats each text that can be; every one keeps its meaning and is formatted once for all."""
    done = 0
    for source in sources:
        try:
            once = replace(source, text=format_source(source))
        except CompileError as refused:
            assert all(d.severity is Severity.ERROR for d in refused.diagnostics)
            continue
        assert format_source(once) == once.text
        assert fingerprint(once) == fingerprint(source)
        done += 1
    return done


def test_formatting_keeps_the_meaning_of_generated_specs():
    assert formatted(mutate.Input("generated", spec(n).text).source for n in range(60)) == 60


def test_formatting_of_mutated_inputs():
    assert formatted(item.source for _, item in mutate.stream(0, 400)) >= 100
