"""Continued BPE against a plain implementation that counts all pairs anew at every step."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from megatron_cpt.tokenizer.byte_level.learning import Learned, Words, learn_merges

Cut = list[int]


def _plain(
    words: list[Cut],
    counts: list[int],
    pieces: dict[int, bytes],
    num: int,
    allowed: Callable[[bytes], bool],
    least: int,
) -> tuple[list[bytes], list[tuple[int, int, int]], set[int]]:
    pieces, words = dict(pieces), [list(word) for word in words]
    first = len(pieces)
    made: list[bytes] = []
    merges: dict[tuple[int, int], int] = {}
    while len(made) < num:
        found: Counter[tuple[int, int]] = Counter()
        for word, count in zip(words, counts, strict=True):
            for pair in zip(word, word[1:], strict=False):
                found[pair] += count
        again = sorted(pair for pair in found if pair in merges)
        new = sorted(
            (-count, pair)
            for pair, count in found.items()
            if count >= least and allowed(pieces[pair[0]] + pieces[pair[1]])
        )
        if not again and not new:
            break
        pair = again[0] if again else new[0][1]
        data = pieces[pair[0]] + pieces[pair[1]]
        result = next((id for id, other in pieces.items() if other == data), None)
        if result is None:
            result = pieces.__len__()
            pieces[result] = data
            made.append(data)
        merges.setdefault(pair, result)
        words = [_merged(word, pair, result) for word in words]
    assert first + len(made) == len(pieces)
    return made, [(*pair, result) for pair, result in merges.items()], {id for word in words for id in word}


def _merged(word: Cut, pair: tuple[int, int], result: int) -> Cut:
    new, at = [], 0
    while at < len(word):
        if tuple(word[at : at + 2]) == pair:
            new.append(result)
            at += 2
        else:
            new.append(word[at])
            at += 1
    return new


def _learned(words: list[Cut], counts: list[int], pieces: dict[int, bytes], num: int, *rest: object) -> Learned:
    flat = np.array([id for word in words for id in word], np.int32)
    packed = Words(flat, np.array(list(map(len, words)), np.int64), np.array(counts, np.int64))
    return learn_merges(packed, pieces, set(), len(pieces), num, *rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(12))
def test_as_counted_anew(seed: int) -> None:
    draw = random.Random(seed)
    pieces = {0: b"a", 1: b"b", 2: b"c", 3: b"ab", 4: b"bca"}
    words = [[draw.randrange(5) for _ in range(draw.randint(1, 12))] for _ in range(30)]
    words += [[0] * size for size in (2, 3, 4, 5, 9)]  # pairs that overlap themselves
    counts = [draw.randint(1, 9) for _ in words]
    allowed: Callable[[bytes], bool] = (lambda data: b"c" in data) if seed % 3 == 0 else (lambda data: len(data) < 9)
    got = _learned(words, counts, pieces, 60, allowed, 1 + seed % 2 * 4)
    made, merges, used = _plain(words, counts, pieces, 60, allowed, 1 + seed % 2 * 4)
    assert got.pieces == made
    assert got.merges == merges
    assert got.used == used
    assert len(made) > 5


def test_merges_of_the_base_are_not_learned_again() -> None:
    pieces = {0: b"a", 1: b"b", 2: b"ab", 3: b"c"}
    words = Words(np.array([0, 1, 3, 0, 1], np.int32), np.array([3, 2]), np.array([2, 2]))
    got = learn_merges(words, pieces, {(0, 1)}, 4, 9, lambda data: True)
    assert got.merges == [(2, 3, 4)]
    assert got.used == {4, 2}


def test_nothing_to_learn() -> None:
    empty = Words(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64))
    assert learn_merges(empty, {0: b"a"}, set(), 1, 9, lambda data: True) == Learned()
