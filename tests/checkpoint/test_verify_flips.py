"""One flipped bit anywhere in a converted folder is found."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_cpt.checkpoint import convert, open_checkpoint, verify
from megatron_cpt.checkpoint.layout import gaps, tensor_extents
from megatron_cpt.errors import CheckpointError, VerificationError

BITS = 8


@pytest.fixture(scope="module")
def folders(make_model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with a tokenizer, and what it is converted to."""
    base = tmp_path_factory.mktemp("flips")
    source = make_model(base / "source")
    (source / "tokenizer.model").write_bytes(b"pieces")
    (source / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 3, "content": "<s>"}]}))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    convert(source, base / "torch_dist", "torch_dist")
    convert(base / "torch_dist", base / "hf", "hf", tokenizer=source)
    return {"source": source, "hf": base / "hf", "torch_dist": base / "torch_dist"}


@contextmanager
def flipped(path: Path, byte: int, bit: int) -> Iterator[None]:
    """One bit of a file the other way round."""
    right = path.read_bytes()
    path.write_bytes(right[:byte] + bytes([right[byte] ^ 1 << bit]) + right[byte + 1 :])
    try:
        yield
    finally:
        path.write_bytes(right)


def places_in(size: int, seed: str) -> list[tuple[int, int]]:
    """(byte, bit) of the first byte, the last and six between."""
    draw = random.Random(seed)
    between = draw.sample(range(1, size - 1), min(6, size - 2))
    return [(byte, draw.randrange(BITS)) for byte in (0, *sorted(between), size - 1)]


@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_in_every_file(to: str, folders: dict[str, Path]) -> None:
    folder = folders[to]
    names = sorted(path.name for path in folder.iterdir())
    must = {"hf": {"config.json", "generation_config.json", "README.md"}, "torch_dist": {".metadata", "common.pt"}}
    assert must[to] | {"manifest.json", "tokenizer.model", "tokenizer_config.json"} <= set(names)
    for name in names:
        for byte, bit in places_in((folder / name).stat().st_size, f"{to} {name}"):
            with flipped(folder / name, byte, bit):
                for arguments in ((folders["source"], folder), (folder,)):
                    with pytest.raises((VerificationError, CheckpointError)):
                        verify(*arguments)
                        pytest.fail(f"byte {byte} bit {bit} of {name} went unseen")
    assert verify(folders["source"], folder)["equal"] and verify(folder)["intact"]


@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_in_every_kind_of_byte_between_tensors(to: str, folders: dict[str, Path]) -> None:
    """Headers, the directories of archives, padding between them, and the padding rows of the vocabulary."""
    folder = folders[to]
    model = open_checkpoint(folder)
    for name, extents in tensor_extents([model.tensors], {}).items():
        for first, last in gaps(name, (folder / name).stat().st_size, extents).tolist():
            for byte in {first, (first + last) // 2, last - 1}:
                with flipped(folder / name, byte, byte % BITS), pytest.raises((VerificationError, CheckpointError)):
                    verify(folders["source"], folder)
                    pytest.fail(f"byte {byte} of {name} went unseen")


@pytest.mark.parametrize("field", ["kind", "files", "tensors", "manifest_sha256", "bytes", "cast", "vocab_size"])
def test_in_the_names_of_the_manifest(field: str, folders: dict[str, Path]) -> None:
    path = folders["hf"] / "manifest.json"
    for byte in range(
        path.read_bytes().index(f'"{field}":'.encode()) + 1, path.read_bytes().index(f'{field}":'.encode()) + len(field)
    ):
        with flipped(path, byte, 0):
            for arguments in ((folders["source"], folders["hf"]), (folders["hf"],)):
                with pytest.raises((VerificationError, CheckpointError)):
                    verify(*arguments)
                    pytest.fail(f"byte {byte} of the manifest went unseen")


def test_where_no_manifest_tells_the_tensors_are_still_compared(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    convert(folders["source"], copy, "hf", dtype="float32")
    (copy / "manifest.json").unlink()
    assert verify(folders["source"], copy)["files"] == 0
    file = copy / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file)
    data = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    for byte in (data, file.stat().st_size - 1):
        with flipped(file, byte, 3), pytest.raises(VerificationError, match="differs in 1 of"):
            verify(folders["source"], copy)
