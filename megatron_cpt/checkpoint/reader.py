"""What every checkpoint format looks like to the rest of the tool: tensors by Hugging Face name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_cpt.config.manifest import sha256_bytes
from megatron_cpt.config.schema import LlamaShape

BLOCK_BYTES = 16 << 20  # tensors are read, converted and compared in blocks of rows of at most this size


class ModelReader(Protocol):
    """A Llama on disk. Tensors come one at a time; what `read` returns must not be changed in place."""

    folder: Path
    llama: LlamaShape
    vocab_size: int

    def names(self) -> list[str]:
        """Hugging Face names of all tensors, in the order of a forward pass."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, the vocabulary without padding."""

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a tensor."""

    def read(self, name: str) -> Tensor:
        """A whole tensor, contiguous."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor's first dimension."""


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Size of a dense tensor in bytes."""
    total = dtype.itemsize
    for size in shape:
        total *= size
    return total


def row_blocks(rows: int, row_bytes: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut [0, rows) into ranges (start, stop) of at most `block_bytes`, at least one row each."""
    step = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def read_blocks(reader: ModelReader, name: str) -> Iterator[Tensor]:
    """A tensor in row order, in blocks of at most BLOCK_BYTES."""
    shape = reader.shape(name)
    for start, stop in row_blocks(shape[0], num_bytes(shape[1:], reader.dtype(name)), BLOCK_BYTES):
        yield reader.read_rows(name, start, stop)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order (no copy when it is contiguous)."""
    if not tensor.numel():  # without a stride it has no view as bytes
        return memoryview(b"")
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers of the elements' size: what is equal in them is equal bit for bit, NaN and -0 too."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize])


class WeightsDigest:
    """SHA-256 of a model's weights, the same in every format and for every way of cutting it up.

    The digest covers, for every HF name in sorted order: name, dtype, shape and the SHA-256 of the
    tensor's bytes. Rows of a tensor have to arrive in ascending order; tensors in any order.

    Args:
        names: the model's tensors, others are left out; None: all that come.
    """

    def __init__(self, names: Iterable[str] | None = None) -> None:
        self._names = None if names is None else frozenset(names)
        self._digests: dict[str, tuple[str, list[int], hashlib._Hash]] = {}

    def update(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], rows: Tensor) -> None:
        """Add the next rows of a tensor."""
        if self._names is not None and name not in self._names:
            return
        if name not in self._digests:
            self._digests[name] = (str(dtype).removeprefix("torch."), list(shape), hashlib.sha256())
        self._digests[name][2].update(raw_bytes(rows))

    def hexdigest(self) -> str:
        """Hex SHA-256 over everything added so far."""
        return weights_sha256(
            {name: (dtype, shape, digest.hexdigest()) for name, (dtype, shape, digest) in self._digests.items()}
        )


def weights_sha256(tensors: Mapping[str, tuple[str, Sequence[int], str]]) -> str:
    """Hex SHA-256 of a model's weights, from (dtype, shape, SHA-256 of its bytes) by HF name; see `WeightsDigest`."""
    listed = {name: [dtype, list(shape), digest] for name, (dtype, shape, digest) in tensors.items()}
    return sha256_bytes(json.dumps(listed, sort_keys=True, separators=(",", ":")).encode())
