"""The parts of an explanation that are mathematics: L(θ), what its letters mean, its gradient."""

from __future__ import annotations

from dataclasses import dataclass

from opdsl.formula.algebra import Atom, Dist, in_order, leaf, single, times
from opdsl.formula.gradient import Field, fields
from opdsl.formula.naming import Definition, Names, named
from opdsl.formula.notation import (
    Add,
    Big,
    Call,
    Fn,
    Frac,
    Ind,
    Math,
    Num,
    Pow,
    Rel,
    Root,
    Sym,
    Text,
    Wrap,
    add,
    latex,
    mul,
    number,
    unicode,
    words,
)
from opdsl.formula.printer import TOO_LONG
from opdsl.formula.push import Push, push
from opdsl.formula.recognise import Divergence
from opdsl.ir.derive import strip
from opdsl.ir.program import Part, Program, Row
from opdsl.meaning.graph import nodes_below
from opdsl.meaning.node import Node
from opdsl.meaning.spec import Spec

LONG = 56  # characters; a longer bracket inside a gated term gets a letter
SHORT = 28  # characters; a longer gate or weight gets one


@dataclass(frozen=True, slots=True)
class Block:
    """One reduction over rows: prefix (`1/N Σ_t`), what N is, and the signed summands."""

    u: str
    l: str
    note: str
    note_l: str  # the note in LaTeX
    items: tuple[tuple[bool, Math], ...]


@dataclass(frozen=True, slots=True)
class Formula:
    blocks: tuple[Block, ...]
    where: tuple[Definition, ...]
    gradient: tuple[Field, ...]  # the coefficients c
    push: tuple[Push, ...]  # Δz of every term
    names: Names
    letters: tuple[tuple[Sym, str], ...]  # letters that no definition explains

    @property
    def glossary(self) -> tuple[str, ...]:
        return tuple(f"{s.u} {text}" for s, text in self.letters)


def formula(spec: Spec, program: Program) -> Formula:
    """L(θ) of a method, its definitions and its coefficient fields."""
    names = named(spec)
    late: list[Definition] = []
    blocks = [b for part in program.parts for b in _blocks(names, part, late)]
    pushes = tuple(push(names, t) for t in spec.terms)
    found = tuple(f for t in spec.terms for f in fields(names, t))
    where = [*_sets(names), *names.definitions, *late]
    where += _rest(names, where)
    sets = [d for d in _sets(names) if d not in where]
    letters = _letters(spec)
    if names.printer.cut:
        letters = (*letters, (TOO_LONG, "a part too long to print"))
    return Formula(tuple(blocks), (*sets, *where), found, pushes, names, letters)


# ---- the loss --------------------------------------------------------------------------------


def _blocks(names: Names, part: Part, late: list[Definition]) -> list[Block]:
    groups: dict[int, list[Row]] = {}
    for row in part.terms:
        groups.setdefault(row.scale.id, []).append(row)
    golden = part.rows == "golden"
    out = []
    for i, rows in enumerate(groups.values()):
        mark = "*" if golden else ("′" * i)
        items: list[tuple[bool, Math]] = []
        old, names.printer.star = names.printer.star, golden
        for row in rows:
            items += _items(names, row, late)
        names.printer.star = old
        u, l, notes = _prefix(names, rows, mark, golden)
        out.append(Block(u, l, *notes, tuple(items)))
    return out


def _prefix(
    names: Names, rows: list[Row], mark: str, golden: bool
) -> tuple[str, str, tuple[str, str]]:
    """The reduction and what its denominator is, both in unicode and LaTeX."""
    text = "of the given text" if golden else "of the batch"
    star = "^*" if golden else "'" * len(mark)

    def note(letter: str, means: str, front: tuple[str, str] = ("", "")) -> tuple[str, str]:
        return (
            f"{letter}{mark} = {front[0]}{means} {text}",
            rf"{letter}{star} = {front[1]}\text{{{means} {text}}}",
        )

    tokens = f"1/N{mark} Σ_t", rf"\frac{{1}}{{N{star}}} \sum_t"
    match names.spec.aggregate:
        case "sum":
            return "Σ_t", r"\sum_t", ("", "")
        case "tokens":
            return *tokens, note("N", "response tokens")
        case "kept_tokens":
            gate = rows[0].term.gate
            gate = names.factors.get(gate.id) or names.printer.expr(gate)
            if unicode(gate) == "1":
                return *tokens, note("N", "response tokens, the kept tokens")
            kept = f"Σ_t {unicode(gate)}, ", rf"\sum_t {latex(gate)},\ "
            return *tokens, note("N", "the kept tokens", kept)
        case "response_length":
            return (
                f"Σ_i 1/|y{mark}| Σ_t",
                rf"\sum_i \frac{{1}}{{|y{star}|}} \sum_t",
                ("", ""),
            )
    return (
        f"1/B{mark} Σ_i 1/|y{mark}| Σ_t",
        rf"\frac{{1}}{{B{star}}} \sum_i \frac{{1}}{{|y{star}|}} \sum_t",
        note("B", "sequences"),
    )


