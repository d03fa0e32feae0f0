"""Attention over packed documents in plain torch: a few batched calls of scaled_dot_product_attention.

Documents of a like length become the rows of one batch, filled up at their ends by repeating their last token.
Under a causal mask no token looks at what follows it, so the filling needs no mask: every call is the plain
causal one, for which torch picks the kernel. On the CPU, and on CUDA in bf16, that is a fused one, which keeps no
W x W matrix. On CUDA in fp32 with fewer key-value groups than query heads it is the plain one, which does keep
it, for every row and head of a batch.

Under a sliding window a long document is cut into blocks of queries, each with the keys that it can see and a mask.

Shape letters: N tokens, H query heads, G key-value groups, K head size; R rows (documents) and W width of a
batch, C = sum of R * W cells of all batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_cpt.kernels.attention.documents import Boundaries, lengths_differ, read_boundaries
from megatron_cpt.runtime.device import current_stream, upload

# A batch takes documents down to 1 / 1.5 of its longest: about 1.2 cells a token on mixed lengths, and at most
# 15 batches from 4096 tokens to 16, below which a document costs less than a call of its own.
_LENGTH_RATIO = 1.5
_SHORT_TOKENS = 16
# Under a window of W tokens a block of B queries is scored against B + W keys, and a block costs a call.
_LEAST_BLOCK = 256


def attention(
    query_NHK: Tensor,
    key_NGK: Tensor,
    value_NGK: Tensor,
    cu_seqlens: Boundaries,
    scale: float,
    window: int | None,
) -> Tensor:
    """Returns causal attention inside each document [N, H, K]; see `op.attention`."""
    device = query_NHK.device
    layout = _lay_out(read_boundaries(cu_seqlens, query_NHK.shape[0]), device, current_stream(device))
    query, key, value = (_gather(tensor, layout.token_of_cell_C) for tensor in (query_NHK, key_NGK, value_NGK))
    outputs = []
    start = 0
    for rows, width in layout.batches:
        cells = slice(start, start + rows * width)
        outputs.append(_attend(query[cells], key[cells], value[cells], rows, width, scale, window))
        start = cells.stop
    if not outputs:
        return torch.zeros_like(query_NHK)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _gather(output, layout.cell_of_token_N)


def _attend(
    query_CHK: Tensor, key_CGK: Tensor, value_CGK: Tensor, rows: int, width: int, scale: float, window: int | None
) -> Tensor:
    query, key, value = (
        tensor.unflatten(0, (rows, width)).transpose(1, 2) for tensor in (query_CHK, key_CGK, value_CGK)
    )
    grouped = query.shape[1] != key.shape[1]
    if window is None or window >= width - 1:
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        block = max(window, _LEAST_BLOCK)
        parts = []
        for first in range(0, width, block):
            stop, begin = min(first + block, width), max(first - window, 0)
            seen = _seen(first, stop, begin, window, query.device)
            parts.append(
                scaled_dot_product_attention(
                    query[:, :, first:stop],
                    key[:, :, begin:stop],
                    value[:, :, begin:stop],
                    attn_mask=seen,
                    scale=scale,
                    enable_gqa=grouped,
                )
            )
        output = torch.cat(parts, 2)
    return output.transpose(1, 2).flatten(0, 1)


def _seen(first: int, stop: int, begin: int, window: int, device: torch.device) -> Tensor:
    """Which keys from `begin` to `stop` (columns) the queries from `first` to `stop` (rows) see."""
    back = torch.arange(first, stop, device=device)[:, None] - torch.arange(begin, stop, device=device)
    return (back >= 0) & (back <= window)


def _gather(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor.index_select(0, index)


@dataclass(frozen=True)
class _Layout:
    """Batches of (R, W) whose cells follow each other; no indices where the cells are the tokens in order."""

    batches: tuple[tuple[int, int], ...]
    token_of_cell_C: Tensor | None = None
    cell_of_token_N: Tensor | None = None


# All layers of a model ask for the same few layouts; the cache spares them the work and the upload. What an
# evaluation in inference mode leaves there must serve training too, so the indices are ordinary tensors.
@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _lay_out(boundaries: tuple[int, ...], device: torch.device, stream: int) -> _Layout:
    """The batches of these documents; its indices are ready for work on the stream that they were made on."""
    documents = [(stop - start, start) for start, stop in pairwise(boundaries) if stop > start]
    if not lengths_differ(boundaries):
        return _Layout(tuple((len(documents), length) for length, _ in documents[:1]))
    num_tokens = boundaries[-1]
    batches = _group_by_length(documents)
    token_of_cell = []
    cell_of_token_N = torch.empty(num_tokens, dtype=torch.int64)
    num_cells = 0
    for batch in batches:
        lengths_R1, starts_R1 = torch.tensor(batch).T.unsqueeze(-1)
        columns_W = torch.arange(batch[0][0])
        tokens_RW = starts_R1 + torch.minimum(columns_W, lengths_R1 - 1)
        cells_RW = torch.arange(num_cells, num_cells + tokens_RW.numel()).view_as(tokens_RW)
        inside_RW = columns_W < lengths_R1
        cell_of_token_N[tokens_RW[inside_RW]] = cells_RW[inside_RW]
        token_of_cell.append(tokens_RW.flatten())
        num_cells += tokens_RW.numel()
    shapes = tuple((len(batch), batch[0][0]) for batch in batches)
    indices = upload(torch.cat((*token_of_cell, cell_of_token_N)), device).split([num_cells, num_tokens])
    return _Layout(shapes, *indices)


def _group_by_length(documents: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Groups documents (length, start) of a like length, longest first."""
    groups: list[list[tuple[int, int]]] = []
    for document in sorted(documents, reverse=True):
        longest = groups[-1][0][0] if groups else 0
        if groups and (document[0] * _LENGTH_RATIO >= longest or longest <= _SHORT_TOKENS):
            groups[-1].append(document)
        else:
            groups.append([document])
    return groups
