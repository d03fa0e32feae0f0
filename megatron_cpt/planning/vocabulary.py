"""What a vocabulary of V ids costs: rows of a rank, logits, parameters, FLOPs per byte of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron_cpt.config.padding import padded_vocab_size
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.planning.flops import flops_per_token
from megatron_cpt.planning.parameters import count_parameters

LOGIT_BYTES = 4  # fp32


def tensor_parallel_fit(
    vocab_size: int, tensor_sizes: Sequence[int], divisor: int, micro_batch_tokens: int
) -> list[dict[str, Any]]:
    """How a vocabulary lies over tensor-parallel ranks.

    Args:
        vocab_size: V, the true size.
        tensor_sizes: values of TP.
        divisor: the vocabulary is padded to a multiple of it (`vocab_divisor`), and of TP.
        micro_batch_tokens: N = B * S of one micro-batch.

    Returns:
        For each TP: whether it divides V (`divides`), `padded_vocab_size` P, `rows` L = P / TP of a rank, and
        `logits_bytes`: N * L * 4, the fp32 logits of one micro-batch on a rank if they are ever held whole.
    """
    fits = []
    for size in tensor_sizes:
        padded = padded_vocab_size(vocab_size, math.lcm(divisor, size))  # as `check_layout` pads
        rows = padded // size
        fits.append(
            {
                "tensor_model_parallel_size": size,
                "divides": vocab_size % size == 0,
                "padded_vocab_size": padded,
                "padded_rows": padded - vocab_size,
                "rows": rows,
                "logits_bytes": micro_batch_tokens * rows * LOGIT_BYTES,
            }
        )
    return fits


def vocabulary_costs(shape: LlamaShape, vocab_size: int, seq_length: int) -> dict[str, Any]:
    """What the vocabulary adds to a model of some shape.

    Returns:
        `hidden_size`, `parameters` of embedding and head, their share of the model's (`parameter_share`),
        `flops_per_token` of training, head included (causal attention over S = `seq_length`).
    """
    count = count_parameters(shape, vocab_size)
    tables = count.embedding + count.head
    return {
        "hidden_size": shape.hidden_size,
        "parameters": tables,
        "parameter_share": tables / count.total,
        "flops_per_token": flops_per_token(shape, vocab_size, seq_length),
    }
