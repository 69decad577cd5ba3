"""`opdsl emit`: one readable file that needs torch alone.

prelude.py, the emitted passes and driver.py, with the method's tables in between. Words of the
user appear in the docstring and in tables only, as escaped literals.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import TYPE_CHECKING

from opdsl.emit.module import _mangle, function_name, input_key
from opdsl.meaning.quantity import Axis

if TYPE_CHECKING:
    from opdsl.compilation import Compilation


def standalone(compilation: Compilation) -> str:
    """Text of the file. Raises CompileError when the spec has errors."""
    import opdsl
    from opdsl.ir.fingerprint import fingerprints
    from opdsl.ir.needs import needs

    spec, program = compilation.require()
    emitted = compilation.emitted
    need = needs(program)
    requires = ["student_logits", "tokens", "mask"]
    requires += [f"teacher_logits[{name}]: {level}" for name, level in need.teachers.items()]
    requires += list(need.tensors)
    lines = [
        f"{spec.name}: {_plain(spec.title or '')}".rstrip(": "),
        "",
        f"Emitted by opdsl {opdsl.__version__}; method {fingerprints(program)['method']}. torch only.",
    ]
    if spec.cites:
        lines.append("Source: " + ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in spec.cites))
    lines.append(f"Formula: {_plain(_formula(compilation))}")
    lines += ["", "    loss = Loss()(student_logits, teacher_logits, tokens, mask, …)"]
    head = '"""' + "\n".join(lines) + '\n"""\n'
    tables = [f"REQUIRES = {tuple(requires)!r}", *_tables(emitted, spec)]
    prelude, driver = _body("prelude.py"), _body("driver.py")
    driver = re.sub(
        r"^(PASSES|FIELDS|CRITICS|ROUTED|DISTS) = .*\n", "", driver, flags=re.MULTILINE
    )
    return "\n".join(
        [
            head,
            prelude.strip(),
            "\n\n# ---- the passes of this method " + "-" * 62 + "\n",
            emitted.text.rstrip(),
            "\n\n# ---- what the passes read " + "-" * 67 + "\n",
            "\n".join(tables),
            "\n\n# ---- the loss " + "-" * 79 + "\n",
            re.sub(r"^import torch\n", "", driver.strip(), flags=re.MULTILINE).strip(),
            "",
        ]
    )


def _body(name: str) -> str:
    """A source file of this package without its docstring."""
    text = (files("opdsl.emit") / name).read_text(encoding="utf-8")
    return re.sub(r'\A""".*?"""\n', "", text, flags=re.DOTALL).replace("  # noqa: F821", "")


def _plain(text: str) -> str:
    """Words for a docstring: printable, on one line, unable to end it."""
    kept = "".join(c if c.isprintable() else " " for c in text)
    return kept.replace("\\", "/").replace('"', "'")


def _formula(compilation: Compilation) -> str:
    import json

    from opdsl.formula.explain import explain

    return str(json.loads(explain(compilation, "json"))["formula"])


def _tables(emitted, spec) -> list[str]:
    passes, fields, critics, dists = [], {}, {}, {}
    for staged in emitted.staged:
        dists[staged.rows] = {"student": "student"}
        for st in staged.stages:
            inputs = []
            for n in st.nodes:
                if n.op == "logp":
                    dists[staged.rows][_mangle(str(n.attr("dist")))] = str(n.attr("dist"))
                if n.op != "input" or n.attr("name") in ("one", "step"):
                    continue
                key = input_key(n)
                per = "sequence" if n.q.axis in (Axis.SEQ, Axis.PROMPT) else "token"
                inputs.append((key, per))
                if n.attr("name") == "values":
                    critics[key] = str(n.attr("critic"))
                    if st.kind == "batch":
                        inputs.append((f"boot_{key}", "sequence"))
                if n.attr("name") == "field":
                    fields[key] = (str(n.attr("field")), str(n.attr("equals")))
            imports = tuple(f"x{n.id}" for n in st.imports)
            passes.append(
                (staged.rows, st.kind, function_name(staged.rows, st), tuple(inputs), imports)
            )
    routed = tuple((r.name, tuple(r.parts), tuple(r.conditions)) for r in spec.routed)
    shown = ",\n    ".join(repr(p) for p in passes)
    return [
        f"PASSES = (\n    {shown},\n)",
        f"FIELDS = {fields!r}",
        f"CRITICS = {critics!r}",
        f"ROUTED = {routed!r}",
        f"DISTS = {dists!r}",
    ]
