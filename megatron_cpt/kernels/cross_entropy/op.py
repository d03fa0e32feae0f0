"""Output projection + cross-entropy over a sharded vocabulary: the public face of the op.

How it is computed stands at the head of `paths`. Shape letters: N tokens, R of them on this rank (N without sequence
parallelism), D hidden size, V true vocabulary size, L rows of the output matrix on this rank, K statistics of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpt.kernels import dispatch
from megatron_cpt.kernels.cross_entropy import library, reference
from megatron_cpt.kernels.cross_entropy.arguments import check_arguments, integer
from megatron_cpt.kernels.cross_entropy.plan import Call

OP = "linear_cross_entropy"
BUDGET_BYTES = 1 << 30

Reduction = Literal["none", "mean", "sum"]


class LinearCrossEntropy(NamedTuple):
    """What the op returns. The loss alone is differentiable.

    Attributes:
        loss: [N], or a scalar with a reduction; fp32 (float64 for float64 inputs).
        nats_N: [N], plain cross-entropy in nats, without label smoothing, z-loss and token weights; 0 where ignored.
        log_sum_exp_N: [N], log of the sum of exp(logit) over the vocabulary; 0 where ignored.
        correct_N: [N] bool, whether no logit is greater than the label's; False where ignored.
    """

    loss: Tensor
    nats_N: Tensor
    log_sum_exp_N: Tensor
    correct_N: Tensor


@dataclass(frozen=True)
class Fused:
    """The implementation whose row functions are those of `rows`."""

    rows: str

    def __call__(
        self,
        hidden_RD: Tensor,
        weight_LD: Tensor,
        labels_N: Tensor,
        token_weights_N: Tensor | None,
        main_grad_LD: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, ...]:
        """Runs the operator; the arguments are checked."""
        text = call._replace(rows=self.rows, num_scored=-1).encode()
        return library.run(hidden_RD, weight_LD, labels_N, token_weights_N, main_grad_LD, text, call.num_scored)[:4]


def _reference(
    hidden_RD: Tensor, weight_LD: Tensor, labels_N: Tensor, token_weights_N: Tensor | None, _: None, call: Call
) -> tuple[Tensor, ...]:
    return reference.linear_cross_entropy(hidden_RD, weight_LD, labels_N, token_weights_N, call)


dispatch.register(OP, "triton", Fused("triton"), dispatch.triton_obstacle)
dispatch.register(OP, "torch", Fused("torch"), dispatch.anywhere)
dispatch.register(OP, "reference", _reference, reference.supports)


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_LD: Tensor,
    labels_N: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    ignore_index: int = -100,
    num_scored: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weights_N: Tensor | None = None,
    reduction: Reduction = "none",
    logits_dtype: torch.dtype | None = None,
    trainable_rows: int = 0,
    main_grad: Tensor | None = None,
    budget_bytes: int = BUDGET_BYTES,
    implementation: str = "auto",
) -> LinearCrossEntropy:
    """Computes the cross-entropy of each token, with logits in bounded memory (`budget_bytes`).

    With z = hidden @ weight.T over the true vocabulary (rows of the padded table from `vocab_size` on are not read
    and get a zero gradient), soft-capped to c * tanh(z / c) where c is given, lse = log(sum of exp(z)),
    e = `label_smoothing` and w the token's weight:

        nats = lse - z[label]
        loss = w * ((1 - e) * nats + e * (lse - mean of z over the vocabulary) + z_loss * lse ** 2)

    Differentiable in `hidden_ND` and `weight_LD`; nothing is computed for one that does not require a gradient.
    A second backward through a retained graph gives the same gradients at the price of one more product; gradients
    of gradients are not defined and raise.

    With a group, its ranks hold consecutive slices of the padded table, of any sizes (a slice may lie wholly in the
    padding), and all of them the same labels. One all-gather of three numbers a token (four with label smoothing)
    joins the slices. Without `sequence_parallel` the gradient of `hidden_ND` is this rank's partial sum; the caller
    adds the ranks' parts. With it each rank gives and receives its own tokens: they are gathered here, and their
    gradients are added and scattered here while the weight's is computed. Arguments that are refused on one rank alone
    leave the other ranks waiting in that exchange.

    Precision: products accumulate in fp32 (parts of a sum that cuBLAS splits are added as torch's
    `allow_bf16_reduced_precision_reduction` and its twin for fp16 say) and are rounded to `logits_dtype`;
    exponentials, sums and the loss are fp32; the gradient of the logits is rounded to the inputs' dtype before the
    two products that use it; the weight's gradient is summed over chunks in fp32, or in bf16 over up to four of
    them. With float64 inputs everything is float64. The same inputs give the same bits.

    Args:
        hidden_ND: [N, D], floating; [N / ranks, D], this rank's tokens in the order of the ranks, with
            `sequence_parallel`.
        weight_LD: [L, D], dtype and device of `hidden_ND`: rows `vocab_start` to `vocab_start + L` of the padded
            table.
        labels_N: [N], integer, each in [0, vocab_size) or `ignore_index`. Checking them would wait for the device,
            so any other label gives NaN: in the loss, and in the gradients.
        vocab_start: row of the padded table with which `weight_LD` begins.
        vocab_size: V, the true size without padding.
        group: ranks that share the table; None or a group of one for a whole table.
        sequence_parallel: whether the ranks of the group share the tokens too.
        ignore_index: label of tokens whose loss and gradient are zero.
        num_scored: number of labels that are not `ignore_index`, where the caller knows it: tokens that are ignored
            are then dropped before the products. On the CPU they are counted here. On another device counting
            would wait for it, so without this number all tokens are computed, and a hidden state that is no finite
            number makes the weight's gradient NaN even where its token is ignored. A wrong number gives NaN.
        label_smoothing: e, in [0, 1): the share of the target that is spread evenly over the V true rows.
        z_loss: factor of the squared log-sum-exp, >= 0.
        softcap: c, > 0; None for none.
        token_weights_N: [N], floating, not differentiated; None for ones.
        reduction: "none"; "sum" over the N tokens; "mean", the sum divided by the sum of the weights of the tokens
            that are not ignored (their number without weights), of this call's N tokens alone: nothing is reduced
            over other ranks. 0 where that divisor is 0.
        logits_dtype: in which logits are stored between their product and the exponentials: fp32, bf16 or fp16, at
            least as wide as the inputs' dtype; None for that dtype itself. fp32 and fp16 (up to 65504, NaN beyond)
            keep more of the bits of a bf16 product; fp32 takes twice the memory. See docs/kernels.md.
        trainable_rows: row of the padded table from which on rows train; those before it get a zero gradient, for
            which nothing is computed.
        main_grad: [L, D], fp32: the weight's gradient is added here, in backward, instead of to `weight.grad`. A
            weight with the attribute `grad_added_to_main_grad` has it set to True, as megatron-core's own layers do.
        budget_bytes: the most that a buffer of logits may take; at least one token's logits are held, on other
            devices than the CPU those of 1024. Logits that fit it as a whole are kept from forward to backward;
            otherwise they are made in chunks, without a reduction or with a group twice. Chunks need an fp32 sum of
            the weight's gradient [L, D] besides where they are more than four and the weight is in bf16, where it
            is in fp16, and with `main_grad` where they are made once; logits that take no more than a chunk and
            that sum are kept as well. What is kept lives outside autograd's saved tensors: hooks on those, and
            torch.utils.checkpoint around the op, neither see nor free it before backward.
        implementation: "auto", or the name of one.

    Returns:
        See `LinearCrossEntropy`. The same bits on every rank of the group.

    Raises:
        ValueError: shapes, dtypes or sizes do not belong together.
        KernelUnsupported: the named implementation cannot run here.

    Source: vocabulary-parallel loss: Shoeybi et al., "Megatron-LM" (2019), section 3; label smoothing: Szegedy et
        al., "Rethinking the Inception Architecture" (2016), section 7; z-loss: Chowdhery et al., "PaLM" (2022),
        section 5; soft-cap: Gemma Team, "Gemma 2" (2024), section 2.
    Deviates: padded rows are outside the softmax and the smoothing, and smoothing is over the whole vocabulary
        however it is sharded.
    """
    if group is not None and dist.get_world_size(group) == 1:
        group, sequence_parallel = None, False
    ranks = 1 if group is None else dist.get_world_size(group)
    trains = torch.is_grad_enabled()
    call = Call(
        rows="",
        vocab_start=integer("vocab_start", vocab_start),
        vocab_size=integer("vocab_size", vocab_size),
        group="" if group is None else group.group_name,
        group_size=ranks,
        sequence_parallel=sequence_parallel,
        ignore_index=integer("ignore_index", ignore_index),
        num_scored=_known_count(num_scored, labels_N, ignore_index),
        label_smoothing=float(label_smoothing),
        z_loss=float(z_loss),
        softcap=0.0 if softcap is None else float(softcap),
        reduction=reduction,
        logits_dtype=str(logits_dtype or hidden_ND.dtype).removeprefix("torch."),
        trainable_rows=integer("trainable_rows", trainable_rows),
        budget_bytes=integer("budget_bytes", budget_bytes),
        train_hidden=trains and hidden_ND.requires_grad,
        train_weight=trains and weight_LD.requires_grad,
        has_main_grad=main_grad is not None,
    )
    check_arguments(OP, hidden_ND, weight_LD, labels_N, token_weights_N, main_grad, softcap, call)
    function = dispatch.choose(
        OP,
        implementation,
        device=hidden_ND.device.type,
        dtype=hidden_ND.dtype,
        sharded=group is not None,
        has_main_grad=main_grad is not None,
    )
    results = function(hidden_ND, weight_LD, labels_N, token_weights_N, main_grad, call)
    return LinearCrossEntropy(*results)


def _known_count(num_scored: int | None, labels_N: Tensor, ignore_index: int) -> int:
    """Returns the number of labels that are not ignored, or -1 where it is not known."""
    if num_scored is None:
        counts = labels_N.device.type == "cpu" and not torch.compiler.is_compiling()
        return int((labels_N != ignore_index).sum()) if counts else -1
    count = integer("num_scored", num_scored)
    if not 0 <= count <= len(labels_N):
        raise ValueError(f"{OP}: got num_scored {count} for {len(labels_N)} tokens; expected 0 to {len(labels_N)}")
    return count
