"""Attention over packed documents: the public face of the op.

Shape letters: N tokens of all documents, H query heads, G key-value groups (H a multiple of G), K head size.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from megatron_cpt.kernels import dispatch
from megatron_cpt.kernels.attention import reference

OP = "attention"

dispatch.register(OP, "torch", reference.attention, dispatch.anywhere)


class Boundaries(Protocol):
    """A one-dimensional integer array: a torch tensor or a NumPy array."""

    def tolist(self) -> Any:
        """Returns the values as a list of Python integers."""


def attention(
    query_NHK: Tensor,
    key_NGK: Tensor,
    value_NGK: Tensor,
    cu_seqlens: Boundaries,
    *,
    max_seqlen: int | None = None,
    scale: float,
    implementation: str = "auto",
) -> Tensor:
    """Returns softmax attention: causal inside each document, none across documents.

    out[n, h] = sum over m of softmax(scale * query[n, h] . key[m, g])[m] * value[m, g], with g = h * G // H and m
    running over the tokens of n's document up to n. Keys and values are not repeated for the heads that
    share them. Differentiable in query, key and value. No dropout, no bias, no window.

    Args:
        query_NHK: [N, H, K], floating; any strides.
        key_NGK: [N, G, K], dtype and device of the query.
        value_NGK: [N, G, K], likewise.
        cu_seqlens: the document starts and then N: 0 = c[0] <= c[1] <= ... = N, integers. Keep it on the host
            (CPU tensor or NumPy array): the torch implementation reads its values, which on a device tensor waits
            for the device.
        max_seqlen: length of the longest document in tokens, for implementations that size a launch by it;
            the torch implementation takes it from `cu_seqlens`.
        scale: factor of the logits, as K ** -0.5.
        implementation: "auto", or the name of one.

    Returns:
        [N, H, K] in the dtype of the query.

    Raises:
        ValueError: shapes or boundaries do not belong together.
        KernelUnsupported: the named implementation cannot run here.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1; grouped heads: Ainslie et al.,
        "GQA" (2023), section 2.2.
    Deviates: several documents share a row and do not see each other.
    """
    shapes = tuple(query_NHK.shape), tuple(key_NGK.shape), tuple(value_NGK.shape)
    if query_NHK.dim() != 3 or key_NGK.dim() != 3 or shapes[1] != shapes[2]:
        raise ValueError(f"{OP}: got query, key, value {shapes}; expected [N, H, K] and twice [N, G, K]")
    num_tokens, num_heads, head_size = shapes[0]
    if (num_tokens, head_size) != (shapes[1][0], shapes[1][2]) or num_heads % max(shapes[1][1], 1) != 0:
        raise ValueError(f"{OP}: got query, key, value {shapes}; N and K must agree and G must divide H")
    function = dispatch.choose(
        OP, implementation, device=query_NHK.device.type, dtype=query_NHK.dtype, head_size=head_size
    )
    result: Tensor = function(query_NHK, key_NGK, value_NGK, cu_seqlens, max_seqlen, scale)
    return result
