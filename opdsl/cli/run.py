"""`opdsl run`: train a student by a method."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from opdsl.diagnostics import CompileError


@click.command("run", short_help="Train a student by a method.")
@click.argument("spec", metavar="FILE|NAME")
@click.option("--method", metavar="NAME", help="Which method of the file. [the last]")
@click.option("--student", metavar="MODEL", help="Student: a transformers folder or a hub name.")
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    metavar="[NAME=]MODEL",
    help="Teacher, likewise; with NAME= for one of several. Repeatable.",
)
@click.option(
    "--teacher-failure",
    metavar="WHAT",
    help="When a served teacher does not answer: halt, pause, or drop_batch(N). [halt]",
)
@click.option(
    "--teacher-timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Time for the scores of one batch, retries included. [300]",
)
@click.option(
    "--teacher-key-env",
    metavar="VARIABLE",
    help="Environment variable with the server's key. [OPDSL_TEACHER_KEY]",
)
@click.option(
    "--offload-teacher", is_flag=True, help="Keep a teacher's weights in main memory between steps."
)
@click.option(
    "--data",
    metavar="DATA",
    help="Prompts: .jsonl, .json, .csv or .parquet with `prompt`, `reference`, …; a folder or hub"
    " name of a data set.",
)
@click.option(
    "--columns",
    metavar="NAME=COLUMN,…",
    help="What the data's columns are, e.g. prompt=question,reference=answer.",
)
@click.option("--eval-data", metavar="FILE", help="Held-out prompts, in the same form.")
@click.option("--task", metavar="NAME", help="Embedded task to train on (chain, fork, …).")
@click.option("--run", "run_name", metavar="NAME", help="Which run block of the spec to use.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="K=V",
    help="Value of a param, or of optimize.lr and its like. Repeatable.",
)
@click.option("--lr", type=float, help="Learning rate; the same as --set optimize.lr=…")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps.")
@click.option("--prompts", type=click.IntRange(min=1), help="Prompts per step.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of data and rollouts. [0]")
@click.option("--out", metavar="DIR", help="Output folder. [runs/METHOD-DATA]")
@click.option("--resume", is_flag=True, help="Continue the run in --out from its checkpoint.")
@click.option(
    "--allow-change",
    multiple=True,
    is_flag=False,
    flag_value="all",
    metavar="[NAME]",
    help="With --resume: let a changed setting (lr, method, …) through; alone: all. Repeatable.",
)
@click.option(
    "--dry-run", is_flag=True, help="Print the plan and its costs, check models and data."
)
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1. [cuda if there is one]")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="[bf16 on cuda]")
@click.option(
    "--compile", "compiled", is_flag=True, help="Dense losses on a CPU through torch.compile."
)
@click.option("--micro-batch", type=click.IntRange(min=1), help="Rows per backward pass.")
@click.option(
    "--memory", metavar="SIZE", help="What loss and gradient may take beyond the models, like 2GiB."
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest response.")
@click.option("--eval-every", type=click.IntRange(min=1), metavar="N", help="Steps between tests.")
@click.option("--save-every", type=click.IntRange(min=1), metavar="N", help="… checkpoints.")
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="N",
    help="Checkpoints to keep.",
)
@click.option(
    "--guard",
    "guards",
    multiple=True,
    metavar="NAME=LIMIT[:halt|warn|off]",
    help="log_ratio, flat_teacher, length or idle: when to warn or stop. Repeatable.",
)
@click.option(
    "--verifier",
    metavar="NAME",
    help="exact, text, numeric, math, regex[:PATTERN], jsonschema[:FILE] or command:PROGRAM."
    " [numeric or text, by the reference]",
)
@click.option(
    "--verifier-limits",
    metavar="LIMITS",
    help="Of a verifier's process: time=30,cpu=…,memory=4GB,output=4MB,files=100MB.",
)
@click.option(
    "--curriculum",
    metavar="RULE",
    help="Which prompts to draw less: pass_rate=0.1..0.9,rest=8 (or rest=never).",
)
@click.option("--skip-bad-rows", is_flag=True, help="Leave bad rows of the data out.")
@click.option(
    "--long-prompts",
    type=click.Choice(["refuse", "drop", "cut"]),
    default="refuse",
    show_default=True,
    help="What to do with prompts past the context.",
)
@click.option(
    "--skip-non-finite",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Skip up to N steps with a non-finite number instead of stopping at the first.",
)
@click.option(
    "--log",
    "log",
    multiple=True,
    type=click.Choice(["tensorboard", "trackio", "wandb"]),
    help="Send the figures of every step there too. Repeatable.",
)
@click.option(
    "--measure-every",
    type=click.IntRange(min=0),
    metavar="N",
    help="Steps between full measurements; 0: none. [5, or 10 for large vocabularies]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def run(
    spec: str, assignments: tuple[str, ...], as_json: bool, dry_run: bool, **options: Any
) -> None:
    """Train a student by the method in FILE (or by the shipped method NAME).

    Without models, a small teacher and student that are built in are trained on the task
    `chain`, which takes seconds and needs no download.
    """
    with reported(as_json):
        method, settings = prepare(spec, assignments, options)
        if dry_run:
            _dry_run(method, settings, as_json)
            return
        from opdsl.train.loop import train
        from opdsl.train.progress import make_progress
        from opdsl.train.report import closing_lines

        progress = make_progress(as_json)
        try:
            summary = train(method, settings, progress)
        finally:
            progress.close()
        if as_json:
            click.echo(json.dumps(summary.to_json(), indent=1))
        else:
            click.echo("\n".join(closing_lines(summary, spec)))


def prepare(spec: str, assignments: tuple[str, ...], options: dict[str, Any]):
    """(method, settings) from the words of the command line."""
    from opdsl.cli.common import compiled
    from opdsl.method import Method
    from opdsl.train.settings import RunSettings, check_optimize
    from opdsl.train.watch import parse_guard

    assignments, rollout = split_rollout(assignments)
    params, optimize = split_assignments(assignments)
    if options["lr"] is not None:
        optimize["lr"] = check_optimize("lr", options["lr"])
    method = Method(compiled(spec, params, options["method"]))
    external = [t.name for t in method.spec.teachers if t.kind == "external"]
    settings = RunSettings(
        out=options["out"],
        task=options["task"],
        run=options["run_name"],
        student=options["student"],
        teachers=split_teachers(options["teachers"], external),
        teacher_failure=options["teacher_failure"],
        teacher_timeout=options["teacher_timeout"],
        teacher_key_env=options["teacher_key_env"],
        offload_teacher=options["offload_teacher"],
        data=options["data"],
        eval_data=options["eval_data"],
        verifier=options["verifier"],
        verifier_limits=options["verifier_limits"],
        columns=options["columns"],
        curriculum=options["curriculum"],
        seed=options["seed"],
        steps=options["steps"],
        prompts=options["prompts"],
        micro_batch=options["micro_batch"],
        memory=options["memory"],
        max_tokens=options["max_tokens"],
        eval_every=options["eval_every"],
        save_every=options["save_every"],
        device=options["device"],
        precision=options["precision"],
        compile=options["compiled"],
        optimize=optimize,
        rollout=rollout,
        resume=options["resume"],
        allow_change=tuple(options["allow_change"]),
        keep=options["keep"],
        guards=dict(parse_guard(text) for text in options["guards"]),
        skip_nonfinite=options["skip_non_finite"],
        skip_bad_rows=options["skip_bad_rows"],
        long_prompts=options["long_prompts"],
        log=options["log"],
        measure_every=options["measure_every"],
        words=command_line(spec),
    )
    return method, settings


AGAIN_WITHOUT = ("resume", "allow_change", "out", "as_json", "dry_run")


def command_line(spec: str) -> tuple[str, ...]:
    """The words that repeat this run in another folder: the options that were given."""
    context = click.get_current_context(silent=True)
    if context is None or context.command.name != "run":
        return ()
    words = ["opdsl", "run", spec]
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if source is not click.core.ParameterSource.COMMANDLINE or option.opts[0][:1] != "-":
            continue
        if option.name in AGAIN_WITHOUT:
            continue
        value = context.params[option.name]
        for one in value if isinstance(value, tuple) else (value,):
            words += [option.opts[0]] if one is True else [option.opts[0], str(one)]
    return tuple(words)


def split_rollout(assignments: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The assignments that are not `rollout.NAME=VALUE`, and those that are."""
    from opdsl.train.settings import parse_rollout

    rest: list[str] = []
    rollout: dict[str, Any] = {}
    for word in assignments:
        name, _, value = word.partition("=")
        if not name.strip().startswith("rollout."):
            rest.append(word)
            continue
        name, checked = parse_rollout(name.strip().removeprefix("rollout."), value.strip())
        if name in rollout:
            raise click.UsageError(f"--set rollout.{name} is given twice")
        rollout[name] = checked
    return tuple(rest), rollout


