"""From logits to tokens: truncation, inverse-CDF draws, and a head that is fast for few rows.

Shapes: B rows, V vocabulary, W = V rounded up to whole blocks, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def sampling_logprobs(
    logits_BV: torch.Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
) -> torch.Tensor:
    """Log-probabilities [B, V] of the sampling distribution; -inf where truncated away.

    Order as everywhere else: temperature, then top-k, then top-p over what is left. Nucleus
    sampling keeps the smallest set of most probable tokens whose mass reaches `top_p`, at
    least one. Ties at the k-th place are broken by the sort, so exactly k tokens stay.
    """
    logits_BV = logits_BV.float()
    if temperature != 1.0:
        logits_BV = logits_BV / temperature
    V = logits_BV.shape[-1]
    cut_k = top_k is not None and top_k < V
    if cut_k or top_p < 1.0:
        sorted_BK, order_BK = torch.topk(logits_BV, min(top_k, V) if cut_k else V, dim=-1)
        if top_p < 1.0:
            probs_BK = sorted_BK.softmax(-1)
            before_BK = probs_BK.cumsum(-1) - probs_BK
            outside_BK = before_BK >= top_p
            outside_BK[:, 0] = False
            sorted_BK = sorted_BK.masked_fill(outside_BK, -torch.inf)
        logits_BV = torch.full_like(logits_BV, -torch.inf).scatter(-1, order_BK, sorted_BK)
    return logits_BV.log_softmax(-1)


BLOCK = 256  # words summed at once before anything is accumulated
# x · BELOW < x for every float32 x > 0, by at most two units in the last place. A product or difference
# that was rounded up to the total would fall behind the last token.
BELOW = 1 - 2**-24


def inverse_cdf(logprobs_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Token ids [B]: the first v whose cumulated probability exceeds the uniform number.

    The uniform number is scaled by the row's total, so that rounding in the cumulated sum can
    neither favour nor reach past the last token; tokens of probability 0 are never returned.
    """
    V = logprobs_BV.shape[-1]
    weights_BW = torch.nn.functional.pad(logprobs_BV.exp(), (0, -V % BLOCK))
    return pick(weights_BW, uniform_B)[0].clamp(max=V - 1)  # a row of NaN is found past the end


def pick(weights_BW: torch.Tensor, uniform_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] drawn in proportion to weights [B, W], W a multiple of BLOCK, and totals [B].

    First the block is found, then the token in it: sums of blocks are vector work, a cumulated
    sum over a whole vocabulary is not.
    """
    B = len(weights_BW)
    blocks_BGK = weights_BW.view(B, -1, BLOCK)
    G = blocks_BGK.shape[1]
    cdf_BG1 = weights_BW.new_zeros(B, G + 1)  # 0 in front: what lies before a block
    torch.cumsum(blocks_BGK.sum(-1), -1, out=cdf_BG1[:, 1:])
    total_B1 = cdf_BG1[:, -1:]
    point_B1 = torch.minimum(uniform_B.to(total_B1).unsqueeze(-1) * total_B1, total_B1 * BELOW)
    block_B1 = torch.searchsorted(cdf_BG1, point_B1, right=True).clamp_(max=G).sub_(1)
    rows = torch.arange(B, device=weights_BW.device)
    inner_BK = blocks_BGK[rows, block_B1[:, 0]].cumsum(-1)
    inside_B1 = torch.minimum(point_B1 - cdf_BG1.gather(1, block_B1), inner_BK[:, -1:] * BELOW)
    place_B1 = torch.searchsorted(inner_BK, inside_B1, right=True)
    return (block_B1 * BLOCK + place_B1).squeeze(-1), total_B1.squeeze(-1)


class Sampler:
    """Draws tokens from logits and says how likely they were, in one buffer that is kept."""

    def __init__(self, temperature: float, top_p: float, top_k: int | None, greedy: bool):
        self.temperature = 1.0 if greedy else temperature
        self.truncation = (1.0, None) if greedy else (top_p, top_k)
        self.greedy = greedy
        self.buffer: torch.Tensor | None = None

    def _weights(self, z_BV: torch.Tensor) -> torch.Tensor:
        """softmax z [B, W] in float32, zero behind V, in a buffer that is kept."""
        B, V = z_BV.shape
        if self.buffer is None or len(self.buffer) < B:
            shape = (B, V + -V % BLOCK)
            self.buffer = torch.zeros(shape, dtype=torch.float32, device=z_BV.device)
        weights_BW = self.buffer[:B]
        if weights_BW.shape[1] == V:
            return torch.softmax(z_BV, -1, out=weights_BW)
        weights_BW[:, :V] = z_BV.softmax(-1)
        return weights_BW

    def __call__(
        self, logits_BV: torch.Tensor, uniform_B: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B] and their log-probabilities [B]; NaN where the logits are no distribution."""
        top_p, top_k = self.truncation
        V = logits_BV.shape[-1]
        if top_p < 1.0 or (top_k is not None and top_k < V):
            assert uniform_B is not None
            logp_BV = sampling_logprobs(logits_BV, self.temperature, top_p, top_k)
            token_B = inverse_cdf(logp_BV, uniform_B)
            return token_B, logp_BV.gather(-1, token_B.unsqueeze(-1)).squeeze(-1)
        z_BV = logits_BV.float()
        if self.temperature != 1.0:
            z_BV = z_BV / self.temperature
        weights_BW = self._weights(z_BV)
        if self.greedy:
            token_B, total_B = logits_BV.argmax(-1), 1.0
        else:
            assert uniform_B is not None
            token_B, total_B = pick(weights_BW, uniform_B)
            token_B = token_B.clamp(max=V - 1)
        chosen_B = weights_BW.gather(-1, token_B.unsqueeze(-1)).squeeze(-1)
        return token_B, (chosen_B / total_B).log()


