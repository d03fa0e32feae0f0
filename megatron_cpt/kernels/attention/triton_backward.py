"""The backward kernels: queries' gradients by tiles of queries, keys' and values' by tiles of keys.

Every number is summed inside one program in a fixed order, so gradients are the same, bit for bit, in every run.
The price is that logits and their gradients are computed twice: seven matrix products where five are needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_cpt.kernels.attention.triton_rows import key_block, key_ranges, load_rows, store_rows, visible_keys

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _add_query_gradient(
    gradient,
    queries,
    grads,
    lse_log2,
    delta,
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
    """Adds what the keys from `begin` to `stop` give to the gradient of a tile of queries, before the scale."""
    for offset in tl.range(0, stop - begin, BLOCK_KEYS, num_stages=STAGES):
        first = key_block(begin + offset, end, BLOCK_KEYS, MASKED, DESCRIPTORS)
        keys = load_rows(
            key, group, first, end, strides[0], strides[1], BLOCK_KEYS, COLUMNS, HEAD_SIZE, MASKED, DESCRIPTORS
        )
        values = load_rows(
            value, group, first, end, strides[2], strides[3], BLOCK_KEYS, COLUMNS, HEAD_SIZE, MASKED, DESCRIPTORS
        )
        scores = tl.dot(queries, keys.T, input_precision=PRECISION)
        weights = tl.exp2(scores * scale_log2 - lse_log2[:, None])
        if MASKED:
            columns = first + tl.arange(0, BLOCK_KEYS)
            visible = visible_keys(rows[:, None], columns[None, :], begin + offset, window, WINDOWED)
            weights = tl.where(visible, weights, 0.0)
        grad_weights = tl.dot(grads, values.T, input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None])
        gradient = tl.dot(grad_scores.to(keys.dtype), keys, gradient, input_precision=PRECISION)
    return gradient


@triton.jit
def query_gradient_kernel(
    query,
    key,
    value,
    output,
    grad_output,
    logsumexp_HN,
    delta_HN,
    grad_query,
    tiles_T3,
    scale,
    window,
    num_tokens,
    num_heads,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    grad_stride,
    grad_head_stride,
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
    """Writes the gradient of one tile of queries of one head, and for the other kernel delta = sum(grad * output)."""
    program = tl.program_id(0)
    head = program % num_heads
    tile = tiles_T3 + program // num_heads * 3
    first, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    scale = tl.cast(scale, tl.float32)
    group = head // SHARE
    rows = first + tl.arange(0, BLOCK_QUERIES)
    strides = (key_stride, key_head_stride, value_stride, value_head_stride)
    outputs = load_rows(
        output, head, first, end, num_heads * HEAD_SIZE, HEAD_SIZE, BLOCK_QUERIES, COLUMNS, HEAD_SIZE, True, False
    )
    grads = load_rows(
        grad_output, head, first, end, grad_stride, grad_head_stride, BLOCK_QUERIES, COLUMNS, HEAD_SIZE, True,
        DESCRIPTORS,
    )  # fmt: skip
    delta = tl.sum(grads.to(tl.float32) * outputs.to(tl.float32), 1)
    statistics = head.to(tl.int64) * num_tokens + rows
    tl.store(delta_HN + statistics, delta, mask=rows < end)
    lse_log2 = tl.load(logsumexp_HN + statistics, mask=rows < end, other=0.0) * _LOG2_E
    queries = load_rows(
        query, head, first, end, query_stride, query_head_stride, BLOCK_QUERIES, COLUMNS, HEAD_SIZE, True, DESCRIPTORS
    )
    gradient = tl.zeros([BLOCK_QUERIES, COLUMNS], tl.float32)
    begin, edge, diagonal, stop = key_ranges(first, start, end, window, BLOCK_QUERIES, BLOCK_KEYS, WINDOWED)
    if WINDOWED:
        gradient = _add_query_gradient(
            gradient, queries, grads, lse_log2, delta, key, value, group, rows, begin, edge, end, scale * _LOG2_E,
            window, strides, True, WINDOWED, BLOCK_KEYS, COLUMNS, HEAD_SIZE, DESCRIPTORS, PRECISION, STAGES,
        )  # fmt: skip
    gradient = _add_query_gradient(
        gradient, queries, grads, lse_log2, delta, key, value, group, rows, edge, diagonal, end, scale * _LOG2_E,
        window, strides, False, WINDOWED, BLOCK_KEYS, COLUMNS, HEAD_SIZE, DESCRIPTORS, PRECISION, STAGES,
    )  # fmt: skip
    gradient = _add_query_gradient(
        gradient, queries, grads, lse_log2, delta, key, value, group, rows, diagonal, stop, end, scale * _LOG2_E,
        window, strides, True, WINDOWED, BLOCK_KEYS, COLUMNS, HEAD_SIZE, DESCRIPTORS, PRECISION, STAGES,
    )  # fmt: skip
    store_rows(grad_query, gradient * scale, head, first, end, num_heads, BLOCK_QUERIES, COLUMNS, HEAD_SIZE)


@triton.jit
def key_value_gradient_kernel(
    query,
    key,
    value,
    grad_output,
    logsumexp_HN,
    delta_HN,
    grad_key,
    grad_value,
    tiles_T3,
    scale,
    window,
    num_tokens,
    num_slots,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    grad_stride,
    grad_head_stride,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes the gradients of one tile of keys and values as far as one slot of its group's heads makes them.

    A group of heads that share keys is cut into SLOTS slots of HEADS heads each; a program goes through the heads
    of its slot one after the other. With one slot a group these are the whole gradients.
    """
    program = tl.program_id(0)
    slot = program % num_slots
    tile = tiles_T3 + program // num_slots * 3
    first, end = tl.load(tile), tl.load(tile + 2)
    scale = tl.cast(scale, tl.float32)
    columns = first + tl.arange(0, BLOCK_KEYS)
    group = slot // SLOTS
    keys = load_rows(
        key, group, first, end, key_stride, key_head_stride, BLOCK_KEYS, COLUMNS, HEAD_SIZE, True, DESCRIPTORS
    )
    values = load_rows(
        value, group, first, end, value_stride, value_head_stride, BLOCK_KEYS, COLUMNS, HEAD_SIZE, True, DESCRIPTORS
    )
    grad_keys = tl.zeros([BLOCK_KEYS, COLUMNS], tl.float32)
    grad_values = tl.zeros([BLOCK_KEYS, COLUMNS], tl.float32)
    stop = end
    if WINDOWED:
        stop = tl.minimum(end, first + BLOCK_KEYS + window)
    num_blocks = tl.cdiv(stop - first, BLOCK_QUERIES)
    # One loop over heads and blocks of queries, so that loads of the next head begin while one ends. Logits stand
    # transposed in it, [keys, queries], so that both products that sum over queries take them as they come.
    for index in tl.range(0, HEADS * num_blocks, num_stages=STAGES):
        head = slot * HEADS + index // num_blocks
        begin = first + index % num_blocks * BLOCK_QUERIES
        top = tl.minimum(begin, end - BLOCK_QUERIES) if DESCRIPTORS else begin
        rows = top + tl.arange(0, BLOCK_QUERIES)
        queries = load_rows(
            query, head, top, end, query_stride, query_head_stride, BLOCK_QUERIES, COLUMNS, HEAD_SIZE, True,
            DESCRIPTORS,
        )  # fmt: skip
        grads = load_rows(
            grad_output, head, top, end, grad_stride, grad_head_stride, BLOCK_QUERIES, COLUMNS, HEAD_SIZE, True,
            DESCRIPTORS,
        )  # fmt: skip
        statistics = head.to(tl.int64) * num_tokens + rows
        scores = tl.dot(keys, queries.T, input_precision=PRECISION)
        # Each of the two is read where it is needed, as registers are short. Where rows may lie past the end, a row
        # that does has no weight: two to the power of minus infinity.
        if DESCRIPTORS:
            lse = tl.load(logsumexp_HN + statistics)
        else:
            lse = tl.load(logsumexp_HN + statistics, mask=rows < end, other=float("inf"))
        weights = tl.exp2(scores * (scale * _LOG2_E) - (lse * _LOG2_E)[None, :])
        seen_by_all = (top == begin) & (top >= first + BLOCK_KEYS - 1)
        if WINDOWED:
            seen_by_all = seen_by_all & (top + BLOCK_QUERIES - 1 <= first + window)
        if not seen_by_all:
            # Compared as distances from the block's top, of which a thread holds few.
            queries_down = tl.arange(0, BLOCK_QUERIES)[None, :]
            visible = queries_down >= (tl.maximum(columns, begin) - top)[:, None]
            if WINDOWED:
                visible = visible & (queries_down <= (columns + window - top)[:, None])
            weights = tl.where(visible, weights, 0.0)
        grad_values = tl.dot(weights.to(grads.dtype), grads, grad_values, input_precision=PRECISION)
        grad_weights = tl.dot(values, grads.T, input_precision=PRECISION)
        if DESCRIPTORS:
            delta = tl.load(delta_HN + statistics)
        else:
            delta = tl.load(delta_HN + statistics, mask=rows < end, other=0.0)
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_keys = tl.dot(grad_scores.to(queries.dtype), queries, grad_keys, input_precision=PRECISION)
    store_rows(grad_key, grad_keys * scale, slot, first, end, num_slots, BLOCK_KEYS, COLUMNS, HEAD_SIZE)
    store_rows(grad_value, grad_values, slot, first, end, num_slots, BLOCK_KEYS, COLUMNS, HEAD_SIZE)
