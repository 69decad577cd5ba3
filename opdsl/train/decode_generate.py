"""Responses from transformers' own loops: `generate`, and `generate_batch` of continuous batching.

`generate` serves models whose cache we do not know. `generate_batch` schedules requests of very
different lengths over paged key-value memory; what it sampled is scored in a pass of ours, so that
log-probabilities are those of the model as it is trained.

Shapes: B rows, P prompt tokens, T response tokens, V vocabulary, K kept most probable tokens.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdsl.train.decode_start import left_pad
from opdsl.train.errors import problem
from opdsl.train.sampling import own_entropy, own_top, sampling_logprobs

SCORED = 1 << 28  # bytes of logits at once in the scoring pass


@dataclass(frozen=True)
class Sampling:
    """What a response is drawn from, and what is noted of it on the way.

    entropy, top: the entropy and the `top` most probable tokens of the model's own distribution.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    greedy: bool = False
    entropy: bool = False
    top: int = 0

    @property
    def truncated(self) -> bool:
        return not self.greedy and (self.top_p < 1.0 or self.top_k is not None)

    def logprobs(self, logits_BV: Tensor) -> Tensor:
        """Log-probabilities [B, V] a token is recorded with; greedy: the model's own."""
        if self.greedy:
            return logits_BV.float().log_softmax(-1)
        return sampling_logprobs(logits_BV, self.temperature, self.top_p, self.top_k)

    def for_transformers(self) -> dict[str, Any]:
        if self.greedy:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": float(self.temperature),
            "top_p": self.top_p,
            "top_k": self.top_k or 0,
        }


@dataclass
class Notes:
    """What is kept of every response token; None where it was not asked for."""

    logprobs_BT: Tensor
    entropy_BT: Tensor | None
    top_ids_BTK: Tensor | None
    top_logprobs_BTK: Tensor | None

    @classmethod
    def empty(cls, B: int, T: int, sampling: Sampling, pad: int, device) -> Notes:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        K = sampling.top
        ids = torch.full((B, T, K), pad, dtype=torch.int64, device=device) if K else None
        return cls(
            zeros(B, T),
            zeros(B, T) if sampling.entropy else None,
            ids,
            zeros(B, T, K) if K else None,
        )

    def write(self, rows, t: int, logp_n: Tensor, logits_nV: Tensor) -> None:
        """Note one token of each of `rows` (an index)."""
        self.logprobs_BT[rows, t] = logp_n
        if self.entropy_BT is not None:
            self.entropy_BT[rows, t] = own_entropy(logits_nV)
        if self.top_ids_BTK is not None and self.top_logprobs_BTK is not None:
            ids_nK, logp_nK = own_top(logits_nV, self.top_ids_BTK.shape[-1])
            self.top_ids_BTK[rows, t], self.top_logprobs_BTK[rows, t] = ids_nK, logp_nK

    def cut(self, lengths_B: Tensor, pad: int) -> None:
        """Nothing behind the lengths: rows that had ended were written on."""
        T = self.logprobs_BT.shape[1]
        behind_BT = torch.arange(T, device=lengths_B.device) >= lengths_B.unsqueeze(-1)
        self.logprobs_BT.masked_fill_(behind_BT, 0.0)
        if self.entropy_BT is not None:
            self.entropy_BT.masked_fill_(behind_BT, 0.0)
        if self.top_ids_BTK is not None and self.top_logprobs_BTK is not None:
            self.top_ids_BTK.masked_fill_(behind_BT.unsqueeze(-1), pad)
            self.top_logprobs_BTK.masked_fill_(behind_BT.unsqueeze(-1), 0.0)


def found(tokens: Tensor, stops: Sequence[int]) -> Tensor:
    """Boolean tensor: the token is one of the end tokens."""
    result = tokens == stops[0]
    for stop in stops[1:]:
        result = result | (tokens == stop)
    return result


