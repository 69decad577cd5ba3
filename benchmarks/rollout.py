"""Decoding on the CPU against `generate`: tokens per second, and whether both draw from one law.

`python -m benchmarks.rollout [--quick]` writes results/rollout.json. The model is a random
Qwen3-like one: 6 layers of 256, V = 32768, 16 prompts of 32 tokens, 96 new tokens, nobody ends
early. The law is tested on a smaller model: first and second tokens of many rollouts of both
loops, binned by probability, in one chi-squared test each, and every recorded log-probability
of ours against a recomputed one.
"""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks import measure

measure.one_thread()

import torch  # noqa: E402

from benchmarks.measure import Variant  # noqa: E402

PROMPTS, PROMPT, NEW = 16, 32, 96


def qwen(vocab: int, layers: int, width: int, spread: float = 0.02):
    """A random model; `spread` is the standard deviation of its weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        num_key_value_heads=max(width // 128, 1),
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=spread,
    )
    return Qwen3ForCausalLM(config).eval()


def prompts(vocab: int, rows: int = PROMPTS, same: int = 1) -> list[list[int]]:
    """rows prompts, `same` of each in a row."""
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(2, vocab, (rows // same, PROMPT), generator=gen)
    return ids.repeat_interleave(same, 0).tolist()


def hf(model, rows: list[list[int]], new: int):
    ids = torch.tensor(rows)
    with torch.no_grad():
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=new,
            pad_token_id=0,
            eos_token_id=1 << 20,  # looked for, as always, and never drawn
        )


def own(model, rows: list[list[int]], new: int, steps: str = "auto"):
    from opdsl.train.rollout import decode

    return decode(model, rows, max_new_tokens=new, eos=-1, pad=0, steps=steps)


plain = partial(own, steps="plain")  # the model called for every token, for comparison


def timed(route, same: int, new: int, dtype: torch.dtype):
    model = qwen(32768, 6, 256).to(dtype)
    return partial(route, model, prompts(32768, PROMPTS, same), new), []


def speed(rounds: int, new: int) -> dict[str, object]:
    """Processor seconds of both routes, with different prompts and with four rollouts of each."""
    found = {}
    cases = (("float32", 1), ("float32", 4))
    for kind, same in cases:
        dtype = getattr(torch, kind)
        variants = [
            Variant("generate", partial(timed, hf, same, new, dtype)),
            Variant("ours", partial(timed, own, same, new, dtype)),
            Variant("ours, plain steps", partial(timed, plain, same, new, dtype)),
        ]
        series = measure.interleaved(variants, rounds)
        summary = {k: s.summary() for k, s in series.items()}
        for s in summary.values():
            if "seconds" in s:
                s["tokens_per_second"] = round(PROMPTS * new / s["seconds"])
        faster = measure.ratio(series["generate"], series["ours"])
        name = f"{kind}, {same} rollout{'s' if same > 1 else ''} per prompt"
        found[name] = {"variants": summary, "speedup": faster and round(faster, 2)}
        print(name, found[name]["speedup"], flush=True)
    return found


def law(rollouts: int) -> dict[str, float]:
    """p-values of "the same law" for first tokens and pairs, and the error of log-probabilities."""
    from opdsl.train.rollout import decode

    vocab = 64
    model = qwen(vocab, 2, 64, spread=0.3)
    prompt = prompts(vocab, 1)[0]
    torch.manual_seed(3)
    mine = decode(model, [prompt] * rollouts, max_new_tokens=2, eos=-1, pad=0)
    theirs = hf(model, [prompt] * rollouts, 2)[:, PROMPT:]
    with torch.no_grad():
        ids = torch.cat([torch.tensor([prompt] * vocab), torch.arange(vocab)[:, None]], 1)
        logits = model(input_ids=ids).logits
        first = logits[0, -2].double().log_softmax(-1)
        second = logits[:, -1].double().log_softmax(-1)
    pairs = (first[:, None] + second).flatten().exp()
    out = {}
    for name, tokens in (("ours", mine.tokens), ("generate", theirs)):
        counts_1 = torch.bincount(tokens[:, 0], minlength=vocab)
        counts_2 = torch.bincount(tokens[:, 0] * vocab + tokens[:, 1], minlength=vocab**2)
        out[f"{name}: first token"] = p_value(counts_1, first.exp())
        out[f"{name}: pair"] = p_value(counts_2, pairs)
    both = torch.stack([torch.bincount(x[:, 0], minlength=vocab) for x in (mine.tokens, theirs)])
    out["ours against generate"] = p_homogeneous(both)
    a, b = mine.tokens[:, 0], mine.tokens[:, 1]
    exact = torch.stack([first[a], second[a, b]], 1)
    out["log-probability error"] = float((mine.logprobs.double() - exact).abs().max())
    return {k: float(f"{v:.3g}") for k, v in out.items()}


def chi_squared(observed: torch.Tensor, expected: torch.Tensor, freedom: int) -> float:
    """The p-value of Pearson's statistic."""
    statistic = ((observed - expected).pow(2) / expected).sum().double()
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2))


def p_value(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Counts against probabilities; entries expected below 10 times are pooled."""
    expected = (p / p.sum() * counts.sum()).double()
    common = expected >= 10
    observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    some = expected > 1e-9
    return chi_squared(observed[some], expected[some], int(some.sum()) - 1)


def p_homogeneous(counts_2V: torch.Tensor) -> float:
    """That two rows of counts have one law."""
    common = counts_2V.sum(0) >= 20
    table = torch.cat([counts_2V[:, common], counts_2V[:, ~common].sum(1, keepdim=True)], 1)
    table = table[:, table.sum(0) > 0].double()
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    return chi_squared(table, expected, table.shape[1] - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    new = 40 if args.quick else NEW  # steps are recorded from 32 tokens on
    fair = law(4000 if args.quick else 20000)
    print(fair, flush=True)
    found = speed(2 if args.quick else 5, new)
    target = {"bound": 2.0, "measured": found["float32, 1 rollout per prompt"]["speedup"]}
    target["met"] = bool(target["measured"] and target["measured"] >= target["bound"])
    content = {"setting": f"{PROMPTS} x ({PROMPT} + {new}) tokens, 6 x 256, V = 32768"}
    content |= {"speed": found, "target": target, "law": fair}
    if not args.quick:
        measure.save("rollout", content)
    print(target)


if __name__ == "__main__":
    main()
