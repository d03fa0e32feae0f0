"""The forward kernel: one program for each tile of queries and head."""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_cpt.kernels.attention.triton_rows import key_block, key_ranges, load_rows, store_rows, visible_keys

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    state,
    queries,
    key,
    value,
    group,
    rows,
    begin,
    stop,
    end,
    scale_log2,
    window,
    strides,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds the keys from `begin` to `stop` to the running softmax of a tile: (output, peak in base 2, total)."""
    output, peak, total = state
    for offset in tl.range(0, stop - begin, BLOCK_KEYS, num_stages=STAGES):
        first = key_block(begin + offset, end, BLOCK_KEYS, MASKED, DESCRIPTORS)
        keys = load_rows(
            key, group, first, end, strides[0], strides[1], BLOCK_KEYS, COLUMNS, HEAD_SIZE, MASKED, DESCRIPTORS
        )
        scores = tl.dot(queries, keys.T, input_precision=PRECISION)
        if MASKED:
            columns = first + tl.arange(0, BLOCK_KEYS)
            visible = visible_keys(rows[:, None], columns[None, :], begin + offset, window, WINDOWED)
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
        # Under a window a row may have seen no key yet; then its peak is -inf, which must not be taken from itself.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak) if WINDOWED else new_peak
        weights = tl.exp2(scores * scale_log2 - shift[:, None])
        shrink = tl.exp2(peak - shift)
        total = total * shrink + tl.sum(weights, 1)
        output = output * shrink[:, None]
        values = load_rows(
            value, group, first, end, strides[2], strides[3], BLOCK_KEYS, COLUMNS, HEAD_SIZE, MASKED, DESCRIPTORS
        )
        output = tl.dot(weights.to(values.dtype), values, output, input_precision=PRECISION)
        peak = new_peak
    return output, peak, total


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    output,
    logsumexp_HN,
    tiles_T3,
    scale_log2,
    window,
    num_tokens,
    num_heads,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    SHARE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attends with one tile of queries of one head; heads of a tile run side by side, so that they share keys."""
    program = tl.program_id(0)
    head = program % num_heads
    tile = tiles_T3 + program // num_heads * 3
    first, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    scale_log2 = tl.cast(scale_log2, tl.float32)
    group = head // SHARE
    rows = first + tl.arange(0, BLOCK_QUERIES)
    strides = (key_stride, key_head_stride, value_stride, value_head_stride)
    queries = load_rows(
        query, head, first, end, query_stride, query_head_stride, BLOCK_QUERIES, COLUMNS, HEAD_SIZE, True, DESCRIPTORS
    )
    state = (
        tl.zeros([BLOCK_QUERIES, COLUMNS], tl.float32),
        tl.full([BLOCK_QUERIES], float("-inf"), tl.float32),
        tl.zeros([BLOCK_QUERIES], tl.float32),
    )
    begin, edge, diagonal, stop = key_ranges(first, start, end, window, BLOCK_QUERIES, BLOCK_KEYS, WINDOWED)
    if WINDOWED:
        state = _attend(
            state, queries, key, value, group, rows, begin, edge, end, scale_log2, window, strides,
            True, WINDOWED, BLOCK_KEYS, COLUMNS, HEAD_SIZE, DESCRIPTORS, PRECISION, STAGES,
        )  # fmt: skip
    state = _attend(
        state, queries, key, value, group, rows, edge, diagonal, end, scale_log2, window, strides,
        False, WINDOWED, BLOCK_KEYS, COLUMNS, HEAD_SIZE, DESCRIPTORS, PRECISION, STAGES,
    )  # fmt: skip
    attended, peak, total = _attend(
        state, queries, key, value, group, rows, diagonal, stop, end, scale_log2, window, strides,
        True, WINDOWED, BLOCK_KEYS, COLUMNS, HEAD_SIZE, DESCRIPTORS, PRECISION, STAGES,
    )  # fmt: skip
    if WINDOWED:
        total = tl.where(rows < end, total, 1.0)  # rows past the end may see no key
    store_rows(output, attended / total[:, None], head, first, end, num_heads, BLOCK_QUERIES, COLUMNS, HEAD_SIZE)
    lse = (peak + tl.log2(total)) * _LN_2
    tl.store(logsumexp_HN + head.to(tl.int64) * num_tokens + rows, lse, mask=rows < end)
