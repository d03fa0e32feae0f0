"""Moves tensors from one checkpoint's files to another's: in blocks, by several workers, and again after a kill.

A worker takes a tensor and streams it row block by row block, so that its digest comes with the bytes. What is done
stands in a journal; the next attempt reads it back, and does again what is not there as the journal says.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_cpt.checkpoint.direct import write_exactly
from megatron_cpt.checkpoint.files import new_tensor
from megatron_cpt.checkpoint.layout import NewLayout
from megatron_cpt.checkpoint.reader import bits, num_bytes, raw_bytes, row_blocks
from megatron_cpt.checkpoint.runs import StoredModel, write_runs
from megatron_cpt.errors import CheckpointError

Progress = Callable[[int, int], None]

JOURNAL = ".journal.jsonl"
MAX_WORKERS = 8
# Small enough for a core's cache: a block is read, hashed and written while it is there. Twice as fast as 16 MiB.
STREAM_BYTES = 2 << 20
_PROCESS_BYTES = 300 << 20  # Python, torch and the tables of a plan


def num_workers(wanted: int | None = None) -> int:
    """How many tensors are worked on at once: what is wanted, or two for each core, eight at most.

    Two, because a worker waits for the disk about as long as it computes.
    """
    return wanted or min(MAX_WORKERS, 2 * (os.cpu_count() or 1))


def peak_bytes(source: StoredModel, layout: NewLayout, workers: int, cast: torch.dtype | None) -> int:
    """An upper estimate of the memory that `execute` takes: the process, and what each worker holds."""
    each = 0
    for name, placed in layout.tensors.items():
        wide = max(source.dtype(name).itemsize, placed.dtype.itemsize)
        block = max(STREAM_BYTES, placed.columns * wide) if num_bytes(placed.shape, placed.dtype) > STREAM_BYTES else 0
        block = block or num_bytes(placed.shape, placed.dtype)
        # As read; a run beside it on the way in or out, with what lies between its rows; a copy that begins at a page;
        # another dtype, and its error.
        pitch = max(
            run.pitch / (run.columns * placed.dtype.itemsize) for run in (*placed.runs, *source.tensors[name].runs)
        )
        rounded = 2 if name in source.rounded else 0  # a master rounded, and the weight that it has to be
        each = max(each, int(block * (2 + pitch + rounded + (0 if cast is None else 4))))
    return _PROCESS_BYTES + workers * each


class Journal:
    """Digests of the tensors that are written, one line each; it outlives the process.

    Args:
        folder: where it lies, beside what it tells of.
        key: names the conversion; the journal of another one is begun anew.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._path, self._lock = folder / JOURNAL, threading.Lock()
        self.done: dict[str, tuple[str, float]] = {}
        first, *lines = self._path.read_bytes().split(b"\n") if self._path.exists() else [b""]
        if first != key.encode():
            self._path.write_bytes(key.encode() + b"\n")
            return
        for line in lines:
            with suppress(ValueError, TypeError):  # the last line of a killed process may be cut short
                name, digest, error = json.loads(line)
                self.done[name] = digest, error
        with open(self._path, "ab") as file:
            file.write(b"\n")  # ends such a line

    @staticmethod
    def is_of(folder: Path, key: str) -> bool:
        """Whether the folder's journal is of the conversion that the key names."""
        path = folder / JOURNAL
        return path.exists() and path.read_bytes().split(b"\n", 1)[0] == key.encode()

    def add(self, name: str, digest: str, error: float) -> None:
        """Note that a tensor is written, and the largest error of its cast."""
        with self._lock, open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps([name, digest, error]) + "\n")

    def close(self) -> None:
        """Remove it: the folder is finished."""
        self._path.unlink()


def execute(
    source: StoredModel,
    layout: NewLayout,
    folder: Path,
    journal: Journal,
    workers: int,
    on_progress: Progress | None = None,
) -> tuple[dict[str, str], dict[str, int | float]]:
    """Write the tensors of a layout that `check_layout` has found to be right.

    Args:
        source: what is read.
        layout: what is written; a dtype of its own there is a cast.
        folder: where; it may hold what an earlier attempt with the same journal has written.
        journal: of this conversion.
        workers: tensors that are worked on at once.
        on_progress: called with (bytes done, bytes in all).

    Returns:
        the SHA-256 of each tensor's bytes by name, and facts: `resumed` tensors that an earlier attempt had written,
        and `cast_max_abs_error` where there was a cast.

    Raises:
        CheckpointError: copies of a tensor in the source differ, or a cast makes a number infinite.
    """
    fresh = not any((folder / file.name).exists() for file in layout.files)
    _prepare(layout, folder)
    if not fresh:
        _clear_padding(layout, folder)
    target = StoredModel(folder, source.format, source.llama, source.vocab_size, 0, layout.tensors)
    progress = Tally(sum(num_bytes(p.shape, p.dtype) for p in layout.tensors.values()), on_progress)

    def work(name: str) -> _Done:
        placed, before = layout.tensors[name], journal.done.get(name)
        if before and before[0] == digest_of(target, name) and _copies_agree(folder, layout, target, name):
            progress.add(num_bytes(placed.shape, placed.dtype))
            return _Done(name, *before, True)
        digest, error = _move(source, layout, folder, name, progress, past_cache=fresh)
        journal.add(name, digest, error)
        return _Done(name, digest, error, False)

    order = sorted(layout.tensors, key=lambda name: _place_in_order(name, layout.tensors[name].shape))
    with ThreadPoolExecutor(workers) as pool:
        done = list(_collected(pool, work, order))
    facts: dict[str, int | float] = {"resumed": sum(each.resumed for each in done)}
    errors = [each.error for each in done if layout.tensors[each.name].dtype != source.dtype(each.name)]
    if errors:
        facts["cast_max_abs_error"] = max(errors)
    return {each.name: each.digest for each in done}, facts


