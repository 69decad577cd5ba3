"""Random texts of the language, well-formed to the parser and arbitrary in meaning.

`expression` draws from names, functions and options that exist, so most of what it writes gets
past the names and into the types; `derive` expands the rules of `grammars/opd.lark` themselves.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from opdsl import resources
from opdsl.syntax import grammar, keywords

NAMES = (
    "student", "rollout", "initial", "reference", "T", "y", "v", "t", "A", "outcome", "prompt",
    "position", "length", "step", "support", "full", "group", "others", "sequence", "batch",
    "same_position", "sampled", "i", "data", "golden", "verifier", "k", "lam", "tau", "V", "tokens",
    "sequences", "kept_tokens", "run", "proportional", "suppress", "immediate", "return_to_go",
    "none", "bin", "drop", "logits", "β", "x",
)  # fmt: skip
OWN = ("a", "b", "mine", "k", "lam", "tau", "x", "β")  # what a statement may declare
FUNCTIONS = (
    "log", "exp", "abs", "min", "max", "clip", "sg", "live", "normalize", "softmax", "sigmoid",
    "tanh", "special", "mean", "sum", "std", "quantile", "sft", "tempered", "top", "top_p", "union",
    "intersection", "critic", "routed", "linear", "cosine", "constant", "KL", "JSD", "skew_KL",
    "alpha_beta", "TV", "hellinger", "chi2", "power", "logratio", "k1", "k2", "k3", "H", "entropy",
    "mass", "overlap", "perplexity", "hesitant", "confident", "passed", "failed", "all_failed",
    "early", "ratio", "truncated_ratio", "ppo_clip", "immediate", "discounted", "return_to_go",
    "window", "gae", "future_only", "baseline_value", "baseline_leave_one_out", "whiten",
    "shape_clip", "rollouts", "sequences", "mix", "external", "ema", "self", "counterfactual",
    "local", "old", "interleaved", "f", "g",
)  # fmt: skip
OPTIONS = (
    "of", "tail", "beta", "alpha", "k", "on", "gamma", "lam", "V", "n", "baseline", "over", "tau",
    "temperature", "group", "top_p", "access", "when", "among", "toward", "strength", "otherwise",
    "eps", "cap", "init", "lr", "warmup", "data", "max_tokens", "context", "a", "b",
)  # fmt: skip
NUMBERS = (
    "0", "1", "2", "0.5", "1e-4", "0.0", "3 nats", "5%", "20 steps", "1e308", "1e-320", "1e18",
    "99999999999999999999", "0 steps", "2 tokens", "1 epochs", "3 bits", "16",
)  # fmt: skip
WRONG = (  # literals that are no numbers, or no sensible ones
    "1e999", "-0", "1e-999", "9" * 60, "1e39", "nan", "inf", "0x10", "1_000", ".5", "5.", "1.2.3",
    "-1", "-0.0", "1e+", "٣", "½", "1e308 nats", "999999999999 steps", "0 %", "1%%", '""', "{}",
    "[]", "()", "true", "None",
)  # fmt: skip
OPERATORS = (
    "+", "-", "*", "/", "^", "<", "<=", ">", ">=", "==", "!=", "≤", "≥", "≠", "and", "or",
    "||", "‖", "->", "=", ":", ",", ".",
)  # fmt: skip
TYPES = (
    "nats", "prob", "logprob", "reward", "gate", "weight", "real", "int", "bool", "dist", "set",
    "nats per token", "nats per token vocab", "gate per group", "real per sequence", "weight per token",
    "text", "routing",
)  # fmt: skip
DOMAINS = (
    "in [0, 1]", "in (0, 1)", "in [5, 1]", "in (0, 0)", "in {}", "in {1}", "in {1, 1, 2}",
    "in [-1, 1]", "in [0, 1e308]", "in (1e308, 1e309)", "in [x, x]", 'in {"a", 1}', "in [k, 1]",
    "in {student}", "in [1 nats, 2 bits]", "in (-0, 0]", "in [0 / 0, 1]",
)  # fmt: skip


def expression(r: random.Random, depth: int = 3) -> str:
    """One expression; operands get simpler as `depth` runs out."""
    if depth <= 0:
        return r.choice((r.choice(NAMES), r.choice(NAMES), r.choice(NUMBERS)))
    inner = lambda: expression(r, depth - 1 - r.randrange(2))  # noqa: E731
    kind = r.randrange(16)
    if kind < 3:
        return f"{inner()} {r.choice(OPERATORS[:16])} {inner()}"
    if kind < 7:
        return (
            f"{r.choice(FUNCTIONS)}({', '.join(argument(r, depth) for _ in range(r.randrange(4)))})"
        )
    if kind == 7:
        return f"{r.choice(('KL', 'JSD', 'TV', 'chi2', 'f', 'logratio'))}({inner()} || {inner()})"
    if kind == 8:
        return f"{inner()}[{inner()}]"
    if kind == 9:
        return f"({inner()})"
    if kind == 10:
        return f"{r.choice(('-', 'not '))}{inner()}"
    if kind == 11:
        return f"if {inner()} then {inner()} else {inner()}"
    if kind == 12:
        name = r.choice(("v", "i", "t", "w"))
        head = r.choice(("sum", "mean", "min", "max", "softmax", "std", "quantile", "f"))
        return f"{head}({name} in {inner()}: {inner()})"
    if kind == 13:
        return f"{{{r.choice(('v', 'w'))} in {inner()}: {inner()}}}"
    if kind == 14:
        schedule = r.choice(("linear", "cosine", "constant"))
        return f"{schedule}({inner()} -> {inner()} over {r.choice(('run', '20 steps', inner()))})"
    return r.choice(
        (f"prompt.{r.choice(OPTIONS)}", f"{{{inner()}, {inner()}}}", '"text"', r.choice(WRONG))
    )


def argument(r: random.Random, depth: int) -> str:
    value = expression(r, depth - 1 - r.randrange(2))
    kind = r.randrange(6)
    if kind < 2:
        return f"{r.choice(OPTIONS)} = {value}"
    return f"{value}: {expression(r, depth - 2)}" if kind == 2 else value


def statement(r: random.Random) -> str:
    """One statement of a method with arbitrary values."""
    e, name = expression(r, r.randrange(4)), r.choice(OWN if r.random() < 0.9 else NAMES)
    return r.choice((
        f"state {e}", f"state rollouts(student, temperature = {e})", f"state mix({e}: rollouts(student), "
        f"{expression(r, 1)}: sequences(data))", f"teacher {name} = {e}",
        f"teacher {name} = external(access = {r.choice(('logits', 'sampled', 'top(4)', e))})",
        f"teacher {name} = external(access = logits) when {e}", f"support {e}",
        f"support top({e}, of = T, tail = {r.choice(('bin', 'drop', 'renormalize', e))})",
        f"feedback loss {e}", f"feedback reward {e}", f"feedback scores {e}", f"credit {e}",
        f"credit return_to_go(baseline = {e})", f"routing {e}",
        f"routing counterfactual(when = {e}, toward = {expression(r, 2)}, otherwise = drop)",
        f"gate {e}", f"gate {name}: {e}", f"weight {e}", f"weight {name}: {e}", f"shape {e}",
        f"aggregate {e}", f"aggregate mean(over = {e})", f"regularize {e}", f"let {name} = {e}",
        f"let {name} : {r.choice(TYPES)} = {e}",
        f"param {name} : {r.choice(TYPES)} {r.choice(DOMAINS)} = {e}", f"param {name} = {e}",
        f"term {name} {{ feedback loss {e} }}", f"term {name} = {r.choice(FUNCTIONS)}({e})",
        f"optimize {{ lr = {e}  steps = {expression(r, 1)} }}", f"override credit {e}",
        f'assert {e} "why"', f'accept {name} "why"', f'allow R0{r.randrange(10)} "why"',
        f'cite arxiv "{r.randrange(10000)}"', f"evidence {r.choice(('reported', name))}",
    ))  # fmt: skip


def definition(r: random.Random, name: str) -> str:
    """A definition, sometimes of itself, sometimes with a recurrence."""
    params = ", ".join(f"{p} : {r.choice(TYPES)}" for p in ("p", "r")[: r.randrange(3)])
    e = expression(r, 2)
    kind = r.randrange(4)
    if kind == 0:
        return f"def {name}({params}) : {r.choice(TYPES)} = {e}"
    if kind == 1:
        return f"def {name}({params}) = {name}({e}) + {r.choice(('f', 'g'))}({e})"
    step = r.choice(("t + 1", "t - 1", "t", "t + 2", "v"))
    return (
        f"def {name}({params}) : nats per token {{\n  G[t] = {e} + 0.5 * G[{step}]\n  return G\n}}"
    )


def method(r: random.Random) -> str:
    """A whole file: a frame that works, some of its statements replaced and others added."""
    lines = [definition(r, name) for name in ("f", "g") if r.random() < 0.3]
    reward = r.random() < 0.4
    frame = ["state rollouts(student, group = 2)", "teacher T = external(access = logits)",
             r.choice(("support full", "support sampled", "support top(4, of = T, tail = bin)")),
             "feedback reward logratio(T, rollout)" if reward else "feedback loss KL(T || student)",
             *(["credit return_to_go"] if reward else []), "aggregate mean(over = tokens)"]  # fmt: skip
    body = {line.split()[0]: line for line in frame if r.random() < 0.98}
    for _ in range(r.choice((1, 1, 1, 2, 2, 3, 6))):
        new = statement(r)
        once = new.split()[0] in ("state", "support", "feedback", "credit", "aggregate", "shape")
        body[new.split()[0] if once else new] = new
    return "\n".join(["opd 1", *lines, "method m {", *("  " + v for v in body.values()), "}", ""])


# ---- the grammar itself ------------------------------------------------------------------


@cache
def rules() -> dict[str, list[tuple[str, ...]]]:
    """Symbol to its expansions, of the compiled grammar."""
    found: dict[str, list[tuple[str, ...]]] = {}
    parser: Any = grammar.lark_parser(resources.grammar_text())
    for rule in parser.rules:
        found.setdefault(str(rule.origin.name), []).append(tuple(s.name for s in rule.expansion))
    return found


SPELLED = {
    "OPD": "opd", "HOLE": "", "STRING": '"s"', "INT": "1", "NUMBER": "0.5", "QUANTITY": "5 nats",
    "BARS": "||", "PLUS": "+", "MINUS": "-", "STAR": "*", "SLASH": "/", "CARET": "^", "ARROW": "->",
    "EQUAL": "=", "COLON": ":", "COMMA": ",", "DOT": ".", "LPAR": "(", "RPAR": ")", "LSQB": "[",
    "RSQB": "]", "LBRACE": "{", "RBRACE": "}",
}  # fmt: skip


def derive(r: random.Random, most: int = 400) -> str:
    """A text derived from the start symbol; beyond `most` symbols the shortest rules finish it."""
    words: dict[str, list[str]] = {}
    for word, terminal in keywords.TERMINALS.items():
        words.setdefault(terminal, []).append(word)
    todo, out, spent = ["start"], ["opd 1"], 0
    while todo and spent < 20 * most:
        symbol = todo.pop()
        spent += 1
        options = rules().get(symbol)
        if options is not None:
            short = min(options, key=len)
            pick = r.choice(options) if spent < most else short
            todo.extend(reversed(pick))
        elif symbol == "NAME":
            out.append(r.choice((*NAMES, *FUNCTIONS, *keywords.UNITS)))
        elif symbol == "CMP":
            out.append(r.choice(OPERATORS[5:14]))
        elif symbol in SPELLED:
            out.append(SPELLED[symbol])
        else:
            out.append(r.choice(words.get(symbol, [symbol.lower()])))
        if out[-1] == "}" or r.random() < 0.1:
            out.append("\n")
    return " ".join(out)
