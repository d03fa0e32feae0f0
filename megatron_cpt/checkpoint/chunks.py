"""Chunks of a `torch_dist` checkpoint read and written as tensors: for those that change them, not copy them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_cpt.checkpoint.archive import ArchiveReader
from megatron_cpt.checkpoint.files import file_inside, new_tensor, read_tensor
from megatron_cpt.checkpoint.huggingface import dense
from megatron_cpt.checkpoint.metadata import Chunk, StoredTensor
from megatron_cpt.errors import CheckpointError

MAX_FILE_BYTES = 5_000_000_000
MAX_CHUNK_BYTES = 64 << 20  # of a tensor, in a chunk that is made here


class ChunkFinder:
    """Finds where in its file the data of a chunk begins; many chunks cost little more than two reads each."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._archives = folder, ArchiveReader()
        self._paths: dict[str, Path] = {}

    def offset(self, chunk: Chunk, dtype: torch.dtype) -> int:
        """First byte of the data; raises CheckpointError unless the chunk is the tensor of the index."""
        path = self._paths.get(chunk.file)
        if path is None:
            path = self._paths[chunk.file] = file_inside(self._folder, chunk.file)
        where = f"{path}: the chunk at byte {chunk.start}"
        value = self._archives.read(path, chunk.start, chunk.length, (chunk.size, dtype))
        stored = dense(value, where, path)
        # A layer that was saved on its own lacks the dimension along which layers are stacked.
        if stored.dtype != dtype or chunk.size not in (stored.shape, (1, *stored.shape)):
            raise CheckpointError(f"{where} is {stored.shape}, {stored.dtype}, the index says {chunk.size} {dtype}")
        return stored.offset


class BoxReader:
    """Boxes of stored tensors, whatever chunks they lie in; the chunk read last is kept."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._finder = folder, ChunkFinder(folder)
        self._chunk: tuple[Chunk, Tensor] | None = None  # row blocks of one table share it

    def read(self, stored: StoredTensor, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The box (offset, size) of a stored tensor, from all chunks that share elements with it."""
        stop = tuple(first + count for first, count in zip(offset, size, strict=True))
        out: Tensor | None = None
        for chunk in stored.chunks:
            low = tuple(map(max, offset, chunk.offset))
            high = tuple(map(min, stop, (first + count for first, count in zip(chunk.offset, chunk.size, strict=True))))
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            part = self._load(chunk, stored.dtype)[_slices(low, high, chunk.offset)]
            if (low, high) == (offset, stop):
                return part
            if out is None:
                out = new_tensor(size, stored.dtype)
            out[_slices(low, high, offset)] = part
        return new_tensor(size, stored.dtype) if out is None else out

    def _load(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        if self._chunk is None or self._chunk[0] != chunk:
            self._chunk = None
            offset = self._finder.offset(chunk, dtype)
            self._chunk = (chunk, read_tensor(self._folder / chunk.file, offset, chunk.size, dtype))
        return self._chunk[1]


def _slices(low: tuple[int, ...], high: tuple[int, ...], origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


class DataFiles:
    """The `.distcp` files of a checkpoint, one archive after the other.

    The CRCs inside the archives are left out: torch never checks them, and they cost a third of the time.

    Args:
        folder: where they go.
        name: what their names begin with.
    """

    def __init__(self, folder: Path, name: str = "__0") -> None:
        self._folder, self._begin, self.count = folder, name, 0
        self._file: BinaryIO | None = None
        self._name = ""

    def __enter__(self) -> DataFiles:
        self._checksums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        return self

    def __exit__(self, *_: object) -> None:
        torch.serialization.set_crc32_options(self._checksums)
        self._close()

    def save(self, value: Any) -> tuple[str, int, int]:
        """Append a value; returns (file name, first byte, number of bytes)."""
        if self._file is None or self._file.tell() > MAX_FILE_BYTES:
            self._close()
            self._name = f"{self._begin}_{self.count}.distcp"
            self._file = open(self._folder / self._name, "wb", buffering=1 << 20)  # noqa: SIM115 - closed by _close
            self.count += 1
        start = self._file.tell()
        torch.save(value, self._file)
        return self._name, start, self._file.tell() - start

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
