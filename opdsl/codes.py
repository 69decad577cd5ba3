"""The registry of diagnostics: one row per stable code.

Families: 0xx syntax, 1xx names and values, 2xx types, axes and units, 3xx structure, 4xx teacher
access and models, 5xx bias boundaries (warnings), 6xx numerics, 7xx run, 9xx faults of opdsl.
`rule` is the theory rule (R01…R66) that `allow` may name; the slug is what `accept` names.
The lesson of a code is the page `opdsl/pages/<code>.md`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from opdsl.diagnostics import Diagnostic, Fix, Label, Severity
from opdsl.source import Span
from opdsl.wrapping import shortened

E, W, N = Severity.ERROR, Severity.WARNING, Severity.NOTE


@dataclass(frozen=True, slots=True)
class Code:
    code: str
    slug: str
    severity: Severity
    rule: str | None = None


_ROWS: tuple[tuple[str, str, Severity, str | None], ...] = (
    # 0xx syntax
    ("OPD001", "unknown_section", E, None),
    ("OPD002", "missing_header", E, None),
    ("OPD003", "unclosed_bracket", E, None),
    ("OPD004", "unexpected_text", E, None),
    ("OPD005", "bad_character", E, None),
    ("OPD006", "unterminated_string", E, None),
    ("OPD007", "chained_comparison", E, None),
    ("OPD008", "source_too_large", E, None),
    ("OPD009", "too_deep", E, None),
    ("OPD010", "not_utf8", E, None),
    ("OPD011", "newer_version", E, None),
    ("OPD012", "bad_number", E, None),
    ("OPD013", "stray_bracket", E, None),
    ("OPD014", "missing_route", E, None),
    ("OPD015", "foreign_operator", E, None),
    ("OPD016", "misplaced_statement", E, None),
    ("OPD017", "unreadable_file", E, None),
    # 1xx names and values
    ("OPD101", "unknown_name", E, None),
    ("OPD102", "shadowed_name", E, None),
    ("OPD103", "duplicate_name", E, None),
    ("OPD104", "unknown_argument", E, None),
    ("OPD105", "missing_argument", E, None),
    ("OPD106", "too_many_arguments", E, None),
    ("OPD107", "needs_override", E, None),
    ("OPD108", "nothing_to_override", E, None),
    ("OPD109", "unknown_method", E, None),
    ("OPD110", "outside_domain", E, None),
    ("OPD111", "unknown_param", E, None),
    ("OPD112", "bad_value", E, None),
    ("OPD113", "import_not_found", E, None),
    ("OPD114", "import_cycle", E, None),
    ("OPD115", "import_name_missing", E, None),
    ("OPD116", "import_outside_root", E, None),
    ("OPD117", "unknown_rule", E, None),
    ("OPD118", "unused_acceptance", W, None),
    ("OPD119", "unknown_setting", E, None),
    ("OPD120", "unknown_term", E, None),
    ("OPD121", "unknown_option", E, None),
    ("OPD122", "not_static", E, None),
    ("OPD123", "recursive_definition", E, None),
    ("OPD124", "bad_recurrence", E, None),
    # 2xx types, axes, units
    ("OPD201", "axis_mismatch", E, None),
    ("OPD202", "wrong_kind", E, None),
    ("OPD203", "declared_unit", E, None),
    ("OPD204", "unit_mismatch", E, None),
    ("OPD205", "not_a_gate", E, None),
    ("OPD206", "gate_out_of_range", E, None),
    ("OPD207", "negative_weight", E, "R53"),
    ("OPD208", "degenerate_divergence", E, None),
    ("OPD209", "missing_direction", E, None),
    ("OPD210", "unbound_index", E, None),
    ("OPD211", "undefined_arithmetic", E, None),
    # 3xx structure
    ("OPD301", "credit_on_direct_loss", E, "R07"),
    ("OPD302", "teacher_free_gradient", E, "R01"),
    ("OPD303", "missing_section", E, None),
    ("OPD304", "duplicate_section", E, None),
    ("OPD305", "state_conflict", E, None),
    ("OPD306", "mixed_reward_units", E, "R62"),
    ("OPD307", "zero_signal", E, "R05"),
    ("OPD308", "zero_gradient", E, None),
    ("OPD309", "misplaced_credit", E, None),
    ("OPD310", "wrong_reward_field", E, "R03"),
    ("OPD311", "tail_missing", E, None),
    ("OPD312", "singleton_renormalized", E, "R20"),
    ("OPD313", "routing_incomplete", E, "R42"),
    ("OPD314", "routing_on_loss", E, None),
    ("OPD315", "action_baseline", E, "R31"),
    ("OPD316", "teacher_text_law", E, "R09"),
    ("OPD317", "own_sample_imitation", E, None),
    ("OPD318", "returns_by_length", E, "R34"),
    ("OPD319", "divergence_as_reward", E, "R04"),
    ("OPD320", "routing_target", E, "R40"),
    ("OPD321", "support_mass_constant", E, "R26"),
    ("OPD322", "clamped_divergence", E, "R25"),
    # 4xx teacher access and models
    ("OPD401", "teacher_access", E, "R27"),
    ("OPD402", "teacher_missing", E, None),
    ("OPD403", "vocabulary_mismatch", E, "R28"),
    ("OPD404", "model_not_found", E, None),
    ("OPD405", "teacher_route_gap", E, None),
    ("OPD406", "sampler_distribution", E, None),
    ("OPD407", "teacher_unable", E, None),
    # 5xx bias boundaries
    ("OPD501", "immediate_credit", W, "R30"),
    ("OPD502", "not_a_divergence", W, "R21"),
    ("OPD503", "renormalized_support", W, "R22"),
    ("OPD504", "sampler_mismatch", W, "R10"),
    ("OPD505", "baseline_includes_self", W, "R32"),
    ("OPD506", "discounted_target", W, "R30"),
    ("OPD507", "stale_rollouts", W, "R10"),
    ("OPD508", "ratio_clip", N, "R64"),
    ("OPD509", "value_drift", W, "R33"),
    ("OPD510", "routed_target", W, "R44"),
    ("OPD511", "student_gate", N, "R50"),
    ("OPD512", "outcome_weight", W, "R52"),
    ("OPD513", "action_weight", W, "R51"),
    ("OPD514", "length_coupling", W, "R34"),
    ("OPD515", "target_shift", W, "R61"),
    ("OPD516", "unbounded_strength", W, "R43"),
    ("OPD517", "unguarded_candidates", W, "R41"),
    ("OPD518", "batch_relative", W, "R55"),
    ("OPD519", "kept_denominator", N, "R65"),
    ("OPD520", "occupancy_only", W, "R06"),
    ("OPD521", "unbounded_return", N, "R35"),
    ("OPD522", "redundant_routing", W, "R46"),
    ("OPD523", "two_estimands", W, "R63"),
    ("OPD524", "scaled_after_sum", W, "R37"),
    ("OPD525", "sampled_divergence", W, "R02"),
    ("OPD526", "one_sided_signal", W, "R45"),
    ("OPD527", "truncated_return", W, "R30"),
    ("OPD528", "exact_own_token", N, "R08"),
    ("OPD529", "tail_in_one_entry", N, "R23"),
    ("OPD530", "student_tail", W, "R24"),
    ("OPD531", "tail_pairing", W, "R29"),
    ("OPD532", "sequence_objective", N, "R30"),
    ("OPD533", "value_sign", W, "R36"),
    ("OPD534", "counted_twice", W, "R38"),
    ("OPD535", "extra_teacher_score", N, "R47"),
    ("OPD536", "kept_share_scale", N, "R54"),
    ("OPD537", "implied_target", N, "R60"),
    ("OPD538", "special_tokens", N, "R66"),
    # 7xx run
    ("OPD701", "model_unusable", E, None),
    ("OPD702", "data_unreadable", E, None),
    ("OPD703", "bad_row", E, None),
    ("OPD704", "output_unwritable", E, None),
    ("OPD705", "resume_mismatch", E, None),
    ("OPD706", "non_finite", E, None),
    ("OPD707", "nothing_to_train", E, None),
    ("OPD708", "unknown_task", E, None),
    ("OPD709", "prompt_too_long", E, None),
    ("OPD710", "output_locked", E, None),
    ("OPD711", "unknown_spec", E, None),
    ("OPD712", "verifier_unusable", E, None),
    ("OPD720", "guard_stopped", E, None),
    ("OPD721", "out_of_memory", E, None),
    ("OPD730", "teacher_absent", E, None),
    ("OPD731", "teacher_lost", E, None),
    ("OPD732", "teacher_wrong", E, None),
    ("OPD733", "stored_scores", E, None),
    ("OPD740", "sink_missing", E, None),
    # 9xx faults of opdsl
    ("OPD900", "internal_error", E, None),
)

CODES: dict[str, Code] = {row[0]: Code(*row) for row in _ROWS}
BY_SLUG: dict[str, Code] = {c.slug: c for c in CODES.values()}


def make(
    code: str,
    span: Span,
    message: str,
    label: str = "",
    *,
    secondary: Iterable[Label] = (),
    notes: Iterable[str] = (),
    helps: Iterable[str] = (),
    fixes: Iterable[Fix] = (),
) -> Diagnostic:
    """A diagnostic of a registered code. Raises KeyError for an unknown code."""
    row = CODES[code]
    return Diagnostic(
        row.code,
        row.slug,
        row.severity,
        shortened(message),  # a word of a text may be as long as the text
        Label(span, shortened(label)),
        tuple(secondary),
        tuple(map(shortened, notes)),
        tuple(map(shortened, helps)),
        tuple(fixes),
        row.rule,
    )
