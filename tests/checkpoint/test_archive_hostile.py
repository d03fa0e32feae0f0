"""torch.save archives from strangers: nothing runs, nothing is allocated on their word, each is refused in one line."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.checkpoint.archive import Array, read_archive
from megatron_cpt.errors import CheckpointError


def saved(value: Any, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **settings)
    return buffer.getvalue()


def entries(raw: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, place of the directory's entry, and place of the header, of each record."""
    size, place = struct.unpack_from("<2I", raw, len(raw) - 10)
    end = place + size
    while place < end:
        name_size, extra, comment = struct.unpack_from("<3H", raw, place + 28)
        name = bytes(raw[place + 46 : place + 46 + name_size]).decode()
        yield name.partition("/")[2], place, struct.unpack_from("<I", raw, place + 42)[0]
        place += 46 + name_size + extra + comment


def entry(name: str, field: int, form: str, value: Any) -> Callable[[bytearray], None]:
    """Change a field of a record's entry in the directory."""

    def edit(raw: bytearray) -> None:
        (place,) = (place for found, place, _ in entries(raw) if found == name)
        struct.pack_into(form, raw, place + field, value)

    return edit


def header(name: str, field: int, form: str, value: Any) -> Callable[[bytearray], None]:
    """Change a field of the header before a record."""

    def edit(raw: bytearray) -> None:
        (place,) = (place for found, _, place in entries(raw) if found == name)
        struct.pack_into(form, raw, place + field, value)

    return edit


def end(back: int, form: str, value: Any) -> Callable[[bytearray], None]:
    return lambda raw: struct.pack_into(form, raw, len(raw) - back, value)


def both(*edits: Callable[[bytearray], None]) -> Callable[[bytearray], None]:
    def edit(raw: bytearray) -> None:
        for one in edits:
            one(raw)

    return edit


def replaced(old: bytes, new_bytes: bytes, last: bool = False) -> Callable[[bytearray], None]:
    def edit(raw: bytearray) -> None:
        assert len(old) == len(new_bytes)
        place = (raw.rindex if last else raw.index)(old)
        raw[place : place + len(old)] = new_bytes

    return edit


