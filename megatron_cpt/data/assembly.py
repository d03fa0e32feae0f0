"""Finished parts to a dataset: one part is linked, several are copied behind one another.

The copy, its hash and the index are made beside one another: the hash is taken of the parts, not of the copy.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.config.manifest import sha256_file
from megatron_cpt.data.counting import Counts, manifest_counts
from megatron_cpt.data.indexed import dtype_for
from megatron_cpt.data.ordered import Progress
from megatron_cpt.data.part import Part
from megatron_cpt.data.parts import Parts
from megatron_cpt.data.tokens import counts_of, tokens_sha256
from megatron_cpt.data.writing import complete_dataset, write_index
from megatron_cpt.errors import DataError

_COPY_BYTES = 64 << 20  # at most in one call of the kernel's copy
_SYNC_BYTES = 256 << 20  # copied between two waits for the disk, so that the last one is short
_READ_BYTES = 1 << 20
_NOT_COPIED_BY_KERNEL = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


class NoDocumentsError(DataError):
    """Every text was empty, left out, or of the other side of the split."""


def assemble(
    parts: Parts,
    prefix: Path,
    vocab_size: int,
    on_error: str,
    inputs: Mapping[str, str],
    fields: Mapping[str, Any],
    workers: int = 1,
    on_progress: Progress | None = None,
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
        workers: threads.
        on_progress: called with (bytes of tokens copied, bytes in all) where the tokens of several parts are.

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
    if not counts.faults:
        Path(f"{prefix}.faults.txt").unlink(missing_ok=True)  # of a dataset that is replaced
    maker = _Files(made, parts.folder, on_progress)
    files, known = maker.make(dtype_for(vocab_size), bool(counts.faults), workers)
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


class _Files:
    """Makes the files of the dataset out of the parts, each by a thread of its own."""

    def __init__(self, made: list[Part], folder: Path, on_progress: Progress | None) -> None:
        self.made, self.folder, self.on_progress = made, folder, on_progress
        self.stopped = False

    def make(self, dtype: np.dtype[Any], with_faults: bool, workers: int) -> tuple[dict[str, Path], dict[str, str]]:
        """Path and hash of each by its ending, on disk."""
        with ThreadPoolExecutor(workers) as pool:
            tokens = pool.submit(self._joined, "tokens", self.on_progress)
            others = {"bin": pool.submit(self._tokens_sha256), "idx": pool.submit(self._index, dtype)}
            if with_faults:
                others["faults.txt"] = pool.submit(self._faults)
            try:
                paths = {"bin": tokens.result(), "idx": self.folder / "assembled.idx"}
                if with_faults:
                    paths["faults.txt"] = self.folder / "assembled.faults"
                return paths, {ending: other.result() for ending, other in others.items()}
            except BaseException:
                self.stopped = True
                raise

    def _index(self, dtype: np.dtype[Any]) -> str:
        path = self.folder / "assembled.idx"
        write_index(path, dtype, _lengths(self._joined("lengths")))
        return sha256_file(path)

    def _faults(self) -> str:
        return sha256_file(self._joined("faults"))

    def _tokens_sha256(self) -> str:
        """Of the parts' tokens in order; where one part has all of them, its journal says it."""
        full = [part for part in self.made if part.size("tokens")]
        if len(full) == 1:
            return tokens_sha256(full[0].state)
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_READ_BYTES))
        for part in full:
            path, left = part.path("tokens"), part.size("tokens")
            with open(path, "rb", buffering=0) as file:
                while left and not self.stopped:
                    count = file.readinto(buffer[: min(left, _READ_BYTES)]) or 0
                    if not count:
                        raise _too_short(path, part.size("tokens") - left, part.size("tokens"))
                    digest.update(buffer[:count])
                    left -= count
        return digest.hexdigest()

    def _joined(self, ending: str, on_progress: Progress | None = None) -> Path:
        """A file with the committed bytes of all parts in order, of its own name, on disk."""
        target = self.folder / f"assembled.{ending}"
        target.unlink(missing_ok=True)
        full = [part for part in self.made if part.size(ending)]
        if len(full) == 1 and full[0].path(ending).stat().st_size == full[0].size(ending):
            try:
                os.link(full[0].path(ending), target)
                return target
            except OSError:  # a file system without hard links: copied below
                target.unlink(missing_ok=True)
        total, done, synced = sum(part.size(ending) for part in full), 0, 0
        with open(target, "wb") as out:
            for part in full:
                with open(part.path(ending), "rb") as source:
                    for count in _copy(source.fileno(), out.fileno(), part.size(ending), part.path(ending)):
                        if self.stopped:
                            return target
                        done += count
                        if done - synced >= _SYNC_BYTES:
                            os.fsync(out.fileno())
                            synced = done
                        if on_progress is not None:
                            on_progress(done, total)
            os.fsync(out.fileno())
        return target


def _copy(source: int, target: int, size: int, name: Path) -> Iterator[int]:
    """Copies bytes, and says of each stretch how long it was."""
    left = size
    while left:
        try:
            copied = os.copy_file_range(source, target, min(left, _COPY_BYTES))
        except OSError as caught:
            if caught.errno not in _NOT_COPIED_BY_KERNEL:
                raise OSError(caught.errno, caught.strerror, str(name)) from None
            copied = _write_all(target, os.read(source, min(left, _READ_BYTES)))
        if not copied:
            raise _too_short(name, size - left, size)
        left -= copied
        yield copied


def _too_short(name: Path, held: int, expected: int) -> DataError:
    return DataError(f"{name} has {held} bytes, its journal counts {expected}; remove its journal")


def _write_all(target: int, data: bytes) -> int:
    written = 0
    while written < len(data):
        written += os.write(target, data[written:])
    return written


def _lengths(path: Path) -> npt.NDArray[np.int32]:
    lengths: npt.NDArray[np.int32] = np.memmap(path, "<i4", mode="r")
    return lengths
