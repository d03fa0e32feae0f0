"""Bytes that a rank of each pipeline stage needs: weights, gradients, optimizer, activations, logits.

An estimate from the shapes of what is kept, for fused attention, norm and activation functions.
Not counted: fragmentation, workspaces, communication buffers, the runtime itself. A layout whose
estimate stays under 80 % of the device's memory is a safe one (Fujii et al., arXiv:2411.06465).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_cpt.config.schema import BatchConfig, KernelConfig, LlamaShape, ParallelConfig
from megatron_cpt.planning.layout import Layout
from megatron_cpt.planning.parameters import rank_parameters

Precision = Literal["fp32", "bf16"]
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
LOGIT_BYTES = {"fp32": 4, "fp16": 2}
# Gradients are accumulated and reduced in fp32 at either precision; backward makes each in that of its weight.
GRADIENT_BYTES = 4
# Two moments, and under bf16 the fp32 copy that the optimizer updates; sharded over data parallelism.
OPTIMIZER_BYTES = {"fp32": 8, "bf16": 12}


@dataclass(frozen=True)
class RankMemory:
    """Estimated bytes on one rank of a pipeline stage."""

    pipeline_rank: int
    parameters: int  # a count, not bytes
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything that is counted."""
        state = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return state + self.activations_bytes + self.logits_bytes


def estimate_memory(
    shape: LlamaShape,
    layout: Layout,
    parallel: ParallelConfig,
    batch: BatchConfig,
    precision: Precision,
    kernels: KernelConfig,
) -> list[RankMemory]:
    """Estimate the memory of one rank of each pipeline stage.

    Args:
        shape: the architecture.
        layout: what `check_layout` returned for the same arguments.
        parallel: the layout's settings (sequence parallelism, recomputation).
        batch: sequence length and micro-batch size.
        precision: of weights and activations.
        kernels: in which precision the loss holds logits, and how many bytes of them at once.

    Returns:
        One entry for each pipeline rank, first stage first.
    """
    counts = rank_parameters(
        shape, layout.padded_vocab_size, layout.layers_per_stage, layout.pipeline_size, layout.tensor_size
    )
    tokens = batch.seq_length * batch.micro_batch_size
    logits = _logits_bytes(layout, kernels, precision, tokens, shape.hidden_size)
    return [
        RankMemory(
            pipeline_rank=rank,
            parameters=count,
            weights_bytes=count * WEIGHT_BYTES[precision],
            gradients_bytes=count * GRADIENT_BYTES + _largest_matrix(shape, layout, rank) * WEIGHT_BYTES[precision],
            optimizer_bytes=-(-count * OPTIMIZER_BYTES[precision] // layout.data_size),
            activations_bytes=_activation_elements(shape, layout, parallel, tokens, rank) * WEIGHT_BYTES[precision],
            logits_bytes=logits if rank == layout.pipeline_size - 1 else 0,
        )
        for rank, count in enumerate(counts)
    ]


def _logits_bytes(layout: Layout, kernels: KernelConfig, precision: Precision, tokens: int, hidden_size: int) -> int:
    """The logits held at once: all, or a budget of them; without tensor parallelism an fp32 sum comes to it."""
    of_weights = kernels.cross_entropy_logits == "model"
    element = WEIGHT_BYTES[precision] if of_weights else LOGIT_BYTES[kernels.cross_entropy_logits]
    logits = tokens * layout.padded_vocab_size // layout.tensor_size * element
    chunks_sum = GRADIENT_BYTES * layout.padded_vocab_size * hidden_size if layout.tensor_size == 1 else 0
    return min(logits, (kernels.cross_entropy_budget_mib << 20) + chunks_sum)


def _largest_matrix(shape: LlamaShape, layout: Layout, rank: int) -> int:
    """Elements of the stage's largest weight, whose gradient is whole before it is added to the fp32 ones."""
    has_table = rank in (0, layout.pipeline_size - 1)
    has_layers = any(layout.layers_per_stage[rank :: layout.pipeline_size])
    rows = max(2 * shape.ffn_hidden_size * has_layers, layout.padded_vocab_size * has_table)
    return rows * shape.hidden_size // layout.tensor_size


def _activation_elements(shape: LlamaShape, layout: Layout, parallel: ParallelConfig, tokens: int, rank: int) -> int:
    """Elements of activations held at the fullest moment: layers in flight times elements of a layer."""
    num_layers = sum(layout.layers_per_stage[rank :: layout.pipeline_size])
    in_flight = -(-num_layers * _chunks_in_flight(layout, rank) // layout.virtual_size)
    live = tokens * layer_elements_per_token(shape, layout.tensor_size, parallel.sequence_parallel)
    if parallel.recompute != "full":
        return in_flight * live
    inputs = tokens * shape.hidden_size // (layout.tensor_size if parallel.sequence_parallel else 1)
    return in_flight * inputs + (live if num_layers else 0)


def _chunks_in_flight(layout: Layout, rank: int) -> int:
    """Chunks of layers whose activations rank `rank` holds when its first backward begins.

    1F1B: PP - rank. Interleaved: 2 * (PP - rank - 1) + (VPP - 1) * PP warm-up chunks and one more.
    """
    pipeline, virtual = layout.pipeline_size, layout.virtual_size
    if virtual == 1:
        return min(pipeline - rank, layout.num_micro_batches)
    return min(2 * (pipeline - rank - 1) + (virtual - 1) * pipeline + 1, layout.num_micro_batches * virtual)


def layer_elements_per_token(shape: LlamaShape, tensor_size: int, sequence_parallel: bool) -> int:
    """Elements one layer keeps for its backward, per token, on one tensor-parallel rank.

    Cut by heads and FFN: q and the attention's output 2*H*K, k and v 2*G*K, gate and up 2*F, their
    product F. Input and output of both norms, 4*D, are cut only under sequence parallelism. The
    selective recomputation of attention changes nothing here: fused attention keeps no scores.
    """
    attention = 2 * (shape.num_attention_heads + shape.num_query_groups) * shape.head_dim
    cut = (attention + 3 * shape.ffn_hidden_size) // tensor_size
    return cut + 4 * shape.hidden_size // (tensor_size if sequence_parallel else 1)
