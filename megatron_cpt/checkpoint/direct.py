"""Writes that go to the disk at once, past the system's page cache.

A checkpoint is written once and is larger than the memory that is free: in the cache it would drive out what is still
to be read, and wait for its way to the disk at the end. Whole pages go directly (Linux's O_DIRECT), what is left of a
run at its two ends through the cache, and all of it where the file system or platform knows no direct writes. A page is
written in one of the two ways only, if different calls write different bytes: direct writes never touch one that a run
fills in part.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path

import torch

PAGE = max(4096, mmap.PAGESIZE)  # at least the block of a disk, and what the page cache holds at once
MIN_DIRECT_BYTES = 128 << 10  # below, a call of its own costs more than it saves
_FLAG = getattr(os, "O_DIRECT", 0)
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)
_scratch = threading.local()


def write_past_cache(path: Path, offset: int, view: memoryview) -> None:
    """Write all of a buffer at a place of a file that has its size already; what lies around it stays.

    Several threads may write at once. Nobody may read the file meanwhile: what a reader brings into the cache may be
    older than what is written, and the system may then fail the next fsync.

    Args:
        path: an existing file.
        offset: of its first byte; any.
        view: bytes.

    Raises:
        OSError: what the system refuses other than direct writes.
    """
    head = min(-offset % PAGE, len(view))
    whole = (len(view) - head) // PAGE * PAGE
    if whole < MIN_DIRECT_BYTES or not _write_directly(path, offset + head, view[head : head + whole]):
        write_at(path, offset, view)
        return
    for begin, end in ((0, head), (head + whole, len(view))):
        if begin < end:
            write_at(path, offset + begin, view[begin:end])


def write_at(path: Path, offset: int, view: memoryview | bytes) -> None:
    """Write all of a buffer at a place of an existing file."""
    with open(path, "r+b", buffering=0) as file:
        try:
            write_exactly(file.fileno(), offset, view)
        except OSError as caught:
            raise _of_path(caught, path) from None


def write_exactly(descriptor: int, offset: int, view: memoryview | bytes) -> None:
    """Write all of a buffer at a place of an open file."""
    done = 0
    while done < len(view):
        done += _some_written(os.pwrite(descriptor, view[done:], offset + done))


def _write_directly(path: Path, offset: int, view: memoryview) -> bool:
    """Write whole pages past the cache; False, and nothing is certain of their place, where that cannot be."""
    if not _FLAG:
        return False
    descriptor = None
    try:
        descriptor = os.open(path, os.O_WRONLY | _FLAG)
        pages = _at_pages(view)
        done = 0
        while done < len(pages):
            done += _some_written(os.pwrite(descriptor, pages[done:], offset + done))
            if done % PAGE:  # the system may write less, and then only the cache takes the rest
                return False
    except OSError as caught:
        if caught.errno in _REFUSED:
            return False
        raise _of_path(caught, path) from None
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return True


def _some_written(count: int) -> int:
    if not count:
        raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
    return count


def _of_path(caught: OSError, path: Path) -> OSError:
    """The same failure, with the path that a call on a descriptor does not know."""
    return OSError(caught.errno, caught.strerror, str(path))


def _at_pages(view: memoryview) -> memoryview:
    """The same bytes in memory that begins at a page: where they are, or in this thread's own until the next call."""
    given = torch.frombuffer(view, dtype=torch.uint8)
    if given.data_ptr() % PAGE == 0:
        return view
    if getattr(_scratch, "size", 0) < len(view):
        _scratch.held, _scratch.size = mmap.mmap(-1, len(view)), len(view)
    copied = memoryview(_scratch.held)[: len(view)]
    torch.frombuffer(copied, dtype=torch.uint8).copy_(given)  # other threads run meanwhile
    return copied
