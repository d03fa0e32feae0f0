"""Signatures against their definition and against exact Jaccard indices; clusters against brute force."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data import _native
from megatron_cpt.data.cleaning import duplicates
from megatron_cpt.data.cleaning.duplicates import (
    Duplicates,
    Signing,
    chance_of_comparison,
    choose_bands,
    find_duplicates,
)
from megatron_cpt.data.reference import derive
from megatron_cpt.errors import DataError

M64 = 2**64 - 1
SIGNING = Signing()


def signed(texts: Sequence[str], signing: Signing = SIGNING) -> np.ndarray:
    return signing.sign(_native.Block.from_texts(list(texts)))


def minhash(texts: Sequence[str], *args: int) -> np.ndarray:
    return _native.minhash(_native.Block.from_texts(list(texts)), *args)


def shingles(text: str, size: int) -> set[str]:
    """The set that the signatures are of."""
    text = " ".join(text.split())
    return {text[k : k + size] for k in range(max(1, len(text) - size + 1))} - {""}


def jaccard(a: str, b: str, size: int = 5) -> float:
    one, two = shingles(a, size), shingles(b, size)
    return len(one & two) / len(one | two)


def minhash_by_definition(text: str, places: int, size: int, seed: int) -> list[int]:
    """All 2 * places rounds over a set of strings, without any of the short cuts."""
    base = derive(seed, 0) | 1
    best: dict[int, tuple[int, int]] = {}
    for shingle in shingles(text, size):
        value = 0
        for letter in shingle:
            value = (value * base + ord(letter) + 1) & M64
        for turn in range(2 * places):
            mixed = (value + derive(seed, turn + 1)) * 0x9FB21C651E98DF25 & M64
            mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & M64
            mixed ^= mixed >> 32
            place = turn - places if turn >= places else (mixed >> 32) * places >> 32
            best[place] = min(best.get(place, (2**64, 0)), (turn, mixed & 0xFFFFFFFF))
    return [best.get(place, (0, 0xFFFFFFFF))[1] for place in range(places)]


spaced = st.text(st.sampled_from("ab cde\t\n\u3000\u00a0\u00e9\u65e5\u672c\U00020b9f\ud7a3."), max_size=80)


@settings(max_examples=60, deadline=None)
@given(spaced | st.text(max_size=60), st.integers(1, 24), st.integers(1, 7), st.integers(0, M64))
def test_signatures_follow_their_definition(text: str, places: int, size: int, seed: int) -> None:
    assert minhash([text], places, size, seed)[0].tolist() == minhash_by_definition(text, places, size, seed)


def test_short_texts_follow_the_definition() -> None:
    for length in range(9):
        for text in (
            "abcdefghi"[:length],
            " abcdefg\u3042"[:length],
            "\u65e5\u672c\u8a9e\u3067\u3059\U00020b9f"[:length],
        ):
            assert minhash([text], 16, 5, 3)[0].tolist() == minhash_by_definition(text, 16, 5, 3)


def test_long_and_repeating_texts_follow_the_definition() -> None:
    rng = random.Random(1)
    letters = "".join(rng.choices("abcdefgh" * 4 + " \n\u3042\u3044\u00e4", k=9000))  # more than are decoded at once
    for text in (letters, "ab" * 2000, "x" * 5000, " " * 50 + "a" + " " * 5000):
        assert minhash([text], 16, 5, 3)[0].tolist() == minhash_by_definition(text, 16, 5, 3)


def test_documents_of_a_block_do_not_touch_each_other() -> None:
    texts = ["a" * 40, "", "some longer text, with words", "b", "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059"]
    alone = np.concatenate([signed([text]) for text in texts])
    assert np.array_equal(signed(texts), alone)
    assert np.array_equal(signed(texts[::-1])[::-1], alone)


def test_white_space_counts_once_and_case_counts() -> None:
    plain, wide, other, upper = minhash(
        ["one two three", " one\n\ttwo \u3000 three\r\n", "one twothree", "One two three"]
    )
    assert np.array_equal(plain, wide)
    assert not np.array_equal(plain, other)
    assert not np.array_equal(plain, upper)
    assert (minhash(["", " \n\u3000"]) == 0xFFFFFFFF).all()


def pairs_of_texts(count: int, length: int, rng: random.Random) -> list[tuple[str, str]]:
    """Pairs that share a stretch, of all degrees of likeness."""
    letters = [chr(code) for code in range(0x4E00, 0x5E00)]
    pairs = []
    for k in range(count):
        common = "".join(rng.choices(letters, k=max(5, length * (k % 20 + 1) // 20)))
        a, b = ("".join(rng.choices(letters, k=length - len(common))) for _ in range(2))
        pairs.append((common + a, common + b))
    return pairs


@pytest.mark.parametrize(("length", "count"), [(12, 1500), (150, 1500), (2500, 250)])
def test_estimates_are_unbiased_and_no_wider_than_minhash(length: int, count: int) -> None:
    pairs = pairs_of_texts(count, length, random.Random(length))
    truth = np.array([jaccard(a, b) for a, b in pairs])
    blocks = [_native.Block.from_texts(list(side)) for side in zip(*pairs, strict=True)]
    errors = []
    for seed in range(6):
        first, second = (_native.minhash(block, 128, 5, seed) for block in blocks)
        errors.append((first == second).mean(axis=1) - truth)
    variance = (truth * (1 - truth) / 128).mean()
    assert abs(np.mean(errors)) < 4 * np.sqrt(variance / (6 * count))
    assert np.var(errors) < 1.1 * variance


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from("a\x00 b\u00e9"), max_size=20), unique=True, max_size=20))
def test_fingerprints_differ_where_texts_do(texts: list[str]) -> None:
    prints = _native.fingerprints(_native.Block.from_texts(texts + texts))
    assert np.array_equal(prints[: len(texts)], prints[len(texts) :])
    for half in (0, 1):
        assert len({int(value) for value in prints[:, half]}) == len(texts)


def test_every_bit_of_a_text_moves_half_of_its_fingerprint() -> None:
    text = bytearray(b"twenty-one characters")
    base = _native.fingerprints(_native.Block.from_texts([text.decode()]))
    flips = []
    for bit in range(7 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 7] ^= 1 << bit % 7
        other = _native.fingerprints(_native.Block.from_texts([flipped.decode()]))
        flips.append(np.unpackbits((base ^ other).view(np.uint8)).reshape(2, 64).sum(axis=1))
    assert np.min(flips) > 10 and np.max(flips) < 54
    assert 31 < np.mean(flips) < 33


# Clusters

WORDS = "rain stone river cloud letter window garden silver night market winter orange paper bridge".split()


def corpus(rng: random.Random, size: int) -> list[str]:
    """Texts among which some are copies, some near copies of copies, some very short, some empty."""
    texts: list[str] = []
    for _ in range(size):
        kind = rng.random()
        text = " ".join(rng.choices(WORDS, k=rng.randint(3, 60)))
        if texts and kind < 0.15:
            text = rng.choice(texts)
        elif texts and kind < 0.6:
            words = rng.choice(texts).split() or ["x"]
            for _ in range(rng.randint(1, 4)):
                words[rng.randrange(len(words))] = rng.choice(WORDS)
            text = " ".join(words)
        elif kind < 0.65:
            text = rng.choice(["", " ", "ab", "ab ", "abc"])
        texts.append(text)
    return texts


def roots_by_brute_force(texts: list[str], threshold: float, signing: Signing) -> list[int]:
    """Every pair that shares a band and is alike, or is equal; clusters by flooding."""
    bands, rows = choose_bands(threshold, signing.num_permutations)
    sketch = minhash(texts, signing.num_permutations, signing.shingle, signing.seed).tolist()
    near: list[set[int]] = [set() for _ in texts]
    for a, b in combinations(range(len(texts)), 2):
        shared = any(sketch[a][k * rows : (k + 1) * rows] == sketch[b][k * rows : (k + 1) * rows] for k in range(bands))
        same = sum(x == y for x, y in zip(sketch[a], sketch[b], strict=True))
        if texts[a] == texts[b] or (shared and same >= threshold * signing.num_permutations):
            near[a].add(b)
            near[b].add(a)
    roots = [-1] * len(texts)
    for start in range(len(texts)):
        flood = [start] if roots[start] < 0 else []
        while flood:
            document = flood.pop()
            if roots[document] < 0:
                roots[document] = start
                flood += near[document]
    return roots


def search(
    folder: Path,
    texts: list[str],
    borders: Sequence[int] = (),
    threshold: float = 0.8,
    signing: Signing = SIGNING,
    map_tasks: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]] = map,
) -> Duplicates:
    parts = []
    cuts = [0, *borders, len(texts)]
    for number, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
        parts.append(folder / f"{number}.signatures")
        parts[-1].write_bytes(signed(texts[start:end], signing).tobytes())
    found = find_duplicates(parts, folder / "scratch", signing, threshold, map_tasks)
    assert not any((folder / "scratch").iterdir())
    return found


def shuffled_and_pickled(work: Callable[[Any], Any], tasks: Iterable[Any]) -> list[Any]:
    order = list(tasks)
    random.Random(5).shuffle(order)
    return [pickle.loads(pickle.dumps(work))(task) for task in order]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_clusters_equal_brute_force(tmp_path: Path, threshold: float, seed: int) -> None:
    signing = Signing(num_permutations=48, shingle=4, seed=seed)
    texts = corpus(random.Random(seed), 160)
    found = search(tmp_path, texts, (30, 30, 97), threshold, signing)
    assert found.roots.tolist() == roots_by_brute_force(texts, threshold, signing)
    assert 0 < found.summary()["near_duplicates"] < len(texts)


def test_how_the_work_is_divided_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = corpus(random.Random(9), 300)
    whole = search(tmp_path, texts)
    monkeypatch.setattr(duplicates, "_ROWS_AT_ONCE", 37)  # many runs a part
    monkeypatch.setattr(duplicates, "_KEYS_AT_ONCE", 50)  # many slices a band
    for borders, map_tasks in [
        ((), map),
        ((10, 200), ThreadPoolExecutor(3).map),
        ((1, 2, 150, 150), shuffled_and_pickled),
    ]:
        found = search(tmp_path, texts, borders, map_tasks=map_tasks)
        assert np.array_equal(found.roots, whole.roots)
        assert np.array_equal(found.repeated, whole.repeated)
    assert found.search.slices > 5 and len(found.search.runs) > 8


def test_the_first_stays_and_each_loss_has_a_reason(tmp_path: Path) -> None:
    long = " ".join(random.Random(3).choices(WORDS, k=300))
    texts = ["first", long, "other", "first", long + " end", long, "First", long.replace(" ", "\n")]
    found = search(tmp_path, texts, (3, 5))
    assert [found.keep(part).tolist() for part in range(3)] == [[True] * 3, [False] * 2, [False, True, False]]
    assert [found.exact(part).tolist() for part in range(3)] == [[False] * 3, [True, False], [True, False, False]]
    assert [found.near(part).tolist() for part in range(3)] == [[False] * 3, [False, True], [False, False, True]]
    assert found.original(1, 0) == (0, 0)
    assert found.original(2, 2) == (0, 1)
    assert found.original(2, 1) == (2, 1)
    summary = found.summary()
    assert json.loads(json.dumps(summary)) == summary
    counts = {key: summary[key] for key in ("documents", "kept", "exact_duplicates", "near_duplicates")}
    assert counts == {"documents": 8, "kept": 4, "exact_duplicates": 2, "near_duplicates": 2}
    assert (summary["clusters"], summary["largest_cluster"]) == (2, 4)


def test_pairs_above_the_threshold_are_found(tmp_path: Path) -> None:
    """Recall against exact Jaccard: nearly all of clearly near pairs, nearly none of clearly different ones."""
    pairs = [pair for pair in pairs_of_texts(4000, 120, random.Random(4)) if jaccard(*pair) > 0.5]
    texts = [text for pair in pairs for text in pair]
    found = ~search(tmp_path, texts).keep(0)[1::2]
    truth = np.array([jaccard(*pair) for pair in pairs])
    assert found[truth >= 0.9].mean() > 0.995
    assert found[truth <= 0.65].mean() < 0.005
    bands, rows = choose_bands(0.8, 128)
    middle = (truth > 0.7) & (truth < 0.85)
    assert found[middle].mean() <= np.mean([chance_of_comparison(j, bands, rows) for j in truth[middle]])


def test_every_band_finds_its_pair(tmp_path: Path) -> None:
    """Rows by hand: pair b agrees in the whole of band b alone; a last pair, as near, in the whole of none."""
    bands, rows = choose_bands(0.8, 128)
    ours = np.random.default_rng(1).integers(0, 2**32, (bands + 1, SIGNING.words), dtype=np.uint32)
    theirs = ours.copy()
    theirs[:, :4] += 1
    for pair in range(bands + 1):
        for band in set(range(bands)) - {pair}:
            theirs[pair, 4 + band * rows + pair % rows] += 1
    for name, words in (("ours", ours), ("theirs", theirs)):
        (tmp_path / name).write_bytes(words.astype("<u4").tobytes())
    found = find_duplicates([tmp_path / "ours", tmp_path / "theirs"], tmp_path / "scratch", SIGNING)
    assert found.keep(1).tolist() == [False] * bands + [True]
    assert [found.original(1, pair) for pair in range(bands)] == [(0, pair) for pair in range(bands)]
    assert not found.repeated.any()


def test_bands_reach_the_recall_with_the_most_rows() -> None:
    assert choose_bands(0.8, 128) == (21, 6)
    assert choose_bands(0.9, 128) == (12, 10)
    assert choose_bands(1.0, 128) == (1, 128)
    for threshold in (0.3, 0.5, 0.7, 0.85):
        bands, rows = choose_bands(threshold, 128)
        assert bands * rows <= 128
        assert chance_of_comparison(threshold, bands, rows) >= 0.99
        assert chance_of_comparison(threshold, 128 // (rows + 1), rows + 1) < 0.99


def test_nothing_to_search(tmp_path: Path) -> None:
    assert find_duplicates([], tmp_path / "scratch", SIGNING).summary()["kept"] == 0
    found = search(tmp_path, [], (0, 0))
    assert len(found.keep(1)) == 0
    assert found.summary()["largest_cluster"] == 0


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(signed(["a", "b"]).tobytes())
    with pytest.raises(DataError, match="missing: no such file of signatures"):
        find_duplicates([good, tmp_path / "missing"], tmp_path / "s", SIGNING)
    with pytest.raises(DataError, match="good: 1056 bytes are no whole number of signatures of 272 bytes"):
        find_duplicates([good], tmp_path / "s", Signing(num_permutations=64))
    with pytest.raises(DataError, match=r"threshold of similarity of 1\.5: expected"):
        find_duplicates([good], tmp_path / "s", SIGNING, threshold=1.5)
    with pytest.raises(DataError, match="raise the threshold or the number of permutations"):
        find_duplicates([good], tmp_path / "s", SIGNING, threshold=0.01)
    with pytest.raises(DataError, match="num_permutations is 0, expected 1..4096"):
        Signing(num_permutations=0)
    with pytest.raises(DataError, match="shingle is 65, expected 1..64"):
        Signing(shingle=65)


def test_the_core_refuses_what_does_not_fit() -> None:
    block = _native.Block.from_texts(["a", "b"])
    with pytest.raises(ValueError, match="num_permutations is 5000, expected 1..4096"):
        _native.minhash(block, 5000)
    rows, both = signed(["a", "b"]), np.ones(2, bool)
    with pytest.raises(ValueError, match="end of the band is 200"):
        _native.sort_band(rows, both, 0, 200)
    with pytest.raises(ValueError, match="chosen must mark each"):
        _native.sort_band(rows, both[:1], 0, 4)
    keys = np.zeros(1, np.uint64)
    with pytest.raises(IndexError, match="beyond the parts"):
        _native.join_band(keys, np.array([2]), [rows], [0], 0, 4, 4)
    with pytest.raises(ValueError, match="number of equal words is 5, expected 0..4"):
        _native.join_band(keys, np.array([0]), [rows], [0], 0, 4, 5)
    with pytest.raises(ValueError, match="count the rows"):
        _native.join_band(keys, np.array([0]), [rows, rows], [0, 3], 0, 4, 4)
    with pytest.raises(IndexError, match="beyond the components"):
        _native.Components(2).unite(np.array([[0, 2]]))
