"""torch.save archives (zip) as bytes: read from their headers, and laid out for others to fill, without torch.load.

An archive holds the records `data.pkl` (the value), `data/0`, `data/1`... (the storages of its tensors) and a few of
some bytes. None is compressed, so a tensor's place in the file is known from the headers alone.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.archive_pickle import Array, Unpickler, pickled
from megatron_cpt.checkpoint.files import one_line
from megatron_cpt.checkpoint.reader import num_bytes
from megatron_cpt.errors import CheckpointError

__all__ = ["ArchiveReader", "Array", "archive_bytes", "lay_out_archive", "read_archive"]

HEADER_BYTES = 32 << 20  # largest directory and largest pickle that are read into memory: 200,000 tensors
ALIGNMENT = 64  # bytes; of the data of each record, as torch aligns them
_ENDS = 1024  # bytes at either end that are read at once: all the headers of an archive of one tensor
_FORMS = 1000  # that are kept of archives; each takes some KiB

_LOCAL = struct.Struct("<I5H3I2H")
_ENTRY = struct.Struct("<I6H3I5H2I")
_END = struct.Struct("<I4H2IH")
_END64 = struct.Struct("<IQ2H2I4Q")
_LOCATOR = struct.Struct("<IIQI")
_LOCAL_MARK, _ENTRY_MARK, _END_MARK, _END64_MARK, _LOCATOR_MARK, _DATA_MARK = (
    int.from_bytes(b"PK" + mark, "little") for mark in (b"\3\4", b"\1\2", b"\5\6", b"\6\6", b"\6\7", b"\7\x08")
)
_ENCRYPTED = 1 | 1 << 6 | 1 << 13
_WITH_DATA_MARK, _UTF8 = 1 << 3, 1 << 11
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number of torch's older form


def read_archive(path: Path, start: int = 0, length: int | None = None) -> Any:
    """The value of a torch.save archive, with an Array in the place of each tensor or parameter.

    Nothing that the archive names is imported or run: see `archive_pickle`. Sparse and quantised tensors, those of
    subclasses and conjugated views become stand-ins. Arrays may share bytes, as the tensors did.

    Args:
        path: the file.
        start: byte at which the archive begins; a file may hold several.
        length: its bytes; None for all up to the file's end.

    Raises:
        CheckpointError: it is missing, cut short, damaged, unsafe, compressed, or in torch's form from before 1.6.
    """
    with _opened(path, start, length) as raw:
        return _read(raw)


class ArchiveReader:
    """Reads archives as `read_archive` does, and parses one of those that are alike: of one tensor, but for its data.

    What is found in an archive is decided by the bytes that reading looks at. Where these are what they were in one of
    the same length, so is the tensor, but for where it begins.
    """

    def __init__(self) -> None:
        self._forms: dict[Hashable, _Form] = {}

    def read(self, path: Path, start: int, length: int, kind: Hashable) -> Any:
        """The value of an archive; see `read_archive`.

        Args:
            path: the file.
            start: byte at which the archive begins.
            length: its bytes.
            kind: what tells apart archives of the same length that are not alike.
        """
        with _opened(path, start, length) as raw:
            form = self._forms.get((length, kind))
            if form is not None and raw.ends() & form.mask == form.looked_at:
                return replace(form.array, offset=start + form.array.offset)
            value = _read(raw)
            if isinstance(value, Array) and (mask := raw.mask()) is not None:
                if len(self._forms) >= _FORMS:
                    self._forms.clear()
                array = replace(value, offset=value.offset - start)
                self._forms[length, kind] = _Form(mask, raw.ends() & mask, array)
            return value


@dataclass(frozen=True, slots=True)
class _Form:
    """What reading looks at in the ends of an archive, and the tensor that it finds, from the archive's begin on."""

    mask: int
    looked_at: int
    array: Array


