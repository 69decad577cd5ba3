"""Verifiers by name: what `--verifier` may say, and what judges a batch.

    judge = make_judge("numeric", Limits())
    judge([Case("6 · 7?", "It is 42.", "42")])          # [Verdict(1.0)]

Three families. *Plain* functions run in process: they can be slow in no way (`verify.register`).
*Workers* (`regex`, `math`, `jsonschema`) live in one limited process each, because a pattern, a
formula or a schema can take for ever on a text (`worker`). A *command* is the user's own program,
one limited process for each batch (`command`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from opdsl.train.errors import problem
from opdsl.train.sandbox import Limits
from opdsl.train.verifiers.numbers import is_number
from opdsl.train.verify import Case, Verdict, get_verifier, names

FORMS = (*sorted(names()), "math", "regex[:PATTERN]", "jsonschema[:FILE]", "command:PROGRAM")
MAX_SCHEMA = 1_000_000  # bytes of a schema file


class Judge(Protocol):
    """Judges responses, a batch at a time; verdicts come in the order of the cases.

    name: as the user wrote it. needs_reference: whether a case without one cannot be judged.
    check() finds out before the first step whether it can work at all (RunProblem OPD712 or
    OPD112). close() ends the processes it has.
    """

    name: str
    needs_reference: bool

    def __call__(self, cases: Sequence[Case]) -> list[Verdict]: ...
    def check(self) -> None: ...
    def close(self) -> None: ...


def make_judge(spec: str | None, limits: Limits) -> Judge:
    """The judge of a verifier's name; None chooses for each reference: numbers as numbers, all
    others as text. Raises RunProblem OPD112 for a name or argument that makes no sense."""
    if spec is None:
        return Plain(None)
    kind, colon, argument = spec.partition(":")
    if colon and not argument.strip():
        raise problem("OPD112", f"--verifier {spec}: nothing stands behind the colon", exit_code=2)
    if kind in names() and not colon:
        return Plain(kind)
    if kind == "command" and colon:
        from opdsl.train.verifiers.command import Command

        return Command(argument, limits)
    if kind == "math" and not colon:
        return _worker(spec, kind, None, limits)
    if kind == "regex":
        groups = _groups(argument) if colon else 0
        return _worker(spec, kind, argument or None, limits, not colon or groups > 0)
    if kind == "jsonschema":
        text = _schema(argument) if colon else None
        return _worker(spec, kind, text, limits, not colon)
    raise problem(
        "OPD112",
        f"there is no verifier {spec!r}",
        helps=[f"verifiers: {', '.join(FORMS)}"],
        exit_code=2,
    )


class Plain:
    """A registered function, in process; with no name, the one that fits each reference."""

    needs_reference = True

    def __init__(self, name: str | None):
        self.kind, self.name = name, name or "by the reference"

    def __call__(self, cases: Sequence[Case]) -> list[Verdict]:
        return [self._one(case) for case in cases]

    def _one(self, case: Case) -> Verdict:
        if case.reference is None:
            return Verdict(None, "the row has no reference")
        kind = self.kind or ("numeric" if is_number(case.reference) else "text")
        return get_verifier(kind)(case.response, case.reference)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


def _worker(spec: str, kind: str, argument: str | None, limits: Limits, reference: bool = True):
    from opdsl.train.verifiers.worker import Worker

    return Worker(spec, kind, argument, limits, reference)


def _groups(pattern: str) -> int:
    """How many groups a pattern of the command line has, or RunProblem OPD112."""
    try:
        return re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise problem(
            "OPD112",
            f"--verifier regex: {pattern!r} is not a pattern: {error}",
            helps=["the syntax is that of Python's `re`; quote it for the shell"],
            exit_code=2,
        ) from None


def _schema(path: str) -> str:
    """The text of a schema file; whether it is a schema is found out by the worker."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise problem("OPD702", f"cannot read the JSON schema {path}: {reason}") from None
    if len(data) > MAX_SCHEMA:
        raise problem("OPD702", f"the JSON schema {path} is larger than {MAX_SCHEMA:,} bytes")
    return data.decode("utf-8", "replace")
