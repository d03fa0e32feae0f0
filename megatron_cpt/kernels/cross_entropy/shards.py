"""The op in two halves, for callers that join the shards of the vocabulary themselves.

A shard gives its statistics; `join_statistics` makes one set of those of all shards, wherever and however they were
brought together; the loss follows from it, and a shard makes its gradients of the joined log-sum-exp:

    greatest_N, sum_N, target_N = join_statistics(torch.stack(statistics_of_shards))
    log_sum_exp_N = greatest_N + sum_N.log()
    nats_N = log_sum_exp_N - target_N

Neither half is differentiable by itself. Shape letters: N tokens, D hidden size, L rows of the output matrix in
the shard, K statistics of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_cpt.kernels import dispatch
from megatron_cpt.kernels.cross_entropy import paths
from megatron_cpt.kernels.cross_entropy.arguments import check_arguments, integer
from megatron_cpt.kernels.cross_entropy.chunks import Logits, plan_of, shard_statistics, token_rows, wide_dtype
from megatron_cpt.kernels.cross_entropy.op import BUDGET_BYTES, OP
from megatron_cpt.kernels.cross_entropy.plan import Call

# A shard does not know the others, so nothing is ignored here: a caller gives such a token no gradient.
_NO_LABEL = -(1 << 62)


@torch.no_grad()
def linear_cross_entropy_statistics(
    hidden_ND: Tensor,
    weight_LD: Tensor,
    labels_N: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    with_sum: bool = False,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    budget_bytes: int = BUDGET_BYTES,
    implementation: str = "auto",
) -> Tensor:
    """Returns what the loss needs to know of one shard's logits.

    Args:
        hidden_ND: as `linear_cross_entropy` takes it, [N, D].
        weight_LD: [L, D], rows `vocab_start` to `vocab_start + L` of the padded table.
        labels_N: [N], integer; a label that is not in the shard, or in none, has the target 0.
        vocab_start: row of the padded table with which the shard begins.
        vocab_size: V, the true size without padding.
        with_sum: whether the sum of the logits is wanted, which label smoothing needs.
        softcap: as `linear_cross_entropy` takes it.
        logits_dtype: likewise.
        budget_bytes: likewise.
        implementation: "auto", "triton" or "torch".

    Returns:
        [K, N] in fp32 (float64 for float64 inputs), K = 3 or with the sum 4: the greatest logit, the sum of
        exp(logit - greatest), the label's logit, the sum of the logits. A shard that lies wholly in the padding
        gives -inf, 0, 0, 0.

    Raises:
        ValueError: shapes, dtypes or sizes do not belong together.
        KernelUnsupported: the named implementation cannot run here.
    """
    call = _call(hidden_ND, vocab_start, vocab_size, softcap, logits_dtype, budget_bytes)
    call = call._replace(label_smoothing=0.5 if with_sum else 0.0)  # any but 0 has the sum made
    call = _checked(hidden_ND, weight_LD, labels_N, None, softcap, implementation, call)
    rows = token_rows(hidden_ND, labels_N, None, labels_N, call)
    return shard_statistics(rows, Logits(call, plan_of(call, len(labels_N), weight_LD), weight_LD))


@torch.no_grad()
def linear_cross_entropy_gradient(
    hidden_ND: Tensor,
    weight_LD: Tensor,
    labels_N: Tensor,
    log_sum_exp_N: Tensor,
    grad_N: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    of_hidden: bool = True,
    of_weight: bool = True,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    trainable_rows: int = 0,
    main_grad: Tensor | None = None,
    budget_bytes: int = BUDGET_BYTES,
    implementation: str = "auto",
) -> tuple[Tensor | None, Tensor | None]:
    """Returns one shard's gradients of sum over n of grad[n] * loss[n].

    Args:
        hidden_ND: as `linear_cross_entropy` takes it, [N, D].
        weight_LD: [L, D], rows `vocab_start` to `vocab_start + L` of the padded table.
        labels_N: [N], integer.
        log_sum_exp_N: [N], over the whole vocabulary; fp32, float64 for float64 inputs.
        grad_N: [N], gradient of each token's loss: 0 for one that is ignored, weights included.
        vocab_start: row of the padded table with which the shard begins.
        vocab_size: V, the true size without padding.
        of_hidden: whether the first gradient is wanted.
        of_weight: whether the second is.
        label_smoothing: as `linear_cross_entropy` takes it.
        z_loss: likewise.
        softcap: likewise.
        logits_dtype: likewise.
        trainable_rows: likewise.
        main_grad: [L, D], fp32: the weight's gradient is added here instead of being returned.
        budget_bytes: likewise.
        implementation: "auto", "triton" or "torch".

    Returns:
        The gradient of `hidden_ND` that this shard brings, which the caller adds over the shards, and that of
        `weight_LD`; None for what is not wanted or was added to `main_grad`.

    Raises:
        ValueError: shapes, dtypes or sizes do not belong together.
        KernelUnsupported: the named implementation cannot run here.
    """
    call = _call(hidden_ND, vocab_start, vocab_size, softcap, logits_dtype, budget_bytes)._replace(
        label_smoothing=float(label_smoothing),
        z_loss=float(z_loss),
        trainable_rows=integer("trainable_rows", trainable_rows),
        train_hidden=of_hidden,
        train_weight=of_weight,
        has_main_grad=main_grad is not None,
    )
    call = _checked(hidden_ND, weight_LD, labels_N, main_grad, softcap, implementation, call)
    wide = wide_dtype(hidden_ND)
    if log_sum_exp_N.shape != labels_N.shape or grad_N.shape != labels_N.shape or log_sum_exp_N.dtype != wide:
        raise ValueError(
            f"{OP}: got log_sum_exp {tuple(log_sum_exp_N.shape)} in {log_sum_exp_N.dtype} and grad "
            f"{tuple(grad_N.shape)}; expected {tuple(labels_N.shape)} of both, the former in {wide}"
        )
    nothing = hidden_ND.new_empty(0)
    kept = paths.Results(
        *(nothing, nothing, log_sum_exp_N.contiguous(), nothing, labels_N, nothing, nothing, nothing, nothing, nothing)
    )
    grad_ND, grad_LD = paths.backward(grad_N, hidden_ND, weight_LD, labels_N, None, main_grad, kept, call)
    return grad_ND if of_hidden else None, grad_LD if of_weight and main_grad is None else None


def _call(
    hidden_ND: Tensor,
    vocab_start: int,
    vocab_size: int,
    softcap: float | None,
    logits_dtype: torch.dtype | None,
    budget_bytes: int,
) -> Call:
    return Call(
        rows="",
        vocab_start=integer("vocab_start", vocab_start),
        vocab_size=integer("vocab_size", vocab_size),
        group="",
        group_size=1,
        sequence_parallel=False,
        ignore_index=_NO_LABEL,
        num_scored=-1,
        label_smoothing=0.0,
        z_loss=0.0,
        softcap=0.0 if softcap is None else float(softcap),
        reduction="none",
        logits_dtype=str(logits_dtype or hidden_ND.dtype).removeprefix("torch."),
        trainable_rows=0,
        budget_bytes=integer("budget_bytes", budget_bytes),
        train_hidden=False,
        train_weight=False,
        has_main_grad=False,
    )


def _checked(
    hidden_ND: Tensor,
    weight_LD: Tensor,
    labels_N: Tensor,
    main_grad_LD: Tensor | None,
    softcap: float | None,
    implementation: str,
    call: Call,
) -> Call:
    """Returns the call with the row functions of the implementation that runs."""
    check_arguments(OP, hidden_ND, weight_LD, labels_N, None, main_grad_LD, softcap, call, is_shard=True)
    chosen: Any = dispatch.choose(OP, implementation, device=hidden_ND.device.type, dtype=hidden_ND.dtype, sharded=True)
    return call._replace(rows=chosen.rows)
