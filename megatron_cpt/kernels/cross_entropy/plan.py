"""What one call of the op is asked for, and which way it is computed: arithmetic on sizes, no tensors.

Shape letters: N tokens, S of them scored, D hidden size, L rows of the output matrix on this rank, M <= L of them
inside the true vocabulary.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

Path = Literal["statistics", "kept", "forward", "recompute"]

# A product of fewer rows, or of a number that no tile divides, leaves an accelerator's matrix units idle.
ACCELERATOR_ROWS = 256
ACCELERATOR_LEAST_ROWS = 1024
# The Triton kernels load whole vectors up to the end of a row that is padded to this many logits.
TRITON_STRIDE = 64
# A matrix product whose operands begin anywhere but at a multiple of 8 elements is a slower one.
_ALIGNMENT = 64
# Sums of bf16 over at most so many chunks are made in bf16. Of n like chunks such a sum has sqrt((n + 1) / 2)
# times the rounding error of one product, 1.6 at most (1.9 where a factor of the loss comes to it that is no power of
# two), and needs no memory but the gradient's. fp16 has not the range for the sum over tokens of which a mean is made.
_MOST_OWN_SUMS = 4


class Call(NamedTuple):
    """The arguments of a call that are no tensors.

    An operator's schema knows no records, so they travel through it as one text (`encode`, `decode`), but
    for `num_scored`.
    """

    rows: str  # whose row functions work: "torch" or "triton"
    vocab_start: int
    vocab_size: int
    group: str  # name of the process group; empty: none
    group_size: int
    sequence_parallel: bool
    ignore_index: int
    num_scored: int  # labels that are not ignored; -1: not known, and every row is computed
    label_smoothing: float
    z_loss: float
    softcap: float  # 0: none
    reduction: str
    logits_dtype: str
    trainable_rows: int  # of the padded table; the rows before it get no gradient
    budget_bytes: int
    train_hidden: bool
    train_weight: bool
    has_main_grad: bool  # the weight's gradient is added to an fp32 tensor that is there

    def encode(self) -> str:
        """Returns the arguments as text."""
        return repr(tuple(self))

    @property
    def dtype(self) -> torch.dtype:
        """In which the logits are stored."""
        dtype: torch.dtype = getattr(torch, self.logits_dtype)
        return dtype

    @property
    def num_statistics(self) -> int:
        """Numbers a token that describe a shard's logits: greatest, sum of exponentials, label's, and sum."""
        return 4 if self.label_smoothing else 3


@lru_cache(maxsize=64)
def decode(text: str) -> Call:
    """Returns what `Call.encode` made a text of."""
    return Call(*ast.literal_eval(text))


@dataclass(frozen=True)
class Plan:
    """How a call is computed.

    Attributes:
        path: see `paths`.
        num_rows: S, tokens that go through the products.
        num_columns: M.
        stride: logits from one row of a buffer to the next, >= M.
        chunk: rows of a buffer.
        wide_sum: whether products for the weight's gradient are summed in fp32, in a tensor of its own; else they
            are added where the gradient is wanted.
    """

    path: Path
    num_rows: int
    num_columns: int
    stride: int
    chunk: int
    wide_sum: bool

    def parts(self) -> list[slice]:
        """Returns the rows of each chunk; none where there is nothing to multiply."""
        if not self.num_columns:
            return []
        starts = range(0, self.num_rows, self.chunk)
        return [slice(start, min(start + self.chunk, self.num_rows)) for start in starts]


def first_product_column(call: Call, num_columns: int) -> int:
    """First column of this rank that is part of the product for the weight's gradient."""
    first = first_trained_column(call, num_columns)
    return first if first == num_columns else first // _ALIGNMENT * _ALIGNMENT


def first_trained_column(call: Call, num_columns: int) -> int:
    """First column of this rank whose row of the weight gets a gradient."""
    return min(max(call.trainable_rows - call.vocab_start, 0), num_columns)


def allowance(call: Call, chunk_bytes: int, sum_bytes: int) -> int:
    """Returns how many bytes all logits may take: the budget, or what chunks and their sum would take together."""
    return max(call.budget_bytes, chunk_bytes + sum_bytes) if sum_bytes else call.budget_bytes


def make_plan(
    call: Call, num_tokens: int, num_local_rows: int, hidden_size: int, *, weight_dtype: torch.dtype, on_cpu: bool
) -> Plan:
    """Plans a call.

    Args:
        call: the arguments.
        num_tokens: N.
        num_local_rows: L.
        hidden_size: D.
        weight_dtype: of the weight and its gradient.
        on_cpu: whether any number of rows is as good as another.
    """
    num_rows = num_tokens if call.num_scored < 0 else call.num_scored
    num_columns = min(max(call.vocab_size - call.vocab_start, 0), num_local_rows)
    multiple = TRITON_STRIDE if call.rows == "triton" else 1
    stride = -(-num_columns // multiple) * multiple
    row_bytes = max(stride * call.dtype.itemsize, 1)
    granularity, least = (1, 1) if on_cpu else (ACCELERATOR_ROWS, ACCELERATOR_LEAST_ROWS)
    most = max(call.budget_bytes // row_bytes // granularity * granularity, least)
    num_chunks = max(-(-num_rows // most), 1)
    even = -(-num_rows // num_chunks)  # chunks of like sizes: none is a remainder of a few rows
    chunk = max(-(-even // granularity) * granularity, 1)
    in_forward = call.reduction != "none" and call.group_size == 1
    own_sums = {torch.float16: 1, torch.bfloat16: _MOST_OWN_SUMS}.get(weight_dtype, num_chunks)
    # To `main_grad` backward adds as it goes; what forward makes has to wait for it, and stays as precise meanwhile.
    wide_sum = in_forward if call.has_main_grad else num_chunks > own_sums
    num_trained = num_columns - first_product_column(call, num_columns) if call.train_weight else 0
    sum_bytes = 4 * num_trained * hidden_size if wide_sum else 0
    path: Path
    if not (call.train_hidden or call.train_weight):
        path = "statistics"
    elif num_chunks == 1 or num_rows * row_bytes <= allowance(call, chunk * row_bytes, sum_bytes):
        path, chunk, wide_sum = "kept", max(num_rows, 1), False  # a single product
    else:
        path = "forward" if in_forward else "recompute"
    return Plan(path, num_rows, num_columns, stride, chunk, wide_sum)
