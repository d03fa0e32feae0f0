"""What a `torch_dist` checkpoint will hold, chunk by chunk, settled before a byte is written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_cpt.checkpoint.llama import STORED_EMBEDDING, STORED_HEAD, placements, stored_shapes
from megatron_cpt.checkpoint.metadata import check_cover
from megatron_cpt.checkpoint.reader import BLOCK_BYTES, ModelReader, num_bytes, row_blocks
from megatron_cpt.errors import CheckpointError

Runs = tuple[tuple[int, int, int], ...]  # as in llama.Placement


@dataclass(frozen=True)
class Piece:
    """`rows` rows of an HF tensor from `source_row` on, which become rows of a chunk from `row` on."""

    name: str
    source_row: int
    row: int
    rows: int


@dataclass(frozen=True)
class PlannedChunk:
    """A box of a stored tensor and what fills it; rows that no piece fills are zero (padding).

    `stacked`: the first dimension counts layers (the box holds one), rows are the second.
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]
    stacked: bool
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class PlannedTensor:
    """A stored tensor in chunks."""

    key: str
    size: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[PlannedChunk, ...]


def plan_torch_dist(reader: ModelReader, padded_size: int, block_bytes: int = BLOCK_BYTES) -> list[PlannedTensor]:
    """Plan the `torch_dist` form of a model, in chunks of one layer and at most `block_bytes`.

    Raises:
        CheckpointError: a source row would be lost or used twice, a stored element would be written
            twice or never, or shapes or dtypes do not fit together.
    """
    sources: dict[str, dict[int | None, dict[str, Runs]]] = defaultdict(lambda: defaultdict(dict))
    for name, place in placements(reader.llama, reader.vocab_size).items():
        sources[place.key][place.layer][name] = place.runs
    plan = []
    for key, size in stored_shapes(reader.llama, padded_size).items():
        dtypes = {reader.dtype(name) for runs in sources[key].values() for name in runs}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{reader.folder}: the tensors of {key} have dtypes {', '.join(sorted(map(str, dtypes)))}, "
                "expected one; state the dtype to convert to"
            )
        dtype = dtypes.pop()
        chunks = [
            chunk for layer, runs in sources[key].items() for chunk in _chunks(layer, runs, size, dtype, block_bytes)
        ]
        plan.append(PlannedTensor(key, size, dtype, tuple(chunks)))
    check_plan(reader, plan)
    return plan


def check_plan(reader: ModelReader, plan: list[PlannedTensor]) -> None:
    """Raise CheckpointError unless every source row is used once and every stored element filled once."""
    used: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for tensor in plan:
        check_cover(tensor.key, tensor.size, [(chunk.offset, chunk.size) for chunk in tensor.chunks])
        for chunk in tensor.chunks:
            rows, *row_shape = chunk.size[1:] if chunk.stacked else chunk.size
            filled = 0
            for piece in sorted(chunk.pieces, key=lambda piece: piece.row):
                if piece.row != filled or reader.shape(piece.name)[1:] != tuple(row_shape):
                    raise CheckpointError(
                        f"{tensor.key}: {piece.name} does not fit at row {piece.row} of {chunk.offset}"
                    )
                filled += piece.rows
                used[piece.name].append((piece.source_row, piece.rows))
            padded = tensor.key in (STORED_EMBEDDING, STORED_HEAD) and chunk.offset[0] + filled >= reader.vocab_size
            if filled != rows and not padded:
                raise CheckpointError(
                    f"{tensor.key}: rows {filled} to {rows} of the chunk at {chunk.offset} have no source"
                )
    for name in reader.names():
        position = 0
        for start, rows in sorted(used.pop(name, [])):
            if start != position:
                raise CheckpointError(f"{name}: row {min(start, position)} would be lost or used twice")
            position += rows
        if position != reader.shape(name)[0]:
            raise CheckpointError(f"{name}: rows from {position} on would be lost")
    if used:
        raise CheckpointError(f"the plan uses {sorted(used)[0]}, which {reader.folder} does not hold")


def _chunks(
    layer: int | None, runs: dict[str, Runs], size: tuple[int, ...], dtype: torch.dtype, block_bytes: int
) -> Iterator[PlannedChunk]:
    rows, *row_shape = size if layer is None else size[1:]
    layers = () if layer is None else (layer,)
    for start, stop in row_blocks(rows, num_bytes(tuple(row_shape), dtype), block_bytes):
        offset = (*layers, start, *(0 for _ in row_shape))
        extent = (*(1 for _ in layers), stop - start, *row_shape)
        yield PlannedChunk(offset, extent, layer is not None, _pieces(runs, start, stop))


def _pieces(sources: dict[str, Runs], start: int, stop: int) -> tuple[Piece, ...]:
    """What fills rows [start, stop) of a stored tensor's layer."""
    pieces = []
    for name, runs in sources.items():
        for source_row, stored_row, rows in runs:
            first, last = max(start, stored_row), min(stop, stored_row + rows)
            if first < last:
                pieces.append(Piece(name, source_row + first - stored_row, first - start, last - first))
    return tuple(sorted(pieces, key=lambda piece: piece.row))
