"""From the text of a spec to its first gradient, without a compiler of machine code.

`python -m benchmarks.latency [--quick]` writes results/latency.json. Every shipped spec in a
process of its own, forked after the imports, so that nothing is cached: read the file, check,
derive, emit, make a small batch by hidden states, loss and backward. Processor seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

from benchmarks import measure

measure.one_thread()

from benchmarks.anyspec import batch_for  # noqa: E402
from benchmarks.measure import Variant  # noqa: E402

BOUND = 0.5


def first_gradient(path) -> object:
    """Everything a user waits for once `import opdsl` is done."""
    import opdsl

    method = opdsl.load(path)
    batch, _ = batch_for(method, 4, 16, 32, 1024)
    loss = method.loss(batch).loss
    loss.backward()
    return loss.detach()


def one(path):
    return partial(first_gradient, path), []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every tenth spec, nothing written")
    args = parser.parse_args()
    import opdsl
    from opdsl.resources import methods

    _ = (opdsl.Batch, opdsl.load)
    import opdsl.compilation
    import opdsl.emit.runtime

    imports = time.process_time()  # the interpreter and torch included
    found: dict[str, float] = {}
    failed: dict[str, str] = {}
    for path in methods(failures=True)[:: 10 if args.quick else 1]:
        v = Variant(path.stem, partial(one, path))
        v.start()
        v.warm()
        v.stop()
        if v.series.failed:
            failed[path.stem] = v.series.failed
        else:
            found[path.stem] = round(v.series.first_seconds, 3)
    slow = {k: v for k, v in sorted(found.items(), key=lambda x: -x[1]) if v > BOUND}
    content = {
        "specs": len(found),
        "import_seconds": round(imports, 2),
        "median": statistics.median(found.values()),
        "largest": max(found.items(), key=lambda x: x[1]),
        "over": slow,
        "failed": failed,
        "seconds": found,
        "target": {"bound": BOUND, "measured": max(found.values()), "met": not slow and not failed},
    }
    if not args.quick:
        measure.save("latency", content)
    print({k: v for k, v in content.items() if k != "seconds"})


if __name__ == "__main__":
    main()
