"""Blocks of corpus files: the same documents however a file is cut, packed, or continued."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_cpt.data import blocks as module
from megatron_cpt.data import parquet as parquet_module
from megatron_cpt.data import read_documents
from megatron_cpt.data.blocks import RawBlock, open_blocks, stop_at_fault
from megatron_cpt.errors import DataError

Row = tuple[int, str, str]


def rows_of(blocks: list[RawBlock]) -> tuple[list[Row], list[tuple[int, str]]]:
    rows: list[Row] = []
    faults: list[tuple[int, str]] = []
    for block in (raw.parse() for raw in blocks):
        rows += zip(block.lines.tolist(), block.texts(), block.ids(), strict=True)
        faults += block.faults
    return rows, faults


def read_all(path: Path, start: dict[str, Any] | None = None, **options: Any) -> tuple[list[RawBlock], str]:
    with open_blocks(path, start=start, **options) as reader:
        blocks = list(iter(reader.read, None))
        assert reader.read() is None and reader.bytes_read == reader.total_bytes == path.stat().st_size
        return blocks, reader.sha256()


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """2,000 records of 0 to 4,000 characters, some far longer than what the test cuts at."""
    draw = random.Random(1)
    word = ["stone", "river", "\u5c71\u306e\u4e0a", "\uac15\uc758", "\u00fcber", "\n", "\r\n", "\U0001f30a "]
    size = [0, 1, 10, 40, 400]
    return [
        {"id": f"w{n // 3}#{n % 3}", "text": "".join(draw.choices(word, k=draw.choice(size))), "more": [n]}
        for n in range(2000)
    ]


def jsonl(records: list[dict[str, Any]]) -> bytes:
    return b"\xef\xbb\xbf" + b"".join(
        json.dumps(record, ensure_ascii=k % 2 == 0).encode() + [b"\n", b"\r\n", b"\n \n\n"][k % 3]
        for k, record in enumerate(records)
    )


def text(records: list[dict[str, Any]]) -> bytes:
    cut = [b"\n\n", b"\r\n \r\n", "\n\u3000\n\n".encode()]
    return b"".join(b"#\n" + record["text"].encode() + cut[k % 3] for k, record in enumerate(records))


def parquet(path: Path, records: list[dict[str, Any]]) -> None:
    columns = {
        "more": [r["more"] for r in records],
        "text": [r["text"] for r in records],
        "id": [r["id"] for r in records],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=300)


def members(data: bytes, pack: Callable[[bytes], bytes]) -> bytes:
    third = len(data) // 3
    return pack(data[:third]) + pack(data[third:])


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], object]] = {
    "a.jsonl": lambda path, r: path.write_bytes(jsonl(r)),
    "a.jsonl.gz": lambda path, r: path.write_bytes(members(jsonl(r), gzip.compress)),
    "a.ndjson.zst": lambda path, r: path.write_bytes(members(jsonl(r), zstandard.compress)),
    "a.txt": lambda path, r: path.write_bytes(text(r)),
    "a.txt.gz": lambda path, r: path.write_bytes(members(text(r), gzip.compress)),
    "a.parquet": parquet,
}


@pytest.fixture(autouse=True)
def small_cuts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many blocks a file without large files."""
    monkeypatch.setattr(module, "CUT_BYTES", 20_000)
    monkeypatch.setattr(parquet_module, "CUT_BYTES", 20_000)
    yield


