"""What operations allocate: every new storage, the largest, and the most that was alive at once.

Seen are the storages behind the tensors that operations return; what a library takes and frees
within one operation (the workspace of a sort or a product) is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Bytes of the storages made under this mode: `largest`, `alive` now, `peak`, all in bytes.

    given: tensors that were there before. wide: entries of a row of the vocabulary; `tiles` then
    counts only storages that hold a row of it (gradients of a head aside), and `tallest` their most.
    """

    def __init__(self, given: Iterable[Tensor] = ()):
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.made: list[tuple[int, str]] = []
        self._seen: dict[int, weakref.ref] = {}
        self._given = [x.untyped_storage() for x in given]
        for storage in self._given:
            self._seen[storage.data_ptr()] = weakref.ref(storage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._note(x.untyped_storage(), func.name())
        return out

    def _note(self, storage: UntypedStorage, name: str) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        known = self._seen.get(place)
        if not size or (known is not None and known() is not None):
            return
        self._seen[place] = weakref.ref(storage)
        weakref.finalize(storage, self._gone, size)
        self.made.append((size, name))
        self.largest = max(self.largest, size)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def _gone(self, size: int) -> None:
        self.alive -= size
