from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_cpt.kernels import attention
from megatron_cpt.kernels.attention.documents import list_tiles
from megatron_cpt.kernels.tuning import Launch
from tests.kernels.guarded import Guard, assert_within_reference_error, guarded

LENGTHS = [1, 2, 7, 63, 0, 64, 65, 130, 0]
NAMES = "output", "query", "key", "value"

pytestmark = pytest.mark.usefixtures("triton")


def _boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _plain(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None) -> Tensor:
    """The definition, document by document, in the dtype of the tensors."""
    share = query.shape[1] // key.shape[1]
    outputs = []
    for start, stop in pairwise(accumulate(lengths, initial=0)):
        query_HSK, key_HSK, value_HSK = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        key_HSK, value_HSK = (x.repeat_interleave(share, 0) for x in (key_HSK, value_HSK))
        back = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        hidden = (back < 0) | (back > (stop if window is None else window))
        logits = (query_HSK @ key_HSK.mT * 0.3).masked_fill(hidden, -torch.inf)
        outputs.append((logits.softmax(-1) @ value_HSK).transpose(0, 1))
    return torch.cat(outputs)


def _ours(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None) -> Tensor:
    return attention(query, key, value, _boundaries(lengths), scale=0.3, window=window, implementation="triton")


def _run(function: Any, tensors: list[Tensor], lengths: list[int], window: int | None) -> list[Tensor]:
    """Returns the output and the gradients of query, key and value; the last of `tensors` is the output's."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    output = function(*leaves, lengths, window)
    return [output.detach(), *torch.autograd.grad(output, leaves, tensors[3])]


def _tensors(
    num_tokens: int, heads: int, groups: int, head_size: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Random query, key, value and gradient of the output."""
    counts = heads, groups, groups, heads
    return [torch.randn(num_tokens, count, head_size, dtype=torch.float64).to(dtype) for count in counts]


def _compare(tensors: list[Tensor], lengths: list[int], window: int | None = None) -> list[Tensor]:
    guards = [guarded(x) for x in tensors]
    values = [guard.value for guard in guards]
    got = _run(_ours, values, lengths, window)
    for guard in guards:
        guard.check()
    plain = _run(_plain, tensors, lengths, window)
    exact = _run(_plain, [x.double() for x in tensors], lengths, window)
    for name, ours, native, truth in zip(NAMES, got, plain, exact, strict=True):
        assert ours.dtype == tensors[0].dtype, name
        assert_within_reference_error(ours, native, truth, name)
    return got


@pytest.mark.parametrize(
    ("heads", "groups", "dtype"),
    [(2, 2, torch.float32), (4, 1, torch.bfloat16), (1, 1, torch.float16)],
    ids=["fp32", "bf16", "fp16"],
)
def test_values_and_gradients(heads: int, groups: int, dtype: torch.dtype, allocations: list[Guard]) -> None:
    _compare(_tensors(sum(LENGTHS), heads, groups, 16, dtype), LENGTHS)
    assert allocations


@pytest.mark.parametrize("window", [1, 20, 64])
@pytest.mark.usefixtures("allocations", "small_blocks")
def test_a_sliding_window(window: int) -> None:
    lengths = [1, 7, 64, 107]
    _compare(_tensors(sum(lengths), 1, 1, 16, torch.bfloat16), lengths, window)


@pytest.mark.usefixtures("allocations", "small_blocks")
def test_a_window_that_reaches_over_all_is_none() -> None:
    lengths = [3, 37]
    tensors = _tensors(40, 1, 1, 16)
    whole, got = (_run(_ours, tensors, lengths, window) for window in (None, np.int32(2**31 - 1)))
    assert all(torch.equal(one, other) for one, other in zip(got, whole, strict=True))


def test_a_window_of_none_before_leaves_each_token_its_own_value() -> None:
    query, key, value, _ = _tensors(40, 2, 1, 16)
    assert torch.equal(_ours(query, key, value, [7, 33], 0), value.repeat_interleave(2, 1))


