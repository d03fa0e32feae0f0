"""A job whose ops are all Triton's, interpreted, in more than one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cpt.config.schema import LlamaShape
from tests.training.conftest import make_tiny

# As little as shows every op, forward and backward, on both sides of each cut.
SHAPE = LlamaShape(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=4,
    max_position_embeddings=16,
)
OPS = ("attention", "cross_entropy", "norm", "rope", "swiglu")


def test_layouts_compute_the_numbers_of_torchs_ops(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    tiny = make_tiny(tmp_path, 120, SHAPE)
    job = {
        "train_steps": 1,
        "batch": {"seq_length": 16, "micro_batch_size": 1, "global_batch_size": 1},
        "optimizer": {"learning_rate": 3e-3, "min_learning_rate": 3e-4, "warmup_steps": 0},
        "data": {"train": [{"prefix": str(tmp_path / "a"), "language": "a"}]},
    }
    layouts = {
        "TP2-SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "PP2": {"pipeline_model_parallel_size": 2},
    }
    kernels = dict.fromkeys(OPS, "triton")
    [wanted] = tiny.train_many({"torch": job | {"kernels": dict.fromkeys(OPS, "torch")}}, 1)["torch"]
    found = tiny.train_many({name: job | {"kernels": kernels, "parallel": cut} for name, cut in layouts.items()}, 2)
    for [got] in found.values():
        assert got["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-6)
