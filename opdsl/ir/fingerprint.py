"""Three fingerprints: `method` changes the formula, `optimize` the trajectory, `run` only inputs.

The method's fingerprint is taken of the program, not of the text: renaming a let, adding a comment
or spelling a divergence by hand leaves it alone.
"""

from __future__ import annotations

import hashlib
import json

from opdsl.ir.program import Program
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node


def digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def canonical(root: Node) -> list:
    """A graph as plain data; knobs count by value, not by name."""
    order: dict[int, int] = {}
    out: list = []
    for n in nodes_below([root]):
        attrs = {k: v for k, v in n.attrs if k not in ("unit", "depth", "id", "of")}
        op = n.op
        if op == "param":
            op = "const"
            attrs.pop("name", None)
        order[n.id] = len(out)
        out.append([op, [order[a.id] for a in n.args], attrs])
    return out


def fingerprints(program: Program) -> dict[str, str]:
    spec = program.spec
    method = {
        "total": [canonical(p.total) for p in program.parts],
        "states": [_state(s) for s in spec.states],
        "teachers": [
            [t.name, t.kind, t.context, t.decay, t.when, *([t.every] if t.every > 1 else [])]
            for t in spec.teachers
        ],
        "critics": [[c.init, c.lr, c.warmup] for c in spec.critics],
    }
    runs = {
        k: [dict(r.settings), {s: list(v) for s, v in r.sweeps.items()}]
        for k, r in spec.runs.items()
    }
    return {
        "method": digest(method),
        "optimize": digest(dict(spec.optimize)) if spec.optimize else "–",
        "run": digest(runs) if runs else "–",
    }


def _state(s) -> list:
    return [
        s.kind,
        (s.policy, s.parts, s.accept) if s.parts else s.policy,
        str(s.share),
        s.temperature,
        s.top_p,
        s.top_k,
        s.group,
        s.max_tokens,
        s.lag,
        s.prefix,
    ]
