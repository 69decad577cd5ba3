"""Sampling whole responses from a causal language model.

One loop of our own: inverse-CDF sampling (one uniform number per row and step, so a row's random
numbers do not depend on the other rows), the log-probability under the distribution actually
sampled from, ended rows left out when enough have ended, and prompts that occur several times read
once. Entropy and the most probable tokens of every state can be noted on the way.

How the model's steps are taken is chosen in `decode_start`: a growing cache, a recorded step
on a CPU, a captured one on CUDA. All speak the generic transformers interface only (`input_ids`,
`position_ids`, `attention_mask`, `cache`, `use_cache`; before transformers 5.24 the cache is called
`past_key_values`). Models whose forward takes neither go through their own `generate`.

Shapes: B rows (responses), T response tokens, K kept most probable tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opdsl.train.decode_generate import (
    Notes,
    Sampling,
    by_batching,
    by_generate,
    found,
    until_end,
)
from opdsl.train.decode_replay import forget_captured
from opdsl.train.decode_start import start
from opdsl.train.decode_steps import cache_name
from opdsl.train.memory import is_out_of_memory
from opdsl.train.sampling import Sampler, blocked_head, inverse_cdf, sampling_logprobs

BACKENDS = ("own", "generate_batch")


@dataclass(frozen=True)
class Rollouts:
    """Responses of one batch.

    tokens [B, T] int64: the response, padded with `pad` behind `lengths`
    lengths [B] int64: tokens written, the end token included
    logprobs [B, T] float32: log-probability (nats) of each token under the distribution it was
        drawn from, temperature and truncation included; with greedy decoding under the
        untempered distribution of the model; 0 behind `lengths`
    finished [B] bool: ended by the end token, not by the length cap
    entropy [B, T] float32: nats, of the model's own distribution (temperature 1, not truncated) at
        the state each token was drawn in; 0 behind `lengths`. None: not asked for
    top_ids [B, T, K] int64, top_logprobs [B, T, K] float32: the most probable tokens of the same
        distribution, best first; `pad` and 0 behind `lengths`. None: not asked for
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    logprobs: torch.Tensor
    finished: torch.Tensor
    entropy: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None

    def rows(self) -> list[list[int]]:
        """The responses as lists without padding."""
        tokens, lengths = self.tokens.tolist(), self.lengths.tolist()
        return [row[:n] for row, n in zip(tokens, lengths)]


def decode(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos: int | Sequence[int],
    pad: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    greedy: bool = False,
    entropy: bool = False,
    top: int = 0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    backend: str = "own",
    steps: str = "auto",
) -> Rollouts:
    """Sample one response per prompt.

    prompts: token ids, equally long or ragged (padded on the left here, with a mask and the
    position ids each row would have alone). eos: the end token, or several of them.
    entropy, top: note the entropy and the `top` most probable tokens of every state on the way.
    generator: lives on the CPU, where the uniform numbers are drawn, so that CPU and GPU runs
    use the same ones; None uses torch's own. The model's training mode is put back; no gradient
    is recorded. backend: "own", or "generate_batch" for transformers' continuous batching. steps:
    one of `decode_start.WAYS`, to insist on one.

    Raises ValueError for no prompts, an empty prompt, or settings outside their range,
    NonFiniteLogits (a FloatingPointError) where the model's logits are no distribution, and
    RunProblem where the backend is not to be had.
    """
    _check(prompts, max_new_tokens, temperature, top_p, top_k)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if top < 0:
        raise ValueError(f"top must be at least 0, not {top}")
    stops = (eos,) if isinstance(eos, int) else tuple(eos)
    device = torch.device(device) if device is not None else next(model.parameters()).device
    sampling = Sampling(temperature, top_p, top_k, greedy, entropy, top)
    given = model, list(prompts), max_new_tokens, stops, pad, sampling, generator, device
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.no_grad():
            if backend == "generate_batch":
                sampled = by_batching(*given)
            else:
                with blocked_head(model, len(prompts), max_new_tokens):
                    known = cache_name(model) is not None
                    sampled = _own(*given, steps) if known else by_generate(*given)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            forget_captured(model)
        raise
    finally:
        if was_training:
            model.train()
    return _rollouts(*sampled)


