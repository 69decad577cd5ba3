"""Verifiers that live in one limited process: asked a case at a time, killed when they stall.

The process is this file, run as a program (`main`). It imports the module of its kind, whose
`prepare(argument)` gives the function `(response, reference) -> score`; whatever the function
raises is that case's error. The trainer's side (`Worker`) starts it at the first case, waits at
most `limits.time` for each verdict, and starts a new one after a stall, a few times a batch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

KINDS = {  # kind -> (module with `prepare`, package it needs, extra that brings the package)
    "regex": ("opdsl.train.verifiers.regex", None, None),
    "math": ("opdsl.train.verifiers.symbolic", "math_verify", "math"),
    "jsonschema": ("opdsl.train.verifiers.schema", "jsonschema", "jsonschema"),
}
START_UP = 60.0  # seconds for the imports of a worker
RESTARTS = 3  # new processes in one batch; further cases of that batch are errors


class Worker:
    """The trainer's side of a worker. See `verifiers.Judge`."""

    def __init__(self, name: str, kind: str, argument: str | None, limits, needs_reference: bool):
        self.name, self.kind, self.argument = name, kind, argument
        self.limits, self.needs_reference = limits, needs_reference
        self._process = None

    def check(self) -> None:
        """Raises RunProblem OPD712 if a package is missing, OPD112 for a bad argument."""
        from importlib.util import find_spec

        from opdsl.train.errors import problem

        _, package, extra = KINDS[self.kind]
        if package is not None and find_spec(package) is None:
            raise problem(
                "OPD712",
                f"the verifier `{self.kind}` needs the package {package.replace('_', '-')}",
                helps=[f"pip install 'opdsl[{extra}]'"],
            )
        fault = self._start()
        if fault:
            raise problem("OPD112", f"--verifier {self.name}: {fault}", exit_code=2)

    def __call__(self, cases: Sequence) -> list:
        from opdsl.train.sandbox import Stopped
        from opdsl.train.verify import MAX_TEXT, Verdict

        verdicts, stops, reason = [], 0, ""
        for case in cases:
            if stops > RESTARTS:
                verdicts.append(Verdict(None, f"not judged, after {stops} stops: {reason}"))
                continue
            if self.needs_reference and case.reference is None:
                verdicts.append(Verdict(None, "the row has no reference"))
                continue
            if len(case.response) > MAX_TEXT or len(case.reference or "") > MAX_TEXT:
                verdicts.append(Verdict(None, f"text longer than {MAX_TEXT:,} characters"))
                continue
            fault = self._start()
            if fault:
                stops, reason = stops + 1, fault
                verdicts.append(Verdict(None, fault))
                continue
            try:
                line = json.dumps([case.response, case.reference]).encode()
                answer = json.loads(self._process.ask(line))
                verdicts.append(Verdict(answer[0], answer[1]))
            except Stopped as stop:
                self._process, stops, reason = None, stops + 1, stop.reason
                verdicts.append(Verdict(None, stop.reason))
        return verdicts

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    def _start(self) -> str:
        """Start the process unless it runs; what is wrong with its set-up, or an empty string."""
        from opdsl.train.sandbox import Limited, Stopped

        if self._process is not None:
            return ""
        # The worker finds the same packages as we do, whatever its environment lacks.
        places = [str(Path(__file__).parents[3]), *(p for p in sys.path if p)]
        process = Limited(
            [sys.executable, "-I", __file__, json.dumps(places)], self.limits, answers=None
        )
        try:
            set_up = process.ask(json.dumps([self.kind, self.argument]).encode(), START_UP)
        except Stopped as stop:
            return f"its process does not start: {stop.reason}"
        fault = json.loads(set_up)[1]
        if fault:
            process.close()
        else:
            self._process = process
        return fault


def main() -> None:
    """The process's side: a line in, `[score or null, error]` out. Output of libraries goes to
    stderr, so that it cannot be taken for a verdict."""
    import os

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path[:] = list(dict.fromkeys([*sys.path, *json.loads(sys.argv[1])]))
    judge = None
    for line in sys.stdin:
        words = json.loads(line)
        try:
            if judge is None:
                judge = import_module(KINDS[words[0]][0]).prepare(words[1])
                score = 1.0
            else:
                score = float(judge(*words))
            answer = [score, ""] if 0.0 <= score <= 1.0 else [None, f"score {score}"]
        except BaseException as error:
            first, *_ = str(error).splitlines() or [""]
            answer = [None, f"{type(error).__name__}: {first}"[:200]]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
