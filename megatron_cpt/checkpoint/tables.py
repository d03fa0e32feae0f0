"""A checkpoint seen as its vocabulary tables and the rest: what surgery reads, and what it puts in their place.

Each format has a class with this face. The rest of a checkpoint is not read where it need not be: files that
hold no table get a second name in the new folder (`carry`).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_cpt.checkpoint.files import new_tensor
from megatron_cpt.checkpoint.reader import num_bytes, row_blocks

Matrix = Literal["embedding", "head"]
Rows = Callable[[int, int], Tensor]  # (start, stop) -> rows [start, stop) of a new table
Progress = Callable[[int, int], None]

_BLOCK_BYTES = 8 << 20
# A file that a person may open and save in place would change under both of its names.
SMALL_FILE_BYTES = 1 << 20
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Table:
    """A table with one row for each id of the vocabulary.

    Attributes:
        name: what the format calls it.
        matrix: which of the two matrices it is, or belongs to.
        is_moment: it accompanies the matrix in an optimizer (a mean of gradients, of their squares), where a row
            that was never trained is zero; fp32 masters are weights.
        num_rows: rows that are stored, padding included.
        width: elements of a row.
        dtype: as it is stored.
        masters_of: name of the table whose fp32 masters these are; None: it is no such.
    """

    name: str
    matrix: Matrix
    is_moment: bool
    num_rows: int
    width: int
    dtype: torch.dtype
    masters_of: str | None = None


@dataclass(frozen=True)
class NewTable:
    """What takes a table's place.

    Attributes:
        vocab_size: rows that an id reaches.
        num_rows: rows to store, padding included.
        make: how they come from the old table.
    """

    vocab_size: int
    num_rows: int
    make: Callable[[Tensor], Rows]


class VocabTables(Protocol):
    """A checkpoint of some format.

    Attributes:
        format: its name.
        tied: it has one matrix for both purposes, whatever copies it holds.
        tables: every stored table.
        vocab_size: its true size; None where the format does not say what of a table is padding.
        divisor: what the number of rows is a multiple of by the checkpoint's own rule.
        tensor_parallel: number of files that rows are cut over.
    """

    folder: Path
    format: str
    tied: bool
    tables: tuple[Table, ...]
    vocab_size: int | None
    divisor: int
    tensor_parallel: int

    def read(self, table: Table) -> Tensor:
        """A whole table, its padding included; must not be changed in place."""

    def rewrite(self, folder: Path, new: Mapping[str, NewTable], on_progress: Progress | None = None) -> dict[str, Any]:
        """Write the checkpoint to an existing empty folder with all of its tables replaced, but for its manifest.

        Args:
            folder: where; the source stays as it is.
            new: by name, one for each of `tables`.
            on_progress: called with (bytes done, bytes in all).

        Returns:
            facts: `files` that were written, `files_carried`, `bytes` of weights, `weights_sha256` where it is known.
        """


def carry(source: Path, target: Path) -> None:
    """Give a file a name in another folder: a hard link, or a copy where that cannot be or the file is small."""
    real = source.resolve()
    if real.stat().st_size > SMALL_FILE_BYTES:
        try:
            os.link(real, target)
            return
        except OSError as caught:
            if caught.errno not in _NO_LINK:
                raise
    shutil.copyfile(real, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def blocks(rows: Rows, start: int, stop: int, row_bytes: int) -> Iterator[Tensor]:
    """Rows [start, stop) in order, a few MiB at a time."""
    for first, last in row_blocks(stop - start, row_bytes, _BLOCK_BYTES):
        yield rows(start + first, start + last)


def filled(rows: Rows, start: int, stop: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows [start, stop) as one tensor."""
    made = new_tensor((stop - start, width), dtype)
    first = 0
    for block in blocks(rows, start, stop, num_bytes((width,), dtype)):
        made[first : first + len(block)] = block
        first += len(block)
    return made