@contextmanager
def _opened(path: Path, start: int, length: int | None) -> Iterator[_Slice]:
    """The bytes of an archive; whatever fails while they are read is a CheckpointError."""
    try:
        # A pipe would make the call wait for its writer.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as caught:
        raise CheckpointError(f"{path} cannot be opened ({caught.strerror}); copy or make it again") from None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if length is None:
            length = status.st_size - start
        if start < 0 or length < 0 or start + length > status.st_size:
            raise ValueError(f"bytes {start} to {start + length} were expected, and the file has {status.st_size}")
        yield _Slice(file, start, length)
    except Exception as caught:  # a damaged archive can fail in any way
        reason = one_line(str(caught) if isinstance(caught, ValueError) else repr(caught), 300)
        raise CheckpointError(
            f"{path}: the torch.save archive at byte {start} is damaged or unsafe ({reason}); "
            "copy it again, or save it again with torch 1.6 or newer"
        ) from None
    finally:
        os.close(file)


class _Slice:
    """Bytes [start, start + length) of an open file; a range to read has been checked against `length`."""

    def __init__(self, file: int, start: int, length: int) -> None:
        self.file, self.start, self.length = file, start, length
        self.head = os.pread(file, min(length, _ENDS), start)
        self.tail_start = max(0, length - _ENDS)
        self.tail = os.pread(file, length - self.tail_start, start + self.tail_start)
        self._looked_at: list[tuple[int, int]] = []
        self.checksums: list[int] = []  # where they lie; no one looks at them

    def read(self, offset: int, size: int) -> bytes:
        self._looked_at.append((offset, size))
        if offset + size <= len(self.head):
            return self.head[offset : offset + size]
        if offset >= self.tail_start:
            found = self.tail[offset - self.tail_start : offset - self.tail_start + size]
        else:
            found = os.pread(self.file, size, self.start + offset)
        if len(found) != size:
            raise ValueError(f"the file ended {size - len(found)} bytes early")
        return found

    def ends(self) -> int:
        """Both ends as one number, for `mask`."""
        return int.from_bytes(self.head + self.tail, "little")

    def mask(self) -> int | None:
        """The bits of both ends that have been looked at; None if others have been, too."""
        mask = bytearray(len(self.head) + len(self.tail))
        for spans, bits in ((self._looked_at, b"\xff"), ([(at, 4) for at in self.checksums], b"\0")):
            for offset, size in spans:
                places = [offset] if offset + size <= len(self.head) else []
                if offset >= self.tail_start:
                    places.append(len(self.head) + offset - self.tail_start)
                if not places:
                    return None
                for place in places:
                    mask[place : place + size] = bits * size
        return int.from_bytes(mask, "little")


def _read(raw: _Slice) -> Any:
    records, prefix = _records(raw)

    def small(name: str, limit: int) -> bytes | None:
        if prefix + name not in records:
            return None
        offset, size = records[prefix + name]
        if size > limit:
            raise ValueError(f"its record {name} has {size:,} bytes, expected at most {limit:,}")
        return raw.read(offset, size)

    def find(key: str) -> tuple[int, int]:
        if f"{prefix}data/{key}" not in records:
            raise ValueError(f"it has no record of storage data/{key[:80]}")
        offset, size = records[f"{prefix}data/{key}"]
        return raw.start + offset, size

    order = small("byteorder", 16)
    if order not in (None, b"little"):
        raise ValueError(f"its byte order is {order!r}, expected b'little': it was saved on another kind of machine")
    data = small("data.pkl", HEADER_BYTES)
    if data is None:
        raise ValueError("it has no record data.pkl")
    return Unpickler(data, find).load()


