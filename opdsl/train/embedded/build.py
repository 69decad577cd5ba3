"""Training the embedded models, and keeping them in the user's cache folder.

A model is a pure function of (recipe, seed, library versions): its cache file is named by the
hash of the three. The file is one safetensors file that carries the SHA-256 of its tensors;
it is written beside its place and renamed, so readers see a whole file or none, two processes
may build at once, and a damaged file is noticed and rebuilt.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from opdsl.train.embedded import chain, recipes
from opdsl.train.embedded.recipes import ModelRecipe, Phase
from opdsl.train.embedded.tasks import Task, get_task
from opdsl.train.rollout import decode

Progress = Callable[[str, float, str], None]
_INITIALISING = threading.Lock()  # fresh weights come from torch's one global generator
_VALIDATION = 256  # rows of each accuracy check while a model is being trained


@dataclass(frozen=True)
class Pair:
    """Teacher and student of one task and seed; `built` is False if both came from the cache,
    `seconds` is the wall time it took to have them."""

    teacher: torch.nn.Module
    student: torch.nn.Module
    built: bool
    seconds: float


def build_pair(
    task: Task | str,
    seed: int,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Pair:
    """Teacher and student of a task, from the cache or trained now (about 15 s on one core).

    progress(stage, fraction, note): stage is "teacher" or "student", fraction 0..1 of that
    stage at its longest, note a few words. Both models come in evaluation mode, float32, CPU.
    """
    task = get_task(task) if isinstance(task, str) else task
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    began = time.perf_counter()
    models, built = {}, False
    for recipe in (task.pair.teacher, task.pair.student):
        path = folder / f"{recipe.role}-{cache_key(recipe, seed)}.safetensors"
        model = load(path, recipe)
        if model is None:
            model = train(recipe, seed, progress)
            save(model, path, progress, recipe.role)
            built = True
        models[recipe.role] = model.eval()
    return Pair(models["teacher"], models["student"], built, time.perf_counter() - began)


def new_model(recipe: ModelRecipe, seed: int):
    """An untrained model; weights are a pure function of (recipe, seed)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": recipe.vocab_size,
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.mlp,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.heads,
        "max_position_embeddings": 64,
        "initializer_range": recipe.initializer_range,
        "tie_word_embeddings": True,
        "pad_token_id": chain.PAD,
        "bos_token_id": chain.BOS,
        "eos_token_id": chain.EOS,
        "attn_implementation": "sdpa",
    }
    # Newer releases of transformers keep the rotary settings in one dictionary.
    if "rope_parameters" in LlamaConfig().to_dict():
        shape["rope_parameters"] = {"rope_type": "default", "rope_theta": recipe.rope_theta}
    else:
        shape["rope_theta"] = recipe.rope_theta
    with _INITIALISING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(chain.stream("weights", recipe.role, seed).integers(2**62)))
        model = LlamaForCausalLM(LlamaConfig(**shape))
    return model.float()


# ---- training --------------------------------------------------------------------------


def train(recipe: ModelRecipe, seed: int, progress: Progress | None = None):
    """Train a model through its phases, on one thread (faster at this size, and identical)."""
    model = new_model(recipe, seed)
    total = sum(phase.steps + phase.anneal for phase in recipe.phases)
    done = 0
    with one_thread():
        for number, phase in enumerate(recipe.phases):
            labels = (recipe.role, number, seed)

            def report(step: int, note: str, done=done, phase=phase) -> None:
                if progress is not None:
                    progress(recipe.role, min(1.0, (done + step) / total), f"{phase.title}{note}")

            _train_phase(model, recipe, phase, labels, report)
            done += phase.steps + phase.anneal
    if progress is not None:
        progress(recipe.role, 1.0, "ready")
    return model.eval()


