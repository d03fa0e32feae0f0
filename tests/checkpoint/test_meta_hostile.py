"""Meta's checkpoints that are damaged, hostile or of another model, and models that have no such form."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpt.checkpoint import convert, open_checkpoint
from megatron_cpt.errors import CheckpointError, InputError
from tests.checkpoint import meta_reference as reference
from tests.checkpoint.meta_reference import PARAMS, SIZES, VOCAB_SIZE, change


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return reference.small(tmp_path / "meta")


class Malicious:
    """Makes a file where it is unpickled as pickle would."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._folder / "ran"),)


def rename(name: str) -> Any:
    return lambda held: held.update({name: held.pop("layers.1.feed_forward.w2.weight")})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: torch.save({"norm.weight": Malicious(f)}, f / "consolidated.00.pth"), "expected a tensor"),
        (lambda f: torch.save(Malicious(f), f / "consolidated.00.pth"), "expected a dict of tensors"),
        (lambda f: torch.save([torch.ones(3)], f / "consolidated.00.pth"), "holds list"),
        (lambda f: (f / "consolidated.00.pth").write_bytes(b"PK" * 90), "damaged or unsafe"),
        (lambda f: (f / "consolidated.00.pth").unlink(), "without a gap"),
        (lambda f: (f / "consolidated.01.pth").unlink(), "files are missing"),
        (lambda f: shutil.copy(f / "consolidated.01.pth", f / "consolidated.02.pth"), "files are missing"),
        (lambda f: (f / "consolidated.01.pth").rename(f / "consolidated.1.pth"), "without a gap"),
        (lambda f: (f / "params.json").unlink(), "params.json is missing"),
        (lambda f: (f / "fp8_scales_0.pt").touch(), "quantised"),
        (lambda f: change(f, 1, rename("layers.1.feed_forward.w4.weight")), "'layers.1.feed_forward.w2.weight' is mis"),
        (lambda f: change(f, 0, lambda held: held.update(more=torch.ones(2))), "'more' is not one of a plain Llama"),
        (lambda f: change(f, 1, lambda held: held.update({"layers.7.x": torch.ones(2)})), "holds 3 layers"),
        (lambda f: change(f, 1, lambda held: held.update({"norm.weight": torch.ones(32)})), r"\(32,\).* expected \(64"),
        (lambda f: change(f, 1, lambda held: held.update({"norm.weight": torch.ones(64).half()})), "torch.float16"),
        (
            lambda f: change(f, 1, lambda held: held.update({"output.weight": torch.ones(64, 68).T})),
            "stored with strides",
        ),
    ],
)
def test_damaged_files_are_refused(damage: Any, message: str, model: Path) -> None:
    damage(model)
    with pytest.raises(InputError, match=message):
        open_checkpoint(model)
    assert not (model / "ran").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_chunk_size": 448}, "'vision_chunk_size'"),
        ({"quantization_args": {}}, "quantised ones"),
        ({"vocab_size": 64}, "hold a vocabulary of 136, params.json says 64"),
        ({"multiple_of": 64}, "hold an FFN of 176, params.json leads to 192"),
        ({"ffn_dim_multiplier": float("nan")}, "expected a number"),
        ({"n_layers": 10**9}, "holds 2 layers"),
        ({"n_kv_heads": 8}, r"wk.weight is \(16, 64\).*expected \(32, 64\)"),
        ({"n_kv_heads": 3}, "expected a multiple"),
        ({"n_heads": 5}, "expected a multiple"),
        ({"dim": 128, "ffn_dim_multiplier": 0.5}, r"tok_embeddings.weight is \(68, 64\).*expected \(136, 64\)"),
        ({"dim": "64"}, "got dim 64, expected an integer"),
        ({"norm_eps": None}, "got norm_eps None"),
        ({"use_scaled_rope": "no"}, "true or false"),
    ],
)
def test_other_parameters_are_refused(fields: dict[str, Any], message: str, model: Path) -> None:
    (model / "params.json").write_text(json.dumps({**PARAMS, **fields}))
    with pytest.raises(InputError, match=message):
        open_checkpoint(model)


def test_files_of_two_models_are_noticed(model: Path, tmp_path: Path) -> None:
    change(model, 1, lambda held: held["layers.1.ffn_norm.weight"].mul_(1.5))
    with pytest.raises(CheckpointError, match="consolidated.01.pth differs .* two models"):
        convert(model, tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("changes", "count", "message"),
    [
        ({"head_dim": 12}, 1, "head_dim 12 with 8 heads"),
        ({"rope_scaling": {"factor": 16.0}}, 1, "factor 8 or 32"),
        ({"num_query_groups": 2}, 4, "2 key-value heads cannot lie in 4"),
        ({}, 3, "cannot lie in 3 files"),
        ({"ffn_hidden_size": 90}, 4, "w1.weight: 90 rows cannot lie in 4 files"),
        ({"vocab_size": 133}, 2, "output.weight: 133 rows cannot lie in 2"),
        ({}, 0, "cannot lie in 0 files"),
    ],
)
def test_what_metas_form_cannot_hold_is_refused(changes, count, message, make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", **{"vocab_size": VOCAB_SIZE, **SIZES, **changes})
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "meta", "meta", tp=count)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
