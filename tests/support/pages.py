"""A finished run whose every text tries to become markup, and a strict reader of pages."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import opdsl
from opdsl.train import html_report
from opdsl.train.loop import Summary
from opdsl.train.plan import make_plan
from opdsl.train.settings import RunSettings

EVIL = (
    "</script></style><img src=x onerror=alert(1)>\"'><svg onload=alert(2)>&lt;b>\x00\ud800\n\tend"
)
SECRET = "s3cr3t-of-mine-0123456789"
VOID = {"meta", "br", "hr", "img", "input", "link"}


def finished(out: Path, name: str = "cr_opd", steps: int = 80, **settings: Any) -> str:
    """`report.html` of a run that never took place, as text; its files lie in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    method = opdsl.load(name)
    words = ("opdsl", "run", name, "--teacher", f"http://me:{SECRET}@host/", "--api-key", SECRET)
    plan = make_plan(method, RunSettings(out=str(out), steps=steps, words=words, **settings))
    values = {"log student": [-1.0, -2.0], "log teacher": [-3.0, -1.0], "log-ratio": [-2.0, 1.0],
              "advantage": [-2.0, 1.0], "gate": [0.0, 1.0], "trigger": [1.0, 0.0],
              "routable": [1.0, 1.0]}  # fmt: skip
    row = {"prompt": EVIL, "text": [EVIL, "!"], "finished": False, "cut": True, "values": values}
    shown = [{"step": s, "names": list(values), "rows": [row]} for s in (1, 40, steps)]
    timings = [{"step": s, "seconds": 1.0, "tokens_per_second": 9.0, "rollouts": 0.4, "teachers": 0.6}
               for s in range(1, steps + 1)]  # fmt: skip
    for file, lines in (("samples", shown), ("timings", timings)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (out / f"{file}.jsonl").write_text(text, encoding="utf-8")
    record = lambda s: {  # noqa: E731
        "step": s, "rows": 4, "tokens": 40, "loss": 1.0 / s, "kl": 2.0 / s, "kl_teacher": 3.0 / s,
        "reward": min(1.0, s / 50), "advantage_mean": -1.0 / s, "advantage_std": 0.5, "length": 5.0,
        f"reward/{EVIL}": 0.5, f"kept/{EVIL}": 0.5, "entropy": None, "truncated": 0.25,
        "clipped_strength": 0.25,
    }  # fmt: skip
    metrics = [record(s) for s in range(1, steps + 1)]
    summary = a_summary(plan, out, metrics)
    return html_report.render(
        out, summary, method, plan, {"weights of T": "ab" * 32}, metrics, [EVIL]
    )


def a_summary(plan: Any, out: Path, metrics: list[dict[str, Any]]) -> Summary:
    measured = lambda x: {  # noqa: E731
        "accuracy": x, "interval": [x - 0.05, x + 0.05], "judged": 100, "length": 5.0,
        "finished": 1.0, "errors": 0,
    }  # fmt: skip
    evals = [
        {"step": s, "sets": {"held-out": {"greedy": measured(x), "sampled": measured(x / 2)}},
         "samples": [EVIL]}
        for s, x in ((0, 0.1), (len(metrics), 0.9))
    ]  # fmt: skip
    return Summary(
        method=plan.method, title=EVIL, fingerprints=plan.fingerprints, task=plan.task,
        student=plan.student, teachers={"T": f"http://me:{SECRET}@host/{EVIL}"}, data=None, seed=0,
        pair_seed=0, steps=len(metrics), rows_per_step=4, parameters=10, device="cpu fp32",
        evals=evals, last=metrics[-1], counts={EVIL: 3}, notes=[EVIL],
        seconds={"loading": 1.0, "training": 2.0, "evaluating": 3.0}, out=str(out),
    )  # fmt: skip


class Strict(HTMLParser):
    """Every element of a page; tags that are not closed in order are an error."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[SimpleNamespace] = []

    def handle_starttag(self, tag, attrs):
        names = [k for k, _ in attrs]
        assert len(set(names)) == len(names), f"an attribute of {tag} stands twice"
        self.elements.append(SimpleNamespace(tag=tag, attributes=dict(attrs), text=""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(SimpleNamespace(tag=tag, attributes=dict(attrs), text=""))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.elements:
            self.elements[-1].text += data


def parsed(page: str) -> list[SimpleNamespace]:
    reader = Strict()
    reader.feed(page)
    reader.close()
    assert not reader.open, f"never closed: {reader.open}"
    return reader.elements
