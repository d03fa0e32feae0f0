"""Views of tensors as kernels walk through them."""

from __future__ import annotations

from torch import Tensor


def rows_of(tensor: Tensor) -> Tensor:
    """Returns [product of the leading sizes, last size] whose rows lie at one distance and are contiguous.

    A view where the strides allow it, else a copy.
    """
    rows = tensor.unsqueeze(0).flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()
