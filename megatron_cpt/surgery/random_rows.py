"""Random rows that belong to their id: the same on every machine, whichever rows are asked for."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def normal_rows(seed: int, matrix: int, ids: Iterable[int], width: int) -> Tensor:
    """Independent N(0, 1) numbers, a row for each id.

    Philox (Salmon et al. 2011) keyed by seed, matrix and id gives 64-bit words, Box and Muller's formula
    makes them normal in float64. So a tensor-parallel rank draws its own rows without the others.

    Args:
        seed: of the plan.
        matrix: number of the matrix, so that embedding and head differ.
        ids: new row numbers.
        width: D.

    Returns:
        float32, one row of `width` for each id.
    """
    pairs = (width + 1) // 2
    rows = [_normals(np.random.Philox(key=[seed, matrix << 40 | id]), pairs)[:width] for id in ids]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, width)


def _normals(words: np.random.Philox, pairs: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    uniform = ((words.random_raw(2 * pairs) >> np.uint64(11)) + 0.5) * 2.0**-53  # in (0, 1)
    radius = np.sqrt(-2.0 * np.log(uniform[:pairs]))
    angle = 2.0 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).astype(np.float32)
