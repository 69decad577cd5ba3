"""`opdsl explain`: a spec's formula and passport, the lesson of a code, or a definition."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING

import click

from opdsl.cli.common import compiled, settings
from opdsl.cli.cost import DEVICES, SHAPE, report
from opdsl.cli.figure import check, draw
from opdsl.diagnostics import CompileError

if TYPE_CHECKING:
    from opdsl.compilation import Compilation

DUMPS = ("ast", "spec", "ir", "torch", "plan")


@click.command(short_help="Formula, gradient and passport of a spec; a code; a definition.")
@click.argument("what", metavar="FILE|CODE|NAME")
@click.option(
    "--format", "format_", type=click.Choice(["text", "json", "latex", "markdown"]), default="text"
)
@click.option("--dump", type=click.Choice(DUMPS), help="Print one phase of the compiler instead.")
@click.option("--set", "pairs", multiple=True, metavar="NAME=VALUE", help="Set a knob.")
@click.option("--method", metavar="NAME", help="Which method of the file. [the last]")
@click.option(
    "--figure",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw where the mass goes at one state (.png, .svg or .pdf).",
)
@click.option(
    "--state",
    metavar="FILE.json",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The state of the figure. [a small built-in one]",
)
@click.option("--probe", is_flag=True, help="Measure the passport's claims on small models.")
@click.option("--cost", is_flag=True, help="Plan, memory and time of a step instead.")
@click.option(
    "--shape",
    metavar="N,H,V",
    default=SHAPE,
    show_default=True,
    help="Tokens, hidden size and vocabulary for --cost.",
)
@click.option(
    "--device", type=click.Choice(DEVICES), default="cpu", show_default=True, help="For --cost."
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="For --cost: what loss and gradient may take, like 2GiB; tokens at a time follow.",
)
def explain(
    what: str,
    format_: str,
    dump: str | None,
    pairs: tuple[str, ...],
    method: str | None,
    figure: Path | None,
    state: Path | None,
    probe: bool,
    cost: bool,
    shape: str,
    device: str,
    memory: str | None,
) -> None:
    """Explain a spec file or shipped spec, a diagnostic code (OPD302 or its slug), or a
    definition of the standard library.

    --state is an object: "student" and "teacher" (probabilities or logits, one number per token;
    "teacher" may be an object of several), "sampled" (a token's name or index), and, if you like,
    "tokens" (their names) and "initial".
    """
    chosen = settings(pairs)
    if figure is not None or state is not None:
        check(figure, state, dump)
    if cost and (
        probe or dump is not None or figure is not None or format_ not in ("text", "json")
    ):
        raise click.UsageError("--cost stands alone, in the formats text and json")
    if memory is not None and not cost:
        raise click.UsageError("--memory goes with --cost")
    if probe and (dump is not None or format_ == "latex"):
        raise click.UsageError("--probe goes with the formats text, json and markdown")
    from opdsl.resources import is_file

    if not (what == "-" or is_file(Path(what)) or dump or chosen or method or cost):
        text = _code(what, format_) or _definition(what, format_)
        if text is not None and figure is not None:
            raise click.UsageError(f"{what} is a code or a definition; a figure shows a method")
        if text is not None and probe:
            raise click.UsageError(f"{what} is a code or a definition; --probe measures a method")
        if text is not None:
            _print(text)
            return
    try:
        if dump is not None:
            click.echo(_dump(what, dump, chosen, method).rstrip("\n"))
            return
        compilation = compiled(what, chosen, method)
        if cost:
            click.echo(report(compilation, shape, device, format_, memory), nl=False)
            return
    except CompileError as e:
        raise _with_names(what, e) from None
    from opdsl.formula.explain import WIDTH, Explanation, printed

    push = None if figure is None else draw(compilation, figure, state)
    width = min(WIDTH, get_terminal_size().columns) if sys.stdout.isatty() else WIDTH
    text = printed(Explanation(compilation), format_, width, push)
    click.echo(_probed(text, compilation, format_, width) if probe else text, nl=False)


def _probed(text: str, compilation: Compilation, format_: str, width: int) -> str:
    """An explanation with what was measured below it."""
    from opdsl.passport.probe import probe

    found = probe(compilation)
    if format_ == "json":
        data = {**json.loads(text), "probe": found.to_dict()}
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    lines = "\n".join(line.rstrip() for line in found.lines(width)) + "\n"
    return f"{text}\n```text\n{lines}```\n" if format_ == "markdown" else f"{text}\n{lines}"


def _print(text: str) -> None:
    """To standard output; escape sequences only where colour is wanted."""
    from opdsl.render import wants_color

    click.echo(text, nl=False, color=wants_color(sys.stdout))


# ---- codes -------------------------------------------------------------------------------------


def _code(what: str, format_: str) -> str | None:
    """The page of a code or slug, or what the registry knows of it."""
    from opdsl.codes import BY_SLUG, CODES

    key = what.upper() if re.fullmatch(r"(?i)opd\d{3}", what) else what
    row = CODES.get(key) or BY_SLUG.get(what)
    if row is None:
        return None
    from opdsl.resources import page

    text = page(row.code)
    if format_ == "json":
        data = {
            "code": row.code,
            "slug": row.slug,
            "severity": str(row.severity),
            "rule": row.rule,
            "page": text,
        }
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    if text is not None and format_ == "markdown":
        return text.rstrip("\n") + "\n"
    if text is not None:
        from opdsl.cli.lesson import lesson
        from opdsl.render import wants_color, width_of

        return lesson(text, width_of(sys.stdout), wants_color(sys.stdout))
    family = {
        "0": "syntax", "1": "names and values", "2": "types, axes and units", "3": "structure",
        "4": "teacher access and models", "5": "bias boundaries", "6": "numerics", "7": "runs",
        "9": "faults of opdsl",
    }[row.code[3]]  # fmt: skip
    lines = [f"{row.code} {row.slug}", "", f"A report of severity {row.severity}, about {family}."]
    if row.code[3] in "2345":
        word = "allow" if row.severity == "error" else "accept"
        rule = row.rule if word == "allow" and row.rule else row.slug
        lines.append(f'A spec acknowledges it with:  {word} {rule} "why"')
    lines.append("The message itself says what was expected and how to repair it.")
    return "\n".join(lines) + "\n"


# ---- definitions -----------------------------------------------------------------------------------


def _definition(what: str, format_: str) -> str | None:
    """A definition of the standard library, unless a shipped spec has that name."""
    if not re.fullmatch(r"[A-Za-z_]\w*", what):
        return None
    from opdsl.formula.definition import definition

    found = definition(what)
    if found is None:
        return None
    if format_ == "json":
        return json.dumps(found.data(), indent=2, ensure_ascii=False) + "\n"
    if format_ == "markdown":
        return (
            f"# {found.name}\n\n{found.doc}\n\n`{found.formula}`\n\n```text\n{found.source}\n```\n"
        )
    return found.text()


def _with_names(what: str, error: CompileError) -> CompileError:
    """An unknown name may also be a misspelt code or definition."""
    first = error.diagnostics[0]
    if first.code != "OPD711":
        return error
    from dataclasses import replace

    from opdsl.codes import BY_SLUG, CODES
    from opdsl.diagnostics import Diagnostic
    from opdsl.formula.definition import names_of_library
    from opdsl.meaning.names import closest

    near = closest(what, [*names_of_library(), *BY_SLUG, *CODES])
    if near is None:
        return error
    helps = (f"a close name: opdsl explain {near}", *first.helps)
    values = {"helps": helps}
    try:
        changed = replace(first, **values)  # type: ignore[type-var]
    except TypeError:
        parts = {k: getattr(first, k) for k in _fields(Diagnostic)}
        changed = Diagnostic(**{**parts, **values})
    return CompileError([changed, *error.diagnostics[1:]])


def _fields(cls: type) -> tuple[str, ...]:
    return tuple(getattr(cls, "__record_fields__", getattr(cls, "__dataclass_fields__", ())))


# ---- phases -----------------------------------------------------------------------------------------


def _dump(what: str, phase: str, chosen: dict[str, object], method: str | None) -> str:
    """One phase of the compiler as text."""
    if phase == "ast":
        from opdsl.cli.common import source_of
        from opdsl.syntax import parse

        file, problems = parse(source_of(what))
        if file is None or any(d.severity == "error" for d in problems):
            raise CompileError(problems)
        return outline(file)
    compilation = compiled(what, chosen, method)
    spec, program = compilation.require()
    match phase:
        case "spec":
            return outline(spec)
        case "ir":
            return compilation.dump_ir()
        case "torch":
            from opdsl.emit.standalone import standalone

            return standalone(compilation)
    from opdsl.ir.stages import stage

    lines = [f"plan of {spec.name}: row passes see one block of tokens, batch passes couple rows"]
    for part in program.parts:
        staged = stage(program, part)
        for i, s in enumerate(staged.stages):
            last = s is staged.last
            what_for = (
                "losses and their logit cotangent" if last else f"{len(s.exports)} values per token"
            )
            lines.append(
                f"  {part.rows:<7} pass {i + 1}  {s.kind:<6} {len(s.nodes):>4} operations"
                f"   reads {len(s.imports)} earlier values, gives {what_for}"
            )
    return "\n".join(lines)


_HIDDEN = ("span", "spans", "builder", "source")


def outline(value: object, indent: str = "", name: str = "") -> str:
    """Records as an indented outline, one field a line; spans are left out."""
    from opdsl.meaning.node import Node

    head = f"{indent}{name}: " if name else indent
    if isinstance(value, Node):
        return f"{head}{value.op} : {value.q.describe()}"
    fields = _fields(type(value))
    if fields and not isinstance(value, str | int | float):
        rows = [f"{head}{type(value).__name__}"]
        for key in fields:
            item = getattr(value, key)
            if key in _HIDDEN or item is None or item == () or item == {}:
                continue
            rows.append(outline(item, indent + "  ", key))
        return "\n".join(rows)
    if isinstance(value, tuple | list):
        if all(isinstance(x, str | int | float) for x in value):
            return f"{head}{', '.join(map(str, value))}"
        return "\n".join([f"{head}", *(outline(x, indent + "  ") for x in value)])
    if isinstance(value, dict):
        return "\n".join(
            [f"{head}", *(outline(v, indent + "  ", str(k)) for k, v in value.items())]
        )
    return f"{head}{value}"
