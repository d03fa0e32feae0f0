"""Which documents of a corpus repeat an earlier one, word for word or nearly.

Every document is signed once (`Signing.sign`): a 128-bit fingerprint of its exact bytes and a MinHash of
its character shingles. `find_duplicates` works on the signatures alone, in three steps:

1. `sort_run`, once a run of rows: the keys of each band (a few values of the signature), sorted, to disk.
2. `join_slice`, once a band and slice of the keys: documents of equal key are compared, by the share of
   values in which their whole signatures agree; pairs of at least `threshold` are reported.
3. Pairs connect documents to clusters; of each cluster the first document, in the order of the parts, stays.

Steps 1 and 2 are functions of files and numbers: they may run anywhere, in any order, and the clusters are
the same. A pair of Jaccard index J is compared with chance 1 - (1 - J^rows)^bands (the S-curve), and then
kept when its estimate, of standard deviation about sqrt(J (1 - J) / num_permutations), reaches the threshold.

A cluster may chain: its documents are each near another one of it, not all of them near its first.

Sources: Broder 1997 (resemblance); Dahlgaard, Knudsen, Thorup 2017 (the sketch, csrc/minhash.hpp);
Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3 (bands and rows).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_cpt.data import _native
from megatron_cpt.errors import DataError

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint32]
MapTasks = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

_FINGERPRINT_WORDS = 4
_ROWS_AT_ONCE = 1 << 20  # of a run
_KEYS_AT_ONCE = 1 << 21  # of a slice, about
_WORD = np.dtype("<u4")


@dataclass(frozen=True)
class Signing:
    """How documents are signed; signatures of different settings cannot be compared.

    Shingles are runs of characters (code points), not words, so that Japanese needs no tokenizer. Runs of
    white space count as one space, none at the ends; upper and lower case differ, as do Unicode forms.

    Args:
        num_permutations: MinHash values a document, 1 to 4096.
        shingle: characters of a shingle, 1 to 64; a shorter text is one shingle.
        seed: chooses the hash functions, 0 to 2^64 - 1.

    Raises:
        DataError: a value is outside of its range.
    """

    num_permutations: int = 128
    shingle: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("num_permutations", 1, 4096), ("shingle", 1, 64), ("seed", 0, 2**64 - 1)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise DataError(f"near duplicates: {name} is {value}, expected {low}..{high}")

    @property
    def words(self) -> int:
        """Width of a row: 32-bit words a document."""
        return _FINGERPRINT_WORDS + self.num_permutations

    def sign(self, block: _native.Block) -> Words:
        """Signs the documents of a block; the interpreter is free meanwhile.

        Returns:
            [documents, words], little-endian: fingerprint (4 words), then MinHash. A part of the corpus is
            the bytes of such rows back to back in a file, without a header.
        """
        fingerprints = _native.fingerprints(block).view(_WORD)
        signatures = _native.minhash(block, self.num_permutations, self.shingle, self.seed)
        return np.concatenate([fingerprints, signatures], axis=1)


def choose_bands(threshold: float, num_permutations: int, recall: float = 0.99) -> tuple[int, int]:
    """Number of bands and rows a band under which pairs at the threshold are compared with chance `recall`.

    Of all that do so, the most rows, as they bring the fewest needless comparisons.

    Returns:
        (bands, rows), with bands * rows <= num_permutations.

    Raises:
        DataError: no choice reaches the recall.
    """
    if not 0 < threshold <= 1:
        raise DataError(f"a threshold of similarity of {threshold}: expected a number above 0 and at most 1")
    for rows in range(num_permutations, 0, -1):
        bands = num_permutations // rows
        if chance_of_comparison(threshold, bands, rows) >= recall:
            return bands, rows
    raise DataError(
        f"pairs of similarity {threshold} cannot be compared with chance {recall} by {num_permutations} values; "
        f"raise the threshold or the number of permutations"
    )


def chance_of_comparison(similarity: float, bands: int, rows: int) -> float:
    """The S-curve: chance that two documents of this Jaccard index agree in a whole band."""
    return 1 - (1 - similarity**rows) ** bands


@dataclass(frozen=True)
class Run:
    """Rows of one part that are sorted at once."""

    path: Path
    start: int
    count: int
    first: int  # number of its first document among all

    def rows(self, signing: Signing) -> Words:
        """The rows, mapped from disk."""
        offset = self.start * signing.words * _WORD.itemsize
        return np.memmap(self.path, _WORD, "r", offset, (self.count, signing.words))


@dataclass(frozen=True)
class Search:
    """A search for duplicates: all that its tasks need, and may be pickled.

    Band 0 is the fingerprint (equal texts); band b > 0 the b-th group of `rows` MinHash values.
    """

    signing: Signing
    threshold: float
    bands: int
    rows: int
    runs: tuple[Run, ...]
    folder: Path

    @property
    def documents(self) -> int:
        """Documents of all parts."""
        return self.runs[-1].first + self.runs[-1].count if self.runs else 0

    @property
    def slices(self) -> int:
        """Slices of the keys of each band: one is in memory at a time."""
        return max(1, -(-self.documents // _KEYS_AT_ONCE))

    def columns(self, band: int) -> tuple[int, int]:
        """First word of a band in a row, and the word behind it."""
        if band == 0:
            return 0, _FINGERPRINT_WORDS
        begin = _FINGERPRINT_WORDS + (band - 1) * self.rows
        return begin, begin + self.rows

    def compared(self, band: int) -> tuple[int, int, int]:
        """Words compared between documents of equal key (first, behind the last), and how many must agree."""
        if band == 0:
            return 0, _FINGERPRINT_WORDS, _FINGERPRINT_WORDS
        needed = math.ceil(self.threshold * self.signing.num_permutations - 1e-9)
        return _FINGERPRINT_WORDS, self.signing.words, needed

    def sorted_path(self, run: int, kind: str) -> Path:
        """File of a run's sorted keys, or of the documents that have them ("keys", "documents")."""
        return self.folder / f"{run:06d}.{kind}"


