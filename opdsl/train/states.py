"""From a method's `state` section to the rows of one batch.

Each prompt of a batch goes to one of the method's state sources, by its share. Rollouts are
drawn from the student, an older student, or a teacher; sequences come from the data or a
teacher's own writing. Masks come from lengths, never from token ids.

Shapes: B rows, T response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from opdsl.train.memory import within_memory
from opdsl.train.mixed import blend, decode_mixed, interleave
from opdsl.train.rollout import Rollouts, decode
from opdsl.train.streams import allocate, torch_generator


@dataclass(frozen=True)
class Rows:
    """The sequences of one batch.

    prompts: one per row; `.ids` is what the student reads. tokens [B, T] int64, lengths [B],
    mask [B, T] bool. logprobs [B, T]: under the sampling distribution, NaN in rows nobody
    sampled (data). finished [B]: ended by the end token. group [B]: rows of one prompt share a
    number. own [B]: sampled by the student, of now or of some steps ago. responses: what the
    verifier reads (with a forced prefix, if there is one). dropped: rows left out, by reason.
    """

    prompts: list[Any]
    tokens: torch.Tensor
    lengths: torch.Tensor
    logprobs: torch.Tensor
    finished: torch.Tensor
    group: torch.Tensor
    own: torch.Tensor
    responses: list[list[int]]
    dropped: dict[str, int]

    @property
    def mask(self) -> torch.Tensor:
        position_T = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return position_T < self.lengths.unsqueeze(-1)

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, keep: Sequence[int], reason: str) -> Rows:
        """Only the rows `keep`; the others are counted under `reason`."""
        if len(keep) == len(self):
            return self
        index = torch.tensor(list(keep), dtype=torch.int64, device=self.tokens.device)
        dropped = self.dropped | {
            reason: self.dropped.get(reason, 0) + len(self) - len(keep),
        }
        return Rows(
            [self.prompts[i] for i in keep],
            self.tokens[index],
            self.lengths[index],
            self.logprobs[index],
            self.finished[index],
            self.group[index],
            self.own[index],
            [self.responses[i] for i in keep],
            dropped,
        )


class States:
    """Draws the rows of any step; a pure function of (weights, seed, step).

    policy(name) gives the model behind "student", "old" or a teacher; view(name, prompt) the
    prompt tokens that model reads. prompts: how many per step. backend: who samples from one policy
    alone, see `rollout.decode`.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        data,
        *,
        policy: Callable[[str], Any],
        view: Callable[[str, Any], Sequence[int]],
        prompts: int,
        steps: int,
        seed: int,
        vocabulary: int,
        runtime,
        chunk: int | None = None,
        backend: str = "own",
    ):
        self.sources, self.data, self.policy, self.view = tuple(sources), data, policy, view
        self.count, self.steps, self.seed = prompts, steps, seed
        self.vocabulary, self.runtime, self.chunk = vocabulary, runtime, chunk
        self.backend = backend  # who samples for training, see `rollout.decode`
        self.halved = 0  # how often memory ran out while sampling

    def rows(self, step: int) -> Rows:
        """The batch of a step. Rows without tokens or with unusable ids are dropped, counted."""
        shares = [share_at(s.share, step, self.steps) for s in self.sources]
        slots = allocate(shares, self.count, self.seed, step)
        pieces, first_group = [], 0
        for number, source in enumerate(self.sources):
            chosen = [i for i, s in enumerate(slots) if s == number]
            if chosen:
                pieces.append(self._source_rows(source, number, chosen, step, first_group))
                first_group += len(chosen)
        rows = join(pieces, self.data.pad)
        tokens, lengths = rows.tokens.tolist(), rows.lengths.tolist()
        rows = rows.select([i for i, n in enumerate(lengths) if n > 0], "empty")
        # Padded vocabulary rows have weights, so a model can emit ids no tokenizer knows.
        V = self.vocabulary
        known = [i for i, row in enumerate(tokens) if max(row[: lengths[i]], default=0) < V]
        return rows if len(known) == len(tokens) else rows.select(known, "unknown id")

    def _source_rows(self, source, number: int, chosen: list[int], step: int, group0: int) -> Rows:
        if source.policy in ("data", "golden"):
            batch = self.data.sequences if source.policy == "data" else self.data.golden
            prompts = batch(step, self.count)
            chosen_prompts = [drawn_by(prompts[i], source.policy) for i in chosen]
            return sequence_rows(chosen_prompts, self.data.pad, self.runtime.device, group0)
        all_prompts = self.data.prompts(step, self.count)
        prompts = [
            drawn_by(all_prompts[i], source.policy) for i in chosen for _ in range(source.group)
        ]
        forced = [list(p.golden[: source.prefix or 0]) for p in prompts]
        if source.prefix:
            prompts = [extended(p, f) for p, f in zip(prompts, forced)]
        out = self.write(
            source,
            prompts,
            max_new_tokens=min(source.max_tokens or 10**9, self.data.max_new_tokens),
            temperature=source.temperature,
            top_p=source.top_p,
            top_k=source.top_k,
            generator=torch_generator(self.seed, f"rollouts {number}", step),
        )
        group = [group0 + i // source.group for i in range(len(prompts))]
        device = self.runtime.device
        return Rows(
            prompts,
            out.tokens,
            out.lengths,
            out.logprobs,
            out.finished,
            torch.tensor(group, device=device),
            torch.full((len(prompts),), source.policy in ("student", "old"), device=device),
            [f + r for f, r in zip(forced, out.rows())],
            {},
        )

    def sample(self, policy: str, ids: list[Sequence[int]], **settings: Any) -> Rollouts:
        """Responses of one policy to prompts as it reads them, `chunk` rows at a time."""
        return self._chunks(None, [self.policy(policy)], [ids], settings)

    def write(self, source, prompts: list[Any], **settings: Any) -> Rollouts:
        """Responses of a source's policy or policies."""
        who = [name for _, name in source.parts] or [source.policy]
        ids = [[self.view(name, p) for p in prompts] for name in who]
        if not source.parts:  # several policies on one response are our own loop's affair
            settings["backend"] = self.backend
        return self._chunks(source, [self.policy(name) for name in who], ids, settings)

    def _chunks(self, source, models: list[Any], ids: list, settings: dict) -> Rollouts:
        """The generator moves on from chunk to chunk, so equal settings give equal responses.

        Where memory runs out the call begins anew with half the rows at a time.
        """
        generator = settings.get("generator")
        start = generator.get_state() if generator is not None else None

        def smaller() -> bool:
            size = min(self.chunk or len(ids[0]), len(ids[0]))
            if size > 1:
                self.chunk = (size + 1) // 2
                self.halved += 1
                if start is not None:
                    generator.set_state(start)
            return size > 1

        return within_memory(lambda: self._in_chunks(source, models, ids, settings), smaller)

    def _in_chunks(self, source, models: list[Any], ids: list, settings: dict) -> Rollouts:
        count = len(ids[0])
        chunk = self.chunk or count
        settings |= {"eos": self.data.eos, "pad": self.data.pad, "device": self.runtime.device}
        with self.runtime.autocast():
            parts = [
                _write(source, models, [x[i : i + chunk] for x in ids], settings)
                for i in range(0, count, chunk)
            ]
        if len(parts) == 1:
            return parts[0]
        T = max(p.tokens.shape[1] for p in parts)
        return Rollouts(
            torch.cat([pad_to(p.tokens, T, self.data.pad) for p in parts]),
            torch.cat([p.lengths for p in parts]),
            torch.cat([pad_to(p.logprobs, T, 0.0) for p in parts]),
            torch.cat([p.finished for p in parts]),
        )


def _write(source, models: list[Any], ids: list[list[Sequence[int]]], settings: dict) -> Rollouts:
    """One policy alone, several blended, or a draft under a judge."""
    if source is None:
        return decode(models[0], ids[0], **settings)
    if source.policy == "blend":
        return decode_mixed(models, ids, blend([w for w, _ in source.parts]), **settings)
    if source.policy == "interleaved":
        return decode_mixed(models, ids, interleave(source.accept), **settings)
    return decode(models[0], ids[0], **settings)


def drawn_by(prompt: Any, policy: str) -> Any:
    """The prompt, marked with who wrote its response: what `drawn(…)` asks."""
    return replace(prompt, fields={**prompt.fields, "@source": policy})


def share_at(share: Any, step: int, steps: int) -> float:
    """The value of a share that may be a schedule over the run."""
    return float(share.at(max(step, 0), steps)) if hasattr(share, "at") else float(share)


def extended(prompt: Any, forced: list[int]) -> Any:
    """The prompt with the first tokens of a right response appended, for every reader."""
    more = tuple(forced)
    kept: dict[str, Any] = {"forced": more} if hasattr(prompt, "forced") else {}
    if getattr(prompt, "hinted", ()):
        kept["hinted"] = (*prompt.hinted, *more)
    ids, teacher_ids = (*prompt.ids, *more), (*prompt.teacher_ids, *more)
    return replace(prompt, ids=ids, teacher_ids=teacher_ids, **kept)


def sequence_rows(prompts: list[Any], pad: int, device, group0: int = 0) -> Rows:
    """Rows that imitate each prompt's golden response; nobody sampled them."""
    golden = [list(p.golden) for p in prompts]
    T = max(1, max(map(len, golden)))
    tokens_BT = torch.tensor([g + [pad] * (T - len(g)) for g in golden], device=device)
    lengths_B = torch.tensor([len(g) for g in golden], device=device)
    B = len(prompts)
    return Rows(
        prompts,
        tokens_BT,
        lengths_B,
        torch.full((B, T), torch.nan, device=device),
        torch.ones(B, dtype=torch.bool, device=device),
        torch.arange(group0, group0 + B, device=device),
        torch.zeros(B, dtype=torch.bool, device=device),
        golden,
        {},
    )


def join(pieces: list[Rows], pad: int) -> Rows:
    """Several sources in one batch, padded to the longest."""
    if len(pieces) == 1:
        return pieces[0]
    T = max(p.tokens.shape[1] for p in pieces)
    return Rows(
        [prompt for p in pieces for prompt in p.prompts],
        torch.cat([pad_to(p.tokens, T, pad) for p in pieces]),
        torch.cat([p.lengths for p in pieces]),
        torch.cat([pad_to(p.logprobs, T, 0.0) for p in pieces]),
        torch.cat([p.finished for p in pieces]),
        torch.cat([p.group for p in pieces]),
        torch.cat([p.own for p in pieces]),
        [response for p in pieces for response in p.responses],
        {},
    )


def pad_to(values_BT: torch.Tensor, T: int, fill: float) -> torch.Tensor:
    return torch.nn.functional.pad(values_BT, (0, T - values_BT.shape[1]), value=fill)
