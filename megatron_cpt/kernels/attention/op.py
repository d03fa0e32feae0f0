"""Attention over packed documents: the public face of the op.

Shape letters: N tokens of all documents, H query heads, G key-value groups (H a multiple of G), K head size.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.kernels import dispatch
from megatron_cpt.kernels.attention import reference, torch_backends
from megatron_cpt.kernels.attention.documents import Boundaries

OP = "attention"
MAX_HEAD_SIZE = 256  # of the Triton kernels
MAX_FP32_HEAD_SIZE = 128  # beyond it a tile of fp32 leaves the registers


def _triton_attention(*arguments: Any) -> Tensor:
    from megatron_cpt.kernels.attention import triton_attention

    return triton_attention.attention(*arguments)


def _triton_obstacle(**facts: Any) -> str | None:
    reason = dispatch.triton_obstacle(**facts)
    if reason is not None:
        return reason
    in_fp32 = facts.get("dtype") == torch.float32
    most = MAX_FP32_HEAD_SIZE if in_fp32 else MAX_HEAD_SIZE
    if facts.get("head_size", 0) > most:
        return f"its kernels take head sizes up to {most}{' in fp32' * in_fp32}, not {facts['head_size']}"
    if in_fp32 and not facts.get("named"):
        return "in fp32 it goes without tensor cores, so it runs by name only"
    return None


dispatch.register(OP, "cudnn", torch_backends.cudnn, torch_backends.cudnn_obstacle)
dispatch.register(OP, "flash", torch_backends.flash, torch_backends.flash_obstacle)
dispatch.register(OP, "triton", _triton_attention, _triton_obstacle)
dispatch.register(OP, "torch", reference.attention, dispatch.anywhere)


def attention(
    query_NHK: Tensor,
    key_NGK: Tensor,
    value_NGK: Tensor,
    cu_seqlens: Boundaries,
    *,
    scale: float,
    window: int | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Returns softmax attention: causal inside each document, none across documents.

    out[n, h] = sum over m of softmax(scale * query[n, h] . key[m, g])[m] * value[m, g], with g = h * G // H and m
    running over the tokens of n's document up to n, under a window from n - window on. Keys and values are not
    repeated for the heads that share them. Differentiable in query, key and value. No dropout, no bias.

    "auto" takes, on a GPU, cuDNN or FlashAttention through torch where all documents have one length, and this
    package's Triton kernels where lengths differ; elsewhere torch, in a few batched calls. The Triton kernels sum
    in a fixed order, forward and backward: two runs give the same bits. The other fused ones promise none.

    Args:
        query_NHK: [N, H, K], floating; any strides.
        key_NGK: [N, G, K], dtype and device of the query.
        value_NGK: [N, G, K], likewise.
        cu_seqlens: the document starts and then N: 0 = c[0] <= c[1] <= ... = N, integers. Keep it on the host
            (CPU tensor or NumPy array): its values are read there, which on a device tensor waits for the device.
        scale: factor of the logits, as K ** -0.5; > 0.
        window: how many tokens before its own a token sees, an integer >= 0; None for all of its document, and one
            that reaches over all N tokens is taken as None. What Hugging Face calls a sliding window of w tokens
            counts the token itself: window = w - 1.
        implementation: "auto", or the name of one: "cudnn", "flash", "triton", "torch".

    Returns:
        [N, H, K] in the dtype of the query.

    Raises:
        ValueError: shapes, dtypes or boundaries do not belong together; `scale` or `window` is out of its range;
            `cu_seqlens` is a list.
        KernelUnsupported: the named implementation cannot run here.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1; grouped heads: Ainslie et al.,
        "GQA" (2023), section 2.2; the kernels: Dao, "FlashAttention-2" (2023), algorithms 1 and 2.
    Deviates: several documents share a row and do not see each other. Backward goes through the keys and through
        the queries in two kernels, where algorithm 2 adds to the queries' gradient in the order of arrival.
    """
    shapes = tuple(query_NHK.shape), tuple(key_NGK.shape), tuple(value_NGK.shape)
    if query_NHK.dim() != 3 or key_NGK.dim() != 3 or shapes[1] != shapes[2]:
        raise ValueError(f"{OP}: got query, key, value {shapes}; expected [N, H, K] and twice [N, G, K]")
    num_tokens, num_heads, head_size = shapes[0]
    if (num_tokens, head_size) != (shapes[1][0], shapes[1][2]) or num_heads % max(shapes[1][1], 1) != 0:
        raise ValueError(f"{OP}: got query, key, value {shapes}; N and K must agree and G must divide H")
    dtypes = query_NHK.dtype, key_NGK.dtype, value_NGK.dtype
    if len(set(dtypes)) != 1:
        raise ValueError(f"{OP}: got query, key, value in {dtypes}; expected one dtype, cast two of them")
    if not scale > 0:
        raise ValueError(f"{OP}: got scale {scale}; expected a number above 0, as K ** -0.5")
    if not hasattr(cu_seqlens, "tolist"):
        raise ValueError(
            f"{OP}: got cu_seqlens as {type(cu_seqlens).__name__}; expected a torch tensor on the host or a NumPy "
            "array: give torch.tensor(cu_seqlens, dtype=torch.int32)"
        )
    window = _window_within(num_tokens, window)
    # What torch.compile makes of a call serves later batches too, of whatever lengths their documents are.
    documents = (
        {"one_length": False}
        if torch.compiler.is_compiling()
        else {"cu_seqlens": cu_seqlens, "tensors": (query_NHK, key_NGK, value_NGK)}
    )
    function = dispatch.choose(
        OP,
        implementation,
        device=query_NHK.device.type,
        dtype=query_NHK.dtype,
        head_size=head_size,
        window=window,
        **documents,
    )
    result: Tensor = function(query_NHK, key_NGK, value_NGK, cu_seqlens, scale, window)
    return result


def _window_within(num_tokens: int, window: int | None) -> int | None:
    """Returns the window as a Python integer, or None where it hides nothing.

    What is left is less than N, so that kernels may add it to a row's number in int32.
    """
    if window is None:
        return None
    try:
        tokens = operator.index(window)
    except TypeError:
        tokens = -1
    if tokens < 0:
        raise ValueError(f"{OP}: got window {window}; expected the number of tokens before its own that a token sees")
    return tokens if tokens < num_tokens - 1 else None
