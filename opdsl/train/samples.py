"""Records of a few responses token by token, for people: `samples.jsonl`.

One record per shown step: {"step", "names", "rows": [{"prompt", "text", "finished", "values"}]}.
`text` holds the pieces of the response, one per token; `values` one list per name, nats or shares,
rounded to five figures so that equal runs write equal files.

Shapes: N kept tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from opdsl.train.states import Rows

SHOWN = 4  # responses of each shown step
LONGEST = 400  # tokens of a response that are shown

# What is recorded per token, where the method has it.
SHOWN_VALUES = ("signal", "advantage", "gate", "weight", "trigger", "routable")


def shown_rows(rows: Rows, count: int) -> list[int]:
    """The first rows of the first `count` prompts, those the student wrote before others."""
    own = rows.own.tolist()
    order = sorted(range(len(rows)), key=lambda i: not own[i])
    seen: set[int] = set()
    chosen = []
    for i in order:
        group = int(rows.group[i])
        if group not in seen:
            seen.add(group)
            chosen.append(i)
    return chosen[:count]


def token_record(
    step: int,
    rows: Rows,
    chosen: Sequence[int],
    values: Mapping[tuple[str, str], torch.Tensor],
    data: Any,
) -> dict[str, Any]:
    """The record of one step. values: numbers per token [N] of `Instruments`."""
    columns = _columns(values)
    lengths = rows.lengths.tolist()
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    out = []
    for i in chosen:
        count = min(lengths[i], LONGEST)
        window = slice(starts[i], starts[i] + count)
        ids = rows.tokens[i, :count].tolist()
        out.append(
            {
                "prompt": data.prompt_text(rows.prompts[i])[:4000],
                "text": pieces(ids, data),
                "finished": bool(rows.finished[i]),
                "cut": count < lengths[i],
                "values": {k: [_short(x) for x in v[window].tolist()] for k, v in columns.items()},
            }
        )
    return {"step": step, "names": list(columns), "rows": out}


def _columns(values: Mapping[tuple[str, str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The shown quantities under short names; a name carries its owner where there are several."""
    columns = {"log student": values["logp", ""]}
    teachers = [of for what, of in values if what == "logp" and of]
    for name in teachers:
        suffix = "" if len(teachers) == 1 else f" {name}"
        columns[f"log teacher{suffix}"] = values["logp", name]
        columns[f"log-ratio{suffix}"] = values["logp", name] - values["logp", ""]
    for what in SHOWN_VALUES:
        owners = [of for w, of in values if w == what]
        for of in owners:
            columns[what if len(owners) == 1 else f"{what} {of}"] = values[what, of]
    return columns


def pieces(ids: Sequence[int], data: Any) -> list[str]:
    """The text each token adds to a response; tokens that add none are named.

    Decoding grows token by token, because a tokenizer may join or hold back characters; where the
    text changes behind, the token's own text is shown.
    """
    out, before = [], ""
    for i, token in enumerate(ids):
        text = data.response_text(list(ids[: i + 1]))
        if text.startswith(before) and len(text) > len(before):
            out.append(text[len(before) :])
        elif token == getattr(data, "eos", None):
            out.append("⟨end⟩")
        else:
            out.append(data.response_text([token]) or f"⟨{token}⟩")
        before = text
    return out


def _short(x: float) -> float:
    return float(f"{x:.5g}")
