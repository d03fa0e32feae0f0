"""Files from strangers: nothing runs, nothing is allocated on their word, every message names the file."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cpt.checkpoint import convert, open_hf, open_torch_dist
from megatron_cpt.errors import CheckpointError

FIRST = "model-00001-of-00005.safetensors"


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def hf(make_model, tmp_path: Path) -> Path:
    folder = make_model(tmp_path / "hf")
    assert len(list(folder.glob("*.safetensors"))) == 5
    return folder


@pytest.fixture
def stored(hf: Path, tmp_path: Path) -> Path:
    convert(hf, tmp_path / "stored", "torch_dist")
    return tmp_path / "stored"


def edit_header(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def entry(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(values)


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 0, 10**9])
def test_length_of_the_header(length: int, hf: Path) -> None:
    raw = (hf / FIRST).read_bytes()
    (hf / FIRST).write_bytes(length.to_bytes(8, "little") + raw[8:])
    with pytest.raises(CheckpointError, match=f"{FIRST}: a header of {length} bytes"):
        open_hf(hf)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (entry(NORM, data_offsets=[0, 128]), "overlap or gap"),
        (entry(NORM, data_offsets=[2**62, 2**62 + 128]), "overlap or gap"),
        (entry(NORM, shape=[2**62]), "bytes for shape"),
        (entry(NORM, shape=[-32]), "integers of 0 or more"),
        (entry(NORM, shape=[32.0]), "integers of 0 or more"),
        (entry(NORM, data_offsets=[128]), "not safetensors'"),
        (entry(NORM, dtype="I64"), "expected one of BF16"),
        (lambda header: header.pop(NORM), "overlap or gap"),
        (lambda header: header.update(other=[]), "not safetensors'"),
    ],
)
def test_header_that_lies(edit: Callable[[dict[str, Any]], None], message: str, hf: Path) -> None:
    edit_header(hf / FIRST, edit)
    with pytest.raises(CheckpointError, match=message):
        open_hf(hf)


def test_a_name_that_appears_twice(hf: Path) -> None:
    raw = (hf / FIRST).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].replace(b"post_attention_layernorm", b"input_layernorm")
    (hf / FIRST).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(CheckpointError, match="appears twice"):
        open_hf(hf)


def test_truncated_and_extended_weights(hf: Path) -> None:
    raw = (hf / FIRST).read_bytes()
    for content in (raw[:-1], raw + b"x", raw[:20], b""):
        (hf / FIRST).write_bytes(content)
        with pytest.raises(CheckpointError, match=FIRST):
            open_hf(hf)


def test_missing_and_extra_tensors(hf: Path) -> None:
    (hf / "model.safetensors.index.json").unlink()
    tensors = {name: t for file in hf.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in hf.glob("*.safetensors"):
        file.unlink()
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    save_file({**tensors, **rotary}, hf / "model.safetensors")  # a constant of old exports: harmless
    assert set(open_hf(hf).names()) == set(tensors)
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(96)}, hf / "model.safetensors")
    with pytest.raises(CheckpointError, match="not expected model.layers.0.self_attn.q_proj.bias"):
        open_hf(hf)
    del tensors["lm_head.weight"]
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing lm_head.weight"):
        open_hf(hf)
    save_file({**tensors, "lm_head.weight": torch.ones(134, 32)}, hf / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \(134, 32\), config.json says \(133, 32\)"):
        open_hf(hf)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "", "sub/x.safetensors", ".."])
def test_index_that_leaves_the_folder(name: str, hf: Path) -> None:
    shutil.copy(hf / FIRST, hf.parent / "outside.safetensors")
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    index["weight_map"][NORM] = name
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected a plain file name"):
        open_hf(hf)


def test_links_and_pipes(hf: Path, stored: Path) -> None:
    shutil.move(hf / FIRST, hf.parent / "outside.safetensors")
    (hf / FIRST).symlink_to("../outside.safetensors")
    with pytest.raises(CheckpointError, match="is a link to"):
        open_hf(hf)
    (hf / FIRST).unlink()
    os.mkfifo(hf / FIRST)
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_hf(hf)
    shutil.move(stored / "__0_0.distcp", stored.parent / "outside.distcp")
    (stored / "__0_0.distcp").symlink_to("../outside.distcp")
    with pytest.raises(CheckpointError, match="is a link to"):
        open_torch_dist(stored)


def test_index_and_files_that_disagree(hf: Path) -> None:
    path = hf / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = FIRST
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names model.ghost.weight, which no file holds"):
        open_hf(hf)
    del index["weight_map"]["model.ghost.weight"], index["weight_map"][NORM]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="mixed up"):
        open_hf(hf)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="weight_map"):
        open_hf(hf)


# torch_dist


def edit_metadata(folder: Path, edit: Callable[[Any], Any]) -> None:
    """Change `.metadata` through torch's own classes."""
    root = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(edit(root) or root))


