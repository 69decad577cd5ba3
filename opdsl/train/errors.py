"""What can stop a run, and the exit code each cause leaves behind.

The trainer raises `RunProblem` with one registered diagnostic (codes OPD7xx, OPD40x); the
command line prints it and exits with `exit_code`. A stack trace is for faults of opdsl only.
"""

from __future__ import annotations

from collections.abc import Iterable

from opdsl.codes import make
from opdsl.diagnostics import CompileError, Diagnostic
from opdsl.source import Source, Span

THIS_RUN = Span(Source("this run", ""), 0, 0)  # the place of diagnostics that have none in a spec

WRONG_USAGE = 2
ENVIRONMENT = 3
GUARD = 4

# Exit code of each run diagnostic; 1 (diagnostics found) where the data or the spec is at fault.
EXIT_CODES = {
    "OPD110": WRONG_USAGE,
    "OPD111": WRONG_USAGE,
    "OPD112": WRONG_USAGE,
    "OPD119": WRONG_USAGE,
    "OPD402": WRONG_USAGE,
    "OPD403": ENVIRONMENT,
    "OPD404": ENVIRONMENT,
    "OPD701": ENVIRONMENT,
    "OPD702": ENVIRONMENT,
    "OPD703": 1,
    "OPD704": ENVIRONMENT,
    "OPD705": WRONG_USAGE,
    "OPD706": GUARD,
    "OPD707": 1,
    "OPD708": WRONG_USAGE,
    "OPD709": 1,
    "OPD710": ENVIRONMENT,
    "OPD711": WRONG_USAGE,
}


class RunProblem(CompileError):
    """The run cannot start or go on; `.diagnostics` holds exactly one diagnostic."""

    def __init__(self, diagnostic: Diagnostic, exit_code: int | None = None):
        super().__init__([diagnostic])
        self.diagnostic = diagnostic
        self.exit_code = EXIT_CODES.get(diagnostic.code, 1) if exit_code is None else exit_code

    @property
    def message(self) -> str:
        return self.diagnostic.message


class GuardStop(RunProblem):
    """A non-finite number was met; nothing was updated. Exit code 4.

    where: what was not finite; step, row, position: where, None if it has no such place.
    """

    def __init__(self, where: str, step: int, row: int | None, position: int | None, note: str):
        self.where, self.step, self.row, self.position = where, step, row, position
        place = f" at step {step}"
        if row is not None:
            place += f", sample {row}"
        if position is not None:
            place += f", position {position}"
        super().__init__(
            make(
                "OPD706",
                THIS_RUN,
                f"{where} is not finite{place}",
                notes=(note, "the update was not applied; the last checkpoint is intact"),
            ),
            GUARD,
        )


class Interrupted(Exception):
    """A signal asked the run to end; the step in progress was finished and saved."""

    def __init__(self, signal_number: int, step: int, checkpoint: str | None):
        super().__init__(f"stopped by signal {signal_number} after step {step}")
        self.signal_number, self.step, self.checkpoint = signal_number, step, checkpoint

    @property
    def exit_code(self) -> int:
        return 128 + self.signal_number


def problem(
    code: str,
    message: str,
    *,
    helps: Iterable[str] = (),
    notes: Iterable[str] = (),
    exit_code: int | None = None,
) -> RunProblem:
    """A RunProblem of a registered code, without a place in a spec.

    raise problem("OPD701", "no model at ./student", helps=["--student DIR"])
    """
    return RunProblem(make(code, THIS_RUN, message, notes=notes, helps=helps), exit_code)
