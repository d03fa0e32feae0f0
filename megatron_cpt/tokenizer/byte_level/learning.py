"""Continued BPE: learn merges on top of words that are already cut.

The words stand one after another in one array, each as the pieces it is cut into. A merge visits the places
where its pair stands, and only the pairs beside these places change their counts.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
_BORDER = -1  # between words
_GONE = -2  # the right half of a merged pair
_FIRST = -(1 << 62)  # goes before every count


@dataclass
class Learned:
    """What was learned.

    Attributes:
        pieces: bytes of the new pieces, in the order of their ids.
        merges: (left, right, result) ids in the order of learning. A result may be an older piece.
        used: ids that the words end up with.
    """

    pieces: list[bytes] = field(default_factory=list)
    merges: list[tuple[int, int, int]] = field(default_factory=list)
    used: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Words:
    """Distinct words, cut into pieces.

    Attributes:
        ids: int32, the pieces of all words, one word after another.
        sizes: int64, pieces of each word.
        counts: int64, how often each word comes up.
    """

    ids: npt.NDArray[np.int32]
    sizes: Ints
    counts: Ints


def learn_merges(
    words: Words,
    pieces: Mapping[int, bytes],
    ranked: set[tuple[int, int]],
    first_id: int,
    num_pieces: int,
    allowed: Callable[[bytes], bool],
    min_count: int = 2,
) -> Learned:
    """Merge the most frequent pair again and again, as the training of BPE does, from a given cut on.

    Args:
        words: as the base cuts them.
        pieces: bytes of each id of the base that words may hold.
        ranked: pairs that the base merges; they are not learned again.
        first_id: id of the first new piece; the others follow.
        num_pieces: stop at so many.
        allowed: whether a merge may make these bytes.
        min_count: stop when no allowed pair comes up so often.

    Returns:
        The pieces and merges. Equal counts go to the smaller pair of ids, so that the result is one.
    """
    text = _Text(words)
    bytes_of = dict(pieces)
    ids = {data: id for id, data in pieces.items()}
    known = set(ranked)
    learned = Learned()
    heap = [(-count, pair) for pair, count in text.counts.items()]
    heapq.heapify(heap)
    while heap and len(learned.pieces) < num_pieces:
        rank, pair = heapq.heappop(heap)
        count = text.counts.get(pair, 0)
        if count < (1 if rank == _FIRST else min_count):
            continue
        if rank not in (-count, _FIRST):  # it has become rarer since it was pushed
            heapq.heappush(heap, (-count, pair))
            continue
        left, right = pair >> 32, pair & 0xFFFFFFFF
        data = bytes_of[left] + bytes_of[right]
        if not allowed(data):
            continue
        if data not in ids:
            ids[data] = first_id + len(learned.pieces)
            bytes_of[ids[data]] = data
            learned.pieces.append(data)
        if (left, right) not in known:
            known.add((left, right))
            learned.merges.append((left, right, ids[data]))
        for grown in text.merge(pair, ids[data]):
            # A pair that has its merge already comes next, as it does when a text is encoded.
            has_merge = (grown >> 32, grown & 0xFFFFFFFF) in known
            heapq.heappush(heap, (_FIRST if has_merge else -text.counts[grown], grown))
    learned.used = text.used()
    return learned


class _Text:
    """Words in one array; `counts` holds how often each pair, as `left << 32 | right`, stands in the text."""

    def __init__(self, words: Words) -> None:
        sizes = words.sizes
        starts = np.cumsum(sizes + 1) - sizes
        size = len(words.ids) + len(sizes) + 1
        self.ids = np.full(size, _BORDER, np.int32)
        within = np.ones(size, bool)
        within[np.concatenate([[0], starts + sizes])] = False
        self.ids[within] = words.ids
        # The word of the border behind it has its count too, where nothing reads it.
        self.weights = np.concatenate([[0], np.repeat(words.counts, sizes + 1)])
        self.next = np.arange(1, size + 1, dtype=np.int32)
        self.previous = np.arange(-1, size - 1, dtype=np.int32)
        self.counts: dict[int, int] = {}
        self._places: dict[int, list[npt.NDArray[np.int32]]] = {}
        places = np.flatnonzero(within[:-1] & within[1:]).astype(np.int32)
        for pair, count, at in self._grouped(self._pairs(self.ids[places], self.ids[places + 1]), places):
            self.counts[pair] = count
            self._places[pair] = [at]

    def merge(self, pair: int, result: int) -> list[int]:
        """Put `result` wherever the pair stands; returns the pairs that have become more frequent."""
        at = self._standing(pair)
        del self.counts[pair], self._places[pair]
        left, right = pair >> 32, pair & 0xFFFFFFFF
        second = self.next[at]
        after, before = self.next[second], self.previous[at]
        id_after, id_before = self.ids[after], self.ids[before]
        self.ids[at], self.ids[second] = result, _GONE
        self.next[at] = after
        self.previous[after] = at
        # Where two merged pairs touch, what lies between them counts once, as the left side of the second.
        touching = np.zeros(len(at), bool)
        touching[:-1] = after[:-1] == at[1:]
        has_before, has_after = id_before >= 0, (id_after >= 0) & ~touching
        lost = [self._pairs(id_before[has_before], left), self._pairs(right, id_after[has_after])]
        old_weights = [self.weights[at[has_before]], self.weights[at[has_after]]]
        for gone, weight in _sums(np.concatenate(lost), np.concatenate(old_weights)):
            if gone != pair:
                self.counts[gone] -= weight
                if not self.counts[gone]:
                    del self.counts[gone], self._places[gone]
        before = self.previous[at]
        made = [
            self._pairs(self.ids[before[has_before]], result),
            self._pairs(result, id_after[has_after]),
        ]
        places = np.concatenate([before[has_before], at[has_after]])
        grown = []
        for new, count, stands in self._grouped(np.concatenate(made), places):
            self.counts[new] = self.counts.get(new, 0) + count
            self._places.setdefault(new, []).append(stands)
            grown.append(new)
        return grown

    def used(self) -> frozenset[int]:
        """The ids that stand in the text."""
        return frozenset(np.unique(self.ids[self.ids >= 0]).tolist())

    def _standing(self, pair: int) -> npt.NDArray[np.int32]:
        """Places where a pair stands, ascending; of those that overlap (a a a), every other one."""
        left, right = pair >> 32, pair & 0xFFFFFFFF
        at = np.unique(np.concatenate(self._places[pair]))
        at = at[self.ids[at] == left]
        at = at[self.ids[self.next[at]] == right]
        if left == right:
            chosen, end = [], -1
            for place, following in zip(at.tolist(), self.next[at].tolist(), strict=True):
                if place != end:
                    chosen.append(place)
                    end = following
            at = np.array(chosen, np.int32)
        return at

    @staticmethod
    def _pairs(left: npt.NDArray[np.int32] | int, right: npt.NDArray[np.int32] | int) -> Ints:
        return np.asarray(left, np.int64) << 32 | np.asarray(right, np.int64)

    def _grouped(self, pairs: Ints, places: npt.NDArray[np.int32]) -> list[tuple[int, int, npt.NDArray[np.int32]]]:
        """(pair, how often, where) of each distinct pair."""
        if not len(pairs):
            return []
        order = np.argsort(pairs, kind="stable")
        pairs, places = pairs[order], places[order]
        starts = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
        sums = np.add.reduceat(self.weights[places], starts).tolist()
        spans = zip(starts.tolist(), [*starts[1:].tolist(), len(places)], strict=True)
        parts = [places[start:end] for start, end in spans]
        return list(zip(pairs[starts].tolist(), sums, parts, strict=True))


def _sums(keys: Ints, weights: Ints) -> list[tuple[int, int]]:
    if not len(keys):
        return []
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return list(zip(keys[starts].tolist(), np.add.reduceat(weights[order], starts).tolist(), strict=True))
