"""`opdsl emit FILE -o out.py`: a standalone PyTorch module."""

from __future__ import annotations

from pathlib import Path

import click

from opdsl.cli.common import compiled, settings


@click.command()
@click.argument("spec")
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write here instead of printing.",
)
@click.option("--set", "pairs", multiple=True, metavar="NAME=VALUE", help="Set a knob.")
@click.option("--method", help="Which method of the file.")
def emit(spec: str, output: Path | None, pairs: tuple[str, ...], method: str | None) -> None:
    """Emit one readable file that needs torch alone."""
    from opdsl.cli.fmt import write_atomically
    from opdsl.emit.standalone import standalone

    text = standalone(compiled(spec, settings(pairs), method))
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        write_atomically(output, text)
    except OSError as e:
        from opdsl.codes import make
        from opdsl.diagnostics import CompileError
        from opdsl.source import NOWHERE

        raise CompileError(
            [
                make(
                    "OPD704",
                    NOWHERE,
                    f"cannot write {output}: {e.strerror}",
                    helps=["-o another/path.py"],
                )
            ]
        ) from None
    click.echo(f"wrote {output}", err=True)
