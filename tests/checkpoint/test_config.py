"""config.json in all its forms: read as what it means, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.checkpoint import hf_config, read_shape
from megatron_cpt.config.schema import LlamaShape, RopeScaling
from megatron_cpt.errors import CheckpointError

LLAMA2: dict[str, Any] = {  # as the first exports of Llama 2 were: nothing that was not needed
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(folder: Path, **changes: Any) -> tuple[LlamaShape, int]:
    config = {key: value for key, value in {**LLAMA2, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    return read_shape(folder)


def test_defaults_of_an_old_config(tmp_path: Path) -> None:
    shape, vocab_size = read(tmp_path)
    assert vocab_size == 32000
    assert (shape.num_query_groups, shape.head_dim, shape.rope_theta) == (32, 128, 10000.0)
    assert shape.rope_scaling is None and not shape.tied_embeddings
    assert read(tmp_path, rms_norm_eps="absent")[0].norm_epsilon == 1e-6


@pytest.mark.parametrize(
    "form",
    [
        {"rope_theta": 500000.0, "rope_scaling": SCALING},
        {"rope_parameters": {"rope_theta": 500000.0, **SCALING}},
        {"rope_theta": 500000.0, "rope_scaling": SCALING, "rope_parameters": {"rope_theta": 500000.0, **SCALING}},
        {
            "rope_theta": 500000,
            "rope_scaling": {**{k: v for k, v in SCALING.items() if k != "rope_type"}, "type": "llama3"},
        },
    ],
)
def test_rope_of_version_4_and_5(form: dict[str, Any], tmp_path: Path) -> None:
    shape, _ = read(tmp_path, **form)
    assert shape.rope_theta == 500000.0
    assert shape.rope_scaling == RopeScaling(factor=8.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "expected 'llama'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope type None"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {**SCALING, "low_freq_factor": 2.0}}, "megatron-core has 1, 4 and 8192 built in"),
        ({"rope_scaling": {**SCALING, "high_freq_factor": 8.0}}, "megatron-core has 1, 4 and 8192 built in"),
        ({"rope_scaling": {**SCALING, "original_max_position_embeddings": 4096}}, "megatron-core has"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "contradict"),
        ({"rope_scaling": SCALING, "rope_parameters": {"rope_type": "default"}}, "contradict"),
        ({"rope_scaling": [8]}, "must be objects"),
        ({"num_attention_heads": 0}, "not what a Llama's config holds"),
        ({"num_key_value_heads": 5}, "32 attention heads over 5"),
        ({"head_dim": 63}, "expected an even number"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"vocab_size": "absent"}, "vocab_size is missing"),
        ({"vocab_size": 0}, "positive integer"),
    ],
)
def test_what_is_not_a_plain_llama_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, **changes)


def test_config_is_written_and_read_back(tmp_path: Path) -> None:
    shape = LlamaShape(
        num_layers=2,
        hidden_size=40,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=16,
        norm_epsilon=3e-6,
        rope_theta=123456.0,
        rope_scaling=RopeScaling(factor=32.0),
        tied_embeddings=True,
        max_position_embeddings=131072,
    )
    config = hf_config(shape, 777, "bfloat16", None, [3, 4])
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_shape(tmp_path) == (shape, 777)
    for form in ("rope_scaling", "rope_parameters"):  # each version reads its own form
        (tmp_path / "config.json").write_text(json.dumps({**config, form: None}))
        assert read_shape(tmp_path) == (shape, 777)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither config.json"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="got model_type 'list'"):
        read_shape(tmp_path)
