"""Exact parameter counts of a Llama: the whole model, and what one rank of a layout holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cpt.config.schema import LlamaShape


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a whole model. `head` is 0 where the head is tied to the embedding."""

    embedding: int
    layer_matrices: int  # of all layers; cut over the tensor-parallel ranks
    layer_norms: int  # of all layers; held by every tensor-parallel rank
    final_norm: int
    head: int

    @property
    def total(self) -> int:
        """All parameters, each counted once."""
        return self.embedding + self.layer_matrices + self.layer_norms + self.final_norm + self.head


def matrix_parameters_per_layer(shape: LlamaShape) -> int:
    """Parameters of one layer's matrices: q and proj 2*D*H*K, k and v 2*D*G*K, gate, up and down 3*D*F."""
    heads_and_groups = shape.num_attention_heads + shape.num_query_groups
    attention = 2 * shape.hidden_size * heads_and_groups * shape.head_dim
    return attention + 3 * shape.hidden_size * shape.ffn_hidden_size


def count_parameters(shape: LlamaShape, vocab_size: int) -> ParameterCount:
    """Count a model's parameters; give the padded size to count the padded rows too."""
    table = vocab_size * shape.hidden_size
    return ParameterCount(
        embedding=table,
        layer_matrices=shape.num_layers * matrix_parameters_per_layer(shape),
        layer_norms=shape.num_layers * 2 * shape.hidden_size,
        final_norm=shape.hidden_size,
        head=0 if shape.tied_embeddings else table,
    )


def rank_parameters(
    shape: LlamaShape, padded_vocab: int, layers_per_stage: Sequence[int], num_ranks: int, tensor_size: int
) -> list[int]:
    """Parameters that one rank of each pipeline stage holds, padded rows included.

    Args:
        shape: the architecture.
        padded_vocab: rows of embedding and head.
        layers_per_stage: layers of each stage in pipeline order; with virtual stages chunk 0 of
            every rank first, so entry i lives on pipeline rank i % num_ranks.
        num_ranks: pipeline-parallel size.
        tensor_size: tensor-parallel size; matrices are cut by it, norms are not.

    Returns:
        One count for each pipeline rank. A tied head that is not on the embedding's rank is a copy
        and is counted there too.
    """
    layer = matrix_parameters_per_layer(shape) // tensor_size + 2 * shape.hidden_size
    table = padded_vocab * shape.hidden_size // tensor_size
    counts = [sum(layers_per_stage[rank::num_ranks]) * layer for rank in range(num_ranks)]
    counts[0] += table
    counts[-1] += shape.hidden_size
    if not shape.tied_embeddings or num_ranks > 1:
        counts[-1] += table
    return counts
