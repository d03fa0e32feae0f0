"""The documents of a packed row: their boundaries, and their tiles as a list of work for kernels."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_cpt.runtime.device import upload


class Boundaries(Protocol):
    """A one-dimensional integer array: a torch tensor or a NumPy array."""

    def tolist(self) -> Any:
        """Returns the values as a list of Python integers."""


def read_boundaries(cu_seqlens: Boundaries, num_tokens: int) -> tuple[int, ...]:
    """Returns the document starts and then the number of tokens, as they are given.

    Raises:
        ValueError: they do not begin with 0, fall somewhere, or do not end with `num_tokens`.
    """
    boundaries = tuple(cu_seqlens.tolist())
    expected = "expected integers: 0, the further document starts in order, and the number of tokens"
    if not boundaries or not all(isinstance(each, int) for each in boundaries):
        raise ValueError(f"attention: got cu_seqlens {str(list(boundaries))[:80]}; {expected}")
    falling = next(((start, stop) for start, stop in pairwise(boundaries) if stop < start), None)
    if falling is not None:
        raise ValueError(f"attention: got cu_seqlens with {falling[1]} after {falling[0]}; {expected}")
    if boundaries[0] != 0 or boundaries[-1] != num_tokens:
        raise ValueError(
            f"attention: got cu_seqlens from {boundaries[0]} to {boundaries[-1]} for {num_tokens} tokens; {expected}"
        )
    return boundaries


def lengths_differ(boundaries: tuple[int, ...]) -> bool:
    """Returns whether documents that have tokens have different numbers of them."""
    return len({stop - start for start, stop in pairwise(boundaries)} - {0}) > 1


# All layers of a model ask for the same few lists. What an evaluation in inference mode leaves here must serve
# training too, so they are ordinary tensors.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def list_tiles(
    boundaries: tuple[int, ...],
    parts: tuple[tuple[int, range], ...],
    window: int | None,
    of_keys: bool,
    device: torch.device,
    stream: int = 0,
) -> tuple[Tensor, ...]:
    """Returns lists of the documents' tiles, those with the most work first, so that none is left for the end.

    Args:
        boundaries: from `read_boundaries`.
        parts: of each list the rows of a tile, of which the last tile of a document may have fewer, and the lengths
            of the documents that are listed.
        window: tokens before its own that a query sees; None: all.
        of_keys: whether the tiles are of keys, whose work is the queries that see them, or of queries.
        device: where the lists go, all in one copy.
        stream: the current one of the device: a list is ready for work on the stream that it was made on.

    Returns:
        For each part [tiles, 3] int32: first row of the tile, of its document, and the row after the document's last.
    """
    lists = [_tiles(boundaries, block, lengths, window, of_keys) for block, lengths in parts]
    # Each begins at a multiple of 16 bytes, as the kernels are compiled for it.
    padded = [pad(tiles, (0, 0, 0, -len(tiles) % 4)) for tiles in lists]
    uploaded = upload(torch.cat(padded), device).split([len(tiles) for tiles in padded])
    return tuple(copy[: len(tiles)] for copy, tiles in zip(uploaded, lists, strict=True))


def _tiles(boundaries: tuple[int, ...], block: int, lengths: range, window: int | None, of_keys: bool) -> Tensor:
    edges = torch.tensor(boundaries)
    starts, ends = edges[:-1], edges[1:]
    sizes = ends - starts
    listed = (sizes >= max(lengths.start, 1)) & (sizes < lengths.stop)
    starts, ends, sizes = starts[listed], ends[listed], sizes[listed]
    counts = (sizes + block - 1) // block
    document = torch.repeat_interleave(torch.arange(len(counts)), counts)
    position = torch.arange(len(document)) - (counts.cumsum(0) - counts)[document]
    start, end = starts[document], ends[document]
    first = start + position * block
    reach = boundaries[-1] if window is None else window
    if of_keys:
        work = torch.minimum(end, first + block + reach) - first
    else:
        work = torch.minimum(end, first + block) - torch.maximum(start, first - reach)
    order = work.argsort(descending=True, stable=True)
    return torch.stack((first, start, end), 1)[order].to(torch.int32)
