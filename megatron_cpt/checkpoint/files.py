"""Files of a checkpoint folder: opened safely, written so that nothing unfinished can be loaded."""

from __future__ import annotations

import io
import mmap
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.checkpoint.reader import num_bytes, raw_bytes
from megatron_cpt.errors import CheckpointError

PARTIAL = ".partial"
OWN_PAGES_BYTES = 1 << 20


def file_inside(folder: Path, name: str) -> Path:
    """The path of a regular file in `folder` that a checkpoint's own index names.

    A download cache of the Hugging Face hub keeps its files as links from `snapshots/<revision>/`
    into `blobs/`; those are followed, every other link out of the folder is refused.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"{folder}: the index names the file {name!r}, expected a plain file name inside the folder"
        )
    path = folder / name
    try:
        real = path.resolve(strict=True)
        regular = stat.S_ISREG(real.stat().st_mode)
    except OSError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete, copy or make it again") from None
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    if real.parent not in roots or not regular:
        raise CheckpointError(
            f"{path} is a link to {real} or not a regular file; a checkpoint may only use files of its own folder, "
            "replace the link by the file"
        )
    return path


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A zero tensor whose memory goes back to the system when it is freed.

    malloc keeps blocks of a few MiB and fragments over the thousands of a conversion; the process
    would grow to several times what it holds.
    """
    size = num_bytes(shape, dtype)
    if size < OWN_PAGES_BYTES:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)


def read_tensor(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor from raw bytes at `offset`; the caller has checked the range against the file's size."""
    tensor = new_tensor(shape, dtype)
    view, done = raw_bytes(tensor), 0
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise CheckpointError(f"{path} ended {len(view) - done} bytes early; it was cut short, copy it again")
            done += got
    return tensor


class FileSlice(io.RawIOBase):
    """Bytes [start, start + length) of a file as a file of their own."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with the slice
        self._start, self._length, self._position = start, length, 0

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def tell(self) -> int:  # noqa: D102
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:  # noqa: D102
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:  # noqa: D102
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        self._file.seek(self._start + self._position)
        done = 0
        while done < len(view) and (got := self._file.readinto(view[done:])):  # the kernel stops at 2 GiB
            done += got
        self._position += done
        return done

    def close(self) -> None:  # noqa: D102
        if not self.closed:
            self._file.close()
        super().close()


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise CheckpointError when the disk under `folder` has less than `needed_bytes` free."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{folder}: {needed_bytes:,} bytes are needed and {free:,} are free; free some space or choose another disk"
        )


def write_at(file: io.BufferedIOBase | io.RawIOBase, tensor: Tensor) -> int:
    """Append a tensor's bytes to a file; returns how many."""
    view = raw_bytes(tensor)
    done = 0
    while done < len(view):
        done += file.write(view[done:]) or 0
    return num_bytes(tuple(tensor.shape), tensor.dtype)
