"""The indexed dataset against megatron-core's own reader and writer, and against damage."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data import IndexedDataset
from megatron_cpt.data.writing import IndexedDatasetWriter, write_index
from megatron_cpt.errors import DataError


@pytest.fixture(scope="session")
def megatron() -> Any:
    from megatron_cpt.runtime.engine import install_engine

    install_engine("cpu")
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def rows(vocab_size: int, count: int = 40) -> list[np.ndarray]:
    draw = np.random.default_rng(vocab_size)
    made = [draw.integers(0, vocab_size, size=draw.integers(1, 30)) for _ in range(count)]
    made[3][0], made[7][-1] = 0, vocab_size - 1
    return made


def write(prefix: Path, vocab_size: int, documents: list[np.ndarray]) -> dict[str, Any]:
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        for row in documents:
            writer.add(row)
        return writer.finish({"text": "0" * 64}, language="xx")


@pytest.mark.parametrize("vocab_size", [400, 65499, 65500, 65536, 128256])
def test_files_equal_megatrons_byte_for_byte_and_megatron_reads_them(
    vocab_size: int, tmp_path: Path, megatron: Any
) -> None:
    documents = rows(vocab_size)
    write(tmp_path / "ours", vocab_size, documents)
    builder = megatron.IndexedDatasetBuilder(
        str(tmp_path / "theirs.bin"), dtype=megatron.DType.optimal_dtype(vocab_size)
    )
    for row in documents:
        builder.add_document(row, [len(row)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
    read = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert len(read) == len(documents)
    assert all(np.array_equal(read[number], row) for number, row in enumerate(documents))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_megatrons_files_are_read_in_every_type_with_split_and_empty_documents(
    dtype: str, tmp_path: Path, megatron: Any
) -> None:
    documents = rows(100)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    expected = []
    for number, row in enumerate(documents):
        if number % 5 == 0:
            builder.end_document()
            expected.append(row[:0])
        half = len(row) // 2
        builder.add_document(row, [half, len(row) - half] if half else [len(row)])
        expected.append(row)
    builder.finalize(str(tmp_path / "theirs.idx"))
    dataset = IndexedDataset(tmp_path / "theirs", foreign=True)
    assert dataset.dtype.name == dtype
    assert dataset.num_documents == len(expected) and dataset.num_tokens == sum(map(len, documents))
    assert all(np.array_equal(dataset.document(number), row) for number, row in enumerate(expected))
    tokens, starts = dataset.tokens(0, dataset.num_tokens)
    assert np.array_equal(tokens, np.concatenate(documents))
    assert starts.tolist() == np.cumsum([0] + [len(row) for row in documents[:-1]]).tolist()
    with pytest.raises(DataError, match="manifest.json is missing"):
        IndexedDataset(tmp_path / "theirs")


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_tokens_are_slices_of_the_concatenated_documents(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "slices"
    if not folder.exists():
        write(folder / "x", 70000, rows(70000))
    dataset, stream = IndexedDataset(folder / "x"), np.concatenate(rows(70000))
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    tokens, starts = dataset.tokens(start, stop)
    assert np.array_equal(tokens, stream[start:stop])
    borders = np.cumsum([0] + [len(row) for row in rows(70000)])[:-1]
    assert starts.tolist() == [border - start for border in borders.tolist() if start <= border < stop]


def test_ids_outside_of_the_vocabulary_are_refused_when_written_and_when_read(tmp_path: Path) -> None:
    for bad in (400, -1, 70000):
        with pytest.raises(DataError, match=f"token id {bad} in document 1, expected 0 to 399"):
            write(tmp_path / "x", 400, [np.array([1]), np.array([2, bad])])
    assert not list(tmp_path.iterdir())
    write(tmp_path / "x", 400, rows(400))
    content = bytearray((tmp_path / "x.bin").read_bytes())
    content[20:22] = struct.pack("<H", 400)
    (tmp_path / "x.bin").write_bytes(content)
    dataset = IndexedDataset(tmp_path / "x")
    assert len(dataset.tokens(0, 10)[0]) == 10
    with pytest.raises(DataError, match=r"x\.bin: token id 400 at token 10, expected 0 to 399"):
        dataset.tokens(5, 15)


def test_ranges_and_documents_that_do_not_exist(tmp_path: Path) -> None:
    write(tmp_path / "x", 400, rows(400))
    dataset = IndexedDataset(tmp_path / "x")
    for number in (-1, 40):
        with pytest.raises(DataError, match=f"no document {number}; expected 0 to 39"):
            dataset.document(number)
    for start, stop in ((-1, 3), (0, dataset.num_tokens + 1), (5, 4)):
        with pytest.raises(DataError):
            dataset.tokens(start, stop)


def test_a_document_without_tokens_and_a_dataset_without_documents(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="document of 0 tokens"):
        write(tmp_path / "x", 400, [np.array([], np.int64)])
    with pytest.raises(DataError, match="the corpus is empty"):
        write(tmp_path / "x", 400, [])
    assert not list(tmp_path.iterdir())


def _patch(path: Path, offset: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)


def _edit_manifest(folder: Path, **fields: Any) -> None:
    path = folder / "x.manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


LENGTHS, OFFSETS, BORDERS = 34, 34 + 4 * 40, 34 + 12 * 40


def _negative_last_length(folder: Path) -> None:
    """Lengths and offsets that agree with each other and with the size of .bin, and make no sense."""
    content = (folder / "x.idx").read_bytes()
    before, last = struct.unpack_from("<ii", content, LENGTHS + 4 * 38)
    (offset,) = struct.unpack_from("<q", content, OFFSETS + 8 * 39)
    _patch(folder / "x.idx", LENGTHS + 4 * 38, struct.pack("<ii", before + last + 3, -3))
    _patch(folder / "x.idx", OFFSETS + 8 * 39, struct.pack("<q", offset + 2 * (last + 3)))


DAMAGE = {
    "no manifest": (lambda f: (f / "x.manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda f: (f / "x.manifest.json").write_text(""), "not valid JSON"),
    "manifest of another kind": (lambda f: _edit_manifest(f, kind="tokenizer"), "describes 'tokenizer'"),
    "manifest of another build": (lambda f: _edit_manifest(f, tokens=5), "the manifest says 5"),
    "no bin": (lambda f: (f / "x.bin").unlink(), r"x\.bin is missing"),
    "no idx": (lambda f: (f / "x.idx").unlink(), r"x\.idx is missing"),
    "short bin": (lambda f: os.truncate(f / "x.bin", 100), r"x\.bin has 100 bytes, its index counts \d+ tokens"),
    "odd bin": (lambda f: os.truncate(f / "x.bin", 101), r"x\.bin has 101 bytes"),
    "longer bin": (lambda f: (f / "x.bin").open("ab").write(b"12"), r"x\.bin has \d+ bytes"),
    "empty bin": (lambda f: os.truncate(f / "x.bin", 0), r"x\.bin has 0 bytes"),
    "empty idx": (lambda f: os.truncate(f / "x.idx", 0), r"x\.idx is not an index"),
    "short idx": (lambda f: os.truncate(f / "x.idx", 300), r"x\.idx has 300 bytes"),
    "longer idx": (lambda f: (f / "x.idx").open("ab").write(bytes(40)), "image modes"),
    "other magic": (lambda f: _patch(f / "x.idx", 0, b"TNTIDX"), "does not begin with MMIDIDX"),
    "other version": (lambda f: _patch(f / "x.idx", 9, b"\x02"), "version 2"),
    "float ids": (lambda f: _patch(f / "x.idx", 17, b"\x07"), "type code 7"),
    "other type": (lambda f: _patch(f / "x.idx", 17, b"\x04"), "without gaps"),
    "huge counts": (lambda f: _patch(f / "x.idx", 18, b"\xff" * 8), r"sequences and 41 document borders need"),
    "negative length": (lambda f: _patch(f / "x.idx", LENGTHS, struct.pack("<i", -1)), "without gaps"),
    "negative last length": (_negative_last_length, "without gaps"),
    "offset elsewhere": (lambda f: _patch(f / "x.idx", OFFSETS + 8, struct.pack("<q", 1 << 40)), "without gaps"),
    "border before": (lambda f: _patch(f / "x.idx", BORDERS + 8, struct.pack("<q", -1)), "borders are damaged"),
    "border behind": (lambda f: _patch(f / "x.idx", BORDERS + 8, struct.pack("<q", 41)), "borders are damaged"),
    "last border": (lambda f: _patch(f / "x.idx", BORDERS + 320, struct.pack("<q", 39)), "borders are damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_on_opening(name: str, tmp_path: Path) -> None:
    write(tmp_path / "x", 400, rows(400))
    damage, message = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "x")


def test_a_dataset_without_any_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "x.idx").write_bytes(b"MMIDIDX\x00\x00" + struct.pack("<QBQQq", 1, 8, 0, 1, 0))
    with pytest.raises(DataError, match="holds no token"):
        IndexedDataset(tmp_path / "x", foreign=True)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_the_index_equals_megatrons_in_every_type_with_split_and_empty_documents(
    dtype: str, tmp_path: Path, megatron: Any
) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=getattr(np, dtype))
    lengths, borders = [], [0]
    for number, row in enumerate(rows(100)):
        if number % 5 == 0:
            builder.end_document()
            borders.append(len(lengths))
        half = len(row) // 2
        parts = [half, len(row) - half] if half else [len(row)]
        builder.add_document(row, parts)
        lengths += parts
        borders.append(len(lengths))
    builder.finalize(str(tmp_path / "theirs.idx"))
    write_index(tmp_path / "ours.idx", np.dtype(dtype), np.array(lengths, np.int32), np.array(borders, np.int64))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    (tmp_path / "ours.bin").write_bytes((tmp_path / "x.bin").read_bytes())
    assert megatron.IndexedDataset(str(tmp_path / "ours")).document_indices.tolist() == borders
    assert IndexedDataset(tmp_path / "ours", foreign=True).num_documents == len(borders) - 1


@pytest.mark.parametrize(("dtype", "code"), [("float32", 7), ("float64", 6)])
def test_megatrons_floating_point_types_are_refused_in_words(
    dtype: str, code: int, tmp_path: Path, megatron: Any
) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=getattr(np, dtype))
    builder.add_document(np.arange(5), [5])
    builder.finalize(str(tmp_path / "x.idx"))
    with pytest.raises(DataError, match=f"type code {code}; expected version 1 and an integer type"):
        IndexedDataset(tmp_path / "x", foreign=True)
