"""Loading models and tokenizers, comparing vocabularies, adapters, and the final export.

A model is a folder in transformers' format or a hub name; only safetensors are read and no code
that comes with a model is run. Everything that can be missing has its own message.

Shapes: B rows, S tokens of prompt and response together, H hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from pathlib import Path
from typing import Any

from opdsl.train.errors import RunProblem, problem

HUB_TIMEOUT = 3.0  # seconds to find out that there is no network


def is_url(name: str) -> bool:
    return "://" in name


def looks_like_path(name: str) -> bool:
    """Whether a model name can only be meant as a folder."""
    return name.startswith((".", "/", "~", os.sep)) or Path(name).exists() or name.count("/") != 1


def check_source(name: str, role: str) -> None:
    """Raise RunProblem (OPD404, OPD701) unless a model called `name` can be loaded here.

    role: "student" or a teacher's name, for the message. A hub name counts as loadable if its
    config is in the hub's cache or the hub answers within a few seconds.
    """
    option = "--student" if role == "student" else f"--teacher {role}="
    if is_url(name):
        raise problem(
            "OPD701",
            f"{role}: {name} is a served model, and this role needs one in this process",
            helps=[f"{option}FOLDER (a transformers folder) or a hub name"],
        )
    if looks_like_path(name):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise problem(
                "OPD404",
                f"{role}: there is no model folder at {name}",
                helps=[f"{option} takes a transformers folder (config.json, *.safetensors)"],
            )
        if not (folder / "config.json").is_file():
            raise problem(
                "OPD701", f"{role}: {name} has no config.json, so it is not a model folder"
            )
        if not any(folder.glob("*.safetensors")):
            other = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
            notes = [f"found {other[0]}; pickled weights are not read"] if other else []
            raise problem("OPD701", f"{role}: {name} holds no *.safetensors", notes=notes)
        return
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    if (
        os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        or not hub_answers()
    ):
        raise problem(
            "OPD404",
            f"{role}: the model {name} is not on this machine and the hub cannot be reached",
            helps=[
                f"{option}FOLDER with a downloaded copy",
                "or --task chain to train the embedded pair, which needs no download",
            ],
        )


def hub_answers() -> bool:
    """Whether a connection to the hub's host opens within HUB_TIMEOUT, name lookup included."""
    from urllib.parse import urlparse

    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (443 if address.scheme == "https" else 80)
    found: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((address.hostname or "", port), timeout=HUB_TIMEOUT).close()
            found.append(True)
        except OSError:
            pass

    # A name lookup has no time-out of its own, hence the thread.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    return bool(found)


def load_model(name: str, role: str, dtype, device):
    """The causal language model at `name` in eval mode. Raises RunProblem OPD404 / OPD701."""
    check_source(name, role)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            _location(name), dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # the libraries below raise a dozen unrelated types
        raise _unusable(name, role, error) from error
    for module in model.modules():  # rollouts and training must see the same function
        if module.__class__.__name__ == "Dropout":
            module.p = 0.0
    for key in ("attention_dropout", "attention_probs_dropout_prob"):
        if hasattr(model.config, key):
            setattr(model.config, key, 0.0)
    return model.to(device).eval()


