"""torch.save archives read and laid out without torch: torch.save and torch.load are the reference."""

from __future__ import annotations

import argparse
import collections
import fractions
import io
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_cpt.checkpoint.archive import Array, archive_bytes, lay_out_archive, read_archive
from megatron_cpt.errors import CheckpointError

DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex128 complex64 "
    "uint16 uint32 uint64 float8_e4m3fn float8_e5m2"
).split()


def saved(value: Any, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **settings)
    return buffer.getvalue()


def bits(tensor: Tensor) -> tuple[Any, ...]:
    dense = tensor.detach().contiguous()
    return tuple(tensor.shape), tensor.dtype, dense.reshape(-1).view(torch.uint8).tolist() if dense.numel() else []


def tensor_at(path: Path, array: Array) -> Tensor:
    """The tensor that an array tells of, by torch's own striding over the bytes of the file."""
    if 0 in array.shape:
        return torch.empty(array.shape, dtype=array.dtype)
    raw = bytearray(path.read_bytes()[array.offset :])
    flat = torch.frombuffer(raw[: len(raw) // array.dtype.itemsize * array.dtype.itemsize], dtype=array.dtype)
    return flat.as_strided(array.shape, array.strides)


def assert_same(found: Any, expected: Any, path: Path) -> None:
    if isinstance(expected, Tensor):
        assert isinstance(found, Array)
        assert (found.shape, found.strides) == (tuple(expected.shape), expected.stride())
        assert bits(tensor_at(path, found)) == bits(expected)
        return
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key], path)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, path)
    elif isinstance(expected, argparse.Namespace):
        assert_same(vars(found), vars(expected), path)
    else:
        assert found == expected


def filled(path: Path, value: Any, tensors: list[Tensor]) -> Path:
    """Write what is laid out, rubbish in the holes, then the tensors' bytes in them."""
    size, parts, offsets = lay_out_archive(value)
    covered = [(offset, len(content)) for offset, content in parts]
    covered += [(offset, tensor.nbytes) for offset, tensor in zip(offsets, tensors, strict=True) if tensor.nbytes]
    covered.sort()
    assert all(first + count == second for (first, count), (second, _) in zip(covered, covered[1:], strict=False))
    assert covered[0][0] == 0 and sum(covered[-1]) == size
    assert all(offset % 64 == 0 for offset in offsets)
    raw = bytearray(b"\xaa" * size)
    for offset, content in parts:
        raw[offset : offset + len(content)] = content
    for offset, tensor in zip(offsets, tensors, strict=True):
        raw[offset : offset + tensor.nbytes] = bytes(bits(tensor)[2])
    path.write_bytes(raw)
    return path


def some_tensor(source: random.Random) -> Tensor:
    dtype = getattr(torch, source.choice(DTYPES))
    shape = [source.choice((0, 1, 2, 3, 5)) for _ in range(source.choice((0, 1, 2, 2, 3)))]
    count = (torch.Size(shape).numel() + 7) * dtype.itemsize
    if dtype is torch.bool:
        flat = torch.tensor([source.random() < 0.5 for _ in range(count)])
    else:
        flat = torch.frombuffer(bytearray(source.randbytes(count)), dtype=dtype)
    start = source.randrange(7)
    tensor = flat[start : start + torch.Size(shape).numel()].reshape(shape)
    if source.random() < 0.3 and tensor.dim() >= 2:
        tensor = tensor.transpose(0, 1)
    if source.random() < 0.2 and tensor.is_floating_point():
        tensor = torch.nn.Parameter(tensor, requires_grad=source.random() < 0.5)
    return tensor


