"""Writes past the page cache leave the bytes that any other write leaves."""

from __future__ import annotations

import errno
import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_cpt.checkpoint import direct
from megatron_cpt.checkpoint.direct import MIN_DIRECT_BYTES, PAGE, write_past_cache
from megatron_cpt.checkpoint.files import new_tensor
from megatron_cpt.checkpoint.reader import raw_bytes

SIZE = 8 * MIN_DIRECT_BYTES


def random_view(size: int, shift: int) -> memoryview:
    """Bytes that begin `shift` bytes after a page."""
    held = new_tensor((size + PAGE,), torch.uint8)
    held.copy_(torch.randint(0, 256, held.shape, generator=torch.Generator().manual_seed(size), dtype=torch.uint8))
    return raw_bytes(held[shift : shift + size])


def check(path: Path, offset: int, size: int, shift: int) -> None:
    before, view = bytes(random_view(SIZE, 0)), random_view(size, shift)
    path.write_bytes(before)
    write_past_cache(path, offset, view)
    assert path.read_bytes() == before[:offset] + bytes(view) + before[offset + size :]


def test_any_place_and_length(tmp_path: Path) -> None:
    places = [0, 1, PAGE - 1, PAGE, PAGE + 1, MIN_DIRECT_BYTES]
    sizes = [0, 1, PAGE, MIN_DIRECT_BYTES - 1, MIN_DIRECT_BYTES, MIN_DIRECT_BYTES + PAGE + 1, SIZE - MIN_DIRECT_BYTES]
    for offset in places:
        for size in sizes:
            check(tmp_path / "file", offset, size, random.Random(offset + size).choice([0, 1, 64, PAGE - 1]))


def test_whole_pages_do_not_go_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    plain = os.open

    def seen(path: Path, flags: int, *more: int) -> int:
        opened.append(flags)
        return plain(path, flags, *more)

    monkeypatch.setattr(os, "open", seen)
    check(tmp_path / "file", PAGE, MIN_DIRECT_BYTES, 0)
    assert [flag & direct._FLAG for flag in opened] == [direct._FLAG]
    check(tmp_path / "file", PAGE, MIN_DIRECT_BYTES - 1, 0)
    assert len(opened) == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("where", ["open", "pwrite", "nowhere"])
def test_a_file_system_without_direct_writes(
    where: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"open": os.open, "pwrite": os.pwrite}
    direct_ones: set[int] = set()

    def opened(path: Path, flags: int, *more: int) -> int:
        if flags & direct._FLAG and where == "open":
            raise OSError(number, os.strerror(number), str(path))
        descriptor = plain["open"](path, flags, *more)
        (direct_ones.add if flags & direct._FLAG else direct_ones.discard)(descriptor)
        return descriptor

    def written(descriptor: int, view: memoryview, offset: int) -> int:
        if descriptor in direct_ones and where == "pwrite":
            direct_ones.remove(descriptor)  # its number will be that of another file
            raise OSError(number, os.strerror(number))
        return plain["pwrite"](descriptor, view, offset)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "pwrite", written)
    if where == "nowhere":
        monkeypatch.setattr(direct, "_FLAG", 0)  # as on macOS
    check(tmp_path / "file", PAGE + 3, 2 * MIN_DIRECT_BYTES + 5, 1)


@pytest.mark.parametrize("taken", [2 * PAGE, PAGE + 7])
def test_the_system_may_write_less(taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.pwrite
    calls = []

    def short(descriptor: int, view: memoryview, offset: int) -> int:
        calls.append(len(view))
        return plain(descriptor, view[:taken] if len(calls) == 1 else view, offset)

    monkeypatch.setattr(direct, "_FLAG", os.O_CLOEXEC)  # so that a part of a page can be written at all
    monkeypatch.setattr(os, "pwrite", short)
    check(tmp_path / "file", 0, 2 * MIN_DIRECT_BYTES, 0)
    assert calls == [2 * MIN_DIRECT_BYTES, 2 * MIN_DIRECT_BYTES - (0 if taken % PAGE else taken)]


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, view: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_bytes(bytes(SIZE))
    monkeypatch.setattr(os, "pwrite", full)
    for size in (1, MIN_DIRECT_BYTES):
        with pytest.raises(OSError, match="No space left") as caught:
            write_past_cache(tmp_path / "file", 0, random_view(size, 0))
        assert caught.value.filename == str(tmp_path / "file")
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="wrote nothing"):
        write_past_cache(tmp_path / "file", 0, random_view(MIN_DIRECT_BYTES, 0))


def test_neighbours_that_are_written_at_once(tmp_path: Path) -> None:
    """Runs that share pages at their borders, by several threads."""
    borders = [0, 131_072 + 17, 300_001, 700_000, 1_048_576, 1_400_007, 1_900_000 + 3, SIZE * 2]
    path, expected = tmp_path / "file", bytes(random_view(SIZE * 2, 0))
    for _ in range(5):
        path.write_bytes(bytes(SIZE * 2))
        with ThreadPoolExecutor(7) as pool:
            for begin, end in itertools.pairwise(borders):
                pool.submit(write_past_cache, path, begin, memoryview(bytearray(expected[begin:end])))
        os.sync()
        assert path.read_bytes() == expected
