"""The command line: one file per command; each parses options, calls one function and prints.

Commands load on use, so `opdsl check` imports neither torch nor sympy. Exit codes: 0 clean,
1 diagnostics, 2 wrong usage, 3 the environment cannot run it, 4 stopped by a guard, 70 a fault of
opdsl, 130 interrupted.
"""

from __future__ import annotations

import os
import sys

import click

COMMANDS = {
    "check": "opdsl.cli.check:check",
    "explain": "opdsl.cli.explain:explain",
    "run": "opdsl.cli.run:run",
    "compare": "opdsl.cli.compare:compare",
    "serve": "opdsl.cli.serve:serve",
    "score": "opdsl.cli.score:score",
    "diff": "opdsl.cli.diff:diff",
    "emit": "opdsl.cli.emit:emit",
    "list": "opdsl.cli.list:list_",
    "new": "opdsl.cli.new:new",
    "fmt": "opdsl.cli.fmt:fmt",
    "completion": "opdsl.cli.completion:completion",
}


class Lazy(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        from importlib import import_module

        module, attribute = COMMANDS[name].split(":")
        return getattr(import_module(module), attribute)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from opdsl.meaning.names import closest

            near = closest(args[0], COMMANDS) if args else None
            if near is not None:
                error.message += f" Did you mean `{near}`?"
            raise


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="opdsl", prog_name="opdsl")
def cli() -> None:
    """opdsl compiles on-policy distillation methods from short .opd files."""


def main() -> None:
    """Entry point: user mistakes become one message, faults of opdsl a short report."""
    from opdsl.diagnostics import CompileError

    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except CompileError as e:
        from opdsl.cli.common import show

        show(e.diagnostics)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as e:
        if os.environ.get("OPDSL_DEBUG"):
            raise
        click.echo(
            f"error[OPD900] internal_error: opdsl itself failed: {type(e).__name__}: {e}\n"
            "   = note: this is a fault of opdsl, not of your file\n"
            "   = help: OPDSL_DEBUG=1 shows where; please report it with the file that caused it",
            err=True,
        )
        sys.exit(70)
