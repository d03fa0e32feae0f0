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
MAX_JSON_BYTES = 64 << 20  # the largest tokenizer.json has about 30 MiB
OWN_PAGES_BYTES = 1 << 20


def file_inside(folder: Path, name: str) -> Path:
    """The path of a regular file in `folder` that a checkpoint's own index names.

    A download cache of the Hugging Face hub keeps its files as links from `snapshots/<revision>/`,
    and folders in it, into `blobs/`; those are followed, every other link out of the folder is refused.
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
    roots += [parent.parent / "blobs" for parent in folder.resolve().parents if parent.name == "snapshots"]
    if real.parent not in roots or not regular:
        raise CheckpointError(
            f"{path} is a link to {real} or not a regular file; a checkpoint may only use files of its own folder, "
            "replace the link by the file"
        )
    return path


def not_linked(folder: Path) -> Path:
    """A folder inside a checkpoint's; raises CheckpointError where it is a link to another place."""
    if folder.is_symlink():
        raise CheckpointError(
            f"{folder} is a link; a checkpoint may only use files of its own folder, replace the link by the folder"
        )
    return folder


def json_inside(folder: Path, name: str) -> Path:
    """As `file_inside`, for a file of settings: it has no more bytes than such a file may have."""
    path = file_inside(folder, name)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path} has {size:,} bytes, expected at most {MAX_JSON_BYTES:,}; it is another kind of file"
        )
    return path


def one_line(told: str, length: int) -> str:
    """A text that a file may have had a part in, for a terminal."""
    return "".join(sign if sign.isprintable() else "?" for sign in told[:length])


def brief(value: Any) -> str:
    """How a message names a value of a checkpoint: a text or number as it is written, at most 60 signs of it."""
    told = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return told if len(told) <= 60 else f"{told[:57]}..."


def read_whole(folder: Path, name: str, limit: int) -> bytes:
    """All bytes of a small file of a checkpoint, see `file_inside`; raises CheckpointError where they are too many."""
    path = file_inside(folder, name)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{path} has {size:,} bytes, expected at most {limit:,}; it is another kind of file")
        return file.read(size)


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
    read_exactly(path, offset, raw_bytes(tensor))
    return tensor


def read_exactly(path: Path, offset: int, view: memoryview) -> None:
    """Fill a buffer from a file; raises CheckpointError where the file ends before."""
    done = 0
    with open(path, "rb", buffering=0) as file:
        while done < len(view):
            got = os.preadv(file.fileno(), [view[done:]], offset + done)
            if not got:
                raise CheckpointError(f"{path} ended {len(view) - done} bytes early; it was cut short, copy it again")
            done += got


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
