"""The ways steps are taken: plain, in slots, recorded, captured. All must be the model's own step."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from opdsl.train import decode_replay, decode_steps
from opdsl.train.decode_generate import Sampling, score
from opdsl.train.decode_start import choose
from opdsl.train.rollout import decode

V, END, PAD = 97, 2, 0
WAYS = ("plain", "fixed", "recorded", "captured")
# Ragged, one twice, one that holds the pad id, one longer than the sliding windows below.
PROMPTS = [[1, 3, 4], [5], [1, 9, 0, 6, 3, 4, 7, 8, 9, 10, 11, 12], [1, 3, 4], [60, 61]]

SHARED = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": END,
}
GPT2 = {
    "vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
    "initializer_range": 0.3, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": END,
}  # fmt: skip
FAMILIES = {
    "Llama": SHARED,
    "Qwen3": SHARED | {"tie_word_embeddings": True},
    "Qwen2": SHARED,
    "Mistral": SHARED | {"sliding_window": 8},
    "Gemma2": SHARED | {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "Gemma3": SHARED | {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "Phi3": SHARED,
    "GPT2": GPT2,
    "GPTNeoX": {k: v for k, v in SHARED.items() if k not in ("num_key_value_heads", "head_dim")},
    "Mixtral": SHARED | {"num_local_experts": 4},
}


def build(family: str):
    import transformers

    torch.set_num_threads(1)
    name = {"Gemma3": "Gemma3Text"}.get(family, family)
    config = getattr(transformers, f"{name}Config")(**FAMILIES[family])
    classes = {"GPT2": "GPT2LMHeadModel"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cls = getattr(transformers, classes.get(family, f"{family}ForCausalLM"))
        return cls(config).eval()


@pytest.fixture(scope="module")
def model():
    return build("Qwen3")


def run(model, way: str = "auto", prompts=PROMPTS, new: int = 40, seed: int = 0, **settings):
    settings = {"eos": END, "pad": PAD} | settings
    generator = torch.Generator().manual_seed(seed)
    return decode(model, prompts, max_new_tokens=new, generator=generator, steps=way, **settings)


@torch.no_grad()
def forced(model, out, prompts=PROMPTS, **sampling):
    """What a teacher-forced pass says of the same tokens, with its notes."""
    return score(model, prompts, out.tokens, out.lengths, PAD, Sampling(**sampling))


@pytest.mark.filterwarnings("ignore:decoding takes plain steps")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_is_the_models_own_step(family):
    """Log-probabilities of decoded tokens equal those of a pass over the whole texts."""
    model = build(family)
    first = run(model, "plain")
    assert len(set(first.lengths.tolist())) > 1 or not first.finished.any()
    for way in WAYS:
        out = run(model, way)
        assert torch.equal(out.tokens, first.tokens), way
        assert torch.allclose(out.logprobs, forced(model, out).logprobs_BT, atol=2e-4), way


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Gemma3", "Mistral", "Phi3"])
def test_common_families_are_recorded_and_captured(family, recwarn):
    """The ways above did not all fall back to plain steps."""
    model = build(family)
    for way in WAYS[1:]:
        run(model, way, new=33)
    assert not [w for w in recwarn if "plain steps" in str(w.message)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"greedy": True},
        {"eos": (2, *range(50))},
    ],
    ids=str,
)
def test_sampling_and_ended_rows(model, way, settings, monkeypatch):
    """Rows that end are left out or masked; the cache grows; the others notice nothing."""
    monkeypatch.setattr(decode_steps, "ROOM", 8)
    prompts = PROMPTS * 3
    first = run(model, "plain", prompts, **settings)
    out = run(model, way, prompts, **settings)
    assert torch.equal(out.tokens, first.tokens) and torch.equal(out.lengths, first.lengths)
    assert torch.equal(out.finished, first.finished)
    sampling = {k: v for k, v in settings.items() if k != "eos"}
    scored = forced(model, out, prompts, **sampling)
    assert torch.allclose(out.logprobs, scored.logprobs_BT, atol=2e-4)


@pytest.mark.parametrize("way", WAYS)
def test_statistics_equal_a_teacher_forced_pass(model, way):
    """Entropy and the most probable tokens are of the model's own, untempered distribution."""
    out = run(model, way, temperature=0.6, top_k=9, entropy=True, top=4, eos=(2, 5, 9))
    with torch.no_grad():
        for b, prompt in enumerate(PROMPTS):
            n = int(out.lengths[b])
            ids = torch.tensor([prompt + out.rows()[b]])
            logp_TV = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
            best_TK, ids_TK = logp_TV.topk(4, -1)
            assert torch.allclose(out.entropy[b, :n], entropy_T, atol=1e-4)
            assert torch.equal(out.top_ids[b, :n], ids_TK)
            assert torch.allclose(out.top_logprobs[b, :n], best_TK, atol=2e-4)
            assert (out.entropy[b, n:] == 0).all() and (out.top_logprobs[b, n:] == 0).all()
            assert (out.top_ids[b, n:] == PAD).all()
    assert out.top_ids.shape == (*out.tokens.shape, 4)
    assert run(model, way, new=3).entropy is None and run(model, way, new=3).top_ids is None


