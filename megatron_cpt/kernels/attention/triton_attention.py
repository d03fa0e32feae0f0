"""Attention on an NVIDIA GPU: launches of the kernels, and their gradient.

A pass is one launch, or two: documents of at least a tile go through tensor descriptors where the GPU and the
tensors allow it, shorter ones through pointers. The grid has a program for each tile of a document and head, whatever
the documents' lengths are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_cpt.kernels.attention.documents import Boundaries, list_tiles, read_boundaries
from megatron_cpt.kernels.attention.triton_backward import key_value_gradient_kernel, query_gradient_kernel
from megatron_cpt.kernels.attention.triton_forward import forward_kernel
from megatron_cpt.kernels.attention.triton_settings import (
    DESCRIPTORS_CAPABILITY,
    FORWARD,
    KEY_VALUE_GRADIENT,
    QUERY_GRADIENT,
    Setting,
    padded_head_size,
)
from megatron_cpt.kernels.graph import GraphOp
from megatron_cpt.kernels.tuning import Launch, Table
from megatron_cpt.runtime.device import compute_capability, current_stream, multiprocessor_count

_DESCRIPTOR_ALIGNMENT = 16  # bytes, of a tensor's begin and of the steps between its rows and heads
_PROGRAMS_PER_MULTIPROCESSOR = 2

_Reader = Callable[[Tensor], Any]  # makes of a tensor what a kernel reads tiles through


def attention(
    query_NHK: Tensor,
    key_NGK: Tensor,
    value_NGK: Tensor,
    cu_seqlens: Boundaries,
    scale: float,
    window: int | None,
) -> Tensor:
    """Returns causal attention inside each document [N, H, K]; see `op.attention`."""
    edges = cu_seqlens if isinstance(cu_seqlens, Tensor) else torch.tensor(cu_seqlens.tolist(), dtype=torch.int32)
    output: Tensor = _ATTENTION(query_NHK, key_NGK, value_NGK, edges, scale, window)[0]
    return output


def launch_forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Returns the output [N, H, K] and the log of the sum of exponentials [H, N] in fp32."""
    num_tokens, num_heads, head_size = query.shape
    query, key, value = (_with_whole_rows(tensor) for tensor in (query, key, value))
    output = query.new_empty(query.shape)
    logsumexp_HN = query.new_empty(num_heads, num_tokens, dtype=torch.float32)
    boundaries = read_boundaries(cu_seqlens, num_tokens)
    for launch, described, tiles in _launches(FORWARD, boundaries, window, (query, key, value), of_keys=False):
        of_queries, of_keys = _readers(launch, described)
        forward_kernel[(len(tiles) * num_heads,)](
            of_queries(query),
            of_keys(key),
            of_keys(value),
            output,
            logsumexp_HN,
            tiles,
            scale * math.log2(math.e),
            window or 0,
            num_tokens,
            num_heads,
            *_strides(query, key, value),
            SHARE=num_heads // key.shape[1],
            **_constexprs(query, window, described, launch),
        )
    return output, logsumexp_HN


def launch_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp_HN: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value."""
    grad, query, key, value = (_with_whole_rows(tensor) for tensor in (grad, query, key, value))
    boundaries = read_boundaries(cu_seqlens, len(query))
    tensors = grad, query, key, value
    grad_query, delta_HN = _launch_query_gradient(tensors, output, logsumexp_HN, boundaries, scale, window)
    grad_key, grad_value = _launch_key_value_gradient(tensors, logsumexp_HN, delta_HN, boundaries, scale, window)
    return grad_query, grad_key, grad_value


def _launch_query_gradient(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    output: Tensor,
    logsumexp_HN: Tensor,
    boundaries: tuple[int, ...],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the query and delta [H, N], the product of output and its gradient, in fp32."""
    grad, query, key, value = tensors
    num_tokens, num_heads, head_size = query.shape
    grad_query, delta_HN = query.new_empty(query.shape), logsumexp_HN.new_empty(logsumexp_HN.shape)
    for launch, described, tiles in _launches(QUERY_GRADIENT, boundaries, window, tensors, of_keys=False):
        of_queries, of_keys = _readers(launch, described)
        query_gradient_kernel[(len(tiles) * num_heads,)](
            of_queries(query),
            of_keys(key),
            of_keys(value),
            output,
            of_queries(grad),
            logsumexp_HN,
            delta_HN,
            grad_query,
            tiles,
            scale,
            window or 0,
            num_tokens,
            num_heads,
            *_strides(query, key, value, grad),
            SHARE=num_heads // key.shape[1],
            **_constexprs(query, window, described, launch),
        )
    return grad_query, delta_HN


