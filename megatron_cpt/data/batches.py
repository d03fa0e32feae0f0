"""Samples to the arrays a step is computed from, for training and for validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.indexed import IndexedDataset
from megatron_cpt.data.sampler import Sample
from megatron_cpt.errors import DataError

IGNORED = -100  # label of a position that is not scored


class Samples(Protocol):
    """Numbered samples of one length: a `SamplePlan` or `ValidationWindows`."""

    @property
    def seq_length(self) -> int:
        """S, tokens of a sample."""

    def sample(self, number: int) -> Sample:
        """Sample `number`, from 0."""


class ValidationWindows:
    """A held-out dataset as samples in which every token is a label exactly once.

    Windows of S + 1 tokens begin at multiples of S; the last is padded. Only the first token of each
    document is no label: nothing before it speaks of it.

    Args:
        dataset: the held-out dataset.
        seq_length: S, tokens of a sample.

    Raises:
        DataError: the dataset holds fewer than two tokens.
    """

    def __init__(self, dataset: IndexedDataset, seq_length: int) -> None:
        if dataset.num_tokens < 2 or seq_length < 1:
            raise DataError(
                f"{dataset.prefix} with {dataset.num_tokens} tokens, seq_length {seq_length}: expected at least 2 and 1"
            )
        self.dataset = dataset
        self.language = dataset.language
        self._seq_length = seq_length

    @property
    def seq_length(self) -> int:
        """S, tokens of a sample."""
        return self._seq_length

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text whose tokens are the labels: the divisor of bits per byte.

        Raises:
            DataError: the dataset has no manifest that says so, or was built without bos, so that the bytes
                of each document's first token would be divided by though that token is never scored.
        """
        if "text_bytes" not in self.dataset.manifest:
            raise DataError(f"{self.dataset.prefix} does not know its bytes of text; build it with this tool")
        if not self.dataset.manifest["append_bos"]:
            raise DataError(
                f"{self.dataset.prefix} was built without bos, so the first token of each document is not scored and "
                "bits per byte would be too low; build the held-out set again with `data build --bos`"
            )
        return int(self.dataset.manifest["text_bytes"])

    def __len__(self) -> int:
        return -(-(self.dataset.num_tokens - 1) // self._seq_length)

    def sample(self, number: int) -> Sample:
        """Sample `number`; from `len(self)` on they are padding alone, to fill up a last batch."""
        if number < 0:
            raise DataError(f"sample {number}: samples are counted from 0")
        length = self._seq_length
        start = min(number * length, self.dataset.num_tokens)
        tokens, boundaries = self.dataset.tokens(start, min(start + length + 1, self.dataset.num_tokens))
        num_labels = max(0, len(tokens) - 1)
        padded = np.zeros(length + 1, np.int64)
        padded[: len(tokens)] = tokens
        return Sample(padded, boundaries, num_labels, 0, self.language)


def validation_windows(dataset: IndexedDataset, seq_length: int) -> ValidationWindows:
    """The samples that score a held-out dataset once and completely."""
    return ValidationWindows(dataset, seq_length)


@dataclass(frozen=True)
class Batch:
    """Samples side by side in one row of N = (number of samples) * S positions.

    Args:
        tokens_N: int64 input ids.
        labels_N: int64 next ids; -100 where the next token begins a document or is padding.
        cu_seqlens: int32 borders, 0 and N included: attention stays between two neighbours. Samples
            and documents both begin at a border.
        position_ids_N: int64, from 0 at each border.
        sources: int64 source number of each sample, shape [number of samples].
    """

    tokens_N: npt.NDArray[np.int64]
    labels_N: npt.NDArray[np.int64]
    cu_seqlens: npt.NDArray[np.int32]
    position_ids_N: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]

    @property
    def max_seqlen(self) -> int:
        """Length of the longest piece between two borders."""
        return int(np.diff(self.cu_seqlens).max())


def batch(samples: Samples, numbers: Sequence[int]) -> Batch:
    """The samples with these numbers, in this order, as one batch.

    Args:
        samples: a `SamplePlan` or `ValidationWindows`.
        numbers: at least one sample number.

    Raises:
        DataError: no numbers, a negative one, or damaged data.
    """
    if not len(numbers):
        raise DataError("a batch of no samples; expected at least one")
    length = samples.seq_length
    chosen = [samples.sample(int(number)) for number in numbers]
    borders = [np.zeros(0, np.int64)]
    labels = []
    for row, sample in enumerate(chosen):
        inside = sample.boundaries[sample.boundaries < length]
        borders += [np.array([row * length]), row * length + inside[inside > 0]]
        label = sample.tokens[1:].copy()
        label[sample.boundaries[sample.boundaries > 0] - 1] = IGNORED
        label[sample.num_labels :] = IGNORED
        labels.append(label)
    starts = np.concatenate(borders)
    total = len(chosen) * length
    pieces = np.diff(np.append(starts, total))
    return Batch(
        tokens_N=np.concatenate([sample.tokens[:-1] for sample in chosen]),
        labels_N=np.concatenate(labels),
        cu_seqlens=np.append(starts, total).astype(np.int32),
        position_ids_N=np.arange(total, dtype=np.int64) - np.repeat(starts, pieces),
        sources=np.array([sample.source for sample in chosen], np.int64),
    )
