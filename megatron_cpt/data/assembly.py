"""Finished parts to a dataset: one part is linked, several are copied behind one another."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.counting import Counts, manifest_counts
from megatron_cpt.data.indexed import dtype_for
from megatron_cpt.data.part import Part
from megatron_cpt.data.parts import Parts
from megatron_cpt.data.tokens import counts_of, tokens_sha256
from megatron_cpt.data.writing import complete_dataset, write_index
from megatron_cpt.errors import DataError

_COPY_BYTES = 1 << 30  # at most in one call of the kernel's copy
_NOT_COPIED_BY_KERNEL = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


class NoDocumentsError(DataError):
    """Every text was empty, left out, or of the other side of the split."""


def assemble(
    parts: Parts, prefix: Path, vocab_size: int, on_error: str, inputs: Mapping[str, str], fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Make `<prefix>.bin`, `.idx`, `.manifest.json` (and `.faults.txt` where records were skipped).

    The parts stay as they are, so a process killed here can be repeated.

    Args:
        parts: the job; all parts done.
        prefix: path of the dataset without an ending.
        vocab_size: number of ids.
        on_error: "stop" refuses parts with faults.
        inputs: name -> SHA-256 of what decides the result beside the files.
        fields: further entries of the manifest.

    Returns:
        The manifest.

    Raises:
        DataError: a part is not done, or has faults that `on_error` does not allow.
        NoDocumentsError: nothing is left to write.
    """
    made = [parts.read(number) for number in range(len(parts.inputs))]
    counts, sources = Counts(), []
    for part in made:
        mine = _counts_of(part, on_error)
        sources.append(
            {
                "path": os.path.abspath(part.input),
                "bytes": part.input_bytes,
                "sha256": part.sha256,
                "first_document": counts.documents,
                **manifest_counts(mine),
            }
        )
        counts.include(mine)
    if not counts.tokens:
        left_out = "; ".join(f"{count:,} records were left out: {reason}" for reason, count in counts.faults.items())
        raise NoDocumentsError(
            f"no document to write to {prefix}: {left_out or 'the corpus, or this side of it, is empty'}"
        )
    files = {"bin": _joined(made, parts.folder, "tokens"), "idx": parts.folder / "assembled.idx"}
    write_index(files["idx"], dtype_for(vocab_size), _lengths(_joined(made, parts.folder, "lengths")))
    if counts.faults:
        files["faults.txt"] = _joined(made, parts.folder, "faults")
    else:
        Path(f"{prefix}.faults.txt").unlink(missing_ok=True)  # of a dataset that is replaced
    full = [part for part in made if part.size("tokens")]
    known = {"bin": tokens_sha256(full[0].state)} if len(full) == 1 else {}
    hashes = {**{os.path.abspath(part.input): part.sha256 for part in made}, **inputs}
    return complete_dataset(
        prefix, files, hashes, known, vocab_size=vocab_size, **manifest_counts(counts), **fields, sources=sources
    )


def _counts_of(part: Part, on_error: str) -> Counts:
    if not part.is_done():
        raise DataError(f"{part.input} is not done; run the command without a shard to do what is missing")
    counts = counts_of(part.state)
    if counts.faults and on_error == "stop":
        raise DataError(
            f"{part.input}: {sum(counts.faults.values())} records were skipped when this part was made, and now faults "
            f"are to stop the build; allow skipping, or remove {part.journal_path} to read the file again"
        )
    return counts


def _joined(made: list[Part], folder: Path, ending: str) -> Path:
    """A file with the committed bytes of all parts in order, of its own name, on disk."""
    target = folder / f"assembled.{ending}"
    target.unlink(missing_ok=True)
    full = [part for part in made if part.size(ending)]
    if len(full) == 1 and full[0].path(ending).stat().st_size == full[0].size(ending):
        try:
            os.link(full[0].path(ending), target)
            return target
        except OSError:  # a file system without hard links: copied below
            target.unlink(missing_ok=True)
    with open(target, "wb") as out:
        for part in full:
            with open(part.path(ending), "rb") as source:
                _copy(source.fileno(), out.fileno(), part.size(ending), part.path(ending))
        os.fsync(out.fileno())
    return target


def _copy(source: int, target: int, size: int, name: Path) -> None:
    left = size
    while left:
        try:
            copied = os.copy_file_range(source, target, min(left, _COPY_BYTES))
        except OSError as caught:
            if caught.errno not in _NOT_COPIED_BY_KERNEL:
                raise OSError(caught.errno, caught.strerror, str(name)) from None
            copied = _write_all(target, os.read(source, min(left, 1 << 20)))
        if not copied:
            raise DataError(f"{name} has {size - left} bytes, its journal counts {size}; remove its journal")
        left -= copied


def _write_all(target: int, data: bytes) -> int:
    written = 0
    while written < len(data):
        written += os.write(target, data[written:])
    return written


def _lengths(path: Path) -> npt.NDArray[np.int32]:
    lengths: npt.NDArray[np.int32] = np.memmap(path, "<i4", mode="r")
    return lengths
