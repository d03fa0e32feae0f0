"""Blocks of a parquet file: rows, without a Python object for any of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from megatron_cpt.config.manifest import sha256_file
from megatron_cpt.data import _native
from megatron_cpt.data._native import Block
from megatron_cpt.data.blocks import CUT_BYTES, BlockReader, Position, RawBlock
from megatron_cpt.errors import DataError

_MOST_ROWS = 8192


class ParquetReader:
    """Blocks of a parquet file. A position is the number of rows before it."""

    def __init__(self, path: Path, text_field: str, start: Position | None, longest: int) -> None:
        self._path, self._text_field, self._longest = path, text_field, longest
        self._row = 0 if start is None else int(start["row"])
        self.before_long: Callable[[], None] | None = None  # rows come as they are: nothing grows
        self.total_bytes = path.stat().st_size
        try:
            self._file = pyarrow.parquet.ParquetFile(path, buffer_size=CUT_BYTES, pre_buffer=False)
        except (OSError, pyarrow.ArrowException) as caught:
            raise self._damaged(caught) from None
        self._rows = self._file.metadata.num_rows
        names = self._file.schema_arrow.names
        if text_field not in names:
            raise DataError(
                f"{path}: no column {text_field!r} (columns here: {', '.join(names)}); name the one with the text"
            )
        kind = self._file.schema_arrow.field(text_field).type
        if not _is_text(kind):
            raise DataError(f"{path}: column {text_field!r} holds {kind}, expected strings")
        self._columns = [text_field, *(["id"] if "id" in names and text_field != "id" else [])]
        self._batches = self._from_row(self._row)

    def _damaged(self, caught: Exception) -> Exception:
        if isinstance(caught, OSError) and caught.errno is not None:  # the system's, not pyarrow's
            return OSError(caught.errno, os.strerror(caught.errno), str(self._path))
        return DataError(f"{self._path}: damaged or not a parquet file, after row {self._row} ({caught})")

    def _from_row(self, row: int) -> Iterator[Any]:
        metadata = self._file.metadata
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            if row >= group.num_rows:
                row -= group.num_rows
                continue
            a_row = max(1, group.total_byte_size // max(1, group.num_rows))
            size = max(1, min(_MOST_ROWS, CUT_BYTES // a_row))
            for batch in self._file.iter_batches(size, [number], self._columns, use_threads=False):
                if row < batch.num_rows:
                    yield batch.slice(row)
                row = max(0, row - batch.num_rows)

    def read(self) -> RawBlock | None:
        """The next rows."""
        try:
            batch = next(self._batches, None)
        except (OSError, pyarrow.ArrowException) as caught:
            raise self._damaged(caught) from None
        if batch is None:
            return None
        first = self._row + 1
        self._row += batch.num_rows
        return RawBlock({"row": self._row}, batch.nbytes, partial(self._parsed, batch, first))

    def _parsed(self, batch: Any, first_row: int, keep_records: bool = False) -> Block:
        del keep_records  # rows have no lines
        columns = [self._column(batch.column(name), name) for name in self._columns]
        names = columns[-1] if "id" in (self._text_field, *self._columns) else None
        return _native.parse_columns(columns[0], names, self._text_field, first_row, self._longest)

    def _column(self, column: Any, name: str) -> tuple[Any, Any, Any]:
        try:
            strings = column.cast(pyarrow.large_string(), safe=False)
        except pyarrow.ArrowException as caught:
            raise DataError(f"{self._path}: column {name!r} cannot be read as strings ({caught})") from None
        _, offsets, data = strings.buffers()
        first = strings.offset
        if offsets is None:
            return np.zeros(1, np.int64), b"", None
        ends = np.frombuffer(offsets, np.int64)[first : first + len(strings) + 1]
        valid = strings.is_valid().to_numpy(zero_copy_only=False) if strings.null_count else None
        return ends, data if data is not None else b"", valid

    @property
    def bytes_read(self) -> int:
        """Bytes of the file, taken to be spread evenly over its rows."""
        return self.total_bytes * self._row // self._rows if self._rows else self.total_bytes

    def sha256(self) -> str:
        """SHA-256 of the file, which is read once more for it."""
        return sha256_file(self._path)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _is_text(kind: Any) -> bool:
    types = pyarrow.types
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
