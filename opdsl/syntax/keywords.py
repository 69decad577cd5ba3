"""The words of the language: keywords, units, axes, Greek letters, and close spellings.

This is the list that the highlighters are generated from and that did-you-mean draws on. The
grammar holds the same words once more as terminals; a test keeps the two equal.
"""

from __future__ import annotations

from functools import cache

VERSION = 1

TOP_KEYWORDS = ("opd", "import", "method", "def", "run")
# Sections in the order of a paper's method section; this order is also the documentation's.
SECTIONS = (
    "state", "teacher", "support", "feedback", "credit", "routing", "gate", "weight", "shape",
    "aggregate", "regularize", "optimize",
)  # fmt: skip
DECLARATIONS = ("cite", "evidence", "accept", "allow", "param", "let", "term", "override", "assert")
METHOD_KEYWORDS = SECTIONS + DECLARATIONS
# What a term may hold; the composing method owns state, teachers, aggregate and optimize.
TERM_KEYWORDS = (
    "support", "feedback", "credit", "routing", "gate", "weight", "shape", "regularize", "let",
    "assert",
)  # fmt: skip
ROUTES = ("loss", "reward", "scores")
GRADES = ("hypothesis", "reported", "replicated")
# Words that carry on an expression or a declaration, so never begin a statement.
JOINERS = (
    "and", "or", "not", "if", "then", "else", "over", "in", "per", "when", "extends", "of",
)  # fmt: skip
OPERATOR_WORDS = ("and", "or", "not", "if", "then", "else")
UNITS = (
    "nats", "prob", "logprob", "reward", "gate", "weight", "real", "int", "bool", "dist", "bits",
)  # fmt: skip
# Types that only definitions need: values that are not numbers.
KINDS = ("set", "routing", "text")
AXES = ("group", "sequence", "token", "vocab")
QUANTITY_UNITS = ("nats", "bits", "steps", "tokens", "epochs", "%")
ALL_KEYWORDS = tuple(
    dict.fromkeys(TOP_KEYWORDS + METHOD_KEYWORDS + ROUTES + JOINERS + ("sweep", "return"))
)

# The grammar's terminal of each keyword.
TERMINALS = {word: word.upper() for word in ALL_KEYWORDS} | {
    "accept": "ACCEPT", "allow": "ACCEPT", "state": "METHOD_SECTION",
    "aggregate": "METHOD_SECTION", "support": "SECTION", "credit": "SECTION",
    "routing": "SECTION", "shape": "SECTION", "regularize": "SECTION", "gate": "TARGETED",
    "weight": "TARGETED", "loss": "ROUTE", "reward": "ROUTE", "scores": "ROUTE",
}  # fmt: skip

BUILT_IN_NAMES = (
    "student", "rollout", "initial", "reference", "data", "golden", "y", "v", "t", "T", "A",
    "outcome", "verifier", "prompt", "position", "length", "step",
)  # fmt: skip
BUILT_IN_FUNCTIONS = (
    "log", "exp", "abs", "min", "max", "clip", "sg", "live", "normalize", "softmax", "sigmoid",
    "special", "mean", "sum", "std", "quantile", "perplexity",
)  # fmt: skip

# Greek letters and their names. `λ`, `lambda` and `lam` are one name, `lam`, the short one that
# Python code can also use. Capital letters that look like Latin ones keep their own names.
GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ϵ": "epsilon",
    "ζ": "zeta", "η": "eta", "θ": "theta", "ϑ": "theta", "ι": "iota", "κ": "kappa", "ϰ": "kappa",
    "λ": "lam", "μ": "mu", "µ": "mu", "ν": "nu", "ξ": "xi", "ο": "omicron", "π": "pi", "ϖ": "pi",
    "ρ": "rho", "ϱ": "rho", "σ": "sigma", "ς": "sigma", "τ": "tau", "υ": "upsilon", "φ": "phi",
    "ϕ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega",
    "Α": "Alpha", "Β": "Beta", "Γ": "Gamma", "Δ": "Delta", "Ε": "Epsilon", "Ζ": "Zeta",
    "Η": "Eta", "Θ": "Theta", "Ι": "Iota", "Κ": "Kappa", "Λ": "Lambda", "Μ": "Mu", "Ν": "Nu",
    "Ξ": "Xi", "Ο": "Omicron", "Π": "Pi", "Ρ": "Rho", "Σ": "Sigma", "Τ": "Tau", "Υ": "Upsilon",
    "Φ": "Phi", "Χ": "Chi", "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip


@cache
def canonical(name: str) -> str:
    """The one spelling of a name: `λ` and `lambda` are `lam`, `π_T` is `pi_T`.

    Works part by part between underscores, so `lambda_0` and `λ_0` are one name too.
    """
    if name.isascii() and "lambda" not in name:
        return name
    spelled = "".join(GREEK.get(ch, ch) for ch in name)
    return "_".join("lam" if part == "lambda" else part for part in spelled.split("_"))


def distance(a: str, b: str) -> int:
    """Edits (insert, delete, replace, swap of neighbours) that turn one word into another."""
    rows = [list(range(len(b) + 1))]
    for i, ca in enumerate(a, 1):
        row = [i]
        for j, cb in enumerate(b, 1):
            cost = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (ca != cb))
            if i > 1 and j > 1 and ca == b[j - 2] and a[i - 2] == cb:
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]


def close(word: str, candidates: tuple[str, ...] | list[str] | set[str]) -> list[str]:
    """Candidates that `word` may be a slip of, nearest first, at most three.

    One edit is allowed per three letters (at least one, from three letters on), upper and lower
    case alike; a longer word is looked for only as its own beginning (`aggreg` for `aggregate`).
    """
    if not 2 <= len(word) <= 40:
        return []
    low = word.lower()
    found = []
    for candidate in candidates:
        other = candidate.lower()
        allowed = max(1, max(len(low), len(other)) // 3)
        if abs(len(low) - len(other)) > allowed and not (len(low) > 3 and other.startswith(low)):
            continue
        edits = distance(low, other)
        if other.startswith(low) and len(low) > 3:
            edits = min(edits, 1)
        if edits <= allowed and edits < len(low):
            found.append((edits, abs(len(low) - len(other)), candidate))
    return [candidate for _, _, candidate in sorted(found)[:3]]
