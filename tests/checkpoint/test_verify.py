"""Verification finds a single changed bit, and says what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cpt.checkpoint import convert, show, verify
from megatron_cpt.errors import VerificationError

UP = "model.layers.2.mlp.up_proj.weight"


def change(folder: Path, name: str, edit) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            edit(tensors[name])
            save_file(tensors, file)


@pytest.fixture
def pair(make_model, tmp_path: Path) -> tuple[Path, Path]:
    source = make_model(tmp_path / "hf")
    convert(source, tmp_path / "stored", "torch_dist")
    return source, tmp_path / "stored"


def test_one_bit(pair: tuple[Path, Path]) -> None:
    source, stored = pair
    assert verify(source, stored)["equal"]

    def flip(tensor: torch.Tensor) -> None:
        tensor.view(torch.int32)[3, 4] ^= 1

    change(source, UP, flip)
    with pytest.raises(VerificationError, match=f"{UP} differs in 1 of 2816 elements"):
        verify(source, stored)


def test_minus_zero_is_not_zero(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = pair
    change(source, UP, lambda tensor: tensor[0].zero_())
    convert(source, tmp_path / "zeros", "torch_dist")
    assert verify(source, tmp_path / "zeros")["zero_rows"] == {UP: 1}
    change(source, UP, lambda tensor: tensor[0].neg_())
    with pytest.raises(VerificationError, match="differs in 32 of"):
        verify(source, tmp_path / "zeros")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity(value: float, pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = pair
    change(source, UP, lambda tensor: tensor[1].fill_(value))
    convert(source, tmp_path / "broken", "torch_dist")
    with pytest.raises(VerificationError, match="holds NaN or infinity"):
        verify(source, tmp_path / "broken")


def test_configs_are_compared_not_only_weights(pair: tuple[Path, Path]) -> None:
    source, stored = pair
    config = json.loads((source / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 10000.0
    config["rms_norm_eps"] = 1e-6
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        VerificationError, match="norm_epsilon is 1e-05, not 1e-06; rope_theta is 500000.0, not 10000.0"
    ):
        verify(source, stored)


def test_another_dtype_must_be_stated(pair: tuple[Path, Path], make_model, tmp_path: Path) -> None:
    source, _ = pair
    half = make_model(tmp_path / "half", dtype=torch.bfloat16)
    with pytest.raises(VerificationError, match="manifest states no such cast"):
        verify(source, half)


def test_damage_after_writing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, stored = pair
    convert(stored, tmp_path / "back", "hf")
    convert(stored, tmp_path / "twin", "hf")
    for folder in (tmp_path / "back", tmp_path / "twin"):  # the same damage in both: only the hash can tell
        change(folder, UP, lambda tensor: tensor[0].fill_(1.0))
    with pytest.raises(VerificationError, match="changed after it was written"):
        verify(tmp_path / "back", tmp_path / "twin")


def test_show(pair: tuple[Path, Path]) -> None:
    source, stored = pair
    shown, seen = show(stored), show(source)
    assert (
        seen["parameters"]
        == shown["parameters"]
        == sum(tensor.numel() for file in source.glob("*.safetensors") for tensor in load_file(file).values())
    )
    assert (seen["format"], shown["format"]) == ("hf", "torch_dist")
    assert (shown["vocab_size"], shown["padded_vocab_size"], shown["dtype"]) == (133, 256, "float32")
