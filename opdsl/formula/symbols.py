"""Letters: how distributions, index sets, knobs and named quantities are written.

The student is π_θ, a teacher T is π_T, the start π_0, the sampling policy μ; a cut support is Ω,
with one bucket for the rest Ω⁺. What gets a letter here is remembered, so that only letters that
were printed are explained.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from opdsl.formula.algebra import Dist
from opdsl.formula.notation import Call, Join, Math, Rel, Sym, Text, add, mul, words
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "eps": "ε", "zeta": "ζ",
    "eta": "η", "theta": "ϑ", "kappa": "κ", "lambda": "λ", "lam": "λ", "mu": "μ̃", "nu": "ν",
    "xi": "ξ", "rho": "ϱ", "sigma": "σ", "tau": "τ", "phi": "φ", "chi": "χ̃", "psi": "ψ", "omega": "ω",
}  # fmt: skip
_COMMAND = {"eps": "epsilon", "lam": "lambda", "theta": "vartheta", "rho": "varrho"}
_HAT, _BAR = "\u0302", "\u0304"


@dataclass(frozen=True, slots=True)
class Named:
    """A letter of the formula. style: "value", "flag" (n, negated 1 − n), "some" (C ≠ ∅), "row"
    (one number per rollout, b^j of another one)."""

    u: str
    l: str
    timed: bool = True
    style: str = "value"
    rank: int = 0

    def at(self, time: str, row: str = "") -> Sym:
        if not self.timed:
            if row and self.style == "row":
                return Sym(f"{self.u}^{row}", f"{{{self.l}}}^{{{row}}}")
            return Sym(self.u, self.l)
        index = time if len(time) == 1 else "{" + time + "}"
        up, lp = (f"^{row}", f"^{{{row}}}") if row else ("", "")
        below = index.replace("−", "-")
        bare = self.l.rstrip("'")  # primes stand behind the index: A_t'^j is fine, A'_t^j is not
        return Sym(f"{self.u}_{index}{up}", f"{bare}_{below}{self.l[len(bare) :]}{lp}")


def primed(letter: str, command: str, count: int, style: str = "value", rank: int = 0) -> Named:
    """The letter, with a prime for every earlier one of the same kind."""
    marks = "′" * count
    return Named(letter + marks, command + "'" * count, True, style, rank)


@dataclass(slots=True)
class Symbols:
    """The letters of one method. `plain` writes student and T instead of π_θ and π_T."""

    params: dict[str, str] = field(default_factory=dict)  # knob -> short name
    teacher: str | None = None  # the one teacher ℓ compares with
    plain: bool = False
    used: dict[tuple, object] = field(default_factory=dict)  # letters printed -> what they mean
    _sets: dict[int, str] = field(default_factory=dict)
    _mixes: dict[Dist, str] = field(default_factory=dict)

    def schedule(self, node: int) -> Sym:
        """η, with a prime for every earlier schedule that was printed."""
        count = list(k for k in self.used if k[0] == "schedule").index(("schedule", node))
        return Sym("η" + "′" * count, r"\eta" + "'" * count, True)

    # -- distributions -----------------------------------------------------------------------
    def dist(self, d: Dist) -> Sym:
        match d[0]:
            case "renorm":
                return self._decorated(self.dist(d[1]), _HAT, r"\hat")
            case "bin":
                return self.dist(d[1])
            case "mix":
                return self._mixture(d)
        _, name, temperature, frozen = d
        s = self._leaf(str(name))
        if frozen:
            self.used["frozen", name] = d
            s = self._decorated(s, _BAR, r"\bar")
        if temperature != 1:
            s = Sym(f"{s.u}^({temperature:g})", f"{s.l}^{{({temperature:g})}}")
            self.used["tempered", name, temperature] = d
        return s

    def _leaf(self, name: str) -> Sym:
        if self.plain:
            return Sym(name, words(name))
        if name == "student":
            return Sym("π_θ", r"\pi_\theta")
        if name == "initial":
            return Sym("π_0", r"\pi_0")
        if name == "rollout":
            return Sym("μ", r"\mu")
        if name.startswith("'"):  # a parameter of a definition
            return Sym(name[1:], name[1:] if len(name) == 2 else words(name[1:]))
        return Sym(f"π_{name}", rf"\pi_{{{words(name) if len(name) > 1 else name}}}")

    def _decorated(self, s: Sym, mark: str, command: str) -> Sym:
        if self.plain:
            return s
        first, rest = (s.l[:3], s.l[3:]) if s.l.startswith(r"\pi") else (s.l, "")
        return Sym(s.u[0] + mark + s.u[1:], f"{command}{{{first}}}{rest}")

    def _mixture(self, d: Dist) -> Sym:
        d = _unbinned(d)  # the entry for the rest is a part of the set, not of the mixture
        if d not in self._mixes:
            self._mixes[d] = "m" + "′" * len(self._mixes)
        self.used["mix", d] = d
        name = self._mixes[d]
        return Sym(name, name.replace("′", "'"))

    # -- index sets ------------------------------------------------------------------------------
    def set(self, s: Node) -> Sym | None:
        """Ω, Ω′, … ; Ω⁺ with a bucket; None for the whole vocabulary."""
        if s.op == "full":
            return None
        base = s.args[0] if s.op == "with_bin" else s
        if base.id not in self._sets:
            self._sets[base.id] = "Ω" + "′" * len(self._sets)
        self.used["set", base.id] = base
        letter = self._sets[base.id]
        mark = "⁺" if s.op == "with_bin" else ""
        if mark:
            self.used["bin", base.id] = base
        l = r"\Omega" + "'" * (len(letter) - 1) + ("^+" if mark else "")
        return Sym(letter + mark, l)

    def described(self, s: Node) -> Math:
        """What an index set is: {y_t} ∪ top-32(π_T)."""
        match s.op:
            case "sampled":
                return Sym("{y_t}", r"\{y_t\}")
            case "full":
                return Text("the vocabulary")
            case "top" | "top_p":
                of = self._of(s.args[0])
                k = f"{s.attr('k')}"
                if s.op == "top_p":
                    return Call(
                        Sym(f"nucleus-{s.attr('p'):g}", rf"\text{{nucleus-{s.attr('p'):g}}}"),
                        (of,),
                    )
                return Call(Sym(f"top-{k}", rf"\text{{top-{k}}}"), (of,))
            case "with_bin":
                return self.described(s.args[0])
        sign = ("∪", r"\cup") if s.op == "union" else ("∩", r"\cap")
        parts = [self.described(a) for a in s.args]
        out = parts[0]
        for p in parts[1:]:
            out = Chain(out, p, *sign).math()
        return out

    def _of(self, n: Node) -> Math:
        """The distribution whose most probable entries are taken: a policy, or a mixture."""
        if n.op == "logp":
            return self.dist(("leaf", n.attr("dist"), n.attr("temperature"), False))
        leaves = {m.id: m for m in nodes_below([n]) if m.op == "logp"}
        names = dict.fromkeys(str(m.attr("dist")) for m in leaves.values())
        return Text("mixture of " + " and ".join(names))

    # -- knobs ---------------------------------------------------------------------------------
    def param(self, name: str) -> Sym:
        short = self.params.get(name, name.split(".")[-1])
        letter = GREEK.get(short)
        if letter is not None:
            return Sym(letter, "\\" + _COMMAND.get(short, short), True)
        return Sym(short, short if len(short) == 1 else words(short), True)


@dataclass(frozen=True, slots=True)
class Chain:
    """Two sets joined by ∪ or ∩."""

    left: Math
    right: Math
    u: str
    l: str

    def math(self) -> Math:
        from opdsl.formula.notation import latex, unicode

        return Sym(
            f"{unicode(self.left)} {self.u} {unicode(self.right)}",
            rf"{latex(self.left)} {self.l} {latex(self.right)}",
        )


def short_names(names: list[str]) -> dict[str, str]:
    """Knob -> the last part of its name where that is unambiguous."""
    tails = [n.split(".")[-1] for n in names]
    return {n: t if tails.count(t) == 1 else n for n, t in zip(names, tails)}


__all__ = ["Join", "Named", "Rel", "Symbols", "add", "mul", "primed", "short_names"]


def _unbinned(d: Dist) -> Dist:
    if d[0] == "bin":
        return _unbinned(d[1])
    if d[0] == "mix":
        return (d[0], tuple((w, _unbinned(x)) for w, x in d[1]), *d[2:])
    return d
