"""Tables from results/*.json: `python -m benchmarks.report` prints Markdown; --write puts it into
docs/performance.md; --quick shows the table of `benchmarks.heads --quick`.

Columns: bare products (floor), ours, ratio, the best peer that ran, how much faster we are than
it, peaks, and each target with what was measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import measure

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
START, END = "<!-- tables: python -m benchmarks.report --write -->", "<!-- end of tables -->"

OWN = ("floor", "ours")


def best_peer(row: dict) -> tuple[str, dict] | None:
    """The fastest variant that is neither the floor nor ours."""
    others = {
        k: v
        for k, v in row["variants"].items()
        if k not in OWN and not k.startswith("ours:") and "failed" not in v
    }
    return min(others.items(), key=lambda x: x[1]["seconds"]) if others else None


def seconds(v: dict | None) -> str:
    return "–" if not v or "failed" in v else f"{v['seconds']:.2f}"


def number(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.2f}"


def target_text(t: dict) -> str:
    sign = "≥" if t["what"] == "speedup" else "≤"
    what = {
        "time": f"of {t['against']}",
        "speedup": f"× faster than {t['against']}",
        "peak": "MB",
    }[t["what"]]
    value = number(t["measured"]) if "measured" in t else "failed"
    mark = "" if t["met"] else " **missed**"
    return f"{value} {what} ({sign} {t['bound']:g}){mark}"


def heads_table(rows: list[dict]) -> list[str]:
    out = [
        "| | floor s | ours s | ours/floor | best peer | s | faster | ours MB | peer MB | targets |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---|",
    ]
    for r in rows:
        v = r["variants"]
        ours = v["ours"]
        ratio = r["ours_per"].get("floor")
        peer = best_peer(r)
        name, at = peer if peer else ("–", None)
        peak = f"{at['peak_mb']:.0f}" if at else "–"
        faster = 1 / r["ours_per"][name] if peer and name in r["ours_per"] else None
        out.append(
            f"| {r['row']} | {seconds(v.get('floor'))} | {seconds(ours)} "
            f"| {number(ratio) if ratio else '–'} | {name} | {seconds(at)} "
            f"| {f'{faster:.2f} ×' if faster else '–'} | {ours.get('peak_mb', 0):.0f} "
            f"| {peak} "
            f"| {'; '.join(target_text(t) for t in r['targets']) or '–'} |"
        )
    return out


def peers_table(rows: list[dict]) -> list[str]:
    """Every peer of every row."""
    out = ["| | peer | s | MB | ours/peer | results differ by |", "|---|---|---:|---:|---:|---:|"]
    for r in rows:
        for name, v in r["variants"].items():
            if name in OWN or name.startswith("ours:"):
                continue
            if "failed" in v:
                out.append(f"| {r['row']} | {name} | failed: {v['failed']} | | | |")
                continue
            away = r["difference_of_results"].get(name)
            out.append(
                f"| {r['row']} | {name} | {v['seconds']:.2f} | {v['peak_mb']:.0f} "
                f"| {number(r['ours_per'][name])} | {f'{away:.0e}' if away is not None else '–'} |"
            )
    return out


def machine(environment: dict) -> str:
    v = environment["versions"]
    packages = ", ".join(f"{k} {v[k]}" for k in v)
    units = "/".join(environment["vector_units"])
    return f"{environment['cpu']} ({units}), one thread; {packages}; {environment['date']}."


SHAPES = {
    "A": "A: 2048 tokens, hidden 512, vocabulary 32768",
    "B": "B: 1024 tokens, hidden 128, vocabulary 151936",
    "C": "C: 4096 tokens, hidden 512, vocabulary 32768",
    "Q": "quick: 512 tokens, hidden 512, vocabulary 32768",
}


def heads(name: str) -> list[str]:
    found = measure.read(name)
    if found is None:
        return []
    out = [machine(found["environment"]), ""]
    for letter, title in SHAPES.items():
        rows = [r for r in found["rows"] if r["shape"] == letter]
        if rows:
            out += [f"### {title}", "", *heads_table(rows), "", "All peers:", ""]
            out += [*peers_table(rows), ""]
    return out


def mark(t: dict) -> str:
    return "met" if t["met"] else "**missed**"


def rest() -> list[str]:
    """One line for every other target."""
    out = ["| | target | measured | |", "|---|---|---|---|"]
    if latency := measure.read("latency"):
        t = latency["target"]
        slow = f", {len(latency['over'])} over it" if latency["over"] else ""
        text = f"median {latency['median']:.2f} s, largest {t['measured']:.2f} s{slow}"
        out.append(
            f"| parse to first gradient, {latency['specs']} specs | ≤ {t['bound']} s | {text} | {mark(t)} |"
        )
    if coverage := measure.read("coverage"):
        t = coverage["target"]
        out.append(
            f"| specs with a chunked plan | all {coverage['specs']} | {t['measured']} | {mark(t)} |"
        )
    if accuracy := measure.read("accuracy"):
        for name, t in accuracy["targets"].items():
            bound = "yes" if t["bound"] is True else f"≤ {t['bound']:g}"
            value = "yes" if t["measured"] is True else t["measured"]
            out.append(f"| gradient error: {name} | {bound} | {value} | {mark(t)} |")
    if rollout := measure.read("rollout"):
        t = rollout["target"]
        out.append(
            f"| decoding against `generate`, {rollout['setting']} | ≥ {t['bound']:g} × | {t['measured']} × | {mark(t)} |"
        )
        p = rollout["law"]
        low = min(v for k, v in p.items() if k != "log-probability error")
        out.append(
            f"| one law (smallest p-value of five tests) | > 0.001 | {low:.2g} | {mark({'met': low > 0.001})} |"
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the table of --quick")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    lines = heads("quick" if args.quick else "heads")
    text = "\n".join(lines if args.quick else [*lines, "### The rest", "", *rest()])
    if not args.write:
        print(text)
        return
    before, _, after = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = after.partition(END)
    PAGE.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
