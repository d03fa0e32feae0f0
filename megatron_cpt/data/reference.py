"""The C++ core of this folder once more, in plain Python: what `_native` has to equal.

Not used at run time; the tests compare the two. Signatures are those of `_native`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
_MASK = 2**64 - 1


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def derive(key: int, number: int) -> int:
    """The `number`-th 64-bit key that follows from `key` (SplitMix64)."""
    return _mix((key + 0x9E3779B97F4A7C15 * (number + 1)) & _MASK)


def _permuted(position: int, size: int, key: int) -> int:
    half = 1
    while 1 << (2 * half) < size:
        half += 1
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for number in range(6):
            left, right = right, left ^ (_mix(derive(key, number) ^ right) & mask)
        position = (left << half) | right
        if position < size:
            return position


def permute(positions: Int64s, size: int, key: int) -> Int64s:
    """Images of positions under the keyed permutation of 0..size-1 (six Feistel rounds, cycle walking)."""
    return np.array([_permuted(int(position), size, key) for position in positions], np.int64)


def visit(indices: Int64s, size: int, key: int) -> Int64s:
    """Which of `size` windows each visit falls on: epoch = index // size has its own permutation."""
    return np.array([_permuted(int(i) % size, size, derive(key, int(i) // size)) for i in indices], np.int64)


def locate(samples: Int64s, quotas: Int64s, key: int) -> tuple[Int64s, Int64s]:
    """Source of each sample, and its number among all samples of that source.

    Every block of sum(quotas) samples holds source s exactly quotas[s] times.
    """
    block_size, ends = int(quotas.sum()), np.cumsum(quotas)
    located = []
    for sample in samples:
        block, slot = divmod(int(sample), block_size)
        images = permute(np.arange(slot + 1), block_size, derive(key, block))
        sources = np.searchsorted(ends, images, side="right")
        source = int(sources[-1])
        located.append((source, block * int(quotas[source]) + int((sources[:-1] == source).sum())))
    columns = np.array(located, np.int64).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


def gather(
    stream: npt.NDArray[np.integer], starts: Int64s, first: int, length: int, vocab_size: int
) -> tuple[Int64s, Int64s]:
    """Tokens first..first+length-1 of a stream, and where among them documents start.

    Raises:
        IndexError: the range leaves the stream.
        ValueError: a token id is not in 0..vocab_size-1.
    """
    if first < 0 or length < 0 or first + length > len(stream):
        raise IndexError(f"tokens {first} to {first + length} of a stream of {len(stream)}")
    tokens = stream[first : first + length].astype(np.int64)
    if ((tokens < 0) | (tokens >= vocab_size)).any():
        raise ValueError(f"token id outside of 0..{vocab_size - 1}")
    return tokens, starts[(starts >= first) & (starts < first + length)] - first
