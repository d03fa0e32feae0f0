"""Ignored tokens: dropped where their number is known, and computed for nothing where it is not."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cpt.kernels.cross_entropy import linear_cross_entropy
from tests.kernels.cross_entropy_cases import HIDDEN, IGNORED, NUM_TOKENS, random_labels, uncounted

# What lies in the padding of a row is computed too and dropped.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.usefixtures("budget_alone"),
]


def test_ignored_tokens_and_frozen_rows_are_no_part_of_a_product() -> None:
    """Not even where they are not numbers."""
    labels = torch.tensor([3, IGNORED, 30, IGNORED, 7])
    hidden, weight = torch.randn(5, HIDDEN), torch.randn(140, HIDDEN)
    hidden[1], hidden[3] = torch.nan, torch.inf
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    shapes: list[tuple[int, ...]] = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ == "mm":
                shapes.append(tuple(out.shape))
            return out

    with Shapes():
        linear_cross_entropy(hidden, weight, labels, vocab_size=140, trainable_rows=70).loss.sum().backward()
    # From the multiple of 64 before the first row that trains.
    assert shapes == [(3, 140), (3, HIDDEN), (76, HIDDEN)]
    assert not weight.grad[:70].any() and weight.grad[70:].any(1).all()
    assert hidden.grad is not None and weight.grad is not None
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_a_count_of_scored_tokens_that_is_wrong_gives_nan() -> None:
    labels = torch.tensor([1, IGNORED, 2, IGNORED])
    arguments = torch.randn(4, 6), torch.randn(9, 6), labels
    right = linear_cross_entropy(*arguments, vocab_size=9, num_scored=2)
    assert torch.equal(right.loss, linear_cross_entropy(*arguments, vocab_size=9).loss)
    for count in (0, 1, 3, 4):
        wrong = linear_cross_entropy(*arguments, vocab_size=9, num_scored=count, reduction="sum")
        assert wrong.loss.isnan()
    assert linear_cross_entropy(*arguments, vocab_size=9, num_scored=0).loss.isnan().tolist() == [True, False] * 2


def test_the_compiler_makes_no_graph_for_each_count_of_scored_tokens() -> None:
    counter = CompileCounter()
    torch.compiler.reset()

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(hidden: Tensor, weight: Tensor, labels: Tensor, count: int) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, vocab_size=9, num_scored=count, reduction="sum").loss

    hidden, weight = torch.randn(8, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    for count in (3, 4, 5, 6):
        labels = torch.arange(8).masked_fill(torch.arange(8) >= count, IGNORED)
        expected = linear_cross_entropy(hidden, weight, labels, vocab_size=9, reduction="sum").loss
        assert torch.equal(compiled(hidden, weight, labels, count), expected)
    assert counter.frame_count <= 2  # the first count is taken for a constant


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("budget_bytes", [1 << 20, 4 * 64 * 9], ids=["whole", "chunks"])
@pytest.mark.usefixtures("triton")
def test_ignored_tokens_of_unknown_number_are_computed_and_count_for_nothing(
    budget_bytes: int, reduction: Any, implementation: str
) -> None:
    """As on a device that is not waited for."""
    labels = random_labels(40)
    inputs = torch.randn(NUM_TOKENS, HIDDEN), torch.randn(40, HIDDEN), torch.randn(NUM_TOKENS)
    options = {"vocab_size": 40, "reduction": reduction, "budget_bytes": budget_bytes, "label_smoothing": 0.1}
    found = []
    for context in (nullcontext, uncounted):
        hidden, weight = (x.clone().requires_grad_() for x in inputs[:2])
        with context():
            result = linear_cross_entropy(hidden, weight, labels, implementation=implementation, **options)
        (result.loss * (inputs[2] if reduction == "none" else 1.0)).sum().backward()
        found.append([*(x.detach() for x in result), hidden.grad, weight.grad])
        assert not result.nats_N[labels == IGNORED].any() and not result.correct_N[labels == IGNORED].any()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("budget_bytes", [1 << 20, 4 * 64 * 2], ids=["whole", "chunks"])
@pytest.mark.usefixtures("triton")
def test_huge_logits_of_ignored_tokens_that_are_computed_leave_gradients_finite(
    budget_bytes: int, reduction: Any, implementation: str
) -> None:
    """Logits of +-1e4, also where those of fp16 are infinite."""
    inputs = torch.randn(6, HIDDEN).bfloat16(), torch.randn(40, HIDDEN).bfloat16()
    labels = torch.tensor([1, IGNORED, 2, IGNORED, 39, 5])
    options = {"vocab_size": 40, "reduction": reduction, "budget_bytes": budget_bytes, "z_loss": 1e-4}
    for logits_dtype, scale in ((torch.bfloat16, 2e3), (torch.float16, 1e5)):
        hidden, weight = inputs[0] * torch.where(labels == IGNORED, scale, 1.0).bfloat16()[:, None], inputs[1].clone()
        found = []
        for context in (nullcontext, uncounted):
            leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            with context():
                result = linear_cross_entropy(
                    *(*leaves, labels), implementation=implementation, logits_dtype=logits_dtype, **options
                )
            found.append(torch.autograd.grad(result.loss.sum(), leaves))
        torch.testing.assert_close(*found, rtol=2**-7, atol=1e-2)
        assert not found[1][0][labels == IGNORED].any()
