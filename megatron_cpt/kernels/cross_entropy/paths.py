"""The ways in which the op is computed, between tensors and without autograd.

Logits exist in chunks of tokens in a buffer under a budget of bytes, and are turned there into their gradient. Of
the four ways the first that fits is taken (`plan.make_plan`):

statistics  nothing trains: chunk by chunk, only what the loss needs.
kept        all logits of this rank fit the budget or one chunk, or take no more than a chunk and an fp32 sum of the
            weight's gradient would: they are kept for backward, which has the true gradient of every token. Three
            products, no sum over chunks.
forward     a scalar loss over a whole table: a chunk's gradients are made right after its logits, of the sum over
            tokens; backward multiplies them by the loss's gradient. Three products. The last chunk's for the weight
            is left to backward, and nothing is added to `main_grad` before it.
recompute   the rest: backward makes the logits again. Four products.

The weight's gradient is summed over the chunks where it is wanted, or, of more than four chunks in bf16, of any in
fp16, and for a `main_grad` that has to wait for backward, first in fp32 (`plan.Plan.wide_sum`).

Under sequence parallelism the tokens' gradient is on its way to the ranks while the weight's is computed.

Shape letters: N tokens, R of them on this rank under sequence parallelism, S of all that go through the products, T
of them in a chunk; D hidden size, L rows of the output matrix on this rank, M <= L of them inside the true
vocabulary; K statistics of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpt.kernels.cross_entropy.chunks import (
    Logits,
    Rows,
    WeightGradient,
    empty_statistics,
    find_scored,
    log_sum_exp,
    plan_of,
    select,
    shard_statistics,
    spread,
    token_rows,
)
from megatron_cpt.kernels.cross_entropy.exchange import gather_statistics, gather_tokens, scatter_tokens
from megatron_cpt.kernels.cross_entropy.plan import Call
from megatron_cpt.kernels.cross_entropy.products import multiply


class Results(NamedTuple):
    """What the forward pass leaves: results, and what backward needs; what does not exist is empty.

    No two are one tensor, and none is an input.
    """

    loss: Tensor
    nats_N: Tensor
    lse_N: Tensor
    correct_N: Tensor
    scored_S: Tensor  # int64, the tokens that were computed, where others were dropped
    tokens_SD: Tensor  # the hidden states that went through the products, where they are not the op's input
    denominator: Tensor  # of the mean; 1 for other reductions
    buffer_TM: Tensor  # logits (kept), or gradients of the last chunk's (forward); rows are padded
    grad_SD: Tensor  # forward: gradient of the tokens
    total_LD: Tensor  # forward: the weight's gradient without the last chunk's; a wide sum has the trained rows alone


def forward(hidden_RD: Tensor, weight_LD: Tensor, labels_N: Tensor, weights_N: Tensor | None, call: Call) -> Results:
    """Computes the loss, and what the plan's path leaves to backward."""
    num_tokens = len(labels_N)
    plan = plan_of(call, num_tokens, weight_LD)
    hidden_ND = gather_tokens(hidden_RD, call.group, call.group_size) if call.sequence_parallel else hidden_RD
    scored_S = find_scored(labels_N, call)
    tokens_SD = select(hidden_ND, scored_S, call)
    rows = token_rows(tokens_SD, labels_N, weights_N, scored_S, call)
    logits = Logits(call, plan, weight_LD)
    grad_SD: Tensor | None = None
    total_LD: Tensor | None = None
    if plan.path == "forward":
        statistics_KS, grad_SD, total_LD = _with_gradients(rows, logits, weight_LD)
    else:
        statistics_KS = shard_statistics(rows, logits)
    if call.group:
        statistics_KS = gather_statistics(statistics_KS, call.group, call.group_size)
    loss, nats_N, lse_N, correct_N, denominator = _losses(statistics_KS, rows, labels_N, scored_S, call)
    keeps_tokens = plan.path != "statistics" and tokens_SD is not hidden_RD
    keeps_buffer = plan.path == "kept" or (plan.path == "forward" and call.train_weight)
    return Results(
        loss=loss,
        nats_N=nats_N,
        lse_N=lse_N,
        correct_N=correct_N,
        scored_S=scored_S,
        tokens_SD=tokens_SD if keeps_tokens else hidden_RD.new_empty(0),
        denominator=denominator,
        buffer_TM=logits.buffer_TM if keeps_buffer else hidden_RD.new_empty(0, dtype=call.dtype),
        grad_SD=hidden_RD.new_empty(0) if grad_SD is None else grad_SD,
        total_LD=hidden_RD.new_empty(0) if total_LD is None else total_LD,
    )