def sort_run(search: Search, number: int) -> None:
    """Writes the sorted keys of each band of a run, and the row of each.

    Two columns without a header: band 0 (all rows), band 1, band 2, ... (rows that repeat no earlier one of
    the run word for word, so that a text repeated a million times is looked up once). Memory: one band.
    """
    run = search.runs[number]
    rows = run.rows(search.signing)
    keys, documents = _native.sort_band(rows, np.ones(run.count, bool), *search.columns(0))
    repeats = _native.join_band(keys, documents.astype(np.int64), [rows], [0], *search.compared(0))
    distinct = np.ones(run.count, bool)
    distinct[repeats[:, 1]] = False
    num_distinct = int(distinct.sum())
    size = run.count + search.bands * num_distinct
    with (
        _column_file(search.sorted_path(number, "keys"), np.uint64, size) as all_keys,
        _column_file(search.sorted_path(number, "documents"), np.uint32, size) as all_documents,
    ):
        all_keys[: run.count], all_documents[: run.count] = keys, documents
        for band in range(1, search.bands + 1):
            part = _extent(run.count, num_distinct, band)
            all_keys[part], all_documents[part] = _native.sort_band(rows, distinct, *search.columns(band))


def join_slice(search: Search, task: tuple[int, int]) -> Int64s:
    """Pairs of documents that are alike and share a key of this band and slice of the keys.

    Args:
        search: the search, all runs of which are sorted.
        task: band (0: equal texts) and slice.

    Returns:
        [pairs, 2], numbers over all documents, the lower first: enough to connect all such pairs.
    """
    band, part = task
    low, high = (np.uint64(min((part + k) * 2**64 // search.slices, 2**64 - 1)) for k in (0, 1))
    keys, documents = [], []
    for number, run in enumerate(search.runs):
        all_keys = _column(search.sorted_path(number, "keys"), np.uint64)
        extent = _extent(run.count, (len(all_keys) - run.count) // search.bands, band)
        column = all_keys[extent]
        begin = int(np.searchsorted(column, low, "left"))
        end = int(np.searchsorted(column, high, "left")) if part + 1 < search.slices else len(column)
        keys.append(column[begin:end])
        rows = _column(search.sorted_path(number, "documents"), np.uint32)[extent][begin:end]
        documents.append(rows.astype(np.int64) + run.first)
    return _native.join_band(
        np.concatenate(keys),
        np.concatenate(documents),
        [run.rows(search.signing) for run in search.runs],
        [run.first for run in search.runs],
        *search.compared(band),
    )


def _extent(num_rows: int, num_distinct: int, band: int) -> slice:
    if band == 0:
        return slice(0, num_rows)
    begin = num_rows + (band - 1) * num_distinct
    return slice(begin, begin + num_distinct)


@contextmanager
def _column_file(path: Path, dtype: type[np.generic], size: int) -> Iterator[npt.NDArray[Any]]:
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.truncate(size * np.dtype(dtype).itemsize)
    yield _column(temporary, dtype, "r+")
    os.replace(temporary, path)


def _column(path: Path, dtype: type[np.generic], mode: Literal["r", "r+"] = "r") -> npt.NDArray[Any]:
    """A column of a file, mapped.

    Without NumPy's header: it is parsed by `ast`, which Python 3.11 does not do safely in several threads.
    """
    if not path.stat().st_size:  # nothing can be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode)


@dataclass(frozen=True)
class Duplicates:
    """What a search has found.

    Documents are numbered over all parts in order; document d of part p is `firsts[p] + d`.
    """

    search: Search
    firsts: tuple[int, ...]  # one more than parts: ends with the number of documents
    roots: Int64s  # [documents] the first document of the cluster that each belongs to
    repeated: Bools  # [documents] whether an earlier document has the same bytes

    def exact(self, part: int) -> Bools:
        """[documents of the part] whether an earlier document has the same bytes."""
        return self.repeated[self.firsts[part] : self.firsts[part + 1]]

    def near(self, part: int) -> Bools:
        """[documents of the part] whether a document goes because it is nearly an earlier one."""
        return ~self.keep(part) & ~self.exact(part)

    def keep(self, part: int) -> Bools:
        """[documents of the part] whether a document is the first of its cluster."""
        first, end = self.firsts[part], self.firsts[part + 1]
        return self.roots[first:end] == np.arange(first, end)

    def original(self, part: int, document: int) -> tuple[int, int]:
        """Part and document that stays in place of this one."""
        root = int(self.roots[self.firsts[part] + document])
        home = int(np.searchsorted(self.firsts, root, "right")) - 1
        return home, root - self.firsts[home]

    def summary(self) -> dict[str, Any]:
        """Counts, settings and the S-curve, for a manifest or report."""
        search = self.search
        sizes = np.bincount(self.roots, minlength=1) if len(self.roots) else np.zeros(1, np.int64)
        repeated = int(self.repeated.sum())
        kept = int((sizes > 0).sum())
        return {
            "documents": len(self.roots),
            "kept": kept,
            "exact_duplicates": repeated,
            "near_duplicates": len(self.roots) - kept - repeated,
            "clusters": int((sizes > 1).sum()),
            "largest_cluster": int(sizes.max()),
            "threshold": search.threshold,
            "num_permutations": search.signing.num_permutations,
            "shingle_characters": search.signing.shingle,
            "seed": search.signing.seed,
            "bands": search.bands,
            "rows": search.rows,
            "chance_of_comparison": {
                f"{similarity:.2f}": round(chance_of_comparison(float(similarity), search.bands, search.rows), 4)
                for similarity in np.arange(0.5, 1.001, 0.05)
            },
        }


def find_duplicates(
    parts: Sequence[str | Path],
    scratch: str | Path,
    signing: Signing,
    threshold: float = 0.8,
    map_tasks: MapTasks = map,
) -> Duplicates:
    """Finds exact and near duplicates among signed documents.

    The result depends on nothing but the rows, their order, and the settings. Memory: about 100 MB a running
    task and 25 bytes a document; pages of mapped files come on top, which the system drops when it needs to.
    Disk: 12 bytes a document and band. Time: linear where documents of equal key are alike; many that share a
    frame, and with it a key, but are not alike, are compared each with each.

    Args:
        parts: files of rows as `Signing.sign` gives them, in the order in which the first of a cluster is chosen.
        scratch: folder for sorted keys; what it holds of an earlier search is replaced, and all is removed at the end.
        signing: the settings the parts were signed with.
        threshold: least estimated Jaccard index of near duplicates, above 0 and at most 1.
        map_tasks: like the built-in `map`: runs a picklable function on each task and gives the results in any
            order; `ThreadPoolExecutor.map`, or a cluster on which all machines see the same files.

    Returns:
        For each document whether it is kept, and if not, why and in favour of which.

    Raises:
        DataError: a part is missing or holds no whole number of rows, or the threshold cannot be met.
    """
    bands, rows = choose_bands(threshold, signing.num_permutations)
    firsts, runs = _runs_of([Path(part) for part in parts], signing)
    search = Search(signing, threshold, bands, rows, tuple(runs), Path(scratch) / "bands")
    if search.folder.exists():
        shutil.rmtree(search.folder)
    search.folder.mkdir(parents=True)
    components = _native.Components(search.documents)
    for _ in map_tasks(partial(sort_run, search), range(len(runs))):
        pass
    _unite(components, search, [0], map_tasks)
    repeated = components.roots() != np.arange(search.documents)
    _unite(components, search, range(1, bands + 1), map_tasks)
    shutil.rmtree(search.folder)
    return Duplicates(search, tuple(firsts), components.roots(), repeated)


def _unite(components: _native.Components, search: Search, bands: Iterable[int], map_tasks: MapTasks) -> None:
    tasks = [(band, part) for band in bands for part in range(search.slices if search.runs else 0)]
    for pairs in map_tasks(partial(join_slice, search), tasks):
        components.unite(pairs)


def _runs_of(parts: Sequence[Path], signing: Signing) -> tuple[list[int], list[Run]]:
    firsts, runs = [0], []
    row_bytes = signing.words * _WORD.itemsize
    for path in parts:
        if not path.is_file():
            raise DataError(f"{path}: no such file of signatures; sign this part again")
        size = path.stat().st_size
        if size % row_bytes:
            raise DataError(
                f"{path}: {size} bytes are no whole number of signatures of {row_bytes} bytes "
                f"({signing.num_permutations} permutations); sign this part again"
            )
        for start in range(0, size // row_bytes, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, size // row_bytes - start)
            runs.append(Run(path, start, count, firsts[-1] + start))
        firsts.append(firsts[-1] + size // row_bytes)
    return firsts, runs
