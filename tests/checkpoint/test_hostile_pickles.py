"""Pickles from strangers, of archives and of the index of torch_dist: small files that ask for much time or memory."""

from __future__ import annotations

import collections
import io
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpt.checkpoint import convert, open_torch_dist
from megatron_cpt.checkpoint.archive import read_archive
from megatron_cpt.checkpoint.metadata import read_index
from megatron_cpt.errors import CheckpointError

Reader = Callable[[bytes, Path], Any]


def in_archive(content: bytes, folder: Path) -> Any:
    """What is read of an archive with this pickle."""
    with zipfile.ZipFile(folder / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return read_archive(folder / "a.pt")


def in_index(content: bytes, folder: Path) -> Any:
    """What is read of an index with this pickle."""
    (folder / ".metadata").write_bytes(content)
    return read_index(folder, lambda key: True)


def refused(reader: Reader, content: bytes, folder: Path, message: str, peak: int = 40_000_000) -> None:
    """Asserts that a pickle is refused in one line, in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            reader(content, folder)
        assert tracemalloc.get_traced_memory()[1] < peak
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def nested(depth: int, first: bytes, pair: bytes) -> bytes:
    """A value whose both parts are one whose both parts are one, and so on: 2^depth parts in a few bytes each."""
    return first + b"".join(b"q" + bytes([n]) + pair.replace(b"$", b"h" + bytes([n])) for n in range(depth))


PAIRS = nested(40, b")", b"$\x86")
LISTS = nested(40, b"]", b"0](" + b"$$" + b"e")
DICTS = nested(40, b"}", b"0}(K\0$K\1$u")
NAMESPACES = nested(40, b"]", b"0cargparse\nNamespace\n)\x81}(X\1\0\0\0a$X\1\0\0\0b$ub")
MIXED = nested(40, b"]", b"0ca\nb\n$$\x86R]$a\x86")  # a stand-in's arguments, and a list beside it


@pytest.mark.parametrize("reader", [in_archive, in_index])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"}" + PAIRS + b"K\1s.", "a key or element of a set"),
        (b"\x96" + (3 << 30).to_bytes(8, "little") + b".", "an instruction that torch.save never writes"),
        (b"B" + (3 << 30).to_bytes(4, "little") + b"xy.", "damaged|cannot be read"),
        (b"\x8f" * 200_000 + b".", "far more than it has bytes"),
        (b"}" * 200_000 + b".", "far more than it has bytes"),
        (b"]" * 200_000 + b".", "far more than it has bytes"),
        (b"(" * 200_000 + b".", "far more than it has bytes"),
        (b"(\x91" * 200_000 + b".", "far more than it has bytes"),
        (b"N" + b"\x94" * 200_000 + b".", "far more than it has bytes"),
        (b")" + b"\x85" * 200_000 + b".", "far more than it has bytes"),
        # Keys of a hundred parts, put into a dict again and again.
        (b"(" + b"N" * 99 + b"tq\x000}" + b"h\0Ns" * 50_000 + b".", "far more than it has bytes"),
    ],
)
def test_instructions_that_cost_more_than_they_have_bytes(
    reader: Reader, content: bytes, message: str, tmp_path: Path
) -> None:
    refused(reader, b"\x80\x04" + content, tmp_path, message)


def test_a_size_is_made_of_few_numbers(tmp_path: Path) -> None:
    text = b"B" + (1 << 20).to_bytes(4, "little") + b"x" * (1 << 20) + b"\x94ctorch\nSize\n\x94"
    content = b"\x80\x04" + text + b"h\1h\0\x85R" * 150 + b"."
    for reader in (in_archive, in_index):
        refused(reader, content, tmp_path, "a tensor's size is no tuple|far more than it has bytes")


@pytest.mark.parametrize("value", [PAIRS, LISTS, DICTS, NAMESPACES, MIXED])
def test_parts_that_come_again_and_again(value: bytes, tmp_path: Path) -> None:
    refused(in_archive, b"\x80\x02" + value + b".", tmp_path, "the same parts again and again")
    # A list in itself has no end.
    refused(in_archive, b"\x80\x02]q\0h\0a.", tmp_path, "the same parts again and again")


def test_parts_that_are_shared(tmp_path: Path) -> None:
    betas, group = (0.9, 0.95), {"lr": 1.0}
    value = {"groups": [{"betas": betas, "group": group} for _ in range(100)], "of": collections.OrderedDict(a=betas)}
    torch.save(value, tmp_path / "a.pt")
    found = read_archive(tmp_path / "a.pt")
    assert found == value and found["groups"][0]["betas"] is found["groups"][99]["betas"]


def test_a_method_cannot_be_put_in_the_place_of_another(tmp_path: Path) -> None:
    state: Any = torch.nn.Linear(2, 2).state_dict()
    torch.save(state, tmp_path / "a.pt")
    assert read_archive(tmp_path / "a.pt")._metadata == state._metadata  # every module's has it
    state.items = [1]
    buffer = io.BytesIO()
    pickle.Pickler(buffer, 2).dump(collections.OrderedDict(a=1))
    content = buffer.getvalue()[:-1] + b"}X\5\0\0\0itemsK\1sb."
    refused(in_archive, content, tmp_path, "gives OrderedDict a state of dict")


@pytest.fixture
def stored(make_model, tmp_path: Path) -> Path:
    convert(make_model(tmp_path / "hf"), tmp_path / "stored", "torch_dist")
    return tmp_path / "stored"


EMBEDDING, NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"


def scalar(root: Any) -> None:
    """Make the embedding a tensor without dimensions."""
    described, index = root.state_dict_metadata[EMBEDDING], next(i for i in root.storage_data if i.fqn == EMBEDDING)
    described.size = torch.Size(())
    described.chunks = [type(described.chunks[0])(torch.Size(()), torch.Size(()))]
    root.storage_data[type(index)(EMBEDDING, torch.Size(()))] = root.storage_data[index]


def renamed_scalar(root: Any) -> None:
    scalar(root)
    root.state_dict_metadata["decoder.layers.0.mlp.linear_fc1.weight_v"] = root.state_dict_metadata.pop(EMBEDDING)
    for index in [index for index in root.storage_data if index.fqn == EMBEDDING]:
        place = root.storage_data.pop(index)
        root.storage_data[type(index)("decoder.layers.0.mlp.linear_fc1.weight_v", index.offset)] = place


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda root: setattr(root.state_dict_metadata[NORM].chunks[0], "sizes", torch.Size((32, 1))), "has a chunk"),
        (lambda root: setattr(root.state_dict_metadata[NORM].chunks[0], "sizes", torch.Size((2,) * 9)), "at most 8"),
        (lambda root: setattr(root.state_dict_metadata[NORM], "size", torch.Size(())), "has a chunk"),
        (lambda root: setattr(root.state_dict_metadata[NORM], "size", (2**63,)), "below 2^63"),
        (lambda root: setattr(root.state_dict_metadata[NORM], "chunks", 3), "cannot be read"),
        (lambda root: root.storage_data.clear(), "no file holds the chunk"),
        (scalar, "expected a matrix"),
        (renamed_scalar, "does not belong"),
    ],
)
def test_an_index_of_wrong_shapes(edit: Callable[[Any], Any], message: str, stored: Path) -> None:
    root = pickle.loads((stored / ".metadata").read_bytes())
    edit(root)
    (stored / ".metadata").write_bytes(pickle.dumps(root))
    with pytest.raises(CheckpointError, match=message.replace("^", r"\^")):
        open_torch_dist(stored)


def test_an_index_of_no_end(tmp_path: Path) -> None:
    with open(tmp_path / ".metadata", "wb") as file:
        file.truncate(257 << 20)
    with pytest.raises(CheckpointError, match="has 269,484,032 bytes, expected at most 268,435,456"):
        read_index(tmp_path, lambda key: True)