def _with_gradients(rows: Rows, logits: Logits, weight_LD: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Statistics and, of the sum of the losses, the gradients of tokens [S, D] and of the weight.

    The last chunk's part of the weight's gradient is not in it; what it is made of stays in the buffer.
    """
    call, plan = logits.call, logits.plan
    tokens_SD = rows.tokens_SD
    statistics_KS = empty_statistics(plan, call, tokens_SD)
    grad_SD = torch.zeros_like(tokens_SD) if call.train_hidden else None
    weight = WeightGradient(weight_LD, None, call, plan)
    grad_S = _token_gradients(statistics_KS.new_ones(()), rows)
    parts = plan.parts()
    for part in parts:
        logits.write(tokens_SD[part])
        logits.statistics(rows.columns_S[part], statistics_KS[:, part])
        lse_T = log_sum_exp(statistics_KS[:, part], rows.invalid_S[part]).masked_fill_(rows.ignored_S[part], 0.0)
        grad_TM = logits.gradient(rows.columns_S[part], lse_T, grad_S[part])
        if grad_SD is not None:
            torch.mm(grad_TM, logits.weight_MD, out=grad_SD[part])
        if call.train_weight and part is not parts[-1]:
            weight.add(grad_TM, tokens_SD[part])
    return statistics_KS, grad_SD, weight.total


def _losses(
    statistics_KS: Tensor, rows: Rows, labels_N: Tensor, scored_S: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss (reduced), nats [N], log-sum-exp [N], correct [N] and the denominator of the mean."""
    lse_S = log_sum_exp(statistics_KS, rows.invalid_S)
    nats_S = lse_S - statistics_KS[2]
    correct_S = (statistics_KS[2] >= statistics_KS[0]) & ~rows.invalid_S & ~rows.ignored_S
    loss_S = nats_S
    if call.label_smoothing:
        even_S = lse_S - statistics_KS[3] / call.vocab_size
        loss_S = (1.0 - call.label_smoothing) * nats_S + call.label_smoothing * even_S
    if call.z_loss:
        loss_S = loss_S + call.z_loss * lse_S.square()
    if rows.weights_S is not None:
        loss_S = loss_S * rows.weights_S
    num_tokens = len(labels_N)
    loss_N, nats_N, lse_N = (
        spread(x_S.masked_fill(rows.ignored_S, 0.0), scored_S, num_tokens) for x_S in (loss_S, nats_S, lse_S)
    )
    if call.num_scored == 0:  # no row can tell that the count is wrong
        for result_N in (loss_N, nats_N, lse_N):
            result_N.masked_fill_(labels_N != call.ignore_index, torch.nan)
    loss = loss_N if call.reduction == "none" else loss_N.sum()
    denominator = lse_S.new_ones(())
    if call.reduction == "mean":
        weights_S = torch.ones_like(lse_S) if rows.weights_S is None else rows.weights_S
        denominator = weights_S.masked_fill(rows.ignored_S, 0.0).sum()
        denominator.masked_fill_(denominator == 0, 1.0)
        loss = loss / denominator
    return loss, nats_N, lse_N, spread(correct_S, scored_S, num_tokens), denominator


def _token_gradients(grad: Tensor, rows: Rows) -> Tensor:
    """Returns the gradient of each row's loss [S] of that of the whole: a scalar, or one for each row."""
    grad_S = grad.expand(len(rows.columns_S))
    if rows.weights_S is not None:
        grad_S = grad_S * rows.weights_S
    return grad_S.masked_fill(rows.ignored_S, 0.0)


def backward(
    grad_loss: Tensor,
    hidden_RD: Tensor,
    weight_LD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    main_grad_LD: Tensor | None,
    kept: Results,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of hidden states [R, D] and weight [L, D]; one that is not wanted is empty.

    `kept.buffer_TM`, `kept.grad_SD` and `kept.total_LD` are used up: the latter two become the gradients where they
    lie, but for tokens that were dropped and for a wide sum. Where the path fills them and they are empty, an earlier
    backward has used them, and the logits are made again. With `main_grad_LD` the weight's gradient is added there.
    """
    plan = plan_of(call, len(labels_N), weight_LD)
    tokens_SD = kept.tokens_SD if kept.tokens_SD.dim() == 2 else hidden_RD
    rows = token_rows(tokens_SD, labels_N, weights_N, kept.scored_S, call)
    scale = grad_loss.to(kept.lse_N.dtype)
    if call.reduction == "mean":
        scale = scale / kept.denominator
    begun = kept.total_LD if kept.total_LD.dim() == 2 else None
    weight = WeightGradient(weight_LD, main_grad_LD, call, plan, begun)
    has_buffer = kept.buffer_TM.dim() == 2
    logits = Logits(call, plan, weight_LD, kept.buffer_TM if has_buffer else None)
    if plan.path == "forward" and (has_buffer or kept.grad_SD.dim() == 2):
        grad_SD = multiply(kept.grad_SD, scale) if call.train_hidden else hidden_RD.new_empty(0)
        if call.train_weight and plan.parts():
            last = plan.parts()[-1]
            weight.add(logits.narrowed(last.stop - last.start), tokens_SD[last])
        return _to_tokens(grad_SD, kept, call)[0], weight.finish(scale)
    if call.reduction == "none":
        scale = select(scale, kept.scored_S, call)
    return _from_logits(rows, _token_gradients(scale, rows), logits, weight, kept, is_written=has_buffer)


def _from_logits(
    rows: Rows, grad_S: Tensor, logits: Logits, weight: WeightGradient, kept: Results, *, is_written: bool
) -> tuple[Tensor, Tensor]:
    """Both gradients by way of each chunk's logits, which `is_written` says are in the buffer already."""
    call, tokens_SD = logits.call, rows.tokens_SD
    lse_S = select(kept.lse_N, kept.scored_S, call)
    grad_SD = torch.zeros_like(tokens_SD) if call.train_hidden else tokens_SD.new_empty(0)
    sent: tuple[Tensor, dist.Work | None] | None = None
    parts = logits.plan.parts()
    for part in parts:
        if not is_written:
            logits.write(tokens_SD[part])
        grad_TM = logits.gradient(rows.columns_S[part], lse_S[part], grad_S[part])
        if call.train_hidden:
            torch.mm(grad_TM, logits.weight_MD, out=grad_SD[part])
        if part is parts[-1]:
            sent = _to_tokens(grad_SD, kept, call)  # under way while the weight's gradient is computed
        if call.train_weight:
            weight.add(grad_TM, tokens_SD[part])
    grad_RD, work = _to_tokens(grad_SD, kept, call) if sent is None else sent
    grad_LD = weight.finish()
    if work is not None:
        work.wait()
    return grad_RD, grad_LD


def _to_tokens(grad_SD: Tensor, kept: Results, call: Call) -> tuple[Tensor, dist.Work | None]:
    """Returns the gradient of the op's tokens [R, D], and what to wait for before it is read."""
    if not call.train_hidden:
        return grad_SD, None
    grad_ND = spread(grad_SD, kept.scored_S, len(kept.lse_N))
    return scatter_tokens(grad_ND, call.group, call.group_size) if call.sequence_parallel else (grad_ND, None)
