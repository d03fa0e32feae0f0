from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cpt.kernels import attention

DOCUMENTS = {
    "one": [37],
    "ragged": [0, 1, 2, 3, 40, 17, 1, 0, 90],
    "equal": [16, 16, 16, 16],
    "long_and_short": [3, 130, 1, 64, 2, 100],
}


def _boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _mask(lengths: list[int], window: int | None = None) -> Tensor:
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = torch.ones(len(document), len(document)).tril().bool()
    if window is not None:
        seen &= ~seen.tril(-window - 1)
    return (document[:, None] == document[None, :]) & seen


def _native(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
    """One dense masked call of torch over all documents."""
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    out = scaled_dot_product_attention(*heads_first, attn_mask=_mask(lengths), scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _truth(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
    """The definition, head by head."""
    share = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        logits = scale * query[:, head] @ key[:, head // share].T
        weights = logits.masked_fill(~_mask(lengths), -torch.inf).softmax(-1)
        heads.append(weights @ value[:, head // share])
    return torch.stack(heads, 1)


def _ours(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
    return attention(query, key, value, _boundaries(lengths), scale=scale)


def _run(function: Any, inputs: list[Tensor], grad: Tensor, lengths: list[int], scale: float) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, lengths, scale)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def _inputs(num_tokens: int, heads: int = 2, groups: int = 1, head_size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(num_tokens, count, head_size) for count in (heads, groups, groups))
    return query, key, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "groups", "head_size"), [(6, 2, 16), (3, 3, 5), (4, 1, 8)])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_values_and_gradients(
    lengths: list[int],
    heads: int,
    groups: int,
    head_size: int,
    dtype: torch.dtype,
    assert_accurate: Any,
    poisoned: Any,
) -> None:
    num_tokens = sum(lengths)
    inputs = [poisoned(num_tokens, count, head_size, dtype=dtype) for count in (heads, groups, groups)]
    grad = poisoned(num_tokens, heads, head_size, dtype=dtype)
    got = _run(_ours, inputs, grad, lengths, 0.3)
    native = _run(_native, inputs, grad, lengths, 0.3)
    truth = _run(_truth, [x.double() for x in inputs], grad.double(), lengths, 0.3)
    assert [x.dtype for x in got] == [dtype] * 4
    for what, *values in zip(("output", "query", "key", "value"), got, native, truth, strict=True):
        assert_accurate(what, *values)


def test_a_document_of_nan_stays_alone() -> None:
    lengths = [30, 25, 28, 3]
    inputs = [x.requires_grad_() for x in _inputs(86)]
    clean = attention(*inputs, _boundaries(lengths), scale=0.3)
    damaged = [x.detach().clone() for x in inputs]
    for tensor in damaged:
        tensor[30:55] = torch.nan
        tensor.requires_grad_()
    out = attention(*damaged, _boundaries(lengths), scale=0.3)
    others = torch.tensor([*range(30), *range(55, 86)])
    assert torch.equal(out[others], clean[others])
    out[others].sum().backward()
    clean[others].sum().backward()
    for one, other in zip(damaged, inputs, strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad[others], other.grad[others])


@pytest.mark.parametrize("window", [0, 1, 20, 300, 699, 700])
def test_a_sliding_window(window: int, assert_accurate: Any) -> None:
    lengths = [3, 700, 1, 64, 690]
    inputs = [x.requires_grad_() for x in _inputs(sum(lengths), heads=2, head_size=4)]
    grad = torch.randn_like(inputs[0])
    got = attention(*inputs, _boundaries(lengths), scale=0.3, window=window)
    results = [(got, *torch.autograd.grad(got, inputs, grad))]
    for dtype in (torch.float32, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in leaves)
        mask = _mask(lengths, window)
        out = scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=0.3, enable_gqa=True)[0].transpose(0, 1)
        results.append((out, *torch.autograd.grad(out, leaves, grad.to(dtype))))
    for what, *values in zip(("output", "query", "key", "value"), *results, strict=True):
        assert_accurate(what, *(x.detach() for x in values))


class _Calls(TorchDispatchMode):
    """Counts the attention calls and gathers, and notes the head counts of the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.key_heads: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count["attention" if "scaled_dot_product" in name else name] += 1
        if "scaled_dot_product" in name:
            self.key_heads.add(args[1].shape[1])
        return func(*args, **(kwargs or {}))


def test_hundreds_of_short_documents_cost_a_handful_of_calls_and_repeat_no_keys() -> None:
    lengths = torch.randint(1, 200, (300,)).tolist()
    inputs = _inputs(sum(lengths), heads=6, groups=2, head_size=4)
    with _Calls() as calls:
        attention(*inputs, _boundaries(lengths), scale=0.3)
    assert 1 <= calls.count["attention"] <= 8
    assert calls.key_heads == {2}
    assert calls.count["index_select"] == 4


def test_whole_equal_documents_are_one_call_without_gathering() -> None:
    inputs = _inputs(96)
    with _Calls() as calls:
        attention(*inputs, _boundaries([24, 24, 0, 24, 24, 0]), scale=0.3)
    assert calls.count["attention"] == 1 and calls.count["index_select"] == 0


def test_boundaries_of_any_integer_kind() -> None:
    inputs = _inputs(10)
    expected = attention(*inputs, torch.tensor([0, 4, 10]), scale=0.3)
    for boundaries in (np.array([0, 4, 10], dtype=np.int32), torch.tensor([0, 4, 4, 10, 10], dtype=torch.int32)):
        assert torch.equal(attention(*inputs, boundaries, scale=0.3), expected)


def test_evaluation_before_training_on_the_same_boundaries() -> None:
    inputs = [x.requires_grad_() for x in _inputs(11)]
    with torch.inference_mode():
        before = attention(*inputs, _boundaries([2, 9]), scale=0.3)
    out = attention(*inputs, _boundaries([2, 9]), scale=0.3)
    out.sum().backward()
    assert torch.equal(before, out)


def test_gradients_against_finite_differences() -> None:
    inputs = [x.double().requires_grad_() for x in _inputs(7, head_size=3)]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, _boundaries([4, 1, 2]), scale=0.5), inputs)


def test_no_tokens() -> None:
    assert attention(*_inputs(0), torch.tensor([0]), scale=1.0).shape == (0, 2, 8)


@pytest.mark.parametrize(
    ("boundaries", "told"),
    [
        ([0, 9], "from 0 to 9 for 10 tokens"),
        ([1, 10], "from 1 to 10 for 10 tokens"),
        ([0, 6, 4, 10], "with 4 after 6"),
        ([], r"\[\]; expected integers"),
        ([0.0, 10.0], r"\[0.0, 10.0\]; expected integers"),
    ],
    ids=str,
)
def test_boundaries_that_do_not_fit_are_refused(boundaries: list[float], told: str) -> None:
    with pytest.raises(ValueError, match=f"got cu_seqlens {told}"):
        attention(*_inputs(10), torch.tensor(boundaries), scale=1.0)


def test_numbers_out_of_their_range_are_refused() -> None:
    query, key, value = _inputs(10)
    boundaries = torch.tensor([0, 10])
    for scale in (0.0, -1.0, torch.nan):
        with pytest.raises(ValueError, match="got scale"):
            attention(query, key, value, boundaries, scale=scale)
    for window in (-1, 2.5):
        with pytest.raises(ValueError, match=f"got window {window}"):
            attention(query, key, value, boundaries, scale=1.0, window=window)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got cu_seqlens as list; .*give torch.tensor"):
        attention(query, key, value, [0, 10], scale=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected one dtype"):
        attention(query, key.double(), value, boundaries, scale=1.0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, key, value = _inputs(10, heads=3, groups=2)
    with pytest.raises(ValueError, match="G must divide H"):
        attention(query, key, value, torch.tensor([0, 10]), scale=1.0)
    with pytest.raises(ValueError, match=r"twice \[N, G, K\]"):
        attention(query, key, value[:5], torch.tensor([0, 10]), scale=1.0)
