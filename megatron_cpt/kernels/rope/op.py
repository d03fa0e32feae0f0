"""Rotary position embedding: the public face of the op.

Shape letters: N tokens, H query heads, G key-value groups, K head size, R = K / 2 rotated pairs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_cpt.kernels import dispatch
from megatron_cpt.kernels.rope import reference

OP = "rope"


def _triton_rope(*arguments: Any) -> Any:
    from megatron_cpt.kernels.rope import triton_rope

    return triton_rope.rope(*arguments)


dispatch.register(OP, "triton", _triton_rope, dispatch.triton_obstacle)
dispatch.register(OP, "torch", reference.rope, dispatch.anywhere)


def rope(
    query_NHK: Tensor,
    key_NGK: Tensor,
    cos_NR: Tensor,
    sin_NR: Tensor,
    *,
    in_place: bool = False,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotates query and key by their tokens' angles, in the half-split layout of Hugging Face.

    With (a, b) = (x[r], x[r + R]) of a head: (a cos - b sin, b cos + a sin). Differentiable in query and key, not
    in the table; the gradient is the rotation back, so nothing but the table is kept. The torch implementation
    rounds the table and each product to the dtype of the query, as Llama's code does; the Triton implementation
    computes in fp32 and rounds once.

    Args:
        query_NHK: [N, H, K], floating, or [N, G, H / G, K]; any strides, so that a view of a packed projection will do.
        key_NGK: [N, G, K], dtype and device of the query; any strides.
        cos_NR: [N, K / 2], from `rotary_table`: positions, and with them documents, are its matter.
        sin_NR: likewise.
        in_place: write the results over query and key and return them. Where gradients are asked for, autograd
            refuses it for a leaf, and with Triton for a view; an earlier step may not need their old values.
        implementation: "auto", or the name of one.

    Returns:
        Rotated query and key, in the shapes and dtype of the inputs; contiguous unless `in_place`.

    Raises:
        ValueError: shapes or dtypes do not belong together.
        KernelUnsupported: the named implementation cannot run here.

    Source: Su et al., "RoFormer" (2021), section 3.2.2.
    Deviates: pairs are (r, r + K / 2), not neighbours: the layout of Hugging Face's Llama, to which its weights
        are permuted.
    """
    shapes = tuple(query_NHK.shape), tuple(key_NGK.shape), tuple(cos_NR.shape), tuple(sin_NR.shape)
    num_tokens, *_, head_size = shapes[0] if len(shapes[0]) in (3, 4) else (0, 0)
    table = (num_tokens, head_size // 2)
    if (
        len(shapes[0]) not in (3, 4)
        or len(shapes[1]) != 3
        or (shapes[1][0], shapes[1][2]) != (num_tokens, head_size)
        or head_size % 2
        or shapes[2:] != (table, table)
    ):
        raise ValueError(
            f"{OP}: got query, key, cos, sin {shapes}; expected [N, H, K] or [N, G, H / G, K], [N, G, K] and twice "
            "[N, K / 2], with an even K"
        )
    if query_NHK.dtype != key_NGK.dtype or not query_NHK.is_floating_point():
        raise ValueError(f"{OP}: got query {query_NHK.dtype} and key {key_NGK.dtype}; expected one floating dtype")
    function = dispatch.choose(OP, implementation, device=query_NHK.device.type, dtype=query_NHK.dtype)
    result: tuple[Tensor, Tensor] = function(query_NHK, key_NGK, cos_NR, sin_NR, in_place)
    return result
