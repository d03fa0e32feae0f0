"""Output projection + cross-entropy over a sharded vocabulary: the public face of the op.

Shape letters: N tokens, D hidden size, L rows of the output matrix on this rank, V true vocabulary size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpt.kernels import dispatch
from megatron_cpt.kernels.cross_entropy import reference

OP = "linear_cross_entropy"

dispatch.register(OP, "torch", reference.linear_cross_entropy, dispatch.anywhere)


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_LD: Tensor,
    labels_N: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    budget_bytes: int = 1 << 30,
    implementation: str = "auto",
) -> Tensor:
    """Returns each token's cross-entropy in nats, without ever holding all logits.

    loss[n] = log(sum over v < V of exp(z[n, v])) - z[n, label[n]], with z = hidden @ weight.T over the true
    vocabulary: rows of the padded table from `vocab_size` on are not read and get a zero gradient. The logits
    are made in chunks of tokens, and made again in backward. Differentiable in `hidden_ND` and `weight_LD`; the
    gradient of one that does not require it is not computed.

    With a group, its ranks hold consecutive slices of the padded table, of any sizes (a slice may lie wholly
    in the padding), and all of them the same tokens. Two all-reduces of N and 2 N numbers join the slices.
    The gradient of `hidden_ND` is this rank's partial sum; the caller adds the ranks' parts.

    Precision: bf16 and fp16 products are accumulated by the matrix product in fp32 and rounded once to the
    dtype of the inputs; exponentials, sums and the loss are fp32; the gradient of the logits is rounded to the
    inputs' dtype before the two products that use it; the weight's gradient is summed over the chunks in fp32.
    With float64 inputs everything is float64.

    Args:
        hidden_ND: [N, D], floating.
        weight_LD: [L, D], dtype and device of `hidden_ND`: rows `vocab_start` to `vocab_start + L` of the padded
            table.
        labels_N: [N], integer, each in [0, vocab_size) or `ignore_index`. Checking them would wait for the
            device, so any other label gives NaN: in the loss, and in the gradients.
        vocab_start: row of the padded table with which `weight_LD` begins.
        vocab_size: V, the true size without padding.
        group: ranks that share the table; None or a group of one for a whole table.
        ignore_index: label of tokens whose loss and gradient are zero.
        budget_bytes: the most that a chunk of fp32 logits may take; a chunk has at least one token. With 16-bit
            inputs a chunk's 16-bit product, half as large, lives beside it for a moment.
        implementation: "auto", or the name of one.

    Returns:
        [N], fp32 (float64 for float64 inputs), nats, 0 where ignored; the same bits on every rank of the group.

    Raises:
        ValueError: shapes, dtypes or sizes do not belong together.
        KernelUnsupported: the named implementation cannot run here.

    Source: vocabulary-parallel loss: Shoeybi et al., "Megatron-LM" (2019), section 3.
    Deviates: padded rows are outside the softmax, and logits are recomputed rather than kept.
    """
    shapes = tuple(hidden_ND.shape), tuple(weight_LD.shape), tuple(labels_N.shape)
    if hidden_ND.dim() != 2 or weight_LD.dim() != 2 or shapes[0][1] != shapes[1][1] or shapes[2] != shapes[0][:1]:
        raise ValueError(f"{OP}: got hidden, weight, labels {shapes}; expected [N, D], [L, D] and [N]")
    if hidden_ND.dtype != weight_LD.dtype or not hidden_ND.is_floating_point():
        raise ValueError(f"{OP}: got hidden {hidden_ND.dtype}, weight {weight_LD.dtype}; expected one floating dtype")
    if labels_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{OP}: got labels {labels_N.dtype}; expected torch.int64 or torch.int32")
    if vocab_start < 0 or vocab_size < 1 or budget_bytes < 1:
        raise ValueError(
            f"{OP}: got vocab_start {vocab_start}, vocab_size {vocab_size}, budget_bytes {budget_bytes}; "
            "expected >= 0, >= 1, >= 1"
        )
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    if group is None and not vocab_start == 0 < vocab_size <= shapes[1][0]:
        raise ValueError(
            f"{OP}: got rows {vocab_start} to {vocab_start + shapes[1][0]} of a vocabulary of {vocab_size} and no "
            "group; expected the whole table, or the group of ranks that hold the rest"
        )
    function = dispatch.choose(OP, implementation, device=hidden_ND.device.type, dtype=hidden_ND.dtype)
    result: Tensor = function(
        hidden_ND, weight_LD, labels_N, vocab_start, vocab_size, group, ignore_index, budget_bytes
    )
    return result
