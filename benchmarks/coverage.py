"""How many shipped specs take a chunked plan: counted by what is allocated, not by what is claimed.

`python -m benchmarks.coverage` writes results/coverage.json. Every shipped spec runs once on more
rows than a tile holds; every tensor that any operation returns is measured, and a spec is counted
if none was larger than a tile of the vocabulary (or than its inputs). Beside it, the plan class.
"""

from __future__ import annotations

from collections import Counter

from benchmarks import measure

measure.one_thread()

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from benchmarks.anyspec import batch_for  # noqa: E402

B, T, H, V = 16, 64, 16, 8192
ROWS = 256  # of a tile on a CPU


class Largest(TorchDispatchMode):
    """The largest tensor an operation made that is a memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x._base is None:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


def probe(path) -> dict[str, object]:
    """Plan and largest allocation of one spec; raises what the spec raises."""
    import opdsl
    from opdsl.emit.plan import plans

    method = opdsl.load(path)
    batch, leaves = batch_for(method, B, T, H, V)
    with Largest() as seen:
        method.loss(batch).loss.backward()
    allowed = max(ROWS * V, *(x.numel() for x in leaves))
    return {
        "plan": "; ".join(p.label for p in plans(method.compilation.emitted)),
        "units": sum(p.units() for p in plans(method.compilation.emitted)[:1]),
        "largest": round(seen.numel / allowed, 3),
        "chunked": seen.numel <= allowed,
        "finite": all(x.grad is None or bool(torch.isfinite(x.grad).all()) for x in leaves),
    }


def main() -> None:
    from opdsl.resources import methods

    found: dict[str, dict] = {}
    for path in methods(failures=True):
        try:
            found[path.stem] = probe(path)
        except Exception as error:  # one spec must not hide the others
            found[path.stem] = {
                "chunked": False,
                "failed": f"{type(error).__name__}: {error}"[:200],
            }
    chunked = sum(bool(x["chunked"]) for x in found.values())
    classes = Counter(str(x.get("plan", "failed")).split(";")[0] for x in found.values())
    content = {
        "rows": B * T,
        "tile": [ROWS, V],
        "specs": len(found),
        "chunked": chunked,
        "classes": dict(classes.most_common()),
        "not_chunked": {k: v for k, v in found.items() if not v["chunked"]},
        "target": {"bound": len(found), "measured": chunked, "met": chunked == len(found)},
        "found": found,
    }
    measure.save("coverage", content)
    print({k: v for k, v in content.items() if k != "found"})


if __name__ == "__main__":
    main()