def _launch_key_value_gradient(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    logsumexp_HN: Tensor,
    delta_HN: Tensor,
    boundaries: tuple[int, ...],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of key and value."""
    grad, query, key, value = tensors
    num_tokens, num_heads, head_size = query.shape
    num_groups = key.shape[1]
    launches = list(_launches(KEY_VALUE_GRADIENT, boundaries, window, tensors, of_keys=True))
    slots = _slots(sum(len(tiles) for _, _, tiles in launches) * num_groups, num_heads // num_groups, query.device.type)
    dtype = query.dtype if slots == 1 else torch.float32
    grad_key, grad_value = (query.new_empty(num_tokens, num_groups * slots, head_size, dtype=dtype) for _ in range(2))
    for launch, described, tiles in launches:
        of_queries, of_keys = _readers(launch, described)
        key_value_gradient_kernel[(len(tiles) * num_groups * slots,)](
            of_queries(query),
            of_keys(key),
            of_keys(value),
            of_queries(grad),
            logsumexp_HN,
            delta_HN,
            grad_key,
            grad_value,
            tiles,
            scale,
            window or 0,
            num_tokens,
            num_groups * slots,
            *_strides(query, key, value, grad),
            HEADS=num_heads // num_groups // slots,
            SLOTS=slots,
            **_constexprs(query, window, described, launch),
        )
    if slots == 1:
        return grad_key, grad_value
    # torch adds along a dimension in an order that depends on the shape alone.
    whole_key, whole_value = (x.unflatten(1, (num_groups, slots)).sum(2).to(key.dtype) for x in (grad_key, grad_value))
    return whole_key, whole_value


def _slots(programs: int, share: int, device_type: str) -> int:
    """Into how many slots the heads that share keys are cut, so that few groups still fill the GPU.

    The least divisor of `share` by which `programs` fill it, or `share`. More slots cost fp32 partial gradients.
    """
    wanted = (multiprocessor_count(device_type) or 0) * _PROGRAMS_PER_MULTIPROCESSOR
    divisors = [slots for slots in range(1, share + 1) if share % slots == 0]
    return next((slots for slots in divisors if programs * slots >= wanted), share)


def _launches(
    table: Table, boundaries: tuple[int, ...], window: int | None, tensors: tuple[Tensor, ...], of_keys: bool
) -> Iterator[tuple[Launch, bool, Tensor]]:
    """Yields the launches of a pass: settings, whether through descriptors, tiles [T, 3]."""
    device = tensors[0].device
    setting = Setting(padded_head_size(tensors[0].shape[2]), True, tensors[0].dtype == torch.float32)
    tile, other = ("BLOCK_KEYS", "BLOCK_QUERIES") if of_keys else ("BLOCK_QUERIES", "BLOCK_KEYS")
    shortest = boundaries[-1] + 1
    launches, parts = [], []
    if _can_describe(tensors):
        launch = table.choose(device.type, setting)
        shortest = launch.blocks[other]
        launches.append((launch, True))
        parts.append((launch.blocks[tile], range(shortest, boundaries[-1] + 1)))
    launch = table.choose(device.type, setting._replace(descriptors=False))
    launches.append((launch, False))
    parts.append((launch.blocks[tile], range(shortest)))
    lists = list_tiles(boundaries, tuple(parts), window, of_keys, device, current_stream(device))
    for (launch, described), tiles in zip(launches, lists, strict=True):
        if len(tiles):
            yield launch, described, tiles


def _can_describe(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the GPU is one for descriptors (the interpreter is) and all tensors lie as they need it."""
    if compute_capability(tensors[0].device.type) not in (None, DESCRIPTORS_CAPABILITY):
        return False
    steps = [step * x.element_size() for x in tensors for step in _steps(x)]
    begins = [x.data_ptr() for x in tensors]
    return min(steps) > 0 and all(value % _DESCRIPTOR_ALIGNMENT == 0 for value in (*steps, *begins))


def _steps(tensor: Tensor) -> tuple[int, int]:
    """Returns the distances of rows and of heads in elements; with one head that of heads means nothing."""
    return tensor.stride(0), tensor.stride(1) if tensor.shape[1] > 1 else tensor.stride(0)


def _strides(*tensors: Tensor) -> list[int]:
    return [step for tensor in tensors for step in _steps(tensor)]


def _readers(launch: Launch, described: bool) -> tuple[_Reader, _Reader]:
    """Returns what makes of a tensor the thing a kernel reads its tiles through: of queries, and of keys."""
    read = _describe if described else _as_it_is
    return partial(read, rows=launch.blocks["BLOCK_QUERIES"]), partial(read, rows=launch.blocks["BLOCK_KEYS"])


def _as_it_is(tensor: Tensor, rows: int) -> Tensor:
    return tensor


def _describe(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Returns a descriptor of [heads, tokens, head size], whose tiles are rows of one head."""
    num_tokens, num_heads, head_size = tensor.shape
    row_step, head_step = _steps(tensor)
    tile = [1, rows, padded_head_size(head_size)]
    return TensorDescriptor(tensor, [num_heads, num_tokens, head_size], [head_step, row_step, 1], tile)


def _with_whole_rows(tensor: Tensor) -> Tensor:
    """Returns the tensor, or a copy where the elements of a head do not lie next to each other."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _constexprs(query: Tensor, window: int | None, described: bool, launch: Launch) -> dict[str, Any]:
    return {
        "HEAD_SIZE": query.shape[2],
        "COLUMNS": padded_head_size(query.shape[2]),
        "WINDOWED": window is not None,
        "DESCRIPTORS": described,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "STAGES": launch.num_stages,
        **launch.keywords(),
    }


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens, ctx.scale, ctx.window = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, cu_seqlens)


def _arguments(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    return grad, *ctx.saved_tensors, ctx.scale, ctx.window


def _gradients(ctx: Any, results: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    return *results, None, None, None


_ATTENTION = GraphOp(
    "attention",
    schema="(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, float scale, int? window) -> (Tensor, Tensor)",
    forward=launch_forward,
    fake=_fake_forward,
    backward_schema=(
        "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, Tensor cu_seqlens, "
        "float scale, int? window) -> (Tensor, Tensor, Tensor)"
    ),
    backward=launch_backward,
    backward_fake=_fake_backward,
    save=_save,
    arguments=_arguments,
    gradients=_gradients,
)
