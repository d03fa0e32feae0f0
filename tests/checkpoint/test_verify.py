"""Verification finds a single changed bit, and says what differs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cpt.checkpoint import LlamaForward, StoredModel, convert, open_checkpoint, show, verify
from megatron_cpt.checkpoint.logits import compare_logits
from megatron_cpt.errors import CheckpointError, VerificationError

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


def test_one_folder_by_its_own_manifest(pair: tuple[Path, Path]) -> None:
    source, stored = pair
    facts = verify(stored)
    assert facts["intact"] and facts["tensors"] == 30 and facts["files"] == 4
    assert facts["weights_sha256"] == verify(source, stored)["weights_sha256"]
    with pytest.raises(CheckpointError, match="no manifest that records the hashes .* give what it was made from"):
        verify(source)
    with pytest.raises(CheckpointError, match="logits are compared with those of a second"):
        verify(stored, logits=True)
    file = next(stored.glob("*.distcp"))
    run = open_checkpoint(stored).tensors[UP].runs[0]
    file.write_bytes(file.read_bytes()[: run.offset] + b"\1" + file.read_bytes()[run.offset + 1 :])
    with pytest.raises(VerificationError, match=f"{UP} does not have its recorded hash"):
        verify(stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0])
def test_single_elements_in_every_dtype(dtype: torch.dtype, value: float, make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", dtype=torch.float32, hidden_size=40)

    def edit(tensor: torch.Tensor) -> None:
        tensor[5] = 0.0
        tensor[5, 17] = value

    for file in source.glob("*.safetensors"):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    change(source, UP, edit)
    if value == 0.0:
        assert verify(source, source)["zero_rows"] == {UP: 1}
        return
    with pytest.raises(VerificationError, match=f"holds NaN or infinity, as does .*: {UP}; nothing can be computed"):
        verify(source, source)


def test_a_row_whose_sum_is_zero_is_not_a_zero_row(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")

    def edit(tensor: torch.Tensor) -> None:
        tensor[:3] = 0.0
        tensor[1, :2] = torch.tensor([2.0, -2.0])
        tensor[2, 3] = -0.0

    change(source, UP, edit)
    assert verify(source, source)["zero_rows"] == {UP: 2}


def test_a_tensor_that_cannot_be_read_ends_it(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, stored = pair
    begun: list[str] = []
    read = StoredModel.read_into

    def failing(model: StoredModel, name: str, start: int, out: torch.Tensor) -> None:
        begun.append(name)
        if len(begun) == 3:
            raise CheckpointError("the disk has gone")
        if len(begun) > 3:
            time.sleep(0.2)  # the one who cancels the others may be slow to wake
        read(model, name, start, out)

    monkeypatch.setattr(StoredModel, "read_into", failing)
    with pytest.raises(CheckpointError, match="the disk has gone"):
        verify(source, stored, workers=1)
    assert len(set(begun)) < 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_of_a_cast_keep_its_bound(dtype: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = pair
    convert(source, tmp_path / "cast", "torch_dist", dtype=dtype)
    facts = verify(source, tmp_path / "cast", logits=True)["logits"]
    half_eps = torch.finfo(getattr(torch, dtype)).eps / 2
    for name in ("near", "far"):  # something differs, by what the dtype explains and not by an order less
        assert half_eps < facts[f"{name}_relative_diff"] < facts["bound"] == pytest.approx(30 * half_eps * 8**0.5)
    convert(tmp_path / "cast", tmp_path / "wide", "hf", dtype="float32")  # exact: the bound is that of fp32
    facts = verify(tmp_path / "cast", tmp_path / "wide", logits=True)["logits"]
    assert facts["far_relative_diff"] <= facts["bound"] == pytest.approx(30 * 2**-24 * 8**0.5)


def test_far_positions_end_where_the_model_ends(make_model, tmp_path: Path) -> None:
    for limit, expected in ((4, "0-3"), (12, "0-11"), (100, "0-11, 17-24, 42-49, 92-99")):
        source = make_model(tmp_path / str(limit), max_position_embeddings=limit)
        facts = compare_logits(open_checkpoint(source), open_checkpoint(source))
        assert facts["far_positions"] == expected and facts["near_positions"] == f"0-{min(limit, 64) - 1}"


def test_far_tokens_see_each_other_as_in_a_whole_text(make_model, tmp_path: Path) -> None:
    """Of a text whose tokens between attract no attention, the far ones alone are left."""
    forward = LlamaForward(make_model(tmp_path / "hf"))
    tokens = torch.arange(6)[None]
    hidden_ND = forward.embed(tokens[0])
    shifted = forward.body(hidden_ND, forward.layout(1, 6, position_N=torch.arange(6) + 900))
    assert torch.allclose(shifted, forward.hidden(tokens)[0], atol=1e-3)  # attention is relative
    apart = forward.body(hidden_ND, forward.layout(1, 6, position_N=torch.tensor([0, 1, 2, 903, 904, 905])))
    assert torch.equal(apart[:3], forward.hidden(tokens)[0, :3])
    assert (apart[3:] - shifted[3:]).abs().max() > 0.1


def test_a_cast_to_its_own_dtype_has_no_error_to_tell(make_model, tmp_path: Path) -> None:
    convert(make_model(tmp_path / "hf"), tmp_path / "same", "hf", dtype="float32")
    assert "Cast" not in (tmp_path / "same" / "README.md").read_text()
    assert verify(tmp_path / "hf", tmp_path / "same")["equal"]


def test_a_changed_manifest_is_not_converted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """It would make another model of the same weights, and a sound new manifest for it."""
    _, stored = pair
    path = stored / "manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 133', '"vocab_size": 100'))
    with pytest.raises(VerificationError, match="changed after it was written, so it proves nothing"):
        convert(stored, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
