"""What a checkpoint of a run holds, and continuing from one.

A resumed run must be the same run: method, data, starting weights and every setting that
decides numbers are compared with those of the checkpoint, and a difference is refused with a
list of what differs. `--allow-change NAME` lets one through; it is written into every later
checkpoint and into the report. Only the number of steps may grow without asking, where the
schedule does not depend on it.

A checkpoint needs no generator states and no place in the data: batches and random streams are
pure functions of seed and step (`streams`).
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opdsl.train import checkpoint, guards, outline
from opdsl.train.errors import problem


def parts(session) -> dict[str, tuple[Callable[[], dict], Callable[[dict], None]]]:
    """Everything with tensors beside the student: name -> (give tensors, take tensors).

    Whatever has `state()` and `load_state(tensors)` takes part, data and states included; an
    empty state is left out.
    """
    engine, found = session.engine, {}
    holders = {f"teacher-{name}": teacher for name, teacher in engine.teachers.items()}
    holders |= {"old": session.old, "data": session.data, "states": engine.states}
    for name, holder in holders.items():
        if hasattr(holder, "state") and holder.state():
            found[name] = (holder.state, holder.load_state)
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


def memories(session) -> dict[str, Any]:
    """Everything that remembers steps gone by: name -> object with `memory()` and `remember()`.

    memory() gives JSON values, remember(them) takes them back. Data, states and teachers take
    part as soon as they have the two.
    """
    engine = session.engine
    holders = {"watch": engine.watched, "outcomes": engine.outcomes, "data": session.data}
    holders["states"] = engine.states
    holders |= {f"teacher {name}": teacher for name, teacher in engine.teachers.items()}
    return {name: x for name, x in holders.items() if hasattr(x, "memory")}


def save(session, done: int) -> Path:
    """Write the checkpoint after `done` steps; returns its folder.

    Raises RunProblem OPD704, and GuardStop where a weight or moment is not finite.
    """
    engine, plan = session.engine, session.plan
    student = dict(zip(engine.names, engine.parameters))
    tensors = {"student": student} | {name: give() for name, (give, _) in parts(session).items()}
    filled = {name: group for name, group in tensors.items() if group}
    guards.guard_weights(filled, done)
    state = {
        "decides": plan.decides(),
        "steps": plan.recipe.steps,
        "position": {"prompts": done * plan.prompts, "seed": plan.seed},
        "counts": engine.counts,
        "sizes": _sizes(session),
        "fingerprints": plan.fingerprints,
        "outline": outline.outline(session.method),
        "versions": versions(session),
        "memories": {name: holder.memory() for name, holder in memories(session).items()},
        "changes": session.changes,
    }
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
    state = found.state
    session.changes[:] = state.get("changes", [])
    allowed = _check_identity(session, found)
    _take_tensors(session, found, bool(allowed), say)
    engine.counts.update(state["counts"])
    _resize(session, state)
    for name, holder in memories(session).items():
        if name in state.get("memories", {}):
            holder.remember(state["memories"][name])
    before, now = state["steps"], plan.recipe.steps
    if before != now:
        say(f"the run goes from {before} to {now} steps; schedules over the whole run stretch")
    for line in allowed:
        session.changes.append(f"after step {found.step}: {line}")
        say(f"changed as allowed: {line}")
    _say_versions(state.get("versions", {}), versions(session), say)
    say(f"resuming after step {found.step}")
    return found.step


def _take_tensors(session, found: checkpoint.Checkpoint, changed: bool, say) -> None:
    """Weights, then everything beside them; after an allowed change parts may come and go."""
    engine, mine = session.engine, found.tensors["student"]
    theirs = {n: list(x.shape) for n, x in mine.items()}
    for name, parameter in zip(engine.names, engine.parameters):
        if theirs.get(name) != list(parameter.shape):
            raise problem(
                "OPD705",
                f"{found.folder} holds another student: {name} has the shape"
                f" {list(parameter.shape)} here and {theirs.get(name, 'no place')} there",
                helps=["give the --student and the adapter of the first start, or another --out"],
            )
    takers = parts(session)
    unknown = set(found.tensors) - set(takers) - {"student"}
    missing = {n for n in takers if n not in found.tensors and n != "optimizer"}
    if unknown and not changed:
        raise problem(
            "OPD705", f"{found.folder} holds {', '.join(sorted(unknown))}, which this run has not"
        )
    with torch.no_grad():
        for name, parameter in zip(engine.names, engine.parameters):
            parameter.copy_(mine[name])
    for name, (_, take) in takers.items():
        if name in found.tensors or name == "optimizer":
            take(found.tensors.get(name, {}))
        elif not (changed or name.endswith("-optimizer")):
            raise problem("OPD705", f"{found.folder} holds no {name}, which this run needs")
    if changed:
        lines = {"is not used any more": unknown, "was not there and starts afresh": missing}
        for what, names in lines.items():
            for name in sorted(names):
                say(f"{name} of the checkpoint {what}")


# ---- sizes and versions ------------------------------------------------------------------------


def _sizes(session) -> dict[str, Any]:
    """Rows at a time, which memory may have made smaller: they decide the last bits."""
    engine = session.engine
    teachers = {n: getattr(t, "chunk", None) for n, t in engine.teachers.items()}
    return {"pass": engine.micro_batch, "sampled": engine.states.chunk, "teachers": teachers}


def _resize(session, state: dict[str, Any]) -> None:
    engine, sizes = session.engine, state.get("sizes")
    if sizes is None:  # schema 1
        engine.micro_batch = state.get("micro_batch")
        return
    engine.micro_batch, engine.states.chunk = sizes["pass"], sizes["sampled"]
    for name, size in sizes["teachers"].items():
        if size is not None and hasattr(engine.teachers.get(name), "chunk"):
            engine.teachers[name].chunk = size


def versions(session) -> dict[str, str]:
    """What the last bits of a run depend on beside its settings."""
    import transformers

    import opdsl

    runtime = session.runtime
    return {
        "opdsl": opdsl.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "device": f"{runtime.device.type} {runtime.precision}",
        "machine": platform.machine(),
    }


def _say_versions(before: dict[str, str], now: dict[str, str], say) -> None:
    differing = [f"{k} was {v}, is {now[k]}" for k, v in before.items() if now.get(k, v) != v]
    if differing:
        say(
            f"{'; '.join(differing)}: from here on the run may differ in the last bits from one"
            " that was never interrupted"
        )


# ---- the same run, or a change that was allowed ----------------------------------------------------


def _check_identity(session, found: checkpoint.Checkpoint) -> list[str]:
    """The changes since the checkpoint, all of them allowed; any other is refused."""
    plan = session.plan
    differing = _differences(session, found)
    allowed = set(plan.settings.allow_change)
    refused = {} if "all" in allowed else {k: v for k, v in differing.items() if k not in allowed}
    if refused:
        words = " ".join(f"--allow-change {name}" for name in refused)
        by = "by another method" if "method" in refused else "with other settings"
        raise problem(
            "OPD705",
            f"{plan.out} was started {by}, so resuming would mix two runs",
            notes=[line for lines in refused.values() for line in lines],
            helps=[
                "start afresh with another --out, or give the spec and settings of the first start",
                f"to go on all the same: {words}",
            ],
        )
    return [line for lines in differing.values() for line in lines]


def _differences(session, found: checkpoint.Checkpoint) -> dict[str, list[str]]:
    """{what differs, as `--allow-change` names it: lines that say how}."""
    plan, state = session.plan, found.state
    theirs, mine = state["identity"], session.identity
    out: dict[str, list[str]] = {}
    if theirs.get("method") != mine["method"]:
        out["method"] = [
            f"method: fingerprint was {_short(theirs.get('method'))}, is {_short(mine['method'])}",
            *outline.changes(state.get("outline", {}), outline.outline(session.method)),
        ]
        if len(out["method"]) == 1:
            out["method"].append("its sections read as before: a `def` they use has changed")
    for key in sorted((set(theirs) | set(mine)) - {"method"}):
        if theirs.get(key) != mine.get(key):
            line = f"{key}: was {_short(theirs.get(key))}, is {_short(mine.get(key))}"
            out.setdefault(key.partition(" ")[0], []).append(line)
    before, now = state["decides"], plan.decides()
    if plan.recipe.schedule != "constant":
        before, now = before | {"steps": state["steps"]}, now | {"steps": plan.recipe.steps}
    for key in sorted(set(before) | set(now)):
        if before.get(key) != now.get(key) and not _only_moved(key, before, now, theirs, mine):
            out[key] = [*out.get(key, []), f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"]
    return out


def _only_moved(key: str, before: dict, now: dict, theirs: dict, mine: dict) -> bool:
    """Whether only the place of a file has changed, and its contents are known to be the same."""

    def same(name: str) -> bool:
        return name in mine and theirs.get(name) == mine[name]

    if key == "student":
        return same("weights of student")
    if key == "data":
        return None not in (before.get(key), now.get(key)) and same("data")
    if key == "teachers":
        return set(before[key]) == set(now[key]) and all(same(f"weights of {n}") for n in now[key])
    return False


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:18] + "…"
