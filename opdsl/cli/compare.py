"""`opdsl compare`: several methods on one embedded task, paired by seed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from opdsl.cli.run import reported, split_assignments


@click.command("compare", short_help="Train several methods on one task; table with intervals.")
@click.argument("specs", nargs=-1, required=True, metavar="FILE|NAME…")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="How many.")
@click.option("--first-seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--task", default="chain", show_default=True, help="Embedded task.")
@click.option("--steps", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--prompts", type=click.IntRange(min=1), help="Prompts per step.")
@click.option(
    "--eval-every", type=click.IntRange(min=1), default=10, show_default=True, metavar="N"
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="optimize.K=V",
    help="An optimize setting for all methods, e.g. optimize.lr=3e-4. Repeatable.",
)
@click.option("--out", default="runs/comparison", show_default=True, metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def compare(
    specs: tuple[str, ...],
    seeds: int,
    first_seed: int,
    task: str,
    steps: int,
    prompts: int | None,
    eval_every: int,
    assignments: tuple[str, ...],
    out: str,
    as_json: bool,
) -> None:
    """Train each method at each seed and tabulate accuracies with 95 % intervals.

    At a seed all methods start from the same models and see the same prompts. Finished runs in
    DIR are used again, so the same command continues a comparison that was stopped.
    """
    with reported(as_json, again="the same command"):
        from opdsl.cli.common import compiled
        from opdsl.method import Method
        from opdsl.train import study
        from opdsl.train.progress import make_progress
        from opdsl.train.settings import RunSettings

        params, optimize = split_assignments(assignments)
        if params:
            raise click.UsageError(
                "compare sets optimize.… for all methods; params belong in specs"
            )
        methods = [Method(compiled(spec, {})) for spec in specs]
        progress = make_progress(as_json)
        try:
            result = study.compare(
                methods,
                task=task,
                seeds=range(first_seed, first_seed + seeds),
                steps=steps,
                out=Path(out),
                base=RunSettings(optimize=optimize, prompts=prompts),
                eval_every=eval_every,
                progress=progress,
            )
        finally:
            progress.close()
        if as_json:
            click.echo(json.dumps(result.to_json(), indent=1))
        elif sys.stdout.isatty():
            _table(result)
        else:
            click.echo(result.markdown(), nl=False)
        click.echo(f"written to {out}/comparison.md, .json, .png", err=True)


def _table(result) -> None:
    from rich.console import Console
    from rich.table import Table

    header, rows = result.rows()
    table = Table(title=f"{result.task}, {result.steps} steps, {len(result.seeds)} seeds")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