def _items(names: Names, row: Row, late: list[Definition]) -> list[tuple[bool, Math]]:
    """Signed summands of one term: weight · gate · loss."""
    printer, term = names.printer, row.term
    loss = printer.expr(term.loss)
    factors = [
        _factor(names, x, *letter, late)
        for x, letter in ((term.weight, ("w", "w")), (term.gate, ("g", "g")))
        if not x.is_const(1)
    ]
    if not factors:
        return list(loss.items) if isinstance(loss, Add) else [(True, loss)]
    if isinstance(loss, Add) and len(loss.items) == 1:
        sign, inner = loss.items[0]
        return [(sign, mul([*factors, inner]))]
    if isinstance(loss, Add) and len(unicode(loss)) > LONG:
        short = term.name.split(".")[-1]
        letter = Sym(f"L_{short}", f"L_{{{words(short)}}}")
        late.append(Definition(letter, "=", loss))
        loss = letter
    return [(True, mul([*factors, loss]))]


def _factor(names: Names, x: Node, u: str, l: str, late: list[Definition]) -> Math:
    """A gate or weight; a long one gets a letter."""
    written = names.printer.expr(x if x.q.live else strip(names.spec.builder, x))
    if len(unicode(written)) <= SHORT:
        return written
    s = names.letter(u, l).at("t")
    late.append(Definition(s, "=", written))
    names.factors[x.id] = s
    return s


def one_line(f: Formula) -> str:
    """`L(θ) = 1/N Σ_t {…}` in one line of unicode."""
    out = ""
    for b in f.blocks:
        body = unicode(Add(b.items))
        if len(b.items) > 1 or not b.items[0][0]:
            body = "{ " + body + " }"
        out += (" + " if out else "") + f"{b.u} {body}"
    return f"L(θ) = {out}"


def display(f: Formula) -> str:
    """The same in LaTeX."""
    out = ""
    for b in f.blocks:
        body = latex(Add(b.items))
        if len(b.items) > 1 or not b.items[0][0]:
            body = rf"\left\{{ {body} \right\}}"
        out += (" + " if out else "") + f"{b.l} {body}"
    return rf"L(\theta) = {out}"


def _letters(spec: Spec) -> tuple[tuple[Sym, str], ...]:
    """Letters that stand for what is handed in."""
    nodes = nodes_below([x for t in spec.terms for x in (t.loss, t.gate, t.weight)])
    inputs = {n.attr("name") for n in nodes if n.op == "input"}
    ops = {n.op for n in nodes}
    out: list[tuple[Sym, str]] = []
    if "rollout_logp" in inputs:
        out.append((Sym("μ", r"\mu"), "the policy that sampled"))
    if "others_sum" in ops:
        out.append((Sym("j", "j"), "the other rollouts of the prompt"))
    elif ops & {"group_sum", "group_max"}:
        out.append((Sym("j", "j"), "the rollouts of the prompt"))
    if any(n.op == "logp" and n.attr("dist") == "initial" for n in nodes):
        out.append((Sym("π_0", r"\pi_0"), "the student at step 0"))
    if "outcome" in inputs:
        out.append((Sym("R", "R"), "the verifier's reward"))
    if "values" in inputs:
        names = [c.name.split(".")[-1] for c in spec.critics]
        l = ", ".join(n if len(n) == 1 else words(n) for n in names)
        out.append((Sym(", ".join(names), l), "the critic"))
    return tuple(out)


# ---- definitions -------------------------------------------------------------------------------


