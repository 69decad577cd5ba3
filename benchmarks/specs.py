"""The methods of the tables as specs, and batches for them.

Nothing here is known to the compiler: a row is a text in the language, as a user would write it,
or the name of a shipped spec.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers import HYBRID
from benchmarks.shapes import Data

LIVE = """
def whitened_return(r : nats per token) : nats per token
  "Return to go with zero mean and unit scale over the batch"
{
  G[t] = r[t] + G[t + 1]
  return (G - mean(G)) / (std(G) + 1e-8)
}

def group_return(r : nats per token) : nats per token
  "Return to go, normalised among the group's rollouts at the same position"
{
  G[t] = r[t] + G[t + 1]
  return (G - mean(i in group: G)) / (std(i in group: G) + 0.0001)
}
"""


def method(body: str, before: str = "", name: str = "bench") -> str:
    return f'opd 1\n{before}\nmethod {name} "Measured" {{\n{body}\n}}\n'


def dense(feedback: str, gate: str = "") -> str:
    return method(
        f"""  param tau : nats in [0, 20] = 1 nats
  state     rollouts(student, group = 4)
  teacher   T = external(access = logits)
  support   full
  feedback  loss {feedback}
  {gate}
  aggregate mean(over = tokens)"""
    )


def served(k: int, support: str, feedback: str) -> str:
    return method(
        f"""  state     rollouts(student, group = 4)
  teacher   T = external(access = top({k}))
  support   {support}
  feedback  loss {feedback}
  aggregate mean(over = tokens)"""
    )


def score(reward: str, credit: str, extra: str = "") -> str:
    return method(
        f"""  state     rollouts(student, group = 4)
  teacher   T = external(access = sampled)
  {extra}
  support   sampled
  feedback  reward {reward}
  credit    {credit}
  aggregate mean(over = tokens)""",
        LIVE,
    )


def hybrid(scored_by: str) -> str:
    """Dense KL behind an entropy gate, return-to-go score, k3 to the initial student, SFT rows.

    scored_by: the teacher the score reads. `S` holds the log-probabilities that were written down
    with the rollouts; `T` reads them off the dense teacher, which then has to run first.
    """
    return method(
        f"""  param tau : nats in [0, 20] = 1 nats
  state     rollouts(student, group = 4)
  teacher   T = external(access = logits)
  teacher   S = external(access = sampled)
  term imitate {{
    support  full
    feedback loss {HYBRID["dense"]} * KL(student || T)
    gate     hesitant(T, tau)
  }}
  term score {{
    support  sampled
    feedback reward {HYBRID["score"]} * logratio({scored_by}, rollout)
    credit   return_to_go
  }}
  term anchor {{
    support  sampled
    feedback loss {HYBRID["reference"]} * k3(student, initial)
  }}
  aggregate  mean(over = tokens)
  regularize {HYBRID["sft"]} * sft(data = golden)"""
    )


SPECS = {
    "reverse KL": dense("KL(student || T)"),
    "forward KL": dense("KL(T || student)"),
    "JSD": dense("JSD(T || student, beta = 0.5)"),
    "sampled": score("logratio(T, rollout)", "immediate"),
    "top-64 truncated": served(64, "top(64, of = T, tail = drop)", "KL(T || student)"),
    "top-64 tail bin": served(64, "top(64, of = T, tail = bin)", "KL(T || student)"),
    "routed": "cr_opd",
    "top-64 renormalised": served(64, "top(64, of = T, tail = renormalize)", "KL(student || T)"),
    "gate known": dense("KL(student || T)", "gate not special(y)"),
    "gate of student": dense("KL(student || T)", "gate H(student) > tau"),
    "returns of rollout": score("logratio(T, rollout)", "return_to_go"),
    "whitened returns": score("logratio(T, student)", "whitened_return"),
    "GAE": score(
        "logratio(T, student)",
        "gae(V = V, gamma = 1, lam = 0.95)",
        "let V : nats per token = critic(init = student, lr = 1e-3, warmup = 20 steps)",
    ),
    "group norm": score("logratio(T, student)", "group_return"),
    "hybrid": hybrid("S"),
    "hybrid, one teacher": hybrid("T"),
}

# what a batch of each row is made with, beside student, tokens and mask
GIVEN = {
    "reverse KL": ("dense",),
    "forward KL": ("dense",),
    "JSD": ("dense",),
    "sampled": ("sampled", "rollout"),
    "top-64 truncated": ("list",),
    "top-64 tail bin": ("list",),
    "routed": ("list32", "sampled", "rollout"),
    "top-64 renormalised": ("list",),
    "gate known": ("dense", "special"),
    "gate of student": ("dense",),
    "returns of rollout": ("sampled", "rollout"),
    "whitened returns": ("sampled", "rollout"),
    "GAE": ("sampled", "rollout", "values"),
    "group norm": ("sampled", "rollout"),
    "hybrid": ("dense", "S", "initial", "rollout", "golden"),
    "hybrid, one teacher": ("dense", "S", "initial", "rollout", "golden"),
}


def compiled(row: str, tau: float | None = None):
    """The method of a row; raises CompileError."""
    import opdsl

    text = SPECS[row]
    knobs = {} if tau is None else {"tau": tau}
    return opdsl.compile(text, knobs) if "\n" in text else opdsl.load(text)


def loss_of(
    row: str, data: Data, tau: float | None = None, torch_compile: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """(h [N, H], W [V, H]) -> the loss: making the batch is part of what is measured."""
    module = compiled(row, tau).loss
    if torch_compile:
        module.compile()
    given, shape = GIVEN[row], data.shape
    mask = torch.ones(shape.B, shape.T, dtype=torch.bool)
    seqs = data.seqs
    more: dict[str, object] = {"group": torch.arange(shape.B) // 4}
    logprobs: dict[str, Tensor] = {}
    if "dense" in given:
        more |= {"teacher_hidden": seqs(data.ht), "teacher_head": data.Wt}
    if "sampled" in given:
        logprobs["T"] = seqs(data.logp_y)
    if "S" in given:
        logprobs["S"] = seqs(data.logp_y)
    if "initial" in given:
        logprobs["initial"] = seqs(data.initial_y)
    k = 32 if "list32" in given else 64
    if "list" in given or "list32" in given:
        more |= {
            "teacher_topk_ids": seqs(data.ids[:, :k]),
            "teacher_topk_logprobs": seqs(data.logp[:, :k]),
        }
    if logprobs:
        more["teacher_logprobs"] = logprobs
    if "rollout" in given:
        more["rollout_logprobs"] = seqs(data.rollout_y)
    if "special" in given:
        more["special"] = seqs(data.special)
    if "values" in given:
        more["values"] = data.values

    def loss(h: Tensor, W: Tensor) -> Tensor:
        from opdsl import Batch

        extra = dict(more)
        if "golden" in given:
            n = len(data.h_gold) // shape.T
            extra["golden"] = Batch.from_hidden(
                data.h_gold.view(n, shape.T, shape.H),
                W,
                tokens=data.y_gold.view(n, shape.T),
                mask=mask[:n],
            )
        batch = Batch.from_hidden(seqs(h), W, tokens=seqs(data.y), mask=mask, **extra)
        return module(batch).loss

    return loss