def until_end(tokens_BT: Tensor, stops: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Lengths [B] up to the first end token, it included, and whether there is one."""
    is_end_BT = found(tokens_BT, stops)
    finished_B = is_end_BT.any(-1)
    first_B = is_end_BT.int().argmax(-1) + 1
    return torch.where(finished_B, first_B, tokens_BT.shape[1]), finished_B


Sampled = tuple[Tensor, Tensor, Tensor, Notes]
"""tokens [B, T], padded behind their lengths [B]; finished [B]; what was noted."""


def by_generate(model, prompts, max_new, stops, pad, sampling: Sampling, generator, device):
    """Responses by `model.generate`, for recurrent and other models without our cache.

    `generate` draws from torch's global generator, so that one is seeded from ours for the
    duration and put back afterwards.
    """
    ids_BP, mask_BP = left_pad(prompts, pad, device)
    if mask_BP is None:
        mask_BP = torch.ones_like(ids_BP, dtype=torch.bool)
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
            **sampling.for_transformers(),
        )
    tokens_BT = out.sequences[:, ids_BP.shape[1] :].clone()
    B, T = tokens_BT.shape
    lengths_B, finished_B = until_end(tokens_BT, stops)
    notes = Notes.empty(B, T, sampling, pad, device)
    every = torch.arange(B, device=device)
    for t, logits_BV in enumerate(out.logits):
        logp_BV = sampling.logprobs(logits_BV)
        logp_B = logp_BV.gather(-1, tokens_BT[:, t : t + 1]).squeeze(-1)
        notes.write(every, t, logp_B, logits_BV)
    notes.cut(lengths_B, pad)
    inside_BT = torch.arange(T, device=device) < lengths_B.unsqueeze(-1)
    return tokens_BT.masked_fill(~inside_BT, pad), lengths_B, finished_B, notes


# ---- continuous batching ----------------------------------------------------------------------


def check_batching(model) -> None:
    """Raise RunProblem OPD701 unless transformers can batch continuously for this model."""
    import transformers

    if not hasattr(model, "generate_batch"):
        raise problem(
            "OPD701",
            "rollout.backend = generate_batch needs a model of transformers 5 with continuous"
            f" batching; {type(model).__name__} of transformers {transformers.__version__} has none",
            helps=["leave rollout.backend out for opdsl's own loop"],
        )


def by_batching(model, prompts, max_new, stops, pad, sampling: Sampling, generator, device):
    """Responses by `model.generate_batch`; log-probabilities from a scoring pass.

    Raises RunProblem OPD701 where it is missing, refuses a setting or leaves a prompt unanswered.
    """
    check_batching(model)
    from transformers import GenerationConfig

    seed = int(torch.randint(2**31, (1,), generator=generator))
    config = GenerationConfig(
        max_new_tokens=max_new,
        eos_token_id=list(stops),
        pad_token_id=pad,
        **sampling.for_transformers(),
    )
    longest = max(map(len, prompts))
    batching = _batching_config(seed, len(prompts), longest, max_new, device)
    arguments = {"progress_bar": False, "continuous_batching_config": batching}
    taken = inspect.signature(model.generate_batch).parameters
    arguments = {k: v for k, v in arguments.items() if k in taken and v is not None}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _quiet():
        torch.manual_seed(seed)
        try:
            out = model.generate_batch(
                [list(p) for p in prompts], generation_config=config, **arguments
            )
        except Exception as error:  # the scheduler's own, of many types
            raise _failed(f"{type(error).__name__}: {error}") from error
    answers = list(out.values())
    errors = [a.error for a in answers if a.error is not None]
    if len(answers) < len(prompts) or errors:
        missing = len(prompts) - len(answers) + len(errors)
        raise _failed(f"{missing} of {len(prompts)} prompts have no response; {errors[:1]}")
    return _scored(model, prompts, [a.generated_tokens for a in answers], stops, pad, sampling)


def _scored(model, prompts, rows: list[list[int]], stops, pad: int, sampling: Sampling) -> Sampled:
    """Rows cut behind their first end token, with what a teacher-forced pass says of them."""
    device = next(model.parameters()).device
    cut = []
    for row in rows:
        ends = [i for i, token in enumerate(row) if token in stops]
        cut.append(list(row[: ends[0] + 1] if ends else row))
    T = max(map(len, cut))
    padded = [row + [pad] * (T - len(row)) for row in cut]
    tokens_BT = torch.tensor(padded, dtype=torch.int64, device=device)
    lengths_B = torch.tensor([len(row) for row in cut], device=device)
    finished_B = torch.tensor([bool(row) and row[-1] in stops for row in cut], device=device)
    notes = score(model, prompts, tokens_BT, lengths_B, pad, sampling)
    return tokens_BT, lengths_B, finished_B, notes


def score(model, prompts, tokens_BT: Tensor, lengths_B: Tensor, pad: int, sampling: Sampling):
    """Notes on given responses, from passes over prompts and responses together."""
    B, T = tokens_BT.shape
    device = tokens_BT.device
    notes = Notes.empty(B, T, sampling, pad, device)
    ids_BP, mask_BP = left_pad(prompts, pad, device)
    if mask_BP is None:
        mask_BP = torch.ones_like(ids_BP, dtype=torch.bool)
    inside_BT = torch.arange(T, device=device) < lengths_B.unsqueeze(-1)
    ids_BS = torch.cat([ids_BP, tokens_BT], 1)
    mask_BS = torch.cat([mask_BP, inside_BT], 1).long()
    position_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
    chunk = max(1, SCORED // (4 * T * model.config.get_text_config().vocab_size))
    for start in range(0, B, chunk):
        part = slice(start, start + chunk)
        logits = model(
            input_ids=ids_BS[part],
            attention_mask=mask_BS[part],
            position_ids=position_BS[part],
            use_cache=False,
        ).logits[:, -T - 1 : -1]
        rows = torch.arange(B, device=device)[part]
        for t in range(T):
            token_n1 = tokens_BT[part, t : t + 1]
            logp_n = _kept_with(sampling.logprobs(logits[:, t]), logits[:, t], token_n1, sampling)
            notes.write(rows, t, logp_n, logits[:, t])
    notes.cut(lengths_B, pad)
    return notes


def _kept_with(logp_nV: Tensor, logits_nV: Tensor, token_n1: Tensor, sampling: Sampling) -> Tensor:
    """log p [n] of tokens; one that rounding put just outside the nucleus counts as inside it."""
    logp_n1 = logp_nV.gather(-1, token_n1)
    if sampling.truncated:
        z_nV = logits_nV.float() / sampling.temperature
        kept_nV = z_nV.masked_fill(torch.isinf(logp_nV), -torch.inf).scatter(
            -1, token_n1, z_nV.gather(-1, token_n1)
        )
        outside_n1 = torch.isinf(logp_n1)
        logp_n1 = torch.where(outside_n1, kept_nV.log_softmax(-1).gather(-1, token_n1), logp_n1)
    return logp_n1.squeeze(-1)


PAGE = 256  # tokens of one block of paged memory, transformers' default


def _batching_config(seed: int, rows: int, longest: int, max_new: int, device) -> Any:
    """Seeded, and refusing what it cannot do; None where transformers has no such configuration.

    Left to itself it takes most of the free memory, which on a CPU is the machine's.
    """
    try:
        from transformers import ContinuousBatchingConfig
    except ImportError:
        return None
    wanted: dict[str, Any] = {"seed": seed, "drop_unsupported_processors": False}
    if device.type == "cpu":
        wanted["num_blocks"] = rows * (-(-(longest + max_new) // PAGE) + 1)
        wanted["max_batch_tokens"] = min(8192, max(256, rows * longest))
    taken = inspect.signature(ContinuousBatchingConfig).parameters
    return ContinuousBatchingConfig(**{k: v for k, v in wanted.items() if k in taken})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the scheduler's remarks on its own warming up; errors are raised by us."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _failed(why: str):
    return problem(
        "OPD701",
        f"generate_batch failed: {why}",
        helps=["leave rollout.backend out for opdsl's own loop"],
    )
