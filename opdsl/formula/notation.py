"""Mathematical expressions and how they look: unicode for terminals, LaTeX for papers.

A closed set of shapes, immutable; `unicode` and `latex` are the only two renderers. LaTeX stays
inside what matplotlib's mathtext understands, so that reports can typeset it without TeX.
"""

from __future__ import annotations

from dataclasses import dataclass

ADD, MUL, UNARY, POW, ATOM = range(5)  # binding strength, weakest first


class Math:
    """Base of everything below."""


@dataclass(frozen=True, slots=True)
class Sym(Math):
    """A letter with decoration: `π_θ`, `A_t`. `param` letters are knobs of the method."""

    u: str
    l: str
    param: bool = False


@dataclass(frozen=True, slots=True)
class Num(Math):
    value: float


@dataclass(frozen=True, slots=True)
class Add(Math):
    """Signed sum; each item is (positive?, expression)."""

    items: tuple[tuple[bool, Math], ...]


@dataclass(frozen=True, slots=True)
class Mul(Math):
    items: tuple[Math, ...]


@dataclass(frozen=True, slots=True)
class Frac(Math):
    top: Math
    bottom: Math


@dataclass(frozen=True, slots=True)
class Pow(Math):
    base: Math
    exponent: Math


@dataclass(frozen=True, slots=True)
class Root(Math):
    body: Math


@dataclass(frozen=True, slots=True)
class Call(Math):
    """`KL(p ‖ q)`, `min(a, b)`, `π_θ(v)`: a head and arguments in brackets."""

    head: Sym
    args: tuple[Math, ...]
    sep: str = ", "


@dataclass(frozen=True, slots=True)
class Fn(Math):
    """A function written without brackets where its argument is one letter or call: `log π(v)`."""

    name: str
    arg: Math


@dataclass(frozen=True, slots=True)
class Big(Math):
    """Σ, mean or softmax over an index: sign, what is under it, body."""

    sign: str  # "Σ" | "mean" | "max" | "softmax"
    under: Math
    body: Math


@dataclass(frozen=True, slots=True)
class Ind(Math):
    """1[condition], or [condition] where that reads better."""

    test: Math
    bare: bool = False


@dataclass(frozen=True, slots=True)
class Rel(Math):
    op: str
    left: Math
    right: Math


@dataclass(frozen=True, slots=True)
class Join(Math):
    """Conditions joined by `and`, `or`, or a comma."""

    op: str
    items: tuple[Math, ...]


@dataclass(frozen=True, slots=True)
class Wrap(Math):
    """|x| or (x)₊ or {x}."""

    kind: str  # "abs" | "positive" | "set" | "text"
    body: Math


@dataclass(frozen=True, slots=True)
class Text(Math):
    """Words inside a formula."""

    words: str


def extent(m: Math, most: int) -> int:
    """How many symbols and operations an expression shows; counting stops beyond `most`."""
    stack, count = [m], 0
    while stack and count <= most:
        node = stack.pop()
        count += 1
        for name in getattr(node, "__slots__", ()):
            value = getattr(node, name)
            for part in value if isinstance(value, tuple) else (value,):
                inner = part[1] if isinstance(part, tuple) else part
                if isinstance(inner, Math):
                    stack.append(inner)
    return count


ZERO, ONE = Num(0.0), Num(1.0)


# ---- building ------------------------------------------------------------------------------


def neg(x: Math) -> Math:
    if isinstance(x, Num):
        return Num(-x.value)
    if isinstance(x, Add):
        return Add(tuple((not s, m) for s, m in x.items))
    return Add(((False, x),))


def add(items: list[tuple[bool, Math]]) -> Math:
    """A signed sum, positive items first where the leading one would be negative."""
    flat: list[tuple[bool, Math]] = []
    for sign, item in items:
        if isinstance(item, Add):
            flat += [(s == sign, m) for s, m in item.items]
        elif isinstance(item, Num) and item.value < 0:
            flat.append((not sign, Num(-item.value)))
        elif not (isinstance(item, Num) and item.value == 0):
            flat.append((sign, item))
    if not flat:
        return ZERO
    if not flat[0][0] and any(s for s, _ in flat):
        flat = [x for x in flat if x[0]] + [x for x in flat if not x[0]]
    return flat[0][1] if len(flat) == 1 and flat[0][0] else Add(tuple(flat))


