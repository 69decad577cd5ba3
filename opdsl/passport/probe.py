"""The claims of a passport, measured: a method on small random models, every response enumerated.

`probe` compares what `report.passport` says with what the emitted passes do (theory §13): expected
gradient, bias against both objectives, curl, field at the teacher, descent, variance. What the
models are and what is assumed is in `small`; what a claim means is in `claims`. A model can refute a
claim; that none does decides an open one for these models only, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from opdsl.passport.pieces import sources
from opdsl.wrapping import wrapped as wrapped_text

if TYPE_CHECKING:
    from opdsl.compilation import Compilation
    from opdsl.passport.measure import Measurement
    from opdsl.passport.model import Small

MODELS, MORE = 3, 9  # a no says that some model is different: more are tried until one is
# of the logits; the later ones, to refute a no: wide where a bound at 10 nats is to bind, flat where
# a truncated sampler is to have more than one token
SPREADS = (1.0, 1.5, 0.7, 3.0, 0.3, 0.7, 6.0, 0.5, 0.7, 12.0, 0.3, 1.0)
AGREES, DISAGREES, DECIDES, OPEN = "agrees", "disagrees", "decides", "not measured"
WORDS = {True: "yes", False: "no", None: "not decided"}


@dataclass(frozen=True)
class Row:
    """One claim. verdict: agrees | disagrees | decides (an open claim) | not measured."""

    claim: str
    claimed: bool | str | None
    measured: bool | None
    verdict: str
    detail: str


@dataclass(frozen=True)
class Distance:
    """Over the models: the best positive factor k of ∇J, the largest relative residual of F − k∇J,
    and the smallest cosine."""

    k: tuple[float, ...]
    residual: float
    cosine: float


@dataclass(frozen=True)
class Probe:
    """What was measured. models: what they are; assumed: how the method was made to fit them;
    bias: by objective; wrong_critic: the same with a critic that is off by unit noise; descent:
    smallest cosine of −F with the steepest descent of each KL; variance: of one draw."""

    method: str
    models: str
    assumed: tuple[str, ...]
    rows: tuple[Row, ...]
    bias: dict[str, Distance]
    wrong_critic: dict[str, Distance]
    descent: dict[str, float]
    variance: float | None
    failed: str = ""

    @property
    def agrees(self) -> bool:
        return not any(r.verdict == DISAGREES for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `--format json`."""
        return {**asdict(self), "agrees": self.agrees}

    def lines(self, width: int = 100) -> list[str]:
        """The probe as text, laid out like the passport above it."""
        out = _entry("probe", self.models, width)
        for text in self.assumed:
            out += _entry("", text, width)
        if self.failed:
            return out + _entry("", f"not measured: {self.failed}", width)
        for r in self.rows:
            claimed = r.claimed if isinstance(r.claimed, str) else WORDS[r.claimed]
            out += _entry(r.claim, f"{r.verdict}: the passport says {claimed}; {r.detail}", width)
        for name, d in self.wrong_critic.items():
            text = f"with a critic off by unit noise: {_percent(d.residual)} of the field"
            out += _entry(f"bias {name}", text, width)
        falls = "; ".join(
            f"{k.replace('||', ' ‖ ')} {'falls' if x > 0 else 'may rise'} ({x:+.2f})"
            for k, x in self.descent.items()
        )
        out += _entry("step", falls and f"first order, smallest cosine: {falls}", width)
        if self.variance is not None:
            out += _entry("spread", f"E‖g − E g‖² of one draw: {self.variance:.3g}", width)
        return out


def probe(compilation: Compilation, models: int = MODELS, seed: int = 1) -> Probe:
    """Measures a compiled method on random small models. Raises CompileError on a faulty spec."""
    from opdsl.passport.report import passport

    spec, _ = compilation.require()
    card = passport(compilation)
    try:
        from opdsl.passport.measure import measure
        from opdsl.passport.small import small

        found: list[tuple[Small, Measurement]] = []
        while len(found) < models or (len(found) < models + MORE and _doubted(card, found)):
            i = len(found)
            m = small(spec, seed=seed + i, spread=SPREADS[i % len(SPREADS)])
            found.append((m, measure(m)))
        first = found[0][0]
        wrong = measure(first, curl=False, wrong=True) if first.critics else None
    except (ValueError, ArithmeticError) as e:  # the model is too large, or lacks what is read
        return Probe(spec.name, "small random models", (), (), {}, {}, {}, None, str(e))
    seen = [x for _, x in found]
    return Probe(
        spec.name,
        _described(first, len(found)),
        tuple(first.notes) + _assumptions(first),
        tuple(_rows(card, seen)),
        {name: _distance(seen, name) for name in seen[0].bias},
        {name: _distance([wrong], name) for name in wrong.bias} if wrong else {},
        {name: min(x.descent[name] for x in seen) for name in seen[0].descent},
        seen[0].variance,
    )


# ---- claims ------------------------------------------------------------------------------------


