"""Responses that two policies write together, token by token.

`blend` draws every token from Σ_i w_i π_i, as MiniLLM's sampler does (arXiv 2306.08543).
`interleave` lets a draft propose and keeps its token where a judge has it among its top k; else
the judge draws (SKD, arXiv 2410.11325). Each policy reads its own prompt, so a teacher with more
context can take part.

Shapes: B rows, T response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opdsl.train.decode_generate import found
from opdsl.train.rollout import (
    Rollouts,
    cache_name,
    check_finite,
    inverse_cdf,
    sampling_logprobs,
)


@dataclass
class _Reader:
    """One model on its prompts, a key-value cache behind it."""

    model: Any
    ids_BP: torch.Tensor
    mask_BP: torch.Tensor
    cache: Any = None
    width: int | None = None

    def start(self) -> torch.Tensor:
        position_BP = (self.mask_BP.cumsum(-1) - 1).clamp(min=0)
        return self._run(self.ids_BP, position_BP)

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        self.mask_BP = torch.cat([self.mask_BP, self.mask_BP.new_ones(len(token_B), 1)], 1)
        return self._run(token_B[:, None], self.mask_BP.sum(-1, keepdim=True) - 1)

    @property
    def held(self) -> str:
        name = cache_name(self.model)
        assert name is not None
        return name

    def _run(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        out = self.model(
            input_ids=ids, attention_mask=self.mask_BP, position_ids=position,
            **{self.held: self.cache}, use_cache=True,
        )  # fmt: skip
        self.cache = getattr(out, self.held)
        logits_BV = out.logits[:, -1]
        return logits_BV if self.width is None else logits_BV[:, : self.width]


# From the log-probabilities [B, V] of each policy and two uniform numbers [B, 2]: the token [B]
# and its log-probability under what drew it.
Rule = Callable[[list[torch.Tensor], torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def blend(shares: Sequence[float]) -> Rule:
    """Every token from Σ_i w_i π_i; the recorded log-probability is the mixture's."""

    def rule(logps: list[torch.Tensor], uniform_B2: torch.Tensor):
        parts = [logp + torch.log(torch.tensor(w)) for w, logp in zip(shares, logps) if w > 0]
        mixed_BV = torch.logsumexp(torch.stack(parts), 0)
        token_B = inverse_cdf(mixed_BV, uniform_B2[:, 0])
        return token_B, mixed_BV.gather(-1, token_B[:, None]).squeeze(-1)

    return rule


def interleave(k: int) -> Rule:
    """The draft's token where the judge has it among its top k, else one of the judge's."""

    def rule(logps: list[torch.Tensor], uniform_B2: torch.Tensor):
        draft_BV, judge_BV = logps
        token_B = inverse_cdf(draft_BV, uniform_B2[:, 0])
        best_BK = judge_BV.topk(min(k, judge_BV.shape[-1]), -1).indices
        kept_B = (best_BK == token_B[:, None]).any(-1)
        token_B = torch.where(kept_B, token_B, inverse_cdf(judge_BV, uniform_B2[:, 1]))
        drawn_BV = torch.where(kept_B[:, None], draft_BV, judge_BV)
        return token_B, drawn_BV.gather(-1, token_B[:, None]).squeeze(-1)

    return rule


def decode_mixed(
    models: Sequence[Any],
    prompts: Sequence[Sequence[Sequence[int]]],
    rule: Rule,
    *,
    max_new_tokens: int,
    eos: int | Sequence[int],
    pad: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Rollouts:
    """One response per row. prompts[i] are the rows' prompts as models[i] reads them.

    Temperature and truncation apply to each policy before they are mixed. Raises ValueError for a
    model without a key-value cache, NonFiniteLogits as `decode` does.
    """
    for model in models:
        if cache_name(model) is None:
            raise ValueError("a mixed sampler needs models with a key-value cache")
    device = torch.device(device) if device is not None else next(models[0].parameters()).device
    stops = (eos,) if isinstance(eos, int) else tuple(eos)
    training = [m.training for m in models]
    for m in models:
        m.eval()
    try:
        with torch.no_grad():
            readers = [_Reader(m, *_padded(p, pad, device)) for m, p in zip(models, prompts)]
            settings = (temperature, top_p, top_k)
            return _loop(readers, rule, max_new_tokens, stops, pad, settings, generator, device)
    finally:
        for m, was in zip(models, training):
            m.train(was)


def _loop(readers, rule, max_new, stops, pad, settings, generator, device) -> Rollouts:
    B = len(readers[0].ids_BP)
    tokens_BT = torch.full((B, max_new), pad, dtype=torch.int64, device=device)
    logprobs_BT = torch.zeros((B, max_new), device=device)
    lengths_B = torch.zeros(B, dtype=torch.int64, device=device)
    finished_B = torch.zeros(B, dtype=torch.bool, device=device)
    uniform_BT2 = torch.rand((B, max_new, 2), generator=generator).to(device)
    logits = [r.start() for r in readers]
    width = min(x.shape[-1] for x in logits)  # heads padded to different widths share the rest
    for r in readers:
        r.width = width
    logits = [x[:, :width] for x in logits]
    for t in range(max_new):
        logps = [sampling_logprobs(x, *settings) for x in logits]
        token_B, logp_B = rule(logps, uniform_BT2[:, t])
        open_B = ~finished_B
        tokens_BT[:, t] = torch.where(open_B, token_B, tokens_BT[:, t])
        logprobs_BT[:, t] = torch.where(open_B, logp_B, logprobs_BT[:, t])
        lengths_B += open_B
        finished_B |= open_B & found(token_B, stops)
        if t + 1 == max_new or bool(finished_B.all()):
            break
        logits = [r.step(token_B) for r in readers]
    check_finite(logprobs_BT)
    T = int(lengths_B.max())
    return Rollouts(tokens_BT[:, :T], lengths_B, logprobs_BT[:, :T], finished_B)


def _padded(prompts, pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [B, P], padded on the left."""
    longest = max(map(len, prompts))
    rows = [[pad] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)