def mul(items: list[Math]) -> Math:
    flat: list[Math] = []
    for item in items:
        if isinstance(item, Num) and item.value == 1:
            continue
        flat += item.items if isinstance(item, Mul) else (item,)
    if not flat:
        return ONE
    return flat[0] if len(flat) == 1 else Mul(tuple(flat))


def frac(top: Math, bottom: Math) -> Math:
    return top if isinstance(bottom, Num) and bottom.value == 1 else Frac(top, bottom)


# ---- numbers -------------------------------------------------------------------------------

_HALVES = {0.5: ("½", 1, 2), 0.25: ("¼", 1, 4), 0.75: ("¾", 3, 4), 1 / 3: ("⅓", 1, 3),
           2 / 3: ("⅔", 2, 3), 1 / 6: ("⅙", 1, 6)}  # fmt: skip
SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def number(x: float, latex: bool = False) -> str:
    for value, (text, top, bottom) in _HALVES.items():
        if abs(abs(x) - value) < 1e-12:
            sign = ("-" if latex else "−") if x < 0 else ""
            return sign + (rf"\frac{{{top}}}{{{bottom}}}" if latex else text)
    if x == float("inf"):
        return r"\infty" if latex else "∞"
    if x == float("-inf"):
        return r"-\infty" if latex else "−∞"
    text = f"{x:.6g}"
    if "e" in text:
        digits, power = text.split("e")
        exponent = str(int(power))
        if latex:
            return rf"{digits}\times 10^{{{exponent}}}" if digits != "1" else rf"10^{{{exponent}}}"
        ten = "10" + exponent.translate(SUPERSCRIPT)
        return ten if digits == "1" else f"{digits}·{ten}"
    return text if latex else text.replace("-", "−")


# ---- unicode -------------------------------------------------------------------------------


def unicode(m: Math, at: int = ADD) -> str:
    """The expression for a terminal, bracketed if it binds less than `at`."""
    text, strength = _u(m)
    return text if strength >= at else f"({text})"


def _u(m: Math) -> tuple[str, int]:
    match m:
        case Sym():
            return m.u, ATOM
        case Num():
            return number(m.value), ATOM if m.value >= 0 else ADD
        case Text():
            return m.words, ATOM
        case Add():
            return _signed([(s, unicode(x, MUL)) for s, x in m.items], "−"), ADD
        case Mul():
            return _product(m.items), MUL
        case Frac():
            bottom = unicode(m.bottom, UNARY)
            return f"{unicode(m.top, MUL)}/{bottom}", MUL
        case Pow():
            power = unicode(m.exponent)
            if all(c in "0123456789−-" for c in power):
                power = power.replace("−", "-").translate(SUPERSCRIPT)
                return unicode(m.base, ATOM) + power, POW
            bare = isinstance(m.exponent, Sym | Num) and (len(power) == 1 or "." in power)
            power = power if bare else f"({power})"
            return f"{unicode(m.base, ATOM)}^{power}", POW
        case Root():
            return f"√{unicode(m.body, ATOM)}", ATOM
        case Call():
            sep = m.sep
            return m.head.u + "(" + sep.join(unicode(a) for a in m.args) + ")", ATOM
        case Fn():
            if isinstance(m.arg, Frac | Mul):
                ratio = isinstance(m.arg, Frac)
                return f"{m.name} {unicode(m.arg) if ratio else f'({unicode(m.arg)})'}", UNARY
            return f"{m.name} {unicode(m.arg, POW)}", UNARY
        case Big():
            under = unicode(m.under)
            sign = f"{m.sign}_{under}" if _simple(under) else f"{m.sign}_{{{under}}}"
            return f"{sign} {unicode(m.body, MUL)}", UNARY
        case Ind():
            return f"{'' if m.bare else '1'}[{unicode(m.test)}]", ATOM
        case Rel():
            return f"{unicode(m.left)} {m.op} {unicode(m.right)}", ADD
        case Join():
            sep = {"and": " ∧ ", "or": " ∨ ", ",": ", "}[m.op]
            inner = [unicode(x) for x in m.items]
            if m.op == "and":
                inner = [f"({t})" if isinstance(x, Join) else t for t, x in zip(inner, m.items)]
            return sep.join(inner), ADD
        case Wrap():
            left, right = {"abs": "||", "positive": ("(", ")₊"), "set": "{}"}[m.kind]
            return f"{left}{unicode(m.body)}{right}", ATOM
    raise TypeError(type(m))


