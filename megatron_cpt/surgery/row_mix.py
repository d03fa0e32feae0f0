"""New vocabulary rows as weighted sums of old ones: new_WD = M_WV @ old_VD, with M sparse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cpt.errors import CheckpointError, InputError

_BLOCK_ROWS = 2048  # bounds the fp32 copy of the rows being mixed


@dataclass(frozen=True, eq=False)
class RowMix:
    """A sparse matrix M with one row for every new vocabulary row (W new rows from V old ones).

    Row i is `weights[indptr[i]:indptr[i+1]]` at the old rows `indices[indptr[i]:indptr[i+1]]`. A row of one
    index with weight 1 is a copy.

    Attributes:
        num_old_rows: V, the old vocabulary's true size.
        indptr: int64, W + 1 offsets.
        indices: int64, old row numbers in [0, V).
        weights: float32, as many as indices.

    Raises:
        InputError: the arrays do not describe such a matrix, or a row has no source.
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
            and bool((indptr[1:] > indptr[:-1]).all())
            and int(indices.min()) >= 0
            and int(indices.max()) < self.num_old_rows
            and bool(weights.isfinite().all())
        )
        if not sound:
            raise InputError(
                f"a row mix over {self.num_old_rows} old rows is damaged: expected for every new row at least one old "
                "row in range and a finite weight; make the plan again"
            )

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[Sequence[int], Sequence[float]]], num_old_rows: int) -> RowMix:
        """Build a mix from one (old row numbers, weights) pair for every new row."""
        indptr: list[int] = [0]
        indices: list[int] = []
        weights: list[float] = []
        for row_indices, row_weights in rows:
            indices.extend(row_indices)
            weights.extend(row_weights)
            indptr.append(len(indices))
        return cls(
            num_old_rows,
            torch.tensor(indptr, dtype=torch.int64),
            torch.tensor(indices, dtype=torch.int64),
            torch.tensor(weights, dtype=torch.float32),
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
        first = self.indptr[:-1]
        return (self.indptr.diff() == 1) & (self.weights[first] == 1.0)

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
        if old_VD.ndim != 2 or old_VD.shape[0] < self.num_old_rows:
            raise CheckpointError(
                f"got an old table of shape {tuple(old_VD.shape)}, expected at least {self.num_old_rows} rows: "
                "the plan was made for another vocabulary"
            )
        start, stop, step = (rows or slice(None)).indices(self.num_new_rows)
        wanted = torch.arange(start, stop, step)
        first = self.indptr[wanted]
        new = old_VD.index_select(0, self.indices[first].to(old_VD.device))
        mixed = torch.nonzero(~self.copied()[wanted]).flatten()
        for block in mixed.split(_BLOCK_ROWS) if len(mixed) else ():
            new[block.to(old_VD.device)] = self._mixed(old_VD, wanted[block]).to(old_VD.dtype)
        return new

    def _mixed(self, old_VD: Tensor, new_rows: Tensor) -> Tensor:
        """Weighted sums in fp32 of some new rows."""
        first, count = self.indptr[new_rows], self.indptr[new_rows + 1] - self.indptr[new_rows]
        total = torch.zeros(len(new_rows), old_VD.shape[1], dtype=torch.float32, device=old_VD.device)
        for place in range(int(count.max())):
            having = torch.nonzero(count > place).flatten()
            at = first[having] + place
            terms = old_VD.index_select(0, self.indices[at].to(old_VD.device)).float()
            total[having.to(old_VD.device)] += terms * self.weights[at, None].to(old_VD.device)
        return total

    def blocks(self, old_VD: Tensor, block_rows: int) -> Iterator[Tensor]:
        """All new rows in order, `block_rows` at a time."""
        for start in range(0, self.num_new_rows, block_rows):
            yield self.apply(old_VD, slice(start, start + block_rows))
