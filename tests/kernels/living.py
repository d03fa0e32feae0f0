"""How much memory tensors take at once while something runs, seen from the ops that make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Living(TorchDispatchMode):
    """Adds up the storages that live at once, but for those of `given`, and counts the matrix products.

    Args:
        given: tensors that are there before.
        counts: which tensors' storages count; all, unless it is stated.
    """

    def __init__(self, *given: Tensor, counts: Callable[[Tensor], bool] = lambda _: True) -> None:
        super().__init__()
        self.peak_bytes, self.products = 0, 0
        self._counts = counts
        self._given = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in given}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self._counts(tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage.cdata not in self._given:
                    self._alive[storage.cdata] = (storage, tensor.untyped_storage().nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))
        return out