def place_of(root: Any, key: str, **values: Any) -> None:
    for index, place in root.storage_data.items():
        if index.fqn == key:
            for name, value in values.items():
                object.__setattr__(place, name, value)
            return
    raise KeyError(key)


def test_a_pickle_that_wants_to_run(stored: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    def infect(root: Any) -> None:
        root.planner_data = Payload(marker)

    edit_metadata(stored, infect)
    with pytest.raises(CheckpointError, match=r"names posix.mkdir"):
        open_torch_dist(stored)
    assert not marker.exists()


def test_names_that_look_harmless(stored: Path, tmp_path: Path) -> None:
    class Sneaky:
        def __init__(self, *call: Any) -> None:
            self.call = call

        def __reduce__(self) -> Any:
            return self.call

    calls = [
        (builtins.eval, ("1",)),
        (getattr, ("text", "upper")),
        (torch.load, ("x",)),
        (torch.distributed.checkpoint.filesystem.FileSystemWriter, (str(tmp_path / "made"),)),
    ]
    good = (stored / ".metadata").read_bytes()
    for call in calls:
        (stored / ".metadata").write_bytes(good)
        edit_metadata(stored, lambda root, call=call: setattr(root, "version", Sneaky(*call)))
        if "FileSystemWriter" in repr(call):  # a class of torch's metadata: kept as an inert record, never made
            open_torch_dist(stored)
        else:
            with pytest.raises(CheckpointError, match="which a checkpoint's index has no use for"):
                open_torch_dist(stored)
    assert not (tmp_path / "made").exists()
    # A dotted name reaches through a module that is allowed: it too becomes a record, and nothing runs.
    words = [
        b"\x8c" + bytes([len(word)]) + word
        for word in (b"torch.distributed.checkpoint.metadata", b"os.system", b"true")
    ]
    (stored / ".metadata").write_bytes(b"\x80\x04" + words[0] + words[1] + b"\x93" + words[2] + b"\x85R.")
    with pytest.raises(CheckpointError, match="os.system"):
        open_torch_dist(stored)


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", pickle.dumps({}), b"\x80\x04r\xff\xff\xff\xff."])
def test_metadata_that_is_none(content: bytes, stored: Path) -> None:
    (stored / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint's index"):
        open_torch_dist(stored)


def test_a_few_bytes_cannot_reserve_gigabytes(stored: Path) -> None:
    (stored / ".metadata").write_bytes(b"\x80\x04Nr" + (2**25).to_bytes(4, "little") + b".")  # the memo's entry 2^25
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_torch_dist(stored)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


QKV = "decoder.layers.self_attention.linear_qkv.weight"
EMBEDDING = "embedding.word_embeddings.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda root: place_of(root, QKV, relative_path="../outside.distcp"), "expected a plain file name"),
        (lambda root: place_of(root, QKV, relative_path="gone.distcp"), "gone.distcp is missing"),
        (lambda root: place_of(root, QKV, offset=2**62), "cut short"),
        (lambda root: place_of(root, QKV, length=100), "cut short"),
        (lambda root: place_of(root, QKV, offset=-1), "integers of 0 or more"),
        (lambda root: place_of(root, QKV, offset="0"), "integers of 0 or more"),
        (lambda root: place_of(root, QKV, transform_descriptors=["zstd"]), "not supported"),
        (lambda root: root.state_dict_metadata.pop(QKV), f"{QKV} is missing"),
        (lambda root: root.state_dict_metadata.update({"bias": root.state_dict_metadata[QKV]}), "no file holds"),
        (lambda root: root.state_dict_metadata[QKV].chunks.pop(), "is missing"),
        (lambda root: root.state_dict_metadata[QKV].chunks.append(root.state_dict_metadata[QKV].chunks[0]), "overlap"),
        (lambda root: setattr(root.state_dict_metadata[QKV], "size", torch.Size((3, 2**40, 2**20))), "is missing"),
        (
            lambda root: setattr(root.state_dict_metadata[QKV].chunks[0], "sizes", torch.Size((2**62, 144, 32))),
            "outside",
        ),
        (lambda root: setattr(root.state_dict_metadata[QKV].properties, "dtype", torch.float16), "the index says"),
    ],
)
def test_metadata_that_lies(edit: Callable[[Any], Any], message: str, stored: Path) -> None:
    (stored.parent / "outside.distcp").write_bytes((stored / "__0_0.distcp").read_bytes())
    edit_metadata(stored, lambda root: edit(root) and None)
    with pytest.raises(CheckpointError, match=message):
        open_torch_dist(stored).read("model.layers.0.self_attn.q_proj.weight")