def load_tokenizer(name: str, role: str):
    """The tokenizer of a model, or None if its folder has none."""
    check_source(name, role)
    from transformers import AutoTokenizer

    folder = Path(_location(name))
    if folder.is_dir() and not any(
        (folder / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(_location(name), trust_remote_code=False)
    except Exception as error:
        raise _unusable(name, role, error) from error


def _location(name: str) -> str:
    return str(Path(name).expanduser()) if looks_like_path(name) else name


def _unusable(name: str, role: str, error: Exception) -> RunProblem:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return problem(
        "OPD701", f"{role}: cannot load {name}: {first}", notes=[f"raised {type(error).__name__}"]
    )


# ---- vocabularies ------------------------------------------------------------------------


def common_vocabulary(student, teachers: dict[str, Any], tokenizers: dict[str, Any]) -> int:
    """How many vocabulary rows student and teachers share; heads are sliced to it.

    tokenizers: role -> tokenizer or None. Tokenizers are compared by their token → id maps and
    special tokens, never by size: equal tokenizers with padded heads agree, different ones of
    the same size do not. Without tokenizers the sizes of the heads must be equal.

    Raises RunProblem OPD403.
    """
    size = head_of(student).weight.shape[0]
    mine = tokenizers.get("student")
    for name, teacher in teachers.items():
        theirs = tokenizers.get(name)
        if mine is not None and theirs is not None:
            if tokenizer_hash(mine) != tokenizer_hash(theirs):
                raise problem(
                    "OPD403",
                    f"student and teacher {name} have different tokenizers",
                    notes=[_tokenizer_witness(mine, theirs)],
                    helps=["token-level distillation needs models of one tokenizer family"],
                )
        elif head_of(teacher).weight.shape[0] != size:
            other = head_of(teacher).weight.shape[0]
            raise problem(
                "OPD403",
                f"student has {size} vocabulary rows, teacher {name} has {other},"
                " and there is no tokenizer to compare",
                helps=["put the tokenizer files into both folders"],
            )
    shared = min([size, *(head_of(t).weight.shape[0] for t in teachers.values())])
    if mine is not None:
        shared = min(shared, max(mine.get_vocab().values()) + 1)
    return shared


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 of the token → id map and the special tokens."""
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    text = repr(vocab) + repr(sorted(map(str, tokenizer.all_special_tokens)))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _tokenizer_witness(a, b) -> str:
    va, vb = a.get_vocab(), b.get_vocab()
    for token in sorted(set(va) | set(vb), key=lambda t: va.get(t, vb.get(t, 0))):
        if va.get(token) != vb.get(token):
            return f"token {token!r} has id {va.get(token)} in one and {vb.get(token)} in the other"
    return "their special tokens differ"


# ---- parts of a model ----------------------------------------------------------------------


def bare(model):
    """The transformers model inside a peft wrapper; adapters stay active in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk_of(model):
    """The module that maps ids [B, S] to hidden states [B, S, H]."""
    inner = bare(model)
    return getattr(inner, inner.base_model_prefix)


def head_of(model):
    """The output projection, with `.weight` [V, H]."""
    return bare(model).get_output_embeddings()


def known_head(model, vocabulary: int):
    """The head as weight, bias, scale and soft cap, or None if it computes something else.

    What the configuration says is a guess; it counts only if it reproduces the model's logits on
    a short input, so an architecture with a twist of its own is never mistaken for a plain one.
    """
    import torch

    from opdsl.emit.kernels.head import Head

    module, config = head_of(model), bare(model).config
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        return None
    scale = getattr(config, "logit_scale", None) or 1.0 / (
        getattr(config, "logits_scaling", 1.0) or 1.0
    )
    cap = getattr(config, "final_logit_softcapping", None)
    ids = torch.arange(4, device=module.weight.device).unsqueeze(0)
    with torch.no_grad():
        hidden = trunk_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits = bare(model)(input_ids=ids, use_cache=False).logits[0].float()
    for one_scale, one_cap in ((1.0, None), (scale, cap)):
        head = Head(module.weight, getattr(module, "bias", None), one_scale, one_cap)
        own = head.logits(hidden)
        # bfloat16 models round their logits to 8 bits, hence the width of this tolerance.
        if own.shape == logits.shape and torch.allclose(own, logits, rtol=2e-2, atol=2e-2):
            return Head(head.weight, head.bias, one_scale, one_cap, vocabulary)
    return None


def count_parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


def context_limit(config) -> int | None:
    """The longest sequence (tokens) a model is made for, if its configuration says."""
    return getattr(config, "max_position_embeddings", None)


def context_of(name: str, role: str) -> int | None:
    """`context_limit` of a model that is not loaded."""
    return context_limit(_config(name, role))


def parameters_of(name: str, role: str) -> int:
    """Number of parameters of a model, from its configuration alone."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return count_parameters(AutoModelForCausalLM.from_config(_config(name, role)))


def config_of(name: str, role: str):
    """The configuration of a model that is not loaded."""
    return _config(name, role)


def _config(name: str, role: str):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(_location(name), trust_remote_code=False)
    except Exception as error:
        raise _unusable(name, role, error) from error


def weights_hash(model) -> str:
    """SHA-256 over names, shapes and bytes of all parameters, in sorted order."""
    import torch

    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        digest.update(f"{name}|{p.dtype}|{tuple(p.shape)}".encode())
        digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- adapters and export ---------------------------------------------------------------------


def add_adapter(model, adapter: tuple[str, dict[str, Any]], seed: int):
    """The model with a low-rank adapter on every linear layer; only the adapter is trained."""
    import torch
    from peft import LoraConfig, get_peft_model

    rank = adapter[1]["rank"]
    config = LoraConfig(
        r=rank,
        lora_alpha=adapter[1].get("alpha", 2 * rank),
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the adapter's initial weights, the same at every start
        return get_peft_model(model, config).eval()


def export(model, folder: Path, tokenizer) -> None:
    """Write the student as an ordinary transformers folder, permissions by the umask.

    With an adapter the merged model goes to `folder` and the adapter alone to `folder`-adapter.
    Merging changes the model in memory, so this comes last in a run.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    written = [folder]
    if hasattr(model, "merge_and_unload"):
        adapter = folder.with_name(folder.name + "-adapter")
        model.save_pretrained(adapter, safe_serialization=True)
        written.append(adapter)
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    umask = os.umask(0)
    os.umask(umask)
    for place in written:
        for path in place.rglob("*"):
            if path.is_file():  # safetensors leaves files at 0600
                path.chmod(0o666 & ~umask)
