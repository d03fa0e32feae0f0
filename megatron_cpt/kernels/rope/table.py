"""The angles of the rotary embedding, one row a token: made once a micro-batch, used in every layer.

Shape letters: N tokens, R rotated pairs of a head (half its size).
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_positions(cu_seqlens: Tensor) -> Tensor:
    """Returns each token's position in its own document [N], int64, on the device of `cu_seqlens`.

    Args:
        cu_seqlens: [documents + 1], integer: the document starts and then N. On a device this waits for it, as the
            number of tokens decides the result's shape.

    Raises:
        ValueError: `cu_seqlens` is empty or not one-dimensional.
    """
    if cu_seqlens.dim() != 1 or not cu_seqlens.numel():
        raise ValueError(
            f"document_positions: got cu_seqlens {tuple(cu_seqlens.shape)}; expected [documents + 1], with a first 0"
        )
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long()
    starts_N = starts.repeat_interleave(lengths)
    return torch.arange(len(starts_N), device=cu_seqlens.device) - starts_N


def rotary_table(inverse_frequencies_R: Tensor, positions_N: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine of position * inverse frequency, [N, R] each.

    Args:
        inverse_frequencies_R: [R], radians a position; angles are computed in fp32, or float64 where it is so.
        positions_N: [N], integer: explicit positions, or `document_positions` of packed documents.

    Returns:
        fp32 (float64) on the device of the positions.
    """
    wide = torch.promote_types(inverse_frequencies_R.dtype, torch.float32)
    angles_NR = torch.outer(positions_N.to(wide), inverse_frequencies_R.to(positions_N.device, wide))
    return angles_NR.cos(), angles_NR.sin()