@dataclass(frozen=True)
class _Done:
    """A tensor that is written."""

    name: str
    digest: str
    error: float
    resumed: bool


def _place_in_order(name: str, shape: tuple[int, ...]) -> tuple[int, str, str]:
    """The largest first, so that none is left for a lonely worker at the end; a weight right after its master.

    The master is compared with the weight, whose bytes are then in the system's cache when it is its turn.
    """
    return -num_bytes(shape, torch.uint8), name.rsplit("/", 1)[-1], name


def digest_of(model: StoredModel, name: str) -> str:
    """SHA-256 of a tensor's bytes, read in blocks."""
    digest = hashlib.sha256()
    for _, block in blocks_of(model, name):
        digest.update(raw_bytes(block))
    return digest.hexdigest()


def blocks_of(model: StoredModel, name: str) -> Iterator[tuple[int, Tensor]]:
    """A tensor as (first row, rows), in order; the rows are overwritten by the next ones."""
    shape, dtype = model.shape(name), model.dtype(name)
    row_bytes = num_bytes(shape[1:], dtype)
    rows = min(shape[0], max(1, STREAM_BYTES // max(1, row_bytes)))
    held = new_tensor((rows, *shape[1:]), dtype)
    for start, stop in row_blocks(shape[0], row_bytes, STREAM_BYTES):
        block = held[: stop - start]
        model.read_into(name, start, block)
        yield start, block


def _collected(pool: ThreadPoolExecutor, work: Callable[[str], _Done], names: Iterable[str]) -> Iterator[_Done]:
    """Results of the work; the first failure ends all of it."""
    futures = [pool.submit(work, name) for name in names]
    try:
        for future in futures:
            yield future.result()
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def _prepare(layout: NewLayout, folder: Path) -> None:
    """Make the files in their sizes, with their headers; what tensors they hold stays."""
    for file in layout.files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.ftruncate(descriptor, file.size)
            for offset, data in file.parts:
                write_exactly(descriptor, offset, data)
        finally:
            os.close(descriptor)


def _clear_padding(layout: NewLayout, folder: Path) -> None:
    """Make the padding rows zero in files that an earlier attempt has left; in new ones they are holes."""
    for placed in layout.padding.values():
        row_bytes = num_bytes(placed.shape[1:], placed.dtype)
        for start, stop in row_blocks(placed.shape[0], row_bytes, STREAM_BYTES):
            write_runs(folder, placed, start, new_tensor((stop - start, *placed.shape[1:]), placed.dtype), placed.runs)


def _move(
    source: StoredModel, layout: NewLayout, folder: Path, name: str, progress: Tally, past_cache: bool
) -> tuple[str, float]:
    """Stream one tensor; returns its digest and the largest error of its cast."""
    placed, copies = layout.tensors[name], layout.copies.get(name, ())
    digest, error = hashlib.sha256(), 0.0
    for start, block in blocks_of(source, name):
        source.check_copies(name, start, block)
        source.check_rounded(name, start, block)
        rows = block
        if placed.dtype != block.dtype:
            rows = block.to(placed.dtype)
            error = max(error, _cast_error(name, block, rows))
        digest.update(raw_bytes(rows))
        for each in (placed, *copies):
            write_runs(folder, each, start, rows, each.runs, past_cache)
        progress.add(num_bytes(tuple(rows.shape), rows.dtype))
    return digest.hexdigest(), error


def _cast_error(name: str, before: Tensor, after: Tensor) -> float:
    """Largest absolute difference; raises where a finite number has become infinite."""
    wide = torch.promote_types(before.dtype, torch.float32)
    error = float((before.to(wide) - after.to(wide)).abs_().max()) if before.numel() else 0.0
    if math.isinf(error) or math.isnan(error):
        lost = torch.isfinite(before) & ~torch.isfinite(after)
        if lost.any():
            raise CheckpointError(
                f"{name}: {int(lost.sum())} numbers are too large for {str(after.dtype).removeprefix('torch.')} and "
                "would become infinite; choose bfloat16 or float32"
            )
        finite = torch.isfinite(before)
        error = float((before.to(wide) - after.to(wide))[finite].abs().max()) if finite.any() else 0.0
    return error


def _copies_agree(folder: Path, layout: NewLayout, target: StoredModel, name: str) -> bool:
    for copy in layout.copies.get(name, ()):
        other = StoredModel(folder, target.format, target.llama, target.vocab_size, 0, {name: copy})
        for (_, ours), (_, theirs) in zip(blocks_of(target, name), blocks_of(other, name), strict=True):
            if not torch.equal(bits(ours), bits(theirs)):
                return False
    return True


class Tally:
    """Bytes done, told to whoever asked; workers share it."""

    def __init__(self, total: int, tell: Progress | None) -> None:
        self._done, self._total, self._tell, self._lock = 0, total, tell, threading.Lock()

    def add(self, size: int) -> None:
        """Count bytes as done."""
        with self._lock:
            self._done += size
            if self._tell is not None:
                self._tell(self._done, self._total)