def changed(model) -> None:
    """An optimizer's step: every weight moves in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ids = torch.tensor([[1, 5, 9]], device=model.device)
    model(input_ids=ids).logits.float().pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("way", WAYS[1:])
def test_weights_that_change_in_place_are_seen(model, way):
    moving = copy.deepcopy(model)
    before = run(moving, way)
    changed(moving)
    after, plain = run(moving, way), run(moving, "plain")
    assert torch.equal(after.tokens, plain.tokens)
    assert torch.allclose(after.logprobs, plain.logprobs, atol=2e-4)
    assert not torch.equal(after.tokens, before.tokens)


def captures(monkeypatch) -> list[int]:
    """Counts how often a step is captured."""
    made: list[int] = []
    original = decode_replay.CapturedSteps._make
    monkeypatch.setattr(
        decode_replay.CapturedSteps,
        "_make",
        lambda self: (made.append(len(self.token_B1)), original(self))[1],
    )
    return made


def test_a_captured_step_stays_valid_after_an_optimizer_step(model, monkeypatch):
    """It is kept for the next call with as many rows, and reads the new weights."""
    moving, made = copy.deepcopy(model), captures(monkeypatch)
    run(moving, "captured")
    changed(moving)
    kept = run(moving, "captured", [p[::-1] for p in PROMPTS], seed=3)
    plain = run(moving, "plain", [p[::-1] for p in PROMPTS], seed=3)
    assert made == [5]
    assert torch.equal(kept.tokens, plain.tokens)
    assert torch.allclose(kept.logprobs, plain.logprobs, atol=2e-4)
    run(moving, "captured", PROMPTS[:3])
    assert made == [5, 3]


@pytest.mark.parametrize("what", ["replaced weight", "attribute", "hook"])
def test_what_a_captured_step_took_for_granted_is_compared(model, monkeypatch, what):
    moving, made = copy.deepcopy(model), captures(monkeypatch)
    run(moving, "captured")
    if what == "replaced weight":
        moving.model.norm.weight = torch.nn.Parameter(moving.model.norm.weight.detach() * 2)
    elif what == "attribute":
        moving.model.layers[0].self_attn.scaling *= 2
    else:
        moving.model.norm.register_forward_hook(lambda module, given, out: out * 2)
    out, plain = run(moving, "captured"), run(moving, "plain")
    assert made == [5, 5]
    assert torch.equal(out.tokens, plain.tokens)


def test_a_kept_step_does_not_keep_the_model(model):
    moving = copy.deepcopy(model)
    run(moving, "captured")
    alive = weakref.ref(moving)
    del moving
    gc.collect()
    assert alive() is None


def test_adapters_that_are_switched_off_are_seen(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    bare = adapted.get_base_model()
    with_adapter = run(bare, "captured")
    with adapted.disable_adapter():
        without = run(bare, "captured")
    for out, other in ((with_adapter, adapted.get_base_model()), (without, model)):
        assert torch.equal(out.tokens, run(other, "plain").tokens)
    assert torch.equal(run(bare, "recorded").tokens, with_adapter.tokens)


def test_what_depends_on_numbers_falls_back_with_one_warning(recwarn):
    """Rotary frequencies that follow the length: Python asks how long the text is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = LlamaConfig(**SHARED | {"max_position_embeddings": 16}, rope_scaling=rope)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    plain = run(model, "plain", [[1, 3, 4], [5, 6, 7]])
    for way in ("recorded", "recorded", "captured", "captured"):
        out = run(model, way, [[1, 3, 4], [5, 6, 7]])
        assert torch.equal(out.tokens, plain.tokens) and torch.equal(out.logprobs, plain.logprobs)
    said = [str(w.message) for w in recwarn if "plain steps" in str(w.message)]
    assert len(said) == 1 and "numbers" in said[0]


