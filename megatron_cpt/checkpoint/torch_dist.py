"""megatron-core's `torch_dist` format, without megatron-core and without a process group.

Reading takes what `convert` wrote and what a training run saved in any TP x PP x DP layout: chunks
may be cut anywhere, layers may be stacked or stored one by one, gate and up together or apart.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.archive import archive_bytes, lay_out_archive, read_archive
from megatron_cpt.checkpoint.chunks import MAX_CHUNK_BYTES, MAX_FILE_BYTES, ChunkFinder
from megatron_cpt.checkpoint.described import Hints, args_of_llama, describe
from megatron_cpt.checkpoint.files import file_inside
from megatron_cpt.checkpoint.layout import NewFile, NewLayout, hole
from megatron_cpt.checkpoint.llama import (
    EMBEDDING,
    EXTRA_STATE_MODULES,
    LAYERS,
    STORED_EMBEDDING,
    placements,
    stored_shapes,
)
from megatron_cpt.checkpoint.metadata import (
    Chunk,
    StoredObject,
    StoredTensor,
    check_chunks,
    read_index,
    read_metadata,
    write_index,
)
from megatron_cpt.checkpoint.optimizer_buffers import BUFFER_STATES
from megatron_cpt.checkpoint.rank_parts import Key, Named, RankBoxes
from megatron_cpt.checkpoint.reader import num_bytes, row_blocks
from megatron_cpt.checkpoint.runs import MASTER, STATES, WEIGHTS, Box, StoredModel
from megatron_cpt.checkpoint.torch_dist_optimizer import TorchDistState, common_state
from megatron_cpt.config.manifest import MANIFEST, write_json_atomic
from megatron_cpt.errors import CheckpointError

_ONE_LAYER = re.compile(re.escape(LAYERS) + r"(0|[1-9]\d{0,5})\.(.+)")
_OF_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.")
_NOT_THE_MODEL = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine_state|opt_param_scheduler")
Boxes = dict[Key, list[Box]]


def open_torch_dist(folder: str | Path, with_optimizer: bool = False, hints: Hints | None = None) -> StoredModel:
    """Open a `torch_dist` folder; only the index and the headers of chunks are read.

    Args:
        folder: the checkpoint.
        with_optimizer: find the state of its optimizer too; else that is skipped unread.
        hints: what a checkpoint of Megatron's, which has no manifest, does not say of itself.

    Raises:
        CheckpointError: not described, a damaged or hostile index, or tensors that do not match the
            manifest one by one.
    """
    folder = Path(folder)
    held = _Seen(with_optimizer)
    index, objects = read_index(folder, held.is_wanted)
    size = index[STORED_EMBEDDING].size if STORED_EMBEDDING in index else (0, 0)
    if len(size) != 2:
        raise CheckpointError(f"{folder}: {STORED_EMBEDDING} has shape {size}, expected a matrix; it is damaged")
    rows = size[0]
    common = _common(folder) if with_optimizer or not (folder / MANIFEST).exists() else {}
    described = describe(folder, _args(folder, common), rows, hints)
    llama, vocab_size = described.llama, described.vocab_size
    padded = described.stated.get("padded_vocab_size", rows)
    sizes = stored_shapes(llama, padded)
    weights = {key: tensor for key, tensor in index.items() if not _OF_OPTIMIZER.match(key)}
    if not weights:
        raise CheckpointError(f"{folder} holds no weights; it is incomplete or of another model")
    named, finder = Named(), ChunkFinder(folder)

    def add(kind: str, found: Mapping[str, StoredTensor]) -> None:
        stacked = _stack_layers(folder, sizes, found)
        boxes = _boxes(finder, stacked)
        dtypes = {key: stacked[key[0]].dtype for key in boxes}
        named.add(kind, llama, (vocab_size, padded), RankBoxes(boxes), dtypes, str(folder))

    add(WEIGHTS, weights)
    facts = None
    if with_optimizer and held.optimizer:
        state = TorchDistState(folder, index, objects, common)
        for kind, found in state.named.items():
            add(kind, found)
        for kind, boxes in state.buffered(llama, padded).items():
            dtypes = dict.fromkeys(boxes.parts, torch.float32)
            named.add(kind, llama, (vocab_size, padded), boxes, dtypes, str(folder))
        facts = state.facts()
    return StoredModel(
        folder,
        "torch_dist",
        llama,
        vocab_size,
        padded,
        named.tensors,
        named.padding,
        named.copies,
        described.stated,
        optimizer=facts,
        holds_optimizer=held.optimizer,
    )


class _Seen:
    """Which keys are read, and whether there is more."""

    def __init__(self, with_optimizer: bool) -> None:
        self.with_optimizer, self.optimizer = with_optimizer, False

    def is_wanted(self, key: str) -> bool:
        """Whether a key is of the model, or of its optimizer where that is asked for."""
        of_optimizer = bool(_OF_OPTIMIZER.match(key))
        self.optimizer |= of_optimizer
        return self.with_optimizer if of_optimizer else not _NOT_THE_MODEL.match(key)


def _common(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds once, for all ranks."""
    common = read_archive(file_inside(folder, "common.pt")) if (folder / "common.pt").exists() else {}
    return common if isinstance(common, dict) else {}


