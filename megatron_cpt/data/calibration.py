"""A little text of two languages for the calibration of new vocabulary rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.batches import Batch, batch
from megatron_cpt.data.indexed import IndexedDataset
from megatron_cpt.data.sampler import SamplePlan

_BLOCK_TOKENS = 1 << 22
_COUNTED_TOKENS = 1 << 28  # enough for the rarest piece's logarithm


def calibration_tokens(
    source: Sequence[str | Path],
    target: Sequence[str | Path],
    tokenizer_sha256: str,
    seq_length: int,
    source_share: float,
    seed: int,
) -> tuple[Callable[[int], Batch], npt.NDArray[np.int64]]:
    """What `surgery.calibrate` reads: a function that gives the next tokens, and counts of the target's ids.

    Args:
        source: prefixes of the source language's datasets, read in equal shares.
        target: prefixes of the target language's.
        tokenizer_sha256: of the new tokenizer, which both were built with.
        seq_length: tokens of a sample.
        source_share: of the samples.
        seed: of their order.

    Returns:
        (take, counts): `take(n)` gives the next samples of at least n tokens; counts has an entry for each id.

    Raises:
        DataError: a dataset that cannot be read, or of another tokenizer.
    """
    sides = [[IndexedDataset(prefix) for prefix in prefixes] for prefixes in (target, source)]
    for dataset in (*sides[0], *sides[1]):
        dataset.check_tokenizer(tokenizer_sha256)
    shares = (1.0 - source_share, source_share)
    weighted = [(ds, ds.language, share / len(side)) for side, share in zip(sides, shares, strict=True) for ds in side]
    plan = SamplePlan(weighted, seq_length, seed)
    given = 0

    def take(count: int) -> Batch:
        nonlocal given
        first, given = given, given - (-count // seq_length)
        return batch([plan.sample(number) for number in range(first, given)])

    return take, np.sum([token_counts(dataset) for dataset in sides[0]], axis=0)


def token_counts(dataset: IndexedDataset) -> npt.NDArray[np.int64]:
    """How often each id occurs among the first 2^28 tokens of a dataset."""
    counts = np.zeros(int(dataset.manifest["vocab_size"]), np.int64)
    for start in range(0, min(dataset.num_tokens, _COUNTED_TOKENS), _BLOCK_TOKENS):
        ids, _ = dataset.tokens(start, min(start + _BLOCK_TOKENS, dataset.num_tokens, _COUNTED_TOKENS))
        counts += np.bincount(ids, minlength=len(counts))
    return counts
