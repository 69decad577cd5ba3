"""The axes of the library and the values they can have, for `opdsl list` and the gallery.

`formula.axes` computes the values; this file is read where nothing is compiled. In values, T
stands for any teacher.
"""

from __future__ import annotations

AXES: dict[str, str] = {
    "state": "whose prefixes the feedback is measured on",
    "teacher": "what the teachers are: external, self, ema, initial; with context, routed, several",
    "access": "the least that is asked of a teacher",
    "support": "index set of a term",
    "tail": "what happens to the mass outside it",
    "route": "differentiated loss, frozen reward, frozen scores of candidates",
    "feedback": "the comparison or the signal, recognised by its values",
    "credit": "which later rewards a token answers for",
    "baseline": "what is subtracted from a reward or return",
    "routing": "where punished mass goes",
    "gate": "what the gate reads",
    "weight": "what the weight reads",
    "aggregate": "what the sum is divided by",
    "regularize": "comparisons added beside the feedback",
    "conservative": "whether the field is the gradient of a scalar",
    "stationary": "whether the field vanishes at student = T",
    "evidence": "how the formula is known",
    "group": "shelf of the library",
}
MEASURED = ("conservative", "stationary", "objective")  # from the passport
DECIDED = ("yes", "no", "undecided")

# Values an axis can have though no shipped method may have them; formulas are not listed.
VALUES: dict[str, tuple[str, ...]] = {
    "state": ("student", "old", "data", "golden", "T", "blend", "interleaved", "mix", "prefix",
              "schedule"),
    "teacher": ("external", "self", "ema", "initial", "context", "routed", "several", "none"),
    "access": ("text", "sampled", "top", "score_ids", "logits", "none"),
    "support": ("full", "sampled", "top-T", "top-student", "top_p-T", "top_p-student", "union",
                "intersection"),
    "tail": ("bin", "renormalize", "drop", "detach", "sampled", "none"),
    "route": ("loss", "reward", "scores"),
    "credit": ("none", "immediate", "return_to_go", "future", "full", "discounted", "window",
               "gae", "other"),
    "baseline": ("none", "state", "leave_one_out", "group", "batch", "position", "critic"),
    "routing": ("implicit", "suppress", "counterfactual", "proportional", "drop", "local"),
    "aggregate": ("tokens", "kept_tokens", "sequences", "response_length", "sum"),
    "conservative": DECIDED,
    "stationary": DECIDED,
    "evidence": ("hypothesis", "reported", "replicated"),
}  # fmt: skip

SHELVES: dict[str, str] = {
    "core": "one of every kind, to start from",
    "foundations": "distillation on given text and on rollouts, before everything else",
    "divergences": "which comparison of two distributions",
    "supports": "which tokens are compared, and what happens to the rest",
    "gates": "which tokens, responses and prompts count, and how much",
    "routing": "where punished mass goes",
    "credit": "which later rewards a token answers for",
    "corrections": "bounded, reshaped and corrected signals",
    "hybrids": "distillation together with a verifier's reward",
    "self": "the student, or its past, as its own teacher",
    "teams": "several teachers",
    "extrapolation": "targets beyond the teacher",
    "frameworks": "what trainers do when they are run as they ship",
}

__all__ = ["AXES", "DECIDED", "MEASURED", "SHELVES", "VALUES"]
