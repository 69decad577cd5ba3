"""A word-level tokenizer without a model, for tests of data."""

from __future__ import annotations

WORDS = [f"w{i}" for i in range(60)] + ["4", "7", "42"]


def tokenizer(words=WORDS, template: str | None = None):
    """Words apart by spaces; unknown ones are `<unk>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    found.chat_template = template
    return found
