"""Corpus files as blocks of documents: read in one thread, parsed in any.

A reader cuts a file into raw blocks of about 1 MiB at borders of records; each knows how to become a `Block`
of documents, and where to go on behind it. How the file is cut never changes what its documents are.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from megatron_cpt.data import _native
from megatron_cpt.data._native import Block
from megatron_cpt.errors import DataError

CUT_BYTES = 1 << 20
LONGEST_RECORD_BYTES = 32 << 20
LONG_BYTES = 2 << 20  # larger blocks are held one at a time, from their reading to the writing of their results
_MOST_READ_BYTES = 16 << 20  # at once, while the end of a long record is looked for
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "txt", ".parquet": "parquet"}

Position = dict[str, Any]


@dataclass(frozen=True)
class RawBlock:
    """Bytes of whole records, not yet parsed.

    Args:
        position: where the file goes on behind this block, for `open_blocks(start=...)`; goes through JSON.
        held_bytes: memory that the block takes.
        parse: makes the `Block`; runs in any thread, without the interpreter's lock. With
            `keep_records=True` the lines of a jsonl file are kept for `Block.write_jsonl`.
    """

    position: Position
    held_bytes: int
    parse: Callable[..., Block]


class BlockReader(Protocol):
    """Gives the blocks of one file in order. One thread at a time may use it."""

    total_bytes: int
    """Bytes of the file as it is on disk."""

    before_long: Callable[[], None] | None
    """Called before a record that needs much memory is read on; it may wait. None, as at first: nothing is called."""

    def read(self) -> RawBlock | None:
        """The next block, or None at the end. Raises DataError where the file cannot be read on."""

    @property
    def bytes_read(self) -> int:
        """Bytes of the file, as it is on disk, that were read so far."""

    def sha256(self) -> str:
        """SHA-256 of the whole file in hex, once everything was read."""

    def close(self) -> None:
        """Closes the file."""

    def __enter__(self) -> BlockReader: ...

    def __exit__(self, *exception: object) -> None: ...


def open_blocks(
    path: str | Path,
    text_field: str = "text",
    start: Position | None = None,
    longest_record_bytes: int = LONGEST_RECORD_BYTES,
) -> BlockReader:
    """Open a corpus file to read its documents in blocks.

    `.jsonl` (also `.ndjson`, `.json`): one JSON object a line, its `id` (a string, or a number as it is spelt)
    is kept. `.txt`: documents stand between blank lines; a line ends in LF or CR LF, and both are read as LF
    (an escaped CR in jsonl is text as written). Each of them may end in `.gz` or `.zst`, of several
    members or frames. `.parquet`: one row a document. Only UTF-8 is read (with or without a byte order mark at
    the front). JSON is that of RFC 8259: a field that stands twice counts as the last one, NaN and Infinity
    are refused although `json.loads` takes them, and so is half of a surrogate pair in the text or the id;
    escaped NUL is a character like any other, while a raw NUL makes a record unusable.

    Records without a usable text become faults of their block; what to do about them is the caller's choice
    (`stop_at_fault`).

    Args:
        path: the file.
        text_field: field (column) that holds the text.
        start: `RawBlock.position` of an earlier reader of the same file: goes on behind that block, with the
            blocks that would have come next.
        longest_record_bytes: a record beyond this becomes a fault and is never held in memory.

    Raises:
        DataError: the file is missing, of an unknown kind, shorter than `start`, or not what its name says.
    """
    path = Path(path)
    kind, compression = kind_of(path)
    if kind == "parquet":
        from megatron_cpt.data.parquet import ParquetReader

        return ParquetReader(path, text_field, start, longest_record_bytes)
    return _TextReader(path, kind, compression, text_field, start, longest_record_bytes)


def kind_of(path: Path) -> tuple[str, str]:
    """("jsonl" | "txt" | "parquet", "gzip" | "zstd" | "") of a corpus file, by its name.

    Raises:
        DataError: there is no such file, or its name says nothing.
    """
    if not path.is_file():
        what = "is a folder; name its files" if path.is_dir() else "does not exist"
        raise DataError(f"corpus {path} {what}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSION.get(suffixes[-1], "") if suffixes else ""
    if compression:
        suffixes.pop()
    kind = _KINDS.get(suffixes[-1], "") if suffixes else ""
    if not kind or (kind == "parquet" and compression):
        raise DataError(
            f"corpus {path}: cannot tell its kind; expected .jsonl or .txt (also with .gz or .zst) or .parquet"
        )
    return kind, compression


def stop_at_fault(block: Block, path: str | Path) -> None:
    """Refuse a block with a record that was left out.

    Raises:
        DataError: the block has faults; the message names the file and the line (row) of the first.
    """
    for line, reason in block.faults:
        raise DataError(f"{path}:{line}: {reason}")


class _HashedFile:
    """A file that is hashed while it is read, each byte once."""

    closed = False

    def __init__(self, path: Path, start: Position | None) -> None:
        self._path = path
        self.failure: OSError | None = None  # of the system, where a read has met one
        self._file: IO[bytes] = path.open("rb", buffering=0)
        self._hash = _native.Sha256()
        self._hashed = self.read_bytes = 0
        if start is not None:
            self._hash = _native.Sha256.from_saved(base64.b64decode(start["sha256"]))
            self._hashed = int(start["hashed"])
            self.read_bytes = self._file.seek(int(start["offset"]))

    def read(self, size: int = -1) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as caught:
            self.failure = OSError(caught.errno, caught.strerror, str(self._path))
            raise self.failure from None
        self.read_bytes += len(data)
        new = self.read_bytes - self._hashed
        if new > 0:
            self._hash.update(data if new >= len(data) else memoryview(data)[-new:])
            self._hashed = self.read_bytes
        return data

    def hash_position(self) -> Position:
        return {"hashed": self._hashed, "sha256": base64.b64encode(self._hash.saved()).decode()}

    def sha256(self) -> str:
        while self.read(CUT_BYTES):
            pass
        return self._hash.digest().hex()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        self._file.close()
        self.closed = True


class _TextReader:
    """Blocks of a jsonl or txt file.

    A position is an offset and its line, counted in the text itself, and how far ahead of it the file was read.
    """

    def __init__(
        self, path: Path, kind: str, compression: str, text_field: str, start: Position | None, longest: int
    ) -> None:
        self._path, self._text_field, self._longest = path, text_field, longest
        self._paragraphs = kind == "txt"
        self._carry = b""
        self._ended = False
        self.before_long: Callable[[], None] | None = None
        self.total_bytes = path.stat().st_size
        self._plain = not compression
        self._offset, self._line = (0, 1) if start is None else (int(start["offset"]), int(start["line"]))
        self._file = _HashedFile(path, start if self._plain else None)
        self._stream: Any = self._file
        if compression:
            import pyarrow

            self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(self._file, "r"), compression)
            self._skip_to(self._offset)
        elif self._offset > self.total_bytes:
            raise self._changed()
        if start is not None and start["ahead"]:  # so that the file is cut as if it had been read in one go
            self._carry = self._pull(int(start["ahead"]))

    def _changed(self) -> DataError:
        return DataError(f"{self._path} is shorter than the part of it that was read before: it has been changed")

    def _skip_to(self, offset: int) -> None:
        while offset:
            chunk = self._pull(min(offset, CUT_BYTES))
            if not chunk:
                raise self._changed()
            offset -= len(chunk)

    def _pull(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except (OSError, EOFError) as caught:
            if self._file.failure is not None:
                raise self._file.failure from None
            if "too much memory" in str(caught):  # zstd's word for a window beyond 2^27 bytes
                raise DataError(
                    f"{self._path} was compressed with a window that is too large to read (zstd --long beyond 27); "
                    "compress it again without --long"
                ) from None
            line = self._line + _native.count_lines(self._carry)
            raise DataError(f"{self._path}:{line}: the compressed file is damaged or cut short ({caught})") from None

    def read(self) -> RawBlock | None:
        held = self._carry
        border = 0
        while not border:
            chunk = b"" if self._ended else self._pull(max(CUT_BYTES, min(len(held), _MOST_READ_BYTES)))
            self._ended = not chunk
            held = held + chunk if held else chunk
            border = len(held) if self._ended else _native.last_border(held, self._paragraphs)
            self._carry = held
            if self._ended and not held:
                return None
            if self.before_long is not None and not border and len(held) >= LONG_BYTES:
                self.before_long()
            if not border and len(held) > self._longest + CUT_BYTES:
                return self._skip_record(held)
        line = self._line
        data = memoryview(held)[:border]
        self._advance(held, border)
        return RawBlock(self._position(), len(held), partial(self._parsed, data, line))

    def _parsed(self, data: memoryview, line: int, keep_records: bool = False) -> Block:
        if self._paragraphs:
            return _native.parse_txt(data, line, self._longest)
        return _native.parse_jsonl(data, self._text_field, line, self._longest, keep_records)

    def _advance(self, held: bytes, border: int) -> None:
        self._line += _native.count_lines(memoryview(held)[:border])
        self._offset += border
        self._carry = held[border:]

    def _skip_record(self, held: bytes) -> RawBlock:
        """Go behind a record that is too long, without holding it."""
        line = self._line
        while not (border := _native.first_border(held, self._paragraphs)):
            rest = _native.unfinished(held, self._paragraphs)
            self._line += _native.count_lines(held)
            self._offset += len(held) - len(rest)
            chunk = self._pull(_MOST_READ_BYTES)
            self._ended = not chunk
            if self._ended:
                border = len(held := rest)
                break
            held = rest + chunk
        self._advance(held, border)
        reason = f"a record of more than {self._longest} bytes; split it"
        return RawBlock(self._position(), 0, partial(_parsed_fault, line, reason))

    def _position(self) -> Position:
        position: Position = {"offset": self._offset, "line": self._line, "ahead": len(self._carry)}
        return {**position, **self._file.hash_position()} if self._plain else position

    @property
    def bytes_read(self) -> int:
        return self._file.read_bytes

    def sha256(self) -> str:
        return self._file.sha256()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _parsed_fault(line: int, reason: str, keep_records: bool = False) -> Block:
    del keep_records
    return Block.of_fault(line, reason)
