"""`opdsl score`: a teacher's scores of the texts of a data set, for runs without the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("score", short_help="Write a teacher's scores of a data set to disk.")
@click.argument("spec", metavar="FILE|NAME")
@click.option("--method", metavar="NAME", help="Which method of the file. [the last]")
@click.option("--teacher", "teachers", multiple=True, metavar="[NAME=]MODEL",
              help="Whose scores: a model, or a server's address.")  # fmt: skip
@click.option("--student", metavar="MODEL", help="Whose tokenizer reads the data. [the teacher's]")
@click.option("--data", metavar="DATA", help="The texts, as `opdsl run` reads them.")
@click.option("--task", metavar="NAME", help="Embedded task instead of data.")
@click.option("--columns", metavar="WORDS", help="What the data's columns are.")
@click.option("--out", required=True, metavar="DIR", help="Folder to write.")
@click.option(
    "--top", type=click.IntRange(min=0), help="Own top tokens to keep. [as the spec reads]"
)
@click.option("--steps", type=click.IntRange(min=1), help="Steps of the run, for an embedded task.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the run, likewise. [0]")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest response of the run.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1. [cuda if there is one]")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="[bf16 on cuda]")
@click.option("--teacher-timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS")
@click.option("--teacher-key-env", metavar="VARIABLE")
@click.option("--skip-bad-rows", is_flag=True, help="Leave bad rows of the data out.")
@click.option("--long-prompts", type=click.Choice(["refuse", "drop", "cut"]), default="refuse")
@click.option("--set", "assignments", multiple=True, metavar="K=V", help="Value of a param.")
def score(spec: str, assignments: tuple[str, ...], **options: Any) -> None:
    """Score the texts that the method in FILE trains on (`sequences(data)`, `sequences(golden)`).

    `opdsl run SPEC --teacher NAME=DIR` then trains on the scores, without the teacher.
    """
    from opdsl.cli.run import reported

    with reported(as_json=False):
        _score(spec, assignments, options)


def _score(spec: str, assignments: tuple[str, ...], options: dict[str, Any]) -> None:
    from opdsl.cli.common import compiled
    from opdsl.cli.run import split_assignments, split_teachers
    from opdsl.method import Method
    from opdsl.train.progress import make_progress
    from opdsl.train.settings import RunSettings
    from opdsl.train.teachers.record import record

    params, optimize = split_assignments(assignments)
    method = Method(compiled(spec, params, options.pop("method")))
    external = [t.name for t in method.spec.teachers if t.kind == "external"]
    teachers = split_teachers(options.pop("teachers"), external)
    out, top = Path(options.pop("out")), options.pop("top")
    settings = RunSettings(teachers=teachers, optimize=optimize, **options)
    progress = make_progress(False)
    try:
        manifest = record(method, settings, out, top, progress)
    finally:
        progress.close()
    size = sum(s["bytes"] for s in manifest["shards"])
    click.echo(
        f"scored    {manifest['rows']} texts by {manifest['teacher']}: sampled tokens"
        + (f" and top {manifest['top']}" if manifest["top"] else "")
        + f", {size / 1e6:.1f} MB"
    )
    click.echo(f"use it    opdsl run {spec} --teacher {out}")