def _sets(names: Names) -> list[Definition]:
    """Ω and how mass outside it counts, for every set that was printed."""
    out = []
    done: set[tuple] = set()
    while todo := [k for k in names.symbols.used if k[0] == "set" and k not in done]:
        key = todo[0]  # describing a set may name another
        done.add(key)
        base = names.symbols.used[key]
        assert isinstance(base, Node)
        s = names.symbols.set(base)
        assert s is not None
        notes: list[tuple[str, str]] = []
        if ("bin", base.id) in names.symbols.used:
            text = "and one entry for the rest"
            notes.append((f"{s.u}⁺: {text}", rf"{s.l}^+\colon\ \text{{{text}}}"))
        tails = {t.support.tail for t in names.spec.terms if t.support.base is base}
        if "renormalize" in tails:
            notes.append((f"π̂(v) = π(v)/π({s.u})", rf"\hat{{\pi}}(v) = \pi(v) / \pi({s.l})"))
        if "drop" in tails or "detach" in tails:
            notes.append(("the rest dropped", r"\text{the rest dropped}"))
        if "sampled" in tails:
            text = "the rest by its sampled token"
            notes.append((text, rf"\text{{{text}}}"))
        note, note_l = ("; ".join(x) for x in zip(*notes)) if notes else ("", "")
        out.append(Definition(s, "=", names.symbols.described(base), note, note_l))
    return out


def _rest(names: Names, before: list[Definition]) -> list[Definition]:
    """ℓ, mixtures, divergences, frozen and tempered policies, schedules, as far as printed."""
    out: list[Definition] = []
    done: set[tuple] = set()
    for _ in range(3):  # a definition may print a letter that needs one itself
        for a, b in list(names.printer.ratios):
            if ("ratio", a, b) not in done:
                done.add(("ratio", a, b))
                out.append(_ratio(names, a, b))
        for key in list(names.symbols.used):
            if key in done or key[0] in ("set", "bin"):
                continue
            done.add(key)
            out += _letter(names, key)
        kinds: dict[tuple[str, bool], list[Divergence]] = {}
        for d in names.printer.divergences.values():
            kinds.setdefault((d.kind, d.detached), []).append(d)
        for kind, found in kinds.items():
            if ("div", kind) not in done:
                done.add(("div", kind))
                out.append(_divergence(names, found))
    out = list({unicode(d.left): d for d in out}.values())
    return sorted(
        out, key=lambda d: isinstance(d.left, Call) and d.op == "=" and "p" in unicode(d.left)
    )


def letters_used(names: Names) -> list[Definition]:
    """Definitions of mixtures and the like that a formula printed."""
    return [d for key in list(names.symbols.used) for d in _letter(names, key) if key[0] != "set"]


def _ratio(names: Names, a: Dist, b: Dist) -> Definition:
    printer = names.printer
    left = printer.difference(Atom("diff", (a, b), "v"), True)
    v = (Sym("v", "v"),)
    gap = [(s, Fn("log", Call(names.symbols.dist(d), v))) for s, d in ((True, a), (False, b))]
    if not printer.ratios[a, b]:
        return Definition(left, "=", add(gap))
    at_y = printer.difference(Atom("diff", (a, b), "y"), True)
    u, l = unicode(at_y), latex(at_y)
    return Definition(
        left, "=", add(gap), f"{u} is {u}(y_t)", rf"{l}\ \text{{is}}\ {l}\left(y_t\right)"
    )