@pytest.mark.parametrize("head_size", [1, 20, 64, 96, 128, 256])
@pytest.mark.usefixtures("allocations")
def test_head_sizes(head_size: int) -> None:
    _compare(_tensors(150, 2, 1, head_size, torch.bfloat16), [20, 130])


@pytest.mark.usefixtures("allocations")
def test_eight_heads_that_share_keys_among_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_cpt.kernels.attention import triton_attention

    tensors = _tensors(70, 8, 1, 16, torch.bfloat16)
    by_one = _compare(tensors, [30, 40])
    monkeypatch.setattr(triton_attention, "multiprocessor_count", lambda device_type: 4)
    assert triton_attention._slots(2, 8, "cpu") == 4 and triton_attention._slots(2, 3, "cpu") == 3
    by_several = _compare(tensors, [30, 40])
    assert all(torch.equal(one, other) for one, other in zip(by_one[:2], by_several[:2], strict=True))


@pytest.fixture
def small_blocks() -> Any:
    """Has all kernels take tiles of other sizes than the rule's, so that ranges of blocks end in all ways."""
    from megatron_cpt.kernels.attention import triton_settings as settings

    blocks = Launch(4, 2, {"BLOCK_QUERIES": 32, "BLOCK_KEYS": 16})
    with (
        settings.FORWARD.using(blocks),
        settings.QUERY_GRADIENT.using(blocks),
        settings.KEY_VALUE_GRADIENT.using(blocks),
    ):
        yield


@pytest.mark.usefixtures("allocations", "small_blocks")
def test_documents_of_every_length_around_a_block() -> None:
    lengths = [1, 2, *range(14, 19), *range(31, 34), 47, 48, 49]
    _compare(_tensors(sum(lengths), 1, 1, 16, torch.bfloat16), lengths)


@pytest.mark.usefixtures("allocations")
def test_strides() -> None:
    lengths = [20, 70]
    packed = torch.randn(90, 6 * 16, dtype=torch.float64).bfloat16()
    query, key, value = (x.unflatten(1, (-1, 16)) for x in packed.split([64, 16, 16], 1))
    grad = torch.randn(4, 90, 16, dtype=torch.float64).bfloat16().transpose(0, 1)
    _compare([query, key, value, grad], lengths)  # views of one tensor, as of a projection
    every_other = torch.randn(90, 4, 32, dtype=torch.float64).bfloat16()[..., ::2]
    _compare([every_other, key, value, grad], lengths)
    unaligned = torch.randn(90, 4, 17, dtype=torch.float64).bfloat16()[..., 1:]
    _compare([unaligned, key, value, grad], lengths)
    expanded = grad[:1, :1].expand(90, 4, 16)
    of_view, of_copy = (_run(_ours, [query, key, value, x], lengths, None) for x in (expanded, expanded.clone()))
    assert all(torch.equal(one, other) for one, other in zip(of_view, of_copy, strict=True))


