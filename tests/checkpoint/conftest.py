from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_cpt.checkpoint import hf_config, hf_shapes, write_hf
from megatron_cpt.config.schema import LlamaShape

ModelMaker = Callable[..., Path]


def tiny_shape(**changes: object) -> LlamaShape:
    """Grouped queries, and heads whose sizes do not add up to the hidden size."""
    sizes = {
        "num_layers": 3,
        "hidden_size": 32,
        "ffn_hidden_size": 88,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "head_dim": 12,
        "rope_theta": 500000.0,
        "max_position_embeddings": 16384,
    }
    return LlamaShape.model_validate({**sizes, **changes})


def write_model(
    folder: Path, vocab_size: int = 133, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object
) -> Path:
    """Write a random Llama of the tiny shape with `changes` as an HF folder, and return the folder."""
    shape = tiny_shape(**changes)
    generator = torch.Generator().manual_seed(seed)

    def draw(size: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(size, generator=generator) * 0.15
        return (noise + 1 if len(size) == 1 else noise).to(dtype)

    entries = [(name, size, dtype, lambda size=size: draw(size)) for name, size in hf_shapes(shape, vocab_size).items()]
    config = hf_config(shape, vocab_size, str(dtype).removeprefix("torch."), 1, 2)
    write_hf(folder, entries, config, max_shard_bytes=60_000)
    return folder


@pytest.fixture(scope="session")
def make_model() -> ModelMaker:
    """Writes a random Llama as an HF folder: make_model(folder, shape changes, vocab_size=, dtype=)."""
    return write_model