def _letter(names: Names, key: tuple) -> list[Definition]:
    symbols = names.symbols
    v = (Sym("v", "v"),)
    match key[0]:
        case "mix":
            parts = []
            for w, d in key[1][1]:
                parts.append(
                    (True, mul([names.printer.poly(in_order(w)), Call(symbols.dist(d), v)]))
                )
            return [Definition(Call(symbols.dist(key[1]), v), "=", add(parts))]
        case "frozen":
            s = symbols.dist(leaf(key[1], 1.0, True))
            return [Definition(s, "=", symbols.dist(leaf(key[1])), "held constant")]
        case "tempered":
            t = Num(key[2])
            s, base = symbols.dist(leaf(key[1], key[2])), symbols.dist(leaf(key[1]))
            return [Definition(s, "∝", Pow(base, Frac(Num(1), t)), f"temperature {number(key[2])}")]
        case "score_tail":
            n = symbols.used[key]
            assert isinstance(n, Node)
            normal = names.printer.normal
            drawn = single(Atom("P", leaf("student"), "y"), -1.0)
            value = names.printer.poly(times(normal.poly(n.args[0]), drawn))
            ((inside, _),) = next(iter(normal.poly(n.args[1])))
            outside = names.printer.literal(inside, False)
            note = "estimates the sum over the rest; its gradient is a score term"
            left = names.printer.node(n)
            return [Definition(left, "=", mul([Ind(outside), value]), note)]
        case "schedule":
            n = symbols.used[key]
            assert isinstance(n, Node)
            over = "the run" if n.attr("over") is None else f"{n.attr('over'):g} steps"
            text = f"{number(n.attr('start'))} → {number(n.attr('stop'))}, {n.attr('kind')} over {over}"  # type: ignore[arg-type]
            return [Definition(symbols.schedule(key[1]), "=", Text(text))]
    return []


def _divergence(names: Names, found: list[Divergence]) -> Definition:
    """What a divergence means, for arbitrary p and q."""
    d = found[0]
    hat = d.p[0] == "renorm"
    p: Dist = leaf("'p")
    q: Dist | None = leaf("'q") if d.q is not None else None
    sets = list({x.set: names.printer.normal.sets[x.set] for x in found}.values())
    several = len(sets) > 1
    sid = next((s.id for s in sets if s.op == "full"), d.set) if several else d.set
    if hat and not several:
        p, q = ("renorm", p, d.set), ("renorm", q, d.set) if q is not None else None
    generic = Divergence(d.kind, sid, p, q, d.weight, d.detached)
    left = names.printer.divergence(generic)
    names.printer.divergences = {
        k: x for k, x in names.printer.divergences.items() if x is not generic
    }
    s = names.symbols.set(names.printer.normal.sets[sid])
    v = Sym("v", "v")
    under: Math = v if s is None else Rel("∈", v, s)
    note = (
        "over the set in the subscript" if several else "over the vocabulary" if s is None else ""
    )
    if d.detached:
        note = "; ".join(x for x in (note, "logarithms held constant") if x)
    return Definition(left, "=", _meaning(names, generic, under), note)


def _meaning(names: Names, d: Divergence, under: Math) -> Math:
    v = (Sym("v", "v"),)
    p = Call(names.symbols.dist(d.p), v)
    q = Call(names.symbols.dist(d.q), v) if d.q is not None else p
    gap = Add(((True, p), (False, q)))
    half = Num(0.5)
    match d.kind:
        case "KL":
            return Big("Σ", under, mul([p, Fn("log", Frac(p, q))]))
        case "H":
            return Add(((False, Big("Σ", under, mul([p, Fn("log", p)]))),))
        case "cross":
            return Add(((False, Big("Σ", under, mul([p, Fn("log", q)]))),))
        case "TV":
            return mul([half, Big("Σ", under, Wrap("abs", gap))])
        case "chi2":
            return Big("Σ", under, Frac(Pow(gap, Num(2)), q))
        case "hellinger":
            return mul(
                [half, Big("Σ", under, Pow(Add(((True, Root(p)), (False, Root(q)))), Num(2)))]
            )
        case "L2":
            return Big("Σ", under, Pow(gap, Num(2)))
    assert d.kind == "JSD" and d.weight is not None
    beta = names.printer.poly(in_order(d.weight))
    other = add([(True, Num(1)), (False, beta)])
    if isinstance(beta, Num):
        other = Num(1 - beta.value)
    m = Sym("m", "m")
    pq = names.symbols.dist(d.p), names.symbols.dist(d.q)  # type: ignore[arg-type]
    kls = [Call(Sym("KL", r"\mathrm{KL}"), (x, m), " ‖ ") for x in pq]
    mix = add([(True, mul([beta, pq[0]])), (True, mul([other, pq[1]]))])
    whole = add([(True, mul([beta, kls[0]])), (True, mul([other, kls[1]]))])
    if any(key[0] == "mix" for key in names.symbols.used):
        return whole
    return Sym(f"{unicode(whole)},  m = {unicode(mix)}", rf"{latex(whole)},\ m = {latex(mix)}")


__all__ = ["Block", "Formula", "display", "formula", "letters_used", "one_line"]