def _records(raw: _Slice) -> tuple[dict[str, tuple[int, int]], str]:
    """Name of each record -> byte of the slice where its data begin, and how many; and the folder all names have."""
    count, size, directory = _directory(raw)
    entries = raw.read(directory, size)
    records: dict[str, tuple[int, int]] = {}
    extents: list[tuple[int, int]] = []
    place = 0
    for _ in range(count):
        mark, _, _, flags, method, _, _, _, packed, held, name_size, more, comment, disk, _, _, header = (
            _ENTRY.unpack_from(entries, place)
        )
        raw.checksums.append(directory + place + 16)
        name = entries[place + 46 : place + 46 + name_size]
        extra = entries[place + 46 + name_size : place + 46 + name_size + more]
        place += 46 + name_size + more + comment
        if mark != _ENTRY_MARK or place > size:
            raise ValueError("its directory is damaged")
        held, packed, header = _wide(extra, held, packed, header)
        told = name.decode("utf-8")
        if told in records:
            raise ValueError(f"it has two records {told[:80]!r}")
        if flags & _ENCRYPTED or disk:
            raise ValueError(f"its record {told[:80]!r} is encrypted or lies in another file")
        if method or packed != held:
            raise ValueError(f"its record {told[:80]!r} is compressed, expected stored")
        if header + 30 + name_size + held > directory:
            raise ValueError(f"its record {told[:80]!r} leaves the archive: {held} bytes after a header at {header}")
        local = _LOCAL.unpack(raw.read(header, 30))
        raw.checksums.append(header + 14)
        begin = header + 30 + local[9] + local[10]
        if local[0] != _LOCAL_MARK or local[9] != name_size or raw.read(header + 30, name_size) != name:
            raise ValueError(f"its directory and the header at byte {header} disagree on the name {told[:80]!r}")
        if local[2] & _ENCRYPTED or local[3]:
            raise ValueError(f"its record {told[:80]!r} is encrypted or compressed, as its header says")
        if begin + held > directory:
            raise ValueError(f"its record {told[:80]!r} leaves the archive: {held} bytes from {begin}")
        records[told] = begin, held
        extents.append((header, begin + held))
    if place != size or not records:
        raise ValueError("its directory has another size than its entries, or none")
    extents.sort()
    for (_, end), (header, _) in zip(extents, extents[1:], strict=False):
        if end > header:
            raise ValueError(f"two of its records overlap at byte {header}")
    return records, next(iter(records)).partition("/")[0] + "/"


def _directory(raw: _Slice) -> tuple[int, int, int]:
    """Entries of the directory, its size, and the byte of the slice where it begins."""
    place = raw.length - _END.size
    if place < 0 or int.from_bytes(raw.read(place, 4), "little") != _END_MARK:
        if raw.head.startswith(_BEFORE_1_6):
            raise ValueError("it is in torch's form from before 1.6")
        raise ValueError("no zip directory at its end: it is cut short, or another kind of file")
    _, disk, first_disk, here, count, size, directory, _ = _END.unpack(raw.read(place, _END.size))
    locator = place - _LOCATOR.size
    if locator >= _END64.size and int.from_bytes(raw.read(locator, 4), "little") == _LOCATOR_MARK:
        _, _, end64, _ = _LOCATOR.unpack(raw.read(locator, _LOCATOR.size))
        place = locator - _END64.size
        mark, _, _, _, disk64, first64, *found = _END64.unpack(raw.read(place, _END64.size))
        short = [min(value, limit) for value, limit in zip(found, (_MAX16, _MAX16, _MAX32, _MAX32), strict=True)]
        if end64 != place or mark != _END64_MARK or disk64 or first64 or short != [here, count, size, directory]:
            raise ValueError("the two ends of its zip directory disagree")
        here, count, size, directory = found
    if disk or first_disk or here != count or directory + size != place:
        raise ValueError(f"its zip directory should be {size} bytes at {directory}, and ends at {place}")
    if size > HEADER_BYTES or count * _ENTRY.size > size:
        raise ValueError(f"its zip directory has {count:,} entries in {size:,} bytes, which cannot be")
    return count, size, directory


def _wide(extra: bytes, *values: int) -> list[int]:
    """The numbers of a directory entry, those of 32 ones taken from the field for 64 bits."""
    wide, place = b"", 0
    if _MAX32 in values:
        while place + 4 <= len(extra):
            kind, size = struct.unpack_from("<2H", extra, place)
            if kind == 1:
                wide = extra[place + 4 : place + 4 + size]
                break
            place += 4 + size
    found = []
    for value in values:
        if value == _MAX32 and len(wide) >= 8:
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        found.append(value)
    return found


