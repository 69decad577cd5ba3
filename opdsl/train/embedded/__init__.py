"""The embedded suite: tasks whose teacher and student are trained here, in seconds.

    task = get_task("chain")
    pair = build_pair(task, seed=0)
    prompts = task.prompts(seed=0, step=0, n=64)

`get_task` and `TASKS` need numpy only; torch and transformers are imported by `build_pair`.
"""

from __future__ import annotations

from opdsl.train.embedded.tasks import TASKS, Prompt, Task, get_task

__all__ = ["TASKS", "Pair", "Prompt", "Task", "build_pair", "get_task"]


def __getattr__(name: str):
    if name in ("Pair", "build_pair"):
        from opdsl.train.embedded import build

        return getattr(build, name)
    raise AttributeError(name)
