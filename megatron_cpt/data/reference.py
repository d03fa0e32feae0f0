"""The C++ core of this folder once more, in plain Python: what `_native` has to equal.

Not used at run time; the tests compare the two. Signatures are those of `_native`.
"""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from math import floor

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
    """Its image under the keyed permutation of 0..size-1 (six Feistel rounds, cycle walking)."""
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


def visit(index: int, size: int, key: int) -> int:
    """Which of `size` windows a visit falls on: epoch = index // size has its own permutation."""
    return _permuted(index % size, size, derive(key, index // size))


class StageOrder:
    """Which source each sample of a stage comes from.

    E_s(t), the exact share of lane s among the first t samples, is rounded twice as unit jobs with releases and
    deadlines, earliest deadline first: at the borders of blocks to floor(E_s) or ceil(E_s), then within each block.

    Args:
        lanes: int64 of shape [sources, 4]: share at the start and at the end of the stage in units of `unit`, and
            the first and last block (not included; -1: none) in which the source is read.
        unit: what the shares of every moment add up to.
        samples: of the stage; 0: it has no end.
        block: samples of a block.
    """

    def __init__(self, lanes: Int64s, unit: int, samples: int, block: int) -> None:
        self.lanes = [tuple(map(int, lane)) for lane in lanes]
        self.unit, self.samples, self.block = unit, samples, block
        self.borders = [[0] * len(self.lanes)]

    def share(self, lane: int, border: int) -> Fraction:
        """E of a lane at a border."""
        start, end, first, last = self.lanes[lane]
        border = max(first, border if last < 0 else min(border, last))
        return self._ramp(start, end, border * self.block) - self._ramp(start, end, first * self.block)

    def _ramp(self, start: int, end: int, t: int) -> Fraction:
        inside = min(t, self.samples) if self.samples else t
        moved = Fraction((end - start) * inside**2, 2 * self.samples) if self.samples else 0
        return (start * inside + moved + end * (t - inside)) / Fraction(self.unit)

    def _deadline(self, lane: int, border: int, count: int) -> int:
        step = 1
        while self.share(lane, border + step) < count:
            if step > 2**34:
                return 2**62
            step *= 2
        later = range(border, border + step + 1)
        return later[bisect_left(later, True, key=lambda b: self.share(lane, b) >= count)]

    def _counts_at(self, border: int) -> list[int]:
        while len(self.borders) <= border:
            number = len(self.borders)
            shares = [self.share(lane, number) for lane in range(len(self.lanes))]
            counts = [max(before, floor(share)) for before, share in zip(self.borders[-1], shares, strict=True)]
            ahead = [lane for lane, share in enumerate(shares) if counts[lane] < share]
            ahead.sort(key=lambda s: (self._deadline(s, number, counts[s] + 1), floor(shares[s]) - shares[s], s))
            for lane in ahead[: number * self.block - sum(counts)]:
                counts[lane] += 1
            self.borders.append(counts)
        return self.borders[border]

    def _lanes_of(self, border: int) -> list[int]:
        before, after = self._counts_at(border), self._counts_at(border + 1)
        quota = [b - a for a, b in zip(before, after, strict=True)]
        taken, order = [0] * len(quota), []
        for now in range(self.block):
            released = [s for s, q in enumerate(quota) if taken[s] < q and taken[s] * self.block // q <= now]
            lane = min(released, key=lambda s: (-((taken[s] + 1) * self.block // -quota[s]), s))
            taken[lane] += 1
            order.append(lane)
        return order

    def at(self, sample: int) -> tuple[int, int]:
        """Lane of a sample, and its number among the samples of that lane."""
        lane = self._lanes_of(sample // self.block)[sample % self.block]
        return lane, int(self.counts(sample)[lane])

    def counts(self, samples: int) -> Int64s:
        """Samples of each lane among the first `samples` ones."""
        border, slot = divmod(samples, self.block)
        inside = self._lanes_of(border)[:slot] if slot else []
        return np.array([c + inside.count(s) for s, c in enumerate(self._counts_at(border))], np.int64)


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
