"""A model of this process as the answer to scoring requests: what `opdsl serve` runs.

Two routes, as in the trainer. Up to a vocabulary of FUSED_FROM words the model gives logits and the
numbers are taken from them exactly as a loss takes them from a teacher in its own process, so that
training with either is equal to the last bit. Above, hidden states go through the head one tile at
a time (`linear_score`): float32 logits, and never a tensor with an entry per word and position.

An answer depends on its request alone, not on what else is being asked.

Shapes: R rows, S tokens of prompt and response, T response tokens, N response tokens of several
rows, K ids, V vocabulary, H hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from opdsl.emit.kernels.linear_logprobs import linear_score
from opdsl.emit.prelude import Dense, top
from opdsl.train import models
from opdsl.train.teachers.local import response_hidden, response_logits
from opdsl.train.teachers.wire import BadMessage, Row, RowScores, Want

FUSED_FROM = 16_384  # vocabulary size above which no tensor of tokens × words is made
HASHED_WHOLE = 200_000_000  # parameters up to which every weight goes into the fingerprint
SAMPLED = 4096  # numbers of each larger tensor that do


class Scorer:
    """Scores rows with one model.

    name: what the model is called in answers. max_batch_tokens: most tokens, padding included, in
    one forward pass; it may shrink when memory runs out.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, max_batch_tokens: int = 16_384):
        self.model, self.name, self.max_batch_tokens = model, name, max_batch_tokens
        self.rows = models.head_of(model).weight.shape[0]
        self.device = models.head_of(model).weight.device
        self.context = models.context_limit(models.bare(model).config)
        self.tokenizer = models.tokenizer_hash(tokenizer) if tokenizer is not None else None
        known = max(tokenizer.get_vocab().values()) + 1 if tokenizer is not None else self.rows
        self.vocabulary = min(self.rows, known)
        self.weights = fingerprint(model)
        self.head = models.known_head(model, self.vocabulary)
        self.width = models.head_of(model).weight.shape[1]
        self.parameters = models.count_parameters(model)

    @property
    def fused(self) -> bool:
        return self.vocabulary > FUSED_FROM and self.head is not None

    def info(self) -> dict[str, Any]:
        """What a client must know before it asks."""
        return {
            "id": self.name,
            "object": "model",
            "vocabulary": self.vocabulary,
            "vocabulary_rows": self.rows,
            "tokenizer": self.tokenizer,
            "weights": self.weights,
            "parameters": self.parameters,
            "context": self.context,
            "max_batch_tokens": self.max_batch_tokens,
            "capabilities": {
                "sampled": True,
                "top": self.vocabulary,
                "ids": "per position",
                "whole": ["logits", *(["hidden"] if self.head is not None else [])],
                "temperature": True,
            },
        }

    def check(self, rows: Sequence[Row], want: Want) -> None:
        """Raises BadMessage, one sentence, for what this model cannot score."""
        V = want.vocabulary or self.vocabulary
        if self.rows < V:
            raise BadMessage(f"vocabulary {V} asked for; the model has {self.rows} rows")
        if want.top > V:
            raise BadMessage(f"top {want.top} of a vocabulary of {V}")
        if want.whole == "hidden" and self.head is None:
            raise BadMessage("this model's head is more than a product; ask for logits")
        for i, row in enumerate(rows):
            if self.context and len(row.tokens) > self.context:
                raise BadMessage(
                    f"row {i} has {len(row.tokens)} tokens, the model's context is {self.context}"
                )
            # The prompt may use rows beyond the words that are scored; nothing may lie outside.
            if not 0 <= min(row.tokens) <= max(row.tokens) < self.rows:
                raise BadMessage(f"row {i} has a token outside the vocabulary of {self.rows}")
            if max(row.tokens[row.prompt :]) >= V:
                raise BadMessage(f"row {i} has a response token outside the vocabulary of {V}")
            if row.ids is not None and not (int(row.ids.min()) >= 0 and int(row.ids.max()) < V):
                raise BadMessage(f"row {i} asks for an id outside the vocabulary of {V}")

    @torch.no_grad()
    def score(self, rows: Sequence[Row], want: Want) -> list[RowScores]:
        """Scores of every row, on the CPU. Call `check` first."""
        found: list[RowScores | None] = [None] * len(rows)
        for part in self._passes(rows):
            for i, one in zip(part, self._pass([rows[i] for i in part], want)):
                found[i] = one
        return found  # type: ignore[return-value]

    def _passes(self, rows: Sequence[Row]) -> list[list[int]]:
        """Row numbers of every forward pass: all at once where they fit, else rows of similar
        length together."""
        longest = max(len(r.tokens) for r in rows)
        if longest * len(rows) <= self.max_batch_tokens:
            return [list(range(len(rows)))]
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].tokens), i))
        parts: list[list[int]] = [[]]
        for i in order:  # in rising length, so the row that joins is the longest
            if parts[-1] and len(rows[i].tokens) * (len(parts[-1]) + 1) > self.max_batch_tokens:
                parts.append([])
            parts[-1].append(i)
        return parts

    def _pass(self, rows: list[Row], want: Want) -> list[RowScores]:
        """One forward pass; with half the rows at a time if memory runs out."""
        try:
            return self._scores(rows, want)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(rows) // 2
        self.max_batch_tokens = max(1, half * max(len(r.tokens) for r in rows))
        return self._pass(rows[:half], want) + self._pass(rows[half:], want)

    def _scores(self, rows: list[Row], want: Want) -> list[RowScores]:
        V, device = want.vocabulary or self.vocabulary, self.device
        T = max(r.response for r in rows)
        padded = [[*r.tokens[r.prompt :], *[0] * (T - r.response)] for r in rows]
        tokens_RT = torch.tensor(padded, dtype=torch.int64, device=device)
        lengths_R = torch.tensor([r.response for r in rows], device=device)
        mask_RT = torch.arange(T, device=device) < lengths_R.unsqueeze(-1)
        prompts = [r.tokens[: r.prompt] for r in rows]
        y_N = tokens_RT[mask_RT]
        ids_NK = None
        if rows[0].ids is not None:
            ids_NK = torch.cat([r.ids for r in rows if r.ids is not None]).to(device)
        hidden_NH = logits_NV = None
        if self.fused or want.whole == "hidden":
            trunk = models.trunk_of(self.model)
            hidden_NH = response_hidden(trunk, prompts, tokens_RT, lengths_R)[mask_RT]
        if not self.fused:
            logits = response_logits(self.model, prompts, tokens_RT, lengths_R, V)
            logits_NV = logits.float()[mask_RT]
        if self.fused:
            found = self._from_hidden(hidden_NH, y_N, ids_NK, want, V)
        else:
            found = _from_logits(logits_NV, y_N, ids_NK, want)
        if want.whole == "logits" and logits_NV is None:
            found["whole"] = self._head(V).logits(hidden_NH)
        elif want.whole:
            found["whole"] = logits_NV if want.whole == "logits" else hidden_NH
        counts = [r.response for r in rows]
        columns = {k: v.cpu().split(counts) for k, v in found.items()}
        return [RowScores(**{k: v[i] for k, v in columns.items()}) for i in range(len(rows))]

    def _from_hidden(self, hidden_NH, y_N, ids_NK, want: Want, V: int) -> dict[str, torch.Tensor]:
        asked = y_N[:, None] if ids_NK is None else torch.cat([y_N[:, None], ids_NK], 1)
        read = linear_score(
            hidden_NH,
            self._head(V),
            ids=asked,
            k=want.top or None,
            entropy=want.entropy,
            temperature=want.temperature,
        )
        found = {"sampled": read.logp[:, 0].contiguous()}
        if ids_NK is not None:
            found["ids_logprobs"] = read.logp[:, 1:].contiguous()
        if want.top:
            found |= {"top_ids": read.top_ids, "top_logprobs": read.top_logp}
        if want.entropy:
            found["entropy"] = read.entropy
        return found

    def _head(self, V: int):
        from dataclasses import replace

        return replace(self.head, vocab=V)

    def head_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(weight and bias of the head, its numbers), for clients that read hidden states."""
        head = self.head
        tensors = {"weight": head.weight.detach()[: self.rows].cpu()}
        if head.bias is not None:
            tensors["bias"] = head.bias.detach()[: self.rows].cpu()
        return tensors, {"scale": head.scale, "soft_cap": head.soft_cap, "weights": self.weights}


def _from_logits(logits_NV, y_N, ids_NK, want: Want) -> dict[str, torch.Tensor]:
    """The same from logits, by the very functions a loss reads a teacher's logits with."""
    dist = Dense(logits_NV, y_N).tempered(want.temperature)
    found = {"sampled": dist.at_y()}
    if ids_NK is not None:
        found["ids_logprobs"] = dist.at(ids_NK)
    if want.top:
        ids, _ = top(dist.z, want.top, dist.lse)
        found |= {"top_ids": ids, "top_logprobs": dist.at(ids)}
    if want.entropy:
        logp = dist.full()
        found["entropy"] = -(logp.exp() * logp).sum(-1)
    return found


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """SHA-256 of the weights: of all of them, or of SAMPLED numbers of each tensor of a large
    model, evenly spaced, which any training step changes."""
    if models.count_parameters(model) <= HASHED_WHOLE:
        return models.weights_hash(model)
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        flat = p.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
        digest.update(f"{name}|{p.dtype}|{tuple(p.shape)}".encode())
        digest.update(some.view(torch.uint8).numpy().data)
    return digest.hexdigest()
