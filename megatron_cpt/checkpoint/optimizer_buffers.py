"""The buffers of Megatron's distributed optimizer: the parameters of a model chunk one after the other, unnamed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_cpt.checkpoint.archive_pickle import Array
from megatron_cpt.checkpoint.optimizer_state import LEAVE_BEHIND, buffer_layout, starts_in_buckets
from megatron_cpt.checkpoint.rank_parts import Piece
from megatron_cpt.checkpoint.runs import STATES
from megatron_cpt.errors import CheckpointError

# State -> its name in Megatron's distributed optimizer, in buffers and by parameter.
BUFFER_STATES = dict(zip(STATES, ("param", "exp_avg", "exp_avg_sq"), strict=True))
_PARAMETERS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Buffer:
    """What a tensor-parallel rank's optimizer holds of a model chunk, put together from all data-parallel ranks.

    Attributes:
        pieces: by state, in order.
        total: elements of each state.
        buckets: their sizes, where the checkpoint tells them.
    """

    pieces: Mapping[str, Sequence[Piece]]
    total: int
    buckets: Sequence[int] | None = None

    def starts(
        self, parameters: Sequence[tuple[str, int]], sizes: Iterable[int | None], shared: str | None
    ) -> dict[str, int] | None:
        """Where each parameter begins; None where they are others than those of the buffer.

        Args:
            parameters: name and number of elements, in the order of the modules.
            sizes: at which a bucket may have been closed, the likeliest first.
            shared: a tied table that lies on two stages.
        """
        if self.buckets is not None:
            return starts_in_buckets(parameters, self.buckets)
        for size in sizes:
            starts, total = buffer_layout(parameters, size, shared)
            if total == self.total:
                return starts
        return None

    def cut(self, state: str, start: int, count: int) -> list[Piece]:
        """Where `count` elements from `start` on lie."""
        found = []
        for piece in self.pieces[state]:
            first, stop = max(start, piece.first), min(start + count, piece.first + piece.count)
            if first < stop:
                offset = piece.offset + (first - piece.first) * torch.float32.itemsize
                found.append(Piece(piece.file, offset, first - start, stop - first))
        return found


def world_buffers(value: Any, file: str, where: str) -> dict[int, Buffer]:
    """The buffers by model chunk, from what the distributed optimizer gathers on one rank and saves.

    Args:
        value: of the archive.
        file: that it lies in, below the checkpoint's folder.
        where: for messages.

    Raises:
        CheckpointError: another form, or not what a Llama's optimizer holds.
    """
    if isinstance(value, list) and len(value) == 1:  # an object of torch_dist
        value = value[0]
    if not isinstance(value, Mapping) or value.get("buckets_coalesced") is not True:
        told = f"{len(value)} optimizers" if isinstance(value, list) else "no coalesced buckets"
        raise CheckpointError(f"{where} holds {told}, expected those of one distributed optimizer; {LEAVE_BEHIND}")
    found = {}
    for number, by_dtype in value.items():
        if type(number) is not int:
            continue
        if not isinstance(by_dtype, Mapping) or len(by_dtype) != 1:
            raise CheckpointError(f"{where}: model chunk {number} has several dtypes, expected one; {LEAVE_BEHIND}")
        ((kinds, world),) = by_dtype.items()
        if not isinstance(kinds, tuple) or not kinds or kinds[0] not in _PARAMETERS or not isinstance(world, Mapping):
            raise CheckpointError(f"{where}: parameters of {kinds!r}, expected bfloat16, float16 or float32")
        found_arrays = {state: world.get(stored) for state, stored in BUFFER_STATES.items()}
        arrays = {state: array for state, array in found_arrays.items() if isinstance(array, Array) and _is_flat(array)}
        sizes = {array.shape for array in arrays.values()}
        if len(arrays) != len(found_arrays) or len(sizes) != 1:
            raise CheckpointError(
                f"{where}: model chunk {number} holds {', '.join(map(str, world))}, expected master, moments "
                f"of one size in float32; {LEAVE_BEHIND}"
            )
        ((total,),) = sizes
        pieces = {state: [Piece(file, array.offset, 0, total)] for state, array in arrays.items()}
        found[number] = Buffer(pieces, total)
    return found


def _is_flat(array: Array) -> bool:
    return len(array.shape) == 1 and array.dtype == torch.float32 and (array.strides == (1,) or array.shape[0] < 2)
