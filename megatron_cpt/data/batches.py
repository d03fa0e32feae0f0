"""Samples to the arrays a step is computed from, for training and for validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.indexed import IndexedDataset
from megatron_cpt.data.windows import Sample, Windows
from megatron_cpt.errors import DataError


@dataclass(frozen=True)
class Batch:
    """Samples side by side in one row of N = (number of samples) * S positions.

    Args:
        tokens_N: int64 input ids.
        labels_N: int64 next ids; -100 where the next token begins a document or is padding.
        cu_seqlens: int32 borders, 0 and N included: attention stays between two neighbours. Samples,
            documents and pieces of them begin at a border.
        position_ids_N: int64, from 0 at each border.
        sources: int64 source number of each sample, shape [number of samples].
    """

    tokens_N: npt.NDArray[np.int64]
    labels_N: npt.NDArray[np.int64]
    cu_seqlens: npt.NDArray[np.int32]
    position_ids_N: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]


def batch(samples: Sequence[Sample]) -> Batch:
    """Samples of one length, in this order, as one batch.

    Raises:
        DataError: no samples, or samples of different lengths.
    """
    windows = [sample.window for sample in samples]
    lengths = {len(window.tokens_S) for window in windows}
    if len(lengths) != 1:
        raise DataError(f"a batch of {len(samples)} samples of lengths {sorted(lengths)}; expected one length")
    length = lengths.pop()
    starts = np.concatenate([row * length + window.starts for row, window in enumerate(windows)])
    total = len(windows) * length
    borders = np.append(starts, total)
    return Batch(
        tokens_N=np.concatenate([window.tokens_S for window in windows]),
        labels_N=np.concatenate([window.labels_S for window in windows]),
        cu_seqlens=borders.astype(np.int32),
        position_ids_N=np.arange(total, dtype=np.int64) - np.repeat(starts, np.diff(borders)),
        sources=np.array([sample.source for sample in samples], np.int64),
    )


def validation_batch(windows: Windows, first: int, count: int) -> Batch:
    """Windows first..first+count-1 of a held-out dataset as one batch; behind the last one padding alone."""
    numbers = range(first, first + count)
    chosen = [windows.window(number) if number < len(windows) else windows.padding() for number in numbers]
    return batch([Sample(window, 0, windows.dataset.language) for window in chosen])


def scored_bytes(dataset: IndexedDataset) -> int:
    """UTF-8 bytes of the text whose tokens are the labels: the divisor of bits per byte.

    Raises:
        DataError: the dataset has no manifest that says so, or was built without bos, so that the bytes
            of each document's first token would be divided by though that token is never scored.
    """
    if "text_bytes" not in dataset.manifest:
        raise DataError(f"{dataset.prefix} does not know its bytes of text; build it with this tool")
    if not dataset.manifest["append_bos"]:
        raise DataError(
            f"{dataset.prefix} was built without bos, so the first token of each document is not scored and "
            "bits per byte would be too low; build the held-out set again with `data build --bos`"
        )
    return int(dataset.manifest["text_bytes"])