def _check(prompts, max_new_tokens, temperature, top_p, top_k) -> None:
    if len(prompts) == 0:
        raise ValueError("decode needs at least one prompt")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty; a model needs at least one token to go on from")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}; use greedy=True for 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")


class NonFiniteLogits(FloatingPointError):
    """The model's logits gave no distribution; `row` and `position` say where, from 0."""

    def __init__(self, row: int, position: int):
        self.row, self.position = row, position
        super().__init__(
            f"the model's logits for response {row}, position {position} are not finite,"
            " so nothing can be sampled from them"
        )


def check_finite(logprobs_BT: torch.Tensor) -> None:
    """Raise NonFiniteLogits where a log-probability is NaN."""
    bad = torch.isnan(logprobs_BT).nonzero()
    if len(bad):
        raise NonFiniteLogits(*bad[0].tolist())


def _own(model, prompts, max_new, stops, pad, sampling: Sampling, generator, device, way: str):
    """The loop: sample, note, leave out rows that ended, step."""
    B = len(prompts)
    steps, logits_BV = start(model, prompts, max_new, pad, device, way)
    tokens_BT = torch.full((B, max_new), pad, dtype=torch.int64, device=device)
    notes = Notes.empty(B, max_new, sampling, pad, device)
    # Rows of the result that the running rows write; a slice while it is all of them.
    alive: slice | torch.Tensor = slice(None)
    # All uniform numbers at once, row by row: dropping rows changes nobody's numbers, and chunks
    # decoded one after the other from one generator get the numbers the whole batch would.
    uniform_BT = None
    if not sampling.greedy:
        uniform_BT = torch.rand((B, max_new), generator=generator).to(device)

    sample = Sampler(sampling.temperature, sampling.top_p, sampling.top_k, sampling.greedy)
    ended = torch.zeros(B, dtype=torch.bool, device=device)  # of the running rows
    for t in range(max_new):
        token_B, logp_B = sample(logits_BV, None if uniform_BT is None else uniform_BT[alive, t])
        # Rows that ended go on until it pays to leave them out; what they write is cut off below.
        tokens_BT[alive, t] = token_B
        notes.write(alive, t, logp_B, logits_BV)
        if t + 1 == max_new:
            break
        ended |= found(token_B, stops)
        if (t + 1) % steps.look_every == 0:
            running = len(ended) - int(ended.sum())
            if running == 0:
                break
            if running <= (1 - steps.drop_from) * len(ended):
                keep = (~ended).nonzero().squeeze(-1)
                alive = torch.arange(B, device=device)[alive][keep]
                token_B, ended = token_B[keep], ended[keep]
                steps.keep(keep)
        logits_BV = steps.step(token_B)
    steps.close()
    lengths_B, finished_B = until_end(tokens_BT, stops)
    notes.cut(lengths_B, pad)
    inside_BT = torch.arange(max_new, device=device) < lengths_B.unsqueeze(-1)
    return tokens_BT.masked_fill_(~inside_BT, pad), lengths_B, finished_B, notes


def _rollouts(tokens_BT, lengths_B, finished_B, notes: Notes) -> Rollouts:
    check_finite(notes.logprobs_BT)
    T = int(lengths_B.max())

    def cut(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[:, :T]

    return Rollouts(
        tokens_BT[:, :T],
        lengths_B,
        notes.logprobs_BT[:, :T],
        finished_B,
        cut(notes.entropy_BT),
        cut(notes.top_ids_BTK),
        cut(notes.top_logprobs_BTK),
    )


__all__ = [
    "BACKENDS",
    "NonFiniteLogits",
    "Rollouts",
    "cache_name",
    "decode",
    "inverse_cdf",
    "sampling_logprobs",
]
