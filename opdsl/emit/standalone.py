"""`opdsl emit`: one readable file with a method's loss, in need of nothing but torch.

Only the parts of the prelude that the method uses are written out, then its passes, then a driver
that packs the response tokens, runs the passes in order and hands their gradient to autograd.

Text a user wrote reaches comments and the docstring alone, stripped of what could end them; the
field names and values of `prompt` tests are written as escaped literals.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from opdsl.emit.module import Emitted, _mangle, comment_text, emit, function_name, input_key
from opdsl.ir.needs import Needs, needs
from opdsl.ir.stages import Staged
from opdsl.meaning.node import Node
from opdsl.meaning.quantity import Axis
from opdsl.meaning.spec import Spec

if TYPE_CHECKING:
    from opdsl.compilation import Compilation


def standalone(compilation: Compilation) -> str:
    """The text of the file. Raises CompileError for a spec with errors."""
    spec, program = compilation.require()
    emitted: Emitted = compilation.emitted
    wants = needs(program)
    body = _loss_class(spec, emitted, wants)
    helpers = [text for text, call in ((NEED, "need("), (ROLE, "role(")) if call in body]
    if "distribution(" in body:
        helpers.append(LISTS if _lists(wants) else DENSE)
    rows = ROWS + CRITIC if "rows.critic" in body else ROWS
    driver = "\n".join(["", *(f"{part.strip()}\n\n" for part in [rows, *helpers, RUN, body])])
    passes = emit(program, comments=True).text
    pieces = [
        _docstring(compilation, spec, wants),
        "import math\n\nimport torch",
        _requires(wants),
        RULE.format("run-time functions") + "\n\n" + _prelude(passes + driver),
        RULE.format("passes: rows see the vocabulary, batch passes couple tokens and rollouts")
        + "\n\n\n"
        + passes,
        RULE.format("driver") + "\n\n" + driver,
    ]
    text = "\n".join(p.strip("\n") + "\n" for p in pieces)
    ast.parse(text)
    return text


# sections of `explain` that a reader of code does without
LEFT_OUT = frozenset(
    [
        "states",
        "teacher",
        "support",
        "route",
        "bias",
        "objective",
        "conservative",
        "fixed",
        "routing",
        "descent",
        "variance",
        "evidence",
    ]
)
RULE = "\n# ---- {} ----------------"

# ---- header ----------------------------------------------------------------------------------------


def _docstring(compilation: Compilation, spec: Spec, wants: Needs) -> str:
    from opdsl import __version__

    lines = [f"{spec.name}: {spec.title}" if spec.title else spec.name, ""]
    lines += [f"Cites {kind} {where}." for kind, where in spec.cites]
    lines += [
        f"Emitted by opdsl {__version__}. The loss and its gradient in the logits are those of",
        "`Method.loss`: the passes below compute both, autograd only carries them on.",
        "",
        *_explained(compilation),
    ]
    body = "\n".join(comment_text(line, width=200).rstrip() for line in lines)
    while "\n\n\n" in body:
        body = body.replace("\n\n\n", "\n\n")
    return f'"""{body.strip()}\n"""'


def _explained(compilation: Compilation) -> list[str]:
    """The derived formula, its gradient and the fingerprints; the rest is `opdsl explain`."""
    from opdsl.formula.explain import explain

    out, skip = [], False
    try:
        text = explain(compilation, "text")
    except Exception:  # a formula that cannot be printed must not keep the loss from being emitted
        return []
    for line in text.rstrip().split("\n")[1:]:
        if (line[:3].strip() and line.startswith("  ")) or line[2:3].strip():
            skip = line.split()[0] in LEFT_OUT
        if not skip:
            out.append(line)
    return out


def _requires(wants: Needs) -> str:
    teachers = ", ".join(f"{k!a}: {v!a}" for k, v in sorted(wants.teachers.items()))
    tensors = "".join(f"{t!a}, " for t in wants.tensors)
    return (
        f"REQUIRES = ({tensors.strip()})  # optional arguments of Loss that this method reads\n"
        f"TEACHERS = {{{teachers}}}  # the least access to each teacher\n"
    )


# ---- prelude, without what the method does not use ---------------------------------------------------


def _prelude(user: str) -> str:
    """The functions and methods of the prelude that the text reaches, in their order."""
    from opdsl.emit import prelude

    source = inspect.getsource(prelude)
    tree = ast.parse(source)
    lines = source.split("\n")

    def text(node: ast.stmt) -> str:
        return "\n".join(lines[node.lineno - 1 : node.end_lineno])

    named = {_name(node): node for node in tree.body if _name(node)}
    kept: set[str] = set()
    seen = _words(ast.parse(user))
    while True:
        fresh = [n for n in named if n in seen and n not in kept]
        methods = [
            (c.name, m)
            for c in tree.body
            if isinstance(c, ast.ClassDef) and c.name in kept
            for m in c.body
            if isinstance(m, ast.FunctionDef)
            and f"{c.name}.{m.name}" not in kept
            and (m.name in seen or m.name.startswith("__"))
        ]
        if not fresh and not methods:
            break
        for name in fresh:
            kept.add(name)
            if not isinstance(named[name], ast.ClassDef):
                seen |= _words(named[name])
        for owner, m in methods:
            kept.add(f"{owner}.{m.name}")
            seen |= _words(m)
    out = []
    for name, node in named.items():
        if name not in kept:
            continue
        if isinstance(node, ast.ClassDef):
            parts = [lines[node.lineno - 1]]
            for m in node.body:
                if not isinstance(m, ast.FunctionDef):
                    parts.append(text(m) + "\n")
                elif f"{name}.{m.name}" in kept:
                    marks = [f"    @{ast.unparse(d)}" for d in m.decorator_list]
                    parts.append("\n".join([*marks, text(m)]) + "\n")
            out.append("\n".join(parts).rstrip())
        else:
            out.append(text(node))
    constants = [x for x in out if not x.startswith(("def ", "class "))]
    rest = [x for x in out if x.startswith(("def ", "class "))]
    head = "\n".join(constants) + "\n\n\n" if constants else "\n"
    return head + "\n\n\n".join(rest) + "\n"


def _name(node: ast.stmt) -> str:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return ""


def _words(tree: ast.AST) -> set[str]:
    """Names and attributes that a piece of code mentions."""
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    return names | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}


# ---- driver ------------------------------------------------------------------------------------------

ROWS = '''
class Rows:
    """The response tokens [N] of a batch [B, T]; empty sequences are left out."""

    def __init__(self, tokens, mask, group):
        mask = mask.bool()
        self.mask, (b, t) = mask, mask.shape
        length = mask.sum(1)
        self.kept = torch.nonzero(length > 0).flatten()
        self.length = length[self.kept]
        self.place = torch.nonzero(mask.reshape(-1)).flatten()
        number = torch.full((b,), -1, dtype=torch.int64, device=mask.device)
        number[self.kept] = torch.arange(self.kept.numel(), device=mask.device)
        self.seq = number[self.place // max(t, 1)]
        self.pos = (mask.cumsum(1) - 1).reshape(-1)[self.place]
        self.y = self.take(tokens)
        group = torch.arange(b, device=mask.device) if group is None else group
        self.coupling = Coupling(self.seq, self.pos, self.length, group[self.kept])

    def take(self, x):
        """[B, T, ...] -> [N, ...]"""
        return x.reshape(-1, *x.shape[2:])[self.place]
'''

CRITIC = '''
    def critic(self, x):
        """values [B, T + 1] -> at the rows [N], after the last token of each sequence [B]"""
        at = torch.arange(self.mask.shape[1], device=x.device)
        last = torch.where(self.mask, at, -1).amax(1)
        boot = x.gather(1, (last + 1)[:, None]).squeeze(1)
        return self.take(x[:, :-1]), boot[self.kept]
'''

RUN = '''
class _Known(torch.autograd.Function):
    """A scalar whose gradient in the logits is already known."""

    @staticmethod
    def forward(ctx, logits, total, dz):
        ctx.save_for_backward(dz)
        ctx.dtype = logits.dtype
        return total.clone()

    @staticmethod
    def backward(ctx, grad):
        (dz,) = ctx.saved_tensors
        return (dz * grad).to(ctx.dtype), None, None


def run(passes, rows, logits, dists, own, per_sequence, step, total_steps, like):
    """Runs the passes in order. own: inputs [N], or [B] for those in per_sequence."""
    with torch.no_grad():
        store = {"step": float(step), "total_steps": float(total_steps)}
        spread = {k: x[rows.seq] if k in per_sequence else x for k, x in own.items()}
        for kind, function in passes[:-1]:
            if kind == "rows":
                store.update(function(dists, {"y": rows.y, **spread, **store}, like))
            else:
                store.update(function(rows.coupling, {**own, **store}, like))
        value, dz, _ = passes[-1][1](dists, {"y": rows.y, **spread, **store}, like)
        value = torch.as_tensor(value, dtype=like, device=rows.y.device).expand(rows.y.numel())
        total = value.sum(dtype=torch.float64).to(like)
        dz = torch.zeros_like(logits) if dz is None else dz
    return _Known.apply(logits, total, dz)
'''


NEED = """
def need(x, name):
    if x is None:
        raise ValueError(f"this method reads {name}: pass it")
    return x
