"""`generate_batch` of transformers' continuous batching in place of the own loop."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.models import llama

from opdsl.train.decode_generate import Sampling, by_batching, score
from opdsl.train.errors import RunProblem
from opdsl.train.rollout import decode

V, END, PAD = 23, 2, 0
PROMPTS = [[1, 3, 4], [1], [1, 5, 0, 6, 3, 4], [1, 3, 4], [6, 6]]
available = pytest.mark.skipif(
    not hasattr(transformers.GenerationMixin, "generate_batch"),
    reason="this transformers has no continuous batching",
)


@pytest.fixture(scope="module")
def model():
    return llama(V, PAD, END)


def run(model, backend: str = "generate_batch", prompts=PROMPTS, seed: int = 0, **settings):
    settings = {"max_new_tokens": 8, "eos": (END, 5), "pad": PAD} | settings
    generator = torch.Generator().manual_seed(seed)
    return decode(model, prompts, generator=generator, backend=backend, **settings)


@available
def test_greedy_is_the_own_loops(model):
    own, theirs = run(model, "own", greedy=True), run(model, greedy=True)
    for name in ("tokens", "lengths", "finished"):
        assert torch.equal(getattr(own, name), getattr(theirs, name))
    assert torch.allclose(own.logprobs, theirs.logprobs, atol=1e-5)


@available
def test_sampled_rows_are_scored_by_the_model(model):
    """Log-probabilities, entropy and best tokens are those of a pass over the whole text."""
    state = torch.get_rng_state()
    out = run(model, temperature=0.7, top_k=4, entropy=True, top=3)
    assert torch.equal(state, torch.get_rng_state()), "torch's own generator was moved"
    for b, (prompt, row) in enumerate(zip(PROMPTS, out.rows())):
        n = len(row)
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([prompt + row])).logits[0]
        logits_TV = logits_TV[len(prompt) - 1 : -1]
        logp_TV = Sampling(0.7, 1.0, 4).logprobs(logits_TV)
        token_T1 = torch.tensor(row)[:, None]
        assert torch.allclose(out.logprobs[b, :n], logp_TV.gather(-1, token_T1)[:, 0], atol=1e-5)
        best_TK, ids_TK = logits_TV.log_softmax(-1).topk(3, -1)
        assert torch.equal(out.top_ids[b, :n], ids_TK)
        assert torch.allclose(out.top_logprobs[b, :n], best_TK, atol=1e-5)
        assert (out.tokens[b, n:] == PAD).all() and (out.logprobs[b, n:] == 0).all()
        assert bool(out.finished[b]) == (row[-1] in (END, 5)) and not {END, 5} & set(row[:-1])
    assert out.entropy.shape == out.tokens.shape


@available
def test_first_tokens_have_the_models_law(model):
    """400 rollouts of one prompt against exact probabilities, chi-squared."""
    prompt = [1, 3]
    out = run(model, prompts=[prompt] * 400, max_new_tokens=1, seed=1)
    with torch.no_grad():
        p_V = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    seen_V = torch.bincount(out.tokens[:, 0], minlength=V)
    big = p_V * 400 >= 5
    chi2 = float(((seen_V - p_V * 400) ** 2 / (p_V * 400))[big].sum())
    assert chi2 < int(big.sum()) + 5 * (2 * int(big.sum())) ** 0.5


def test_a_token_rounded_out_of_the_nucleus_is_inside_it(model):
    """The scheduler's kernels and ours round differently; no log-probability may be -inf."""
    with torch.no_grad():
        order = model(input_ids=torch.tensor([[1, 3]])).logits[0, -1].argsort(descending=True)
    third = order[2].view(1, 1)
    sampling = Sampling(top_k=2)
    notes = score(model, [[1, 3]], third, torch.tensor([1]), PAD, sampling)
    wider = score(model, [[1, 3]], third, torch.tensor([1]), PAD, Sampling(top_k=3))
    assert torch.allclose(notes.logprobs_BT, wider.logprobs_BT, atol=1e-5)


def test_refused_where_it_is_missing():
    with pytest.raises(RunProblem, match=r"rollout\.backend"):
        by_batching(torch.nn.Linear(2, 2), [[1]], 1, (2,), 0, Sampling(), None, None)


def test_failures_are_named(model, monkeypatch):
    def no_answers(inputs, generation_config=None, **kwargs):
        return {}

    monkeypatch.setattr(model, "generate_batch", no_answers, raising=False)
    with pytest.raises(RunProblem, match="5 of 5 prompts"):
        run(model)


def test_unknown_backend(model):
    with pytest.raises(ValueError, match="backend"):
        run(model, "vllm")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("rollout.bakend=own", "rollout.backend"),
        ("rollout.backend=vllm", "own or generate_batch"),
    ],
)
def test_settings_are_checked(words, message):
    from opdsl.cli.run import split_rollout

    with pytest.raises(RunProblem) as caught:
        split_rollout((words, "k=3"))
    text = " ".join([caught.value.diagnostics[0].message, *caught.value.diagnostics[0].helps])
    assert message in text
    assert split_rollout(("rollout.backend=own", "k=3")) == (("k=3",), {"backend": "own"})


@available
@pytest.mark.slow
def test_a_run_samples_with_it(tmp_path):
    """Two steps of a shipped method; the log-probabilities are the scoring pass's."""
    from click.testing import CliRunner

    from opdsl.cli import cli

    words = ["run", "sampled_opd", "--set", "rollout.backend=generate_batch", "--steps", "2"]
    done = CliRunner().invoke(cli, [*words, "--prompts", "4", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
