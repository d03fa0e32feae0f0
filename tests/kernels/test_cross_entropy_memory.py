"""Memory at real sizes, without the memory: bytes of the tensors that live at once, of a run that computes nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, linear

from megatron_cpt.kernels import linear_cross_entropy
from megatron_cpt.kernels.cross_entropy import chunks
from tests.kernels.living import Living

NUM_TOKENS, HIDDEN_SIZE = 8192, 4096
MIB, GIB = 1 << 20, 1 << 30
SMALL = 2 * MIB  # numbers for each token


@pytest.fixture(autouse=True)
def _nothing_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and products need no memory on a GPU; on the CPU some rows are widened, and products made apart."""
    functions = SimpleNamespace(statistics=lambda *_: None, gradient=lambda *_, **__: None)
    monkeypatch.setattr(chunks, "row_functions", lambda _: functions)
    monkeypatch.setattr(chunks, "add_product", lambda *_: None)
    monkeypatch.setattr(chunks, "write_product", lambda *_: None)


def _peak_bytes(vocab_size: int, loss: Callable[[Tensor, Tensor, Tensor], Tensor], *given: Tensor) -> int:
    """Returns what forward and backward need besides their inputs; the gradients that come out are part of it."""
    hidden_ND, weight_VD = (
        torch.empty(rows, HIDDEN_SIZE, dtype=torch.bfloat16, requires_grad=True) for rows in (NUM_TOKENS, vocab_size)
    )
    labels_N = torch.zeros(NUM_TOKENS, dtype=torch.int64)
    with Living(hidden_ND, weight_VD, labels_N, *given) as living:
        grads = torch.autograd.grad(loss(hidden_ND, weight_VD, labels_N), (hidden_ND, weight_VD), allow_unused=True)
    assert grads[0] is not None
    return living.peak_bytes


def _ours(vocab_size: int, budget_bytes: int, **options: Any) -> int:
    def loss(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        return linear_cross_entropy(
            *(hidden_ND, weight_VD, labels_N),
            vocab_size=vocab_size,
            budget_bytes=budget_bytes,
            num_scored=NUM_TOKENS,
            implementation="torch",
            **{"reduction": "mean", **options},
        ).loss.sum()

    return _peak_bytes(vocab_size, loss, *(value for value in options.values() if isinstance(value, Tensor)))


@pytest.mark.parametrize(
    ("vocab_size", "budget_bytes"),
    [
        (32000, GIB),
        (43176, GIB),
        (43176, 256 * MIB),
        (128256, GIB),
        (128256, GIB // 2),
        (176000, GIB),
        (176000, 4 * GIB),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_budget_and_the_gradients_are_all_that_is_needed(
    vocab_size: int, budget_bytes: int, reduction: str
) -> None:
    gradients = 2 * (NUM_TOKENS + vocab_size) * HIDDEN_SIZE
    with FakeTensorMode():
        peak = _ours(vocab_size, budget_bytes, reduction=reduction)
    assert gradients < peak <= budget_bytes + gradients + SMALL


def test_many_chunks_and_main_grad_keep_all_logits_or_an_fp32_sum() -> None:
    """Whichever is less, as docs/kernels.md says."""
    vocab_size = 128256
    hidden, weight, logits = (2 * HIDDEN_SIZE * NUM_TOKENS, 2 * HIDDEN_SIZE * vocab_size, 2 * NUM_TOKENS * vocab_size)
    with FakeTensorMode():
        main_grad = torch.empty(vocab_size, HIDDEN_SIZE)
        many = _ours(vocab_size, GIB // 8)
        into_main_grad = _ours(vocab_size, GIB, main_grad=main_grad)
        halves = _ours(vocab_size, GIB, main_grad=main_grad, reduction="none")  # made twice, summed as they come
        trained = _ours(vocab_size, GIB, main_grad=main_grad, trainable_rows=vocab_size - 1024)
    assert hidden + weight + logits < many <= hidden + weight + logits + SMALL
    assert hidden + logits < into_main_grad <= hidden + logits + SMALL
    assert halves <= hidden + GIB + SMALL
    assert trained <= hidden + GIB + 4 * 1024 * HIDDEN_SIZE + SMALL


def test_beside_plain_cross_entropy() -> None:
    """A quarter of its memory or less under a budget of 256 MiB; under 1 GiB all logits fit, and it is 0.27 of it."""

    def plain(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        return cross_entropy(linear(hidden_ND, weight_VD).float(), labels_N)

    with FakeTensorMode():
        theirs = _peak_bytes(43176, plain)
        small, default = (_ours(43176, budget) / theirs for budget in (256 * MIB, GIB))
    print(f"of plain cross-entropy's memory at V = 43,176: {small:.3f} under 256 MiB, {default:.3f} under 1 GiB")
    assert small <= 0.25 and default <= 0.27
