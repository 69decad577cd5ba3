"""The verifier `command:PROGRAM …`: the user's own program, in a limited process.

It reads one JSON object a line and prints one verdict a line, in the same order:

    {"id": 0, "prompt": "6 · 7?", "response": "It is 42.", "reference": "42", "fields": {…}}
    1                      or true, 0.5, {"score": 0.5}, {"error": "no compiler here"}

and ends with status 0. One process judges up to `CHUNK` responses. Where it stalls, crashes or
stops early, the verdicts it printed count, the first case without one is an error, and the cases
after that go to a new process, `RETRIES` times a batch. More lines than cases make all of that
process's verdicts errors: nobody knows whose they are.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdsl.train.errors import problem
from opdsl.train.sandbox import Limited, Limits, Stopped
from opdsl.train.verify import Case, Verdict

CHUNK = 256
RETRIES = 3


class Command:
    """See `verifiers.Judge`. Words of the command that name existing files are made absolute,
    because it runs in an empty folder. Raises RunProblem OPD112 for a command line that cannot
    be split into words."""

    needs_reference = False

    def __init__(self, line: str, limits: Limits):
        self.name, self.limits = f"command:{line}", limits
        try:
            words = shlex.split(line)
        except ValueError as error:
            reason = str(error).lower()
            raise problem("OPD112", f"--verifier command: {reason} in {line!r}") from None
        if not words:
            raise problem("OPD112", "--verifier command: no program is named", exit_code=2)
        self.words = [
            os.path.abspath(w) if i and os.path.exists(w) else w for i, w in enumerate(words)
        ]

    def check(self) -> None:
        """Raises RunProblem OPD712 if there is no such program; it is not run."""
        program = self.words[0]
        found = shutil.which(os.path.abspath(program) if os.sep in program else program)
        if found is None:
            there = os.sep in program and Path(program).is_file()
            raise problem(
                "OPD712",
                f"the verifier's program {program} "
                + ("may not be executed" if there else "is not there"),
                helps=[f"chmod +x {program}" if there else "--verifier 'command:./judge.sh'"],
            )
        self.words[0] = found

    def close(self) -> None:
        pass

    def __call__(self, cases: Sequence[Case]) -> list[Verdict]:
        self.check()
        verdicts: list[Verdict] = []
        failures = 0
        while len(verdicts) < len(cases):
            chunk = cases[len(verdicts) : len(verdicts) + CHUNK]
            found, reason = self._run(chunk)
            verdicts += found
            if not reason:
                continue
            failures += 1
            if len(found) < len(chunk):
                verdicts.append(Verdict(None, reason))
            if failures > RETRIES:
                rest = len(cases) - len(verdicts)
                verdicts += [Verdict(None, f"not judged, after {failures} stops: {reason}")] * rest
        return verdicts

    def _run(self, cases: Sequence[Case]) -> tuple[list[Verdict], str]:
        """Verdicts of one process, and why it stopped early (empty: it did not)."""
        data = b"".join(_line(i, case) for i, case in enumerate(cases))
        reason = ""
        with Limited(self.words, self.limits, answers=len(cases)) as process:
            try:
                lines = process.exchange(data)
            except Stopped as stop:
                lines, reason = stop.lines, stop.reason
        if len(lines) > len(cases):
            fault = f"printed {len(lines)} verdicts for {len(cases)} responses"
            return [Verdict(None, fault)] * len(cases), reason or fault
        if not reason and len(lines) < len(cases):
            reason = f"printed {len(lines)} verdicts for {len(cases)} responses"
        return [read_verdict(line, i) for i, line in enumerate(lines)], reason


def _line(number: int, case: Case) -> bytes:
    row: dict[str, Any] = {
        "id": number,
        "prompt": case.prompt,
        "response": case.response,
        "reference": case.reference,
        "fields": dict(case.fields),
    }
    return json.dumps(row, ensure_ascii=True).encode() + b"\n"


def read_verdict(line: bytes, number: int) -> Verdict:
    """One printed line as a verdict; anything that is not one is an error."""
    shown = line[:60].decode("utf-8", "replace")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return Verdict(None, f"printed {shown!r}, which is not JSON")
    if isinstance(value, dict):
        if value.get("id", number) != number:
            return Verdict(None, f"printed the verdict of {value['id']!r} for response {number}")
        if value.get("error"):
            return Verdict(None, str(value["error"])[:200])
        value = value.get("score")
    if isinstance(value, bool) or (isinstance(value, (int, float)) and 0.0 <= value <= 1.0):
        return Verdict(float(value))
    return Verdict(None, f"printed {shown!r}, which is no score from 0 to 1")
