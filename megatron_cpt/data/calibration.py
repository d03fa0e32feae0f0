"""A little text of two languages for the calibration of new vocabulary rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.batches import Batch, batch
from megatron_cpt.data.indexed import IndexedDataset
from megatron_cpt.data.sampler import SamplePlan

_BLOCK_TOKENS = 1 << 22
_COUNTED_TOKENS = 1 << 28  # enough for the rarest piece's logarithm


class CalibrationText:
    """What `surgery.calibrate` reads.

    Args:
        source: prefixes of the source language's datasets, read by their sizes.
        target: prefixes of the target language's.
        tokenizer_sha256: of the new tokenizer, which both were built with.
        seq_length: tokens of a sample.
        source_share: of the samples.
        seed: of their order.

    Raises:
        DataError: a dataset that cannot be read, or of another tokenizer.
    """

    def __init__(
        self,
        source: Sequence[str | Path],
        target: Sequence[str | Path],
        tokenizer_sha256: str,
        seq_length: int,
        source_share: float,
        seed: int,
    ) -> None:
        sides = [[IndexedDataset(prefix) for prefix in prefixes] for prefixes in (target, source)]
        for dataset in (*sides[0], *sides[1]):
            dataset.check_tokenizer(tokenizer_sha256)
        shares = (1.0 - source_share, source_share)
        weighted = [
            (ds, ds.language, share * ds.num_tokens / max(1, sum(each.num_tokens for each in side)))
            for side, share in zip(sides, shares, strict=True)
            for ds in side
        ]
        self._plan = SamplePlan(weighted, seq_length, seed)
        self._seq_length, self._given, self._target = seq_length, 0, sides[0]

    @cached_property
    def num_tokens(self) -> int:
        """Tokens, from the first on, until a dataset begins again; in whole samples."""
        all_samples = range(1, sum(map(len, self._plan.windows)) + 1)
        once = bisect_right(all_samples, 1.0, key=lambda count: max(self._plan.epochs(count).values()))
        return once * self._seq_length

    def take(self, count: int) -> Batch:
        """The next samples of both languages, of at least `count` tokens."""
        first, self._given = self._given, self._given - (-count // self._seq_length)
        return batch([self._plan.sample(number) for number in range(first, self._given)])

    def counts(self) -> npt.NDArray[np.int64]:
        """How often each id occurs in the target's datasets."""
        found: npt.NDArray[np.int64] = np.sum([token_counts(dataset) for dataset in self._target], axis=0)
        return found

    def target_ids(self, count: int) -> Iterator[npt.NDArray[np.int64]]:
        """The first tokens of the target's datasets, about `count` in all, in blocks."""
        for dataset in self._target:
            stop = min(dataset.num_tokens, -(-count // len(self._target)))
            for start in range(0, stop, _BLOCK_TOKENS):
                yield dataset.tokens(start, min(start + _BLOCK_TOKENS, stop))[0]


def token_counts(dataset: IndexedDataset) -> npt.NDArray[np.int64]:
    """How often each id occurs among the first 2^28 tokens of a dataset."""
    counts = np.zeros(int(dataset.manifest["vocab_size"]), np.int64)
    for start in range(0, min(dataset.num_tokens, _COUNTED_TOKENS), _BLOCK_TOKENS):
        ids, _ = dataset.tokens(start, min(start + _BLOCK_TOKENS, dataset.num_tokens, _COUNTED_TOKENS))
        counts += np.bincount(ids, minlength=len(counts))
    return counts
