"""The learned value of a state, for `gae(V, …)` and `baseline = value(V)`.

V(s_t) estimates the return from response position t on, in nats. It is trained on λ-returns of
the method's own frozen signal by squared error, for `warmup` batches before the student moves
and then once per step, after the student's update. Behind an end token the value is 0; at the
length cap the last state's value stands in for what was cut off.

A critic of a small student is a trainable copy of it with a value head (`init = student`), so
its features can follow the task. For a large student, and for `init = zero`, only a head is
trained, on the student's detached states, which costs no second model.

Returns change scale while the student learns, so the head works in normalised units and is
rescaled whenever mean and spread are updated, leaving its outputs where they were (PopArt,
arXiv 1602.07714).

Shapes: B rows, T response positions, H hidden.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch

from opdsl.train.metrics import explained_variance
from opdsl.train.models import bare, count_parameters, trunk_of
from opdsl.train.runtime import Runtime
from opdsl.train.teachers.local import response_hidden

OWN_TRUNK_LIMIT = 50_000_000  # parameters up to which a critic gets a trunk of its own
_MEMORY = 0.9  # of the running mean and spread of the targets, per update
_PASSES = 2  # regression steps per batch


class Critic:
    """One critic of a method; see the module's text for what it learns from."""

    def __init__(self, decl, student, runtime: Runtime):
        self.name, self.warmup, self.runtime = decl.name, decl.warmup, runtime
        self.student = student
        self.trunk = None
        if decl.init == "student" and count_parameters(student) <= OWN_TRUNK_LIMIT:
            self.trunk = copy.deepcopy(trunk_of(student)).requires_grad_(True).eval()
        width = bare(student).config.hidden_size
        self.head = torch.nn.Linear(width, 1, device=runtime.device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.mean = torch.zeros((), device=runtime.device)
        self.spread = torch.ones((), device=runtime.device)
        self.updates = 0
        learned = list(self.head.parameters())
        learned += list(self.trunk.parameters()) if self.trunk is not None else []
        self.optimizer = torch.optim.AdamW(
            learned, lr=decl.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    # ---- values --------------------------------------------------------------------------

    def _normalised(self, prompts: Sequence[Sequence[int]], tokens_BT, lengths_B) -> torch.Tensor:
        """Head output [B, T+1] for states s_0 … s_T."""
        trunk = self.trunk if self.trunk is not None else trunk_of(self.student)
        # One more column, so that the state behind the last token is computed as well.
        longer_BT = torch.cat([tokens_BT, tokens_BT[:, -1:]], 1)
        gradient = contextlib.nullcontext() if self.trunk is not None else torch.no_grad()
        with self.runtime.autocast(), gradient:
            hidden_BTH = response_hidden(trunk, prompts, longer_BT, lengths_B)
        return self.head(hidden_BTH.float()).squeeze(-1)

    @torch.no_grad()
    def values(self, prompts, tokens_BT, lengths_B, finished_B) -> torch.Tensor:
        """V(s_0 … s_T) [B, T+1] in nats; 0 behind an end token and beyond the row's length."""
        values_BT = self._normalised(prompts, tokens_BT, lengths_B) * self.spread + self.mean
        position_T = torch.arange(values_BT.shape[1], device=values_BT.device)
        last_B1 = lengths_B.unsqueeze(-1)
        alive_BT = (position_T < last_B1) | ((position_T == last_B1) & ~finished_B.unsqueeze(-1))
        return torch.where(alive_BT, values_BT, 0.0)

    # ---- learning ------------------------------------------------------------------------

    def learn(
        self, prompts, tokens_BT, lengths_B, mask_BT, targets_BT, values_BT
    ) -> dict[str, float]:
        """A few regression steps towards the targets [B, T]; nothing happens without tokens.

        Returns the squared error (nats², before learning) and the explained variance of the
        values that were used.
        """
        if not bool(mask_BT.any()):
            return {}
        measured = {
            "critic_ev": explained_variance(values_BT[:, :-1], targets_BT, mask_BT),
            "critic_mse": float((values_BT[:, :-1] - targets_BT)[mask_BT].square().mean()),
        }
        self._rescale(targets_BT[mask_BT])
        goal_BT = (targets_BT - self.mean) / self.spread
        for _ in range(_PASSES):
            guess_BT = self._normalised(prompts, tokens_BT, lengths_B)[:, :-1]
            # Huber beyond three spreads: a single wild return must not move every value.
            loss = torch.nn.functional.huber_loss(guess_BT[mask_BT], goal_BT[mask_BT], delta=3.0)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            parameters = self.optimizer.param_groups[0]["params"]
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if not bool(torch.isfinite(norm)):
                raise FloatingPointError(f"the gradient of critic {self.name}")
            self.optimizer.step()
        return measured

    @torch.no_grad()
    def _rescale(self, targets_N: torch.Tensor) -> None:
        """Move mean and spread towards the targets', and the head the other way."""
        weight = max(1.0 - _MEMORY, 1.0 / (self.updates + 1))
        mean = self.mean + weight * (targets_N.mean() - self.mean)
        spread_now = targets_N.std(correction=0).clamp(min=1e-2)
        spread = (
            spread_now if self.updates == 0 else self.spread + weight * (spread_now - self.spread)
        )
        self.head.weight.mul_(self.spread / spread)
        self.head.bias.copy_((self.spread * self.head.bias + self.mean - mean) / spread)
        self.mean, self.spread = mean, spread
        self.updates += 1

    # ---- checkpoints -----------------------------------------------------------------------

    def modules(self) -> dict[str, Any]:
        return {"head": self.head} | ({"trunk": self.trunk} if self.trunk is not None else {})

    def state(self) -> dict[str, torch.Tensor]:
        tensors = {"mean": self.mean, "spread": self.spread, "updates": torch.tensor(self.updates)}
        for part, module in self.modules().items():
            tensors |= {f"{part}.{n}": p.detach() for n, p in module.named_parameters()}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        device = self.runtime.device
        self.mean, self.spread = tensors["mean"].to(device), tensors["spread"].to(device)
        self.updates = int(tensors["updates"])
        for part, module in self.modules().items():
            for name, parameter in module.named_parameters():
                parameter.copy_(tensors[f"{part}.{name}"])


def lambda_returns(reward_BT, values_BT, mask_BT, gamma: float, lam: float) -> torch.Tensor:
    """λ-returns [B, T]: G_t = r_t + γ((1−λ)V_{t+1} + λG_{t+1}), with G = V behind the last token.

    values_BT [B, T+1] holds 0 behind an end token and the bootstrap at the length cap, so the
    recursion needs no other ending. mask_BT marks real tokens; 0 is returned elsewhere.
    """
    T = reward_BT.shape[1]
    out_BT = torch.zeros_like(reward_BT)
    ahead_B = values_BT[:, T]
    for t in reversed(range(T)):
        # Behind a row's last token the return is the value there, whatever the batch's width.
        inside_B = mask_BT[:, t + 1] if t + 1 < T else torch.zeros_like(mask_BT[:, 0])
        next_B = torch.where(inside_B, ahead_B, values_BT[:, t + 1])
        mixed_B = (1 - lam) * values_BT[:, t + 1] + lam * next_B
        ahead_B = reward_BT[:, t] + gamma * mixed_B
        out_BT[:, t] = torch.where(mask_BT[:, t], ahead_B, 0.0)
    return out_BT
