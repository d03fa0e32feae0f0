"""New files of a checkpoint, laid out to the last byte before one is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from megatron_cpt.checkpoint.archive_pickle import Array, dense_strides
from megatron_cpt.checkpoint.runs import Placed, StoredModel, check_runs
from megatron_cpt.errors import CheckpointError


@dataclass(frozen=True)
class Target:
    """The form of a new checkpoint; `convert` refuses sizes that a format has no use for.

    Attributes:
        format: "hf", "torch_dist", "mp_rank", "meta" or "nxd".
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        vpp: model chunks of each pipeline rank.
        spec: whose names a legacy file has: Transformer Engine's modules ("te") or megatron-core's own ("local").
        vocab_divisor: the vocabulary tables are padded to a multiple of this.
        optimizer_form: of a legacy file's state: of Megatron's "distributed" optimizer or of its "plain" one.
    """

    format: str
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    spec: str = "te"
    vocab_divisor: int = 128
    optimizer_form: str = "distributed"


@dataclass(frozen=True)
class NewFile:
    """A file of known size.

    Attributes:
        name: path below the new folder.
        size: in bytes.
        parts: (offset, bytes) of all that is neither a tensor nor padding: headers.
    """

    name: str
    size: int
    parts: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True)
class NewLayout:
    """What a new checkpoint consists of.

    Attributes:
        files: those that hold tensors.
        tensors: where each goes, by the source's names.
        padding: rows of the vocabulary tables that belong to no id; they are zero.
        copies: where a tensor goes a second time, as norms do on every tensor-parallel rank.
        finish: writes, into the folder, the files without which nothing can be loaded.
    """

    files: tuple[NewFile, ...]
    tensors: dict[str, Placed]
    finish: Callable[[Path], None]
    padding: dict[str, Placed] = field(default_factory=dict)
    copies: dict[str, tuple[Placed, ...]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def hole(shape: tuple[int, ...], dtype: torch.dtype) -> Array:
    """A tensor that an archive leaves room for."""
    return Array(-1, shape, dense_strides(shape), dtype)


def check_layout(source: StoredModel, layout: NewLayout, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise CheckpointError unless every element goes to one place and every byte comes from one.

    Every named tensor of the source is laid out once, in its shape and this dtype, and no other; each run lies in a
    file; headers, tensors and padding together fill every file without a gap or an overlap.
    """
    if dtypes.keys() != layout.tensors.keys():
        wrong = sorted(dtypes.keys() ^ layout.tensors.keys())
        raise CheckpointError(f"{source.folder}: {wrong[0]} (and {len(wrong) - 1} more) would be lost or made up")
    for name, placed in layout.tensors.items():
        if placed.shape != source.shape(name):
            raise CheckpointError(f"{name}: laid out as {placed.shape}, the source has {source.shape(name)}")
        for each in (placed, *layout.copies.get(name, ())):
            if each.dtype != dtypes[name]:
                raise CheckpointError(
                    f"{source.folder}: {name} and what is stored with it in one matrix have dtypes {dtypes[name]} and "
                    f"{each.dtype}, expected one; state the dtype to convert to"
                )
        for each in (source.tensors[name], placed, *layout.copies.get(name, ())):
            check_runs(name, each)
    for name, placed in layout.padding.items():
        check_runs(f"padding of {name}", placed)
    extents = tensor_extents([layout.tensors, layout.padding], layout.copies)
    if unknown := sorted(extents.keys() - {file.name for file in layout.files}):
        raise CheckpointError(f"{unknown[0]}: tensors would go to a file that is not made")
    for file in layout.files:
        parts = np.array([(at, at + len(data)) for at, data in file.parts], dtype=np.int64).reshape(-1, 2)
        check_filled(file.name, file.size, np.concatenate([extents.get(file.name, parts[:0]), parts]))


def tensor_extents(
    tables: Iterable[Mapping[str, Placed]], copies: Mapping[str, tuple[Placed, ...]]
) -> dict[str, np.ndarray]:
    """By file, where tensors lie: rows of (first byte, last byte + 1), in no order."""
    found: dict[str, list[np.ndarray]] = {}
    held = [placed for table in tables for placed in table.values()]
    for placed in (*held, *(copy for each in copies.values() for copy in each)):
        itemsize = placed.dtype.itemsize
        for run in placed.runs:
            size = run.columns * itemsize
            rows, size = (1, size * run.rows) if run.pitch == size else (run.rows, size)
            first = run.offset + np.arange(rows, dtype=np.int64) * run.pitch
            if size:
                found.setdefault(run.file, []).append(np.stack([first, first + size], axis=1))
    return {name: np.concatenate(each) for name, each in found.items()}


def check_filled(name: str, size: int, extents: np.ndarray) -> None:
    """Raise CheckpointError unless the extents fill [0, size) without a gap or an overlap."""
    borders = gaps(name, size, extents)
    if len(borders):
        first, last = borders[0]
        raise CheckpointError(f"{name}: bytes {first} to {last} of {size} would hold nothing")


def gaps(name: str, size: int, extents: np.ndarray) -> np.ndarray:
    """What of [0, size) no extent covers, as rows of (first byte, last byte + 1); raises where two overlap."""
    extents = extents[extents[:, 1] > extents[:, 0]]
    extents = extents[np.argsort(extents[:, 0], kind="stable")]
    starts, stops = np.append(extents[:, 0], size), np.insert(extents[:, 1], 0, 0)
    if (starts < stops).any():
        at = int(starts[starts < stops][0])
        raise CheckpointError(f"{name}: two tensors share the byte {at}, or it lies behind the file's end ({size})")
    open_ = starts > stops
    return np.stack([stops[open_], starts[open_]], axis=1)
