"""One stage of a plan as whole numbers: shares of a unit, and blocks at which sources take turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt, lcm

import numpy as np
import numpy.typing as npt

from megatron_cpt.data import _native
from megatron_cpt.errors import DataError

Int64s = npt.NDArray[np.int64]

BLOCK = 256  # samples over which a share is constant, at most
FINEST_SHARE = 1 << 40  # shares are whole numbers of 1 / (the least common denominator, at most this)
FINEST_ENDLESS_SHARE = 1 << 20  # the same without stages, where an order is held for one period of the shares


def exact(value: float) -> Fraction:
    """The number as it is written: 0.1 is a tenth."""
    return Fraction(repr(value))


@dataclass(frozen=True)
class Stream:
    """A share of a stage: of the samples at its start and its end, for sources that take turns (or one)."""

    sources: tuple[int, ...]
    start: Fraction
    end: Fraction
    parts: tuple[Fraction, ...] = (Fraction(1),)


@dataclass(frozen=True)
class CompiledStage:
    """One stage as whole numbers.

    Attributes:
        name: of the stage; empty where the weights hold for the whole run.
        first: its first sample.
        samples: how many it has; 0: no end.
        sources: number of the source of each lane.
        lanes, unit, block: as `_native.StageOrder` takes them.
        order: that.
    """

    name: str
    first: int
    samples: int
    sources: tuple[int, ...]
    lanes: Int64s
    unit: int
    block: int
    order: _native.StageOrder

    @property
    def changes(self) -> bool:
        """Whether its shares move or its sources take turns, so that its length decides its order."""
        return bool((self.lanes[:, 0] != self.lanes[:, 1]).any() or (self.lanes[:, 3] >= 0).any())


def compile_stage(
    name: str, first: int, samples: int, streams: Sequence[Stream], source_names: Sequence[str]
) -> CompiledStage:
    """Shares as whole numbers, and the order that follows from them.

    Args:
        name: of the stage.
        first: its first sample.
        samples: how many it has; 0: no end.
        streams: its shares, which add up to 1 at both ends.
        source_names: of every source of the plan.

    Raises:
        DataError: too short for sources in turn, or too many sources.
    """
    changes = any(stream.start != stream.end or len(stream.sources) > 1 for stream in streams)
    # A share is constant within a block, so with short blocks a short stage moves smoothly; a stage that
    # does not change may be grown, so its blocks do not depend on its length.
    block = min(BLOCK, 1 << max(0, isqrt(samples).bit_length() - 2)) if changes else BLOCK
    unit, shares = _whole_shares(streams, FINEST_SHARE if samples else FINEST_ENDLESS_SHARE)
    lanes, sources = [], []
    for stream, (start, end) in zip(streams, shares, strict=True):
        try:
            borders = _turns(stream, samples, block)
        except ValueError:
            names = ", ".join(source_names[source] for source in stream.sources)
            raise DataError(
                f"stage {name!r} with {samples:,} samples is too short for {names} in turn; give it more tokens"
            ) from None
        for source, begin, stop in zip(stream.sources, [0, *borders], [*borders, -1], strict=True):
            lanes.append((start, end, begin, stop))
            sources.append(source)
    rows = np.array(lanes, np.int64)
    order = _native.StageOrder(rows, unit, samples, block)
    return CompiledStage(name, first, samples, tuple(sources), rows, unit, block, order)


def _whole_shares(streams: Sequence[Stream], finest: int) -> tuple[int, list[tuple[int, int]]]:
    """Shares as whole numbers of a unit: exact where the common denominator is at most `finest`."""
    unit = lcm(*(share.denominator for stream in streams for share in (stream.start, stream.end)))
    if unit <= finest:
        return unit, [(int(stream.start * unit), int(stream.end * unit)) for stream in streams]
    starts = largest_remainder([stream.start for stream in streams], finest)
    ends = largest_remainder([stream.end for stream in streams], finest)
    return finest, list(zip(starts, ends, strict=True))


def largest_remainder(shares: Sequence[Fraction], total: int) -> list[int]:
    """Split `total` by shares that add up to 1: at least 1 for each above 0, ties to the first.

    Raises:
        DataError: more shares above 0 than `total`.
    """
    least = [int(share > 0) for share in shares]
    if sum(least) > total:
        raise DataError(f"{sum(least)} shares of a whole of {total}; expected at most that many sources")
    counts = [max(low, int(share * total)) for low, share in zip(least, shares, strict=True)]
    by_remainder = sorted(range(len(shares)), key=lambda s: (counts[s] - shares[s] * total, s))
    short = total - sum(counts)
    for s in by_remainder[: max(0, short)]:
        counts[s] += 1
    for _ in range(-short):
        larger = [s for s in range(len(shares)) if counts[s] > 1]
        counts[max(larger, key=lambda s: (counts[s] - shares[s] * total, -s))] -= 1
    return counts


def _turns(stream: Stream, samples: int, block: int) -> list[int]:
    """The blocks at which the next source of a stream has its turn: nearest to the parts, none empty.

    Raises:
        ValueError: fewer blocks than sources.
    """
    blocks = -(-samples // block)
    if len(stream.sources) > 1 and blocks < len(stream.sources):
        raise ValueError
    borders: list[int] = []
    done = Fraction(0)
    for number, part in enumerate(stream.parts[:-1], 1):
        done += part
        wanted = done * _ramp(stream, samples, samples)
        low, high = 0, blocks
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _ramp(stream, middle * block, samples) <= wanted else (low, middle)
        before, after = (_ramp(stream, border * block, samples) for border in (low, high))
        nearest = low if wanted - before <= after - wanted else high
        least = borders[-1] + 1 if borders else 1
        borders.append(min(max(nearest, least), blocks - (len(stream.parts) - number)))
    return borders


def _ramp(stream: Stream, sample: int, samples: int) -> Fraction:
    sample = min(sample, samples)
    return stream.start * sample + (stream.end - stream.start) * sample**2 / (2 * samples)
