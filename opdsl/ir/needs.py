"""What a program reads: teacher access, tensors of the batch, coupling."""

from __future__ import annotations

from dataclasses import dataclass, field

from opdsl.ir.program import Program
from opdsl.meaning.access import requirements
from opdsl.meaning.graph import nodes_below


@dataclass(frozen=True, slots=True)
class Needs:
    """teachers: role -> least access ("sampled", "top(32)", "score_ids", "logits")."""

    teachers: dict[str, str] = field(default_factory=dict)
    initial: bool = False
    rollout: bool = False
    outcome: bool = False
    group: bool = False
    values: tuple[str, ...] = ()
    special: bool = False
    golden: bool = False
    prompt_fields: tuple[str, ...] = ()
    coupled: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the optional arguments of Batch.from_logits this method reads."""
        out = []
        if self.initial:
            out.append("initial_logits")
        for name in ("rollout", "outcome", "group", "special", "golden"):
            if getattr(self, name):
                out.append("rollout_logprobs" if name == "rollout" else name)
        if self.values:
            out.append("values")
        if self.prompt_fields:
            out.append("prompt")
        return tuple(out)


def needs(program: Program) -> Needs:
    spec = program.spec
    nodes = nodes_below([p.total for p in program.parts])
    inputs = {str(n.attr("name")) for n in nodes if n.op == "input"}
    fields = {str(n.attr("field")) for n in nodes if n.op == "input" and n.attr("name") == "field"}
    fields |= {t.when[0] for t in spec.teachers if t.when}
    fields = {f for f in fields if not f.startswith("@")}  # "@source": the state source fills it
    dists = {str(n.attr("dist")) for n in nodes if n.op == "logp"}
    grouped = {"group_sum", "group_max", "others_sum"}
    from opdsl.ir.stages import stage

    return Needs(
        teachers={k: v.text for k, v in requirements(spec).items()},
        initial="initial" in dists,
        rollout="rollout_logp" in inputs,
        outcome="outcome" in inputs,
        group=any(n.op in grouped for n in nodes),
        values=tuple(sorted({str(n.attr("critic")) for n in nodes if n.attr("critic")})),
        special="special" in inputs,
        golden=any(p.rows == "golden" for p in program.parts),
        prompt_fields=tuple(sorted(fields)),
        coupled=any(stage(program, p).coupled for p in program.parts),
    )
