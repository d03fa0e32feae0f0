from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from megatron_cpt.kernels.cross_entropy import library, linear_cross_entropy, torch_rows
from tests.kernels.cross_entropy_cases import HIDDEN, IGNORED, NUM_TOKENS, random_labels
from tests.kernels.guarded import assert_within_reference_error
from tests.kernels.living import Living

# What lies in the padding of a row is computed too and dropped.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.usefixtures("budget_alone"),
]


def _native(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = linear(hidden, weight)
    return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


def _run(function: Any, hidden: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(hidden, weight)
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight), grad))


@pytest.mark.parametrize("chunk_tokens", [1, 5, 10, NUM_TOKENS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab_size", [1, 7, 250, 5397])
def test_values_and_gradients(
    vocab_size: int, dtype: torch.dtype, chunk_tokens: int, assert_accurate: Any, poisoned: Any
) -> None:
    padded = -(-vocab_size // 8) * 8
    hidden, weight = poisoned(NUM_TOKENS, HIDDEN, dtype=dtype), poisoned(padded, HIDDEN, dtype=dtype)
    weight[vocab_size:] = torch.nan
    labels, grad = random_labels(vocab_size), poisoned(NUM_TOKENS)
    row_bytes = dtype.itemsize * vocab_size

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, labels, vocab_size=vocab_size, budget_bytes=chunk_tokens * row_bytes).loss

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
    labels, grad = random_labels(50), torch.randn(NUM_TOKENS)
    got = _run(lambda x, w: linear_cross_entropy(x, w, labels, vocab_size=50).loss, hidden, weight, grad)
    native = _run(lambda x, w: _native(x, w, labels), hidden, weight, grad)
    truth = _run(lambda x, w: _native(x, w, labels), hidden.double(), weight.double(), grad.double())
    for what, *values in zip(("loss", "hidden", "weight"), got, native, truth, strict=True):
        assert_accurate(what, *values)


def test_small_chunks_in_bf16_lose_nothing_of_the_weight_gradient(assert_accurate: Any) -> None:
    hidden, weight = torch.rand(500, HIDDEN).bfloat16(), torch.randn(30, HIDDEN).bfloat16()
    labels, grad = torch.full((500,), 3), torch.ones(500)
    _, _, got = _run(
        lambda x, w: linear_cross_entropy(x, w, labels, vocab_size=30, budget_bytes=1).loss, hidden, weight, grad
    )
    _, _, native = _run(lambda x, w: _native(x, w, labels), hidden, weight, grad)
    _, _, truth = _run(lambda x, w: _native(x, w, labels), hidden.double(), weight.double(), grad.double())
    assert_accurate("weight", got, native, truth)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("budget_bytes", [1 << 20, 8 * 5 * 2], ids=["whole", "chunks"])
def test_gradients_against_finite_differences(budget_bytes: int, reduction: Any) -> None:
    hidden, weight = torch.randn(6, 3).double().requires_grad_(), torch.randn(8, 3).double().requires_grad_()
    labels = torch.tensor([0, 4, IGNORED, 2, 2, 1], dtype=torch.int32)
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "token_weights_N": torch.rand(6)}
    assert torch.autograd.gradcheck(
        lambda x, w: (
            linear_cross_entropy(
                x, w, labels, vocab_size=5, budget_bytes=budget_bytes, reduction=reduction, **options
            ).loss
        ),
        (hidden, weight),
        nondet_tol=1e-12,  # a second backward makes the logits again
    )


def _logits(weight: Tensor) -> Living:
    """Follows all tensors [rows, width] but the weight."""
    return Living(weight, counts=lambda tensor: tensor.dim() == 2 and tensor.shape[1] == weight.shape[0])


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_live_logits_never_exceed_the_budget(
    dtype: torch.dtype, reduction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the few rows that are widened at a time."""
    monkeypatch.setattr(torch_rows, "_BLOCK_BYTES", 1)
    hidden = torch.randn(64, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(1000, 5, dtype=dtype, requires_grad=True)
    budget_bytes = 9 * dtype.itemsize * 1000 + 17
    with _logits(weight) as logits:
        labels = torch.randint(0, 1000, (64,))
        result = linear_cross_entropy(
            *(hidden, weight, labels), vocab_size=1000, budget_bytes=budget_bytes, reduction=reduction
        )
        result.loss.sum().backward()
    assert 0.8 * budget_bytes < logits.peak_bytes <= budget_bytes + 3 * 4 * 1000


@pytest.mark.parametrize(("budget_bytes", "more"), [(1 << 20, 0), (NUM_TOKENS // 2 * 4 * 40, 1)], ids=["kept", "again"])
def test_products_that_are_made(budget_bytes: int, more: int) -> None:
    """Nothing for what is frozen; logits that fit are made once, others twice, and with a reduction once always."""
    labels = torch.randint(0, 40, (NUM_TOKENS,))
    chunks = 1 + 2 * more
    for reduction in ("none", "sum"):
        for trained, products in (((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)):
            hidden = torch.randn(NUM_TOKENS, HIDDEN, requires_grad=trained[0])
            weight = torch.randn(40, HIDDEN, requires_grad=trained[1])
            options: dict[str, Any] = {"budget_bytes": budget_bytes, "reduction": reduction}
            with _logits(weight) as logits:
                result = linear_cross_entropy(hidden, weight, labels, vocab_size=40, **options)
                if any(trained):
                    result.loss.sum().backward()
            again = more if any(trained) and reduction == "none" else 0
            assert logits.products == chunks * (products + again), (reduction, trained)
            assert (hidden.grad is not None, weight.grad is not None) == trained


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_only_ignored_tokens_and_no_tokens(reduction: Any) -> None:
    for num_tokens in (5, 0):
        for budget_bytes in (1, 1 << 20):
            hidden = torch.randn(num_tokens, HIDDEN, requires_grad=True)
            weight = torch.randn(9, HIDDEN, requires_grad=True)
            labels = torch.full((num_tokens,), -1)
            options = {"vocab_size": 9, "ignore_index": -1, "reduction": reduction, "budget_bytes": budget_bytes}
            result = linear_cross_entropy(hidden, weight, labels, **options)
            result.loss.sum().backward()
            assert torch.equal(result.nats_N, torch.zeros(num_tokens)) and not result.loss.any()
            assert hidden.grad is not None and not hidden.grad.any()
            assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("implementation", ["torch", "triton", "reference"])
@pytest.mark.parametrize("label", [9, 11, -1])
@pytest.mark.usefixtures("triton")
def test_a_label_outside_the_vocabulary_cannot_pass_unseen(label: int, implementation: str) -> None:
    hidden, weight = torch.randn(3, HIDDEN, requires_grad=True), torch.randn(12, HIDDEN, requires_grad=True)
    labels = torch.tensor([0, label, 8])
    result = linear_cross_entropy(hidden, weight, labels, vocab_size=9, implementation=implementation)
    result.loss.sum().backward()
    for found in (result.loss, result.nats_N, result.log_sum_exp_N):
        assert found.isnan().tolist() == [False, True, False]
    assert not result.correct_N[1]
    if implementation != "reference":
        assert hidden.grad is not None and hidden.grad.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("budget_bytes", [1 << 20, 4 * 90 * 8], ids=["whole", "chunks"])
def test_backward_twice_gives_the_same_gradients(budget_bytes: int, reduction: Any) -> None:
    hidden, weight = torch.randn(NUM_TOKENS, HIDDEN, requires_grad=True), torch.randn(90, HIDDEN, requires_grad=True)
    options = {"vocab_size": 90, "budget_bytes": budget_bytes, "reduction": reduction}
    loss = linear_cross_entropy(hidden, weight, random_labels(90), **options).loss.sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    third = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(second, third, strict=True))


def test_a_gradient_of_a_gradient_is_refused() -> None:
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(9, 6)
    loss = linear_cross_entropy(hidden, weight, torch.arange(4), vocab_size=9).loss.square().sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_tied_weights_get_both_gradients() -> None:
    tokens = torch.randint(0, 30, (12,))
    found = []
    for implementation in ("torch", "reference"):
        table = torch.randn(30, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        hidden = torch.nn.functional.embedding(tokens, table)
        options = {"vocab_size": 30, "implementation": implementation, "reduction": "mean"}
        linear_cross_entropy(hidden, table, tokens.roll(1), **options).loss.backward()
        found.append(table.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("budget_bytes", [1 << 20, 4 * 90 * 8], ids=["whole", "chunks"])
def test_main_grad_receives_the_weights_gradient(budget_bytes: int, reduction: Any) -> None:
    hidden, weight = torch.randn(NUM_TOKENS, HIDDEN).bfloat16(), torch.randn(96, HIDDEN).bfloat16()
    labels = random_labels(90)
    options: dict[str, Any] = {"vocab_size": 90, "budget_bytes": budget_bytes, "reduction": reduction}
    found = []
    for marks in ({}, {"grad_added_to_main_grad": False}, {"grad_added_to_main_grad": False, "zero_out_wgrad": True}):
        leaf, main_grad = weight.clone().requires_grad_(), torch.ones(96, HIDDEN)
        for name, value in marks.items():
            setattr(leaf, name, value)
        loss = linear_cross_entropy(hidden, leaf, labels, main_grad=main_grad, trainable_rows=7, **options).loss
        assert main_grad.eq(1).all()
        loss.sum().backward()
        found.append(main_grad - 1)
        assert (leaf.grad is None) == (not marks)
        if marks:
            assert leaf.grad_added_to_main_grad  # type: ignore[attr-defined]
        if "zero_out_wgrad" in marks:
            assert leaf.grad is not None and not leaf.grad.any()
    plain, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
    for leaf in (plain, exact):
        loss = linear_cross_entropy(
            hidden.to(leaf.dtype), leaf, labels, trainable_rows=7, implementation="reference", **options
        ).loss
        loss.sum().backward()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert_within_reference_error(found[0], plain.grad.float(), exact.grad, "main_grad")
    assert not found[0][:7].any() and not found[0][90:].any()


def test_integers_of_numpy_are_integers() -> None:
    arguments = torch.randn(4, 6, requires_grad=True), torch.randn(9, 6), torch.tensor([1, IGNORED, 2, IGNORED])
    whole = {"vocab_start": 0, "vocab_size": 9, "num_scored": 2, "budget_bytes": 64, "trainable_rows": 0}
    expected = linear_cross_entropy(*arguments, ignore_index=IGNORED, **whole).loss
    given = {name: np.int64(value) for name, value in whole.items()}
    assert torch.equal(linear_cross_entropy(*arguments, ignore_index=np.int64(IGNORED), **given).loss, expected)


@pytest.mark.parametrize(
    ("implementation", "budget_bytes"), [("torch", 1 << 20), ("torch", 4 * 4 * 90), ("triton", 1 << 20)], ids=str
)
@pytest.mark.usefixtures("triton")
def test_the_compiler_sees_one_node(implementation: str, budget_bytes: int) -> None:
    def function(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        options: dict[str, Any] = {"vocab_size": 90, "implementation": implementation, "budget_bytes": budget_bytes}
        options |= {"reduction": "mean"}
        return 2 * linear_cross_entropy(x, w, labels, **options).loss

    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    hidden, weight = torch.randn(9, HIDDEN, requires_grad=True), torch.randn(96, HIDDEN, requires_grad=True)
    labels = torch.arange(9) * 10
    expected = torch.autograd.grad(function(hidden, weight, labels), (hidden, weight))
    torch.compiler.reset()
    torch.compile(function, fullgraph=True, backend=backend)(hidden, weight, labels)
    named = [str(node.target) for graph in graphs for node in graph.graph.nodes if "cross_entropy" in str(node.target)]
    assert named == ["megatron_cpt.linear_cross_entropy.default"]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(hidden, weight, labels), (hidden, weight))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    ("budget_bytes", "dtype"),
    [(1 << 20, torch.float32), (4 * 90 * 4, torch.float32), (90 * 2, torch.bfloat16)],
    ids=["whole", "chunks", "wide sum"],
)
def test_the_op_keeps_the_rules_of_the_dispatcher(
    budget_bytes: int, dtype: torch.dtype, reduction: Any, monkeypatch: Any
) -> None:
    """Schema, fake results and gradients agree with what is computed."""
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(library, "run", lambda *inputs: given.append(inputs) or inputs[:4])
    hidden, weight = (torch.randn(rows, HIDDEN, dtype=dtype, requires_grad=True) for rows in (9, 96))
    labels = torch.tensor([0, 80, IGNORED, 3, 4, 5, IGNORED, 7, 89])
    options = {"vocab_size": 90, "reduction": reduction, "budget_bytes": budget_bytes}
    linear_cross_entropy(hidden, weight, labels, **options)
    tests = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(torch.ops.megatron_cpt.linear_cross_entropy, given[0], test_utils=tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_ND": torch.zeros(4, 5)}, r"expected \[N, D\]"),
        ({"labels_N": torch.zeros(3, dtype=torch.int64)}, r"expected \[N, D\]"),
        ({"weight_LD": torch.zeros(8, 6).bfloat16()}, "one floating dtype"),
        ({"labels_N": torch.zeros(4)}, "torch.int64 or torch.int32"),
        ({"vocab_size": 0}, "a vocabulary of 0 and no group"),
        ({"budget_bytes": 0}, "budget_bytes 0"),
        ({"vocab_size": 9}, "the whole table, or the group"),
        ({"vocab_start": 2}, "the whole table, or the group"),
        ({"sequence_parallel": True}, "sequence_parallel and no group"),
        ({"num_scored": 5}, "num_scored 5 for 4 tokens"),
        ({"num_scored": -1}, "num_scored -1 for 4 tokens"),
        ({"num_scored": "4"}, "num_scored '4'; expected an integer"),
        ({"weight_LD": torch.zeros(8, 6, device="meta")}, "labels on cpu, meta; expected one device"),
        ({"budget_bytes": 1e9}, "budget_bytes 1000000000.0; expected an integer"),
        ({"label_smoothing": 1.0}, "label_smoothing 1.0"),
        ({"z_loss": -0.1}, "z_loss -0.1"),
        ({"softcap": 0.0}, "softcap 0.0"),
        ({"reduction": "max"}, "reduction 'max'"),
        ({"trainable_rows": -1}, "trainable_rows -1"),
        ({"logits_dtype": torch.bfloat16}, "no narrower than the inputs'"),
        ({"logits_dtype": torch.float64}, "use torch.float32"),
        ({"logits_dtype": torch.int32}, "a floating dtype"),
        ({"token_weights_N": torch.ones(3)}, r"token weights \(3,\)"),
        ({"main_grad": torch.zeros(7, 6)}, r"main_grad \(7, 6\)"),
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
