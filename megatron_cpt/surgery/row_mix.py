"""Rows as weighted sums of old rows: new_WD = M_WV @ old_VD, with M sparse."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from megatron_cpt.errors import CheckpointError, InputError

Row = tuple[Sequence[int] | np.ndarray[Any, Any], Sequence[float] | np.ndarray[Any, Any]]  # old rows and weights

_BLOCK_ROWS = 2048  # new rows, and columns of the old ones, that are in fp32 at a time
_BLOCK_COLUMNS = 512
_LONG_ROW = 32
# Elements summed together for shorter rows: they stay in a core's cache, and torch leaves so few to one thread. Where
# other jobs run beside, threads that wait for each other after each of these short steps cost ten times the sums.
_SUM_ELEMENTS = 32000


@dataclass(frozen=True, eq=False)
class RowMix:
    """A sparse matrix M with one row for every new vocabulary row (W new rows from V old ones).

    Row i is `weights[indptr[i]:indptr[i+1]]` at the old rows `indices[indptr[i]:indptr[i+1]]`. A row of one
    index with weight 1 is a copy, a row of none is zero.

    Attributes:
        num_old_rows: V, the old vocabulary's true size.
        indptr: int64, W + 1 offsets.
        indices: int64, old row numbers in [0, V).
        weights: float32, as many as indices.

    Raises:
        InputError: the arrays do not describe such a matrix.
    """

    num_old_rows: int
    indptr: Tensor
    indices: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        indptr, indices, weights = self.indptr, self.indices, self.weights
        sound = (
            (indptr.dtype, indices.dtype, weights.dtype) == (torch.int64, torch.int64, torch.float32)
            and indptr.ndim == indices.ndim == weights.ndim == 1
            and len(indptr) > 1
            and len(indices) == len(weights) == int(indptr[-1])
            and int(indptr[0]) == 0
            and bool((indptr[1:] >= indptr[:-1]).all())
            and bool(((indices >= 0) & (indices < self.num_old_rows)).all())
            and bool(weights.isfinite().all())
        )
        if not sound:
            raise InputError(
                f"a row mix over {self.num_old_rows} old rows is damaged: expected rows of old row numbers in range, "
                "each with a finite weight; make the plan again"
            )

    @classmethod
    def from_rows(cls, rows: Iterable[Row], num_old_rows: int) -> RowMix:
        """Build a mix from one (old row numbers, weights) pair for every new row."""
        indptr: list[int] = [0]
        indices = array("q")  # 12 bytes an entry where lists take 80: some methods make long rows
        weights = array("f")
        for row_indices, row_weights in rows:
            indices.frombytes(np.asarray(row_indices, np.int64).tobytes())
            weights.frombytes(np.asarray(row_weights, np.float32).tobytes())
            indptr.append(len(indices))
        return cls(
            num_old_rows,
            torch.tensor(indptr, dtype=torch.int64),
            torch.from_numpy(np.array(indices, np.int64)),
            torch.from_numpy(np.array(weights, np.float32)),
        )

    @property
    def num_new_rows(self) -> int:
        """W, the number of rows the mix makes."""
        return len(self.indptr) - 1

    def row(self, new_row: int) -> tuple[list[int], list[float]]:
        """Old row numbers and weights of one new row."""
        span = slice(int(self.indptr[new_row]), int(self.indptr[new_row + 1]))
        return self.indices[span].tolist(), self.weights[span].tolist()

    def copied(self) -> Tensor:
        """For every new row, whether it is a copy of one old row (bool, W)."""
        return self._copied.clone()

    @cached_property
    def _copied(self) -> Tensor:
        single = self.indptr.diff() == 1
        single[single.clone()] = self.weights[self.indptr[:-1][single]] == 1.0
        return single

    def only(self, kept_W: Tensor) -> RowMix:
        """The same mix with all other rows zero (`kept_W`: bool, W)."""
        count = torch.where(kept_W, self.indptr.diff(), 0)
        used = torch.repeat_interleave(kept_W, self.indptr.diff())
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
        return RowMix(self.num_old_rows, indptr, self.indices[used], self.weights[used])

    def apply(self, old_VD: Tensor, rows: slice | None = None) -> Tensor:
        """Make new rows from the old table.

        Copies keep every bit. Mixed rows are summed in fp32, in the order of the indices, and then cast; a
        row's value does not depend on which other rows are asked for.

        Args:
            old_VD: the old table in any floating dtype, on any device; rows from `num_old_rows` on (padding)
                are never used.
            rows: which new rows to make; None makes all of them.

        Returns:
            The rows, of the dtype and on the device of `old_VD`.

        Raises:
            CheckpointError: `old_VD` has fewer rows than the mix draws from.
        """
        start, stop, step = (rows or slice(None)).indices(self.num_new_rows)
        wanted = torch.arange(start, stop, step)
        self.check_table(old_VD)
        copied = self._copied[wanted]
        sources = self.indices[self.indptr[wanted[copied]]]
        if bool(copied.all()):
            return old_VD.index_select(0, sources.to(old_VD.device))
        new = old_VD.new_empty(len(wanted), old_VD.shape[1])
        at, summed = (torch.nonzero(mask).flatten() for mask in (copied, ~copied))
        new.index_copy_(0, at.to(new.device), old_VD.index_select(0, sources.to(old_VD.device)))
        new.index_copy_(0, summed.to(new.device), self.mixed(old_VD, wanted[summed]).to(old_VD.dtype))
        return new

    def check_table(self, old_VD: Tensor) -> None:
        """Raise CheckpointError where an old table has fewer rows than the mix draws from."""
        if old_VD.ndim != 2 or old_VD.shape[0] < self.num_old_rows:
            raise CheckpointError(
                f"got an old table of shape {tuple(old_VD.shape)}, expected at least {self.num_old_rows} rows: "
                "the plan was made for another vocabulary"
            )

    def mixed(self, old_VD: Tensor, new_rows: Tensor) -> Tensor:
        """Weighted sums in fp32 of some new rows (int64 row numbers)."""
        count = self.indptr[new_rows + 1] - self.indptr[new_rows]
        is_long = count > _LONG_ROW  # a rule of the row alone: its value does not depend on the others
        if not bool(is_long.any()):
            return self._short_sums(old_VD, new_rows)
        mixed = torch.empty(len(new_rows), old_VD.shape[1], dtype=torch.float32, device=old_VD.device)
        for rows, sums in ((~is_long, self._short_sums), (is_long, self._long_sums)):
            at = rows.nonzero().flatten()
            if len(at):
                mixed.index_copy_(0, at.to(mixed.device), sums(old_VD, new_rows[at]))
        return mixed

    def _short_sums(self, old_VD: Tensor, new_rows: Tensor) -> Tensor:
        """Term by term, few elements at a time."""
        first, count = self.indptr[new_rows], self.indptr[new_rows + 1] - self.indptr[new_rows]
        device, width = old_VD.device, old_VD.shape[1]
        sums = torch.empty(len(new_rows), width, dtype=torch.float32, device=device)
        for block in count.argsort(descending=True).split(max(1, _SUM_ELEMENTS // max(1, width))):
            total = torch.zeros(len(block), width, dtype=torch.float32, device=device)
            for place in range(int(count[block[0]])):
                having = int((count[block] > place).sum())  # the longest sums come first
                at = first[block[:having]] + place
                terms = old_VD.index_select(0, self.indices[at].to(device)).float()
                total[:having] += terms.mul_(self.weights[at, None].to(device))
            sums.index_copy_(0, block.to(device), total)
        return sums

    def _long_sums(self, old_VD: Tensor, new_rows: Tensor) -> Tensor:
        """By one pass over the old rows that are used."""
        first, count = self.indptr[new_rows], self.indptr[new_rows + 1] - self.indptr[new_rows]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
        at = torch.arange(int(starts[-1])) + torch.repeat_interleave(first - starts[:-1], count)
        used, places = self.indices[at].unique(return_inverse=True)
        used, places, starts, weights = (part.to(old_VD.device) for part in (used, places, starts, self.weights[at]))
        total = torch.zeros(len(new_rows), old_VD.shape[1], dtype=torch.float32, device=old_VD.device)
        for column in range(0, old_VD.shape[1], _BLOCK_COLUMNS):
            columns = slice(column, column + _BLOCK_COLUMNS)
            table = old_VD[:, columns].index_select(0, used).float()
            total[:, columns] = embedding_bag(
                places, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
            )
        return total
