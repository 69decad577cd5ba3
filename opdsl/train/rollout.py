"""Sampling whole responses from a causal language model.

One key-value-cache loop of our own: inverse-CDF sampling (one uniform number per row and
step, so a row's random numbers do not depend on the other rows), the log-probability under
the distribution actually sampled from, finished rows dropped from the batch a quarter at a time,
and prompts that occur several times run through the model once.

It speaks the generic transformers interface only (`input_ids`, `position_ids`,
`attention_mask`, `cache`, `use_cache`; before transformers 5.24 the cache is called
`past_key_values`). Models whose forward takes neither go through their own `generate`.

Shapes: B rows (responses), U different prompts, P prompt tokens, T response tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opdsl.train.cache import make_room
from opdsl.train.sampling import Sampler, blocked_head, inverse_cdf, sampling_logprobs


@dataclass(frozen=True)
class Rollouts:
    """Responses of one batch.

    tokens [B, T] int64: the response, padded with `pad` behind `lengths`
    lengths [B] int64: tokens written, the end token included
    logprobs [B, T] float32: log-probability (nats) of each token under the distribution it was
        drawn from, temperature and truncation included; with greedy decoding under the
        untempered distribution of the model; 0 behind `lengths`
    finished [B] bool: ended by the end token, not by the length cap
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    logprobs: torch.Tensor
    finished: torch.Tensor

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
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Rollouts:
    """Sample one response per prompt.

    prompts: token ids, equally long or ragged (padded on the left here, with a mask and the
    position ids each row would have alone). eos: the end token, or several of them.
    generator: lives on the CPU, where the uniform numbers are drawn, so that CPU and GPU runs
    use the same ones; None uses torch's own. The model's training mode is put back; no gradient
    is recorded.

    Raises ValueError for no prompts, an empty prompt, or settings outside their range, and
    NonFiniteLogits (a FloatingPointError) where the model's logits are no distribution.
    """
    _check(prompts, max_new_tokens, temperature, top_p, top_k)
    stops = (eos,) if isinstance(eos, int) else tuple(eos)
    device = torch.device(device) if device is not None else next(model.parameters()).device
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.no_grad(), blocked_head(model, len(prompts), max_new_tokens):
            settings = (temperature, top_p, top_k, greedy)
            loop = _cached_loop if cache_name(model) else _hf_generate
            return loop(model, prompts, max_new_tokens, stops, pad, settings, generator, device)
    finally:
        if was_training:
            model.train()


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


def _check_finite(logprobs_BT: torch.Tensor) -> None:
    bad = torch.isnan(logprobs_BT).nonzero()
    if len(bad):
        raise NonFiniteLogits(*bad[0].tolist())


def cache_name(model) -> str | None:
    """What the key-value cache is called, as an argument and in the output; None: there is none.

    transformers 5.24 renamed `past_key_values` to `cache`; the old name goes with 5.40.
    """
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), None)


def _is_any(tokens: torch.Tensor, stops: tuple[int, ...]) -> torch.Tensor:
    """Boolean tensor: the token is one of the end tokens."""
    found = tokens == stops[0]
    for stop in stops[1:]:
        found = found | (tokens == stop)
    return found