"""

ROLE = '''
def role(x, name, *absent):
    """One teacher (or critic) of several; a single one plays any role."""
    if not isinstance(x, dict):
        return x
    if name not in x and absent:
        return absent[0]
    return x[name] if name in x or len(x) != 1 else next(iter(x.values()))
'''

DENSE = """
def distribution(x, rows, like):
    return Dense(rows.take(x).to(like), rows.y)
"""

LISTS = '''
def distribution(x, rows, like):
    """Full logits, or the lists of a served teacher."""
    if not isinstance(x, tuple):
        return Dense(rows.take(x).to(like), rows.y)
    ids, logp, logp_y = (None if part is None else rows.take(part) for part in x)
    logp, logp_y = (None if part is None else part.to(like) for part in (logp, logp_y))
    return Sparse(ids, logp, logp_y, rows.y)
'''


def _loss_class(spec: Spec, emitted: Emitted, wants: Needs) -> str:
    """The module: what it reads is written out, nothing is looked up by name at run time."""
    main = next((s for s in emitted.staged if s.rows == "main"), None)
    golden = next((s for s in emitted.staged if s.rows == "golden"), None)
    lines = [
        "class Loss(torch.nn.Module):",
        '    """The loss of a batch, summed and normalised over all of it.',
        "",
        "    student_logits [B, T, V]: logits at t predict tokens[:, t]; mask [B, T]: response tokens.",
        "    teacher_logits: [B, T, V], or a dict by role" + _lists_note(wants),
        "    rollout_logprobs [B, T]; initial_logits [B, T, V]; outcome, group [B]; values",
        "    [B, T + 1] (or a dict by critic); special [B, T]; prompt: one dict of fields a row.",
    ]
    if golden is not None:
        lines.append("    golden: (student_logits, tokens, mask) of text given as data.")
    lines += ['    """', ""]
    lines += [
        "    def forward(self, student_logits, teacher_logits, tokens, mask, rollout_logprobs=None,",
        "                initial_logits=None, outcome=None, group=None, values=None, special=None,",
        "                prompt=None, step=0, total_steps=1, golden=None):",
        "        like = torch.float64 if student_logits.dtype == torch.float64 else torch.float32",
    ]
    if main is not None:
        lines += [*_block(spec, main, "        "), "        return total"]
    else:
        lines.append("        total = student_logits.sum() * 0.0")
        lines.append("        return total")
    if golden is not None:
        lines[-1:] = [
            "        if golden is not None:",
            "            (student_logits, tokens, mask), group = golden, None",
            *(
                line.replace("        total = run(", "        total = total + run(", 1)
                for line in _block(spec, golden, "            ")
            ),
            "        return total",
        ]
    return "\n".join(lines) + "\n"


