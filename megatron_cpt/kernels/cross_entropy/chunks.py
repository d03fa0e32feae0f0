"""The parts of which the op's ways are made: rows, chunks of logits, and where the weight's gradient goes.

Shape letters: N tokens, S of them that go through the products, T of them in a chunk; D hidden size, L rows of the
output matrix on this rank, M <= L of them inside the true vocabulary; K statistics of a token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_cpt.kernels.cross_entropy import torch_rows
from megatron_cpt.kernels.cross_entropy.plan import (
    Call,
    Plan,
    first_product_column,
    first_trained_column,
    make_plan,
)
from megatron_cpt.kernels.cross_entropy.products import add_product, multiply, write_logits, write_product

# oneDNN's bf16 product on a CPU with AMX reads a row to the next multiple of 32 elements and multiplies what lies
# behind its end by zero: there must be numbers.
_TAIL = 64


class Rows(NamedTuple):
    """What is known of the rows that go through the products."""

    tokens_SD: Tensor
    columns_S: Tensor  # int64, the label's row in this rank's slice; outside [0, M) where it is not here
    invalid_S: Tensor  # bool, labels outside the vocabulary
    ignored_S: Tensor  # bool, labels that are ignored and were not dropped
    weights_S: Tensor | None


def row_functions(name: str) -> Any:
    """Returns the module whose `statistics` and `gradient` work on the logits."""
    if name == "torch":
        return torch_rows
    from megatron_cpt.kernels.cross_entropy import triton_rows

    return triton_rows


def plan_of(call: Call, tokens: int, weight_LD: Tensor) -> Plan:
    """Plans a call on N tokens."""
    on_cpu = weight_LD.device.type == "cpu"
    return make_plan(call, tokens, *weight_LD.shape, weight_dtype=weight_LD.dtype, on_cpu=on_cpu)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of losses and statistics."""
    return torch.promote_types(tensor.dtype, torch.float32)


def find_scored(labels_N: Tensor, call: Call) -> Tensor:
    """Returns the scored tokens in their order, int64; empty where no token is dropped."""
    if call.num_scored in (-1, len(labels_N)):
        return labels_N.new_empty(0, dtype=torch.int64)
    return torch.argsort(labels_N == call.ignore_index, stable=True)[: call.num_scored]


def select(tensor: Tensor, scored_S: Tensor, call: Call) -> Tensor:
    """Returns the rows that are not dropped."""
    return tensor if call.num_scored in (-1, len(tensor)) else tensor.index_select(0, scored_S)


def spread(part: Tensor, scored_S: Tensor, num_tokens: int) -> Tensor:
    """Puts rows back where they were, with zeros between them."""
    if len(part) == num_tokens:
        return part
    return part.new_zeros(num_tokens, *part.shape[1:]).index_copy_(0, scored_S, part)


def token_rows(tokens_SD: Tensor, labels_N: Tensor, weights_N: Tensor | None, scored_S: Tensor, call: Call) -> Rows:
    """Gathers what is known of the rows; `tokens_SD` are the selected ones already."""
    labels_S = select(labels_N, scored_S, call)
    ignored_S = labels_S == call.ignore_index
    columns_S = torch.where(ignored_S, -1, labels_S.long() - call.vocab_start)
    invalid_S = ((labels_S < 0) | (labels_S >= call.vocab_size)) & ~ignored_S
    if call.num_scored >= 0:
        # The caller's count; a wrong one would drop tokens that are scored, and checking it would wait for the device.
        invalid_S = invalid_S | ((labels_N != call.ignore_index).sum() != call.num_scored)
    weights_S = None if weights_N is None else select(weights_N, scored_S, call).to(wide_dtype(tokens_SD))
    return Rows(tokens_SD, columns_S, invalid_S, ignored_S, weights_S)


class Logits:
    """Makes chunks of logits in one buffer, and their gradients in their place."""

    def __init__(self, call: Call, plan: Plan, weight_LD: Tensor, buffer_TM: Tensor | None = None) -> None:
        self.call, self.plan = call, plan
        self.weight_MD = weight_LD[: plan.num_columns]
        if buffer_TM is None:
            buffer_TM = weight_LD.new_empty(min(plan.chunk, plan.num_rows), plan.stride, dtype=call.dtype)
        self.buffer_TM = buffer_TM
        self.functions = row_functions(call.rows)

    def write(self, tokens_TD: Tensor) -> None:
        """Fills the front of the buffer."""
        write_logits(tokens_TD, self.weight_MD, self._logits(len(tokens_TD)))

    def statistics(self, columns_T: Tensor, out_KT: Tensor) -> None:
        """Describes what `write` has left."""
        self.functions.statistics(self._logits(len(columns_T)), columns_T, out_KT, self.call.softcap)

    def gradient(self, columns_T: Tensor, lse_T: Tensor, grad_T: Tensor) -> Tensor:
        """Turns what `write` has left into its gradient [T, M] in the dtype of the weight, and returns it."""
        call = self.call
        out_TM = self.narrowed(len(columns_T))
        self.functions.gradient(
            self._logits(len(columns_T)),
            out_TM,
            columns_T,
            lse_T,
            grad_T,
            vocab_size=call.vocab_size,
            label_smoothing=call.label_smoothing,
            z_loss=call.z_loss,
            softcap=call.softcap,
        )
        if self.buffer_TM.device.type == "cpu":
            self._elements()[: len(columns_T), self.plan.num_columns :][:, :_TAIL].zero_()
        return out_TM

    def narrowed(self, num_rows: int) -> Tensor:
        """The buffer as gradients [T, M]: each row begins where the row of its logits begins."""
        return self._elements()[:num_rows, : self.plan.num_columns]

    def _elements(self) -> Tensor:
        return self.buffer_TM.view(self.weight_MD.dtype)

    def _logits(self, num_rows: int) -> Tensor:
        return self.buffer_TM[:num_rows, : self.plan.num_columns]