def split_assignments(assignments: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params of the method, settings of `optimize`) from `k=v` words."""
    from opdsl.syntax.keywords import canonical
    from opdsl.train.settings import parse_optimize

    params: dict[str, Any] = {}
    optimize: dict[str, Any] = {}
    for word in assignments:
        name, found, value = word.partition("=")
        name, value = name.strip(), value.strip()
        if not found or not name or not value:
            raise click.UsageError(f"--set takes NAME=VALUE, not {word!r}")
        if name in params or name.removeprefix("optimize.") in optimize:
            raise click.UsageError(f"--set {name} is given twice")
        if name.startswith("optimize."):
            name, checked = parse_optimize(name.removeprefix("optimize."), value)
            optimize[name] = checked
        else:
            params[canonical(name)] = value
    return params, optimize


def split_teachers(words: tuple[str, ...], external: list[str]) -> dict[str, str]:
    """Teacher role -> model; "" stands for all of them. A path may itself hold `=`."""
    teachers: dict[str, str] = {}
    for word in words:
        name, found, model = word.partition("=")
        if not found or not (name in external or name.isidentifier()):
            name, model = "", word
        if not model:
            raise click.UsageError(f"--teacher takes MODEL or NAME=MODEL, not {word!r}")
        if name in teachers:
            raise click.UsageError(f"--teacher {name + '=' if name else ''}… is given twice")
        teachers[name] = model
    return teachers


def _dry_run(method, settings, as_json: bool) -> None:
    """Everything that can be checked without loading weights."""
    from opdsl.train.plan import make_plan
    from opdsl.train.preview import preview

    found = preview(method, make_plan(method, settings))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
    else:
        click.echo("\n".join(found.lines()))


@contextmanager
def reported(as_json: bool, again: str = "the same command and --resume") -> Iterator[None]:
    """Turn what a run can raise into one message and the right exit code.

    again: what continues a run that a signal stopped.
    """
    from opdsl.train.errors import Interrupted, RunProblem

    try:
        yield
    except RunProblem as error:
        show(error, as_json)
        raise click.exceptions.Exit(error.exit_code) from None
    except CompileError as error:
        show(error, as_json)
        raise click.exceptions.Exit(2 if asked_wrongly(error) else 1) from None
    except Interrupted as stop:
        place = f"; saved in {stop.checkpoint}" if stop.checkpoint else ""
        click.echo(f"stopped by a signal after step {stop.step}{place}", err=True)
        click.echo(f"continue with {again}", err=True)
        raise click.exceptions.Exit(stop.exit_code) from None
    except KeyboardInterrupt:
        click.echo("interrupted before the first step", err=True)
        raise click.exceptions.Exit(130) from None


def asked_wrongly(error: CompileError) -> bool:
    """Whether the mistake is in the words of the command rather than in a spec."""
    return bool(error.diagnostics) and all(
        d.code in ("OPD017", "OPD111", "OPD711") or "--set" in d.message for d in error.diagnostics
    )


def show(error: CompileError, as_json: bool) -> None:
    """Diagnostics to stderr; with --json as JSON to stdout, so that callers can read them."""
    from opdsl.cli import common

    if as_json:
        common.show(error.diagnostics, "json", sys.stdout)
    else:
        common.show(error.diagnostics)
