"""`opdsl explain`: a spec's formula and passport, the lesson of a code, or a definition."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from opdsl.cli.common import compiled, settings
from opdsl.diagnostics import CompileError

DUMPS = ("ast", "spec", "ir", "torch", "plan")


@click.command(short_help="Formula, gradient and passport of a spec; a code; a definition.")
@click.argument("what", metavar="FILE|CODE|NAME")
@click.option(
    "--format", "format_", type=click.Choice(["text", "json", "latex", "markdown"]), default="text"
)
@click.option("--dump", type=click.Choice(DUMPS), help="Print one phase of the compiler instead.")
@click.option("--set", "pairs", multiple=True, metavar="NAME=VALUE", help="Set a knob.")
@click.option("--method", metavar="NAME", help="Which method of the file. [the last]")
def explain(
    what: str, format_: str, dump: str | None, pairs: tuple[str, ...], method: str | None
) -> None:
    """Explain a spec file or shipped spec, a diagnostic code (OPD302 or its slug), or a
    definition of the standard library."""
    chosen = settings(pairs)
    if not (what == "-" or Path(what).is_file() or dump or chosen or method):
        text = _code(what, format_) or _definition(what, format_)
        if text is not None:
            click.echo(text, nl=False)
            return
    try:
        if dump is not None:
            click.echo(_dump(what, dump, chosen, method).rstrip("\n"))
            return
        compilation = compiled(what, chosen, method)
    except CompileError as e:
        raise _with_names(what, e) from None
    from opdsl.formula.explain import explain as explained

    click.echo(explained(compilation, format_), nl=False)


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
    if text is not None:
        return text.rstrip("\n") + "\n"
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
