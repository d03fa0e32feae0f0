"""Documents and the files they come from: jsonl, txt and parquet, plain, gzip or zstd."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_cpt.errors import DataError

Progress = Callable[[int, int], None]
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_JSONL = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Document:
    """One text with its language.

    Args:
        text: the text, exactly as it is to be trained on.
        language: short name of its language, such as "en".
        source: where it was read, "file:line"; for messages only.
        id: the origin the corpus gives it, "work#part" or "work"; empty when it gives none.
    """

    text: str
    language: str
    source: str
    id: str = ""


def work_of(document: Document) -> str:
    """Name of the work a document belongs to: its id up to the first '#', or its text when it has no id."""
    return document.id.split("#", 1)[0] or document.text


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document is kept for validation.

    Decided by a hash of the work alone, so all parts of a book stay on one side, the answer does not
    depend on the other documents, and a larger fraction only ever adds works.

    Args:
        document: any document.
        fraction: expected share of the works that is held out, 0 to 1.
    """
    digest = hashlib.sha256(work_of(document).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def split_held_out(documents: Iterable[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Split documents into (training, held out) by `is_held_out`, in the order given.

    Raises:
        DataError: one side would be empty.
    """
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        sides[is_held_out(document, fraction)].append(document)
    if not sides[0] or not sides[1]:
        works = len({work_of(document) for side in sides for document in side})
        raise DataError(
            f"holding out {fraction:g} of {works} works leaves the {'held-out' if sides[0] else 'training'} side "
            "empty; give more works (documents with one id before '#' are one work) or another fraction"
        )
    return sides


def read_documents(
    paths: str | Path | Sequence[str | Path],
    text_field: str = "text",
    language: str = "",
    on_progress: Progress | None = None,
) -> Iterator[Document]:
    """Read the documents of corpus files, one at a time and in order.

    `.jsonl` (also `.ndjson`, `.json`): one JSON object a line, its `id` is kept. `.txt`: documents stand
    between blank lines. `.parquet`: one row a document. Each of the first two may end in `.gz` or `.zst`.
    Nothing is cleaned or normalised; texts may be empty.

    Args:
        paths: one file or several.
        text_field: field (column) that holds the text.
        language: language given to every document.
        on_progress: called with (bytes read, bytes in all), counted in the files as they are on disk.

    Raises:
        DataError: a file that is missing, of an unknown kind, cut short or not UTF-8, or a record
            without a text; the message names file and line.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    readers = [(path, _reader_of(path)) for path in files]
    total = sum(path.stat().st_size for path in files)
    finished = 0
    for path, reader in readers:
        with open(path, "rb") as raw:
            for count, (number, text, name) in enumerate(reader(path, raw, text_field)):
                if on_progress is not None and count % 256 == 0:
                    on_progress(finished + min(raw.tell(), path.stat().st_size), total)
                yield Document(text, language, f"{path}:{number}", name)
        finished += path.stat().st_size
        if on_progress is not None:
            on_progress(finished, total)


Record = tuple[int, str, str]  # line or row (from 1), text, id
Reader = Callable[[Path, IO[bytes], str], Iterator[Record]]


def _reader_of(path: Path) -> Reader:
    if not path.is_file():
        what = "is a folder; name its files" if path.is_dir() else "does not exist"
        raise DataError(f"corpus {path} {what}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSION:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind in _JSONL:
        return _read_jsonl
    if kind == ".txt":
        return _read_text
    if path.suffix.lower() == ".parquet":
        return _read_parquet
    raise DataError(f"corpus {path}: cannot tell its kind; expected .jsonl or .txt (also with .gz or .zst) or .parquet")


def _lines(path: Path, raw: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file that may be compressed, decoded strictly."""
    stream: Any = raw
    if path.suffix.lower() in _COMPRESSION:
        import pyarrow

        stream = io.BufferedReader(pyarrow.CompressedInputStream(raw, _COMPRESSION[path.suffix.lower()]))
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline()
        except (OSError, EOFError) as caught:
            raise DataError(f"{path}:{number}: the compressed file is damaged or cut short ({caught})") from None
        if not line:
            return
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as caught:
            raise DataError(
                f"{path}:{number}: not valid UTF-8 ({caught.reason} at byte {caught.start} of the line); "
                "convert the file first"
            ) from None


def _read_jsonl(path: Path, raw: IO[bytes], text_field: str) -> Iterator[Record]:
    for number, line in _lines(path, raw):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as caught:
            raise DataError(
                f"{path}:{number}: not a line of JSON ({caught}); expected one JSON object a line"
            ) from None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: got a JSON {type(record).__name__}, expected an object")
        if text_field not in record:
            have = ", ".join(sorted(record)) or "none"
            raise DataError(
                f"{path}:{number}: no field {text_field!r} (fields here: {have}); name the one with the text"
            )
        text = _checked_text(record[text_field], text_field, f"{path}:{number}")
        yield number, text, _name(record.get("id"))


def _name(value: Any) -> str:
    return "" if value is None else str(value)


def _checked_text(text: Any, text_field: str, place: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{place}: field {text_field!r} holds {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as caught:  # JSON can spell half of a surrogate pair, UTF-8 cannot
        raise DataError(
            f"{place}: {text_field!r} holds a lone surrogate at character {caught.start}; remove it"
        ) from None
    return text


def _read_text(path: Path, raw: IO[bytes], text_field: str) -> Iterator[Record]:
    del text_field  # a text file has no fields
    first, block = 0, []
    for number, line in _lines(path, raw):
        if line.strip():
            first = first or number
            block.append(line)
        elif block:
            yield first, "".join(block).rstrip("\r\n"), ""
            first, block = 0, []
    if block:
        yield first, "".join(block).rstrip("\r\n"), ""


def _read_parquet(path: Path, raw: IO[bytes], text_field: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(raw)
        names = file.schema_arrow.names
        if text_field not in names:
            raise DataError(
                f"{path}: no column {text_field!r} (columns here: {', '.join(names)}); name the one with the text"
            )
        for batch in file.iter_batches(batch_size=256, columns=[name for name in (text_field, "id") if name in names]):
            for record in batch.to_pylist():
                number += 1
                text = _checked_text(record[text_field], text_field, f"{path}:{number}")
                yield number, text, _name(record.get("id"))
    except (OSError, pyarrow.ArrowException) as caught:
        raise DataError(f"{path}: damaged or not a parquet file, after row {number} ({caught})") from None
