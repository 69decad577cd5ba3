"""Formulas for the report: the LaTeX of `explain` as MathML, which browsers draw themselves.

The input is what this package prints (a closed set of commands), not LaTeX in general; anything
else raises ValueError, and the report shows the formula as text instead.
"""

from __future__ import annotations

import re

from opdsl.train.html_text import Html, el, joined

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|[0-9]+(?:\.[0-9]+)?|\s+|.", re.DOTALL)

_LETTERS = {  # command -> (character, upright)
    "pi": ("π", False), "theta": ("θ", False), "mu": ("μ", False), "beta": ("β", False),
    "alpha": ("α", False), "eta": ("η", False), "epsilon": ("ϵ", False), "rho": ("ρ", False),
    "lambda": ("λ", False), "tau": ("τ", False), "gamma": ("γ", False), "delta": ("δ", False),
    "sigma": ("σ", False), "phi": ("ϕ", False), "psi": ("ψ", False), "omega": ("ω", False),
    "kappa": ("κ", False), "nu": ("ν", False), "xi": ("ξ", False), "chi": ("χ", False),
    "zeta": ("ζ", False), "iota": ("ι", False), "varsigma": ("ς", False),
    "varrho": ("ϱ", False), "varphi": ("φ", False), "varepsilon": ("ε", False),
    "ell": ("ℓ", False), "partial": ("∂", False), "nabla": ("∇", True),
    "Omega": ("Ω", True), "Delta": ("Δ", True), "Gamma": ("Γ", True), "Lambda": ("Λ", True),
    "Sigma": ("Σ", True), "Pi": ("Π", True), "Phi": ("Φ", True), "Psi": ("Ψ", True),
    "Theta": ("Θ", True), "emptyset": ("∅", True), "infty": ("∞", True),
}  # fmt: skip
_OPERATORS = {
    "cdot": "·", "in": "∈", "notin": "∉", "leq": "≤", "geq": "≥", "neq": "≠", "propto": "∝",
    "wedge": "∧", "vee": "∨", "neg": "¬", "cup": "∪", "cap": "∩", "to": "→", "ldots": "…",
    "Vert": "‖", "vert": "|", "mid": "∣", "colon": ":", "times": "×", "sim": "∼", "equiv": "≡",
    "approx": "≈", "odot": "⊙", "subset": "⊂", "{": "{", "}": "}", "|": "‖",
}  # fmt: skip
_SPACES = {",": "0.17em", ":": "0.22em", ";": "0.28em", " ": "0.33em", "quad": "1em",
           "qquad": "2em", "!": "0em"}  # fmt: skip
_NAMED = frozenset({"log", "exp", "min", "max", "sup", "inf", "arg", "tanh", "Pr"})
_BIG = {"sum": "∑", "prod": "∏"}
# Behind these a minus is a sign, not a difference.
_BEFORE_SIGN = frozenset("=<>(,[{:|+-/") | {
    "\\{", "\\left", "\\cdot", "\\leq", "\\geq", "\\neq", "\\in", "\\propto", "\\wedge", "\\quad",
}  # fmt: skip
_BOLD = {str(i): chr(0x1D7CE + i) for i in range(10)}
_BOLD |= {chr(65 + i): chr(0x1D400 + i) for i in range(26)}
_BOLD |= {chr(97 + i): chr(0x1D41A + i) for i in range(26)}


def mathml(latex: str, spoken: str = "", display: bool = True) -> Html:
    """A `math` element. spoken: the formula as plain text, for readers that draw none.

    Raises ValueError for a command or nesting this printer's formulas do not have.
    """
    reader = _Reader(latex)
    inner = reader.row("")
    return el(
        "math",
        el("mrow", *inner),
        display="inline",
        displaystyle="true" if display else None,
        alttext=spoken or latex,
    )


