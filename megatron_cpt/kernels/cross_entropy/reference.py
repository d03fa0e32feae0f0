"""Output projection + cross-entropy over a sharded vocabulary, in plain torch.

Shape letters: N tokens (T of them in a chunk), D hidden size, L rows of the output matrix on this rank,
M <= L of them inside the true vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_LD: Tensor,
    labels_N: Tensor,
    vocab_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    ignore_index: int,
    budget_bytes: int,
) -> Tensor:
    """Returns the loss of each token [N] in nats; see `op.linear_cross_entropy`."""
    num_true = min(max(vocab_size - vocab_start, 0), weight_LD.shape[0])
    element_bytes = torch.promote_types(hidden_ND.dtype, torch.float32).itemsize
    chunk = max(budget_bytes // (element_bytes * max(weight_LD.shape[0], 1)), 1)
    ignored_N = labels_N == ignore_index
    invalid_N = ((labels_N < 0) | (labels_N >= vocab_size)) & ~ignored_N
    columns_N = torch.where(ignored_N, -1, labels_N.long() - vocab_start)
    result: Tensor = _LinearCrossEntropy.apply(
        hidden_ND, weight_LD, columns_N, ignored_N, invalid_N, num_true, chunk, group
    )
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the inputs and one number a token; a chunk's logits live inside one call of a function below.

    `columns_N` is the label's row in this rank's slice (outside [0, M) where it is not here), M is `num_true`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_LD: Tensor,
        columns_N: Tensor,
        ignored_N: Tensor,
        invalid_N: Tensor,
        num_true: int,
        chunk: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        weight_MD = weight_LD[:num_true]
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        peak_N = hidden_ND.new_full(columns_N.shape, -torch.inf, dtype=wide)
        # Row 0: sum of exp(logit - peak); row 1: logit of the label, 0 where another rank holds it.
        packed_2N = torch.zeros(2, *columns_N.shape, dtype=wide, device=hidden_ND.device)
        if num_true > 0:
            for part in _chunks(len(columns_N), chunk):
                _chunk_statistics(hidden_ND[part], weight_MD, columns_N[part], peak_N[part], packed_2N[:, part])
        if group is not None:
            # Once for all tokens: ranks with slices of different sizes have different chunks.
            local_N = peak_N.clone()
            dist.all_reduce(peak_N, dist.ReduceOp.MAX, group=group)
            packed_2N[0] *= (local_N - peak_N).exp_()
            dist.all_reduce(packed_2N, group=group)
        lse_N = packed_2N[0].log().add_(peak_N).masked_fill_(invalid_N, torch.nan)
        ctx.save_for_backward(hidden_ND, weight_LD, columns_N, ignored_N, lse_N)
        ctx.num_true, ctx.chunk = num_true, chunk
        return (lse_N - packed_2N[1]).masked_fill_(ignored_N, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_LD, columns_N, ignored_N, lse_N = ctx.saved_tensors
        weight_MD = weight_LD[: ctx.num_true]
        grad_N = grad_N.to(lse_N.dtype).masked_fill(ignored_N, 0.0)
        grad_hidden = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        total_LD = torch.zeros_like(weight_LD, dtype=lse_N.dtype) if ctx.needs_input_grad[1] else None
        if ctx.num_true > 0:
            for part in _chunks(len(columns_N), ctx.chunk):
                hidden_TD = hidden_ND[part]
                grad_TM = _chunk_gradient(hidden_TD, weight_MD, columns_N[part], lse_N[part], grad_N[part])
                if grad_hidden is not None:
                    torch.mm(grad_TM, weight_MD, out=grad_hidden[part])
                if total_LD is not None:
                    _add_product(total_LD[: ctx.num_true], grad_TM, hidden_TD)
                del grad_TM  # before the next chunk's logits are made
        grad_weight = None if total_LD is None else total_LD.to(weight_LD.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _chunks(num_tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, num_tokens)) for start in range(0, num_tokens, chunk))


def _logits(hidden_TD: Tensor, weight_MD: Tensor) -> Tensor:
    product_TM = hidden_TD @ weight_MD.T
    return product_TM.to(torch.promote_types(product_TM.dtype, torch.float32))


def _chunk_statistics(
    hidden_TD: Tensor, weight_MD: Tensor, columns_T: Tensor, peak_T: Tensor, packed_2T: Tensor
) -> None:
    """Writes the chunk's greatest logits, sums of exponentials and label logits to the last two arguments."""
    logits_TM = _logits(hidden_TD, weight_MD)
    peak_T.copy_(logits_TM.amax(-1))
    index_T1, present_T = _position(columns_T, weight_MD)
    packed_2T[1] = logits_TM.gather(1, index_T1).squeeze(1).masked_fill_(~present_T, 0.0)
    packed_2T[0] = logits_TM.sub_(peak_T.unsqueeze(1)).exp_().sum(-1)


def _chunk_gradient(hidden_TD: Tensor, weight_MD: Tensor, columns_T: Tensor, lse_T: Tensor, grad_T: Tensor) -> Tensor:
    """Returns grad * (softmax - one-hot of the label) [T, M] in the dtype of the hidden states."""
    probabilities_TM = _logits(hidden_TD, weight_MD).sub_(lse_T.unsqueeze(1)).exp_()
    index_T1, present_T = _position(columns_T, weight_MD)
    probabilities_TM.scatter_add_(1, index_T1, -present_T.to(lse_T.dtype).unsqueeze(1))
    return probabilities_TM.mul_(grad_T.unsqueeze(1)).to(hidden_TD.dtype)


def _position(columns_T: Tensor, weight_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a valid column for each label [T, 1], and whether the label is really in it [T]."""
    last = weight_MD.shape[0] - 1
    return columns_T.clamp(0, last).unsqueeze(1), (columns_T >= 0) & (columns_T <= last)


def _add_product(total_MD: Tensor, grad_TM: Tensor, hidden_TD: Tensor) -> None:
    """Adds grad.T @ hidden to the sum."""
    if total_MD.dtype == grad_TM.dtype:
        total_MD.addmm_(grad_TM.T, hidden_TD)
    else:
        total_MD.add_(grad_TM.T @ hidden_TD)
