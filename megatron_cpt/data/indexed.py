"""The indexed dataset on disk, `<prefix>.bin` and `<prefix>.idx`: byte for byte megatron-core's format.

`.bin`: token ids back to back, little endian, no header. `.idx`, little endian and unpadded: magic
(9 bytes), version 1 (u64), dtype code (u8), number of sequences S (u64), length of the document array
D + 1 (u64), S lengths in tokens (i32), S byte offsets (i64), D + 1 document borders as sequence
numbers (i64). `<prefix>.manifest.json` is ours: written last, it makes the pair complete.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.config.manifest import read_manifest, sha256_file
from megatron_cpt.data import _native
from megatron_cpt.errors import DataError

Int64s = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.integer[Any]]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
ENTRIES_AT_ONCE = 1 << 20


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """Type of the ids on disk: u16 below 65,500 ids, else i32 (megatron-core's rule)."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def bin_path(prefix: str | Path) -> Path:
    """Path of the token stream of a dataset."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Path of the index of a dataset."""
    return Path(f"{prefix}.idx")


def manifest_path(prefix: str | Path) -> Path:
    """Path of the manifest of a dataset."""
    return Path(f"{prefix}.manifest.json")


def running_ends(lengths: npt.NDArray[np.int32]) -> Iterator[tuple[int, Int64s]]:
    """Token position at which each sequence ends, in blocks: (first sequence of the block, ends)."""
    total = 0
    for start in range(0, len(lengths), ENTRIES_AT_ONCE):
        ends = np.cumsum(lengths[start : start + ENTRIES_AT_ONCE], dtype=np.int64) + total
        total = int(ends[-1])
        yield start, ends


class IndexedDataset:
    """Reads a dataset through memory maps; only the document starts are held in memory (8 bytes each).

    `stream` holds the ids of all documents back to back, read-only, in the type on disk; `vocab_size`,
    `language` and `manifest` are those it was built with.

    Args:
        prefix: path of the dataset without an ending.
        foreign: read a dataset without a manifest, made by another tool. Its vocabulary, language and
            bytes are then unknown.

    Raises:
        DataError: a file is missing or damaged, or .bin, .idx and manifest do not fit each other.
    """

    def __init__(self, prefix: str | Path, foreign: bool = False) -> None:
        self.prefix = str(prefix)
        self.manifest: dict[str, Any] = {}
        if not foreign:
            self.manifest = read_manifest(manifest_path(prefix), "shards", DataError)
        self.vocab_size = int(self.manifest.get("vocab_size", 2**31))
        self.language = str(self.manifest.get("language", ""))
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                raise DataError(f"{path} is missing; give the prefix without an ending, or build the dataset again")
        self._read_index()
        self._check_manifest()

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str, bool]]:
        return IndexedDataset, (self.prefix, not self.manifest)  # another process maps the files itself

    def _read_index(self) -> None:
        """Map both files and check every length and offset of the index against the token stream."""
        path, size = idx_path(self.prefix), idx_path(self.prefix).stat().st_size
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or header[:9] != MAGIC:
            raise DataError(
                f"{path} is not an index of tokens (it does not begin with MMIDIDX); build the dataset again"
            )
        _, version, code, sequences, borders = HEADER.unpack(header)
        if version != 1 or code not in DTYPES:
            raise DataError(
                f"{path} has version {version} and type code {code}; expected version 1 and an integer type"
            )
        expected = HEADER.size + 12 * sequences + 8 * borders
        if size != expected:
            raise DataError(
                f"{path} has {size} bytes, {sequences} sequences and {borders} document borders need {expected}; "
                "it was cut short or holds image modes, build the dataset again"
            )
        self.dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        index = np.memmap(path, mode="r")
        lengths = np.frombuffer(index, "<i4", sequences, HEADER.size)
        offsets = np.frombuffer(index, "<i8", sequences, HEADER.size + 4 * sequences)
        documents = np.frombuffer(index, "<i8", borders, HEADER.size + 12 * sequences)
        self._check_index(lengths, offsets, documents)
        self.stream: Tokens = np.memmap(bin_path(self.prefix), dtype=self.dtype, mode="r").view(np.ndarray)
        starts = np.append(offsets, self.stream.nbytes)[documents] // self.dtype.itemsize
        self._starts: Int64s = np.ascontiguousarray(starts, np.int64)
        full = np.diff(self._starts) > 0  # an empty document has a border and no tokens
        self._full_starts = self._starts[:-1] if full.all() else self._starts[:-1][full]

    def _check_index(self, lengths: Any, offsets: Any, documents: Any) -> None:
        path, size = idx_path(self.prefix), bin_path(self.prefix).stat().st_size
        total = 0
        for start, ends in running_ends(lengths):
            block = lengths[start : start + len(ends)]
            if block.min() < 0 or not np.array_equal(
                offsets[start : start + len(ends)], (ends - block) * self.dtype.itemsize
            ):
                raise DataError(f"{path}: the sequences do not follow each other without gaps; build the dataset again")
            total = int(ends[-1])
        if size != total * self.dtype.itemsize:
            raise DataError(
                f"{bin_path(self.prefix)} has {size} bytes, its index counts {total} tokens of "
                f"{self.dtype.itemsize} bytes; the two files are not of one build, build the dataset again"
            )
        sound = (
            len(documents) and documents[0] == 0 and documents[-1] == len(lengths) and (np.diff(documents) >= 0).all()
        )
        if not total or not sound:
            raise DataError(
                f"{path}: " + ("the document borders are damaged" if total else "the dataset holds no token")
            )

    def _check_manifest(self) -> None:
        facts = {"documents": self.num_documents, "tokens": self.num_tokens}
        for name, got in facts.items():
            if self.manifest and self.manifest.get(name) != got:
                raise DataError(
                    f"{self.prefix}: the files hold {got} {name}, the manifest says {self.manifest.get(name)}; "
                    "they are not of one build, build the dataset again"
                )

    @property
    def num_documents(self) -> int:
        """Number of documents, empty ones (foreign datasets only) included."""
        return len(self._starts) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents."""
        return len(self.stream)

    @property
    def document_starts(self) -> Int64s:
        """Token at which each document starts, and the end of the last one: shape [num_documents + 1]."""
        return self._starts

    @property
    def content_hash(self) -> str:
        """SHA-256 that stands for the tokens: of `.bin` by the manifest, else of the index alone."""
        return str(self.manifest["outputs"]["bin"]["sha256"]) if self.manifest else sha256_file(idx_path(self.prefix))

    def document(self, number: int) -> Tokens:
        """The token ids of one document, read-only, in the type on disk.

        Raises:
            DataError: there is no such document.
        """
        if not 0 <= number < self.num_documents:
            raise DataError(f"{self.prefix} has no document {number}; expected 0 to {self.num_documents - 1}")
        return self.stream[self._starts[number] : self._starts[number + 1]]

    def tokens(self, start: int, stop: int) -> tuple[Int64s, Int64s]:
        """Tokens start..stop-1 of the documents in their order, and where documents start among them.

        Returns:
            int64 ids of shape [stop - start], and increasing positions in 0..stop-start-1.

        Raises:
            DataError: the range leaves the dataset, or an id is not of its vocabulary.
        """
        try:
            return _native.gather(self.stream, self._full_starts, start, stop - start, self.vocab_size)
        except IndexError as caught:
            raise DataError(f"{self.prefix}: {caught}") from None
        except ValueError as caught:
            raise DataError(
                f"{bin_path(self.prefix)}: {caught}, expected 0 to {self.vocab_size - 1}; build the dataset again"
            ) from None

    def check_tokenizer(self, sha256: str) -> None:
        """Refuse to work with a tokenizer that did not make this dataset.

        Args:
            sha256: `Tokenizer.sha256` of the one that is to be used.

        Raises:
            DataError: the manifest names another.
        """
        made_by = self.manifest.get("tokenizer_sha256")
        if made_by != sha256:
            raise DataError(
                f"{self.prefix} was built with tokenizer {str(made_by)[:12]}, this one is {sha256[:12]}; "
                "build the dataset with this tokenizer, or give the one it was built with"
            )