def _args(folder: Path, common: Mapping[str, Any]) -> dict[str, Any] | None:
    """Megatron's arguments, where a training run of it saved them."""
    args = None if (folder / MANIFEST).exists() else common.get("args")
    return vars(args) if isinstance(args, Namespace) else None


def holds_optimizer(folder: str | Path) -> bool:
    """Whether a `torch_dist` folder holds an optimizer's moments."""
    return bool(read_metadata(Path(folder), lambda key: "optimizer." in key and ".exp_avg." in key))


def _boxes(finder: ChunkFinder, tensors: Mapping[str, StoredTensor]) -> Boxes:
    """Where the matrices lie that chunks are made of: one for a layer, or for a tensor that has none."""
    boxes: Boxes = defaultdict(list)
    for key, tensor in tensors.items():
        for chunk in tensor.chunks:
            offset = finder.offset(chunk, tensor.dtype)
            layered = key.startswith(LAYERS)
            first, *low = chunk.offset if layered else (0, *chunk.offset)
            count, *extent = chunk.size if layered else (1, *chunk.size)
            rows, columns = (*extent, 1)[:2]
            for layer in range(count):
                at = offset + layer * rows * columns * tensor.dtype.itemsize
                number = first + layer if layered else None
                boxes[key, number].append(Box(chunk.file, at, low[0], rows, (*low, 0)[1], columns))
    return boxes


def lay_out_torch_dist(
    source: StoredModel,
    dtypes: Mapping[str, torch.dtype],
    padded_size: int,
    chunk_bytes: int = MAX_CHUNK_BYTES,
) -> NewLayout:
    """Lay out tensors in chunks of one layer and at most `chunk_bytes`.

    Args:
        source: the model.
        dtypes: by name, of each tensor that is written, the state of an optimizer among them.
        padded_size: rows of the vocabulary tables.
        chunk_bytes: largest chunk.
    """
    files = _Files()
    named = Named()
    index: dict[str, StoredTensor] = {}
    places = placements(source.llama, source.vocab_size)
    for kind in (WEIGHTS, *STATES):
        prefix = "" if kind == WEIGHTS else f"{kind}/"
        if prefix + EMBEDDING not in dtypes:
            continue
        stored_prefix = "" if kind == WEIGHTS else f"optimizer.state.{BUFFER_STATES[kind]}."
        boxes: Boxes = defaultdict(list)
        by_key: dict[Key, torch.dtype] = {}
        for key, size in stored_shapes(source.llama, padded_size).items():
            dtype = next(dtypes[prefix + name] for name, at in places.items() if at.key == key)
            chunks = []
            for layer in range(size[0]) if key.startswith(LAYERS) else (None,):
                by_key[key, layer] = dtype
                for box, chunk in _lay_out_matrix(files, layer, size, dtype, chunk_bytes):
                    boxes[key, layer].append(box)
                    chunks.append(chunk)
            index[stored_prefix + key] = StoredTensor(dtype, size, tuple(chunks))
        named.add(kind, source.llama, (source.vocab_size, padded_size), RankBoxes(boxes), by_key, "the new checkpoint")
    nothing = archive_bytes([None])
    objects = {
        key: StoredObject(*files.add(len(nothing), [(0, nothing)]))
        for key in _extra_state_keys(source.llama.num_layers)
    }
    kind = str(dtypes[EMBEDDING]).removeprefix("torch.")
    args = args_of_llama(source.llama, source.vocab_size, padded_size, padded_size, kind)
    # Megatron compares these with its own before it reads chunks, which are cut for no rank.
    vars(args).update(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    common: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}, "args": args}
    if source.optimizer is not None and f"{MASTER}/{EMBEDDING}" in dtypes:
        step = source.stated.get("step") or source.optimizer.step
        common |= common_state(source.optimizer, args, step)
    finish = partial(_finish, tensors=index, objects=objects, common=common)
    return NewLayout(files.made(), named.tensors, finish, named.padding)