def own_entropy(logits_BV: torch.Tensor) -> torch.Tensor:
    """Entropy [B] (nats) of the model's own distribution, neither tempered nor truncated."""
    z_BV = logits_BV.float()
    return torch.special.entr(z_BV.softmax(-1)).sum(-1)


def own_top(logits_BV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own k most probable tokens [B, k] and their log-probabilities, best first."""
    z_BV = logits_BV.float()
    z_BK, ids_BK = z_BV.topk(k, -1)
    return ids_BK, z_BK - z_BV.logsumexp(-1, keepdim=True)


# ---- a head for few rows ---------------------------------------------------------------------

COLUMNS = 512  # words of one block of the head
FEW = range(2, 65)  # rows for which a library product spends its time rearranging the weight
WORTH = 32  # tokens after which the copy has paid for itself


@contextmanager
def blocked_head(model: nn.Module, rows: int, tokens: int) -> Iterator[None]:
    """While decoding on a CPU: the model's output product from a copy of its weight in blocks.

    A product [16, H] x [H, V] reads its weight once, in the wrong order, and rearranges it each
    time; [V / 512, H, 512] is that order, copied once per call. Plain float32 `nn.Linear` heads
    only; anything that happens to the logits afterwards is the model's own. The copy is dropped
    at the end, so a step of the optimizer in between is seen.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not _suits(head, rows, tokens):
        yield
        return
    assert isinstance(head, nn.Linear)
    head.forward = _Blocks(head)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward


def _suits(head: object, rows: int, tokens: int) -> bool:
    if type(head) is not nn.Linear or "forward" in vars(head):
        return False
    weight = head.weight
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    large = weight.shape[1] >= 192 and weight.numel() >= 1 << 20
    return (
        plain and large and rows in FEW and tokens >= WORTH and not torch.is_autocast_enabled("cpu")
    )


class _Blocks:
    """hidden [B, S, H] -> logits [B, S, V] as `head` gives them; buffers are kept between calls."""

    def __init__(self, head: nn.Linear):
        self.bias = head.bias
        V, H = head.weight.shape
        blocks = -(-V // COLUMNS)
        self.width = V
        self.logits = torch.empty(0, blocks, COLUMNS)
        self.weight_GHK = torch.empty(blocks, H, COLUMNS)
        whole = V // COLUMNS
        self.weight_GHK[:whole] = head.weight[: whole * COLUMNS].view(-1, COLUMNS, H).mT
        if whole < blocks:
            self.weight_GHK[whole].zero_()
            self.weight_GHK[whole, :, : V - whole * COLUMNS] = head.weight[whole * COLUMNS :].T

    def __call__(self, hidden: Tensor) -> Tensor:
        """The result is overwritten by the next call."""
        n_nH = hidden.reshape(-1, hidden.shape[-1])
        n, (blocks, _, columns) = len(n_nH), self.weight_GHK.shape
        if len(self.logits) != n:
            self.logits = torch.empty(n, blocks, columns)
        out_GnK = self.logits.transpose(0, 1)  # every block's product goes to its place in a row
        torch.bmm(n_nH.expand(blocks, *n_nH.shape), self.weight_GHK, out=out_GnK)
        logits_nV = self.logits.view(n, -1)[:, : self.width]
        if self.bias is not None:
            logits_nV += self.bias
        return logits_nV.view(*hidden.shape[:-1], -1)
