"""Floating-point operations of training, by the formula every MFU of this project uses.

A matrix with n parameters costs 2n per token forward and 4n backward (gradient of its input and of
itself): 6n. Attention has no parameters; scores and their product with V cost 2 * 2 * S * H * K per
token and layer forward when every position sees all S positions, and half of that under the causal
mask; backward costs twice the forward.

    flops per token = 6 * (layers * matrix parameters per layer + D * V)  +  3 * layers * a * S * H * K
    a = 2 (causal: what has to be computed)   or   4 (non-causal: what many published figures count)

The head is included, the embedding look-up, norms and the softmax are not (well below 1 %). Work
done twice under recomputation is not counted, and neither are padded rows: this is MFU, not HFU.
Packed documents shorter than S need less attention than this says.

The two conventions differ by 2 to 12 % at common sizes, so a published number can be compared only
after asking which one it uses.
"""

from __future__ import annotations

from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.planning.parameters import matrix_parameters_per_layer


def attention_flops_per_token(shape: LlamaShape, seq_length: int, causal: bool = True) -> int:
    """Training FLOPs of all layers' attention scores and weighted sums, per token."""
    per_layer = (2 if causal else 4) * seq_length * shape.num_attention_heads * shape.head_dim
    return 3 * shape.num_layers * per_layer


def flops_per_token(shape: LlamaShape, vocab_size: int, seq_length: int, causal: bool = True) -> int:
    """Training FLOPs (forward and backward) per token, head included, nothing recomputed.

    Args:
        shape: the architecture.
        vocab_size: true vocabulary size.
        seq_length: positions of one sequence.
        causal: count attention under the causal mask (half), or in full.

    Returns:
        FLOPs per token; MFU = this * tokens per second / (devices * peak FLOPs per second).
    """
    matrices = shape.num_layers * matrix_parameters_per_layer(shape) + shape.hidden_size * vocab_size
    return 6 * matrices + attention_flops_per_token(shape, seq_length, causal)
