"""Small random models of a method.

What is assumed: batch-wide denominators are step sizes and left out, unless the method reads other
statistics of the batch; then the responses drawn together are the batch, with the method's own
aggregate. An old student trails the student by a fixed displacement. Given text is a fixed policy's
(golden text: fixed responses). Numbers that move with the step are taken halfway through a run.
A critic is exact (the expected return of its own signal under the student) unless told otherwise.
Sets, shifts and thresholds are cut to fit (`fit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from opdsl.emit.batch import BatchError
from opdsl.emit.routed import add_routed
from opdsl.ir.interpret import Evaluator
from opdsl.ir.program import lower
from opdsl.meaning.node import Node
from opdsl.meaning.spec import Routed, Spec
from opdsl.passport import enumerate as exact
from opdsl.passport.coupling import GROUPED, LOOPED, reads_batch, roots
from opdsl.passport.fit import fitted
from opdsl.passport.model import Case, Small, marked
from opdsl.passport.pieces import sources
from opdsl.passport.strict import SOURCE, reads_fields


def small(spec: Spec, tree: exact.Tree | None = None, seed: int = 0, spread: float = 1.0) -> Small:
    """A random small model of a method. The tree follows from what the method couples."""
    program = lower(spec)
    nodes = roots(program)
    ops = {n.op for n in nodes}
    coupled = reads_batch(spec)
    groups = bool(ops & GROUPED) and spec.group > 1
    group = 2 if groups or coupled else 1
    if tree is None:
        tree = (
            exact.tree(3, 2)
            if ops & LOOPED and coupled
            else exact.tree(*((3, 3) if group > 1 else (4, 3)))
        )
    cases = tuple(
        _case(spec, tree, prompt, 1000 * seed + 10 * i, spread)
        for i, prompt in enumerate(_prompts(spec, nodes))
    )
    student = torch.stack(
        [tree.random(1000 * seed + 10 * i + 1, spread) for i in range(len(cases))]
    )
    names = [t for term in spec.terms for t in term.teachers if t != "initial"]
    reference = names[0] if names else None
    rough = Small(spec, tree, cases, student, 1, False, (), reference)
    cut = fitted(spec, _values_in(rough), tree.vocab, tree.cap)
    notes = list(cut.notes)
    if group > 1 and spec.group not in (1, group):
        notes.append(f"groups of {spec.group} are groups of {group}")
    if coupled:
        notes.append("the responses drawn together are the batch")
    for s in sources(spec):
        if s.policy == "old":
            notes.append("the old student is the student displaced by a fixed amount")
        if s.prefix:
            notes.append("forced prefixes are left out")
    return _with(rough, spec=cut.spec, group=group, coupled=coupled, notes=tuple(notes))


def _with(x: Small, **changes: object) -> Small:
    """A model with other parts, its caches left behind."""
    return Small(**{**{f.name: getattr(x, f.name) for f in fields(x)}, **changes})  # type: ignore[arg-type]


def _case(spec: Spec, w: exact.Tree, prompt: Mapping[str, str], seed: int, spread: float) -> Case:
    names = {t.name for t in spec.teachers} - {"initial"}
    g = torch.Generator().manual_seed(seed + 5)
    outcome = (torch.rand(len(w.responses), generator=g) < 0.5).double()
    return Case(
        prompt,
        {name: w.random(seed + 2 + 1000 * (i + 1), spread) for i, name in enumerate(sorted(names))},
        w.random(seed + 3, spread),
        outcome,
        w.random(seed + 4, spread),
        0.5 * w.random(seed + 6),
        w.random(seed + 7)[:, 0],
    )


def _prompts(spec: Spec, nodes: list[Node]) -> list[dict[str, str]]:
    """One prompt of every kind the method tells apart and has a teacher for."""
    asked = reads_fields(nodes) | {c for r in spec.routed for c in r.conditions if c is not None}
    asked |= {t.when for t in spec.teachers if t.when is not None}
    asked = {c for c in asked if c[0] != SOURCE}
    kinds: list[dict[str, str]] = [{name: value} for name, value in sorted(asked)]
    if not kinds:
        return [{}]
    kinds.append({name: "another" for name, _ in asked})
    return [p for p in kinds if all(_has_teacher(r, p) for r in spec.routed)] or [{}]


def _has_teacher(r: Routed, prompt: Mapping[str, str]) -> bool:
    return any(c is None or prompt.get(c[0]) == c[1] for c in r.conditions)


def _values_in(m: Small) -> Callable[[Node], np.ndarray | None]:
    """What a node is over all responses of a model, for `fitted`."""
    state: dict[str, Evaluator] = {}

    def values(node: Node) -> np.ndarray | None:
        if "run" not in state:
            w, z = m.tree, m.student_PSV[0]
            case = marked(m.cases[0], sources(m.spec)[0].policy)
            rows = torch.arange(len(w.responses))
            own_BT = torch.log_softmax(z, -1)[w.state_BT, w.tokens_BT]
            leaf = z[w.state_BT]
            table = {c.name: torch.zeros(w.size[0], dtype=z.dtype) for c in m.spec.critics}
            batch = add_routed(m._batch(case, leaf, rows, own_BT, table or None), m.spec.routed)
            flat = leaf.reshape(-1, leaf.shape[-1])[batch.place_N]
            state["run"] = Evaluator(batch, flat)
        try:
            with torch.no_grad():
                x = state["run"](node)
        except (BatchError, KeyError, AttributeError):
            return None
        return x.detach().double().numpy() if isinstance(x, Tensor) else None

    return values
