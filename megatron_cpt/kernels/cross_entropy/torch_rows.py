"""What is done to a chunk's logits between its products, in plain torch: the twin of `triton_rows`.

Both work in place on rows that a product has written, and both hold the same numbers. Here a few rows at a time are
widened and worked on: they stay in a processor's cache, and no second copy of the logits exists.

Shape letters: T rows of a chunk, R of them at a time, M columns, K numbers a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Of widened logits worked on at a time: what a processor's cache holds; elsewhere enough for a launch to be worth it.
_BLOCK_BYTES = 8 << 20
_DEVICE_BLOCK_BYTES = 256 << 20


def statistics(logits_TM: Tensor, columns_T: Tensor, out_KT: Tensor, softcap: float) -> None:
    """Writes what the loss needs of each row.

    Args:
        logits_TM: [T, M], floating, unit stride along M; left as it is.
        columns_T: [T] int64, the label's column; outside [0, M) where another shard holds it, or none.
        out_KT: [K, T], fp32 or float64, K 3 or 4. Row 0: the greatest logit. Row 1: sum of exp(logit - greatest).
            Row 2: the label's logit, 0 where it is not here. Row 3: sum of the logits.
        softcap: c > 0 has every logit z replaced by c * tanh(z / c); 0 leaves it.
    """
    for rows in _blocks(logits_TM, out_KT.dtype):
        wide_RM = _widened(logits_TM[rows], out_KT.dtype, softcap)
        peak_R = wide_RM.amax(-1)
        index_R1, present_R = _position(columns_T[rows], wide_RM.shape[1])
        out_KT[0, rows] = peak_R
        out_KT[1, rows] = (wide_RM - peak_R.unsqueeze(1)).exp_().sum(-1)
        out_KT[2, rows] = wide_RM.gather(1, index_R1).squeeze(1).masked_fill_(~present_R, 0.0)
        if len(out_KT) == 4:
            out_KT[3, rows] = wide_RM.sum(-1)


def gradient(
    logits_TM: Tensor,
    out_TM: Tensor,
    columns_T: Tensor,
    lse_T: Tensor,
    grad_T: Tensor,
    *,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """Writes the gradient of the products' results.

    With p = exp(logit - lse), e = label_smoothing and V = vocab_size, it is grad times
    p * (1 + 2 * z_loss * lse) - (1 - e) * [label's column] - e / V, times the derivative of the soft-cap.

    Args:
        logits_TM: [T, M], floating, as `statistics` takes it.
        out_TM: [T, M], receives the gradient. It may begin where `logits_TM` begins, row by row: a row is read
            before it is written.
        columns_T: [T] int64, as `statistics` takes it.
        lse_T: [T], fp32 or float64: log-sum-exp over the whole vocabulary.
        grad_T: [T], dtype of `lse_T`: gradient of each row's loss. Where it is 0 and `lse_T` is a number the row's
            gradient is 0, whatever `lse_T` and the logits are.
        vocab_size: V, of all shards together.
        label_smoothing: e.
        z_loss: factor of lse ** 2 in the loss.
        softcap: as `statistics` takes it.
    """
    for rows in _blocks(logits_TM, lse_T.dtype):
        lse_R1 = lse_T[rows].unsqueeze(1)
        wide_RM = _widened(logits_TM[rows], lse_T.dtype, softcap)
        grad_RM = (wide_RM - lse_R1).exp_()
        if z_loss:
            grad_RM.mul_(1.0 + 2.0 * z_loss * lse_R1)
        index_R1, present_R = _position(columns_T[rows], grad_RM.shape[1])
        grad_RM.scatter_add_(1, index_R1, present_R.to(lse_T.dtype).mul_(label_smoothing - 1.0).unsqueeze(1))
        if label_smoothing:
            grad_RM.sub_(label_smoothing / vocab_size)
        if softcap:
            grad_RM.mul_(1.0 - (wide_RM / softcap).square_())
        grad_R1 = grad_T[rows].unsqueeze(1)
        out_TM[rows] = grad_RM.mul_(grad_R1).masked_fill_((grad_R1 == 0) & ~lse_R1.isnan(), 0.0)


def _blocks(logits_TM: Tensor, wide: torch.dtype) -> Iterator[slice]:
    num_rows, num_columns = logits_TM.shape
    block_bytes = _BLOCK_BYTES if logits_TM.device.type == "cpu" else _DEVICE_BLOCK_BYTES
    block = max(block_bytes // (wide.itemsize * num_columns), 1)
    return (slice(start, min(start + block, num_rows)) for start in range(0, num_rows, block))


def _widened(logits_RM: Tensor, wide: torch.dtype, softcap: float) -> Tensor:
    wide_RM = logits_RM.to(wide)
    return (wide_RM / softcap).tanh_().mul_(softcap) if softcap else wide_RM


def _position(columns_R: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Returns a valid column for each label [R, 1], and whether the label is really in it [R]."""
    last = num_columns - 1
    return columns_R.clamp(0, last).unsqueeze(1), (columns_R >= 0) & (columns_R <= last)
