"""megatron-core's `torch_dist` format, without megatron-core and without a process group.

Reading takes what `convert` wrote and what a training run saved in any TP x PP x DP layout: chunks
may be cut anywhere, layers may be stacked or stored one by one, gate and up together or apart.
Optimizer state is skipped unread.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_cpt.checkpoint.files import new_tensor
from megatron_cpt.checkpoint.llama import EXTRA_STATE_MODULES, LAYERS, check_supported, placements, stored_shapes
from megatron_cpt.checkpoint.manifest import read_checkpoint_manifest
from megatron_cpt.checkpoint.metadata import (
    Chunk,
    StoredObject,
    StoredTensor,
    check_cover,
    load_chunk,
    read_metadata,
    write_index,
)
from megatron_cpt.checkpoint.plan import PlannedChunk, PlannedTensor
from megatron_cpt.checkpoint.reader import ModelReader, WeightsDigest, num_bytes
from megatron_cpt.config.manifest import write_json_atomic
from megatron_cpt.errors import CheckpointError

MAX_FILE_BYTES = 5_000_000_000
_NOT_THE_MODEL = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine_state|opt_param_scheduler")
_ONE_LAYER = re.compile(re.escape(LAYERS) + r"(0|[1-9]\d{0,5})\.(.+)")


def open_torch_dist(folder: str | Path) -> TorchDistReader:
    """Open a `torch_dist` folder with its manifest; only the index is read.

    Raises:
        CheckpointError: no manifest, a damaged or hostile index, or tensors that do not match the
            manifest one by one.
    """
    return TorchDistReader(Path(folder))


def holds_optimizer(folder: str | Path) -> bool:
    """Whether a `torch_dist` folder holds an optimizer's moments."""
    return bool(read_metadata(Path(folder), lambda key: "optimizer." in key and ".exp_avg." in key))


