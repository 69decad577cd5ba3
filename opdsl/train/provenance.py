"""Where a run came from and how to make it again: command, versions, machine, fingerprints."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib import metadata
from typing import Any

from opdsl.train.redact import redacted, redacted_value, redacted_words

PACKAGES = ("opdsl", "torch", "transformers", "tokenizers", "accelerate", "peft", "numpy",
            "safetensors", "datasets", "triton")  # fmt: skip


def versions() -> dict[str, str]:
    """Python, the packages whose version can change numbers, and the machine's kind."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.machine()}"
    return found


def machine(device: str) -> dict[str, str]:
    """What computed: the device, its name, threads. Nothing that names the machine or its user."""
    import torch

    found = {"device": device, "cores": str(os.cpu_count() or "?")}
    if device.startswith("cuda") and torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name(torch.device(device.split()[0]))
        found["CUDA"] = str(torch.version.cuda)
    return found


def command(settings: Any, method: Any) -> str:
    """The command that repeats a run into a folder of its own, without keys.

    A run started from Python has no command; then it is the call that repeats it.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.words:
        words = redacted_words(settings.words)
        if processes > 1:
            words = ["accelerate", "launch", f"--num_processes={processes}", "-m", *words]
        return f"{shlex.join(words)} --out NEW"
    given = {}
    fresh = type(settings)()
    for name in settings.__dataclass_fields__:
        value = getattr(settings, name)
        if value != getattr(fresh, name) and name not in ("out", "resume", "cache_dir"):
            given[name] = redacted_value(dict(value) if hasattr(value, "items") else value, name)
    inside = ", ".join([f"{k}={v!r}" for k, v in given.items()] + ['out="NEW"'])
    return f"opdsl.train.loop.train(opdsl.load({redacted(method.name)!r}), RunSettings({inside}))"
