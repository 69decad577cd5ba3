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
    "OPD407": WRONG_USAGE,
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
    "OPD712": ENVIRONMENT,
    "OPD740": ENVIRONMENT,
    "OPD720": GUARD,
    "OPD721": GUARD,
    "OPD730": ENVIRONMENT,
    "OPD731": GUARD,
    "OPD732": GUARD,
    "OPD733": 1,
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
    """A guard met something no update may be made from; nothing was updated. Exit code 4.

    where: what was met; step, row, position: its place, None if it has no such place. note: the
    sample. skippable: whether `--skip-non-finite` may leave the step out.
    """

    def __init__(
        self,
        where: str,
        step: int,
        row: int | None,
        position: int | None,
        note: str,
        *,
        code: str = "OPD706",
        says: str = "is not finite",
        cures: Iterable[str] = (),
        skippable: bool | None = None,
    ):
        self.where, self.step, self.row, self.position = where, step, row, position
        self.skippable = code == "OPD706" if skippable is None else skippable
        place = f" at step {step}"
        if row is not None:
            place += f", sample {row}"
        if position is not None:
            place += f", position {position}"
        super().__init__(
            make(
                code,
                THIS_RUN,
                f"{where} {says}{place}",
                notes=(note, "the step was not kept; the last checkpoint is intact"),
                helps=tuple(cures) or CURES.get(where.partition(" of ")[0], ()),
            ),
            GUARD,
        )


# What to do about a number that is not finite, by what it was.
CURES = {
    "the score": (
        "check the teacher's files and its precision (--precision fp32);"
        " --skip-non-finite N leaves out up to N such steps",
    ),
    "the student's output": (
        "the weights overflowed some steps ago: look at `grad_norm` in metrics.jsonl and start"
        " afresh with a smaller --lr",
    ),
    "the output": (
        "a policy in a working precision (--precision fp32); if it is the student, a smaller --lr",
    ),
    "the loss": (
        "bound the signal in the spec: `shape clip(…)`, `credit discounted(…)`, `ppo_clip(…)`",
    ),
    "the gradient": ("--precision fp32, or a smaller --lr",),
    "the weights": ("continue with --resume and a smaller --lr, allowed by --allow-change lr",),
}


def out_of_memory(step: int, doing: str, rows: int, detail: str) -> RunProblem:
    """Memory ran out with `rows` rows in a pass, and fewer rows cannot help. Exit code 4."""
    first = (detail.strip().splitlines() or ["out of memory"])[0]
    return problem(
        "OPD721",
        f"out of memory at step {step} while {doing}, with {rows} row{'s' * (rows != 1)} at a time",
        notes=[first[:200], "the step was not kept; the last checkpoint is intact"],
        helps=[
            "a smaller --max-tokens, --precision bf16, an adapter"
            " (--set optimize.adapter=lora(rank = 8)), or a smaller model;"
            " then continue with --resume --allow-change"
        ],
    )


class TeacherLost(RunProblem):
    """A teacher outside this process stopped answering in a run; nothing was updated. Exit code 4.

    The weights are good, so the loop saves them before it ends.
    """

    def __init__(self, message: str):
        helps = ("bring it back and continue with --resume",
                 "--teacher-failure pause waits for it, drop_batch(N) leaves out up to N batches")  # fmt: skip
        super().__init__(make("OPD731", THIS_RUN, message, helps=helps), GUARD)


class BatchDropped(Exception):
    """A step is left out: `what` is counted, `message` says why."""

    def __init__(self, what: str, message: str):
        super().__init__(message)
        self.what, self.message = what, message


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
