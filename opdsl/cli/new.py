"""`opdsl new NAME`: a spec to start from."""

from __future__ import annotations

import re
from pathlib import Path

import click

TEMPLATE = """opd 1

# What the method does, in one sentence.
method {name} "{name}: describe it here" {{
  evidence  hypothesis

  param coef : real in (0, 10] = 1.0

  state     rollouts(student, temperature = 1.0, group = 4)
  teacher   T = external(access = logits)
  support   full
  feedback  loss coef * KL(student || T)
  aggregate mean(over = tokens)
}}
"""


@click.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def new(name: str, force: bool) -> None:
    """Write NAME.opd in the current folder."""
    from opdsl.meaning.names import RESERVED

    path = Path(name if name.endswith(".opd") else f"{name}.opd")
    stem = path.stem
    if not re.fullmatch(r"[A-Za-z_][A-Za-z_0-9]*", stem) or stem in RESERVED:
        raise click.UsageError(
            f"{stem!r} cannot name a method: letters, digits and _ , not a built-in name"
        )
    if path.exists() and not force:
        raise click.UsageError(f"{path} exists; --force overwrites it")
    from opdsl.cli.fmt import write_atomically

    try:
        write_atomically(path, TEMPLATE.format(name=stem))
    except OSError as e:
        raise click.UsageError(f"cannot write {path}: {e.strerror}") from None
    click.echo(f"wrote {path}; next: opdsl check {path}, opdsl explain {path}, opdsl run {path}")
