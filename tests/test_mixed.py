"""Texts that two policies write together: the mixture's law, and drafts under a judge."""

from __future__ import annotations

import pytest
import torch

from opdsl.train.mixed import blend, decode_mixed, interleave
from opdsl.train.rollout import decode

V, EOS, PAD = 7, 2, 0
PROMPTS = [[1, 3, 4], [1], [6, 5, 3, 4]]  # ragged


def small(seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
            initializer_range=0.5, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models():
    return small(0), small(1)


def next_probs(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].float().softmax(-1)


def write(models, rule, prompts, seed=0, n=6, **more):
    g = torch.Generator().manual_seed(seed)
    return decode_mixed(
        models, [prompts, prompts], rule, max_new_tokens=n, eos=EOS, pad=PAD, generator=g, **more
    )


def test_a_blend_draws_from_the_mixture_and_records_it(models) -> None:
    out = write(models, blend([0.7, 0.3]), PROMPTS)
    for prompt, row, logps in zip(PROMPTS, out.rows(), out.logprobs):
        for t, token in enumerate(row):
            p, q = (next_probs(m, prompt + row[:t]) for m in models)
            want = 0.7 * p[token] + 0.3 * q[token]
            assert float(logps[t].exp()) == pytest.approx(float(want), rel=2e-4)
    assert all(row[-1] == EOS or len(row) == 6 for row in out.rows())


def test_the_law_of_the_first_token(models) -> None:
    n = 6000
    p, q = (next_probs(m, [1, 3]) for m in models)
    for rule, want in ((blend([0.7, 0.3]), 0.7 * p + 0.3 * q), (interleave(2), kept(p, q, 2))):
        out = write(models, rule, [[1, 3]] * n, n=1)
        found = torch.bincount(out.tokens[:, 0], minlength=V) / n
        assert float((found - want).abs().max()) < 5 * 0.5 / n**0.5


def kept(p: torch.Tensor, q: torch.Tensor, k: int) -> torch.Tensor:
    """Law of a draft from p under a judge q: p on its top k, the rest of p's mass by q."""
    inside = torch.zeros_like(p).scatter(0, q.topk(k).indices, 1.0)
    return p * inside + (p * (1 - inside)).sum() * q


def test_a_judge_that_accepts_everything_changes_nothing(models) -> None:
    alone = write(models, blend([1.0, 0.0]), PROMPTS)
    judged = write(models, interleave(V), PROMPTS)
    assert alone.rows() == judged.rows()
    plain = decode(
        models[0], PROMPTS, max_new_tokens=40, eos=EOS, pad=PAD,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    assert plain.tokens.shape[0] == alone.tokens.shape[0]


def test_every_policy_reads_its_own_prompt(models) -> None:
    g = torch.Generator().manual_seed(0)
    theirs = [[1, 5, 5, *p] for p in PROMPTS]
    out = decode_mixed(
        models, [PROMPTS, theirs], blend([0.5, 0.5]), max_new_tokens=3, eos=EOS, pad=PAD,
        generator=g,
    )  # fmt: skip
    for mine, other, row, logps in zip(PROMPTS, theirs, out.rows(), out.logprobs):
        p, q = next_probs(models[0], mine), next_probs(models[1], other)
        assert float(logps[0].exp()) == pytest.approx(float(0.5 * (p + q)[row[0]]), rel=2e-4)


def test_a_model_without_a_cache_is_refused() -> None:
    class Bare(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    with pytest.raises(ValueError, match="cache"):
        write((Bare(), Bare()), blend([0.5, 0.5]), PROMPTS)