def _rows(card: dict[str, Any], seen: list[Measurement]) -> list[Row]:
    size = max(x.size for x in seen)
    at = [x.at_teacher for x in seen if x.at_teacher is not None]
    curl = max(x.curl for x in seen if x.curl is not None)
    rows = [
        _row("zero field", card["zero_expected_gradient"], all(x.zero for x in seen),
             f"‖F‖ = {size:.3g}"),
        _row("at teacher", card["stationary_at_teacher"], _all(seen, lambda x: x.stationary),
             _beside(seen, at)),
        _row("conservative", card["conservative"], _all(seen, lambda x: x.conservative),
             f"‖J − Jᵀ‖ / ‖J‖ = {_number(curl)}"),
    ]  # fmt: skip
    for name, claimed in card["unbiased"].items():
        measured = _all(seen, lambda x, n=name: x.unbiased(n))
        if not seen[0].bias:
            rows.append(_row(name, claimed, None, "no teacher is compared with"))
            continue
        d = _distance(seen, name)
        factor = ", ".join(f"{k:.3g}" for k in d.k)
        rows.append(
            _row(name, claimed, measured,
                 f"F is off by {_percent(d.residual)} from k ∇{name} at the best k = {factor}; "
                 f"cosine {d.cosine:.3f}")
        )  # fmt: skip
    return rows + _descents(card["descent"], seen)


def _doubted(card: dict[str, Any], found: list[tuple[Small, Measurement]]) -> bool:
    """A no that every model so far contradicts."""
    return any(r.claimed is False and r.measured for r in _rows(card, [x for _, x in found]))


def _row(name: str, claimed: bool | None, measured: bool | None, detail: str) -> Row:
    if measured is None:
        verdict = OPEN
    elif claimed is None:
        verdict, detail = DECIDES, f"here {WORDS[measured]}: {detail}"
    else:
        verdict = AGREES if claimed == measured else DISAGREES
    return Row(name, claimed, measured, verdict, detail)


def _descents(claims: dict[str, str], seen: list[Measurement]) -> list[Row]:
    """Certificates of descent for the whole field; those of single tokens are not measured here."""
    rows = []
    for name, text in claims.items():
        key = f"{name} of sequences" if "whole sequences" in text else name
        whole = "visited states" in text or "whole sequences" in text
        if not text.startswith("guaranteed") or not whole or key not in seen[0].descent:
            continue
        worst = min(x.descent[key] for x in seen)
        shown = name.replace("||", " ‖ ")
        rows.append(
            Row("descent", text, worst > 0, AGREES if worst > 0 else DISAGREES,
                f"{shown}: cosine {worst:.3f}")
        )  # fmt: skip
    return rows


def _all(seen: list[Measurement], f: Callable[[Measurement], bool | None]) -> bool | None:
    answers = [f(x) for x in seen]
    if False in answers:
        return False
    return None if None in answers else True


def _beside(seen: list[Measurement], at: list[float]) -> str:
    if any(x.jumps for x in seen):
        return "the field jumps at the teacher"
    if not at:
        return "no teacher is compared with"
    return f"‖F‖ there is {_number(max(at))} of ‖F‖ elsewhere"


def _distance(seen: list[Measurement], name: str) -> Distance:
    found = [x.bias[name] for x in seen]
    return Distance(
        tuple(round(b.k, 9) for b in found),
        max(b.residual for b in found),
        min(b.cosine for b in found),
    )


# ---- words -------------------------------------------------------------------------------------


def _described(m: Small, models: int) -> str:
    states, vocab = m.tree.size
    prompts = f", {len(m.cases)} kinds of prompt" if len(m.cases) > 1 else ""
    groups = f", drawn in groups of {m.group}" if m.group > 1 else ""
    return (
        f"{models} random models of {vocab} tokens and {states} states, all "
        f"{len(m.tree.responses)} responses of at most {m.tree.cap} tokens{groups}{prompts}; float64"
    )


def _assumptions(m: Small) -> tuple[str, ...]:
    out = []
    if m.critics:
        out.append("the critic is exact: the expected return of its own signal")
    if m.module.program.part("golden") is not None:
        out.append("golden text is a fixed set of responses, once per rollout")
    if any(s.policy == "data" for s in sources(m.spec)):
        out.append("given text is drawn from a fixed policy")
    if not m.coupled and m.spec.aggregate not in ("sum", "response_length"):
        out.append("the batch's denominator is left out: it is a step size")
    return tuple(out)


def _number(x: float) -> str:
    return "0" if x < 1e-8 else f"{x:.3g}"


def _percent(x: float) -> str:
    return "0 %" if x < 1e-8 else f"{100 * x:.3g} %"


def _entry(label: str, text: str, width: int) -> list[str]:
    indent = 16
    lines = wrapped_text(text, width - indent) if text else []
    return [f"  {label if i == 0 else '':<{indent - 2}}{line}" for i, line in enumerate(lines)]
