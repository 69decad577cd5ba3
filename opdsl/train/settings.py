"""What a user may set for one run, and the optimizer recipe that follows from it.

`RunSettings` holds the user's words as they came (None = not said). `recipe_for` turns them,
the spec's `optimize {}` section and the defaults of the chosen pair into one `Recipe`.

On the embedded pair the recipe of the embedded suite holds: a spec's `lr` is meant for models
ten thousand times larger. `--set optimize.lr=…` (or `--lr`) wins everywhere.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from opdsl.train.errors import problem
from opdsl.train.watch import Rule


@dataclass(frozen=True)
class RunSettings:
    """One run as asked for. Paths are as typed; None means the default of the plan.

    prompts: prompts per optimizer step (rows = prompts x group). micro_batch: rows per
    backward pass; the result does not depend on it. skip_nonfinite: how many non-finite steps
    may be skipped before the run stops (0: stop at the first). pair_seed: seed of the embedded
    models; seed: of data, rollouts and mixing. measure_every: steps between full measurements;
    they never change the run.
    """

    out: str | None = None
    task: str | None = None
    run: str | None = None
    student: str | None = None
    teachers: Mapping[str, str] = field(default_factory=dict)  # "" = every external teacher
    data: str | None = None
    eval_data: str | None = None
    verifier: str | None = None  # None: by the kind of reference, see `verifiers`
    verifier_limits: str | None = None  # "time=30,memory=4GB", see `sandbox`
    columns: str | None = None  # "prompt=question,reference=answer", see `rows`
    curriculum: str | None = None  # "pass_rate=0.1..0.9", see `curriculum`
    seed: int | None = None
    pair_seed: int = 0
    steps: int | None = None
    prompts: int | None = None
    micro_batch: int | None = None
    max_tokens: int | None = None
    eval_every: int | None = None
    eval_at: tuple[int, ...] = ()
    eval_prompts: int | None = None
    save_every: int | None = None
    keep: int = 3
    device: str | None = None
    precision: str | None = None
    memory: str | None = None  # of loss and gradient, "2GiB"; tokens at a time follow
    compile: bool = False  # dense row passes on a CPU through torch.compile
    optimize: Mapping[str, object] = field(default_factory=dict)
    rollout: Mapping[str, object] = field(default_factory=dict)  # see `parse_rollout`
    teacher_failure: str | None = None  # halt | pause | drop_batch(N), see `teachers.link`
    teacher_timeout: float | None = None  # seconds for the scores of one batch
    teacher_key_env: str | None = None  # environment variable with a server's key
    offload_teacher: bool = False
    resume: bool = False
    allow_change: tuple[str, ...] = ()  # what may differ when resuming; "all" for everything
    guards: Mapping[str, Rule] = field(default_factory=dict)  # see `watch`
    skip_nonfinite: int = 0
    skip_bad_rows: bool = False
    long_prompts: str = "refuse"  # refuse | drop | cut
    measure_every: int | None = None  # 0: off; None: see `meters`
    log: tuple[str, ...] = ()  # sinks beside the files, see `sinks`
    words: tuple[str, ...] = ()  # the command line, for the report
    report: bool = True
    export: bool = True
    cache_dir: str | None = None


@dataclass(frozen=True)
class Recipe:
    """The trajectory: how gradients become updates. Everything `optimize {}` may say."""

    lr: float
    steps: int
    batch: int  # rows (sequences) per optimizer step
    warmup: int = 5
    schedule: str = "constant"  # constant | linear | cosine, after the warm-up
    clip_grad: float = 1.0  # global norm; 0 turns clipping off
    epochs: int = 1  # optimizer steps on each batch of rollouts
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    adapter: tuple[str, dict[str, Any]] | None = None  # ("lora", {"rank": 8})

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, …: linear warm-up, then the schedule, to 0 at `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.schedule == "linear":
            return self.lr * max(0.0, 1.0 - done)
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


EMBEDDED_RECIPE = Recipe(lr=1e-3, steps=100, batch=64, warmup=5)
REAL_RECIPE = Recipe(lr=1e-6, steps=0, batch=64, warmup=10)  # steps 0: one pass over the data
LORA_LR = 1e-4

SCHEDULES = ("constant", "linear", "cosine")


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _not_negative(value: object) -> bool:
    return _positive(value) or (value == 0 and not isinstance(value, bool))


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


# Settings of `optimize {}` that say how often or in what portions, not where the weights go.
PACE = ("micro_batch", "eval_every", "save_every")

# name -> (test, what is accepted)
_SETTINGS: dict[str, tuple[Callable[[object], bool], str]] = {
    "lr": (_positive, "a number above 0"),
    "steps": (_count, "a whole number from 1"),
    "batch": (_count, "a whole number from 1"),
    "epochs": (_count, "a whole number from 1"),
    "warmup": (lambda v: v == 0 or _count(v), "a whole number from 0"),
    "schedule": (lambda v: v in SCHEDULES, " | ".join(SCHEDULES)),
    "clip_grad": (_not_negative, "a number from 0 (0 turns it off)"),
    "weight_decay": (_not_negative, "a number from 0"),
    "beta1": (lambda v: _not_negative(v) and v < 1, "a number in [0, 1)"),
    "beta2": (lambda v: _not_negative(v) and v < 1, "a number in [0, 1)"),
    "prompts": (_count, "a whole number from 1"),
    "micro_batch": (_count, "a whole number from 1"),
    "eval_every": (_count, "a whole number from 1"),
    "save_every": (_count, "a whole number from 1"),
    "optimizer": (lambda v: v == "adamw", "adamw"),
    "adapter": (
        lambda v: v is None or (isinstance(v, tuple) and v[0] == "lora" and _count(v[1]["rank"])),
        "lora(rank = 8) or none",
    ),
}


def parse_optimize(name: str, text: str) -> tuple[str, object]:
    """`optimize.NAME=TEXT` of the command line as (name, checked value).

    Raises RunProblem OPD119 for an unknown name, OPD112 for a value out of range.
    """
    value: object
    lora = re.fullmatch(
        r"lora\(\s*rank\s*=\s*(\d+)(?:\s*,\s*alpha\s*=\s*(\d+))?\s*\)", text.strip()
    )
    number = re.fullmatch(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?:\s*steps)?", text.strip())
    if lora:
        value = ("lora", {"rank": int(lora[1])} | ({"alpha": int(lora[2])} if lora[2] else {}))
    elif number:
        value = float(number[1])
        if value.is_integer() and not re.search(r"[.eE]", number[1]):
            value = int(value)
    else:
        value = None if text.strip() == "none" else text.strip()
    return name, check_optimize(name, value)


# name -> what is accepted
_ROLLOUT = {"backend": ("own", "generate_batch")}


def parse_rollout(name: str, text: str) -> tuple[str, str]:
    """`rollout.NAME=TEXT` of the command line, checked: who samples the training rollouts.

    backend: `own`, or `generate_batch` of transformers' continuous batching.
    Raises RunProblem OPD119 for an unknown name, OPD112 for another value.
    """
    if name not in _ROLLOUT:
        near = difflib.get_close_matches(name, _ROLLOUT, n=1, cutoff=0.5)
        helps = [f"did you mean rollout.{near[0]}?"] if near else []
        raise problem(
            "OPD119",
            f"there is no setting rollout.{name}",
            helps=[*helps, "settings: " + ", ".join(sorted(_ROLLOUT))],
        )
    if text not in _ROLLOUT[name]:
        wanted = " or ".join(_ROLLOUT[name])
        raise problem("OPD112", f"rollout.{name} = {text} is not {wanted}")
    return name, text


def check_optimize(name: str, value: object) -> object:
    """The value of one `optimize` setting, or RunProblem OPD119 / OPD112."""
    if name not in _SETTINGS:
        near = difflib.get_close_matches(name, _SETTINGS, n=1)
        helps = [f"did you mean optimize.{near[0]}?"] if near else []
        raise problem(
            "OPD119",
            f"there is no setting optimize.{name}",
            helps=[*helps, "settings: " + ", ".join(sorted(_SETTINGS))],
        )
    if name == "schedule" and isinstance(value, tuple):
        value = value[0]  # cosine() written as a call
    accepts, wants = _SETTINGS[name]
    if isinstance(value, float) and value.is_integer() and wants.startswith("a whole"):
        value = int(value)
    if not accepts(value):
        raise problem("OPD112", f"optimize.{name} = {value!r} is not {wants}")
    return value


def recipe_for(
    in_spec: Mapping[str, object],
    settings: RunSettings,
    *,
    embedded: bool,
    group: int,
    rows_of_data: int | None,
) -> tuple[Recipe, list[str]]:
    """The recipe of a run, and the remarks a user should read about it.

    Order, last wins: defaults of the pair, spec (real models only; `epochs` always, because it
    belongs to the method's estimator), `--set optimize.…`, `--steps`, `--prompts`. `steps` stays
    0 where it follows from the size of the data and that is not known yet (rows_of_data None).
    """
    notes: list[str] = []
    base = EMBEDDED_RECIPE if embedded else REAL_RECIPE
    spec = {k: check_optimize(k, v) for k, v in in_spec.items()}
    user = {k: check_optimize(k, v) for k, v in settings.optimize.items()}
    chosen: dict[str, Any] = {}
    if embedded:
        if "epochs" in spec:
            chosen["epochs"] = spec["epochs"]
        passed = [k for k in spec if k not in (*chosen, *user, *PACE, "optimizer")]
        if passed:
            notes.append(
                f"the spec's optimize settings ({', '.join(sorted(passed))}) are for full-size"
                f" models; the embedded pair uses its own (lr {base.lr:g});"
                " --set optimize.lr=… overrides"
            )
    else:
        chosen |= spec
        if (chosen | user).get("adapter"):
            base = replace(base, lr=LORA_LR)
    chosen |= user
    if "prompts" in chosen:
        chosen["batch"] = chosen.pop("prompts") * group
    for name in (*PACE, "optimizer"):
        chosen.pop(name, None)
    if settings.steps is not None:
        chosen["steps"] = check_optimize("steps", settings.steps)
    if settings.prompts is not None:
        chosen["batch"] = check_optimize("batch", settings.prompts) * group
    recipe = replace(base, **chosen)
    if settings.prompts is None:
        # Whole groups only; the embedded pair keeps at least 8 prompts for diversity.
        prompts = max(8 if embedded else 1, recipe.batch // group)
        recipe = replace(recipe, batch=prompts * group)
    if recipe.steps == 0 and rows_of_data is not None:
        recipe = replace(recipe, steps=max(1, math.ceil(rows_of_data * group / recipe.batch)))
        notes.append(f"steps not given: one pass over the data, {recipe.steps} steps")
    if 0 < recipe.steps <= recipe.warmup:
        recipe = replace(recipe, warmup=max(0, recipe.steps // 10))
    return recipe, notes
