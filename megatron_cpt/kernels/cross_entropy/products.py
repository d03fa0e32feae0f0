"""The matrix products of the op: torch's own, in the precision that the op asks for.

Shape letters: T tokens of a chunk, D hidden size, M rows of the output matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 24  # of an operand or a product that is converted at a time


def write_logits(hidden_TD: Tensor, weight_MD: Tensor, out_TM: Tensor) -> None:
    """Writes hidden @ weight.T.

    In the dtype of `hidden_TD` the product is accumulated in fp32 and rounded once. In another dtype it is made in
    fp32: by the matrix product itself where torch offers that (CUDA), else from operands that are widened in blocks.
    """
    if out_TM.dtype == hidden_TD.dtype:
        torch.mm(hidden_TD, weight_MD.T, out=out_TM)
    elif not _widens(hidden_TD):
        wide_TD = hidden_TD.float()
        step = max(_BLOCK_ELEMENTS // max(weight_MD.shape[1], 1), 1)
        for start in range(0, weight_MD.shape[0], step):
            out_TM[:, start : start + step] = wide_TD @ weight_MD[start : start + step].float().T
    elif out_TM.dtype == torch.float32:
        torch.ops.aten.mm.dtype_out(hidden_TD, weight_MD.T, torch.float32, out=out_TM)
    else:
        step = max(_BLOCK_ELEMENTS // max(weight_MD.shape[0], 1), 1)
        for start in range(0, hidden_TD.shape[0], step):
            part = slice(start, start + step)
            out_TM[part] = torch.ops.aten.mm.dtype(hidden_TD[part], weight_MD.T, torch.float32)


def write_product(grad_TM: Tensor, hidden_TD: Tensor, out_MD: Tensor) -> None:
    """Writes grad.T @ hidden to a tensor that may be wider than both, as `add_product` would add it to zeros."""
    if out_MD.dtype == grad_TM.dtype:
        torch.mm(grad_TM.T, hidden_TD, out=out_MD)
    elif out_MD.dtype == torch.float32 and _widens(hidden_TD):
        torch.ops.aten.mm.dtype_out(grad_TM.T, hidden_TD, torch.float32, out=out_MD)
    else:
        out_MD.copy_(grad_TM.T @ hidden_TD)


def add_product(total_MD: Tensor, grad_TM: Tensor, hidden_TD: Tensor) -> None:
    """Adds grad.T @ hidden to a sum that may be wider than both.

    Where torch cannot add to a wider sum inside the product, each product is rounded to the dtype of `hidden_TD`.
    """
    if total_MD.dtype == grad_TM.dtype:
        total_MD.addmm_(grad_TM.T, hidden_TD)
    elif total_MD.dtype == torch.float32 and _widens(hidden_TD):
        torch.ops.aten.addmm.dtype_out(total_MD, grad_TM.T, hidden_TD, torch.float32, out=total_MD)
    else:
        total_MD.add_(grad_TM.T @ hidden_TD)


def _widens(tensor: Tensor) -> bool:
    """Whether torch's products of such tensors have an fp32 result (from torch 2.8 on)."""
    return tensor.is_cuda and "dtype_out" in torch.ops.aten.mm.overloads()
