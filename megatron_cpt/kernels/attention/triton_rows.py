"""Reading and writing tiles of rows of one head, for the Triton kernels of this op.

A tile may reach past the end of its document, into the next one or past the last token. What lies there belongs to
others and may be anything, NaN too, and zero times NaN is NaN: it must not meet a sum over rows. There are two ways:

- through pointers such rows are read as zeros;
- through descriptors (the tensor memory accelerator of Hopper GPUs) a tile is read as it lies, so the kernels move
  a document's last tile back to end with it, and leave out what an earlier tile had. That takes documents of at least
  a tile; shorter ones go through pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(
    tensor,
    head,
    first,
    end,
    stride,
    head_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    RAGGED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Returns the [ROWS, COLUMNS] tile of one head from row `first` on; columns from HEAD_SIZE on are zeros.

    RAGGED: rows from `end` on may be among them; through pointers they are zeros. `tensor` is a pointer, or a
    descriptor of [heads, tokens, head size].
    """
    if DESCRIPTORS:
        return tensor.load([head, first, 0]).reshape([ROWS, COLUMNS])
    else:
        rows = tl.arange(0, ROWS)
        columns = tl.arange(0, COLUMNS)
        base = tensor + head.to(tl.int64) * head_stride + first.to(tl.int64) * stride
        pointers = base + rows[:, None] * stride + columns[None, :]
        if RAGGED:
            inside = (first + rows < end)[:, None] & (columns < HEAD_SIZE)[None, :]
            return tl.load(pointers, mask=inside, other=0.0)
        elif HEAD_SIZE == COLUMNS:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=columns[None, :] < HEAD_SIZE, other=0.0)


@triton.jit
def store_rows(
    tensor, tile, head, first, end, num_heads, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_SIZE: tl.constexpr
):
    """Writes the rows of a tile before `end` to a contiguous [tokens, num_heads, HEAD_SIZE]."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    base = tensor + (first.to(tl.int64) * num_heads + head) * HEAD_SIZE
    inside = (first + rows < end)[:, None] & (columns < HEAD_SIZE)[None, :]
    pointers = base + rows[:, None] * (num_heads * HEAD_SIZE) + columns[None, :]
    tl.store(pointers, tile.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def key_block(begin, end, BLOCK_KEYS: tl.constexpr, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Returns the first row to read for the block of keys that begins at `begin`."""
    if MASKED and DESCRIPTORS:
        return tl.minimum(begin, end - BLOCK_KEYS)
    else:
        return begin


@triton.jit
def visible_keys(rows, columns, begin, window, WINDOWED: tl.constexpr):
    """Returns which keys (columns) from `begin` on the queries (rows) see; both broadcast against each other."""
    visible = (rows >= columns) & (columns >= begin)
    if WINDOWED:
        visible = visible & (rows <= columns + window)
    return visible


@triton.jit
def key_ranges(
    first, start, end, window, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, WINDOWED: tl.constexpr
):
    """Returns where the keys of a tile of queries begin, are seen by all of it, cease to be so, and stop.

    All but the last are whole blocks away from the first.
    """
    begin = start
    if WINDOWED:
        begin = tl.maximum(start, first - window)
    diagonal = begin + (first + 1 - begin) // BLOCK_KEYS * BLOCK_KEYS
    edge = begin
    if WINDOWED:
        unseen = tl.maximum(first + BLOCK_QUERIES - 1 - window - begin, 0)
        edge = tl.minimum(begin + tl.cdiv(unseen, BLOCK_KEYS) * BLOCK_KEYS, diagonal)
    return begin, edge, diagonal, tl.minimum(first + BLOCK_QUERIES, end)