def some_value(source: random.Random, depth: int = 3) -> Any:
    kind = source.randrange(9) if depth else source.randrange(4)
    inner = [some_value(source, depth - 1) for _ in range(source.randrange(4))] if kind >= 4 else []
    words = [f"key{number}" for number in range(len(inner))]
    if kind == 4:
        return tuple(inner)
    if kind == 5:
        return inner
    if kind == 6:
        return collections.OrderedDict(zip(words, inner, strict=True))
    if kind == 7:
        return argparse.Namespace(**dict(zip(words, inner, strict=True)))
    if kind == 8:
        return {source.choice((word, number)): value for number, (word, value) in enumerate(zip(words, inner))}  # noqa: B905
    plain = [None, True, -5, 2**40, -(2**200), 1.5, "text \u00e9\u3042", b"\x00\xff", {1, "a"}, frozenset({2}), 1 + 2j]
    return (
        some_tensor(source)
        if kind < 3
        else source.choice([*plain, torch.Size([2, 3]), torch.bfloat16, bytearray(b"x")])
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_reads_what_torch_saved_and_writes_what_torch_reads(tmp_path_factory: Any, seed: int) -> None:
    folder = tmp_path_factory.mktemp("value")
    source = random.Random(seed)
    value = [some_value(source) for _ in range(3)]
    path, before = folder / "a.pt", source.randbytes(source.randrange(3000))
    path.write_bytes(before + saved(value) + bytes(10))
    found = read_archive(path, len(before), path.stat().st_size - len(before) - 10)
    assert_same(found, value, path)

    arrays: list[Array] = []

    def walk(part: Any) -> None:
        if isinstance(part, Array):
            arrays.append(part)
        elif isinstance(part, dict | argparse.Namespace):
            for inner in (part if isinstance(part, dict) else vars(part)).values():
                walk(inner)
        elif isinstance(part, list | tuple):
            for inner in part:
                walk(inner)

    walk(found)
    written = filled(folder / "b.pt", found, [tensor_at(path, array).contiguous() for array in arrays])
    for mmap in (False, True):
        loaded = torch.load(written, weights_only=False, mmap=mmap)
        assert str(dense(loaded)) == str(dense(value))


def dense(value: Any) -> Any:
    """The value with the bits of each tensor in its place."""
    if isinstance(value, Tensor):
        return bits(value)
    if isinstance(value, dict):
        return type(value), [(key, dense(inner)) for key, inner in value.items()]
    if isinstance(value, argparse.Namespace):
        return dense(vars(value))
    if isinstance(value, list | tuple):
        return type(value), [dense(inner) for inner in value]
    return sorted(map(str, value)) if isinstance(value, set) else value


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_every_dtype_and_protocol(protocol: int, tmp_path: Path) -> None:
    source = random.Random(protocol)
    value: dict[str, Any] = {"order": [1, {"a": b"bytes", "b": bytearray(b"more"), "s": {1}, "f": frozenset({2})}]}
    for name in DTYPES:
        dtype = getattr(torch, name)
        raw = bytearray(source.randbytes(24 * dtype.itemsize))
        if dtype is torch.bool:
            raw = bytearray(byte & 1 for byte in raw)
        value[name] = torch.frombuffer(raw, dtype=dtype).reshape(4, 6)
    path = tmp_path / "a.pt"
    path.write_bytes(saved(value, pickle_protocol=protocol))
    assert_same(read_archive(path), value, path)
    assert {read_archive(path)[name].dtype for name in DTYPES} == {getattr(torch, name) for name in DTYPES}


def test_shared_storages_views_and_parameters(tmp_path: Path) -> None:
    base = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    same = torch.ones(3)
    value = {
        "base": base,
        "rows": base[2:4],
        "columns": base[:, 3:5],
        "turned": base.t(),
        "spread": torch.ones(1, 3).expand(5, 3),
        "parameter": torch.nn.Parameter(base[1]),
        "past the end": base[6:],
        "same": [same, same],
    }
    path = tmp_path / "a.pt"
    torch.save(value, path)
    found = read_archive(path)
    assert_same(found, value, path)
    assert found["rows"].offset == found["base"].offset + 20 * 4 and found["columns"].strides == (10, 1)
    assert found["same"][0] is found["same"][1]
    # The places are those that torch's own reader tells.
    reader = torch._C.PyTorchFileReader(str(path))
    assert found["base"].offset == reader.get_record_offset("data/0")


def test_state_dict_of_a_module_keeps_its_attributes(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()
    torch.save(state, tmp_path / "a.pt")
    found = read_archive(tmp_path / "a.pt")
    assert found._metadata == state._metadata
    written = filled(tmp_path / "b.pt", found, list(state.values()))
    assert torch.load(written, weights_only=True)._metadata == state._metadata
    fresh = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    fresh.load_state_dict(torch.load(written, weights_only=True))


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Array:
    return Array(-1, shape, torch.empty(shape, device="meta").stride(), dtype)


def test_the_bytes_are_torchs(tmp_path: Path) -> None:
    tensors = [torch.randn(3, 4), torch.empty(0, 3), torch.ones(()), torch.randn(7).to(torch.float8_e4m3fn)]
    arrays = [new(*tensor.shape, dtype=tensor.dtype) for tensor in tensors]

    def value(parts: list[Any]) -> dict[str, Any]:
        return {"model": {f"layer.{number}": part for number, part in enumerate(parts)}, "iteration": 10, "n": None}

    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        expected = saved(value(tensors))
    finally:
        torch.serialization.set_crc32_options(checksums)
    raw = filled(tmp_path / "a.pt", value(arrays), tensors).read_bytes()
    # All of it up to the record that tells which run of torch wrote the file.
    end = expected.index(b"PK\3\4", expected.index(b"archive/version"))
    assert raw[:end] == expected[:end]
    reader = torch._C.PyTorchFileReader(str(tmp_path / "a.pt"))
    expected_reader = torch._C.PyTorchFileReader(io.BytesIO(expected))
    names = set(expected_reader.get_all_records()) - {".data/serialization_id"}
    assert set(reader.get_all_records()) == names
    assert all(reader.get_record(name) == expected_reader.get_record(name) for name in names)
    loaded = torch.load(tmp_path / "a.pt", weights_only=True, mmap=True)
    assert dense(loaded) == dense(value(tensors))


def test_one_array_in_two_places_is_one_tensor(tmp_path: Path) -> None:
    shared, equal = new(2), new(2)
    written = filled(tmp_path / "a.pt", [shared, equal, {"again": shared}], [torch.ones(2), torch.zeros(2)])
    first, second, last = torch.load(written, weights_only=True)
    assert last["again"] is first and second.tolist() == [0, 0]
    assert len(lay_out_archive([shared, equal, shared])[2]) == 2


def test_an_array_of_other_strides_becomes_dense(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    turned = Array(77, (2, 3), (1, 2), torch.float32)
    loaded = torch.load(filled(tmp_path / "a.pt", turned, [tensor]), weights_only=True)
    assert torch.equal(loaded, tensor) and loaded.is_contiguous()


class Needy:
    """Cannot be made without an argument; pickled by its attributes alone."""

    def __init__(self, needed: int) -> None:
        self.needed = needed

    def __eq__(self, other: object) -> bool:
        return type(other) is Needy and vars(other) == vars(self)


def test_objects_are_written_under_their_names(tmp_path: Path) -> None:
    value = {
        "args": argparse.Namespace(lr=1e-4, kinds=[torch.float16, torch.device("cpu")], inner=argparse.Namespace(a=1)),
        "needy": Needy(3),
        "fraction": fractions.Fraction(1, 3),
        "default": collections.defaultdict(list, a=[1]),
        "random": random.Random(1).getstate(),
        "class": fractions.Fraction,
        "function": os.path.join,
        "deque": collections.deque([1, 2]),
        "slice": slice(1, 2),
    }
    torch.save(value, tmp_path / "a.pt")
    found = read_archive(tmp_path / "a.pt")
    assert type(found["args"]) is argparse.Namespace and not isinstance(found["needy"], Needy)
    written = filled(tmp_path / "b.pt", found, [])
    loaded = torch.load(written, weights_only=False)
    assert loaded == value and type(loaded["default"]) is collections.defaultdict


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_other_tensors_are_stand_ins(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    negative = torch._neg_view(torch.ones(2))
    torch.save(
        {"sparse": sparse, "quantised": quantised, "negative": negative, "plain": torch.ones(2)}, tmp_path / "a.pt"
    )
    found = read_archive(tmp_path / "a.pt")
    assert [name for name, value in found.items() if isinstance(value, Array)] == ["plain"]
    loaded = torch.load(
        filled(tmp_path / "b.pt", found["sparse"], [sparse._indices(), sparse._values()]), weights_only=True
    )
    assert torch.equal(loaded.to_dense(), torch.eye(3))
    with pytest.raises(CheckpointError, match="a storage outside a plain tensor"):
        lay_out_archive(found)


def test_archive_bytes(tmp_path: Path) -> None:
    for value in ([None], {"a": {"b": [1, 2.5, "x"], 3: (True, b"raw")}}, []):
        assert torch.load(io.BytesIO(archive_bytes(value)), weights_only=True) == value
    with pytest.raises(ValueError, match="1 tensors"):
        archive_bytes([new(2)])


def test_what_cannot_be_written() -> None:
    with pytest.raises(TypeError, match="expected an Array"):
        lay_out_archive([torch.ones(2)])
    with pytest.raises(CheckpointError, match=r"torch.quint8 cannot be written"):
        lay_out_archive(new(2, dtype=torch.quint8))
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(CheckpointError, match="cannot be saved"):
        lay_out_archive(deep)


def test_tensor_data_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(1000, 1000), "b": torch.zeros(10)}, tmp_path / "a.pt")
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: read.append(size) or pread(file, size, at))
    read_archive(tmp_path / "a.pt")
    assert 0 < sum(read) < 10_000