def test_a_step_that_is_not_the_models_is_found(model, monkeypatch):
    """A recording that rewriting spoilt is not used; the call goes on in plain steps."""

    def spoilt(tape):
        return tape.having([op for op in tape.ops if "index_copy" not in str(op.func)])

    monkeypatch.setattr(decode_replay, "shorten", spoilt)
    with pytest.warns(UserWarning, match="plain steps"):
        out = run(copy.deepcopy(model), "recorded")
    assert torch.equal(out.tokens, run(model, "plain").tokens)


@pytest.mark.parametrize("way", WAYS[1:])
def test_half_precision_by_autocast(model, way, recwarn):
    """Weights cast once per call instead of once per token; a kept step renews its casts."""
    moving = copy.deepcopy(model)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):  # left before weights change: it caches
            plain, out = run(moving, "plain", greedy=True), run(moving, way, greedy=True)
            scored = forced(moving, out, greedy=True).logprobs_BT
        same = (out.tokens == plain.tokens).float().mean()
        assert same > 0.5 and torch.equal(out.tokens[:, :2], plain.tokens[:, :2])
        assert (out.logprobs - scored).abs().max() < 0.3  # two roundings to 8 bits
        changed(moving)
    assert not [w for w in recwarn if "plain steps" in str(w.message)]


def test_python_that_counts_steps_is_not_recorded(model):
    """A list of operations cannot count along; the next step would be another one."""
    counting = copy.deepcopy(model)
    counting.seen = 0

    def count(module, given):
        module.seen += 1

    counting.register_forward_pre_hook(count)
    with pytest.warns(UserWarning, match="count their steps"):
        out = run(counting, "recorded")
    assert torch.equal(out.tokens, run(model, "plain").tokens)


def test_the_choice_depends_on_the_call_only():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose("auto", 16, 96, cpu) == "recorded" and choose("auto", 16, 96, cuda) == "captured"
    assert choose("auto", 65, 96, cpu) == choose("auto", 16, 8, cpu) == "plain"
    assert choose("auto", 16, 8, cuda) == "plain" and choose("fixed", 1, 1, cpu) == "fixed"
    with pytest.raises(ValueError, match="steps must be"):
        choose("graph", 1, 1, cpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("half", [False, True])
def test_a_cuda_graph_stays_valid_after_an_optimizer_step(model, half, monkeypatch, recwarn):
    moving, made = copy.deepcopy(model).to("cuda"), captures(monkeypatch)
    for _ in range(3):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
            out, plain = run(moving, greedy=True), run(moving, "plain", greedy=True)
            scored = forced(moving, out, greedy=True).logprobs_BT
        same = (out.tokens[:, :8] == plain.tokens[:, :8]).float().mean()
        assert same == 1.0 or (half and same > 0.5)
        assert (out.logprobs - scored).abs().max() < (0.3 if half else 1e-3)
        changed(moving)
    assert made == [5], "the graph was captured once and kept"
    assert not [w for w in recwarn if "plain steps" in str(w.message)]
