"""A Llama with random weights, as an HF folder: where a base model trained here begins."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from megatron_cpt.checkpoint.hf_config import hf_config
from megatron_cpt.checkpoint.hf_writer import write_hf
from megatron_cpt.checkpoint.llama import hf_shapes
from megatron_cpt.config.manifest import sha256_bytes
from megatron_cpt.config.schema import LlamaShape

STANDARD_DEVIATION = 0.02


def write_random_hf(
    shape: LlamaShape, vocab_size: int, seed: int, folder: str | Path, bos: int | None, eos: int | None
) -> None:
    """Write an fp32 Llama with random weights to a new HF folder.

    Matrices are drawn from N(0, 0.02), those that write to the residual stream from
    N(0, 0.02 / sqrt(2 layers)) (GPT-2's rule, as Megatron uses it); norms are one. Each tensor has a
    generator of its own, keyed by its name, so the numbers depend on nothing else.
    """

    def draw(name: str, size: tuple[int, ...]) -> Tensor:
        if len(size) == 1:
            return torch.ones(size)
        key = int(sha256_bytes(f"{seed}/{name}".encode())[:15], 16)
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = STANDARD_DEVIATION / math.sqrt(2 * shape.num_layers) if residual else STANDARD_DEVIATION
        return torch.empty(size).normal_(0.0, deviation, generator=torch.Generator().manual_seed(key))

    entries = [
        (name, size, torch.float32, lambda name=name, size=size: draw(name, size))
        for name, size in hf_shapes(shape, vocab_size).items()
    ]
    write_hf(folder, entries, hf_config(shape, vocab_size, "float32", bos, eos))
