"""The kernel of the rotary embedding: a program takes a block of heads of one token, of the query or of the key.

Shape letters: as in `op`; query and key may each be [N, groups, heads of a group, K].
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from megatron_cpt.kernels.tuning import CompileCase, Launch, Table

Sizes = tuple[int, int]  # heads of the query (at least those of the key), head size


def _rule(sizes: Sizes) -> Launch:
    """A thread rotates about 8 pairs: 16 bytes of either half in bf16."""
    num_heads, head_size = sizes
    pairs = triton.next_power_of_2(head_size // 2)
    heads = min(triton.next_power_of_2(num_heads), max(2048 // pairs, 1))
    return Launch(num_warps=min(max(heads * pairs // 256, 1), 8), blocks={"BLOCK_H": heads, "BLOCK_R": pairs})


ROTATION = Table(_rule)


@triton.jit
def _rotate_heads(
    in_ptr,
    out_ptr,
    first_head,
    num_heads,
    heads_per_group,
    in_group_stride,
    in_head_stride,
    out_group_stride,
    out_head_stride,
    cos,
    sin,
    pairs,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    heads = first_head + tl.arange(0, BLOCK_H)
    columns = tl.arange(0, BLOCK_R)[None, :]
    mask = (heads < num_heads)[:, None] & (columns < pairs)
    # The heads of a token may lie further apart in a view than int32 counts.
    group, head = (heads // heads_per_group).to(tl.int64), (heads % heads_per_group).to(tl.int64)
    in_pointers = in_ptr + (group * in_group_stride + head * in_head_stride)[:, None] + columns
    out_pointers = out_ptr + (group * out_group_stride + head * out_head_stride)[:, None] + columns
    first = tl.load(in_pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(in_pointers + pairs, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_pointers, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(out_pointers + pairs, (second * cos + first * sin).to(dtype), mask=mask)


@triton.jit
def rotate(
    query_ptr,
    key_ptr,
    query_out_ptr,
    key_out_ptr,
    cos_ptr,
    sin_ptr,
    num_query_heads,
    num_key_heads,
    query_heads_per_group,
    key_heads_per_group,
    pairs,
    query_token_stride,
    query_group_stride,
    query_head_stride,
    query_out_token_stride,
    query_out_group_stride,
    query_out_head_stride,
    key_token_stride,
    key_group_stride,
    key_head_stride,
    key_out_token_stride,
    key_out_group_stride,
    key_out_head_stride,
    INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Writes the rotated heads, or with INVERSE the heads rotated back; inputs and outputs may be the same."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    columns = tl.arange(0, BLOCK_R)
    cos = tl.load(cos_ptr + token * pairs + columns, mask=columns < pairs, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * pairs + columns, mask=columns < pairs, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    query_blocks = tl.cdiv(num_query_heads, BLOCK_H)
    if block < query_blocks:
        _rotate_heads(
            query_ptr + token * query_token_stride,
            query_out_ptr + token * query_out_token_stride,
            block * BLOCK_H,
            num_query_heads,
            query_heads_per_group,
            query_group_stride,
            query_head_stride,
            query_out_group_stride,
            query_out_head_stride,
            cos,
            sin,
            pairs,
            BLOCK_H,
            BLOCK_R,
        )
    else:
        _rotate_heads(
            key_ptr + token * key_token_stride,
            key_out_ptr + token * key_out_token_stride,
            (block - query_blocks) * BLOCK_H,
            num_key_heads,
            key_heads_per_group,
            key_group_stride,
            key_head_stride,
            key_out_group_stride,
            key_out_head_stride,
            cos,
            sin,
            pairs,
            BLOCK_H,
            BLOCK_R,
        )


def compile_cases() -> Iterator[CompileCase]:
    """Yields the kernel with every setting, at the head counts and sizes of Llama models and of their shards."""
    heads = "*bf16:16"
    signature = {f"{name}_ptr": heads for name in ("query", "key", "query_out", "key_out")}
    signature |= {"cos_ptr": "*fp32:16", "sin_ptr": "*fp32:16", "pairs": "i32:16"}
    signature |= {f"num_{name}_heads": "i32" for name in ("query", "key")}
    signature |= {f"{name}_heads_per_group": "i32" for name in ("query", "key")}
    for name in ("query", "query_out", "key", "key_out"):
        signature |= {f"{name}_{what}_stride": "i32:16" for what in ("token", "group", "head")}
    for name, sizes, launch in ROTATION.entries(((4, 128), (32, 64), (32, 128))):
        for inverse in (False, True):
            title = f"rope {name} heads={sizes[0]} K={sizes[1]}{' inverse' * inverse}"
            yield CompileCase(
                title, rotate, signature, {"INVERSE": inverse, **launch.blocks}, launch.options(), "stream"
            )
