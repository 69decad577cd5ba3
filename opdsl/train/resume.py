"""What a checkpoint of a run holds, and continuing from one.

A resumed run must be the same run: method, data, starting weights and every setting that
decides numbers are compared with those of the checkpoint, and a difference is refused with a
list of what differs. Only the number of steps may grow, where the schedule does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opdsl.train import checkpoint
from opdsl.train.errors import problem


def parts(session) -> dict[str, tuple[Callable[[], dict], Callable[[dict], None]]]:
    """Everything with a state beside the student: name -> (give tensors, take tensors)."""
    engine, found = session.engine, {}
    for name, teacher in engine.teachers.items():
        if teacher.state():
            found[f"teacher-{name}"] = (teacher.state, teacher.load_state)
    if session.old is not None:
        found["old"] = (session.old.state, session.old.load_state)
    optimizers = {"optimizer": (engine.optimizer, engine.names)}
    for critic in engine.critics:
        found[f"critic-{critic.name}"] = (critic.state, critic.load_state)
        names = [str(i) for i in range(len(critic.optimizer.param_groups[0]["params"]))]
        optimizers[f"critic-{critic.name}-optimizer"] = (critic.optimizer, names)
    for name, (optimizer, names) in optimizers.items():
        found[name] = (
            lambda o=optimizer, n=names: checkpoint.optimizer_tensors(o, n),
            lambda tensors, o=optimizer, n=names: checkpoint.load_optimizer(o, n, tensors),
        )
    return found


def save(session, done: int) -> Path:
    """Write the checkpoint after `done` steps; returns its folder."""
    engine, plan = session.engine, session.plan
    student = dict(zip(engine.names, engine.parameters))
    tensors = {"student": student} | {name: give() for name, (give, _) in parts(session).items()}
    state = {
        "decides": plan.decides(),
        "steps": plan.recipe.steps,
        "counts": engine.counts,
        "micro_batch": engine.micro_batch,
        "fingerprints": plan.fingerprints,
    }
    filled = {name: group for name, group in tensors.items() if group}
    root = plan.out / "checkpoints"
    return checkpoint.write(root, done, filled, state, session.identity, plan.settings.keep)


def load(session, say: Callable[[str], None]) -> int:
    """Put the newest good checkpoint into the session; returns the steps already done.

    0 without `resume`, or where there is no checkpoint yet. Raises RunProblem OPD705.
    """
    plan, engine = session.plan, session.engine
    root = plan.out / "checkpoints"
    checkpoint.clean(root)
    if not plan.settings.resume:
        return 0
    found = checkpoint.newest(root, say)
    if found is None:
        say("no checkpoint to resume from: starting at step 0")
        return 0
    _check_identity(session, found)
    takers = parts(session)
    unknown = set(found.tensors) - set(takers) - {"student"}
    if unknown:
        raise problem(
            "OPD705", f"{found.folder} holds {', '.join(sorted(unknown))}, which this run has not"
        )
    with torch.no_grad():
        for name, parameter in zip(engine.names, engine.parameters):
            parameter.copy_(found.tensors["student"][name])
    for name, (_, take) in takers.items():
        take(found.tensors.get(name, {}))
    engine.counts.update(found.state["counts"])
    engine.micro_batch = found.state["micro_batch"]
    before, now = found.state["steps"], plan.recipe.steps
    if before != now:
        say(f"the run goes from {before} to {now} steps; schedules over the whole run stretch")
    say(f"resuming after step {found.step}")
    return found.step


def _check_identity(session, found: checkpoint.Checkpoint) -> None:
    """Refuse to continue a run that another method, data set or setting began."""
    out, plan = session.plan.out, session.plan
    theirs, mine = found.state["identity"], session.identity
    if theirs.get("method") != mine["method"]:
        raise problem(
            "OPD705",
            f"{out} was trained by another method (fingerprint"
            f" {theirs.get('method', '?')[:12]}, this one is {mine['method'][:12]})",
            notes=["comments and layout do not change the fingerprint; formulas and --set do"],
            helps=["start afresh with another --out, or put the spec back as it was"],
        )
    differing = [
        f"{key}: was {_short(theirs.get(key))}, is {_short(mine.get(key))}"
        for key in sorted(set(theirs) | set(mine))
        if theirs.get(key) != mine.get(key)
    ]
    before: dict[str, Any] = found.state["decides"]
    now = plan.decides()
    if plan.recipe.schedule != "constant":
        before, now = before | {"steps": found.state["steps"]}, now | {"steps": plan.recipe.steps}
    differing += [
        f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(set(before) | set(now))
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise problem(
            "OPD705",
            f"{out} was started with other settings, so resuming would mix two runs",
            notes=differing,
            helps=["give the settings of the first start, or another --out"],
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:18] + "…"
