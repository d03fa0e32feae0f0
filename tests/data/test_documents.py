"""Corpus files of every kind give the same documents; broken ones are refused by name and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_cpt.data import Document, is_held_out, read_documents, split_held_out
from megatron_cpt.errors import DataError


def jsonl(documents: list[Document]) -> bytes:
    return "".join(json.dumps({"id": d.id, "text": d.text}) + "\n" for d in documents).encode()


def write_parquet(path: Path, documents: list[Document]) -> None:
    table = pyarrow.table({"id": [d.id for d in documents], "text": [d.text for d in documents]})
    pyarrow.parquet.write_table(table, path, row_group_size=50)


WRITERS: dict[str, Callable[[Path, list[Document]], object]] = {
    "a.jsonl": lambda path, d: path.write_bytes(jsonl(d)),
    "a.jsonl.gz": lambda path, d: path.write_bytes(gzip.compress(jsonl(d))),
    "two.jsonl.gz": lambda path, d: path.write_bytes(gzip.compress(jsonl(d[:50])) + gzip.compress(jsonl(d[50:]))),
    "a.ndjson.zst": lambda path, d: path.write_bytes(zstandard.compress(jsonl(d))),
    "two.json.zst": lambda path, d: path.write_bytes(
        zstandard.compress(jsonl(d[:50])) + zstandard.compress(jsonl(d[50:]))
    ),
    "bom.jsonl": lambda path, d: path.write_bytes(b"\xef\xbb\xbf" + jsonl(d)),
    "crlf.jsonl": lambda path, d: path.write_bytes(jsonl(d).replace(b"\n", b"\r\n\r\n")),
    "open.jsonl": lambda path, d: path.write_bytes(jsonl(d)[:-1]),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_documents(name: str, tmp_path: Path, documents: list[Document]) -> None:
    WRITERS[name](tmp_path / name, documents)
    read = list(read_documents(tmp_path / name, language="xx"))
    assert [(d.text, d.language, d.id) for d in read] == [(d.text, d.language, d.id) for d in documents]
    assert read[0].source == f"{tmp_path / name}:1"


def test_text_files_hold_documents_between_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\n\nein\n  zwei \n \n\ndrei\r\n\r\nvier\n")
    read = list(read_documents(str(tmp_path / "a.txt")))
    assert [(d.text, d.source.rsplit(":", 1)[1]) for d in read] == [("ein\n  zwei ", "3"), ("drei", "7"), ("vier", "9")]


def test_many_files_are_read_in_order_and_progress_counts_their_bytes(
    tmp_path: Path, documents: list[Document]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents[:70]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(documents[70:])))
    seen: list[tuple[int, int]] = []
    read = read_documents([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"], on_progress=lambda *at: seen.append(at))
    assert [d.text for d in read] == [d.text for d in documents]
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert seen[-1] == (size, size) and seen == sorted(seen) and {total for _, total in seen} == {size}


GOOD = b'{"text": "good"}\n'
BROKEN = {
    "malformed line": ("a.jsonl", GOOD + GOOD + b'{"text": "cut\n', "a.jsonl:3: not a line of JSON"),
    "deep line": ("a.jsonl", GOOD + b"[" * 200_000 + b"\n", "a.jsonl:2: not a line of JSON"),
    "not an object": ("a.jsonl", b'["text"]\n', "a.jsonl:1: got a JSON array"),
    "missing field": (
        "a.jsonl",
        GOOD + b'{"body": "x", "id": 1}\n',
        "a.jsonl:2: no field 'text' \\(fields here: body, id",
    ),
    "null text": ("a.jsonl", b'{"text": null}\n', "a.jsonl:1: field 'text' holds null"),
    "lone surrogate": ("a.jsonl", GOOD + b'{"text": "x\\ud800"}\n', "a.jsonl:2: .*lone surrogate"),
    "latin-1": ("a.jsonl", GOOD + b'{"text": "caf\xe9"}\n', "a.jsonl:2: not valid UTF-8"),
    "latin-1 text": ("a.txt", b"good\n\ncaf\xe9\n", "a.txt:3: not valid UTF-8"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(GOOD * 10)[:-9], "a.jsonl.gz:.* damaged or cut short"),
    "not gzip": ("a.jsonl.gz", GOOD, "a.jsonl.gz:1: .* damaged or cut short"),
    "wrong checksum": ("a.jsonl.gz", gzip.compress(GOOD)[:-8] + bytes(8), "a.jsonl.gz:.* damaged or cut short"),
    "cut zstd": ("a.jsonl.zst", zstandard.compress(GOOD * 10)[:-3], "a.jsonl.zst:.* damaged or cut short"),
    "not parquet": ("a.parquet", GOOD, "a.parquet: damaged or not a parquet file"),
    "unknown kind": ("a.csv", GOOD, "a.csv: cannot tell its kind"),
    "no kind": ("corpus", GOOD, "cannot tell its kind"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_file_and_line(name: str, tmp_path: Path) -> None:
    file, content, message = BROKEN[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_documents(tmp_path / file))


def test_all_of_a_cut_file_before_the_cut_is_not_taken_for_the_whole(tmp_path: Path, documents: list[Document]) -> None:
    whole = gzip.compress(jsonl(documents))
    for cut in range(1, len(whole), len(whole) // 40):
        (tmp_path / "a.jsonl.gz").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: "):
            list(read_documents(tmp_path / "a.jsonl.gz"))


def test_missing_files_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match="b.jsonl does not exist"):
        next(read_documents([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]))
    with pytest.raises(DataError, match="is a folder"):
        next(read_documents(tmp_path))


def test_parquet_without_the_column_or_with_a_hole(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text' .columns here: body."):
        list(read_documents(tmp_path / "a.parquet"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="b.parquet:2: field 'text' holds null"):
        list(read_documents(tmp_path / "b.parquet"))


def test_held_out_split_keeps_works_whole_and_only_grows(documents: list[Document]) -> None:
    train, held_out = split_held_out(documents, 0.2)
    assert sorted(d.source for d in train + held_out) == sorted(d.source for d in documents)
    works = [{d.id.split("#")[0] for d in side} for side in (train, held_out)]
    assert not works[0] & works[1] and 3 <= len(works[1]) <= 14
    assert {d.source for d in held_out} <= {d.source for d in documents if is_held_out(d, 0.4)}
    assert [is_held_out(d, 0.2) for d in documents] == [d in held_out for d in documents]
    many = [Document("", "xx", "memory", f"book {number}#1") for number in range(2000)]
    assert 330 < sum(is_held_out(document, 0.2) for document in many) < 470


def test_without_ids_equal_texts_stay_together() -> None:
    documents = [Document(f"text {n % 50}", "en", str(n)) for n in range(200)]
    train, held_out = split_held_out(documents, 0.3)
    assert not {d.text for d in train} & {d.text for d in held_out}


def test_a_split_with_an_empty_side_is_refused(documents: list[Document]) -> None:
    with pytest.raises(DataError, match="of 1 works leaves the"):
        split_held_out(documents[:3], 0.3)
    with pytest.raises(DataError, match="held-out side empty"):
        split_held_out(documents, 0.0)