def _lists_note(wants: Needs) -> str:
    if _lists(wants):
        return (
            ";\n    a served teacher is (ids [B, T, K], log-probabilities [B, T, K], of y [B, T])."
        )
    return "."


def _lists(wants: Needs) -> bool:
    """Whether a teacher may be given by its top list and its sampled log-probability."""
    return any(v == "sampled" or v.startswith("top") for v in wants.teachers.values())


def _block(spec: Spec, s: Staged, pad: str) -> Iterator[str]:
    nodes = {n.id: n for st in s.stages for n in st.nodes}.values()
    inputs = {input_key(n): n for n in nodes if n.op == "input"}
    inputs = {k: n for k, n in inputs.items() if n.attr("name") not in ("one", "step")}
    yield f"{pad}rows = Rows(tokens, mask, group)"
    yield f"{pad}logits = rows.take(student_logits)"
    yield f"{pad}d = {{'student': Dense(logits.detach().to(like), rows.y)}}"
    for name in sorted({str(n.attr("dist")) for n in nodes if n.op == "logp"} - {"student"}):
        yield from _dist(spec, name, pad)
    yield f"{pad}own = {{}}"
    for k in sorted(inputs):
        yield from _input(k, inputs[k], pad)
    seq = [k for k, n in inputs.items() if n.q.axis in (Axis.SEQ, Axis.PROMPT)]
    seq += [f"boot_{k}" for k, n in inputs.items() if n.attr("name") == "values"]
    passes = ", ".join(f"('{st.kind}', {function_name(s.rows, st)})" for st in s.stages)
    per_sequence = "{" + ", ".join(ascii(k) for k in sorted(seq)) + "}" if seq else "()"
    yield f"{pad}passes = [{passes}]"
    yield f"{pad}total = run(passes, rows, logits, d, own, {per_sequence}, step, total_steps, like)"