def _lay_out_matrix(
    files: _Files, layer: int | None, size: tuple[int, ...], dtype: torch.dtype, chunk_bytes: int
) -> list[tuple[Box, Chunk]]:
    """The chunks of a stored matrix: of one layer, or of a tensor that has none."""
    layers = () if layer is None else (layer,)
    rows, *row_shape = size[len(layers) :]
    made = []
    for start, stop in row_blocks(rows, num_bytes(tuple(row_shape), dtype), chunk_bytes):
        extent = (*(1 for _ in layers), stop - start, *row_shape)
        size_bytes, parts, offset = files.archive(extent, dtype)
        file, begin, length = files.add(size_bytes, parts)
        made.append(
            (
                Box(file, begin + offset, start, stop - start, 0, (*row_shape, 1)[0]),
                Chunk((*layers, start, *(0 for _ in row_shape)), extent, file, begin, length),
            )
        )
    return made


class _Files:
    """Data files that grow by one archive after the other, none of it written yet."""

    def __init__(self) -> None:
        self._held: list[tuple[int, list[tuple[int, bytes]]]] = []
        self._archives: dict[tuple[tuple[int, ...], torch.dtype], tuple[int, list[tuple[int, bytes]], int]] = {}

    def archive(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, list[tuple[int, bytes]], int]:
        """Size, headers and place of the data of an archive that holds one tensor."""
        if (shape, dtype) not in self._archives:
            size, parts, (offset,) = lay_out_archive(hole(shape, dtype))
            self._archives[shape, dtype] = size, parts, offset
        return self._archives[shape, dtype]

    def add(self, size: int, parts: list[tuple[int, bytes]]) -> tuple[str, int, int]:
        """Append an archive; returns (file name, first byte, number of bytes)."""
        if not self._held or self._held[-1][0] > MAX_FILE_BYTES:
            self._held.append((0, []))
        begin, before = self._held[-1]
        before.extend((begin + at, data) for at, data in parts)
        self._held[-1] = begin + size, before
        return self._name(len(self._held) - 1), begin, size

    def made(self) -> tuple[NewFile, ...]:
        """All files."""
        return tuple(NewFile(self._name(i), size, tuple(parts)) for i, (size, parts) in enumerate(self._held))

    def _name(self, number: int) -> str:
        return f"__0_{number}.distcp"


def _finish(
    folder: Path, tensors: Mapping[str, StoredTensor], objects: Mapping[str, StoredObject], common: Mapping[str, Any]
) -> None:
    """Write what is not tensors; `.metadata`, without which nothing is loaded, comes last."""
    (folder / "common.pt").write_bytes(archive_bytes(dict(common)))
    write_json_atomic(folder / "metadata.json", {"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    write_index(folder, tensors, objects)


def _stack_layers(
    folder: Path, sizes: dict[str, tuple[int, ...]], found: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Bring every layout to stacked layers and check it against the sizes the manifest leads to."""
    chunks: dict[str, list[Chunk]] = {key: [] for key in sizes}
    dtypes: dict[str, torch.dtype] = {}
    for key, tensor in found.items():
        target, row = key, 0
        prefix: tuple[int, ...] = ()
        if key not in sizes and tensor.size and (match := _ONE_LAYER.fullmatch(key)):
            target, prefix = LAYERS + match[2], (int(match[1]),)
            if target.endswith(("linear_fc1.weight_w", "linear_fc1.weight_v")):  # gate and up stored apart
                row = tensor.size[0] if target.endswith("_v") else 0
                target = target[:-2]
        if target not in sizes or not tensor.size:
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
        check_chunks(key, size, chunks[key])
    return {key: StoredTensor(dtypes[key], size, tuple(chunks[key])) for key, size in sizes.items()}


def _extra_state_keys(num_layers: int) -> list[str]:
    """megatron-core refuses a checkpoint without these (empty) objects."""
    return [
        f"{LAYERS}{module}._extra_state/shard_{layer}_{num_layers}"
        for module in EXTRA_STATE_MODULES
        for layer in range(num_layers)
    ]
