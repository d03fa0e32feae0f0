"""The matrix products of the op: torch's own, in the precision that the op asks for.

Shape letters: T tokens of a chunk, D hidden size, M rows of the output matrix.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 24  # of an operand or a product that is converted at a time
_LEAST_COLUMNS = 2048  # of a product that is converted in blocks; fewer leave a GPU idle


def write_logits(hidden_TD: Tensor, weight_MD: Tensor, out_TM: Tensor) -> None:
    """Writes hidden @ weight.T.

    In the dtype of `hidden_TD` the product is accumulated in fp32 and rounded once. In another dtype it is made in
    fp32: by the matrix product itself where torch offers that (CUDA), else from operands that are widened in blocks.
    """
    if out_TM.dtype == hidden_TD.dtype:
        torch.mm(hidden_TD, weight_MD.T, out=out_TM)
    elif not _widens(hidden_TD):
        wide_TD = hidden_TD.float()
        for part in _blocks(weight_MD.shape[0], weight_MD.shape[1], 1):
            out_TM[:, part] = wide_TD @ weight_MD[part].float().T
    elif out_TM.dtype == torch.float32:
        _write_wide(hidden_TD, weight_MD.T, out_TM)
    else:
        for part in _blocks(weight_MD.shape[0], hidden_TD.shape[0], _LEAST_COLUMNS):
            wide_TC = hidden_TD.new_empty(hidden_TD.shape[0], part.stop - part.start, dtype=torch.float32)
            _write_wide(hidden_TD, weight_MD[part].T, wide_TC)
            out_TM[:, part] = wide_TC


def write_product(grad_TM: Tensor, hidden_TD: Tensor, out_MD: Tensor) -> None:
    """Writes grad.T @ hidden to a tensor that may be wider than both, as `add_product` would add it to zeros."""
    if out_MD.dtype == grad_TM.dtype:
        torch.mm(grad_TM.T, hidden_TD, out=out_MD)
    elif out_MD.dtype == torch.float32 and _widens(hidden_TD):
        _write_wide(grad_TM.T, hidden_TD, out_MD)
    else:
        out_MD.copy_(grad_TM.T @ hidden_TD)


def add_product(total_MD: Tensor, grad_TM: Tensor, hidden_TD: Tensor) -> None:
    """Adds grad.T @ hidden to a sum that may be wider than both.

    Where torch cannot add to a wider sum inside the product, an fp32 product of some rows of the sum at a time is
    added to it. Where it has no wider product either, each product is rounded to the dtype of `hidden_TD`.
    """
    if total_MD.dtype == grad_TM.dtype:
        total_MD.addmm_(grad_TM.T, hidden_TD)
    elif total_MD.dtype != torch.float32 or not _widens(hidden_TD):
        total_MD.add_(grad_TM.T @ hidden_TD)
    elif _adds_wide(hidden_TD.device, hidden_TD.dtype):
        torch.ops.aten.addmm.dtype_out(total_MD, grad_TM.T, hidden_TD, torch.float32, out=total_MD)
    else:
        for part in _blocks(total_MD.shape[0], total_MD.shape[1], _LEAST_COLUMNS):
            wide_CD = torch.empty_like(total_MD[part])
            _write_wide(grad_TM[:, part].T, hidden_TD, wide_CD)
            total_MD[part] += wide_CD


def multiply(tensor: Tensor, factor: Tensor) -> Tensor:
    """Multiplies in place by a wider number, which is not rounded to the tensor's dtype before.

    On a GPU torch would round one without dimensions; one with a dimension it does not, and needs no memory for that.
    """
    return tensor.mul_(factor.reshape(1) if tensor.is_cuda else factor)


def _blocks(size: int, others: int, least: int) -> list[slice]:
    """Cuts one side of a matrix so that a part has _BLOCK_ELEMENTS, but is at least so long."""
    step = max(_BLOCK_ELEMENTS // max(others, 1), least)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _write_wide(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Writes the product of two narrow matrices as it is accumulated, in fp32."""
    torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=out)


def _widens(tensor: Tensor) -> bool:
    """Whether torch's products of such tensors have an fp32 result (from torch 2.8 on)."""
    return tensor.is_cuda and "dtype_out" in torch.ops.aten.mm.overloads()


@cache
def _adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether such a product can be added to an fp32 sum. torch 2.8 and 2.9 have the op and refuse the mixture."""
    if "dtype_out" not in torch.ops.aten.addmm.overloads():
        return False
    operand, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, operand, operand, torch.float32, out=total)
    except RuntimeError:
        return False
    return True