@pytest.mark.parametrize(("damaged", "damage"), [(0, torch.nan), (1, 3.0), (2, torch.inf), (3, torch.nan)])
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.filterwarnings("ignore:.*NaN:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_no_bit_depends_on_another_document_or_differs_between_runs(damaged: int, damage: float) -> None:
    lengths = [20, 5, 33, 1]
    tensors = _tensors(59, 1, 1, 16, torch.bfloat16)
    clean, again = (_run(_ours, tensors, lengths, None) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(clean, again, strict=True))
    begin = sum(lengths[:damaged])
    end = begin + lengths[damaged]
    for tensor in tensors:
        tensor[begin:end] = damage
    others = torch.tensor([*range(begin), *range(end, 59)])
    for name, before, after in zip(NAMES, clean, _run(_ours, tensors, lengths, None), strict=True):
        assert torch.equal(before[others], after[others]), name
        assert not torch.equal(before[begin:end], after[begin:end]) or lengths[damaged] == 1, name


def test_a_document_has_the_bits_it_has_alone() -> None:
    tensors = _tensors(200, 2, 1, 16, torch.bfloat16)
    together = _run(_ours, tensors, [3, 130, 67], None)
    for begin, end in ((0, 3), (3, 133), (133, 200)):
        alone = _run(_ours, [x[begin:end].clone() for x in tensors], [end - begin], None)
        assert all(torch.equal(one[begin:end], other) for one, other in zip(together, alone, strict=True))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # of what a mask then drops
def test_large_logits_do_not_overflow() -> None:
    query, key, value, grad = _tensors(70, 1, 1, 16)
    for name, result in zip(NAMES, _run(_ours, [query * 1e3, key * 1e3, value, grad], [3, 67], None), strict=True):
        assert torch.isfinite(result).all(), name


def test_no_tokens() -> None:
    assert all(x.numel() == 0 for x in _run(_ours, _tensors(0, 2, 1, 16), [0, 0], None))


def test_only_wanted_gradients_and_a_second_backward() -> None:
    query, key, value, grad = _tensors(30, 2, 1, 16)
    query.requires_grad_()
    output = _ours(query, key, value, [30], None)
    first, second = (torch.autograd.grad(output, query, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with torch.inference_mode():
        assert torch.equal(_ours(query, key, value, [30], None), output)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_sees_one_node() -> None:
    graphs: list[Any] = []

    def keep(module: Any, _: Any) -> Any:
        graphs.append(module.graph)
        return module

    def called(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, boundaries, scale=0.3, implementation="triton")

    boundaries = _boundaries([10, 20])
    *inputs, grad = _tensors(30, 2, 1, 16)
    torch.compiler.reset()
    torch.compile(called, fullgraph=True, backend=keep)(*inputs)
    own = [str(node.target) for node in graphs[0].nodes if str(node.target).startswith("megatron_cpt")]
    assert len(graphs) == 1 and own == ["megatron_cpt.attention.default"]
    torch.compiler.reset()
    leaves = [x.requires_grad_() for x in inputs]
    compiled = torch.compile(called, fullgraph=True, backend="aot_eager")
    expected, got = (torch.autograd.grad(function(*leaves), leaves, grad) for function in (called, compiled))
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))


def test_the_op_keeps_the_rules_of_the_dispatcher() -> None:
    query, key, value, _ = _tensors(20, 2, 1, 16)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    tests = "test_schema", "test_autograd_registration", "test_faketensor"
    arguments = *leaves, _boundaries([8, 12]), 0.3, None
    _ours(*leaves, [20], None)  # registers it
    torch.library.opcheck(torch.ops.megatron_cpt.attention, arguments, test_utils=tests)


def test_tiles_cover_every_document_once_and_the_longest_work_comes_first() -> None:
    boundaries = (0, 5, 5, 40, 41, 100)
    parts = (16, range(2, 101)), (16, range(2))
    tiles, short = list_tiles(boundaries, parts, None, False, torch.device("cpu"))
    assert tiles.data_ptr() % 16 == short.data_ptr() % 16 == 0
    assert sorted(map(tuple, tiles.tolist())) == [
        (0, 0, 5),
        *((first, 5, 40) for first in (5, 21, 37)),
        *((first, 41, 100) for first in (41, 57, 73, 89)),
    ]
    assert tiles[0].tolist() == [89, 41, 100] and tiles[-1].tolist() == [0, 0, 5]
    of_keys, _ = list_tiles(boundaries, parts, None, True, torch.device("cpu"))
    assert of_keys[0].tolist() == [41, 41, 100] and of_keys[-1].tolist() == [37, 5, 40]
    assert short.tolist() == [[40, 40, 41]] and short.dtype == torch.int32