def _simple(text: str) -> bool:
    return len(text) == 1 or not any(c in text for c in " ,:")


def _signed(items: list[tuple[bool, str]], minus: str) -> str:
    out = ""
    for i, (positive, text) in enumerate(items):
        if i == 0:
            out = text if positive else f"{minus}{text}"
        else:
            out += f" {'+' if positive else minus} {text}"
    return out


def _product(items: tuple[Math, ...]) -> str:
    out = ""
    for i, item in enumerate(items):
        last = i == len(items) - 1
        # a function swallows what follows it, so it is bracketed unless it comes last
        text = unicode(item, MUL if last and not isinstance(item, Frac) else UNARY)
        if isinstance(item, Fn | Big) and not last:
            text = f"({unicode(item)})"
        if i:
            out += " · " if _dotted(items[i - 1], item) else " "
        out += text
    return out


def _dotted(before: Math, after: Math) -> bool:
    if isinstance(before, Num):
        return isinstance(after, Num) or (isinstance(after, Sym) and after.param)
    long = isinstance(before, Sym) and before.param and len(before.u) > 1
    return long or isinstance(before, Frac) or isinstance(after, Frac | Num)


# ---- LaTeX ---------------------------------------------------------------------------------

_WORDS = {"‖": r"\Vert", "≤": r"\leq", "≥": r"\geq", "≠": r"\neq", "∈": r"\in", "∉": r"\notin",
          "∅": r"\emptyset", "<": "<", ">": ">", "=": "=", ":": ":", "∝": r"\propto",
          "∧": r"\wedge", "∨": r"\vee", "∼": r"\sim", "→": r"\to", "…": r"\ldots",
          "−": "-", "·": r"\cdot",
          **{u: rf"\frac{{{a}}}{{{b}}}" for u, a, b in _HALVES.values()}}  # fmt: skip


def latex(m: Math, at: int = ADD) -> str:
    """The expression in LaTeX, bracketed if it binds less than `at`."""
    text, strength = _l(m)
    return text if strength >= at else _bracketed(text)


def _bracketed(text: str) -> str:
    """In brackets, which grow only where there is something tall inside."""
    tall = any(
        x in text for x in (r"\frac", r"\sum", r"\sqrt", r"\left", r"\max_", r"\min_", "mean}_")
    )
    return rf"\left({text}\right)" if tall else f"({text})"


def words(text: str) -> str:
    r"""Upright text in LaTeX math: \mathrm with spaces and underscores kept."""
    safe = text.replace("\\", "").replace("_", r"\_").replace("%", r"\%").replace("#", r"\#")
    safe = safe.replace("&", r"\&").replace("$", r"\$").replace("{", r"\{").replace("}", r"\}")
    safe = safe.replace(" ", r"\ ")
    for u, l in _WORDS.items():
        if not u.isascii():
            safe = safe.replace(u, l + " ")
    safe = "".join(c if c.isascii() else "?" for c in safe)  # a letter TeX may not know
    return r"\mathrm{" + safe + "}"


