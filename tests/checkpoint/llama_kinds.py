"""Four tiny models, one for each way in which Llamas differ, with what transformers computes for them.

Sizes divide by TP 8 where groups do not matter, and 8 layers fill PP 4 x VPP 2. With heads of 8 the rotary
frequencies at theta 5e5 fall on both sides of the scaling and between.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB_SIZE = 133
SIZES = {"num_layers": 8, "hidden_size": 64, "ffn_hidden_size": 88, "head_dim": 8, "num_query_groups": 4}
KINDS: dict[str, dict[str, Any]] = {
    "llama-2": {**SIZES, "num_query_groups": 8, "rope_theta": 1e4, "max_position_embeddings": 4096},
    "llama-3.1": {**SIZES, "rope_scaling": {"factor": 8.0}, "max_position_embeddings": 131072},
    "llama-3.2": {
        **SIZES,
        "rope_scaling": {"factor": 32.0},
        "tied_embeddings": True,
        "max_position_embeddings": 131072,
    },
    "wide-heads": {**SIZES, "head_dim": 12},
}


def random_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(length))


def transformers_logits(folder: Path, tokens_BS: Tensor, **config: Any) -> Tensor:
    """fp32 logits of a Hugging Face folder; `config` changes what its config.json says."""
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **config)
    with torch.no_grad():
        return model(tokens_BS).logits


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    return float((got - expected).abs().max() / expected.abs().max())
