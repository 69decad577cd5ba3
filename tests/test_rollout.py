"""Rollouts: the cached loop against exact distributions, full recomputation and `generate`."""

from __future__ import annotations

import math

import pytest
import torch
from support.models import llama

from opdsl.train import rollout
from opdsl.train.rollout import NonFiniteLogits, decode, inverse_cdf, sampling_logprobs

V, EOS, PAD = 7, 2, 0
# Ragged, one twice, and one that holds the pad id.
PROMPTS = [[1, 3, 4], [1], [1, 5, 0, 6, 3, 4], [1, 3, 4], [6, 6]]


@pytest.fixture(scope="module")
def model():
    return llama(V, PAD, EOS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def logits_after(model, ids) -> torch.Tensor:
    """Next-token logits [V] by a plain forward without cache or padding."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]


def by_hand(model, prompts, uniform_BT, **settings):
    """The same rollouts, every token from a forward over the whole unpadded text."""
    rows = []
    for prompt, uniforms in zip(prompts, uniform_BT):
        tokens, logprobs = [], []
        for u in uniforms:
            logp_V = sampling_logprobs(logits_after(model, prompt + tokens)[None], **settings)[0]
            token = int(inverse_cdf(logp_V[None], u[None])[0])
            tokens.append(token)
            logprobs.append(float(logp_V[token]))
            if token == EOS:
                break
        rows.append((tokens, logprobs))
    return rows


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8, "temperature": 1.3}],
    ids=str,
)
def test_sampling_equals_recomputation(model, settings):
    out = decode(
        model, PROMPTS, max_new_tokens=6, eos=EOS, pad=PAD, generator=generator(), **settings
    )
    uniform_BT = torch.rand((len(PROMPTS), 6), generator=generator())
    for b, (tokens, logprobs) in enumerate(by_hand(model, PROMPTS, uniform_BT, **settings)):
        n = len(tokens)
        assert out.rows()[b] == tokens and int(out.lengths[b]) == n
        assert bool(out.finished[b]) == (tokens[-1] == EOS)
        assert torch.allclose(out.logprobs[b, :n], torch.tensor(logprobs), atol=1e-5)
        assert (out.tokens[b, n:] == PAD).all() and (out.logprobs[b, n:] == 0).all()
    assert out.tokens.shape == out.logprobs.shape == (len(PROMPTS), int(out.lengths.max()))


def test_some_rows_end_early(model):
    """The test above must exercise the dropping of finished rows."""
    out = decode(model, PROMPTS, max_new_tokens=6, eos=EOS, pad=PAD, generator=generator())
    assert len(set(out.lengths.tolist())) > 1 and out.finished.any() and not out.finished.all()


@pytest.mark.parametrize("equal_length", [True, False])
def test_greedy_equals_generate(model, equal_length):
    prompts = [p[-2:] for p in PROMPTS if len(p) > 1] if equal_length else PROMPTS
    out = decode(model, prompts, max_new_tokens=8, eos=EOS, pad=PAD, greedy=True)
    for prompt, row in zip(prompts, out.rows()):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=PAD,
        )[0, len(prompt) :].tolist()
        assert row == theirs


def test_distribution_of_pairs(model):
    """20,000 samples of two tokens against their exact probabilities (chi-square)."""
    prompt, count = [1, 3], 20_000
    first_V = logits_after(model, prompt).softmax(-1)
    exact = {}
    for v in range(V):
        if v == EOS:
            exact[(v,)] = float(first_V[v])
            continue
        second_V = logits_after(model, [*prompt, v]).softmax(-1)
        exact |= {(v, w): float(first_V[v] * second_V[w]) for w in range(V)}
    assert math.isclose(sum(exact.values()), 1, rel_tol=1e-5)
    out = decode(
        model, [prompt] * count, max_new_tokens=2, eos=EOS, pad=PAD, generator=generator(1)
    )
    seen: dict[tuple, int] = {}
    for row in out.rows():
        seen[tuple(row)] = seen.get(tuple(row), 0) + 1
    assert set(seen) <= set(exact)
    big = {k: p for k, p in exact.items() if p * count >= 5}
    chi2 = sum((seen.get(k, 0) - p * count) ** 2 / (p * count) for k, p in big.items())
    # 5 standard deviations above the mean of chi-square with len(big) degrees of freedom.
    assert chi2 < len(big) + 5 * math.sqrt(2 * len(big))


def test_generate_route_has_the_same_law(model, monkeypatch):
    """The route for models without this cache: same log-probabilities, lengths and law."""
    monkeypatch.setattr(rollout, "cache_name", lambda _: None)
    settings = {"temperature": 0.8, "top_k": 4, "max_new_tokens": 4, "eos": EOS, "pad": PAD}
    state = torch.get_rng_state()
    out = decode(model, PROMPTS * 400, generator=generator(3), **settings)
    assert torch.equal(state, torch.get_rng_state()), "torch's own generator was moved"
    again = decode(model, PROMPTS * 400, generator=generator(3), **settings)
    assert torch.equal(out.tokens, again.tokens)
    first_BV = sampling_logprobs(logits_after(model, PROMPTS[0])[None], 0.8, 1.0, 4)
    rows = torch.tensor([i for i in range(len(PROMPTS) * 400) if i % 5 in (0, 3)])
    share_V = torch.bincount(out.tokens[rows, 0], minlength=V) / len(rows)
    assert (share_V - first_BV[0].exp()).abs().max() < 0.06  # 800 draws, 3.4 sigma
    for b in range(5):
        prompt, tokens = PROMPTS[b], out.rows()[b]
        for t, token in enumerate(tokens):
            logp_V = sampling_logprobs(logits_after(model, prompt + tokens[:t])[None], 0.8, 1.0, 4)[
                0
            ]
            assert abs(float(logp_V[token]) - float(out.logprobs[b, t])) < 1e-5
        assert (EOS in tokens) == bool(out.finished[b]) and EOS not in tokens[:-1]


def test_pure_function_of_generator_and_chunks(model):
    settings = {"max_new_tokens": 6, "eos": EOS, "pad": PAD}
    whole = decode(model, PROMPTS * 4, generator=generator(5), **settings)
    again = decode(model, PROMPTS * 4, generator=generator(5), **settings)
    assert torch.equal(whole.tokens, again.tokens)
    assert torch.equal(whole.logprobs, again.logprobs)
    shared = generator(5)
    chunks = [
        decode(model, (PROMPTS * 4)[i : i + 7], generator=shared, **settings).rows()
        for i in range(0, 20, 7)
    ]
    assert [row for chunk in chunks for row in chunk] == whole.rows()


def test_several_end_tokens(model):
    out = decode(
        model, [[1, 3]] * 200, max_new_tokens=6, eos=(EOS, 4), pad=PAD, generator=generator()
    )
    for row, finished in zip(out.rows(), out.finished.tolist()):
        assert finished == (row[-1] in (EOS, 4)) and not {EOS, 4} & set(row[:-1])


def test_mode_and_gradients_are_left_alone(model):
    model.train()
    out = decode(model, PROMPTS, max_new_tokens=3, eos=EOS, pad=PAD, generator=generator())
    assert model.training and not out.logprobs.requires_grad
    model.eval()


def test_truncation_matches_transformers():
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits_BV = torch.randn(200, 40, generator=generator()) * 3
    cases = [(0.7, 0.9, 12), (1.5, 0.5, 40), (1.0, 0.999, 3), (1.0, 1e-4, 9)]
    for temperature, top_p, top_k in cases:
        theirs = LogitsProcessorList(
            [TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]
        )(None, logits_BV).log_softmax(-1)
        ours = sampling_logprobs(logits_BV, temperature, top_p, top_k)
        assert torch.equal(torch.isinf(ours), torch.isinf(theirs))
        finite = ~torch.isinf(ours)
        assert torch.allclose(ours[finite], theirs[finite], atol=1e-5)


def test_top_k_breaks_ties_to_exactly_k():
    logp_BV = sampling_logprobs(torch.zeros(3, 9), top_k=4)
    assert (torch.isfinite(logp_BV).sum(-1) == 4).all()


def test_inverse_cdf_never_returns_impossible_tokens():
    logp_BV = torch.tensor([[-math.inf, math.log(0.5), -math.inf, math.log(0.5), -math.inf]])
    for u in (0.0, 0.49999, 0.5, 0.99999994):
        assert int(inverse_cdf(logp_BV, torch.tensor([u]))[0]) == (1 if u < 0.5 else 3)
    many_BV = sampling_logprobs(torch.randn(64, 50_000, generator=generator()), top_k=50)
    token_B = inverse_cdf(many_BV, torch.full((64,), 0.99999994))
    assert torch.isfinite(many_BV.gather(-1, token_B[:, None])).all()


def test_non_finite_logits_are_named(model):
    import copy

    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[6] = math.nan
    with pytest.raises(NonFiniteLogits) as caught:
        decode(broken, [[1], [1, 6], [1]], max_new_tokens=1, eos=EOS, pad=PAD)
    assert (caught.value.row, caught.value.position) == (1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0.0}, "greedy=True"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
    ],
    ids=str,
)
def test_refusals(model, change, message):
    settings = {"prompts": PROMPTS, "max_new_tokens": 2, "eos": EOS, "pad": PAD} | change
    with pytest.raises(ValueError, match=message):
        decode(model, settings.pop("prompts"), **settings)
