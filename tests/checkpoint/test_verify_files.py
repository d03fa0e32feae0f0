"""Verification sees files that a manifest does not list: loaders may take them for the model."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_cpt.checkpoint import convert, open_hf, verify
from megatron_cpt.checkpoint.huggingface import lay_out_hf
from megatron_cpt.errors import CheckpointError, VerificationError


@pytest.fixture
def source(make_model, tmp_path: Path) -> Path:
    return make_model(tmp_path / "hf")


@pytest.fixture
def export(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export in several weight files."""
    # The function hides the module in its package.
    module = sys.modules["megatron_cpt.checkpoint.convert"]
    monkeypatch.setattr(module, "lay_out_hf", partial(lay_out_hf, max_shard_bytes=60_000))
    convert(source, tmp_path / "export", "hf")
    assert len(list((tmp_path / "export").glob("*.safetensors"))) == 5
    return tmp_path / "export"


def test_a_model_beside_the_model(export: Path, source: Path, make_model, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)
    tensors = {name: t for file in other.glob("*.safetensors") for name, t in load_file(file).items()}
    save_file(tensors, export / "model.safetensors", {"format": "pt"})
    for check, error in (
        (lambda: verify(export), VerificationError),
        (lambda: verify(source, export), VerificationError),
        (lambda: verify(export, source), CheckpointError),  # not what is proved
        (lambda: open_hf(export), CheckpointError),
    ):
        with pytest.raises(error, match=r"transformers loads the former .*: remove model.safetensors, or"):
            check()
    (export / "model.safetensors").unlink()
    assert verify(source, export)["equal"]


def test_transformers_takes_the_one_file(export: Path, make_model, tmp_path: Path) -> None:
    """What the refusal rests on."""
    other = make_model(tmp_path / "other", seed=1)
    tensors = {name: t for file in other.glob("*.safetensors") for name, t in load_file(file).items()}
    save_file(tensors, export / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).state_dict()
    assert torch.equal(loaded["lm_head.weight"], tensors["lm_head.weight"])


def test_a_single_pickled_file_beside_its_index(source: Path, tmp_path: Path) -> None:
    """The same for the older kind of weights."""
    for file in source.glob("*.safetensors"):
        torch.save(
            load_file(file), source / file.name.replace(".safetensors", ".bin").replace("model", "pytorch_model")
        )
        file.unlink()
    index = json.loads((source / "model.safetensors.index.json").read_text())
    names = {
        n: f.replace(".safetensors", ".bin").replace("model", "pytorch_model") for n, f in index["weight_map"].items()
    }
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    (source / "model.safetensors.index.json").unlink()
    open_hf(source)
    shutil.copy(source / names["lm_head.weight"], source / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match="remove pytorch_model.bin, or pytorch_model.bin.index.json and the files"
    ):
        open_hf(source)


def test_an_index_of_one_file_is_no_other_model(source: Path) -> None:
    tensors = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in source.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, source / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(open_hf(source).names()) == set(tensors)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.model",
        "modeling_llama.py",
        "chat_template.jinja",
        "sub/consolidated.00.PTH",
        "merges.txt",
        "__1_0.distcp",
    ],
)
def test_a_file_that_loaders_look_for(name: str, export: Path, source: Path) -> None:
    (export / name).parent.mkdir(exist_ok=True)
    (export / name).write_bytes(b"")
    for arguments in ((export,), (source, export)):
        with pytest.raises(VerificationError, match=f"{name} was added and may be loaded with the rest, remove it"):
            verify(*arguments)


def test_what_no_loader_looks_for_is_told(export: Path) -> None:
    assert verify(export)["unlisted"] == []
    for name in ("LICENSE", ".gitattributes", "images/loss.png", ".git/objects/pack.bin", ".cache/huggingface/x.json"):
        (export / name).parent.mkdir(parents=True, exist_ok=True)
        (export / name).write_bytes(b"text")
    assert verify(export)["unlisted"] == ["LICENSE", "images/loss.png"]


def test_a_tracker_beside_torch_dist(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "stored", "torch_dist")
    (tmp_path / "stored" / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(VerificationError, match="latest_checkpointed_iteration.txt was added and may be loaded"):
        verify(tmp_path / "stored")


@pytest.mark.parametrize("form", ["mp_rank", "nxd"])
def test_any_file_among_those_of_ranks(form: str, make_model, tmp_path: Path) -> None:
    convert(make_model(tmp_path / "hf", vocab_size=134, head_dim=4), tmp_path / "ranks", form, tp=2)
    (tmp_path / "ranks" / "LICENSE").write_text("free")
    assert verify(tmp_path / "ranks")["unlisted"] == ["LICENSE"]
    listed = json.loads((tmp_path / "ranks" / "manifest.json").read_text())["files"]
    below = next(name for name in listed if "/" in name).rsplit("/", 1)[0]
    (tmp_path / "ranks" / below / "notes").write_text("mine")
    with pytest.raises(VerificationError, match=f"{below}/notes was added"):
        verify(tmp_path / "ranks")
    (tmp_path / "ranks" / below / "notes").unlink()
    (tmp_path / "ranks" / below / "linked").symlink_to(tmp_path)
    with pytest.raises(VerificationError, match=f"{below}/linked was added"):
        verify(tmp_path / "ranks")