def _dist(spec: Spec, name: str, pad: str) -> Iterator[str]:
    """The distribution under a role, chosen by a field of the prompt where it is routed."""
    target = f"d['{_mangle(name)}']"
    if name == "initial":
        yield f"{pad}start = need(initial_logits, 'initial_logits')"
        yield f"{pad}{target} = Dense(rows.take(start).to(like), rows.y)"
        return
    routed = next((r for r in spec.routed if r.name == name), None)
    if routed is None:
        yield f"{pad}given = role(teacher_logits, {name!a})"
        yield f"{pad}{target} = distribution(given, rows, like)"
        return
    tests = [(p, c) for p, c in zip(routed.parts, routed.conditions) if c]
    default = next((p for p, c in zip(routed.parts, routed.conditions) if c is None), None)
    yield f"{pad}given = role(teacher_logits, {name!a}, None)"
    yield f"{pad}if given is None:  # chosen row by row"
    first = default or tests[-1][0]
    if default is None:
        where = " or ".join(f"str(p.get({f!a})) == {v!a}" for _, (f, v) in tests)
        yield f"{pad}    assert all({where} for p in prompt), 'a prompt without a teacher'"
    yield f"{pad}    given = role(teacher_logits, {first!a})"
    for part, (f, value) in reversed([t for t in tests if t[0] != first]):
        yield f"{pad}    hit = [str(p.get({f!a})) == {value!a} for p in prompt]"
        yield f"{pad}    hit = torch.tensor(hit, device=given.device)[:, None, None]"
        yield f"{pad}    given = torch.where(hit, role(teacher_logits, {part!a}), given)"
    yield f"{pad}{target} = distribution(given, rows, like)"


def _input(k: str, n: Node, pad: str) -> Iterable[str]:
    name = n.attr("name")
    left = f"{pad}own[{k!a}] ="
    if name == "length":
        return [f"{left} rows.length.to(like)"]
    if name == "position":
        return [f"{left} rows.pos.to(like)"]
    if name == "outcome":
        return [f"{left} need(outcome, 'outcome')[rows.kept].to(like)"]
    if name == "special":
        absent = "torch.zeros_like(rows.y, dtype=torch.bool)"
        return [f"{left} {absent} if special is None else rows.take(special).bool()"]
    if name == "rollout_logp":
        return [
            f"{left} (  # without a record, the student is taken to have sampled",
            f"{pad}    d['student'].at_y() if rollout_logprobs is None",
            f"{pad}    else rows.take(rollout_logprobs).to(like))",
        ]
    if name == "noise":
        return [f"{left} uniform(rows.place, step, {n.attr('k')}).to(like)"]
    if name == "field":
        test = f"str(p.get({str(n.attr('field'))!a})) == {str(n.attr('equals'))!a}"
        return [
            f"{pad}hits = [{test} for p in need(prompt, 'prompt')]",
            f"{left} torch.tensor(hits, device=rows.y.device)[rows.kept]",
        ]
    assert name == "values", name
    return [
        f"{pad}value, boot = rows.critic(role(need(values, 'values'), {str(n.attr('critic'))!a}))",
        f"{left} value.to(like)",
        f"{pad}own[{'boot_' + k!a}] = boot.to(like)",
    ]
