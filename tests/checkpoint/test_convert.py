"""Conversions lose nothing, refuse what they cannot do, and leave nothing half done."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cpt.checkpoint import (
    Hints,
    convert,
    open_checkpoint,
    open_hf,
    open_torch_dist,
    read_checkpoint_manifest,
    read_shape,
    verify,
    write_hf,
)
from megatron_cpt.checkpoint.convert import FORMATS
from megatron_cpt.checkpoint.manifest import SEALS
from megatron_cpt.config.manifest import sha256_file
from megatron_cpt.errors import CheckpointError, InputError, TokenizerError


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an HF folder, read by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "divisor", "changes"),
    [
        (torch.float32, 133, 128, {}),
        (torch.bfloat16, 128, 128, {"tied_embeddings": True}),
        (torch.float16, 77, 1, {"num_query_groups": 8, "num_layers": 1}),
        (torch.bfloat16, 130, 8, {"num_query_groups": 1, "rope_scaling": {"factor": 8.0}}),
    ],
)
def test_round_trip_is_bit_exact(dtype, vocab_size, divisor, changes, make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", vocab_size, dtype, **changes)
    there = convert(source, tmp_path / "stored", "torch_dist", divisor)
    assert there["padded_vocab_size"] == -(-vocab_size // divisor) * divisor
    back = convert(tmp_path / "stored", tmp_path / "back", "hf")
    assert there["weights_sha256"] == back["weights_sha256"]
    before, after = weights_of(source), weights_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(bits(tensor), bits(after[name])), name
    assert read_shape(source) == read_shape(tmp_path / "stored") == read_shape(tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())


def test_manifest_of_a_stored_checkpoint(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")
    convert(source, tmp_path / "stored", "torch_dist")
    manifest = read_checkpoint_manifest(tmp_path / "stored")
    assert manifest["format"] == "torch_dist"
    assert (manifest["vocab_size"], manifest["padded_vocab_size"]) == (133, 256)
    assert manifest["shape"] == open_hf(source).llama
    assert manifest["inputs"]["config.json"] == sha256_file(source / "config.json")
    padding = torch.cat(list(open_torch_dist(tmp_path / "stored").padding_blocks("lm_head.weight")))
    assert padding.shape == (123, 32) and not padding.any()


def test_rows_of_the_vocabulary_are_read_alone(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")
    convert(source, tmp_path / "stored", "torch_dist")
    for reader in (open_hf(source), open_torch_dist(tmp_path / "stored")):
        for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"):
            whole = weights_of(source)[name]
            assert torch.equal(reader.read(name), whole)
            assert torch.equal(reader.read_rows(name, 7, 19), whole[7:19])
        with pytest.raises(IndexError):
            reader.read_rows("model.embed_tokens.weight", 0, 134)


def test_a_cast_is_stated_and_measured(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")
    facts = convert(source, tmp_path / "stored", "torch_dist", dtype="bfloat16")
    before = weights_of(source)
    largest = max(float((tensor - tensor.bfloat16().float()).abs().max()) for tensor in before.values())
    assert facts["cast_max_abs_error"] == pytest.approx(largest)
    assert verify(source, tmp_path / "stored")["cast"] == "bfloat16"
    reader = open_torch_dist(tmp_path / "stored")
    for name, tensor in before.items():
        assert torch.equal(reader.read(name), tensor.bfloat16()), name


@pytest.mark.parametrize("to", FORMATS)
def test_tensors_of_different_dtypes_are_kept_or_refused(to: str, make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", vocab_size=134, head_dim=4, rope_theta=10000.0)
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: t.half() if "layers.1.mlp.up" in name else t for name, t in tensors.items()}, file)
    if to in ("hf", "meta"):  # each tensor lies by itself
        convert(source, tmp_path / "out", to)
        reader = open_checkpoint(tmp_path / "out")
        for name, tensor in weights_of(source).items():
            kept = reader.read(name)
            assert kept.dtype == tensor.dtype and torch.equal(bits(kept), bits(tensor)), name
    else:
        with pytest.raises(CheckpointError, match=r"dtypes torch\.float\d+ and torch\.float\d+"):
            convert(source, tmp_path / "out", to)
        assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "wide", to, dtype="float32")
    assert verify(source, tmp_path / "wide")["cast"] == "float32"


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    added = [{"id": 3, "content": "<s>"}, {"id": 5, "content": "</s>"}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))


def test_the_tokenizer_goes_along_and_must_be_the_right_one(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")
    write_tokenizer(source)
    facts = convert(source, tmp_path / "stored", "torch_dist")
    assert facts["tokenizer_sha256"] == sha256_file(source / "tokenizer.model")
    convert(tmp_path / "stored", tmp_path / "back", "hf", tokenizer=source)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"pieces"
    write_tokenizer(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.model").write_bytes(b"other pieces")
    with pytest.raises(TokenizerError, match="not the tokenizer of"):
        convert(tmp_path / "stored", tmp_path / "again", "hf", tokenizer=tmp_path / "other")
    with pytest.raises(TokenizerError, match="holds neither"):
        convert(tmp_path / "stored", tmp_path / "again", "hf", tokenizer=tmp_path)


def test_a_tokenizer_that_was_changed_is_not_handed_on(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")
    write_tokenizer(source)
    convert(source, tmp_path / "stored", "torch_dist")
    (tmp_path / "stored" / "tokenizer.model").write_bytes(b"other pieces")
    with pytest.raises(TokenizerError, match=r"tokenizer in .* was changed: its SHA-256 is not the"):
        convert(tmp_path / "stored", tmp_path / "back", "hf")


def test_end_tokens_come_from_the_tokenizer_when_nothing_states_them(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")
    convert(source, tmp_path / "stored", "torch_dist")
    manifest = tmp_path / "stored" / "manifest.json"
    content = json.loads(manifest.read_text())
    for name in ("bos_token_id", "eos_token_id", *SEALS):
        del content[name]
    manifest.write_text(json.dumps(content))
    write_tokenizer(tmp_path / "tokenizer")
    convert(tmp_path / "stored", tmp_path / "a", "hf", tokenizer=tmp_path / "tokenizer", eos_token_id=8)
    generation = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (3, 8)


def test_dry_run_writes_nothing(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")
    facts = convert(source, tmp_path / "stored", "torch_dist", dry_run=True)
    assert facts["bytes"] > 0 and sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "onnx"}, "got the format 'onnx', expected one of hf, torch_dist"),
        ({"to": "torch_dist", "dtype": "int8"}, "expected one of float32"),
        ({"to": "torch_dist", "vocab_divisor": 0}, "expected 1 or more"),
        ({"to": "torch_dist", "vocab_divisor": 10**15}, "1,048,576 at most"),
        (
            {"to": "torch_dist", "spec": "local", "optimizer_form": "plain"},
            "got --spec, --optimizer-form for torch_dist",
        ),
        ({"to": "hf", "vocab_divisor": 64}, "got --vocab-divisor for hf"),
        ({"to": "mp_rank", "optimizer_form": "plain"}, "got --optimizer-form plain, and no optimizer's state goes"),
        ({"to": "mp_rank", "tp": 3}, "got --tp 3 for 2 key-value heads"),
        ({"to": "torch_dist", "bos_token_id": 133}, "got bos_token_id 133, expected an id below 133"),
        ({"to": "torch_dist", "eos_token_id": [2, 500]}, "got eos_token_id 500, expected an id below 133"),
        (
            {"to": "torch_dist", "hints": Hints(vocab_size=99)},
            "itself says a vocabulary of 133, not 99 as --vocab-size",
        ),
        (
            {"to": "torch_dist", "hints": Hints(tokenizer_size=134)},
            "the tokenizer has 134 ids, the vocabulary of .* 133",
        ),
        ({"to": "torch_dist", "tp": 2}, "got --tp for torch_dist, which has no use for it"),
        ({"to": "hf", "pp": 2, "vpp": 2}, "got --pp, --vpp for hf"),
    ],
)
def test_impossible_requests(arguments, message, make_model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        convert(make_model(tmp_path / "hf"), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_existing_work_is_never_touched(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="already holds files"):
        convert(source, tmp_path / "out", "torch_dist")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["note.txt"]
    with pytest.raises(CheckpointError, match="already holds a model"):
        write_hf(source, [("x", (1,), torch.float32, lambda: torch.zeros(1))], {})


def test_an_interrupted_conversion_goes_on(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")

    def stop(done: int, total: int) -> None:
        if done * 2 > total:
            raise KeyboardInterrupt

    convert(source, tmp_path / "stored", "torch_dist")
    for to, start in (("torch_dist", source), ("hf", tmp_path / "stored")):
        with pytest.raises(KeyboardInterrupt):
            convert(start, tmp_path / "out", to, workers=1, on_progress=stop)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "hf", "stored"]
        assert 0 < convert(start, tmp_path / "out", to)["resumed"] < 30
        verify(start, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
    # What is left of another conversion is not gone on with, even where its files have the same names, nor lost.
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", "torch_dist", workers=1, on_progress=stop)
    with pytest.raises(CheckpointError, match="holds an unfinished conversion to .*, not this one"):
        convert(source, tmp_path / "out", "torch_dist", dtype="bfloat16")
    assert convert(source, tmp_path / "out", "torch_dist")["resumed"] > 0
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", "torch_dist", dtype="bfloat16", workers=1, on_progress=stop)
    (tmp_path / ".out.partial" / ".metadata").write_text("half")
    whole = convert(source, tmp_path / "whole", "torch_dist", dtype="bfloat16")
    gone_on = convert(source, tmp_path / "out", "torch_dist", dtype="bfloat16")
    assert whole["resumed"] == 0 < gone_on["resumed"]
    assert gone_on["cast_max_abs_error"] == whole["cast_max_abs_error"] > 0
    verify(source, tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


def test_what_an_earlier_attempt_wrote_is_proved_not_believed(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")

    def stop(done: int, total: int) -> None:
        if done * 2 > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", "torch_dist", workers=1, on_progress=stop)
    file = tmp_path / ".out.partial" / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))  # as a machine that lost power may leave it
    assert convert(source, tmp_path / "out", "torch_dist")["resumed"] == 0
    verify(source, tmp_path / "out")


def test_a_full_disk_is_noticed_before_writing(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "hf")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(CheckpointError, match="bytes are needed and 1 are free"):
        convert(source, tmp_path / "out", "torch_dist")


def test_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    def entry(made: object) -> list:
        return [("a", (4, 2), torch.float32, lambda: made)]

    for made in (torch.zeros(3, 2), torch.zeros(4, 2, dtype=torch.float16), [torch.zeros(2, 2)], torch.zeros(2, 4)):
        with pytest.raises(CheckpointError, match="announced"):
            write_hf(tmp_path / "out", entry(made), {})
        assert not list((tmp_path / "out").iterdir())
    write_hf(tmp_path / "out", entry(iter([torch.zeros(3, 2), torch.ones(1, 2)])), {})
    assert load_file(tmp_path / "out" / "model.safetensors")["a"].tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]


def test_a_hub_cache_of_links_is_read(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    verify(source, snapshot)
