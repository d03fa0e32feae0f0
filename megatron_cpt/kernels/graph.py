"""Ops as torch.compile sees them: one node each, which it neither looks into nor breaks its graph at.

An eager call goes to an `autograd.Function`, whose way to the kernel is several times shorter than that of an op of
torch's dispatcher; a call that is being compiled goes to the op. Both run the same functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAMESPACE = "megatron_cpt"


class GraphOp:
    """A differentiable op of the namespace `megatron_cpt`.

    Args:
        name: of the op; its gradient is the op `<name>_backward`.
        forward: launches the kernel.
        fake: makes the results of `forward` without their values.
        backward: launches the gradient's kernel. A gradient that is not wanted comes back as an empty tensor.
        backward_fake: makes the results of `backward` without their values.
        save: (ctx, inputs, output): keeps what the gradient needs, as `setup_context` of an `autograd.Function`.
        arguments: (ctx, gradients of the results) -> what `backward` is called with; None where no gradient came.
        gradients: (ctx, results of `backward`) -> the gradient of each input, None where there is none.
        schema: of the op, as "(Tensor x, float y) -> Tensor"; None: that of the annotations of `forward`.
        backward_schema: of the gradient, likewise.
        backward_mutates: arguments of `backward` that it changes.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        backward: Callable[..., Any],
        backward_fake: Callable[..., Any],
        save: Callable[..., None],
        arguments: Callable[..., tuple[Any, ...] | None],
        gradients: Callable[..., tuple[Tensor | None, ...]],
        schema: str | None = None,
        backward_schema: str | None = None,
        backward_mutates: tuple[str, ...] = (),
    ) -> None:
        self._op: Any = torch.library.custom_op(f"{NAMESPACE}::{name}", forward, mutates_args=(), schema=schema)
        self._op.register_fake(fake)
        backward_op: Any = torch.library.custom_op(
            f"{NAMESPACE}::{name}_backward", backward, mutates_args=backward_mutates, schema=backward_schema
        )
        backward_op.register_fake(backward_fake)

        def way_back(function: Any, ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            given = arguments(ctx, *grads)
            return (None,) * len(ctx.needs_input_grad) if given is None else gradients(ctx, function(*given))

        def compiled_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return way_back(backward_op, ctx, grads)

        self._op.register_autograd(compiled_backward, setup_context=save)

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(*inputs: Any) -> Any:
                return forward(*inputs)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                save(ctx, inputs, output)

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
                return way_back(backward, ctx, grads)

        self._eager = Eager

    def __call__(self, *inputs: Any) -> Any:
        """Runs the op."""
        return self._op(*inputs) if torch.compiler.is_compiling() else self._eager.apply(*inputs)