def _left_pad(prompts, pad: int, device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """ids [U, P] and mask [U, P] (None where all prompts are equally long)."""
    longest = max(map(len, prompts))
    ids_UP = torch.tensor(
        [[pad] * (longest - len(p)) + list(p) for p in prompts], dtype=torch.int64, device=device
    )
    if all(len(p) == longest for p in prompts):
        return ids_UP, None
    # The mask comes from the lengths: a prompt may well contain the pad id.
    lengths_U1 = torch.tensor([[len(p)] for p in prompts], device=device)
    return ids_UP, torch.arange(longest, device=device) >= longest - lengths_U1


PACK = 0.25  # share of ended rows from which it pays to copy the cache without them


def _cached_loop(model, prompts, max_new, stops, pad, settings, generator, device) -> Rollouts:
    temperature, top_p, top_k, greedy = settings
    B = len(prompts)
    index: dict[tuple[int, ...], int] = {}
    row_of_B = [index.setdefault(tuple(p), len(index)) for p in prompts]
    ids_UP, mask_UP = _left_pad(list(index), pad, device)

    arguments = {"input_ids": ids_UP, "use_cache": True, "logits_to_keep": 1}
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        del arguments["logits_to_keep"]
    mask_BL = position_B1 = None
    if mask_UP is not None:
        position_UP = (mask_UP.long().cumsum(-1) - 1).clamp(min=0)
        arguments |= {"attention_mask": mask_UP.long(), "position_ids": position_UP}
    held = cache_name(model)
    assert held is not None
    out = model(**arguments)
    cache, logits_BV = getattr(out, held), out.logits[:, -1]
    if len(index) < B:
        rows = torch.tensor(row_of_B, device=device)
        cache.batch_select_indices(rows)
        logits_BV = logits_BV[rows]
        if mask_UP is not None:
            mask_UP, position_UP = mask_UP[rows], position_UP[rows]
    if mask_UP is not None:
        mask_BL, position_B1 = mask_UP.long(), position_UP[:, -1:]

    tokens_BT = torch.full((B, max_new), pad, dtype=torch.int64, device=device)
    logprobs_BT = torch.zeros((B, max_new), dtype=torch.float32, device=device)
    lengths_B = torch.zeros(B, dtype=torch.int64, device=device)
    finished_B = torch.zeros(B, dtype=torch.bool, device=device)
    alive = torch.arange(B, device=device)  # row of the result that each running row writes
    # All uniform numbers at once, row by row: dropping rows changes nobody's numbers, and chunks
    # decoded one after the other from one generator get the numbers the whole batch would.
    uniform_BT = None if greedy else torch.rand((B, max_new), generator=generator).to(device)

    make_room(cache, max_new)
    sample = Sampler(temperature, top_p, top_k, greedy)
    for t in range(max_new):
        token_B, logp_B = sample(logits_BV, None if uniform_BT is None else uniform_BT[alive, t])
        open_B = ~finished_B[alive]
        # rows that ended before are still computed until enough of them have: see PACK
        tokens_BT[alive, t] = torch.where(open_B, token_B, pad)
        logprobs_BT[alive, t] = torch.where(open_B, logp_B, 0.0)
        lengths_B[alive] += open_B
        finished_B[alive] |= _is_any(token_B, stops)
        keep = (~finished_B[alive]).nonzero().squeeze(-1)
        if t + 1 == max_new or len(keep) == 0:
            break
        if len(keep) <= (1 - PACK) * len(alive):
            alive, token_B = alive[keep], token_B[keep]
            cache.batch_select_indices(keep)
            if mask_BL is not None:
                mask_BL, position_B1 = mask_BL[keep], position_B1[keep]
        step = {"input_ids": token_B.unsqueeze(-1), held: cache, "use_cache": True}
        if mask_BL is not None:
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(alive), 1)], 1)
            position_B1 = position_B1 + 1
            step |= {"attention_mask": mask_BL, "position_ids": position_B1}
        out = model(**step)
        cache, logits_BV = getattr(out, held), out.logits[:, -1]

    _check_finite(logprobs_BT)
    T = int(lengths_B.max())
    return Rollouts(tokens_BT[:, :T], lengths_B, logprobs_BT[:, :T], finished_B)


def _hf_generate(model, prompts, max_new, stops, pad, settings, generator, device) -> Rollouts:
    """The same through `model.generate`, for recurrent and other models without this cache.

    `generate` draws from torch's global generator, so that one is seeded from ours for the
    duration and put back afterwards.
    """
    temperature, top_p, top_k, greedy = settings
    ids_BP, mask_BP = _left_pad(prompts, pad, device)
    if mask_BP is None:
        mask_BP = torch.ones_like(ids_BP, dtype=torch.bool)
    chosen: dict = {"do_sample": False}
    if not greedy:
        chosen = {
            "do_sample": True,
            "temperature": float(temperature),
            "top_p": top_p,
            "top_k": top_k or 0,
        }
    seed = int(torch.randint(2**62, (1,), generator=generator))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids_BP,
            attention_mask=mask_BP.long(),
            max_new_tokens=max_new,
            eos_token_id=list(stops),
            pad_token_id=pad,
            return_dict_in_generate=True,
            output_logits=True,
            **chosen,
        )
    tokens_BT = out.sequences[:, ids_BP.shape[1] :].clone()
    is_eos_BT = _is_any(tokens_BT, stops)
    finished_B = is_eos_BT.any(-1)
    T = tokens_BT.shape[1]
    lengths_B = torch.where(finished_B, is_eos_BT.int().argmax(-1) + 1, T)
    logprobs_BT = torch.zeros(tokens_BT.shape, dtype=torch.float32, device=device)
    for t, logits_BV in enumerate(out.logits):
        logp_BV = (
            logits_BV.float().log_softmax(-1)
            if greedy
            else sampling_logprobs(logits_BV, temperature, top_p, top_k)
        )
        logprobs_BT[:, t] = logp_BV.gather(-1, tokens_BT[:, t : t + 1]).squeeze(-1)
    _check_finite(logprobs_BT)
    inside_BT = torch.arange(T, device=device) < lengths_B.unsqueeze(-1)
    return Rollouts(
        tokens_BT.masked_fill(~inside_BT, pad),
        lengths_B,
        logprobs_BT.masked_fill(~inside_BT, 0.0),
        finished_B,
    )


__all__ = [
    "NonFiniteLogits",
    "Rollouts",
    "cache_name",
    "decode",
    "inverse_cdf",
    "sampling_logprobs",
]
