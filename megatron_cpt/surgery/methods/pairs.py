"""How often pairs of ids occur together, counted over a corpus in bounded memory."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_WAITING = 1 << 22  # pairs that wait to be merged, at least; a merge takes five times as much as it holds


class PairCounts:
    """Counts of pairs (a, b), kept sorted; b is below `base`."""

    def __init__(self, base: int) -> None:
        self.base = base
        self._keys, self._counts = np.empty(0, np.int64), np.empty(0, np.int64)
        self._waiting: list[tuple[Array, Array]] = []
        self._num_waiting = 0

    def add(self, first: Array, second: Array, weight: int = 1) -> None:
        """Count the pairs (first[i], second[i]), each as `weight`."""
        keys, counts = np.unique(first.astype(np.int64) * self.base + second, return_counts=True)
        self._waiting.append((keys, counts * weight))
        self._num_waiting += len(keys)
        if self._num_waiting > max(_WAITING, len(self._keys) // 4):
            self._merge()

    def found(self) -> tuple[Array, Array, Array]:
        """(a, b, count) of all pairs, ascending; a and b as int32."""
        self._merge()
        first = (self._keys // self.base).astype(np.int32)
        return first, (self._keys % self.base).astype(np.int32), self._counts

    def _merge(self) -> None:
        parts = [(self._keys, self._counts), *self._waiting]
        self._waiting, self._num_waiting = [], 0
        keys = np.concatenate([part[0] for part in parts])
        counts = np.concatenate([part[1] for part in parts])
        del parts
        order = keys.argsort(kind="stable")
        keys, counts = keys[order], counts[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        self._keys = keys[starts]
        self._counts = np.add.reduceat(counts, starts) if len(starts) else counts


def groups(sorted_ids: Array) -> tuple[Array, Array]:
    """The different numbers of a sorted array, and where each begins, with the end."""
    starts = np.flatnonzero(np.diff(sorted_ids, prepend=-1))
    return sorted_ids[starts], np.append(starts, len(sorted_ids))