class TorchDistReader:
    """The tensors of a `torch_dist` folder by their HF names (a `ModelReader`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_checkpoint_manifest(folder)
        self.llama = check_supported(self.manifest["shape"], str(folder))
        self.vocab_size: int = self.manifest["vocab_size"]
        self.padded_vocab_size: int = self.manifest["padded_vocab_size"]
        self._placements = placements(self.llama, self.vocab_size)
        sizes = stored_shapes(self.llama, self.padded_vocab_size)
        self._tensors = _stack_layers(folder, sizes, read_metadata(folder, lambda key: not _NOT_THE_MODEL.match(key)))
        self._layer: tuple[tuple[str, int], Tensor] | None = None  # the layer's tensor read last: q, k, v share one
        self._boxes = BoxReader(folder)

    def names(self) -> list[str]:
        """Hugging Face names of all tensors, in the order of a forward pass."""
        return list(self._placements)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, the vocabulary without its padding."""
        place = self._place(name)
        size = self._tensors[place.key].size
        return (sum(rows for _, _, rows in place.runs), *(size[1:] if place.layer is None else size[2:]))

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self._tensors[self._place(name).key].dtype

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        return self.read_rows(name, 0, self.shape(name)[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor."""
        place = self._place(name)
        if not 0 <= start <= stop <= self.shape(name)[0]:
            raise IndexError(f"rows {start} to {stop} of {name}, which has {self.shape(name)[0]}")
        if len(place.runs) > 1:
            stored = self._read_layer(place.key, place.layer)
            return torch.cat([stored[row : row + rows] for _, row, rows in place.runs])[start:stop]
        layers = () if place.layer is None else (place.layer,)
        row_shape = self._tensors[place.key].size[1 + len(layers) :]
        offset = (*layers, place.runs[0][1] + start, *(0 for _ in row_shape))
        box = self._assemble(place.key, offset, (*(1 for _ in layers), stop - start, *row_shape))
        return (box[0] if layers else box).contiguous()

    def padding(self, name: str) -> Tensor:
        """The stored rows of a vocabulary table beyond the true vocabulary."""
        key = self._place(name).key
        size = self._tensors[key].size
        return self._assemble(key, (self.vocab_size, 0), (size[0] - self.vocab_size, size[1]))

    def _place(self, name: str) -> Any:
        if name not in self._placements:
            raise CheckpointError(f"{self.folder}: there is no tensor {name!r}")
        return self._placements[name]

    def _read_layer(self, key: str, layer: int) -> Tensor:
        if self._layer is None or self._layer[0] != (key, layer):
            self._layer = None  # let go of the old one first
            size = self._tensors[key].size
            box = self._assemble(key, (layer, *(0 for _ in size[1:])), (1, *size[1:]))
            self._layer = ((key, layer), box[0])
        return self._layer[1]

    def _assemble(self, key: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        return self._boxes.read(self._tensors[key], offset, size)


class BoxReader:
    """Boxes of stored tensors, whatever chunks they lie in; the chunk read last is kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
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
            self._chunk = (chunk, load_chunk(self._folder, chunk, dtype))
        return self._chunk[1]


def _slices(low: tuple[int, ...], high: tuple[int, ...], origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def _stack_layers(
    folder: Path, sizes: dict[str, tuple[int, ...]], found: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Bring every layout to stacked layers and check it against the sizes the manifest leads to."""
    chunks: dict[str, list[Chunk]] = {key: [] for key in sizes}
    dtypes: dict[str, torch.dtype] = {}
    for key, tensor in found.items():
        target, row = key, 0
        prefix: tuple[int, ...] = ()
        if key not in sizes and (match := _ONE_LAYER.fullmatch(key)):
            target, prefix = LAYERS + match[2], (int(match[1]),)
            if target.endswith(("linear_fc1.weight_w", "linear_fc1.weight_v")):  # gate and up stored apart
                row = tensor.size[0] if target.endswith("_v") else 0
                target = target[:-2]
        if target not in sizes:
            raise CheckpointError(f"{folder}: {key} does not belong to the Llama that the manifest describes")
        for chunk in tensor.chunks:
            offset = (*prefix, chunk.offset[0] + row, *chunk.offset[1:])
            chunks[target].append(replace(chunk, offset=offset, size=(*(1 for _ in prefix), *chunk.size)))
        if not prefix and tensor.size != sizes[target]:
            raise CheckpointError(
                f"{folder}: {key} has shape {tensor.size}, the manifest says {sizes[target]}; the weights and the "
                "manifest are of two models"
            )
        if dtypes.setdefault(target, tensor.dtype) != tensor.dtype:
            raise CheckpointError(f"{folder}: {target} is stored as {dtypes[target]} and as {tensor.dtype}")
    for key, size in sizes.items():
        if not chunks[key]:
            raise CheckpointError(f"{folder}: {key} is missing; the checkpoint is incomplete or of another model")
        check_cover(key, size, [(chunk.offset, chunk.size) for chunk in chunks[key]])
    return {key: StoredTensor(dtypes[key], size, tuple(chunks[key])) for key, size in sizes.items()}


def write_torch_dist(
    folder: Path,
    reader: ModelReader,
    plan: list[PlannedTensor],
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a planned checkpoint, all but its manifest; `.metadata` comes last.

    Returns:
        {"files": number of data files, "bytes": bytes of weights, "weights_sha256": digest of the
        weights in HF order, without padding}.
    """
    digest, done = WeightsDigest(), 0
    total = sum(num_bytes(chunk.size, tensor.dtype) for tensor in plan for chunk in tensor.chunks)
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, StoredObject] = {}
    with DataFiles(folder) as files:
        for tensor in plan:
            chunks = []
            for chunk in tensor.chunks:
                place = files.save(_fill(reader, chunk, tensor.dtype, digest))
                chunks.append(Chunk(chunk.offset, chunk.size, *place))
                done += num_bytes(chunk.size, tensor.dtype)
                if on_progress is not None:
                    on_progress(done, total)
            tensors[tensor.key] = StoredTensor(tensor.dtype, tensor.size, tuple(chunks))
        for key in _extra_state_keys(reader.llama.num_layers):
            objects[key] = StoredObject(*files.save([None]))
    torch.save({"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}, folder / "common.pt")
    write_json_atomic(folder / "metadata.json", {"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    write_index(folder, tensors, objects)
    return {"files": files.count, "bytes": total, "weights_sha256": digest.hexdigest()}


def _extra_state_keys(num_layers: int) -> list[str]:
    """megatron-core refuses a checkpoint without these (empty) objects."""
    return [
        f"{LAYERS}{module}._extra_state/shard_{layer}_{num_layers}"
        for module in EXTRA_STATE_MODULES
        for layer in range(num_layers)
    ]


def _fill(reader: ModelReader, chunk: PlannedChunk, dtype: torch.dtype, digest: WeightsDigest) -> Tensor:
    """The tensor of a planned chunk, its padding zero."""
    filled = new_tensor(chunk.size, dtype)
    rows = filled[0] if chunk.stacked else filled
    for piece in chunk.pieces:
        part = reader.read_rows(piece.name, piece.source_row, piece.source_row + piece.rows)
        digest.update(piece.name, dtype, reader.shape(piece.name), part)
        rows[piece.row : piece.row + piece.rows] = part
    return filled


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
