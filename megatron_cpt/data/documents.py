"""Documents one by one, for whoever wants them in Python, and which of them are held out."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.data.blocks import kind_of, open_blocks, stop_at_fault
from megatron_cpt.errors import DataError

Progress = Callable[[int, int], None]
_log = logging.getLogger(__name__)


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
    on_error: str = "stop",
) -> Iterator[Document]:
    """Read the documents of corpus files, one at a time and in order.

    The kinds of files are those of `open_blocks`. Nothing is cleaned or normalised; texts may be empty.

    Args:
        paths: one file or several.
        text_field: field (column) that holds the text.
        language: language given to every document.
        on_progress: called with (bytes read, bytes in all), counted in the files as they are on disk.
        on_error: "stop" at a record without a usable text, or "skip" it with a line in the log.

    Raises:
        DataError: a file that is missing, of an unknown kind or cut short, or (`on_error="stop"`) a record
            that is damaged, not UTF-8 or without a text; the message names file and line.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error is {on_error!r}, expected 'stop' or 'skip'")
    files = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    for path in files:
        kind_of(path)
    total = sum(path.stat().st_size for path in files)
    finished = 0
    for path in files:
        with open_blocks(path, text_field) as reader:
            while (raw := reader.read()) is not None:
                block = raw.parse()
                if on_error == "stop":
                    stop_at_fault(block, path)
                for line, reason in block.faults:
                    _log.warning("%s:%d: %s (left out)", path, line, reason)
                for line, text, name in zip(block.lines.tolist(), block.texts(), block.ids(), strict=True):
                    yield Document(text, language, f"{path}:{line}", name)
                if on_progress is not None:
                    on_progress(finished + min(reader.bytes_read, reader.total_bytes), total)
            finished += reader.total_bytes
        if on_progress is not None:
            on_progress(finished, total)