def _train_phase(model, recipe: ModelRecipe, phase: Phase, labels, report) -> None:
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=phase.lr,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    end = None  # the step at which training is over, once that is known
    step = 0
    while end is None or step < end:
        rate = phase.lr * min(1.0, (step + 1) / phase.warmup)
        if end is not None:
            rate *= (end - step) / (phase.anneal + 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = recipes.rows(chain.stream("train", *labels, step), recipe, phase, phase.batch)
        loss = _loss(model, batch, phase.smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        step += 1
        if end is None and step >= phase.least and step % phase.check == 0:
            score = accuracy(model, recipe, phase, labels)
            report(step, f" ({score:.0%} right)")
            if phase.band[0] <= score <= phase.band[1] or step >= phase.steps:
                end = step + phase.anneal
        elif step % 10 == 0:
            report(step, "")


def _loss(model, batch: recipes.Rows, smoothing: float) -> torch.Tensor:
    """Mean cross-entropy (nats) of the target tokens."""
    tokens_BL = torch.from_numpy(batch.tokens)
    target_BL = torch.from_numpy(batch.target)[:, 1:]
    logits_BLV = model(input_ids=tokens_BL[:, :-1], use_cache=False).logits
    return F.cross_entropy(
        logits_BLV[target_BL], tokens_BL[:, 1:][target_BL], label_smoothing=smoothing
    )


@torch.no_grad()
def accuracy(model, recipe: ModelRecipe, phase: Phase, labels) -> float:
    """Share of validation rows that are right, by the phase's measure."""
    clean = recipes.validation(phase)
    batch = recipes.rows(chain.stream("validation", *labels), recipe, clean, _VALIDATION)
    was_training = model.training
    model.eval()
    try:
        if phase.measure == "exact":
            tokens_BL = torch.from_numpy(batch.tokens)
            target_BL = torch.from_numpy(batch.target)[:, 1:]
            if recipe.fork:  # given the long route: which route is chosen is not a mistake
                target_BL[:, int(target_BL[0].int().argmax())] = False
            guess_BL = model(input_ids=tokens_BL[:, :-1], use_cache=False).logits.argmax(-1)
            return float(((guess_BL == tokens_BL[:, 1:]) | ~target_BL).all(-1).float().mean())
        first = int(batch.target[0].argmax())
        out = decode(
            model,
            batch.tokens[:, :first].tolist(),
            max_new_tokens=batch.tokens.shape[1] - first,
            eos=chain.EOS,
            pad=chain.PAD,
            greedy=True,
        )
        last_B = (out.lengths - 2).clamp(min=0).unsqueeze(-1)
        answer_B = torch.from_numpy(batch.tokens[:, -2])
        right_B = (out.tokens.gather(-1, last_B).squeeze(-1) == answer_B) & out.finished
        return float(right_B.float().mean())
    finally:
        model.train(was_training)


@contextmanager
def one_thread():
    """Run torch on one thread: with tiny tensors, waiting threads cost more than they help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- the cache -------------------------------------------------------------------------


def default_cache_dir() -> Path:
    """`embedded/` in the user's cache folder; OPDSL_CACHE_DIR moves it."""
    import platformdirs

    root = os.environ.get("OPDSL_CACHE_DIR") or platformdirs.user_cache_dir("opdsl")
    return Path(root) / "embedded"


def cache_key(recipe: ModelRecipe, seed: int) -> str:
    """Hash of recipe, seed and the versions that decide the numbers."""
    import transformers

    text = "|".join([recipe.fingerprint(), str(seed), torch.__version__, transformers.__version__])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def save(model, path: Path, progress: Progress | None = None, role: str = "") -> None:
    """Write the weights; a folder that cannot be written costs time later, not the run now."""
    from safetensors.torch import save as to_bytes

    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    data = to_bytes(tensors, metadata={"sha256": _digest(tensors)})
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{time.monotonic_ns()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if progress is not None:
            progress(role, 1.0, f"not cached: {error}")


def load(path: Path, recipe: ModelRecipe):
    """The cached model, or None if there is none or the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if (file.metadata() or {}).get("sha256") != _digest(tensors):
                return None
    except (OSError, SafetensorError, ValueError, RuntimeError):
        return None
    model = new_model(recipe, seed=0)
    parameters = dict(model.named_parameters())
    if {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in tensors.items()}:
        return None
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return model.eval()
