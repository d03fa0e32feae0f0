"""The op as autograd and torch.compile see it: one node each way (`kernels.graph`).

What the forward operator keeps for backward is handed over once: backward turns the logits into their gradient where
they lie. A second backward through the same graph finds nothing kept and makes the logits again, with the same
result. Gradients of gradients are not defined, and asking for them raises.

Shape letters: as in `paths`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_cpt.kernels.cross_entropy import paths
from megatron_cpt.kernels.cross_entropy.chunks import plan_of, wide_dtype
from megatron_cpt.kernels.cross_entropy.plan import Call, decode, first_product_column
from megatron_cpt.kernels.graph import GraphOp

Ten = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# Positions in what the forward operator returns.
_LSE, _SCORED, _TOKENS, _DENOMINATOR = 2, 4, 5, 6


def settings_of(call: str, num_scored: int) -> Call:
    """Returns the arguments of a call whose text has no number of scored tokens.

    That number differs from batch to batch: as an argument of its own it costs a compiler no new graph.
    """
    return decode(call)._replace(num_scored=num_scored)


def forward(
    hidden_RD: Tensor,
    weight_LD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    main_grad_LD: Tensor | None,
    call: str,
    num_scored: int,
) -> Ten:
    """Returns what `paths.forward` does; `main_grad_LD` is for backward alone."""
    return tuple(paths.forward(hidden_RD, weight_LD, labels_N, weights_N, settings_of(call, num_scored)))  # type: ignore[return-value]


def _forward_fake(
    hidden_RD: Tensor,
    weight_LD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    main_grad_LD: Tensor | None,
    call: str,
    num_scored: int,
) -> Ten:
    settings = settings_of(call, num_scored)
    num_tokens = len(labels_N)
    plan = plan_of(settings, num_tokens, weight_LD)
    wide = wide_dtype(hidden_RD)
    hidden_size = hidden_RD.shape[1]
    loss_N, nats_N, lse_N = (hidden_RD.new_empty(num_tokens, dtype=wide) for _ in range(3))
    drops = plan.num_rows != num_tokens
    in_forward = plan.path == "forward"
    keeps_tokens = plan.path != "statistics" and (drops or settings.sequence_parallel)
    keeps_buffer = plan.path == "kept" or (in_forward and settings.train_weight)
    buffer = (min(plan.chunk, plan.num_rows), plan.stride) if keeps_buffer else (0,)
    has_total = in_forward and settings.train_weight and plan.num_rows > plan.chunk
    total = hidden_RD.new_empty(0)
    if has_total and plan.wide_sum:
        num_trained = plan.num_columns - first_product_column(settings, plan.num_columns)
        total = loss_N.new_empty(num_trained, hidden_size)
    elif has_total:
        total = torch.empty_like(weight_LD)
    return (
        loss_N if settings.reduction == "none" else loss_N.new_empty(()),
        nats_N,
        lse_N,
        hidden_RD.new_empty(num_tokens, dtype=torch.bool),
        hidden_RD.new_empty(plan.num_rows if drops else 0, dtype=torch.int64),
        hidden_RD.new_empty((plan.num_rows, hidden_size) if keeps_tokens else (0,)),
        loss_N.new_empty(()),
        hidden_RD.new_empty(buffer, dtype=settings.dtype),
        hidden_RD.new_empty((plan.num_rows, hidden_size) if in_forward and settings.train_hidden else (0,)),
        total,
    )


def backward(
    grad_loss: Tensor,
    hidden_RD: Tensor,
    weight_LD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    main_grad_LD: Tensor | None,
    lse_N: Tensor,
    scored_S: Tensor,
    tokens_SD: Tensor,
    denominator: Tensor,
    buffer_TM: Tensor,
    grad_SD: Tensor,
    total_LD: Tensor,
    call: str,
    num_scored: int,
) -> tuple[Tensor, Tensor]:
    """Returns what `paths.backward` does, but of a gradient that lies in an argument an empty tensor.

    No result of an operator may be one of its arguments; `_gradients` has them.
    """
    kept = paths.Results(
        grad_loss, lse_N, lse_N, scored_S, scored_S, tokens_SD, denominator, buffer_TM, grad_SD, total_LD
    )
    grad_RD, grad_LD = paths.backward(
        grad_loss, hidden_RD, weight_LD, labels_N, weights_N, main_grad_LD, kept, settings_of(call, num_scored)
    )
    return (
        grad_RD.new_empty(0) if grad_RD is grad_SD else grad_RD,
        grad_LD.new_empty(0) if grad_LD is total_LD else grad_LD,
    )


def _backward_fake(
    grad_loss: Tensor,
    hidden_RD: Tensor,
    weight_LD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    main_grad_LD: Tensor | None,
    lse_N: Tensor,
    scored_S: Tensor,
    tokens_SD: Tensor,
    denominator: Tensor,
    buffer_TM: Tensor,
    grad_SD: Tensor,
    total_LD: Tensor,
    call: str,
    num_scored: int,
) -> tuple[Tensor, Tensor]:
    settings = settings_of(call, num_scored)
    is_in_sum = total_LD.dim() == 2 and not plan_of(settings, len(labels_N), weight_LD).wide_sum
    returns_weight = settings.train_weight and main_grad_LD is None and not is_in_sum
    returns_hidden = settings.train_hidden and grad_SD.shape != hidden_RD.shape
    return (
        hidden_RD.new_empty(hidden_RD.shape if returns_hidden else (0,)),
        weight_LD.new_empty(weight_LD.shape if returns_weight else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Ten) -> None:
    hidden_RD, weight_LD, labels_N, weights_N, main_grad_LD, call, num_scored = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(
        hidden_RD,
        weight_LD,
        labels_N,
        weights_N,
        *(output[position] for position in (_LSE, _SCORED, _TOKENS, _DENOMINATOR)),
    )
    # Changed in place between forward and backward, and by backward, which is meant to be so.
    ctx.main_grad_LD = main_grad_LD
    ctx.once = output[_DENOMINATOR + 1 :]
    ctx.call, ctx.num_scored = call, num_scored


def _arguments(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Any, ...] | None:
    if grad_loss is None:
        return None
    hidden_RD, weight_LD, labels_N, weights_N, *kept = ctx.saved_tensors
    once, ctx.once = ctx.once, None
    if once is None:
        dtype = settings_of(ctx.call, ctx.num_scored).dtype
        once = hidden_RD.new_empty(0, dtype=dtype), hidden_RD.new_empty(0), hidden_RD.new_empty(0)
    ctx.made = once[1:]
    return (
        *(grad_loss, hidden_RD, weight_LD, labels_N, weights_N, ctx.main_grad_LD),
        *(*kept, *once, ctx.call, ctx.num_scored),
    )


def _gradients(ctx: Any, made: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    call = settings_of(ctx.call, ctx.num_scored)
    grad_RD, grad_LD = made
    (grad_SD, total_LD), ctx.made = ctx.made, None
    grad_hidden = (grad_RD if grad_RD.dim() == 2 else grad_SD) if call.train_hidden else None
    grad_weight = (grad_LD if grad_LD.dim() == 2 else total_LD) if call.train_weight else None
    if call.train_weight and ctx.main_grad_LD is not None:
        grad_weight = _stand_in(ctx.saved_tensors[1])
    return grad_hidden, grad_weight, None, None, None, None, None


def _stand_in(weight_LD: Tensor) -> Tensor | None:
    """Tells megatron-core that `main_grad` has the gradient, and returns what it wants in its place.

    Its hooks fire for a weight by the gradient that autograd brings, and skip that gradient's values where
    `grad_added_to_main_grad` is set. A weight with `zero_out_wgrad` has a second use (a tied embedding) whose
    gradient is added to this one.
    """
    if not hasattr(weight_LD, "grad_added_to_main_grad"):
        return None
    weight_LD.grad_added_to_main_grad = True
    if getattr(weight_LD, "zero_out_wgrad", False):
        return weight_LD.new_zeros(()).expand_as(weight_LD)  # waits for the other gradient, and takes no memory
    return torch.empty_like(weight_LD)


# As `paths.forward`; of what it returns the loss is differentiable.
run = GraphOp(
    "linear_cross_entropy",
    forward=forward,
    fake=_forward_fake,
    backward=backward,
    backward_fake=_backward_fake,
    backward_mutates=("main_grad_LD", "buffer_TM", "grad_SD", "total_LD"),
    save=_save,
    arguments=_arguments,
    gradients=_gradients,
)
