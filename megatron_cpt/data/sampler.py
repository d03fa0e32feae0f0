"""The order of the data as a pure function of (sources, seed, sample number).

There are no index files and no state: to resume at sample i is to ask for sample i. The order knows
nothing of ranks, micro-batches or the length of the run, so none of them can change it.

Source of a sample: every block of 1,000 samples holds each source exactly `quota` times, in an order
permuted by (seed, block). Window of a sample: the k-th sample of a source with W windows belongs to
epoch k // W, which visits every window once, in an order permuted by (seed, source, epoch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_cpt.config.manifest import sha256_json
from megatron_cpt.data import _native
from megatron_cpt.data.indexed import IndexedDataset
from megatron_cpt.data.windows import Sample, open_windows
from megatron_cpt.errors import DataError

Int64s = npt.NDArray[np.int64]

BLOCK = 1000
_ORDER = 2  # of the rules above; part of the state hash
_MIXTURE_KEY = 0  # purposes of the keys derived from the seed; source s has purpose 1 + s


@dataclass(frozen=True)
class Place:
    """Where a sample comes from: source number, epoch of that source, number of its window."""

    source: int
    epoch: int
    window: int


def quotas(weights: Sequence[float], block: int = BLOCK) -> list[int]:
    """Split `block` samples by weight: largest remainder, at least 1 for each, ties to the first.

    Raises:
        DataError: no weights, a weight that is not above 0, or more weights than samples.
    """
    if not weights or len(weights) > block or not all(0 < weight < float("inf") for weight in weights):
        raise DataError(f"weights {list(weights)[:8]}: expected 1 to {block} finite numbers above 0")
    total = sum(weights)
    shares = [weight / total * block for weight in weights]
    counts = [max(1, int(share)) for share in shares]
    while sum(counts) < block:
        counts[max(range(len(counts)), key=lambda s: (shares[s] - counts[s], -s))] += 1
    while sum(counts) > block:
        larger = [s for s in range(len(counts)) if counts[s] > 1]
        counts[min(larger, key=lambda s: (shares[s] - counts[s], s))] -= 1
    return counts


class SamplePlan:
    """An endless, fixed sequence of samples from weighted sources.

    An epoch of a source visits each of its windows (`open_windows`) once.

    Args:
        sources: (dataset or its prefix, language, weight) each; weights are shares of the samples.
        seq_length: S, tokens of a sample.
        seed: 0 to 2^64 - 1.

    Raises:
        DataError: a dataset that cannot be read, holds no prediction or is listed twice, or datasets of
            different tokenizers.
    """

    def __init__(
        self, sources: Sequence[tuple[str | Path | IndexedDataset, str, float]], seq_length: int, seed: int
    ) -> None:
        if seq_length < 1 or not 0 <= seed < 2**64:
            raise DataError(f"seq_length {seq_length} and seed {seed}: expected at least 1, and 0 to 2^64 - 1")
        self.seq_length = seq_length
        self.seed = seed
        self.quotas = quotas([weight for _, _, weight in sources])
        self.datasets = [
            dataset if isinstance(dataset, IndexedDataset) else IndexedDataset(dataset) for dataset, _, _ in sources
        ]
        self.languages = [language for _, language, _ in sources]
        self._check()
        self._windows = [open_windows(dataset, seq_length) for dataset in self.datasets]
        self.num_windows = [len(windows) for windows in self._windows]
        self._quotas = np.array(self.quotas, np.int64)
        self._keys = [_native.derive(seed, purpose) for purpose in range(1 + len(self.datasets))]

    def _check(self) -> None:
        prefixes = [dataset.prefix for dataset in self.datasets]
        for number, dataset in enumerate(self.datasets):
            if dataset.prefix in prefixes[:number]:
                raise DataError(f"{dataset.prefix} is listed twice; list it once with the sum of the weights")
            first = self.datasets[0]
            if dataset.manifest.get("tokenizer_sha256") != first.manifest.get("tokenizer_sha256"):
                raise DataError(
                    f"{dataset.prefix} and {first.prefix} were built with different tokenizers; build them with one"
                )

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer behind all sources."""
        return self.datasets[0].vocab_size

    @property
    def bytes_per_token(self) -> float:
        """Expected bytes of text behind one token of this mixture (bos and eos are tokens without text)."""
        each = [float(dataset.manifest["bytes_per_token"]) for dataset in self.datasets]
        return sum(quota * value for quota, value in zip(self.quotas, each, strict=True)) / BLOCK

    @property
    def state_hash(self) -> str:
        """Identity of the order: with an equal hash, sample i is the same sample for every i."""
        sources = [
            [dataset.content_hash, language, quota]
            for dataset, language, quota in zip(self.datasets, self.languages, self.quotas, strict=True)
        ]
        return sha256_json({"order": _ORDER, "sources": sources, "seed": self.seed, "seq_length": self.seq_length})

    def place(self, number: int) -> Place:
        """Where sample `number` (from 0) comes from."""
        if number < 0:
            raise DataError(f"sample {number}: samples are counted from 0")
        sources, indices = _native.locate(np.array([number], np.int64), self._quotas, self._keys[_MIXTURE_KEY])
        source = int(sources[0])
        window = _native.visit(indices, self.num_windows[source], self._keys[1 + source])
        return Place(source, int(indices[0]) // self.num_windows[source], int(window[0]))

    def sample(self, number: int) -> Sample:
        """Sample `number` (from 0), the same on every rank and in every run.

        Raises:
            DataError: the dataset holds an id that is not of its vocabulary.
        """
        place = self.place(number)
        return Sample(self._windows[place.source].window(place.window), place.source, self.languages[place.source])

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How often the first `num_samples` samples pass through each source: prefix -> passes."""
        blocks, rest = divmod(num_samples, BLOCK)
        counts = blocks * self._quotas
        if rest:
            last = np.arange(blocks * BLOCK, num_samples, dtype=np.int64)
            sources, _ = _native.locate(last, self._quotas, self._keys[_MIXTURE_KEY])
            counts = counts + np.bincount(sources, minlength=len(self.quotas))
        return {
            dataset.prefix: int(count) / windows
            for dataset, count, windows in zip(self.datasets, counts, self.num_windows, strict=True)
        }