def test_extra_tensor_and_other_layers(stored: Path) -> None:
    def rename(old: str, new: str) -> Callable[[Any], None]:
        def edit(root: Any) -> None:
            root.state_dict_metadata[new] = root.state_dict_metadata.pop(old)
            for index in list(root.storage_data):
                if index.fqn == old:
                    root.storage_data[type(index)(new, index.offset)] = root.storage_data.pop(index)

        return edit

    good = (stored / ".metadata").read_bytes()
    for new in ("decoder.layers.self_attention.linear_qkv.bias", "decoder.layers.0.self_attention.q_layernorm.weight"):
        (stored / ".metadata").write_bytes(good)
        edit_metadata(stored, rename(QKV, new))
        with pytest.raises(CheckpointError, match=f"{new} does not belong"):
            open_torch_dist(stored)
    (stored / ".metadata").write_bytes(good)
    edit_metadata(stored, rename(QKV, f"optimizer.state.exp_avg.{QKV}"))  # skipped unread, so the weight is missing
    with pytest.raises(CheckpointError, match=f"{QKV} is missing"):
        open_torch_dist(stored)


def test_two_chunks_in_the_same_bytes(stored: Path) -> None:
    def edit(root: Any) -> None:
        places = [place for index, place in root.storage_data.items() if index.fqn == QKV]
        places[1].offset = places[0].offset

    edit_metadata(stored, edit)
    with pytest.raises(CheckpointError, match="overlap at byte"):
        open_torch_dist(stored)


def test_truncated_data(stored: Path) -> None:
    file = stored / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(CheckpointError, match="cut short"):
        open_torch_dist(stored)


def replace_chunk(folder: Path, key: str, content: bytes) -> None:
    """Put other bytes where the first chunk of a tensor lies (appended to the data file)."""
    file = folder / "__0_0.distcp"
    start = file.stat().st_size
    with open(file, "ab") as data:
        data.write(content)
    edit_metadata(folder, lambda root: place_of(root, key, offset=start, length=len(content)))


def archive(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("archive/data.pkl", b"")
        packed.writestr("archive/data/0", bytes(50_000_000))
    return buffer.getvalue()


def test_chunks_that_are_not_what_the_index_says(stored: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    filler = torch.zeros(256, 32)
    cases = [
        (archive([Payload(marker), filler]), "is list, expected a tensor"),
        (archive({"a": filler}), "is dict, expected a tensor"),
        (archive(torch.zeros(256, 33)), "the index says"),
        (archive(filler.half().repeat(2, 1)), "the index says"),
        (bomb(), "damaged or unsafe"),
        (b"\0" * 40_000, "damaged or unsafe"),
    ]
    for content, message in cases:
        replace_chunk(stored, EMBEDDING, content)
        with pytest.raises(CheckpointError, match=message):
            open_torch_dist(stored).read("model.embed_tokens.weight")
    assert not marker.exists()
    replace_chunk(stored, EMBEDDING, archive(filler + 3))
    assert open_torch_dist(stored).read("model.embed_tokens.weight")[0, 0] == 3  # the method of this test works


def test_manifest(stored: Path) -> None:
    path = stored / "manifest.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"vocab_size": 300}, "0 < vocab_size <= padded_vocab_size"),
        ({"vocab_size": "133"}, "expected two integers"),
        ({"padded_vocab_size": 384}, r"has shape \(256, 32\), the manifest says \(384, 32\)"),
        ({"kind": "shards"}, "expected 'checkpoint'"),
        ({"shape": {**good["shape"], "num_layers": 4}}, "manifest says"),
        ({"shape": {**good["shape"], "hidden_size": -1}}, "field shape is not a Llama's"),
        ({"shape": None}, "field shape is not a Llama's"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=message):
            open_torch_dist(stored)
    path.unlink()
    assert open_torch_dist(stored).vocab_size == good["vocab_size"]  # Megatron's arguments in common.pt say it too
    (stored / "common.pt").unlink()
    with pytest.raises(CheckpointError, match="holds neither manifest.json nor"):
        open_torch_dist(stored)