class _Reader:
    """Recursive descent over the tokens of one formula."""

    def __init__(self, latex: str):
        self.tokens = _TOKEN.findall(latex)
        self.at = 0

    def peek(self) -> str:
        while self.at < len(self.tokens) and self.tokens[self.at].isspace():
            self.at += 1
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        if not token:
            raise ValueError("the formula ends too early")
        self.at += 1
        return token

    def row(self, until: str) -> list[Html]:
        """Elements up to `until` ("" is the end), which is taken too."""
        out: list[Html] = []
        before = "("
        while True:
            token = self.peek()
            if token == until:
                self.at += bool(token)
                return out
            if not token or token in ("}", "\\right"):
                raise ValueError(f"{token or 'the end'} where {until or 'no brace'} was expected")
            if token == "-" and before in _BEFORE_SIGN:
                self.at += 1
                out.append(el("mo", "−", form="prefix"))
            else:
                out += self.scripted()
            before = before if token in ("\\,", "\\ ") else token

    def scripted(self) -> list[Html]:
        """One atom with its sub- and superscripts, and the space that follows a name."""
        first = self.peek()
        base = self.atom()
        low = high = None
        primes = ""
        while self.peek() in ("_", "^", "'"):
            sign = self.take()
            if sign == "'":
                primes += "′"
            elif sign == "_":
                low = self.group()
            else:
                high = self.group()
        if primes:
            high = joined([el("mo", primes), high]) if high else el("mo", primes)
            high = el("mrow", high)
        name = first.lstrip("\\")
        limits = first.startswith("\\") and (name in _BIG or name in ("max", "min"))
        made = _scripts(base, low, high, limits)
        follows = self.peek()
        spaced = first.startswith("\\") and (name in _NAMED or name == "operatorname")
        if spaced and follows not in ("", "(", "\\left", ")", "}", "\\,", ","):
            return [made, el("mspace", width="0.17em")]
        return [made]

    def group(self) -> Html:
        """The argument of a command or script: a braced row, or one atom."""
        if self.peek() == "{":
            self.take()
            inner = self.row("}")
            return inner[0] if len(inner) == 1 else el("mrow", *inner)
        return self.atom()

    def words(self) -> str:
        """The text inside braces, spaces kept; commands give their character."""
        if self.peek() != "{":
            return self.take()
        self.at += 1
        out, depth = "", 0
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            self.at += 1
            if token == "{":
                depth += 1
            elif token == "}":
                if depth == 0:
                    return re.sub(r"\s+", " ", out)
                depth -= 1
            elif token.startswith("\\"):
                out += _character(token[1:])
            else:
                out += token
        raise ValueError("a text is not closed")

    def atom(self) -> Html:
        token = self.take()
        if token == "{":
            return el("mrow", *self.row("}"))
        if token.startswith("\\"):
            return self.command(token[1:])
        if token[0].isdigit():
            return el("mn", token)
        if token.isalpha():
            return el("mi", token)
        if token in "^_&#$%~":
            raise ValueError(f"{token} has no place here")
        return el("mo", {"-": "−", "*": "∗"}.get(token, token), **_fence(token))

    def command(self, name: str) -> Html:
        if name in _LETTERS:
            character, upright = _LETTERS[name]
            return el("mi", character, mathvariant="normal" if upright else None)
        if name in _BIG:
            return el("mo", _BIG[name], movablelimits="false")
        if name in _OPERATORS:
            return el("mo", _OPERATORS[name], **_fence(_OPERATORS[name]))
        if name in _SPACES:
            return el("mspace", width=_SPACES[name])
        if name in _NAMED:
            return el("mi", name)
        match name:
            case "frac":
                return el("mfrac", self.group(), self.group())
            case "sqrt":
                return el("msqrt", self.group())
            case "hat" | "bar" | "tilde":
                sign = {"hat": "^", "bar": "‾", "tilde": "~"}[name]
                return el("mover", self.group(), el("mo", sign, stretchy="false"), accent="true")
            case "mathrm" | "operatorname":
                return self.upright()
            case "text":
                return el("mtext", _kept(self.words()))
            case "mathbf":
                return el("mi", "".join(_BOLD.get(c, c) for c in self.words()))
            case "left":
                return self.fenced()
            case "_":
                return el("mi", "_")
        raise ValueError(f"\\{name} is not known")

    def upright(self) -> Html:
        """A name in one piece; where it holds more than characters, what stands there."""
        before = self.at
        try:
            return el("mi", _kept(self.words()), mathvariant="normal")
        except ValueError:
            self.at = before
            return self.group()

    def fenced(self) -> Html:
        """\\left … \\right: fences as tall as what they hold."""
        left = self.take()
        inner = self.row("\\right")
        right = self.take()
        fences = [_fence_text(f) for f in (left, right)]
        made = [el("mo", f, stretchy="true", fence="true") if f else None for f in fences]
        return el("mrow", made[0], *inner, made[1])


def _scripts(base: Html, low: Html | None, high: Html | None, limits: bool) -> Html:
    if low and high:
        return el("munderover" if limits else "msubsup", base, low, high)
    if low:
        return el("munder" if limits else "msub", base, low)
    if high:
        return el("mover" if limits else "msup", base, high)
    return base


def _fence(character: str) -> dict[str, str]:
    """Fences that were not asked to grow stay as they are."""
    return {"stretchy": "false"} if character in "()[]{}|‖" else {}


def _fence_text(token: str) -> str:
    return "" if token == "." else _character(token[1:]) if token.startswith("\\") else token


def _character(name: str) -> str:
    if name in _LETTERS:
        return _LETTERS[name][0]
    if name in _OPERATORS:
        return _OPERATORS[name]
    if name in _SPACES:
        return " "
    if name in ("_", "&", "%", "#", "$"):
        return name
    if name in _NAMED:
        return name
    raise ValueError(f"\\{name} has no character")


def _kept(words: str) -> str:
    """Spaces at the ends of math text vanish unless they cannot break."""
    return words.replace(" ", "\u00a0")


def formula_lines(lines: list[str], spoken: list[str]) -> Html | None:
    """Several formulas one below the other; None where one of them is not understood.

    spoken: their plain text; shown to readers that draw no formulas.
    """
    try:
        made = [
            el("div", mathml(line, spoken[i] if i < len(spoken) else ""), class_=_place(line))
            for i, line in enumerate(lines)
        ]
    except ValueError:
        return None
    return el("div", *made, class_="formulas")


def _place(line: str) -> str:
    return "formula next" if line.startswith("\\quad") else "formula"
