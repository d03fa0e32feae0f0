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
        schema: of the op, as "(Tensor x, float y) -> Tensor".
        forward: launches the kernel.
        fake: makes the results of `forward` without their values.
        backward_schema: of the gradient: what `save` keeps, after the gradients of the results.
        backward: launches the gradient's kernel. A gradient that is not wanted comes back as an empty tensor.
        backward_fake: makes the results of `backward` without their values.
        save: (ctx, inputs, output): keeps what the gradient needs, as `setup_context` of an `autograd.Function`.
        arguments: (ctx, gradients of the results) -> what `backward` is called with.
        gradients: (ctx, results of `backward`) -> the gradient of each input, None where there is none.
    """

    def __init__(
        self,
        name: str,
        *,
        schema: str,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        backward_schema: str,
        backward: Callable[..., Any],
        backward_fake: Callable[..., Any],
        save: Callable[..., None],
        arguments: Callable[..., tuple[Any, ...]],
        gradients: Callable[..., tuple[Tensor | None, ...]],
    ) -> None:
        self._op: Any = torch.library.custom_op(f"{NAMESPACE}::{name}", forward, mutates_args=(), schema=schema)
        self._op.register_fake(fake)
        backward_op: Any = torch.library.custom_op(
            f"{NAMESPACE}::{name}_backward", backward, mutates_args=(), schema=backward_schema
        )
        backward_op.register_fake(backward_fake)

        def compiled_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return gradients(ctx, backward_op(*arguments(ctx, *grads)))

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
                return gradients(ctx, backward(*arguments(ctx, *grads)))

        self._eager = Eager

    def __call__(self, *inputs: Any) -> Any:
        """Runs the op."""
        return self._op(*inputs) if torch.compiler.is_compiling() else self._eager.apply(*inputs)
