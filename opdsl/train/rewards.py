"""The per-token reward a method's critic is trained on: its own frozen signal, after shaping.

The signal is a node of the method's program. A program of one batch-level sum over it is
compiled once, like any loss; the pass below that sum hands over exactly one number per token,
which is the reward. So whatever a method calls its signal, on either route, is what its critic
learns to predict.

Shapes: B rows, T response tokens, N kept tokens of the batch.
"""

from __future__ import annotations

from typing import Any

import torch


class Rewards:
    """Evaluates the signal of a method's reward term. Raises LookupError if it has none."""

    def __init__(self, method: Any):
        from opdsl.emit.module import emit, key
        from opdsl.emit.runtime import LossModule
        from opdsl.ir.derive import strip
        from opdsl.ir.program import Part, Program, lift_token
        from opdsl.meaning.quantity import Axis
        from opdsl.passport.returns import critic_term

        term = critic_term(method.spec)
        if term is None or term.signal is None:
            raise LookupError(f"{method.name} has a critic and no reward for it to predict")
        builder = method.program.builder
        signal = lift_token(builder, strip(builder, term.signal))
        quantity = signal.q.with_(axis=Axis.CONST, low=float("-inf"), high=float("inf"))
        total = lift_token(builder, builder.make("sum_b", (signal,), quantity))
        program = Program(method.spec, (Part("main", (), total, ()),))
        self.module = LossModule(program, emit(program))
        self.key, self.program, self.signal = key(signal), method.program, signal

    @torch.no_grad()
    def __call__(self, batch: Any, mask_BT: torch.Tensor) -> torch.Tensor:
        """Rewards [B, T] in nats, 0 outside the mask."""
        (context,) = self.module.prepare([batch])
        reward_N = context.imports["main"].get(self.key)
        if reward_N is None:
            reward_N = self._of_inputs(batch)
        out_BT = torch.zeros(mask_BT.shape, dtype=torch.float32, device=mask_BT.device)
        out_BT[mask_BT] = reward_N.float()
        return out_BT

    def _of_inputs(self, batch: Any) -> torch.Tensor:
        """A signal made of batch inputs alone (an outcome, say) crosses no pass; the oracle's
        evaluator is slower and knows every node."""
        from opdsl.ir.interpret import Evaluator, dense64

        return Evaluator(batch, dense64(batch, "student"))(self.signal).detach()
