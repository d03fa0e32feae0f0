"""Writing an indexed dataset: the index from lengths alone, and the moment at which a dataset is there."""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.config.manifest import read_manifest, sha256_file, temporary_path, write_manifest
from megatron_cpt.data.indexed import (
    DTYPES,
    ENTRIES_AT_ONCE,
    HEADER,
    MAGIC,
    Int64s,
    Tokens,
    dtype_for,
    manifest_path,
    running_ends,
)
from megatron_cpt.data.packing import remove_packs
from megatron_cpt.errors import DataError

_CODES = {np.dtype(dtype).newbyteorder("<"): code for code, dtype in DTYPES.items()}
LONGEST_DOCUMENT = 2**31 - 1  # lengths are i32


def check_no_dataset(prefix: str | Path) -> None:
    """Raise DataError when there is a dataset at `prefix` already."""
    if manifest_path(prefix).exists():
        raise DataError(f"{prefix} already holds a dataset; choose another prefix or ask to overwrite it")


def write_index(
    path: Path, dtype: np.dtype[Any], lengths: npt.NDArray[np.int32], borders: Int64s | None = None
) -> None:
    """Write an index, in memory that does not depend on its size, and bring it to disk.

    Args:
        path: file to write.
        dtype: type of the ids in `.bin`, little endian.
        lengths: int32 tokens of each sequence [S]; may be a memory map.
        borders: sequence numbers at which documents begin, and S behind the last: [D + 1]; two equal ones
            are an empty document. None: one sequence a document.
    """
    count = len(lengths)
    documents = count + 1 if borders is None else len(borders)
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, _CODES[np.dtype(dtype).newbyteorder("<")], count, documents))
        for start in range(0, count, ENTRIES_AT_ONCE):
            file.write(lengths[start : start + ENTRIES_AT_ONCE].astype("<i4").tobytes())
        for start, ends in running_ends(lengths):
            file.write(((ends - lengths[start : start + len(ends)]) * dtype.itemsize).astype("<i8").tobytes())
        for start in range(0, documents, ENTRIES_AT_ONCE):
            stop = min(start + ENTRIES_AT_ONCE, documents)
            block = np.arange(start, stop, dtype="<i8") if borders is None else borders[start:stop].astype("<i8")
            file.write(block.tobytes())
        file.flush()
        os.fsync(file.fileno())


def complete_dataset(
    prefix: Path, files: Mapping[str, Path], inputs: Mapping[str, str], known: Mapping[str, str], **fields: Any
) -> dict[str, Any]:
    """Move finished files to their names and write the manifest, last; returns it.

    From the first move until the manifest is there, nothing at `prefix` can be loaded. Packs of a dataset that was
    there before are removed.

    Args:
        prefix: path of the dataset without an ending.
        files: ending -> finished file on the same file system, on disk already.
        inputs: name -> SHA-256 of what it was made from.
        known: ending -> SHA-256 of files that were hashed while they were written.
        fields: further entries of the manifest.
    """
    outputs = {
        ending: {"bytes": path.stat().st_size, "sha256": known.get(ending) or sha256_file(path)}
        for ending, path in files.items()
    }
    manifest_path(prefix).unlink(missing_ok=True)
    remove_packs(prefix)
    for ending, path in files.items():
        os.replace(path, f"{prefix}.{ending}")
    write_manifest(manifest_path(prefix), "shards", inputs, **fields, outputs=outputs)
    folder = os.open(prefix.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return read_manifest(manifest_path(prefix), "shards", DataError)


class IndexedDatasetWriter:
    """Writes a dataset whose documents come one after another, under temporary names.

    `finish` moves the files to their names and writes the manifest last. Leaving the `with` block
    without `finish` removes everything; a dataset that stood there before stays until `finish`.

    Args:
        prefix: path of the dataset without an ending; its folder is made.
        vocab_size: number of ids; decides the type on disk, larger ids are refused.
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.dtype = dtype_for(vocab_size)
        self.lengths = array("i")
        self.num_tokens = 0

    def __enter__(self) -> IndexedDatasetWriter:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary("bin"), "wb", buffering=1 << 20)  # noqa: SIM115 - closed in __exit__
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        for ending in ("bin", "idx"):
            self._temporary(ending).unlink(missing_ok=True)

    def add(self, ids: list[int] | Tokens) -> None:
        """Append one document.

        Raises:
            DataError: no ids, more than an index entry can count, or an id outside of the vocabulary.
        """
        row = np.asarray(ids, dtype=np.int64)
        if not 0 < len(row) <= LONGEST_DOCUMENT:
            raise DataError(f"a document of {len(row)} tokens; expected 1 to {LONGEST_DOCUMENT}")
        self.add_documents(row, np.array([len(row)], np.int32))

    def add_documents(self, tokens: Tokens, lengths: npt.NDArray[np.int32]) -> None:
        """Append documents that stand back to back in `tokens`, with `lengths` tokens each, all above 0.

        Raises:
            DataError: an id outside of the vocabulary.
        """
        check_ids(tokens, lengths, self.vocab_size, len(self.lengths))
        self._file.write(np.ascontiguousarray(tokens, self.dtype).data)
        self.lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.num_tokens += len(tokens)

    def finish(self, inputs: Mapping[str, str], **fields: Any) -> dict[str, Any]:
        """Make the dataset loadable and return its manifest.

        Args:
            inputs: name -> SHA-256 of what it was made from.
            fields: further entries of the manifest.

        Raises:
            DataError: nothing was added.
        """
        if not self.lengths:
            raise DataError(f"no document to write to {self.prefix}: the corpus is empty")
        self._file.flush()
        os.fsync(self._file.fileno())
        write_index(self._temporary("idx"), self.dtype, np.frombuffer(self.lengths, dtype=np.int32))
        return complete_dataset(
            self.prefix,
            {ending: self._temporary(ending) for ending in ("bin", "idx")},
            inputs,
            {},
            vocab_size=self.vocab_size,
            documents=len(self.lengths),
            tokens=self.num_tokens,
            **fields,
        )

    def _temporary(self, ending: str) -> Path:
        return temporary_path(f"{self.prefix}.{ending}")


def check_ids(tokens: Tokens, lengths: npt.NDArray[np.int32], vocab_size: int, first_document: int) -> None:
    """Raise DataError for an id outside of the vocabulary, with the document it stands in."""
    if not len(tokens):
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        bad = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
        document = first_document + int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), bad, side="right"))
        raise DataError(
            f"token id {tokens[bad]} in document {document}, expected 0 to {vocab_size - 1}; "
            "give the tokenizer that made these ids"
        )
