"""A frozen model whose weights lie in main memory and visit the device for each call.

A teacher is needed for one forward pass a step. Kept on the device it takes the room of its
weights all the time; on the shelf it takes it during its pass, at the price of one copy a step
(about 1 s for 8 billion bfloat16 parameters over PCIe 4.0 x16, by 16 GB at 16 to 25 GB/s). Nothing
is copied back: the weights do not change.
"""

from __future__ import annotations

from typing import Any

import torch


class Shelf:
    """`with shelf:` the model is on `device`; outside, its weights are in (pinned) main memory.

    Entering twice is counted, so that two roles of one model may overlap.
    """

    def __init__(self, model: Any, device: torch.device | str):
        self.device, self.depth, self.moves = torch.device(device), 0, 0
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        pin = self.device.type == "cuda"
        self.parts = [(t, self._home(t.data, pin)) for t in tensors.values()]
        self._put(home=True)

    @staticmethod
    def _home(x: torch.Tensor, pin: bool) -> torch.Tensor:
        x = x.cpu()
        return x.pin_memory() if pin else x

    def _put(self, home: bool) -> None:
        for tensor, kept in self.parts:
            tensor.data = kept if home else kept.to(self.device, non_blocking=True, copy=True)

    def __enter__(self) -> None:
        if self.depth == 0:
            self._put(home=False)
            self.moves += 1
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self._put(home=True)