def _l(m: Math) -> tuple[str, int]:
    match m:
        case Sym():
            return m.l, ATOM
        case Num():
            return number(m.value, True), ATOM if m.value >= 0 else ADD
        case Text():
            return words(m.words), ATOM
        case Add():
            return _signed([(s, latex(x, MUL)) for s, x in m.items], "-"), ADD
        case Mul():
            return _product_latex(m.items), MUL
        case Frac():
            return rf"\frac{{{latex(m.top)}}}{{{latex(m.bottom)}}}", MUL
        case Pow():
            base = latex(m.base, ATOM)
            base = f"{{{base}}}" if isinstance(m.base, Sym) and "^" in base else base
            return f"{base}^{{{latex(m.exponent)}}}", POW
        case Root():
            return rf"\sqrt{{{latex(m.body)}}}", ATOM
        case Call():
            sep = rf" \,{_WORDS['‖']}\, " if "‖" in m.sep else m.sep
            return m.head.l + _bracketed(sep.join(latex(a) for a in m.args)), ATOM
        case Fn():
            name = rf"\{m.name}" if m.name in ("log", "exp", "tanh") else rf"\mathrm{{{m.name}}}"
            body = latex(m.arg, POW)
            if isinstance(m.arg, Frac):
                body = latex(m.arg)
            return f"{name} {body}", UNARY
        case Big():
            sign = {"Σ": r"\sum", "max": r"\max", "min": r"\min"}.get(
                m.sign, rf"\operatorname{{{m.sign}}}"
            )
            return rf"{sign}_{{{latex(m.under)}}} {latex(m.body, MUL)}", UNARY
        case Ind():
            return ("" if m.bare else r"{\mathbf{1}}") + rf"\left[{latex(m.test)}\right]", ATOM
        case Rel():
            op = _WORDS.get(m.op, m.op)
            return f"{latex(m.left)} {op} {latex(m.right)}", ADD
        case Join():
            sep = {"and": r" \wedge ", "or": r" \vee ", ",": r",\ "}[m.op]
            return sep.join(latex(x) for x in m.items), ADD
        case Wrap():
            left, right = {"abs": (r"\left|", r"\right|"), "set": (r"\{", r"\}"),
                           "positive": (r"\left(", r"\right)_+")}[m.kind]  # fmt: skip
            return f"{left}{latex(m.body)}{right}", ATOM
    raise TypeError(type(m))


def _product_latex(items: tuple[Math, ...]) -> str:
    out = ""
    for i, item in enumerate(items):
        last = i == len(items) - 1
        text = latex(item, MUL if last or isinstance(item, Frac) else UNARY)
        if isinstance(item, Fn | Big) and not last:
            text = _bracketed(latex(item))
        if i:
            out += r" \cdot " if _dotted(items[i - 1], item) else r"\, "
        out += text
    return out


# ---- long formulas ---------------------------------------------------------------------------


def broken(m: Math, width: int, first: str = "", later: str = "") -> list[str]:
    """The expression in lines of at most `width` characters where its sum allows.

    `first` and `later` are what the first and the following lines begin with.
    """
    whole = first + unicode(m)
    if len(whole) <= width or not isinstance(m, Add):
        return [whole]
    out: list[str] = []
    line = first
    for i, (positive, item) in enumerate(m.items):
        text = unicode(item, MUL)
        if i == 0:
            piece = text if positive else f"−{text}"
        else:
            piece = f"{'+' if positive else '−'} {text}"
        glue = "" if not line.strip() or line in (first, later) else " "
        if i and len(line + glue + piece) > width:
            out.append(line)
            line = later + piece
        else:
            line += glue + piece
    return [*out, line]


def folded(text: str, width: int, later: str) -> list[str]:
    """A long line of mathematics, broken at blanks outside brackets where there are any."""
    if len(text) <= width:
        return [text]
    depth, cut, inner = 0, 0, 0
    start = len(text) - len(text.lstrip())
    for i, c in enumerate(text[:width]):
        depth += (c in "([{") - (c in ")]}")
        if c == " " and i > max(start, len(later)) and not _opens(text[:i]):
            inner = i
            if depth <= 0:
                cut = i
    cut = cut if cut > width // 2 else inner
    if not cut:
        return [text]
    return [text[:cut].rstrip(), *folded(later + text[cut:].lstrip(), width, later)]


def _opens(text: str) -> bool:
    """Whether what follows belongs to the last word: log x, Σ_v x."""
    word = text.rsplit(" ", 1)[-1].lstrip("([{−")
    return word in ("log", "−", "+") or word.startswith(("Σ", "mean_", "max_", "min_"))