# Fields of a directory entry: 8 flags, 10 method, 20 packed size, 24 size, 28 name's size, 34 disk, 42 header;
# of a header: 6 flags, 8 method, 26 name's size, 28 extra's size.
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.clear(), "no zip directory at its end"),
        (lambda raw: raw.extend(b"more"), "no zip directory at its end"),
        (lambda raw: raw.__delitem__(slice(-30, None)), "no zip directory at its end"),
        (entry("data/0", 10, "<H", 8), "archive/data/0' is compressed"),
        (header("data/0", 8, "<H", 8), "archive/data/0' is encrypted or compressed, as its header says"),
        (entry("data/0", 20, "<I", 3), "archive/data/0' is compressed"),
        (entry("data.pkl", 8, "<H", 1), "archive/data.pkl' is encrypted"),
        (header("data.pkl", 6, "<H", 1), "archive/data.pkl' is encrypted"),
        (entry("data/0", 34, "<H", 1), "lies in another file"),
        (replaced(b"archive/data/1", b"archive/data/0", last=True), "two records 'archive/data/0'"),
        (replaced(b"archive/data/1", b"archive/data/9", last=True), "disagree on the name 'archive/data/9'"),
        (replaced(b"archive/data/1", b"archive/data/9"), "disagree on the name 'archive/data/1'"),
        (header("data/1", 26, "<H", 13), "disagree on the name"),
        (entry("data/1", 28, "<H", 9), "damaged"),
        (entry("data/1", 42, "<I", 10**6), "leaves the archive"),
        (entry("data/1", 42, "<I", 2**32 - 1), "leaves the archive"),
        (header("data/1", 28, "<H", 65_000), "leaves the archive"),
        (both(entry("data/1", 20, "<I", 10**9), entry("data/1", 24, "<I", 10**9)), "leaves the archive"),
        (both(entry("data/0", 20, "<I", 100), entry("data/0", 24, "<I", 100)), "overlap at byte"),
        (both(entry("data/0", 20, "<I", 8), entry("data/0", 24, "<I", 8)), "should have 4 elements .* has 8 bytes"),
        (end(22 - 10, "<H", 3), "ends of its zip directory disagree"),
        (end(22 - 12, "<I", 40), "ends of its zip directory disagree"),
        (end(42 - 8, "<Q", 10), "ends of its zip directory disagree"),
        (end(98 - 48, "<Q", 2**40), "ends of its zip directory disagree"),
        (both(end(98 - 40, "<Q", 2**62), end(10, "<I", 2**32 - 1)), "zip directory should be"),
        (end(22 - 4, "<H", 1), "zip directory should be"),
        (both(end(98 - 24, "<Q", 2**62), end(98 - 32, "<Q", 2**62), end(14, "<I", 2**32 - 1)), "which cannot be"),
        (replaced(b"little", b"large!"), "byte order is b'large!'"),
        (replaced(b"FloatStorage", b"FlockStorage"), "torch.FlockStorage, which is none of torch's"),
        (replaced(b"FloatStorage", b"InnetStorage"), "none of torch's"),
        (replaced(b"storageq", b"storeageq"[1:]), "something else than a storage"),
        (replaced(b"X\1\0\0\x001", b"X\1\0\0\x007"), "no record of storage data/7"),
    ],
)
def test_an_archive_that_lies(edit: Callable[[bytearray], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    raw = bytearray(saved([torch.arange(4.0), torch.arange(3)]))
    path.write_bytes(raw)
    read_archive(path)  # sound before the change
    edit(raw)
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_archive(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700


def with_pickle(content: bytes, storages: tuple[bytes, ...] = (bytes(64),), order: bytes = b"little") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/byteorder", order)
        archive.writestr("x/version", b"3\n")
        for key, data in enumerate(storages):
            archive.writestr(f"x/data/{key}", data)
    return buffer.getvalue()


class _Reduced:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


class _Key(tuple):  # what the pickler below writes as a reference to a storage
    pass


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return tuple(obj) if type(obj) is _Key else None


def tensor_pickle(
    *view: Any, kind: Any = torch.FloatStorage, key: Any = "0", count: Any = 16, rebuild: Any = None
) -> bytes:
    """The pickle of a tensor over a storage of 64 bytes: storage offset, shape, strides."""
    arguments = (_Key(("storage", kind, key, "cpu", count)), *view, False, collections.OrderedDict())
    buffer = io.BytesIO()
    _Pickler(buffer, 2).dump(_Reduced(rebuild or torch._utils._rebuild_tensor_v2, arguments))
    return buffer.getvalue()


def test_the_method_of_the_pickles_works(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(with_pickle(tensor_pickle(1, torch.Size([3, 5]), (5, 1))))
    assert torch.load(path, weights_only=True).shape == (3, 5)
    assert read_archive(path).shape == (3, 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tensor_pickle(2, (3, 5), (5, 1)), r"shape \(3, 5\) and strides \(5, 1\) from element 2 leaves its storage"),
        (tensor_pickle(0, (17,), (1,)), "leaves its storage"),
        (tensor_pickle(0, (2,), (16,)), "leaves its storage"),
        (tensor_pickle(16, (), ()), "leaves its storage"),
        (tensor_pickle(2**62, (1,), (1,)), "leaves its storage"),
        (tensor_pickle(0, (2**62, 2**62), (1, 1)), "leaves its storage"),
        (tensor_pickle(-1, (1,), (1,)), "storage offset holds something else than integers"),
        (tensor_pickle(0, (-1,), (1,)), "shape holds something else than integers"),
        (tensor_pickle(0, (2,), (-1,)), "stride holds something else than integers"),
        (tensor_pickle(0, (2**63,), (0,)), "shape holds something else than integers"),
        (tensor_pickle(0, (2.0,), (1,)), "shape holds something else than integers"),
        (tensor_pickle(0, (True,), (1,)), "shape holds something else than integers"),
        (tensor_pickle(0, [2], (1,)), "shape is no tuple"),
        (tensor_pickle(0, (1,) * 65, (0,) * 65), "shape is no tuple of at most 64"),
        (tensor_pickle(0, (2, 2), (1,)), "2 dimensions and 1 strides"),
        (tensor_pickle(0, (2,), (1,), count=17), "should have 17 elements of torch.float32, .* has 64 bytes"),
        (tensor_pickle(0, (2,), (1,), count=-16), "a size that is no integer"),
        (tensor_pickle(0, (2,), (1,), count=2**62), "should have"),
        (tensor_pickle(0, (2,), (1,), key=0), "a storage has no key"),
        (tensor_pickle(0, (2,), (1,), key="../data.pkl"), "no record of storage"),
        (tensor_pickle(0, (2,), (1,), kind=torch.float32), "of dtype, which is none of torch's storage types"),
        (tensor_pickle(0, (2,), (1,), kind=collections.OrderedDict), "none of torch's storage types"),
        (tensor_pickle(0, (2,)), "TypeError"),
        (pickle.dumps(_Reduced(torch._utils._rebuild_tensor_v2, (1, 0, (2,), (1,), 0, 0)), 2), "lies in int"),
        (b"\x80\x02X\x01\0\0\0aQ.", "something else than a storage"),
        (b"", "EOFError"),
        (b"\x80\x09.", "unsupported pickle protocol"),
        (b"not a pickle", "never writes"),
        (b"\x80\x02I1\n.", "never writes"),
        (b"\x80\x02ios\nsystem\n.", "never writes"),
        (b"\x80\x02\x82\x01.", "never writes"),
        (b"\x80\x05\x96" + b"\xff" * 6 + b"\0\0.", "never writes"),
        (b"\x80\x02R.", "IndexError"),
        (b"\x80\x02K\x01)R.", "calls int"),
        (b"\x80\x02K\x01)\x81.", "makes an object of int"),
        (b"\x80\x02cos\nsystem\n}b.", "gives Named a state"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "gives type a state"),
        (b"\x80\x02cargparse\nNamespace\n)\x81N}X\x01\0\0\0aK\x01s\x86b.", "gives Namespace a state of tuple"),
        (b"\x80\x02](K\x01K\x01u.", "puts entries into list"),
        (b"\x80\x02}(K\x01K\x01e.", "appends to dict"),
        (b"\x80\x02}K\x01a.", "appends to dict"),
        (b"\x80\x02}(K\x01u.", "zip"),
        (b"\x80\x02}(]K\x01u.", "a key .* is list"),
        (b"\x80\x04]K\x01K\x02\x91.", "IndexError"),
        (b"\x80\x04\x8c\x04a\nosX\x01\0\0\0b\x93.", "line break"),
    ],
)
def test_a_pickle_that_lies(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(with_pickle(content))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_archive(tmp_path / "a.pt")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_nothing_runs_and_nothing_is_imported(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "a.pt").write_bytes(saved({"x": _Reduced(os.mkdir, (str(marker),)), "w": torch.ones(2)}))
    found = read_archive(tmp_path / "a.pt")
    assert found["x"].arguments == (str(marker),) and type(found["x"]).stands_for[1] == "mkdir"
    (tmp_path / "b.pt").write_bytes(with_pickle(b"\x80\x02cno.such.module\nThing\n)R."))
    assert type(read_archive(tmp_path / "b.pt")).stands_for == ("no.such.module", "Thing")
    assert not marker.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert marker.exists()  # the method of this test works


def nested_key(depth: int) -> bytes:
    """A dict whose key is pairs of pairs, each twice the same: a few bytes whose hash takes 2^depth steps."""
    pairs = b"".join(b"q" + bytes([number]) + b"h" + bytes([number]) + b"\x86" for number in range(depth))
    return b"\x80\x02}K\x01" + pairs + b"K\x01s."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nested_key(80), "a key or element of a set"),
        (b"\x80\x02Nr" + (2**31).to_bytes(4, "little") + b"0K\x01.", None),
        (b"\x80\x02}\x8b" + (20).to_bytes(4, "little") + bytes(19) + b"\x01K\x01s.", "a number of 153 bits"),
        (
            b"\x80\x02(" + b"K\x01" * 5000 + b"tq\x000](" + b"ca\nb\nh\x00R" * 2000 + b"e.",
            "builds far more than it has bytes",
        ),
        (
            b"\x80\x02](" + b"K\x01" * 1000 + b"eq\x000](" + b"c__builtin__\nset\nh\x00\x85R" * 500 + b"e.",
            "builds far more than it has bytes",
        ),
        (
            b"\x80\x02}(" + b"".join(b"X\x04\0\0\0%04dN" % number for number in range(5000)) + b"uq\x000]("
            b"" + b"cargparse\nNamespace\n)\x81h\x00b" * 3000 + b"e.",
            "builds far more than it has bytes",
        ),
        (
            b"\x80\x02](" + b"".join(b"ca\nb%d\n" % number for number in range(10_001)) + b"e.",
            "more than 10000 classes",
        ),
    ],
)
def test_a_few_bytes_cannot_take_long_or_much(content: bytes, message: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(with_pickle(content))
    tracemalloc.start()
    try:
        if message is None:
            read_archive(tmp_path / "a.pt")
        else:
            with pytest.raises(CheckpointError, match=message):
                read_archive(tmp_path / "a.pt")
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()


def test_a_pickle_of_more_than_32_mib(tmp_path: Path) -> None:
    raw, more = bytearray(saved([1])), 33 << 20
    (directory,) = struct.unpack_from("<I", raw, len(raw) - 6)
    # Its header now lies behind the other records, before a gap; the directory and its ends move by the gap.
    both(entry("data.pkl", 20, "<I", more), entry("data.pkl", 24, "<I", more), entry("data.pkl", 42, "<I", directory))(
        raw
    )
    moved = bytes(raw[:26]) + struct.pack("<2H", len("archive/data.pkl"), 0) + b"archive/data.pkl"
    gap = len(moved) + more
    (end64,) = struct.unpack_from("<Q", raw, len(raw) - 34)
    both(end(50, "<Q", directory + gap), end(34, "<Q", end64 + gap), end(6, "<I", directory + gap))(raw)
    with open(tmp_path / "a.pt", "wb") as file:
        file.write(raw[:directory] + moved)
        file.seek(directory + gap)
        file.write(raw[directory:])
    with pytest.raises(CheckpointError, match="record data.pkl has 34,603,008 bytes, expected at most 33,554,432"):
        read_archive(tmp_path / "a.pt")


def test_files_that_are_no_archive(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened .No such file"):
        read_archive(tmp_path / "gone.pt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_archive(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_archive(tmp_path)
    path = tmp_path / "a.pt"
    path.write_bytes(saved([1], _use_new_zipfile_serialization=False))
    with pytest.raises(CheckpointError, match="from before 1.6"):
        read_archive(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/other", b"")
    with pytest.raises(CheckpointError, match="no record data.pkl"):
        read_archive(path)
    path.write_bytes(with_pickle(pickle.dumps([1], 2), order=b"big"))
    with pytest.raises(CheckpointError, match="byte order is b'big'"):
        read_archive(path)


@pytest.mark.parametrize(("start", "length"), [(-1, None), (0, -1), (0, 10**9), (10**9, None), (5, 100), (0, 21)])
def test_ranges_that_hold_no_archive(start: int, length: int | None, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save([torch.ones(2)], path)
    with pytest.raises(CheckpointError, match=f"archive at byte {start} is damaged"):
        read_archive(path, start, length)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_change_of_bytes_ends_otherwise_than_in_an_error_or_a_value(tmp_path_factory: Any, data: Any) -> None:
    raw = bytearray(saved({"a": torch.ones(3, 4), "b": argparse.Namespace(x=[1, {"y": b"z"}])}))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a.pt"
    path.write_bytes(raw)
    try:
        found = read_archive(path)
    except CheckpointError as caught:
        assert str(path) in str(caught) and "\n" not in str(caught)
        return
    if isinstance(found, dict) and isinstance(found.get("a"), Array):
        array = found["a"]
        assert 0 <= array.offset <= len(raw)