@pytest.mark.parametrize("name", WRITERS)
def test_every_block_can_be_parsed_in_any_thread_and_continued_from(
    name: str, tmp_path: Path, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    WRITERS[name](path, records)
    blocks, digest = read_all(path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() and len(blocks) > 5
    with ThreadPoolExecutor(3) as pool:
        whole = list(pool.map(lambda raw: rows_of([raw]), blocks))
    rows = [row for part, _ in whole for row in part]
    assert all(not faults for _, faults in whole)
    if "txt" not in name:
        assert [(text, name) for _, text, name in rows] == [(r["text"], r["id"]) for r in records]
    monkeypatch.setattr(module, "CUT_BYTES", 7_001)
    monkeypatch.setattr(parquet_module, "CUT_BYTES", 7_001)
    for k in range(0, len(blocks), 1 + len(blocks) // 12):
        start = json.loads(json.dumps(blocks[k].position))
        rest, again = read_all(path, start)
        assert again == digest
        assert rows_of(rest)[0] == [row for part, _ in whole[k + 1 :] for row in part]


def test_lines_are_those_of_the_file(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(records))
    lines = (tmp_path / "a.jsonl").read_bytes().split(b"\n")
    for line, text, _ in rows_of(read_all(tmp_path / "a.jsonl")[0])[0]:
        assert json.loads(lines[line - 1].decode("utf-8-sig"))["text"] == text


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_cuts_of_every_size_give_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {
        "a.txt": "\n \n\u3000\u3000eins\n zwei\u3000\n\u3000 \u2003\r\n\n\ndrei\x1c\nvier\n\t\nf\xfcnf\n\u3000",
        "a.jsonl": '\ufeff{"text": "\u3042"}\n\n \u3000\n{"text": "b\\n"}\r\n{"text": ""}\n[]\n{"text": "c"}',
    }[name]
    (tmp_path / name).write_text(data, newline="")
    seen = []
    for size in range(1, 80):
        monkeypatch.setattr(module, "CUT_BYTES", size)
        seen.append(rows_of(read_all(tmp_path / name)[0]))
    assert all(one == seen[0] for one in seen) and len(seen[0][0]) == (3 if name == "a.txt" else 4)


LONG = {
    "a.jsonl": lambda size: b'{"text": "' + b"x" * size + b'"}\n',
    "a.jsonl.gz": lambda size: b'{"text": "' + b"x" * size + b'"}\n',
    "a.txt": lambda size: b"ab\n" + b"x\n" * (size // 2) + "\u3000 \u3000\n".encode(),
    "b.txt": lambda size: b"\xe3" * size + b"\n\n",
}


@pytest.mark.parametrize("name", LONG)
def test_a_record_that_is_too_long_is_a_fault_wherever_the_file_is_cut(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_READ_BYTES", 7_000)
    short = LONG[name](10) if name != "b.txt" else b"ok\n\n"
    data = short + LONG[name](6_000) + short + LONG[name](400_000) + short * 2 + LONG[name](100_000).rstrip()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    found = []
    for size in (10, 1_000, 30_000, 1 << 20):
        monkeypatch.setattr(module, "CUT_BYTES", size)
        blocks, digest = read_all(tmp_path / name, longest_record_bytes=5_000)
        assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        found.append(rows_of(blocks))
        for block in blocks[:: 1 + len(blocks) // 5]:
            rest = rows_of(read_all(tmp_path / name, block.position, longest_record_bytes=5_000)[0])
            assert rest[0] == found[-1][0][len(found[-1][0]) - len(rest[0]) :]
            assert rest[1] == found[-1][1][len(found[-1][1]) - len(rest[1]) :]
    rows, faults = found[0]
    assert all(one == found[0] for one in found) and len(rows) == 4
    assert [reason for _, reason in faults] == ["a record of more than 5000 bytes; split it"] * 3
    lines = data.split(b"\n")
    assert all(lines[line - 1][:2] in (b'{"', b"ab", b"\xe3\xe3") for line, _ in faults)


def test_memory_stays_small_whatever_the_length_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CUT_BYTES", 1 << 20)
    for name, data in {"a.jsonl.gz": b'{"text": "', "a.txt.gz": b"x"}.items():
        with gzip.open(tmp_path / name, "wb", 1) as file:
            file.write(data)
            for _ in range(200):
                file.write(b" " * 1_000_000)
            file.write(b'"}\n\n{"text": "end"}\n')
        with open_blocks(tmp_path / name, longest_record_bytes=2 << 20) as reader:
            before = pyarrow.total_allocated_bytes()
            blocks = list(iter(reader.read, None))
            assert max(raw.held_bytes for raw in blocks) < 24 << 20 and pyarrow.total_allocated_bytes() <= before + 4e6
        rows, faults = rows_of(blocks)
        assert len(rows) == 1 and "end" in rows[0][1] and [line for line, _ in faults] == [1]


def test_parquet_of_other_string_types_and_with_holes(tmp_path: Path) -> None:
    columns = {
        "dictionary": pyarrow.array(["a", "b", None, "a", "\u5c71"]).dictionary_encode(),
        "large": pyarrow.array(["", "b", None, "a", "\u5c71"], pyarrow.large_string()),
        "body": pyarrow.array(["x", "y", None, "z", "w"]),
        "id": pyarrow.array([7, None, 9, -1, 2**60]),
        "number": pyarrow.array([1, 2, 3, 4, 5]),
    }
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    for field in ("dictionary", "large", "body"):
        rows, faults = rows_of(read_all(path, text_field=field)[0])
        assert rows == [
            (row, text, name)
            for row, (text, name) in enumerate(
                zip(columns[field].to_pylist(), ["7", "", "9", "-1", str(2**60)], strict=True), 1
            )
            if text is not None
        ]
        assert faults == [(3, f"field '{field}' holds null, expected a string")]
    with pytest.raises(DataError, match="column 'number' holds int64, expected strings"):
        open_blocks(path, "number")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert rows_of(read_all(path)[0]) == ([], [])
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xffx")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), path)
    assert rows_of(read_all(path)[0]) == ([(2, "x", "")], [(1, "not valid UTF-8; convert the file first")])


def test_a_damaged_parquet_is_an_error(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    parquet(tmp_path / "a.parquet", records)
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a\.parquet: damaged or not a parquet file"):
        open_blocks(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(data[:1000] + b"\xff" * 3000 + data[4000:])
    with pytest.raises(DataError, match=r"a\.parquet: damaged or not a parquet file, after row \d+ "):
        rows_of(read_all(tmp_path / "a.parquet")[0])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt.zst"])
def test_an_error_of_the_system_is_told_as_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("/proc/self/mem")  # a file whose first page cannot be read
    with open_blocks(tmp_path / name) as reader, pytest.raises(OSError, match="Input/output error") as caught:
        reader.read()
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path / name))


def test_an_error_of_the_system_in_a_parquet_is_told_as_it_is(
    tmp_path: Path, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "Error reading bytes from file. Detail: [errno 5] Input/output error")

    parquet(tmp_path / "a.parquet", records)
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", fail)
    with open_blocks(tmp_path / "a.parquet") as reader, pytest.raises(OSError, match="Input/output error") as caught:
        reader.read()
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path / "a.parquet"))


def test_a_window_that_is_too_large_is_told_as_that(tmp_path: Path) -> None:
    """The frame of `zstd --long=31` is valid: a file to compress again, not a damaged one."""
    settings = zstandard.ZstdCompressionParameters(window_log=31, compression_level=1)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packer.compress(b'{"text": "a"}\n') + packer.flush())
    with open_blocks(path) as reader, pytest.raises(DataError) as caught:
        reader.read()
    assert "a window that is too large to read" in str(caught.value) and "compress it again" in str(caught.value)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt.zst"])
def test_empty_files_have_no_blocks(name: str, tmp_path: Path) -> None:
    pack = {"l": bytes, "z": gzip.compress, "t": zstandard.compress}[name[-1]]
    for content in (b"", b"\n \n\n", b"\xef\xbb\xbf"):
        (tmp_path / name).write_bytes(pack(content))
        assert rows_of(read_all(tmp_path / name)[0]) == ([], [])


def test_a_file_that_became_shorter_is_not_continued(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    for name, pack in {"a.jsonl": bytes, "a.jsonl.gz": gzip.compress}.items():
        (tmp_path / name).write_bytes(pack(jsonl(records)))
        position = read_all(tmp_path / name)[0][-1].position
        (tmp_path / name).write_bytes(pack(jsonl(records[:100])))
        with pytest.raises(DataError, match="is shorter than the part of it that was read before"):
            open_blocks(tmp_path / name, start=position)


def test_faults_stop_or_are_skipped_as_the_caller_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \n{"text": "b"}\n')
    with open_blocks(path) as reader:
        raw = reader.read()
    assert raw is not None
    block = raw.parse()
    assert block.texts() == ["a", "b"]
    with pytest.raises(
        DataError, match=r"a\.jsonl:2: not a line of JSON \(expected a JSON value where the line ends\)"
    ):
        stop_at_fault(block, path)
    stop_at_fault(block.from_texts(["a"]), path)
    with pytest.raises(DataError, match=r"a\.jsonl:2: "):
        list(read_documents(path))
    assert [d.text for d in read_documents(path, on_error="skip")] == ["a", "b"]
    assert "a.jsonl:2: not a line of JSON" in caplog.text
