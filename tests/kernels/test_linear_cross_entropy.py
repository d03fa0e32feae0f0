from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_cpt.kernels import linear_cross_entropy

NUM_TOKENS = 37
HIDDEN = 24
IGNORED = -100


def _labels(vocab_size: int) -> Tensor:
    labels = torch.randint(0, vocab_size, (NUM_TOKENS,))
    labels[:2], labels[2:4], labels[4:8] = 0, vocab_size - 1, IGNORED
    return labels


def _native(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = linear(hidden, weight)
    return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


def _run(function: Any, hidden: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(hidden, weight)
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight), grad))


@pytest.mark.parametrize("chunk_tokens", [1, 5, NUM_TOKENS, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab_size", [1, 7, 250, 5397])
def test_values_and_gradients(
    vocab_size: int, dtype: torch.dtype, chunk_tokens: int, assert_accurate: Any, poisoned: Any
) -> None:
    padded = -(-vocab_size // 8) * 8
    hidden, weight = poisoned(NUM_TOKENS, HIDDEN, dtype=dtype), poisoned(padded, HIDDEN, dtype=dtype)
    weight[vocab_size:] = torch.nan
    labels, grad = _labels(vocab_size), poisoned(NUM_TOKENS)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, labels, vocab_size=vocab_size, budget_bytes=chunk_tokens * 4 * padded)

    loss, grad_hidden, grad_weight = _run(ours, hidden, weight, grad)
    assert (loss.dtype, grad_hidden.dtype, grad_weight.dtype) == (torch.float32, dtype, dtype)
    assert not loss[4:8].any() and not grad_hidden[4:8].any() and not grad_weight[vocab_size:].any()
    got = loss, grad_hidden, grad_weight[:vocab_size]
    native = _run(lambda x, w: _native(x, w, labels), hidden, weight[:vocab_size], grad)
    truth = _run(lambda x, w: _native(x, w, labels), hidden.double(), weight[:vocab_size].double(), grad.double())
    for what, *values in zip(("loss", "hidden", "weight"), got, native, truth, strict=True):
        assert_accurate(what, *values)


def test_logits_of_ten_thousand_stay_exact(assert_accurate: Any) -> None:
    hidden, weight = torch.randn(NUM_TOKENS, HIDDEN), torch.randn(50, HIDDEN) * 1e3
    labels, grad = _labels(50), torch.randn(NUM_TOKENS)
    got = _run(lambda x, w: linear_cross_entropy(x, w, labels, vocab_size=50), hidden, weight, grad)
    native = _run(lambda x, w: _native(x, w, labels), hidden, weight, grad)
    truth = _run(lambda x, w: _native(x, w, labels), hidden.double(), weight.double(), grad.double())
    for what, *values in zip(("loss", "hidden", "weight"), got, native, truth, strict=True):
        assert_accurate(what, *values)


def test_small_chunks_in_bf16_lose_nothing_of_the_weight_gradient(assert_accurate: Any) -> None:
    hidden, weight = torch.rand(500, HIDDEN).bfloat16(), torch.randn(30, HIDDEN).bfloat16()
    labels, grad = torch.full((500,), 3), torch.ones(500)
    _, _, got = _run(
        lambda x, w: linear_cross_entropy(x, w, labels, vocab_size=30, budget_bytes=1), hidden, weight, grad
    )
    _, _, native = _run(lambda x, w: _native(x, w, labels), hidden, weight, grad)
    _, _, truth = _run(lambda x, w: _native(x, w, labels), hidden.double(), weight.double(), grad.double())
    assert_accurate("weight", got, native, truth)


def test_gradients_against_finite_differences() -> None:
    hidden, weight = torch.randn(6, 3).double().requires_grad_(), torch.randn(8, 3).double().requires_grad_()
    labels = torch.tensor([0, 4, IGNORED, 2, 2, 1], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy(x, w, labels, vocab_size=5, budget_bytes=8 * 8 * 4), (hidden, weight)
    )


class _Logits(TorchDispatchMode):
    """Follows the storages of all tensors [*, width] but the weight's, and counts the matrix products."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.width, self.peak_bytes, self.products = weight.shape[0], 0, 0
        self._weight = StorageWeakRef(weight.untyped_storage()).cdata
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == self.width:
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage.cdata != self._weight:
                    self._alive[storage.cdata] = (storage, tensor.untyped_storage().nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))
        return out


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.0), (torch.bfloat16, 1.5)], ids=["fp32", "bf16"])
def test_live_logits_never_exceed_the_budget(dtype: torch.dtype, factor: float) -> None:
    hidden = torch.randn(64, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(1000, 5, dtype=dtype, requires_grad=True)
    budget_bytes = 9 * 4 * 1000 + 17
    with _Logits(weight) as logits:
        labels = torch.randint(0, 1000, (64,))
        linear_cross_entropy(hidden, weight, labels, vocab_size=1000, budget_bytes=budget_bytes).sum().backward()
    assert 0.8 * factor * budget_bytes < logits.peak_bytes <= factor * budget_bytes


def test_frozen_tensors_cost_no_product() -> None:
    labels = torch.randint(0, 40, (NUM_TOKENS,))
    for trained, products in (((True, True), 4), ((True, False), 3), ((False, True), 3), ((False, False), 1)):
        hidden = torch.randn(NUM_TOKENS, HIDDEN, requires_grad=trained[0])
        weight = torch.randn(40, HIDDEN, requires_grad=trained[1])
        with _Logits(weight) as logits:
            loss = linear_cross_entropy(hidden, weight, labels, vocab_size=40)
            if any(trained):
                loss.sum().backward()
        assert logits.products == products
        assert (hidden.grad is not None, weight.grad is not None) == trained


def test_only_ignored_tokens_and_no_tokens() -> None:
    for num_tokens in (5, 0):
        hidden = torch.randn(num_tokens, HIDDEN, requires_grad=True)
        weight = torch.randn(9, HIDDEN, requires_grad=True)
        labels = torch.full((num_tokens,), -1)
        loss = linear_cross_entropy(hidden, weight, labels, vocab_size=9, ignore_index=-1)
        loss.sum().backward()
        assert torch.equal(loss, torch.zeros(num_tokens))
        assert hidden.grad is not None and not hidden.grad.any()
        assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("label", [9, 11, -1])
def test_a_label_outside_the_vocabulary_cannot_pass_unseen(label: int) -> None:
    hidden, weight = torch.randn(3, HIDDEN, requires_grad=True), torch.randn(12, HIDDEN, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, label, 8]), vocab_size=9)
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert hidden.grad is not None and hidden.grad.isnan().any(1).tolist() == [False, True, False]


def test_backward_twice_gives_the_same_bits() -> None:
    hidden, weight = torch.randn(NUM_TOKENS, HIDDEN, requires_grad=True), torch.randn(90, HIDDEN, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, _labels(90), vocab_size=90, budget_bytes=4 * 90 * 8).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_ND": torch.zeros(4, 5)}, r"expected \[N, D\]"),
        ({"labels_N": torch.zeros(3, dtype=torch.int64)}, r"expected \[N, D\]"),
        ({"weight_LD": torch.zeros(8, 6).bfloat16()}, "one floating dtype"),
        ({"labels_N": torch.zeros(4)}, "torch.int64 or torch.int32"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"budget_bytes": 0}, "budget_bytes 0"),
        ({"vocab_size": 9}, "the whole table, or the group"),
        ({"vocab_start": 2}, "the whole table, or the group"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden_ND": torch.zeros(4, 6),
        "weight_LD": torch.zeros(8, 6),
        "labels_N": torch.zeros(4, dtype=torch.int64),
        "vocab_size": 7,
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(arguments | change))