def _wide_field(values: list[int]) -> bytes:
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def lay_out_archive(value: Any) -> tuple[int, list[tuple[int, bytes]], list[int]]:
    """A torch.save archive of a value without the data of its tensors.

    The bytes are those of torch.save with checksums left out (torch looks at none), but for a record that says which
    run of torch wrote it. Each Array becomes a dense tensor on the CPU, in row-major order and with a storage of its
    own, whatever its strides; one that appears several times (the same object) becomes one tensor.

    Args:
        value: what protocol 2 of pickle can write, stand-ins of `read_archive`, and an Array for each tensor.

    Returns:
        The archive's size in bytes; its bytes that are not tensor data, in parts (offset, bytes); and the offset of
        the data of each Array, in order of first appearance. The data fill what the parts leave open, and what the
        parts leave open is data alone.

    Raises:
        CheckpointError: a tensor's dtype, or a storage outside a tensor, cannot be written; or it is nested too deep.
    """
    try:
        data, arrays = pickled(value)
    except (ValueError, RecursionError) as caught:
        raise CheckpointError(
            f"this value cannot be saved for torch ({caught}); convert or leave out that part"
        ) from None
    archive = _Writer()
    for name, content in (("data.pkl", data), (".format_version", b"1"), (".storage_alignment", b"64")):
        archive.add(name, content)
    archive.add("byteorder", b"little")
    offsets = [archive.open(f"data/{key}", num_bytes(array.shape, array.dtype)) for key, array in enumerate(arrays)]
    archive.add("version", b"3\n")
    return *archive.finish(), offsets


def archive_bytes(value: Any) -> bytes:
    """The whole torch.save archive of a value without tensors (see `lay_out_archive`)."""
    size, parts, offsets = lay_out_archive(value)
    if offsets:
        raise ValueError(f"{len(offsets)} tensors in a value whose archive is to be whole")
    ((_, content),) = parts
    assert len(content) == size
    return content


class _Writer:
    """Lays records out one after the other, as torch's writer does.

    torch.load may compute the place of a storage from those before it, so padding and marks are where torch has them.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[int, bytes]] = []
        self.begin, self.bytes = 0, bytearray()  # of the part at hand
        self.directory, self.count = bytearray(), 0

    def add(self, name: str, content: bytes) -> None:
        self._header(name, len(content))
        self.bytes += content
        self._mark()

    def open(self, name: str, size: int) -> int:
        """Add a record whose data others write; returns their offset."""
        self._header(name, size)
        offset = self.begin + len(self.bytes)
        if size:
            self.parts.append((self.begin, bytes(self.bytes)))
            self.begin, self.bytes = offset + size, bytearray()
        self._mark()
        return offset

    def finish(self) -> tuple[int, list[tuple[int, bytes]]]:
        directory = self.begin + len(self.bytes)
        size, end = len(self.directory), directory + len(self.directory)
        self.bytes += self.directory
        self.bytes += _END64.pack(
            _END64_MARK, _END64.size - 12, 0x31E, 45, 0, 0, self.count, self.count, size, directory
        )
        self.bytes += _LOCATOR.pack(_LOCATOR_MARK, 0, end, 1)
        count = min(self.count, _MAX16)
        self.bytes += _END.pack(_END_MARK, 0, 0, count, count, min(size, _MAX32), min(directory, _MAX32), 0)
        self.parts.append((self.begin, bytes(self.bytes)))
        return self.begin + len(self.bytes), self.parts

    def _header(self, record: str, size: int) -> None:
        name = b"archive/" + record.encode()
        header = self.begin + len(self.bytes)
        big, far = size >= _MAX32, header >= _MAX32
        # The header tells no packed size, as if the data were still to come; the directory tells both.
        local, wide = (_wide_field([size, packed] * big + [header] * far) for packed in (0, size))
        flags = _UTF8 | (_WITH_DATA_MARK if size else 0)
        padding = -(header + _LOCAL.size + len(name) + len(wide) + 4) % ALIGNMENT
        local += b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        self.bytes += _LOCAL.pack(_LOCAL_MARK, 0, flags, 0, 0, 0, 0, 0, 0, len(name), len(local)) + name + local
        short = min(size, _MAX32)
        at = min(header, _MAX32)
        self.directory += _ENTRY.pack(
            _ENTRY_MARK, 0, 0, flags, 0, 0, 0, 0, short, short, len(name), len(wide), 0, 0, 0, 0, at
        )
        self.directory += name + wide
        self.count += 1
        self.mark = struct.pack("<2I2Q" if wide else "<4I", _DATA_MARK, 0, size, size) if size else b""

    def _mark(self) -> None:
        self.bytes += self.mark