def log_sum_exp(statistics_KS: Tensor, invalid_S: Tensor) -> Tensor:
    """Returns log of the sum of exponentials over the vocabulary; NaN where a label is invalid."""
    return statistics_KS[1].log().add_(statistics_KS[0]).masked_fill_(invalid_S, torch.nan)


def empty_statistics(plan: Plan, call: Call, like: Tensor) -> Tensor:
    """Returns statistics [K, S] of no columns."""
    statistics_KS = like.new_zeros(call.num_statistics, plan.num_rows, dtype=wide_dtype(like))
    statistics_KS[0] = -torch.inf
    return statistics_KS


def shard_statistics(rows: Rows, logits: Logits) -> Tensor:
    """Returns the statistics [K, S] of this rank's columns; the last chunk's logits stay in the buffer."""
    statistics_KS = empty_statistics(logits.plan, logits.call, rows.tokens_SD)
    for part in logits.plan.parts():
        logits.write(rows.tokens_SD[part])
        logits.statistics(rows.columns_S[part], statistics_KS[:, part])
    return statistics_KS


class WeightGradient:
    """Where the products for the weight's gradient are added up, in the order in which they come.

    In a new gradient [L, D]; in `main_grad`; or first in a wide sum [M, D] of the trained rows, as `plan.wide_sum`
    says. `begun` is `total` of an earlier one that this one goes on with.
    """

    def __init__(
        self, weight_LD: Tensor, main_grad_LD: Tensor | None, call: Call, plan: Plan, begun: Tensor | None = None
    ) -> None:
        self.weight_LD, self.main_grad_LD = weight_LD, main_grad_LD
        self.call, self.is_wide = call, plan.wide_sum
        self.trained = slice(first_product_column(call, plan.num_columns), plan.num_columns)
        self.total = begun

    def add(self, grad_TM: Tensor, tokens_TD: Tensor) -> None:
        """Adds a chunk's part."""
        grad_TM = trained_columns(grad_TM, self.call)
        if self.main_grad_LD is not None and not self.is_wide:
            add_product(self.main_grad_LD[self.trained], grad_TM, tokens_TD)
        elif self.total is not None:
            add_product(self.total if self.is_wide else self.total[self.trained], grad_TM, tokens_TD)
        elif self.is_wide:
            self.total = tokens_TD.new_empty(grad_TM.shape[1], tokens_TD.shape[1], dtype=wide_dtype(tokens_TD))
            write_product(grad_TM, tokens_TD, self.total)
        else:
            self.total = self._new_gradient()
            write_product(grad_TM, tokens_TD, self.total[self.trained])

    def finish(self, scale: Tensor | None = None) -> Tensor:
        """Returns the gradient [L, D], times a factor; empty where none is wanted or `main_grad` has it."""
        nothing = self.weight_LD.new_empty(0)
        if not self.call.train_weight:
            return nothing
        if self.main_grad_LD is not None:
            if self.total is not None:
                self.main_grad_LD[self.trained].add_(self.total if scale is None else self.total.mul_(scale))
            return nothing
        if self.total is None:
            return torch.zeros_like(self.weight_LD)
        if self.is_wide:
            gradient_LD = self._new_gradient()
            gradient_LD[self.trained] = self.total if scale is None else self.total.mul_(scale)
            return gradient_LD
        if scale is not None:
            multiply(self.total[self.trained], scale)
        return self.total

    def _new_gradient(self) -> Tensor:
        """A gradient whose frozen and padded rows are zero."""
        gradient_LD = torch.empty_like(self.weight_LD)
        gradient_LD[: self.trained.start] = 0
        gradient_LD[self.trained.stop :] = 0
        return gradient_LD


def trained_columns(grad_TM: Tensor, call: Call) -> Tensor:
    """Returns the columns for the weight's product. Those of frozen rows among them are set to zero."""
    num_columns = grad_TM.shape[1]
    start = first_product_column(call, num_columns)
    grad_TM[:, start : first_trained_column(call, num_columns)] = 0
    return grad_TM[:, start:]
