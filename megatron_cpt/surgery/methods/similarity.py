"""From vectors to weights: the shared pieces that a new piece is like, and how much of each.

Similarities are made for a block of new pieces, used and dropped, so that no matrix of all of them is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_cpt.errors import CheckpointError
from megatron_cpt.surgery.row_mix import Row
from megatron_cpt.surgery.threads import in_blocks

_BLOCK_ELEMENTS = 1 << 24  # similarities that a thread holds
_FIRST_SUPPORT = 64


def unit(vectors_NE: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays.

    Raises:
        CheckpointError: a row is not finite.
    """
    length = vectors_NE.norm(dim=1, keepdim=True)
    if not bool(length.isfinite().all()):
        first = int((~length.flatten().isfinite()).nonzero()[0])
        raise CheckpointError(f"the vector of row {first} is not finite: the model it is from is damaged")
    return vectors_NE / length.clamp(min=1e-30)


def topk_weights(new_NE: Tensor, old_OE: Tensor, top_k: int, temperature: float) -> Iterator[Row]:
    """For each new vector the places of the most similar old ones and softmax(cosine / temperature) over them.

    Both sides are unit vectors.

    Yields:
        (places, weights), in the order of the new vectors.
    """
    count = min(top_k, len(old_OE))

    def best(block_BE: Tensor) -> tuple[Tensor, Tensor]:
        cosines, places = (block_BE @ old_OE.T).topk(count)
        return places, torch.softmax(cosines.double() / temperature, dim=1).float()

    for places, weights in in_blocks(best, row_blocks(new_NE, len(old_OE))):
        yield from zip(places.numpy(), weights.numpy(), strict=True)


def sparsemax_weights(new_NE: Tensor, old_OE: Tensor) -> Iterator[Row]:
    """For each new vector the places and weights of sparsemax over its cosines to all old ones.

    sparsemax(z) is the point of the simplex next to z: max(0, z_u - t), with t such that the sum is 1. Both
    sides are unit vectors. The result is exact, and only as long as the support: t needs the largest cosines
    alone, as many as are found to be in it.

    Source: Martins and Astudillo 2016 (arXiv 1602.02068), algorithm 1.

    Yields:
        (places, weights), the largest first, in the order of the new vectors.
    """

    def supports(block_BE: Tensor) -> list[Row]:
        cosines = block_BE @ old_OE.T
        found: list[Row] = [((), ())] * len(cosines)
        waiting, count = torch.arange(len(cosines)), min(_FIRST_SUPPORT, len(old_OE))
        while len(waiting):
            largest, places = cosines[waiting].topk(count)
            ordered = largest.double()
            ranks = torch.arange(1, count + 1)
            sums = ordered.cumsum(1)
            size = (1 + ranks * ordered > sums).sum(1)
            done = (size < count) | (count == len(old_OE))
            threshold = (sums.gather(1, size[:, None] - 1) - 1) / size[:, None]
            weights = (ordered - threshold).float().numpy()
            for row in done.nonzero().flatten().tolist():
                length = int(size[row])
                found[int(waiting[row])] = (places[row, :length].numpy(), weights[row, :length])
            waiting, count = waiting[~done], min(4 * count, len(old_OE))
        return found

    for rows in in_blocks(supports, row_blocks(new_NE, len(old_OE))):
        yield from rows


def row_blocks(vectors_NE: Tensor, num_columns: int) -> Sequence[Tensor]:
    """Rows in blocks whose product with `num_columns` others a thread may hold."""
    return vectors_NE.split(max(1, _BLOCK_ELEMENTS // max(1, num_columns)))
